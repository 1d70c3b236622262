"""The examples of docs/integrations.md run, each with its program."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import hear_axlstm
from hear_encoders.cli.weights import main as weights_main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
FILES = ["examples/speech.flac", "examples/music.ogg"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the example under a heading in a directory with examples/ and the packaged weights in folder/."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    def execute(heading: str) -> dict:
        section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        namespace: dict = {}
        exec(block, namespace)
        return namespace

    return execute


@pytest.fixture
def folder(run):
    assert "hear-weights package hear_axlstm folder/ " in PAGE
    assert weights_main(["package", "hear_axlstm", "folder/"]) == 0


def test_transformers(run, folder):
    pytest.importorskip("transformers")
    names = run("transformers")
    assert names["steps"].shape == (2, 133, 960)
    expected = hear_axlstm.load_model("folder/").encode(["examples/speech.flac", "examples/till.wav"])
    np.testing.assert_allclose(names["scenes"], expected, atol=1e-5)


def test_sentence_transformers(run, folder):
    pytest.importorskip("sentence_transformers")
    names = run("sentence-transformers")
    assert np.array_equal(names["embeddings"], hear_axlstm.load_model().encode(FILES))
    assert names["embedding"].shape == (960,) and names["similarities"].shape == (2, 1)


def test_mteb(run, monkeypatch, tmp_path):
    mteb = pytest.importorskip("mteb")
    from test_mteb import Tones

    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    get_tasks = mteb.get_tasks

    def local_task(tasks):  # the named tasks exist, but would have to be downloaded
        assert len(get_tasks(tasks=tasks)) == len(tasks)
        return [Tones()]

    monkeypatch.setattr(mteb, "get_tasks", local_task)
    names = run("mteb")
    assert names["results"].model_name == "hear-audiomaepp/axlstm-tiny"
    assert names["other"].model_name == "me/axlstm-layer-6"
    for result in (names["results"], names["other"]):
        assert result.task_results[0].scores["test"][0]["main_score"] == 1.0


def test_xares(run):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(run("X-ARES")["LayerSixEncoder"]())


def test_the_page_names_the_modules_that_are_there():
    for path in re.findall(r"hear_encoders/adapters/\w+\.py", PAGE):
        assert (ROOT / path).is_file(), path
