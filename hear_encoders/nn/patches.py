"""Patches of a log-mel segment, their positions, and the base class of all encoders.

Letters in shape comments: B segments, T time steps, R rows of bands, N = T * R patches,
P values in a patch, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hear_encoders.config import EncoderConfig, PatchConfig


def patchify(logmel: Tensor, patches: PatchConfig) -> Tensor:
    """Cut log-mel frames into patches in time-major order: patch index = step * rows + row.

    Args:
        logmel: (B, frames, bands), frames a multiple of `patches.patch_frames`.

    Returns:
        (B, N, P), each patch's values frame by frame.
    """
    batch, frames, bands = logmel.shape
    steps = frames // patches.patch_frames
    if frames % patches.patch_frames or bands != patches.bands:
        raise ValueError(
            f"expected (B, a multiple of {patches.patch_frames} frames, {patches.bands} bands), "
            f"got {tuple(logmel.shape)}"
        )
    grid = logmel.reshape(batch, steps, patches.patch_frames, patches.rows, patches.patch_bands)
    return grid.transpose(2, 3).reshape(batch, steps * patches.rows, patches.patch_size)  # (B, N, P)


def unpatchify(values: Tensor, patches: PatchConfig) -> Tensor:
    """Undo `patchify`: (B, N, P) -> (B, frames, bands)."""
    batch, tokens, _ = values.shape
    steps = tokens // patches.rows
    grid = values.reshape(batch, steps, patches.rows, patches.patch_frames, patches.patch_bands)
    return grid.transpose(2, 3).reshape(batch, steps * patches.patch_frames, patches.bands)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Return sines, then cosines of `positions` at `dim / 2` frequencies 10000^(-2j/dim): (positions, dim) float64."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(patches: PatchConfig, dim: int) -> Tensor:
    """Return the fixed position table of one segment, as in MAE: (N, dim) float32.

    The first half of the channels encodes the row (bands), the second half the step (time).
    """
    steps = torch.arange(patches.steps, device="cpu").repeat_interleave(patches.rows)
    rows = torch.arange(patches.rows, device="cpu").repeat(patches.steps)
    return torch.cat([sincos_1d(rows, dim // 2), sincos_1d(steps, dim // 2)], dim=1).float()


class PatchEncoder(nn.Module):
    """Base of the encoders: log-mel patches become tokens, a cls token goes in front, blocks follow.

    Subclasses set `blocks` and `norm` and implement `run_block`. Pretraining calls `embed` and `encode` separately and
    masks in between; inference calls the module.
    """

    position_table: Tensor
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_projection = nn.Linear(config.patches.patch_size, config.dim)
        self.cls_token = nn.Parameter(torch.empty(config.dim))  # its row of the position table is zero
        self.register_buffer("position_table", sincos_2d(config.patches, config.dim), persistent=False)

    def embed(self, logmel: Tensor) -> Tensor:
        """Project the patches and add their positions: (B, frames, bands) -> (B, N, D).

        Fewer frames than a full segment are the segment's beginning; more are an error.
        """
        patches = patchify(logmel, self.config.patches)
        if patches.shape[1] > self.config.patches.patches:
            raise ValueError(
                f"expected at most {self.config.patches.chunk_frames} frames (one segment), got {logmel.shape[1]}"
            )
        return self.patch_projection(patches) + self.position_table[: patches.shape[1]]

    def with_cls(self, tokens: Tensor) -> Tensor:
        """Put the cls token in front: (B, N, D) -> (B, 1 + N, D)."""
        cls = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return torch.cat([cls, tokens], dim=1)

    def encode(self, tokens: Tensor, positions: Tensor | None = None, layers: Sequence[int] | None = None) -> Tensor:
        """Run the blocks and the final norm: (B, N, D) -> (B, 1 + N, D), the cls token first.

        Args:
            positions: (B, N) patch index of each token, if not all patches are there in order. None: token i is
                patch i.
            layers: return the outputs of these blocks, counted from 1, without the final norm and with their channels
                concatenated: (B, 1 + N, layers * D). Later blocks are not run.
        """
        x = self.with_cls(tokens)  # (B, S, D)
        outputs = {}
        for number, block in enumerate(self.blocks, start=1):
            x = self.run_block(number, block, x, positions)
            if layers is not None and number in layers:
                outputs[number] = x
                if number == max(layers):
                    return torch.cat([outputs[layer] for layer in layers], dim=2)
        return self.norm(x)

    def run_block(self, number: int, block: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
        """Run one block: (B, S, D) -> (B, S, D)."""
        raise NotImplementedError

    def forward(self, logmel: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Encode normalized log-mel segments: (B, frames, bands) -> (B, N, D), without the cls token.

        Args:
            layers: as for `encode`; then (B, N, layers * D).
        """
        return self.encode(self.embed(logmel), layers=layers)[:, 1:]
