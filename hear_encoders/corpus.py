"""Embedding many audio files: finding, decoding ahead, batching, collecting failures.

Decoding runs in threads while the encoder runs. Files of similar length are encoded together, so that their
last, shorter chunks share forward passes as their full ones do.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from hear_encoders.audio import audio_extensions, load_audio
from hear_encoders.embedder import Embedder, check_audio
from hear_encoders.outputs import Output


@dataclass(frozen=True)
class AudioFile:
    """A file to embed: where it is, and what it is called below the folder that was asked for."""

    path: Path
    name: str


@dataclass(frozen=True)
class Failure:
    """A file that could not be embedded, and why; the reason names it."""

    path: Path
    reason: str


def find_audio(inputs: Sequence[str]) -> list[AudioFile]:
    """Find the audio files that files, folders (recursive) and glob patterns stand for, each once, sorted.

    In folders, files count as audio by their extension; a file given by itself always counts. Names are
    relative to the folder if there is one input and it is a folder, else to the files' common parent.

    Raises:
        FileNotFoundError: an input that is not there, or that stands for no audio file.
    """
    extensions = audio_extensions()
    paths: dict[str, Path] = {}  # by absolute path, so that no file counts twice
    for given in inputs:
        matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
        found: list[Path] = []
        for match in map(Path, matches):
            if match.is_dir():
                found += [path for path in match.rglob("*") if path.suffix.lower() in extensions and path.is_file()]
            else:
                found.append(match)
        if not found:
            raise FileNotFoundError(f"no audio files in {given}" if matches else f"no such file or folder: {given}")
        paths.update((os.path.abspath(path), path) for path in found)
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        root = os.path.abspath(inputs[0])
    else:
        root = os.path.commonpath([os.path.dirname(absolute) for absolute in paths])
    return [
        AudioFile(path, Path(os.path.relpath(absolute, root)).as_posix()) for absolute, path in sorted(paths.items())
    ]


def embed_corpus(
    embedder: Embedder,
    files: Sequence[AudioFile],
    output: Output,
    *,
    timestamps: bool = False,
    batch_seconds: float = 120.0,
    jobs: int = 4,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Failure]:
    """Embed files and hand the embeddings to `output`, which is neither closed nor aborted here.

    Args:
        embedder: the model, on the device to run on.
        files: from `find_audio`.
        timestamps: timestamp embeddings instead of scene embeddings.
        batch_seconds: seconds of audio encoded together; a longer file is a batch of its own. About twice as
            much is decoded ahead.
        jobs: decoding threads.
        on_done: called with the number of files that are through, successful or not.

    Returns:
        The files that failed, sorted; the rest are done.
    """
    failures: list[Failure] = []
    with ThreadPoolExecutor(jobs) as pool:
        lengths = list(pool.map(_duration_s, files))
        by_length = sorted(zip(lengths, files), key=lambda pair: (pair[0], pair[1].path))
        decoded = _decode_ahead(pool, by_length, 2 * batch_seconds)
        for batch in _batches(decoded, batch_seconds):
            good: list[tuple[AudioFile, Tensor]] = []
            for file, future in batch:
                error = future.exception()
                if error is None:
                    good.append((file, future.result()))
                elif isinstance(error, (OSError, ValueError)):
                    failures.append(Failure(file.path, str(error)))
                else:
                    raise error
            try:
                embeddings = embedder.embed_batches([audio for _, audio in good], timestamps) if good else []
            except torch.OutOfMemoryError as error:
                failures += [
                    Failure(file.path, f"{file.path}: out of memory in a batch of {len(good)} files ({error})")
                    for file, _ in good
                ]
                embeddings = []
            for (file, audio), embedding in zip(good, embeddings):
                times = embedder.timestamps_ms(audio.shape[1]).numpy() if timestamps else None
                output.add(str(file.path), file.name, embedding[0].cpu().numpy(), times)
            on_done(len(batch))
    return sorted(failures, key=lambda failure: failure.path)


def _duration_s(file: AudioFile) -> float:
    """Length by the file's header; 0 for one that cannot be read, which decoding will find out."""
    try:
        return soundfile.info(str(file.path)).duration
    except soundfile.LibsndfileError:
        return 0.0


def _decode(file: AudioFile) -> Tensor:
    return check_audio(load_audio(file.path), name=str(file.path))


def _decode_ahead(
    pool: ThreadPoolExecutor, files: Iterable[tuple[float, AudioFile]], ahead_s: float
) -> Iterator[tuple[float, AudioFile, Future[Tensor]]]:
    """Decode in order, at most `ahead_s` seconds (and at least one file) further than what was taken."""
    pending: deque[tuple[float, AudioFile, Future[Tensor]]] = deque()
    pending_s = 0.0
    for seconds, file in files:
        while pending and pending_s + seconds > ahead_s:
            pending_s -= pending[0][0]
            yield pending.popleft()
        pending.append((seconds, file, pool.submit(_decode, file)))
        pending_s += seconds
    yield from pending


def _batches(
    decoded: Iterable[tuple[float, AudioFile, Future[Tensor]]], batch_seconds: float
) -> Iterator[list[tuple[AudioFile, Future[Tensor]]]]:
    """Group consecutive files up to `batch_seconds` in all."""
    batch: list[tuple[AudioFile, Future[Tensor]]] = []
    batch_s = 0.0
    for seconds, file, future in decoded:
        if batch and batch_s + seconds > batch_seconds:
            yield batch
            batch, batch_s = [], 0.0
        batch.append((file, future))
        batch_s += seconds
    if batch:
        yield batch
