"""The figures that pretraining draws: reconstructed spectrograms, and held-out error against the clips trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hear_encoders.files import atomic_write

_FRAME_S = 0.01


def reconstruction_figure(logmel: np.ndarray, visible: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """Draw one column per clip: the input, its visible patches, and its reconstruction.

    Args:
        logmel: (clips, frames, bands), normalized.
        visible: (clips, frames, bands), 1 = visible, 0 = masked.
        predicted: (clips, frames, bands); only its masked cells are drawn.
        title: heading of the whole figure.
    """
    clips, frames, bands = logmel.shape
    colors = colormaps["magma"].with_extremes(bad="0.75")
    rows = {
        "input": logmel,
        "visible": np.where(visible > 0, logmel, np.nan),
        "reconstructed": np.where(visible > 0, logmel, predicted),
    }
    figure = Figure(figsize=(3 * clips, 5.4), layout="constrained")
    axes = figure.subplots(3, clips, squeeze=False, sharex=True, sharey=True)
    for row, (name, values) in zip(axes, rows.items()):
        for clip, axis in enumerate(row):
            low, high = np.percentile(logmel[clip], [1, 99])
            axis.imshow(
                *(values[clip].T,), origin="lower", aspect="auto", cmap=colors, vmin=low, vmax=high,
                extent=(0, frames * _FRAME_S, 0, bands), interpolation="nearest",
            )  # fmt: skip
        row[0].set_ylabel(f"{name}\nmel band")
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.suptitle(title)
    return figure


def held_out_figure(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw held-out error against clips trained on, one line per run.

    Errors compare only between runs with the same baselines: another mask ratio, for instance, is another task. Runs
    are grouped by their baselines, a panel per group.

    Args:
        curves: by the run's name, those lines of its log.jsonl that hold a held-out error.
    """
    panels: dict[tuple[float, float], dict[str, list[dict[str, Any]]]] = {}
    for name, points in curves.items():
        baselines = (points[-1]["held_out_mean"], points[-1]["held_out_interpolation"])
        panels.setdefault(baselines, {})[name] = points
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (baselines, runs) in zip(axes, panels.items()):
        for name, points in runs.items():
            clips, errors = ([point[key] for point in points] for key in ("clips", "held_out_loss"))
            axis.plot(clips, errors, label=f"{name}: {errors[-1]:.3f}")
        for baseline, value, style in zip(("mean of the visible cells", "interpolation"), baselines, ("--", ":")):
            axis.axhline(value, color="0.3", linestyle=style, label=f"{baseline}: {value:.3f}")
        axis.set(xlabel="2 s clips trained on", ylim=(0, 1.2 * max(baselines)))
        axis.legend()
    axes[0].set_ylabel("held-out mean squared error of masked patches")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. Missing parent directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
