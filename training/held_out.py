"""What a model is tested on while it trains: crops that never change, masked the same way every time.

Their reconstruction error says something only beside what needs no model, on the same masks: predicting the mean of
what is visible, and interpolating between visible patches.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hear_encoders.config import PatchConfig
from hear_encoders.nn.patches import patchify, unpatchify
from training.config import RunConfig
from training.corpora.shards import JoinedShards, ShardIndex
from training.data import Crops
from training.masking import Masking, masking_noise, random_masking
from training.objectives import autocast, masked_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = 20_000_003  # of crops and masks; no run's own seed, and the same for all runs

# Widths that are tried for interpolation, as standard deviations of a Gaussian; the best one counts.
_WIDTHS_FRAMES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_WIDTHS_BANDS = (1.0, 2.0, 4.0, 8.0, 16.0)
_EVERYWHERE = 1e-6  # weight of the farthest visible cell, so that there always is something to predict


class Baselines(NamedTuple):
    """Mean squared error over masked patches of predictions that need no model."""

    mean: float
    interpolation: float


class FixedCrops:
    """Crops of held-out records with their masks.

    Args:
        index: the records.
        config: the run's; mask ratio, patch grid and normalisation are taken from it.
        clips: how many crops.
    """

    def __init__(self, index: ShardIndex | JoinedShards, config: RunConfig, clips: int) -> None:
        self.config = config
        self.patches = config.encoder.patches
        crops = Crops(index, self.patches.chunk_frames, 1, config.normalize, _SEED)
        self.logmel = torch.stack([crops[row] for row in range(clips)])  # (clips, frames, bands)
        self.target = patchify(self.logmel, self.patches)  # (clips, N, P)
        self.masking = random_masking(masking_noise(_SEED, 0, clips, self.patches.patches), config.mask_ratio)

    @torch.no_grad()
    def predict(self, model: nn.Module, device: torch.device) -> Tensor:
        """All patches as a pretraining model predicts them: (clips, N, P) float32 on the CPU."""
        part = max(1, self.config.batch_size // self.config.accumulate)
        predicted = []
        for first in range(0, len(self.logmel), part):
            rows = slice(first, first + part)
            masking = Masking(*(tensor[rows].to(device) for tensor in self.masking))
            with autocast(device, self.config.precision):
                predicted.append(model(self.logmel[rows].to(device), masking).patches.cpu())
        return torch.cat(predicted)

    def error(self, predicted: Tensor) -> float:
        """Mean squared error over the masked patches of a prediction (clips, N, P)."""
        return masked_loss(predicted, self.target, self.masking.mask).item()

    @functools.cached_property
    def baselines(self) -> Baselines:
        """The errors to be below."""
        seen = cells(1 - self.masking.mask, self.patches)  # (clips, frames, bands), 1 = visible
        mean = (self.logmel * seen).sum((1, 2), keepdim=True) / seen.sum((1, 2), keepdim=True)
        errors = [
            self.error(patchify(_smooth(self.logmel, seen, frames, bands), self.patches))
            for frames in _WIDTHS_FRAMES
            for bands in _WIDTHS_BANDS
        ]
        return Baselines(self.error(patchify(mean.expand_as(self.logmel), self.patches)), min(errors))

    def figure(self, predicted: Tensor, title: str) -> Figure:
        """Input, visible patches and a prediction (clips, N, P) as spectrograms."""
        from training.curves import reconstruction_figure  # matplotlib takes a second to import

        seen = cells(1 - self.masking.mask, self.patches)
        arrays = (tensor.numpy() for tensor in (self.logmel, seen, unpatchify(predicted, self.patches)))
        return reconstruction_figure(*arrays, title)


def cells(per_patch: Tensor, patches: PatchConfig) -> Tensor:
    """One value per patch to one per cell of the spectrogram: (B, N) -> (B, frames, bands)."""
    return unpatchify(per_patch[..., None].expand(-1, -1, patches.patch_size), patches)


def _smooth(logmel: Tensor, seen: Tensor, width_frames: float, width_bands: float) -> Tensor:
    """At every cell the mean of the visible ones, weighted by a Gaussian of their distance: (B, frames, bands)."""

    def weights(length: int, width: float) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (-0.5 * (distance / width) ** 2).exp() + _EVERYWHERE

    along_time, along_bands = weights(logmel.shape[1], width_frames), weights(logmel.shape[2], width_bands)
    return (along_time @ (logmel * seen) @ along_bands) / (along_time @ seen @ along_bands)
