"""Tasks whose clips are recordings: drum strokes, everyday sounds, spoken words, languages.

A clip is the beginning of a recording, peak-normalized because levels differ between packages. As in HEAR's own tasks,
digital silence follows where the recording is shorter than the task's clips. The lists give recordings, labels and
splits. The clip lengths, and one split, are chosen here:

    drum_stroke       1 s: half of all recordings are shorter, and of the rest only cymbals still sound
    everyday_sounds   2 s: two of three recordings are shorter; longer ones (a running engine) are recognizable by then
    spoken_words      1.25 s: 19 of 20 words are shorter
    language_id       3 s: most prompts are shorter, read sentences longer. The package klettres-data is the validation
                      split, because no other training package has all four languages
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, TaskSpec
from evaluation.open_tasks.sources import clip_name, cut_or_pad, normalize_peak, read_list
from training.corpora.recordings import read_recording

SECONDS = {"drum_stroke": 1.0, "everyday_sounds": 2.0, "spoken_words": 1.25, "language_id": 3.0}

# Groups in the lists' training split that become the validation split.
VALIDATION_GROUPS = {"language_id": ("klettres-data",)}


def recorded_spec(name: str) -> TaskSpec:
    """Return the description of one of these tasks."""
    rows = _rows(name)
    splits = {row["split"] for row in rows}
    return TaskSpec(
        name,
        SECONDS[name],
        ("train", "valid", "test") if "train" in splits else tuple(sorted(splits)),
        ("top1_acc",),
        tuple(sorted({row["label"] for row in rows})),
    )


def recorded_sources(name: str) -> list[str]:
    """Return the recordings that one of these tasks needs, as PACKAGE/PATH."""
    return [row["path"] for row in _rows(name)]


def recorded_clips(name: str, cache: Path) -> list[Clip]:
    """Return the clips of one of these tasks.

    Args:
        name: the task.
        cache: cache of `training.corpora.archive` with the task's packages.
    """
    return [
        Clip(
            name=clip_name(row["path"]),
            split=row["split"],
            labels=(row["label"],),
            groups=(row["group"],),
            sources=(row["path"],),
            make=partial(_beginning, row["path"], cache, SECONDS[name]),
        )
        for row in _rows(name)
    ]


def _rows(name: str) -> list[dict[str, str]]:
    valid = VALIDATION_GROUPS.get(name, ())
    return [{**row, "split": "valid"} if row["group"] in valid else row for row in read_list(name)]


def _beginning(recording: str, cache: Path, seconds: float) -> np.ndarray:
    return normalize_peak(cut_or_pad(read_recording(recording, cache), seconds))
