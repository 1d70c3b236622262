"""Find audio files, and read them as 16 kHz mono with soundfile (decoding) and soxr (resampling)."""

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

# Errors that soundfile raises for a file it cannot read: its own, TypeError for samples without a header (.raw), and
# UnicodeEncodeError for a name that is not Unicode.
UNREADABLE = (soundfile.LibsndfileError, TypeError, UnicodeEncodeError)

# libsndfile's log entry for a WAV whose header is wrong about the number of bytes.
_WAV_LENGTH = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


def audio_extensions() -> set[str]:
    """Return the lower-case file extensions, with the dot, that the installed libsndfile is likely to read."""
    names = {f".{name.lower()}" for name in soundfile.available_formats()}
    return (names - {".raw"}) | {
        *(".aif", ".aifc", ".bwf", ".iff", ".mp1", ".mp2", ".mp3", ".oga", ".opus", ".snd", ".sph"),
    }


def load_audio(path: str | os.PathLike[str]) -> Tensor:
    """Read an audio file as 16 kHz mono: average its channels, resample other sample rates.

    Returns:
        (samples,) float32, nominally in [-1, 1].

    Warns:
        UserWarning: the file is shorter than its header says (Ogg has no such header); the rest is returned.

    Raises:
        FileNotFoundError: no such file.
        OSError: the file cannot be opened.
        ValueError: libsndfile cannot read it as audio, or it has no samples.
    """
    return torch.cat(list(read_audio(path)))


def read_audio(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Read an audio file block by block, for hours of audio; otherwise as `load_audio`.

    Yields:
        (n,) float32, made from up to 2^18 frames at the file's rate; may be empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    open(path, "rb").close()  # the operating system's error says more than libsndfile's
    samples = 0
    try:
        with soundfile.SoundFile(path) as file:
            frames = 0
            for block, read in _read_mono(file):
                frames += read
                samples += len(block)
                yield torch.from_numpy(block)
            if frames < file.frames:
                warnings.warn(f"{path} is cut short: it has {frames} of {file.frames} frames", stacklevel=3)
            elif length := _WAV_LENGTH.search(file.extra_info):  # file.frames does not come from the header here
                claimed, actual = int(length[1]), int(length[2])
                if actual < claimed < UNKNOWN_LENGTH:
                    warnings.warn(f"{path} is cut short: it has {actual} of {claimed} bytes", stacklevel=3)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not readable as audio ({getattr(error, 'error_string', error)})") from error
    if samples == 0:
        raise ValueError(f"{path}: holds no samples")


def duration_s(path: str | os.PathLike[str]) -> float:
    """Return an audio file's duration according to its header, in seconds; 0 if it cannot be read."""
    try:
        return soundfile.info(str(path)).duration
    except UNREADABLE:
        return 0.0


def _read_mono(file: soundfile.SoundFile) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks at 16 kHz, each with the number of the file's frames that it was made from."""
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
    """An audio file.

    Attributes:
        path: as found from the inputs.
        name: relative to the root that `find_audio` returns, with forward slashes.
    """

    path: Path
    name: str


def find_audio(inputs: Sequence[str]) -> tuple[Path, list[AudioFile]]:
    """Find audio files.

    Folders and patterns select files by extension; a file given by name is always taken. Links to folders are
    followed.

    Args:
        inputs: files, folders (searched recursively) and glob patterns.

    Warns:
        UserWarning: a folder cannot be read.

    Returns:
        The root, and the files below it: each once, sorted by name. The root depends on the inputs alone, not on the
        files found: it is the folder, the file's folder, or the part of the pattern before its wildcards; for several
        inputs, the longest common path of these.

    Raises:
        FileNotFoundError: an input does not exist, or selects no audio file.
    """
    extensions = audio_extensions()
    roots: list[str] = []
    paths: dict[str, Path] = {}  # by absolute path, so that no file is listed twice
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
            exists = not pattern or glob.has_magic(given)
            raise FileNotFoundError(f"no audio files in {given}" if exists else f"no such file or folder: {given}")
        root = given if os.path.isdir(given) else os.path.dirname(given)
        while pattern and glob.has_magic(root):
            root = os.path.dirname(root)
        roots.append(os.path.abspath(root))
        paths.update((os.path.abspath(path), path) for path in found)
    root = os.path.commonpath(roots)
    files = [AudioFile(path, Path(os.path.relpath(absolute, root)).as_posix()) for absolute, path in paths.items()]
    return Path(root), sorted(files, key=lambda file: file.name)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, links to other folders included; visit each folder once."""
    root = os.path.realpath(folder)
    seen = {root}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        # A link to a folder below the root would give that folder's files a second name.
        if real in seen or (os.path.islink(path) and real.startswith(os.path.join(root, ""))):
            return False
        seen.add(real)
        return True

    def warn(error: OSError) -> None:
        warnings.warn(f"{error.filename} cannot be searched: {error.strerror}", stacklevel=4)

    for parent, folders, names in os.walk(folder, onerror=warn, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_new(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in names)


def _is_audio(path: Path, extensions: set[str]) -> bool:
    return path.suffix.lower() in extensions and path.is_file()
