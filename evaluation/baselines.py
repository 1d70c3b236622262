"""A HEAR module of baselines that an encoder must beat: log-mel statistics and untrained encoders.

    python -m evaluation run --module evaluation.baselines --name logmel ...
    python -m evaluation run --module evaluation.baselines --option untrained=axlstm_tiny ...

Untrained encoders are an option here because `load_model()` of `hear_audiomaepp` and `hear_axlstm` needs weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hear_encoders.checks import check_audio
from hear_encoders.config import PatchConfig, preset
from hear_encoders.embedder import Embedder
from hear_encoders.framing import ExactFraming
from hear_encoders.nn.build import build_encoder
from hear_encoders.nn.frontend import BANDS, SAMPLE_RATE, LogMel

STEP_FRAMES = PatchConfig().patch_frames
WINDOW_FRAMES = 20  # 200 ms around a step's center


class LogMelStatistics(nn.Module):
    """Mean and standard deviation over time of the 80 log-mel bands: 160 values, no weights."""

    sample_rate = SAMPLE_RATE
    scene_embedding_size = timestamp_embedding_size = 2 * BANDS

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel()
        self._framing = ExactFraming(PatchConfig())  # the encoders' time steps

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return statistics over whole clips: (B, samples) -> (B, 160), on the audio's device."""
        return _statistics(self._frames(audio)).to(audio.device)

    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return statistics over 200 ms around each step; at a clip's edges its first or last frame is repeated.

        Returns:
            (B, T, 160), and timestamps (B, T) in milliseconds, those of the encoders' exact framing.
        """
        frames = self._frames(audio)
        timestamps = self._framing.timestamps_ms(audio.shape[-1])
        step_begin = STEP_FRAMES * torch.arange(len(timestamps), device=frames.device)
        offset = torch.arange(WINDOW_FRAMES, device=frames.device) - (WINDOW_FRAMES - STEP_FRAMES) // 2
        index = (step_begin[:, None] + offset).clamp_(0, frames.shape[1] - 1)  # (T, window)
        embeddings = _statistics(frames[:, index])  # (B, T, window, bands) -> (B, T, 160)
        return embeddings.to(audio.device), timestamps.expand(len(frames), -1).to(audio.device)

    def _frames(self, audio: Tensor) -> Tensor:
        return self.log_mel(check_audio(audio).to(self.log_mel.window.device))


def _statistics(frames: Tensor) -> Tensor:
    """Return mean and standard deviation over frames: (..., frames, bands) -> (..., 2 * bands)."""
    variance, mean = torch.var_mean(frames, dim=-2, correction=0)
    return torch.cat([mean, variance.sqrt()], dim=-1)


def load_model(
    model_file_path: str = "", *, untrained: str | None = None, seed: int = 0, **options: Any
) -> LogMelStatistics | Embedder:
    """Create a baseline.

    Args:
        model_file_path: must be empty: there are no weights to load. HEAR requires the parameter.
        untrained: preset of an untrained encoder, such as "axlstm_tiny"; None creates log-mel statistics.
        seed: for the untrained encoder's initial weights.
        options: keyword arguments of `hear_encoders.Embedder`, for an untrained encoder.

    Raises:
        ValueError: weights were given, or options for log-mel statistics.
    """
    if model_file_path:
        raise ValueError(f"baselines have no weights to load, got {model_file_path}")
    if untrained is None:
        if options or seed:
            raise ValueError("log-mel statistics have no options; did you mean to pass untrained=PRESET as well?")
        return LogMelStatistics().eval()
    return Embedder(build_encoder(preset(untrained), seed=seed), **options).eval()


def get_scene_embeddings(audio: Tensor, model: LogMelStatistics | Embedder) -> Tensor:
    """Return one embedding per clip: (clips, samples) -> (clips, size)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: LogMelStatistics | Embedder) -> tuple[Tensor, Tensor]:
    """Return an embedding per 40 ms step, (clips, steps, size), and timestamps (clips, steps) in milliseconds."""
    return model.timestamp_embeddings(audio)
