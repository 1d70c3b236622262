"""Peers on small models with random weights, saved by transformers itself."""

from __future__ import annotations

import pytest
import torch

from evaluation import peers

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "conv_dim": (16,) * 7}
AST = {"max_length": 96, "num_mel_bins": 64}  # 5 rows, 9 columns


@pytest.fixture(params=["wav2vec2", "wavlm", "hubert", "ast"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "ast":
        model = transformers.ASTModel(transformers.ASTConfig(**SMALL, **AST))
        extractor = transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=96)
    else:
        name = {"wav2vec2": "Wav2Vec2", "wavlm": "WavLM", "hubert": "Hubert"}[request.param]
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SMALL, **CONVOLUTIONS))
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    return tmp_path


def last_layer(folder, audio):
    """The last layer, straight from transformers."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(audio.numpy()), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def test_embeddings_are_means_over_time_of_the_last_layer(folder, noise):
    model = peers.load_model(str(folder))
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (16000, 32, 32)
    audio = noise(2, 15600)  # 975 ms, all that this AST takes
    expected = last_layer(folder, audio)
    if model.model.config.model_type == peers.AST_TYPE:
        expected = expected[:, 2:].reshape(2, 5, 9, 32).mean(1)
        times = [87.5 + 100 * step for step in range(9)]
    else:
        times = [12.5 + 20 * step for step in range(48)]
    embeddings, timestamps = peers.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(timestamps, torch.tensor([times, times]))
    torch.testing.assert_close(peers.get_scene_embeddings(audio, model), expected.mean(1))
    assert embeddings.dtype == torch.float32 and expected.std(1).min() > 1e-6


@pytest.mark.parametrize("samples", [1, 399, 400, 16000, 40000])
def test_clips_of_any_length_have_evenly_spaced_steps_within_them(folder, noise, samples):
    model = peers.load_model(str(folder))
    embeddings, timestamps = peers.get_timestamp_embeddings(noise(1, samples), model)
    assert embeddings.shape[:2] == timestamps.shape and embeddings.isfinite().all()
    assert len(timestamps[0]) == 1 or timestamps[0, -1] < samples / 16
    spacing = timestamps.diff()
    torch.testing.assert_close(spacing, torch.full_like(spacing, spacing[0, 0] if spacing.numel() else 0))
    if samples == 40000:
        assert len(timestamps[0]) == (25 if spacing[0, 0] == 100 else 124)


def test_a_long_clips_steps_are_those_of_its_pieces(tmp_path, noise):
    torch.manual_seed(0)
    transformers.ASTModel(transformers.ASTConfig(**SMALL, **AST)).save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=96).save_pretrained(tmp_path)
    model, audio = peers.load_model(str(tmp_path)), noise(1, 40000)
    embeddings, _ = model.timestamp_embeddings(audio)
    torch.testing.assert_close(embeddings[:, 9:18], model.timestamp_embeddings(audio[:, 14400:30000])[0])


def test_other_types_and_missing_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name a model"):
        peers.load_model()
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bert'"):
        peers.load_model(str(tmp_path))
