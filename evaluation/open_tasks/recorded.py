"""Tasks whose clips are recordings: drum strokes, everyday sounds, spoken words, languages.

A clip is the beginning of a recording, peak-normalised (within a package the level may mean something, across packages
it says which one it is) and followed by digital silence where it is shorter than the task's clips, as in HEAR's own
tasks. The lists say which recordings, with what label, and in which split. What they leave open:

    drum_stroke       1 s: a stroke's beginning; only cymbals go on, and half of all recordings are over by then
    everyday_sounds   2 s: two of three recordings are shorter; an engine that runs on is known by then
    spoken_words      1.25 s: 19 of 20 words are shorter
    language_id       3 s: of most prompts all, of read sentences a part. The validation split is klettres-data: the
                      only one of the training packages that has all four languages
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, Task
from evaluation.open_tasks.sources import clip_name, fit, level, read_list
from training.corpora.recordings import read_recording

SECONDS = {"drum_stroke": 1.0, "everyday_sounds": 2.0, "spoken_words": 1.25, "language_id": 3.0}

# Groups of the lists' training split that validate instead.
VALIDATION_GROUPS: Mapping[str, tuple[str, ...]] = {"language_id": ("klettres-data",)}


def recorded_task(name: str) -> Task:
    """The description of one of these tasks."""
    rows = _rows(name)
    splits = {row["split"] for row in rows}
    return Task(
        name,
        SECONDS[name],
        ("train", "valid", "test") if "train" in splits else tuple(sorted(splits)),
        ("top1_acc",),
        tuple(sorted({row["label"] for row in rows})),
    )


def recorded_sources(name: str) -> list[str]:
    return [row["path"] for row in _rows(name)]


def recorded_clips(name: str, cache: Path) -> list[Clip]:
    """The clips of one of these tasks.

    Args:
        name: the task's.
        cache: of `training.corpora.archive`; holds the packages.
    """
    return [
        Clip(
            clip_name(row["path"]),
            row["split"],
            (row["label"],),
            (row["group"],),
            (row["path"],),
            partial(_beginning, row["path"], cache, SECONDS[name]),
        )
        for row in _rows(name)
    ]


def _rows(name: str) -> list[dict[str, str]]:
    valid = VALIDATION_GROUPS.get(name, ())
    return [{**row, "split": "valid"} if row["group"] in valid else row for row in read_list(name)]


def _beginning(recording: str, cache: Path, seconds: float) -> np.ndarray:
    return level(fit(read_recording(recording, cache), seconds))
