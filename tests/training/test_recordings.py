"""Recordings in Debian packages: inside archives, Doom's WADs, sound fonts and WAV files around Ogg."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
import soundfile

from training.corpora.recordings import read_recording, wad_sound

RATE = 16000


@pytest.fixture
def cache(tmp_path):
    """A cache with an empty package `toys`; tests add files."""
    (tmp_path / "toys").mkdir()
    return tmp_path


def tone(seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def test_archive_members_are_read(cache):
    wav = io.BytesIO()
    soundfile.write(wav, tone(0.5), RATE, format="WAV")
    with zipfile.ZipFile(cache / "toys" / "data.pk3", "w") as opened:
        opened.writestr("sound/beep.wav", wav.getvalue())
    assert read_recording("toys/data.pk3.d/sound/beep.wav", cache) == pytest.approx(tone(0.5), abs=1e-4)


def test_sounds_in_a_wad_are_read(cache):
    values = np.arange(64, 192, dtype=np.uint8)
    padded = bytes([values[0]] * 16) + values.tobytes() + bytes([values[-1]] * 16)
    lump = struct.pack("<HHI", 3, RATE, len(padded)) + padded
    wad = struct.pack("<4sII", b"IWAD", 2, 12 + len(lump)) + lump
    wad += struct.pack("<II8s", 0, 0, b"START") + struct.pack("<II8s", 12, len(lump), b"DSBEEP")
    (cache / "toys" / "doom.wad").write_bytes(wad)
    samples = read_recording("toys/doom.wad.d/DSBEEP.wav", cache)
    assert np.array_equal(samples, (values.astype(np.float32) - 128) / 128)
    with pytest.raises(FileNotFoundError, match="no lump DSBOOP"):
        read_recording("toys/doom.wad.d/DSBOOP.wav", cache)
    with pytest.raises(ValueError, match="START is not a sound"):
        wad_sound(wad, "START")


def test_sound_font_samples_are_read(cache):
    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def header(name: bytes, start: int, end: int) -> bytes:
        return struct.pack("<20sIIIIIBbHH", name, start, end, start, end, RATE, 60, 0, 0, 1)

    values = np.arange(-500, 500, dtype="<i2")
    body = b"sfbk" + chunk(b"LIST", b"INFO" + chunk(b"INAM", b"toy"))
    body += chunk(b"LIST", b"sdta" + chunk(b"smpl", values.tobytes()))
    shdr = header(b"kick", 0, 600) + header(b"snare", 646, 946) + header(b"EOS", 0, 0)
    body += chunk(b"LIST", b"pdta" + chunk(b"phdr", b"\0" * 38) + chunk(b"shdr", shdr))
    (cache / "toys" / "Kit.sf2").write_bytes(chunk(b"RIFF", body))
    samples = read_recording("toys/extracted/Kit/00001_k060_snare.flac", cache)
    assert np.array_equal(samples, values[646:946].astype(np.float32) / 32768)
    with pytest.raises(ValueError, match="sample 0 is called 'kick', expected 'snare'"):
        read_recording("toys/extracted/Kit/00000_k060_snare.flac", cache)


def test_an_ogg_stream_in_a_wav_file_is_read(cache):
    ogg = io.BytesIO()
    soundfile.write(ogg, tone(0.5), RATE, format="OGG", subtype="VORBIS")
    data = ogg.getvalue()
    form = struct.pack("<HHIIHH", 0x674F, 1, RATE, RATE, 1, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    (cache / "toys" / "beep.ogg").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert read_recording("toys/beep.ogg", cache) == pytest.approx(tone(0.5), abs=0.05)


def test_a_file_that_is_not_audio_is_an_error(cache):
    (cache / "toys" / "beep.wav").write_bytes(b"RIFF\0\0\0\0WAVEdata\2\0\0\0no")
    with pytest.raises(ValueError, match=r"beep\.wav"):
        read_recording("toys/beep.wav", cache)
