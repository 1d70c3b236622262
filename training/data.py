"""Crops of records, in an order that is a function of the seed alone.

Training reads an endless sequence of rows, one crop each. Consecutive rows, `crops_per_record` of them, share a record:
row i is a crop of the record at position i // crops_per_record of the record order. The record order is one
permutation of the records after another. In a mixture of several folders of shards, each folder has its own
record order, and every hundred positions hold each folder's percentage of records.

The batch of an optimizer step is the next `batch_size` rows, divided among the processes. So the seed and the step
determine the data of any step: resuming needs no reader's state, and the data do not depend on the number of processes
and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hear_encoders.nn.frontend import STD_OFFSET
from training.config import RunConfig
from training.corpora.shards import JoinedShards, ShardIndex
from training.masking import hash_seed

# First numbers of a hash, so that its uses get different seeds.
_ORDER, _CROP, _MIXTURE = 1, 2, 3

_BLOCK = 100  # positions in which the percentages of a mixture hold exactly


class Crops(Dataset):
    """Normalized log-mel crops by row number.

    Args:
        index: the records.
        frames: length of a crop; a shorter record is repeated.
        crops_per_record: how many consecutive rows share a record.
        normalize: "record" or "crop", over which mean and standard deviation are taken.
        seed: seed of the record order and the crop positions.
        mixture_percent: percentage of records per folder of a `JoinedShards`; None draws every record equally often.

    Raises:
        ValueError: not one percentage per folder, or a folder without records.
    """

    def __init__(
        self,
        index: ShardIndex | JoinedShards,
        frames: int,
        crops_per_record: int,
        normalize: str,
        seed: int,
        mixture_percent: Sequence[int] | None = None,
    ) -> None:
        if mixture_percent is not None and len(mixture_percent) != len(index.sizes):
            raise ValueError(
                f"shares must have a percentage for each of {len(index.sizes)} folders of shards, "
                f"got {tuple(mixture_percent)}"
            )
        self.index = index
        self.frames = frames
        self.crops_per_record = crops_per_record
        self.normalize = normalize
        self.seed = seed
        self.mixture_percent = None if mixture_percent is None else np.array(mixture_percent)
        self._sizes = [len(index)] if mixture_percent is None else index.sizes
        if min(self._sizes) == 0:
            raise ValueError("a folder of shards holds no records")
        self._firsts = [0, *np.cumsum(self._sizes)]
        # Cached from the last call, each with its number: epoch, block and position.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._mixture: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._last: tuple[int, tuple[np.ndarray, float, float]] = (-1, (np.empty((0, 0)), 0.0, 0.0))

    def __getitem__(self, row: int) -> Tensor:
        """Return a row's crop: (frames, 80) float32."""
        position = row // self.crops_per_record
        if position != self._last[0]:  # consecutive rows share a record
            self._last = (position, self._read(position))
        record, mean, std = self._last[1]
        first = hash_seed(self.seed, _CROP, row) % (len(record) - self.frames + 1)
        crop = record[first : first + self.frames].astype(np.float32)
        if self.normalize == "crop":
            mean, std = _statistics(crop)
        return torch.from_numpy((crop - np.float32(mean)) / np.float32(std + STD_OFFSET))

    def _read(self, position: int) -> tuple[np.ndarray, float, float]:
        """Read the record at a position, at least as long as a crop, with its mean and standard deviation."""
        record = self.index.read(self.record_at(position))
        mean, std = (0.0, 0.0) if self.normalize == "crop" else _statistics(record.astype(np.float32))
        if len(record) < self.frames:
            record = np.tile(record, (-(-self.frames // len(record)), 1))
        return record, mean, std

    def record_at(self, position: int) -> int:
        """Return the number of the record at a position of the endless order."""
        folder, position = (0, position) if self.mixture_percent is None else self._folder_at(position)
        epoch, within = divmod(position, self._sizes[folder])
        order = self._orders.get(folder)
        if order is None or order[0] != epoch:
            generator = np.random.default_rng(hash_seed(self.seed, _ORDER, epoch, *([folder] if folder else [])))
            order = self._orders[folder] = (epoch, generator.permutation(self._sizes[folder]))
        return int(self._firsts[folder] + order[1][within])

    def _folder_at(self, position: int) -> tuple[int, int]:
        """Return the folder that a position draws from, and how many earlier positions draw from it."""
        block, within = divmod(position, _BLOCK)
        if self._mixture[0] != block:
            generator = np.random.default_rng(hash_seed(self.seed, _MIXTURE, block))
            folders = np.repeat(np.arange(len(self.mixture_percent)), self.mixture_percent)
            self._mixture = (block, generator.permutation(folders))
        folder = int(self._mixture[1][within])
        earlier = int((self._mixture[1][:within] == folder).sum())
        return folder, block * int(self.mixture_percent[folder]) + earlier


def run_crops(index: ShardIndex | JoinedShards, config: RunConfig) -> Crops:
    """Return the crops that a run trains on."""
    frames = config.encoder.patches.chunk_frames
    return Crops(index, frames, config.crops_per_record, config.normalize, config.seed, mixture_percent=config.shares)


class RowBatches(Sampler[list[int]]):
    """Row numbers of one process's micro-batches, from an optimizer step on: `accumulate` of them per step."""

    def __init__(
        self, batch_size: int, accumulate: int, rank: int, processes: int, first_step: int, steps: int
    ) -> None:
        if batch_size % (accumulate * processes):
            raise ValueError(
                f"batch_size = {batch_size} must be divisible by accumulate x processes = {accumulate} x {processes}"
            )
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.processes = rank, processes
        self.first_step, self.steps = first_step, steps

    def __iter__(self) -> Iterator[list[int]]:
        per_process = self.batch_size // self.processes
        size = per_process // self.accumulate
        for step in range(self.first_step, self.steps):
            first = step * self.batch_size + self.rank * per_process
            for offset in range(0, per_process, size):
                yield list(range(first + offset, first + offset + size))

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * self.accumulate


def crop_loader(crops: Crops, batches: RowBatches, workers: int, pin_memory: bool) -> DataLoader:
    """Return a loader whose worker processes read ahead of training."""
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,  # forking a process that has threads may hang it
        persistent_workers=False,
    )


def _statistics(logmel: np.ndarray) -> tuple[float, float]:
    """Return mean and unbiased standard deviation, as `hear_encoders.nn.frontend.normalize` uses them.

    In numpy, whose sums do not depend on the number of threads: a worker, which has one thread, must read the same bits
    as the training process.
    """
    return float(logmel.mean()), float(logmel.std(ddof=1))
