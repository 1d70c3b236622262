"""`hear-embed --stream -`: samples on standard input, lines of JSON on standard output, without delay."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


def embed_stream(*arguments: object) -> int:
    return embed_main(["--stream", "-", *map(str, arguments)])


def parse(lines: str) -> tuple[np.ndarray, list[float]]:
    steps = [json.loads(line) for line in lines.splitlines()]
    return np.array([step["embedding"] for step in steps]), [step["timestamp_ms"] for step in steps]


def test_lines_are_the_clips_timestamp_embeddings(weights, speech, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(speech.tobytes())))
    assert embed_stream("--weights", weights, "--statistics", -6, 3.5) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    model = hear_axlstm.load_model(weights, statistics=[-6.0, 3.5])
    expected, times = model.timestamp_embeddings(torch.from_numpy(speech / np.float32(32768))[None])
    embeddings, timestamps_ms = parse(output)
    assert timestamps_ms == times[0].tolist()
    np.testing.assert_allclose(embeddings, expected[0], rtol=1e-4, atol=1e-4)


def test_line_is_written_as_soon_as_its_step_is_complete(weights, speech, monkeypatch):
    (stdin, to_stdin), (from_stdout, stdout) = os.pipe(), os.pipe()
    with (
        ThreadPoolExecutor(2) as pool,
        open(to_stdin, "wb") as samples,
        open(from_stdout) as lines,
        open(stdin) as command_stdin,
        open(stdout, "w") as command_stdout,
    ):
        monkeypatch.setattr(sys, "stdin", command_stdin)
        monkeypatch.setattr(sys, "stdout", command_stdout)

        def command() -> int:
            try:
                return embed_stream("--weights", weights, "--warm-up", 0.4)
            finally:
                command_stdout.close()

        def send(part: np.ndarray, last: bool = False) -> None:
            samples.write(part.tobytes())
            (samples.close if last else samples.flush)()

        code = pool.submit(command)
        send(speech[: 16000 // 2])
        first = [lines.readline() for _ in range(12)]  # would wait forever if all lines came at the end
        pool.submit(send, speech[16000 // 2 :], last=True)
        _, timestamps_ms = parse("".join([*first, lines.read()]))
        assert timestamps_ms == [15.0 + 40 * step for step in range(75)] and code.result() == 0


def test_reader_that_closes_the_pipe_ends_the_process_quietly(weights, speech):
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, "--stream", "-", "--weights", str(weights), "--statistics", "-6", "3.5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
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
def test_model_that_looks_ahead_is_refused(module, config, message, tmp_path, capsys):
    save_checkpoint(tmp_path, build_encoder(config, seed=1))
    assert embed_main(["--stream", "-", "--model", module, "--weights", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
