"""Shards of log-mel records, written by `training.corpora.prepare`, read in any order.

A folder of shards holds (NNNNNN: the shard's number, KEY: the record's name, without dots)

    shard-NNNNNN.tar    WebDataset, uncompressed: KEY.logmel.npy, float16 (frames, 80), and KEY.json for each record
    shard-NNNNNN.json   sidecar: the records' offsets, and sources that could not be read
    index.json          written last: front end, number of records and hours, list of shards
    plan.json           assigns sources to shards; only `prepare` reads it

The index has the SHA-256 of each sidecar, which is verified when the folder is opened; the sidecar has its shard's
SHA-256, which `verify` compares, and the CRC-32 of each record's values, which is verified whenever the record is read.
Folders of older versions lack all three.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hear_encoders.checkpoint import sha256
from hear_encoders.files import file_named, read_json
from hear_encoders.nn import frontend
from hear_encoders.nn.frontend_torchaudio import FrontendName

FORMAT_VERSION = 1
INDEX_FILE = "index.json"

# Files kept open. A process may usually have 1024, and AudioSet alone is 2000 shards.
_OPEN_SHARDS = 512

_NO_CHECKSUM = -1


class DamagedShardsError(ValueError):
    """A file in a folder of shards is damaged."""


def shard_name(number: int) -> str:
    """Name a shard: `shard-000000.tar`."""
    return f"shard-{number:06d}.tar"


def sidecar_name(number: int) -> str:
    """Name a shard's sidecar: `shard-000000.json`."""
    return f"shard-{number:06d}.json"


def frontend_settings(name: FrontendName = "own") -> dict[str, Any]:
    """Return the front end's settings, which determine the log-mel values, as in index.json."""
    return {
        "sample_rate": frontend.SAMPLE_RATE,
        "window": frontend.WINDOW,
        "hop": frontend.HOP,
        "bands": frontend.BANDS,
        "lowest_hz": frontend.LOWEST_HZ,
        "highest_hz": frontend.HIGHEST_HZ,
        "log_offset": frontend.LOG_OFFSET,
        **({} if name == "own" else {"library": name}),
    }


@dataclass(frozen=True)
class Record:
    """The source of a record."""

    key: str
    source: str  # path of the audio file, relative to the folder that was prepared
    start_s: float  # in the audio file
    duration_s: float


class ShardIndex:
    """Random access to the records in a folder of shards, by number.

    Record i is the same in every process and every run. Threads and forked processes may share an index; a pickled
    copy opens its own files.

    Attributes:
        path: the folder.
        shards: (records,) int32, the number of each record's shard.
        offsets: (records,) int64, where each record's values begin in the shard, in bytes.
        frames: (records,) int32, lengths in frames of 10 ms.
        checksums: (records,) int64, CRC-32 of each record's values; -1 if it has none.
        sizes: [number of records], as in `JoinedShards`.
    """

    def __init__(
        self, path: Path, shards: np.ndarray, offsets: np.ndarray, frames: np.ndarray, checksums: np.ndarray
    ) -> None:
        self.path = path
        self.shards = shards
        self.offsets = offsets
        self.frames = frames
        self.checksums = checksums
        self.sizes = [len(offsets)]
        self._firsts = np.searchsorted(shards, np.arange(shards[-1] + 1 if len(shards) else 0))
        self._files: dict[int, _File] = {}
        self._sidecar: tuple[int, list[dict[str, Any]]] = (-1, [])

    def fingerprint(self) -> str:
        """Return a hash of the records' positions and lengths, which tells folders apart."""
        digest = hashlib.sha256()
        for array in (self.shards, self.offsets, self.frames):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardIndex:
        """Open the folder that `python -m training.corpora.prepare ... PATH` wrote.

        Raises:
            FileNotFoundError: the folder has no index.json (`prepare` did not finish), or a shard is missing.
            ValueError: the version or front end is not this code's, or a file is damaged or does not match the index.
        """
        path = Path(path)
        index_file = path / INDEX_FILE
        if not index_file.is_file():
            raise FileNotFoundError(
                f"no {INDEX_FILE} in {path}: let `python -m training.corpora.prepare ... {path}` finish"
            )
        index = read_object(index_file)
        if index.get("version") != FORMAT_VERSION:
            raise ValueError(f"{index_file}: version {index.get('version')}, this code reads {FORMAT_VERSION}")
        _check_frontend(index.get("frontend", {}), index_file)
        with damage_named(index_file):
            rows = [(shard["records"], shard["bytes"], shard.get("sidecar_sha256")) for shard in index["shards"]]
        tables = [np.empty((0, 3), dtype=np.int64)]  # offset, frames, checksum of each record
        for number, (count, size, checksum) in enumerate(rows):
            _check_size(path / shard_name(number), size)
            sidecar = path / sidecar_name(number)
            if checksum is not None and (got := sha256(sidecar)) != checksum:
                raise DamagedShardsError(f"{sidecar}: damaged: its SHA-256 is {got}, expected {checksum}")
            tables.append(_read_table(sidecar, size))
            if len(tables[-1]) != count:
                raise DamagedShardsError(f"{sidecar}: {len(tables[-1])} records, but {index_file} says {count}")
        shards = np.repeat(np.arange(len(rows), dtype=np.int32), [len(table) for table in tables[1:]])
        offsets, frames, checksums = np.concatenate(tables).T
        return cls(path, shards, offsets.copy(), frames.astype(np.int32), checksums.copy())

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, i: int) -> np.ndarray:
        """Return the log-mel of record i: (frames, 80) float16, natural logarithm, not normalized, read-only.

        Raises:
            IndexError: no record i.
            FileNotFoundError: its shard is missing.
            DamagedShardsError: its shard is truncated, or the record's checksum does not match.
        """
        shard, frames = int(self.shards[i]), int(self.frames[i])
        length = frames * frontend.BANDS * 2
        data = self._file(shard).read(length, int(self.offsets[i]))
        if len(data) < length:
            raise DamagedShardsError(f"{self.path / shard_name(shard)} is truncated: record {i} is incomplete")
        expected = int(self.checksums[i])
        if expected != _NO_CHECKSUM and zlib.crc32(data) != expected:
            raise DamagedShardsError(f"{self.path / shard_name(shard)} is damaged: the checksum of record {i} differs")
        return np.frombuffer(data, dtype="<f2").reshape(frames, frontend.BANDS)

    def record(self, i: int) -> Record:
        """Return record i's source, from the shard's sidecar. Only the last sidecar is kept in memory.

        Raises:
            IndexError: no record i.
        """
        shard, i = int(self.shards[i]), range(len(self))[i]
        number, records = self._sidecar
        if number != shard:
            records = read_object(self.path / sidecar_name(shard))["records"]
            self._sidecar = (shard, records)
        found = records[i - int(self._firsts[shard])]
        return Record(found["key"], found["source"], found["start_s"], found["duration_s"])

    def _file(self, shard: int) -> _File:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_SHARDS:
                # A new dict, not clear(): another thread may be reading the old one.
                self._files = {}
            file = self._files[shard] = _File(self.path / shard_name(shard))
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_sidecar": (-1, [])}


class JoinedShards:
    """Several folders of shards as one: the records are numbered folder by folder.

    Attributes:
        indices: one per folder.
        sizes: number of records in each folder.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = list(indices)
        self.sizes = [len(index) for index in self.indices]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, i: int) -> np.ndarray:
        """Return record i's log-mel, see `ShardIndex.read`."""
        return self._call(ShardIndex.read, i)

    def record(self, i: int) -> Record:
        """Return record i's source, see `ShardIndex.record`."""
        return self._call(ShardIndex.record, i)

    def _call(self, method: Callable[[ShardIndex, int], Any], i: int) -> Any:
        i = range(len(self))[i]
        folder = bisect_right(self._ends, i)
        return method(self.indices[folder], i - self._ends[folder] + self.sizes[folder])


class _File:
    """A file that any thread may read; closed when it is no longer referenced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # O_BINARY: Windows
        except FileNotFoundError as error:
            raise FileNotFoundError(f"shard is missing: {path}") from error

    def read(self, length: int, offset: int) -> bytes:
        with file_named(self._path):
            if hasattr(os, "pread"):
                return os.pread(self._descriptor, length, offset)
            with self._lock:  # Windows
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                return os.read(self._descriptor, length)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of a JSON file's values that are missing or of other types into one that names the file."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DamagedShardsError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def verify(path: str | os.PathLike[str], number: int) -> bool | None:
    """Compare a shard's SHA-256 with its sidecar's.

    Args:
        path: the folder.
        number: the shard's.

    Returns:
        Whether they are equal; None if the sidecar has none.
    """
    expected = read_object(Path(path) / sidecar_name(number)).get("sha256")
    return None if expected is None else sha256(Path(path) / shard_name(number)) == expected


def _check_frontend(saved: Any, index_file: Path) -> None:
    ours = frontend_settings()
    saved = saved if isinstance(saved, dict) else {}
    saved = {name: value for name, value in saved.items() if name != "library"}  # libraries differ by rounding
    differences = [
        f"{name} is {saved.get(name)}, expected {ours.get(name)}"
        for name in sorted(ours.keys() | saved.keys())
        if saved.get(name) != ours.get(name)
    ]
    if differences:
        raise ValueError(f"{index_file}: made with another front end: {'; '.join(differences)}")


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"shard is missing: {file}")
    if file.stat().st_size != expected:
        raise DamagedShardsError(f"{file} has {file.stat().st_size} bytes, expected {expected}: truncated or changed")


def _read_table(sidecar: Path, shard_bytes: int) -> np.ndarray:
    """Read offset, frames and checksum of a shard's records: (records, 3) int64."""
    values = read_object(sidecar)
    with damage_named(sidecar):
        rows = [(record["offset"], record["frames"], record.get("crc32", _NO_CHECKSUM)) for record in values["records"]]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    offsets, frames = table[:, 0], table[:, 1].clip(max=2**31 - 1)  # products of larger numbers might overflow
    if not ((table[:, :2] >= (0, 1)).all() and (frames * frontend.BANDS * 2 <= shard_bytes - offsets).all()):
        raise DamagedShardsError(f"{sidecar}: damaged: a record lies outside of its shard")
    return table


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise ValueError, which names the file, if it is damaged."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedShardsError(f"{path}: damaged: expected a JSON object, got {type(value).__name__}")
    return value
