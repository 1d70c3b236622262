"""Patches and their positions."""

from __future__ import annotations

import math

import pytest
import torch

from hear_encoders import PatchConfig
from hear_encoders.nn.patches import patchify, sincos_2d, unpatchify

GRIDS = [PatchConfig(), PatchConfig(patch_frames=8), PatchConfig(patch_bands=8)]


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_in_time_major_order(grid):
    logmel = torch.arange(200 * 80.0).reshape(1, 200, 80)
    patches = patchify(logmel, grid)
    assert patches.shape == (1, grid.patches, grid.patch_size)
    for step, row in [(0, 0), (0, 1), (3, 2), (grid.steps - 1, grid.rows - 1)]:
        frames = slice(step * grid.patch_frames, (step + 1) * grid.patch_frames)
        bands = slice(row * grid.patch_bands, (row + 1) * grid.patch_bands)
        assert torch.equal(patches[0, step * grid.rows + row], logmel[0, frames, bands].flatten())


@pytest.mark.parametrize("grid", GRIDS)
def test_unpatchify_undoes_patchify(grid):
    logmel = torch.randn(3, 120, 80)
    assert torch.equal(unpatchify(patchify(logmel, grid), grid), logmel)


@pytest.mark.parametrize("shape", [(1, 199, 80), (1, 200, 64)])
def test_frames_that_do_not_fit_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"multiple of 4 frames, 80 bands\), got"):
        patchify(torch.zeros(shape), PatchConfig())


@pytest.mark.parametrize("grid", GRIDS)
def test_position_table_encodes_rows_then_steps(grid):
    dim = 48
    table = sincos_2d(grid, dim)
    assert table.shape == (grid.patches, dim)
    for step, row in [(0, 0), (1, 4), (7, 3), (grid.steps - 1, grid.rows - 1)]:
        expected = []
        for position in (row, step):  # first half of the channels: bands; second half: time
            angles = [position / 10000 ** (2 * j / (dim / 2)) for j in range(dim // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(table[step * grid.rows + row], torch.tensor(expected), rtol=0, atol=1e-6)


def test_more_frames_than_a_segment_are_refused(small_encoder):
    with pytest.raises(ValueError, match=r"at most 200 frames \(one segment\), got 204"):
        small_encoder.embed(torch.zeros(1, 204, 80))


def test_a_shorter_segment_is_the_beginning_of_a_longer_one(small_encoder):
    logmel = torch.randn(2, 200, 80)
    torch.testing.assert_close(small_encoder.embed(logmel[:, :52]), small_encoder.embed(logmel)[:, : 13 * 5])
