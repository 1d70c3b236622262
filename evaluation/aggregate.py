"""Summarize runs: means with 95 % intervals, and the papers' aggregate score s(m).

The papers normalize each task by the worst and the best *run* (seed) of any model, compute s for each seed and average:

    s(m) = 100 / |T| * sum over tasks t of (x_t(m) - worst_t) / (best_t - worst_t)

Their tables print only means and intervals. To place results beside them, runs of the published models are simulated:
ten normal scores with exactly the printed mean and interval. The extremes of ten runs are random (s varies by 0.14 from
draw to draw, together for all models of a paper), so the best of many draws is used: the one whose s columns, each
computed over the models of its own paper, are closest to the printed ones.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from evaluation.tasks import lower_is_better

PUBLISHED_FILE = Path(__file__).with_name("published.csv")

PUBLISHED_SEEDS = 10
_PUBLISHED_TABLE = 2  # of both papers: the table with a score per task; other tables print s only
_AGGREGATE, _PARAMETERS = "s", "parameters"  # in the file's task column: s(m), and millions of parameters
_DRAWS = 2000
_DRAWS_AT_ONCE = 100

Runs = Mapping[str, Mapping[int, float]]  # one model's scores: task -> seed -> score


class Estimate(NamedTuple):
    """A mean over runs. `half_width` belongs to its 95 % interval; None if there are fewer than two runs."""

    mean: float
    half_width: float | None
    runs: int


class Extremes(NamedTuple):
    """A task's worst and best run, and the models they belong to."""

    worst: float
    best: float
    worst_model: str
    best_model: str


class Aggregate(NamedTuple):
    """A model's s(m) over `tasks`."""

    estimate: Estimate
    tasks: tuple[str, ...]


class PublishedRow(NamedTuple):
    """A row of a paper's main table: mean and interval half-width per task, and the printed s(m)."""

    paper: str
    model: str
    source: str
    tasks: dict[str, tuple[float, float]]
    aggregate: tuple[float, float]


class AblationRow(NamedTuple):
    """A row of a paper's Tables 3 to 5: the printed s(m), and millions of parameters where they are printed."""

    paper: str
    table: int
    model: str
    aggregate: tuple[float, float]
    parameters: float | None


def t_quantile(degrees: int) -> float:
    """Return the half-width of the central 95 % of Student's t distribution."""
    return float(stats.t.ppf(0.975, degrees))


def estimate(scores: Sequence[float]) -> Estimate:
    """Return mean and 95 % t-interval of runs.

    Args:
        scores: at least one, one per run.
    """
    values = np.asarray(scores, dtype=float)
    if values.size == 0:
        raise ValueError("an estimate needs at least one run, got none")
    half_width = None
    if values.size > 1:
        half_width = float(t_quantile(values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return Estimate(float(values.mean()), half_width, values.size)


def extremes(models: Mapping[str, Runs], metrics: Mapping[str, str] | None = None) -> dict[str, Extremes]:
    """Return the worst and the best run of each task, over all models.

    Args:
        models: runs by model name.
        metrics: metric by task, to know where lower is better. Not needed for the ten HEAR tasks.
    """
    found = {}
    for task in dict.fromkeys(task for runs in models.values() for task in runs):
        scores = [(score, model) for model, runs in models.items() for score in runs.get(task, {}).values()]
        if scores:
            low, high = min(scores, key=lambda run: run[0]), max(scores, key=lambda run: run[0])
            worst, best = (high, low) if lower_is_better((metrics or {}).get(task, "")) else (low, high)
            found[task] = Extremes(worst[0], best[0], worst[1], best[1])
    return found


def aggregate(runs: Runs, bounds: Mapping[str, Extremes]) -> Aggregate | None:
    """Return a model's s(m) over those tasks in `bounds` that it was run on; None if there are none.

    The mean covers all runs. The interval covers the seeds that all of these tasks have.

    Args:
        runs: the model's runs.
        bounds: worst and best run of the tasks to aggregate. A task whose worst equals its best is left out.
    """
    normalized = {
        task: {seed: 100 * (score - bound.worst) / (bound.best - bound.worst) for seed, score in runs[task].items()}
        for task, bound in bounds.items()
        if runs.get(task) and bound.best != bound.worst
    }
    if not normalized:
        return None
    seeds = set.intersection(*(set(scores) for scores in normalized.values()))
    mean = float(np.mean([np.mean(list(scores.values())) for scores in normalized.values()]))
    half_width = None
    if len(seeds) > 1:
        half_width = estimate([np.mean([scores[seed] for scores in normalized.values()]) for seed in seeds]).half_width
    return Aggregate(Estimate(mean, half_width, len(seeds)), tuple(normalized))


@functools.cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return the rows of both papers' main tables, in print order."""
    cells: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    with open(PUBLISHED_FILE, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if int(line["table"]) == _PUBLISHED_TABLE:
                row = cells.setdefault((line["paper"], line["model"], line["source"]), {})
                row[line["task"]] = (float(line["mean"]), float(line["half_width"]))
    return tuple(PublishedRow(*key, tasks=row, aggregate=row.pop(_AGGREGATE)) for key, row in cells.items())


@functools.cache
def ablation_rows() -> tuple[AblationRow, ...]:
    """Return the rows of both papers' Tables 3 to 5, in print order."""
    cells: dict[tuple[str, int, str], dict[str, tuple[str, str]]] = {}
    with open(PUBLISHED_FILE, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if int(line["table"]) != _PUBLISHED_TABLE:
                row = cells.setdefault((line["paper"], int(line["table"]), line["model"]), {})
                row[line["task"]] = (line["mean"], line["half_width"])
    rows = []
    for key, row in cells.items():
        mean, half_width = map(float, row[_AGGREGATE])
        parameters = float(row[_PARAMETERS][0]) if _PARAMETERS in row else None
        rows.append(AblationRow(*key, aggregate=(mean, half_width), parameters=parameters))
    return tuple(rows)


@functools.cache
def published_runs() -> dict[str, dict[str, dict[int, float]]]:
    """Return simulated runs of the published models: model -> task -> seed -> score. Models in both papers count once.

    The draw returned is the one whose largest error against a printed s(m) is smallest; see the module's docstring.
    """
    models = {row.model: row for row in published_rows()}
    tasks = list(published_rows()[0].tasks)
    best, smallest = None, math.inf
    generator = np.random.default_rng(0)
    for _ in range(0, _DRAWS, _DRAWS_AT_ONCE):
        draws = simulated_runs(list(models.values()), _DRAWS_AT_ONCE, generator)
        worst = np.max([np.abs(error).max(1) for error in _aggregate_errors(draws, list(models))], axis=0)
        if worst.min() < smallest:
            best, smallest = draws[worst.argmin()], worst.min()
    return {
        model: {task: dict(enumerate(map(float, scores))) for task, scores in zip(tasks, rows)}
        for model, rows in zip(models, best)
    }


def simulated_runs(rows: Sequence[PublishedRow], draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return normal scores with exactly the printed means and intervals: (draws, models, tasks, seeds)."""
    printed = np.array([list(row.tasks.values()) for row in rows])  # (models, tasks, 2)
    deviation = printed[..., 1] * math.sqrt(PUBLISHED_SEEDS) / t_quantile(PUBLISHED_SEEDS - 1)
    noise = generator.standard_normal((draws, *deviation.shape, PUBLISHED_SEEDS))
    noise -= noise.mean(-1, keepdims=True)
    noise /= noise.std(-1, ddof=1, keepdims=True)
    return printed[..., :1] + deviation[..., None] * noise


def _aggregate_errors(draws: np.ndarray, models: Sequence[str]) -> list[np.ndarray]:
    """Return computed minus printed s(m) for each paper, over that paper's models: arrays (draws, models)."""
    errors = []
    for paper in dict.fromkeys(row.paper for row in published_rows()):
        rows = [row for row in published_rows() if row.paper == paper]
        scores = draws[:, [models.index(row.model) for row in rows]]
        worst, best = scores.min((1, 3), keepdims=True), scores.max((1, 3), keepdims=True)
        computed = 100 * ((scores - worst) / (best - worst)).mean((2, 3))
        errors.append(computed - np.array([row.aggregate[0] for row in rows]))
    return errors
