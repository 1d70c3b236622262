"""Held-out error of a model in training: fixed crops of held-out records, always with the same masks.

The error means something only beside two baselines on the same masks that need no model: predicting the mean of the
visible cells, and interpolating between visible cells.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hear_encoders.config import PatchConfig
from hear_encoders.nn.patches import patchify, unpatchify
from training.config import RunConfig
from training.corpora.shards import JoinedShards, ShardIndex
from training.data import Crops
from training.masking import Masking, masking_noise, random_masking
from training.objectives import autocast, masked_loss

_SEED = 20_000_003  # of crops and masks: the same for all runs, and unlikely to be a run's own seed

# Widths of the Gaussian, as standard deviations, that interpolation tries; the best pair counts.
_WIDTHS_FRAMES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_WIDTHS_BANDS = (1.0, 2.0, 4.0, 8.0, 16.0)
_LEAST_WEIGHT = 1e-6  # of the farthest visible cell, so that no sum of weights is zero


class Baselines(NamedTuple):
    """Mean squared errors over masked patches of predictions that need no model."""

    mean: float
    interpolation: float


class FixedCrops:
    """Crops of held-out records, with their masks.

    Args:
        index: the records.
        config: the run's config, for mask ratio, patch grid and normalization.
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
        """Return all patches as a pretraining model predicts them: (clips, N, P) float32 on the CPU."""
        rows = max(1, self.config.batch_size // self.config.accumulate)
        predicted = []
        for first in range(0, len(self.logmel), rows):
            micro_batch = slice(first, first + rows)
            masking = Masking(*(tensor[micro_batch].to(device) for tensor in self.masking))
            with autocast(device, self.config.precision):
                predicted.append(model(self.logmel[micro_batch].to(device), masking).patches.cpu())
        return torch.cat(predicted)

    def error(self, predicted: Tensor) -> float:
        """Return the mean squared error over the masked patches of a prediction (clips, N, P)."""
        return masked_loss(predicted, self.target, self.masking.mask).item()

    @functools.cached_property
    def baselines(self) -> Baselines:
        """Errors of the two predictions that need no model."""
        visible = self._visible()
        mean = (self.logmel * visible).sum((1, 2), keepdim=True) / visible.sum((1, 2), keepdim=True)
        errors = [
            self.error(patchify(_interpolate(self.logmel, visible, frames, bands), self.patches))
            for frames in _WIDTHS_FRAMES
            for bands in _WIDTHS_BANDS
        ]
        return Baselines(self.error(patchify(mean.expand_as(self.logmel), self.patches)), min(errors))

    def spectrograms(self, predicted: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return log-mel, visible cells (1, masked: 0) and a prediction (clips, N, P), each (clips, frames, bands)."""
        return self.logmel.numpy(), self._visible().numpy(), unpatchify(predicted, self.patches).numpy()

    def _visible(self) -> Tensor:
        return patches_to_cells(1 - self.masking.mask, self.patches)


def patches_to_cells(per_patch: Tensor, patches: PatchConfig) -> Tensor:
    """Repeat each patch's value in all its spectrogram cells: (B, N) -> (B, frames, bands)."""
    return unpatchify(per_patch[..., None].expand(-1, -1, patches.patch_size), patches)


def _interpolate(logmel: Tensor, visible: Tensor, width_frames: float, width_bands: float) -> Tensor:
    """Replace every cell by the mean of the visible cells, weighted by a Gaussian of distance: (B, frames, bands)."""

    def weights(length: int, width: float) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (-0.5 * (distance / width) ** 2).exp() + _LEAST_WEIGHT

    along_time, along_bands = weights(logmel.shape[1], width_frames), weights(logmel.shape[2], width_bands)
    return (along_time @ (logmel * visible) @ along_bands) / (along_time @ visible @ along_bands)
