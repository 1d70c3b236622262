"""Shards of log-mel records: what `training.corpora.prepare` writes, and reading them at random.

A folder of shards holds (NNNNNN: shard number, KEY: record's name, without dots)

    shard-NNNNNN.tar    WebDataset, uncompressed: KEY.logmel.npy, float16 (frames, 80), and KEY.json, record by record
    shard-NNNNNN.json   where the shard's records lie in it, and which sources could not be read
    index.json          written last: front end, number of records and hours, all shards
    plan.json           which sources go into which shard; only `prepare` reads it
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hear_encoders.nn import frontend

FORMAT_VERSION = 1
INDEX_FILE = "index.json"

# Open files are kept, but fewer than the 1024 that a process may usually have: AudioSet alone is 2000 shards.
_OPEN_SHARDS = 512


def shard_name(number: int) -> str:
    """Name of a shard: `shard-000000.tar`."""
    return f"shard-{number:06d}.tar"


def frontend_settings() -> dict[str, float]:
    """What the log-mel values depend on, as index.json has it."""
    return {
        "sample_rate": frontend.SAMPLE_RATE,
        "window": frontend.WINDOW,
        "hop": frontend.HOP,
        "bands": frontend.BANDS,
        "lowest_hz": frontend.LOWEST_HZ,
        "highest_hz": frontend.HIGHEST_HZ,
        "log_offset": frontend.LOG_OFFSET,
    }


@dataclass(frozen=True)
class Record:
    """Where a record comes from."""

    key: str
    source: str  # path of the audio file, relative to the folder that was prepared
    start_s: float  # in the audio file
    duration_s: float


class ShardIndex:
    """All records of a folder of shards, by number; reads any of them at any time.

    Record i is the same in every process and every run. May be used by several threads, after a fork, and
    pickled: a copy opens files of its own.

    Attributes:
        path: the folder.
        shards: (records,) int32, number of the shard each record is in.
        offsets: (records,) int64, where its values begin in the shard's file, in bytes.
        frames: (records,) int32, length in frames of 10 ms.
        sizes: [records], as `JoinedShards` has them.
    """

    def __init__(self, path: Path, shards: np.ndarray, offsets: np.ndarray, frames: np.ndarray) -> None:
        self.path = path
        self.shards = shards
        self.offsets = offsets
        self.frames = frames
        self.sizes = [len(offsets)]
        self._firsts = np.searchsorted(shards, np.arange(shards[-1] + 1 if len(shards) else 0))
        self._files: dict[int, _File] = {}
        self._sidecar: tuple[int, list[dict[str, Any]]] = (-1, [])

    def fingerprint(self) -> str:
        """Tells folders of records apart, by where records lie and how long they are."""
        digest = hashlib.sha256()
        for array in (self.shards, self.offsets, self.frames):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardIndex:
        """Open the folder that `python -m training.corpora.prepare ... PATH` wrote.

        Raises:
            FileNotFoundError: the folder has no index.json (`prepare` did not get to its end), or a shard is gone.
            ValueError: another version or front end than this code's, or shards that do not fit the index.
        """
        path = Path(path)
        index_file = path / INDEX_FILE
        if not index_file.is_file():
            raise FileNotFoundError(
                f"no {INDEX_FILE} in {path}: let `python -m training.corpora.prepare ... {path}` finish"
            )
        index = json.loads(index_file.read_bytes())
        if index.get("version") != FORMAT_VERSION:
            raise ValueError(f"{index_file}: version {index.get('version')}, this code reads {FORMAT_VERSION}")
        _check_frontend(index.get("frontend", {}), index_file)
        counts = [shard["records"] for shard in index["shards"]]
        offsets, frames = np.empty(sum(counts), dtype=np.int64), np.empty(sum(counts), dtype=np.int32)
        last = 0
        for number, shard in enumerate(index["shards"]):
            _check_size(path / shard_name(number), shard["bytes"])
            records = _read_sidecar(path, number)
            if len(records) != shard["records"]:
                raise ValueError(
                    f"{_sidecar_file(path, number)}: {len(records)} records, {index_file} says {shard['records']}"
                )
            first, last = last, last + len(records)
            offsets[first:last] = [record["offset"] for record in records]
            frames[first:last] = [record["frames"] for record in records]
        return cls(path, np.repeat(np.arange(len(counts), dtype=np.int32), counts), offsets, frames)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, i: int) -> np.ndarray:
        """Return the log-mel of record i: (frames, 80) float16, natural logarithm, not normalised, read-only.

        Raises:
            IndexError: no record i.
            FileNotFoundError: its shard is gone.
            ValueError: its shard is cut short.
        """
        shard, frames = int(self.shards[i]), int(self.frames[i])
        length = frames * frontend.BANDS * 2
        file = self._file(shard)
        data = os.pread(file.descriptor, length, int(self.offsets[i]))
        if len(data) < length:
            raise ValueError(f"{self.path / shard_name(shard)} is cut short: record {i} is not all there")
        return np.frombuffer(data, dtype="<f2").reshape(frames, frontend.BANDS)

    def record(self, i: int) -> Record:
        """Tell where record i comes from; read from the shard's sidecar, of which the last one used is kept.

        Raises:
            IndexError: no record i.
        """
        shard, i = int(self.shards[i]), range(len(self))[i]
        number, records = self._sidecar
        if number != shard:
            records = _read_sidecar(self.path, shard)
            self._sidecar = (shard, records)
        found = records[i - int(self._firsts[shard])]
        return Record(found["key"], found["source"], found["start_s"], found["duration_s"])

    def _file(self, shard: int) -> _File:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_SHARDS:
                # A new dict rather than clear(): another thread may be looking into the old one.
                self._files = {}
            file = self._files[shard] = _File(self.path / shard_name(shard))
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_sidecar": (-1, [])}


class JoinedShards:
    """Folders of shards as one: records are numbered through, one folder after another.

    Attributes:
        indices: of the folders.
        sizes: records of each folder.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = list(indices)
        self.sizes = [len(index) for index in self.indices]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, i: int) -> np.ndarray:
        """As `ShardIndex.read`."""
        return self._call(ShardIndex.read, i)

    def record(self, i: int) -> Record:
        """As `ShardIndex.record`."""
        return self._call(ShardIndex.record, i)

    def _call(self, method: Callable[[ShardIndex, int], Any], i: int) -> Any:
        i = range(len(self))[i]
        folder = bisect_right(self._ends, i)
        return method(self.indices[folder], i - self._ends[folder] + self.sizes[folder])


class _File:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"shard is gone: {path}") from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _check_frontend(there: dict[str, float], index_file: Path) -> None:
    ours = frontend_settings()
    differences = [
        f"{name} is {there.get(name)} there, {ours.get(name)} here"
        for name in sorted(ours.keys() | there.keys())
        if there.get(name) != ours.get(name)
    ]
    if differences:
        raise ValueError(f"{index_file}: made with another front end: {'; '.join(differences)}")


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"shard is gone: {file}")
    if file.stat().st_size != expected:
        raise ValueError(f"{file} is cut short or changed: {file.stat().st_size} bytes of {expected}")


def _sidecar_file(path: Path, number: int) -> Path:
    return (path / shard_name(number)).with_suffix(".json")


def _read_sidecar(path: Path, number: int) -> list[dict[str, Any]]:
    return json.loads(_sidecar_file(path, number).read_bytes())["records"]
