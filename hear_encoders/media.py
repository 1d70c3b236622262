"""Decode what libsndfile does not read (AAC, MP4, WebM, AMR, G.722, ...) with FFmpeg, through PyAV.

PyAV is the extra `av`, imported on use.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

INSTALL = "pip install 'hear-audiomaepp[av]'"

# Extensions of files that have or may have sound, and that libsndfile does not read. Not .ts and .mts, which are
# TypeScript more often than MPEG; such a file is read if it is given by name.
MEDIA_EXTENSIONS = frozenset(
    {
        *(".aac", ".ac3", ".amr", ".ape", ".awb", ".dts", ".eac3", ".g722", ".m4a", ".m4b", ".mka", ".mpc", ".ra"),
        *(".spx", ".tak", ".tta", ".weba", ".wma", ".wv"),
        *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mxf"),
        *(".ogv", ".qt", ".rm", ".vob", ".webm", ".wmv"),
    }
)

# FFmpeg's names of the containers and codecs that are opened. Others are playlists, which open further files or
# addresses, pictures, subtitles, or formats without a header that FFmpeg would guess.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,g722,loas,matroska,mov,mp3,mpc,mpc8,mpeg,"
    "mpegts,mxf,ogg,oma,qcp,rm,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)
# G.722 has no header, so only its name tells.
_FORMAT_OF_EXTENSION = {".g722": "g722"}
# Containers whose header states the length of a track.
_STATES_LENGTH = {"mov", "avi", "asf", "wv", "caf"}
_LENGTH_TOLERANCE_S = 0.5


class UnknownFormatError(ValueError):
    """FFmpeg does not know the file either."""


def import_av() -> ModuleType:
    """Import PyAV.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"needs PyAV: {INSTALL}") from error
    return av


def decode(path: Path, block_frames: int) -> Generator[tuple[np.ndarray, int], None, float | None]:
    """Decode a file's audio track, the one that a player would choose, without gaps.

    Args:
        block_frames: frames to gather in a block; a block may hold a few more.

    Yields:
        Blocks (n,) float32, channels averaged, and their sample rate, which may change between blocks.

    Returns:
        The seconds that the container states, or None.

    Raises:
        ImportError: PyAV is not installed.
        UnknownFormatError: FFmpeg does not recognize the format.
        ValueError: no audio track, no decoder for it, or it is damaged.
    """
    with _open(path) as (av, container, stream):
        gathered: list[np.ndarray] = []
        frames, rate = 0, 0
        try:
            for frame in container.decode(stream):
                if gathered and (frames >= block_frames or frame.sample_rate != rate):
                    yield np.concatenate(gathered), rate
                    gathered, frames = [], 0
                gathered.append(_mono(frame))
                frames, rate = frames + len(gathered[-1]), frame.sample_rate
        except av.FFmpegError as error:
            raise ValueError(f"not decodable ({error.strerror})") from error
        if gathered:
            yield np.concatenate(gathered), rate
        return _stated_s(container, stream)


def duration_s(path: Path) -> float:
    """Return the duration that the container states or FFmpeg estimates, in seconds; 0 if neither.

    Raises: as `decode`.
    """
    with _open(path) as (_, container, stream):
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1e6  # in microseconds


@contextmanager
def _open(path: Path) -> Iterator[tuple[ModuleType, Any, Any]]:
    """Open a file and choose its audio track: PyAV, container, stream."""
    av = import_av()
    suffix = path.suffix.lower()
    with open(path, "rb") as file:

        def seek(offset: int, whence: int) -> int:
            try:
                return file.seek(offset, whence)
            except OSError as error:  # FFmpeg tries to seek to before the beginning; PyAV would print the exception
                return -(error.errno or errno.EINVAL)

        # FFmpeg reads through Python, so it opens no other file. It sees only the suffix of the name, which may be no
        # Unicode.
        source = SimpleNamespace(read=file.read, seek=seek, tell=file.tell, name=f"file{suffix}")
        try:
            container = av.open(
                source,
                format=_FORMAT_OF_EXTENSION.get(suffix),
                options={"format_whitelist": _FORMATS},
                metadata_errors="replace",
            )
        except av.FFmpegError as error:
            raise UnknownFormatError(error.strerror) from error
        with container:
            stream = container.streams.best("audio")
            if stream is None and not container.streams.audio:
                raise ValueError("no sound track")
            if stream is None or stream.codec_context is None:  # PyAV 17 would crash
                raise ValueError("no decoder for its sound, which may be protected")
            yield av, container, stream


def _mono(frame: Any) -> np.ndarray:
    """Return an av.AudioFrame's samples (n,), channels averaged, as float32 in [-1, 1]."""
    samples = frame.to_ndarray()  # (channels, n), or (1, n * channels) if interleaved
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    mean = samples.mean(axis=0, dtype=np.float32)
    if samples.dtype == np.uint8:
        return (mean - np.float32(128)) / np.float32(128)
    if np.issubdtype(samples.dtype, np.integer):
        return mean / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return mean


def _stated_s(container: Any, stream: Any) -> float | None:
    """Return the seconds that the header states for the audio, if it does."""
    names = set(container.format.name.split(","))
    if names & _STATES_LENGTH and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if "matroska" in names and len(container.streams) == 1 and container.duration:  # of the longest track
        return container.duration / 1e6
    return None


def is_cut_short(seconds: float, stated_s: float | None) -> bool:
    """Return whether decoded audio is clearly shorter than its container states."""
    return stated_s is not None and seconds < stated_s - _LENGTH_TOLERANCE_S


def is_media(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's extension is one of MEDIA_EXTENSIONS."""
    return Path(path).suffix.lower() in MEDIA_EXTENSIONS
