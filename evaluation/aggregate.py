"""Scores of many runs in one number: means with 95 % intervals, and the papers' aggregate s(m).

The papers normalise a task by the worst and the best *run* (seed) of any model, compute s for each seed and average:

    s(m) = 100 / |T| * sum over tasks t of (x_t(m) - worst_t) / (best_t - worst_t)

Their tables hold means and intervals only. To stand beside them, runs of the published models are simulated: ten
normal scores with exactly the printed mean and interval. The extremes of ten runs are a matter of luck (s moves by
0.14 from draw to draw, all models of a paper together), so among many draws the one is taken whose s columns, each over
the models of its own paper, are nearest to the printed ones.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PUBLISHED_FILE = Path(__file__).with_name("published.csv")

PUBLISHED_SEEDS = 10
_PUBLISHED_TABLE = 2  # in both papers the one with a score per task; the others print s only
_AGGREGATE = "s"  # stands in the file's task column for s(m)
_DRAWS = 2000
_DRAWS_AT_ONCE = 100

Runs = Mapping[str, Mapping[int, float]]  # task -> seed -> score, of one model


class Estimate(NamedTuple):
    """A mean over runs; `half_width` of its 95 % interval is None where there are fewer than two runs."""

    mean: float
    half_width: float | None
    runs: int


class Extremes(NamedTuple):
    """The worst and the best run of a task, and whose they are."""

    worst: float
    best: float
    worst_model: str
    best_model: str


class Aggregate(NamedTuple):
    """s(m) of a model over `tasks`."""

    estimate: Estimate
    tasks: tuple[str, ...]


class PublishedRow(NamedTuple):
    """A model in a paper's main table: mean and half-width of the interval per task, and the printed s(m)."""

    paper: str
    model: str
    source: str
    tasks: dict[str, tuple[float, float]]
    aggregate: tuple[float, float]


def lower_is_better(metric: str) -> bool:
    """Whether a metric of hear-eval-kit is an error."""
    return metric.endswith("_er")


@functools.cache
def t_quantile(degrees: int) -> float:
    """Half-width of the central 95 % of Student's t distribution.

    Args:
        degrees: of freedom, at least 1.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, degrees) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_central(angle: float, degrees: int) -> float:
    """Probability that |t| is below tan(angle) * sqrt(degrees): the finite series for whole degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = sine * cosine if odd else sine
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    return (angle + total) * 2 / math.pi if odd else total


def estimate(scores: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval of runs.

    Args:
        scores: one per run, at least one.
    """
    values = np.asarray(scores, dtype=float)
    if values.size == 0:
        raise ValueError("an estimate needs at least one run, got none")
    half_width = None
    if values.size > 1:
        half_width = float(t_quantile(values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return Estimate(float(values.mean()), half_width, values.size)


def extremes(models: Mapping[str, Runs], metrics: Mapping[str, str] | None = None) -> dict[str, Extremes]:
    """The worst and the best run of every task that any of the models has.

    Args:
        models: runs by the model's name.
        metrics: by task; says where less is better. Not needed for the ten HEAR tasks.
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
    """s(m) of one model over those tasks of `bounds` that it has; None where it has none of them.

    The mean is that of all runs, the interval that over seeds which all these tasks have; the two belong together
    where no seed is missing.

    Args:
        runs: of the model.
        bounds: of the tasks to aggregate; a task whose worst and best are equal says nothing and is left out.
    """
    normalised = {
        task: {seed: 100 * (score - bound.worst) / (bound.best - bound.worst) for seed, score in runs[task].items()}
        for task, bound in bounds.items()
        if runs.get(task) and bound.best != bound.worst
    }
    if not normalised:
        return None
    seeds = set.intersection(*(set(scores) for scores in normalised.values()))
    mean = float(np.mean([np.mean(list(scores.values())) for scores in normalised.values()]))
    half_width = None
    if len(seeds) > 1:
        half_width = estimate([np.mean([scores[seed] for scores in normalised.values()]) for seed in seeds]).half_width
    return Aggregate(Estimate(mean, half_width, len(seeds)), tuple(normalised))


@functools.cache
def published_rows() -> tuple[PublishedRow, ...]:
    """The rows of both papers' main tables, in print order."""
    cells: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    with open(PUBLISHED_FILE, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if int(line["table"]) == _PUBLISHED_TABLE:
                row = cells.setdefault((line["paper"], line["model"], line["source"]), {})
                row[line["task"]] = (float(line["mean"]), float(line["half_width"]))
    return tuple(PublishedRow(*key, tasks=row, aggregate=row.pop(_AGGREGATE)) for key, row in cells.items())


@functools.cache
def published_runs() -> dict[str, dict[str, dict[int, float]]]:
    """Simulated runs of every published model, by model, task and seed. Models of both papers are there once.

    Of all draws the one whose greatest distance to a printed s(m) is smallest; see the module's docstring.
    """
    models = {row.model: row for row in published_rows()}
    tasks = list(published_rows()[0].tasks)
    best, best_distance = None, math.inf
    generator = np.random.default_rng(0)
    for _ in range(0, _DRAWS, _DRAWS_AT_ONCE):
        draws = simulated_runs(list(models.values()), _DRAWS_AT_ONCE, generator)
        distance = np.max([np.abs(error).max(1) for error in _aggregate_errors(draws, list(models))], axis=0)
        if distance.min() < best_distance:
            best, best_distance = draws[distance.argmin()], distance.min()
    return {
        model: {task: dict(enumerate(map(float, scores))) for task, scores in zip(tasks, rows)}
        for model, rows in zip(models, best)
    }


def simulated_runs(rows: Sequence[PublishedRow], draws: int, generator: np.random.Generator) -> np.ndarray:
    """Normal scores that have exactly the printed means and intervals: (draws, models, tasks, seeds)."""
    printed = np.array([list(row.tasks.values()) for row in rows])  # (models, tasks, 2)
    deviation = printed[..., 1] * math.sqrt(PUBLISHED_SEEDS) / t_quantile(PUBLISHED_SEEDS - 1)
    noise = generator.standard_normal((draws, *deviation.shape, PUBLISHED_SEEDS))
    noise -= noise.mean(-1, keepdims=True)
    noise /= noise.std(-1, ddof=1, keepdims=True)
    return printed[..., :1] + deviation[..., None] * noise


def _aggregate_errors(draws: np.ndarray, models: Sequence[str]) -> list[np.ndarray]:
    """Computed less printed s(m), each paper over its own models: per paper (draws, models)."""
    errors = []
    for paper in dict.fromkeys(row.paper for row in published_rows()):
        rows = [row for row in published_rows() if row.paper == paper]
        scores = draws[:, [models.index(row.model) for row in rows]]
        worst, best = scores.min((1, 3), keepdims=True), scores.max((1, 3), keepdims=True)
        computed = 100 * ((scores - worst) / (best - worst)).mean((2, 3))
        errors.append(computed - np.array([row.aggregate[0] for row in rows]))
    return errors
