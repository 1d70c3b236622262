"""Folders for other programs: our loader reads them as it reads any checkpoint, and stays strict."""

from __future__ import annotations

import json

import pytest
from conftest import SMALL_CONFIGS

from hear_encoders import build_encoder, load_checkpoint
from hear_encoders.adapters.folder import save_folder
from hear_encoders.checkpoint import fingerprint


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
