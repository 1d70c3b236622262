"""Read audio from a pipe as it arrives: raw PCM or WAV, at any rate and with any channels, to 16 kHz mono.

soundfile cannot do this: it needs files that it can seek in. A pipe cannot seek, and it may never end.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soxr

from hear_encoders.nn.frontend import SAMPLE_RATE

# Largest read; a pipe often returns less.
READ_BYTES = 1 << 16

# A WAV written to a pipe cannot state its length. Its header says 0, or at least this: nearly 2 or 4 GiB.
UNKNOWN_LENGTH = 0x7FFF_F000

# Magic bytes of unsupported formats.
_OTHER_FORMATS = {
    **{b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b".snd": "AU", b"caff": "CAF"},
    **{b"RF64": "RF64", b"RIFX": "RIFX"},
    **{b"ID3" + bytes([version]): "MP3" for version in (2, 3, 4)},
}
# First bytes of MP3 without tags. Raw samples rarely begin with them, but may.
_MP3_FRAMES = (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")

# Sample rates that are taken, in Hz. A damaged header that says 1 Hz would multiply the audio by 16000.
SAMPLE_RATES = (1000, 768_000)

_WAVE_PCM, _WAVE_FLOAT, _WAVE_EXTENSIBLE = 1, 3, 0xFFFE


def _s24(data: bytes) -> np.ndarray:
    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return wide.view("<i4")[:, 0] / np.float32(2**31)


# Bytes per sample, and a function from bytes to samples in [-1, 1].
_DECODERS: dict[str, tuple[int, Callable[[bytes], np.ndarray]]] = {
    "u8": (1, lambda data: (np.frombuffer(data, np.uint8) - np.float32(128)) / np.float32(128)),
    "s16le": (2, lambda data: np.frombuffer(data, "<i2") / np.float32(2**15)),
    "s24le": (3, _s24),
    "s32le": (4, lambda data: np.frombuffer(data, "<i4") / np.float32(2**31)),
    "f32le": (4, lambda data: np.frombuffer(data, "<f4")),
    "f64le": (8, lambda data: np.frombuffer(data, "<f8")),
}
ENCODINGS = tuple(_DECODERS)


@dataclass(frozen=True)
class PCM:
    """Format of raw samples with interleaved channels.

    Attributes:
        encoding: ffmpeg's name, one of ENCODINGS.
        sample_rate: in Hz.
        channels: number of channels.

    Raises:
        ValueError: an unknown encoding, a sample rate outside SAMPLE_RATES, or no channel.
    """

    encoding: str = "s16le"
    sample_rate: int = SAMPLE_RATE
    channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}; got {self.encoding!r}")
        check_sample_rate(self.sample_rate)
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")


def check_sample_rate(rate: float) -> None:
    """Raise ValueError for a sample rate outside SAMPLE_RATES."""
    low, high = SAMPLE_RATES
    if not low <= rate <= high:
        raise ValueError(f"expected a sample rate from {low} to {high} Hz, got {rate:g}")


def read_pipe(pipe: BinaryIO, raw: PCM) -> Iterator[np.ndarray]:
    """Read a pipe as 16 kHz mono, block by block as samples arrive.

    Args:
        pipe: WAV, recognized by its first bytes, or raw samples.
        raw: format of raw samples; a WAV header overrides it.

    Yields:
        (n,) float32, nominally in [-1, 1]; n varies and may be 0. The resampler delays samples by some milliseconds;
        the last block holds the rest. An incomplete frame at the end is dropped.

    Warns:
        UserWarning: the raw samples may be MP3.

    Raises:
        ValueError: a damaged WAV header, WAV samples that are neither PCM nor float, or another file format.
    """
    head = pipe.read(4)
    if head in _OTHER_FORMATS:
        raise ValueError(f"expected WAV or raw samples, got {_OTHER_FORMATS[head]}: decode it first")
    if head == b"RIFF":
        pcm, remaining = _read_wav_header(pipe)
        rest = b""
    else:
        if head[:2] in _MP3_FRAMES:
            warnings.warn("the input begins like MP3, but is read as raw samples: decode it first", stacklevel=2)
        pcm, remaining, rest = raw, None, head
    bytes_per_sample, decode = _DECODERS[pcm.encoding]
    frame_bytes = bytes_per_sample * pcm.channels
    resampler = None
    if pcm.sample_rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(pcm.sample_rate, SAMPLE_RATE, num_channels=1, dtype="float32")
    read = getattr(pipe, "read1", pipe.read)  # returns what has arrived; `read` would wait for more
    while True:
        data = read(READ_BYTES if remaining is None else min(READ_BYTES, remaining))
        ended = not data
        if remaining is not None:
            remaining -= len(data)
        data = rest + data
        whole = len(data) - len(data) % frame_bytes
        rest = data[whole:]
        samples = decode(data[:whole]).reshape(-1, pcm.channels)
        mono = samples.mean(axis=1, dtype=np.float32)
        yield mono if resampler is None else resampler.resample_chunk(mono, last=ended)
        if ended:
            return


def _read_wav_header(pipe: BinaryIO) -> tuple[PCM, int | None]:
    """Read from after "RIFF" up to the first sample; return the format, and the number of bytes if it is stated."""
    if _read(pipe, 8)[4:] != b"WAVE":
        raise ValueError("expected WAV after 'RIFF', got another kind of RIFF file")
    pcm = None
    while True:
        name, size = struct.unpack("<4sI", _read(pipe, 8))
        if name == b"data":
            if pcm is None:
                raise ValueError("the WAV header has no 'fmt ' chunk before its 'data' chunk")
            return pcm, None if size == 0 or size >= UNKNOWN_LENGTH else size
        if name == b"fmt ":
            pcm = _read_wav_format(_read(pipe, size))
            _read(pipe, size % 2)
        else:
            _read(pipe, size + size % 2)


def _read_wav_format(chunk: bytes) -> PCM:
    if len(chunk) < 16:
        raise ValueError(f"the WAV header's 'fmt ' chunk must have at least 16 bytes, got {len(chunk)}")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
    if tag == _WAVE_EXTENSIBLE and len(chunk) >= 26:
        (tag,) = struct.unpack("<H", chunk[24:26])
    known = {
        **{(_WAVE_PCM, 8): "u8", (_WAVE_PCM, 16): "s16le", (_WAVE_PCM, 24): "s24le", (_WAVE_PCM, 32): "s32le"},
        **{(_WAVE_FLOAT, 32): "f32le", (_WAVE_FLOAT, 64): "f64le"},
    }
    if (tag, bits) not in known:
        raise ValueError(f"expected WAV with PCM or float samples, got format {tag} with {bits} bits")
    return PCM(known[tag, bits], rate, channels)


def _read(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise ValueError("the input ends inside the WAV header")
    return data
