"""Find audio files, and read them as 16 kHz mono.

soundfile decodes (libsndfile), PyAV what that refuses (`hear_encoders.media`), and soxr resamples.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from hear_encoders import media
from hear_encoders.nn.frontend import SAMPLE_RATE
from hear_encoders.pcm import UNKNOWN_LENGTH, check_sample_rate

# Frames decoded at a time.
BLOCK_FRAMES = 1 << 18

# Errors that soundfile raises for a file it cannot read: its own, and TypeError for samples without a header (.raw).
UNREADABLE = (soundfile.LibsndfileError, TypeError)

# libsndfile's log entry for a WAV whose header is wrong about the number of bytes.
_WAV_LENGTH = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)

# libsndfile's number of frames, or a little less, for a file that does not state it.
_UNKNOWN_FRAMES = 1 << 60

_HEADERLESS = frozenset({".raw", ".pcm"})
_NEEDS_AV = f"reading them needs PyAV: {media.INSTALL}"
_NEEDS_HEADER = "they have no header that states their sample rate: convert them to WAV"


def audio_extensions() -> set[str]:
    """Return the lower-case file extensions, with the dot, that the installed libsndfile is likely to read."""
    names = {f".{name.lower()}" for name in soundfile.available_formats()}
    return (names - {".raw"}) | {
        *(".aif", ".aifc", ".bwf", ".iff", ".mp1", ".mp2", ".mp3", ".oga", ".opus", ".snd", ".sph"),
    }


def extensions_read() -> tuple[set[str], dict[str, str]]:
    """Return the extensions of files that are read here, and those of other media, with the reason why not."""
    readable, unreadable = audio_extensions(), dict.fromkeys(_HEADERLESS, _NEEDS_HEADER)
    try:
        media.import_av()
        readable |= media.MEDIA_EXTENSIONS
    except ImportError:
        unreadable.update(dict.fromkeys(media.MEDIA_EXTENSIONS, _NEEDS_AV))
    return readable, unreadable


def load_audio(path: str | os.PathLike[str]) -> Tensor:
    """Read an audio file, or a video's sound, as 16 kHz mono: average its channels, resample other sample rates.

    libsndfile reads wav, flac, ogg, opus, mp3 and more. The rest (m4a, mp4, webm, wma, amr, ...) needs PyAV, the extra
    `av`.

    Returns:
        (samples,) float32, nominally in [-1, 1].

    Warns:
        UserWarning: the file is shorter than its header says (Ogg has no such header); the rest is returned.

    Raises:
        FileNotFoundError: no such file.
        OSError: the file cannot be opened.
        ValueError: it is not a regular file, not readable as audio, without PyAV where that is needed, has no samples,
            or states a sample rate outside 1 to 768 kHz.
    """
    return torch.cat(list(read_audio(path)))


def read_audio(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Read an audio file block by block, for hours of audio; otherwise as `load_audio`.

    Yields:
        (n,) float32, made from up to 2^18 frames at the file's rate; may be empty.
    """
    path = Path(path)
    check_regular_file(path)
    open(path, "rb").close()  # the operating system's error says more than libsndfile's
    samples = 0
    try:
        file = soundfile.SoundFile(_libsndfile_path(path))
    except UNREADABLE as error:
        blocks = _read_media(path, error)
    else:
        blocks = _read_sound(path, file)
    for block in to_16_khz(blocks):
        samples += len(block)
        yield torch.from_numpy(block)
    if samples == 0:
        raise ValueError(f"{path}: holds no samples")


def probe_s(path: str | os.PathLike[str]) -> float:
    """Return an audio file's duration according to its header, in seconds; 0 if that does not say.

    Raises: as `load_audio`, as far as reading the header shows.
    """
    path = Path(path)
    check_regular_file(path)
    open(path, "rb").close()
    try:
        with soundfile.SoundFile(_libsndfile_path(path)) as file:
            _check_rate(path, file.samplerate)
            return file.frames / file.samplerate if file.frames < _UNKNOWN_FRAMES else 0.0
    except UNREADABLE as error:
        try:
            return media.duration_s(path)
        except (ImportError, ValueError) as media_error:
            raise _unreadable(path, error, media_error) from error


def duration_s(path: str | os.PathLike[str]) -> float:
    """Return an audio file's duration according to its header, in seconds; 0 if it cannot be read."""
    try:
        return probe_s(path)
    except (OSError, ValueError):
        return 0.0


def check_regular_file(path: Path) -> None:
    """Check, without opening it, that a path is a file. A pipe would block, and a device may never end.

    Raises:
        FileNotFoundError: no such file, or a folder.
        ValueError: a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, PermissionError):
            raise
        raise FileNotFoundError(f"no such audio file: {path}") from error
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(f"no such audio file: {path} is a folder")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file, but a pipe or a device; use hear-embed --stream - or a copy")


def _libsndfile_path(path: Path) -> str | bytes:
    """Return a path as soundfile takes it. Names that are not Unicode only pass as bytes."""
    return os.fsencode(path) if os.name == "posix" else str(path)


def _read_sound(path: Path, file: soundfile.SoundFile) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks at the file's rate, channels averaged, each with the rate."""
    try:
        with file:
            _check_rate(path, file.samplerate)
            frames = 0
            last = False
            while not last:
                block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True).mean(axis=1)
                frames += len(block)
                last = len(block) < BLOCK_FRAMES
                yield block, file.samplerate
            if frames < file.frames < _UNKNOWN_FRAMES:
                warnings.warn(f"{path} is cut short: it has {frames} of {file.frames} frames", stacklevel=4)
            elif length := _WAV_LENGTH.search(file.extra_info):  # file.frames does not come from the header here
                claimed, actual = int(length[1]), int(length[2])
                if actual < claimed < UNKNOWN_LENGTH:
                    warnings.warn(f"{path} is cut short: it has {actual} of {claimed} bytes", stacklevel=4)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read_media(path: Path, refusal: Exception) -> Iterator[tuple[np.ndarray, int]]:
    """As `_read_sound`, for a file that libsndfile refused."""
    seconds = 0.0
    blocks = media.decode(path, BLOCK_FRAMES)
    while True:
        try:
            block, rate = next(blocks)
        except StopIteration as end:
            stated_s = end.value
            break
        except (ImportError, ValueError) as error:
            raise _unreadable(path, refusal, error) from error
        _check_rate(path, rate)
        seconds += len(block) / rate
        yield block, rate
    if media.is_cut_short(seconds, stated_s):
        warnings.warn(f"{path} is cut short: it has {seconds:.1f} of {stated_s:.1f} s", stacklevel=4)


def _unreadable(path: Path, refusal: Exception, media_error: Exception | None = None) -> ValueError:
    """Return the error for a file that neither libsndfile nor, if it was asked, FFmpeg reads."""
    reason = str(getattr(refusal, "error_string", refusal))
    if isinstance(media_error, ImportError):
        if media.is_media(path):
            return ValueError(f"{path}: {media_error}")
    elif media_error is not None and not isinstance(media_error, media.UnknownFormatError):
        reason = str(media_error)
    return ValueError(f"{path}: not readable as audio ({reason})")


def _check_rate(path: Path, rate: int) -> None:
    try:
        check_sample_rate(rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_16_khz(blocks: Iterable[tuple[np.ndarray, float]]) -> Iterator[np.ndarray]:
    """Resample blocks (n,) of mono audio, each with its sample rate, to 16 kHz; yields may be empty."""
    resampler, rate, rest = None, float(SAMPLE_RATE), np.zeros(0, np.float32)
    for block, block_rate in blocks:
        if block_rate != rate:  # of the first block, or of a stream that changes
            if resampler is not None:
                yield resampler.resample_chunk(rest, last=True)
            rate, resampler = block_rate, None
            if rate != SAMPLE_RATE:
                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, num_channels=1, dtype="float32")
        yield block if resampler is None else resampler.resample_chunk(block)
    if resampler is not None:
        yield resampler.resample_chunk(rest, last=True)


@dataclass(frozen=True)
class AudioFile:
    """An audio file.

    Attributes:
        path: as found from the inputs.
        name: relative to the root of the `Search`, with forward slashes.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class LeftOut:
    """A file that looks like audio or video, and is left out.

    Attributes:
        path: as found from the inputs.
        name: as of an `AudioFile`.
        reason: why, for all files with this reason.
    """

    path: Path
    name: str
    reason: str


@dataclass(frozen=True)
class Search:
    """The files that inputs select, and those they leave out; both lists are sorted by name.

    Attributes:
        root: the folder that names are relative to.
        files: to read.
        left_out: in folders and patterns, files that look like media but cannot be read.
    """

    root: Path
    files: list[AudioFile]
    left_out: list[LeftOut]


def find_audio(inputs: Sequence[str], exclude: Sequence[str] = ()) -> tuple[Path, list[AudioFile]]:
    """Return the root and the files of `search_audio`.

    Warns:
        UserWarning: a folder cannot be read; files that look like audio or video are left out.
    """
    search = search_audio(inputs, exclude)
    for line in summarize(search.left_out):
        warnings.warn(line, stacklevel=2)
    return search.root, search.files


def search_audio(inputs: Sequence[str], exclude: Sequence[str] = ()) -> Search:
    """Find audio files, and videos if PyAV is installed.

    Folders and patterns select files by extension; a file given by name is always taken. Links to folders are
    followed.

    Args:
        inputs: files, folders (searched recursively) and glob patterns.
        exclude: patterns of files to ignore: a name's or a folder's ("*.mp4", "drafts"), or a path's relative to the
            root ("drafts/*.wav"; * also matches slashes).

    Warns:
        UserWarning: a folder cannot be read.

    Returns:
        The root, and the files below it, each once. The root depends on the inputs alone, not on the files found: it
        is the folder, the file's folder, or the part of the pattern before its wildcards; for several inputs, the
        longest common path of these.

    Raises:
        FileNotFoundError: an input does not exist, or selects no audio file; or all files are excluded.
    """
    readable, unreadable = extensions_read()
    roots: list[str] = []
    paths: dict[str, Path] = {}  # by absolute path, so that no file is listed twice
    left_out: dict[str, Path] = {}
    for given in inputs:
        pattern = not os.path.exists(given)
        matches = [Path(match) for match in glob.glob(given, recursive=True)] if pattern else [Path(given)]
        found: list[Path] = []
        unread: list[Path] = []
        for match in matches:
            for path in _files_below(match) if match.is_dir() else [match]:
                suffix = path.suffix.lower()
                if (path is match and not pattern) or (suffix in readable and path.is_file()):
                    found.append(path)
                elif suffix in unreadable and path.is_file():
                    unread.append(path)
        root = given if os.path.isdir(given) else os.path.dirname(given)
        while pattern and glob.has_magic(root):
            root = os.path.dirname(root)
        if not found:
            exists = not pattern or glob.has_magic(given)
            why = "".join(f"; {line}" for line in summarize(_named(unread, root, unreadable)))
            raise FileNotFoundError(f"no audio files in {given}{why}" if exists else f"no such file or folder: {given}")
        roots.append(os.path.abspath(root))
        paths.update((os.path.abspath(path), path) for path in found)
        left_out.update((os.path.abspath(path), path) for path in unread)
    root = os.path.commonpath(roots)
    files = [AudioFile(path, _name_below(root, path)) for path in paths.values()]
    kept = [file for file in files if not is_excluded(file.name, exclude)]
    if not kept:
        raise FileNotFoundError(f"no audio files left: all {len(files)} are excluded")
    unread = [path for absolute, path in left_out.items() if absolute not in paths]
    others = [other for other in _named(unread, root, unreadable) if not is_excluded(other.name, exclude)]
    return Search(Path(root), sorted(kept, key=lambda file: file.name), others)


def summarize(left_out: Iterable[LeftOut]) -> list[str]:
    """Return a line for each reason: how many files, with which extensions, and what to do."""
    suffixes: dict[str, Counter[str]] = defaultdict(Counter)
    for other in left_out:
        suffixes[other.reason][other.path.suffix.lower()] += 1
    lines = []
    for reason, counts in suffixes.items():
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
        total = counts.total()
        lines.append(f"{total} file{'s' if total > 1 else ''} left out ({kinds}): {reason}")
    return lines


def _named(paths: Iterable[Path], root: str, reasons: dict[str, str]) -> list[LeftOut]:
    others = [LeftOut(path, _name_below(root, path), reasons[path.suffix.lower()]) for path in paths]
    return sorted(others, key=lambda other: other.name)


def _name_below(root: str, path: Path) -> str:
    return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(root))).as_posix()


def is_excluded(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a file's name relative to the root, its last part or a folder in it matches a pattern."""
    return any(
        fnmatch.fnmatchcase(candidate, pattern.rstrip("/"))
        for pattern in patterns
        for candidate in (name, *name.split("/"))
    )


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
        warnings.warn(f"{error.filename} cannot be searched: {error.strerror}", stacklevel=5)

    for parent, folders, names in os.walk(folder, onerror=warn, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_new(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in names)
