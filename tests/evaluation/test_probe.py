"""The probe: its scores, and that it never reads test clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from evaluation import __main__ as command
from evaluation.probe import fit_linear, probe, probe_model
from evaluation.tasks import read_task

RATE = 16000
CLASSES = ["high", "low", "middle"]
PITCH_HZ = {"low": 200, "middle": 800, "high": 3200}


def make_task(folder: Path, splits: list[str], clips: int = 12, **fields) -> Path:
    """Write a task of tones of three pitches at random phases, `clips` in each split."""
    generator = np.random.default_rng(0)
    for split in splits:
        (folder / str(RATE) / split).mkdir(parents=True)
        labels = {}
        for clip in range(clips):
            labels[f"{clip}.wav"] = [CLASSES[clip % 3]]
            cycles = PITCH_HZ[CLASSES[clip % 3]] * np.arange(RATE // 4) / RATE + generator.random()
            soundfile.write(folder / str(RATE) / split / f"{clip}.wav", 0.1 * np.sin(2 * np.pi * cycles), RATE)
        (folder / f"{split}.json").write_text(json.dumps(labels))
    metadata = {
        "task_name": folder.name,
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "evaluation": ["top1_acc"],
        "splits": splits,
    }
    (folder / "task_metadata.json").write_text(json.dumps(metadata | fields))
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + "".join(f"{i},{c}\n" for i, c in enumerate(CLASSES)))
    return folder


def band_loudness(audio: torch.Tensor) -> torch.Tensor:
    spectrum = torch.fft.rfft(audio).abs()  # (clips, bins)
    return torch.stack([band.sum(-1) for band in spectrum.chunk(16, dim=-1)], dim=-1)


def constant(audio: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(audio), 4)


def test_the_score_is_of_the_valid_split_and_test_clips_are_not_read(tmp_path):
    folder = make_task(tmp_path / "tones", ["train", "valid", "test"])
    shutil.rmtree(folder / str(RATE) / "test")
    assert probe(read_task(folder), band_loudness, RATE) == 1
    assert probe(read_task(folder), constant, RATE) == pytest.approx(1 / 3)


def test_shifted_validation_labels_score_zero(tmp_path):
    folder = make_task(tmp_path / "tones", ["train", "valid", "test"], clips=30)
    labels = json.loads((folder / "valid.json").read_text())
    wrong = {name: [CLASSES[(CLASSES.index(label) + 1) % 3]] for name, (label,) in labels.items()}
    (folder / "valid.json").write_text(json.dumps(wrong))
    assert probe(read_task(folder), band_loudness, RATE) == 0


def test_clips_limits_each_split_to_the_same_random_sample(tmp_path):
    folder = make_task(tmp_path / "tones", ["train", "valid", "test"], clips=20)
    seen: list[torch.Tensor] = []

    def embed(audio: torch.Tensor) -> torch.Tensor:
        seen.append(audio)
        return band_loudness(audio)

    probe(read_task(folder), embed, RATE, clips=9)
    probe(read_task(folder), embed, RATE, clips=9)
    train, valid, *again = seen
    assert len(train) == len(valid) == 9
    assert torch.equal(train, again[0]) and torch.equal(valid, again[1])


def test_a_task_without_audio_at_the_models_sample_rate_is_an_error(tmp_path):
    folder = make_task(tmp_path / "tones", ["train", "valid", "test"])
    with pytest.raises(FileNotFoundError, match="no audio at 48000 Hz"):
        probe(read_task(folder), constant, 48000)


def test_averaging_whole_embeddings_removes_the_difference_between_bands(tmp_path):
    folder = make_task(tmp_path / "tones", ["train", "valid", "test"])
    scores = [
        probe_model("evaluation.baselines", None, {}, [read_task(folder)], 12, average)[0] for average in (1, 2, 160)
    ]
    assert scores[0] == 1 and scores[0] >= scores[1] > scores[2]


def test_the_linear_classifier_minimizes_its_loss():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    classify = fit_linear(rows, labels, 3)
    deviation, mean = torch.std_mean(rows.double(), dim=0)
    standard = (rows.double() - mean) / deviation
    residual = classify(rows).softmax(-1) - torch.nn.functional.one_hot(labels, 3)
    bias = classify(mean[None].float())  # (1, 3)
    weight = torch.linalg.lstsq(standard, classify(rows) - bias).solution
    # The gradient of mean cross entropy + 0.1 / 2 |weight|^2 is zero there.
    torch.testing.assert_close(standard.T @ residual / 60 + 0.1 * weight, torch.zeros(5, 3).double(), atol=1e-4, rtol=0)


def test_the_command_prints_a_row_per_model_and_names_the_tasks_it_leaves_out(tmp_path, capsys):
    make_task(tmp_path / "tones", ["train", "valid", "test"])
    make_task(tmp_path / "onsets", ["train", "valid", "test"], embedding_type="event")
    make_task(tmp_path / "folded", ["fold0", "fold1"], split_mode="presplit_kfold")  # tests on every clip
    arguments = ["probe", "--module", "evaluation.baselines", "--tasks-dir", str(tmp_path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2] == "evaluation.baselines | 100.0 | 100.0"
    assert "left out" in printed.err and "folded, onsets" in printed.err
    assert command.main([*arguments, "--average", "7"]) == 2
    assert "160 values cannot be split into 7 equal parts" in capsys.readouterr().err
    assert command.main([*arguments, "--tasks", "onsets"]) == 2
    assert "no task to probe" in capsys.readouterr().err
    assert command.main([*arguments, "--module", "hear_axlstm", "--option", "framng=exact"]) == 2
    assert "hear_axlstm could not be loaded with options {'framng': 'exact'}" in capsys.readouterr().err
    assert command.main([*arguments, "--module", "no_such_module"]) == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().err
