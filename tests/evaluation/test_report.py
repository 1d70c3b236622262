"""The papers' aggregate score, and the evaluation report."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import aggregate as scores
from evaluation import report
from evaluation.page import page
from evaluation.papers import ENCODERS, has_encoder
from evaluation.papers import PAPERS as PAPERS_BY_NAME
from evaluation.results import ModelRecord, read_results
from evaluation.tables import TABLE_NAMES, compare_hear, compare_others, markdown, summary, tables, text
from evaluation.tasks import HEAR_TASKS, find_hear_task
from hear_encoders.config import EncoderConfig, config_to_dict, preset
from hear_encoders.nn.build import ENCODER_OF_CONFIG
from hear_encoders.papers import ROWS

ROOT = Path(__file__).parents[2]
HEAR_FOLDERS = {
    "BO": "beijing_opera-v1.0-hear2021-full",
    "Mri-S": "mridangam_stroke-v1.5-full",
    "Mri-T": "mridangam_tonic-v1.5-full",
    "NS-5h": "nsynth_pitch-v2.2.3-5h",
    "CD": "tfds_crema_d-1.0.0-full",
    "LC": "libricount-v1.0.0-hear2021-full",
    "SC-5h": "speech_commands-v0.0.2-5h",
    "VL": "vox_lingua_top10-hear2021-full",
    "E50": "esc50-v2.0.0-full",
    "F50K": "fsd50k-v1.0-full",
}
PAPERS = tuple(PAPERS_BY_NAME.values())


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def add_model(results: Path, label: str, **card: object) -> Path:
    card = {"label": label, "module": "hear_axlstm", "weights": "w", "options": {}, "embedding_size": 384} | card
    write(results / label / "model.json", card | {"versions": {"torch": "2.13.0"}})
    return results / label


def add_task(model: Path, folder: str, runs: list[float], metric: str = "top1_acc", **details: object) -> Path:
    """Add a task with these scores, as fractions, for seeds 0, 1, ..."""
    metric = hear.metric if (hear := find_hear_task(folder)) else metric
    details = {"task": folder, "folder": folder, "metric": metric, "classes": 4, "clips": 100} | details
    write(model / folder / "task.json", {"embedding_seconds": 5.0, "audio_seconds": 200.0} | details)
    for seed, score in enumerate(runs):
        run = {"seed": seed, "metric": metric, "score": score, "scores": {metric: score}, "seconds": 3.0}
        write(model / folder / f"seed-{seed:04d}.json", run)
    return model / folder


def add_like(
    results: Path, label: str, published: str, tasks: tuple[str, ...] = tuple(HEAR_FOLDERS), **card: object
) -> Path:
    """Add a model with the simulated runs of a published model."""
    model = add_model(results, label, **card)
    for task in tasks:
        runs = scores.published_runs()[published][task]
        add_task(model, HEAR_FOLDERS[task], [score / 100 for score in runs.values()])
    return model


# ---- scores ----


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (9, 2.2621572), (29, 2.0452296), (99, 1.9842170)],
)
def test_t_quantiles_match_published_tables(degrees, quantile):
    assert scores.t_quantile(degrees) == pytest.approx(quantile, abs=1e-6)


def test_interval_of_known_runs():
    shown = scores.estimate([1.0, 2.0, 3.0, 4.0])
    assert shown.mean == 2.5
    assert shown.half_width == pytest.approx(3.1824463 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert scores.estimate([7.0]) == (7.0, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        scores.estimate([])


def test_aggregate_by_hand():
    models = {"a": {"x": {0: 10.0, 1: 30.0}, "y": {0: 1.0, 1: 2.0}}, "b": {"x": {0: 50.0, 1: 40.0}, "y": {0: 5.0}}}
    bounds = scores.extremes(models)
    assert bounds["x"] == (10.0, 50.0, "a", "b")
    found = scores.aggregate(models["a"], bounds)
    assert found.tasks == ("x", "y")
    assert found.estimate.mean == pytest.approx(np.mean([(0 + 0) / 2, (50 + 25) / 2]))
    assert found.estimate.half_width == pytest.approx(scores.estimate([0.0, 37.5]).half_width)
    assert scores.aggregate(models["b"], bounds).estimate.half_width is None  # the two tasks share one seed
    assert scores.aggregate({"z": {0: 1.0}}, bounds) is None


def test_lower_error_rates_are_better():
    models = {"a": {"x": {0: 0.2}}, "b": {"x": {0: 0.8}}}
    bounds = scores.extremes(models, {"x": "segment_1s_er"})
    assert [scores.aggregate(models[name], bounds).estimate.mean for name in "ab"] == [100.0, 0.0]


# ---- the papers ----


def test_published_rows_are_complete_and_agree_between_the_papers():
    rows = scores.published_rows()
    assert [sum(row.paper == paper for row in rows) for paper in PAPERS] == [20, 20]
    assert all(list(row.tasks) == [task.abbreviation for task in HEAR_TASKS] for row in rows)
    by_model = {}
    for row in rows:
        assert by_model.setdefault(row.model, row.tasks) == row.tasks
    assert len(by_model) == 27


def test_simulated_runs_have_the_printed_means_and_intervals():
    rows = {row.model: row for row in scores.published_rows()}
    for model, runs in scores.published_runs().items():
        for task, by_seed in runs.items():
            shown = scores.estimate(list(by_seed.values()))
            assert (shown.mean, shown.half_width) == pytest.approx(rows[model].tasks[task], abs=1e-9)


@pytest.mark.parametrize("paper", PAPERS)
def test_each_printed_s_is_reproduced_over_the_models_of_its_paper(paper):
    runs = scores.published_runs()
    rows = [row for row in scores.published_rows() if row.paper == paper]
    bounds = scores.extremes({row.model: runs[row.model] for row in rows})
    errors = {row.model: scores.aggregate(runs[row.model], bounds).estimate.mean - row.aggregate[0] for row in rows}
    assert max(map(abs, errors.values())) < 0.3, errors
    intervals = [scores.aggregate(runs[row.model], bounds).estimate.half_width - row.aggregate[1] for row in rows]
    assert np.mean(np.abs(intervals)) < 0.1


@pytest.mark.parametrize(("paper", "worst", "mean"), [("AudioMAE++", 0.3, 0.15), ("AxLSTM", 0.4, 0.25)])
def test_arbitrary_draws_reproduce_s_on_average(paper, worst, mean):
    """Test the rule without choosing a draw by the printed s columns; single draws vary by 0.14."""
    rows = [row for row in scores.published_rows() if row.paper == paper]
    draws = scores.simulated_runs(rows, 400, np.random.default_rng(1))
    low, high = draws.min((1, 3), keepdims=True), draws.max((1, 3), keepdims=True)
    expected = (100 * (draws - low) / (high - low)).mean((0, 2, 3))
    errors = np.abs(expected - [row.aggregate[0] for row in rows])
    assert errors.max() < worst
    assert errors.mean() < mean


def test_other_rules_do_not_reproduce_the_papers():
    rows = [row for row in scores.published_rows() if row.paper == "AxLSTM"]
    means = {row.model: {task: {0: shown[0]} for task, shown in row.tasks.items()} for row in rows}
    s_of_means = scores.aggregate(means["HEAR-Naive"], scores.extremes(means)).estimate.mean
    assert s_of_means == pytest.approx(0.0)  # worst and best of means; the paper prints 5.1
    runs = scores.published_runs()
    pooled = scores.extremes(runs)  # worst and best over the models of both papers
    errors = [scores.aggregate(runs[row.model], pooled).estimate.mean - row.aggregate[0] for row in rows]
    assert max(map(abs, errors)) > 0.8


# ---- results in the papers' tables ----


def with_encoder(config: EncoderConfig) -> dict:
    """Return what a model's record has of its encoder."""
    return {"module": "anything", "encoder": config_to_dict(config), "parameters": count_parameters(config)}


def count_parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ENCODER_OF_CONFIG[type(config)](config).parameters())


@pytest.mark.parametrize(("name", "paper"), PAPERS_BY_NAME.items())
def test_the_runs_of_each_printed_model_give_its_printed_s(tmp_path, name, paper):
    family = "audiomaepp_tiny" if paper == "AudioMAE++" else "axlstm_tiny"
    printed = {row.model: row.aggregate for row in scores.published_rows() if row.paper == paper}
    for number, model in enumerate(printed):
        add_like(tmp_path, f"copy{number}", model, **with_encoder(preset(family)))
    comparisons = {comparison.name: comparison for comparison in compare_hear(read_results([tmp_path]))}
    entries = {entry.name: entry for entry in comparisons[name].entries}
    for number, (model, (mean, half_width)) in enumerate(printed.items()):
        for found in (entries[f"copy{number}"].aggregate.estimate, entries[model].aggregate.estimate):
            assert found.mean == pytest.approx(mean, abs=0.25)
            assert found.half_width == pytest.approx(half_width, abs=0.25)
    (other,) = comparisons.keys() - {name}
    assert not any(entry.own for entry in comparisons[other].entries)


def test_models_evaluated_here_do_not_change_a_papers_scale(tmp_path):
    model = add_like(tmp_path, "mine", "AxLSTM-T")
    before = compare_hear(read_results([tmp_path]))[1]
    add_task(model, HEAR_FOLDERS["VL"], [0.97 + 0.001 * seed for seed in range(10)])
    add_task(model, HEAR_FOLDERS["E50"], [0.01 + 0.001 * seed for seed in range(10)])
    after = compare_hear(read_results([tmp_path]))[1]
    assert after.bounds == before.bounds
    published = [{entry.name: entry for entry in found.entries if not entry.own} for found in (before, after)]
    assert published[0] == published[1]


def test_a_model_of_another_kind_stands_in_both_papers_and_its_line_names_the_scale(tmp_path, capsys):
    add_like(tmp_path, "naive", "HEAR-Naive", module="evaluation.hear_naive", parameters=0)
    add_like(tmp_path, "old", "MAE-Tiny", module="hear_audiomaepp")  # results from before the encoder was recorded
    comparisons = compare_hear(read_results([tmp_path]))
    own = [[entry.name for entry in comparison.entries if entry.own] for comparison in comparisons]
    assert own == [["old", "naive"], ["naive"]]
    assert all(entry.parameters is None for comparison in comparisons for entry in comparison.entries)
    assert report.main([str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("naive: s(m) 5.")]
    assert ["on the AudioMAE++ paper's scale" in line for line in lines] == [True, False]
    assert ["on the AxLSTM paper's scale" in line for line in lines] == [False, True]


def test_every_row_of_tables_3_to_5_has_its_encoder():
    assert list(ENCODERS) == [(row.paper, row.table, row.model) for row in scores.ablation_rows()]
    published = {(row.paper, 2, row.model) for row in scores.published_rows()}
    assert {row for row in ROWS if row[1] == 2} <= published


@pytest.mark.parametrize(("name", "paper"), PAPERS_BY_NAME.items())
def test_the_papers_configs_train_the_encoders_of_tables_3_to_5(name, paper):
    pytest.importorskip("yaml")
    from training.config import load_run_config

    matched = []
    for path in sorted((ROOT / "training/configs/papers" / name).glob("table[345]_*.yaml")):
        card = ModelRecord("x", "x", None, {}, None, 16000, 1, 1, config_to_dict(load_run_config(path).encoder), {})
        rows = [row for row in ENCODERS if row[:2] == (paper, int(path.name[5])) and has_encoder(card, row)]
        assert rows, path
        matched += rows
    assert set(matched) == {row for row in ENCODERS if row[0] == paper}


@pytest.mark.parametrize("row", [row for row in scores.ablation_rows() if row.parameters], ids=lambda row: row.model)
def test_printed_parameters_are_those_of_the_encoder(row):
    counted = count_parameters(ENCODERS[row.paper, row.table, row.model]) / 1e6
    assert round(counted, 1) == pytest.approx(row.parameters, abs=0.1001)


def test_a_model_stands_under_the_row_whose_encoder_it_has(tmp_path):
    like = {"AudioMAE++": "AudioMAE++-Base", "AxLSTM": "AxLSTM-T"}
    for number, (row, config) in enumerate(ENCODERS.items()):
        add_like(tmp_path, f"own{number}", like[row[0]], **with_encoder(config))
    found = {table.name: table for table in tables(read_results([tmp_path]))}
    for number, ((paper, place, name), config) in enumerate(ENCODERS.items()):
        table = found[f"{dict(map(reversed, PAPERS_BY_NAME.items()))[paper]}_table{place}"]
        assert table.columns == ["Row of the paper", "Model", "#M parameters", "s(m)"]
        printed = [row.cells[0] for row in table.rows if not row.own]
        assert printed == [key[2] for key in ENCODERS if key[:2] == (paper, place)]
        (index,) = (index for index, row in enumerate(table.rows) if row.cells[1] == f"own{number}")
        label, _, parameters, score = table.rows[index].cells
        assert parameters == pytest.approx(count_parameters(config) / 1e6)
        assert score.mean == pytest.approx({"AudioMAE++": 91.8, "AxLSTM": 70.7}[paper], abs=0.25)
        above = next(row.cells[0] for row in reversed(table.rows[:index]) if not row.own)
        assert above == label.split(" or ")[-1]
        assert name in label.split(" or ")
        assert label == name or paper == "AudioMAE++"  # whose checkpoints do not tell their decoders


def test_tables_3_to_5_print_the_papers_values_and_say_when_tasks_are_missing(tmp_path):
    add_like(tmp_path, "mine", "AxLSTM-T", ("BO", "CD"), **with_encoder(ENCODERS["AxLSTM", 3, "SSAST-T"]))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    content = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for line in (
        "AxLSTM-T, expansion 3 | as printed | 4.3 | 68.9±0.4",
        "AxLSTM-T, 500 patches | as printed | - | 68.2±0.3",
        "AxLSTM-T, expansion 3, sigmoid gate, no flip | as printed | - | 69.6±0.2",
        "AudioMAE++-Base, RoPE in decoder | as printed | - | 91.4±0.2",
        "AudioMAE++-Large, decoder 768 | as printed | - | 93.4±0.2",
    ):
        assert line in content
    assert "covers 2 of the ten HEAR tasks (BO, CD)" in content
    assert "the two are not comparable" in content
    for title in ("AudioMAE++ paper, Table 3: RoPE", "AxLSTM paper, Table 5: gate and flip"):
        assert title in html and title in content


# ---- reading and comparing results ----


def test_hear_folders_are_named_by_abbreviation(tmp_path):
    add_like(tmp_path, "mine", "SSAST")
    tasks = read_results([tmp_path]).models[0].tasks
    assert {name: task.folder for name, task in tasks.items()} == HEAR_FOLDERS


@pytest.mark.parametrize("folder", ["nsynth_pitch-v2.2.3-50h", "speech_commands-v0.0.2-full", "esc50-v2.0.0-small"])
def test_other_sizes_of_hear_tasks_are_not_compared_with_the_papers(tmp_path, folder):
    add_task(add_model(tmp_path, "mine"), folder, [0.5, 0.6])
    results = read_results([tmp_path])
    assert results.hear_tasks() == []
    assert [task.folder for task in results.task_results()] == [folder]
    assert compare_hear(results) == []


def test_versions_are_dropped_from_unambiguous_names(tmp_path):
    first, second = add_model(tmp_path, "first"), add_model(tmp_path, "second")
    for model, folder in ((first, "pitch-v1.0.0-full"), (second, "pitch-v1.1.0-full"), (second, "drums-v1.0.0-full")):
        add_task(model, folder, [0.5, 0.6])
    tasks = ["drums", "pitch-v1.0.0-full", "pitch-v1.1.0-full"]
    assert read_results([tmp_path]).other_tasks() == tasks
    assert read_results([tmp_path], ["drums-v1.0.0-full"]).other_tasks() == ["drums"]


def test_a_different_metric_is_not_compared_with_the_papers(tmp_path):
    task = add_task(add_model(tmp_path, "mine"), HEAR_FOLDERS["E50"], [0.5, 0.6])
    write(task / "task.json", {"folder": HEAR_FOLDERS["E50"], "metric": "mAP"})
    results = read_results([tmp_path])
    assert results.hear_tasks() == []
    assert "top1_acc" in results.remarks[0]


def test_runs_on_different_versions_of_a_task_are_not_compared(tmp_path):
    for name, fingerprint in {"one": "a", "two": "b"}.items():
        add_task(add_model(tmp_path, name), "drums-v1.0.0-full", [0.5, 0.6], fingerprint=fingerprint)
    with pytest.raises(ValueError, match="drums has changed between the models' runs"):
        compare_others(read_results([tmp_path]))


def test_a_copy_of_a_published_model_ranks_with_it(tmp_path):
    add_like(tmp_path, "copy", "AxLSTM-S")
    (comparison,) = compare_hear(read_results([tmp_path]), "all")
    by_name = {entry.name: entry for entry in comparison.entries}
    assert by_name["copy"].aggregate.estimate == pytest.approx(by_name["AxLSTM-S"].aggregate.estimate)
    assert abs(comparison.rank(by_name["copy"]) - comparison.rank(by_name["AxLSTM-S"])) == 1
    assert summary(comparison)[0].startswith("copy: s(m) ")
    assert "all ten HEAR tasks" in summary(comparison)[0]
    for task, (mean, half_width) in scores.published_rows()[-2].tasks.items():
        assert text(by_name["copy"].scores[task]) == f"{mean:.1f}±{half_width:.1f}"


def test_a_model_named_like_a_published_one_stays_separate(tmp_path):
    add_like(tmp_path, "SSAST", "AxLSTM-B")
    results = read_results([tmp_path])
    (comparison,) = compare_hear(results, "all")
    entries = {entry.name: entry for entry in comparison.entries}
    assert entries["SSAST (here)"].own
    assert not entries["SSAST"].own
    assert entries["SSAST (here)"].scores["BO"].mean != entries["SSAST"].scores["BO"].mean
    assert "SSAST (here)" in page(results)


def test_s_covers_the_tasks_that_were_run_and_says_so(tmp_path):
    add_like(tmp_path, "two", "AxLSTM-B", ("BO", "CD"))
    add_like(tmp_path, "one", "AxLSTM-B", ("CD",))
    (comparison,) = compare_hear(read_results([tmp_path]), "all")
    assert comparison.ranked_tasks == ["BO", "CD"]
    by_name = {entry.name: entry for entry in comparison.entries}
    assert by_name["AxLSTM-B"].aggregate.tasks == ("BO", "CD")
    assert comparison.rank(by_name["one"]) is None
    lines = " ".join(summary(comparison))
    assert "2 of the ten HEAR tasks (BO, CD)" in lines
    assert "not ranked, as it lacks BO" in lines


def test_a_new_best_run_changes_the_scale_and_the_report_says_so(tmp_path):
    model = add_like(tmp_path, "mine", "AudioMAE++-Large")
    before = markdown(tables(read_results([tmp_path]), "all")[1])
    add_task(model, HEAR_FOLDERS["VL"], [0.97 + 0.001 * seed for seed in range(10)])
    results = read_results([tmp_path])
    after = markdown(tables(results, "all")[1])
    assert "best of VL (mine)" not in before
    assert "best of VL (mine)" in after
    (comparison,) = compare_hear(results, "all")
    published = {entry.name: entry.aggregate.estimate.mean for entry in comparison.entries}
    assert published["HuBERT-large"] < 72.0  # 73.4 if its own run is the best of VL


def test_open_tasks_have_their_own_aggregate(tmp_path):
    for label, shift in (("a", 0.0), ("b", 0.2)):
        model = add_model(tmp_path, label)
        for task in ("drum_stroke", "pitch"):
            add_task(model, task, [0.5 + shift, 0.6 + shift])
        add_task(model, HEAR_FOLDERS["BO"], [0.9, 0.92])
    (comparison,) = compare_others(read_results([tmp_path]))
    assert [entry.name for entry in comparison.entries] == ["b", "a"]
    assert [entry.aggregate.estimate.mean for entry in comparison.entries] == pytest.approx([500 / 6, 100 / 6])
    assert comparison.ranked_tasks == ["drum_stroke", "pitch"]


def test_a_single_model_on_an_open_task_gets_no_aggregate(tmp_path):
    add_task(add_model(tmp_path, "mine"), "pitch", [0.5, 0.6])
    results = read_results([tmp_path])
    (comparison,) = compare_others(results)
    (entry,) = comparison.entries
    assert entry.aggregate is None
    assert "no s(m)" in summary(comparison)[0]
    assert "55.0" in page(results)
    assert "others_scores" in {table.name for table in tables(results)}
    assert "others_aggregate" not in {table.name for table in tables(results)}


def test_missing_and_single_seeds_do_not_break_the_report(tmp_path):
    add_like(tmp_path, "full", "SSAST")
    model = add_like(tmp_path, "gaps", "SSAST")
    for seed in (0, 3):
        (model / HEAR_FOLDERS["BO"] / f"seed-{seed:04d}.json").unlink()
    for seed in range(1, 10):
        (model / HEAR_FOLDERS["CD"] / f"seed-{seed:04d}.json").unlink()
    for file in (model / HEAR_FOLDERS["LC"]).glob("seed-*.json"):
        file.unlink()
    write(model / HEAR_FOLDERS["VL"] / "seed-0004.json", '{"seed": 4, "score": NaN}')
    results = read_results([tmp_path])
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    content = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "±n/a" in content
    assert "gaps has fewer than 10 seeds of BO (8), CD (1), LC (0), VL (9)" in content
    assert "seed 4 has no finite score" in content
    assert results.models[1].tasks["LC"].scores == {}


def test_onset_f_measures_of_all_tolerances_are_columns_of_one_table(tmp_path):
    for label, framing, strict in (("exact", "exact", 0.8), ("reference", "reference", 0.4)):
        model = add_model(tmp_path, label, options={"framing": framing})
        task = add_task(model, "onsets", [0.9, 0.9], metric="event_onset_200ms_fms", embedding_type="event")
        for seed in range(2):
            extra = {"event_onset_200ms_fms": 0.9, "event_onset_50ms_fms": strict, "segment_1s_er": 0.1}
            write(task / f"seed-{seed:04d}.json", {"seed": seed, "score": 0.9, "scores": extra})
    (table,) = (table for table in tables(read_results([tmp_path])) if table.name == "onsets")
    assert table.columns == ["Task", "Model", "Options", "within 50 ms", "within 200 ms"]
    assert [[text(cell) for cell in row.cells[2:]] for row in table.rows] == [
        ["framing exact", "80.0±0.0", "90.0±0.0"],
        ["framing reference", "40.0±0.0", "90.0±0.0"],
    ]


def test_timing_shows_seconds_and_speed(tmp_path):
    add_task(add_model(tmp_path, "mine"), "pitch", [0.5, 0.6], embedding_seconds=4.0, audio_seconds=100.0)
    (table,) = (table for table in tables(read_results([tmp_path])) if table.name == "timing")
    assert table.rows[0].cells == ["pitch", "mine", 100, 100.0, 4.0, 25.0, 3.0, 2]


def test_models_of_the_same_name_in_two_folders_are_distinguished(tmp_path):
    for folder in ("first", "second"):
        add_task(add_model(tmp_path / folder, "mine"), "pitch", [0.5, 0.6])
    labels = [model.label for model in read_results([tmp_path / "first", tmp_path / "second"]).models]
    assert labels == ["first/mine", "second/mine"]


# ---- files ----


class _Page(HTMLParser):
    """Checks that tags nest, and collects references to other files."""

    void = frozenset({"meta", "br", "line", "rect", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escapes_every_label(tmp_path):
    evil = "<script>alert('x')</script>\"&' onload='y"
    results = tmp_path / "results"
    task = add_task(add_model(results, "a"), "pitch", [0.5, 0.6], task=evil)
    write(results / "a" / "model.json", {"module": evil, "weights": evil, "options": {evil: evil}, "versions": evil})
    points = {"method": evil, "points": [[0, 0], [1, 1], [2, 1]], "labels": [evil, "b", ["c", evil]]}
    write(task / "map.json", points)
    named = add_model(results, "b<i>'\"&")
    add_task(named, "x<b>|'\"", [0.2, 0.3])
    write(named / "x<b>|'\"" / "map.json", points)
    assert report.main([str(results)]) == 0
    html = (results / "report" / "report.html").read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(html)
    assert parser.open == []
    assert not parser.tags & {"script", "b<b", "i", "link", "img", "iframe"}
    assert all(reference.startswith("#") for reference in parser.references)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "&lt;script&gt;" in html
    content = (results / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in content
    assert r"x&lt;b&gt;\|" in content


def test_maps_show_every_point_and_label(tmp_path):
    task = add_task(add_model(tmp_path, "mine"), "words", [0.5, 0.6])
    labels = [f"word {row % 84}" for row in range(300)]
    points = np.random.default_rng(0).standard_normal((300, 2)).tolist()
    write(task / "map.json", {"method": "PCA", "points": points, "labels": labels})
    html = page(read_results([tmp_path]))
    drawn = html[html.index("aria-label='Embeddings of words by mine'") :]
    drawn = drawn[: drawn.index("</svg>")]
    assert len(re.findall(r"M[\d.]+ [\d.]+", drawn)) == 300
    assert set(re.findall("<title>(.*?)</title>", drawn)) == set(labels)
    places = np.array(re.findall(r"M([\d.]+) ([\d.]+)", drawn), dtype=float)
    assert places.min() > 0
    assert places.max() < 200


def test_csv_markdown_and_page_show_the_same_numbers(tmp_path):
    add_like(tmp_path, "mine", "SSAM-Small")
    add_like(tmp_path, "other", "SSAST-B")
    out = tmp_path / "out"
    assert report.main([str(tmp_path), "--out", str(out), "--scale", "all"]) == 0
    html, content = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    with open(out / "hear_scores.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 29
    for line in lines:
        for task in HEAR_FOLDERS:
            shown = f"{float(line[task]):.1f}±{float(line[f'{task} half-width']):.1f}"
            assert shown in html
            assert shown in content
    assert {line["Model"] for line in lines if line["origin"] == "results"} == {"mine", "other"}


def test_the_tasks_option_selects_tasks_and_names_unknown_ones(tmp_path, capsys):
    model = add_like(tmp_path, "mine", "SSAST")
    add_task(model, "pitch", [0.5, 0.6])
    out = tmp_path / "out"
    assert report.main([str(tmp_path), "--out", str(out), "--tasks", "BO", HEAR_FOLDERS["CD"]]) == 0
    content = (out / "report.md").read_text(encoding="utf-8")
    assert "2 of the ten HEAR tasks (BO, CD)" in content
    assert "pitch" not in content
    assert report.main([str(tmp_path), "--out", str(out), "--tasks", "pitch"]) == 0  # removes earlier tables
    kept = {path.stem for path in out.glob("*.csv")}
    assert "others_scores" in kept and not any(name.startswith("hear") for name in kept) and kept < set(TABLE_NAMES)
    capsys.readouterr()
    assert report.main([str(tmp_path), "--tasks", "BO", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert "pitch" in error


def test_folders_without_results_are_an_error(tmp_path, capsys):
    assert report.main([str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    write(tmp_path / "notes" / "x.json", {})
    assert report.main([str(tmp_path)]) == 2
    assert "model.json" in capsys.readouterr().err
    add_model(tmp_path, "mine")
    assert report.main([str(tmp_path)]) == 2
    assert "no finished runs" in capsys.readouterr().err
    write(tmp_path / "mine" / "pitch" / "task.json", "{")
    assert report.main([str(tmp_path)]) == 2
    assert "task.json: not valid JSON" in capsys.readouterr().err


def test_other_files_among_the_results_are_ignored(tmp_path):
    task = add_task(add_model(tmp_path, "mine"), "pitch", [0.5, 0.6])
    write(task / "seed-0000.json.bak", "{")
    write(task / "test.predicted-scores.json", "{")
    write(tmp_path / "mine" / ".work" / "log.txt", "x")
    write(tmp_path / "README", "x")
    assert list(read_results([tmp_path]).models[0].tasks["pitch"].scores.values()) == [50.0, 60.0]


def test_the_command_does_not_need_matplotlib(tmp_path):
    add_task(add_model(tmp_path, "mine"), "pitch", [0.5, 0.6])
    code = "import sys; sys.modules['matplotlib'] = None; from evaluation import report"
    code += "; sys.exit(report.main(sys.argv[1:]))"
    root = Path(report.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("report.html\n")
