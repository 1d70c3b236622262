"""`hear-map`: reading what `hear-embed` writes, and the numbers behind the page. `test_map_page.py` opens the page."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from urllib.parse import unquote, urljoin

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from hear_encoders.cli import map as hear_map
from hear_encoders.cli.embeddings import Embeddings, read_embeddings
from hear_encoders.cli.map import (
    audio_files,
    centered_directions,
    data_url,
    names_below_common,
    nearest,
    relative_url,
    similarity_over_time,
)
from hear_encoders.cli.outputs import open_output

SIZE = 6
NAMES = ["b/two.wav", "a/one.flac", "b/three.wav"]  # in the order of embedding


def embedding(name: str, steps: int | None) -> np.ndarray:
    seed = NAMES.index(name)
    shape = (SIZE,) if steps is None else (steps + seed, SIZE)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def times(steps: int) -> np.ndarray:
    return 40 * np.arange(steps, dtype=np.float32) + 15


def write(path: Path, steps: int | None = None) -> Path:
    """Write embeddings as hear-embed does."""
    output = open_output(path, steps is not None, {"root": "/sounds"})
    for name in NAMES:
        values = embedding(name, steps)
        output.add(f"/sounds/{name}", name, values, None if steps is None else times(len(values)))
    output.close()
    return path


@pytest.mark.parametrize("steps", [None, 4], ids=["scenes", "timestamps"])
@pytest.mark.parametrize("name", ["out.npz", "out.parquet", "out"])
def test_each_output_of_hear_embed_is_read_back(tmp_path, name, steps):
    result = read_embeddings(write(tmp_path / name, steps))
    files = sorted(NAMES)
    folder = name == "out"
    assert result.paths == [file if folder else f"/sounds/{file}" for file in files]
    assert result.root == (Path("/sounds") if folder else None)
    if steps is None:
        np.testing.assert_array_equal(result.scenes, [embedding(file, None) for file in files])
        assert result.steps is None
    else:
        for row, file in enumerate(files):
            np.testing.assert_array_equal(result.steps[row], embedding(file, steps))
            np.testing.assert_array_equal(result.timestamps_ms[row], times(len(result.steps[row])))
            np.testing.assert_allclose(result.scenes[row], embedding(file, steps).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("steps", [None, 4], ids=["scenes", "timestamps"])
def test_the_parts_of_a_corpus_are_read_whatever_else_they_hold(tmp_path, steps):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/_part-3.jsonl").write_text("{}")
    (tmp_path / "_hear-embed-corpus.json").write_text("{}")
    for part, names in enumerate([NAMES[:2], NAMES[2:]]):
        values = [np.atleast_2d(embedding(name, steps)) for name in names]
        rows = np.concatenate(values).astype(np.float16)
        columns = {
            "path": [f"/sounds/{name}" for name, own in zip(names, values) for _ in own],
            "duration_s": np.ones(len(rows)),
            **({} if steps is None else {"timestamp_ms": np.concatenate([times(len(own)) for own in values])}),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(rows.ravel(), SIZE),
            "label": ["bird"] * len(rows),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"part-{part}.parquet", use_dictionary=["path"])
    result = read_embeddings(tmp_path)
    assert result.paths == [f"/sounds/{name}" for name in sorted(NAMES)]
    expected = [np.atleast_2d(embedding(name, steps)).mean(axis=0) for name in sorted(NAMES)]
    np.testing.assert_allclose(result.scenes, expected, atol=2e-3)


def test_the_parts_of_an_earlier_corpus_are_read(tmp_path):
    (tmp_path / "corpus").mkdir()
    for part, names in enumerate([NAMES[:2], NAMES[2:]]):
        output = open_output(tmp_path / "corpus" / f"part-{part:06d}.parquet", False, {})
        for name in names:
            output.add(f"/sounds/{name}", name, embedding(name, None), None)
        output.close()
    (tmp_path / "corpus" / "_plan.json").write_text("{}")
    assert read_embeddings(tmp_path / "corpus").paths == [f"/sounds/{name}" for name in sorted(NAMES)]


def test_an_input_that_hear_embed_did_not_write_is_refused_by_name(tmp_path):
    paths, values = np.array(["a", "b"]), np.zeros((2, SIZE), np.float32)
    cases = {
        "text.npz": "not readable as .npz",
        "pickled.npz": "not readable as .npz",
        "other.npz": r"expected the arrays \['embeddings', 'paths'\].*got \['labels'\]",
        "few.npz": "expected 2 rows of embeddings for 2 paths, got 1",
        "none.npz": "holds no embeddings",
        "nan.npz": "the embedding of b is not finite",
        "shape.npz": "expected text paths",
        "text.parquet": "not readable as Parquet",
        "folder": "expected a .npz file, a .parquet file or a folder",
        "clip.wav": "expected a .npz file, a .parquet file or a folder",
    }
    for name in ("text.npz", "text.parquet", "clip.wav"):
        (tmp_path / name).write_text("no")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "pickled.npz", paths=np.array([None, None], object), embeddings=values)
    np.savez(tmp_path / "other.npz", labels=paths)
    np.savez(tmp_path / "few.npz", paths=paths, embeddings=values[:1])
    np.savez(tmp_path / "none.npz", paths=paths[:0], embeddings=values[:0])
    np.savez(tmp_path / "nan.npz", paths=paths, embeddings=values + np.array([[0], [np.nan]], np.float32))
    np.savez(tmp_path / "shape.npz", paths=paths, embeddings=values[0])
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_embeddings(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothere"):
        read_embeddings(tmp_path / "nothere.npz")


def test_neighbors_are_those_of_a_plain_search():
    scenes = np.random.default_rng(0).normal(size=(700, 20)) + 5  # more than one block; a large part in common
    rows, similarity = nearest(centered_directions(scenes), 10)
    centered = scenes - scenes.mean(axis=0)
    for row in range(0, 700, 37):
        cosines = np.array(
            [centered[row] @ other / np.linalg.norm(centered[row]) / np.linalg.norm(other) for other in centered]
        )
        cosines[row] = -2
        assert rows[row].tolist() == np.argsort(-cosines)[:10].tolist()
        np.testing.assert_allclose(similarity[row], np.sort(cosines)[:-11:-1], atol=1e-5)


def test_equal_embeddings_have_no_direction():
    """Otherwise rounding errors would look like differences."""
    assert not centered_directions(np.full((5, 3), 0.1, np.float32)).any()
    rows, _ = nearest(centered_directions(np.ones((1, 3))), 0)
    assert rows.shape == (1, 0)


@pytest.mark.parametrize("count", [1, 2, 160, 161, 1000])
def test_similarity_over_time_is_that_of_equal_stretches(count):
    steps = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32) + 3
    result = similarity_over_time(steps, times(count))
    stretch = {1: 1, 2: 1, 160: 1, 161: 2, 1000: 7}[count]
    means = np.stack([steps[start : start + stretch].mean(axis=0) for start in range(0, count, stretch)])
    assert result["rows"] == len(means) <= 160
    assert result["row_s"] == pytest.approx(0.04 * stretch)
    if count > 1:
        means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    expected = means @ means.T if count > 1 else np.zeros((1, 1))
    lower = np.frombuffer(base64.b64decode(result["lower"]), np.uint8) / 127.5 - 1
    np.testing.assert_allclose(lower, expected[np.tril_indices(len(means))], atol=0.005)


def test_names_are_below_the_common_folder(monkeypatch, tmp_path):
    assert names_below_common(["/x/y/a.wav", "/x/y/z/b.wav"]) == ("/x/y", ["a.wav", "z/b.wav"])
    assert names_below_common(["x/a.wav", "./x/b.wav"]) == ("x", ["a.wav", "b.wav"])
    assert names_below_common(["a.wav", "x/b.wav"]) == ("", ["a.wav", "x/b.wav"])
    monkeypatch.chdir(tmp_path)
    assert names_below_common(["x/a.wav", str(tmp_path / "y/b.wav")]) == (str(tmp_path), ["x/a.wav", "y/b.wav"])


def test_audio_is_where_it_was_embedded_or_where_the_user_says():
    def find(paths, recorded=None, root=None):
        return audio_files(Embeddings(paths, recorded, np.zeros((len(paths), 1))), root)

    assert find(["x/a.wav"]) == [Path("x/a.wav")]
    assert find(["x/a.wav"], Path("/sounds")) == [Path("/sounds/x/a.wav")]
    assert find(["x/a.wav"], Path("/sounds"), Path("/new")) == [Path("/new/x/a.wav")]
    assert find(["/old/x/a.wav", "/old/b.wav"], root=Path("/new")) == [Path("/new/x/a.wav"), Path("/new/b.wav")]


@pytest.mark.parametrize("name", ["a.wav", "50% of #1?.wav", "a:b.wav", "é ü.wav", '"<img>".wav'])
def test_a_link_leads_from_the_page_to_the_file(tmp_path, name):
    url = relative_url(tmp_path / "clips" / name, tmp_path / "pages")
    assert unquote(urljoin((tmp_path / "pages/map.html").as_uri(), url)) == f"file://{tmp_path}/clips/{name}"
    assert not set(url) & set("<>\"'#?: ")


def test_embedded_audio_is_what_the_models_hear(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(22050) / 44100) / 2
    soundfile.write(tmp_path / "tone.aiff", np.stack([tone, tone], axis=1), 44100)  # browsers do not play AIFF
    kind, _, content = data_url(tmp_path / "tone.aiff").partition(",")
    assert kind == "data:audio/mpeg;base64"
    (tmp_path / "tone.mp3").write_bytes(base64.b64decode(content))
    samples, rate = soundfile.read(tmp_path / "tone.mp3")
    assert (rate, samples.ndim) == (16000, 1) and len(samples) == pytest.approx(8000, abs=2)
    assert np.abs(np.fft.rfft(samples)).argmax() == pytest.approx(440 / 2, abs=1)  # bins of 2 Hz
    assert samples.std() == pytest.approx(tone.std(), rel=0.05)


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else found("json"))
    source = write(tmp_path / "out.npz")
    assert hear_map.main([str(source), "-o", str(tmp_path / "map.html")]) == 2
    assert capsys.readouterr().err == "hear-map: error: a map needs plotly: pip install 'hear-audiomaepp[map]'\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json"))
    for target, message in [("out.npz", "ending in .html"), ("no/map.html", "no such folder")]:
        assert hear_map.main([str(source), "-o", str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
    assert hear_map.main([str(tmp_path / "other.npz"), "-o", str(tmp_path / "map.html")]) == 2
    assert capsys.readouterr().err.endswith("no such file or folder: " + str(tmp_path / "other.npz") + "\n")
    assert hear_map.main([str(source), "-o", str(tmp_path / "map.html"), "--embed-audio"]) == 2
    assert "/sounds/a/one.flac" in capsys.readouterr().err
    assert not (tmp_path / "map.html").exists()
