"""From waveforms to embeddings: framing, normalisation, batching, timestamps.

One time step is one column of patches: 4 frames, 40 ms. Its embedding is the column's tokens, one per row of
bands, concatenated. Chunks of 200 frames (2 s) are encoded independently, so chunks of any clips share a
forward pass. Letters in shape comments: B clips, F frames, T time steps, E embedding size.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hear_encoders import released as reference
from hear_encoders.allocator import keep_freed_memory
from hear_encoders.nn import axlstm_offline as axlstm_chunks
from hear_encoders.nn.build import Encoder, is_as_built
from hear_encoders.nn.frontend import (
    BANDS,
    HOP,
    HOP_MS,
    SAMPLE_RATE,
    LogMel,
    clip_statistics,
    logmel_of_blocks,
    normalize,
    statistics_of_blocks,
)
from hear_encoders.threads import encode_side_by_side

Framing = Literal["exact", "reference"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Pooling = Literal["mean", "mean_std"]

DEFAULT_MAX_CHUNKS = 8
PEAK_WORTH_A_WARNING = 10.0  # samples are meant to lie in [-1, 1]
LARGEST_PEAK = 1e15  # beyond it the float32 power spectrum overflows
# A batch of more clips than this, none longer than a recording has channels, is a recording with its axes swapped.
MOST_TINY_CLIPS, MOST_CHANNELS = 1000, 8


class Chunk(NamedTuple):
    """A piece of a clip that goes through the encoder by itself."""

    frames: Tensor  # (F, bands) normalised log-mel
    steps: int  # how many of its time steps, from the first, belong to the clip


class Embedder(nn.Module):
    """An encoder with everything around it: what `load_model` returns.

    Args:
        encoder: from `build_encoder` or a checkpoint.
        framing: "exact": step i covers frames 4i..4i+3 and stands at their centre, 40 i + 15 ms; step times
            lie within the clip. Where the last step reaches past the clip's end, by up to 20 ms, the last frame is
            repeated; nothing else is padded. Frames are centred, so the STFT window of a chunk's
            last frames reaches up to 12.5 ms further, and at a clip's end meets its reflection.
            "reference": the released code's framing, with its zero-padded chunks, its regrouping of tokens and its
            drifting timestamps; needed to reproduce published numbers with published checkpoints.
        precision: what the encoder's matmuls run in. "auto" is float32 on the CPU and on MPS, bfloat16 on a
            CUDA device that has it, else float16. Results are float32 always.
        max_chunks: chunks of 2 s per forward pass; bounds memory, does not change the result. In float32 on a CPU,
            from as many as torch has threads, each thread takes chunks of its own through the encoder; with fewer,
            the threads share every operation.
        statistics: mean and standard deviation of log-mel to normalise with. None takes each clip's own over
            all its frames and bands, which is what the models are trained with.
        pooling: what a scene embedding is of the clip's timestamp embeddings: "mean", as in the papers, or "mean_std",
            with the standard deviation (over the steps, divided by their number) of each channel after it.
        compile: run the encoder through `torch.compile`: the first call takes a minute or more, and what it compiled
            is kept on disk (TORCHINDUCTOR_CACHE_DIR) for the next process. Chunks shorter than 2 s are not compiled,
            nor is an AxLSTM in float32 on the CPU, which has a faster form.

    Warns:
        UserWarning: half precision was chosen on an x86 CPU without AVX-512. It comes when something is embedded.

    Attributes:
        sample_rate: 16000, in Hz.
        timestamp_embedding_size: E, rows of patches x channels of a token.
        scene_embedding_size: the same, or twice that for "mean_std".

    Raises:
        ValueError: an option is none of the above.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        encoder: Encoder,
        *,
        framing: Framing = "exact",
        precision: Precision = "auto",
        max_chunks: int = DEFAULT_MAX_CHUNKS,
        statistics: Sequence[float] | None = None,
        pooling: Pooling = "mean",
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("framing", framing, get_args(Framing))
        _check_choice("pooling", pooling, get_args(Pooling))
        _check_choice("precision", precision, get_args(Precision))
        if type(compile) is not bool:
            raise ValueError(f"compile must be True or False, got {compile!r}")
        if type(max_chunks) is not int or max_chunks < 1:
            raise ValueError(f"max_chunks must be an integer of at least 1, got {max_chunks!r}")
        self.encoder = encoder
        self.framing = framing
        self.precision = precision
        self.max_chunks = max_chunks
        self.statistics = None if statistics is None else check_statistics(statistics)
        self.pooling = pooling
        self.compiles = compile
        self._compiled: tuple[Encoder, Callable[[Tensor], Tensor]] | None = None
        self.log_mel = LogMel()
        patches = encoder.config.patches
        if patches.bands != BANDS:
            raise ValueError(f"patches.bands must be {BANDS}, as many as the front end makes, got {patches.bands}")
        self.timestamp_embedding_size = patches.rows * encoder.config.dim
        self.scene_embedding_size = (2 if pooling == "mean_std" else 1) * self.timestamp_embedding_size
        self.step_ms = HOP_MS * patches.patch_frames
        self.first_step_ms = HOP_MS * (patches.patch_frames - 1) / 2  # centre of the first column's frames
        keep_freed_memory()

    @property
    def device(self) -> torch.device:
        """Where the weights are. Audio from elsewhere is brought here, and results back to it."""
        return self.encoder.cls_token.device

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """One embedding per clip: the mean of its timestamp embeddings, or what `pooling` says.

        Args:
            audio: (B, samples) or (samples,) floating point, 16 kHz mono in [-1, 1].

        Returns:
            (B, E) float32 on the audio's device, B = 1 for a single clip; (B, 2 E) for "mean_std".

        Raises:
            TypeError: not a tensor, or samples that are not floating point.
            ValueError: not one or two dimensions, nothing in it, or samples that are not finite.
        """
        return self.embed_batches([check_audio(audio)])[0].to(audio.device)

    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """One embedding per time step.

        Args, Raises: as `scene_embeddings`.

        Returns:
            Embeddings (B, T, E) and timestamps (B, T) in milliseconds, float32 on the audio's device.
        """
        batch = check_audio(audio)
        embeddings = self.embed_batches([batch], per_step=True)[0].to(audio.device)
        timestamps = self.timestamps_ms(batch.shape[1]).to(audio.device)
        return embeddings, timestamps.repeat(batch.shape[0], 1)

    def step_count(self, samples: int) -> int:
        """Number of time steps of a clip of this many samples.

        In exact framing those whose time lies within the clip, and at least one.
        """
        patches = self.encoder.config.patches
        if self.framing == "reference":
            return reference.step_count(samples, patches)
        first_sample, step_samples = HOP * (patches.patch_frames - 1) // 2, HOP * patches.patch_frames
        return max(1, (samples - first_sample) // step_samples + 1)

    def timestamps_ms(self, samples: int) -> Tensor:
        """When the steps of a clip of this many samples stand, in milliseconds: (T,) float32."""
        first_ms, step_ms = self.first_step_ms, self.step_ms
        if self.framing == "reference":
            first_ms, step_ms = 0.0, reference.step_ms(samples, self.encoder.config.patches)
        steps = torch.arange(self.step_count(samples), dtype=torch.float64, device="cpu")
        return (first_ms + step_ms * steps).float()

    def embed_batches(self, batches: Sequence[Tensor], per_step: bool = False) -> list[Tensor]:
        """Embed batches of different lengths together: their chunks share forward passes.

        Args:
            batches: tensors (B, samples), each as `check_audio` returns it.
            per_step: return timestamp embeddings; they stand at `timestamps_ms(samples)`.

        Returns:
            For each batch its scene embeddings (B, E) or (B, 2 E), or timestamp embeddings (B, T, E), float32 on
            the model's device.
        """
        self._check_weights()
        self._warn_of_slow_precision(stacklevel=4)
        # Not inference mode: autocast would cast all weights again at each pass, and results could not be trained on.
        with torch.no_grad():
            # Nothing after this waits for a GPU: it works while whoever called prepares the next batches.
            chunks_of_batch = [self._chunks(self._bring(batch)) for batch in batches]
            chunks = [chunk for batch in chunks_of_batch for chunk in batch]
            rows = sum(chunk.steps for chunk in chunks) if per_step else len(chunks)
            size = self.timestamp_embedding_size if per_step else self.scene_embedding_size
            result = torch.empty(rows, size, dtype=torch.float32, device=self.device)
            offsets = torch.tensor([0] + [chunk.steps for chunk in chunks], device="cpu").cumsum(0)
            for indices, embeddings in self._encode(chunks):
                row = torch.tensor(indices, device="cpu")
                if per_step:
                    row = (offsets[row][:, None] + torch.arange(embeddings.shape[1], device="cpu")).flatten()
                values = embeddings.flatten(0, 1) if per_step else self._pool_chunk(embeddings)
                result.index_copy_(0, self._bring(row), values)
        counts = [sum(chunk.steps for chunk in batch) if per_step else len(batch) for batch in chunks_of_batch]
        parts = [part.unflatten(0, (len(batch), -1)) for part, batch in zip(result.split(counts), batches)]
        if per_step:
            return parts
        return [self._pool_clip(part, self.step_count(batch.shape[1])) for part, batch in zip(parts, batches)]

    def embed_blocks(
        self, read: Callable[[], Iterable[Tensor]], per_step: bool = False, name: str = "audio"
    ) -> tuple[Tensor, int]:
        """Embed one long clip that need not fit into memory, in exact framing.

        Args:
            read: gives the clip from its beginning, in blocks (n,) of any length, also none. It is called twice where
                the clip's own statistics are to be found first.
            per_step: return timestamp embeddings; they are held in memory, 96 kB for a second.
            name: what to call the clip in messages.

        Returns:
            Scene embedding (1, E) or (1, 2 E), or timestamp embeddings (1, T, E), float32 on the CPU: what
            `embed_batches` gives for the whole clip, to rounding. And how many samples the clip has.

        Raises:
            TypeError, ValueError: as `check_audio`; no samples, or not exact framing.
        """
        self._check_weights()
        self._warn_of_slow_precision(stacklevel=3)
        if self.framing != "exact":
            raise ValueError(f"only exact framing goes through a clip in blocks, got {self.framing!r}")
        patches, samples, peak, done = self.encoder.config.patches, 0, 0.0, 0

        def blocks() -> Iterator[Tensor]:
            nonlocal samples, peak
            samples = 0
            for block in read():
                samples += len(block)
                if len(block):
                    batch, block_peak = checked_audio(block, name)
                    peak = max(peak, block_peak)
                    yield batch[0].to(self.device)

        parts, total = [], torch.zeros(1, self.scene_embedding_size, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            statistics = self.statistics or statistics_of_blocks(logmel_of_blocks(self.log_mel, blocks()))
            size = self.max_chunks * patches.chunk_frames
            for frames, last in _in_pieces(logmel_of_blocks(self.log_mel, blocks()), size):
                steps = self.step_count(samples) - done if last else size // patches.patch_frames
                chunks = self._cut(normalize(frames[None], *statistics), steps)
                done += steps
                for _, embeddings in self._encode(chunks):  # in order: all but the clip's last chunk are of equal shape
                    embeddings = embeddings.flatten(0, 1)  # (T, E)
                    if per_step:
                        parts.append(embeddings.cpu())
                    else:
                        values = embeddings.cpu().double()
                        powers = [values] if self.pooling == "mean" else [values, values**2]
                        total += torch.cat([power.sum(0) for power in powers])
        if done == 0:
            raise ValueError(f"{name}: there are no samples")
        warn_of_peak(peak, name, stacklevel=3)
        if per_step:
            return torch.cat(parts)[None], samples
        mean, *square = (total / done).split(self.timestamp_embedding_size, dim=1)
        deviation = [(value - mean**2).clamp(min=0).sqrt() for value in square]
        return torch.cat([mean, *deviation], dim=1).float(), samples

    def _chunks(self, audio: Tensor) -> list[Chunk]:
        """Frames of (B, samples) cut into chunks, clip by clip, equally many for each clip."""
        patches = self.encoder.config.patches
        steps = self.step_count(audio.shape[1])
        logmel = self.log_mel(audio)  # (B, F, bands)
        logmel = normalize(logmel, *(self.statistics or clip_statistics(logmel)))
        if self.framing == "reference":
            logmel = reference.pad_frames(logmel, patches)
        return self._cut(logmel, steps)

    def _cut(self, logmel: Tensor, steps: int) -> list[Chunk]:
        """Normalised frames (B, F, bands) cut into the chunks of so many steps, clip by clip."""
        patches = self.encoder.config.patches
        if self.framing == "exact":
            frames = steps * patches.patch_frames
            missing = frames - logmel.shape[1]
            if missing > 0:  # the last step reaches past the clip's end: repeat the last frame
                logmel = torch.cat([logmel, logmel[:, -1:].expand(-1, missing, -1)], dim=1)
            logmel = logmel[:, :frames]
        pieces = logmel.split(patches.chunk_frames, dim=1)
        kept = [min(patches.steps, steps - index * patches.steps) for index in range(len(pieces))]
        return [
            Chunk(piece[clip], keep) for clip in range(logmel.shape[0]) for piece, keep in zip(pieces, kept) if keep > 0
        ]

    def _encode(self, chunks: list[Chunk]) -> Iterator[tuple[list[int], Tensor]]:
        """Encode chunks of equal shape together; yield their indices and embeddings (chunks, T, E)."""
        patches = self.encoder.config.patches
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, chunk in enumerate(chunks):
            alike[chunk.frames.shape[0], chunk.steps].append(index)
        dtype = resolve_precision(self.precision, self.device)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            encode, threads = self._form(dtype)
            for (_, steps), indices in alike.items():
                for batch in _passes(indices, self.max_chunks, threads):
                    frames = torch.stack([chunks[index].frames for index in batch])
                    # Where fewer chunks than threads are left, the threads share every operation.
                    parts = threads if len(batch) % threads == 0 else 1
                    tokens = encode_side_by_side(encode, frames, parts)  # (chunks, N, D)
                    if self.framing == "reference":
                        embeddings = reference.regroup_tokens(tokens, patches)
                    else:
                        embeddings = tokens.unflatten(1, (-1, patches.rows)).flatten(2)  # time-major: (chunks, T, E)
                    yield batch, embeddings[:, :steps].float()

    def _form(self, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
        """The encoder in its form for this dtype, and in how many threads chunks may go through it side by side."""
        cpu = dtype is torch.float32 and self.device.type == "cpu"
        # What looks at operations, such as torch's counter of FLOPs, sees those of its own thread only.
        watched = _get_current_dispatch_mode() is not None
        threads = torch.get_num_threads() if cpu and not watched and is_as_built(self.encoder) else 1
        if cpu and axlstm_chunks.takes(self.encoder):
            return axlstm_chunks.ChunkEncoder(self.encoder), threads
        if self.compiles:
            return self._encode_compiled, 1
        return self.encoder, threads

    def _pool_chunk(self, embeddings: Tensor) -> Tensor:
        """What a scene embedding needs to know of a chunk's steps: (chunks, T, E) -> (chunks, E) sums, for "mean_std"
        (chunks, 2 E) with sums of squares about the chunk's own mean."""
        if self.pooling == "mean":
            return embeddings.sum(1)
        variance, mean = torch.var_mean(embeddings, dim=1, correction=0)
        return embeddings.shape[1] * torch.cat([mean, variance], dim=1)

    def _pool_clip(self, pooled: Tensor, steps: int) -> Tensor:
        """Scene embeddings of clips of so many steps from their pooled chunks, (B, chunks, E) or (B, chunks, 2 E)."""
        if self.pooling == "mean":
            return pooled.sum(1) / steps
        sums, squares = pooled.chunk(2, dim=2)
        mean = sums.sum(1, keepdim=True) / steps  # (B, 1, E)
        full = self.encoder.config.patches.steps
        steps_of_chunk = sums.new_full((sums.shape[1], 1), full)
        steps_of_chunk[-1:].fill_(steps - full * (len(steps_of_chunk) - 1))
        squares = squares + steps_of_chunk * (sums / steps_of_chunk - mean) ** 2  # about the clip's mean
        return torch.cat([mean[:, 0], (squares.sum(1) / steps).sqrt()], dim=1)

    def _encode_compiled(self, frames: Tensor) -> Tensor:
        """The encoder, compiled once for full chunks, however many; each shorter length would be compiled anew."""
        if frames.shape[1] < self.encoder.config.patches.chunk_frames:
            return self.encoder(frames)
        if self._compiled is None or self._compiled[0] is not self.encoder:
            self._compiled = self.encoder, torch.compile(self.encoder)
        if frames.shape[0] > 1:  # one chunk is a case of its own for torch
            torch._dynamo.maybe_mark_dynamic(frames, 0)
        return self._compiled[1](frames)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_compiled": None}  # a copy, or another process, compiles for itself

    def _bring(self, audio: Tensor) -> Tensor:
        """Audio on the model's device. A GPU fetches it by itself, while the CPU goes on."""
        if self.device.type == "cuda" and audio.device.type == "cpu":
            return audio.pin_memory().to(self.device, non_blocking=True)
        return audio.to(self.device)

    def _check_weights(self) -> None:
        dtype = self.encoder.cls_token.dtype
        if not dtype == self.log_mel.mel.dtype == torch.float32:
            raise ValueError(f"the model's weights are {dtype}: keep them float32, and choose half with precision=...")

    def _warn_of_slow_precision(self, stacklevel: int) -> None:
        half = resolve_precision(self.precision, self.device) is not torch.float32
        if half and self.device.type == "cpu" and _is_old_x86():
            warnings.warn(
                f"precision={self.precision!r} takes several times as long as 'float32' on a CPU without AVX-512",
                stacklevel=stacklevel,
            )


def _is_old_x86() -> bool:
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def _in_pieces(blocks: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, bool]]:
    """Frames (F, bands) regrouped into pieces of `size` frames, the last one of up to twice as many; is it the last?"""
    kept = None
    for block in blocks:
        kept = block if kept is None else torch.cat([kept, block])
        while len(kept) > 2 * size:
            yield kept[:size], False
            kept = kept[size:]
    if kept is not None:
        yield kept, True


def _passes(indices: list[int], most: int, threads: int) -> Iterator[list[int]]:
    """Cut into forward passes of at most so many chunks, for each thread equally many in all but the last."""
    even = len(indices) // threads * threads if most >= threads else 0
    size = most // threads * threads or most
    for first in range(0, even, size):
        yield indices[first : min(first + size, even)]
    for first in range(even, len(indices), most):
        yield indices[first : first + most]


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the encoder's matmuls for this choice on this device."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):  # the question is about the current device
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_audio(audio: Tensor, name: str = "audio") -> Tensor:
    """Return `audio` as a float32 batch (B, samples), or say clearly what is wrong with it.

    Args:
        audio: (B, samples) or (samples,) floating point.
        name: what to call it in messages, such as a file's path.

    Warns:
        UserWarning: samples far outside [-1, 1], as of 16-bit audio that was not scaled.

    Raises:
        TypeError: not a tensor, or samples that are not floating point.
        ValueError: not one or two dimensions, (samples, channels), nothing in it, or samples that are not finite.
    """
    batch, peak = checked_audio(audio, name)
    if audio.ndim == 2 and audio.shape[0] > MOST_TINY_CLIPS and audio.shape[1] <= MOST_CHANNELS:
        raise ValueError(
            f"{name} has shape {tuple(audio.shape)}: {audio.shape[0]} clips of {audio.shape[1]} samples. If it is"
            " (samples, channels), as soundfile reads it, average the channels, or read it with load_audio"
        )
    warn_of_peak(peak, name, stacklevel=4)
    return batch


def checked_audio(audio: Tensor, name: str) -> tuple[Tensor, float]:
    """As `check_audio`, with the largest magnitude in place of a warning of it, and of any number of rows.

    A stream knows how many rows it takes, and may take few samples at a time.
    """
    if not isinstance(audio, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of shape (clips, samples), got {type(audio).__name__}; "
            "clips of different lengths are embedded one by one"
        )
    if not audio.is_floating_point():
        raise TypeError(f"{name} must hold floating-point samples in [-1, 1], got {audio.dtype}")
    if audio.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (clips, samples) or (samples,), got {tuple(audio.shape)}")
    if audio.numel() == 0:
        raise ValueError(f"{name} is empty: got shape {tuple(audio.shape)}")
    batch = torch.atleast_2d(audio.detach()).float()
    lowest, highest = (value.item() for value in batch.aminmax())
    peak = max(-lowest, highest)
    if not (math.isfinite(lowest) and peak <= LARGEST_PEAK):  # aminmax hands a NaN on
        raise ValueError(f"{name} must hold finite samples in [-1, 1], got values from {lowest} to {highest}")
    return batch, peak


def warn_of_peak(peak: float, name: str, stacklevel: int) -> bool:
    """Warn of samples far outside [-1, 1]. Was there something to warn of?"""
    worth = peak > PEAK_WORTH_A_WARNING
    if worth:
        warnings.warn(
            f"{name} peaks at {peak:g}; samples are expected in [-1, 1]. 16-bit samples are divided by 32768.",
            stacklevel=stacklevel,
        )
    return worth


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_statistics(statistics: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation as floats. Raises ValueError where they are not that."""
    if not (
        isinstance(statistics, (list, tuple))
        and len(statistics) == 2
        and all(isinstance(value, Real) and math.isfinite(value) for value in statistics)
        and statistics[1] > 0
    ):
        raise ValueError(
            f"statistics must be [mean, standard deviation], finite numbers, the latter above 0; got {statistics!r}"
        )
    return float(statistics[0]), float(statistics[1])
