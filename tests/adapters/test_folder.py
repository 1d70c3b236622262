"""Folders for other programs: our loader reads them as it reads any checkpoint, and stays strict."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from conftest import SMALL_CONFIGS

from hear_encoders import build_encoder, load_checkpoint, save_checkpoint
from hear_encoders.adapters.folder import save_folder
from hear_encoders.checkpoint import fingerprint
from hear_encoders.cli.weights import main


@pytest.fixture
def encoder():
    return build_encoder(SMALL_CONFIGS["axlstm"], seed=1).eval()


def test_a_folder_for_other_programs_loads_as_a_checkpoint(encoder, tmp_path):
    save_folder(tmp_path, encoder)
    assert fingerprint(load_checkpoint(tmp_path)) == fingerprint(encoder)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_hear.HearModel"


def test_fields_that_transformers_does_not_write_are_still_refused(encoder, tmp_path):
    save_folder(tmp_path, encoder)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="unknown field 'hidden_act'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("package", ["transformers", "sentence_transformers", "mteb"])
def test_a_missing_package_is_an_error_that_names_the_extra(package, monkeypatch):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"hear_encoders.adapters.{package}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"hear-audiomaepp\[{package.replace('_', '-')}\]"):
        importlib.import_module(f"hear_encoders.adapters.{package}")


def test_the_package_command_writes_a_folder_that_loads(tmp_path, encoder, capsys):
    save_checkpoint(tmp_path / "weights", encoder)
    assert main(["package", str(tmp_path / "weights"), str(tmp_path / "folder")]) == 0
    assert fingerprint(load_checkpoint(tmp_path / "folder")) == fingerprint(encoder)
    assert (tmp_path / "folder" / "modeling_hear.py").is_file()
    assert main(["package", str(tmp_path / "weights"), str(tmp_path / "folder")]) == 2
    assert "not empty" in capsys.readouterr().err
