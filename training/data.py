"""Crops of records, in an order that is a function of the seed alone.

Training reads an endless sequence of rows. Row i is crop i % crops_per_record of the record at place
i // crops_per_record of the record order; the record order is one permutation after another. Where several folders of
shards have shares, each folder has such an order of its own, and every hundred places hold as many of each folder as
its share says. A step's batch is `batch_size` rows in a row, of which each process takes its share. So the data of any
step are known from the seed and the step: resuming needs no reader's state, and the number of processes and workers
does not matter.
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

# What a hash is for, so that no two uses of the same numbers meet.
_ORDER, _CROP, _MIX = 1, 2, 3

_BLOCK = 100  # places after which each folder has had its share


class Crops(Dataset):
    """Normalised log-mel crops by row number.

    Args:
        index: the records.
        frames: length of a crop; a shorter record is repeated from its beginning.
        crops_per_record: rows in a row that share a record.
        normalize: "record" or "crop", what mean and standard deviation are taken over.
        seed: of record order and crop positions.
        shares: of the places, in hundredths, one per folder of a `JoinedShards`; None: every record alike.

    Raises:
        ValueError: shares that are not one per folder; nothing to draw from.
    """

    def __init__(
        self,
        index: ShardIndex | JoinedShards,
        frames: int,
        crops_per_record: int,
        normalize: str,
        seed: int,
        shares: Sequence[int] | None = None,
    ) -> None:
        if shares is not None and len(shares) != len(index.sizes):
            raise ValueError(f"expected a share for each of {len(index.sizes)} folders of shards, got {tuple(shares)}")
        self.index = index
        self.frames = frames
        self.crops_per_record = crops_per_record
        self.normalize = normalize
        self.seed = seed
        self.shares = None if shares is None else np.array(shares)
        self._sizes = [len(index)] if shares is None else index.sizes
        if min(self._sizes) == 0:
            raise ValueError("there are shards without a record: nothing can be drawn from them")
        self._firsts = [0, *np.cumsum(self._sizes)]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._mix: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
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
        folder, place = (0, place) if self.shares is None else self._folder_at(place)
        epoch, within = divmod(place, self._sizes[folder])
        order = self._orders.get(folder)
        if order is None or order[0] != epoch:
            generator = np.random.default_rng(hash_seed(self.seed, _ORDER, epoch, *([folder] if folder else [])))
            order = self._orders[folder] = (epoch, generator.permutation(self._sizes[folder]))
        return int(self._firsts[folder] + order[1][within])

    def _folder_at(self, place: int) -> tuple[int, int]:
        """Which folder a place takes a record of, and how many places before it did."""
        block, within = divmod(place, _BLOCK)
        if self._mix[0] != block:
            generator = np.random.default_rng(hash_seed(self.seed, _MIX, block))
            self._mix = (block, generator.permutation(np.repeat(np.arange(len(self.shares)), self.shares)))
        folder = int(self._mix[1][within])
        return folder, block * int(self.shares[folder]) + int((self._mix[1][:within] == folder).sum())


def run_crops(index: ShardIndex | JoinedShards, config: RunConfig) -> Crops:
    """The crops that a run trains on."""
    frames = config.encoder.patches.chunk_frames
    return Crops(index, frames, config.crops_per_record, config.normalize, config.seed, config.shares)


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
    """Mean and unbiased standard deviation over an array, as `hear_encoders.nn.frontend.normalize` uses them.

    In numpy, whose sums do not depend on the number of threads: reading in a worker, which has one, must give the same
    bits as reading in the training process.
    """
    return float(logmel.mean()), float(logmel.std(ddof=1))
