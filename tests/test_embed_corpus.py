"""`torchrun -m hear_encoders.cli.embed_corpus`: every file once, even if processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as parquet
import pytest
import soundfile

from hear_encoders import (
    TransformerConfig,
    build_encoder,
    load_audio,
    load_checkpoint,
    save_checkpoint,
)
from hear_encoders.cli import embed_corpus
from hear_encoders.cli.embed_corpus import main
from hear_encoders.embedder import Embedder

FILES = 40
MODULE = ["-m", "hear_encoders.cli.embed_corpus"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, build_encoder(TransformerConfig("audiomaepp", dim=48, depth=2, heads=3), seed=1))
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(FILES):
        (folder / f"{number % 3}").mkdir(exist_ok=True)
        noise = np.random.default_rng(number).normal(0, 0.1, 16000 + 800 * number)
        soundfile.write(folder / f"{number % 3}" / f"{number:02d}.wav", noise, 16000)
    return folder


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = ["torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}", "--standalone"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *MODULE, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_worker(launcher: subprocess.Popen[str], output: Path) -> None:
    """Kill a worker as soon as the first part is written."""
    while not list(output.glob("part-*.parquet")):
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)
    workers = [child for child in psutil.Process(launcher.pid).children() if MODULE[1] in " ".join(child.cmdline())]
    os.kill(workers[1].pid, signal.SIGKILL)


def rows(output: Path) -> dict[str, np.ndarray]:
    """Read embeddings by path, from the folder as one table; check that no path occurs twice."""
    table = parquet.read_table(output)
    paths = table["path"].to_pylist()
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, np.stack(table["embedding"].to_numpy())))


def assert_complete(output: Path, recordings: Path, weights: Path) -> None:
    """Check that every file occurs once, with the model's embedding of it."""
    got = rows(output)
    files = sorted(str(path) for path in recordings.rglob("*.wav"))
    assert sorted(got) == files
    model = Embedder(load_checkpoint(weights))
    for path in files[::10]:
        expected = model.scene_embeddings(load_audio(path)[None])[0]
        np.testing.assert_allclose(got[path], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [1, 0], ids=["torchrun restarts it", "the command is given again"])
def test_killed_worker_loses_no_file_and_repeats_none(restarts, recordings, weights, tmp_path):
    output = tmp_path / "out"
    arguments = [recordings, "-o", output, "--weights", weights, "--part-files", 1]
    launcher = torchrun(*arguments, restarts=restarts)
    kill_worker(launcher, output)
    log, _ = launcher.communicate()
    assert (launcher.returncode == 0) == (restarts > 0), log
    if not restarts:
        assert len(list(output.glob("_part-??????.json"))) < FILES
        before = {path: path.stat().st_mtime_ns for path in output.glob("_part-??????.json")}
        assert main([str(argument) for argument in arguments]) == 0  # with another number of processes
        assert {path: path.stat().st_mtime_ns for path in before} == before  # finished parts are not embedded again
    assert_complete(output, recordings, weights)


def run(recordings: Path, output: Path, *arguments: object) -> int:
    return main([str(recordings), "-o", str(output), *map(str, arguments)])


def test_one_process_needs_no_launcher_and_new_files_form_new_parts(recordings, weights, tmp_path, capsys):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("b", "c", "d"):
        os.link(recordings / "0/00.wav", folder / f"{name}.wav")
    assert run(folder, output, "--weights", weights, "--part-files", 2, "--timestamps") == 0
    first = (output / "part-000000.parquet").read_bytes()
    os.link(recordings / "1/01.wav", folder / "a.wav")
    (folder / "junk.wav").write_bytes(b"no sound")
    assert run(folder, output, "--weights", weights, "--part-files", 2, "--timestamps") == 0
    assert "junk.wav: not readable as audio" in capsys.readouterr().err
    table = parquet.read_table(output)
    assert sorted(set(table["path"].to_pylist())) == [str(folder / f"{name}.wav") for name in "abcd"]
    assert table.num_rows == 3 * 25 + 26 and table.column_names == ["path", "timestamp_ms", "embedding"]
    assert (output / "part-000000.parquet").read_bytes() == first
    record = json.loads((output / "_part-000002.json").read_text())
    assert record["files"] == 2 and len(record["failures"]) == 1


def test_part_without_a_readable_file_counts_as_done(weights, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "junk.wav").write_bytes(b"no sound")
    assert run(tmp_path / "in", tmp_path / "out", "--weights", weights) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_part-000000.files.json",
        "_part-000000.json",
        "_plan.json",
    ]


def test_parts_have_a_largest_size(recordings, weights, tmp_path):
    assert run(recordings, tmp_path / "out", "--weights", weights, "--part-mb", 0.2) == 0
    sizes = [
        sum((recordings / name).stat().st_size for name in json.loads(path.read_text()))
        for path in (tmp_path / "out").glob("_part-*.files.json")
    ]
    assert len(sizes) > 5 and max(sizes) <= 2e5
    assert_complete(tmp_path / "out", recordings, weights)


def test_broken_machine_does_not_mark_a_part_as_done(recordings, weights, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_batches", broken)
        with pytest.raises(RuntimeError, match=r"none of the 40 files of part 0 .* unspecified launch failure"):
            run(recordings, tmp_path / "out", "--weights", weights)
    assert not list((tmp_path / "out").glob("*part-000000.parquet"))
    assert run(recordings, tmp_path / "out", "--weights", weights) == 0
    assert_complete(tmp_path / "out", recordings, weights)


def test_unmounted_recordings_do_not_mark_a_part_as_done(weights, tmp_path, monkeypatch):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    agree = embed_corpus._agree_on_parts

    def agree_and_unmount(*arguments):
        todo = agree(*arguments)
        folder.rename(tmp_path / "elsewhere")
        folder.mkdir()  # a mount point stays
        return todo

    with monkeypatch.context() as patch:
        patch.setattr(embed_corpus, "_agree_on_parts", agree_and_unmount)
        with pytest.raises(RuntimeError, match=r"none of the 1 files of part 0 .* no such audio file"):
            run(folder, output, "--weights", weights)
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert run(folder, output, "--weights", weights) == 0
    assert parquet.read_table(output).num_rows == 1


def test_interrupted_planning_resumes(recordings, weights, tmp_path, monkeypatch):
    def cut_short(path, *_):
        if "files" in path.name:
            raise KeyboardInterrupt
        write_json(path, *_)

    write_json = embed_corpus.write_json
    with monkeypatch.context() as patch:
        patch.setattr(embed_corpus, "write_json", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run(recordings, tmp_path / "out", "--weights", weights)
    assert run(recordings, tmp_path / "out", "--weights", weights) == 0
    assert_complete(tmp_path / "out", recordings, weights)


def test_file_deleted_after_planning_is_a_failure(weights, tmp_path, monkeypatch, capsys):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    find = embed_corpus.find_audio

    def find_and_delete(inputs, exclude):
        found = find(inputs, exclude)
        (tmp_path / "a.wav").unlink()
        return found

    monkeypatch.setattr(embed_corpus, "find_audio", find_and_delete)
    assert run(tmp_path, tmp_path / "out", "--weights", weights, "--part-files", 1) == 0
    assert "no such audio file" in capsys.readouterr().err
    assert parquet.read_table(tmp_path / "out")["path"].to_pylist() == [str(tmp_path / "b.wav")]


def test_every_process_must_have_the_same_settings(recordings, weights, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert run(recordings / "0", output, "--weights", weights) == 0
    monkeypatch.setattr(embed_corpus, "_agree_on_parts", lambda *_: [])  # as in a process that is not rank 0
    assert run(recordings / "0", output, "--weights", weights, "--precision", "bfloat16") == 2
    assert "made with precision = 'float32', now 'bfloat16'" in capsys.readouterr().err


def test_impossible_requests_fail_before_any_work(recordings, weights, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(tmp_path / "nowhere", output, "--weights", weights) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert run(recordings / "0", output, "--weights", weights) == 0
    assert run(recordings / "0", output, "--weights", weights, "--framing", "reference") == 2
    assert "made with framing = 'exact', now 'reference'" in capsys.readouterr().err
    assert run(recordings / "0", recordings / "1", "--weights", weights) == 2
    assert "is not empty and has no _plan.json" in capsys.readouterr().err
    assert run(recordings / "0", tmp_path / "out.parquet", "--weights", weights) == 2
    assert "expected a folder" in capsys.readouterr().err
    (output / "_plan.json").write_text("{")
    assert run(recordings / "0", output, "--weights", weights) == 2
    assert "_plan.json: damaged" in capsys.readouterr().err
