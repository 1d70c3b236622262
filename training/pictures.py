"""What training looks like: reconstructions as spectrograms, and curves of held-out error.

`python -m training.pictures OUT.png RUN...` draws the held-out error of one or more runs against time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hear_encoders.atomic import atomic_write
from training.runlog import LOG_FILE

_FRAME_S = 0.01


def reconstruction_figure(logmel: np.ndarray, seen: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """One column per clip: the input, what the encoder saw of it, and the masked patches as predicted.

    Args:
        logmel: (clips, frames, bands), normalised.
        seen: (clips, frames, bands), 1 = visible.
        predicted: (clips, frames, bands); only masked cells of it are shown.
        title: over the whole figure.
    """
    clips, frames, bands = logmel.shape
    colours = colormaps["magma"].with_extremes(bad="0.75")
    rows = {
        "input": logmel,
        "visible": np.where(seen > 0, logmel, np.nan),
        "reconstructed": np.where(seen > 0, logmel, predicted),
    }
    figure = Figure(figsize=(3 * clips, 5.4), layout="constrained")
    axes = figure.subplots(3, clips, squeeze=False, sharex=True, sharey=True)
    for row, (name, values) in zip(axes, rows.items()):
        for clip, axis in enumerate(row):
            low, high = np.percentile(logmel[clip], [1, 99])
            axis.imshow(
                *(values[clip].T,), origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high,
                extent=(0, frames * _FRAME_S, 0, bands), interpolation="nearest",
            )  # fmt: skip
        row[0].set_ylabel(f"{name}\nmel band")
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.suptitle(title)
    return figure


def held_out_figure(logs: dict[str, list[dict]]) -> Figure:
    """Held-out error against steps, one line per run, and the baselines as far as they differ.

    Args:
        logs: lines of a run's log.jsonl, by the run's name.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    baselines: dict[tuple[str, float], list[str]] = {}
    for name, lines in logs.items():
        points = [line for line in lines if "held_out_loss" in line]
        (line,) = axis.plot(
            [point["clips"] for point in points], [point["held_out_loss"] for point in points], label=name
        )
        for key in ("mean", "interpolation"):
            value = round(points[-1][f"held_out_{key}"], 3)
            baselines.setdefault((key, value), []).append(line.get_color())
    for (key, value), _ in baselines.items():
        axis.axhline(value, color="0.4", linestyle="--" if key == "mean" else ":")
        axis.annotate(
            f"{key} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.3"
        )
    axis.set(xlabel="clips of 2 s trained on", ylabel="mean squared error of masked patches, held out")
    axis.legend()
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m training.pictures", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run trained with --held-out")
    options = parser.parse_args(arguments)
    logs = {}
    for run in options.runs:
        if not (run / LOG_FILE).is_file():
            print(f"{parser.prog}: error: {run} is not a run: it has no {LOG_FILE}", file=sys.stderr)
            return 2
        logs[run.name] = [json.loads(line) for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        if not any("held_out_loss" in line for line in logs[run.name]):
            print(f"{parser.prog}: error: {run} was trained without --held-out", file=sys.stderr)
            return 2
    save_png(held_out_figure(logs), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
