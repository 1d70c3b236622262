"""The object that `load_model` returns: from waveforms to embeddings.

Log-mel frames are normalized, cut into segments of 2 s and encoded; each time step's tokens are concatenated, and a
clip's steps are pooled into its scene embedding. Segments are encoded independently, so segments of any clips share a
forward pass. Letters in shape comments: B clips, F frames, T time steps, E embedding size.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hear_encoders.checks import (
    check_audio,
    check_choice,
    check_layer,
    check_lengths,
    check_shape,
    check_statistics,
    validate_audio,
    warn_if_loud,
)
from hear_encoders.clips import encode_clips
from hear_encoders.execution import Execution, Precision, raise_mmap_threshold
from hear_encoders.framing import FRAMINGS, FramingName, Segment
from hear_encoders.nn.build import Encoder
from hear_encoders.nn.frontend import (
    BANDS,
    SAMPLE_RATE,
    clip_statistics,
    logmel_of_blocks,
    normalize,
    statistics_of_blocks,
)
from hear_encoders.nn.frontend_torchaudio import FRONTENDS, FrontendName
from hear_encoders.pooling import POOLINGS, PoolingName


class Embedder(nn.Module):
    """An encoder with everything around it, from waveforms to embeddings. `load_model` returns one.

    In float32 on a CPU, several threads run the encoder at once, and an AxLSTM runs from folded weights instead of its
    modules, in bfloat16 too. So forward hooks on an encoder's modules may be called in other threads, or not at all,
    and so may a `forward` that replaces a module's own without adding parameters: to use these, call `embedder.encoder`
    yourself, or set `encoder.mode` of an AxLSTM to "chunkwise". Change weights through the encoder's parameters, by an
    optimizer or `load_state_dict`; after writing to `parameter.data`, make a new `Embedder`.

    Args:
        encoder: from `build_encoder` or a checkpoint.
        framing: "exact": step i covers frames 4i to 4i + 3; its timestamp is their center, 40 i + 15 ms, and lies
            within the clip. Nothing is padded, except that the last frame is repeated where the last step reaches
            past the clip's end, by up to 20 ms. Frames are centered, so the STFT window of a segment's last frames
            reaches up to 12.5 ms further, and at a clip's end meets its reflection. "reference": the released code's
            framing, with zero-padded segments, regrouped tokens and drifting timestamps. Use it to reproduce
            published numbers with published checkpoints.
        precision: the dtype of the encoder's matmuls. "auto" is float32 on CPU and MPS, and on CUDA bfloat16, or
            float16 if the device lacks that. Results are always float32.
        max_segments: 2 s segments per forward pass; bounds memory, does not change the result. None is 8 on a CPU and
            60 on a GPU.
        layer: N embeds with the output of block N, from 1 to the encoder's depth, as it is, without the final norm.
            Several numbers concatenate these blocks' embeddings, in the order given. None is the last block's output
            after the final norm, as in the papers.
        statistics: mean and standard deviation of log-mel to normalize with. None takes each clip's own, over all
            its frames and bands, as in training.
        pooling: how a clip's time steps become its scene embedding: "mean", as in the papers, or "mean_std", which
            appends each channel's standard deviation over the steps (divided by their number).
        frontend: "own" computes the log-mel with torch alone. "torchaudio" computes the same through torchaudio, in
            float32, which gives the papers' numbers to the last bit; it needs the extra `torchaudio`. Streams always
            use the own one.
        compile: run the encoder through `torch.compile`. The first call takes a minute or more; compiled code is
            kept on disk (TORCHINDUCTOR_CACHE_DIR) for the next process. Segments shorter than 2 s are not compiled,
            and neither is an AxLSTM in float32 or bfloat16 on a CPU, which has a faster form.

    Warns:
        UserWarning: half precision on an x86 CPU without AVX-512; when something is embedded.

    Attributes:
        sample_rate: 16000, in Hz.
        timestamp_embedding_size: E, rows of patches times channels of a token, times the number of layers.
        scene_embedding_size: E, or 2 E for "mean_std".
        layers: the option `layer` as a tuple of numbers, or None.
        framer: the framing's implementation, see `hear_encoders.framing`.

    Raises:
        ValueError: an option is none of the above.
        ImportError: frontend="torchaudio", and torchaudio does not import.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        encoder: Encoder,
        *,
        framing: FramingName = "exact",
        precision: Precision = "auto",
        max_segments: int | None = None,
        layer: int | Sequence[int] | None = None,
        statistics: Sequence[float] | None = None,
        pooling: PoolingName = "mean",
        frontend: FrontendName = "own",
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_choice("frontend", frontend, tuple(FRONTENDS))
        check_choice("framing", framing, tuple(FRAMINGS))
        check_choice("pooling", pooling, tuple(POOLINGS))
        check_choice("precision", precision, get_args(Precision))
        if type(compile) is not bool:
            raise ValueError(f"compile must be True or False, got {compile!r}")
        if max_segments is not None and (type(max_segments) is not int or max_segments < 1):
            raise ValueError(f"max_segments must be an integer of at least 1, got {max_segments!r}")
        patches = encoder.config.patches
        if patches.bands != BANDS:
            raise ValueError(f"patches.bands must be {BANDS}, as many as the front end makes, got {patches.bands}")
        self.encoder = encoder
        self._framing = framing
        self.framer = FRAMINGS[framing](patches)
        self.layers = check_layer(layer, encoder.config.depth)
        self.execution = Execution(precision, max_segments, compile, self.layers)
        self.statistics = None if statistics is None else check_statistics(statistics)
        self._pooling = pooling
        self._pool = POOLINGS[pooling]()
        self.frontend = frontend
        self.log_mel = FRONTENDS[frontend]()
        self._layer_count = 1 if self.layers is None else len(self.layers)
        self.timestamp_embedding_size = self._layer_count * patches.rows * encoder.config.dim
        self.scene_embedding_size = self._pool.width * self.timestamp_embedding_size
        raise_mmap_threshold()

    @property
    def device(self) -> torch.device:
        """The device of the weights. Audio is moved there, and results move back to the audio's device."""
        return self.encoder.cls_token.device

    @property
    def framing(self) -> FramingName:
        """The option, as given. Make a new `Embedder` to change an option."""
        return self._framing

    @property
    def pooling(self) -> PoolingName:
        """The option, as given."""
        return self._pooling

    @property
    def precision(self) -> Precision:
        """The option, as given."""
        return self.execution.precision

    @property
    def max_segments(self) -> int:
        """The option, or its default on the model's device."""
        return self.execution.max_segments(self.device)

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return one embedding per clip: its timestamp embeddings, pooled.

        Args:
            audio: (B, samples) or (samples,) floating point, 16 kHz mono in [-1, 1].

        Returns:
            (B, E) float32 on the audio's device, B = 1 for a single clip; (B, 2 E) for "mean_std".

        Raises:
            TypeError: not a tensor, or samples that are not floating point.
            ValueError: not one or two dimensions, empty, or samples that are not finite.
        """
        return self.embed_batches([check_audio(audio)])[0].to(audio.device)

    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return one embedding per time step.

        Args, Raises: as for `scene_embeddings`.

        Returns:
            Embeddings (B, T, E) and timestamps (B, T) in milliseconds, float32 on the audio's device.
        """
        batch = check_audio(audio)
        embeddings = self.embed_batches([batch], per_step=True)[0].to(audio.device)
        timestamps = self.timestamps_ms(batch.shape[1]).to(audio.device)
        return embeddings, timestamps.repeat(batch.shape[0], 1)

    def forward(self, audio: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the embeddings of all time steps, with gradients, for fine-tuning: `model(audio, lengths)`.

        Without `lengths`, a whole row is a clip: zeros at its end count when it is normalized. With
        `lengths`, a row gives what its first `lengths[i]` samples give alone, whatever comes after them.

        Args:
            audio: (B, samples) or (samples,) floating point, 16 kHz mono in [-1, 1].
            lengths: (B,) integers, the numbers of samples of each clip before its padding.

        Returns:
            (B, T, E) float32 on the audio's device, T = `step_count(samples)`. With `lengths`, the steps of clip i are
            the first `step_count(lengths[i])`, and zeros follow. `pool` makes scene embeddings of them. Under
            `torch.no_grad()` the values are those of `timestamp_embeddings`.

        Raises:
            TypeError, ValueError: as for `scene_embeddings`, padding excepted; or `lengths` that do not fit.
        """
        check_shape(audio)
        batch = torch.atleast_2d(audio)
        rows = {batch.shape[1]: list(range(len(batch)))}
        if lengths is not None:
            counts = check_lengths(lengths, *batch.shape)
            rows = {count: [row for row, own in enumerate(counts) if own == count] for count in sorted(set(counts))}
            padding = torch.arange(batch.shape[1], device="cpu") >= torch.tensor(counts, device="cpu")[:, None]
            batch = batch.masked_fill(padding.to(batch.device), 0)
        check_audio(batch)
        self._check_weights(stacklevel=5)
        batch, steps = self._to_device(batch.float()), self.step_count(batch.shape[1])
        segments, first_steps = [], []  # each segment's first step is that row of (B T, E)
        for count, own in rows.items():
            pieces = self._segments(batch[own, :count])
            segments += pieces
            per_clip = len(pieces) // len(own)
            first_steps += [
                row * steps + index * self.encoder.config.patches.steps for row in own for index in range(per_clip)
            ]
        size = (len(batch) * steps, self.timestamp_embedding_size)
        result = torch.zeros(size, dtype=torch.float32, device=self.device)
        for indices, embeddings in self._encode(segments):
            first = torch.tensor([first_steps[index] for index in indices], device="cpu")
            row = (first[:, None] + torch.arange(embeddings.shape[1], device="cpu")).flatten()
            result = result.index_copy_(0, self._to_device(row), embeddings.flatten(0, 1))
        return result.unflatten(0, (-1, steps)).to(audio.device)

    def pool(self, embeddings: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Pool the time steps that `model(audio, lengths)` returns, with gradients.

        Args:
            embeddings: (B, T, E).
            lengths: (B,) as given to the model; None: all T steps are the clips'.

        Returns:
            Scene embeddings (B, E), or (B, 2 E) for "mean_std".
        """
        if lengths is None:
            return self._pool.finish(self._pool.summarize(embeddings), embeddings.shape[1])
        values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        steps = [self.step_count(samples) for samples in values]
        if len(steps) != len(embeddings) or max(steps) > embeddings.shape[1]:
            raise ValueError(f"embeddings of shape {tuple(embeddings.shape)} do not fit lengths {list(values)}")
        scenes = [
            self._pool.finish(self._pool.summarize(clip[None, :count]), count) for clip, count in zip(embeddings, steps)
        ]
        return torch.cat(scenes)

    def encode(
        self,
        inputs: Any,
        *,
        sampling_rate: float | None = None,
        timestamps: bool = False,
        batch_seconds: float = 120.0,
        normalize: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Embed one clip or many: files, arrays or rows of a datasets table, of any lengths, without padding.

        Args:
            inputs: one clip, or a list or iterator of clips, which may differ in kind and length. A clip is

                - the path of an audio file, at any sample rate, with any number of channels;
                - a NumPy array or tensor (samples,), floating point in [-1, 1], or uint8, int16 or int32 as in WAV
                  files, which are divided by their full scale;
                - a mapping with "array" and "sampling_rate", or a torchcodec `AudioDecoder`: what the audio column of
                  a `datasets` table holds.
            sampling_rate: of arrays and tensors, in Hz; None means 16000. They are resampled as files are.
            timestamps: return one embedding per time step instead of one per clip.
            batch_seconds: seconds of audio encoded together, and about twice as much decoded ahead. In exact framing
                a clip over 10 minutes is read and encoded in blocks. An iterator is read as far as needed.
            normalize: scale embeddings to length 1.
            show_progress_bar: None shows one on a terminal and in a notebook, for several clips.

        Returns:
            float32 arrays, in the order given: a scene embedding (E,) for one clip, (N, E) for N of them, or (2 E)
            for "mean_std"; equal to `scene_embeddings` of each clip, to rounding. With `timestamps`, a tuple
            `(embeddings, timestamps_ms)` of shapes (T, E) and (T,) for one clip, a list of tuples for several.

        Raises:
            FileNotFoundError, OSError: a file cannot be opened.
            TypeError, ValueError: a clip of another kind, not readable as audio, empty or not finite. Messages name
                the path, or the place in the list.
        """
        return encode_clips(
            self,
            inputs,
            sampling_rate=sampling_rate,
            timestamps=timestamps,
            batch_seconds=batch_seconds,
            normalize=normalize,
            show_progress_bar=show_progress_bar,
        )

    def step_count(self, samples: int) -> int:
        """Return the number of time steps of a clip of this many samples."""
        return self.framer.step_count(samples)

    def timestamps_ms(self, samples: int) -> Tensor:
        """Return the times of the steps of a clip of this many samples, in milliseconds: (T,) float32."""
        return self.framer.timestamps_ms(samples)

    def embed_batches(self, batches: Sequence[Tensor], per_step: bool = False) -> list[Tensor]:
        """Embed batches of different lengths together: their segments share forward passes.

        Args:
            batches: tensors (B, samples), each as `check_audio` returns it.
            per_step: return timestamp embeddings; `timestamps_ms(samples)` has their times.

        Returns:
            For each batch its scene embeddings (B, E) or (B, 2 E), or timestamp embeddings (B, T, E), float32 on
            the model's device.
        """
        self._check_weights(stacklevel=4)
        # Not inference mode: in it, autocast casts all weights at each pass, and results cannot be trained on.
        with torch.no_grad():
            # Nothing below waits for a GPU: it works while the caller prepares the next batches.
            segments_of_batch = [self._segments(self._to_device(batch)) for batch in batches]
            segments = [segment for batch in segments_of_batch for segment in batch]
            rows = sum(segment.steps for segment in segments) if per_step else len(segments)
            size = self.timestamp_embedding_size if per_step else self.scene_embedding_size
            result = torch.empty(rows, size, dtype=torch.float32, device=self.device)
            offsets = torch.tensor([0] + [segment.steps for segment in segments], device="cpu").cumsum(0)
            for indices, embeddings in self._encode(segments):
                row = torch.tensor(indices, device="cpu")
                if per_step:
                    row = (offsets[row][:, None] + torch.arange(embeddings.shape[1], device="cpu")).flatten()
                values = embeddings.flatten(0, 1) if per_step else self._pool.summarize(embeddings)
                result.index_copy_(0, self._to_device(row), values)
            counts = [sum(s.steps for s in batch) if per_step else len(batch) for batch in segments_of_batch]
            parts = [part.unflatten(0, (len(batch), -1)) for part, batch in zip(result.split(counts), batches)]
            if per_step:
                return parts
            scenes = []
            for summaries, batch, batch_segments in zip(parts, batches, segments_of_batch):
                steps = _step_counts([segment.steps for segment in batch_segments[: summaries.shape[1]]])  # of one clip
                summary = self._pool.merge(summaries, self._to_device(steps))
                scenes.append(self._pool.finish(summary, self.step_count(batch.shape[1])))
            return scenes

    def embed_blocks(
        self, read: Callable[[], Iterable[Tensor]], per_step: bool = False, name: str = "audio"
    ) -> tuple[Tensor, int]:
        """Embed one long clip that need not fit into memory, in exact framing.

        Args:
            read: returns the clip from its beginning, in blocks (n,) of any length, also empty ones. It is called
                twice if the clip's own statistics have to be found first.
            per_step: return timestamp embeddings; they are held in memory, 96 kB per second of audio.
            name: the clip's name in messages.

        Returns:
            The scene embedding (1, E) or (1, 2 E), or timestamp embeddings (1, T, E), float32 on the CPU: equal to
            `embed_batches` of the whole clip, to rounding. And the clip's number of samples.

        Raises:
            TypeError, ValueError: as for `check_audio`; no samples, or not exact framing.
        """
        self._check_weights(stacklevel=3)
        if not self.framer.is_local:
            raise ValueError(f"only exact framing can embed a clip in blocks, got {self.framing!r}")
        patches, samples, peak, done = self.encoder.config.patches, 0, 0.0, 0

        def blocks() -> Iterator[Tensor]:
            nonlocal samples, peak
            samples = 0
            for block in read():
                samples += len(block)
                if len(block):
                    batch, block_peak = validate_audio(block, name)
                    peak = max(peak, block_peak)
                    yield batch[0].to(self.device)

        parts, summary = [], torch.zeros(1, self.scene_embedding_size, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            statistics = self.statistics or statistics_of_blocks(logmel_of_blocks(self.log_mel, blocks()))
            size = self.max_segments * patches.chunk_frames
            for frames, last in _regroup(logmel_of_blocks(self.log_mel, blocks()), size):
                steps = self.step_count(samples) - done if last else size // patches.patch_frames
                for _, embeddings in self._encode(self.framer.cut(normalize(frames[None], *statistics), steps)):
                    # In order, since all segments but the clip's last have the same length.
                    count = embeddings.shape[0] * embeddings.shape[1]
                    embeddings = embeddings.flatten(0, 1)[None]  # (1, T, E)
                    if per_step:
                        parts.append(embeddings.cpu())
                    else:
                        both = torch.stack([summary, self._pool.summarize(embeddings).cpu().double()], dim=1)
                        summary = self._pool.merge(both, _step_counts([done, count]).double())
                    done += count
        if done == 0:
            raise ValueError(f"{name}: there are no samples")
        warn_if_loud(peak, name, stacklevel=3)
        if per_step:
            return torch.cat(parts, dim=1), samples
        return self._pool.finish(summary, done).float(), samples

    def _segments(self, audio: Tensor) -> list[Segment]:
        """Cut (B, samples) into segments of normalized log-mel, clip by clip, the same number for each clip."""
        logmel = self.log_mel(audio)  # (B, F, bands)
        logmel = normalize(logmel, *(self.statistics or clip_statistics(logmel)))
        return self.framer.cut(logmel, self.step_count(audio.shape[1]))

    def _encode(self, segments: list[Segment]) -> Iterator[tuple[list[int], Tensor]]:
        """Encode segments of equal shape together; yield their indices and embeddings (segments, T, E)."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, segment in enumerate(segments):
            alike[segment.frames.shape[0], segment.steps].append(index)
        for (_, steps), indices in alike.items():
            for batch in self.execution.batches(indices, self.encoder):
                frames = torch.stack([segments[index].frames for index in batch])
                tokens = self.execution.encode(self.encoder, frames)  # (segments, N, D)
                parts = tokens.chunk(self._layer_count, dim=2)  # one for each layer
                yield batch, torch.cat([self.framer.group(part) for part in parts], dim=2)[:, :steps].float()

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the model's device. A GPU copies it while the CPU continues."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and not tensor.requires_grad:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _check_weights(self, stacklevel: int) -> None:
        """Refuse weights that are not float32; warn of a precision that is slow here."""
        dtype = self.encoder.cls_token.dtype
        if not dtype == self.log_mel.mel.dtype == torch.float32:
            raise ValueError(f"the model's weights are {dtype}: keep them float32, and choose half with precision=...")
        if self.execution.is_slow(self.device):
            warnings.warn(
                f"precision={self.precision!r} takes several times as long as 'float32' on a CPU without AVX-512",
                stacklevel=stacklevel,
            )


def _step_counts(counts: list[int]) -> Tensor:
    """Return numbers of steps as `Pooling.merge` takes them: (S, 1) float32 on the CPU."""
    return torch.tensor(counts, dtype=torch.float32, device="cpu")[:, None]


def _regroup(blocks: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, bool]]:
    """Regroup frames (F, bands) into pieces of `size`, the last of up to twice that; yield each and if it is last."""
    kept = None
    for block in blocks:
        kept = block if kept is None else torch.cat([kept, block])
        while len(kept) > 2 * size:
            yield kept[:size], False
            kept = kept[size:]
    if kept is not None:
        yield kept, True
