"""Clips of many kinds, one after the other: what `Embedder.encode` accepts and does.

A clip is a path, an array or tensor, a row of a datasets table or a torchcodec decoder. `encode_clips` decodes clips in
threads while the encoder runs, embeds them in batches of any lengths, and puts the results in order. The commands
decode and batch files with the same functions.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hear_encoders.audio import BLOCK_FRAMES, duration_s, read_audio, to_16_khz
from hear_encoders.checks import check_audio, check_dense
from hear_encoders.framing import Framing
from hear_encoders.nn.frontend import SAMPLE_RATE
from hear_encoders.pcm import check_sample_rate

# In exact framing, longer clips are not held in memory as a whole. They are decoded twice, first for their statistics.
LONG_S = 600.0

DECODING_THREADS = 4

UNKNOWN_S = 30.0  # a guess if the header does not tell, to bound how much is decoded ahead

# Zero and full scale of integer samples, as in WAV files.
PCM_RANGE = {"uint8": (128, 2**7), "int16": (0, 2**15), "int32": (0, 2**31)}

KINDS = "a path, a 1-D array or tensor, a row {'array', 'sampling_rate'}, or a torchcodec AudioDecoder"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """Audio that is still to be read.

    Attributes:
        name: its path, or its place in the list, for messages.
        seconds: its duration, according to its header; a guess if that does not tell.
        blocks: yields it from its beginning, in blocks (n,) float32 at 16 kHz, not yet checked.
    """

    name: str
    seconds: float
    blocks: Callable[[], Iterator[Tensor]]

    def load(self) -> Tensor:
        """Read the whole clip and check it: (1, samples).

        Raises:
            FileNotFoundError, OSError, ValueError: as `load_audio` and `check_audio`.
        """
        return check_audio(torch.cat(list(self.blocks())), name=self.name)


def _is_clip(given: object) -> bool:
    """Return whether this is one clip rather than several, going by its type."""
    single = isinstance(given, (str, os.PathLike, np.ndarray, Tensor, Mapping))
    return single or hasattr(given, "get_all_samples")


def as_clip(given: Any, name: str, sampling_rate: float | None = None) -> Clip:
    """Return any kind of clip as a `Clip`, without reading it.

    Args:
        given: a path; (samples,) array or tensor; a mapping with "array" and "sampling_rate"; or an object with
            `get_all_samples`, as torchcodec's decoders.
        name: its place, for messages; a path is its own name.
        sampling_rate: of an array or tensor, in Hz; None means 16000.

    Raises:
        TypeError: none of these, or samples of another type.
        ValueError: not one dimension, no samples, or an impossible sampling rate.
        IsADirectoryError: a folder.
    """
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        if os.path.isdir(path):
            raise IsADirectoryError(
                f"{path} is a folder: pass a list of its files, such as sorted(Path({path!r}).rglob('*.wav')), "
                "or use hear-embed"
            )
        return Clip(str(path), duration_s(path) or UNKNOWN_S, partial(read_audio, path))
    if hasattr(given, "get_all_samples"):  # torchcodec
        metadata = getattr(given, "metadata", None)
        seconds = getattr(metadata, "duration_seconds_from_header", None) or UNKNOWN_S
        return Clip(name, float(seconds), partial(_decoder_blocks, given, name))
    if isinstance(given, Mapping):
        if not {"array", "sampling_rate"} <= given.keys():
            raise TypeError(
                f"{name} has the keys {sorted(map(str, given))}, expected 'array' and 'sampling_rate': of a datasets "
                "table, pass the column with the audio, such as table['audio']"
            )
        array = given["array"]
        samples = np.asarray(array) if isinstance(array, (list, tuple)) else array
        return _array_clip(samples, name, given["sampling_rate"])
    return _array_clip(given, name, SAMPLE_RATE if sampling_rate is None else sampling_rate)


def _array_clip(samples: Any, name: str, sampling_rate: Any) -> Clip:
    if not isinstance(samples, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be {KINDS}; got {type(samples).__name__}")
    if isinstance(samples, Tensor):
        check_dense(samples, name)
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, Real):
        raise TypeError(f"{name}: sampling_rate must be a number of Hz, got {sampling_rate!r}")
    try:
        check_sample_rate(float(sampling_rate))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    dtype = str(samples.dtype).removeprefix("torch.")
    floating = samples.is_floating_point() if isinstance(samples, Tensor) else samples.dtype.kind == "f"
    if not floating and dtype not in PCM_RANGE:
        raise TypeError(f"{name} must hold floating-point samples in [-1, 1], or {', '.join(PCM_RANGE)}; got {dtype}")
    if samples.ndim != 1:
        raise ValueError(
            f"{name} has shape {tuple(samples.shape)}, expected (samples,): average channels, as in x.mean(0) for "
            "(channels, samples), and pass a batch of clips as list(x)"
        )
    if len(samples) == 0:
        raise ValueError(f"{name} is empty: got shape (0,)")
    return Clip(name, len(samples) / float(sampling_rate), partial(_array_blocks, samples, float(sampling_rate)))


def _array_blocks(samples: np.ndarray | Tensor, sampling_rate: float) -> Iterator[Tensor]:
    """Yield samples at any rate as float32 blocks at 16 kHz. Tensors at 16 kHz stay on their device."""
    zero, full_scale = PCM_RANGE.get(str(samples.dtype).removeprefix("torch."), (0, 1))
    if isinstance(samples, Tensor) and sampling_rate == SAMPLE_RATE:
        yield from ((block.float() - zero) / full_scale for block in samples.detach().split(BLOCK_FRAMES))
        return
    array = samples.detach().cpu().float().numpy() if isinstance(samples, Tensor) else samples

    def blocks() -> Iterator[tuple[np.ndarray, float]]:  # as long as those of a file, to be resampled bit for bit alike
        for first in range(0, len(array) + 1, BLOCK_FRAMES):
            with np.errstate(over="ignore"):  # the check of finite samples says more
                block = np.array(array[first : first + BLOCK_FRAMES], dtype=np.float32)
            yield (block - np.float32(zero)) / np.float32(full_scale), sampling_rate

    yield from map(torch.from_numpy, to_16_khz(blocks()))


def _decoder_blocks(decoder: Any, name: str) -> Iterator[Tensor]:
    samples = decoder.get_all_samples()  # data is (channels, samples) in [-1, 1]
    if samples.data.shape[-1] == 0:
        raise ValueError(f"{name}: holds no samples")
    return _array_blocks(samples.data.float().mean(0), float(samples.sample_rate))


class BatchEmbedder(Protocol):
    """The part of an `Embedder` that this module uses."""

    framer: Framing
    scene_embedding_size: int

    def timestamps_ms(self, samples: int) -> Tensor: ...

    def embed_batches(self, batches: Sequence[Tensor], per_step: bool) -> list[Tensor]: ...

    def embed_blocks(self, read: Callable[[], Iterable[Tensor]], per_step: bool, name: str) -> tuple[Tensor, int]: ...


def encode_clips(
    embedder: BatchEmbedder,
    inputs: Any,
    *,
    sampling_rate: float | None,
    timestamps: bool,
    batch_seconds: float,
    normalize: bool,
    show_progress_bar: bool | None,
) -> Any:
    """Embed one clip or many. Arguments, results and errors are those of `Embedder.encode`."""
    if isinstance(batch_seconds, bool) or not (isinstance(batch_seconds, (int, float)) and batch_seconds > 0):
        raise ValueError(f"batch_seconds must be a number of seconds above 0, got {batch_seconds!r}")
    single = _is_clip(inputs)
    results: dict[int, Any] = {}
    with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="hear_encoders.decode") as pool:
        clips, count = _number_clips(pool, [inputs] if single else inputs, sampling_rate, single)
        with _progress_bar(count, False if single and show_progress_bar is None else show_progress_bar) as bar:
            for index, samples, embedding in _embed_clips(embedder, pool, clips, timestamps, batch_seconds):
                values = embedding[0].numpy()
                if normalize:
                    length = np.linalg.norm(values, axis=-1, keepdims=True)
                    values = values / np.maximum(length, np.finfo(np.float32).tiny)
                results[index] = (values, embedder.timestamps_ms(samples).numpy()) if timestamps else values
                bar.update()
    in_order = [results[index] for index in range(len(results))]
    if single:
        return in_order[0]
    if timestamps:
        return in_order
    return np.stack(in_order) if in_order else np.empty((0, embedder.scene_embedding_size), np.float32)


def _number_clips(
    pool: ThreadPoolExecutor, inputs: Iterable[Any], sampling_rate: float | None, single: bool
) -> tuple[Iterable[tuple[float, tuple[int, Clip]]], int | None]:
    """Return each clip with its seconds and its index, and the number of clips, if it is known.

    A list is sorted by duration, so that last, shorter segments share forward passes too.

    Raises:
        TypeError: not several clips. Errors of `as_clip` come now for a list, later for an iterator.
    """

    def number_clip(index: int, given: Any) -> tuple[float, tuple[int, Clip]]:
        clip = as_clip(given, "audio" if single else f"inputs[{index}]", sampling_rate)
        return clip.seconds, (index, clip)

    if not isinstance(inputs, Iterable):
        raise TypeError(f"expected {KINDS}, or a list or iterator of these; got {type(inputs).__name__}")
    if isinstance(inputs, (list, tuple)):
        clips = list(pool.map(number_clip, range(len(inputs)), inputs))
        return sorted(clips, key=lambda clip: clip[0]), len(inputs)
    count = len(inputs) if isinstance(inputs, Sized) else None
    return (number_clip(index, given) for index, given in enumerate(inputs)), count


def _progress_bar(count: int | None, show: bool | None) -> Any:
    # Imported on use, since it is slow to import. In a notebook without widgets, tqdm.auto warns of that.
    if show is False:
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm

    # disable=None: only on a terminal, or in a notebook. Short work needs no bar.
    return tqdm(total=count, unit="clip", disable=None if show is None else not show, delay=1 if show is None else 0)


def _embed_clips(
    embedder: BatchEmbedder,
    pool: ThreadPoolExecutor,
    clips: Iterable[tuple[float, tuple[int, Clip]]],
    timestamps: bool,
    batch_seconds: float,
) -> Iterator[tuple[int, int, Tensor]]:
    """Embed clips in batches, and long ones in blocks.

    Args:
        pool: decodes ahead.
        clips: from `_number_clips`.

    Yields:
        Each clip's index, number of samples at 16 kHz, and embedding (1, E) or (1, T, E) on the CPU, in any order.
    """

    def load(numbered: tuple[int, Clip]) -> Tensor | None:  # None: to be read in blocks
        return None if numbered[1].seconds > LONG_S and embedder.framer.is_local else numbered[1].load()

    encoded: deque[tuple[list[tuple[int, int]], CopyToCPU]] = deque()

    def oldest() -> Iterator[tuple[int, int, Tensor]]:
        sizes, copies = encoded.popleft()
        yield from ((*size, embedding) for size, embedding in zip(sizes, copies.wait()))

    for batch in in_batches(decode_ahead(pool, load, clips, 2 * batch_seconds), batch_seconds):
        loaded = [(index, clip, future.result()) for (index, clip), future in batch]
        whole = [(index, audio) for index, _, audio in loaded if audio is not None]
        embeddings = embedder.embed_batches([audio for _, audio in whole], timestamps)
        encoded.append(([(index, audio.shape[1]) for index, audio in whole], CopyToCPU(embeddings)))
        if len(encoded) > 1:  # a GPU goes on with this batch while the previous one is used
            yield from oldest()
        for index, clip, audio in loaded:
            if audio is None:
                embedding, samples = embedder.embed_blocks(partial(prefetch, pool, clip.blocks), timestamps, clip.name)
                yield index, samples, embedding
    while encoded:
        yield from oldest()


def prefetch(pool: ThreadPoolExecutor, read: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    """Yield blocks of audio; while the caller works on one, the next is decoded."""
    blocks = read()
    following = pool.submit(next, blocks, None)
    while (block := following.result()) is not None:
        following = pool.submit(next, blocks, None)
        yield block


def decode_ahead(
    pool: ThreadPoolExecutor, decode: Callable[[Item], Any], items: Iterable[tuple[float, Item]], ahead_s: float
) -> Iterator[tuple[float, Item, Future[Any]]]:
    """Decode in order, at most `ahead_s` seconds (and at least one item) ahead of the caller.

    Args:
        items: each with its duration in seconds.
    """
    pending: deque[tuple[float, Item, Future[Any]]] = deque()
    pending_s = 0.0
    for seconds, item in items:
        while pending and pending_s + seconds > ahead_s:
            pending_s -= pending[0][0]
            yield pending.popleft()
        pending.append((seconds, item, pool.submit(decode, item)))
        pending_s += seconds
    yield from pending


def in_batches(
    decoded: Iterable[tuple[float, Item, Future[Any]]], batch_seconds: float
) -> Iterator[list[tuple[Item, Future[Any]]]]:
    """Group consecutive items into batches of at most `batch_seconds`, or of one longer item."""
    batch: list[tuple[Item, Future[Any]]] = []
    batch_s = 0.0
    for seconds, item, future in decoded:
        if batch and batch_s + seconds > batch_seconds:
            yield batch
            batch, batch_s = [], 0.0
        batch.append((item, future))
        batch_s += seconds
    if batch:
        yield batch


class CopyToCPU:
    """Tensors on their way to the CPU. A GPU copies them while it computes what comes next."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._on_gpu = bool(tensors) and tensors[0].is_cuda
        # Other devices than CUDA have no event to wait for, so their copies block.
        self._copies = [tensor.to("cpu", non_blocking=self._on_gpu) for tensor in tensors]
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """Wait until the tensors are on the CPU, and return them."""
        if self._on_gpu:
            self._copied.synchronize()
            # Clones are pageable; they free the pinned memory of the copies.
            self._on_gpu, self._copies = False, [copy.clone() for copy in self._copies]
        return self._copies
