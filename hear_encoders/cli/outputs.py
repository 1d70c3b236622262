"""Outputs of `hear-embed`: an `.npz` file, a `.parquet` file, or a folder of `.npy` files.

All files are written atomically. They hold (E: embedding size, T: time steps):

    .npz, scenes          paths (files,), embeddings (files, E)
    .npz, timestamps      paths (files,), offsets (files + 1,), timestamps_ms (sum of T,), embeddings (sum of T, E);
                          file i has rows offsets[i]:offsets[i + 1]
    .parquet, scenes      one row per file: path, embedding
    .parquet, timestamps  one row per time step: path, timestamp_ms, embedding
    folder, scenes        NAME.npy (E,) for each file, in the same subfolders as the audio
    folder, timestamps    NAME.npy (T, E) and NAME.timestamps_ms.npy (T,)
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, Protocol, cast

import numpy as np

from hear_encoders.audio import audio_extensions
from hear_encoders.files import atomic_write, remove_leftovers, write_or_check_settings

SETTINGS_FILE = "hear-embed.json"
MIN_ROW_GROUP = 1024  # rows of Parquet

# Formats that are not written: names with these suffixes are refused. Any other name is a folder.
_OTHER_FORMATS = audio_extensions() | {
    *(".npy", ".mat", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".pt", ".pth", ".pkl", ".safetensors"),
    *(".h5", ".hdf5", ".feather", ".arrow", ".zip", ".gz", ".tar"),
}


class Output(Protocol):
    """Collects embeddings file by file. `close` completes the output; `abort` discards an unfinished one."""

    def has(self, name: str) -> bool:
        """Return whether the output already holds the embedding of audio file `name`.

        Raises:
            ValueError: it has one, but no record of how it was made.
        """
        ...

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


def output_kind(path: Path) -> Literal["npz", "parquet", "folder"]:
    """Return the kind of output that a path selects.

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
    """Raise ValueError if pyarrow, which writes Parquet, is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet needs pyarrow: pip install 'hear-audiomaepp[parquet]'")


def open_output(path: Path, timestamps: bool, settings: dict[str, Any]) -> Output:
    """Open the output that the path selects (see `output_kind`).

    Args:
        path: ends in `.npz` or `.parquet`, or is a folder.
        timestamps: timestamp embeddings will be added instead of scene embeddings.
        settings: settings that the embeddings depend on. A folder records them, and refuses other ones later.

    Raises:
        ValueError: as `output_kind`, or the folder holds embeddings made with other settings.
    """
    kind = output_kind(path)
    if kind == "folder":
        return FolderOutput(path, timestamps, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    return NpzOutput(path, timestamps) if kind == "npz" else ParquetOutput(path, timestamps)


class NpzOutput:
    """One `.npz` file, written by `close`."""

    def __init__(self, path: Path, timestamps: bool) -> None:
        self._timestamps = timestamps
        remove_leftovers(path.parent)
        self._rows: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))  # opened now, so that it fails before any work

    def has(self, name: str) -> bool:
        return False

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        self._rows[path] = (embedding, timestamps_ms)

    def close(self) -> None:
        paths = sorted(self._rows)
        arrays: dict[str, Any] = {"paths": np.array(paths)}
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
        _discard(self._stack)


class ParquetOutput:
    """One `.parquet` file, written as embeddings arrive. Rows are in the order of `add`."""

    def __init__(self, path: Path, timestamps: bool) -> None:
        import pyarrow.parquet

        self._arrow = pyarrow
        self._timestamps = timestamps
        remove_leftovers(path.parent)
        self._pending: list[Any] = []  # tables
        self._writer: Any = None
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))

    def has(self, name: str) -> bool:
        return False

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        rows = np.atleast_2d(embedding)  # (1, E) or (T, E)
        # Parquet's text is UTF-8; bytes of a name that are not are written as \xNN.
        path = os.fsencode(path).decode(errors="backslashreplace")
        columns = {"path": self._arrow.array([path] * len(rows))}
        if self._timestamps:
            columns["timestamp_ms"] = self._arrow.array(timestamps_ms)
        columns["embedding"] = self._arrow.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
        self._pending.append(self._arrow.table(columns))
        if sum(table.num_rows for table in self._pending) >= MIN_ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._stack.close()

    def abort(self) -> None:
        _discard(self._stack)

    def _flush(self) -> None:
        """Write the pending tables as one row group. One row group per file would be slow to read."""
        if not self._pending:
            return
        table = self._arrow.concat_tables(self._pending)
        self._pending.clear()
        if self._writer is None:
            writer = self._arrow.parquet.ParquetWriter(self._file, table.schema, use_dictionary=["path"])
            self._writer = self._stack.enter_context(writer)
        self._writer.write_table(table)


def _discard(stack: ExitStack) -> None:
    """Leave the contexts as if interrupted, so that an atomic file is removed."""
    interruption = KeyboardInterrupt()
    with suppress(OSError):  # closing a file writes its buffer, which may fail like the write before
        stack.__exit__(type(interruption), interruption, None)


def _save(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array as .npy. NumPy writes to a file itself, and then does not say that the disk is full."""
    np.save(cast(BinaryIO, SimpleNamespace(write=file.write)), array)


class FolderOutput:
    """A folder with one `.npy` file per audio file. Existing embeddings are kept, so that a run can be resumed."""

    def __init__(self, path: Path, timestamps: bool, settings: dict[str, Any]) -> None:
        self._folder = path
        self._record = path / SETTINGS_FILE
        self._settings = {**settings, "timestamps": timestamps}
        self._has_record = self._write_or_check_settings(write=False)
        self._tidied: set[Path] = set()  # folders without leftovers of killed runs

    def has(self, name: str) -> bool:
        path = self._embedding_path(name)
        exists = os.path.exists(path)  # Path.exists would raise if the name is too long
        if exists and not self._has_record:
            raise ValueError(f"{path} exists, but no {self._record} says how it was made: choose another folder")
        return exists

    def add(self, path: str, name: str, embedding: np.ndarray, timestamps_ms: np.ndarray | None) -> None:
        target = self._embedding_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in self._tidied:
            remove_leftovers(target.parent)
            self._tidied.add(target.parent)
        # Only now: a run that embeds nothing must not bind later ones to its settings.
        self._has_record = self._has_record or self._write_or_check_settings(write=True)
        if timestamps_ms is not None:
            with atomic_write(target.with_name(f"{Path(name).name}.timestamps_ms.npy")) as file:
                _save(file, timestamps_ms)
        with atomic_write(target) as file:  # last, as `has` looks for it
            _save(file, embedding)

    def _write_or_check_settings(self, *, write: bool) -> bool:
        """Return whether the folder has a record of its settings, which then equal this run's."""
        advice = "choose another folder or delete it"
        record = write_or_check_settings(
            self._record, self._settings, holds="embeddings made", advice=advice, write=write
        )
        return record is not None

    def _embedding_path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
