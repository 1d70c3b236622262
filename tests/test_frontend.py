"""Waveform to log-mel: torchaudio's numbers, in slices, at any length."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import hear_axlstm
from hear_encoders.nn import frontend
from hear_encoders.nn.frontend import (
    LogMel,
    clip_statistics,
    logmel_of_blocks,
    mel_matrix,
    normalize,
    statistics_of_blocks,
)

LENGTHS = (17120, 32000, 68801)


@pytest.mark.parametrize("samples", LENGTHS)
def test_equals_torchaudio(golden, samples):
    tensors, _ = golden("frontend")
    logmel = LogMel()(tensors[f"audio.{samples}"])
    assert logmel.shape == (2, samples // 160 + 1, 80)
    normalized = normalize(logmel, *clip_statistics(logmel))
    for actual, name in ((logmel, "logmel_raw"), (normalized, "logmel_normalized")):
        errors = (actual - tensors[f"{name}.{samples}"][:, 0]).abs()
        # torchaudio's own FFT is in float32, and in silent bands that is seen.
        assert errors.max() < 1e-4 and (errors > 5e-6).float().mean() < 2e-3


@pytest.mark.parametrize("samples", LENGTHS)
def test_equals_a_plain_computation_in_float64(golden, samples):
    audio = golden("frontend")[0][f"audio.{samples}"]
    padded = np.pad(audio.double().numpy(), [(0, 0), (200, 200)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 400, axis=1)[:, ::160]
    hann = torch.hann_window(400, dtype=torch.float32).double().numpy()  # of the papers' checkpoints: rounded
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    expected = torch.from_numpy(np.log(power @ mel_matrix().double().numpy() + 2.0**-23))
    torch.testing.assert_close(LogMel()(audio).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("slice_frames", [1, 2, 7, 100, 431])
def test_slices_do_not_show(golden, monkeypatch, slice_frames):
    audio = golden("frontend")[0]["audio.68801"]
    whole = LogMel()(audio)
    monkeypatch.setattr(frontend, "FRAMES_PER_SLICE", slice_frames)
    torch.testing.assert_close(LogMel()(audio), whole, rtol=0, atol=5e-6)


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 200, 201, 202, 399, 400, 401])
def test_short_clips_have_finite_frames(noise, samples):
    logmel = LogMel()(noise(2, samples))
    assert logmel.shape == (2, max(samples, 201) // 160 + 1, 80)
    assert logmel.isfinite().all()


def test_the_torchaudio_frontend_without_torchaudio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.transforms", None)
    with pytest.raises(ImportError, match=r"got 2\..*pip install 'hear-audiomaepp\[torchaudio\]'"):
        hear_axlstm.load_model(frontend="torchaudio")
    with pytest.raises(ValueError, match="frontend must be"):
        hear_axlstm.load_model(frontend="librosa")


def test_a_clip_too_short_to_reflect_is_extended_with_zeros(noise):
    clip = noise(1, 150)
    extended = torch.cat([clip, torch.zeros(1, 51)], dim=1)
    assert torch.equal(LogMel()(clip), LogMel()(extended))


def test_a_sine_peaks_in_its_own_band():
    corners_mel = torch.linspace(2595 * torch.log10(torch.tensor(1 + 50 / 700)).item(), 2840.0230, 82)
    centres_hz = 700 * (10 ** (corners_mel[1:-1] / 2595) - 1)
    seconds = torch.arange(16000) / 16000
    for band in (20, 45, 75):
        sine = torch.sin(2 * torch.pi * centres_hz[band] * seconds)[None]
        assert LogMel()(sine)[0, 50].argmax() == band


def test_mel_filters_are_triangles_with_peaks_of_one_at_most():
    matrix = mel_matrix()
    assert matrix.shape == (201, 80) and matrix.dtype == torch.float32
    assert (matrix >= 0).all() and matrix.max() <= 1
    assert (matrix[0] == 0).all()  # nothing below 50 Hz
    assert (matrix.sum(0) > 0).all()  # no empty band


@pytest.mark.parametrize("samples", [201, 16000, 68801])
def test_silence_normalizes_to_exactly_zero(samples):
    logmel = LogMel()(torch.zeros(2, samples))
    assert (normalize(logmel, *clip_statistics(logmel)) == 0).all()


def test_statistics_are_each_clips_own(noise):
    audio = torch.stack([noise(1, 16000)[0], 0.01 * noise(1, 16000, seed=1)[0]])
    logmel = LogMel()(audio)
    mean, std = clip_statistics(logmel)
    for clip in range(2):
        assert mean[clip].item() == pytest.approx(logmel[clip].double().mean().item(), abs=1e-5)
        assert std[clip].item() == pytest.approx(logmel[clip].double().std().item(), abs=1e-5)


@pytest.mark.parametrize("samples", [1, 160, 200, 201, 359, 360, 361, 5000, 33333])
@pytest.mark.parametrize("block", [1, 159, 160, 401, 10_000])
def test_blocks_have_the_frames_of_the_whole(noise, samples, block):
    clip = noise(1, min(samples, 1000 * block))
    expected = LogMel()(clip)[0]
    blocks = list(logmel_of_blocks(LogMel(), clip[0].split(block)))
    torch.testing.assert_close(torch.cat(blocks), expected, rtol=1e-5, atol=1e-5)
    mean, std = clip_statistics(expected[None])
    assert statistics_of_blocks(blocks) == pytest.approx((mean.item(), std.item()), rel=1e-5)
