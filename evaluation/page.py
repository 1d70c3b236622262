"""The report as one self-contained HTML page: tables, ranked dots, bars with intervals, maps of embeddings.

This module prepares values; `report.html.j2` lays them out and `report.css` styles them. Charts are SVG strips with
positions in percent of their width, so text keeps its size on a narrow screen. Colors follow the reader's light or dark
setting, and nothing is told by color alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluation.results import EmbeddingMap, Results
from evaluation.tables import Comparison, Entry, Table, ablations, compare_hear, compare_others, standings, tables, text
from evaluation.tasks import ONSET_METRIC, scale

_TEMPLATE_FILE = "report.html.j2"
_COLORS = 10
_MAP_SIZE = 200.0  # side of a map in its own units
_MAP_MARGIN = 6.0
_MAP_LAYERS = 6
_MARKERS = (
    "h0",
    "m-2.4 1.6h4.8l-2.4-4.4z",
    "m-2.2 0h4.4m-2.2-2.2v4.4",
    "m-2-2h4v4h-4z",
    "m-1.8-1.8l3.6 3.6m0-3.6l-3.6 3.6",
)
_NO_LABEL = "(none)"  # for a clip of a multilabel task
_METRICS = {"top1_acc": "accuracy", "pitch_acc": "pitch accuracy", "mAP": "mean average precision"}
_CHANCE_METRICS = ("top1_acc", "pitch_acc")


def page(results: Results, scale: str = "paper") -> str:
    """Return the whole page. `scale` is that of `evaluation.tables.compare_hear`."""
    colors = {model.label: _color(row) for row, model in enumerate(results.models)}
    found = {table.name: table for table in tables(results, scale)}
    sections: list[dict[str, object]] = []
    for comparison in compare_hear(results, scale) + compare_others(results):
        evaluated = {task for entry in comparison.entries if entry.own for task in entry.scores}
        cards = [_card(task, comparison, results) for task in comparison.tasks if task in evaluated]
        sections.append({"id": comparison.name, "title": comparison.title, "comparison": comparison, "cards": cards})
    if printed := ablations(results):
        sections.append({"id": "ablations", "title": "The papers' ablations", "tables": printed})
    if "onsets" in found:
        sections.append({"id": "onsets", "title": "Events", "table": found["onsets"]})
    if maps := [_task_maps(task, results) for task in results.all_tasks() if _maps_of(task, results)]:
        sections.append({"id": "maps", "title": "Maps of embeddings", "maps": maps})
    sections.append({"id": "timing", "title": "Time", "table": found["timing_totals"], "folded": found["timing"]})
    sections.append({"id": "models", "title": "Models", "table": found["models"]})

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(percent=_percent, cell=text, breakable=_breakable)
    return environment.get_template(_TEMPLATE_FILE).render(
        colors=colors,
        lines=standings(results, scale) + results.remarks,
        sections=sections,
        tables=found,
        column_classes=_column_classes,
        map_size=_MAP_SIZE,
    )


def _color(row: int, ramp: str = "c") -> str:
    """Return the style that selects a color of the style sheet: "c" for distinct colors, "r" for shades."""
    return f"--c:var(--{ramp}{row % _COLORS})"


def _percent(value: float, top: float = 100.0) -> str:
    """Return the position of a value on a strip from 0 to `top`."""
    return f"{100 * min(max(value / top, 0.0), 1.0):.2f}%"


def _breakable(name: str) -> Markup:
    """Allow a line break inside a name, but only after its punctuation."""
    return Markup("<wbr/>").join(re.split(r"(?<=[_=/+-])(?=\w)", name))


def _column_classes(table: Table) -> list[str]:
    """Return a CSS class for each column: "name" stays in view while the table scrolls, "text" may wrap."""
    classes = [
        "text" if any(isinstance(row.cells[column], str) for row in table.rows) and name != "Tasks" else ""
        for column, name in enumerate(table.columns)
    ]
    return ["name" if classes[0] else "", *classes[1:]]


# ---- bars of one task ----


@dataclass(frozen=True)
class _Card:
    """Bars of one task's scores. `top` is the right end of their axis."""

    task: str
    title: str
    about: str
    top: float
    chance: float | None
    own: list[Entry]
    published: list[Entry]
    best_published: Entry | None


def _card(task: str, comparison: Comparison, results: Results) -> _Card:
    order = [model.label for model in results.models]
    entries = [entry for entry in comparison.entries if task in entry.scores]
    own = sorted((entry for entry in entries if entry.own), key=lambda entry: order.index(entry.label))
    published = [entry for entry in entries if not entry.own]
    measured, metric = results.of_task(task), comparison.metrics[task]
    classes = next((result.classes for result in measured if result.classes), None)
    clips = next((result.clips for result in measured if result.clips), None)
    chance = 100 / classes if classes and metric in _CHANCE_METRICS else None
    about = [_metric_in_words(metric)]
    about += [f"{count} {unit}" for count, unit in ((classes, "classes"), (clips, "clips")) if count]
    if chance is not None:
        about.append(f"chance {chance:.1f}")
    hear = next((result.hear for result in measured if result.hear), None)
    return _Card(
        task=task,
        title=f"{task}: {hear.title}" if hear else task,
        about=", ".join(about),
        top=100.0 if scale(metric) == 100 else max(entry.scores[task].mean for entry in own) * 1.1 or 1.0,
        chance=chance,
        own=own,
        published=published,
        best_published=max(published, key=lambda entry: entry.scores[task].mean, default=None),
    )


def _metric_in_words(metric: str) -> str:
    if match := ONSET_METRIC.search(metric):
        return f"onset F-measure within {match[1]} ms"
    return _METRICS.get(metric, metric.replace("_", " "))


# ---- maps ----


@dataclass(frozen=True)
class _Path:
    """One SVG path of a map or its legend; `marker` numbers its shape."""

    label: str
    style: str
    marker: int
    d: str


def _maps_of(task: str, results: Results) -> list[tuple[str, EmbeddingMap]]:
    """Return model and map for each model that has a map of a task."""
    found = [(model.label, model.tasks[task].map) for model in results.models if task in model.tasks]
    return [(label, drawn) for label, drawn in found if drawn and drawn.points]


def _task_maps(task: str, results: Results) -> dict[str, object]:
    """Return the maps of one task, with the legend that they share."""
    maps = _maps_of(task, results)
    marks = _Marks([label for _, drawn in maps for label in drawn.labels])
    figures = [
        {"model": model, "method": drawn.method or f"{len(drawn.points)} points", "paths": _scatter(drawn, marks)}
        for model, drawn in maps
    ]
    return {"task": task, "marks": marks, "figures": figures}


class _Marks:
    """Looks of a task's labels: ten colors, then further markers; shades of one color ramp if labels are numbers.

    Args:
        labels: of all points, with repetition. Labels beyond the available looks are gray, the rarest first.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        counts = Counter(labels)
        self.shaded = len(counts) > 2 and all(map(_is_number, counts))
        self.labels = sorted(counts, key=float if self.shaded else str)
        self.gray: set[str] = set()
        if not self.shaded and len(counts) > _COLORS * len(_MARKERS):
            kept = {label for label, _ in counts.most_common(_COLORS * len(_MARKERS))}
            self.gray = set(counts) - kept
            self.labels = [label for label in self.labels if label in kept]
        self._row = {label: row for row, label in enumerate(self.labels)}

    @property
    def ramp(self) -> list[str]:
        """Styles of the color ramp that stands for the legend if there are many shades."""
        return [_color(shade, "r") for shade in range(_COLORS)] if self.shaded and len(self.labels) > _COLORS else []

    @property
    def legend(self) -> list[_Path]:
        """A path for each label that is not gray."""
        return [self.path(label, "M0 0") for label in self.labels]

    def path(self, label: str, *places: str) -> _Path:
        """Return a path that draws a label's marker at each place."""
        shown = label or _NO_LABEL
        if label in self.gray:
            return _Path(shown, "--c:var(--line)", 0, "".join(place + _MARKERS[0] for place in places))
        row = self._row[label]
        if self.shaded:
            style, marker = _color(round(row * (_COLORS - 1) / (len(self.labels) - 1)), "r"), 0
        else:
            style, marker = _color(row), row // _COLORS
        return _Path(shown, style, marker, "".join(place + _MARKERS[marker] for place in places))


def _scatter(drawn: EmbeddingMap, marks: _Marks) -> list[_Path]:
    """Return the paths of a map, both axes on the same scale.

    They are layered: each layer holds a part of every label, so no label covers all others. Gray labels come first.
    """
    xs, ys = zip(*drawn.points)
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    factor = (_MAP_SIZE - 2 * _MAP_MARGIN) / span
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    places: dict[str, list[str]] = {}
    for (x, y), label in zip(drawn.points, drawn.labels):
        right, down = _MAP_SIZE / 2 + (x - middle_x) * factor, _MAP_SIZE / 2 - (y - middle_y) * factor
        places.setdefault(label, []).append(f"M{right:.1f} {down:.1f}")
    order = sorted(places, key=lambda label: label not in marks.gray)
    paths = [marks.path(label, *places[label][layer::_MAP_LAYERS]) for layer in range(_MAP_LAYERS) for label in order]
    return [path for path in paths if path.d]


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").replace(".", "", 1).isdigit()
