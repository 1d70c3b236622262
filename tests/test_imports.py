"""Importing a package does nothing, and brings in nothing that inference does not need."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hear_encoders

ROOT = Path(__file__).parents[1]
PACKAGES = ["hear_encoders", "hear_audiomaepp", "hear_axlstm"]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Needs of training, of tests or of optional outputs; or imported only where they are used, being slow.
UNWANTED = [
    *("training", "evaluation", "torchaudio", "xlstm", "mlstm_kernels", "tensorflow", "tests", "pytest"),
    *("huggingface_hub", "pyarrow", "fsspec", "ray", "plotly", "sklearn", "tqdm", "onnx", "onnxscript", "onnxruntime"),
    *("transformers", "sentence_transformers", "mteb", "xares"),
]

# The dependencies are imported first: what they do at import is not the package's doing.
PROBE = """
import sys

network = []
sys.addaudithook(lambda event, arguments: network.append(event) if event.startswith("socket.") else None)

import json, locale, logging, os, random, signal, threading, warnings
import numpy, safetensors.torch, soundfile, soxr, torch
import http.client, importlib.metadata, multiprocessing

def state():
    return {
        "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "threads": [thread.name for thread in threading.enumerate()],
        "precision of matmuls": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "default dtype and device": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "cuda": torch.cuda.is_initialized(),
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of numpy": repr(numpy.random.get_state()),
        "random numbers": repr(random.getstate()),
        "warnings": [repr(warnings.filters), repr(warnings.showwarning)],
        "logging": [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable],
        "error handling of numpy": repr(numpy.geterr()),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": sys.path,
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
        "output": [repr(sys.stdout), repr(sys.stderr)],
    }

before, known = state(), set(sys.modules)
network.clear()
for stream in (sys.stdout, sys.stderr):
    print("IMPORT", file=stream, flush=True)
package = __import__(sys.argv[1])
after = state()
report = {
    "changed": [name for name in before if before[name] != after[name]],
    "network": network,
    "modules": sorted({name.partition(".")[0] for name in sys.modules.keys() - known}),
    "public": sorted(name for name in getattr(package, "__all__", []) if hasattr(package, name)),
    "declared": sorted(package.__all__),
}
with open("report.json", "w") as file:
    json.dump(report, file)
"""


@pytest.fixture(scope="session", params=PACKAGES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The effects of importing the package in a fresh process."""
    folder = tmp_path_factory.mktemp("import")
    process = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROBE, request.param],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(hear_encoders.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((folder / "report.json").read_text())
    files = sorted(path.name for path in folder.iterdir())
    printed = [stream.partition("IMPORT\n")[2] for stream in (process.stdout, process.stderr)]
    return {**report, "printed": printed, "files": files, "name": request.param}


def test_import_prints_nothing_and_warns_of_nothing(imported: dict) -> None:
    assert imported["printed"] == ["", ""]


def test_import_changes_no_setting_of_the_process(imported: dict) -> None:
    """Neither threads nor devices, nor random numbers, warnings, logging, environment or signals."""
    assert imported["changed"] == []


def test_import_opens_no_socket_and_writes_no_file(imported: dict) -> None:
    assert imported["network"] == []
    assert imported["files"] == ["report.json"]


def test_import_brings_in_nothing_that_inference_does_not_need(imported: dict) -> None:
    assert set(imported["modules"]) & set(UNWANTED) == set()
    assert imported["name"] in imported["modules"]


def test_public_names_are_there(imported: dict) -> None:
    assert imported["public"] == imported["declared"]
    assert imported["declared"]


def test_hear_modules_do_not_import_each_other(imported: dict) -> None:
    others = {"hear_audiomaepp", "hear_axlstm"} - {imported["name"]}
    assert set(imported["modules"]) & others == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_file_imports_what_the_runtime_does_not_need(path: Path) -> None:
    """Anywhere in it, in functions too; by name in importlib.import_module as well."""
    forbidden = {
        "training",
        "evaluation",
        "torchaudio",
        "xlstm",
        "mlstm_kernels",
        "tensorflow",
        "tests",
        "transformers",
        "timm",
    }
    if path.parent.name == "adapters":
        forbidden.discard("transformers")
    if path.name == "frontend_torchaudio.py":
        forbidden.remove("torchaudio")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert {name.partition(".")[0] for name in found} & forbidden == set()


# From top to bottom: a module imports only from lower layers, or from its own layer where that is a package.
LAYERS = [
    ["benchmarks"],
    ["evaluation"],
    ["training"],
    ["training.corpora"],
    ["hear_encoders.cli.embed", "hear_encoders.cli.weights", "hear_encoders.cli.map", "hear_encoders.cli.embed_corpus"],
    ["hear_encoders.cli"],
    ["hear_encoders.adapters"],
    ["hear_audiomaepp", "hear_axlstm"],
    ["hear_encoders.onnx_export"],
    ["hear_encoders.onnx_graphs"],
    ["hear_encoders.hear", "hear_encoders.stream"],
    ["hear_encoders.__init__"],
    ["hear_encoders.embedder"],
    ["hear_encoders.clips"],
    ["hear_encoders.framing", "hear_encoders.pooling", "hear_encoders.execution", "hear_encoders.checks"],
    ["hear_encoders.checkpoint", "hear_encoders.released", "hear_encoders.audio"],
    ["hear_encoders.storage"],
    ["hear_encoders.hub", "hear_encoders.pcm", "hear_encoders.media", "hear_encoders.frontend", "hear_encoders.papers"],
    ["hear_encoders.nn.build", "hear_encoders.nn.axlstm_offline", "hear_encoders.nn.axlstm_online"],
    ["hear_encoders.nn.axlstm_folded"],
    ["hear_encoders.nn.axlstm", "hear_encoders.nn.transformer", "hear_encoders.nn.frontend_torchaudio"],
    ["hear_encoders.nn.patches", "hear_encoders.nn.mlstm_segment", "hear_encoders.nn.frontend"],
    ["hear_encoders.nn.mlstm"],
    ["hear_encoders.config"],
    ["hear_encoders.files", "hear_encoders.console", "hear_encoders.threads", "hear_encoders.cluster"],
]
SELF_CONTAINED = {"benchmarks", "evaluation", "training", "training.corpora"}
SELF_CONTAINED |= {"hear_encoders.cli", "hear_encoders.adapters"}
OWN_PACKAGES = {name.partition(".")[0] for layer in LAYERS for name in layer}


def _layer(module: str) -> tuple[int, str]:
    """Return a module's layer, and the name under which it is listed there."""
    matches = [
        (len(name), index, name)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} is in no layer: add it to LAYERS"
    _, index, name = max(matches)
    return index, name


def _own_imports() -> dict[str, set[str]]:
    """Return the imports between our modules, read from the source, inside functions too."""
    modules = {}
    for package in sorted(OWN_PACKAGES):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[name if name == "hear_encoders.__init__" else name.removesuffix(".__init__")] = path
    graph = {}
    for module, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:  # a submodule, or a name defined in the module
                    submodule = f"{node.module}.{alias.name}"
                    imported.add(submodule if submodule in modules else node.module)
        imported = {"hear_encoders.__init__" if name == "hear_encoders" else name for name in imported}
        graph[module] = (imported & modules.keys()) - {module}
    return graph


def test_imports_run_down_through_the_layers() -> None:
    upwards = []
    for module, imported in _own_imports().items():
        if not imported:
            continue
        index, name = _layer(module)
        for target in imported:
            below, target_name = _layer(target)
            if not (below > index or (target_name == name and name in SELF_CONTAINED)):
                upwards.append(f"{module} imports {target}")
    assert upwards == []


def test_there_is_no_import_cycle() -> None:
    """Not even through an import inside a function."""
    graphlib.TopologicalSorter(_own_imports()).prepare()  # raises CycleError


def test_evaluation_needs_only_the_corpora_and_the_configs_of_training() -> None:
    """`evaluation.reproduce` reads configs and run directories, and starts training in other processes."""
    needed = {
        target
        for module, imported in _own_imports().items()
        if module.startswith("evaluation")
        for target in imported
        if target.startswith("training")
    }
    needed = {name for name in needed if not name.startswith("training.corpora")}
    assert needed == {"training.config", "training.run_dir"}


def test_all_source_files_are_checked() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert names >= {f"{package}/__init__.py" for package in PACKAGES} | {
        "hear_encoders/cli/embed.py",
        "hear_encoders/hub.py",
    }


def test_every_import_is_declared_as_a_dependency() -> None:
    """The wheel's requirements and the imports name the same packages."""
    declared = set(dependencies())
    used = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            used |= {name.partition(".")[0] for name in names}
    third_party = used - set(sys.stdlib_module_names) - set(PACKAGES)
    extras = {
        "av",
        "pyarrow",
        "plotly",
        "sklearn",
        "threadpoolctl",
        "torchaudio",
    }  # "av", "parquet", "map", "torchaudio"
    extras |= {"ray", "fsspec"}
    extras |= {"transformers", "sentence_transformers", "mteb"}  # of the adapters
    assert third_party - extras == declared


def dependencies() -> list[str]:
    """Names in the `dependencies` of pyproject.toml; Python 3.10 has no TOML parser."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    names = [line.strip(' ",') for line in block.splitlines() if line.strip()]
    return [name.partition(">")[0] for name in names]
