"""Evaluate a model with heareval on a directory of HEAR tasks, seed by seed.

The work is divided into units, each a process of `evaluation.kit` in heareval's environment. A unit embeds a task, or
trains and tests its classifiers for one seed on those embeddings, or draws a map of its test clips. A finished unit has
left its file in the results folder (see `evaluation.results`), so the same command, given again, runs only missing
units.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.environment import ROOT
from evaluation.results import EmbeddingMap, ModelFolder, ModelRecord, Unit, read_record
from evaluation.tasks import read_scores, read_task
from hear_encoders.files import locked, read_json
from hear_encoders.threads import usable_cpus, wait_passively

LOG_TAIL_LINES = 8
_POLL_S = 0.5
LOCK_WAIT_S = 10.0  # a killed driver's last processes hold the lock until they notice and end


@dataclass(frozen=True)
class Model:
    """A HEAR module with its arguments.

    Attributes:
        label: its name in the results.
        module: import name.
        weights: path, or a name that the module understands, for `load_model`; None loads the module's default.
        options: further keyword arguments for `load_model`.
    """

    label: str
    module: str
    weights: str | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", self.label):
            raise ValueError(f"a label consists of letters, digits and ._+=-, got {self.label!r}")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that a kit step needs to load the model."""
        weights, options = self.weights, self.options
        if weights is not None and os.path.exists(weights):
            weights = os.path.abspath(weights)
        elif weights is not None:  # heareval only takes existing paths; this is HEAR's name for the first parameter
            weights, options = None, {"model_file_path": weights, **options}
        return {"module": self.module, "weights_path": weights, "options": options}


def default_label(module: str, weights: str | None, options: dict[str, Any]) -> str:
    """Return a label made of the module's name, the last part of the weights' path, and the options."""
    parts = [module.rpartition(".")[2]]
    if weights is not None:
        path = Path(weights)
        parts.append(path.stem if path.is_file() else path.name)
    parts += [f"{key}={value}" for key, value in options.items()]
    return re.sub(r"[^\w.+=-]+", "_", "-".join(parts))


@dataclass(frozen=True)
class Failure:
    """A unit, task or model that failed, the reason, and its log if there is one."""

    subject: str
    reason: str
    log: Path | None = None

    def __str__(self) -> str:
        if self.log is None:
            return f"{self.subject}: {self.reason}"
        return "\n".join([f"{self.subject}: {self.reason} ({self.log})", *(f"    {line}" for line in tail(self.log))])


def tail(path: Path) -> list[str]:
    """Return the last lines of a log; of a line that a progress bar overwrote, only its last state."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-LOG_TAIL_LINES:]


class Driver:
    """Evaluates one model.

    Args:
        model: the model to evaluate.
        results: results folder, shared with other models.
        kit: command that runs a kit step, without the step's arguments.
        jobs: number of processes at once.
        report: called with each line of progress.
    """

    def __init__(
        self, model: Model, results: Path, kit: Sequence[str], jobs: int = 1, report: Callable[[str], None] = print
    ) -> None:
        self.model, self.kit, self.jobs, self.report = model, list(kit), jobs, report
        self.results = ModelFolder(results, model.label)
        self.environment = step_environment(jobs)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()
        self._lock: int | None = None  # file descriptor that the processes inherit
        self._sample_rate = 0

    def run(self, folders: Sequence[Path], seeds: Sequence[int], keep_embeddings: bool = False) -> list[Failure]:
        """Run the units whose results are missing.

        Args:
            folders: task folders.
            seeds: seeds for PyTorch Lightning's `seed_everything`.
            keep_embeddings: keep the embeddings of finished tasks.

        Returns:
            The failures; everything else is done.

        Raises:
            ValueError: another process is writing these results, or they belong to another model.
        """
        self.results.work.mkdir(parents=True, exist_ok=True)
        with (
            locked(self.results.work, name=self.results.path, wait_s=LOCK_WAIT_S) as self._lock,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            try:
                if failure := pool.submit(self._describe).result():
                    return [failure]
                failures, units, tasks = [], [], []
                for folder in folders:
                    try:
                        task = read_task(folder)
                        self.results.check_task(task)
                    except (OSError, ValueError) as error:
                        failures.append(Failure(folder.name, str(error)))
                        continue
                    tasks.append(task)
                    units += self.results.missing_units(task, seeds)
                failures += self._run_units(units, pool)
            except BaseException:  # Ctrl-C, for example. The pool then waits for its threads, they for their processes
                self._stop()
                raise
            for task in tasks:
                if not self.results.missing_units(task, seeds):
                    self.results.remove_work(task, keep_embeddings)
            return failures

    def _describe(self) -> Failure | None:
        """Load the model once; write model.json or compare with it."""
        model, output, log = self.model, self.results.work / "describe.json", self.results.work / "describe.log"
        try:
            self._run_step("describe", log, **model.arguments(), output=output)
        except ChildProcessError:
            return Failure(model.label, "the model could not be loaded", log)
        record = replace(
            read_record(output, ModelRecord),
            label=model.label,
            module=model.module,
            weights=model.weights,
            options=model.options,
        )
        self._sample_rate = record.sample_rate
        earlier = self.results.write_or_check_model(record)
        for name, version in record.versions.items():
            if earlier.get(name) != version:
                self.report(f"{model.label}: earlier results used {name} {earlier.get(name)}, new ones use {version}")
        return None

    def _run_units(self, units: Sequence[Unit], pool: ThreadPoolExecutor) -> list[Failure]:
        """Run units in order, `jobs` at once; a task's other units wait until it is embedded."""
        waiting, done = list(units), 0
        not_embedded = {unit.task for unit in units if unit.step == "embed"}
        running: dict[Future[str], Unit] = {}
        failures: list[Failure] = []
        while waiting or running:
            ready = [unit for unit in waiting if unit.step == "embed" or unit.task not in not_embedded]
            for unit in ready[: self.jobs - len(running)]:
                waiting.remove(unit)
                running[pool.submit(self._run_unit, unit)] = unit
            # With a timeout, because a signal may reach another thread, and this one notices it when it wakes up.
            for future in wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                done += 1
                try:
                    message = future.result()
                    if unit.step == "embed":
                        not_embedded.remove(unit.task)
                except (OSError, ValueError, KeyError) as error:
                    message = f"FAILED ({error})"
                    failures.append(Failure(str(unit), str(error), self.results.log(unit)))
                    if unit.step == "embed":
                        done += sum(other.task == unit.task for other in waiting)
                        waiting = [other for other in waiting if other.task != unit.task]
                self.report(f"[{done}/{len(units)}] {self.model.label}: {unit}: {message}")
        return failures

    def _run_unit(self, unit: Unit) -> str:
        """Run one unit in a process and write its results; return a progress message.

        Raises:
            OSError, ValueError, KeyError: the process failed, or its output is not as expected.
        """
        self.results.task_file(unit.task).parent.mkdir(parents=True, exist_ok=True)
        run = {"embed": self._embed, "map": self._draw_map, "predict": self._predict}[unit.step]
        return run(unit, self.results.embeddings(unit.task), self.results.log(unit))

    def _embed(self, unit: Unit, embeddings: Path, log: Path) -> str:
        task, model = unit.task, self.model.arguments()
        self._run_step("embed", log, **model, tasks_dir=task.folder.parent, task=task.name, output=embeddings)
        seconds = read_json(embeddings / "profile.embeddings.json")["time_elapsed"]
        audio_seconds = task.audio_seconds(self._sample_rate)
        self.results.write_task(task, seconds, audio_seconds)
        return f"{task.clips} clips, {audio_seconds / 60:.1f} minutes, in {seconds:.0f} s"

    def _draw_map(self, unit: Unit, embeddings: Path, log: Path) -> str:
        output = self.results.map_file(unit.task)
        seconds = self._run_step("map", log, embeddings=embeddings, output=output)
        return f"{len(read_record(output, EmbeddingMap).points)} test clips in two dimensions ({seconds:.0f} s)"

    def _predict(self, unit: Unit, embeddings: Path, log: Path) -> str:
        folder = self.results.seed_work(unit.task, unit.seed)
        seconds = self._run_step("predict", log, embeddings=embeddings, folder=folder, seed=unit.seed)
        scores_file = folder / "test.predicted-scores.json"
        score, scores = read_scores(scores_file, unit.task)
        self.results.write_seed(unit.task, unit.seed, score, scores, seconds)
        # Keep heareval's own account, but not its checkpoints and predictions.
        os.replace(scores_file, folder.with_suffix(".heareval.json"))
        shutil.rmtree(folder)
        return f"{unit.task.metric} {score:.4f} ({seconds:.0f} s)"

    def _run_step(self, step: str, log: Path, **arguments: Any) -> float:
        """Run a kit step in a process that writes its output to `log`; return the seconds it took.

        Raises:
            ChildProcessError: the exit code is not 0.
        """
        started = time.monotonic()
        process = self._start(step, arguments, log)
        self._processes.add(process)
        if self._stopping.is_set():  # `_stop` may have missed this process
            process.kill()
        code = process.wait()
        self._processes.remove(process)
        if code != 0:
            raise ChildProcessError(f"exit code {code}")
        return time.monotonic() - started

    def _start(self, step: str, arguments: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*self.kit, step, json.dumps(arguments, default=_absolute), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,  # heareval and its libraries may write files to the current folder
                env=self.environment,
                start_new_session=True,  # Ctrl-C goes to the driver alone, which then kills its processes
                pass_fds=[] if self._lock is None else [self._lock],
            )

    def _stop(self) -> None:
        """Kill all processes, including those about to start."""
        self._stopping.set()
        for process in list(self._processes):
            process.kill()


def _absolute(path: Path) -> str:
    """Return a path in a form that JSON and a process in another folder understand."""
    return str(path.absolute())


def step_environment(jobs: int) -> dict[str, str]:
    """Return the environment variables for the kit's processes.

    They import from this checkout and the current folder. Each of `jobs` processes gets an equal share of the cores
    that may be used, or fewer CPU threads if OMP_NUM_THREADS says so.
    """
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    threads = max(1, usable_cpus() // jobs)
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdigit() and int(requested) > 0:
        threads = min(threads, int(requested))
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **settings}
    wait_passively(environment)
    return environment
