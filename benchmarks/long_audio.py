"""Time and memory of embedding one long file, from a minute to ten hours.

Each length is a WAV file of noise, 16 kHz and 16 bits, which `hear-embed`'s code embeds in its own process, from file
to scene embedding. Memory is the peak resident memory of that process, including Python, torch and the weights.

Example:
    python -m benchmarks.long_audio --minutes 1 10 60 600 --plot long_audio.png
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measure import argument_parser, format_machine, format_table, print_progress
from hear_encoders import PRESETS
from hear_encoders.nn.frontend import SAMPLE_RATE

# Prints seconds and bytes. A short file goes first, so that one-time initialization is not measured.
PROGRAM = """
import sys, time
from pathlib import Path
import torch
from benchmarks.measure import peak_bytes
from hear_encoders import Embedder, build_encoder, preset
from hear_encoders.audio import AudioFile
from hear_encoders.cli.embed_files import embed_files
from hear_encoders.cli.outputs import NpzOutput

name, folder, length = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
embedder = Embedder(build_encoder(preset(name), seed=0).eval())

def embed(length):
    output = NpzOutput(folder / "out.npz", False)
    failures = embed_files(embedder, [AudioFile(folder / f"{length}.wav", length)], output)
    assert not failures, failures
    output.close()

embed("warm-up")
start = time.perf_counter()
memory = peak_bytes(lambda: embed(length), torch.device("cpu"))
print(time.perf_counter() - start, memory or 0)
"""


def write_noise(path: Path, minutes: float) -> None:
    """Write a WAV file of noise, one minute at a time."""
    random, samples = np.random.default_rng(0), round(60 * minutes * SAMPLE_RATE)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        for first in range(0, samples, 60 * SAMPLE_RATE):
            file.write(random.uniform(-0.5, 0.5, min(60 * SAMPLE_RATE, samples - first)))


def measure(preset: str, minutes: float, folder: Path) -> tuple[float, int]:
    """Return seconds and bytes for a file of this length."""
    write_noise(folder / "warm-up.wav", 0.2)
    file = folder / f"{minutes:g}.wav"
    write_noise(file, minutes)
    command = [sys.executable, "-c", PROGRAM, preset, str(folder), file.stem]
    outcome = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    file.unlink()
    seconds, memory = outcome.stdout.split()
    return float(seconds), int(memory)


def draw(path: Path, measured: dict[str, list[tuple[float, float, int]]]) -> None:
    """Plot time (both axes logarithmic) and memory (only the length logarithmic) against length."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for preset, rows in measured.items():
        minutes, seconds, memory = zip(*rows)
        time_axes.loglog(minutes, seconds, marker="o", label=preset)
        memory_axes.semilogx(minutes, [value / 1e6 for value in memory], marker="o", label=preset)
    time_axes.set(xlabel="minutes of audio", ylabel="seconds")
    memory_axes.set(xlabel="minutes of audio", ylabel="peak memory in MB", ylim=(0, None))
    time_axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.long_audio", __doc__)
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=PRESETS,
        metavar="NAME",
        default=["audiomaepp_tiny", "axlstm_tiny"],
        help="default: audiomaepp_tiny axlstm_tiny",
    )
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 10, 60], help="lengths; default: 1 10 60")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw a plot")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    measured: dict[str, list[tuple[float, float, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for preset in options.presets:
            for minutes in options.minutes:
                seconds, memory = measure(preset, minutes, Path(folder))
                measured.setdefault(preset, []).append((minutes, seconds, memory))
                print_progress(f"{preset}, {minutes:g} minutes: {seconds:.1f} s, {memory / 1e6:.0f} MB")
    rows = [
        [f"`{preset}`", f"{minutes:g}", f"{seconds:.1f}", f"{60 * minutes / seconds:.0f}", f"{memory / 1e6:.0f}"]
        for preset, cells in measured.items()
        for minutes, seconds, memory in cells
    ]
    print(f"{format_machine(torch.device('cpu'))}\n- float32, one file at a time, from disk to scene embedding\n")
    print(format_table(["preset", "minutes", "seconds", "x real time", "peak MB"], rows))
    if options.plot:
        draw(options.plot, measured)


if __name__ == "__main__":
    main()
