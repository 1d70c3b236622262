"""What `hear-embed-corpus` reads, and the stages that Ray runs, in this process, on local files and in memory."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as parquet
import pytest
import soundfile
from conftest import SMALL_CONFIGS

from hear_encoders import build_encoder, load_audio, load_checkpoint, save_checkpoint
from hear_encoders.cli import corpus_stages
from hear_encoders.cli.corpus_inputs import plan
from hear_encoders.cli.corpus_stages import Embed, decode, done_paths, settings_or_error, write
from hear_encoders.cli.embed_corpus import busy_share, main
from hear_encoders.embedder import Embedder
from hear_encoders.storage import Folder, find_files

FILES = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, build_encoder(SMALL_CONFIGS["audiomaepp"], seed=1))
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(FILES):
        noise = np.random.default_rng(number).normal(0, 0.1, 16000 + 3200 * number)
        soundfile.write(folder / f"{number:02d}.flac", noise, 16000)
    return folder


@pytest.fixture
def memory():
    """fsspec's memory filesystem, empty."""
    storage = fsspec.filesystem("memory")
    storage.rm("/", recursive=True) if storage.find("/") else None
    yield storage
    storage.store.clear()


def run(
    inputs: list[str],
    output: str,
    weights: Path,
    *,
    timestamps: bool = False,
    half: bool = False,
    part_seconds: float = 3.0,
    column: str | None = None,
    task_mb: float = 0.1,
    only: int | None = None,
) -> list[dict]:
    """Run the stages one after the other, and return what they report. `only` is the number of parts to write."""
    options = argparse.Namespace(
        **{"weights": str(weights), "revision": None, "model": "hear_audiomaepp", "framing": "exact"},
        **{"precision": "auto", "embedding": "paper", "layer": None, "pooling": None, "statistics": None},
        **{"device": "cpu", "compile": False, "threads": 1, "batch_seconds": 4.0},
        **{"timestamps": timestamps, "half": half},
    )
    checkpoint = {path.name: path.read_bytes() for path in weights.iterdir()}
    folder = Folder(output)
    work = plan(inputs, exclude=[], column=column, done=done_paths(folder), task_mb=task_mb)
    settings = settings_or_error(options, checkpoint)
    assert isinstance(settings, dict)
    worker = Embed(options, lambda: checkpoint, settings)
    embedder = Embedder(load_checkpoint(weights))
    reports = []
    for task in work.tasks:
        tasks = pyarrow.table({"task": [pickle.dumps(pickle.loads(pickle.dumps(task)))]})
        for row in decode(tasks, part_seconds, True):
            if len(reports) == only:
                return reports
            embedded = worker(row)
            size = embedder.timestamp_embedding_size
            told = write(embedded, output, work.extras, embedder.framer, timestamps, size)
            reports.append(json.loads(told["report"][0].as_py()))
    return reports


def read(output: str | Path) -> pyarrow.Table:
    return parquet.read_table(output).sort_by("path")


def embeddings(table: pyarrow.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*part-*")}


def test_rows_hold_each_file_with_its_duration_and_the_models_embedding(recordings, weights, tmp_path):
    reports = run([str(recordings)], str(tmp_path / "out"), weights)
    table = read(tmp_path / "out")
    files = sorted(map(str, recordings.iterdir()))
    assert table["path"].to_pylist() == files
    assert table["duration_s"].to_pylist() == [(5 + number) / 5 for number in range(FILES)]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 48 * 5)
    model = Embedder(load_checkpoint(weights))
    expected = [model.scene_embeddings(load_audio(path))[0].numpy() for path in files]
    np.testing.assert_allclose(embeddings(table), expected, rtol=1e-4, atol=1e-5)
    assert len(reports) > 4 and sum(report["files"] for report in reports) == FILES


def test_steps_have_timestamps_and_half_precision_is_float16(recordings, weights, tmp_path):
    run([str(recordings)], str(tmp_path / "out"), weights, timestamps=True, half=True)
    table = read(tmp_path / "out")
    first = table.filter(pyarrow.compute.equal(table["path"], str(recordings / "00.flac")))
    assert first["timestamp_ms"].to_pylist() == [15 + 40 * step for step in range(25)]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float16(), 48 * 5)
    assert table.column_names == ["path", "duration_s", "timestamp_ms", "embedding"]


def test_a_later_run_writes_what_is_missing_into_the_same_files(recordings, weights, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run([str(recordings)], str(whole), weights)
    assert len(run([str(recordings)], str(part), weights, only=2)) == 2
    written = content(part)
    assert len(run([str(recordings)], str(part), weights)) == len(content(whole)) - len(written)
    assert content(part) == content(whole)
    assert run([str(recordings)], str(part), weights) == []


def test_whichever_parts_are_missing_the_rest_is_the_same(recordings, weights, tmp_path):
    run([str(recordings)], str(tmp_path / "out"), weights)
    before = content(tmp_path / "out")
    for name in sorted(before)[::2]:
        (tmp_path / "out" / name).unlink()
    run([str(recordings)], str(tmp_path / "out"), weights)
    assert content(tmp_path / "out") == before


def test_unreadable_files_are_errors_with_reasons_and_are_not_tried_again(recordings, weights, tmp_path):
    shutil.copytree(recordings, tmp_path / "in")
    (tmp_path / "in" / "05.flac").write_bytes(b"no sound")
    soundfile.write(tmp_path / "in" / "06.flac", np.zeros(0), 16000)
    reports = run([str(tmp_path / "in")], str(tmp_path / "out"), weights)
    lines = [json.loads(line) for path in (tmp_path / "out" / "errors").iterdir() for line in path.open()]
    assert sorted(line["path"] for line in lines) == [str(tmp_path / "in" / f"0{number}.flac") for number in (5, 6)]
    assert any("not readable as audio" in line["reason"] for line in lines)
    assert sum(len(report["failures"]) for report in reports) == 2
    assert read(tmp_path / "out").num_rows == FILES - 2  # the folder reads as one table beside errors/
    assert run([str(tmp_path / "in")], str(tmp_path / "out"), weights) == []
    shutil.rmtree(tmp_path / "out" / "errors")
    assert sum(len(report["failures"]) for report in run([str(tmp_path / "in")], str(tmp_path / "out"), weights)) == 2


def test_long_files_are_read_by_the_worker(recordings, weights, tmp_path, monkeypatch):
    run([str(recordings)], str(tmp_path / "whole"), weights)
    monkeypatch.setattr(corpus_stages, "MAX_DECODED_S", 2.5)
    run([str(recordings)], str(tmp_path / "out"), weights)
    whole, out = read(tmp_path / "whole"), read(tmp_path / "out")
    assert out.drop_columns("embedding").equals(whole.drop_columns("embedding"))
    np.testing.assert_allclose(embeddings(out), embeddings(whole), rtol=1e-4, atol=1e-5)


def test_too_little_memory_for_a_batch_embeds_one_by_one(recordings, weights, tmp_path, monkeypatch):
    run([str(recordings)], str(tmp_path / "whole"), weights)
    embed = Embedder.embed_batches

    def embed_one(self, batches, per_step=False):
        if len(batches) > 1 or batches[0].shape[1] == 16000:
            raise MemoryError("too large")
        return embed(self, batches, per_step)

    monkeypatch.setattr(Embedder, "embed_batches", embed_one)
    reports = run([str(recordings)], str(tmp_path / "out"), weights)
    assert [reason for report in reports for reason in report["failures"]] == [
        f"{recordings / '00.flac'}: MemoryError: too large"
    ]
    out, whole = read(tmp_path / "out"), read(tmp_path / "whole").slice(1)
    np.testing.assert_allclose(embeddings(out), embeddings(whole), rtol=1e-4, atol=1e-5)


def test_worker_with_other_weights_is_refused(weights):
    options = argparse.Namespace(
        **{"weights": "", "revision": None, "model": "hear_audiomaepp", "framing": "exact", "precision": "auto"},
        **{"embedding": "paper", "layer": None, "pooling": None, "statistics": None, "device": "cpu"},
        **{"compile": False, "threads": 1, "batch_seconds": 4.0, "timestamps": False, "half": False},
    )
    checkpoint = {path.name: path.read_bytes() for path in weights.iterdir()}
    settings = settings_or_error(options, checkpoint)
    with pytest.raises(ValueError, match=r"would embed with weights = .*, the others with 'abc'"):
        Embed(options, lambda: checkpoint, {**settings, "weights": "abc"})
    assert "not a readable safetensors file" in settings_or_error(options, {**checkpoint, "model.safetensors": b"abc"})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest_selects_files_and_carries_its_other_columns(kind, recordings, weights, tmp_path):
    names = [f"{number:02d}.flac" for number in (3, 1, 7)]
    table = pyarrow.table({"file": names, "label": ["a", None, "c"], "year": [1, 2, 3]})
    manifest = recordings.parent / f"manifest-{tmp_path.name}.{kind}"
    table = table.set_column(0, "file", [[f"{recordings.name}/{name}" for name in names]])
    parquet.write_table(table, manifest) if kind == "parquet" else pyarrow.csv.write_csv(table, manifest)
    run([str(manifest)], str(tmp_path / "out"), weights, column="file")
    rows = read(tmp_path / "out").drop_columns(["embedding", "duration_s"]).to_pylist()
    assert [(Path(row["path"]).name, row["year"]) for row in rows] == [("01.flac", 2), ("03.flac", 1), ("07.flac", 3)]
    assert rows[1]["label"] == "a"
    assert run([str(manifest)], str(tmp_path / "out"), weights, column="file") == []
    with pytest.raises(ValueError, match=r"columns file, label, year, but no 'path'"):
        plan([str(manifest)], exclude=[], column=None, done=[], task_mb=1)


def test_tar_shards_are_read_member_by_member(recordings, weights, tmp_path):
    for shard, numbers in enumerate([range(6), range(6, FILES)]):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in numbers:
                archive.add(recordings / f"{number:02d}.flac", f"a/{number}.flac")
                info = tarfile.TarInfo(f"a/{number}.json")
                info.size = 2
                archive.addfile(info, io.BytesIO(b"{}"))
    pattern, output = str(tmp_path / "?.tar"), tmp_path / "out"
    run([pattern], str(output), weights, only=2)
    written = content(output)
    run([pattern], str(output), weights)
    assert written.items() < content(output).items()
    assert sorted(read(output)["path"].to_pylist()) == sorted(
        f"{tmp_path}/{number // 6}.tar#a/{number}.flac" for number in range(FILES)
    )


def test_rows_of_a_table_with_audio_are_read_by_number(recordings, weights, tmp_path):
    files = sorted(recordings.iterdir())
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in files[:-1]]
    audio.append({"bytes": None, "path": str(files[-1])})
    table = pyarrow.table({"label": [path.stem for path in files], "audio": audio})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    run([str(tmp_path / "in.parquet")], str(tmp_path / "out"), weights, task_mb=0.01, only=3)
    written = content(tmp_path / "out")
    run([str(tmp_path / "in.parquet")], str(tmp_path / "out"), weights, task_mb=0.01)
    assert written.items() < content(tmp_path / "out").items()
    run([str(recordings)], str(tmp_path / "files"), weights)
    rows = read(tmp_path / "out").sort_by("label")
    assert rows["path"].to_pylist() == [f"{tmp_path}/in.parquet#{row}" for row in range(FILES)]
    assert rows["label"].to_pylist() == [path.stem for path in files]
    np.testing.assert_allclose(embeddings(rows), embeddings(read(tmp_path / "files")), rtol=1e-4, atol=1e-5)


def test_any_fsspec_storage_is_read_and_written(recordings, weights, tmp_path, memory):
    for path in recordings.iterdir():
        memory.pipe_file(f"/in/deep/{path.name}", path.read_bytes())
    memory.pipe_file("/in/deep/junk.wav", b"no sound")
    memory.pipe_file("/in/notes.txt", b"no audio")
    run(["memory://in"], "memory://out", weights)
    run([str(recordings)], str(tmp_path / "local"), weights)
    tables = [parquet.read_table(memory.open(path)) for path in memory.glob("/out/*.parquet")]
    table = pyarrow.concat_tables(tables).sort_by("path")
    assert table["path"].to_pylist() == [f"memory:///in/deep/{number:02d}.flac" for number in range(FILES)]
    assert embeddings(table).tobytes() == embeddings(read(tmp_path / "local")).tobytes()
    (error,) = memory.glob("/out/errors/*")
    assert json.loads(memory.cat_file(error))["reason"].startswith("memory:///in/deep/junk.wav: not readable as audio")
    assert run(["memory://in"], "memory://out", weights) == []
    assert list(find_files(f"file://{recordings}/*1.flac")) == [
        f"file://{recordings}/{name}.flac" for name in ("01", "11")
    ]
    with pytest.raises(FileNotFoundError, match=r"no files in memory://nowhere/\*.wav"):
        find_files("memory://nowhere/*.wav")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: memory://nowhere\.wav"):
        find_files("memory://nowhere.wav")
    with pytest.raises(ValueError, match="nonsense"):
        find_files("nonsense://a")


@pytest.mark.parametrize("location", ["memory://claimed", "local"])
def test_folder_belongs_to_the_settings_of_the_first_run(location, tmp_path, memory):
    folder = Folder(location if "://" in location else str(tmp_path / location))
    for settings in ({"size": [1, 2]}, {"size": (1, 2)}):
        folder.claim("_record.json", settings, holds="embeddings made", advice="choose another")
    with pytest.raises(ValueError, match=r"holds embeddings made with size = \[1, 2\], now 3: choose another"):
        folder.claim("_record.json", {"size": 3}, holds="embeddings made", advice="choose another")
    with folder.write("_record.json") as file:
        file.write(b"{")
    with pytest.raises(ValueError, match="damaged"):
        folder.claim("_record.json", {"size": 3}, holds="embeddings made", advice="choose another")


@pytest.mark.parametrize("location", ["memory://unfinished", "local"])
def test_interrupted_write_leaves_nothing(location, tmp_path, memory):
    folder = Folder(location if "://" in location else str(tmp_path / location))
    with pytest.raises(KeyboardInterrupt), folder.write("sub/a.parquet") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert folder.names("sub") == []
    with folder.write("sub/a.parquet") as file:
        file.write(b"whole")
    assert folder.names("sub") == ["a.parquet"] and folder.names() == []
    with folder.open("sub/a.parquet") as file:
        assert file.read() == b"whole"


def test_without_ray_the_command_says_what_to_install(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(recordings), "-o", str(tmp_path / "out")]) == 2
    assert "this needs Ray: pip install 'hear-audiomaepp[ray]'" in capsys.readouterr().err


def test_busy_share_counts_from_a_workers_first_part_to_the_runs_last():
    assert busy_share({"a": [(0, 1), (2, 3)], "b": [(2, 4)]}) == pytest.approx(4 / 6)
    assert busy_share({}) == 0
