"""The results folder. The driver writes it, the report reads it, and file names and keys are known only here.

RESULTS/LABEL/model.json           the model: module, weights, options, library versions
RESULTS/LABEL/TASK/task.json       the task it was evaluated on, and how long embedding took
RESULTS/LABEL/TASK/seed-0000.json  scores of one seed
RESULTS/LABEL/TASK/map.json        test clips of a scene task in two dimensions; optional
RESULTS/LABEL/.work/               logs, and embeddings while they are needed
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from evaluation.tasks import HEAR_TASKS, ONSET_METRIC, HearTask, Task, find_hear_task, scale
from hear_encoders.files import read_json, write_json, write_or_check_settings

MODEL_FILE, TASK_FILE, MAP_FILE, WORK_FOLDER = "model.json", "task.json", "map.json", ".work"
_SEED_FILE = re.compile(r"seed-\d+\.json")
_VERSION = re.compile(r"-v[\d.]+-full$")

Record = TypeVar("Record", "ModelRecord", "TaskRecord", "SeedRecord", "EmbeddingMap")


# ---- the files: field names are the JSON keys ----


@dataclass(frozen=True)
class ModelRecord:
    """model.json. `fingerprint` hashes the weights; None if the model is not a torch module.

    `encoder` is the config of this project's encoders; None for other models.
    """

    label: str
    module: str
    weights: str | None
    options: dict[str, Any]
    fingerprint: str | None
    sample_rate: int
    embedding_size: int
    parameters: int | None
    encoder: dict[str, Any] | None
    versions: dict[str, str]


@dataclass(frozen=True)
class TaskRecord:
    """task.json. `fingerprint` hashes the task's labels and clip lists."""

    task: str
    folder: str
    embedding_type: str
    prediction_type: str
    split_mode: str
    metric: str
    classes: int
    clips: int
    embedding_seconds: float
    audio_seconds: float
    fingerprint: str


@dataclass(frozen=True)
class SeedRecord:
    """seed-NNNN.json. `score` is that of `metric`, `scores` has all test scores."""

    seed: int
    metric: str
    score: float
    scores: dict[str, float | None]
    seconds: float


@dataclass(frozen=True)
class EmbeddingMap:
    """map.json: test clips in two dimensions, and how they were laid out."""

    method: str
    points: list[tuple[float, float]]
    labels: list[str]


def write_record(path: str | os.PathLike[str], record: Record) -> None:
    """Write one file of the results."""
    write_json(path, asdict(record))


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read one file of the results. A key that the file lacks reads as None; values are not checked.

    Raises:
        ValueError: not a JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    known: dict[str, Any] = {key.name: value.get(key.name) for key in fields(kind)}
    return kind(**known)


# ---- one model's folder, as the driver fills it ----


@dataclass(frozen=True)
class Unit:
    """One process's work: a step ("embed", "predict" or "map") for a task. Only "predict" has a seed."""

    step: str
    task: Task
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.task.name} {self.step if self.seed is None else f'seed {self.seed}'}"


class ModelFolder:
    """RESULTS/LABEL: one model's results and work files."""

    def __init__(self, results: Path, label: str) -> None:
        self.path = results / label
        self.work = self.path / WORK_FOLDER

    def task_file(self, task: Task) -> Path:
        """Return the path of task.json."""
        return self.path / task.name / TASK_FILE

    def map_file(self, task: Task) -> Path:
        """Return the path of map.json."""
        return self.path / task.name / MAP_FILE

    def seed_file(self, task: Task, seed: int) -> Path:
        """Return the path of a seed's scores."""
        return self.path / task.name / f"seed-{seed:04d}.json"

    def embeddings(self, task: Task) -> Path:
        """Return the folder of embeddings, which is either complete or missing."""
        return self.work / task.name / "embeddings"

    def seed_work(self, task: Task, seed: int) -> Path:
        """Return heareval's working folder for a seed."""
        return self.work / task.name / f"seed-{seed:04d}"

    def log(self, unit: Unit) -> Path:
        """Return the file that receives the output of a unit's process."""
        name = unit.step if unit.seed is None else f"seed-{unit.seed:04d}"
        return self.work / unit.task.name / f"{name}.log"

    def write_or_check_model(self, model: ModelRecord) -> dict[str, str]:
        """Write model.json, or check that it describes the same model.

        Returns:
            Library versions at the time when model.json was written.

        Raises:
            ValueError: the folder holds results of another model.
        """
        free = {"label", "sample_rate", "embedding_size", "parameters", "encoder", "versions"}
        if model.fingerprint is not None:
            free.add("weights")  # the same weights may lie elsewhere now
        record = write_or_check_settings(
            self.path / MODEL_FILE,
            asdict(model),
            holds="results of another model,",
            advice="choose another --name",
            free=free,
        )
        return record["versions"]

    def check_task(self, task: Task) -> None:
        """Raise ValueError if the folder's results belong to an earlier version of a task."""
        path = self.task_file(task)
        if path.exists() and read_record(path, TaskRecord).fingerprint != task.fingerprint:
            raise ValueError(f"the task has changed since it was evaluated: remove {path.parent} to evaluate it again")

    def write_task(self, task: Task, embedding_seconds: float, audio_seconds: float) -> None:
        """Write task.json."""
        record = TaskRecord(
            task=task.title,
            folder=task.name,
            embedding_type=task.embedding_type,
            prediction_type=task.prediction_type,
            split_mode=task.split_mode,
            metric=task.metric,
            classes=task.classes,
            clips=task.clips,
            embedding_seconds=round(embedding_seconds, 3),
            audio_seconds=round(audio_seconds, 3),
            fingerprint=task.fingerprint,
        )
        write_record(self.task_file(task), record)

    def write_seed(self, task: Task, seed: int, score: float, scores: dict[str, float | None], seconds: float) -> None:
        """Write the scores of a seed."""
        write_record(self.seed_file(task, seed), SeedRecord(seed, task.metric, score, scores, round(seconds, 3)))

    def missing_units(self, task: Task, seeds: Sequence[int]) -> list[Unit]:
        """Return the units whose results are missing for a task, embedding first."""
        units = [Unit("predict", task, seed) for seed in seeds if not self.seed_file(task, seed).exists()]
        if task.embedding_type == "scene" and not self.map_file(task).exists():
            units.append(Unit("map", task))
        if not self.task_file(task).exists() or (units and not self.embeddings(task).is_dir()):
            units.insert(0, Unit("embed", task))
        return units

    def remove_work(self, task: Task, keep_embeddings: bool) -> None:
        """Remove a task's embeddings and working folders, including those that a killed driver left; keep the logs."""
        embeddings = self.embeddings(task)
        for folder in embeddings.parent.glob("*/"):
            if folder.is_dir() and not (keep_embeddings and folder == embeddings):
                shutil.rmtree(folder)


# ---- all results, as the report reads them ----


@dataclass(frozen=True)
class TaskResult:
    """One model's runs on one task. Scores are in percent if the metric is a fraction."""

    name: str  # the papers' abbreviation, or the folder's name, without version and size unless ambiguous
    folder: str
    hear: HearTask | None
    metric: str
    fingerprint: str | None
    scores: dict[int, float]  # seed -> score
    onsets: dict[int, dict[int, float]]  # onset F-measures: tolerance in ms -> seed -> score
    run_seconds: list[float]
    embedding_seconds: float | None
    audio_seconds: float | None
    classes: int | None
    clips: int | None
    map: EmbeddingMap | None


@dataclass(frozen=True)
class ModelResult:
    """One model and its results by task name."""

    label: str
    card: ModelRecord
    tasks: dict[str, TaskResult]


@dataclass
class Results:
    """All models' results, and remarks that a reader of the report should see."""

    models: list[ModelResult]
    remarks: list[str] = field(default_factory=list)

    def task_results(self) -> list[TaskResult]:
        """Return the task results of all models."""
        return [task for model in self.models for task in model.tasks.values()]

    def of_task(self, name: str) -> list[TaskResult]:
        """Return each model's result on one task."""
        return [model.tasks[name] for model in self.models if name in model.tasks]

    def hear_tasks(self) -> list[str]:
        """Return those of HEAR's ten tasks that any model has, in the papers' order."""
        names = {task.name for task in self.task_results() if task.hear}
        return [task.abbreviation for task in HEAR_TASKS if task.abbreviation in names]

    def other_tasks(self) -> list[str]:
        """Return all other tasks, sorted."""
        return sorted({task.name for task in self.task_results() if not task.hear})

    def all_tasks(self) -> list[str]:
        """Return HEAR's tasks, then the others."""
        return self.hear_tasks() + self.other_tasks()


def read_results(folders: Sequence[Path], tasks: Iterable[str] | None = None) -> Results:
    """Read results folders.

    Args:
        folders: each holds one folder per model. Other files and folders in it are ignored.
        tasks: abbreviations from the papers, or folder names; None reads all tasks.

    Raises:
        FileNotFoundError: a folder is missing or holds no results.
        ValueError: a file is malformed, a requested task has no results, or two models have the same name.
    """
    results = Results([])
    model_files = [(folder, path) for folder in folders for path in _model_files(folder)]
    labels = [path.parent.name for _, path in model_files]
    for folder, path in model_files:
        label = path.parent.name
        if labels.count(label) > 1:
            label = f"{folder.resolve().name}/{label}"
        if label in (model.label for model in results.models):
            raise ValueError(f"two models are called {label!r}: rename one of the folders")
        results.models.append(_read_model(path, label, results.remarks))
    _shorten_names(results)
    if tasks is not None:
        _keep_tasks(results, set(tasks))
    if not any(task.scores for task in results.task_results()):
        raise FileNotFoundError(f"no finished runs (LABEL/TASK/seed-NNNN.json) in {', '.join(map(str, folders))}")
    most = max(len(task.scores) for task in results.task_results())
    for model in results.models:
        if fewer := [f"{task.name} ({len(task.scores)})" for task in model.tasks.values() if len(task.scores) < most]:
            results.remarks.append(
                f"{model.label} has fewer than {most} seeds of {', '.join(sorted(fewer))}. "
                "The interval of its s(m) covers the seeds that all tasks have."
            )
    return results


def _model_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = sorted(folder.glob(f"*/{MODEL_FILE}"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no results: expected {folder}/LABEL/{MODEL_FILE}")
    return found


def _shorten_names(results: Results) -> None:
    """Drop version and size from the names of tasks outside HEAR's ten, unless two tasks would share a name."""
    folders = {task.folder for task in results.task_results() if not task.hear}
    short = {folder: _VERSION.sub("", folder) for folder in folders}
    names = list(short.values())
    for model in results.models:
        for name, task in list(model.tasks.items()):
            if not task.hear and names.count(short[task.folder]) == 1:
                del model.tasks[name]
                model.tasks[short[task.folder]] = replace(task, name=short[task.folder])


def _keep_tasks(results: Results, wanted: set[str]) -> None:
    """Remove the results of all but the wanted tasks."""
    known = {name for task in results.task_results() for name in (task.name, task.folder)}
    if missing := sorted(wanted - known):
        raise ValueError(f"no results of task {', '.join(missing)}; there are results of {', '.join(sorted(known))}")
    for model in results.models:
        for name, task in list(model.tasks.items()):
            if not {name, task.folder} & wanted:
                del model.tasks[name]


def _read_model(path: Path, label: str, remarks: list[str]) -> ModelResult:
    tasks = {}
    for task_file in sorted(path.parent.glob(f"*/{TASK_FILE}")):
        task = _read_task_result(task_file, f"{label}, {task_file.parent.name}", remarks)
        if task.name in tasks:
            raise ValueError(f"{label} has {task.name} twice: {tasks[task.name].folder} and {task.folder}")
        tasks[task.name] = task
    return ModelResult(label, read_record(path, ModelRecord), tasks)


def _read_task_result(path: Path, where: str, remarks: list[str]) -> TaskResult:
    record = read_record(path, TaskRecord)
    folder, metric = path.parent.name, record.metric
    if not isinstance(metric, str):
        raise ValueError(f"{path}: expected a metric's name, got {metric!r}")
    hear = find_hear_task(folder, Path(str(record.folder)).name)
    if hear and metric != hear.metric:
        remarks.append(f"{where}: scored by {metric}, in the papers by {hear.metric}; so not compared with them.")
        hear = None
    scores: dict[int, float] = {}
    onsets: dict[int, dict[int, float]] = {}
    run_seconds = []
    for file in sorted(path.parent.iterdir()):
        if not _SEED_FILE.fullmatch(file.name):
            continue
        run = read_record(file, SeedRecord)
        if not isinstance(run.seed, int):
            raise ValueError(f"{file}: expected an integer seed, got {run.seed!r}")
        if (score := _finite(run.score)) is None:
            remarks.append(f"{where}: seed {run.seed} has no finite score and is left out.")
            continue
        scores[run.seed] = score * scale(metric)
        for name, value in (run.scores or {}).items():
            if (match := ONSET_METRIC.search(name)) and (value := _finite(value)) is not None:
                onsets.setdefault(int(match[1]), {})[run.seed] = value * scale(name)
        if (seconds := _finite(run.seconds)) is not None:
            run_seconds.append(seconds)
    map_file = path.with_name(MAP_FILE)
    return TaskResult(
        name=hear.abbreviation if hear else folder,
        folder=folder,
        hear=hear,
        metric=metric,
        fingerprint=record.fingerprint,
        scores=scores,
        onsets=dict(sorted(onsets.items())),
        run_seconds=run_seconds,
        embedding_seconds=_finite(record.embedding_seconds),
        audio_seconds=_finite(record.audio_seconds),
        classes=_count(record.classes),
        clips=_count(record.clips),
        map=_read_map(map_file) if map_file.is_file() else None,
    )


def _read_map(path: Path) -> EmbeddingMap:
    """Read a map, without points that are not finite."""
    record = read_record(path, EmbeddingMap)
    points, labels = record.points, record.labels
    if not isinstance(points, list) or not isinstance(labels, list) or len(points) != len(labels):
        raise ValueError(f"{path}: expected as many labels as points")
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected points [x, y]: {error}") from None
    texts = [" + ".join(map(str, label)) if isinstance(label, list) else str(label) for label in labels]
    finite = [row for row, pair in enumerate(pairs) if all(map(math.isfinite, pair))]
    return EmbeddingMap(str(record.method or ""), [pairs[row] for row in finite], [texts[row] for row in finite])


def _count(value: Any) -> int | None:
    """Return an integer as it is, anything else as None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _finite(value: Any) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
