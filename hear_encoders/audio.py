"""Audio files to 16 kHz mono, by soundfile (decoding) and soxr (resampling)."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from hear_encoders.nn.frontend import SAMPLE_RATE
from hear_encoders.pcm import UNKNOWN_LENGTH

# Frames decoded at a time.
BLOCK_FRAMES = 1 << 18

# What soundfile raises for a file it cannot read: besides its own error, TypeError for samples without a header
# (.raw) and UnicodeEncodeError for a name that is not Unicode.
UNREADABLE = (soundfile.LibsndfileError, TypeError, UnicodeEncodeError)

# How libsndfile's log of a WAV says that its samples are not as many bytes as the header claims.
_WAV_LENGTH = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


def audio_extensions() -> set[str]:
    """Lower-case file extensions, with the dot, that the installed libsndfile is likely to read."""
    names = {f".{name.lower()}" for name in soundfile.available_formats()}
    return (names - {".raw"}) | {
        ".aif",
        ".aifc",
        ".bwf",
        ".iff",
        ".mp1",
        ".mp2",
        ".mp3",
        ".oga",
        ".opus",
        ".snd",
        ".sph",
    }


def load_audio(path: str | os.PathLike[str]) -> Tensor:
    """Read an audio file as 16 kHz mono: channels are averaged, other sample rates resampled.

    Returns:
        (samples,) float32, nominally in [-1, 1].

    Warns:
        UserWarning: the file ends before the length in its header (Ogg has none); what is there is returned.

    Raises:
        FileNotFoundError: no such file.
        OSError: the system does not open it.
        ValueError: not an audio file that libsndfile reads, damaged, or without samples.
    """
    return torch.cat(list(read_audio(path)))


def read_audio(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Read an audio file as `load_audio` does, with its warnings and errors, a block at a time: for hours of audio.

    Yields:
        (n,) float32, of about 2^18 samples of the file's rate; may be empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    open(path, "rb").close()  # an error of the system's says more than libsndfile's
    samples = 0
    try:
        with soundfile.SoundFile(path) as file:
            frames = 0
            for block, read in _read_mono(file):
                frames += read
                samples += len(block)
                yield torch.from_numpy(block)
            if frames < file.frames:
                warnings.warn(f"{path} is cut short: {frames} of {file.frames} frames are there", stacklevel=3)
            elif length := _WAV_LENGTH.search(file.extra_info):  # here `frames` is what is there
                claimed, there = int(length[1]), int(length[2])
                if there < claimed < UNKNOWN_LENGTH:
                    warnings.warn(f"{path} is cut short: {there} of {claimed} bytes are there", stacklevel=3)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not readable as audio ({getattr(error, 'error_string', error)})") from error
    if samples == 0:
        raise ValueError(f"{path}: holds no samples")


def duration_s(path: str | os.PathLike[str]) -> float:
    """Length of an audio file by its header, in seconds; 0 for one that cannot be read."""
    try:
        return soundfile.info(str(path)).duration
    except UNREADABLE:
        return 0.0


def _read_mono(file: soundfile.SoundFile) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks at 16 kHz, and how many frames of the file each was made of."""
    resampler = None
    if file.samplerate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, num_channels=1, dtype="float32")
    last = False
    while not last:
        block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True).mean(axis=1)
        last = len(block) < BLOCK_FRAMES
        yield block if resampler is None else resampler.resample_chunk(block, last=last), len(block)


@dataclass(frozen=True)
class AudioFile:
    """A file to embed: where it is, and what it is called below the folder that was asked for."""

    path: Path
    name: str


def find_audio(inputs: Sequence[str]) -> tuple[Path, list[AudioFile]]:
    """Find the audio files that files, folders (recursive) and glob patterns stand for, each once, sorted.

    In folders and for patterns, files count as audio by their extension; a file given by itself always counts.
    Links to folders are followed.

    Warns:
        UserWarning: a folder that may not be read.

    Returns:
        The root and the files below it, whose names are relative to it. The root depends on the inputs alone,
        not on what is found: the folder itself, a file's folder, the part of a pattern before its wildcards;
        for several inputs, what these have in common.

    Raises:
        FileNotFoundError: an input that is not there, or that stands for no audio file.
    """
    extensions = audio_extensions()
    roots: list[str] = []
    paths: dict[str, Path] = {}  # by absolute path, so that no file counts twice
    for given in inputs:
        pattern = not os.path.exists(given)
        matches = [Path(match) for match in glob.glob(given, recursive=True)] if pattern else [Path(given)]
        found: list[Path] = []
        for match in matches:
            if match.is_dir():
                found += [path for path in _files_below(match) if _is_audio(path, extensions)]
            elif not pattern or _is_audio(match, extensions):
                found.append(match)
        if not found:
            there = not pattern or glob.has_magic(given)
            raise FileNotFoundError(f"no audio files in {given}" if there else f"no such file or folder: {given}")
        root = given if os.path.isdir(given) else os.path.dirname(given)
        while pattern and glob.has_magic(root):
            root = os.path.dirname(root)
        roots.append(os.path.abspath(root))
        paths.update((os.path.abspath(path), path) for path in found)
    root = os.path.commonpath(roots)
    files = [AudioFile(path, Path(os.path.relpath(absolute, root)).as_posix()) for absolute, path in paths.items()]
    return Path(root), sorted(files, key=lambda file: file.name)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in its folders, links to folders elsewhere included, each folder once."""
    root = os.path.realpath(folder)
    seen = {root}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        # A link to a folder that is reached without it would give its files a second name.
        if real in seen or (os.path.islink(path) and real.startswith(os.path.join(root, ""))):
            return False
        seen.add(real)
        return True

    def warn(error: OSError) -> None:
        warnings.warn(f"{error.filename} is not searched: {error.strerror}", stacklevel=4)

    for parent, folders, names in os.walk(folder, onerror=warn, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_new(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in names)


def _is_audio(path: Path, extensions: set[str]) -> bool:
    return path.suffix.lower() in extensions and path.is_file()
