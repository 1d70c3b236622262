"""From waveform to log-mel spectrogram, as in both papers.

16 kHz mono; 25 ms periodic Hann window, 10 ms hop, centered frames with reflected edges, power spectrum;
80 HTK mel bands from 50 to 8000 Hz without area normalization; natural logarithm. Frame i is centered on
sample 160 * i, so a clip of N samples has N // 160 + 1 frames. Equal to
`torchaudio.transforms.MelSpectrogram` with these arguments, without needing torchaudio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16_000
WINDOW = 400  # samples, 25 ms; also the FFT size
HOP = 160  # samples, 10 ms
HOP_MS = 1000 * HOP // SAMPLE_RATE
BANDS = 80
LOWEST_HZ, HIGHEST_HZ = 50.0, 8000.0
LOG_OFFSET = 1.1920929e-07  # float32 machine epsilon
STD_OFFSET = 1e-8

# Reflecting WINDOW // 2 samples at an edge takes one sample more than that.
SHORTEST_CLIP = WINDOW // 2 + 1

# Frames of audio before a frame that its window reaches.
FRAMES_BEFORE = math.ceil(WINDOW / 2 / HOP)

# Frames per STFT call. Bounds the complex spectrum's memory (3.2 kB a frame) however long the clip is.
FRAMES_PER_SLICE = 6_000


class LogMel(nn.Module):
    """Log-mel spectrogram of a batch of waveforms.

    Never in half precision, which a power spectrum exceeds: the FFT runs in float64 (float32 on MPS, which has no
    float64), the rest in float32.
    """

    window: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW, dtype=torch.float32, device="cpu"), persistent=False)
        self.register_buffer("mel", mel_matrix(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Compute log-mel frames.

        Args:
            audio: (B, samples) float32 at 16 kHz. A clip shorter than 201 samples is extended with zeros to 201, the
                least that can be reflected at both edges.

        Returns:
            (B, samples // 160 + 1, 80) float32, natural log of mel power.
        """
        if audio.shape[1] < SHORTEST_CLIP:
            audio = F.pad(audio, (0, SHORTEST_CLIP - audio.shape[1]))
        batch, samples = audio.shape
        frames = samples // HOP + 1
        logmel = audio.new_empty(batch, frames, BANDS)
        # Slices are shorter for larger batches, which bounds memory.
        slice_frames = max(1, FRAMES_PER_SLICE // batch)
        with torch.autocast(audio.device.type, enabled=False):  # the caller may have enabled it
            for first in range(0, frames, slice_frames):
                last = min(first + slice_frames, frames)
                logmel[:, first:last] = self._slice(audio, first, last)
        return logmel

    def _slice(self, audio: Tensor, first: int, last: int) -> Tensor:
        """Compute log-mel of frames first..last-1: (B, last - first, 80)."""
        half = WINDOW // 2
        start, stop = first * HOP - half, (last - 1) * HOP + half
        samples = audio.shape[1]
        piece = audio[:, max(start, 0) : min(stop, samples)]
        if start < 0:
            piece = torch.cat([audio[:, 1 : 1 - start].flip(1), piece], dim=1)
        if stop > samples:
            piece = torch.cat([piece, audio[:, samples - 1 - (stop - samples) : samples - 1].flip(1)], dim=1)
        # Beside a loud sound, a silent band has only rounding errors; those of float32 differ between processors by
        # 5e-4 in the log-mel.
        wide = torch.float32 if piece.device.type == "mps" else torch.float64  # MPS has no float64
        window = self.window.to(wide)
        spectrum = torch.stft(piece.to(wide), WINDOW, HOP, window=window, center=False, return_complex=True)
        power = (spectrum.real * spectrum.real).addcmul_(spectrum.imag, spectrum.imag)  # (B, 201, frames)
        power = power.to(self.mel.dtype)
        return (power.transpose(1, 2) @ self.mel).add_(LOG_OFFSET).log_()


def logmel_of_blocks(log_mel: Callable[[Tensor], Tensor], blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Compute log-mel of a clip that comes in blocks; concatenated, the frames equal those of the whole clip.

    Args:
        blocks: (n,) float32 each, of any length, which make up the clip.

    Yields:
        (F, 80) float32 each.
    """
    audio, first = None, 0  # the samples still needed, and the frame that is centered on the first of them
    done = 0  # frames
    for block in blocks:
        audio = block if audio is None else torch.cat([audio, block])
        # Frames whose windows are complete. The very first one also needs the samples that its beginning reflects.
        whole = (HOP * first + len(audio) - WINDOW // 2) // HOP + 1 if HOP * first + len(audio) >= SHORTEST_CLIP else 0
        if whole > done:
            # Both ends of this piece are reflected, so the frames there are wrong; leave them out.
            yield log_mel(audio[None])[0, done - first : whole - first]
            done, drop = whole, max(0, whole - FRAMES_BEFORE - first)
            audio, first = audio[HOP * drop :].clone(), first + drop
    if audio is not None:
        yield log_mel(audio[None])[0, done - first :]


def mel_matrix() -> Tensor:
    """Return the (201, 80) float32 matrix of triangular HTK mel filters with peaks of 1."""
    # In float32 throughout, as for the papers' checkpoints: if a bin barely touches a narrow low filter, the rounding
    # of the filter's corners shows in the log-mel (2e-4).
    bins_hz = torch.linspace(0, SAMPLE_RATE // 2, WINDOW // 2 + 1, dtype=torch.float32, device="cpu")
    lowest_mel, highest_mel = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (LOWEST_HZ, HIGHEST_HZ))
    corners_mel = torch.linspace(lowest_mel, highest_mel, BANDS + 2, dtype=torch.float32, device="cpu")
    corners_hz = 700.0 * (10.0 ** (corners_mel / 2595.0) - 1.0)
    widths_hz = corners_hz.diff()
    distances_hz = corners_hz - bins_hz[:, None]  # (201, 82)
    rising = -distances_hz[:, :-2] / widths_hz[:-1]
    falling = distances_hz[:, 2:] / widths_hz[1:]
    return torch.minimum(rising, falling).clamp_(min=0.0)


def clip_statistics(logmel: Tensor) -> tuple[Tensor, Tensor]:
    """Return each clip's mean and unbiased standard deviation over all frames and bands: two (B, 1, 1)."""
    variance, mean = torch.var_mean(logmel, dim=(1, 2), keepdim=True)
    return mean, variance.sqrt()


def statistics_of_blocks(blocks: Iterable[Tensor]) -> tuple[float, float]:
    """Compute `clip_statistics` of one clip whose frames come in blocks (F, bands).

    Raises:
        ValueError: no frames.
    """
    count, mean, squares = 0, 0.0, 0.0  # squares of distances from the mean
    for block in blocks:
        variance, middle = torch.var_mean(block, correction=0)
        added, step = block.numel(), middle.item() - mean
        squares += added * (variance.item() + step * step * count / (count + added))
        count += added
        mean += step * added / count
    if count == 0:
        raise ValueError("there are no frames to compute statistics from")
    return mean, math.sqrt(squares / (count - 1))


def normalize(logmel: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Return (logmel - mean) / (std + 1e-8)."""
    return (logmel - mean) / (std + STD_OFFSET)
