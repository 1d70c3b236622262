"""What a report reads: a folder of results, one folder per model in it and one per task in that.

RESULTS/LABEL/model.json             which weights, through which module, with which options
RESULTS/LABEL/TASK/task.json         metric, classes, clips, seconds of embedding
RESULTS/LABEL/TASK/seed-0000.json    scores of one run
RESULTS/LABEL/TASK/map.json          embeddings in two dimensions, with their labels; need not be there
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HearTask:
    """One of the ten HEAR tasks of the papers."""

    abbreviation: str
    title: str
    folder: str  # regular expression of the folder that HEAR distributes
    metric: str


# In the order of the papers' tables: music and pitch, speech, audio.
HEAR_TASKS = (
    HearTask("BO", "Beijing Opera", r"beijing_opera-.*-full", "top1_acc"),
    HearTask("Mri-S", "Mridangam Stroke", r"mridangam_stroke-.*-full", "top1_acc"),
    HearTask("Mri-T", "Mridangam Tonic", r"mridangam_tonic-.*-full", "top1_acc"),
    HearTask("NS-5h", "NSynth Pitch 5h", r"nsynth_pitch-.*-5h", "pitch_acc"),
    HearTask("CD", "Crema-D", r"tfds_crema_d-.*-full", "top1_acc"),
    HearTask("LC", "LibriCount", r"libricount-.*-full", "top1_acc"),
    HearTask("SC-5h", "Speech Commands 5h", r"speech_commands-.*-5h", "top1_acc"),
    HearTask("VL", "VoxLingua107 Top 10", r"vox_lingua_top10-.*-full", "top1_acc"),
    HearTask("E50", "ESC-50", r"esc50-.*-full", "top1_acc"),
    HearTask("F50K", "FSD50K", r"fsd50k-.*-full", "mAP"),
)

ONSET_METRIC = re.compile(r"(?:^|_)onset_(\d+)ms_fms$")
_VERSION = re.compile(r"-v[\d.]+-full$")
_SEED_FILE = re.compile(r"seed-\d+\.json")
_FRACTIONS = ("_acc", "mAP", "aucroc", "_fms")  # metrics between 0 and 1, shown in percent as the papers do


@dataclass(frozen=True)
class EmbeddingMap:
    """Embeddings in two dimensions."""

    method: str
    points: list[tuple[float, float]]
    labels: list[str]


@dataclass(frozen=True)
class TaskResult:
    """One model's runs on one task. Scores are in percent where the metric is a fraction."""

    name: str  # the papers' abbreviation, or the folder's name, without version and size where that is clear
    folder: str
    hear: HearTask | None
    metric: str
    fingerprint: str | None  # of the task's labels and clips
    scores: dict[int, float]  # by seed
    onsets: dict[int, dict[int, float]]  # onset F-measures: tolerance in ms -> seed -> score
    run_seconds: list[float]
    embedding_seconds: float | None
    audio_seconds: float | None
    classes: int | None
    clips: int | None
    map: EmbeddingMap | None


@dataclass(frozen=True)
class ModelResult:
    """One model's card and tasks."""

    label: str
    card: dict[str, Any]
    tasks: dict[str, TaskResult]


@dataclass
class Results:
    """Everything that was read, and what a reader of the report should know about it."""

    models: list[ModelResult]
    remarks: list[str] = field(default_factory=list)

    def task_results(self) -> list[TaskResult]:
        """All of all models."""
        return [task for model in self.models for task in model.tasks.values()]

    def hear_tasks(self) -> list[str]:
        """Those of the ten that any model has, in the papers' order."""
        names = {task.name for task in self.task_results() if task.hear}
        return [task.abbreviation for task in HEAR_TASKS if task.abbreviation in names]

    def other_tasks(self) -> list[str]:
        """All other tasks, sorted."""
        return sorted({task.name for task in self.task_results() if not task.hear})


def read_results(folders: Sequence[Path], tasks: Iterable[str] | None = None) -> Results:
    """Read folders of results.

    Args:
        folders: each with one folder per model. Files and folders of other names are ignored.
        tasks: the only ones to take: abbreviations of the papers or folder names. All by default.

    Raises:
        FileNotFoundError: where a folder is missing or holds no results.
        ValueError: where a file is not what it should be, or a task that was asked for is nowhere.
    """
    results = Results([])
    cards = [(folder, card) for folder in folders for card in _cards(folder)]
    labels = [card.parent.name for _, card in cards]
    for folder, card in cards:
        label = card.parent.name
        if labels.count(label) > 1:
            label = f"{folder.resolve().name}/{label}"
        if label in (model.label for model in results.models):
            raise ValueError(f"two models are called {label!r}: rename one of the folders")
        results.models.append(_read_model(card, label, results.remarks))
    _shorten_names(results)
    known = {name for task in results.task_results() for name in (task.name, task.folder)}
    if tasks is not None:
        wanted = list(tasks)
        if missing := [task for task in wanted if task not in known]:
            raise ValueError(
                f"no results of task {', '.join(missing)}; there are results of {', '.join(sorted(known))}"
            )
        for model in results.models:
            for name in [name for name, task in model.tasks.items() if not {name, task.folder} & set(wanted)]:
                del model.tasks[name]
    if not any(task.scores for task in results.task_results()):
        raise FileNotFoundError(f"no finished runs (LABEL/TASK/seed-NNNN.json) in {', '.join(map(str, folders))}")
    most = max(len(task.scores) for task in results.task_results())
    for model in results.models:
        if fewer := [f"{task.name} ({len(task.scores)})" for task in model.tasks.values() if len(task.scores) < most]:
            results.remarks.append(
                f"{model.label} has fewer than {most} seeds of {', '.join(sorted(fewer))}. "
                "The interval of its s(m) is over seeds that all tasks have."
            )
    return results


def _shorten_names(results: Results) -> None:
    """Leave version and size out of the names of tasks outside HEAR's ten, unless there are several of a task."""
    folders = {task.folder for task in results.task_results() if not task.hear}
    short = {folder: _VERSION.sub("", folder) for folder in folders}
    names = list(short.values())
    for model in results.models:
        for name, task in list(model.tasks.items()):
            if not task.hear and names.count(short[task.folder]) == 1:
                del model.tasks[name]
                model.tasks[short[task.folder]] = replace(task, name=short[task.folder])


def scale(metric: str) -> float:
    """What a score is multiplied by to be shown."""
    return 100.0 if metric.endswith(_FRACTIONS) else 1.0


def _cards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    cards = sorted(folder.glob("*/model.json"))
    if not cards:
        raise FileNotFoundError(f"{folder} holds no results: expected {folder}/LABEL/model.json")
    return cards


def _read_model(card: Path, label: str, remarks: list[str]) -> ModelResult:
    tasks = {}
    for path in sorted(card.parent.glob("*/task.json")):
        task = _read_task(path, f"{label}, {path.parent.name}", remarks)
        if task.name in tasks:
            raise ValueError(f"{label} has {task.name} twice: {tasks[task.name].folder} and {task.folder}")
        tasks[task.name] = task
    return ModelResult(label, _read_object(card), tasks)


def _read_task(path: Path, where: str, remarks: list[str]) -> TaskResult:
    details = _read_object(path)
    folder = path.parent.name
    metric = details.get("metric")
    if not isinstance(metric, str):
        raise ValueError(f"{path}: expected the name of a metric, got {metric!r}")
    # The results' own folder first: HEAR's task names alone do not tell its sizes (5h, 50h, small) apart.
    names = (folder, Path(str(details.get("folder", ""))).name)
    hear = next((task for name in names for task in HEAR_TASKS if re.fullmatch(task.folder, name)), None)
    if hear and metric != hear.metric:
        remarks.append(f"{where}: measured in {metric}, in the papers in {hear.metric}; so not compared with them.")
        hear = None
    scores: dict[int, float] = {}
    onsets: dict[int, dict[int, float]] = {}
    seconds = []
    for file in sorted(path.parent.iterdir()):
        if not _SEED_FILE.fullmatch(file.name):
            continue
        run = _read_object(file)
        seed, score = run.get("seed"), _number(run.get("score"))
        if not isinstance(seed, int):
            raise ValueError(f"{file}: expected a whole number as seed, got {seed!r}")
        if score is None:
            remarks.append(f"{where}: seed {seed} has no finite score and is left out.")
            continue
        scores[seed] = score * scale(metric)
        for name, value in (run.get("scores") or {}).items():
            if (match := ONSET_METRIC.search(name)) and (number := _number(value)) is not None:
                onsets.setdefault(int(match[1]), {})[seed] = number * scale(name)
        if (taken := _number(run.get("seconds"))) is not None:
            seconds.append(taken)
    map_file = path.with_name("map.json")
    return TaskResult(
        name=hear.abbreviation if hear else folder,
        folder=folder,
        hear=hear,
        metric=metric,
        fingerprint=details.get("fingerprint"),
        scores=scores,
        onsets=dict(sorted(onsets.items())),
        run_seconds=seconds,
        embedding_seconds=_number(details.get("embedding_seconds")),
        audio_seconds=_number(details.get("audio_seconds")),
        classes=_count(details.get("classes")),
        clips=_count(details.get("clips")),
        map=_read_map(map_file) if map_file.is_file() else None,
    )


def _read_map(path: Path) -> EmbeddingMap:
    value = _read_object(path)
    points, labels = value.get("points"), value.get("labels")
    if not isinstance(points, list) or not isinstance(labels, list) or len(points) != len(labels):
        raise ValueError(f"{path}: expected as many labels as points")
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected points [x, y]: {error}") from None
    texts = [" + ".join(map(str, label)) if isinstance(label, list) else str(label) for label in labels]
    finite = [row for row, pair in enumerate(pairs) if all(map(math.isfinite, pair))]
    return EmbeddingMap(str(value.get("method", "")), [pairs[row] for row in finite], [texts[row] for row in finite])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> int | None:
    """A count that may be given as a number, as a list of what is counted, or per split."""
    if isinstance(value, dict):
        counts = [_count(part) for part in value.values()]
        return None if None in counts else sum(counts)
    if isinstance(value, list):
        return len(value)
    number = _number(value)
    return None if number is None else int(number)
