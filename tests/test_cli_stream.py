"""`hear-embed --stream -`: samples on standard input, lines of JSON on standard output, as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hear_axlstm
from hear_encoders import AxLSTMConfig, TransformerConfig, build_encoder, load_audio, save_checkpoint
from hear_encoders.cli.embed import main as embed_main

SPEECH = Path(__file__).parents[1] / "examples" / "speech.flac"
ENTRY = "import sys; from hear_encoders.cli.embed import main; sys.exit(main())"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, build_encoder(AxLSTMConfig("axlstm", dim=48, depth=2), seed=1))
    return folder


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """(samples,) int16, 3 s."""
    return (load_audio(SPEECH)[: 3 * 16000].numpy() * 32767).astype("<i2")


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, "--stream", "-", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def parse(lines: bytes) -> tuple[np.ndarray, list[float]]:
    steps = [json.loads(line) for line in lines.splitlines()]
    return np.array([step["embedding"] for step in steps]), [step["timestamp_ms"] for step in steps]


def test_the_lines_are_the_clips_timestamp_embeddings(weights, speech):
    process = start("--weights", weights, "--statistics", -6, 3.5)
    output, errors = process.communicate(speech.tobytes())
    assert process.returncode == 0 and errors == b""
    model = hear_axlstm.load_model(weights, statistics=[-6.0, 3.5])
    expected, times = model.timestamp_embeddings(torch.from_numpy(speech / np.float32(32768))[None])
    embeddings, timestamps_ms = parse(output)
    assert timestamps_ms == times[0].tolist()
    np.testing.assert_allclose(embeddings, expected[0], rtol=1e-4, atol=1e-4)


def test_a_line_comes_as_soon_as_its_step_is_over(weights, speech):
    process = start("--weights", weights, "--warm-up", 0.4)
    process.stdin.write(speech[: 16000 // 2].tobytes())
    process.stdin.flush()
    first = [process.stdout.readline() for _ in range(12)]  # would wait for ever if they came at the end only
    rest, _ = process.communicate(speech[16000 // 2 :].tobytes())
    _, timestamps_ms = parse(b"".join([*first, rest]))
    assert timestamps_ms == [15.0 + 40 * step for step in range(75)] and process.returncode == 0


def test_a_reader_that_goes_away_ends_it_quietly(weights, speech):
    process = start("--weights", weights, "--statistics", -6, 3.5)
    process.stdin.write(speech.tobytes())
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    try:
        for _ in range(20):
            process.stdin.write(speech.tobytes())
        process.stdin.close()
    except BrokenPipeError:
        pass
    assert process.wait() == 1 and process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "a.wav"], "takes - as its only input"),
        (["--stream", "-", "-o", "out.npz"], "and no --output"),
        (["--stream", "-", "--timestamps"], "and no --output"),
        (["--stream", "-", "--encoding", "mp3"], "invalid choice: 'mp3'"),
        (["--stream", "-", "--warm-up", "-1"], "at least 0, got '-1'"),
        (["a.wav"], "required: -o/--output"),
        (["a.wav", "-o", "out", "--sample-rate", "8000"], "go with --stream"),
        (["a.wav", "-o", "out", "--warm-up", "0"], "go with --stream"),
    ],
)
def test_contradictory_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        embed_main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("hear_axlstm", AxLSTMConfig("axlstm", dim=48, depth=2, flip=True), "with flip cannot be streamed"),
        ("hear_audiomaepp", TransformerConfig("audiomaepp", dim=48, depth=1, heads=3), "an AxLSTM without flip can"),
    ],
)
def test_a_model_that_looks_ahead_is_refused(module, config, message, tmp_path, capsys):
    save_checkpoint(tmp_path, build_encoder(config, seed=1))
    assert embed_main(["--stream", "-", "--model", module, "--weights", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
