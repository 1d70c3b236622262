"""The report as one HTML page that needs nothing else: tables, ranked dots, bars with intervals, maps of embeddings.

Charts of numbers are laid out by the page, with SVG strips in percent of the width, so that text keeps its size on a
narrow screen. Colours follow the reader's light or dark setting; names never depend on colour alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from evaluation.aggregate import Estimate
from evaluation.results import HEAR_TASKS, ONSET_METRIC, Results, TaskResult, scale
from evaluation.tables import (
    Comparison,
    Entry,
    Table,
    compare_hear,
    compare_others,
    places,
    tables,
    text,
)

_STYLE_FILE = Path(__file__).with_name("report.css")
_COLOURS = 10
_MAP_SIZE = 200.0  # side of a map in its own units
_MAP_MARGIN = 6.0
_MAP_LAYERS = 6
# Paths drawn at each point of a map, by marker: dots and squares are zero-length strokes with a cap.
_MARKERS = (
    ("h0", "stroke-width='4.4' stroke-linecap='round'"),
    ("m-2.4 1.6h4.8l-2.4-4.4z", "stroke-width='1.1'"),
    ("m-2.2 0h4.4m-2.2-2.2v4.4", "stroke-width='1.4'"),
    ("m-2-2h4v4h-4z", "stroke-width='1.1'"),
    ("m-1.8-1.8l3.6 3.6m0-3.6l-3.6 3.6", "stroke-width='1.4'"),
)
_MANY_LABELS = 20  # a legend of more than these starts folded
_MANY_LINES = 10  # so does a longer list of sentences
_METRICS = {"top1_acc": "accuracy", "pitch_acc": "pitch accuracy", "mAP": "mean average precision"}
_NO_LABEL = "(none)"  # a clip of a multilabel task
_CHANCE_METRICS = ("top1_acc", "pitch_acc")


def page(results: Results) -> str:
    """The whole page."""
    colours = {model.label: f"--c:var(--c{row % _COLOURS})" for row, model in enumerate(results.models)}
    found = {table.name: table for table in tables(results)}
    sections: list[tuple[str, str, str]] = []
    comparisons = {"hear": compare_hear(results), "others": compare_others(results)}
    for name, comparison in comparisons.items():
        if comparison:
            title = "HEAR tasks" if name == "hear" else "Other tasks"
            sections.append((name, title, _comparison(name, comparison, results, found, colours)))
    if "onsets" in found:
        sections.append(("onsets", "Events", _table(found["onsets"])))
    if maps := _maps(results, colours):
        sections.append(("maps", "Maps of embeddings", maps))
    folded = f"<details><summary>Every task</summary>{_table(found['timing'])}</details>"
    sections.append(("timing", "Time", _table(found["timing_totals"]) + folded))
    sections.append(("models", "Models", _table(found["models"])))

    keys = "".join(
        f"<li><span class='key' style='{colours[model.label]}'></span>{escape(model.label)}</li>"
        for model in results.models
    )
    body = "".join(f"<h2 id='{name}'>{escape(title)}</h2>{html}" for name, title, html in sections)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<title>Evaluation of audio embeddings</title>\n"
        f"<style>{_STYLE_FILE.read_text(encoding='utf-8')}</style></head>\n"
        "<body><h1>Evaluation of audio embeddings</h1>"
        f"<ul class='legend'>{keys}</ul>"
        "<nav>" + "".join(f"<a href='#{name}'>{escape(title)}</a>" for name, title, _ in sections) + "</nav>"
        f"{_fold('Places and remarks', places(results) + results.remarks)}\n{body}</body></html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _fold(title: str, lines: Sequence[str]) -> str:
    """A list, folded where it is long."""
    shown = _list(lines)
    return shown if len(lines) <= _MANY_LINES else f"<details><summary>{escape(title)}</summary>{shown}</details>"


def _comparison(
    name: str, comparison: Comparison, results: Results, found: dict[str, Table], colours: dict[str, str]
) -> str:
    scores = found[f"{name}_scores"]
    parts = []
    if comparison.ranked_tasks:
        ranking = found[f"{name}_aggregate"]
        parts.append(f"<h3>Aggregate score s(m)</h3>{_ranking(comparison, colours)}{_list(ranking.notes)}")
    parts.append(f"<h3>Scores</h3>{_table(scores)}")
    about = "Bars with 95 % intervals; dashed: chance, were all classes equally frequent"
    about += "; grey: published models." if comparison.published else "."
    parts.append(f"<h3>Task by task</h3><p class='soft'>{about}</p><div class='cards'>")
    parts += [_card(task, comparison, results, colours) for task in comparison.tasks]
    parts.append("</div>")
    if comparison.ranked_tasks:
        extremes = found[f"{name}_extremes"]
        parts.append("<details><summary>s(m) in numbers, and the runs that set its scale</summary>")
        parts.append(f"{_table(ranking, notes=False)}{_table(extremes)}</details>")
    return "".join(parts)


def _table(table: Table, notes: bool = True) -> str:
    mixed = len({row.own for row in table.rows}) > 1
    sticky = table.columns.index("Model") if "Model" in table.columns else 0
    # Only a leading column may stay in view: one further right would cover those before it.
    sticky = sticky if sticky == 0 else -1
    textual = [
        any(isinstance(row.cells[column], str) for row in table.rows) and name not in ("Tasks",)
        for column, name in enumerate(table.columns)
    ]

    def css(column: int, extra: str = "") -> str:
        classes = ["name"] if column == sticky else ["text"] if textual[column] else []
        classes += [extra] if extra else []
        return f" class='{' '.join(classes)}'" if classes else ""

    head = "".join(f"<th scope='col'{css(column)}>{escape(name)}</th>" for column, name in enumerate(table.columns))
    rows = []
    for row in table.rows:
        cells = []
        for column, cell in enumerate(row.cells):
            tag = "th scope='row'" if column == sticky else "td"
            best = css(column, "best" if column in row.best else "")
            cells.append(f"<{tag}{best}>{escape(text(cell))}</{tag.split()[0]}>")
        rows.append(f"<tr{' class=own' if row.own else ''}>{''.join(cells)}</tr>")
    shown = _list(table.notes) if notes else ""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(table.title, quote=True)}'>"
        f"<table{' class=mixed' if mixed else ''}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{shown}"
    )


def _percent(value: float, top: float = 100.0) -> str:
    """A place on a strip whose right end is `top`."""
    return f"{100 * min(max(value / top, 0.0), 1.0):.2f}%"


def _grid(height: int) -> str:
    return "".join(f"<line class='grid' x1='{x}%' x2='{x}%' y1='0' y2='{height}'/>" for x in (0, 25, 50, 75, 100))


def _axis(top: float = 100.0) -> str:
    """Numbers under a strip."""
    ticks = []
    for x, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end")):
        quarter = " class='quarter'" if x in (25, 75) else ""
        ticks.append(f"<text{quarter} x='{x}%' y='11' text-anchor='{anchor}'>{x * top / 100:g}</text>")
    return f"<svg class='axis' height='14' aria-hidden='true'>{''.join(ticks)}</svg>"


def _ranking(comparison: Comparison, colours: dict[str, str]) -> str:
    rows = []
    for entry in comparison.entries:
        if entry.aggregate is None:
            continue
        complete = comparison.complete(entry)
        shown = entry.aggregate.estimate
        note = (
            "" if complete else f"<small>{len(entry.aggregate.tasks)} of {len(comparison.ranked_tasks)} tasks</small>"
        )
        rows.append(
            f"<div class='{'own' if entry.own else 'published'}' style='{_colour(entry, colours)}'>"
            f"<span class='place'>{comparison.rank(entry) or '-'}</span><span>{escape(entry.name)}</span>"
            f"<svg height='18' role='img' aria-label='{escape(text(shown), quote=True)}'>{_grid(18)}"
            f"{_interval(shown, 9, 'spread')}<circle class='dot{'' if complete else ' partial'}' "
            f"cx='{_percent(shown.mean)}' cy='9' r='{6 if entry.own else 4}'/></svg>"
            f"<span class='value'>{text(shown)}{note}</span></div>"
        )
    mixed = " mixed" if comparison.published else ""
    return (
        f"<div class='ranking{mixed}'>{''.join(rows)}<div><span></span><span></span>{_axis()}<span></span></div></div>"
    )


def _colour(entry: Entry, colours: dict[str, str]) -> str:
    if not entry.own:
        return "--c:var(--published)"
    return colours[entry.label]


def _interval(shown: Estimate, y: float, css: str, top: float = 100.0) -> str:
    """The interval of an estimate as a horizontal line."""
    if shown.half_width is None:
        return ""
    low, high = (_percent(shown.mean + sign * shown.half_width, top) for sign in (-1, 1))
    return f"<line class='{css}' x1='{low}' x2='{high}' y1='{y}' y2='{y}'/>"


def _card(task: str, comparison: Comparison, results: Results, colours: dict[str, str]) -> str:
    """Bars of one task, and where published models lie."""
    order = list(colours)
    own = sorted(
        (entry for entry in comparison.entries if entry.own and task in entry.scores),
        key=lambda entry: order.index(entry.label),
    )
    published = [entry for entry in comparison.entries if not entry.own]
    metric = comparison.metrics[task]
    percent = scale(metric) == 100
    top = 100.0 if percent else max(entry.scores[task].mean for entry in own) * 1.1 or 1.0
    of_task = [model.tasks[task] for model in results.models if task in model.tasks]
    classes = next((result.classes for result in of_task if result.classes), None)
    chance = 100 / classes if classes and metric in _CHANCE_METRICS else None
    hear = next((hear for hear in HEAR_TASKS if hear.abbreviation == task and comparison.published), None)
    rows = []
    for entry in own:
        shown = entry.scores[task]
        width = _percent(shown.mean, top)
        ends = ""
        if shown.half_width is not None:
            for sign in (-1, 1):
                x = _percent(shown.mean + sign * shown.half_width, top)
                ends += f"<line class='whisker' x1='{x}' x2='{x}' y1='2' y2='12'/>"
        rows.append(
            f"<div class='label' style='{_colour(entry, colours)}'><span><span class='key'></span>{escape(entry.name)}"
            f"</span><b>{text(shown)}</b></div>"
            f"<svg height='14' style='{_colour(entry, colours)}' aria-hidden='true'>{_grid(14)}"
            f"<rect class='bar' x='0' y='3' height='8' width='{width}'/>{_interval(shown, 7, 'whisker', top)}{ends}"
            f"{_chance(chance, 14)}</svg>"
        )
    if published:
        best = max(published, key=lambda entry: entry.scores[task].mean)
        ticks = "".join(
            f"<line class='tick' x1='{_percent(entry.scores[task].mean)}' x2='{_percent(entry.scores[task].mean)}' "
            f"y1='2' y2='12'><title>{escape(entry.name)} {text(entry.scores[task])}</title></line>"
            for entry in published
        )
        rows.append(
            f"<div class='label soft'><span>published; best {escape(best.name)}</span>"
            f"<span>{text(best.scores[task])}</span></div><svg height='14' aria-hidden='true'>{_grid(14)}{ticks}</svg>"
        )
    about = [_metric(metric), *_size(of_task)]
    if chance is not None:
        about.append(f"chance {chance:.1f}")
    title = f"{task}: {hear.title}" if hear else task
    return (
        f"<div class='card'><h3>{escape(title)}</h3><div class='soft'>{escape(', '.join(about))}</div>"
        f"{''.join(rows)}{_axis(top)}</div>"
    )


def _chance(chance: float | None, height: int) -> str:
    if chance is None:
        return ""
    return f"<line class='chance' x1='{_percent(chance)}' x2='{_percent(chance)}' y1='0' y2='{height}'/>"


def _metric(metric: str) -> str:
    """A metric of hear-eval-kit in words."""
    if match := ONSET_METRIC.search(metric):
        return f"onset F-measure within {match[1]} ms"
    return _METRICS.get(metric, metric.replace("_", " "))


def _size(results: Sequence[TaskResult]) -> list[str]:
    """Numbers of classes and clips, where known."""
    classes = next((result.classes for result in results if result.classes), None)
    clips = next((result.clips for result in results if result.clips), None)
    return [f"{count} {name}" for count, name in ((classes, "classes"), (clips, "clips")) if count]


def _maps(results: Results, colours: dict[str, str]) -> str:
    parts = []
    for task in results.hear_tasks() + results.other_tasks():
        found = [
            (model.label, model.tasks[task].map)
            for model in results.models
            if task in model.tasks and model.tasks[task].map and model.tasks[task].map.points
        ]
        if not found:
            continue
        marks = _Marks([label for _, drawn in found for label in drawn.labels])
        figures = []
        for model, drawn in found:
            caption = drawn.method or f"{len(drawn.points)} points"
            figures.append(
                f"<figure><figcaption><span class='key' style='{colours[model]}'></span>{escape(model)}<br>"
                f"{escape(caption)}</figcaption><svg viewBox='0 0 {_MAP_SIZE:g} {_MAP_SIZE:g}' role='img' "
                f"aria-label='{escape(f'Embeddings of {task} by {model}', quote=True)}'>"
                f"{_scatter(drawn.points, drawn.labels, marks)}</svg></figure>"
            )
        parts.append(f"<h3>{escape(task)}</h3>{marks.legend()}<div class='maps'>{''.join(figures)}</div>")
    if not parts:
        return ""
    return (
        "<p>Embeddings of test clips in two dimensions, coloured by label. Distances and empty space depend on the "
        "projection: look for what lies together.</p>" + "".join(parts)
    )


class _Marks:
    """How the labels of a task are drawn: ten colours, then further markers; shades where they are numbers.

    Args:
        labels: of all points, with repetition. Beyond what colours and markers tell apart, rare labels are grey.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        counts = Counter(labels)
        self.shaded = len(counts) > 2 and all(map(_is_number, counts))
        self.labels = sorted(counts, key=float if self.shaded else str)
        self.grey: set[str] = set()
        if not self.shaded and len(counts) > _COLOURS * len(_MARKERS):
            kept = {label for label, _ in counts.most_common(_COLOURS * len(_MARKERS))}
            self.grey = set(counts) - kept
            self.labels = [label for label in self.labels if label in kept]
        self._row = {label: row for row, label in enumerate(self.labels)}

    def look(self, label: str) -> tuple[str, int]:
        """Style and marker of a label."""
        if label in self.grey:
            return "--c:var(--line)", 0
        row = self._row[label]
        if self.shaded:
            return f"--c:var(--r{round(row * (_COLOURS - 1) / (len(self.labels) - 1))})", 0
        return f"--c:var(--c{row % _COLOURS})", row // _COLOURS

    def legend(self) -> str:
        """A list of labels with their marks."""
        if self.shaded and len(self.labels) > _COLOURS:
            shades = "".join(f"<i style='--c:var(--r{shade})'></i>" for shade in range(_COLOURS))
            first, last = escape(self.labels[0]), escape(self.labels[-1])
            return f"<p class='soft'>{first}<span class='ramp'>{shades}</span>{last}</p>"
        items = []
        for label in self.labels:
            style, marker = self.look(label)
            path, stroke = _MARKERS[marker]
            items.append(
                f"<li><svg viewBox='-4 -4 8 8' aria-hidden='true'><path style='{style}' {stroke} d='M0 0{path}'/></svg>"
                f"{escape(label or _NO_LABEL)}</li>"
            )
        if self.grey:
            items.append(f"<li class='soft'>in grey: {len(self.grey)} rarer labels</li>")
        shown = f"<ul class='legend'>{''.join(items)}</ul>"
        if len(items) > _MANY_LABELS:
            return f"<details><summary>{len(self.labels) + len(self.grey)} labels</summary>{shown}</details>"
        return shown


def _scatter(points: Sequence[tuple[float, float]], labels: Sequence[str], marks: _Marks) -> str:
    """Paths of points of one label, both axes to the same scale.

    They are drawn in layers that each hold a part of every label, so that none covers the others; grey ones first.
    """
    xs, ys = zip(*points)
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    factor = (_MAP_SIZE - 2 * _MAP_MARGIN) / span
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    places: dict[str, list[str]] = {}
    for (x, y), label in zip(points, labels):
        across, down = _MAP_SIZE / 2 + (x - middle_x) * factor, _MAP_SIZE / 2 - (y - middle_y) * factor
        places.setdefault(label, []).append(f"M{across:.1f} {down:.1f}")
    paths = []
    for layer in range(_MAP_LAYERS):
        for label in sorted(places, key=lambda label: label not in marks.grey):
            style, marker = marks.look(label)
            path, stroke = _MARKERS[marker]
            if drawn := "".join(place + path for place in places[label][layer::_MAP_LAYERS]):
                paths.append(
                    f"<path style='{style}' {stroke} d='{drawn}'><title>{escape(label or _NO_LABEL)}</title></path>"
                )
    return "".join(paths)


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").replace(".", "", 1).isdigit()
