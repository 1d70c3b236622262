"""The programs in `examples/` do what their first lines say."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL_CONFIGS
from safetensors import safe_open

from hear_encoders import build_encoder, load_checkpoint, save_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Two classes of sounds of different lengths and rates: low tones and noise."""
    random = np.random.default_rng(0)
    for index in range(15):
        rate, samples = (16000, 22050)[index % 2], 3000 + 900 * index
        times = np.arange(samples) / rate
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(200, 600) * times) + 0.01 * random.standard_normal(samples)
        for name, audio in (("tone", tone), ("noise", 0.2 * random.standard_normal(samples))):
            (tmp_path / "sounds" / name).mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / "sounds" / name / f"{index}.wav", audio, rate)
    return tmp_path / "sounds"


def test_fine_tuning_learns_classes_and_is_loaded_again(labelled, tmp_path, capsys):
    assert len((EXAMPLES / "finetune.py").read_text(encoding="utf-8").splitlines()) < 80
    save_checkpoint(tmp_path / "before", build_encoder(SMALL_CONFIGS["audiomaepp"], seed=1))
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
    finetune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finetune)
    finetune.main(
        [str(labelled), str(tmp_path / "after"), "--weights", str(tmp_path / "before"), "--epochs", "2", "--batch", "5"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["frozen encoder", "epoch 1", "epoch 2", "loaded again"]
    accuracies = [float(re.search(r"accuracy ([\d.]+)", line)[1]) for line in lines]
    assert lines[0].endswith(" on 6 held-out files of 30")
    assert accuracies[0] >= 0.8 and accuracies[2] == accuracies[3] >= 0.8  # a guess has 0.5
    before, after = (load_checkpoint(tmp_path / name).state_dict() for name in ("before", "after"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > len(before) / 2
    with safe_open(tmp_path / "after/head.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["noise", "tone"]


def test_a_search_lists_the_most_similar_sounds_first(monkeypatch, capsys):
    query = EXAMPLES / "till.wav"
    monkeypatch.setattr(sys, "argv", ["search.py", str(EXAMPLES), str(query)])
    runpy.run_path(str(EXAMPLES / "search.py"), run_name="__main__")
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4 and rows[0] == ["1.000", str(query)]
    similarities = [float(similarity) for similarity, _ in rows]
    assert similarities == sorted(similarities, reverse=True) and similarities[1] < 0.5
