"""Embedding many audio files: finding, decoding ahead, batching, collecting failures.

Decoding runs in threads while the encoder runs. Files of similar length are encoded together, so that their
last, shorter chunks share forward passes as their full ones do. Long ones are read and encoded piece by piece.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hear_encoders.audio import AudioFile, duration_s, load_audio, read_audio
from hear_encoders.cli.outputs import Output
from hear_encoders.embedder import Embedder, check_audio

# Longer files, in exact framing, are not held in memory as a whole; they are decoded twice, first for their statistics.
LONG_S = 600.0


@dataclass(frozen=True)
class Failure:
    """A file that could not be embedded, and why; the reason names it. Was it the machine, rather than the file?"""

    path: Path
    reason: str
    machine: bool = False


def embed_files(
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
        batch_seconds: seconds of audio encoded together; a longer file is a batch of its own, and one of over
            10 minutes goes through piece by piece. About twice as much is decoded ahead.
        jobs: decoding threads.
        on_done: called with the number of files that are through, successful or not.

    Returns:
        The files that failed, sorted; the rest are done.
    """
    failures: list[Failure] = []

    def add(file: AudioFile, samples: int, embedding: Tensor) -> None:
        times = embedder.timestamps_ms(samples).numpy() if timestamps else None
        try:
            output.add(str(file.path), file.name, embedding[0].numpy(), times)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            failures.append(Failure(file.path, f"{file.path}: its name is too long for the output"))

    def embed(batch: list[tuple[AudioFile, Future[Tensor]]]) -> _Embedded:
        good: list[tuple[AudioFile, Tensor]] = []
        for file, future in batch:
            error = future.exception()
            if error is None:
                good.append((file, future.result()))
            else:
                failures.append(_failure(file, error))
        lengths = [(file, audio.shape[1]) for file, audio in good]
        try:
            embeddings = embedder.embed_batches([audio for _, audio in good], timestamps) if good else []
            return _Embedded(len(batch), lengths, embeddings)
        except (MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            failures.extend(_failures_of_batch([file for file, _ in good], error))
            return _Embedded(len(batch), [], [])

    def take(batch: _Embedded) -> None:
        try:
            embeddings = batch.fetch()
        except RuntimeError as error:  # of a GPU that computed in the meantime
            failures.extend(_failures_of_batch([file for file, _ in batch.files], error))
            batch.files.clear()
        while batch.files:
            add(*batch.files[0], embeddings[-len(batch.files)])
            batch.files.popleft()
        on_done(batch.count)

    with ThreadPoolExecutor(jobs) as pool:
        lengths = list(pool.map(duration_s, [file.path for file in files]))
        by_length = sorted(zip(lengths, files), key=lambda pair: (pair[0], pair[1].path))
        long = [file for seconds, file in by_length if seconds > LONG_S and embedder.framing == "exact"]
        decoded = _decode_ahead(pool, by_length[: len(by_length) - len(long)], 2 * batch_seconds)
        # A GPU works on a batch while the one before is taken and written, and while the next is decoded.
        underway: deque[_Embedded] = deque()
        try:
            for batch in _batches(decoded, batch_seconds):
                underway.append(embed(batch))
                if len(underway) > 1:
                    take(underway[0])
                    underway.popleft()
        finally:  # also if that was interrupted: what is embedded is written
            for embedded in underway:
                take(embedded)
        for file in long:
            try:
                read = partial(_one_ahead, pool, partial(read_audio, file.path))
                embedding, samples = embedder.embed_blocks(read, timestamps, name=str(file.path))
            except (OSError, ValueError, MemoryError, RuntimeError) as error:
                failures.append(_failure(file, error))
            else:
                add(file, samples, embedding)
            on_done(1)
    return sorted(failures, key=lambda failure: failure.path)


class _Embedded:
    """Embeddings of a batch of files, on their way to the CPU.

    Attributes:
        count: files of the batch, also those that failed.
        files: those whose embeddings are yet to be written, with their numbers of samples.
    """

    def __init__(self, count: int, files: list[tuple[AudioFile, int]], embeddings: list[Tensor]) -> None:
        self.count, self.files = count, deque(files)
        self._on_gpu = bool(embeddings) and embeddings[0].is_cuda
        # Only of CUDA is there an event to wait for.
        self._embeddings = [embedding.to("cpu", non_blocking=self._on_gpu) for embedding in embeddings]
        if self._on_gpu:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(embeddings[0].device))

    def fetch(self) -> list[Tensor]:
        """Wait for the embeddings: (1, E) or (1, T, E) for each file."""
        if self._on_gpu:
            self._there.synchronize()
            self._on_gpu, self._embeddings = False, [embedding.clone() for embedding in self._embeddings]  # pageable
        return self._embeddings


def _failures_of_batch(files: list[AudioFile], error: BaseException) -> list[Failure]:
    reason = f"{type(error).__name__} in a batch of {len(files)} files: {error}"
    return [Failure(file.path, f"{file.path}: {reason}", True) for file in files]


def _failure(file: AudioFile, error: BaseException) -> Failure:
    machine = isinstance(error, (OSError, MemoryError, RuntimeError))
    if isinstance(error, (OSError, ValueError)):  # in words for people, with the file's name
        return Failure(file.path, str(error), machine)
    return Failure(file.path, f"{file.path}: {type(error).__name__}: {error}", machine)


def _one_ahead(pool: ThreadPoolExecutor, read: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    """Blocks of audio; while one is worked on, the next is decoded."""
    blocks = read()
    following = pool.submit(next, blocks, None)
    while (block := following.result()) is not None:
        following = pool.submit(next, blocks, None)
        yield block


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
