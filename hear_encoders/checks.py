"""Checks of audio, statistics and options. Errors say what was expected and what was given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

PEAK_WORTH_A_WARNING = 10.0  # samples are meant to lie in [-1, 1]
LEAST_INTEGER_PEAK = 256.0  # louder audio is probably integers that were not scaled
LARGEST_PEAK = 1e15  # beyond it the float32 power spectrum overflows

# A batch of more clips than this, none longer than a recording has channels, is a recording with its axes swapped.
MOST_TINY_CLIPS, MOST_CHANNELS = 1000, 8


def check_audio(audio: Tensor, name: str = "audio") -> Tensor:
    """Return `audio` as a float32 batch (B, samples); raise an error that names the problem if it is not audio.

    Args:
        audio: (B, samples) or (samples,) floating point.
        name: its name in messages, such as a file's path.

    Warns:
        UserWarning: samples far outside [-1, 1], such as 16-bit audio that was not scaled.

    Raises:
        TypeError: not a dense tensor, or samples that are not floating point.
        ValueError: not one or two dimensions, shape (samples, channels), empty, or samples that are not finite.
    """
    batch, peak = validate_audio(audio, name)
    if audio.ndim == 2 and audio.shape[0] > MOST_TINY_CLIPS and audio.shape[1] <= MOST_CHANNELS:
        raise ValueError(
            f"{name} has shape {tuple(audio.shape)}: {audio.shape[0]} clips of {audio.shape[1]} samples. If it is"
            " (samples, channels), as soundfile reads it, average the channels, or read it with load_audio"
        )
    warn_if_loud(peak, name, stacklevel=4)
    return batch


def validate_audio(audio: Tensor, name: str) -> tuple[Tensor, float]:
    """Check audio as `check_audio` does, except for swapped axes; return the batch and its largest magnitude.

    Streams use it: they know their number of rows and may get few samples at a time.
    """
    check_shape(audio, name)
    batch = torch.atleast_2d(audio.detach()).float()
    lowest, highest = (value.item() for value in batch.aminmax())  # NaN if any sample is
    peak = max(-lowest, highest)
    if not (math.isfinite(lowest) and peak <= LARGEST_PEAK):
        raise ValueError(f"{name} must hold finite samples in [-1, 1], got values from {lowest} to {highest}")
    return batch, peak


def check_shape(audio: Tensor, name: str = "audio") -> None:
    """Check audio as `check_audio` does, except for its values and swapped axes."""
    if not isinstance(audio, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of shape (clips, samples), got {type(audio).__name__}; "
            "model.encode takes paths, NumPy arrays, and lists of clips of different lengths"
        )
    check_dense(audio, name)
    if not audio.is_floating_point():
        raise TypeError(f"{name} must hold floating-point samples in [-1, 1], got {audio.dtype}")
    if audio.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (clips, samples) or (samples,), got {tuple(audio.shape)}")
    if audio.numel() == 0:
        raise ValueError(f"{name} is empty: got shape {tuple(audio.shape)}")


def check_dense(audio: Tensor, name: str) -> None:
    """Raise TypeError unless a tensor has all its samples in memory, one after another or in strides.

    Sparse, nested and meta tensors lack most operations, or samples.
    """
    if audio.layout != torch.strided or audio.is_nested or audio.is_meta:
        kind = "a nested tensor" if audio.is_nested else f"{audio.layout} on device {audio.device}"
        raise TypeError(f"{name} must be a dense tensor with samples in memory, got {kind}")


def check_lengths(lengths: Tensor | Sequence[int], clips: int, samples: int) -> list[int]:
    """Return the numbers of real samples of padded clips as integers.

    Raises:
        TypeError: not integers.
        ValueError: not one for each clip, or not between 1 and the padded number of samples.
    """
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        raise TypeError(f"lengths must be integers, in samples; got {lengths!r}")
    if len(values) != clips or not all(1 <= value <= samples for value in values):
        raise ValueError(f"lengths must be {clips} numbers of samples from 1 to {samples}, got {values}")
    return [int(value) for value in values]


def warn_if_loud(peak: float, name: str, stacklevel: int) -> bool:
    """Warn if samples lie far outside [-1, 1]; return whether they do."""
    loud = peak > PEAK_WORTH_A_WARNING
    if loud:
        hint = " Divide 16-bit integer samples by 32768." if peak > LEAST_INTEGER_PEAK else ""
        warnings.warn(f"{name} peaks at {peak:g}; samples are expected in [-1, 1].{hint}", stacklevel=stacklevel)
    return loud


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an option has one of these values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_statistics(statistics: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation as floats.

    Raises:
        ValueError: not two finite numbers, or a standard deviation that is not above 0.
    """
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


def check_layer(layer: int | Sequence[int] | None, depth: int) -> tuple[int, ...] | None:
    """Return numbers of blocks as a tuple, or None.

    Raises:
        ValueError: not an integer or several different ones, from 1 to `depth`.
    """
    if layer is None:
        return None
    given = (layer,) if isinstance(layer, Integral) else layer if isinstance(layer, (list, tuple)) else ()
    layers = tuple(int(number) for number in given if isinstance(number, Integral) and not isinstance(number, bool))
    allowed = layers and len(set(layers)) == len(given) and all(1 <= number <= depth for number in layers)
    if not allowed:
        raise ValueError(f"layer must be the number of a block, from 1 to {depth}, or a list of these; got {layer!r}")
    return layers
