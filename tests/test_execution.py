"""Threads that encode segments side by side: same results, one core each, nothing changed for other threads."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hear_encoders import AxLSTMConfig, Embedder, build_encoder, execution
from hear_encoders.execution import Execution, call_on_one_core, encode_in_threads


@pytest.fixture
def torch_threads():
    """torch_threads(n) sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads_asked_for(monkeypatch) -> list[tuple[int, int]]:
    """(segments, threads) of every forward pass."""
    asked = []

    def counted(encode, frames: Tensor, threads: int) -> Tensor:
        asked.append((len(frames), threads))
        return encode_in_threads(encode, frames, threads)

    monkeypatch.setattr(execution, "encode_in_threads", counted)
    return asked


@pytest.mark.parametrize("clips", [1, 2, 3, 7])
@pytest.mark.parametrize("threads", [2, 3])
def test_results_are_those_of_one_thread(small_encoder, noise, torch_threads, threads, clips):
    audio, model = noise(clips, 48_000), Embedder(small_encoder)  # a full segment and half a segment per clip
    expected, times = model.timestamp_embeddings(audio)
    torch_threads(threads)
    embeddings, same_times = model.timestamp_embeddings(audio)
    torch.testing.assert_close(embeddings, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(times, same_times)


def test_every_thread_gets_equally_many_segments_and_the_remainder_is_encoded_separately(
    small_embedder, noise, torch_threads, threads_asked_for
):
    torch_threads(2)
    small_embedder(max_segments=5).scene_embeddings(noise(11, 32_000))
    assert threads_asked_for == [(4, 2), (4, 2), (2, 2), (1, 1)]


def test_fewer_segments_than_threads_are_not_split(small_embedder, noise, torch_threads, threads_asked_for):
    torch_threads(4)
    small_embedder().scene_embeddings(noise(3, 32_000))
    small_embedder(max_segments=2).scene_embeddings(noise(4, 32_000))  # nor are more encoded at once than max_segments
    assert threads_asked_for == [(3, 1), (2, 1), (2, 1)]


@pytest.mark.filterwarnings("ignore:precision=.*takes several times as long:UserWarning")
@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"compile": True}])
def test_half_precision_and_compiled_encoders_stay_in_the_calling_thread(
    small_embedder, noise, torch_threads, threads_asked_for, options
):
    torch_threads(2)
    model = small_embedder(**options)
    model.execution._compiled = (model.encoder, model.encoder)  # the plain encoder stands in for the compiled one
    model.scene_embeddings(noise(4, 32_000))
    assert threads_asked_for == [(4, 1)]


@pytest.mark.parametrize("kind", ["audiomaepp", "axlstm"])
def test_a_flop_counter_sees_a_single_thread_completely(small_embedder, noise, torch_threads, kind):
    torch_threads(1)
    model, counted = small_embedder(kind), []
    model.scene_embeddings(noise(2, 32_000))  # folds an AxLSTM's weights, which also takes matmuls
    for clips in (2, 4):
        with FlopCounterMode(display=False) as counter:
            model.scene_embeddings(noise(clips, 32_000))
        counted.append(counter.get_total_flops())
    assert counted[1] == 2 * counted[0] > 1e6


def test_threads_use_one_core_each_and_other_threads_keep_their_number(torch_threads):
    torch_threads(3)
    here, together, seen = threading.current_thread(), threading.Barrier(3), []

    def encode(part: Tensor) -> Tensor:
        together.wait(30)  # none ends before all have begun
        seen.append((len(part), threading.current_thread() is here, torch.get_num_threads(), torch.is_grad_enabled()))
        return part + 1

    rows = torch.arange(6.0)
    assert torch.equal(encode_in_threads(encode, rows, 3), rows + 1)
    assert seen == 3 * [(2, False, 1, False)]
    assert torch.get_num_threads() == 3
    begun_with = []
    thread = threading.Thread(target=lambda: begun_with.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert begun_with == [3]


def test_a_changed_number_of_threads_takes_effect(torch_threads):
    for threads in (2, 4, 2):
        torch_threads(threads)
        together = threading.Barrier(threads)

        def encode(part: Tensor, together: threading.Barrier = together) -> Tensor:
            together.wait(30)
            return part

        assert len(encode_in_threads(encode, torch.zeros(8), threads)) == 8


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_reaches_the_threads(torch_threads, inference):
    torch_threads(2)
    seen = []
    with torch.inference_mode(inference):
        encode_in_threads(lambda part: (seen.append(torch.is_inference_mode_enabled()), part)[1], torch.zeros(2), 2)
    assert seen == [inference, inference]


def test_an_error_in_a_thread_is_raised_and_the_next_call_works(torch_threads):
    torch_threads(2)

    def encode(part: Tensor) -> Tensor:
        if part[-1] == 3:
            raise ValueError("in the last part")
        return part

    with pytest.raises(ValueError, match="in the last part"):
        encode_in_threads(encode, torch.arange(4.0), 2)
    assert len(encode_in_threads(encode, torch.zeros(4), 2)) == 4


def test_if_threads_cannot_be_started_the_caller_encodes_and_no_thread_is_left_waiting(torch_threads, monkeypatch):
    torch_threads(5)
    before, start, started = threading.active_count(), threading.Thread.start, []

    def start_some(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    parts = []
    assert len(encode_in_threads(lambda part: parts.append(len(part)) or part, torch.zeros(5), 5)) == 5
    assert parts == [5]
    for thread in started:
        thread.join(30)
    assert threading.active_count() <= before
    assert torch.get_num_threads() == 5


AFTER_THE_END = """
import atexit, sys, threading, time
import torch
from hear_encoders.execution import encode_in_threads

torch.set_num_threads(2)

def encode(part):
    return part + 1

def embed():
    time.sleep(0.5)  # the main thread ends meanwhile
    print(encode_in_threads(encode, torch.zeros(4), 2).tolist())

if sys.argv[2] == "warm":
    encode_in_threads(encode, torch.zeros(4), 2)
atexit.register(embed) if sys.argv[1] == "atexit" else threading.Thread(target=embed).start()
"""


@pytest.mark.parametrize("state", ["warm", "cold"])
@pytest.mark.parametrize("where", ["atexit", "thread"])
def test_embedding_works_after_the_main_thread_has_ended(where, state):
    program = [sys.executable, "-c", AFTER_THE_END, where, state]
    result = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[1.0, 1.0, 1.0, 1.0]\n", "")


def test_a_callers_own_number_of_threads_stays(torch_threads):
    torch_threads(4)
    own, others = [], []

    def call() -> None:
        torch.get_num_threads()
        barrier = threading.Barrier(2)
        encode_in_threads(lambda part: (barrier.wait(30), part)[1], torch.zeros(2), 2)
        own.append(torch.get_num_threads())

    for target in (call, lambda: others.append(torch.get_num_threads())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join(60)
    assert (own, others) == ([4], [4])


def _in_a_fork(results: multiprocessing.SimpleQueue) -> None:
    results.put(encode_in_threads(lambda part: part + 1, torch.zeros(2), 2).tolist())
    results.put(call_on_one_core(torch.get_num_threads))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_its_own_threads(torch_threads):
    torch_threads(2)
    encode_in_threads(lambda part: part, torch.zeros(2), 2)  # starts those of this process
    call_on_one_core(int)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_in_a_fork, args=(results,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert results.get() == [1, 1]
    assert results.get() == 1


def test_callers_of_one_core_run_side_by_side_and_nothing_is_changed(torch_threads):
    torch_threads(3)
    together, seen = threading.Barrier(2), []

    def work() -> int:
        together.wait(30)  # would break if the callers waited for each other
        return torch.get_num_threads()

    callers = [threading.Thread(target=lambda: seen.append(call_on_one_core(work))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert seen == [1, 1]
    workers = [call_on_one_core(threading.current_thread) for _ in range(2)]
    assert workers[0] is workers[1] is not threading.current_thread()
    assert call_on_one_core(lambda: call_on_one_core(threading.current_thread)) is workers[0]  # no deadlock
    with pytest.raises(ZeroDivisionError):
        call_on_one_core(lambda: 1 // 0)
    assert torch.get_num_threads() == 3
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]
    torch_threads(1)
    assert call_on_one_core(threading.current_thread) is threading.current_thread()


def test_threads_of_callers_that_ended_end_too(torch_threads):
    torch_threads(2)
    call_on_one_core(int)
    before = threading.active_count()
    for _ in range(3):
        caller = threading.Thread(target=lambda: call_on_one_core(int))
        caller.start()
        caller.join()
    gc.collect()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 30])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_batches_keep_the_order_and_the_limit(monkeypatch, count, most, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    encoder = build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1))
    batches = list(Execution("auto", most, compile=False).batches(list(range(count)), encoder))
    assert list(itertools.chain(*batches)) == list(range(count))
    assert all(1 <= len(indices) <= most for indices in batches)
    if most >= threads:  # every segment that can run side by side does
        assert sum(len(indices) for indices in batches if len(indices) % threads) == count % threads
