"""What training looks like: reconstructions as spectrograms, and curves of held-out error.

`python -m training.curves OUT.png RUN...` draws the held-out error of one or more runs against the clips they saw.
A run that began with the weights of another of them (`start_from`) begins where that one ended.
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

from hear_encoders.files import atomic_write
from training.pretrain import read_run_config
from training.run_log import LOG_FILE

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


def held_out_figure(curves: dict[str, list[dict]]) -> Figure:
    """Held-out error against clips trained on, one line per run.

    Runs whose baselines differ, as with another mask ratio, do not compare: each kind has a panel of its own.

    Args:
        curves: lines about held-out error of a run's log.jsonl, by the run's name.
    """
    panels: dict[tuple[float, float], dict[str, list[dict]]] = {}
    for name, points in curves.items():
        baselines = (points[-1]["held_out_mean"], points[-1]["held_out_interpolation"])
        panels.setdefault(baselines, {})[name] = points
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (baselines, runs) in zip(axes, panels.items()):
        for name, points in runs.items():
            clips, errors = ([point[key] for point in points] for key in ("clips", "held_out_loss"))
            axis.plot(clips, errors, label=f"{name}: {errors[-1]:.3f}")
        for what, value, style in zip(("mean of what is visible", "interpolation"), baselines, ("--", ":")):
            axis.axhline(value, color="0.3", linestyle=style, label=f"{what}: {value:.3f}")
        axis.set(xlabel="clips of 2 s trained on", ylim=(0, 1.2 * max(baselines)))
        axis.legend()
    axes[0].set_ylabel("squared error of masked patches, held out")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m training.curves", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run trained with --held-out")
    options = parser.parse_args(arguments)
    logs: dict[Path, list[dict]] = {}
    for run in options.runs:
        if not (run / LOG_FILE).is_file():
            print(f"{parser.prog}: error: {run} is not a run: it has no {LOG_FILE}", file=sys.stderr)
            return 2
        logs[run] = [json.loads(line) for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines()]
        if not any("held_out_loss" in line for line in logs[run]):
            print(f"{parser.prog}: error: {run} was trained without --held-out", file=sys.stderr)
            return 2
    curves = {}
    for run, lines in logs.items():
        before = _clips_before(run, logs)
        curves[run.name] = [{**line, "clips": line["clips"] + before} for line in lines if "held_out_loss" in line]
    save_png(held_out_figure(curves), options.output)
    return 0


def _clips_before(run: Path, logs: dict[Path, list[dict]]) -> int:
    """Clips that a run's first weights had seen in other runs of `logs`."""
    start_from = read_run_config(run).start_from
    for earlier, lines in logs.items():
        if start_from is not None and earlier.resolve() == Path(start_from).resolve():
            return _clips_before(earlier, logs) + lines[-1]["step"] * read_run_config(earlier).batch_size
    return 0


if __name__ == "__main__":
    sys.exit(main())
