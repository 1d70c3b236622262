"""The HEAR API, as hear-validator and hear-eval-kit use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import hub_client
import pytest
import torch
from conftest import SMALL_CONFIGS
from hub_server import HubServer
from safetensors.torch import load_file

import hear_audiomaepp
import hear_axlstm
from hear_encoders import build_encoder, preset, save_checkpoint
from hear_encoders.execution import resolve_device
from hear_encoders.hear import EMBEDDINGS

MODULES = {"hear_audiomaepp": hear_audiomaepp, "hear_axlstm": hear_axlstm}
FAMILIES = {"hear_audiomaepp": ["audiomaepp", "mae"], "hear_axlstm": ["axlstm", "ssast"]}


@pytest.fixture
def checkpoints(tmp_path):
    """Save small checkpoints; return their directories by family."""
    for family in ("audiomaepp", "ssast", "axlstm"):
        save_checkpoint(tmp_path / family, build_encoder(SMALL_CONFIGS[family], seed=1))
    return {family: str(tmp_path / family) for family in ("audiomaepp", "ssast", "axlstm")}


@pytest.mark.parametrize("module", MODULES)
def test_hear_validator_passes_unpatched(module, tmp_path):
    validator = Path(sys.executable).parent / "hear-validator"
    result = subprocess.run(
        [validator, module, "--device", "cpu"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("Looks good!")
    assert "Interval between timestamps is 40.0ms" in result.stdout
    assert "timestamps" not in result.stderr  # the validator warns of intervals above 50 ms


@pytest.mark.parametrize("module", MODULES)
def test_without_a_path_the_bundled_tiny_encoder_is_loaded_without_warnings(module, noise):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = MODULES[module].load_model(), MODULES[module].load_model("")
    assert one.encoder.config == preset({"hear_audiomaepp": "audiomaepp_tiny", "hear_axlstm": "axlstm_tiny"}[module])
    audio = noise(1, 16000)
    assert torch.equal(*(MODULES[module].get_scene_embeddings(audio, model) for model in (one, two)))


@pytest.mark.parametrize("module", MODULES)
def test_bundled_weights_are_float16_and_keep_the_wheel_below_60_mb(module):
    folder = Path(MODULES[module].__file__).parent / "weights"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 30e6  # the wheel has two of these
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("module", MODULES)
def test_loaded_model_has_the_attributes_of_the_hear_api(module, checkpoints):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MODULES[module].load_model(checkpoints[FAMILIES[module][0]])
    assert isinstance(model, torch.nn.Module) and not model.training
    assert model.sample_rate == 16000
    for size in (model.scene_embedding_size, model.timestamp_embedding_size):
        assert type(size) is int and size == 240


@pytest.mark.parametrize("module", MODULES)
def test_embeddings_are_float32_on_the_device_of_the_audio(module, checkpoints, noise):
    model = MODULES[module].load_model(checkpoints[FAMILIES[module][0]])
    audio = noise(3, 40000)
    scenes = MODULES[module].get_scene_embeddings(audio, model)
    embeddings, timestamps = MODULES[module].get_timestamp_embeddings(audio, model)
    assert scenes.shape == (3, 240) and embeddings.shape == (3, 63, 240) and timestamps.shape == (3, 63)
    for tensor in (scenes, embeddings, timestamps):
        assert tensor.dtype == torch.float32 and tensor.device == audio.device and not tensor.requires_grad
    assert timestamps[0, 0] == 15 and (timestamps.diff() == 40).all()


@pytest.mark.filterwarnings("ignore:precision='bfloat16':UserWarning")  # slow on CPUs without AVX-512
def test_options_parsed_from_json_work(checkpoints, noise):
    options = json.loads(
        '{"framing": "reference", "precision": "bfloat16", "max_chunks": 2, "revision": null,'
        ' "statistics": [-6.5, 3], "compile": true}'
    )
    model = hear_axlstm.load_model(checkpoints["axlstm"], **options)
    assert (model.framing, model.precision, model.max_segments) == ("reference", "bfloat16", 2)
    assert model.execution.compile
    model = hear_axlstm.load_model(checkpoints["axlstm"], **options | {"compile": False})
    assert hear_axlstm.get_timestamp_embeddings(noise(1, 32000), model)[0].shape == (1, 51, 240)


def test_released_means_reference_framing(checkpoints):
    load_model, path = hear_axlstm.load_model, checkpoints["axlstm"]
    assert load_model(path, released=True).framing == "reference"
    assert load_model(path, released=True, framing="reference").framing == "reference"
    assert load_model(path).framing == "exact"
    with pytest.raises(ValueError, match="released=True means framing='reference', got framing='exact'"):
        load_model(path, released=True, framing="exact")


def test_unknown_option_is_named(checkpoints):
    with pytest.raises(TypeError, match="unexpected keyword argument 'hop'"):
        hear_axlstm.load_model(checkpoints["axlstm"], hop=10)


def test_revision_needs_a_repository(checkpoints):
    with pytest.raises(ValueError, match="revision 'v1' was given without a Hub repository"):
        hear_axlstm.load_model(revision="v1")
    with pytest.raises(ValueError, match="is a local path, not a Hub repository"):
        hear_axlstm.load_model(checkpoints["axlstm"], revision="v1")


def test_each_module_accepts_its_papers_baseline_and_refuses_the_other_papers_models(checkpoints, noise):
    assert hear_axlstm.load_model(checkpoints["ssast"]).encoder.config.family == "ssast"
    with pytest.raises(ValueError, match="family 'axlstm', but hear_audiomaepp supports audiomaepp and mae"):
        hear_audiomaepp.load_model(checkpoints["axlstm"])
    model = hear_audiomaepp.load_model(checkpoints["audiomaepp"])
    for function in (hear_axlstm.get_scene_embeddings, hear_axlstm.get_timestamp_embeddings):
        with pytest.raises(ValueError, match="family 'audiomaepp', but hear_axlstm supports axlstm and ssast"):
            function(noise(1, 16000), model)
        with pytest.raises(TypeError, match=r"must come from hear_axlstm\.load_model, got Linear"):
            function(noise(1, 16000), torch.nn.Linear(2, 2))


def test_hear_functions_refuse_bad_audio(checkpoints):
    model = hear_axlstm.load_model(checkpoints["axlstm"])
    with pytest.raises(TypeError, match="got list"):
        hear_axlstm.get_scene_embeddings([[0.1], [0.2, 0.3]], model)
    with pytest.raises(ValueError, match=r"got \(1, 2, 3\)"):
        hear_axlstm.get_timestamp_embeddings(torch.zeros(1, 2, 3), model)


def test_load_model_reads_a_hub_repository_and_then_its_cache(checkpoints, tmp_path, noise):
    files = {name: (tmp_path / "axlstm" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with closing(HubServer()) as server:
        server.commit("org/axlstm", files)
        online, offline = (
            hub_client.call(
                hub_client.embed, "org/axlstm", "main", endpoint=server.url, home=tmp_path / "hf", **settings
            )
            for settings in ({"HF_HUB_DISABLE_TELEMETRY": "1"}, {"HF_HUB_OFFLINE": "1"})
        )
    model = hear_axlstm.load_model(checkpoints["axlstm"])
    expected = hear_axlstm.get_scene_embeddings(torch.linspace(-1, 1, 16000)[None], model)
    assert online == offline == expected.tolist()


@pytest.mark.parametrize("module", MODULES)
def test_the_modules_export_only_the_hear_functions_and_hear_axlstm_also_streams(module):
    streams = ["stream"] if module == "hear_axlstm" else []
    assert sorted(MODULES[module].__all__) == [
        "get_scene_embeddings",
        "get_timestamp_embeddings",
        "load_model",
        *streams,
    ]


def test_a_model_is_loaded_onto_a_device_that_is_there(checkpoints, monkeypatch):
    load_model, path = hear_axlstm.load_model, checkpoints["axlstm"]
    assert load_model(path).device == load_model(path, device="cpu").device == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert load_model(path, device="auto").device == torch.device("cpu")
    for device in ("cuda", "cuda:1", torch.device("cuda"), "mps"):
        with pytest.raises(ValueError, match=r"device '(cuda(:1)?|mps)' is not there, only 'cpu'"):
            load_model(path, device=device)
    for device in ("gpu", "cuda:x", 0.5):
        with pytest.raises(ValueError, match=f"device {device!r} is not one of PyTorch's: use 'auto' or 'cpu'"):
            load_model(path, device=device)


def test_the_devices_of_a_machine_with_gpus_are_selected_by_name(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert resolve_device(name) == torch.device(name)
    assert resolve_device("auto") == torch.device("cuda")
    for name in ("cuda:2", "mps"):
        with pytest.raises(ValueError, match=f"device '{name}' is not there, only 'cpu', 'cuda:0', 'cuda:1'"):
            resolve_device(name)


@pytest.mark.parametrize("mode", ["auto", "parallel", "chunkwise", "recurrent"])
def test_the_mode_of_an_axlstm_does_not_change_its_embeddings(checkpoints, noise, mode):
    model = hear_axlstm.load_model(checkpoints["axlstm"], mode=mode)
    assert model.encoder.mode == mode
    expected = hear_axlstm.load_model(checkpoints["axlstm"]).scene_embeddings(noise(1, 40_000))
    torch.testing.assert_close(model.scene_embeddings(noise(1, 40_000)), expected, rtol=1e-4, atol=1e-5)


def test_a_mode_is_one_of_an_axlstm(checkpoints):
    with pytest.raises(
        ValueError, match="mode must be one of 'auto', 'parallel', 'chunkwise', 'recurrent'; got 'fast'"
    ):
        hear_axlstm.load_model(checkpoints["axlstm"], mode="fast")
    for module, family in ((hear_axlstm, "ssast"), (hear_audiomaepp, "audiomaepp")):
        with pytest.raises(ValueError, match=f"mode is for AxLSTM, but .* holds a model of family '{family}'"):
            module.load_model(checkpoints[family], mode="parallel")


def test_an_embedding_stands_for_a_layer_and_a_pooling(checkpoints, noise):
    load_model, path, audio = hear_axlstm.load_model, checkpoints["axlstm"], noise(1, 40_000)
    default = load_model(path).scene_embeddings(audio)
    assert torch.equal(load_model(path, embedding="paper").scene_embeddings(audio), default)
    best = load_model(path, embedding="best")
    setting = EMBEDDINGS["best"]
    assert torch.equal(best.scene_embeddings(audio), load_model(path, **setting._asdict()).scene_embeddings(audio))
    assert not torch.equal(best.scene_embeddings(audio)[:, :240], best.scene_embeddings(audio)[:, 240:])
    with pytest.raises(ValueError, match="embedding must be one of 'paper', 'best'; got 'good'"):
        load_model(path, embedding="good")
    for option in ({"layer": 1}, {"pooling": "mean"}):
        with pytest.raises(ValueError, match="embedding='best' selects the layer and the pooling"):
            load_model(path, embedding="best", **option)


def test_a_layer_of_a_loaded_model_has_the_size_of_its_embeddings(checkpoints, noise):
    model = hear_axlstm.load_model(checkpoints["axlstm"], layer=[1, 2], pooling="mean_std")
    assert (model.timestamp_embedding_size, model.scene_embedding_size) == (480, 960)
    assert hear_axlstm.get_scene_embeddings(noise(1, 9000), model).shape == (1, 960)
    assert hear_axlstm.get_timestamp_embeddings(noise(1, 9000), model)[0].shape == (1, 14, 480)
