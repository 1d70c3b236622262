"""The README says what is so: its Python runs, its table counts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_CONFIGS

from hear_encoders import PRESETS, build_encoder, save_checkpoint
from hear_encoders.cli.embed import main as embed_main
from hear_encoders.nn.build import ENCODER_OF_CONFIG

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_examples_run_as_printed(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    save_checkpoint(tmp_path / "path/to/weights", build_encoder(SMALL_CONFIGS["audiomaepp"], seed=0))
    monkeypatch.chdir(tmp_path)
    assert embed_main(["examples/", "-o", "embeddings.npz"]) == 0
    namespace: dict = {}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(block, namespace)
    assert namespace["result"]["embeddings"].shape == (4, 960)
    assert namespace["scene"].shape == (1, 960)
    assert namespace["steps"].shape == (1, 133, 960) and namespace["timestamps_ms"].shape == (1, 133)
    assert namespace["times_ms"].shape == namespace["embeddings"].shape[:2] == (1, 1)  # the last step of the stream
    assert namespace["mean"] == pytest.approx(-5.44, abs=0.01) and namespace["std"] == pytest.approx(4.30, abs=0.01)
    assert namespace["model"].framing == "reference"


def test_the_table_of_models_is_the_presets():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) M \| (\d+) \|$", README, flags=re.MULTILINE
    )
    table = {name: values for name, *values in rows}
    assert table.keys() == PRESETS.keys()
    for name, config in PRESETS.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in ENCODER_OF_CONFIG[type(config)](config).parameters())
        expected = [config.dim, config.depth, config.heads, f"{count / 1e6:.1f}", config.dim * config.patches.rows]
        assert table[name] == [str(value) for value in expected], name


def test_continuous_integration_runs_the_readmes_test_command():
    commands = [line for block in blocks("sh") for line in block.splitlines() if "&& pytest" in line]
    assert commands == ['pip install -c constraints.txt ".[test]" && pytest -n auto']
    assert "README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_every_link_into_the_tree_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
