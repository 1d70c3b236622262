"""What `hear-embed-corpus` reads: audio files anywhere, manifests, tar shards and tables with audio, as decoding tasks.

`plan` lists the inputs and groups what is missing in the output into tasks. A task goes to any machine, and yields its
recordings there. A recording's path is its key, by which a later run knows that it is done:

    an audio file          its absolute path or address; in a manifest, as written there
    a file of a tar shard  SHARD#NAME
    a row of a table       TABLE#ROW
"""

from __future__ import annotations

import glob
import os
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hear_encoders.audio import LeftOut, extensions_read, is_excluded, search_audio, summarize
from hear_encoders.storage import find_files, is_url, open_file

TASK_FILES = 1000
UNKNOWN_MB = 1.0  # assumed size of a file that the listing gives none for

_TABLES = {".parquet", ".csv", ".arrow"}
_SAVED_DATASET = {"dataset_info.json", "state.json"}  # what `Dataset.save_to_disk` writes beside its .arrow files
_BATCH_ROWS = 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class Recording:
    """Audio to embed.

    Attributes:
        path: its key, see above.
        source: a path or an address, or the file's content.
        suffix: of the file's name.
        extras: values of the columns that are carried through.
    """

    path: str
    source: str | bytes
    suffix: str
    extras: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Recordings that are decoded one after the other."""

    def recordings(self) -> Iterator[Recording]: ...


@dataclass(frozen=True)
class FilesTask:
    """Audio files, complete recordings already."""

    files: list[Recording]

    def recordings(self) -> Iterator[Recording]:
        yield from self.files


@dataclass(frozen=True)
class TarTask:
    """The audio files of a tar shard, as WebDataset reads them, but for those already done."""

    shard: str
    done: frozenset[str]

    def recordings(self) -> Iterator[Recording]:
        readable, _ = extensions_read()
        with open_file(self.shard) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                path, suffix = f"{self.shard}#{member.name}", posixpath.splitext(member.name)[1].lower()
                if member.isfile() and suffix in readable and path not in self.done:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield Recording(path, content.read(), suffix)


@dataclass(frozen=True)
class TableTask:
    """Rows of a table whose column `audio` holds files: {"bytes", "path"}, as `datasets` stores them.

    Attributes:
        table: path or address of a .parquet or .arrow file.
        row_groups: of Parquet; empty for all rows.
        first_row: number of the first row.
        column: name of the column.
        extras: names of the other columns.
        done: numbers of rows that are done.
    """

    table: str
    row_groups: tuple[int, ...]
    first_row: int
    column: str
    extras: tuple[str, ...]
    done: frozenset[int]

    def recordings(self) -> Iterator[Recording]:
        row = self.first_row
        with open_file(self.table) as file:
            for batch in self._batches(file):
                wanted = [index for index in range(batch.num_rows) if row + index not in self.done]
                for index, values in zip(wanted, batch.take(wanted).to_pylist()):
                    audio = values[self.column] or {}
                    name = audio.get("path") or ""
                    source = name if audio.get("bytes") is None else audio["bytes"]
                    extras = {name: values[name] for name in self.extras}
                    yield Recording(f"{self.table}#{row + index}", source, posixpath.splitext(name)[1].lower(), extras)
                row += batch.num_rows

    def _batches(self, file: Any) -> Iterator[Any]:
        """Yield record batches with the column and the extras."""
        import pyarrow.parquet

        columns = [self.column, *self.extras]
        if not _is_parquet(self.table):
            for batch in _open_arrow(file):
                for first in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(first, _BATCH_ROWS).select(columns)
            return
        parquet = pyarrow.parquet.ParquetFile(file)
        yield from parquet.iter_batches(_BATCH_ROWS, row_groups=list(self.row_groups) or None, columns=columns)


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Attributes:
        tasks: for Ray's decoding tasks.
        files: number of recordings in them, without those in tar shards.
        shards: number of tar shards.
        done: number of recordings that the output holds already.
        extras: pyarrow schema of the columns that are carried through.
        left_out: lines about files that look like media but cannot be read.
    """

    tasks: list[Task]
    files: int
    shards: int
    done: int
    extras: Any
    left_out: list[str]


def plan(
    inputs: Sequence[str], *, exclude: Sequence[str], column: str | None, done: Collection[str], task_mb: float
) -> Plan:
    """List inputs and group what is missing into tasks.

    Tasks are groups of the whole list, without what is done. So the rest of an interrupted run is decoded in the same
    groups again.

    Args:
        inputs: files, folders and glob patterns, here or at an address. Manifests (.csv, .parquet), tables with audio
            (.parquet, or a folder of `Dataset.save_to_disk`) and .tar shards are recognized by name and columns.
        exclude: patterns, as in `search_audio`.
        column: of manifests and tables; None is "path" of a manifest, "audio" of a table.
        done: paths of recordings that are done.
        task_mb: MB of files in a task.

    Raises:
        FileNotFoundError: an input does not exist, or selects nothing.
        ValueError: storage that cannot be reached, a table without the column, a path that occurs twice, or tables
            with different columns.
    """
    import pyarrow

    listing = _Listing(exclude, column, set(done), task_mb)
    folders: list[str] = []  # on this machine, searched together so that no file is found twice
    for given in inputs:
        suffix = os.path.splitext(given)[1].lower()
        if suffix in _TABLES or suffix == ".tar":
            for source in _expand(given):
                listing.add_shard(source) if suffix == ".tar" else listing.add_table(source)
        elif not is_url(given) and os.path.isdir(given) and set(os.listdir(given)) >= _SAVED_DATASET:
            for source in _expand(os.path.join(given, "data-*.arrow")):
                listing.add_table(source)
        elif is_url(given):
            listing.add_address(given)
        else:
            folders.append(given)
    if folders:
        listing.add_folders(folders)
    return Plan(
        [*listing.tasks, *listing.grouped_files()],
        listing.missing,
        listing.shards,
        listing.held,
        pyarrow.schema([]) if listing.extras is None else listing.extras,
        summarize(listing.left_out),
    )


class _Listing:
    """What `plan` gathers."""

    def __init__(self, exclude: Sequence[str], column: str | None, done: set[str], task_mb: float) -> None:
        self._exclude, self._column, self._done, self._task_mb = exclude, column, done, task_mb
        self._readable, self._unreadable = extensions_read()
        self._files: dict[str, tuple[Recording, float]] = {}  # by path, with MB
        self.tasks: list[Task] = []
        self.missing = self.shards = self.held = 0
        self.extras: Any = None
        self.left_out: list[LeftOut] = []
        self._rows_done: dict[str, set[str]] = defaultdict(set)  # by shard or table
        for path in done:
            container, hash, place = path.rpartition("#")
            if hash:
                self._rows_done[container].add(place)

    def add_folders(self, inputs: Sequence[str]) -> None:
        search = search_audio(inputs, self._exclude)
        self.left_out += search.left_out
        for file in search.files:
            path = os.path.abspath(file.path)
            self._add(Recording(shown_path(path), path, file.path.suffix), _size_mb(path))

    def add_address(self, url: str) -> None:
        found = find_files(url)
        single = list(found) == [url]
        root = posixpath.commonpath([posixpath.dirname(path) for path in found])
        added = 0
        for path, size in found.items():
            name, suffix = posixpath.relpath(path, root), posixpath.splitext(path)[1].lower()
            if is_excluded(name, self._exclude):
                continue
            if single or suffix in self._readable:
                self._add(Recording(path, path, suffix), size / 1e6 or UNKNOWN_MB)
                added += 1
            elif suffix in self._unreadable:
                self.left_out.append(LeftOut(Path(path), path, self._unreadable[suffix]))
        if not added:
            raise FileNotFoundError(f"no audio files in {url}")

    def add_shard(self, shard: str) -> None:
        done = frozenset(f"{shard}#{name}" for name in self._rows_done[shard])
        self.tasks.append(TarTask(shard, done))
        self.shards += 1
        self.held += len(done)

    def add_table(self, table: str) -> None:
        """Add a manifest, or a table with audio."""
        import pyarrow

        schema = _schema(table)
        audio = [
            name
            for name in schema.names
            if pyarrow.types.is_struct(schema.field(name).type)
            and {"bytes", "path"} <= {child.name for child in schema.field(name).type}
        ]
        column = self._column or next(iter(audio), "path")
        if column not in schema.names:
            raise ValueError(f"{table} has the columns {', '.join(schema.names)}, but no {column!r}: give --column")
        extras = pyarrow.schema([field for field in schema if field.name != column]).remove_metadata()
        if self.extras is not None and extras != self.extras:
            raise ValueError(f"{table} has other columns than the table before: {', '.join(schema.names)}")
        self.extras = extras
        if column in audio:
            self._add_rows(table, column)
        elif _is_text(schema.field(column).type):
            self._add_manifest(table, column)
        else:
            raise ValueError(f"{table}: column {column!r} holds {schema.field(column).type}, expected paths or audio")

    def _add_manifest(self, table: str, column: str) -> None:
        folder = posixpath.dirname(table) if is_url(table) else os.path.dirname(os.path.abspath(table))
        for row in _read_table(table).to_pylist():
            path = row.pop(column)
            if not path:
                raise ValueError(f"{table}: a row has no {column}")
            source = path if is_url(path) or os.path.isabs(path) else f"{folder}/{path}"
            if path in self._files:
                raise ValueError(f"{table}: {path} occurs twice")
            size = UNKNOWN_MB if is_url(source) else _size_mb(source)
            self._add(Recording(path, source, posixpath.splitext(path)[1].lower(), row), size)

    def _add_rows(self, table: str, column: str) -> None:
        import pyarrow.parquet

        done = frozenset(int(row) for row in self._rows_done[table] if row.isdecimal())
        names = tuple(self.extras.names)
        if not _is_parquet(table):
            with open_file(table) as file:
                rows = sum(batch.num_rows for batch in _open_arrow(file))
            groups = [(range(0), 0, rows)]
        else:
            with open_file(table) as file:
                metadata = pyarrow.parquet.ParquetFile(file).metadata
            groups, first, start, mb = [], 0, 0, 0.0
            for group in range(metadata.num_row_groups):
                mb += metadata.row_group(group).total_byte_size / 1e6
                if mb >= self._task_mb or group == metadata.num_row_groups - 1:
                    count = sum(metadata.row_group(index).num_rows for index in range(first, group + 1))
                    groups.append((range(first, group + 1), start, count))
                    first, start, mb = group + 1, start + count, 0.0
        for row_groups, start, count in groups:
            own = frozenset(row for row in done if start <= row < start + count)
            self.held += len(own)
            self.missing += count - len(own)
            if len(own) < count:
                self.tasks.append(TableTask(table, tuple(row_groups), start, column, names, own))

    def _add(self, recording: Recording, megabytes: float) -> None:
        self._files[recording.path] = (recording, megabytes)

    def grouped_files(self) -> Iterator[FilesTask]:
        """Yield tasks of the listed files, without those that are done."""
        group: list[Recording] = []
        listed, size = 0, 0.0
        for recording, megabytes in self._files.values():
            listed, size = listed + 1, size + megabytes
            if recording.path in self._done:
                self.held += 1
            else:
                group.append(recording)
            if listed == TASK_FILES or size >= self._task_mb:
                if group:
                    self.missing += len(group)
                    yield FilesTask(group)
                group, listed, size = [], 0, 0.0
        if group:
            self.missing += len(group)
            yield FilesTask(group)


def shown_path(path: str) -> str:
    """Return a path as UTF-8 text: a byte of a name that is not UTF-8 becomes \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _size_mb(path: str) -> float:
    """Return a file's size in MB, or a guess if it is not there; reading it will fail later."""
    try:
        return os.stat(path).st_size / 1e6
    except (OSError, ValueError):
        return UNKNOWN_MB


def _expand(given: str) -> list[str]:
    """Return the files that a name or pattern of a table or shard selects, as absolute paths or addresses."""
    if is_url(given):
        return list(find_files(given))
    matches = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no such file: {given}")
    return [os.path.abspath(match) for match in matches]


def _is_parquet(table: str) -> bool:
    return table.lower().endswith(".parquet")


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _open_arrow(file: Any) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(file)


def _schema(table: str) -> Any:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        with open_file(table) as file:
            if _is_parquet(table):
                return pyarrow.parquet.read_schema(file)
            if table.lower().endswith(".arrow"):
                return _open_arrow(file).schema
            return pyarrow.csv.read_csv(file).schema  # of all rows: types are guessed from the values
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{table}: not readable as a table ({error})") from error


def _read_table(table: str) -> Any:
    import pyarrow.csv
    import pyarrow.parquet

    with open_file(table) as file:
        if _is_parquet(table):
            return pyarrow.parquet.read_table(file)
        return _open_arrow(file).read_all() if table.lower().endswith(".arrow") else pyarrow.csv.read_csv(file)
