"""The driver: which units it runs, skips and reports. A small script stands in for the kit and heareval."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from heareval_stand_in import CLIP_S, FAKE_KIT, make_environment, make_task

from evaluation import __main__ as command
from evaluation import baselines, environment
from evaluation.driver import Driver, Model, default_label, step_environment
from evaluation.driver import tail as log_tail
from evaluation.tasks import find_tasks, read_scores, read_task
from hear_encoders import Embedder
from hear_encoders.files import locked
from hear_encoders.nn.frontend import LogMel

ROOT = Path(__file__).parents[2]


class Bench:
    """A folder that holds tasks, results and the fake kit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks, self.results = folder, folder / "tasks", folder / "results"
        self.kit = folder / "kit.py"
        self.kit.write_text(FAKE_KIT)
        make_task(self.tasks, "birds-v1")
        make_task(self.tasks, "onsets-v1", embedding_type="event", prediction_type="multilabel")
        self.lines: list[str] = []

    def driver(self, jobs: int = 1, module: str = "some_module") -> Driver:
        kit = [sys.executable, "-S", str(self.kit)]
        return Driver(Model("some", module, None, {}), self.results, kit, jobs, self.lines.append)

    def run(self, seeds: int = 2, jobs: int = 1, keep_embeddings: bool = False, module: str = "some_module"):
        self.lines.clear()
        (self.folder / "calls.txt").unlink(missing_ok=True)
        return self.driver(jobs, module).run(find_tasks(self.tasks), range(seeds), keep_embeddings)

    def calls(self) -> list[str]:
        return (self.folder / "calls.txt").read_text().splitlines()

    def fail(self, *calls: str) -> None:
        (self.folder / "fail.txt").write_text("\n".join(calls))

    def result(self, name: str):
        return json.loads((self.results / "some" / name).read_text())


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# ---- units that run, and units that are skipped ----


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_unit_runs_once_and_after_its_task_is_embedded(bench, jobs):
    assert bench.run(jobs=jobs) == []
    expected = ["describe"]
    expected += ["embed birds-v1", "predict birds-v1 0", "predict birds-v1 1", "map birds-v1"]
    expected += ["embed onsets-v1", "predict onsets-v1 0", "predict onsets-v1 1"]  # event tasks have no map
    calls = bench.calls()
    assert sorted(calls) == sorted(expected)
    for task in ("birds-v1", "onsets-v1"):
        assert calls.index(f"embed {task}") < min(calls.index(f"predict {task} {seed}") for seed in (0, 1))
    assert len(bench.lines) == 7 and bench.lines[-1].startswith("[7/7] some: ")


def test_results_are_laid_out_as_the_report_reads_them(bench):
    bench.run()
    model = bench.result("model.json")
    assert {"label": "some", "module": "some_module", "weights": None, "options": {}}.items() <= model.items()
    assert model["embedding_size"] == 4 and model["versions"] == {"torch": "2"}
    task = bench.result("birds-v1/task.json")
    del task["fingerprint"]
    assert task == {
        "task": "birds",
        "folder": "birds-v1",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "metric": "top1_acc",
        "classes": 2,
        "clips": 3,
        "embedding_seconds": 1.5,
        "audio_seconds": 3 * CLIP_S,
    }
    seed = bench.result("birds-v1/seed-0001.json")
    assert seed.pop("seconds") >= 0
    scores = {"loss": 1.0, "top1_acc": 0.26}
    assert seed == {"seed": 1, "metric": "top1_acc", "score": 0.26, "scores": scores}
    assert (bench.results / "some/birds-v1/map.json").exists() and not (
        bench.results / "some/onsets-v1/map.json"
    ).exists()


@pytest.mark.parametrize("work", ["kept", "removed"])
def test_finished_units_are_skipped(bench, work):
    bench.run()
    if work == "removed":
        shutil.rmtree(bench.results / "some/.work")
    assert bench.run() == []
    assert bench.calls() == ["describe"]


def test_only_missing_units_run(bench):
    bench.run(keep_embeddings=True)
    (bench.results / "some/onsets-v1/seed-0000.json").unlink()
    bench.run(seeds=3, keep_embeddings=True)
    assert bench.calls() == ["describe", "predict birds-v1 2", "predict onsets-v1 0", "predict onsets-v1 2"]


def test_embeddings_are_removed_at_the_end_and_recomputed_when_needed(bench):
    bench.run()
    assert not list(bench.results.glob("**/embeddings"))
    bench.run(seeds=3)
    assert bench.calls() == [
        "describe",
        *("embed birds-v1", "predict birds-v1 2"),
        *("embed onsets-v1", "predict onsets-v1 2"),
    ]


# ---- failures ----


def test_a_failing_seed_is_reported_with_its_output_and_the_rest_runs(bench):
    bench.fail("predict birds-v1 0")
    (failure,) = bench.run()
    assert "birds-v1 seed 0: exit code 3" in str(failure)
    assert [line.strip() for line in str(failure).splitlines()[1:]] == ["99 %", "it went wrong"]
    assert len(bench.calls()) == 8 and (bench.results / "some/birds-v1/seed-0001.json").exists()
    assert not (bench.results / "some/birds-v1/seed-0000.json").exists()
    bench.fail()
    assert bench.run() == []
    assert bench.calls() == ["describe", "predict birds-v1 0"]  # its embeddings were kept


def test_a_tasks_seeds_are_skipped_if_embedding_fails(bench):
    bench.fail("embed birds-v1")
    (failure,) = bench.run()
    assert failure.subject == "birds-v1 embed"
    assert bench.calls() == [
        "describe",
        "embed birds-v1",
        "embed onsets-v1",
        "predict onsets-v1 0",
        "predict onsets-v1 1",
    ]


def test_nothing_else_runs_if_the_model_cannot_be_loaded(bench):
    bench.fail("describe")
    (failure,) = bench.run()
    assert "could not be loaded" in str(failure) and "it went wrong" in str(failure)
    assert bench.calls() == ["describe"] and not (bench.results / "some/model.json").exists()


def test_scores_without_the_tasks_metric_are_a_failure(bench):
    make_task(bench.tasks, "chords", evaluation=["mAP"])
    failures = bench.run(seeds=1)
    assert [failure.subject for failure in failures] == ["chords seed 0"] and "mAP" in failures[0].reason


@pytest.mark.parametrize("fields, message", [({"split_mode": "random"}, "split_mode"), ({"evaluation": []}, "field")])
def test_a_malformed_task_is_reported_and_the_rest_runs(bench, fields, message):
    make_task(bench.tasks, "bad", **fields)
    (failure,) = bench.run()
    assert failure.subject == "bad" and message in failure.reason
    assert len(bench.calls()) == 8


def test_a_changed_task_is_not_mixed_with_its_old_scores(bench):
    bench.run()
    (bench.tasks / "birds-v1" / "test.json").write_text('{"test.wav": ["b"]}')
    (failure,) = bench.run(seeds=3)
    assert failure.subject == "birds-v1" and "changed" in failure.reason
    assert "predict onsets-v1 2" in bench.calls() and "predict birds-v1 2" not in bench.calls()


def test_two_models_cannot_share_a_label(bench):
    bench.run()
    with pytest.raises(ValueError, match="another --name"):
        bench.run(module="another_module")


def test_two_weights_of_a_model_outside_torch_cannot_share_a_label(bench):
    bench.kit.write_text(FAKE_KIT.replace('"fingerprint": a["module"]', '"fingerprint": None'))
    kit = [sys.executable, "-S", str(bench.kit)]
    one, other = (Model("some", "some_module", f"{folder}/model.h5", {}) for folder in "ab")
    assert Driver(one, bench.results, kit, 1, bench.lines.append).run(find_tasks(bench.tasks), range(1)) == []
    with pytest.raises(ValueError, match=r"weights = 'a/model.h5', now 'b/model.h5'.*another --name"):
        Driver(other, bench.results, kit, 1, bench.lines.append).run(find_tasks(bench.tasks), range(2))


def test_resuming_with_other_library_versions_is_reported(bench):
    bench.run()
    assert not any("new ones" in line for line in bench.lines)
    bench.kit.write_text(FAKE_KIT.replace('{"torch": "2"}', '{"torch": "3"}'))
    bench.run(seeds=3)
    assert bench.lines[0] == "some: earlier results used torch 2, new ones use 3"


def test_two_drivers_cannot_write_the_same_results(bench, monkeypatch):
    bench.run()
    monkeypatch.setattr("evaluation.driver.LOCK_WAIT_S", 0.3)
    with locked(bench.results / "some/.work"), pytest.raises(ValueError, match="another process"):
        bench.run()


def test_an_interrupted_driver_kills_its_processes(bench, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    bench.kit.write_text(FAKE_KIT + "\nif step == 'predict':\n    import time; time.sleep(60)\n")
    driver = bench.driver(jobs=2)
    started: list[subprocess.Popen] = []
    start = driver._start
    monkeypatch.setattr(driver, "_start", lambda *a: started.append(start(*a)) or started[-1])

    def interrupt():
        calls = bench.folder / "calls.txt"
        _wait_for(lambda: calls.exists() and {"predict birds-v1 0", "embed onsets-v1"} <= set(bench.calls()))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.run(find_tasks(bench.tasks), range(2))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, previous)
    assert all(process.returncode is not None for process in started)
    assert not list(bench.results.glob("**/seed-*.json"))


def test_a_step_ends_when_its_driver_is_killed(tmp_path):
    pid_file, step = tmp_path / "pid", tmp_path / "step.py"
    step.write_text(f"""
import os, time
from pathlib import Path
from evaluation import kit

def work():
    Path({str(tmp_path)!r}, "unfinished").write_text(str(os.getpid()))
    os.rename({str(tmp_path / "unfinished")!r}, {str(pid_file)!r})
    time.sleep(600)

kit.STEPS["work"] = work
kit.main()
""")
    driver_code = f"""
import os, subprocess, sys
subprocess.run([sys.executable, {str(step)!r}, "work", "{{}}", str(os.getpid())])
"""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    driver = subprocess.Popen([sys.executable, "-c", driver_code], env={**os.environ, "PYTHONPATH": path})
    try:
        _wait_for(pid_file.exists)
    finally:
        driver.kill()
        driver.wait()
    _wait_for(lambda: not _is_running(int(pid_file.read_text())))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # Z: it has ended, but its new parent has not yet waited for it


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 120  # seconds; only a failure or a very busy machine takes so long
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- heareval's files ----


@pytest.fixture
def read(tmp_path):
    def read(results: str, **fields):
        task = read_task(make_task(tmp_path, "task", **fields))
        path = tmp_path / "test.predicted-scores.json"
        path.write_text(results)
        return read_scores(path, task)

    return read


def test_scores_of_one_split_include_an_infinite_one_as_none(read):
    results = """{"test": {"test_loss": 0.5, "test_score": 0.75, "test_top1_acc": 0.75, "test_d_prime": Infinity,
        "validation_score": 0.8, "epoch": 11}, "hparams": {"dropout": 0.25}, "score_mode": "max"}"""
    assert read(results) == (0.75, {"loss": 0.5, "top1_acc": 0.75, "d_prime": None})


def test_fold_scores_are_averaged(read):
    results = """{"fold0": {"test_score": 0.5, "test_mAP": 0.5, "validation_score": Infinity},
        "fold1": {"test_score": 1.0, "test_mAP": 1.0, "validation_score": 0.5},
        "fold2": {"test_score": 0.9, "test_mAP": 0.9, "validation_score": 0.5},
        "aggregated_scores": {"test_score_mean": 0.8, "test_score_std": 0.2, "test_mAP_mean": 0.8, "test_mAP_std": 0.2,
        "test_aucroc_mean": NaN, "test_aucroc_std": NaN, "validation_score_mean": Infinity}}"""
    fields = {"split_mode": "presplit_kfold", "splits": ["fold0", "fold1", "fold2"], "evaluation": ["mAP", "aucroc"]}
    assert read(results, **fields) == (0.8, {"mAP": 0.8, "aucroc": None})


def test_a_test_without_detected_events_scores_0(read):
    results = """{"test": {"test_score": NaN, "test_event_onset_200ms_fms": NaN,
        "test_event_onset_200ms_fms_f_measure": NaN, "test_event_onset_200ms_fms_precision": NaN}}"""
    score, scores = read(results, embedding_type="event", evaluation=["event_onset_200ms_fms"])
    assert score == 0.0 and scores["event_onset_200ms_fms_precision"] is None


def test_a_fold_without_detected_events_counts_as_0(read):
    results = """{"fold0": {"test_event_onset_200ms_fms": 0.4}, "fold1": {"test_event_onset_200ms_fms": NaN},
        "fold2": {"test_event_onset_200ms_fms": 0.2}, "aggregated_scores": {"test_event_onset_200ms_fms_mean": 0.3}}"""
    fields = {"split_mode": "presplit_kfold", "splits": ["fold0", "fold1", "fold2"], "embedding_type": "event"}
    score, _ = read(results, evaluation=["event_onset_200ms_fms"], **fields)
    assert score == pytest.approx(0.2)


@pytest.mark.parametrize("value", ["Infinity", "NaN"])
def test_an_infinite_or_undefined_first_score_is_an_error(read, value):
    with pytest.raises(ValueError, match="d_prime"):
        read(f'{{"test": {{"test_score": {value}, "test_d_prime": {value}}}}}', evaluation=["d_prime"])


def test_a_logs_tail_omits_overwritten_progress(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"\rEpoch 1\rEpoch 2\r\n" * 3 + b"\nRuntimeError: no\n")
    assert log_tail(log) == ["first", "Epoch 2", "Epoch 2", "Epoch 2", "RuntimeError: no"]


# ---- arguments ----


def test_existing_weights_are_passed_as_a_path_and_others_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    path = Model("a", "m", "mine", {"framing": "exact"}).arguments()
    assert path == {"module": "m", "weights_path": str(tmp_path / "mine"), "options": {"framing": "exact"}}
    name = Model("a", "m", "org/name", {}).arguments()
    assert name == {"module": "m", "weights_path": None, "options": {"model_file_path": "org/name"}}


def test_labels_distinguish_models_and_stay_inside_the_results():
    assert default_label("hear_axlstm", None, {}) == "hear_axlstm"
    assert default_label("hear_axlstm", "runs/long/", {"framing": "reference"}) == "hear_axlstm-long-framing=reference"
    for label in ("../up", "a/b", ".work", ""):
        with pytest.raises(ValueError, match="label"):
            Model(label, "m", None, {})


@pytest.mark.parametrize(
    "text, pair", [("n=4", ("n", 4)), ("framing=exact", ("framing", "exact")), ("x=[1, 2]", ("x", [1, 2]))]
)
def test_options_are_json_or_text(text, pair):
    assert command._option(text) == pair


@pytest.mark.parametrize("jobs, asked, threads", [(1, None, 8), (3, None, 2), (20, None, 1), (2, "1", 1), (2, "16", 4)])
def test_processes_share_the_cores(monkeypatch, jobs, asked, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("hear_encoders.threads.cpu_quota", lambda: math.inf)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    environment = step_environment(jobs)
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == (str(threads), "PASSIVE")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert step_environment(jobs)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_tasks_are_found_by_folder_name(bench):
    (bench.tasks / "notes").mkdir()
    assert [path.name for path in find_tasks(bench.tasks)] == ["birds-v1", "onsets-v1"]
    assert [path.name for path in find_tasks(bench.tasks, ["onsets-v1"])] == ["onsets-v1"]
    with pytest.raises(FileNotFoundError, match="birds-v1, onsets-v1"):
        find_tasks(bench.tasks, ["birds"])


def test_the_command_runs_reports_failures_and_exits_with_1(bench, monkeypatch, capsys):
    kit_environment = make_environment(bench.folder / "environment", bench.kit)
    arguments = ["run", "--module", "m", "--name", "some", "--tasks-dir", str(bench.tasks), "--out", str(bench.results)]
    arguments += ["--seeds", "1", "--env", str(kit_environment)]
    bench.fail("predict onsets-v1 0")
    assert command.main(arguments) == 1
    printed = capsys.readouterr()
    assert "birds-v1 seed 0: top1_acc 0.2500" in printed.out and "it went wrong" in printed.err
    bench.fail()
    assert command.main(arguments) == 0
    assert "2 tasks, 1 seeds" in capsys.readouterr().out


def test_the_command_names_the_missing_environment(bench, capsys):
    arguments = ["run", "--module", "m", "--tasks-dir", str(bench.tasks), "--out", str(bench.results)]
    assert command.main([*arguments, "--env", str(bench.folder / "nowhere")]) == 2
    assert "evaluation setup" in capsys.readouterr().err


# ---- heareval's environment ----


def test_the_kits_pins_override_constraints():
    constraints = "# tested\ntorch==2.13.0\nsetuptools==84.2.1\nSed.Eval==9; python_version < '4'\n"
    requirements = "# pins\nsetuptools==81.0.0  # the last\nsed_eval==0.2.1\ntorch\n"
    assert environment.other_constraints(constraints, requirements) == "torch==2.13.0\n"


def test_each_kit_requirement_has_one_pinned_version():
    def lines(path):
        return [
            line.partition("#")[0].strip() for line in path.read_text().splitlines() if line.partition("#")[0].strip()
        ]

    kept = environment.other_constraints(environment.CONSTRAINTS.read_text(), environment.REQUIREMENTS.read_text())
    pinned = {environment._package(line) for line in kept.splitlines()}
    for line in lines(environment.REQUIREMENTS):
        assert "==" in line or environment._package(line) in pinned, line


def test_setup_refuses_a_folder_that_is_not_an_environment(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a virtual environment"):
        environment.setup(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# ---- baselines ----


@pytest.fixture(params=[None, "axlstm_tiny"], ids=["log-mel statistics", "untrained"])
def baseline(request):
    return baselines.load_model(untrained=request.param)


def test_baselines_meet_the_hear_contract(baseline):
    audio = torch.rand(3, 8000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert isinstance(baseline, torch.nn.Module) and baseline.sample_rate == 16000
    scene = baselines.get_scene_embeddings(audio, baseline)
    steps, timestamps = baselines.get_timestamp_embeddings(audio, baseline)
    assert scene.shape == (3, baseline.scene_embedding_size) and scene.dtype == torch.float32
    assert steps.shape == (3, timestamps.shape[1], baseline.timestamp_embedding_size)
    assert timestamps.shape[0] == 3 and steps.isfinite().all() and scene.isfinite().all()
    alone = baselines.get_scene_embeddings(audio[1:2], baseline)
    torch.testing.assert_close(scene[1:2], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [100, 879, 880, 16000, 33333])
def test_baselines_have_the_encoders_timestamps(samples):
    audio = torch.zeros(2, samples)
    encoder = baselines.load_model(untrained="axlstm_tiny")
    assert isinstance(encoder, Embedder)
    _, timestamps = baselines.get_timestamp_embeddings(audio, baselines.load_model())
    assert torch.equal(timestamps[1], encoder.timestamps_ms(samples))


def test_log_mel_statistics_are_mean_and_deviation_over_time():
    model, audio = baselines.load_model(), torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) / 10
    frames = LogMel()(audio)[0]
    scene = baselines.get_scene_embeddings(audio, model)[0]
    torch.testing.assert_close(scene, torch.cat([frames.mean(0), frames.std(0, correction=0)]))
    steps, timestamps = baselines.get_timestamp_embeddings(audio, model)
    centre = timestamps[0, 12].item() / 10  # in frames; the window extends 100 ms to both sides
    window = frames[math.ceil(centre - 10) : math.floor(centre + 10) + 1]
    assert len(window) == 20
    torch.testing.assert_close(steps[0, 12], torch.cat([window.mean(0), window.std(0, correction=0)]))


def test_an_untrained_encoder_is_a_function_of_its_seed():
    audio = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) / 10
    first, again, other = (
        baselines.get_scene_embeddings(audio, baselines.load_model(untrained="axlstm_tiny", seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_baselines_reject_weights_and_unknown_options():
    for arguments, options in ((["weights/"], {}), ([], {"framing": "exact"})):
        with pytest.raises(ValueError):
            baselines.load_model(*arguments, **options)
