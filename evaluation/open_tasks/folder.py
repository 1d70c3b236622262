"""A task's folder in HEAR's format, as heareval 2021.1.3 reads it. It appears only once it is complete.

    NAME-vVERSION-full/
        task_metadata.json      kind of task and its scores
        labelvocabulary.csv     idx,label
        SPLIT.json              {"a.wav": ["label"]}; events: {"a.wav": [{"label", "start", "end"}]}, times in ms
        16000/SPLIT/a.wav       16 kHz, mono, 16 bits
        sources.csv             file,split,groups,sources of each clip; no group is in two splits
        LICENCES.md, licences/  packages with their versions and licences, and their copyright files

heareval ignores sources.csv and the licences.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from evaluation.tasks import METADATA_FILE, VOCABULARY_FILE
from hear_encoders.console import progress
from hear_encoders.files import locked
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora import archive

Label = str | dict[str, Any]  # a scene's label, or an event: label, start, end (ms)


@dataclass(frozen=True)
class Clip:
    """A clip of a task.

    Attributes:
        name: file name, unique in the task.
        split: one of the task's splits.
        labels: one label for a scene, or any number of events.
        groups: the speakers, kits or packages behind it, which must not be in another split.
        sources: the recordings that it is made of.
        make: returns its samples, (N,) float32 in [-1, 1], the same ones in every call.
    """

    name: str
    split: str
    labels: tuple[Label, ...]
    groups: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class TaskSpec:
    """A task's description, with everything that heareval must know.

    Attributes:
        name: name of the task.
        seconds: length of every clip.
        splits: train, valid and test; or folds, where heareval validates on the fold after the test fold.
        evaluation: names of heareval's scores; the first one selects models.
        labels: the vocabulary, in order of label indices.
        events: True for a task of finding events, which may overlap, in time; False for one label per clip.
        parameters: further metadata entries.
        version: must be raised when clips change.
    """

    name: str
    seconds: float
    splits: tuple[str, ...]
    evaluation: tuple[str, ...]
    labels: tuple[str, ...]
    events: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1.0.0"

    @property
    def folder_name(self) -> str:
        """Name of the task's folder."""
        return f"{self.name}-v{self.version}-full"

    def metadata(self) -> dict[str, Any]:
        """Return the content of task_metadata.json."""
        is_kfold = self.splits != ("train", "valid", "test")
        return {
            "task_name": self.name,
            "version": self.version,
            "embedding_type": "event" if self.events else "scene",
            "prediction_type": "multilabel" if self.events else "multiclass",
            "split_mode": "presplit_kfold" if is_kfold else "trainvaltest",
            **({"nfolds": len(self.splits)} if is_kfold else {}),
            "sample_duration": self.seconds,
            "evaluation": list(self.evaluation),
            **self.parameters,
            "default_mode": "full",
            "mode": "full",
            "splits": list(self.splits),
        }


def check_clips(spec: TaskSpec, clips: Sequence[Clip]) -> None:
    """Check names, splits and labels of a task's clips, and that no group is in two splits.

    Raises:
        ValueError: names the first fault found.
    """
    split_of: dict[str, str] = {}
    names: set[str] = set()
    for clip in clips:
        if clip.split not in spec.splits:
            raise ValueError(f"{spec.name}: {clip.name} is in split {clip.split}, expected one of {spec.splits}")
        for group in clip.groups:
            if split_of.setdefault(group, clip.split) != clip.split:
                raise ValueError(f"{spec.name}: {group} is in {split_of[group]} and in {clip.split}")
        if clip.name in names:
            raise ValueError(f"{spec.name}: two clips are called {clip.name}")
        names.add(clip.name)
        labels = {label if isinstance(label, str) else label["label"] for label in clip.labels}
        if not labels <= set(spec.labels):
            raise ValueError(f"{spec.name}: {clip.name} has unknown labels {sorted(labels - set(spec.labels))}")
        if not spec.events and len(clip.labels) != 1:
            raise ValueError(f"{spec.name}: {clip.name} has {len(clip.labels)} labels, expected one")
    if empty := set(spec.splits) - {clip.split for clip in clips}:
        raise ValueError(f"{spec.name}: no clips in {sorted(empty)}")


def write_task(
    out_dir: Path, spec: TaskSpec, clips: Sequence[Clip], packages: Sequence[str], cache: Path, jobs: int = 1
) -> Path:
    """Write a task's folder.

    Args:
        out_dir: folder for task folders. Nothing else is ever in it, also while this runs.
        spec: the task's description.
        clips: all of its clips.
        packages: the packages that the clips come from.
        cache: cache of `training.corpora.archive` with these packages.
        jobs: threads that make clips.

    Returns:
        The task's folder.

    Raises:
        ValueError: `check_clips` or `check_samples` rejects a clip, or another process writes to `out_dir`.
    """
    check_clips(spec, clips)
    final = out_dir / spec.folder_name
    with _staging_folder(out_dir) as staging:
        folder = staging / spec.folder_name
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        for split in spec.splits:
            (folder / str(SAMPLE_RATE) / split).mkdir(parents=True)

        def write(clip: Clip) -> None:
            path = folder / str(SAMPLE_RATE) / clip.split / clip.name
            path.write_bytes(wav_bytes(check_samples(clip.make(), spec, clip)))

        with progress(len(clips), "clip", spec.name) as advance, ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(write, clips):
                advance()
        for split in spec.splits:
            labels = {clip.name: list(clip.labels) for clip in _by_name(clips) if clip.split == split}
            _write_text(folder / f"{split}.json", json.dumps(labels, indent=1, ensure_ascii=False) + "\n")
        _write_csv(folder / VOCABULARY_FILE, ("idx", "label"), enumerate(spec.labels))
        _write_csv(
            folder / "sources.csv",
            ("file", "split", "groups", "sources"),
            ((clip.name, clip.split, "|".join(clip.groups), "|".join(clip.sources)) for clip in _by_name(clips)),
        )
        _write_licences(folder, spec.name, packages, cache)
        _write_text(folder / METADATA_FILE, json.dumps(spec.metadata(), indent=1) + "\n")
        os.replace(folder, final)
    return final


def check_samples(samples: np.ndarray, spec: TaskSpec, clip: Clip) -> np.ndarray:
    """Return a clip's samples. Raise ValueError unless they have the task's length and a peak in (0, 1]."""
    length = round(spec.seconds * SAMPLE_RATE)
    if samples.shape != (length,):
        raise ValueError(f"{spec.name}: {clip.name} has shape {samples.shape}, expected {(length,)}")
    peak = float(np.abs(samples).max())
    if not 0 < peak <= 1:  # also refuses NaN
        raise ValueError(f"{spec.name}: {clip.name} has peak {peak}, expected more than 0 and at most 1")
    return samples


def wav_bytes(samples: np.ndarray) -> bytes:
    """Encode samples in [-1, 1] as a 16-bit WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.rint(samples * 32767).astype(np.int16), SAMPLE_RATE, "PCM_16", format="WAV")
    return file.getvalue()


def _by_name(clips: Sequence[Clip]) -> list[Clip]:
    return sorted(clips, key=lambda clip: clip.name)


def _write_licences(folder: Path, task: str, packages: Sequence[str], cache: Path) -> None:
    lines = [
        f"# Sources of {task}",
        "",
        "The audio comes from files in these packages of Debian's main archive: decoded to 16 kHz mono, cut, brought",
        "to one level, and for some tasks mixed. sources.csv lists each clip's files. The audio stays under their",
        "licences. The table names the licences in each package's copyright file, which is in licences/ and says which",
        "files each licence covers.",
        "",
        "| package | version | licences |",
        "|---|---|---|",
    ]
    (folder / "licences").mkdir()
    for package in sorted(packages):
        text = archive.licence_text(package, cache)
        _write_text(folder / "licences" / f"{package}.txt", text)
        lines.append(f"| {package} | {archive.version(package, cache)} | {archive.licence_cell(text)} |")
    _write_text(folder / "LICENCES.md", "\n".join(lines) + "\n")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _staging_folder(out_dir: Path) -> Iterator[Path]:
    """Make and lock a folder for unfinished tasks, beside `out_dir`, which has finished ones only.

    Raises:
        ValueError: another process holds it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    # A finished task is moved by a rename, which works only within one file system.
    parent = out_dir if os.path.ismount(out_dir) else out_dir.resolve().parent
    folder = parent / f".{out_dir.resolve().name}.unfinished"
    folder.mkdir(exist_ok=True)
    with locked(folder, name=out_dir):
        try:
            yield folder
        finally:
            with suppress(OSError):
                shutil.rmtree(folder)
