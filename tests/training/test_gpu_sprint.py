"""A pack keeps log-mel closely, and a sprint on it ends with the clock or SIGTERM, with weights that load."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hear_audiomaepp
import hear_axlstm
from training import gpu_sprint
from training.config import load_run_config
from training.corpora import pack, prepare
from training.corpora.shards import ShardIndex

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
SMALL = ["encoder.dim=48", "encoder.depth=1", "batch_size=8", "held_out_clips=4", "precision=float32", "compile=false"]

SMALL_TRANSFORMER = ["encoder.heads=2", "decoder.dim=32", "decoder.depth=1", "decoder.heads=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards per kind: noise through a filter that moves, the last clip shorter than a crop."""
    folders = []
    parent = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    for kind in (*gpu_sprint.KINDS, gpu_sprint.HELD_OUT):
        recordings = tmp_path_factory.mktemp(kind)
        for number, seconds in enumerate((12, 3, 1.23)):
            noise = generator.standard_normal(int(seconds * 16000))
            loudness = 0.2 + np.sin(np.arange(len(noise)) / 4000) ** 2
            smooth = np.convolve(noise, np.hanning(3 + 10 * number), mode="same")
            soundfile.write(recordings / f"{number}.wav", 0.1 * loudness * smooth / np.abs(smooth).max(), 16000)
        assert prepare.main([str(recordings), str(parent / kind), "--jobs", "1"]) == 0
        folders.append(parent / kind)
    return folders


@pytest.fixture(scope="module")
def packed(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    assert pack.main([*map(str, shards), "-o", str(folder)]) == 0
    return folder


def small(family):
    return [*SMALL, *(SMALL_TRANSFORMER if family == "audiomaepp" else [])]


def test_pack_keeps_log_mel(shards, packed):
    kinds = pack.read_pack(packed)
    assert list(kinds) == [folder.name for folder in shards]
    for folder in shards:
        index, records = ShardIndex.open(folder), kinds[folder.name]
        assert records.frames.dtype == torch.float16
        assert len(records) == len(index)
        for i in range(len(index)):
            expected, actual = index.read(i).astype(np.float64), records.read(i).astype(np.float64)
            assert actual.shape == expected.shape
            assert np.sqrt(np.square(actual - expected).mean()) < 0.16 * expected.std()


def test_pack_is_deterministic(shards, packed, tmp_path):
    assert pack.main([*map(str, shards), "-o", str(tmp_path)]) == 0
    names = sorted(path.name for path in packed.iterdir())
    assert names == ["part-000.json", "part-000.pack"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (packed / name).read_bytes()


def test_parts_and_budget_hold(shards, packed, tmp_path):
    """Every part fits, and the folder named last is cut."""
    part_mb = 0.03
    assert pack.main([*map(str, shards), "-o", str(tmp_path / "parts"), "--part-mb", str(part_mb)]) == 0
    parts = sorted((tmp_path / "parts").glob("*.pack"))
    assert len(parts) > 1
    for part in parts:
        assert part.stat().st_size + part.with_suffix(".json").stat().st_size <= part_mb * 1e6
    whole, in_parts = pack.read_pack(packed), pack.read_pack(tmp_path / "parts")
    assert all(torch.equal(whole[kind].frames, in_parts[kind].frames) for kind in whole)

    assert pack.main([*map(str, shards), "-o", str(tmp_path / "small"), "--part-mb", "0.01"]) == 2

    max_mb = 0.9 * sum(path.stat().st_size for path in packed.iterdir()) / 1e6
    assert pack.main([*map(str, shards), "-o", str(tmp_path / "cut"), "--max-mb", str(max_mb)]) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "cut").iterdir()) <= max_mb * 1e6
    assert list(pack.read_pack(tmp_path / "cut")) == [folder.name for folder in shards[:-1]]


def test_damaged_pack_is_refused(packed, tmp_path):
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    part = tmp_path / "part-000.pack"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256"):
        pack.read_pack(tmp_path)
    with pytest.raises(FileNotFoundError, match="part"):
        pack.read_pack(tmp_path / "nothing")


def test_large_coefficients_survive():
    """A step from silence to noise has coefficients of hundreds of steps."""
    record = np.zeros((95, 80), dtype=np.float16)
    record[50:] = 12
    (actual,) = np.split(pack.decode_group(pack.encode_group([record]), [95]), 1)
    assert np.abs(actual - record.astype(np.float32)).max() < 2


@pytest.mark.parametrize("normalize", ["crop", "record"])
def test_crops_are_those_of_training(packed, normalize):
    """Each crop is one that `training.data.Crops` may draw, and the kinds come in their percentages."""
    config = load_run_config(CONFIGS / "axlstm_tiny.yaml", [f"normalize={normalize}", "shares=[60,30,10]"])
    kinds = pack.read_pack(packed)
    folders = [kinds[kind] for kind in gpu_sprint.KINDS]
    device = torch.device("cpu")
    crops = gpu_sprint.DeviceCrops(folders, config, device, torch.Generator().manual_seed(0))(200)
    assert crops.shape == (200, 200, 80) and crops.dtype == torch.float32
    found = []
    for folder in folders:
        possible = torch.stack([crop for i in range(len(folder)) for crop in all_crops(folder.read(i), normalize)])
        # Every 20th frame tells crops apart.
        distances = torch.cdist(crops[:, ::20].flatten(1), possible[:, ::20].flatten(1), p=torch.inf)
        found.append(distances.amin(1) < 2e-3)
    found = torch.stack(found)
    assert (found.sum(0) == 1).all()
    torch.testing.assert_close(found.double().mean(1), torch.tensor([0.6, 0.3, 0.1]).double(), rtol=0, atol=0.1)


def test_learning_rate_follows_the_clock():
    assert gpu_sprint.rate_factor(0) == 0
    assert gpu_sprint.rate_factor(0.5) == 1
    assert gpu_sprint.rate_factor(1 - gpu_sprint.COOLDOWN / 2) == pytest.approx(0.5)
    assert gpu_sprint.rate_factor(1) == gpu_sprint.rate_factor(1.1) == 0


@pytest.mark.parametrize("family,module", [("audiomaepp", hear_audiomaepp), ("axlstm", hear_axlstm)])
def test_sprint_ends_with_the_clock(family, module, packed, tmp_path):
    config = load_run_config(CONFIGS / f"{family}_tiny.yaml", [*gpu_sprint.DEFAULTS, *small(family)])
    records = pack.read_pack(packed)
    sprint = gpu_sprint.Sprint(config, records, tmp_path, torch.device("cpu"), 0.0)
    begin = time.monotonic()
    sprint.end_s = begin + 4
    sprint.run(begin)
    assert time.monotonic() - begin < 30
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["step"] > 0 and line["clips"] == 8 * line["step"]
    assert line["rate"] < 0.5 * config.learning_rate
    assert 0 < line["held_out"] < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.jsonl", "model.safetensors"]
    model = module.load_model(str(tmp_path))
    assert torch.isfinite(module.get_scene_embeddings(torch.randn(1, 16000), model)).all()

    again = dataclasses.replace(config, start_from=str(tmp_path))
    started = gpu_sprint.Sprint(again, records, tmp_path / "again", torch.device("cpu"), 0.0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(started.model.state_dict()[name], tensor)
    other = dataclasses.replace(again, encoder=dataclasses.replace(config.encoder, depth=2))
    with pytest.raises(ValueError, match="depth=1"):
        gpu_sprint.Sprint(other, records, tmp_path / "other", torch.device("cpu"), 0.0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_saves(packed, tmp_path):
    command = [sys.executable, "-m", "training.gpu_sprint", "--config", str(CONFIGS / "axlstm_tiny.yaml")]
    command += ["--pack", str(packed), "--out", str(tmp_path), "--device", "cpu", "--minutes", "9", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        for line in process.stdout:
            if line.startswith("ready"):
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1
    hear_axlstm.load_model(str(tmp_path))


def all_crops(record, normalize):
    """Return all normalized crops of 200 frames of a record."""
    wide = record.astype(np.float32)
    mean, std = wide.mean(), wide.std(ddof=1)
    wide = np.tile(wide, (-(-200 // len(wide)), 1))
    crops = [wide[first : first + 200] for first in range(len(wide) - 199)]
    if normalize == "crop":
        return [torch.from_numpy((crop - crop.mean()) / crop.std(ddof=1)) for crop in crops]
    return [torch.from_numpy((crop - mean) / std) for crop in crops]
