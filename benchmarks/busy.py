"""Time a clip, a stream and `hear-embed` on a quiet machine and beside processes that keep every core busy.

Each measurement is a process of its own, since OpenMP reads how threads wait when PyTorch is loaded. Quiet and busy,
all measurements take turns. Start it on a machine that is quiet otherwise.

Example:
  python -m benchmarks.busy --turns 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch

import hear_audiomaepp
import hear_axlstm
from benchmarks.measure import argument_parser, format_machine, format_table, print_progress
from hear_encoders import load_audio
from hear_encoders.cli.embed import main as hear_embed
from hear_encoders.threads import usable_cpus

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "examples" / "speech.flac"
CLIP_CALLS = 10
BLOCK_SAMPLES = 1000
FILES = 40  # of 5.3 s, for hear-embed

# How threads wait, and how many there are: environment variables.
SETTINGS: dict[str, dict[str, str]] = {
    "PyTorch's default": {},
    "threads sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
COLUMNS = ["what", "threads", "quiet s", "busy s", "busy / quiet", "quiet CPU s", "busy CPU s"]


def clip() -> Callable[[], object]:
    """Embed a clip of 2 s with AudioMAE++-Tiny, as often as CLIP_CALLS."""
    model, audio = hear_audiomaepp.load_model(), load_audio(SPEECH)[None, :32_000]

    def call() -> None:
        for _ in range(CLIP_CALLS):
            hear_audiomaepp.get_scene_embeddings(audio, model)

    hear_audiomaepp.get_scene_embeddings(audio, model)
    return call


def stream() -> Callable[[], object]:
    """Push 5.3 s of speech through AxLSTM-Tiny in blocks, as in the README."""
    stream = hear_axlstm.stream(hear_axlstm.load_model(statistics=[-6.0, 3.5]))
    blocks = load_audio(SPEECH).split(BLOCK_SAMPLES)

    def call() -> None:
        for block in blocks:
            stream.push(block)
        stream.finish()

    for block in blocks[:20]:
        stream.push(block)
    stream.reset()
    return call


def command() -> Callable[[], object]:
    """Embed FILES files with `hear-embed`, without the time that PyTorch takes to load."""
    folder = Path(tempfile.mkdtemp())

    def call() -> None:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder)
            for number in range(FILES):
                shutil.copy(SPEECH, folder / f"{number}.flac")
            if hear_embed([str(folder), "-o", str(folder / "out.npz"), "--device", "cpu"]) != 0:
                raise RuntimeError("hear-embed failed")

    return call


WORK: dict[str, tuple[str, Callable[[], Callable[[], object]], int]] = {
    "clip": ("a clip of 2 s", clip, CLIP_CALLS),
    "stream": ("the README's stream, 5.3 s", stream, 1),
    "command": (f"hear-embed, {FILES} files of 5.3 s", command, 1),
}


def work(name: str) -> None:
    """Do one measurement in this process, and print its seconds and CPU seconds."""
    _, prepare, calls = WORK[name]
    call = prepare()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    seconds = [(time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls]
    print(json.dumps(seconds))


def measure(name: str, setting: dict[str, str]) -> list[float]:
    """Do one measurement in a new process; return seconds and CPU seconds."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.busy", "--work", name],
        cwd=ROOT,
        env={**environment, **setting},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.busy", __doc__)
    parser.add_argument("--turns", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=usable_cpus() + 1, metavar="N", help="busy processes; default: %(default)s"
    )
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="default: all")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.turns, options.processes) < 1:
        parser.error("--turns and --processes must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.work:
        work(options.work)
        return
    times: dict[tuple[str, str, bool], list[list[float]]] = {}
    for turn in range(options.turns):
        for busy in (False, True):
            print_progress(f"turn {turn + 1} of {options.turns}, {'busy' if busy else 'quiet'}")
            with busy_processes(options.processes if busy else 0):
                for name in options.only:
                    for setting, environment in SETTINGS.items():
                        times.setdefault((name, setting, busy), []).append(measure(name, environment))
    rows = []
    for name in options.only:
        for setting in SETTINGS:
            (quiet, quiet_cpu), (busy, busy_cpu) = (
                [median(column) for column in zip(*times[name, setting, state])] for state in (False, True)
            )
            numbers = [f"{quiet:.3f}", f"{busy:.3f}", f"{busy / quiet:.1f}", f"{quiet_cpu:.3f}", f"{busy_cpu:.3f}"]
            rows.append([WORK[name][0], setting, *numbers])
    print(format_machine(torch.device("cpu")))
    print(f"- {options.processes} busy processes; medians of {options.turns} turns", end="\n\n")
    print(format_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
