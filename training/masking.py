"""Random masks: a choice of patches per clip, made from noise so that it can be repeated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """The masked and visible patches of a batch."""

    mask: Tensor  # (B, N) float32, 1 = masked
    keep: Tensor  # (B, K) int64, indices of the visible patches in the order the encoder sees them
    restore: Tensor  # (B, N) int64, index of patch i in the concatenation of visible and masked patches


def random_masking(noise: Tensor, ratio: float) -> Masking:
    """Mask the patches with the largest noise.

    Args:
        noise: (B, N) independent uniform numbers.
        ratio: share of patches masked; N * (1 - ratio), rounded down, stay visible.
    """
    visible = visible_count(noise.shape[1], ratio)
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return Masking((restore >= visible).float(), shuffle[:, :visible], restore)


def visible_count(patches: int, ratio: float) -> int:
    """Return how many patches stay visible."""
    return int(round(patches * (1 - ratio), 6))  # 250 * (1 - 0.8) is 49.99... in floating point


def masking_noise(seed: int, step: int, clips: int, patches: int) -> Tensor:
    """Return uniform noise (clips, patches) for one global batch: a function of seed and optimizer step alone.

    Every process draws the same noise and takes its own rows. So masks do not depend on how many processes share a
    batch, and resuming needs no generator's state.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, step))
    return torch.rand(clips, patches, generator=generator)


def hash_seed(*numbers: int) -> int:
    """Mix integers into one 63-bit seed. Unlike sums, seeds of neighboring numbers are unrelated."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
