"""A HEAR module of what an encoder has to beat: statistics of log-mel, and encoders that were never trained.

    python -m evaluation run --module evaluation.baselines --name logmel ...
    python -m evaluation run --module evaluation.baselines --option untrained=axlstm_tiny ...

The untrained encoders have an option here because `load_model()` of the packages takes their bundled weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hear_encoders.config import preset
from hear_encoders.embedder import Embedder, check_audio
from hear_encoders.nn.build import build_encoder
from hear_encoders.nn.frontend import BANDS, HOP, HOP_MS, SAMPLE_RATE, LogMel

# Time steps as those of the encoders: 4 frames each, at the centre of their frames.
STEP_FRAMES = 4
FIRST_STEP_MS = HOP_MS * (STEP_FRAMES - 1) / 2
WINDOW_FRAMES = 20  # 200 ms around the step's centre


class LogMelStatistics(nn.Module):
    """Mean and standard deviation of the 80 log-mel bands over time: no weights, 160 numbers."""

    sample_rate = SAMPLE_RATE
    scene_embedding_size = timestamp_embedding_size = 2 * BANDS

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel()

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Statistics over the whole clip: (B, samples) -> (B, 160) on the audio's device."""
        return _statistics(self._frames(audio)).to(audio.device)

    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics over 200 ms around each step, at a clip's edges with its outermost frames repeated.

        Returns:
            (B, T, 160) and timestamps (B, T) in milliseconds, 40 i + 15, those that lie within the clip.
        """
        frames = self._frames(audio)
        samples = audio.shape[-1]
        steps = max(1, (samples - HOP * (STEP_FRAMES - 1) // 2) // (HOP * STEP_FRAMES) + 1)
        step = torch.arange(steps, device=frames.device)
        offset = torch.arange(WINDOW_FRAMES, device=frames.device) - (WINDOW_FRAMES - STEP_FRAMES) // 2
        index = (STEP_FRAMES * step[:, None] + offset).clamp_(0, frames.shape[1] - 1)  # (T, window)
        embeddings = _statistics(frames[:, index])  # of (B, T, window, bands)
        timestamps = FIRST_STEP_MS + HOP_MS * STEP_FRAMES * step.float()
        return embeddings.to(audio.device), timestamps.expand(len(frames), -1).to(audio.device)

    def _frames(self, audio: Tensor) -> Tensor:
        return self.log_mel(check_audio(audio).to(self.log_mel.window.device))


def _statistics(frames: Tensor) -> Tensor:
    """Mean and standard deviation over the last dimension but one, side by side in the last."""
    variance, mean = torch.var_mean(frames, dim=-2, correction=0)
    return torch.cat([mean, variance.sqrt()], dim=-1)


def load_model(
    model_file_path: str = "", *, untrained: str | None = None, seed: int = 0, **options: Any
) -> LogMelStatistics | Embedder:
    """Make a baseline.

    Args:
        model_file_path: nothing; there are no weights to load.
        untrained: an encoder's preset such as "axlstm_tiny"; None makes log-mel statistics.
        seed: of the untrained encoder's weights.
        options: of `hear_encoders.Embedder`, for an untrained encoder.

    Raises:
        ValueError: weights were given, or an option that the baseline does not have.
    """
    if model_file_path:
        raise ValueError(f"the baselines take no weights, got {model_file_path}")
    if untrained is None:
        if options or seed:
            raise ValueError("log-mel statistics have no options; did you mean untrained=PRESET?")
        return LogMelStatistics().eval()
    return Embedder(build_encoder(preset(untrained), seed=seed), **options).eval()


def get_scene_embeddings(audio: Tensor, model: LogMelStatistics | Embedder) -> Tensor:
    """One embedding per clip: (clips, samples) -> (clips, size)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: LogMelStatistics | Embedder) -> tuple[Tensor, Tensor]:
    """One embedding per 40 ms: (clips, steps, size), and timestamps (clips, steps) in milliseconds."""
    return model.timestamp_embeddings(audio)
