"""The steps of an evaluation, each run as a process inside heareval's environment.

`evaluation.driver` calls `python -m evaluation.kit STEP ARGUMENTS DRIVER_PID` with the interpreter of the environment
that `evaluation.environment` made. ARGUMENTS is a JSON object of the step's keyword arguments.

heareval 2021.1.3 comes from PyPI, unchanged. It expects the libraries of 2021 and searches a wider grid than the
papers, so each step patches it before it starts. All patches are in this file, each with its reason.
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

# Slow imports (torch, and hear_encoders, which imports torch) are inside functions: `main` watches the driver first.

# The papers' restricted grid. Settings not named here (optimizer, norms) have a single value in heareval's own grid.
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
# heareval tries this many random grid points: more than any grid has, even one that a task's metadata widens.
ALL_GRID_POINTS = 1000

MAP_CLIPS, MAP_COMPONENTS, MAP_PERPLEXITY, MAP_SEED = 600, 50, 30, 0


# ---- steps ----


def describe(module: str, weights_path: str | None, options: dict[str, Any], output: str) -> None:
    """Load a model as heareval does, and write its fields of `evaluation.results.ModelRecord` to `output`."""
    from hear_encoders.files import write_json

    imported = importlib.import_module(module)
    model = imported.load_model(*([weights_path] if weights_path else []), **options)
    write_json(
        output,
        {
            "sample_rate": int(model.sample_rate),
            "embedding_size": int(model.scene_embedding_size),
            **_weights(model),
            "encoder": _encoder(model),
            "versions": _versions(module),
        },
    )


def embed(
    module: str, weights_path: str | None, options: dict[str, Any], tasks_dir: str, task: str, output: str
) -> None:
    """Embed all clips of a task. The folder `output` appears only once it is complete."""
    importlib.import_module(module)  # before TensorFlow: some libraries (openSMILE) cannot be loaded after it
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
    (embeddings,) = unfinished.glob(f"*/{task}")  # heareval names the folder between after the module and options
    shutil.rmtree(output, ignore_errors=True)
    os.replace(embeddings, output)
    shutil.rmtree(unfinished)


def predict(embeddings: str, folder: str, seed: int) -> None:
    """Train and test the papers' classifiers with one seed. heareval writes the scores to `folder`."""
    _accept_pickled_weights()
    _replace_memory_meter()
    _restore_epoch_setter()
    _train_through_undefined_scores()
    # heareval turns deterministic kernels on; cuBLAS then raises unless its workspace size is fixed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from heareval.predictions import runner, task_predictions

    task_predictions.PARAM_GRID.update(PAPERS_GRID, initialization=[torch.nn.init.xavier_normal_])
    # A progress bar over 500 epochs fills the log, and slows the training of such a small network.
    task_predictions.pl.Trainer = functools.partial(task_predictions.pl.Trainer, enable_progress_bar=False)
    # heareval always passes seed 42.
    seed_everything = task_predictions.seed_everything
    task_predictions.seed_everything = lambda _, workers: seed_everything(seed, workers=workers)

    # heareval writes into the folder of embeddings, so each seed gets its own folder with links to them.
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for entry in os.scandir(embeddings):
        if entry.is_file():
            os.symlink(os.path.abspath(entry.path), os.path.join(folder, entry.name))
    runner.runner([os.path.abspath(folder), "--grid-points", str(ALL_GRID_POINTS)], standalone_mode=False)


def draw_map(embeddings: str, output: str) -> None:
    """Project test clips of a scene task to two dimensions by t-SNE; write points and labels to `output`."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from evaluation.results import EmbeddingMap, write_record
    from evaluation.tasks import METADATA_FILE
    from hear_encoders.files import read_json

    folder = Path(embeddings)
    metadata = read_json(folder / METADATA_FILE)
    # A k-fold task tests on each fold in turn.
    splits = ["test"] if metadata["split_mode"] == "trainvaltest" else metadata["splits"]
    vectors, labels = [], []
    for split in splits:
        shape = read_json(folder / f"{split}.embedding-dimensions.json")
        vectors.append(np.fromfile(folder / f"{split}.embeddings.npy", dtype=np.float32).reshape(shape))
        with open(folder / f"{split}.target-labels.pkl", "rb") as file:  # trusted: the embed step wrote it
            labels += [" + ".join(map(str, clip)) for clip in pickle.load(file)]
    vectors = np.concatenate(vectors)
    count = min(MAP_CLIPS, len(vectors))
    if count < 4:
        raise ValueError(f"a map needs at least 4 test clips, got {count}")
    chosen = np.sort(np.random.default_rng(MAP_SEED).permutation(len(vectors))[:count])
    components = min(MAP_COMPONENTS, count, vectors.shape[1])
    perplexity = min(MAP_PERPLEXITY, (count - 1) / 3)
    reduced = PCA(components, svd_solver="full").fit_transform(vectors[chosen])
    points = TSNE(perplexity=perplexity, init="pca", random_state=MAP_SEED).fit_transform(reduced)
    method = f"t-SNE (perplexity {perplexity:g}) of {components} principal components, {count} of {len(vectors)} clips"
    rounded = [(round(float(x), 3), round(float(y), 3)) for x, y in points]
    write_record(output, EmbeddingMap(method, rounded, [labels[index] for index in chosen]))


STEPS: dict[str, Callable[..., None]] = {"describe": describe, "embed": embed, "predict": predict, "map": draw_map}


# ---- patches that let heareval run with current libraries ----


def _accept_pickled_weights() -> None:
    """Let torch.load read pickled objects, which it refuses by default since 2.6.

    heareval loads its own Lightning checkpoints that way, and HEAR modules of 2021 their weights.
    """
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def _restore_epoch_setter() -> None:
    """Make Lightning's current epoch assignable again (hear-eval-kit issue 432).

    Before testing, heareval sets it to the epoch whose event postprocessing it wants. Lightning 1.6 removed the setter.
    """
    from pytorch_lightning.loops import FitLoop

    def get_epoch(loop: FitLoop) -> int:
        return loop.epoch_progress.current.completed

    def set_epoch(loop: FitLoop, epoch: int) -> None:
        loop.epoch_progress.current.completed = epoch

    FitLoop.current_epoch = property(get_epoch, set_epoch)


def _train_through_undefined_scores() -> None:
    """Make early stopping treat a NaN score as no improvement instead of ending the training.

    An event F-measure is NaN as long as no event is detected. None of the papers' tasks is scored by one.
    """
    from heareval.predictions import task_predictions

    task_predictions.EarlyStopping = functools.partial(task_predictions.EarlyStopping, check_finite=False)


def _replace_memory_meter() -> None:
    """Replace heareval's GPU memory meter, which fails with current pynvml; nothing reads its results."""
    meter = types.ModuleType("heareval.gpu_max_mem")
    meter.reset = lambda: None
    meter.measure = lambda: None
    meter.device_name = lambda: "not measured"
    package = importlib.import_module("heareval")
    package.gpu_max_mem = sys.modules[meter.__name__] = meter


def _pass_tensorflow_gpu_check() -> None:
    """Pass heareval's check that TensorFlow sees the GPU that torch sees; only TensorFlow modules would need it."""
    import tensorflow as tf

    tf.test.is_gpu_available = lambda *_, **__: True


# ---- facts about a model ----


def _weights(model: object) -> dict[str, Any]:
    """Return the number and hash of a torch model's weights, which identify it; None for other models."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return {"parameters": None, "fingerprint": None}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):  # a state dict may hold extra state of any type
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"parameters": sum(p.numel() for p in model.parameters()), "fingerprint": digest.hexdigest()}


def _encoder(model: object) -> dict[str, Any] | None:
    """Return the encoder's config if the model is one of this project's, else None."""
    from hear_encoders.config import config_to_dict
    from hear_encoders.embedder import Embedder

    return config_to_dict(model.encoder.config) if isinstance(model, Embedder) else None


def _versions(module: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that compute scores, and of the module's own distribution."""
    package = module.partition(".")[0]
    names = ["heareval", "torch", "numpy", "pytorch-lightning", "scikit-learn", "sed_eval", "hear-audiomaepp"]
    names += importlib.metadata.packages_distributions().get(package, [])
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


# ---- the process ----


def _end_with(driver: int) -> None:
    """End this process soon after the driver ends, so that a killed driver leaves no step running."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run the step that the command line names."""
    step, arguments, driver_pid = sys.argv[1:]
    _end_with(int(driver_pid))
    STEPS[step](**json.loads(arguments))


if __name__ == "__main__":
    main()
