"""The calls that the kit's steps make into heareval, which small fake modules stand in for."""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from evaluation import kit
from hear_encoders.config import config_to_dict, preset


@pytest.fixture
def stand_in(monkeypatch):
    """Return a function that makes a fake module importable. Undo a step's changes to the process afterwards."""

    def stand_in(name: str, **contents) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        return module

    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "heareval.gpu_max_mem", None)
    stand_in("heareval")
    return stand_in


@pytest.fixture
def predictions(stand_in):
    """Fake the modules that `predict` patches. The fixture's value records the calls to heareval."""
    calls: dict = {}

    class FitLoop:
        epoch_progress = types.SimpleNamespace(current=types.SimpleNamespace(completed=3))

    def runner(arguments: list[str], standalone_mode: bool) -> None:
        task_predictions.seed_everything(42, workers=False)  # as heareval does
        calls.update(arguments=arguments, grid=dict(task_predictions.PARAM_GRID), links=os.listdir(arguments[0]))
        calls["stopping"] = task_predictions.EarlyStopping(patience=20)
        loop = FitLoop()
        loop.current_epoch = 7
        calls["epoch"] = (loop.current_epoch, loop.epoch_progress.current.completed)

    stand_in("pytorch_lightning")
    stand_in("pytorch_lightning.loops", FitLoop=FitLoop)
    stand_in("heareval.predictions")
    stand_in("heareval.predictions.runner", runner=runner)
    task_predictions = stand_in(
        "heareval.predictions.task_predictions",
        PARAM_GRID={
            "hidden_layers": [1, 2],
            "lr": [1e-2, 1e-3],
            "dropout": [0.1],
            "optim": ["Adam"],
            "max_epochs": [9],
        },
        pl=types.SimpleNamespace(Trainer=dict),
        EarlyStopping=dict,
        seed_everything=lambda seed, workers: calls.update(seed=seed),
    )
    return calls


def test_heareval_searches_the_papers_grid_with_the_given_seed(predictions, tmp_path):
    (tmp_path / "embeddings" / "fold").mkdir(parents=True)
    (tmp_path / "embeddings" / "train.embeddings.npy").write_bytes(b"numbers")
    kit.predict(str(tmp_path / "embeddings"), str(tmp_path / "seed"), 5)
    assert predictions["seed"] == 5
    grid = predictions["grid"]
    assert grid.pop("initialization") == [torch.nn.init.xavier_normal_]
    assert grid == {
        "hidden_layers": [1],
        "hidden_dim": [1024],
        "dropout": [0.1, 0.25],
        "lr": [1e-4],
        "batch_size": [1024],
        "patience": [20],
        "max_epochs": [500],
        "check_val_every_n_epoch": [3],
        "optim": ["Adam"],  # heareval's own
    }
    folder, _, points = predictions["arguments"]
    assert folder == str(tmp_path / "seed") and int(points) >= 2  # tries all grid points
    assert predictions["links"] == ["train.embeddings.npy"]
    assert (tmp_path / "seed" / "train.embeddings.npy").read_bytes() == b"numbers"


def test_training_continues_through_undefined_scores_and_tests_the_best_epochs_postprocessing(predictions, tmp_path):
    (tmp_path / "embeddings").mkdir()
    kit.predict(str(tmp_path / "embeddings"), str(tmp_path / "seed"), 0)
    assert predictions["stopping"] == {"check_finite": False, "patience": 20}
    assert predictions["epoch"] == (7, 7)


def test_the_embeddings_folder_appears_only_when_complete(stand_in, tmp_path):
    calls: list[list[str]] = []

    def runner(arguments: list[str], standalone_mode: bool, fail: bool) -> None:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--embeddings-dir") + 1]) / "module_options" / "birds"
        folder.mkdir(parents=True)
        (folder / "train.embeddings.npy").write_bytes(b"numbers")
        if fail:
            raise RuntimeError("no memory")

    stand_in("module")
    stand_in("tensorflow", test=types.SimpleNamespace())
    stand_in("heareval.embeddings")
    stand_in("heareval.embeddings.runner", runner=functools.partial(runner, fail=True))
    arguments = ("module", "a/weights", {"framing": "exact"}, "tasks", "birds", str(tmp_path / "embeddings"))
    with pytest.raises(RuntimeError, match="no memory"):
        kit.embed(*arguments)
    assert not (tmp_path / "embeddings").exists()
    stand_in("heareval.embeddings.runner", runner=functools.partial(runner, fail=False))
    kit.embed(*arguments)
    assert [path.name for path in tmp_path.rglob("*")] == ["embeddings", "train.embeddings.npy"]
    words = calls[-1]
    assert words[0] == "module" and words[words.index("--model") + 1] == "a/weights"
    assert words[words.index("--task") + 1] == "birds" and words[words.index("--tasks-dir") + 1] == "tasks"
    assert json.loads(words[words.index("--model-options") + 1]) == {"framing": "exact"}


def test_a_module_is_imported_before_tensorflow(stand_in, monkeypatch, tmp_path):
    """openSMILE's library corrupts memory if TensorFlow's was loaded first."""
    imports = stand_in("imports", seen=[])
    (tmp_path / "a_model.py").write_text("import imports\nimports.seen.append('a_model')\n")
    (tmp_path / "tensorflow.py").write_text("import imports\nimports.seen.append('tensorflow')\nclass test: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_model", "tensorflow"):
        stand_in(name)  # so that monkeypatch removes it afterwards
        del sys.modules[name]
    stand_in("heareval.embeddings")
    stand_in("heareval.embeddings.runner", runner=lambda *_, **__: imports.seen.append("heareval"))
    with pytest.raises(ValueError):  # this fake heareval writes no embeddings
        kit.embed("a_model", None, {}, str(tmp_path), "task", str(tmp_path / "out"))
    assert imports.seen == ["a_model", "tensorflow", "heareval"]


def test_a_models_fingerprint_covers_weights_names_and_dtypes(tmp_path):
    def fingerprint(change) -> str:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
        with torch.no_grad():
            change(model)
        return kit._weights(model)["fingerprint"]

    def nudge(model):
        model[1].bias[1] += 1e-3

    def exchange(model):
        model[0], model[1] = model[1], model[0]

    same, again = fingerprint(lambda model: None), fingerprint(lambda model: None)
    assert same == again
    assert len({same, fingerprint(nudge), fingerprint(exchange), fingerprint(lambda model: model.half())}) == 4
    assert kit._weights(object()) == {"parameters": None, "fingerprint": None}


def test_a_models_record_has_its_encoders_config_and_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "_versions", lambda module: {})  # heareval is not installed here
    kit.describe("evaluation.baselines", None, {"untrained": "axlstm_tiny"}, str(tmp_path / "model.json"))
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["encoder"] == json.loads(json.dumps(config_to_dict(preset("axlstm_tiny"))))
    assert record["parameters"] == pytest.approx(4.3e6, rel=0.02) and record["embedding_size"] == 960
    kit.describe("evaluation.hear_naive", None, {}, str(tmp_path / "model.json"))
    record = json.loads((tmp_path / "model.json").read_text())
    assert (record["encoder"], record["parameters"], record["embedding_size"]) == (None, 0, 4096)
