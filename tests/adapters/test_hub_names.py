"""Repositories by their name, on a stand-in for the Hub, in the programs themselves."""

from __future__ import annotations

import contextlib
from pathlib import Path

import hub_client
import hub_models
import numpy as np
import pytest
from conftest import SMALL_CONFIGS
from hub_server import TOKEN, HubServer

from hear_encoders import Embedder, build_encoder
from hear_encoders.adapters.folder import save_folder

CARD = b"---\nlicense: apache-2.0\n---\n# A small AxLSTM\n"


@pytest.mark.parametrize(
    ("package", "embed"),
    [
        ("transformers", hub_models.embed_by_transformers),
        ("sentence_transformers", hub_models.encode_by_sentence_transformers),
        ("mteb", hub_models.encode_by_mteb),
    ],
)
def test_a_pushed_repository_is_embedded_by_its_name(package, embed, tmp_path: Path, noise):
    pytest.importorskip(package)
    if package == "mteb":
        pytest.importorskip("torchaudio")  # of mteb's extra "audio"
    encoder = build_encoder(SMALL_CONFIGS["axlstm"], seed=1).eval()
    save_folder(tmp_path / "model", encoder)
    audio = noise(1, 20_000)[0].numpy()
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with contextlib.closing(HubServer()) as hub:
        hub.commit("org/name", {**files, "README.md": CARD})
        settings = {"endpoint": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        got = hub_client.call(embed, "org/name", audio, home=tmp_path / "hf_home", **settings)
    np.testing.assert_allclose(got, Embedder(encoder).encode(audio), atol=2e-6)
