"""Measure `hear-embed-corpus` on one machine: its rate beside `hear-embed`, how busy its workers are, and decoding.

Example:
  python -m benchmarks.corpus --hours 3
  python -m benchmarks.corpus --hours 3 --workers 1 2 4 --weights path/to/weights
  python -m benchmarks.corpus --decoding
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measure import argument_parser, format_machine, format_table, print_progress
from hear_encoders import load_audio
from hear_encoders.nn.frontend import SAMPLE_RATE

SHORTEST_S, LONGEST_S = 0.5, 3600.0
FORMATS = {"mp3": 44100, "opus": 48000, "flac": 44100}  # Opus has no 44.1 kHz
OLD_PART_FILES, OLD_PART_MB = 1000, 256  # of the torchrun command before


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argument_parser("python -m benchmarks.corpus", __doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="of audio, at least; default: %(default)g")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--part-seconds", type=float, default=300.0, help="default: %(default)g")
    parser.add_argument("--weights", default="", help="default: bundled")
    parser.add_argument("--decoding", action="store_true", help="time decoding alone, on one core")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        table = _time_decoding(Path(folder)) if options.decoding else _time_corpus(options, Path(folder))
    print(f"{format_machine(torch.device('cpu'))}\n\n{table}")


def durations(hours: float, seed: int = 0) -> list[float]:
    """Return durations from half a second to an hour, evenly on a logarithmic scale; the longest is there."""
    chance = np.random.default_rng(seed)
    seconds = [LONGEST_S]
    while sum(seconds) < 3600 * hours:
        seconds.append(float(np.exp(chance.uniform(np.log(SHORTEST_S), np.log(LONGEST_S)))))
    chance.shuffle(seconds)
    return seconds


def static_busy_share(seconds: Sequence[float], workers: int) -> float:
    """Return how busy processes are if each takes every n-th part of 1000 files or 256 MB, by seconds of audio."""
    parts, size, count = [0.0], 0.0, 0
    for duration in seconds:
        megabytes = duration * SAMPLE_RATE * 2 / 1e6
        if count and (count == OLD_PART_FILES or size + megabytes > OLD_PART_MB):
            parts, size, count = [*parts, 0.0], 0.0, 0
        parts[-1] += duration
        size, count = size + megabytes, count + 1
    return sum(parts) / (workers * max(sum(parts[rank::workers]) for rank in range(workers)))


def _time_corpus(options: argparse.Namespace, folder: Path) -> str:
    seconds = durations(options.hours)
    noise = np.random.default_rng(1).normal(0, 0.1, int(LONGEST_S) * SAMPLE_RATE).astype(np.float32)
    (folder / "in").mkdir()
    for number, duration in enumerate(seconds):
        soundfile.write(folder / "in" / f"{number:05d}.wav", noise[: int(duration * SAMPLE_RATE)], SAMPLE_RATE)
    weights = ["--weights", options.weights] if options.weights else []
    print_progress(f"{len(seconds)} files, {sum(seconds) / 3600:.2f} hours: hear-embed")
    began = time.perf_counter()
    command = [sys.executable, "-m", "hear_encoders.cli.embed", str(folder / "in"), "-o", str(folder / "out.npz")]
    subprocess.run([*command, *weights], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    rows = [["hear-embed", f"{took:.0f}", f"{sum(seconds) / took:.0f}", "", "-"]]
    for workers in options.workers:
        print_progress(f"{workers} workers")
        command = [sys.executable, "-m", "hear_encoders.cli.embed_corpus", str(folder / "in"), *weights]
        output = ["-o", str(folder / f"out{workers}"), "--part-seconds", str(options.part_seconds)]
        began = time.perf_counter()
        text = subprocess.run(
            [*command, *output, "--workers", str(workers)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        took = time.perf_counter() - began
        busy = re.search(r"busy (\d+)%", text)
        assert busy, text
        rows.append(
            [
                *(f"hear-embed-corpus --workers {workers}", f"{took:.0f}", f"{sum(seconds) / took:.0f}"),
                *(f"{busy[1]} %", f"{static_busy_share(seconds, workers):.0%}".replace("%", " %")),
            ]
        )
    columns = ["command", "s, with its start", "audio s per s", "workers busy", "static split: busy"]
    return format_table(columns, rows)


def _time_decoding(folder: Path) -> str:
    """Decode five minutes in each format on one core: hear_encoders' decoder, resampling and all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for suffix, rate in FORMATS.items():
        path = folder / f"noise.{suffix}"
        noise = np.random.default_rng(0).normal(0, 0.1, (300 * rate, 2))
        subtype = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
        soundfile.write(path, noise, rate, **subtype)
        load_audio(path)
        began = time.process_time()
        load_audio(path)
        took = time.process_time() - began
        rows.append([f"{suffix}, {rate / 1000:g} kHz stereo", f"{300 / took:.0f}"])
    return format_table(["format", "audio s per core-second"], rows)


if __name__ == "__main__":
    main()
