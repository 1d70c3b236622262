"""AxLSTM on audio that is still arriving: push samples as they come, get embeddings 40 ms by 40 ms.

A stream gives the numbers of `Embedder.timestamp_embeddings` in exact framing, so it has the same segments: every 2 s
the encoder starts over, with its cls token, an empty memory and the first position. Inside a segment, an mLSTM without
flip only looks back, and its state has a constant size.

This module handles samples, log-mel, normalization and time; `hear_encoders.nn.axlstm_online` runs the encoder.
Letters in shape comments: B streams, T time steps, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hear_encoders.checks import check_dense, check_statistics, validate_audio, warn_if_loud
from hear_encoders.embedder import Embedder
from hear_encoders.execution import call_on_one_core
from hear_encoders.framing import ExactFraming
from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.nn.axlstm_online import OnlineEncoder
from hear_encoders.nn.frontend import (
    BANDS,
    FRAMES_BEFORE,
    HOP,
    LOG_OFFSET,
    SAMPLE_RATE,
    SHORTEST_CLIP,
    WINDOW,
    LogMel,
    normalize,
)

DEFAULT_WARM_UP_S = 2.0

# Samples past a step's end that its last frame's window reaches.
LOOKAHEAD = WINDOW // 2 - HOP

# Most steps encoded at once: enough for efficient matmuls, and few enough for float32 sums over the gates.
STEPS_AT_ONCE = 5

# Log-mel of silence. Sums are taken relative to it, so that silence has a variance of exactly zero.
SILENCE = math.log(LOG_OFFSET)


class AxLSTMStream:
    """One or several streams of audio through an AxLSTM.

    Example:
        stream = AxLSTMStream(model)
        for block in blocks:  # (samples,) each, of any length
            embeddings, timestamps_ms = stream.push(block)  # (1, steps, E), (1, steps); often none, or several
        embeddings, timestamps_ms = stream.finish()

    The split into blocks does not change the result. A step's last STFT window reaches 2.5 ms past its 40 ms, so step i
    is emitted 40 (i + 1) + 2.5 ms after the beginning. `finish` returns the remaining step, if there is one, framed as
    at the end of a clip.

    With fixed statistics, the embeddings equal `model.timestamp_embeddings` of the whole audio. Otherwise the stream
    uses running statistics: it emits nothing for the first `warm_up_s`, then all steps of the warm-up at once,
    normalized with the mean and standard deviation over all their frames and bands. Each later step is normalized with
    the statistics of all steps up to and including itself. They continue across segments.

    The stream copies the weights, so later changes to the model have no effect on it. It always computes in float32.
    Use each object from one thread at a time. On a CPU it computes on one core, in a helper thread if torch is set to
    use more; streams in several threads run side by side.

    Args:
        model: an AxLSTM without flip in exact framing, from `hear_axlstm.load_model`. The stream runs on its device.
        streams: B, the number of streams that go through the model together, in step.
        statistics: mean and standard deviation of log-mel to normalize with. None takes the model's
            (`load_model(..., statistics=...)`), and running ones if it has none.
        warm_up_s: seconds of warm-up for running statistics, rounded up to whole steps, at least one. No effect with
            fixed statistics.

    Attributes:
        streams: B.
        statistics: the fixed mean and standard deviation, or None if they are running.
        timestamp_embedding_size: E, as the model's.

    Raises:
        TypeError: `model` is not from `load_model`.
        ValueError: the model cannot be streamed (a transformer, flip, reference framing, weights that are not
            float32), or an option is out of range.
    """

    def __init__(
        self,
        model: Embedder,
        *,
        streams: int = 1,
        statistics: Sequence[float] | None = None,
        warm_up_s: float = DEFAULT_WARM_UP_S,
    ) -> None:
        encoder = streamable_encoder(model)
        if type(streams) is not int or streams < 1:
            raise ValueError(f"streams must be an integer of at least 1, got {streams!r}")
        if isinstance(warm_up_s, bool) or not (isinstance(warm_up_s, (int, float)) and 0 <= warm_up_s < math.inf):
            raise ValueError(f"warm_up_s must be a finite number of seconds of at least 0, got {warm_up_s!r}")
        self.streams = streams
        self.statistics = model.statistics if statistics is None else check_statistics(statistics)
        self.timestamp_embedding_size = model.timestamp_embedding_size
        self._patches = model.encoder.config.patches
        self._framing = ExactFraming(self._patches)
        self._warm_up_steps = max(1, math.ceil(warm_up_s * SAMPLE_RATE / self._framing.step_samples))
        self._device = device = model.device
        self._log_mel = LogMel().to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # whatever the caller has switched on
            self._encoder = OnlineEncoder(encoder, streams, model.layers)
        self._received = 0
        # Keep only the samples that later frames need.
        kept = HOP * FRAMES_BEFORE + max(self._framing.step_samples + LOOKAHEAD, SHORTEST_CLIP) - 1
        self._tensors = {"samples": torch.zeros(streams, kept, dtype=torch.float32, device=device)}
        if self.statistics is None:
            wide = _wide(device)  # for sums over days
            frames = self._warm_up_steps * self._patches.patch_frames
            self._tensors["sums"] = torch.zeros(streams, 2, dtype=wide, device=device)  # of values, of their squares
            self._tensors["warm_up"] = torch.zeros(streams, frames, BANDS, dtype=torch.float32, device=device)
        self._tensors.update(self._encoder.state)
        self.reset()

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of everything the stream remembers, as tensors whose shapes do not depend on the audio.

        Save them with `safetensors` or `torch.save`, and pass them to `load_state` of another stream with the same
        model and options.
        """
        received = torch.tensor(self._received, dtype=torch.int64, device="cpu")
        return {"received": received, **{name: tensor.clone() for name, tensor in self._tensors.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved `state`; its tensors may be on any device.

        Raises:
            TypeError: not a mapping of names to tensors.
            ValueError: a tensor is missing, unknown, or has a different shape or dtype from this stream's. The stream
                is left unchanged.
        """
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError(f"state must be a mapping of tensors, as a stream's `state` is; got {type(state).__name__}")
        own = self.state
        for name in [*own, *state]:
            if name not in state:
                raise ValueError(f"state: missing tensor {name!r}; is it from a stream with other options?")
            if name not in own:
                raise ValueError(f"state: unknown tensor {name!r}; is it from a stream with other options?")
            got, expected = state[name], own[name]
            if got.shape != expected.shape or got.dtype != expected.dtype:
                raise ValueError(
                    f"state: {name!r} must have shape {tuple(expected.shape)} and dtype {expected.dtype}, "
                    f"got {tuple(got.shape)} and {got.dtype}"
                )
        received = int(state["received"])
        if received < 0:
            raise ValueError(f"state: 'received' must be a number of samples, got {received}")
        self._received = received
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])

    def reset(self) -> None:
        """Forget everything: the next sample is the first one."""
        self._received = 0
        self._warned = False
        for tensor in self._tensors.values():
            tensor.zero_()
        self._encoder.reset()

    def push(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next samples, the same number for each stream, and return the steps they complete.

        Args:
            samples: (streams, n), or (n,) for a single stream, floating point, 16 kHz mono in [-1, 1]; n may be 0.

        Returns:
            Embeddings (streams, T, E) float32, and timestamps (streams, T) in milliseconds from the stream's first
            sample, float64 so that they stay exact for days (float32 on MPS), both on the samples' device. T is often
            0.

        Warns:
            UserWarning: samples far outside [-1, 1], such as 16-bit audio that was not scaled; once until `reset`.

        Raises:
            TypeError: not a tensor, or samples that are not floating point.
            ValueError: a wrong shape, or samples that are not finite. The stream is left unchanged.
        """
        if not isinstance(samples, Tensor):
            raise TypeError(f"samples must be a torch.Tensor of shape (streams, n), got {type(samples).__name__}")
        check_dense(samples, "samples")
        if samples.ndim not in (1, 2) or torch.atleast_2d(samples).shape[0] != self.streams:
            raise ValueError(f"samples must have shape ({self.streams}, n), got {tuple(samples.shape)}")
        if samples.is_floating_point() and samples.numel() == 0:
            batch, peak = torch.atleast_2d(samples.detach()).float(), 0.0
        else:
            batch, peak = validate_audio(samples, "samples")
        if not self._warned:  # loud audio stays loud
            self._warned = warn_if_loud(peak, "samples", stacklevel=3)
        embeddings, timestamps = self._on_one_core(lambda: self._push(batch))
        return embeddings.to(samples.device), timestamps.to(_wide(samples.device)).to(samples.device)

    def finish(self) -> tuple[Tensor, Tensor]:
        """End the stream: return the remaining steps, framed as at the end of a clip, and reset.

        Returns:
            As `push`, on the model's device. Usually at most one step; all of them during the warm-up of running
            statistics; none if nothing was pushed.
        """
        embeddings, timestamps = self._on_one_core(self._finish)
        self.reset()
        return embeddings, timestamps.to(_wide(self._device)).to(self._device)

    def _on_one_core(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Compute on one core: a step's operations are too small to share. A GPU needs no such care."""
        return call_on_one_core(compute) if self._device.type == "cpu" else compute()

    def _push(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take valid samples (B, n) and embed the steps they complete, as `_embed`."""
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            audio, first = self._with_kept(batch.to(self._device))
            done, received = self._complete_steps(self._received), self._received + batch.shape[1]
            frames = self._frames(audio, first, done, self._complete_steps(received) - done)
            self._keep(audio, first, received)
        return self._embed(frames, done, last=False)

    def _finish(self) -> tuple[Tensor, Tensor]:
        """Embed the remaining steps, as `_embed`."""
        done = self._complete_steps(self._received)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            audio, first = self._with_kept(torch.empty(self.streams, 0, dtype=torch.float32, device=self._device))
            steps = self._framing.step_count(self._received) if self._received else 0
            frames = self._frames(audio, first, done, steps - done)
        return self._embed(frames, done, last=True)

    def _complete_steps(self, received: int) -> int:
        """Count the steps whose windows lie within this many samples. The first also needs the samples it reflects."""
        return (received - LOOKAHEAD) // self._framing.step_samples if received >= SHORTEST_CLIP else 0

    def _first_kept(self, received: int) -> int:
        """Return the first sample to keep after this many were received; a frame is centered on it."""
        return max(0, self._complete_steps(received) * self._framing.step_samples - HOP * FRAMES_BEFORE)

    def _with_kept(self, batch: Tensor) -> tuple[Tensor, int]:
        """Append samples to the kept ones: (B, kept + n), and the position of the first of them in the stream."""
        first = self._first_kept(self._received)
        return torch.cat([self._tensors["samples"][:, : self._received - first], batch], dim=1), first

    def _keep(self, audio: Tensor, first: int, received: int) -> None:
        """Keep the samples that later frames need, from audio that begins with sample `first`."""
        self._received = received
        rest, kept = audio[:, self._first_kept(received) - first :], self._tensors["samples"]
        kept[:, : rest.shape[1]] = rest
        kept[:, rest.shape[1] :] = 0

    def _frames(self, audio: Tensor, first: int, done: int, steps: int) -> Tensor:
        """Compute log-mel of `steps` steps from step `done` on: (B, T * frames of a patch, bands)."""
        if steps == 0:
            return audio.new_empty(self.streams, 0, BANDS)
        # Both ends of this piece are reflected, so the frames there are wrong; leave them out.
        begin = (done * self._framing.step_samples - first) // HOP
        return self._framing.fit(self._log_mel(audio)[:, begin:], steps)

    def _embed(self, frames: Tensor, done: int, last: bool) -> tuple[Tensor, Tensor]:
        """Normalize and encode the steps from step `done` on: embeddings (B, T, E), timestamps (B, T) on the CPU."""
        patch_frames, segment_steps = self._patches.patch_frames, self._patches.steps
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            if self.statistics is not None:
                frames = normalize(frames, *self.statistics)
            else:
                frames, done = self._normalize_running(frames, done, last)
        steps = frames.shape[1] // patch_frames
        # Allocated outside of inference mode, so that heads can be trained on it.
        size = (self.streams, steps, self.timestamp_embedding_size)
        embeddings = torch.empty(size, dtype=torch.float32, device=self._device)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            step = 0
            while step < steps:
                position = (done + step) % segment_steps
                stop = min(step + STEPS_AT_ONCE, steps, step + segment_steps - position)
                columns = frames[:, patch_frames * step : patch_frames * stop]
                embeddings[:, step:stop] = self._encoder(columns, position)
                step = stop
        return embeddings, self._framing.step_times_ms(done, done + steps).repeat(self.streams, 1)

    def _normalize_running(self, frames: Tensor, done: int, last: bool) -> tuple[Tensor, int]:
        """Normalize the steps whose statistics are known by now; return them and the number of their first step.

        Args:
            frames: (B, F, bands) of the steps from step `done` on; may be empty.
            last: no more frames will come, so the warm-up is over however short it was.
        """
        sums, warm_up = self._tensors["sums"], self._tensors["warm_up"]
        patch_frames, first = self._patches.patch_frames, done
        heard = done + frames.shape[1] // patch_frames
        values = frames.unflatten(1, (heard - done, patch_frames)).flatten(2).to(sums.dtype) - SILENCE
        sums_of_steps = torch.stack([values.sum(2), values.square().sum(2)], dim=2)  # (B, T, 2)
        totals = torch.cat([sums[:, None], sums_of_steps], dim=1).cumsum(1)  # before these steps, and after each
        sums.copy_(totals[:, -1])
        if done < self._warm_up_steps:
            if heard < self._warm_up_steps and not last:
                warm_up[:, patch_frames * done : patch_frames * heard] = frames
                return frames[:, :0], 0
            frames, first = torch.cat([warm_up[:, : patch_frames * done], frames], dim=1), 0
        # Each step is normalized with the statistics of the steps up to itself, or up to the end of the warm-up.
        steps = torch.arange(first + 1, heard + 1, device=sums.device).clamp(min=min(self._warm_up_steps, heard))
        total, squares = totals[:, steps - done].unbind(2)  # (B, T) each
        count = (patch_frames * BANDS * steps).to(sums.dtype)
        mean = total / count
        std = ((squares - total * mean) / (count - 1)).clamp(min=0).sqrt()
        per_frame = (value.float().repeat_interleave(patch_frames, dim=1)[..., None] for value in (mean + SILENCE, std))
        return normalize(frames, *per_frame), first


def _wide(device: torch.device) -> torch.dtype:
    """Return float64 if the device has it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def streamable_encoder(model: Embedder) -> AxLSTMEncoder:
    """Return a model's encoder, or raise an error that says why it cannot be streamed."""
    if not isinstance(model, Embedder):
        raise TypeError(f"model must come from hear_axlstm.load_model, got {type(model).__name__}")
    encoder = model.encoder
    if not isinstance(encoder, AxLSTMEncoder):
        raise ValueError(
            f"a model of family {encoder.config.family!r} cannot be streamed: its attention spans a whole 2 s "
            "segment, including what is yet to come; an AxLSTM without flip can"
        )
    if encoder.config.flip:
        raise ValueError(
            "an AxLSTM with flip cannot be streamed: every second block reads its 2 s segment from the end, so the "
            "first embedding depends on the last sample; a model without flip can"
        )
    if not model.framer.is_local:
        raise ValueError(
            f"only exact framing can be streamed, got {model.framing!r}: the released code's timestamps and padding "
            "depend on the length of the whole clip; load the model with framing='exact'"
        )
    dtypes = {parameter.dtype for parameter in encoder.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"the model's weights must be float32, got {', '.join(sorted(map(str, dtypes)))}")
    return encoder
