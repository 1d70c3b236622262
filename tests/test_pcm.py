"""Audio from a pipe: WAV and raw samples, however the bytes arrive."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from hear_encoders import load_audio
from hear_encoders.pcm import ENCODINGS, PCM, read_pipe

SUBTYPES = {
    "u8": "PCM_U8",
    "s16le": "PCM_16",
    "s24le": "PCM_24",
    "s32le": "PCM_32",
    "f32le": "FLOAT",
    "f64le": "DOUBLE",
}


class Pipe(io.RawIOBase):
    """Returns bytes in pieces of random sizes, as a pipe may, and cannot seek."""

    def __init__(self, data: bytes, largest: int = 977) -> None:
        self.data, self.largest, self.random = data, largest, np.random.default_rng(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(len(buffer), len(self.data), int(self.random.integers(1, self.largest)))
        buffer[:size], self.data = self.data[:size], self.data[size:]
        return size


def piped(data: bytes, raw: PCM | None = None) -> np.ndarray:
    return np.concatenate(list(read_pipe(io.BufferedReader(Pipe(data)), raw or PCM())))


@pytest.fixture
def sound() -> np.ndarray:
    """(50001, 2) at 44.1 kHz."""
    random = np.random.default_rng(1)
    seconds = np.arange(50001) / 44100
    tones = np.stack([np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 3000 * seconds)], axis=1)
    return 0.4 * tones + random.normal(0, 0.01, tones.shape)


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_piped_wav_equals_the_file(encoding, kind, sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound, 44100, SUBTYPES[encoding], format=kind)
    expected = load_audio(tmp_path / "a.wav").numpy()
    got = piped((tmp_path / "a.wav").read_bytes(), PCM("f64le", 8000, 7))  # the header overrides it
    assert got.dtype == np.float32 and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_raw_samples_are_read_in_the_given_format(encoding, sound, tmp_path):
    soundfile.write(tmp_path / "a.raw", sound, 16000, SUBTYPES[encoding], endian="LITTLE")
    soundfile.write(tmp_path / "a.wav", sound, 16000, SUBTYPES[encoding])
    data = (tmp_path / "a.raw").read_bytes()
    expected = load_audio(tmp_path / "a.wav").numpy()
    np.testing.assert_allclose(piped(data, PCM(encoding, 16000, 2)), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(piped(data + b"\1" * (len(data) // 50001 - 1), PCM(encoding, 16000, 2)), expected)


def test_piped_wav_may_lack_its_length_and_have_other_chunks(sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound[:, 0], 16000, "PCM_16")
    wav = (tmp_path / "a.wav").read_bytes()
    at = wav.index(b"data") + 4
    samples = wav[at + 4 :]
    extra = b"LIST" + struct.pack("<I", 4) + b"abcd"
    expected = load_audio(tmp_path / "a.wav").numpy()
    for length in (0, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF):
        np.testing.assert_array_equal(piped(wav[:at] + struct.pack("<I", length) + samples), expected)
    np.testing.assert_array_equal(piped(wav + extra), expected)
    np.testing.assert_array_equal(piped(wav[:12] + extra + wav[12:]), expected)  # and before the format


def test_empty_input_gives_no_samples():
    assert piped(b"").size == 0
    assert piped(b"\0\0\0", PCM("f32le")).size == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF\0\0\0\0AVI LIST", "another kind of RIFF"),
        (b"fLaC\0\0\0\0", "got FLAC: decode it first"),
        (b"ID3\4\0\0\0\0", "got MP3"),
        (b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0", "ends inside the WAV header"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "no 'fmt '"),
        (b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0\1\0", "at least 16 bytes, got 2"),
        (b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 2, 1, 16000, 0, 0, 4), "got format 2 with 4 bits"),
        (b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 1, 1, 0, 0, 16), "to 768000 Hz, got 1"),
        (
            b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 0, 16000, 0, 0, 16),
            "channels must be at least",
        ),
    ],
)
def test_damaged_header_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        piped(data)


@pytest.mark.parametrize("head", [b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"])
def test_input_that_begins_like_mp3_is_read_as_samples_with_a_warning(head):
    with pytest.warns(UserWarning, match="begins like MP3"):
        assert piped(head + b"\0\0").size == 2


def test_impossible_formats_are_refused():
    with pytest.raises(ValueError, match=r"encoding must be one of .*; got 'mp3'"):
        PCM("mp3")
    with pytest.raises(ValueError, match="expected a sample rate from 1000 to 768000 Hz, got 0"):
        PCM(sample_rate=0)
