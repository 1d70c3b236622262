"""The front end and the resampling against torchaudio itself. `.ci/run` installs it beside this torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hear_axlstm
from hear_encoders import load_audio
from hear_encoders.nn.frontend import LogMel, clip_statistics, mel_matrix, normalize
from hear_encoders.nn.frontend_torchaudio import TorchaudioLogMel
from training.corpora import prepare
from training.corpora.shards import ShardIndex

torchaudio = pytest.importorskip("torchaudio", reason="needs torchaudio, see .ci/run")

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIPS = ("speech.flac", "till.wav", "music.ogg", "bell.mp3")
EPSILON = 2.0**-23


def spectrogram():
    """MelSpectrogram with the papers' settings, written out."""
    return torchaudio.transforms.MelSpectrogram(
        sample_rate=16000, n_fft=400, win_length=400, hop_length=160, f_min=50, f_max=8000, n_mels=80
    )


def torchaudio_logmel(audio, dtype=torch.float32):
    return torch.log(spectrogram().to(dtype)(audio.to(dtype)) + EPSILON).transpose(1, 2)


def sounds():
    """Clips at full scale, silence, and a step."""
    seconds = torch.arange(32000, dtype=torch.float64) / 16000
    noise = torch.rand(32000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tone = torch.sin(2 * torch.pi * 1000 * seconds).float()
    return {
        "silence": torch.zeros(32000),
        "nearly silence": noise * 2.0**-15,
        "ones": torch.ones(32000),
        "noise": noise,
        "tone": tone,
        "square wave": tone.sign(),
        "impulse": torch.zeros(32000).index_fill(0, torch.tensor([16000]), 1.0),
        "step": torch.cat([torch.zeros(16000), noise[16000:]]),
    }


# ---- log-mel ----


def test_the_mel_matrix_is_torchaudios():
    torch.testing.assert_close(mel_matrix(), spectrogram().mel_scale.fb, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_logmel_of_recordings_is_torchaudios(name):
    audio = load_audio(EXAMPLES / name)[None]
    logmel = LogMel()(audio)
    torch.testing.assert_close(logmel.double(), torchaudio_logmel(audio, torch.float64), rtol=0, atol=3e-6)
    expected = torchaudio_logmel(audio)  # its FFT in float32: in silent bands that is seen
    errors = (logmel - expected).abs()
    assert errors.max() < 2e-3 and errors.mean() < 1e-5
    normalized = (expected - expected.mean()) / (expected.std() + 1e-8)
    torch.testing.assert_close(normalize(logmel, *clip_statistics(logmel)), normalized, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", sounds())
def test_logmel_at_full_scale_and_in_silence_is_torchaudios(name):
    audio = sounds()[name][None]
    expected = torchaudio_logmel(audio, torch.float64)
    torch.testing.assert_close(LogMel()(audio).double(), expected, rtol=0, atol=3e-6)
    if name == "silence":
        assert torch.equal(LogMel()(audio), torchaudio_logmel(audio))


def test_logmel_of_every_length_from_1_to_3000_samples_is_torchaudios():
    audio = load_audio(EXAMPLES / "speech.flac")[None, 8000:11000]
    ours, theirs = LogMel(), spectrogram().double()
    for samples in range(1, 3001):
        clip = audio[:, :samples]
        logmel = ours(clip)
        if samples < 201:  # which torchaudio refuses: half a window does not fit for reflection
            clip = torch.nn.functional.pad(clip, (0, 201 - samples))
        expected = torch.log(theirs(clip.double()) + EPSILON).transpose(1, 2)
        assert logmel.shape == expected.shape == (1, max(samples, 201) // 160 + 1, 80)
        assert (logmel - expected).abs().max() < 3e-6, samples


# ---- frontend="torchaudio" ----


@pytest.mark.parametrize("samples", [100, 201, 17120, 68801])
def test_the_torchaudio_frontend_is_torchaudio_to_the_last_bit(noise, samples):
    audio = noise(2, samples)
    padded = torch.nn.functional.pad(audio, (0, max(0, 201 - samples)))
    assert torch.equal(TorchaudioLogMel()(audio), torchaudio_logmel(padded))


def test_the_torchaudio_frontend_equals_the_numbers_recorded_with_the_papers_code(golden):
    tensors, _ = golden("frontend")
    for samples in (17120, 32000, 68801):
        errors = (TorchaudioLogMel()(tensors[f"audio.{samples}"]) - tensors[f"logmel_raw.{samples}"][:, 0]).abs()
        assert errors.max() < 1e-4 and (errors > 1e-6).float().mean() < 2e-3  # FFTs differ between processors


def test_a_model_embeds_with_torchaudios_logmel():
    audio = load_audio(EXAMPLES / "speech.flac")[None]
    own, model = hear_axlstm.load_model(), hear_axlstm.load_model(frontend="torchaudio")
    assert (own.frontend, model.frontend) == ("own", "torchaudio")
    assert torch.equal(model.log_mel(audio), torchaudio_logmel(audio))
    expected, embeddings = own.timestamp_embeddings(audio)[0], model.timestamp_embeddings(audio)[0]
    assert not torch.equal(embeddings, expected)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-3)


def test_shards_hold_torchaudios_logmel(tmp_path):
    out = tmp_path / "shards"
    arguments = [str(EXAMPLES / "speech.flac"), str(out), "--jobs", "1"]
    assert prepare.main([*arguments, "--frontend", "torchaudio"]) == 0
    audio = load_audio(EXAMPLES / "speech.flac")[None]
    values = torch.from_numpy(ShardIndex.open(out).read(0).copy())
    assert torch.equal(values, torchaudio_logmel(audio)[0].half())
    assert prepare.main(arguments) == 2  # the folder belongs to the other front end


# ---- resampling ----


def at_16_khz(signal, rate, tmp_path):
    """A signal resampled by ours, through a file, and by torchaudio; both float64, without the edges."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, signal, rate, subtype="DOUBLE")
    theirs = torchaudio.functional.resample(torch.from_numpy(signal), rate, 16000).numpy()
    return [resampled[800:-800] for resampled in (load_audio(path).double().numpy(), theirs)]


def level_db(signal):
    return 10 * math.log10(np.mean(np.square(signal)) + 1e-20)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.8, 0.9])
def test_tones_are_resampled_better_than_by_torchaudio(rate, part, tmp_path):
    hz = part * min(rate, 16000) / 2
    expected = 0.5 * np.sin(2 * np.pi * hz * np.arange(32000) / 16000)
    ours, theirs = at_16_khz(0.5 * np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate), rate, tmp_path)
    assert abs(len(ours) - len(theirs)) <= 1
    errors_db = [level_db(resampled - expected[800 : 800 + len(resampled)]) for resampled in (ours, theirs)]
    # At 90 % of the band -70 dB and -20 dB: torchaudio's filter is short. In its middle -115 dB and -60 dB.
    assert errors_db[0] < (-110 if part <= 0.5 else -65) and errors_db[0] < errors_db[1] - 40


@pytest.mark.parametrize("rate", [22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_tones_above_8_khz_disappear_better_than_by_torchaudio(rate, part, tmp_path):
    hz = 9000 + part * (rate / 2 - 9000)
    ours, theirs = at_16_khz(0.5 * np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate), rate, tmp_path)
    assert level_db(ours) < -100 and level_db(ours) < level_db(theirs) - 10


@pytest.mark.parametrize("rate", [22050, 32000, 44100, 48000])
def test_sweeps_are_resampled_better_than_by_torchaudio(rate, tmp_path):
    def sweep(rate):  # from 50 to 7000 Hz in 2 s
        seconds = np.arange(2 * rate) / rate
        return 0.5 * np.sin(2 * np.pi * (50 * seconds + (7000 - 50) / 4 * seconds**2))

    expected = sweep(16000)[800:]
    both = at_16_khz(sweep(rate), rate, tmp_path)
    errors_db = [level_db(resampled - expected[: len(resampled)]) for resampled in both]
    assert errors_db[0] < -80 and errors_db[0] < errors_db[1] - 40
