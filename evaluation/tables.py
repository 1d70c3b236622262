"""What a report says, as tables: results beside the published rows, ranked by s(m); and the tables as text.

A page, Markdown and CSV are made of the same tables, so they cannot differ in what they say.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from typing import Any

from evaluation.aggregate import (
    Aggregate,
    Estimate,
    Extremes,
    aggregate,
    estimate,
    extremes,
    lower_is_better,
    published_rows,
    published_runs,
)
from evaluation.results import HEAR_TASKS, Results, TaskResult

Cell = str | int | float | Estimate | None

COMPARISONS = ("hear", "others")
TABLE_NAMES = (
    "models",
    *(f"{comparison}_{table}" for comparison in COMPARISONS for table in ("aggregate", "scores", "extremes")),
    *("onsets", "timing", "timing_totals"),
)


@dataclass(frozen=True)
class Entry:
    """A model in a comparison: one of the results, or a published one. `name` is unique in it, `label` the model's."""

    name: str
    label: str
    scores: dict[str, Estimate]
    aggregate: Aggregate | None
    printed: dict[str, Estimate] | None  # s(m) as printed, by paper; None where it is one of the results

    @property
    def own(self) -> bool:
        """Whether it is one of the results."""
        return self.printed is None


@dataclass(frozen=True)
class Comparison:
    """Models on a group of tasks, best s(m) first. `ranked_tasks` are those that s(m) is over."""

    title: str
    tasks: list[str]
    ranked_tasks: list[str]
    metrics: dict[str, str]
    bounds: dict[str, Extremes]
    entries: list[Entry]

    @property
    def published(self) -> bool:
        """Whether published models are among the entries."""
        return not all(entry.own for entry in self.entries)

    def complete(self, entry: Entry) -> bool:
        """Whether an entry's s(m) is over all tasks, so that it can be ranked."""
        return entry.aggregate is not None and len(entry.aggregate.tasks) == len(self.ranked_tasks)

    def rank(self, entry: Entry) -> int | None:
        """Place among the complete entries, from 1."""
        ranked = [other for other in self.entries if self.complete(other)]
        return ranked.index(entry) + 1 if entry in ranked else None


@dataclass(frozen=True)
class Row:
    """Cells of a table; `best` are the columns in which no other row is better."""

    cells: list[Cell]
    own: bool = True
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its CSV file."""

    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def compare_hear(results: Results) -> Comparison | None:
    """The results on HEAR's ten beside both papers' models; None where there are none."""
    tasks = [name for name in results.hear_tasks() if any(result.scores for result in _of(results, name))]
    return _compare(results, "HEAR tasks", tasks, published=True) if tasks else None


def compare_others(results: Results) -> Comparison | None:
    """The results on all other tasks, among themselves; None where there are none."""
    tasks = [name for name in results.other_tasks() if any(result.scores for result in _of(results, name))]
    return _compare(results, "Other tasks", tasks, published=False) if tasks else None


def _of(results: Results, task: str) -> list[TaskResult]:
    return [model.tasks[task] for model in results.models if task in model.tasks]


def _compare(results: Results, title: str, tasks: list[str], published: bool) -> Comparison:
    simulated = published_runs() if published else {}
    printed = {row.model: row for row in published_rows()} if published else {}
    aggregates: dict[str, dict[str, Estimate]] = {}
    for row in published_rows() if published else ():
        aggregates.setdefault(row.model, {})[row.paper] = Estimate(*row.aggregate, runs=10)
    metrics = {}
    for task in tasks:
        measured = _of(results, task)
        found = sorted({result.metric for result in measured})
        if len(found) > 1:
            raise ValueError(f"{task} was measured in different metrics: {', '.join(found)}")
        if len({result.fingerprint for result in measured} - {None}) > 1:
            raise ValueError(f"{task} has changed between the models' runs: evaluate them on the same clips")
        metrics[task] = found[0]

    runs = {model: {task: simulated[model][task] for task in tasks} for model in simulated}
    own = {}  # names of the results -> labels
    for model in results.models:
        scores = {task: model.tasks[task].scores for task in tasks if task in model.tasks}
        scores = {task: seeds for task, seeds in scores.items() if seeds}
        if scores:
            name = model.label if model.label not in simulated else f"{model.label} (here)"
            own[name] = model.label
            runs[name] = scores

    # A task that one model alone has would be normalised by that model's own luck.
    shared = [task for task in tasks if sum(task in scores for scores in runs.values()) > 1]
    bounds = extremes(runs, metrics)
    bounds = {task: bounds[task] for task in shared if bounds[task].worst != bounds[task].best}
    entries = []
    for name, scores in runs.items():
        if name in own:
            estimates = {task: estimate(list(values.values())) for task, values in scores.items()}
        else:
            estimates = {task: Estimate(*printed[name].tasks[task], runs=10) for task in tasks}
        total = aggregate(scores, bounds)
        entries.append(Entry(name, own.get(name, name), estimates, total, None if name in own else aggregates[name]))
    entries.sort(key=lambda entry: entry.aggregate.estimate.mean if entry.aggregate else float("-inf"), reverse=True)
    return Comparison(title, tasks, list(bounds), metrics, bounds, entries)


def places(results: Results) -> list[str]:
    """Where each of the results stands, in sentences."""
    comparisons = (compare_hear(results), compare_others(results))
    return [line for comparison in comparisons if comparison for line in summary(comparison)]


def summary(comparison: Comparison) -> list[str]:
    """A sentence for each of the results: its s(m) and its place."""
    lines = []
    ranked = [entry for entry in comparison.entries if comparison.complete(entry)]
    for entry in comparison.entries:
        if not entry.own:
            continue
        if entry.aggregate is None:
            lines.append(f"{entry.name}: no s(m); it takes a task that two models have.")
            continue
        line = f"{entry.name}: s(m) {text(entry.aggregate.estimate)}"
        rank = comparison.rank(entry)
        if rank is None:
            missing = [task for task in comparison.ranked_tasks if task not in entry.aggregate.tasks]
            count = f"{len(entry.aggregate.tasks)} of {len(comparison.ranked_tasks)} tasks"
            line += f" over {count}; not ranked, as it lacks {', '.join(missing)}"
        else:
            line += f" over {_tasks(comparison)}; place {rank} of {len(ranked)}"
            if rank > 1:
                line += f", below {_named(ranked[rank - 2])}"
            if rank < len(ranked):
                line += f"{',' if rank == 1 else ' and'} above {_named(ranked[rank])}"
        lines.append(line + ".")
    return lines


def _named(entry: Entry) -> str:
    return f"{entry.name} ({entry.aggregate.estimate.mean:.1f})"


def _tasks(comparison: Comparison) -> str:
    """What s(m) is over, in words."""
    tasks = comparison.ranked_tasks
    if not comparison.published:
        return f"{len(tasks)} tasks outside HEAR's ten" if len(tasks) > 1 else f"{tasks[0]} alone"
    if len(tasks) == len(HEAR_TASKS):
        return "all ten HEAR tasks"
    return f"{len(tasks)} of the ten HEAR tasks ({', '.join(tasks)})"


def method(comparison: Comparison) -> list[str]:
    """How the numbers of a comparison came about."""
    lines = [
        "Scores are means over seeds with 95 % t-intervals, in percent; n/a where there are fewer than two seeds.",
        "s(m) = 100/|T| · Σ (x - worst)/(best - worst): worst and best over every run of every model in this table; "
        "computed per seed, then averaged.",
    ]
    if comparison.ranked_tasks:
        lines.append(f"Here s(m) is over {_tasks(comparison)}.")
    if left_out := [task for task in comparison.tasks if task not in comparison.ranked_tasks]:
        lines.append(f"Not in s(m), for want of a second model or of any difference: {', '.join(left_out)}.")
    papers = list(dict.fromkeys(paper for entry in comparison.entries for paper in entry.printed or ()))
    if papers:
        lines.append(
            f"Published rows are Table 2 of the {' and '.join(papers)} papers. Only their means and intervals are "
            "known: their runs are simulated (ten normal scores with exactly that mean and interval; of 2000 seeded "
            "draws the one that comes nearest to both printed s columns, each over the models of its own paper)."
        )
        lines.append(
            "Here worst and best are over the models of both papers and the results together, so s(m) of published "
            "rows differs from what either paper printed, over its own 20 models"
            + (
                "."
                if len(comparison.ranked_tasks) == len(HEAR_TASKS)
                else ", and the printed ones are over all ten tasks."
            )
        )
    else:
        lines.append("No published results exist for these tasks: s(m) only tells these models apart.")
    own = {entry.name for entry in comparison.entries if entry.own}
    moved = [
        f"{which} of {task} ({model})"
        for task, bound in comparison.bounds.items()
        for which, model in (("worst", bound.worst_model), ("best", bound.best_model))
        if model in own
    ]
    if papers:
        lines.append(
            f"The results move the scale: they set {', '.join(moved)}; without them every s(m) would be another."
            if moved
            else "All worst and best runs are of published models: the results do not move the scale."
        )
    return lines


def tables(results: Results) -> list[Table]:
    """Everything a report says in numbers."""
    found = [_models_table(results)]
    for name, comparison in zip(COMPARISONS, (compare_hear(results), compare_others(results))):
        if comparison:
            if comparison.ranked_tasks:
                found.append(_ranking(name, comparison))
            found.append(_scores(name, comparison))
            if comparison.ranked_tasks:
                found.append(_extremes(name, comparison))
    if onsets := _onsets(results):
        found.append(onsets)
    found += [_timing(results), _totals(results)]
    return found


def _models_table(results: Results) -> Table:
    rows = []
    for model in results.models:
        card = model.card
        rows.append(
            Row(
                [
                    model.label,
                    _plain(card.get("module")),
                    _plain(card.get("weights")),
                    _plain(card.get("options")),
                    card.get("embedding_size") if isinstance(card.get("embedding_size"), int) else None,
                    _plain(card.get("versions")),
                ]
            )
        )
    return Table("models", "Models", ["Model", "Module", "Weights", "Options", "Embedding size", "Versions"], rows)


def _plain(value: Any) -> str:
    """A JSON value on one line."""
    if value is None or value == {}:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {part if isinstance(part, str) else json.dumps(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _ranking(name: str, comparison: Comparison) -> Table:
    papers = list(dict.fromkeys(paper for entry in comparison.entries for paper in entry.printed or ()))
    rows = [
        Row(
            [
                comparison.rank(entry),
                entry.name,
                entry.aggregate.estimate if entry.aggregate else None,
                f"{len(entry.aggregate.tasks) if entry.aggregate else 0} of {len(comparison.ranked_tasks)}",
                *((entry.printed or {}).get(paper) for paper in papers),
            ],
            entry.own,
        )
        for entry in comparison.entries
    ]
    columns = ["Place", "Model", "s(m)", "Tasks", *(f"printed in {paper}" for paper in papers)]
    return Table(f"{name}_aggregate", f"{comparison.title}: aggregate score", columns, rows, method(comparison))


def _scores(name: str, comparison: Comparison) -> Table:
    best = {}
    for column, task in enumerate(comparison.tasks, start=1):
        means = [round(entry.scores[task].mean, 1) for entry in comparison.entries if task in entry.scores]
        if len(means) > 1:
            best[column] = min(means) if lower_is_better(comparison.metrics[task]) else max(means)
    rows = []
    for entry in comparison.entries:
        cells: list[Cell] = [entry.name, *(entry.scores.get(task) for task in comparison.tasks)]
        top = {
            column for column, cell in enumerate(cells) if column and cell and round(cell.mean, 1) == best.get(column)
        }
        if comparison.ranked_tasks:
            cells.append(entry.aggregate.estimate if entry.aggregate else None)
        rows.append(Row(cells, entry.own, frozenset(top)))
    title = f"{comparison.title}: scores"
    by_metric: dict[str, list[str]] = {}
    for task, metric in comparison.metrics.items():
        by_metric.setdefault(metric, []).append(task)
    note = "Metrics: " + "; ".join(f"{metric} ({', '.join(tasks)})" for metric, tasks in by_metric.items()) + "."
    # The notes on s(m) go with its table, where there is one.
    notes = [note] if comparison.ranked_tasks else [note, *method(comparison)]
    columns = ["Model", *comparison.tasks, *(["s(m)"] if comparison.ranked_tasks else [])]
    return Table(f"{name}_scores", title, columns, rows, notes)


def _extremes(name: str, comparison: Comparison) -> Table:
    rows = [
        Row([task, bound.worst, bound.worst_model, bound.best, bound.best_model])
        for task, bound in comparison.bounds.items()
    ]
    title = f"{comparison.title}: the runs that set the scale of s(m)"
    return Table(
        f"{name}_extremes", title, ["Task", "Worst run", "Worst run's model", "Best run", "Best run's model"], rows
    )


def _onsets(results: Results) -> Table | None:
    found = [(task, model) for task in _task_order(results) for model in results.models if task in model.tasks]
    found = [(task, model) for task, model in found if model.tasks[task].onsets]
    if not found:
        return None
    tolerances = sorted({ms for task, model in found for ms in model.tasks[task].onsets})
    rows = []
    for task, model in found:
        onsets = model.tasks[task].onsets
        estimates = (estimate(list(onsets[ms].values())) if ms in onsets else None for ms in tolerances)
        rows.append(Row([task, model.label, _plain(model.card.get("options")), *estimates]))
    columns = ["Task", "Model", "Options", *(f"within {ms} ms" for ms in tolerances)]
    note = "F-measures in percent of onsets found within a tolerance, for every model and framing of it side by side."
    return Table("onsets", "Events: onset F-measures", columns, rows, [note])


def _task_order(results: Results) -> list[str]:
    return results.hear_tasks() + results.other_tasks()


def _timing(results: Results) -> Table:
    rows = []
    for task in _task_order(results):
        for model in results.models:
            if result := model.tasks.get(task):
                seconds = result.run_seconds
                rows.append(
                    Row(
                        [
                            task,
                            model.label,
                            result.clips,
                            result.audio_seconds,
                            result.embedding_seconds,
                            _speed(result.audio_seconds, result.embedding_seconds),
                            sum(seconds) / len(seconds) if seconds else None,
                            len(result.scores),
                        ]
                    )
                )
    columns = ["Task", "Model", "Clips", "Audio, s", "Embedding, s", "x real time", "s per seed", "Seeds"]
    return Table("timing", "Time per task", columns, rows)


def _totals(results: Results) -> Table:
    rows = []
    for model in results.models:
        timed = [task for task in model.tasks.values() if task.audio_seconds and task.embedding_seconds]
        audio = sum(task.audio_seconds for task in timed)
        embedding = sum(task.embedding_seconds for task in timed)
        runs = [seconds for task in model.tasks.values() for seconds in task.run_seconds]
        speed = _speed(audio, embedding)
        rows.append(Row([model.label, audio / 3600, embedding / 60, speed, len(runs), sum(runs) / 60]))
    columns = ["Model", "Audio, h", "Embedding, min", "x real time", "Runs", "Runs, min"]
    return Table("timing_totals", "Time in all", columns, rows)


def _speed(audio: float | None, taken: float | None) -> float | None:
    return audio / taken if audio and taken else None


def text(cell: Cell) -> str:
    """A cell as a reader sees it."""
    if cell is None:
        return "-"
    if isinstance(cell, Estimate):
        return f"{cell.mean:.1f}±{'n/a' if cell.half_width is None else f'{cell.half_width:.1f}'}"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def markdown(table: Table) -> str:
    """A table with its title and notes. Own rows of a mixed table, and best cells, are bold."""
    mixed = len({row.own for row in table.rows}) > 1
    lines = [f"## {escape_markdown(table.title)}", ""]
    lines += ["| " + " | ".join(map(escape_markdown, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = []
        for column, cell in enumerate(row.cells):
            shown = escape_markdown(text(cell))
            bold = shown and (column in row.best or (mixed and row.own and table.columns[column] == "Model"))
            cells.append(f"**{shown}**" if bold else shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{escape_markdown(note)}\n" for note in table.notes)])


def escape_markdown(value: str) -> str:
    """Text that Markdown leaves as it is."""
    value = re.sub(r"([\\`*\[\]|~#])", r"\\\1", " ".join(value.split()))
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def comma_separated(table: Table) -> str:
    """A table as CSV, numbers in full; a mean, its interval and its runs are three columns."""
    split = [any(isinstance(row.cells[column], Estimate) for row in table.rows) for column in range(len(table.columns))]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    header = []
    for column, wide in zip(table.columns, split):
        header += [column, f"{column} half-width", f"{column} runs"] if wide else [column]
    mixed = len({row.own for row in table.rows}) > 1
    writer.writerow([*header, *(["origin"] if mixed else [])])
    for row in table.rows:
        cells: list[Any] = []
        for cell, wide in zip(row.cells, split):
            parts = list(cell) if isinstance(cell, Estimate) else [cell, None, None] if wide else [cell]
            cells += [round(part, 6) if isinstance(part, float) else part for part in parts]
        writer.writerow([*cells, *(["results" if row.own else "published"] if mixed else [])])
    return output.getvalue()
