"""Our folders in transformers itself, offline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hear_encoders import Embedder, load_checkpoint
from hear_encoders.adapters.folder import save_folder
from hear_encoders.checkpoint import fingerprint

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(small_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_folder(tmp_path / "model", small_encoder)
    return tmp_path / "model"


def load(folder, **options):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def clips(noise):
    return [noise(1, samples, seed=samples)[0].numpy() for samples in (40_000, 16_001, 700)]


@pytest.fixture
def batch(folder, clips):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return extractor(clips, sampling_rate=16_000, padding=True, return_tensors="pt")


def test_padded_batches_have_the_embeddings_of_the_clips_alone(folder, small_encoder, clips, batch):
    model = load(folder)
    with torch.no_grad():
        output = model(**batch)
    ours = Embedder(small_encoder)
    steps = [embeddings for embeddings, _ in ours.encode(clips, timestamps=True)]
    assert model.config.hidden_size == output.last_hidden_state.shape[2] == 240
    for row, expected in zip(output.last_hidden_state.numpy(), steps):
        np.testing.assert_allclose(row[: len(expected)], expected, atol=2e-6)
        assert not row[len(expected) :].any()
    np.testing.assert_allclose(output.pooler_output, ours.encode(clips), atol=2e-6)
    with torch.no_grad():
        assert torch.equal(output.last_hidden_state, ours(batch["input_values"], [len(clip) for clip in clips]))
        assert torch.equal(model(**batch, return_dict=False)[1], output.pooler_output)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_of_all_dtypes_mean_the_same(folder, batch, dtype):
    model = load(folder)
    with torch.no_grad():
        expected = model(**batch).pooler_output
        got = model(batch["input_values"], batch["attention_mask"].to(dtype)).pooler_output
    assert torch.equal(got, expected)


def test_without_a_mask_all_samples_count(folder, small_encoder, noise):
    audio = noise(2, 8000)
    with torch.no_grad():
        output = load(folder)(audio)
    torch.testing.assert_close(output.pooler_output, Embedder(small_encoder).scene_embeddings(audio))


def test_a_trained_model_is_saved_as_a_checkpoint_of_ours_and_loads_again(folder, batch, tmp_path):
    model = load(folder)
    model(**batch).pooler_output.square().sum().backward()
    for parameter in model.parameters():
        parameter.data -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path / "trained")
    assert fingerprint(load_checkpoint(tmp_path / "trained")) == fingerprint(model.encoder)
    assert fingerprint(load_checkpoint(folder)) != fingerprint(model.encoder)
    assert fingerprint(load(tmp_path / "trained").encoder) == fingerprint(model.encoder)


def test_a_model_from_its_config_is_initialized(folder, batch):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = transformers.AutoModel.from_config(config, trust_remote_code=True)(**batch)
    assert output.pooler_output.isfinite().all() and output.pooler_output.std() > 0.01


@pytest.mark.parametrize("change", ["missing", "unexpected", "not finite"])
def test_damaged_weights_are_refused(folder, change):
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["cls_token"]
    elif change == "unexpected":
        tensors["more"] = torch.zeros(1)
    else:
        tensors["cls_token"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match={"missing": "cls_token", "unexpected": "more"}.get(change, "NaN")):
        load(folder)


def test_an_unknown_field_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth": "two"}))
    with pytest.raises((ValueError, TypeError), match="depth"):
        load(folder)


def test_padding_anywhere_but_at_the_end_is_refused(folder, noise):
    with pytest.raises(ValueError, match="pad at the end"):
        load(folder)(noise(1, 8000), torch.tensor([[0] * 4000 + [1] * 4000]))


def test_another_sampling_rate_is_refused(folder, clips):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    with pytest.raises(ValueError, match="16000"):
        extractor(clips, sampling_rate=44_100)
