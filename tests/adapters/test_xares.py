"""Our encoders in X-ARES: its checker, and a small task made here, from tar files to scores."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence

from hear_encoders import Embedder
from hear_encoders.adapters.xares import XaresModel


@pytest.fixture
def clips(noise):
    return [noise(1, samples, seed=samples)[0] for samples in (20_000, 7_000, 641)]


def test_padded_clips_have_their_own_embeddings_and_means(small_encoder, clips):
    ours = Embedder(small_encoder)
    with torch.inference_mode():
        embeddings = XaresModel(ours)(pad_sequence(clips, batch_first=True)).numpy()
    for row, (steps, _) in zip(embeddings, ours.encode(clips, timestamps=True)):
        np.testing.assert_allclose(row[: len(steps)], steps, atol=2e-6)
    np.testing.assert_allclose(embeddings.mean(1), ours.encode(clips), atol=2e-6)


def test_a_silent_clip_is_embedded_whole(small_embedder):
    audio, model = torch.zeros(2, 8000), small_embedder()
    audio[1] = torch.linspace(-0.5, 0.5, 8000)
    with torch.no_grad():
        embeddings = XaresModel(model)(audio)
    torch.testing.assert_close(embeddings.mean(1), model.scene_embeddings(audio))


@pytest.mark.parametrize("name", ["AudioMAEppEncoder", "AxLSTMEncoder"])
def test_encoders_pass_the_checker_of_xares(name):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    path = f"hear_encoders/adapters/xares_{name.removesuffix('Encoder').lower()}.py"
    encoder = pytest.importorskip("xares.utils").attr_from_py_path(path, endswith="Encoder")()
    assert type(encoder).__name__ == name
    assert checker.check_audio_encoder(encoder)


def test_a_task_runs_from_its_tar_files_to_its_scores(tmp_path, monkeypatch):
    task = pytest.importorskip("xares.task")
    torchaudio = pytest.importorskip("torchaudio")
    from xares.audiowebdataset import write_audio_tar
    from xares.utils import attr_from_py_path

    def load(file):  # torchaudio's own needs torchcodec
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T), rate

    monkeypatch.setattr(torchaudio, "load", load)
    folder = tmp_path / "tones"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        paths, labels = [], []
        for index in range(12):  # X-ARES compares with ten neighbors
            times = np.arange(8000 + 500 * index) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * (300, 3000)[index % 2] * times) + rng.normal(0, 0.01, len(times))
            paths.append(str(tmp_path / f"{split}{index}.wav"))
            labels.append({"label": index % 2})
            soundfile.write(paths[-1], tone, 16_000)
        write_audio_tar(paths, labels, str(folder / f"{split}*.tar"), num_shards=1)
    (folder / ".audio_tar_ready").touch()
    config = task.TaskConfig(
        name="tones",
        env_root=tmp_path,
        private=True,
        encoder=attr_from_py_path("hear_encoders/adapters/xares_axlstm.py", endswith="Encoder")(),
        num_encoder_workers=0,
        label_processor=lambda row: row["label"],
        output_dim=2,
        epochs=1,
        torch_num_threads=1,
    )
    tones = task.XaresTask(config)
    tones.make_encoded_tar()
    tones.run_mlp()
    assert tones.run_knn()[0] == 1.0
    assert (folder / "embeddings" / "AxLSTMEncoder" / ".encoded_tar_ready").is_file()
