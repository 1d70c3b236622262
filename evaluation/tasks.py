"""HEAR tasks: the papers' ten, task folders in HEAR's format, and the scores that heareval writes for them."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hear_encoders.audio import duration_s
from hear_encoders.files import read_json

METADATA_FILE, VOCABULARY_FILE = "task_metadata.json", "labelvocabulary.csv"
EMBEDDING_TYPES = ("scene", "event")
SPLIT_MODES = ("trainvaltest", "new_split_kfold", "presplit_kfold")


# ---- the papers' tasks ----


@dataclass(frozen=True)
class HearTask:
    """One of the papers' ten HEAR tasks.

    Attributes:
        abbreviation, title, hours: as in the papers' Table 1.
        folder: the folder's name in HEAR's distribution: task, version and size.
        metric: hear-eval-kit's name.
        split: how HEAR splits the clips.
    """

    abbreviation: str
    title: str
    folder: str
    metric: str
    hours: float
    split: str

    def matches(self, folder: str) -> bool:
        """Return whether a folder's name stands for this task, in any version."""
        task, size = self.folder.split("-")[0], self.folder.split("-")[-1]
        return folder.startswith(f"{task}-") and folder.endswith(f"-{size}")


_FOLDS, _TRAIN_VALID_TEST = "5 folds", "train, valid, test"

# In the order of the papers' tables: music and pitch, speech, audio.
HEAR_TASKS = (
    HearTask("BO", "Beijing Opera", "beijing_opera-v1.0-hear2021-full", "top1_acc", 0.3, _FOLDS),
    HearTask("Mri-S", "Mridangam Stroke", "mridangam_stroke-v1.5-full", "top1_acc", 1.57, _FOLDS),
    HearTask("Mri-T", "Mridangam Tonic", "mridangam_tonic-v1.5-full", "top1_acc", 1.57, _FOLDS),
    HearTask("NS-5h", "NSynth Pitch 5h", "nsynth_pitch-v2.2.3-5h", "pitch_acc", 5.5, _TRAIN_VALID_TEST),
    HearTask("CD", "Crema-D", "tfds_crema_d-1.0.0-full", "top1_acc", 10.0, _FOLDS),
    HearTask("LC", "LibriCount", "libricount-v1.0.0-hear2021-full", "top1_acc", 8.0, _FOLDS),
    HearTask("SC-5h", "Speech Commands 5h", "speech_commands-v0.0.2-5h", "top1_acc", 6.5, _TRAIN_VALID_TEST),
    HearTask("VL", "VoxLingua107 Top 10", "vox_lingua_top10-hear2021-full", "top1_acc", 5.0, _FOLDS),
    HearTask("E50", "ESC-50", "esc50-v2.0.0-full", "top1_acc", 2.77, _FOLDS),
    HearTask("F50K", "FSD50K", "fsd50k-v1.0-full", "mAP", 100.0, _TRAIN_VALID_TEST),
)


def find_hear_task(*folders: str) -> HearTask | None:
    """Return the HEAR task that the first matching folder name denotes, or None.

    Folder names are needed because HEAR's task names do not distinguish its sizes (5h, 50h, small).
    """
    for folder in folders:
        for task in HEAR_TASKS:
            if task.matches(folder):
                return task
    return None


# ---- metrics ----

ONSET_METRIC = re.compile(r"(?:^|_)onset_(\d+)ms_fms$")
_FRACTIONS = ("_acc", "mAP", "aucroc", "_fms")  # metrics between 0 and 1


def scale(metric: str) -> float:
    """Return the factor from a metric to the number shown: fractions are shown in percent, as in the papers."""
    return 100.0 if metric.endswith(_FRACTIONS) else 1.0


def lower_is_better(metric: str) -> bool:
    """Return whether a hear-eval-kit metric is an error rate."""
    return metric.endswith("_er")


# ---- task folders ----


@dataclass(frozen=True)
class Task:
    """A task folder in HEAR's format.

    Attributes:
        folder: its path.
        title: the task's name in its metadata, without version and size.
        embedding_type, prediction_type, split_mode: as in its metadata.
        metric: the first metric of its metadata, which selects hyperparameters and ranks models.
        classes, clips: how many it has.
        splits: names of its splits or folds.
        fingerprint: SHA-256 of its metadata, labels and clip lists.
    """

    folder: Path
    title: str
    embedding_type: str
    prediction_type: str
    split_mode: str
    metric: str
    classes: int
    clips: int
    splits: tuple[str, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """The folder's name, which is the task's name in the results."""
        return self.folder.name

    @property
    def kfold(self) -> bool:
        """True if the task is cross-validated: each split is tested once, by classifiers trained on the others."""
        return self.split_mode != "trainvaltest"

    def audio_seconds(self, sample_rate: int) -> float:
        """Return the total duration of its clips."""
        return sum(
            duration_s(self.folder / str(sample_rate) / split / clip)
            for split in self.splits
            for clip in read_json(self.folder / f"{split}.json")
        )


def find_tasks(tasks_dir: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Return the task folders in a directory, sorted by name.

    Args:
        names: folders to return; None returns all.

    Raises:
        FileNotFoundError: the directory does not exist, holds no tasks, or lacks one of `names`.
    """
    if not tasks_dir.is_dir():
        raise FileNotFoundError(f"task directory does not exist: {tasks_dir}")
    found = {path.parent.name: path.parent for path in sorted(tasks_dir.glob(f"*/{METADATA_FILE}"))}
    if not found:
        raise FileNotFoundError(f"{tasks_dir} holds no tasks: no folder in it has a {METADATA_FILE}")
    missing = [name for name in names or [] if name not in found]
    if missing:
        raise FileNotFoundError(f"{tasks_dir} has no task {missing[0]!r}; it has {', '.join(found)}")
    return [found[name] for name in sorted(names or found)]


def read_task(folder: Path) -> Task:
    """Read a task folder's metadata, labels and clip lists.

    Raises:
        FileNotFoundError, ValueError: one of its files is missing or not in HEAR's format.
    """
    metadata_file, vocabulary_file = folder / METADATA_FILE, folder / VOCABULARY_FILE
    metadata = read_json(metadata_file)
    try:
        fields = {
            "title": metadata["task_name"],
            "embedding_type": metadata["embedding_type"],
            "prediction_type": metadata["prediction_type"],
            "split_mode": metadata["split_mode"],
            "metric": metadata["evaluation"][0],
            "splits": tuple(metadata["splits"]),
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{metadata_file}: a field is missing or empty: {error}") from error
    for key, choices in (("embedding_type", EMBEDDING_TYPES), ("split_mode", SPLIT_MODES)):
        if fields[key] not in choices:
            raise ValueError(f"{metadata_file}: {key} must be one of {', '.join(choices)}, got {fields[key]!r}")
    split_files = [folder / f"{split}.json" for split in fields["splits"]]
    clips = sum(len(read_json(path)) for path in split_files)
    with open(vocabulary_file, encoding="utf-8", newline="") as file:
        classes = sum(1 for _ in csv.DictReader(file))
    digest = hashlib.sha256()
    for path in (metadata_file, vocabulary_file, *split_files):
        digest.update(path.read_bytes())
    return Task(folder, **fields, classes=classes, clips=clips, fingerprint=digest.hexdigest())


# ---- heareval's scores ----


def read_scores(path: Path, task: Task) -> tuple[float, dict[str, float | None]]:
    """Read the scores that heareval wrote for one seed.

    Returns:
        The score of the task's first metric, and all test scores by metric, averaged over the folds of a k-fold task.
        A score that is not finite is None: the d-prime of perfectly separated classes, for example. An F-measure is 0
        if no event was detected, although sed_eval leaves it undefined; this also holds for a single fold, which
        heareval's own mean would skip.

    Raises:
        ValueError: the first metric's score is missing or not finite.
    """
    results = read_json(path)  # Python's json accepts heareval's Infinity and NaN
    tests = [results[split] for split in task.splits] if task.kfold else [results["test"]]
    suffix = "_mean" if task.kfold else ""
    scores = {}
    for key, value in results["aggregated_scores" if task.kfold else "test"].items():
        if key.startswith("test_") and key.endswith(suffix):
            key = key.removesuffix(suffix)
            if key.endswith(("_fms", "_f_measure")):
                value = sum(0.0 if math.isnan(test[key]) else test[key] for test in tests) / len(tests)
            scores[key.removeprefix("test_")] = value
    scores.pop("score", None)  # repeats the first metric
    score = scores.get(task.metric)
    if score is None or not math.isfinite(score):
        raise ValueError(f"{path}: the test score {task.metric} is {score}")
    return score, {metric: value if math.isfinite(value) else None for metric, value in scores.items()}
