"""Our folders in sentence-transformers itself, offline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hear_encoders import Embedder, load_checkpoint
from hear_encoders.adapters.folder import save_folder
from hear_encoders.checkpoint import fingerprint

sentence_transformers = pytest.importorskip("sentence_transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = [str(EXAMPLES / name) for name in ("speech.flac", "music.ogg", "till.wav", "bell.mp3")]


@pytest.fixture
def folder(small_encoder, tmp_path):
    save_folder(tmp_path / "model", small_encoder)
    return str(tmp_path / "model")


def load(folder, **options):
    return sentence_transformers.SentenceTransformer(folder, trust_remote_code=True, device="cpu", **options)


def test_paths_and_arrays_are_embedded_bit_for_bit_as_by_encode(folder, small_encoder):
    model, ours = load(folder), Embedder(small_encoder)
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    row = {"array": noise, "sampling_rate": 44_100}
    assert np.array_equal(model.encode(FILES), ours.encode(FILES))
    assert np.array_equal(model.encode(FILES[0]), ours.encode(FILES[0]))
    assert np.array_equal(model.encode([noise, row, FILES[2]]), ours.encode([noise, row, FILES[2]]))
    assert np.array_equal(model.encode([{"audio": FILES[3]}]), ours.encode([FILES[3]]))
    np.testing.assert_allclose(
        model.encode(FILES, normalize_embeddings=True), ours.encode(FILES, normalize=True), atol=1e-6
    )
    assert model.get_embedding_dimension() == 240


def test_small_batches_give_the_same_to_rounding(folder):
    model = load(folder)
    np.testing.assert_allclose(model.encode(FILES, batch_size=1), model.encode(FILES), atol=2e-6)


def test_options_select_the_embedding(folder, small_encoder):
    model = load(folder, model_kwargs={"pooling": "mean_std", "layer": 1})
    assert np.array_equal(model.encode(FILES), Embedder(small_encoder, pooling="mean_std", layer=1).encode(FILES))


def test_a_model_needs_no_folder(small_encoder):
    from hear_encoders.adapters.sentence_transformers import AudioModule

    ours = Embedder(small_encoder)
    model = sentence_transformers.SentenceTransformer(modules=[AudioModule(ours)], device="cpu")
    assert np.array_equal(model.encode(FILES), ours.encode(FILES))


def test_saved_models_load_again_and_are_checkpoints_of_ours(folder, small_encoder, tmp_path):
    load(folder).save(str(tmp_path / "again"))
    assert fingerprint(load_checkpoint(tmp_path / "again")) == fingerprint(small_encoder)
    assert np.array_equal(load(str(tmp_path / "again")).encode(FILES), load(folder).encode(FILES))


def test_training_has_gradients_of_real_samples_only(folder, small_encoder):
    model = load(folder)
    scenes = model(model.preprocess(FILES))["sentence_embedding"]
    np.testing.assert_allclose(scenes.detach(), Embedder(small_encoder).encode(FILES), atol=2e-6)
    scenes.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_text_and_prompts_are_refused(folder):
    model = load(folder)
    with pytest.raises(ValueError, match="'text' is not supported"):
        model.encode("a sentence")
    with pytest.raises(ValueError, match="without a prompt"):
        model.encode(FILES, prompt="query: ")
