"""Exported graphs in ONNX Runtime equal PyTorch, and are described well enough to be used without it.

`.ci/run` installs the extra `onnx` and runs this file. An export of a small model takes seconds, so tests share them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import wave
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_CONFIGS

import hear_audiomaepp
import hear_axlstm
from hear_encoders import AxLSTMConfig, Embedder, build_encoder, save_checkpoint
from hear_encoders.cli.weights import main
from hear_encoders.onnx_export import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

STATISTICS = [-6.0, 3.5]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@lru_cache(maxsize=32)
def small_model(kind: str, **options) -> Embedder:
    """A small model with every parameter moved off its initial value."""
    encoder = build_encoder(SMALL_CONFIGS[kind], seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Embedder(encoder, **options)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Export a model's part once and open it: session(model, part="encoder", input="logmel")."""
    folder, opened = tmp_path_factory.mktemp("onnx"), {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4

    def get(model: Embedder, **arguments):
        key = id(model), *arguments.items()
        if key not in opened:
            export_onnx(model, folder / f"{len(opened)}.onnx", **arguments)
            opened[key] = onnxruntime.InferenceSession(folder / f"{len(opened)}.onnx", options)
        return opened[key]

    return get


def assert_close(got: np.ndarray, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(got), expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["audiomaepp_rope", "ssast", "axlstm_flip"])
def test_segments_of_every_length_equal_pytorch(session, kind):
    model = small_model(kind)
    graph = session(model, part="encoder", input="logmel")
    generator = torch.Generator().manual_seed(0)
    for steps in range(1, 51):
        frames = torch.randn(1 + steps % 3, 4 * steps, 80, generator=generator)
        (embeddings,) = graph.run(None, {"frames": frames.numpy()})
        assert_close(embeddings, model.encoder(frames).unflatten(1, (-1, 5)).flatten(2))


def test_more_than_a_segment_is_refused(session):
    graph = session(small_model("audiomaepp_rope"), part="encoder", input="logmel")
    with pytest.raises(Exception, match="250 by 255"):  # ONNX Runtime's exceptions derive from Exception only
        graph.run(None, {"frames": np.zeros((1, 204, 80), np.float32)})


# At the front end's edges and at those of steps, and one of each number of steps.
LENGTHS = [1, 2, 200, 201, 239, 240, 241, 879, 880, *range(1000, 32_000, 640), 31_999, 32_000, 32_239]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("audiomaepp", {}), ("axlstm", {"pooling": "mean_std", "layer": (2, 1), "statistics": tuple(STATISTICS)})],
)
def test_clips_of_up_to_a_segment_equal_the_embeddings(session, noise, kind, options):
    model = small_model(kind, **options)
    graph = session(model, part="encoder", input="waveform")
    for samples in LENGTHS:
        audio = noise(1 + samples % 3, samples)
        embeddings, scenes = graph.run(["embeddings", "scene_embeddings"], {"audio": audio.numpy()})
        assert_close(embeddings, model.timestamp_embeddings(audio)[0])
        assert_close(scenes, model.scene_embeddings(audio))


def test_the_front_end_equals_log_mel(session, noise):
    model = small_model("audiomaepp")
    graph = session(model, part="frontend")
    for samples in [*LENGTHS[:20], 70_001]:
        audio = noise(1 + samples % 3, samples)
        audio[0, samples // 2 :] *= 1e-6  # nearly silent
        (logmel,) = graph.run(None, {"audio": audio.numpy()})
        assert_close(logmel, model.log_mel(audio))


def test_a_silent_band_beside_a_loud_tone_equals_log_mel(session):
    model = small_model("audiomaepp")
    audio = torch.sin(2 * torch.pi * 440 / 16000 * torch.arange(16000, dtype=torch.float64)).float()[None]
    (logmel,) = session(model, part="frontend").run(None, {"audio": audio.numpy()})
    assert_close(logmel, model.log_mel(audio))


@lru_cache(maxsize=1)
def step_model() -> Embedder:
    """A model of a single block: the step's export takes longer than others'."""
    encoder = build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1), seed=1).eval()
    return Embedder(encoder, statistics=tuple(STATISTICS))


def run_steps(graph, inputs: list[np.ndarray]) -> np.ndarray:
    """Run steps from a state of zeros: (B, ...) each -> (B, T, E)."""
    first, *rest = graph.get_inputs()
    dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    state = {value.name: np.zeros((len(inputs[0]), *value.shape[1:]), dtypes[value.type]) for value in rest}
    embeddings = []
    for step in inputs:
        output, *states = graph.run(None, {first.name: step, **state})
        state = dict(zip(state, states))
        embeddings.append(output)
    return np.stack(embeddings, axis=1)


@pytest.mark.parametrize("input", ["waveform", "logmel"])
def test_steps_equal_a_stream(session, noise, input):
    model = step_model()
    audio = noise(2, 51_000)  # 79 steps: into a second segment
    expected, _ = hear_axlstm.stream(model, streams=2).push(audio)
    if input == "waveform":  # windows of 880 samples that advance by 640
        padded = np.pad(audio.numpy(), ((0, 0), (200, 0)), mode="reflect")
        inputs = [padded[:, 640 * step : 640 * step + 880] for step in range(79)]
    else:
        frames = ((model.log_mel(audio) - STATISTICS[0]) / STATISTICS[1]).numpy()
        inputs = [frames[:, 4 * step : 4 * step + 4] for step in range(79)]
    assert_close(run_steps(session(model, part="step", input=input), inputs), expected)


def test_metadata_has_all_settings_and_the_file_nothing_of_this_machine(session, tmp_path):
    model = small_model("axlstm", pooling="mean_std", layer=(2, 1), statistics=tuple(STATISTICS))
    graph = session(model, part="encoder", input="waveform")
    settings = graph.get_modelmeta().custom_metadata_map
    assert json.loads(settings["config"])["dim"] == 48
    assert {name: settings[name] for name in ("part", "input", "family", "pooling", "framing")} == {
        "part": "encoder",
        "input": "waveform",
        "family": "axlstm",
        "pooling": "mean_std",
        "framing": "exact",
    }
    numbers = ("sample_rate", "layer", "statistics", "step_frames", "segment_frames", "step_ms", "first_step_ms")
    assert [json.loads(settings[name]) for name in numbers] == [16000, [2, 1], STATISTICS, 4, 200, 40, 15]
    assert [(value.name, value.shape) for value in graph.get_inputs()] == [("audio", ["batch", "samples"])]
    assert [(value.name, value.shape) for value in graph.get_outputs()] == [
        ("embeddings", ["batch", "steps", 480]),
        ("scene_embeddings", ["batch", 960]),
    ]
    content = Path(graph._model_path).read_bytes()
    assert b"site-packages" not in content and str(Path(__file__).parents[1]).encode() not in content


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The files of the example, by the commands that it prints, from weights in float16."""
    folder = tmp_path_factory.mktemp("example")
    model = small_model("audiomaepp")
    half = build_encoder(model.encoder.config).half()
    half.load_state_dict(model.encoder.state_dict())
    save_checkpoint(folder / "weights", half)
    for output, options in (("frontend.onnx", ["--part", "frontend"]), ("encoder.onnx", ["--input", "logmel"])):
        assert main(["export", str(folder / "weights"), str(folder / output), *options]) == 0
    return folder


@pytest.mark.parametrize("samples", [1, 700, 32_000, 75_321])
def test_the_example_equals_scene_embeddings(exported, noise, tmp_path, samples):
    samples_16_bit = (32767 * noise(1, samples)[0]).short().numpy()
    with wave.open(str(tmp_path / "clip.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(samples_16_bit.tobytes())
    path = Path(__file__).parents[1] / "examples/onnx_embed.py"
    spec = importlib.util.spec_from_file_location("onnx_embed", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.PIECE = 123  # frames of log-mel at once: the longest clip has 471
    sessions = [onnxruntime.InferenceSession(exported / name) for name in ("frontend.onnx", "encoder.onnx")]
    embeddings, times_ms, scene = example.embed(example.read_wav(str(tmp_path / "clip.wav")), *sessions)

    model = hear_audiomaepp.load_model(exported / "weights")
    audio = torch.from_numpy(samples_16_bit.astype(np.float32) / 32768)[None]
    expected, expected_ms = hear_audiomaepp.get_timestamp_embeddings(audio, model)
    assert_close(embeddings[None], expected)
    assert times_ms.tolist() == expected_ms[0].tolist()
    assert_close(scene[None], hear_audiomaepp.get_scene_embeddings(audio, model))


def test_the_command_tells_inputs_and_outputs_and_refuses_an_existing_file(exported, tmp_path, capsys):
    output = tmp_path / "frontend.onnx"
    command = ["export", str(exported / "weights"), str(output), "--part", "frontend"]
    assert main(command) == 0
    assert "audio             float32 (batch, samples)\n" in capsys.readouterr().out
    content = output.read_bytes()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert output.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ["frontend.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "step"], "cannot be streamed"),
        (["--layer", "3"], "layer must be"),
        (["--part", "frontend", "--input", "logmel"], "takes waveforms"),
    ],
)
def test_what_cannot_be_exported_is_refused(exported, tmp_path, capsys, options, message):
    assert main(["export", str(exported / "weights"), str(tmp_path / "out.onnx"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="only exact framing"):
        export_onnx(small_model("ssast", framing="reference"), tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="need statistics"):
        export_onnx(small_model("axlstm"), tmp_path / "out.onnx", part="step")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'hear-audiomaepp\[onnx\]'"):
        export_onnx(small_model("ssast"), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_stream_in_the_documentation_equals_a_stream(session, noise, tmp_path, monkeypatch):
    model, audio = step_model(), noise(1, 3000)
    shutil.copy(session(model, part="step", input="waveform")._model_path, tmp_path / "step.onnx")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/onnx.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    namespace = {"audio": audio[0].numpy()}
    exec(block, namespace)
    expected, _ = hear_axlstm.stream(model).push(audio)
    assert_close(namespace["embedding"], expected[:, -1])
