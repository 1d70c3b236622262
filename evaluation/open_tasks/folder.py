"""A task as a folder in HEAR's format, as heareval 2021.1.3 reads it: there whole or not at all.

    NAME-vVERSION-full/
        task_metadata.json     what kind of task it is, and how it is scored
        labelvocabulary.csv    idx,label
        SPLIT.json             {"a.wav": ["label"]}; events: {"a.wav": [{"label", "start", "end" in ms}]}
        16000/SPLIT/a.wav      16 kHz, mono, 16 bits
        sources.csv            file,split,groups,sources: what each clip was made of; no group is in two splits
        LICENCES.md, licences/ the packages with their versions and licences, and their copyright files

heareval takes no notice of the last three.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora import archive
from training.locks import locked

Label = str | dict[str, Any]  # of a scene; of an event: label, start, end (ms)


@dataclass(frozen=True)
class Clip:
    """A clip of a task.

    Attributes:
        name: file name, unique in the task.
        split: of the task's.
        labels: one label of a scene, or any number of events.
        groups: what must not be in two splits: speakers, kits, packages.
        sources: what it is made of.
        make: its samples, (N,) float32 in [-1, 1]; always the same ones.
    """

    name: str
    split: str
    labels: tuple[Label, ...]
    groups: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Task:
    """What heareval has to know about a task.

    Attributes:
        name: the task's.
        seconds: length of every clip.
        splits: train, valid, test, or folds, of which heareval validates on the one after the tested one.
        evaluation: heareval's names of scores; the first one selects models.
        labels: the vocabulary, in the order of its indices.
        events: whether events are to be found in time, several at once, rather than one label per clip.
        parameters: further entries of the metadata.
        version: to be raised when the clips change.
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
        return f"{self.name}-v{self.version}-full"

    def metadata(self) -> dict[str, Any]:
        folds = self.splits != ("train", "valid", "test")
        return {
            "task_name": self.name,
            "version": self.version,
            "embedding_type": "event" if self.events else "scene",
            "prediction_type": "multilabel" if self.events else "multiclass",
            "split_mode": "presplit_kfold" if folds else "trainvaltest",
            **({"nfolds": len(self.splits)} if folds else {}),
            "sample_duration": self.seconds,
            "evaluation": list(self.evaluation),
            **self.parameters,
            "default_mode": "full",
            "mode": "full",
            "splits": list(self.splits),
        }


def check_clips(task: Task, clips: Sequence[Clip]) -> None:
    """Check what a task must keep: names, splits, labels, and that no group is in two splits.

    Raises:
        ValueError: the first thing that is wrong.
    """
    split_of: dict[str, str] = {}
    names: set[str] = set()
    for clip in clips:
        if clip.split not in task.splits:
            raise ValueError(f"{task.name}: {clip.name} is in split {clip.split}, expected one of {task.splits}")
        for group in clip.groups:
            if split_of.setdefault(group, clip.split) != clip.split:
                raise ValueError(f"{task.name}: {group} is in {split_of[group]} and in {clip.split}")
        if clip.name in names:
            raise ValueError(f"{task.name}: two clips are called {clip.name}")
        names.add(clip.name)
        labels = {label if isinstance(label, str) else label["label"] for label in clip.labels}
        if not labels <= set(task.labels):
            raise ValueError(f"{task.name}: {clip.name} has unknown labels {sorted(labels - set(task.labels))}")
        if not task.events and len(clip.labels) != 1:
            raise ValueError(f"{task.name}: {clip.name} has {len(clip.labels)} labels, expected one")
    if empty := set(task.splits) - {clip.split for clip in clips}:
        raise ValueError(f"{task.name}: no clips in {sorted(empty)}")


def write_task(
    out_dir: Path, task: Task, clips: Sequence[Clip], packages: Sequence[str], cache: Path, jobs: int = 1
) -> Path:
    """Make a task's folder.

    Args:
        out_dir: holds task folders and nothing else, also while this runs.
        task: its description.
        clips: all of its clips.
        packages: what they come from.
        cache: of `training.corpora.archive`; holds the packages.
        jobs: threads that make clips.

    Returns:
        The folder.

    Raises:
        ValueError: clips that do not make a task (`check_clips`), or of the wrong length or values.
    """
    check_clips(task, clips)
    final = out_dir / task.folder_name
    with _unfinished(out_dir) as beside:
        folder = beside / task.folder_name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        for split in task.splits:
            (folder / str(SAMPLE_RATE) / split).mkdir(parents=True)

        def write(clip: Clip) -> None:
            path = folder / str(SAMPLE_RATE) / clip.split / clip.name
            path.write_bytes(wav_bytes(check_samples(clip.make(), task, clip)))

        with ThreadPoolExecutor(jobs) as pool:
            for _ in tqdm(pool.map(write, clips), total=len(clips), desc=task.name, unit="clip", disable=None):
                pass
        for split in task.splits:
            labels = {clip.name: list(clip.labels) for clip in _by_name(clips) if clip.split == split}
            _write_text(folder / f"{split}.json", json.dumps(labels, indent=1, ensure_ascii=False) + "\n")
        _write_csv(folder / "labelvocabulary.csv", ("idx", "label"), enumerate(task.labels))
        _write_csv(
            folder / "sources.csv",
            ("file", "split", "groups", "sources"),
            ((clip.name, clip.split, "|".join(clip.groups), "|".join(clip.sources)) for clip in _by_name(clips)),
        )
        _write_licences(folder, task, packages, cache)
        _write_text(folder / "task_metadata.json", json.dumps(task.metadata(), indent=1) + "\n")
        os.replace(folder, final)
    return final


def check_samples(samples: np.ndarray, task: Task, clip: Clip) -> np.ndarray:
    """Raises ValueError unless these are the samples of a clip of this task."""
    length = round(task.seconds * SAMPLE_RATE)
    if samples.shape != (length,):
        raise ValueError(f"{task.name}: {clip.name} has shape {samples.shape}, expected {(length,)}")
    peak = float(np.abs(samples).max())
    if not 0 < peak <= 1:  # NaN neither
        raise ValueError(f"{task.name}: {clip.name} has peak {peak}, expected more than 0 and at most 1")
    return samples


def wav_bytes(samples: np.ndarray) -> bytes:
    """A 16-bit WAV file of samples in [-1, 1]."""
    file = io.BytesIO()
    soundfile.write(file, np.rint(samples * 32767).astype(np.int16), SAMPLE_RATE, "PCM_16", format="WAV")
    return file.getvalue()


def _by_name(clips: Sequence[Clip]) -> list[Clip]:
    return sorted(clips, key=lambda clip: clip.name)


def _write_licences(folder: Path, task: Task, packages: Sequence[str], cache: Path) -> None:
    lines = [
        f"# Sources of {task.name}",
        "",
        "The audio was made from files of these packages of Debian's main archive (which file went where is in",
        "sources.csv): decoded to 16 kHz mono, cut, levelled, and for some tasks mixed. It stays under their licences.",
        "Those named are the ones in a package's copyright file, which is in licences/ and says what they cover.",
        "",
        "| package | version | licences |",
        "|---|---|---|",
    ]
    (folder / "licences").mkdir()
    for package in sorted(packages):
        text = archive.licence_text(package, cache)
        _write_text(folder / "licences" / f"{package}.txt", text)
        names = ", ".join(archive.licence_names(text)) or "see its copyright file"
        lines.append(f"| {package} | {archive.version(package, cache)} | {names.replace('|', '/')} |")
    _write_text(folder / "LICENCES.md", "\n".join(lines) + "\n")


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _unfinished(out_dir: Path) -> Iterator[Path]:
    """A folder for what is not finished: beside `out_dir`, so that this holds whole tasks only.

    Raises:
        ValueError: another process is using it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    # A task takes its place by a rename, which cannot leave a file system.
    beside = out_dir if os.path.ismount(out_dir) else out_dir.resolve().parent
    folder = beside / f".{out_dir.resolve().name}.unfinished"
    folder.mkdir(exist_ok=True)
    with locked(folder, out_dir):
        try:
            yield folder
        finally:
            with suppress(OSError):
                shutil.rmtree(folder)
