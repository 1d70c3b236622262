"""Embed many audio files: decode ahead, batch, write, collect failures.

Threads decode while the encoder runs. Files of similar length are encoded together, so that their last, shorter
segments share forward passes too. Long files are read and encoded piece by piece.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from hear_encoders.audio import AudioFile, duration_s, load_audio, read_audio
from hear_encoders.checks import check_audio
from hear_encoders.cli.outputs import Output
from hear_encoders.clips import LONG_S, CopyToCPU, decode_ahead, in_batches, prefetch
from hear_encoders.embedder import Embedder

NOT_FINITE = "the embedding is not finite; are the weights damaged?"


@dataclass(frozen=True)
class Failure:
    """A file that could not be embedded.

    Attributes:
        path: the file.
        reason: an error message that names the file.
    """

    path: Path
    reason: str


def embed_files(
    embedder: Embedder,
    files: Sequence[AudioFile],
    output: Output,
    *,
    timestamps: bool = False,
    batch_seconds: float = 120.0,
    jobs: int = 4,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Failure]:
    """Embed files and add the embeddings to `output`, which the caller closes or aborts.

    Args:
        embedder: the model, on the device to run on.
        files: from `search_audio`.
        timestamps: timestamp embeddings instead of scene embeddings.
        batch_seconds: seconds of audio encoded together. A longer file forms its own batch; one over 10 minutes is
            encoded piece by piece. About twice as much is decoded ahead.
        jobs: decoding threads.
        on_done: called with the number of files that have just been completed, successfully or not.

    Returns:
        The files that failed, sorted by path; all others are done.
    """
    failures: list[Failure] = []

    def write(file: AudioFile, samples: int, embedding: Tensor) -> None:
        if not embedding.isfinite().all():
            failures.append(Failure(file.path, f"{file.path}: {NOT_FINITE}"))
            return
        times = embedder.timestamps_ms(samples).numpy() if timestamps else None
        try:
            output.add(str(file.path), file.name, embedding[0].numpy(), times)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            failures.append(Failure(file.path, f"{file.path}: its name is too long for the output"))

    def encode(batch: list[tuple[AudioFile, Future[Tensor]]]) -> _EncodedBatch:
        decoded: list[tuple[AudioFile, Tensor]] = []
        for file, future in batch:
            error = future.exception()
            if error is None:
                decoded.append((file, future.result()))
            else:
                failures.append(_file_failure(file, error))
        try:
            embeddings = embedder.embed_batches([audio for _, audio in decoded], timestamps) if decoded else []
            return _EncodedBatch(len(batch), [(file, audio.shape[1]) for file, audio in decoded], embeddings)
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when out of memory
            failures.extend(_batch_failures([file for file, _ in decoded], error))
            return _EncodedBatch(len(batch), [], [])

    def write_batch(batch: _EncodedBatch) -> None:
        try:
            embeddings = batch.wait()
        except RuntimeError as error:  # from the GPU, which has been computing since
            failures.extend(_batch_failures([file for file, _ in batch.unwritten], error))
            batch.unwritten.clear()
        while batch.unwritten:
            write(*batch.unwritten[0], embeddings[-len(batch.unwritten)])
            batch.unwritten.popleft()
        on_done(batch.count)

    with ThreadPoolExecutor(jobs) as pool:
        lengths = list(pool.map(duration_s, [file.path for file in files]))
        by_length = sorted(zip(lengths, files), key=lambda pair: (pair[0], pair[1].path))
        long = [file for seconds, file in by_length if seconds > LONG_S and embedder.framer.is_local]
        decoded = decode_ahead(pool, _decode, by_length[: len(by_length) - len(long)], 2 * batch_seconds)
        # While a GPU encodes one batch, the previous one is written and the next one decoded.
        unwritten: deque[_EncodedBatch] = deque()
        try:
            for batch in in_batches(decoded, batch_seconds):
                unwritten.append(encode(batch))
                if len(unwritten) > 1:
                    write_batch(unwritten[0])
                    unwritten.popleft()
        finally:  # after an interruption too, finished embeddings are written
            for encoded in unwritten:
                write_batch(encoded)
        for file in long:
            try:
                read = partial(prefetch, pool, partial(read_audio, file.path))
                embedding, samples = embedder.embed_blocks(read, timestamps, name=str(file.path))
            except (OSError, ValueError, MemoryError, RuntimeError) as error:
                failures.append(_file_failure(file, error))
            else:
                write(file, samples, embedding)
            on_done(1)
    return sorted(failures, key=lambda failure: failure.path)


class _EncodedBatch:
    """The embeddings of a batch of files, which may still be on their way to the CPU.

    Attributes:
        count: number of files in the batch, including those that failed.
        unwritten: files whose embeddings are not written yet, with their numbers of samples.
    """

    def __init__(self, count: int, files: list[tuple[AudioFile, int]], embeddings: list[Tensor]) -> None:
        self.count, self.unwritten, self._copy = count, deque(files), CopyToCPU(embeddings)

    def wait(self) -> list[Tensor]:
        """Wait until the embeddings are on the CPU, and return them: (1, E) or (1, T, E) for each file."""
        return self._copy.wait()


def _batch_failures(files: list[AudioFile], error: BaseException) -> list[Failure]:
    reason = f"{type(error).__name__} in a batch of {len(files)} files: {error}"
    return [Failure(file.path, f"{file.path}: {reason}") for file in files]


def _file_failure(file: AudioFile, error: BaseException) -> Failure:
    if isinstance(error, (OSError, ValueError)):  # readable messages that name the file
        return Failure(file.path, str(error))
    return Failure(file.path, f"{file.path}: {type(error).__name__}: {error}")


def _decode(file: AudioFile) -> Tensor:
    return check_audio(load_audio(file.path), name=str(file.path))
