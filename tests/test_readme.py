"""The documentation is true: its Python runs, its table of models is right, its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import SMALL_CONFIGS

from hear_encoders import PRESETS, build_encoder, load_checkpoint, save_checkpoint
from hear_encoders.cli.embed import main as embed_main
from hear_encoders.nn.build import ENCODER_OF_CONFIG

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "benchmarks", "evaluation", "examples", "training")
    for path in (ROOT / folder).glob("*.md")
)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


@pytest.fixture
def run_python(tmp_path, monkeypatch):
    """Run a page's Python where the README's first command has been run; return the names that it defines."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    save_checkpoint(tmp_path / "path/to/weights", build_encoder(SMALL_CONFIGS["audiomaepp"], seed=0))
    monkeypatch.chdir(tmp_path)

    def run(page: str, count: int) -> dict:
        namespace: dict = {}
        assert len(blocks(page, "python")) == count
        for block in blocks(page, "python"):
            exec(block, namespace)
        return namespace

    return run


def test_the_readmes_python_runs_as_printed(run_python):
    namespace = run_python("README.md", 2)
    assert namespace["scene"].shape == (1, 960)
    assert namespace["steps"].shape == (133, 960) and namespace["timestamps_ms"].shape == (133,)
    assert namespace["times_ms"].shape == namespace["embeddings"].shape[:2] == (1, 1)  # the last step of the stream


def test_every_way_to_embed_in_python_runs_as_printed(run_python):
    namespace = run_python("docs/python.md", 2)
    for name in ("one", "from_array", "from_row"):
        assert namespace[name].shape == (960,)
    assert namespace["many"].shape == namespace["unit"].shape == namespace["scenes"].shape == (2, 960)
    assert namespace["steps"].shape == (2, 133, 960) and namespace["mask"].sum(1).tolist() == [133, 67]
    assert (namespace["steps"].detach().abs().sum(2) > 0).equal(namespace["mask"])


def test_embeddings_of_a_folder_are_read_as_printed(run_python):
    assert embed_main(["examples/", "-o", "embeddings.npz"]) == 0
    assert run_python("docs/corpus.md", 1)["result"]["embeddings"].shape == (4, 960)


def test_statistics_and_streams_run_as_printed(run_python):
    namespace = run_python("docs/streaming.md", 2)
    assert namespace["mean"] == pytest.approx(-5.44, abs=0.01) and namespace["std"] == pytest.approx(4.30, abs=0.01)
    assert namespace["embeddings"].shape == (8, 1, 960) and namespace["times_ms"].shape == (8, 1)


def test_reference_framing_is_chosen_as_printed(run_python):
    assert run_python("docs/framing.md", 1)["model"].framing == "reference"


def test_a_wrong_flip_and_fine_tuning_change_the_embeddings_as_printed(run_python):
    namespace = run_python("docs/weights.md", 2)
    assert namespace["changes"] == pytest.approx([0.27, 0.14, 0.22, 0.22], abs=0.011)
    model, audio = namespace["model"], namespace["audio"]
    assert namespace["scenes"].shape == (1, 960)
    assert not torch.allclose(model.scene_embeddings(audio), namespace["scenes"].detach(), atol=1e-3)
    saved = load_checkpoint("fine-tuned/model.safetensors").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.encoder.state_dict().items())


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
    commands = [line for block in blocks("README.md", "sh") for line in block.splitlines() if "&& pytest" in line]
    assert commands == ['pip install -c constraints.txt ".[test]" && pytest -n auto']
    assert "README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_into_the_tree_leads_somewhere(page):
    for link in re.findall(r"\]\(([^):]+)\)", without_code(ROOT / page)):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in headings(target), link


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    lines = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
