"""HEAR-Naive, the lower end of the papers' s(m): HEAR's own baseline, a random projection of a log-mel spectrogram.

    python -m evaluation run --module evaluation.hear_naive --name HEAR-Naive ...

Written from HEAR's description and the constants of its `hearbaseline.naive`: power spectra of Hann windows of 4096
samples at 44.1 kHz (93 ms) every 25 ms, 256 mel bands, log(mel + 1e-4), and a fixed random matrix to 4096 values. The
published module takes audio at 44.1 kHz (`--option sample_rate=44100`). The default is 16 kHz, the papers' rate, with
windows of the same duration and bands up to 8 kHz.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hear_encoders.checks import check_audio
from hear_encoders.nn.frontend import SAMPLE_RATE

PUBLISHED_RATE, PUBLISHED_WINDOW = 44_100, 4096  # Hz, samples
HOP_MS = 25
BANDS = 256
SIZE = 4096
LOG_OFFSET = 1e-4
SEED = 0
SLICE_FRAMES = 512  # per STFT call, which bounds memory


class HearNaive(nn.Module):
    """Random projection of log-mel frames: 4096 values per 25 ms, no trained weights.

    Args:
        sample_rate: of the audio, in Hz.
    """

    scene_embedding_size = timestamp_embedding_size = SIZE
    hann: Tensor
    mel: Tensor
    projection: Tensor

    def __init__(self, sample_rate: int = SAMPLE_RATE) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.hop = round(HOP_MS * sample_rate / 1000)
        self.window = 2 * round(PUBLISHED_WINDOW * sample_rate / PUBLISHED_RATE / 2)  # even, so that it has a center
        self.register_buffer("hann", torch.hann_window(self.window))
        self.register_buffer("mel", slaney_mel_matrix(sample_rate, self.window, BANDS))
        # Torch's generator makes the same numbers from this seed as for the published module.
        projection = torch.rand(BANDS, SIZE, generator=torch.Generator().manual_seed(SEED)) / math.sqrt(BANDS)
        self.register_buffer("projection", projection)

    def log_mel(self, audio: Tensor) -> Tensor:
        """Return log-mel frames centered on samples 0, hop, ...: (B, samples) -> (B, samples // hop + 1, 256)."""
        padded = nn.functional.pad(audio, (self.window // 2, self.window // 2))
        frames = padded.unfold(-1, self.window, self.hop)  # a view: (B, T, window)
        slices = []
        for part in frames.split(SLICE_FRAMES, dim=1):
            power = torch.fft.rfft(part * self.hann).abs().square()
            slices.append(torch.log(power @ self.mel + LOG_OFFSET))
        return torch.cat(slices, dim=1)

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return the mean over time of the projected frames: (B, samples) -> (B, 4096), on the audio's device."""
        # The mean of projections is the projection of the mean.
        return (self._frames(audio).mean(1) @ self.projection).to(audio.device)

    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected frames, (B, T, 4096), and their times (B, T) in milliseconds."""
        embeddings = self._frames(audio) @ self.projection
        times = torch.arange(embeddings.shape[1], dtype=torch.float32) * (1000 * self.hop / self.sample_rate)
        return embeddings.to(audio.device), times.expand(len(embeddings), -1).to(audio.device)

    def _frames(self, audio: Tensor) -> Tensor:
        return self.log_mel(check_audio(audio).to(self.hann.device))


def slaney_mel_matrix(sample_rate: int, window: int, bands: int) -> Tensor:
    """Return the (window // 2 + 1, bands) matrix of triangular filters of equal area on Slaney's mel scale.

    The scale is linear below 1000 Hz (3 mel per 200 Hz) and logarithmic above it (27 mel per factor of 6.4). The
    filters reach from 0 Hz to half the sample rate, as `librosa.filters.mel` makes them by default.
    """
    per_mel_hz, knee_hz, step = 200 / 3, 1000.0, math.log(6.4) / 27
    knee_mel = knee_hz / per_mel_hz
    highest_mel = knee_mel + math.log(sample_rate / 2 / knee_hz) / step
    mels = torch.linspace(0, highest_mel, bands + 2, dtype=torch.float64)
    corners_hz = torch.where(mels < knee_mel, mels * per_mel_hz, knee_hz * torch.exp(step * (mels - knee_mel)))
    bins_hz = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    distances_hz = corners_hz - bins_hz[:, None]  # (bins, bands + 2)
    widths_hz = corners_hz.diff()
    rising = -distances_hz[:, :-2] / widths_hz[:-1]
    falling = distances_hz[:, 2:] / widths_hz[1:]
    triangles = torch.minimum(rising, falling).clamp_(min=0)
    return (triangles * 2 / (corners_hz[2:] - corners_hz[:-2])).float()


def load_model(model_file_path: str = "", *, sample_rate: int = SAMPLE_RATE) -> HearNaive:
    """Create the baseline.

    Args:
        model_file_path: must be empty: there are no weights to load. HEAR requires the parameter.
        sample_rate: of the audio, in Hz: 16000, or 44100 as published.

    Raises:
        ValueError: weights were given.
    """
    if model_file_path:
        raise ValueError(f"HEAR-Naive has no weights to load, got {model_file_path}")
    return HearNaive(sample_rate).eval()


def get_scene_embeddings(audio: Tensor, model: HearNaive) -> Tensor:
    """Return one embedding per clip: (clips, samples) -> (clips, 4096)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: HearNaive) -> tuple[Tensor, Tensor]:
    """Return an embedding per 25 ms, (clips, steps, 4096), and timestamps (clips, steps) in milliseconds."""
    return model.timestamp_embeddings(audio)
