"""The wheel: its content, and that it works when nothing else is installed."""

from __future__ import annotations

import configparser
import email.message
import email.parser
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import hear_encoders
from hear_encoders import AxLSTMConfig, TransformerConfig, build_encoder, load_audio, load_checkpoint, save_checkpoint
from hear_encoders.files import locked

pytest.importorskip("build")
pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]
PACKAGES = ["hear_audiomaepp", "hear_axlstm", "hear_encoders"]
SMALL = {
    "hear_audiomaepp": TransformerConfig("audiomaepp", dim=48, depth=1, heads=3),
    "hear_axlstm": AxLSTMConfig("axlstm", dim=48, depth=1),
}
IGNORED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


@dataclass(frozen=True)
class Built:
    """A copy of the working tree, and the wheel and sdist that `python -m build` made from it."""

    tree: Path
    wheel: Path
    sdist: Path

    @property
    def names(self) -> list[str]:
        """Return the names of the wheel's files."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()

    def text(self, name: str) -> str:
        """Return a file from the wheel's .dist-info directory."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(f"hear_audiomaepp-{hear_encoders.__version__}.dist-info/{name}").decode()

    @property
    def metadata(self) -> email.message.Message:
        return email.parser.Parser().parsestr(self.text("METADATA"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the sdist, and the wheel from it, once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ and os.name != "nt":  # `locked` does nothing on Windows
        folder = folder.parent
    folder /= "package"
    folder.mkdir(exist_ok=True)
    with locked(folder, wait_s=math.inf):
        if not list(folder.glob("*.whl")):
            build(folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(folder / "tree", wheel, sdist)


def build(folder: Path) -> None:
    """Copy the working tree and build it. Modules without bundled weights get small ones."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
    (tree / "training").mkdir(exist_ok=True)
    (tree / "training" / "__init__.py").touch()
    for package, config in SMALL.items():
        if not (tree / package / "weights").exists():
            save_checkpoint(tree / package / "weights", build_encoder(config, seed=1).eval())
    run_build("--outdir", folder, tree)


def run_build(*arguments: object) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *map(str, arguments)],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="session")
def site(built: Built) -> Path:
    """Install only the wheel into a directory."""
    target = built.tree.parent / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"]
    with locked(built.tree.parent, wait_s=math.inf):
        if not target.exists():
            command = [sys.executable, "-m", "pip", "install", *options, "--target", target, built.wheel]
            subprocess.run(command, check=True)
    return target


@pytest.fixture
def run(site: Path, tmp_path: Path):
    """Run a command in an empty directory that sees only the installed wheel."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def execute(*command: object) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True)

    return execute


def test_wheel_is_for_python_3_on_any_platform(built: Built) -> None:
    assert built.wheel.name == f"hear_audiomaepp-{hear_encoders.__version__}-py3-none-any.whl"


@pytest.mark.long
def test_building_again_later_gives_the_same_wheel(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.tree, tmp_path / "tree", ignore=shutil.ignore_patterns(*IGNORED))
    for path in (tmp_path / "tree").rglob("*"):
        os.utime(path, (1_800_000_000, 1_800_000_000))
    run_build("--outdir", tmp_path, tmp_path / "tree")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.read_bytes() == built.wheel.read_bytes()


def test_wheel_contains_only_the_three_packages(built: Built) -> None:
    expected = {
        path.relative_to(built.tree).as_posix()
        for package in PACKAGES
        for path in (built.tree / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    metadata = f"hear_audiomaepp-{hear_encoders.__version__}.dist-info/"
    assert {name for name in built.names if not name.startswith(metadata)} == expected
    assert expected >= {f"{package}/py.typed" for package in PACKAGES}
    assert expected >= {
        f"{package}/weights/{name}" for package in SMALL for name in ("config.json", "model.safetensors")
    }
    assert (built.tree / "tests").is_dir() and (built.tree / "training").is_dir()  # but not in the wheel
    assert built.text("top_level.txt").split() == PACKAGES


def test_metadata_is_the_projects(built: Built) -> None:
    metadata = built.metadata
    assert metadata["Name"] == "hear-audiomaepp"
    assert metadata["Version"] == hear_encoders.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"]
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {
        *("av", "eval", "lint", "map", "mteb", "onnx", "parquet", "peers", "ray", "sentence-transformers", "test"),
        *("test-map", "test-ray", "torchaudio", "train", "transformers", "xares"),
    }
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0] for line in required}
    assert names == {"torch", "numpy", "safetensors", "huggingface_hub", "soundfile", "soxr", "tqdm"}
    torchaudio = [line for line in metadata.get_all("Requires-Dist") if "torchaudio" in line]
    assert all('extra == "torchaudio"' in line for line in torchaudio) and len(torchaudio) == 2  # with its own torch


def test_the_list_of_components_has_all_dependencies_in_their_tested_versions(built: Built) -> None:
    components = json.loads((ROOT / "docs" / "sbom.cdx.json").read_text())["components"]
    versions = {component["name"].lower(): component["version"].partition("+")[0] for component in components}
    tested = re.findall(
        r'^([\w-]+)==([\w.]+)(?:; python_version >= "3.11")?$', (ROOT / "constraints.txt").read_text(), re.M
    )
    required = [name for name in built.metadata.get_all("Requires-Dist") if "extra ==" not in name]
    names = {re.match(r"[\w-]+", name)[0] for name in required}
    assert len(names) == 7
    assert {name: versions.get(name) for name in names} == {name: dict(tested).get(name) for name in names}


def pinned(path: Path) -> set[tuple[str, str]]:
    """Return the names and versions in a file of requirements."""
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE)
    return {(name.lower().replace("_", "-"), version) for name, version in pins}


def test_the_lock_has_the_tested_versions_each_with_its_hashes() -> None:
    lock, tested = pinned(ROOT / ".ci" / "requirements.lock"), pinned(ROOT / "constraints.txt")
    names = {name for name, _ in lock}
    assert names >= {"torch", "numpy", "pytest", "hearvalidator"}
    assert {pin for pin in tested if pin[0] in names} == {pin for pin in lock if pin[0] in dict(tested)}, "run .ci/lock"
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    assert all("--hash=sha256:" in after for line, after in itertools.pairwise(lines) if "==" in line)


def test_wheel_has_licence_model_card_and_readme(built: Built) -> None:
    assert (ROOT / "LICENSE").is_file() and (ROOT / "README.md").is_file()
    assert built.metadata.get_all("License-File", []) == ["LICENSE", "MODEL_CARD.md"]
    assert "Apache License" in built.text("licenses/LICENSE")
    assert "Licence\n\nThe weights" in built.text("licenses/MODEL_CARD.md")  # the weights' licence
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    assert built.metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_commands_are_declared(built: Built) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(built.text("entry_points.txt"))
    assert dict(entries["console_scripts"]) == {
        "hear-map": "hear_encoders.cli.entry:hear_map",
        "hear-embed": "hear_encoders.cli.entry:hear_embed",
        "hear-embed-corpus": "hear_encoders.cli.entry:hear_embed_corpus",
        "hear-weights": "hear_encoders.cli.entry:hear_weights",
    }


def test_sdist_contains_the_sources_of_the_wheel(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "pyproject.toml" in names
    assert names >= {name for name in built.names if ".dist-info/" not in name}


USE = """
import json, sys, warnings
import numpy, torch

warnings.simplefilter("error")
import hear_audiomaepp, hear_axlstm, hear_encoders

audio = torch.from_numpy(numpy.load(sys.argv[1]))[None]
report = {"files": [module.__file__ for module in (hear_audiomaepp, hear_axlstm, hear_encoders)]}
for module in (hear_audiomaepp, hear_axlstm):
    model = module.load_model()
    scene = module.get_scene_embeddings(audio, model)
    steps, times = module.get_timestamp_embeddings(audio, model)
    assert scene.shape == (1, model.scene_embedding_size)
    assert steps.shape == (*times.shape, model.timestamp_embedding_size)
    report[module.__name__] = scene[0].tolist()
print(json.dumps(report))
"""


def test_wheel_works_from_an_empty_directory_with_its_bundled_weights(built: Built, site: Path, run, tmp_path) -> None:
    audio = load_audio(ROOT / "examples" / "till.wav")
    np.save(tmp_path / "audio.npy", audio.numpy())
    process = run(sys.executable, "-c", USE, tmp_path / "audio.npy")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert [Path(file) for file in report["files"]] == [
        site / name / "__init__.py" for name in ("hear_audiomaepp", "hear_axlstm", "hear_encoders")
    ]
    for package in SMALL:
        encoder = load_checkpoint(built.tree / package / "weights" / "model.safetensors")
        expected = hear_encoders.Embedder(encoder).scene_embeddings(audio)[0]
        np.testing.assert_allclose(report[package], expected, atol=1e-4)


@pytest.fixture(scope="session")
def scripts(site: Path) -> dict[str, Path]:
    """Return the commands' installed scripts by name."""
    found = {path.stem: path for path in (site / ("Scripts" if os.name == "nt" else "bin")).iterdir()}
    assert sorted(found) == ["hear-embed", "hear-embed-corpus", "hear-map", "hear-weights"]
    return found


def test_hear_embed_runs_as_installed(run, scripts, tmp_path: Path) -> None:
    examples = ROOT / "examples"
    process = run(
        scripts["hear-embed"], examples / "till.wav", examples / "bell.mp3", "-o", "out.npz", "--device", "cpu"
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "out.npz: 2 of 2 files embedded\n"
    with np.load(tmp_path / "empty" / "out.npz") as arrays:
        assert arrays["paths"].tolist() == [str(examples / "bell.mp3"), str(examples / "till.wav")]
        assert arrays["embeddings"].shape[0] == 2


def test_hear_weights_runs_as_installed(run, scripts, site: Path) -> None:
    process = run(scripts["hear-weights"], "show", site / "hear_axlstm" / "weights")
    assert (process.returncode, process.stderr) == (0, "")
    assert "axlstm" in process.stdout
    assert run(scripts["hear-weights"], "show", site / "nothere").returncode == 2
