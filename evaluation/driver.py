"""Runs heareval on a directory of HEAR tasks, seed by seed, and keeps the scores.

The work is cut into units, each a process of `evaluation.kit` in heareval's environment: embed a task once,
then train and test its classifiers for each seed on these embeddings, and draw a map of its clips. A unit that is done
has left its file in the results; so what is missing is the plan, whenever the command is given again:

    RESULTS/LABEL/model.json           what was evaluated
    RESULTS/LABEL/TASK/task.json       what it was evaluated on, how long embedding took
    RESULTS/LABEL/TASK/seed-0000.json  scores of one seed
    RESULTS/LABEL/TASK/map.json        test clips of a scene task in two dimensions
    RESULTS/LABEL/.work/               logs, and embeddings while they are needed
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.environment import ROOT
from hear_encoders.audio import duration_s
from hear_encoders.files import write_json

METADATA_FILE, VOCABULARY_FILE = "task_metadata.json", "labelvocabulary.csv"
EMBEDDING_TYPES = ("scene", "event")
SPLIT_MODES = ("trainvaltest", "new_split_kfold", "presplit_kfold")
LOG_TAIL_LINES = 8
POLL_S = 0.1
LOCK_WAIT_S = 10.0


# ---- what is evaluated, and on what ----


@dataclass(frozen=True)
class Model:
    """A HEAR module with its arguments.

    Attributes:
        label: its name in the results.
        module: import name.
        weights: what `load_model` is to load: a path, or a name that the module understands. None: its default.
        options: further keyword arguments of `load_model`.
    """

    label: str
    module: str
    weights: str | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", self.label):
            raise ValueError(f"a label is made of letters, digits and ._+=-, got {self.label!r}")

    def arguments(self) -> dict[str, Any]:
        """Arguments of the kit's steps. heareval only takes weights that exist as a file or folder."""
        if self.weights is None:
            return {"module": self.module, "weights_path": None, "options": self.options}
        if os.path.exists(self.weights):
            return {"module": self.module, "weights_path": os.path.abspath(self.weights), "options": self.options}
        # By the name that the HEAR API gives to load_model's first parameter.
        options = {"model_file_path": self.weights, **self.options}
        return {"module": self.module, "weights_path": None, "options": options}


def default_label(module: str, weights: str | None, options: dict[str, Any]) -> str:
    """A label that tells the usual models apart: module, last part of the weights, options."""
    parts = [module.rpartition(".")[2]]
    if weights is not None:
        path = Path(weights)
        parts.append(path.stem if path.is_file() else path.name)
    parts += [f"{key}={value}" for key, value in options.items()]
    return re.sub(r"[^\w.+=-]+", "_", "-".join(parts))


@dataclass(frozen=True)
class Task:
    """A folder in HEAR's format.

    Attributes:
        folder: where it lies; its name is the task's name in the results.
        facts: of task.json: task, embedding_type, prediction_type, split_mode, metric, classes, clips.
        splits: names of splits or folds.
        fingerprint: hash of metadata, labels and lists of clips.
    """

    folder: Path
    facts: dict[str, Any] = field(hash=False)
    splits: tuple[str, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def kfold(self) -> bool:
        """Whether each split is tested on once, by classifiers trained on the others."""
        return self.facts["split_mode"] != "trainvaltest"

    def audio_seconds(self, sample_rate: int) -> float:
        """Length of all its audio."""
        folders = [self.folder / str(sample_rate) / split for split in self.splits]
        return sum(
            duration_s(folder / clip)
            for folder, split in zip(folders, self.splits)
            for clip in json.loads((self.folder / f"{split}.json").read_text(encoding="utf-8"))
        )


def find_tasks(tasks_dir: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Folders of tasks, in order of their names.

    Args:
        names: the folders to take, or None for all.

    Raises:
        FileNotFoundError: no such directory, no task in it, or none of a given name.
    """
    if not tasks_dir.is_dir():
        raise FileNotFoundError(f"no such directory of tasks: {tasks_dir}")
    there = {path.parent.name: path.parent for path in sorted(tasks_dir.glob(f"*/{METADATA_FILE}"))}
    if not there:
        raise FileNotFoundError(f"{tasks_dir} holds no tasks: no folder with a {METADATA_FILE}")
    missing = [name for name in names or [] if name not in there]
    if missing:
        raise FileNotFoundError(f"{tasks_dir} has no task {missing[0]!r}; it has {', '.join(there)}")
    return [there[name] for name in sorted(names or there)]


def read_task(folder: Path) -> Task:
    """Read what a task says about itself.

    Raises:
        FileNotFoundError, ValueError: one of its files is missing or is not as HEAR has it.
    """
    files = [folder / METADATA_FILE, folder / VOCABULARY_FILE]
    metadata = _read_json(files[0])
    try:
        facts = {
            "task": metadata["task_name"],
            "folder": folder.name,
            "embedding_type": metadata["embedding_type"],
            "prediction_type": metadata["prediction_type"],
            "split_mode": metadata["split_mode"],
            "metric": metadata["evaluation"][0],
        }
        splits = tuple(metadata["splits"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{files[0]}: a missing or empty field, {error}") from error
    for key, choices in (("embedding_type", EMBEDDING_TYPES), ("split_mode", SPLIT_MODES)):
        if facts[key] not in choices:
            raise ValueError(f"{files[0]}: {key} must be one of {', '.join(choices)}, got {facts[key]!r}")
    files += [folder / f"{split}.json" for split in splits]
    facts["clips"] = sum(len(_read_json(path)) for path in files[2:])
    with open(files[1], encoding="utf-8", newline="") as file:
        facts["classes"] = sum(1 for _ in csv.DictReader(file))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return Task(folder, facts, splits, digest.hexdigest())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


# ---- scores ----


def read_scores(path: Path, task: Task) -> tuple[float, dict[str, float | None]]:
    """Read the scores that heareval wrote for one seed.

    Returns:
        The score of the task's first metric, and all test scores by name, of k-fold tasks their means over the
        folds. A score that is not a finite number, such as the d-prime of a class told apart perfectly, is None.
        The F-measure of a test in which no event was detected, which sed_eval leaves undefined, is 0, also where
        that is one fold of several, which heareval's mean passes over.

    Raises:
        ValueError: the first metric's score is not there or not finite.
    """
    results = _read_json(path)  # Python's json reads the Infinity and NaN that heareval writes
    tests = [results[split] for split in task.splits] if task.kfold else [results["test"]]
    suffix = "_mean" if task.kfold else ""
    scores = {}
    for key, value in results["aggregated_scores" if task.kfold else "test"].items():
        if key.startswith("test_") and key.endswith(suffix):
            key = key.removesuffix(suffix)
            if key.endswith(("_fms", "_f_measure")):
                value = sum(0.0 if math.isnan(test[key]) else test[key] for test in tests) / len(tests)
            scores[key.removeprefix("test_")] = value
    scores.pop("score", None)  # the first metric's once more
    metric = task.facts["metric"]
    score = scores.get(metric)
    if score is None or not math.isfinite(score):
        raise ValueError(f"{path}: the test score {metric} is {score}")
    return score, {name: value if math.isfinite(value) else None for name, value in scores.items()}


# ---- units ----


@dataclass(frozen=True)
class Unit:
    """A step of the kit for a task; `seed` is None for all steps but "predict"."""

    step: str
    task: Task
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.task.name} {self.step if self.seed is None else f'seed {self.seed}'}"


@dataclass(frozen=True)
class Failure:
    """A unit that did not end well, or a task or model that could not be taken up; why, and its log if it has one."""

    what: str
    reason: str
    log: Path | None = None

    def __str__(self) -> str:
        if self.log is None:
            return f"{self.what}: {self.reason}"
        return "\n".join([f"{self.what}: {self.reason} ({self.log})", *(f"    {line}" for line in tail(self.log))])


class Results:
    """Where things are kept for one model."""

    def __init__(self, results: Path, label: str) -> None:
        self.folder = results / label
        self.work = self.folder / ".work"
        self.model_file = self.folder / "model.json"

    def task_file(self, task: Task) -> Path:
        """What the model was evaluated on."""
        return self.folder / task.name / "task.json"

    def map_file(self, task: Task) -> Path:
        """The map of a scene task."""
        return self.folder / task.name / "map.json"

    def seed_file(self, task: Task, seed: int) -> Path:
        """Scores of one seed."""
        return self.folder / task.name / f"seed-{seed:04d}.json"

    def embeddings(self, task: Task) -> Path:
        """Folder of embeddings, there as a whole or not at all."""
        return self.work / task.name / "embeddings"

    def seed_work(self, task: Task, seed: int) -> Path:
        """heareval's working folder for one seed."""
        return self.work / task.name / f"seed-{seed:04d}"

    def log(self, unit: Unit) -> Path:
        """What the process of a unit printed."""
        name = unit.step if unit.seed is None else f"seed-{unit.seed:04d}"
        return self.work / unit.task.name / f"{name}.log"

    def check(self, task: Task) -> None:
        """Raise ValueError where there are results for another state of this task."""
        path = self.task_file(task)
        if path.exists() and _read_json(path).get("fingerprint") != task.fingerprint:
            raise ValueError(f"the task has changed since it was evaluated: remove {path.parent} to evaluate it anew")

    def plan(self, task: Task, seeds: Sequence[int]) -> list[Unit]:
        """What is still to be done for a task, embedding first."""
        units = [Unit("predict", task, seed) for seed in seeds if not self.seed_file(task, seed).exists()]
        if task.facts["embedding_type"] == "scene" and not self.map_file(task).exists():
            units.append(Unit("map", task))
        if not self.task_file(task).exists() or (units and not self.embeddings(task).is_dir()):
            units.insert(0, Unit("embed", task))
        return units


def tail(path: Path) -> list[str]:
    """The last lines of a log; of a line that was written over, as progress bars are, its last state."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-LOG_TAIL_LINES:]


# ---- running ----


class Driver:
    """Evaluates one model.

    Args:
        model: what to evaluate.
        results: folder of results, of this model and others.
        kit: command that runs a step of the kit, without its arguments.
        jobs: processes at work at once.
        say: called with each line of progress.
    """

    def __init__(
        self, model: Model, results: Path, kit: Sequence[str], jobs: int = 1, say: Callable[[str], None] = print
    ) -> None:
        self.model, self.kit, self.jobs, self.say = model, list(kit), jobs, say
        self.results = Results(results, model.label)
        self.environment = step_environment(jobs)

    def run(self, folders: Sequence[Path], seeds: Sequence[int], keep_embeddings: bool = False) -> list[Failure]:
        """Do what is missing.

        Args:
            folders: of the tasks.
            seeds: for `seed_everything` of PyTorch Lightning.
            keep_embeddings: leave the embeddings of tasks that are complete.

        Returns:
            What failed; everything else is done.

        Raises:
            BlockingIOError: another process is at work on these results.
            ValueError: they are another model's.
        """
        with _locked(self.results.work) as self.lock:
            failure = self._describe()
            if failure:
                return [failure]
            failures, units, tasks = [], [], []
            for folder in folders:
                try:
                    task = read_task(folder)
                    self.results.check(task)
                except (OSError, ValueError) as error:
                    failures.append(Failure(folder.name, str(error)))
                    continue
                tasks.append(task)
                units += self.results.plan(task, seeds)
            failures += self._run_units(units)
            for task in tasks:
                if not self.results.plan(task, seeds):
                    self._clean(task, keep_embeddings)
            return failures

    def _clean(self, task: Task, keep_embeddings: bool) -> None:
        """Remove the big things of a complete task, also what a killed driver may have left of them."""
        embeddings = self.results.embeddings(task)
        for folder in embeddings.parent.glob("*/"):
            if folder.is_dir() and not (keep_embeddings and folder == embeddings):
                shutil.rmtree(folder)

    def _describe(self) -> Failure | None:
        """Load the model once, and write model.json or compare with what is there."""
        output, log = self.results.work / "describe.json", self.results.work / "describe.log"
        process = self._start("describe", {**self.model.arguments(), "output": str(output.absolute())}, log)
        with _ended(process):
            if process.wait() != 0:
                return Failure(self.model.label, "the model could not be loaded", log)
        facts = _read_json(output)
        self.sample_rate = facts["sample_rate"]
        mine = {"module": self.model.module, "options": self.model.options, "fingerprint": facts["fingerprint"]}
        if facts["fingerprint"] is None:  # not torch's: the name of its weights is all there is to go by
            mine["weights"] = self.model.weights
        if self.results.model_file.exists():
            there = _read_json(self.results.model_file)
            for key, value in mine.items():
                if there[key] != value:
                    raise ValueError(
                        f"{self.results.folder} holds results of another model ({key} {there[key]}, not {value}):"
                        " give this one another --name"
                    )
            for name, version in facts["versions"].items():
                if (before := there["versions"].get(name)) != version:
                    self.say(f"{self.model.label}: results there are of {name} {before}, those to come of {version}")
        else:
            model = {"label": self.model.label, "weights": self.model.weights, **mine, **facts}
            write_json(self.results.model_file, model)
        return None

    def _run_units(self, units: Sequence[Unit]) -> list[Failure]:
        waiting, done = deque(units), 0
        unembedded = {unit.task for unit in units if unit.step == "embed"}
        running: dict[Unit, tuple[subprocess.Popen[bytes], float]] = {}
        failures: list[Failure] = []
        lost: set[Task] = set()  # tasks that could not be embedded
        try:
            while waiting or running:
                for unit in list(waiting):
                    if unit.task in lost:
                        waiting.remove(unit)
                        done += 1
                    elif len(running) < self.jobs and (unit.step == "embed" or unit.task not in unembedded):
                        waiting.remove(unit)
                        running[unit] = (self._start_unit(unit), time.monotonic())
                ended = [unit for unit, (process, _) in running.items() if process.poll() is not None]
                if not ended and running:
                    time.sleep(POLL_S)
                for unit in ended:
                    process, started = running.pop(unit)
                    done += 1
                    try:
                        if process.returncode != 0:
                            raise ValueError(f"exit code {process.returncode}")
                        line = self._finish(unit, time.monotonic() - started)
                        unembedded -= {unit.task} if unit.step == "embed" else set()
                    except (OSError, ValueError, KeyError) as error:
                        line = f"FAILED ({error})"
                        failures.append(Failure(str(unit), str(error), self.results.log(unit)))
                        lost |= {unit.task} if unit.step == "embed" else set()
                    self.say(f"[{done}/{len(units)}] {self.model.label}: {unit}: {line}")
        finally:
            for process, _ in running.values():
                with _ended(process):
                    pass
        return failures

    def _start_unit(self, unit: Unit) -> subprocess.Popen[bytes]:
        task, results = unit.task, self.results
        embeddings = str(results.embeddings(task).absolute())
        if unit.step == "embed":
            arguments = {
                **self.model.arguments(),
                "tasks_dir": str(task.folder.parent.absolute()),
                "task": task.name,
                "output": embeddings,
            }
        elif unit.step == "map":
            arguments = {"embeddings": embeddings, "output": str(results.map_file(task).absolute())}
        else:
            folder = results.seed_work(task, unit.seed)
            arguments = {"embeddings": embeddings, "folder": str(folder.absolute()), "seed": unit.seed}
        results.task_file(task).parent.mkdir(parents=True, exist_ok=True)
        return self._start(unit.step, arguments, results.log(unit))

    def _start(self, step: str, arguments: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*self.kit, step, json.dumps(arguments), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,  # heareval and its libraries may leave files where they run
                env=self.environment,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its processes
                pass_fds=[self.lock],
            )

    def _finish(self, unit: Unit, seconds: float) -> str:
        """Write the results of a unit whose process ended well; return what to say about it."""
        task, results = unit.task, self.results
        if unit.step == "map":
            return f"{len(_read_json(results.map_file(task))['points'])} clips ({seconds:.0f} s)"
        if unit.step == "embed":
            took = _read_json(results.embeddings(task) / "profile.embeddings.json")["time_elapsed"]
            audio = task.audio_seconds(self.sample_rate)
            times = {"embedding_seconds": round(took, 3), "audio_seconds": round(audio, 3)}
            write_json(results.task_file(task), {**task.facts, **times, "fingerprint": task.fingerprint})
            return f"{task.facts['clips']} clips, {audio / 60:.1f} minutes, in {took:.0f} s"
        folder = results.seed_work(task, unit.seed)
        scores_file = folder / "test.predicted-scores.json"
        score, scores = read_scores(scores_file, task)
        metric = task.facts["metric"]
        values = {"seed": unit.seed, "metric": metric, "score": score, "scores": scores, "seconds": round(seconds, 3)}
        write_json(results.seed_file(task, unit.seed), values)
        # heareval's own account is kept, its checkpoints and predictions are not.
        os.replace(scores_file, folder.with_suffix(".heareval.json"))
        shutil.rmtree(folder)
        return f"{metric} {score:.4f} ({seconds:.0f} s)"


def step_environment(jobs: int) -> dict[str, str]:
    """Environment variables of the kit's processes: this checkout and the current folder to import from, and threads.

    Each of `jobs` processes gets its share of the cores, or fewer threads if OMP_NUM_THREADS says so.
    """
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        threads = min(threads, int(asked))
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **settings}


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """On leaving, end a process that is still at work."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the only lock on a folder, which is made if need be.

    Yields:
        The lock's file descriptor. A process that inherits it shares the lock: of a driver that was killed it is held
        until its last step has noticed, which is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(f"another process is at work on {folder.parent}") from None
            time.sleep(POLL_S)
        yield file.fileno()
