"""Pooling: from the time steps of a clip to its scene embedding, one segment at a time.

Two classes have the same methods. A summary holds all that a scene embedding needs from some steps; the summaries of
parts merge into that of the whole. Letters in shape comments: B clips, T time steps, E embedding size, S parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

PoolingName = Literal["mean", "mean_std"]

LEAST_VARIANCE = 1e-24  # the root's gradient at 0 is infinite


class Pooling(Protocol):
    """The methods of both poolings."""

    width: int
    """Scene embedding size over E."""

    def summarize(self, embeddings: Tensor) -> Tensor:
        """Summarize steps: (B, T, E) -> (B, width * E)."""
        ...

    def merge(self, summaries: Tensor, steps: Tensor) -> Tensor:
        """Merge the summaries (B, S, width * E) of parts that have `steps` (S, 1) steps -> (B, width * E)."""
        ...

    def finish(self, summary: Tensor, steps: int) -> Tensor:
        """Turn summaries (B, width * E) of this many steps into scene embeddings (B, width * E)."""
        ...


class MeanPooling:
    """The mean over the steps, as in both papers. A summary is a sum."""

    width = 1

    def summarize(self, embeddings: Tensor) -> Tensor:
        return embeddings.sum(1)

    def merge(self, summaries: Tensor, steps: Tensor) -> Tensor:
        return summaries.sum(1)

    def finish(self, summary: Tensor, steps: int) -> Tensor:
        return summary / steps


class MeanStdPooling:
    """The mean over the steps, then their standard deviation (divided by their number).

    A summary is a sum, then a sum of squared distances from the part's own mean: sums of plain squares would cancel.
    """

    width = 2

    def summarize(self, embeddings: Tensor) -> Tensor:
        variance, mean = torch.var_mean(embeddings, dim=1, correction=0)
        return embeddings.shape[1] * torch.cat([mean, variance], dim=1)

    def merge(self, summaries: Tensor, steps: Tensor) -> Tensor:
        sums, squares = summaries.chunk(2, dim=2)  # (B, S, E) each
        total = sums.sum(1)
        distances = sums / steps.clamp(min=1) - (total / steps.sum())[:, None]  # a part may have no steps
        return torch.cat([total, (squares + steps * distances**2).sum(1)], dim=1)

    def finish(self, summary: Tensor, steps: int) -> Tensor:
        sums, squares = (summary / steps).chunk(2, dim=1)
        return torch.cat([sums, squares.clamp(min=LEAST_VARIANCE).sqrt()], dim=1)


POOLINGS: dict[str, Callable[[], Pooling]] = {"mean": MeanPooling, "mean_std": MeanStdPooling}
