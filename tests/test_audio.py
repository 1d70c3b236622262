"""Read any audio file as 16 kHz mono, and refuse files that are not audio by name."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from damage import assert_damage_raises_only_value_errors

from hear_encoders import audio, load_audio

RATE = 16_000


@pytest.fixture
def write(tmp_path: Path):
    """Write samples, (frames,) or (frames, channels), to a file in tmp_path, as exactly as the format allows."""

    def write_file(samples, rate: int = RATE, name: str = "clip.wav", subtype: str | None = None, **options) -> Path:
        path = tmp_path / name
        if subtype is None and path.suffix == ".wav":
            subtype = "FLOAT"
        soundfile.write(path, np.asarray(samples), rate, subtype=subtype, **options)
        return path

    return write_file


def tone(hz: float, rate: int, frames: int, phase: float = 0.3) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(frames) / rate + phase)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def test_samples_at_16_khz_come_through_unchanged(write) -> None:
    samples = noise(5000)
    loaded = load_audio(write(samples))
    assert loaded.dtype == torch.float32
    assert loaded.shape == (5000,)
    np.testing.assert_array_equal(loaded.numpy(), samples)


def test_path_may_be_a_string_in_any_script(write) -> None:
    path = write(noise(100), name="größe 音 [1].wav")
    np.testing.assert_array_equal(load_audio(str(path)), load_audio(path))


# Suffix, subtype, largest deviation from the written samples. A codec also rings at a hard start and end.
FORMATS = {
    "pcm 16": (".wav", "PCM_16", 4e-5),
    "pcm 24": (".wav", "PCM_24", 4e-7),
    "pcm 32": (".wav", "PCM_32", 1e-7),
    "pcm 8": (".wav", "PCM_U8", 1e-2),
    "double": (".wav", "DOUBLE", 1e-7),
    "mu-law": (".wav", "ULAW", 2e-2),
    "flac": (".flac", None, 4e-5),
    "aiff": (".aiff", None, 4e-5),
    "au": (".au", None, 4e-5),
    "caf": (".caf", None, 4e-5),
    "w64": (".w64", None, 4e-5),
    "vorbis": (".ogg", "VORBIS", 3e-2),
    "mp3": (".mp3", None, 3e-2),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_samples(write, kind: str) -> None:
    suffix, subtype, tolerance = FORMATS[kind]
    samples = tone(440, RATE, RATE)
    loaded = load_audio(write(samples, name=f"clip{suffix}", subtype=subtype)).numpy()
    assert loaded.shape == samples.shape
    inner = slice(200, -200) if kind in ("vorbis", "mp3") else slice(None)
    np.testing.assert_allclose(loaded[inner], samples[inner], atol=tolerance)


def test_opus_has_the_right_length_and_level(write) -> None:
    samples = tone(440, 48_000, 48_000)
    loaded = load_audio(write(samples, 48_000, name="clip.opus", format="OGG", subtype="OPUS"))
    assert abs(len(loaded) - RATE) <= 320
    assert loaded[1000:-1000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.02)


def test_content_decides_the_format_not_the_extension(write) -> None:
    samples = noise(1000)
    path = write(samples)
    np.testing.assert_array_equal(load_audio(path.rename(path.with_name("clip"))), samples)
    np.testing.assert_array_equal(load_audio((path.parent / "clip").rename(path.with_suffix(".mp3"))), samples)


def test_channels_are_averaged(write) -> None:
    left, right = noise(4000, seed=1), noise(4000, seed=2)
    loaded = load_audio(write(np.stack([left, right], axis=1)))
    np.testing.assert_allclose(loaded, (left + right) / 2, atol=1e-7)
    six = noise(3000, 6)
    np.testing.assert_allclose(load_audio(write(six)), six.mean(axis=1), atol=1e-7)


def test_channels_are_averaged_when_resampling_too(write) -> None:
    stereo = noise(44_100, 2)
    mixed = load_audio(write(stereo, 44_100))
    mono = load_audio(write(stereo.mean(axis=1), 44_100))
    np.testing.assert_allclose(mixed, mono, atol=1e-6)


def test_opposite_channels_cancel(write) -> None:
    left = noise(22_050)
    assert load_audio(write(np.stack([left, -left], axis=1), 22_050)).abs().max() == 0


RATES = [1000, 7350, 8000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000]


@pytest.mark.parametrize("rate", RATES)
def test_resampled_tone_is_the_tone_at_16_khz(write, rate: int) -> None:
    """Compare with the formula: pitch, level and time are right."""
    hz = 220.0
    loaded = load_audio(write(tone(hz, rate, 2 * rate), rate)).numpy()
    assert loaded.shape == (2 * RATE,)
    inner = slice(RATE // 5, -RATE // 5)  # a filter cannot know what lies beyond the edges
    np.testing.assert_allclose(loaded[inner], tone(hz, RATE, 2 * RATE)[inner], atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frames", [9_999, 30_001])
def test_resampled_length_is_the_duration(write, rate: int, frames: int) -> None:
    assert abs(len(load_audio(write(noise(frames), rate))) - frames * RATE / rate) <= 1


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_resampling_keeps_the_level(write, rate: int) -> None:
    constant = load_audio(write(np.full(2 * rate, 0.25), rate))[RATE // 2 : -RATE // 2]
    np.testing.assert_allclose(constant, 0.25, atol=1e-4)


@pytest.mark.parametrize("hz", [9000, 12_000, 20_000])
def test_frequencies_above_8_khz_are_filtered_out(write, hz: int) -> None:
    loaded = load_audio(write(tone(hz, 44_100, 44_100), 44_100))
    assert loaded[RATE // 5 : -RATE // 5].abs().max() < 1e-3  # aliased, it would be 0.5


# With blocks of 1000 frames: shorter, equal, one more, a multiple, in between.
@pytest.mark.parametrize("frames", [2, 999, 1000, 1001, 3000, 12_345])
@pytest.mark.parametrize("rate", [RATE, 8000, 44_100])
def test_blocks_leave_no_seams(write, monkeypatch: pytest.MonkeyPatch, rate: int, frames: int) -> None:
    samples = noise(frames, 2)
    path = write(samples, rate)
    whole = soxr.resample(samples.mean(axis=1), rate, RATE) if rate != RATE else samples.mean(axis=1)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1000)
    loaded = load_audio(path)
    assert loaded.shape == whole.shape
    np.testing.assert_allclose(loaded, whole, atol=1e-6)


def test_file_is_read_in_blocks(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(noise(100_000, 2), 48_000)
    asked = []

    class Watched(soundfile.SoundFile):
        def read(self, frames: int = -1, *args, **kwargs):
            asked.append(frames)
            return super().read(frames, *args, **kwargs)

    monkeypatch.setattr(soundfile, "SoundFile", Watched)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 10_000)
    load_audio(path)
    assert set(asked) == {10_000}
    assert len(asked) in (10, 11)


def test_examples_have_their_documented_lengths() -> None:
    examples = Path(__file__).parents[1] / "examples"
    seconds = {"speech.flac": 5.30, "music.ogg": 6.60, "till.wav": 2.67, "bell.mp3": 4.50}
    for name, duration in seconds.items():
        loaded = load_audio(examples / name)
        assert len(loaded) / RATE == pytest.approx(duration, abs=0.01), name
        assert 0.05 < loaded.abs().max() <= 1.1, name
        assert loaded.isfinite().all(), name


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothere\.wav"):
        load_audio(tmp_path / "nothere.wav")


def test_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        load_audio(tmp_path)


@pytest.mark.parametrize("rate", [RATE, 8000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_file_without_samples_is_refused(write, rate: int, channels: int) -> None:
    path = write(np.zeros((0, channels)), rate)
    with pytest.raises(ValueError, match=r"clip\.wav: holds no samples"):
        load_audio(path)


def test_file_shorter_than_one_sample_at_16_khz_is_refused(write) -> None:
    with pytest.raises(ValueError, match=r"clip\.wav"):
        load_audio(write(noise(3), 192_000))


JUNK = {
    "nothing": b"",
    "a wav's first bytes": b"RIFF\x24\x00\x00\x00WAVE",
    "text": b"not audio " * 500,
    "zeros": bytes(4096),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
}


@pytest.mark.parametrize("content", JUNK)
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".txt", ""])
def test_file_that_is_not_audio_is_refused(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(JUNK[content])
    with pytest.raises(ValueError, match=f"junk{suffix}"):
        load_audio(path)


def test_samples_without_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "headerless.raw"  # nothing states the sample rate
    path.write_bytes(bytes(32_000))
    with pytest.raises(ValueError, match=r"headerless\.raw"):
        load_audio(path)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_truncated_file_is_an_error_or_a_warning(write, suffix: str) -> None:
    """The headers state the length, so half a recording must not silently pass for the whole."""
    path = write(noise(44_100), 44_100, name=f"cut{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning), match=rf"cut\{suffix}"):
            load_audio(path)


@pytest.mark.parametrize("length", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_that_was_written_to_a_pipe_is_complete(write, recwarn, length: int) -> None:
    """Its header could not state the length."""
    path = write(noise(8000), RATE, name="pipe.wav")
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + length.to_bytes(4, "little") + content[place + 4 :])
    assert len(load_audio(path)) == 8000
    assert not recwarn.list


def test_file_that_cannot_be_opened_is_not_called_damaged(write, monkeypatch) -> None:
    path = write(noise(8000), RATE)

    def refuse(name, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=str(path)):
        load_audio(path)


@pytest.mark.filterwarnings("ignore:.* is cut short")
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_damaged_file_raises_only_value_errors_that_name_it(write, suffix: str) -> None:
    original = write(noise(4000, 2), 44_100, name=f"clip{suffix}")
    assert_damage_raises_only_value_errors(original, attempts=20, header=200)


def test_extensions_cover_the_common_formats() -> None:
    extensions = audio.audio_extensions()
    assert extensions >= {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"}
    assert all(extension == extension.lower() and extension.startswith(".") for extension in extensions)
    assert not extensions & {".raw", ".txt", ".npy", ".npz", ".json", ".md"}
