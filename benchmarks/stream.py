"""Streaming speed: the time that a 40 ms step of live audio takes AxLSTM on one thread.

The benchmark times `AxLSTMStream.push` with the next 640 samples of every stream, including checks and log-mel, over a
minute of noise, with freshly initialized weights and fixed statistics. Each push except the first completes one step.
The first second warms up and does not count. "CPU ms" is the processor time of the pushing thread; on a busy machine it
is less than the elapsed time, but it still depends on who shares the caches and the memory. Then a 2 s clip takes turns
as a single push and as an offline call, for comparison with `embed`.

Example:
    python -m benchmarks.stream --presets axlstm_tiny --streams 1 8
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import argument_parser, format_machine, format_table, print_progress, take_turns
from hear_axlstm import stream as make_stream
from hear_encoders.config import PRESETS
from hear_encoders.embedder import Embedder
from hear_encoders.nn.build import build_encoder
from hear_encoders.nn.frontend import SAMPLE_RATE

STATISTICS = (-6.0, 3.5)
STEP_S = 0.04
WARM_UP_PUSHES = 25
STREAMABLE = [name for name, config in PRESETS.items() if config.family == "axlstm" and not config.flip]
COLUMNS = (
    "preset",
    "streams",
    "pushes",
    "median ms",
    "99 % ms",
    "max ms",
    "CPU median ms",
    "CPU 99 % ms",
    "real time",
    "state MB",
    "2 s push ms",
    "2 s offline ms",
)


@dataclass(frozen=True)
class Result:
    """Measurements of one preset: seconds per push in ascending order, state size, and the times of a 2 s clip."""

    preset: str
    streams: int
    wall_s: list[float]
    cpu_s: list[float]
    state_bytes: int
    long_push_s: float
    offline_s: float


def measure(preset: str, embedder: Embedder, streams: int, seconds: float) -> Result:
    """Time pushes of 40 ms to this many streams, then a clip of 2 s."""
    step_samples = round(STEP_S * SAMPLE_RATE)
    audio = 0.1 * torch.randn(streams, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    stream = make_stream(embedder, streams=streams)
    wall_s, cpu_s = [], []
    for block in audio.split(step_samples, dim=1):
        wall, cpu = time.perf_counter(), time.thread_time()
        stream.push(block)
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.thread_time() - cpu)
    clip = audio[:, : 2 * SAMPLE_RATE]
    long_push_s, offline_s = take_turns(
        [lambda: stream.push(clip), lambda: embedder.timestamp_embeddings(clip)], torch.device("cpu")
    )
    state_bytes = sum(tensor.nbytes for tensor in stream.state.values())
    wall_s, cpu_s = sorted(wall_s[WARM_UP_PUSHES:]), sorted(cpu_s[WARM_UP_PUSHES:])
    return Result(preset, streams, wall_s, cpu_s, state_bytes, long_push_s, offline_s)


def quantile_ms(ascending: Sequence[float], fraction: float) -> str:
    """Format a quantile of sorted times in seconds as milliseconds."""
    return f"{1e3 * ascending[round(fraction * (len(ascending) - 1))]:.2f}"


def format_row(result: Result) -> list[str]:
    median_s = result.wall_s[len(result.wall_s) // 2]
    return [
        result.preset,
        str(result.streams),
        str(len(result.wall_s)),
        *(quantile_ms(result.wall_s, fraction) for fraction in (0.5, 0.99, 1.0)),
        *(quantile_ms(result.cpu_s, fraction) for fraction in (0.5, 0.99)),
        f"{result.streams * STEP_S / median_s:.1f} x",
        f"{result.state_bytes / 1e6:.1f}",
        f"{1e3 * result.long_push_s:.1f}",
        f"{1e3 * result.offline_s:.1f}",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.stream", __doc__)
    parser.add_argument(
        "--presets", nargs="+", choices=STREAMABLE, default=["axlstm_tiny"], help="default: %(default)s"
    )
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8], help="streams in a batch; default: 1 8")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of noise per stream; default: 60")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: 1")
    options = parser.parse_args(arguments)
    if min(options.streams) < 1 or options.threads < 1:
        parser.error("--streams and --threads must be at least 1")
    if not options.seconds >= 2:
        parser.error(f"--seconds: expected at least 2, got {options.seconds}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for name in options.presets:
        embedder = Embedder(build_encoder(PRESETS[name], seed=0).eval(), precision="float32", statistics=STATISTICS)
        for streams in options.streams:
            print_progress(f"{name}, {streams} streams")
            results.append(measure(name, embedder, streams, options.seconds))
    print(format_machine(torch.device("cpu")))
    if hasattr(os, "getloadavg"):
        print(
            f"- float32; load average over the last minute {os.getloadavg()[0]:.1f}, including this process", end="\n\n"
        )
    print(format_table(COLUMNS, [format_row(result) for result in results]))


if __name__ == "__main__":
    main()
