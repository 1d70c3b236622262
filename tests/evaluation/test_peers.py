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
    if isinstance(model, peers.ASTPeer):
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


# ---- with evaluation/peers-requirements.txt ----


@pytest.fixture
def audiomae(tmp_path):
    """A small vision transformer as timm saves it, for 96 frames in 64 bands: 6 columns, 4 rows."""
    timm = pytest.importorskip("timm", reason="needs evaluation/peers-requirements.txt")
    torch.manual_seed(0)
    sizes = {"img_size": (96, 64), "in_chans": 1, "num_classes": 0, "global_pool": "avg", "embed_dim": 32}
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_heads=2, **sizes)
    for parameter in model.fc_norm.parameters():
        torch.nn.init.normal_(parameter)
    timm.models.save_for_hf(model, tmp_path / "audiomae")
    return tmp_path / "audiomae", model.eval()


def test_audiomaes_embeddings_are_those_of_timm(audiomae, noise):
    folder, original = audiomae
    model = peers.load_model(str(folder))
    audio = noise(2, 15600)  # 96 frames
    frames = torch.stack([kaldi_frames(clip) for clip in audio])  # (B, 96, 64)
    with torch.no_grad():
        # Column by column, all at once: the batch of an image's patches, with the position of each.
        patches = frames.unfold(1, 16, 16).unfold(2, 16, 16)  # (B, 6, 4, 16, 16)
        weight, bias = original.patch_embed.proj.weight[:, 0], original.patch_embed.proj.bias
        tokens = torch.einsum("bcrij,dij->bcrd", patches, weight).flatten(1, 2) + bias
        tokens = torch.cat([original.cls_token.expand(2, -1, -1), tokens], 1) + original.pos_embed
        for block in original.blocks:
            tokens = block(tokens)
        expected = original.fc_norm(tokens[:, 1:]).reshape(2, 6, 4, 32).mean(2)
    embeddings, timestamps = peers.get_timestamp_embeddings(audio, model)
    torch.testing.assert_close(embeddings, expected, atol=1e-3, rtol=1e-3)
    assert timestamps[1].tolist() == [87.5 + 160 * step for step in range(6)]
    torch.testing.assert_close(peers.get_scene_embeddings(audio, model), embeddings.mean(1))
    assert peers.get_timestamp_embeddings(noise(1, 40000), model)[0].shape == (1, 16, 32)


def kaldi_frames(clip):
    """AudioMAE's input, by torchaudio, with the constants of its release."""
    kaldi = pytest.importorskip("torchaudio").compliance.kaldi
    frames = kaldi.fbank(
        (clip - clip.mean())[None], htk_compat=True, window_type="hanning", num_mel_bins=64, sample_frequency=16000
    )
    return (torch.nn.functional.pad(frames, (0, 0, 0, 96 - len(frames))) + 4.2677393) / (2 * 4.5689974)


@pytest.fixture
def beats(tmp_path):
    """A small BEATs in the format of its release."""
    module = pytest.importorskip("speechbrain.lobes.models.beats", reason="needs evaluation/peers-requirements.txt")
    torch.manual_seed(0)
    config = {
        **{"input_patch_size": 16, "embed_dim": 24, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48},
        **{"encoder_layers": 2, "encoder_attention_heads": 2, "conv_pos": 16, "conv_pos_groups": 2},
        **{"relative_position_embedding": True, "gru_rel_pos": True, "deep_norm": True},
    }
    torch.save({"cfg": config, "model": {}}, tmp_path / "empty.pt")

    class Untrained(module.BEATs):
        def load_state_dict(self, _):
            pass

    model = Untrained(str(tmp_path / "empty.pt"))
    torch.save({"cfg": config, "model": model.state_dict()}, tmp_path / "beats.pt")
    return tmp_path / "beats.pt", model


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (2800, 1), (32000, 12)])
def test_beats_embeddings_are_those_of_speechbrain(beats, noise, samples, steps):
    path, original = beats
    model, audio = peers.load_model(str(path)), noise(2, samples)
    embeddings, timestamps = peers.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, steps, 32) and timestamps[0].tolist() == [87.5 + 160 * step for step in range(steps)]
    with torch.no_grad():
        padded = torch.nn.functional.pad(audio, (0, max(0, 2800 - samples)))
        tokens = original.extract_features(padded, torch.ones(2))[0]
    torch.testing.assert_close(embeddings[:, -1], tokens[:, -8:].mean(1))  # 8 bands of the last column
    torch.testing.assert_close(peers.get_scene_embeddings(audio, model), embeddings.mean(1))


def test_passts_embeddings_are_those_of_hear21passt(tmp_path, noise, monkeypatch, capsys):
    passt = pytest.importorskip("hear21passt.base", reason="needs evaluation/peers-requirements.txt")
    torch.manual_seed(0)
    untrained = passt.get_model_passt(arch="passt_s_swa_p16_128_ap476", pretrained=False)
    untrained.blocks = untrained.blocks[:1]
    monkeypatch.setattr(passt, "get_model_passt", lambda arch: untrained)  # it would fetch 340 MB
    capsys.readouterr()
    model, audio = peers.load_model("passt"), noise(2, 16000)
    scene = peers.get_scene_embeddings(audio, model)
    assert model.sample_rate == 16000 and scene.shape == (2, 1295) == (2, model.scene_embedding_size)
    steps, timestamps = peers.get_timestamp_embeddings(audio, model)
    assert steps.shape == (2, 21, 1295) and timestamps[1].tolist() == [50 * step for step in range(21)]
    assert capsys.readouterr().out == ""
    # The same tone at 32 kHz, straight through hear21passt.
    seconds = torch.arange(32000, dtype=torch.float64) / 32000
    tone = (torch.sin(2 * torch.pi * 440 * seconds) * torch.hann_window(32000, dtype=torch.float64)).float()[None]
    expected = passt.get_scene_embeddings(tone, model.model)
    torch.testing.assert_close(peers.get_scene_embeddings(tone[:, ::2], model), expected, atol=0.02, rtol=0)
    assert scene.std() > 0.1
    assert peers.get_timestamp_embeddings(noise(1, 1), model)[0].isfinite().all()
