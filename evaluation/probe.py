"""A quick look at weights while choices are still open: a linear classifier on validation clips, in a minute or two.

`run` is for results: it trains the papers' classifiers for hours and scores them on test splits, which no choice may
rest on. This fits logistic regression on scene embeddings of a task's "train", and scores it on "valid". Tasks of k
folds are not for it: each of their clips is tested on once.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from evaluation.driver import Task

METRICS = ("top1_acc", "pitch_acc")  # the share of clips whose one label was found
DEFAULT_CLIPS = 500
BATCH_CLIPS = 32
WEIGHT_DECAY = 0.1  # of standardised embeddings, against the mean loss of a clip
ITERATIONS = 200

SceneEmbeddings = Callable[[Tensor], Tensor]


def can_probe(task: Task) -> bool:
    """Whether each clip of a task has one embedding and one label, and some clips are for validation alone."""
    return task.facts["embedding_type"] == "scene" and task.facts["metric"] in METRICS and not task.kfold


def probe_model(
    module: str, weights: str | None, options: dict[str, Any], tasks: Iterable[Task], clips: int, average: int = 1
) -> list[float]:
    """Load a HEAR module's model, and `probe` it on each task.

    Args:
        average: take the mean of so many equal parts of each embedding. Ours are of the rows of bands, five of them
            side by side: 5 shows what keeping them apart is worth.

    Raises:
        ValueError: the module or its model could not be loaded, or embeddings do not have so many equal parts.
        FileNotFoundError: no such weights, or a task has no audio at the model's rate.
    """
    try:
        hear = importlib.import_module(module)
        model = hear.load_model(*([] if weights is None else [weights]), **options)
    except (ImportError, TypeError) as error:  # a name mistyped: of the module, or of an option
        raise ValueError(f"{module} could not be loaded with options {options}: {error}") from error

    @torch.no_grad()
    def embed(audio: Tensor) -> Tensor:
        embeddings = hear.get_scene_embeddings(audio, model)
        if embeddings.shape[1] % average:
            raise ValueError(f"embeddings of {embeddings.shape[1]} numbers do not have {average} equal parts")
        return embeddings.unflatten(1, (average, -1)).mean(1)

    return [probe(task, embed, model.sample_rate, clips) for task in tasks]


def probe(task: Task, embed: SceneEmbeddings, sample_rate: int, clips: int = DEFAULT_CLIPS) -> float:
    """Share of validation clips that a linear classifier gets right.

    Args:
        task: one that `can_probe` takes.
        embed: audio (clips, samples) at `sample_rate` to embeddings (clips, size).
        clips: at most so many of a split, the same for all models.

    Raises:
        FileNotFoundError: the task has no audio at that rate.
    """
    (rows, names), (valid_rows, valid_names) = (
        _embed_split(task, split, embed, clips, sample_rate) for split in ("train", "valid")
    )
    vocabulary = sorted({*names, *valid_names})
    classify = fit_linear(rows, torch.tensor([vocabulary.index(name) for name in names]), len(vocabulary))
    found = [vocabulary[index] for index in classify(valid_rows).argmax(-1)]
    return sum(one == other for one, other in zip(found, valid_names)) / len(valid_names)


def fit_linear(embeddings: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised embeddings.

    Args:
        embeddings: (clips, size).
        labels: (clips,), numbers below `classes`.

    Returns:
        A function from embeddings to scores (clips, classes).
    """
    deviation, mean = torch.std_mean(embeddings.double(), dim=0)

    def standardise(rows: Tensor) -> Tensor:
        return (rows.double() - mean) / deviation.clamp_min(1e-6)

    rows = standardise(embeddings)
    weight = torch.zeros(embeddings.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda rows: standardise(rows) @ weight + bias


def _embed_split(
    task: Task, split: str, embed: SceneEmbeddings, clips: int, sample_rate: int
) -> tuple[Tensor, list[str]]:
    """Embeddings (clips, size) and labels of a split, or of a draw from it."""
    labels = json.loads((task.folder / f"{split}.json").read_text(encoding="utf-8"))
    names = sorted(labels)
    if len(names) > clips:
        names = random.Random(0).sample(names, clips)
    folder = task.folder / str(sample_rate) / split
    if not folder.is_dir():
        raise FileNotFoundError(f"{task.name} has no audio at {sample_rate} Hz: no folder {folder}")
    rows = []
    for start in range(0, len(names), BATCH_CLIPS):
        audio = [soundfile.read(folder / name, dtype="float32")[0] for name in names[start : start + BATCH_CLIPS]]
        rows.append(embed(pad_sequence([torch.from_numpy(clip) for clip in audio], batch_first=True)).float().cpu())
    return torch.cat(rows), [labels[name][0] for name in names]
