"""Framing: how a clip's log-mel frames become segments and time steps, and the steps' timestamps.

Two classes have the same methods; `Embedder` chooses one, and no other code depends on which one it is. A segment is up
to 2 s (200 frames) that the encoder sees independently of the rest. A time step is one column of patches: 4 frames,
40 ms. Letters in shape comments: B clips or segments, F frames, T time steps, N = T * R tokens, R rows of patches, D
channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hear_encoders.config import PatchConfig
from hear_encoders.nn.frontend import HOP, HOP_MS, SAMPLE_RATE

FramingName = Literal["exact", "reference"]


class Segment(NamedTuple):
    """A piece of a clip that is encoded independently of the rest."""

    frames: Tensor  # (F, bands) normalized log-mel
    steps: int  # number of its time steps that belong to the clip; the rest, at its end, is padding


class Framing(Protocol):
    """The methods of both framings."""

    is_local: bool
    """True if steps depend only on the audio around them, not on the clip's length. Then a clip can be embedded piece
    by piece."""

    def step_count(self, samples: int) -> int:
        """Return the number of time steps of a clip of this many samples."""
        ...

    def timestamps_ms(self, samples: int) -> Tensor:
        """Return the times of the steps of a clip of this many samples, in milliseconds: (T,) float32."""
        ...

    def cut(self, logmel: Tensor, steps: int) -> list[Segment]:
        """Cut normalized frames (B, F, bands) into segments with this many steps per clip, clip by clip."""
        ...

    def group(self, tokens: Tensor) -> Tensor:
        """Concatenate each time step's tokens: (B, N, D) -> (B, T, R * D)."""
        ...


class ExactFraming:
    """Step i covers frames 4i to 4i + 3. Its timestamp is their center, 40 i + 15 ms, and lies within the clip.

    Nothing is padded, except that the last frame is repeated where the last step reaches past the clip's end (by up to
    20 ms). The last segment is just shorter.
    """

    is_local = True

    def __init__(self, patches: PatchConfig) -> None:
        self._patches = patches
        self.step_samples = HOP * patches.patch_frames
        self.step_ms = HOP_MS * patches.patch_frames
        self.first_step_ms = HOP_MS * (patches.patch_frames - 1) / 2

    def step_count(self, samples: int) -> int:
        first_sample = HOP * (self._patches.patch_frames - 1) // 2
        return max(1, (samples - first_sample) // self.step_samples + 1)

    def timestamps_ms(self, samples: int) -> Tensor:
        return self.step_times_ms(0, self.step_count(samples)).float()

    def step_times_ms(self, first: int, end: int) -> Tensor:
        """Return the times of steps first..end-1, in milliseconds: (T,) float64 on the CPU."""
        return self.first_step_ms + self.step_ms * torch.arange(first, end, dtype=torch.float64, device="cpu")

    def fit(self, logmel: Tensor, steps: int) -> Tensor:
        """Cut frames (B, F, bands) to this many whole steps, or repeat the last frame to reach them."""
        frames = steps * self._patches.patch_frames
        missing = frames - logmel.shape[1]
        if missing > 0:
            logmel = torch.cat([logmel, logmel[:, -1:].expand(-1, missing, -1)], dim=1)
        return logmel[:, :frames]

    def cut(self, logmel: Tensor, steps: int) -> list[Segment]:
        return _cut(self.fit(logmel, steps), steps, self._patches)

    def group(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (-1, self._patches.rows)).flatten(2)  # tokens are time-major


class ReferenceFraming:
    """The papers' released code's framing, quirks included: published numbers were made with it.

    - Frames are padded with zeros after normalization to a multiple of 200, by a full segment if they already are one.
      int(50 * pad / 200) steps are dropped at the end. All of a segment is encoded, so the shortest clip costs as much
      as one of 2 s.
    - Time-major tokens are grouped as if they were band-major: step j of a segment holds tokens j, 50 + j, 100 + j,
      150 + j and 200 + j, which are five different times in one row of bands.
    - Timestamps begin at 0 and are spaced by duration / steps, so they drift by up to one step.
    """

    is_local = False

    def __init__(self, patches: PatchConfig) -> None:
        self._patches = patches

    def pad_count(self, frames: int) -> int:
        """Return the number of zero frames to append."""
        return self._patches.chunk_frames - frames % self._patches.chunk_frames

    def step_count(self, samples: int) -> int:
        patches, frames = self._patches, samples // HOP + 1
        pad = self.pad_count(frames)
        return (frames + pad) // patches.chunk_frames * patches.steps - int(patches.steps * pad / patches.chunk_frames)

    def timestamps_ms(self, samples: int) -> Tensor:
        steps = self.step_count(samples)
        step_ms = 1000 * samples / SAMPLE_RATE / steps
        return (step_ms * torch.arange(steps, dtype=torch.float64, device="cpu")).float()

    def cut(self, logmel: Tensor, steps: int) -> list[Segment]:
        return _cut(F.pad(logmel, (0, 0, 0, self.pad_count(logmel.shape[1]))), steps, self._patches)

    def group(self, tokens: Tensor) -> Tensor:
        grid = tokens.unflatten(1, (self._patches.rows, self._patches.steps))  # as if the first axis were rows
        return grid.transpose(1, 2).flatten(2)


FRAMINGS: dict[str, Callable[[PatchConfig], Framing]] = {
    "exact": ExactFraming,
    "reference": ReferenceFraming,
}


def _cut(logmel: Tensor, steps: int, patches: PatchConfig) -> list[Segment]:
    """Split frames (B, F, bands) into segments; leave out those without any of the clip's steps."""
    pieces = logmel.split(patches.chunk_frames, dim=1)
    kept = [min(patches.steps, steps - index * patches.steps) for index in range(len(pieces))]
    return [Segment(piece[clip], keep) for clip in range(len(logmel)) for piece, keep in zip(pieces, kept) if keep > 0]
