"""What runs inside heareval's environment: one step of an evaluation per process.

`evaluation.driver` calls `python -m evaluation.kit STEP ARGUMENTS PID`, the step's keyword arguments as
JSON and its own process, with the interpreter of the environment that `evaluation.environment` made. The
evaluation itself is heareval 2021.1.3, unchanged, from PyPI. It was written for the libraries of 2021 and for a wider
search than the papers'; what has to be set before it starts is in this file, each with its reason.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pickle
import platform
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing slow is imported up here: a step watches its driver (see `main`) before it loads torch and the rest.

# The papers' restricted search; what is not named here (optimiser, norms) has one value in heareval's own grid.
PAPERS_GRID = {
    "hidden_layers": [1],
    "hidden_dim": [1024],
    "dropout": [0.1, 0.25],
    "lr": [1e-4],
    "batch_size": [1024],
    "patience": [20],
    "max_epochs": [500],
    "check_val_every_n_epoch": [3],
}
ALL_GRID_POINTS = 1000  # heareval tries a random choice of so many; a task's metadata may widen its grid

MAP_CLIPS, MAP_COMPONENTS, MAP_PERPLEXITY, MAP_SEED = 600, 50, 30, 0


# ---- steps ----


def describe(module: str, weights_path: str | None, options: dict[str, Any], output: str) -> None:
    """Load a model as heareval does, and write what there is to know about it."""
    from hear_encoders.files import write_json

    imported = importlib.import_module(module)
    model = imported.load_model(*([weights_path] if weights_path else []), **options)
    write_json(
        output,
        {
            "sample_rate": int(model.sample_rate),
            "embedding_size": int(model.scene_embedding_size),
            **_weights(model),
            "versions": _versions(module),
        },
    )


def embed(
    module: str, weights_path: str | None, options: dict[str, Any], tasks_dir: str, task: str, output: str
) -> None:
    """Embed all clips of a task; the folder `output` is there once that is complete."""
    importlib.import_module(module)  # before TensorFlow, beside which not every library can be loaded any more
    _accept_pickled_weights()
    _replace_memory_meter()
    _pass_tensorflow_gpu_check()
    from heareval.embeddings.runner import runner

    unfinished = Path(f"{output}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    arguments = [module, "--tasks-dir", tasks_dir, "--task", task, "--embeddings-dir", str(unfinished)]
    if weights_path:
        arguments += ["--model", weights_path]
    runner([*arguments, "--model-options", json.dumps(options)], standalone_mode=False)
    (embeddings,) = unfinished.glob(f"*/{task}")  # below a folder that heareval names after module and options
    shutil.rmtree(output, ignore_errors=True)
    os.replace(embeddings, output)
    shutil.rmtree(unfinished)


def predict(embeddings: str, folder: str, seed: int) -> None:
    """Train and test the papers' classifiers for one seed; heareval leaves its scores in `folder`."""
    _accept_pickled_weights()
    _replace_memory_meter()
    _restore_epoch_setter()
    _train_through_undefined_scores()
    # Lightning asks for deterministic kernels; cuBLAS has them only with a fixed workspace, and raises without.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from heareval.predictions import runner, task_predictions

    task_predictions.PARAM_GRID.update(PAPERS_GRID, initialization=[torch.nn.init.xavier_normal_])
    # The progress of each batch of 500 epochs fills logs, and takes a share of the time of such a small network.
    task_predictions.pl.Trainer = functools.partial(task_predictions.pl.Trainer, enable_progress_bar=False)
    # heareval has the seed 42 written into it.
    seed_everything = task_predictions.seed_everything
    task_predictions.seed_everything = lambda _, workers: seed_everything(seed, workers=workers)

    # heareval writes beside the embeddings: each seed gets a folder of its own, with links to them.
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for entry in os.scandir(embeddings):
        if entry.is_file():
            os.symlink(os.path.abspath(entry.path), os.path.join(folder, entry.name))
    runner.runner([os.path.abspath(folder), "--grid-points", str(ALL_GRID_POINTS)], standalone_mode=False)


def draw_map(embeddings: str, output: str) -> None:
    """Lay out the test clips of a scene task in two dimensions, and write points and labels."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from hear_encoders.files import write_json

    folder = Path(embeddings)
    metadata = json.loads((folder / "task_metadata.json").read_text(encoding="utf-8"))
    # Of a k-fold task every fold is tested on once.
    splits = ["test"] if metadata["split_mode"] == "trainvaltest" else metadata["splits"]
    vectors, labels = [], []
    for split in splits:
        shape = tuple(json.loads((folder / f"{split}.embedding-dimensions.json").read_text()))
        vectors.append(np.fromfile(folder / f"{split}.embeddings.npy", dtype=np.float32).reshape(shape))
        with open(folder / f"{split}.target-labels.pkl", "rb") as file:  # our own heareval has just written it
            labels += [" + ".join(map(str, clip)) for clip in pickle.load(file)]
    vectors = np.concatenate(vectors)
    count = min(MAP_CLIPS, len(vectors))
    if count < 4:
        raise ValueError(f"a map takes at least 4 test clips, got {count}")
    chosen = np.sort(np.random.default_rng(MAP_SEED).permutation(len(vectors))[:count])
    components = min(MAP_COMPONENTS, count, vectors.shape[1])
    perplexity = min(MAP_PERPLEXITY, (count - 1) / 3)
    reduced = PCA(components, svd_solver="full").fit_transform(vectors[chosen])
    points = TSNE(perplexity=perplexity, init="pca", random_state=MAP_SEED).fit_transform(reduced)
    method = f"t-SNE (perplexity {perplexity:g}) of {components} principal components, {count} of {len(vectors)} clips"
    write_json(
        output,
        {
            "method": method,
            "points": [[round(float(x), 3), round(float(y), 3)] for x, y in points],
            "labels": [labels[index] for index in chosen],
        },
    )


STEPS: dict[str, Callable[..., None]] = {"describe": describe, "embed": embed, "predict": predict, "map": draw_map}


# ---- what heareval needs to run today ----


def _accept_pickled_weights() -> None:
    """Since 2.6 torch.load refuses pickled objects unless asked not to.

    heareval loads the Lightning checkpoints that it has just written, and modules of 2021 load their own weights so.
    """
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def _restore_epoch_setter() -> None:
    """Before testing heareval sets the epoch whose postprocessing of events it wants (hear-eval-kit issue 432).

    Lightning dropped that in 1.6: the assignment would be to an attribute that nothing reads.
    """
    from pytorch_lightning.loops import FitLoop

    def get_epoch(loop: FitLoop) -> int:
        return loop.epoch_progress.current.completed

    def set_epoch(loop: FitLoop, epoch: int) -> None:
        loop.epoch_progress.current.completed = epoch

    FitLoop.current_epoch = property(get_epoch, set_epoch)


def _train_through_undefined_scores() -> None:
    """An event F-measure is NaN as long as nothing is detected, and EarlyStopping then ends the training at once.

    Such a score now counts as no improvement. None of the papers' tasks has one.
    """
    from heareval.predictions import task_predictions

    task_predictions.EarlyStopping = functools.partial(task_predictions.EarlyStopping, check_finite=False)


def _replace_memory_meter() -> None:
    """On a GPU machine heareval's memory meter needs the pynvml of 2021, whose names were bytes. Nothing reads it."""
    meter = types.ModuleType("heareval.gpu_max_mem")
    meter.reset = lambda: None
    meter.measure = lambda: None
    meter.device_name = lambda: "not measured"
    package = importlib.import_module("heareval")
    package.gpu_max_mem = sys.modules[meter.__name__] = meter


def _pass_tensorflow_gpu_check() -> None:
    """heareval stops where torch sees a GPU and TensorFlow does not; that only matters to TensorFlow's modules."""
    import tensorflow as tf

    tf.test.is_gpu_available = lambda *_, **__: True


# ---- facts about a model ----


def _weights(model: object) -> dict[str, Any]:
    """Number and hash of a torch model's weights: what tells two models of one name apart."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return {"parameters": None, "fingerprint": None}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):  # a module may keep other things there
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"parameters": sum(p.numel() for p in model.parameters()), "fingerprint": digest.hexdigest()}


def _versions(module: str) -> dict[str, str]:
    """Versions of Python, of what computes the scores, and of the module's own distribution where it has one."""
    package = module.partition(".")[0]
    names = ["heareval", "torch", "numpy", "pytorch-lightning", "scikit-learn", "sed_eval", "hear-audiomaepp"]
    names += importlib.metadata.packages_distributions().get(package, [])
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


# ---- the process ----


def _end_with(driver: int) -> None:
    """End this process soon after its parent: a driver that was killed must not leave steps at work."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run one step: its name, its arguments as JSON, and the process to end with."""
    step, arguments, driver = sys.argv[1:]
    _end_with(int(driver))
    STEPS[step](**json.loads(arguments))


if __name__ == "__main__":
    main()
