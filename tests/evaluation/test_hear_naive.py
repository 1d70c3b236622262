"""HEAR-Naive against its description, written out as slowly as possible."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation import hear_naive


def plain_mel(rate: int, window: int) -> torch.Tensor:
    """Slaney's filters, one value at a time: (bins, 256)."""

    def to_hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(rate / 2000) / math.log(6.4)
    corners = [to_hz(top * i / 257) for i in range(258)]
    matrix = torch.zeros(window // 2 + 1, 256, dtype=torch.float64)
    for band in range(256):
        low, center, high = corners[band : band + 3]
        for bin_ in range(window // 2 + 1):
            hz = bin_ * rate / window
            height = min((hz - low) / (center - low), (high - hz) / (high - center))
            matrix[bin_, band] = max(0.0, height) * 2 / (high - low)
    return matrix


@pytest.mark.parametrize(("rate", "window", "hop"), [(44100, 4096, 1102), (16000, 1486, 400)])
def test_embeddings_follow_the_description(noise, rate, window, hop):
    model = hear_naive.load_model(sample_rate=rate)
    assert model.sample_rate == rate
    audio = noise(2, 3 * rate // 10 + 7)
    torch.manual_seed(0)
    projection = torch.rand(256, 4096).double() / 16
    mel = plain_mel(rate, window)
    padded = torch.nn.functional.pad(audio.double(), (window // 2, window - window // 2))
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(window) / window)
    expected, times = [], []
    start = 0
    while start + window <= padded.shape[1]:
        power = torch.fft.rfft(padded[:, start : start + window] * hann).abs() ** 2
        expected.append(torch.log(power @ mel + 1e-4) @ projection)
        times.append(1000 * start / rate)
        start += hop
    expected = torch.stack(expected, dim=1)
    embeddings, timestamps = hear_naive.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32 and embeddings.shape == expected.shape
    torch.testing.assert_close(embeddings.double(), expected, rtol=2e-4, atol=2e-3)
    torch.testing.assert_close(timestamps, torch.tensor([times, times]))
    scene = hear_naive.get_scene_embeddings(audio, model)
    torch.testing.assert_close(scene.double(), expected.mean(1), rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("rate", [44100, 16000])
def test_every_band_hears_something(rate):
    assert (hear_naive.load_model(sample_rate=rate).mel.sum(0) > 0).all()


def test_long_clips_run_in_slices(noise, monkeypatch):
    model = hear_naive.load_model()
    whole = model.scene_embeddings(noise(1, 16000))
    monkeypatch.setattr(hear_naive, "SLICE_FRAMES", 7)
    torch.testing.assert_close(model.scene_embeddings(noise(1, 16000)), whole)


def test_weights_are_refused():
    with pytest.raises(ValueError, match="no weights"):
        hear_naive.load_model("weights.pt")
