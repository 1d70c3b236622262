"""Where `hear-embed` puts embeddings: an `.npz` file, a `.parquet` file, or a folder of `.npy` files.

All are written atomically. Arrays per kind of output and of embedding (E: embedding size, T: time steps):

    .npz, scenes          paths (files,), embeddings (files, E)
    .npz, timestamps      paths (files,), offsets (files + 1,), timestamps_ms (all T,), embeddings (all T, E);
                          file i has the rows offsets[i]:offsets[i + 1]
    .parquet, scenes      one row a file: path, embedding
    .parquet, timestamps  one row a step: path, timestamp_ms, embedding
    folder, scenes        NAME.npy (E,) for every file, in the folders the files lie in
    folder, timestamps    NAME.npy (T, E) and NAME.timestamps_ms.npy (T,)
"""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from hear_encoders.audio import audio_extensions
from hear_encoders.files import atomic_write, write_json

SETTINGS_FILE = "hear-embed.json"
PARQUET_ROWS = 1024  # in a row group, at least

# Suffixes that one expects to be honoured; any other name is a folder's.
_OTHER_FORMATS = audio_extensions() | {
    *(".npy", ".mat", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".pt", ".pth", ".pkl", ".safetensors"),
    *(".h5", ".hdf5", ".feather", ".arrow", ".zip", ".gz", ".tar"),
}


class Output(Protocol):
    """Takes the embeddings of one file at a time; `close` puts the result in place, `abort` leaves none."""

    def has(self, name: str) -> bool:
        """Is the file's embedding there already? Raises ValueError where something else is in its place."""
        ...

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


def output_kind(path: Path) -> Literal["npz", "parquet", "folder"]:
    """Tell what an output's name stands for.

    Raises:
        ValueError: none of the three, or Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz" and not path.is_dir():
        return "npz"
    if suffix == ".parquet" and not path.is_dir():
        check_parquet()
        return "parquet"
    if path.is_file() or (suffix in _OTHER_FORMATS and not path.is_dir()):
        raise ValueError(f"{path}: expected a name ending in .npz or .parquet, or a folder")
    return "folder"


def check_parquet() -> None:
    """Raise ValueError where there is no pyarrow to write Parquet with."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet needs pyarrow: pip install 'hear-audiomaepp[parquet]'")


def open_output(path: Path, timestamps: bool, settings: dict[str, Any]) -> Output:
    """Open the output that the name stands for (see `output_kind`).

    Args:
        path: ends in `.npz` or `.parquet`, or is a folder.
        timestamps: whether timestamp embeddings will come.
        settings: what the embeddings depend on. A folder keeps them, so that no two runs mix in it.

    Raises:
        ValueError: as `output_kind`, or a folder that holds embeddings made with other settings.
    """
    kind = output_kind(path)
    if kind == "folder":
        return FolderOutput(path, timestamps, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    return NpzOutput(path, timestamps) if kind == "npz" else ParquetOutput(path, timestamps)


def settings_difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is another now, in words; empty if there is none."""
    for key in {**now, **earlier}:
        if earlier.get(key) != now.get(key):
            return f"{key} = {earlier.get(key)!r}, now {now.get(key)!r}"
    return ""


class NpzOutput:
    """One `.npz` file, written at the end."""

    def __init__(self, path: Path, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._rows: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))  # now, to find out now if it cannot be written

    def has(self, name: str) -> bool:
        return False

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        self._rows[path] = (embedding, timestamps_ms)

    def close(self) -> None:
        paths = sorted(self._rows)
        arrays: dict[str, np.ndarray] = {"paths": np.array(paths)}
        if self._timestamps:
            embeddings = [self._rows[path][0] for path in paths]
            arrays["offsets"] = np.cumsum([0] + [len(embedding) for embedding in embeddings])
            arrays["timestamps_ms"] = np.concatenate([self._rows[path][1] for path in paths])
            arrays["embeddings"] = np.concatenate(embeddings)
        else:
            arrays["embeddings"] = np.stack([self._rows[path][0] for path in paths])
        np.savez(self._file, **arrays)
        self._stack.close()

    def abort(self) -> None:
        _abandon(self._stack)


class ParquetOutput:
    """One `.parquet` file, written as embeddings come; rows are in the order of encoding."""

    def __init__(self, path: Path, timestamps: bool) -> None:
        import pyarrow.parquet

        self._arrow = pyarrow
        self._timestamps = timestamps
        self._pending: list[Any] = []  # tables
        self._writer: Any = None
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))

    def has(self, name: str) -> bool:
        return False

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        rows = np.atleast_2d(embedding)  # (1, E) or (T, E)
        columns = {"path": self._arrow.array([path] * len(rows))}
        if self._timestamps:
            columns["timestamp_ms"] = self._arrow.array(timestamps_ms)
        columns["embedding"] = self._arrow.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
        self._pending.append(self._arrow.table(columns))
        if sum(table.num_rows for table in self._pending) >= PARQUET_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._stack.close()

    def abort(self) -> None:
        _abandon(self._stack)

    def _flush(self) -> None:
        """Write what is pending as one row group; a row group for each file would be slow to read."""
        if not self._pending:
            return
        table = self._arrow.concat_tables(self._pending)
        self._pending.clear()
        if self._writer is None:
            writer = self._arrow.parquet.ParquetWriter(self._file, table.schema, use_dictionary=["path"])
            self._writer = self._stack.enter_context(writer)
        self._writer.write_table(table)


def _abandon(stack: ExitStack) -> None:
    """Leave the contexts as after an error, which makes an atomic file go away."""
    abandoned = KeyboardInterrupt()
    with suppress(OSError):  # what is buffered is written as a file closes, which may fail as writing did
        stack.__exit__(type(abandoned), abandoned, None)


class FolderOutput:
    """A folder with one `.npy` file for each audio file. What is there already is not made again."""

    def __init__(self, path: Path, timestamps: bool, settings: dict[str, Any]) -> None:
        self._folder = path
        self._record = path / SETTINGS_FILE
        self._settings = {**settings, "timestamps": timestamps}
        self._resumed = self._record.exists()
        if not self._resumed:
            return
        try:
            earlier = json.loads(self._record.read_text(encoding="utf-8"))
            if not isinstance(earlier, dict):
                raise ValueError(f"expected a JSON object, got {type(earlier).__name__}")
        except ValueError as error:
            raise ValueError(f"{self._record}: damaged ({error}); choose another folder") from error
        if difference := settings_difference(earlier, self._settings):
            raise ValueError(f"{path} holds embeddings made with {difference}: choose another folder or delete it")

    def has(self, name: str) -> bool:
        path = self._embedding_path(name)
        there = os.path.exists(path)  # written last; Path.exists would raise for a name that is too long
        if there and not self._resumed:
            raise ValueError(f"{path} is there, and no {self._record} says how it was made: choose another folder")
        return there

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        target = self._embedding_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._record.exists():
            write_json(self._record, self._settings)
        if timestamps_ms is not None:
            with atomic_write(target.with_name(f"{Path(name).name}.timestamps_ms.npy")) as file:
                np.save(file, timestamps_ms)
        with atomic_write(target) as file:
            np.save(file, embedding)

    def _embedding_path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
