"""Crops of records, in an order that is a function of the seed alone.

Training reads an endless sequence of rows. Row i is crop i % crops_per_record of the record at place
i // crops_per_record of the record order; the record order is one permutation after another. A step's batch
is `batch_size` rows in a row, of which each process takes its share. So the data of any step are known from the seed
and the step: resuming needs no reader's state, and the number of processes and workers does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hear_encoders.frontend import STD_OFFSET
from training.config import RunConfig
from training.masking import hash_seed
from training.shards import ShardIndex

# What a hash is for, so that no two uses of the same numbers meet.
_ORDER, _CROP = 1, 2


class Crops(Dataset):
    """Normalised log-mel crops by row number.

    Args:
        index: the records.
        frames: length of a crop; a shorter record is repeated from its beginning.
        crops_per_record: rows in a row that share a record.
        normalize: "record" or "crop", what mean and standard deviation are taken over.
        seed: of record order and crop positions.
    """

    def __init__(self, index: ShardIndex, frames: int, crops_per_record: int, normalize: str, seed: int) -> None:
        self.index = index
        self.frames = frames
        self.crops_per_record = crops_per_record
        self.normalize = normalize
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._last: tuple[int, tuple[np.ndarray, float, float]] = (-1, (np.empty((0, 0)), 0.0, 0.0))

    def __getitem__(self, row: int) -> Tensor:
        """Return the crop of a row: (frames, 80) float32."""
        place = row // self.crops_per_record
        if place != self._last[0]:  # rows that share a record come one after another
            self._last = (place, self._record(place))
        record, mean, std = self._last[1]
        first = hash_seed(self.seed, _CROP, row) % (len(record) - self.frames + 1)
        crop = record[first : first + self.frames].astype(np.float32)
        if self.normalize == "crop":
            mean, std = _statistics(crop)
        return torch.from_numpy((crop - np.float32(mean)) / np.float32(std + STD_OFFSET))

    def _record(self, place: int) -> tuple[np.ndarray, float, float]:
        """The record at a place, at least as long as a crop, with its mean and standard deviation."""
        record = self.index.read(self.record_at(place))
        mean, std = (0.0, 0.0) if self.normalize == "crop" else _statistics(record.astype(np.float32))
        if len(record) < self.frames:
            record = np.tile(record, (-(-self.frames // len(record)), 1))
        return record, mean, std

    def record_at(self, place: int) -> int:
        """Which record stands at a place of the endless order."""
        epoch, within = divmod(place, len(self.index))
        if self._order[0] != epoch:
            generator = np.random.default_rng(hash_seed(self.seed, _ORDER, epoch))
            self._order = (epoch, generator.permutation(len(self.index)))
        return int(self._order[1][within])


def run_crops(index: ShardIndex, config: RunConfig) -> Crops:
    """The crops that a run trains on."""
    return Crops(index, config.encoder.patches.chunk_frames, config.crops_per_record, config.normalize, config.seed)


class RowBatches(Sampler[list[int]]):
    """Row numbers of one process's batches, from a step on, in `accumulate` parts a step."""

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
        share = self.batch_size // self.processes
        part = share // self.accumulate
        for step in range(self.first_step, self.steps):
            first = step * self.batch_size + self.rank * share
            for offset in range(0, share, part):
                yield list(range(first + offset, first + offset + part))

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * self.accumulate


def crop_loader(crops: Crops, batches: RowBatches, workers: int, pin_memory: bool) -> DataLoader:
    """A loader that reads ahead of training in worker processes."""
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
    """Mean and unbiased standard deviation over an array, as `hear_encoders.frontend.normalize` uses them.

    In numpy, whose sums do not depend on the number of threads: reading in a worker, which has one, must give the same
    bits as reading in the training process.
    """
    return float(logmel.mean()), float(logmel.std(ddof=1))
