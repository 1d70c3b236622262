"""Exact framing, as properties; options; bad input."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from hear_encoders import AxLSTMConfig, Embedder, PatchConfig, TransformerConfig, build_encoder
from hear_encoders.checks import check_audio
from hear_encoders.execution import resolve_precision

STATISTICS = (-6.0, 3.5)
KINDS = ["audiomaepp", "axlstm"]
LENGTHS = [1, 100, 201, 239, 240, 480, 879, 880, 1519, 1520, 16000, 31999, 32000, 32240, 32241, 70001]


@pytest.mark.parametrize("samples", LENGTHS)
def test_steps_are_40_ms_apart_from_15_ms_and_lie_within_the_clip(small_embedder, noise, samples):
    embeddings, timestamps = small_embedder().timestamp_embeddings(noise(2, samples))
    steps = max(1, math.floor((samples / 16 - 15) / 40) + 1)
    assert embeddings.shape == (2, steps, 240) and timestamps.shape == (2, steps)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    assert embeddings.isfinite().all()
    assert timestamps.tolist() == [[40 * i + 15 for i in range(steps)]] * 2


@pytest.mark.parametrize(("frames", "first", "spacing"), [(4, 15, 40), (8, 35, 80), (2, 5, 20)])
def test_steps_stand_at_the_center_of_their_frames_for_other_patch_sizes(noise, frames, first, spacing):
    config = AxLSTMConfig("axlstm", dim=48, depth=1, patches=PatchConfig(patch_frames=frames, patch_bands=16))
    _, timestamps = Embedder(build_encoder(config, seed=0)).timestamp_embeddings(noise(1, 48000))
    assert timestamps[0].tolist() == [first + spacing * i for i in range(int((3000 - first) // spacing) + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 5000, 32000, 80001])
def test_scene_embedding_is_the_mean_over_steps(small_embedder, noise, kind, samples):
    embedder, audio = small_embedder(kind, max_segments=2), noise(3, samples)
    steps, _ = embedder.timestamp_embeddings(audio)
    torch.testing.assert_close(embedder.scene_embeddings(audio), steps.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framing", ["exact", "reference"])
@pytest.mark.parametrize("samples", [1, 5000, 32000, 80001])
def test_a_deviation_over_steps_comes_after_their_mean_if_asked_for(small_embedder, noise, framing, samples):
    options = {"max_segments": 2, "framing": framing}
    embedder, audio = small_embedder("axlstm", pooling="mean_std", **options), 3 * noise(3, samples)
    steps, _ = embedder.timestamp_embeddings(audio)
    scenes = embedder.scene_embeddings(audio)
    assert scenes.shape == (3, embedder.scene_embedding_size) == (3, 2 * embedder.timestamp_embedding_size)
    mean, deviation = scenes.chunk(2, dim=1)
    torch.testing.assert_close(mean, small_embedder("axlstm", **options).scene_embeddings(audio), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation, steps.double().std(1, correction=0).float(), rtol=1e-4, atol=1e-5)
    if framing == "exact":
        in_blocks, _ = embedder.embed_blocks(lambda: audio[0].split(3000))
        torch.testing.assert_close(in_blocks, scenes[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("click_ms", [1000, 2400, 3333])
@pytest.mark.parametrize("kind", KINDS)
def test_a_click_moves_the_embedding_at_its_own_time(small_embedder, noise, kind, click_ms):
    quiet = 0.01 * noise(1, 70000)
    clicked = quiet.clone()
    clicked[0, 16 * click_ms : 16 * click_ms + 32] += 0.5
    embedder = small_embedder(kind, statistics=STATISTICS)
    before, timestamps = embedder.timestamp_embeddings(quiet)
    after, _ = embedder.timestamp_embeddings(clicked)
    moved = (after - before).norm(dim=-1)[0]
    segment = (timestamps[0] // 2000).int()
    nearest = (timestamps[0] - click_ms).abs().argmin()
    assert (timestamps[0][moved.argmax()] - click_ms).abs() <= 40
    assert moved[nearest] > 0.3
    assert moved[segment != segment[nearest]].max() < 1e-4  # segments are independent


@pytest.mark.parametrize("click_ms", [1000, 2400, 3333])
def test_a_click_moves_nothing_before_the_stft_window_reaches_it_without_flip(small_embedder, noise, click_ms):
    quiet = 0.01 * noise(1, 70000)
    clicked = quiet.clone()
    clicked[0, 16 * click_ms : 16 * click_ms + 32] += 0.5
    embedder = small_embedder("axlstm", statistics=STATISTICS)
    before, timestamps = embedder.timestamp_embeddings(quiet)
    after, _ = embedder.timestamp_embeddings(clicked)
    moved = (after - before).abs().amax(-1)[0]
    # Step i ends with frame 4i + 3, 15 ms after its timestamp, whose window reaches 12.5 ms further.
    untouched = timestamps[0] + 15 + 12.5 <= click_ms
    assert moved[untouched].max() < 1e-5
    assert moved[~untouched][0] > 1e-3


@pytest.mark.parametrize("given", [None, STATISTICS])
def test_batched_equals_single(small_encoder, noise, given):
    embedder, audio = Embedder(small_encoder, statistics=given), noise(5, 50000)
    audio[1] *= 0.01
    audio[2] = 0
    batched, _ = embedder.timestamp_embeddings(audio)
    for clip, embedding in zip(audio, batched):
        single, _ = embedder.timestamp_embeddings(clip[None])
        torch.testing.assert_close(single[0], embedding, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embedder.scene_embeddings(clip)[0], embedding.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("samples", "complete"), [(70000, 2), (64041, 2), (64000, 1), (32041, 1)])
def test_a_clip_equals_itself_with_samples_appended_up_to_the_last_complete_segment(
    small_encoder, noise, samples, complete
):
    """A segment is complete if its last frame's window, 40 samples past the segment, lies within the clip."""
    embedder = Embedder(small_encoder, statistics=STATISTICS)
    longer = torch.cat([noise(1, samples), noise(1, 41234, seed=1)], dim=1)
    short, _ = embedder.timestamp_embeddings(longer[:, :samples])
    long, _ = embedder.timestamp_embeddings(longer)
    steps = 50 * complete
    torch.testing.assert_close(long[:, :steps], short[:, :steps], rtol=1e-4, atol=1e-5)
    if short.shape[1] > steps:
        assert (long[:, steps : short.shape[1]] - short[:, steps:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_callers_autocast_does_not_leak_in(small_encoder, noise, dtype):
    audio = 100 * noise(1, 20000)
    embedder = Embedder(small_encoder, precision="float32")
    with pytest.warns(UserWarning, match="peaks at"):
        expected = embedder.scene_embeddings(audio)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(embedder.scene_embeddings(audio), expected)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_weights_of_another_dtype_are_refused_with_a_hint(small_embedder, noise, convert):
    with pytest.raises(ValueError, match=r"keep them float32, and choose half with precision="):
        convert(small_embedder()).scene_embeddings(noise(1, 4000))


def test_an_encoder_of_other_bands_is_refused():
    encoder = build_encoder(TransformerConfig("mae", dim=48, depth=1, heads=3, patches=PatchConfig(bands=64)), seed=0)
    with pytest.raises(ValueError, match=r"patches\.bands must be 80, as many as the front end makes, got 64"):
        Embedder(encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_another_default_dtype_of_torch_changes_nothing(small_embedder, noise, kind):
    embedder, audio = small_embedder(kind), noise(1, 20000)
    expected = embedder.scene_embeddings(audio)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(embedder.scene_embeddings(audio), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_padding_enters_the_encoder(small_embedder, noise):
    embedder = small_embedder()
    lengths = [segment.frames.shape[0] for segment in embedder._segments(noise(1, 70001))]
    assert lengths == [200, 200, 40]  # 438 frames; the 110th step lacks two


@pytest.mark.parametrize("audio", [torch.zeros(2, 40000), torch.full((2, 40000), 0.5), torch.zeros(1, 10)])
def test_silence_and_dc_give_finite_embeddings(small_encoder, audio):
    embedder = Embedder(small_encoder)
    embeddings, _ = embedder.timestamp_embeddings(audio)
    assert embeddings.isfinite().all() and embedder.scene_embeddings(audio).isfinite().all()


def test_own_statistics_given_explicitly_change_nothing(small_embedder, noise):
    audio = noise(1, 40000)
    logmel = small_embedder().log_mel(audio)
    given = small_embedder(statistics=[logmel.mean().item(), logmel.std().item()])
    torch.testing.assert_close(
        given.scene_embeddings(audio), small_embedder().scene_embeddings(audio), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_of_audio_are_taken(small_embedder, noise, dtype):
    audio = noise(1, 20000).to(dtype)
    scene = small_embedder().scene_embeddings(audio)
    assert scene.dtype == torch.float32
    torch.testing.assert_close(scene, small_embedder().scene_embeddings(audio.float()))


def test_a_single_clip_without_batch_dimension_is_a_batch_of_one(small_embedder, noise):
    clip = noise(1, 20000)
    assert torch.equal(small_embedder().scene_embeddings(clip[0]), small_embedder().scene_embeddings(clip))
    assert small_embedder().timestamp_embeddings(clip[0])[0].shape == (1, 31, 240)


def test_non_contiguous_audio_and_audio_with_gradient_are_taken(small_embedder, noise):
    audio = noise(20000, 2).T.requires_grad_()
    expected = small_embedder().scene_embeddings(audio.detach().contiguous())
    torch.testing.assert_close(small_embedder().scene_embeddings(audio), expected)


def test_results_can_be_trained_on(small_embedder, noise):
    scene = small_embedder().scene_embeddings(noise(2, 20000))
    head = torch.nn.Linear(240, 3)
    head(scene).sum().backward()  # would raise for an inference tensor
    assert head.weight.grad is not None


@pytest.mark.filterwarnings("ignore:precision=.*takes several times as long:UserWarning")
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01), ("float32", 1e-6)])
def test_precision_changes_results_only_by_rounding(small_encoder, noise, precision, tolerance):
    audio = noise(2, 40000)
    expected = Embedder(small_encoder, precision="float32").scene_embeddings(audio)
    actual = Embedder(small_encoder, precision=precision).scene_embeddings(audio)
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance and (error > 0 or precision == "float32")


@pytest.mark.parametrize(
    ("machine", "capability", "precision", "warns"),
    [
        ("x86_64", "AVX2", "bfloat16", True),
        ("AMD64", "DEFAULT", "float16", True),
        ("x86_64", "AVX512", "bfloat16", False),
        ("aarch64", "DEFAULT", "bfloat16", False),
        ("x86_64", "AVX2", "float32", False),
        ("x86_64", "AVX2", "auto", False),
    ],
)
def test_half_precision_on_a_cpu_without_instructions_for_it_warns(
    small_embedder, noise, monkeypatch, machine, capability, precision, warns
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = small_embedder(precision=precision)
    for embed in (lambda: model.scene_embeddings(noise(1, 800)), lambda: model.embed_blocks(lambda: noise(1, 800))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            embed()
        assert ["CPU without AVX-512" in str(warning.message) for warning in caught] == ([True] if warns else [])


def test_auto_precision_is_float32_on_the_cpu():
    assert resolve_precision("auto", torch.device("cpu")) is torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framing": "loose"}, "framing must be one of 'exact', 'reference'; got 'loose'"),
        ({"precision": "int8"}, "precision must be one of 'auto', 'float32', 'bfloat16', 'float16'; got 'int8'"),
        ({"max_segments": 0}, "max_segments must be an integer of at least 1, got 0"),
        ({"max_segments": 2.5}, "max_segments must be an integer of at least 1, got 2.5"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'mean_std'; got 'max'"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"statistics": [1.0]}, r"statistics must be \[mean, standard deviation\], .* got \[1.0\]"),
        ({"statistics": [0.0, 0.0]}, r"the latter above 0; got \[0.0, 0.0\]"),
        ({"statistics": [float("nan"), 1.0]}, r"the latter above 0; got \[nan, 1.0\]"),
        ({"statistics": "12"}, "the latter above 0; got '12'"),
    ],
)
def test_impossible_options_are_refused(small_embedder, options, message):
    with pytest.raises(ValueError, match=message):
        small_embedder(**options)


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        ([[0.1, 0.2], [0.3]], TypeError, "must be a torch.Tensor of shape .clips, samples., got list"),
        (torch.zeros(2, 100).numpy(), TypeError, "got ndarray"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(2, 100, dtype=torch.int16), TypeError, "floating-point samples in .-1, 1., got torch.int16"),
        (torch.zeros(2, 100, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.zeros(2, 100).to_sparse(), TypeError, "dense tensor with samples in memory, got torch.sparse_coo on"),
        (torch.zeros(2, 100).to_mkldnn(), TypeError, "got torch._mkldnn on device cpu"),
        (torch.zeros(2, 100, device="meta"), TypeError, "got torch.strided on device meta"),
        (torch.nested.nested_tensor([torch.ones(5), torch.ones(6)], layout=torch.jagged), TypeError, "a nested tensor"),
        (torch.zeros(1, 2, 100), ValueError, r"got \(1, 2, 100\)"),
        (torch.tensor(0.5), ValueError, r"got \(\)"),
        (torch.zeros(2, 0), ValueError, r"audio is empty: got shape \(2, 0\)"),
        (torch.zeros(0, 100), ValueError, r"audio is empty: got shape \(0, 100\)"),
        (torch.zeros(16000, 2), ValueError, r"\(16000, 2\): 16000 clips of 2 samples. If it is \(samples, channels\)"),
        (torch.tensor([[0.0, float("nan")]]), ValueError, "finite samples"),
        (torch.tensor([[0.0, float("inf")]]), ValueError, "finite samples"),
        (torch.tensor([[0.0, -float("inf")]]), ValueError, "finite samples"),
        (torch.tensor([[0.0, 1e300]], dtype=torch.float64), ValueError, "finite samples"),
        (torch.tensor([[0.0, 1e20]]), ValueError, "finite samples"),
    ],
)
def test_bad_audio_is_refused_before_any_work(small_embedder, monkeypatch, audio, error, message):
    embedder = small_embedder()
    monkeypatch.setattr(embedder.log_mel, "forward", lambda audio: pytest.fail("work was done"))
    for function in (embedder.scene_embeddings, embedder.timestamp_embeddings):
        with pytest.raises(error, match=message):
            function(audio)


def test_sixteen_bit_range_warns(small_embedder, noise):
    with pytest.warns(UserWarning, match=r"audio peaks at 3\d+.*; samples are expected in \[-1, 1\]"):
        small_embedder().scene_embeddings(32768 * noise(1, 4000))


def test_statistics_may_be_numpy_numbers(small_embedder, noise):
    expected = small_embedder(statistics=[-6.0, 3.5]).scene_embeddings(noise(1, 4000))
    embedder = small_embedder(statistics=list(np.array([-6, 3.5], np.float32)))
    assert torch.equal(embedder.scene_embeddings(noise(1, 4000)), expected)


def test_ordinary_audio_does_not_warn(noise, recwarn):
    check_audio(3 * noise(1, 4000))
    assert not recwarn.list


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [*LENGTHS, 64000, 64160, 64240, 128000, 250_001])
@pytest.mark.parametrize("statistics", [None, STATISTICS])
def test_a_clip_in_blocks_is_embedded_like_the_whole(small_embedder, noise, kind, samples, statistics):
    embedder, clip = small_embedder(kind, max_segments=1, statistics=statistics), noise(1, samples)
    for sizes in (700, 100_000):
        embeddings, length = embedder.embed_blocks(partial(clip[0].split, sizes), per_step=True)
        assert length == samples
        torch.testing.assert_close(embeddings, embedder.timestamp_embeddings(clip)[0], rtol=1e-4, atol=1e-4)
        scene, _ = embedder.embed_blocks(partial(clip[0].split, sizes))
        torch.testing.assert_close(scene, embedder.scene_embeddings(clip), rtol=1e-4, atol=1e-4)


def test_silence_in_blocks_is_embedded_like_the_whole(small_embedder):
    embedder, clip = small_embedder(), torch.zeros(1, 100_000)
    scene, _ = embedder.embed_blocks(lambda: clip[0].split(3000))
    torch.testing.assert_close(scene, embedder.scene_embeddings(clip), rtol=1e-5, atol=1e-5)


def test_a_clip_that_cannot_be_embedded_in_blocks_is_refused(small_embedder, noise):
    with pytest.raises(ValueError, match="only exact framing"):
        small_embedder(framing="reference").embed_blocks(lambda: [noise(1, 32000)[0]])
    for statistics in (None, STATISTICS):
        with pytest.raises(ValueError, match="there are no"):
            small_embedder(statistics=statistics).embed_blocks(lambda: [torch.empty(0)])
    with pytest.raises(ValueError, match="finite samples"):
        small_embedder().embed_blocks(lambda: [noise(1, 32000)[0], torch.full((10,), math.nan)])


MEMORY_PROGRAM = """
import dataclasses, resource, torch
from hear_encoders import Embedder, build_encoder, preset
torch.set_num_threads(1)
config = dataclasses.replace(preset({preset!r}), depth={depth})
embedder = Embedder(build_encoder(config, seed=0).eval())
hour = torch.rand(1, 3600 * 16000, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
embeddings, timestamps = embedder.timestamp_embeddings(hour)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)  # before looking costs memory of its own
assert embeddings.shape == (1, 90000, 960) and embeddings.sum().isfinite(), embeddings.shape
assert timestamps[0, -1] == 40 * 89999 + 15
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["audiomaepp_tiny", "axlstm_tiny"])
def test_an_hour_runs_in_less_than_1500_mb(preset):
    # Depth costs time, not memory: one block's activations are freed before the next block runs.
    program = MEMORY_PROGRAM.format(preset=preset, depth=1)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1500


PAGE_FAULTS_PROGRAM = """
import dataclasses, resource, sys, torch
from hear_encoders import Embedder, build_encoder, preset
torch.set_num_threads(int(sys.argv[1]))
embedder = Embedder(build_encoder(dataclasses.replace(preset("axlstm_tiny"), depth=2), seed=0).eval())
audio = torch.zeros(4, 32000)
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    embedder.scene_embeddings(audio)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))
"""


COMPILED = """
import copy, pickle
import torch
from torch._dynamo.utils import counters
from hear_encoders import AxLSTMConfig, Embedder, PatchConfig, TransformerConfig, build_encoder

audio = 0.1 * torch.randn(9, 72_000, generator=torch.Generator().manual_seed(0))
for config, precision in (
    (TransformerConfig("audiomaepp", dim=48, depth=1, heads=3), "float32"),
    (AxLSTMConfig("axlstm", dim=48, depth=1, patches=PatchConfig(patch_frames=8)), "bfloat16"),
):
    plain = Embedder(build_encoder(config, seed=1).eval(), precision=precision)
    compiled = Embedder(build_encoder(config, seed=1).eval(), precision=precision, compile=True)
    if config.family == "axlstm":  # its folded form is not compiled
        plain.encoder.mode = compiled.encoder.mode = "chunkwise"
    for clips, samples in ((9, 32_000), (1, 32_000), (3, 72_000), (2, 20_000)):  # full segments and shorter ones
        expected, got = (model.timestamp_embeddings(audio[:clips, :samples])[0] for model in (plain, compiled))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 if precision == "float32" else 0.1)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, counters["stats"]  # one segment, and several
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    again = pickle.loads(pickle.dumps(copy.deepcopy(compiled)))
    torch.testing.assert_close(again.scene_embeddings(audio), compiled.scene_embeddings(audio))
    counters.clear()
"""


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_encoder_equals_the_plain_one_and_is_compiled_for_full_segments_only():
    # In its own process, because torch.compile imports and keeps much.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=600)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have allocators of their own")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_calls_reuse_freed_memory(threads):
    program = [sys.executable, "-c", PAGE_FAULTS_PROGRAM, threads]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200  # new pages in one call; thousands if freed memory were returned to the system


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [TransformerConfig("audiomaepp", 48, 2, 3), AxLSTMConfig("axlstm", 48, 2)])
def test_cuda_equals_cpu(noise, config):
    audio = noise(2, 70000)
    encoder = build_encoder(config, seed=0).eval()
    expected, _ = Embedder(encoder).timestamp_embeddings(audio)
    embedder = Embedder(encoder, precision="float32").cuda()
    actual, timestamps = embedder.timestamp_embeddings(audio.cuda())
    assert actual.is_cuda and timestamps.is_cuda
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert embedder.scene_embeddings(audio).device.type == "cpu"  # results follow the audio
