"""The ComParE baseline, with a fake openSMILE: the real one is licensed for research only and not installed here."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import soundfile
import torch

from evaluation import functionals


class Frame:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def to_numpy(self) -> np.ndarray:
        return self.values[None]


class Smile:
    """Value i is i times the clip's root mean square; value 0 is NaN."""

    def __init__(self, feature_set: str, feature_level: str) -> None:
        assert (feature_set, feature_level) == ("ComParE 2016", "functionals")

    def process_signal(self, clip: np.ndarray, rate: int) -> Frame:
        assert clip.dtype == np.float32 and clip.ndim == 1 and rate == 16000
        values = np.arange(functionals.SIZE, dtype=np.float32) * np.sqrt(np.mean(clip**2))
        values[0] = np.nan
        return Frame(values)


@pytest.fixture(autouse=True)
def opensmile(monkeypatch):
    module = types.SimpleNamespace(
        Smile=Smile,
        FeatureSet=types.SimpleNamespace(ComParE_2016="ComParE 2016"),
        FeatureLevel=types.SimpleNamespace(Functionals="functionals"),
    )
    monkeypatch.setitem(sys.modules, "opensmile", module)


@pytest.fixture
def statistics(tmp_path):
    for number in range(5):
        level = 0.1 * (1 + number)
        soundfile.write(tmp_path / f"{number}.wav", level * np.sign(np.sin(np.arange(40000))), 16000, "FLOAT")
    assert functionals.main([str(tmp_path), "-o", str(tmp_path / "functionals.npz"), "--clips", "50"]) == 0
    return tmp_path / "functionals.npz"


@pytest.mark.filterwarnings("ignore:audio peaks")
def test_embeddings_are_standardized_functionals(statistics):
    model = functionals.load_model(str(statistics))
    with np.load(statistics) as file:
        mean, std = file["mean"], file["std"]
    np.testing.assert_allclose(mean[1:] / np.arange(1, functionals.SIZE), mean[1], rtol=1e-4)
    assert 0.2 < mean[1] < 0.4 and 0.1 < std[1] < 0.2  # for levels from 0.1 to 0.5
    audio = torch.full((2, 8000), 0.3)
    audio[1] *= 100
    scene = functionals.get_scene_embeddings(audio, model)
    assert scene.shape == (2, functionals.SIZE) == (2, model.scene_embedding_size) and scene.dtype == torch.float32
    torch.testing.assert_close(scene[0, 5].item(), (5 * 0.3 - mean[5]) / std[5], rtol=1e-3, atol=1e-3)
    assert scene[0, 0] == 0 and scene[1, 5] == functionals.LARGEST


def test_unsupported_uses_raise_errors_that_explain(statistics, tmp_path, capsys):
    with pytest.raises(ValueError, match="no weights: pass the file"):
        functionals.load_model()
    with pytest.raises(ValueError, match="whole clips"):
        functionals.get_timestamp_embeddings(torch.zeros(1, 8000), functionals.load_model(str(statistics)))
    assert functionals.main([str(tmp_path / "nothing"), "-o", str(tmp_path / "x.npz")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
