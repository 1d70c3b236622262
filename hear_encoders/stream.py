"""AxLSTM on audio that is still arriving: samples go in as they come, embeddings come out 40 ms by 40 ms.

A stream gives the numbers of `Embedder.timestamp_embeddings` in exact framing, so it follows the same chunks: every
2 s the encoder begins anew, with its cls token, an empty memory and the first position. Inside a chunk an mLSTM
without flip looks back only, and all it has to carry is a state of constant size.

Here is what surrounds the encoder: samples, log-mel, normalisation, time. `hear_encoders.nn.axlstm_online` holds the
encoder in the form that goes on from where it was. Letters in shape comments: B streams, T time steps, E embedding
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hear_encoders.embedder import Embedder, check_statistics, checked_audio, warn_of_peak
from hear_encoders.nn.axlstm_online import StepEncoder
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

# Samples past a step's end that the window of its last frame reaches.
LOOKAHEAD = WINDOW // 2 - HOP

# Steps that go through the encoder together where more than one is there: enough for the matmuls, and so few that the
# gates' running sums over them keep their digits in float32.
STEPS_TOGETHER = 5

SILENCE = math.log(LOG_OFFSET)  # log-mel of silence. Sums are taken about it, so that silence has no variance at all


class AxLSTMStream:
    """One or several streams of audio through an AxLSTM.

    Example:
        stream = AxLSTMStream(model)
        for block in blocks:  # (samples,) each, of any length
            embeddings, timestamps_ms = stream.push(block)  # (1, steps, E), (1, steps); often no step, or several
        embeddings, timestamps_ms = stream.finish()

    How the samples are cut into blocks does not change what comes out, only when. Step i comes as soon as its 40 ms
    and the 2.5 ms after them that its last STFT window reaches are there: 40 (i + 1) + 2.5 ms from the beginning.
    `finish` gives the step that may then be left, framed as at the end of a clip.

    With given statistics the embeddings equal `model.timestamp_embeddings` of the whole audio. Without, normalisation
    is a running one: nothing comes out until `warm_up_s` have been heard; then all steps of the warm-up come at once,
    normalised with the mean and standard deviation over all frames and bands of these steps; each later step is
    normalised with those of all steps up to and including itself. The statistics run on across chunks.

    The weights are copied: what happens to the model later does not reach a stream. All is computed in float32,
    whatever the model's precision. One object is to be used by one thread at a time.

    Args:
        model: an AxLSTM without flip in exact framing, from `hear_axlstm.load_model`. The stream is on its device.
        streams: B, how many streams of equal pace go through the model together.
        statistics: mean and standard deviation of log-mel to normalise with. None takes the model's
            (`load_model(..., statistics=...)`), and if it has none, running ones.
        warm_up_s: seconds of a running normalisation's warm-up, rounded up to whole steps, at least one. It has no
            effect where statistics are given.

    Attributes:
        streams: B.
        statistics: the given mean and standard deviation, or None where they are running.
        timestamp_embedding_size: E, as the model's.

    Raises:
        TypeError: `model` is not a model from `load_model`.
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
        _check_model(model)
        if type(streams) is not int or streams < 1:
            raise ValueError(f"streams must be an integer of at least 1, got {streams!r}")
        if isinstance(warm_up_s, bool) or not (isinstance(warm_up_s, (int, float)) and 0 <= warm_up_s < math.inf):
            raise ValueError(f"warm_up_s must be a finite number of seconds of at least 0, got {warm_up_s!r}")
        self.streams = streams
        self.statistics = model.statistics if statistics is None else check_statistics(statistics)
        self.timestamp_embedding_size = model.timestamp_embedding_size
        self._step_count, self._step_ms, self._first_step_ms = model.step_count, model.step_ms, model.first_step_ms
        self._patches = model.encoder.config.patches
        self._step_samples = HOP * self._patches.patch_frames
        self._warm_up_steps = max(1, math.ceil(warm_up_s * SAMPLE_RATE / self._step_samples))
        self._device = device = model.device
        self._log_mel = LogMel().to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # whatever the caller has switched on
            self._encoder = StepEncoder(model.encoder, streams)
        self._received = 0
        # Of the samples only those are kept that frames to come need.
        kept = HOP * FRAMES_BEFORE + max(self._step_samples + LOOKAHEAD, SHORTEST_CLIP) - 1
        self._tensors = {"samples": torch.zeros(streams, kept, dtype=torch.float32, device=device)}
        if self.statistics is None:
            wide = _wide(device)  # sums of a day's frames
            frames = self._warm_up_steps * self._patches.patch_frames
            self._tensors["sums"] = torch.zeros(streams, 2, dtype=wide, device=device)  # of values, of their squares
            self._tensors["warm_up"] = torch.zeros(streams, frames, BANDS, dtype=torch.float32, device=device)
        self._tensors.update(self._encoder.state)
        self.reset()

    @property
    def state(self) -> dict[str, Tensor]:
        """All that the stream remembers, a copy: tensors whose shapes do not depend on what was heard.

        They can be saved with `safetensors` or `torch.save`, and given to `load_state` of another stream of the same
        model and options.
        """
        received = torch.tensor(self._received, dtype=torch.int64, device="cpu")
        return {"received": received, **{name: tensor.clone() for name, tensor in self._tensors.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` gave, on whatever device it is.

        Raises:
            TypeError: not a mapping of names to tensors.
            ValueError: a tensor is missing, unknown, or of another shape or dtype than this stream's. The stream is
                as it was before.
        """
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError(f"state must be what `state` of a stream gave, got {type(state).__name__}")
        own = self.state
        for name in [*own, *state]:
            if name not in state:
                raise ValueError(f"state: missing tensor {name!r}; is it of a stream with other options?")
            if name not in own:
                raise ValueError(f"state: unknown tensor {name!r}; is it of a stream with other options?")
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
        """Take in the next samples, of each stream equally many, and give out the steps they complete.

        Args:
            samples: (streams, n), or (n,) for a single stream, floating point, 16 kHz mono in [-1, 1]; n may be 0.

        Returns:
            Embeddings (streams, T, E) float32 and timestamps (streams, T) in milliseconds from the stream's first
            sample, float64 (exact however long the stream runs; float32 on MPS), both on the samples' device. T is
            often 0.

        Warns:
            UserWarning: samples far outside [-1, 1], as of 16-bit audio that was not scaled; once until `reset`.

        Raises:
            TypeError: not a tensor, or samples that are not floating point.
            ValueError: another shape, or samples that are not finite. The stream is as it was before.
        """
        if not isinstance(samples, Tensor):
            raise TypeError(f"samples must be a torch.Tensor of shape (streams, n), got {type(samples).__name__}")
        if samples.ndim not in (1, 2) or torch.atleast_2d(samples).shape[0] != self.streams:
            raise ValueError(f"samples must have shape ({self.streams}, n), got {tuple(samples.shape)}")
        nothing = samples.is_floating_point() and samples.numel() == 0
        batch, peak = (
            (torch.atleast_2d(samples.detach()).float(), 0.0) if nothing else checked_audio(samples, "samples")
        )
        if not self._warned:  # loud audio goes on being so
            self._warned = warn_of_peak(peak, "samples", stacklevel=3)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            audio, first = self._with_kept(batch.to(self._device))
            done, received = self._complete_steps(self._received), self._received + batch.shape[1]
            frames = self._frames(audio, first, done, self._complete_steps(received) - done)
            self._keep(audio, first, received)
        embeddings, timestamps = self._embed(frames, done, last=False)
        return embeddings.to(samples.device), timestamps.to(_wide(samples.device)).to(samples.device)

    def finish(self) -> tuple[Tensor, Tensor]:
        """End the stream: give out what is left, as at the end of a clip, and begin anew as after `reset`.

        Returns:
            As `push`, on the model's device. Usually at most one step; all of them while a running normalisation
            warms up; none where nothing was pushed.
        """
        done = self._complete_steps(self._received)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            audio, first = self._with_kept(torch.empty(self.streams, 0, dtype=torch.float32, device=self._device))
            steps = self._step_count(self._received) if self._received else 0
            frames = self._frames(audio, first, done, steps - done)
        embeddings, timestamps = self._embed(frames, done, last=True)
        self.reset()
        return embeddings, timestamps.to(_wide(self._device)).to(self._device)

    def _complete_steps(self, received: int) -> int:
        """Steps whose windows all lie within so many samples. The first also needs what its beginning reflects."""
        return (received - LOOKAHEAD) // self._step_samples if received >= SHORTEST_CLIP else 0

    def _first_kept(self, received: int) -> int:
        """The first sample that is kept when so many were received; a frame is centred on it."""
        return max(0, self._complete_steps(received) * self._step_samples - HOP * FRAMES_BEFORE)

    def _with_kept(self, batch: Tensor) -> tuple[Tensor, int]:
        """What is kept with these samples after it: (B, kept + n), and which sample of the stream is its first."""
        first = self._first_kept(self._received)
        return torch.cat([self._tensors["samples"][:, : self._received - first], batch], dim=1), first

    def _keep(self, audio: Tensor, first: int, received: int) -> None:
        """Of audio that begins with sample `first`, keep what frames to come need."""
        self._received = received
        rest, kept = audio[:, self._first_kept(received) - first :], self._tensors["samples"]
        kept[:, : rest.shape[1]] = rest
        kept[:, rest.shape[1] :] = 0

    def _frames(self, audio: Tensor, first: int, done: int, steps: int) -> Tensor:
        """Log-mel of `steps` steps from step `done` on: (B, T * frames of a patch, bands)."""
        if steps == 0:
            return audio.new_empty(self.streams, 0, BANDS)
        # Where the audio is cut off inside the stream, its outermost frames are of reflections: they are left out.
        begin = (done * self._step_samples - first) // HOP
        frames = self._patches.patch_frames * steps
        logmel = self._log_mel(audio)[:, begin : begin + frames]
        missing = frames - logmel.shape[1]
        if missing:  # the last step reaches past the end: repeat the last frame
            logmel = torch.cat([logmel, logmel[:, -1:].expand(-1, missing, -1)], dim=1)
        return logmel

    def _embed(self, frames: Tensor, done: int, last: bool) -> tuple[Tensor, Tensor]:
        """Normalise and encode the steps from step `done` on: embeddings (B, T, E), timestamps (B, T) on the CPU."""
        patch_frames, chunk_steps = self._patches.patch_frames, self._patches.steps
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            if self.statistics is not None:
                frames = normalize(frames, *self.statistics)
            else:
                frames, done = self._normalize_running(frames, done, last)
        steps = frames.shape[1] // patch_frames
        # Made outside of inference mode, so that heads can be trained on it.
        size = (self.streams, steps, self.timestamp_embedding_size)
        embeddings = torch.empty(size, dtype=torch.float32, device=self._device)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            step = 0
            while step < steps:
                position = (done + step) % chunk_steps
                stop = min(step + STEPS_TOGETHER, steps, step + chunk_steps - position)
                columns = frames[:, patch_frames * step : patch_frames * stop]
                embeddings[:, step:stop] = self._encoder(columns, position)
                step = stop
        times = torch.arange(done, done + steps, dtype=torch.float64, device="cpu")
        return embeddings, (self._first_step_ms + self._step_ms * times).repeat(self.streams, 1)

    def _normalize_running(self, frames: Tensor, done: int, last: bool) -> tuple[Tensor, int]:
        """Normalise what can be by now, and tell which step that begins with.

        Args:
            frames: (B, F, bands) of the steps from step `done` on; there may be none.
            last: no more will come, so that the warm-up is over however short it was.
        """
        sums, warm_up = self._tensors["sums"], self._tensors["warm_up"]
        patch_frames, first = self._patches.patch_frames, done
        heard = done + frames.shape[1] // patch_frames
        values = frames.unflatten(1, (heard - done, patch_frames)).flatten(2).to(sums.dtype) - SILENCE
        of_steps = torch.stack([values.sum(2), values.square().sum(2)], dim=2)  # (B, T, 2)
        totals = torch.cat([sums[:, None], of_steps], dim=1).cumsum(1)  # before these steps, and after each
        sums.copy_(totals[:, -1])
        if done < self._warm_up_steps:
            if heard < self._warm_up_steps and not last:
                warm_up[:, patch_frames * done : patch_frames * heard] = frames
                return frames[:, :0], 0
            frames, first = torch.cat([warm_up[:, : patch_frames * done], frames], dim=1), 0
        # Steps whose statistics each step is normalised with: up to itself, in the warm-up up to the end of it.
        steps = torch.arange(first + 1, heard + 1, device=sums.device).clamp(min=min(self._warm_up_steps, heard))
        total, squares = totals[:, steps - done].unbind(2)  # (B, T) each
        count = (patch_frames * BANDS * steps).to(sums.dtype)
        mean = total / count
        std = ((squares - total * mean) / (count - 1)).clamp(min=0).sqrt()
        of_frames = (value.float().repeat_interleave(patch_frames, dim=1)[..., None] for value in (mean + SILENCE, std))
        return normalize(frames, *of_frames), first


def _wide(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_model(model: Embedder) -> None:
    """Say why a model cannot be streamed, if it cannot."""
    if not isinstance(model, Embedder):
        raise TypeError(f"model must come from hear_axlstm.load_model, got {type(model).__name__}")
    config = model.encoder.config
    if config.family != "axlstm":
        raise ValueError(
            f"a model of family {config.family!r} cannot be streamed: its attention looks at all of a 2 s chunk at "
            "once, also ahead; an AxLSTM without flip can"
        )
    if config.flip:
        raise ValueError(
            "an AxLSTM with flip cannot be streamed: every second block reads its 2 s chunk from the end, so the "
            "first embedding depends on the last sample; a model without flip can"
        )
    if model.framing != "exact":
        raise ValueError(
            f"only exact framing can be streamed, got {model.framing!r}: the released code's timestamps and padding "
            "depend on the length of the whole clip; load the model with framing='exact'"
        )
    dtypes = {parameter.dtype for parameter in model.encoder.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"the model's weights must be float32, got {', '.join(sorted(map(str, dtypes)))}")
