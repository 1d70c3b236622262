"""The report's tables: results beside the published rows, ranked by s(m), and these tables as Markdown and CSV.

Page, Markdown and CSV are made from the same tables, so they cannot contradict each other.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.aggregate import (
    PUBLISHED_SEEDS,
    Aggregate,
    Estimate,
    Extremes,
    PublishedRow,
    ablation_rows,
    aggregate,
    estimate,
    extremes,
    published_rows,
    published_runs,
)
from evaluation.papers import PAPERS, has_encoder, in_paper
from evaluation.results import ModelRecord, ModelResult, Results
from evaluation.tasks import HEAR_TASKS, lower_is_better

Cell = str | int | float | Estimate | None

_PARAMETERS = "#M parameters"

SCALES = ("paper", "all")  # s(m) on the scale of each paper's own models, or of all models together
COMPARISONS = (*PAPERS, "hear", "others")
ABLATION_TABLES = tuple(dict.fromkeys((row.paper, row.table) for row in ablation_rows()))
TABLE_NAMES = (
    "models",
    *(f"{comparison}_{table}" for comparison in COMPARISONS for table in ("aggregate", "scores", "extremes")),
    *(f"{name}_table{table}" for name, paper in PAPERS.items() for owner, table in ABLATION_TABLES if owner == paper),
    *("onsets", "timing", "timing_totals"),
)
_ABLATION_TITLES = {
    ("AudioMAE++", 3): "RoPE",
    ("AudioMAE++", 4): "decoder dimensions",
    ("AxLSTM", 3): "expansion factor",
    ("AxLSTM", 4): "patch size",
    ("AxLSTM", 5): "gate and flip",
}


@dataclass(frozen=True)
class Entry:
    """A model in a comparison, evaluated here or published.

    Attributes:
        name: unique in the comparison.
        label: the model's own name.
        scores: by task.
        aggregate: s(m); None if no task allows one.
        printed: s(m) as printed, by paper; None for a model evaluated here.
        card: the record of a model evaluated here; None for a published one.
    """

    name: str
    label: str
    scores: dict[str, Estimate]
    aggregate: Aggregate | None
    printed: dict[str, Estimate] | None
    card: ModelRecord | None = None

    @property
    def parameters(self) -> float | None:
        """Millions of parameters of a model evaluated here; None if unknown or none."""
        count = self.card.parameters if self.card else None
        return count / 1e6 if isinstance(count, int) and count else None

    @property
    def own(self) -> bool:
        """True if the model was evaluated here."""
        return self.printed is None


@dataclass(frozen=True)
class Comparison:
    """Models on a group of tasks, best s(m) first. s(m) covers `ranked_tasks`.

    `paper` is the paper whose models alone set the scale of s(m); None if all models of the comparison set it.
    """

    name: str  # begins the names of its tables
    title: str
    paper: str | None
    tasks: list[str]
    ranked_tasks: list[str]
    metrics: dict[str, str]
    bounds: dict[str, Extremes]
    entries: list[Entry]

    @property
    def papers(self) -> list[str]:
        """The papers whose models are among the entries."""
        return list(dict.fromkeys(paper for entry in self.entries for paper in entry.printed or ()))

    def complete(self, entry: Entry) -> bool:
        """Return whether an entry has all ranked tasks, so that its s(m) can be ranked."""
        return entry.aggregate is not None and len(entry.aggregate.tasks) == len(self.ranked_tasks)

    def rank(self, entry: Entry) -> int | None:
        """Return the place among the complete entries, from 1; None for an incomplete one."""
        ranked = [other for other in self.entries if self.complete(other)]
        return ranked.index(entry) + 1 if entry in ranked else None


@dataclass(frozen=True)
class Row:
    """A table row. `best` holds the columns in which no other row is better."""

    cells: list[Cell]
    own: bool = True
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    """A table. `name` is also the name of its CSV file."""

    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """True if the table has both published models and models evaluated here."""
        return len({row.own for row in self.rows}) > 1


def compare_hear(results: Results, scale: str = "paper") -> list[Comparison]:
    """Compare results on HEAR's ten tasks with the papers' Table 2; return nothing if there are no such results.

    Args:
        results: from `read_results`.
        scale: "paper" makes a comparison for each paper, with its models and those evaluated here that belong to it
            (see `evaluation.papers`); worst and best run are those of the paper's own models, as in print. "all" makes
            one comparison of all models, in which worst and best run are those of any model.
    """
    tasks = _scored(results, results.hear_tasks())
    if not tasks:
        return []
    if scale == "all":
        return [_compare(results, results.models, "hear", "HEAR tasks", tasks, published_rows())]
    comparisons = []
    for name, paper in PAPERS.items():
        models = [model for model in results.models if in_paper(model.card, paper)]
        rows = [row for row in published_rows() if row.paper == paper]
        comparisons.append(_compare(results, models, name, f"{paper} paper, Table 2", tasks, rows, paper))
    return comparisons


def compare_others(results: Results) -> list[Comparison]:
    """Compare results on all other tasks with each other; return nothing if there are none."""
    tasks = _scored(results, results.other_tasks())
    title = "Other tasks" if _scored(results, results.hear_tasks()) else "All tasks"
    return [_compare(results, results.models, "others", title, tasks)] if tasks else []


def _scored(results: Results, tasks: list[str]) -> list[str]:
    """Return the tasks that have at least one finished run."""
    return [task for task in tasks if any(result.scores for result in results.of_task(task))]


def _compare(
    results: Results,
    models: Sequence[ModelResult],
    name: str,
    title: str,
    tasks: list[str],
    rows: Sequence[PublishedRow] = (),
    paper: str | None = None,
) -> Comparison:
    """Compare `models`, some of those in `results`, with each other and with published rows."""
    printed = {row.model: row for row in rows}
    simulated = {model: published_runs()[model] for model in printed}
    aggregates: dict[str, dict[str, Estimate]] = {}  # as printed, by model and paper
    for row in rows:
        aggregates.setdefault(row.model, {})[row.paper] = Estimate(*row.aggregate, runs=PUBLISHED_SEEDS)
    metrics = {}
    for task in tasks:
        measured = results.of_task(task)
        found = sorted({result.metric for result in measured})
        if len(found) > 1:
            raise ValueError(f"{task} was scored by different metrics: {', '.join(found)}")
        if len({result.fingerprint for result in measured} - {None}) > 1:
            raise ValueError(f"{task} has changed between the models' runs: evaluate all models on the same clips")
        metrics[task] = found[0]

    published = {model: {task: simulated[model][task] for task in tasks} for model in simulated}
    runs, own = dict(published), {}  # own: name in the comparison -> model
    for model in models:
        scores = {task: model.tasks[task].scores for task in tasks if task in model.tasks}
        scores = {task: seeds for task, seeds in scores.items() if seeds}
        if scores:
            unique = model.label if model.label not in simulated else f"{model.label} (here)"
            own[unique] = model
            runs[unique] = scores

    # A task that only one model has would be normalized by that model's own luck.
    shared = [task for task in tasks if sum(task in scores for scores in runs.values()) > 1]
    bounds = extremes(published if paper else runs, metrics)
    bounds = {task: bounds[task] for task in shared if bounds[task].worst != bounds[task].best}
    entries = []
    for entry, scores in runs.items():
        total = aggregate(scores, bounds)
        if entry in own:
            estimates = {task: estimate(list(values.values())) for task, values in scores.items()}
            entries.append(Entry(entry, own[entry].label, estimates, total, None, own[entry].card))
        else:
            estimates = {task: Estimate(*printed[entry].tasks[task], runs=PUBLISHED_SEEDS) for task in tasks}
            entries.append(Entry(entry, entry, estimates, total, aggregates[entry]))
    entries.sort(key=lambda entry: entry.aggregate.estimate.mean if entry.aggregate else float("-inf"), reverse=True)
    return Comparison(name, title, paper, tasks, list(bounds), metrics, bounds, entries)


def standings(results: Results, scale: str = "paper") -> list[str]:
    """Return the place of each model evaluated here, in sentences."""
    comparisons = compare_hear(results, scale) + compare_others(results)
    return [line for comparison in comparisons for line in summary(comparison)]


def summary(comparison: Comparison) -> list[str]:
    """Return a sentence for each model evaluated here: its s(m) and its place."""
    lines = []
    ranked = [entry for entry in comparison.entries if comparison.complete(entry)]
    for entry in comparison.entries:
        if not entry.own:
            continue
        if entry.aggregate is None:
            lines.append(f"{entry.name}: no s(m), because it needs a task that two models have.")
            continue
        line = f"{entry.name}: s(m) {text(entry.aggregate.estimate)}"
        if comparison.paper:
            line += f" on the {comparison.paper} paper's scale"
        rank = comparison.rank(entry)
        if rank is None:
            missing = [task for task in comparison.ranked_tasks if task not in entry.aggregate.tasks]
            count = f"{len(entry.aggregate.tasks)} of {len(comparison.ranked_tasks)} tasks"
            line += f" over {count}; not ranked, as it lacks {', '.join(missing)}"
        else:
            line += f" over {_ranked_tasks(comparison)}; place {rank} of {len(ranked)}"
            if rank > 1:
                line += f", below {_named(ranked[rank - 2])}"
            if rank < len(ranked):
                line += f"{',' if rank == 1 else ' and'} above {_named(ranked[rank])}"
        lines.append(line + ".")
    return lines


def _named(entry: Entry) -> str:
    return f"{entry.name} ({entry.aggregate.estimate.mean:.1f})"


def _ranked_tasks(comparison: Comparison) -> str:
    """Describe the tasks that s(m) covers."""
    tasks = comparison.ranked_tasks
    if not comparison.papers:
        return f"{len(tasks)} tasks outside HEAR's ten" if len(tasks) > 1 else f"{tasks[0]} alone"
    if len(tasks) == len(HEAR_TASKS):
        return "all ten HEAR tasks"
    return f"{len(tasks)} of the ten HEAR tasks ({', '.join(tasks)})"


def method(comparison: Comparison) -> list[str]:
    """Describe how a comparison's numbers were computed."""
    scale = f"model in the {comparison.paper} paper's Table 2" if comparison.paper else "model in this table"
    lines = [
        "Scores are means over seeds in percent, with 95 % intervals (Student's t); n/a with fewer than two seeds.",
        f"s(m) = 100/|T| · Σ (x - worst)/(best - worst): worst and best over every run of every {scale}; "
        "computed per seed, then averaged.",
    ]
    if any(score.runs == 2 for entry in comparison.entries for score in entry.scores.values()):
        lines.insert(1, "Two seeds give very wide intervals (12.7 standard errors): compare models with three or more.")
    if comparison.ranked_tasks:
        lines.append(f"Here s(m) covers {_ranked_tasks(comparison)}.")
    if left_out := [task for task in comparison.tasks if task not in comparison.ranked_tasks]:
        lines.append(f"Not in s(m), because only one model has them or all runs are equal: {', '.join(left_out)}.")
    if not comparison.papers:
        lines.append("No published results exist for these tasks: s(m) only compares these models with each other.")
        return lines
    all_ten = len(comparison.ranked_tasks) == len(HEAR_TASKS)
    source = f"{' and '.join(comparison.papers)} paper{'s' if len(comparison.papers) > 1 else ''}"
    lines.append(
        f"Published rows are from Table 2 of the {source}: means and intervals only. Their runs are simulated: ten "
        "normal scores with exactly that mean and interval; of 2000 seeded draws, the one closest to both papers' s "
        "columns."
    )
    if comparison.paper:
        lines.append(
            "Models evaluated here do not change the scale; their s(m) can lie below 0 or above 100."
            + ("" if all_ten else " The printed s(m) covers all ten tasks, so it differs from the one here.")
        )
        return lines
    lines.append(
        "Here worst and best cover the models of both papers and the models evaluated here. So the s(m) of published "
        "rows differs from the printed one, which covers the 20 models of its own paper"
        + ("." if all_ten else " and all ten tasks.")
    )
    own = {entry.name for entry in comparison.entries if entry.own}
    moved = [
        f"{which} of {task} ({model})"
        for task, bound in comparison.bounds.items()
        for which, model in (("worst", bound.worst_model), ("best", bound.best_model))
        if model in own
    ]
    lines.append(
        f"The models evaluated here change the scale of s(m): they set {', '.join(moved)}."
        if moved
        else "The models evaluated here do not change the scale of s(m): published models set worst and best."
    )
    return lines


def tables(results: Results, scale: str = "paper") -> list[Table]:
    """Return all tables of a report. `scale` is that of `compare_hear`."""
    found = [_models_table(results)]
    for comparison in compare_hear(results, scale) + compare_others(results):
        if comparison.ranked_tasks:
            found.append(_ranking(comparison))
        found.append(_scores(comparison))
        if comparison.ranked_tasks:
            found.append(_extremes(comparison))
    found += ablations(results)
    if onsets := _onsets(results):
        found.append(onsets)
    found += [_timing(results), _totals(results)]
    return found


def ablations(results: Results) -> list[Table]:
    """Return Tables 3 to 5 of the papers, with the models evaluated here that have the encoder of a printed row.

    s(m) is on the scale of the paper, because these tables print nothing else.
    """
    comparisons = {comparison.paper: comparison for comparison in compare_hear(results)}
    return [_ablation(comparisons[paper], paper, table) for paper, table in ABLATION_TABLES if paper in comparisons]


def _ablation(comparison: Comparison, paper: str, table: int) -> Table:
    printed = [row for row in ablation_rows() if (row.paper, row.table) == (paper, table)]
    own = [entry for entry in comparison.entries if entry.own]
    under: dict[tuple[str, ...], list[Entry]] = {}  # names of printed rows with one encoder -> own models with it
    for entry in own:
        names = tuple(row.model for row in printed if has_encoder(entry.card, (paper, table, row.model)))
        if names:
            under.setdefault(names, []).append(entry)
    rows = []
    for row in printed:
        rows.append(Row([row.model, "as printed", row.parameters, Estimate(*row.aggregate, PUBLISHED_SEEDS)], False))
        for names, entries in under.items():
            if row.model == names[-1]:
                for entry in entries:
                    score = entry.aggregate.estimate if entry.aggregate else None
                    rows.append(Row([" or ".join(names), entry.name, entry.parameters, score]))
    short = next(name for name, title in PAPERS.items() if title == paper)
    notes = [
        "A model evaluated here stands under the printed rows whose encoder it has. Its s(m) is on the scale of the "
        f"paper's Table 2 and covers {_ranked_tasks(comparison)}."
    ]
    if len(comparison.ranked_tasks) < len(HEAR_TASKS):
        notes.append("The printed s(m) covers all ten tasks, so the two are not comparable.")
    if any(len(names) > 1 for names in under):
        notes.append("Rows with different decoders have the same encoder: only the model's name tells which it is.")
    title = f"{paper} paper, Table {table}: {_ABLATION_TITLES[paper, table]}"
    return Table(f"{short}_table{table}", title, ["Row of the paper", "Model", _PARAMETERS, "s(m)"], rows, notes)


def _models_table(results: Results) -> Table:
    columns = ["Model", "Module", "Weights", "Options", "Embedding size", "Versions"]
    rows = []
    for model in results.models:
        card = model.card
        size = card.embedding_size if isinstance(card.embedding_size, int) else None
        about = [_plain(value) for value in (card.module, card.weights, card.options)]
        rows.append(Row([model.label, *about, size, _plain(card.versions)]))
    return Table("models", "Models", columns, rows)


def _plain(value: Any) -> str:
    """Return a JSON value as one line of text."""
    if value is None or value == {}:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {part if isinstance(part, str) else json.dumps(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _ranking(comparison: Comparison) -> Table:
    rows = [
        Row(
            [
                comparison.rank(entry),
                entry.name,
                entry.aggregate.estimate if entry.aggregate else None,
                f"{len(entry.aggregate.tasks) if entry.aggregate else 0} of {len(comparison.ranked_tasks)}",
                *((entry.printed or {}).get(paper) for paper in comparison.papers),
            ],
            entry.own,
        )
        for entry in comparison.entries
    ]
    columns = ["Place", "Model", "s(m)", "Tasks", *(f"printed in {paper}" for paper in comparison.papers)]
    title = f"{comparison.title}: aggregate score"
    return Table(f"{comparison.name}_aggregate", title, columns, rows, method(comparison))


def _scores(comparison: Comparison) -> Table:
    best = {}
    for column, task in enumerate(comparison.tasks, start=2):
        means = [round(entry.scores[task].mean, 1) for entry in comparison.entries if task in entry.scores]
        if len(means) > 1:
            best[column] = min(means) if lower_is_better(comparison.metrics[task]) else max(means)
    rows = []
    for entry in comparison.entries:
        cells: list[Cell] = [entry.name, entry.parameters]
        top = set()
        for column, task in enumerate(comparison.tasks, start=2):
            score = entry.scores.get(task)
            cells.append(score)
            if score and round(score.mean, 1) == best.get(column):
                top.add(column)
        if comparison.ranked_tasks:
            cells.append(entry.aggregate.estimate if entry.aggregate else None)
        rows.append(Row(cells, entry.own, frozenset(top)))
    title = f"{comparison.title}: scores"
    by_metric: dict[str, list[str]] = {}
    for task, metric in comparison.metrics.items():
        by_metric.setdefault(metric, []).append(task)
    note = "Metrics: " + "; ".join(f"{metric} ({', '.join(tasks)})" for metric, tasks in by_metric.items()) + "."
    # The notes on s(m) belong to its own table, if there is one.
    notes = [note] if comparison.ranked_tasks else [note, *method(comparison)]
    columns = ["Model", _PARAMETERS, *comparison.tasks, *(["s(m)"] if comparison.ranked_tasks else [])]
    return Table(f"{comparison.name}_scores", title, columns, rows, notes)


def _extremes(comparison: Comparison) -> Table:
    rows = [
        Row([task, bound.worst, bound.worst_model, bound.best, bound.best_model])
        for task, bound in comparison.bounds.items()
    ]
    title = f"{comparison.title}: the runs that set the scale of s(m)"
    columns = ["Task", "Worst run", "Worst run's model", "Best run", "Best run's model"]
    return Table(f"{comparison.name}_extremes", title, columns, rows)


def _onsets(results: Results) -> Table | None:
    found = [(task, model) for task in results.all_tasks() for model in results.models if task in model.tasks]
    found = [(task, model) for task, model in found if model.tasks[task].onsets]
    if not found:
        return None
    tolerances = sorted({ms for task, model in found for ms in model.tasks[task].onsets})
    rows = []
    for task, model in found:
        onsets = model.tasks[task].onsets
        estimates = (estimate(list(onsets[ms].values())) if ms in onsets else None for ms in tolerances)
        rows.append(Row([task, model.label, _plain(model.card.options), *estimates]))
    columns = ["Task", "Model", "Options", *(f"within {ms} ms" for ms in tolerances)]
    note = "F-measures in percent for onsets found within a tolerance; a model's framings are separate rows."
    return Table("onsets", "Events: onset F-measures", columns, rows, [note])


def _timing(results: Results) -> Table:
    rows = []
    for task in results.all_tasks():
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
    return Table("timing_totals", "Total time", columns, rows)


def _speed(audio: float | None, taken: float | None) -> float | None:
    return audio / taken if audio and taken else None


def text(cell: Cell) -> str:
    """Return a cell as it is shown."""
    if cell is None:
        return "-"
    if isinstance(cell, Estimate):
        return f"{cell.mean:.1f}±{'n/a' if cell.half_width is None else f'{cell.half_width:.1f}'}"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def markdown(table: Table) -> str:
    """Return a table with title and notes. Best cells are bold, and so are own models beside published ones."""
    mixed = table.mixed
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
    """Escape text so that Markdown shows it unchanged."""
    value = re.sub(r"([\\`*\[\]|~#])", r"\\\1", " ".join(value.split()))
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def comma_separated(table: Table) -> str:
    """Return a table as CSV with unrounded numbers; an estimate takes three columns: mean, half-width, runs."""
    split = [any(isinstance(row.cells[column], Estimate) for row in table.rows) for column in range(len(table.columns))]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    header = []
    for column, wide in zip(table.columns, split):
        header += [column, f"{column} half-width", f"{column} runs"] if wide else [column]
    mixed = table.mixed
    writer.writerow([*header, *(["origin"] if mixed else [])])
    for row in table.rows:
        cells: list[Any] = []
        for cell, wide in zip(row.cells, split):
            parts = list(cell) if isinstance(cell, Estimate) else [cell, None, None] if wide else [cell]
            cells += [round(part, 6) if isinstance(part, float) else part for part in parts]
        writer.writerow([*cells, *(["results" if row.own else "published"] if mixed else [])])
    return output.getvalue()
