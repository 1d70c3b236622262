"""Train and evaluate the rows of a paper's table, and show them beside the printed ones.

    python -m evaluation table axlstm/5 --data SHARDS --tasks-dir TASKS --out DIR

DIR is a results folder (see `evaluation.results`), so `python -m evaluation report DIR` reads it, too:

    DIR/settings.json        what all rows in it share: changes to the configs, load_model's options, the data
    DIR/ROW/run/             the row's pretraining run
    DIR/ROW/weights/         its exported encoder
    DIR/ROW/model.json, ...  its results
    DIR/axlstm_table5.md     the table

A row is named after its config in `training/configs/papers/`. Whoever works on a row holds a lock on DIR/ROW, so
commands on several machines that share DIR take different rows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.aggregate import PUBLISHED_SEEDS, Estimate, ablation_rows, published_rows
from evaluation.driver import Driver, Failure, Model
from evaluation.environment import ROOT
from evaluation.papers import MODULE_OF_FAMILY, PAPERS
from evaluation.results import ModelFolder, read_results
from evaluation.tables import Cell, Comparison, Row, Table, compare_hear, compare_others, method
from evaluation.tasks import read_task
from hear_encoders.checkpoint import WEIGHTS_FILE
from hear_encoders.files import locked, write_or_check_settings
from training.config import RunConfig, load_run_config
from training.corpora.shards import JoinedShards, ShardIndex
from training.run_dir import steps_saved

CONFIGS = ROOT / "training" / "configs" / "papers"
SETTINGS_FILE = "settings.json"
_FIRST_LINE = re.compile(r"# (?P<paper>\S+), table (?P<table>\d): (?P<model>.+)")


@dataclass(frozen=True)
class PaperRow:
    """A trained row of a paper's table, and its config; paper and model as in published.csv."""

    paper: str
    table: int
    model: str
    config: Path

    @property
    def short_name(self) -> str:
        """The config's name without its table: "expansion2_exponential_flip"."""
        return self.config.stem.partition("_")[2]


def read_rows(paper: str) -> list[PaperRow]:
    """Return the rows of a paper that have a config, table by table, in print order.

    Args:
        paper: "audiomaepp" or "axlstm".
    """
    rows = []
    for config in (CONFIGS / paper).glob("*.yaml"):
        match = _FIRST_LINE.match(config.read_text(encoding="utf-8"))
        if match is None:
            raise ValueError(f"{config}: its first line does not name a row")
        rows.append(PaperRow(match["paper"], int(match["table"]), match["model"], config))
    printed = [(row.paper, 2, row.model) for row in published_rows()]
    printed += [(row.paper, row.table, row.model) for row in ablation_rows()]
    return sorted(rows, key=lambda row: printed.index((row.paper, row.table, row.model)))


def table_rows(table: str, wanted: Sequence[str] | None = None) -> list[PaperRow]:
    """Return the rows of a table.

    Args:
        table: such as "axlstm/5".
        wanted: short names of the rows to return; None returns all.

    Raises:
        ValueError: no such table or row.
    """
    paper, _, number = table.partition("/")
    tables = {f"{name}/{row.table}": None for name in PAPERS for row in read_rows(name)}
    if table not in tables:
        raise ValueError(f"no table {table!r} to train; there are {', '.join(tables)}")
    rows = [row for row in read_rows(paper) if row.table == int(number)]
    names = [row.short_name for row in rows]
    if unknown := [name for name in wanted or () if name not in names]:
        raise ValueError(f"{table} has no row {', '.join(unknown)}; its rows are {', '.join(names)}")
    return [row for row in rows if wanted is None or row.short_name in wanted]


class Reproduction:
    """Rows of the papers' tables in a folder.

    Args:
        out: the folder.
        data: folders of shards to train on.
        overrides: changes to the configs, "key=value".
        options: keyword arguments for `load_model` when rows are evaluated.
        held_out: shards to test on during training, if any.
        report: called with each line of progress.

    Raises:
        FileNotFoundError: shards are missing.
    """

    def __init__(
        self,
        out: Path,
        data: Sequence[Path],
        overrides: Sequence[str] = (),
        options: dict[str, Any] | None = None,
        held_out: Path | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.out, self.data, self.overrides, self.held_out = out, list(data), list(overrides), held_out
        self.options, self.report = options or {}, report
        shards = JoinedShards([ShardIndex.open(path) for path in data])
        self._records = len(shards)
        self._names: dict[Path, str] = {}
        self._settings = {
            "set": self.overrides,
            "options": self.options,
            "data": [index.fingerprint() for index in shards.indices],
        }

    def run_config(self, row: PaperRow) -> RunConfig:
        """Return the config that a row is trained with."""
        return load_run_config(row.config, self.overrides)

    def name(self, row: PaperRow) -> str:
        """Return the name of a row's folder: that of the first row of its paper with the same config.

        AxLSTM-T with expansion 2, for example, is in Tables 3 to 5; it is trained once.
        """
        if row.config not in self._names:
            config = self.run_config(row)
            rows = read_rows(row.config.parent.name)
            self._names[row.config] = next(other.config.stem for other in rows if self.run_config(other) == config)
        return self._names[row.config]

    def weights(self, row: PaperRow) -> Path:
        """Return the folder of a row's exported encoder, which is complete or missing."""
        return self.out / self.name(row) / "weights"

    def is_finished(self, row: PaperRow, folders: Sequence[Path], seeds: Sequence[int]) -> bool:
        """Return whether a row is trained, and evaluated on all tasks with all seeds."""
        if not (self.weights(row) / WEIGHTS_FILE).exists():
            return False
        results = ModelFolder(self.out, self.name(row))
        try:
            tasks = [read_task(folder) for folder in folders]
            for task in tasks:
                results.check_task(task)
        except (OSError, ValueError):
            return False  # the driver says why
        return not any(results.missing_units(task, seeds) for task in tasks)

    def run(
        self, rows: Sequence[PaperRow], folders: Sequence[Path], seeds: Sequence[int], kit: Sequence[str], jobs: int
    ) -> tuple[list[Failure], list[str]]:
        """Train and evaluate the rows that are not finished and that no other process works on.

        Args:
            rows: the rows.
            folders: task folders.
            seeds: seeds of the evaluation.
            kit, jobs: as for `Driver`.

        Returns:
            The failures, and the names of rows that other processes work on.

        Raises:
            ValueError: the overrides do not fit a row's config, or the folder has rows of other settings or data.
        """
        failures: list[Failure] = []
        waiting = list({self.name(row): row for row in rows}.values())
        write_or_check_settings(
            self.out / SETTINGS_FILE, self._settings, holds="rows made", advice="choose another --out"
        )
        while True:
            begun = len(waiting)
            for row in list(waiting):
                if self.is_finished(row, folders, seeds):
                    self.report(f"{self.name(row)}: finished")
                    waiting.remove(row)
                    continue
                with ExitStack() as claim:
                    if self._claim(row, claim):
                        waiting.remove(row)
                        failures += self._train(row) or self._evaluate(row, folders, seeds, kit, jobs)
            if not waiting or len(waiting) == begun:  # else look again: others may have finished theirs, or ended
                return failures, [self.name(row) for row in waiting]

    def _claim(self, row: PaperRow, stack: ExitStack) -> bool:
        """Lock a row until `stack` closes; return False if another process works on it."""
        folder = self.out / self.name(row)
        (folder / "run").mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(folder))
            with locked(folder / "run", inherited=False):  # pretraining may outlive a killed command
                pass
        except ValueError:
            stack.close()
            return False
        return True

    def _train(self, row: PaperRow) -> list[Failure]:
        """Train a row and export its encoder, unless that is done."""
        if (self.weights(row) / WEIGHTS_FILE).exists():
            return []
        name = self.name(row)
        run = self.out / name / "run"
        total = self.run_config(row).steps(self._records)
        self.report(f"{name}: training {row.model} for {total} optimizer steps")
        arguments = ["--config", row.config, "--out", run]
        for data in self.data:
            arguments += ["--data", data]
        if self.held_out is not None:
            arguments += ["--held-out", self.held_out]
        code = run_module("training.pretrain", *arguments, *self.overrides)
        steps = max(steps_saved(run), default=0)
        if code != 0:
            return [Failure(name, f"training ended with exit code {code}")]
        if steps < total:
            return [Failure(name, f"training stopped at step {steps} of {total}")]
        unfinished = run.with_name(".weights")
        shutil.rmtree(unfinished, ignore_errors=True)
        if code := run_module("training.export", run, unfinished):
            return [Failure(name, f"the export ended with exit code {code}")]
        os.rename(unfinished, self.weights(row))
        return []

    def _evaluate(
        self, row: PaperRow, folders: Sequence[Path], seeds: Sequence[int], kit: Sequence[str], jobs: int
    ) -> list[Failure]:
        module = MODULE_OF_FAMILY[self.run_config(row).encoder.family]
        model = Model(self.name(row), module, str(self.weights(row)), self.options)
        try:
            return Driver(model, self.out, kit, jobs, self.report).run(folders, seeds)
        except ValueError as error:  # these results belong to other weights, for example
            return [Failure(model.label, str(error))]

    def tables(self, rows: Sequence[PaperRow]) -> list[Table]:
        """Return the rows as trained here beside the printed ones: a table for HEAR's tasks, and one for others.

        s(m) on HEAR's tasks is on the paper's scale. On other tasks it is on that of all models in the folder.
        """
        try:
            results = read_results([self.out])
        except FileNotFoundError:
            return []
        hear = [found for found in compare_hear(results) if found.paper == rows[0].paper]
        names = {row: self.name(row) for row in rows}
        return [_side_by_side(names, comparison) for comparison in [*hear, *compare_others(results)]]


def run_module(module: str, *arguments: object) -> int:
    """Run `python -m MODULE` of this checkout; return its exit code. Interrupted, let it save and end first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _side_by_side(names: dict[PaperRow, str], comparison: Comparison) -> Table:
    """Return each row as printed, and as trained here under the given name."""
    paper, number = next((row.paper, row.table) for row in names)
    entries = {entry.label: entry for entry in comparison.entries if entry.own}
    rows = []
    for row, name in names.items():
        cells, parameters, aggregate = _printed(row)
        rows.append(
            Row([row.model, "printed", parameters, *(cells.get(task) for task in comparison.tasks), aggregate], False)
        )
        if entry := entries.get(name):
            scores = [entry.scores.get(task) for task in comparison.tasks]
            total = entry.aggregate.estimate if entry.aggregate else None
            rows.append(Row([row.model, "here", entry.parameters, *scores, total]))
        else:
            rows.append(Row([row.model, "not yet here", None, *[None] * (len(comparison.tasks) + 1)]))
    notes = [line.replace("model in this table", "model in the folder") for line in method(comparison)]
    if comparison.paper is None:
        notes.append("The printed s(m) covers HEAR's ten tasks: compare the order of rows, not the numbers.")
    columns = ["Row of the paper", "", "#M parameters", *comparison.tasks, "s(m)"]
    return Table(f"{comparison.name}_table{number}", f"{paper} paper, Table {number}", columns, rows, notes)


def _printed(row: PaperRow) -> tuple[dict[str, Cell], float | None, Cell]:
    """Return a row's printed scores by task, millions of parameters and s(m)."""
    if row.table == 2:
        found = next(other for other in published_rows() if (other.paper, other.model) == (row.paper, row.model))
        tasks: dict[str, Cell] = {task: Estimate(*cell, PUBLISHED_SEEDS) for task, cell in found.tasks.items()}
        return tasks, None, Estimate(*found.aggregate, PUBLISHED_SEEDS)
    key = (row.paper, row.table, row.model)
    ablation = next(other for other in ablation_rows() if (other.paper, other.table, other.model) == key)
    return {}, ablation.parameters, Estimate(*ablation.aggregate, PUBLISHED_SEEDS)
