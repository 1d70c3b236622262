"""Audio that arrives on a pipe: raw PCM or WAV, of any rate and number of channels, to 16 kHz mono as it comes.

soundfile reads files, in which it can go back and forth; a pipe has no end to look at and may never have one.
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

# What is read at a time, at most: a pipe gives what it has.
READ_BYTES = 1 << 16

# Lengths that a WAV from a pipe has in its header, because its writer could not know: 0, and nearly 2 or 4 GiB.
UNKNOWN_LENGTH = 0x7FFF_F000

# What a pipe of samples does not begin with, but for one in four billion.
_OTHER_FORMATS = {
    **{b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b".snd": "AU", b"caff": "CAF"},
    **{b"RF64": "RF64", b"RIFX": "RIFX"},
    **{b"ID3" + bytes([version]): "MP3" for version in (2, 3, 4)},
}
# What few begin with, but every MP3 without tags.
_MP3_FRAMES = (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")

_WAVE_PCM, _WAVE_FLOAT, _WAVE_EXTENSIBLE = 1, 3, 0xFFFE


def _s24(data: bytes) -> np.ndarray:
    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return wide.view("<i4")[:, 0] / np.float32(2**31)


# Bytes of a sample, and bytes to samples in [-1, 1].
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
    """How samples follow each other: interleaved channels, in an encoding by ffmpeg's name for it.

    Raises:
        ValueError: an unknown encoding, a rate or a number of channels below 1.
    """

    encoding: str = "s16le"
    sample_rate: int = SAMPLE_RATE
    channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}; got {self.encoding!r}")
        if self.sample_rate < 1 or self.channels < 1:
            raise ValueError(f"expected a sample rate and channels, got {self.sample_rate} Hz and {self.channels}")


def read_pipe(pipe: BinaryIO, raw: PCM) -> Iterator[np.ndarray]:
    """Blocks of 16 kHz mono as the samples come in.

    Args:
        pipe: WAV, known by its first bytes, or samples without a header.
        raw: of what samples without a header are.

    Yields:
        (n,) float32, nominally in [-1, 1]; n varies and may be 0. Resampling holds back some milliseconds, which come
        at the end. A frame that the end cuts off is left out.

    Warns:
        UserWarning: samples that may be MP3.

    Raises:
        ValueError: a WAV header that is damaged, or of samples other than PCM; another format of files.
    """
    head = pipe.read(4)
    if head in _OTHER_FORMATS:
        raise ValueError(f"expected WAV or samples without a header, got {_OTHER_FORMATS[head]}: decode it before")
    if head == b"RIFF":
        pcm, remaining = _read_wav_header(pipe)
        rest = b""
    else:
        if head[:2] in _MP3_FRAMES:
            warnings.warn("this begins as MP3 does, but is read as samples: decode it before", stacklevel=2)
        pcm, remaining, rest = raw, None, head
    bytes_per_sample, decode = _DECODERS[pcm.encoding]
    frame_bytes = bytes_per_sample * pcm.channels
    resampler = None
    if pcm.sample_rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(pcm.sample_rate, SAMPLE_RATE, num_channels=1, dtype="float32")
    read = getattr(pipe, "read1", pipe.read)  # what is there, rather than wait for all that was asked for
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
    """Read from after "RIFF" to the first sample: what the samples are, and how many bytes of them, if it says."""
    if _read(pipe, 8)[4:] != b"WAVE":
        raise ValueError("expected WAV after 'RIFF', got another kind of RIFF file")
    pcm = None
    while True:
        name, size = struct.unpack("<4sI", _read(pipe, 8))
        if name == b"data":
            if pcm is None:
                raise ValueError("the WAV header has no 'fmt ' before its 'data'")
            return pcm, None if size == 0 or size >= UNKNOWN_LENGTH else size
        if name == b"fmt ":
            pcm = _read_wav_format(_read(pipe, size))
            _read(pipe, size % 2)
        else:
            _read(pipe, size + size % 2)


def _read_wav_format(chunk: bytes) -> PCM:
    if len(chunk) < 16:
        raise ValueError(f"the WAV header's 'fmt ' must have at least 16 bytes, got {len(chunk)}")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
    if tag == _WAVE_EXTENSIBLE and len(chunk) >= 26:
        (tag,) = struct.unpack("<H", chunk[24:26])
    known = {
        **{(_WAVE_PCM, 8): "u8", (_WAVE_PCM, 16): "s16le", (_WAVE_PCM, 24): "s24le", (_WAVE_PCM, 32): "s32le"},
        **{(_WAVE_FLOAT, 32): "f32le", (_WAVE_FLOAT, 64): "f64le"},
    }
    if (tag, bits) not in known:
        raise ValueError(f"expected a WAV of PCM or float samples, got format {tag} with {bits} bits")
    return PCM(known[tag, bits], rate, channels)


def _read(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise ValueError("the input ends inside the WAV header")
    return data
