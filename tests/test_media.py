"""Read what libsndfile refuses, through PyAV: the same audio as in the WAV that it was made from."""

from __future__ import annotations

import os
import re
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from damage import assert_damage_raises_only_value_errors

from hear_encoders import audio, load_audio, media
from hear_encoders.audio import duration_s, probe_s

av = pytest.importorskip("av")

EXAMPLES = Path(__file__).parents[1] / "examples"
BIT_RATES = {"libopencore_amrnb": 12_200, "g722": 64_000}


def write_media(
    path: Path,
    codec: str | None,
    samples: np.ndarray,
    rate: int,
    *,
    format: str | None = None,
    first_s: float = 0.0,
    video: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode samples (channels, n) with FFmpeg. `codec` None writes no sound."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        pictures = container.add_stream("mpeg4", rate=10) if video else None
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        if codec is not None:
            stream = container.add_stream(codec, rate=rate, layout=layout)
            stream.bit_rate = BIT_RATES.get(codec, 128_000)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), "fltp", layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(first_s * rate)
            context = stream.codec_context
            resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                container.mux(stream.encode(part))
        if pictures is not None:
            for number in range(10):
                picture = av.VideoFrame(64, 64, "yuv420p")
                picture.pts, picture.time_base = number, Fraction(1, 10)
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
    return path


def speech(rate: int, channels: int = 1) -> np.ndarray:
    """Return the example at a sample rate: (channels, n), each channel at another level."""
    samples, original = soundfile.read(EXAMPLES / "speech.flac", dtype="float32")
    return soxr.resample(samples, original, rate) * np.linspace(1, 0.4, channels, dtype=np.float32)[:, None]


# Codec, sample rate, channels, frame in samples, least correlation with the original.
FORMATS = {
    "clip.m4a": ("aac", 44_100, 2, 1024, 0.99),
    "clip.aac": ("aac", 44_100, 1, 2048, 0.98),  # nothing states how much the encoder added
    "clip.mp4": ("aac", 48_000, 2, 1024, 0.99),
    "clip.mov": ("aac", 48_000, 1, 1024, 0.99),
    "surround.mp4": ("aac", 48_000, 6, 1024, 0.95),  # without high frequencies in one channel
    "lossless.m4a": ("alac", 44_100, 2, 1, 0.9999),
    "clip.3gp": ("libopencore_amrnb", 8000, 1, 160, 0.5),  # a vocoder, which does not keep the phase
    "clip.amr": ("libopencore_amrnb", 8000, 1, 160, 0.5),
    "clip.webm": ("libopus", 48_000, 2, 960, 0.99),
    "clip.mkv": ("aac", 44_100, 2, 1024, 0.99),
    "lossless.mka": ("flac", 44_100, 1, 1, 0.9999),
    "clip.wma": ("wmav2", 44_100, 2, 2048, 0.99),
    "clip.g722": ("g722", 16_000, 1, 22, 0.99),
    "clip.wv": ("wavpack", 44_100, 2, 1, 0.999),
    "clip.avi": ("mp2", 44_100, 1, 1152, 0.98),
}


@pytest.mark.parametrize("name", FORMATS)
def test_media_hold_the_audio_they_were_made_from(tmp_path: Path, name: str) -> None:
    codec, rate, channels, frame, least = FORMATS[name]
    samples = speech(rate, channels)
    path = write_media(tmp_path / name, codec, samples, rate)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    loaded = load_audio(path).numpy()
    wanted = soxr.resample(samples.mean(axis=0), rate, 16_000)
    length_s, frame_samples = samples.shape[1] / rate, frame / rate * 16_000
    assert abs(len(loaded) - len(wanted)) <= frame_samples + 1
    estimated = path.suffix in (".aac", ".amr")  # from the bit rate
    assert duration_s(path) == pytest.approx(length_s, rel=0.05 if estimated else 0.01)
    shift = lag(loaded, wanted)
    exact = codec in ("alac", "flac", "wavpack", "libopus") or (codec == "aac" and path.suffix != ".aac")
    assert abs(shift) <= (0 if exact else frame_samples)
    loaded, wanted = loaded[max(0, shift) :], wanted[max(0, -shift) :]
    both = [values[: min(len(loaded), len(wanted))] for values in (loaded, wanted)]
    assert np.corrcoef(both)[0, 1] > least
    assert both[0].std() == pytest.approx(both[1].std(), rel=0.07)


def lag(loaded: np.ndarray, wanted: np.ndarray) -> int:
    """Return by how many samples `loaded` is late."""
    size = len(loaded) + len(wanted)
    products = np.fft.irfft(np.fft.rfft(loaded, size) * np.fft.rfft(wanted, size).conj(), size)
    place = int(products.argmax())
    return place if place < size // 2 else place - size


def test_blocks_leave_no_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_media(tmp_path / "clip.m4a", "aac", speech(44_100), 44_100)
    whole = load_audio(path).numpy()
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5000)
    blocks = [block.numpy() for block in audio.read_audio(path)]
    assert len(blocks) > 40 and max(map(len, blocks)) < 3000
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)


def test_integer_samples_are_scaled_by_their_width(tmp_path: Path) -> None:
    samples = speech(16_000, 2)
    for codec in ("pcm_u8", "pcm_s16le", "pcm_s32le", "pcm_f32le", "pcm_f64le"):
        path = write_media(tmp_path / f"{codec}.mkv", codec, samples, 16_000)
        np.testing.assert_allclose(load_audio(path), samples.mean(axis=0), atol=1e-2 if codec == "pcm_u8" else 1e-4)


def test_opus_that_libsndfile_calls_malformed_is_read(tmp_path: Path) -> None:
    """FFmpeg writes such files if the input's timestamps begin before zero."""
    samples = speech(48_000)
    path = write_media(tmp_path / "early.opus", "libopus", samples, 48_000, first_s=-0.5)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    loaded = load_audio(path).numpy()
    assert abs(len(loaded) / 16_000 - samples.shape[1] / 48_000) < 0.52
    wanted = soxr.resample(samples[0], 48_000, 16_000)[-len(loaded) :]
    assert np.corrcoef(loaded[-32_000:], wanted[-32_000:])[0, 1] > 0.95


def test_sound_of_a_video_is_read(tmp_path: Path) -> None:
    samples = speech(48_000)
    path = write_media(tmp_path / "video.mp4", "aac", samples, 48_000, video=True)
    assert abs(len(load_audio(path)) / 16_000 - samples.shape[1] / 48_000) < 0.03


def test_video_without_sound_is_named(tmp_path: Path) -> None:
    path = write_media(tmp_path / "silent.mp4", None, np.zeros((1, 0)), 48_000, video=True)
    for read in (load_audio, probe_s):
        with pytest.raises(ValueError, match=rf"^{path}: not readable as audio \(no sound track\)$"):
            read(path)


def test_sound_without_a_decoder_is_named(tmp_path: Path) -> None:
    path = write_media(tmp_path / "protected.m4a", "aac", speech(44_100), 44_100)
    content = path.read_bytes()
    assert content.count(b"mp4a") == 1
    path.write_bytes(content.replace(b"mp4a", b"zzzz").replace(b"esds", b"free"))
    with pytest.raises(ValueError, match=rf"^{path}: not readable as audio \(no decoder for its sound"):
        load_audio(path)


def test_file_that_neither_decoder_knows_gets_libsndfiles_reason(tmp_path: Path, capfd) -> None:
    for name in ("junk.mp4", "junk.amr", "junk.wav", "junk.g722.bin"):
        path = tmp_path / name
        path.write_bytes(b"not audio " * 500)
        with pytest.raises(ValueError, match=rf"{path}: not readable as audio \(.*(Format not recognised|unknown)"):
            load_audio(path)
    assert capfd.readouterr().err == ""  # FFmpeg is quiet


@pytest.mark.parametrize("content", ["#EXTM3U\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"])
def test_playlists_do_not_open_other_files(tmp_path: Path, content: str) -> None:
    secret = write_media(tmp_path / "secret.aac", "aac", speech(44_100), 44_100)
    for name in ("list.m3u8", "list.mp4", "list.txt"):
        (tmp_path / name).write_text(content.format(secret))
        with pytest.raises(ValueError, match="not readable"):
            load_audio(tmp_path / name)


def test_cut_video_is_a_warning_or_an_error(tmp_path: Path) -> None:
    """Half a recording must not silently pass for the whole."""
    for name, codec, options in (("cut.m4a", "aac", {"movflags": "faststart"}), ("cut.mka", "flac", {})):
        path = write_media(tmp_path / name, codec, speech(44_100), 44_100, options=options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ValueError, UserWarning), match=name):
                load_audio(path)


@pytest.mark.filterwarnings("ignore:.* is cut short")
@pytest.mark.parametrize("name", ["clip.m4a", "clip.webm", "clip.amr", "clip.wma"])
def test_damaged_media_raise_only_value_errors_that_name_them(tmp_path: Path, name: str) -> None:
    codec, rate, channels, *_ = FORMATS[name]
    original = write_media(tmp_path / name, codec, speech(rate, channels)[:, :rate], rate)
    assert_damage_raises_only_value_errors(original, attempts=30, header=600)


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    path = write_media(tmp_path / "clip.m4a", "aac", speech(44_100), 44_100)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=re.escape(f"{path}: needs PyAV: pip install 'hear-audiomaepp[av]'")):
        load_audio(path)
    assert duration_s(path) == 0
    assert len(load_audio(EXAMPLES / "speech.flac")) > 80_000  # needs no PyAV


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only on Linux")
def test_name_that_is_not_unicode_is_read(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.m4a")
    write_media(tmp_path / "clip.m4a", "aac", speech(44_100), 44_100).rename(path)
    assert len(load_audio(path)) > 80_000


def test_extensions_are_those_that_libsndfile_lacks() -> None:
    assert not media.MEDIA_EXTENSIONS & audio.audio_extensions()
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in media.MEDIA_EXTENSIONS)
