"""Read recordings in Debian packages as 16 kHz mono samples.

A recording's name is `PACKAGE/PATH`, with its path in the package. Most are audio files. Others are inside a
container: a zip archive (`ARCHIVE.d/MEMBER`), Doom's WAD (`FILE.wad.d/LUMP.wav`), a sound font
(`PACKAGE/extracted/FONT/NUMBER_kKEY_NAME.flac`: sample NUMBER of FONT.sf2), or a WAV file around an Ogg stream.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from hear_encoders import media
from hear_encoders.audio import load_audio
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.archive import locate

_SOUND_FONT_SAMPLE = re.compile(r"extracted/(?P<font>[^/]+)/(?P<number>\d+)_k\d+_(?P<name>[^/]*)\.flac")
_WAD_LUMP = re.compile(r"(?P<wad>.+\.wad)\.d/(?P<lump>[^/]{1,8})\.wav")


def packages_of(recordings: Iterable[str]) -> list[str]:
    """Return the recordings' packages, sorted."""
    return sorted({recording.split("/", 1)[0] for recording in recordings})


def check_decoders(recordings: Iterable[str]) -> None:
    """Check that the recordings can be decoded, before anything is fetched.

    Raises:
        ImportError: PyAV is not installed, and a recording needs it: G.722, Matroska, WavPack, ...
    """
    needing = [recording for recording in recordings if media.is_media(recording)]
    if needing:
        try:
            media.import_av()
        except ImportError as error:
            raise ImportError(f"{needing[0]}: {error}") from error


def is_plain_file(path: str) -> bool:
    """Return True if a path in a package is, judging by its name, an audio file that libsndfile reads."""
    inside = _SOUND_FONT_SAMPLE.fullmatch(path) or _WAD_LUMP.fullmatch(path)
    return not inside and not media.is_media(path)


def read_recording(recording: str, cache: Path) -> np.ndarray:
    """Read `PACKAGE/PATH` from the cache of `training.corpora.archive`.

    Returns:
        (N,) float32 at 16 kHz, channels averaged.

    Raises:
        FileNotFoundError: no such file. The lists are for Debian 12; another release may have moved it.
        ValueError: not decodable, or not without PyAV.
    """
    package, path = recording.split("/", 1)
    folder = cache / package
    if match := _SOUND_FONT_SAMPLE.fullmatch(path):
        fonts = sorted(folder.rglob(f"{match['font']}.sf2"))
        if not fonts:
            raise FileNotFoundError(f"package {package} has no file {match['font']}.sf2")
        return _resample(*sound_font_sample(fonts[0].read_bytes(), int(match["number"]), match["name"]))
    if match := _WAD_LUMP.fullmatch(path):
        return _resample(*wad_sound(locate(folder, match["wad"]).read_bytes(), match["lump"]))
    file = locate(folder, path)
    try:
        return load_audio(file).numpy()
    except ValueError:
        samples = ogg_in_wav(file.read_bytes())
        if samples is None:
            raise
        return _resample(*samples)


def sound_font_sample(data: bytes, number: int, name: str) -> tuple[np.ndarray, int]:
    """Read sample `number` of a sound font (SoundFont 2.01, 16 bits).

    Returns:
        (N,) float32, and the sample rate.

    Raises:
        ValueError: not a sound font, or the sample's name is not `name`.
    """
    chunks = _riff_chunks(data)
    if not {b"smpl", b"shdr"} <= chunks.keys():
        raise ValueError("not a sound font: no samples (smpl) or no sample headers (shdr)")
    headers = list(struct.iter_unpack("<20sIIIIIBbHH", chunks[b"shdr"]))[:-1]  # the last is a terminator
    if number >= len(headers):
        raise ValueError(f"the sound font has {len(headers)} samples, so no number {number}")
    raw_name, start, end, _, _, rate, *_ = headers[number]
    found = raw_name.split(b"\0")[0].decode("latin-1")
    if found != name:
        raise ValueError(f"the sound font's sample {number} is called {found!r}, expected {name!r}")
    return np.frombuffer(chunks[b"smpl"], "<i2")[start:end].astype(np.float32) / 32768, rate


def ogg_in_wav(data: bytes) -> tuple[np.ndarray, int] | None:
    """Decode a WAV file that contains an Ogg stream, which libsndfile refuses. Return None for any other file."""
    if data[:4] != b"RIFF" or not (ogg := _riff_chunks(data).get(b"data", b"")).startswith(b"OggS"):
        return None
    samples, rate = soundfile.read(io.BytesIO(ogg), dtype="float32", always_2d=True)
    return samples.mean(axis=1), rate


def _riff_chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the contents of a RIFF file's chunks by name, including those inside lists."""
    chunks: dict[bytes, bytes] = {}
    ends = [len(data)]
    at = 0
    while at + 8 <= ends[-1]:
        name, size = struct.unpack_from("<4sI", data, at)
        if name in (b"RIFF", b"LIST"):
            at += 12
            continue
        chunks[name] = data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return chunks


def wad_sound(data: bytes, lump: str) -> tuple[np.ndarray, int]:
    """Read a sound in a Doom WAD: a header, then unsigned 8-bit samples with 16 bytes of padding at each end.

    Returns:
        (N,) float32, and the sample rate.

    Raises:
        FileNotFoundError: no such lump.
        ValueError: not a WAD, or not a sound.
    """
    kind, lumps, directory = struct.unpack_from("<4sII", data)
    if kind not in (b"IWAD", b"PWAD"):
        raise ValueError(f"not a WAD: begins with {kind!r}")
    for place, size, name in struct.iter_unpack("<II8s", data[directory : directory + 16 * lumps]):
        if name.rstrip(b"\0") == lump.encode("ascii"):
            form, rate, samples = struct.unpack_from("<HHI", data, place)
            if form != 3 or not 32 < samples <= size - 8:
                raise ValueError(f"lump {lump} is not a sound")
            values = np.frombuffer(data, np.uint8, samples - 32, place + 8 + 16)
            return (values.astype(np.float32) - 128) / 128, rate
    raise FileNotFoundError(f"the WAD has no lump {lump}")


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)
