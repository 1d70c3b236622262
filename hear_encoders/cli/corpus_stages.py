"""The stages of `hear-embed-corpus`: decode, embed, write. Ray Data runs them, and passes tables from one to the next.

A decoding task turns its recordings into *parts*: consecutive recordings with about `part_seconds` of audio together.
A part is embedded by one worker and becomes one file, whose name is a hash of the paths in it. What a part holds
depends on nothing but the inputs. So whenever Ray, or a second launch, repeats a stage, it writes the same file again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hear_encoders.audio import load_audio, probe_s, read_audio
from hear_encoders.checks import check_audio
from hear_encoders.cli.corpus_inputs import Recording, Task
from hear_encoders.cli.embed_files import NOT_FINITE
from hear_encoders.cli.options import embedding_settings, load_embedder
from hear_encoders.clips import LONG_S, CopyToCPU, prefetch
from hear_encoders.embedder import Embedder
from hear_encoders.framing import Framing
from hear_encoders.nn.frontend import SAMPLE_RATE
from hear_encoders.storage import Folder, local_copy

ERRORS = "errors"
ROW_GROUP = 1 << 14  # rows of Parquet

# Longer files are not decoded ahead: the worker that embeds one reads it block by block.
MAX_DECODED_S = 3600.0

Result = TypeVar("Result")


@dataclass
class Part:
    """A part without its audio. The lists have an entry for each recording that was decoded.

    Attributes:
        paths: keys.
        samples: numbers of samples at 16 kHz; 0 for a recording that the worker is to read itself.
        extras: values of the columns that are carried through.
        source: where the worker is to read the part's only recording; empty if its audio is here.
        failures: paths and reasons.
        warnings: about recordings that were read all the same.
        worker: name of the worker that has embedded it.
        began, ended: when it did, in seconds since 1970.
    """

    paths: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    failures: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    worker: str = ""
    began: float = 0.0
    ended: float = 0.0

    def drop(self, index: int, reason: str) -> None:
        """Make a recording a failure."""
        del self.samples[index], self.extras[index]
        self.failures.append((self.paths.pop(index), reason))


def to_row(part: Part, values: np.ndarray) -> Any:
    """Return a part with its audio or embeddings as a pyarrow table of one row."""
    import pyarrow

    offsets = pyarrow.array([0, values.size], pyarrow.int64())
    column = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(values.reshape(-1)))
    return pyarrow.table({"part": [pickle.dumps(part)], "values": column})


def from_row(table: Any) -> tuple[Part, np.ndarray]:
    """Return what `to_row` was given, the values flat and read-only."""
    return pickle.loads(table["part"][0].as_py()), table["values"][0].values.to_numpy(zero_copy_only=True)


def decode(table: Any, part_seconds: float, is_local: bool) -> Iterator[Any]:
    """Decode the recordings of the tasks in a table's rows, and yield a row for each part.

    Args:
        part_seconds: a part ends with the recording that reaches this.
        is_local: long recordings can be embedded in blocks, see `hear_encoders.framing`.
    """
    for pickled in table["task"].to_pylist():
        yield from _parts(pickle.loads(pickled), part_seconds, is_local)


def _parts(task: Task, part_seconds: float, is_local: bool) -> Iterator[Any]:
    def load(recording: Recording, path: Path) -> np.ndarray | None:  # (samples,); None: long
        # Content that came with a shard or a table is in memory already.
        if is_local and isinstance(recording.source, str) and probe_s(path) > MAX_DECODED_S:
            return None
        return check_audio(load_audio(path), name=str(path))[0].numpy()

    nothing = np.zeros(0, np.float32)
    part, audio = Part(), [nothing]
    for recording in task.recordings():
        try:
            samples, caught = read(recording, load)
        except UnreadableError as error:
            part.failures.append((recording.path, str(error)))
            continue
        if samples is None:
            assert isinstance(recording.source, str)
            yield to_row(Part([recording.path], [0], [recording.extras], recording.source), nothing)
            continue
        part.paths.append(recording.path)
        part.samples.append(len(samples))
        part.extras.append(recording.extras)
        part.warnings += caught
        audio.append(samples)
        if sum(part.samples) >= part_seconds * SAMPLE_RATE:
            yield to_row(part, np.concatenate(audio))
            part, audio = Part(), [nothing]
    if part.paths or part.failures:
        yield to_row(part, np.concatenate(audio))


class UnreadableError(ValueError):
    """A recording that cannot be read. The message names it."""


def read(recording: Recording, function: Callable[[Recording, Path], Result]) -> tuple[Result, list[str]]:
    """Return what a function makes of a recording and the path of its file, and the warnings it gave.

    Raises:
        UnreadableError: for any error, since storage libraries raise many kinds.
    """
    copied = ""

    def named(text: str) -> str:
        for place in (copied, recording.source):
            text = text.replace(place, recording.path) if place and isinstance(place, str) else text
        return text if recording.path in text else f"{recording.path}: {text}"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with local_copy(recording.source, recording.suffix) as path:
                copied = str(path)
                result = function(recording, path)
        except Exception as error:
            is_plain = isinstance(error, (OSError, ValueError))
            raise UnreadableError(named(str(error) if is_plain else f"{type(error).__name__}: {error}")) from error
    return result, [named(str(warning.message)) for warning in caught]


class Embed:
    """A worker: embeds parts with a model that it loads once.

    Args:
        options: of the command.
        get_checkpoint: returns the content of the files of the weights.
        settings: of the output, which this worker's must equal.

    Raises:
        ValueError: its settings differ, as on a machine with another version of this package.
    """

    def __init__(
        self, options: argparse.Namespace, get_checkpoint: Callable[[], dict[str, bytes]], settings: dict[str, Any]
    ) -> None:
        self._options = options
        self._embedder = load_checkpointed(options, get_checkpoint())
        own = model_settings(self._embedder, options)
        differing = [name for name in own if own[name] != settings[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{socket.gethostname()} would embed with {name} = {own[name]!r}, the others with {settings[name]!r}"
            )
        self._pool = ThreadPoolExecutor(1)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, table: Any) -> Any:
        """Embed the part in a row: return it with its embeddings, (E,) or (T, E) of each recording, flat."""
        part, samples = from_row(table)
        part.worker, part.began = self._name, time.time()
        results = self._embed_long(part) if part.source else self._embed(part, samples)
        for index in reversed(range(len(results))):
            result = results[index]
            if isinstance(result, str):
                part.drop(index, result)
            elif not np.isfinite(result).all():
                part.drop(index, f"{part.paths[index]}: {NOT_FINITE}")
            else:
                continue
            del results[index]
        part.ended = time.time()
        values = np.concatenate([np.zeros(0, np.float32), *(np.ravel(result) for result in results)])
        return to_row(part, values.astype(np.float16) if self._options.half else values)

    def _embed_long(self, part: Part) -> list[np.ndarray | str]:
        def embed(recording: Recording, path: Path) -> Tensor:
            blocks = partial(prefetch, self._pool, partial(read_audio, path))
            embedding, part.samples[0] = self._embedder.embed_blocks(blocks, self._options.timestamps, str(path))
            return embedding

        recording = Recording(part.paths[0], part.source, os.path.splitext(part.source)[1].lower())
        try:
            embedding, caught = read(recording, embed)
        except UnreadableError as error:
            return [str(error)]
        part.warnings += caught
        return [embedding[0].numpy()]

    def _embed(self, part: Part, samples: np.ndarray) -> list[np.ndarray | str]:
        """Return each recording's embedding, or why it has none."""
        ends = np.cumsum(part.samples, dtype=np.int64)
        clips = [torch.from_numpy(clip.copy())[None] for clip in np.split(samples, ends[:-1])] if part.paths else []
        results: list[np.ndarray | str] = [""] * len(clips)
        by_length = sorted(range(len(clips)), key=lambda index: clips[index].shape[1])
        copies = []  # of a GPU's results, which arrive while it goes on
        for batch in _batches(by_length, part.samples, self._options.batch_seconds):
            embeddings = self._embed_batch([clips[index] for index in batch])
            copies.append((batch, CopyToCPU([value for value in embeddings if isinstance(value, Tensor)]), embeddings))
        for batch, copy, embeddings in copies:
            arrived = iter(copy.wait())
            for index, value in zip(batch, embeddings):
                is_tensor = isinstance(value, Tensor)
                results[index] = next(arrived)[0].numpy() if is_tensor else f"{part.paths[index]}: {value}"
        return results

    def _embed_batch(self, clips: list[Tensor]) -> list[Tensor | str]:
        """Embed clips together; if there is not enough memory for that, one by one."""
        per_step = self._options.timestamps
        try:
            if len(clips) == 1 and clips[0].shape[1] > LONG_S * SAMPLE_RATE and self._embedder.framer.is_local:
                return [self._embedder.embed_blocks(partial(clips[0][0].split, 1 << 18), per_step)[0]]
            return list(self._embedder.embed_batches(clips, per_step))
        except (MemoryError, torch.OutOfMemoryError) as error:
            if len(clips) == 1:
                return [f"{type(error).__name__}: {error}"]
        return [result for clip in clips for result in self._embed_batch([clip])]


def _batches(indices: Sequence[int], samples: Sequence[int], batch_seconds: float) -> Iterator[list[int]]:
    """Group consecutive indices into batches of at most `batch_seconds`, or of one longer recording."""
    batch: list[int] = []
    for index in indices:
        if batch and sum(samples[other] for other in batch) + samples[index] > batch_seconds * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def write(table: Any, output: str, extras: Any, framer: Framing, timestamps: bool, size: int) -> Any:
    """Write the part in a table's row, and return a row with what the driver is told of it.

    Args:
        output: path or address of the folder.
        extras: pyarrow schema of the columns that are carried through.
        framer: of the model.
        timestamps: there is an embedding per step.
        size: E.
    """
    import pyarrow.parquet

    part, values = from_row(table)
    folder = Folder(output)
    if part.paths:
        rows = _rows(part, values.reshape(-1, size), extras, framer if timestamps else None)
        with folder.write(f"{part_name(part.paths)}.parquet") as file:
            pyarrow.parquet.write_table(rows, file, use_dictionary=["path"], row_group_size=ROW_GROUP)
    if part.failures:
        name = part_name([path for path, _ in part.failures])
        with folder.write(f"{ERRORS}/_{name}.jsonl") as file:
            for path, reason in part.failures:
                file.write(f"{json.dumps({'path': path, 'reason': reason})}\n".encode())
    report = {
        "files": len(part.paths),
        "seconds": sum(part.samples) / SAMPLE_RATE,
        "failures": [reason for _, reason in part.failures],
        "warnings": part.warnings,
        "worker": part.worker,
        "began": part.began,
        "ended": part.ended,
    }
    return pyarrow.table({"report": [json.dumps(report)]})


def _rows(part: Part, embeddings: np.ndarray, extras: Any, framer: Framing | None) -> Any:
    """Return a part's rows as a table, with timestamps if there is a framer.

    Args:
        embeddings: (recordings, E), or (sum of T, E).
    """
    import pyarrow

    times = [framer.timestamps_ms(samples).numpy() for samples in part.samples] if framer else []
    recording = np.repeat(np.arange(len(part.paths)), [len(own) for own in times] or 1)
    columns = {
        "path": pyarrow.array(part.paths, pyarrow.string()).take(recording),
        "duration_s": np.array(part.samples)[recording] / SAMPLE_RATE,
    }
    if framer:
        columns["timestamp_ms"] = np.concatenate(times)
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(embeddings.reshape(-1), embeddings.shape[1])
    table = pyarrow.table(columns)
    carried = pyarrow.Table.from_pylist(part.extras, schema=extras).take(recording)
    for field_, values in zip(extras, carried.columns):
        table = table.append_column(field_, values)
    return table


def part_name(paths: Sequence[str]) -> str:
    """Return the name, without a suffix, of the file with these recordings."""
    return f"part-{hashlib.blake2b(json.dumps(list(paths)).encode(), digest_size=10).hexdigest()}"


def load_checkpointed(options: argparse.Namespace, checkpoint: dict[str, bytes]) -> Embedder:
    """Load the model with weights given as the content of their files."""
    with tempfile.TemporaryDirectory(prefix="hear-weights-") as folder:
        for name, content in checkpoint.items():
            Path(folder, name).write_bytes(content)
        own = argparse.Namespace(**{**vars(options), "weights": folder, "revision": None})
        return load_embedder(own)


def model_settings(embedder: Embedder, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the values in the output depend on, as plain JSON values."""
    settings = embedding_settings(embedder, options.model, Path())
    del settings["root"]  # paths are complete
    return {**settings, "timestamps": options.timestamps, "half": options.half}


def settings_or_error(options: argparse.Namespace, checkpoint: dict[str, bytes]) -> dict[str, Any] | str:
    """Return `model_settings` of the model on this machine, or why it cannot be loaded."""
    try:
        return model_settings(load_checkpointed(options, checkpoint), options)
    except (OSError, ValueError) as error:
        return str(error)


def done_paths(folder: Folder) -> set[str]:
    """Return the paths of all recordings that the output holds, or that have failed."""
    import pyarrow.parquet

    def paths_in(name: str) -> set[str]:
        with folder.open(name) as file:
            table = pyarrow.parquet.read_table(file, columns=["path"], read_dictionary=["path"])
        return {path for chunk in table["path"].chunks for path in chunk.dictionary.to_pylist()}

    done: set[str] = set()
    with ThreadPoolExecutor(16) as pool:
        for paths in pool.map(paths_in, [name for name in folder.names() if name.endswith(".parquet")]):
            done |= paths
    for name in folder.names(ERRORS):
        with folder.open(f"{ERRORS}/{name}") as file:
            done |= {json.loads(line)["path"] for line in file}
    return done
