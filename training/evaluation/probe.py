"""A quick look at weights while choices are still open: a linear classifier on validation clips, in a minute or two.

`run` is for results: it trains the papers' classifiers for hours and scores them on test splits, which no choice may
rest on. This fits logistic regression on scene embeddings, and scores it on clips that are for validation: of tasks
with such a split that one; of k-fold tasks, where every fold is tested on once, each fold but the first, by a
classifier fitted on the others (the first is left alone).
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from training.evaluation.run import Task

METRICS = ("top1_acc", "pitch_acc")  # the share of clips whose one label was found
DEFAULT_CLIPS = 500
BATCH_CLIPS = 32
WEIGHT_DECAY = 0.1  # of standardised embeddings, against the mean loss of a clip
ITERATIONS = 200

SceneEmbeddings = Callable[[Tensor], Tensor]


def can_probe(task: Task) -> bool:
    """Whether each clip of a task has one embedding and one label."""
    return task.facts["embedding_type"] == "scene" and task.facts["metric"] in METRICS


def probe_model(
    module: str, weights: str | None, options: dict[str, Any], tasks: Iterable[Task], clips: int, average: int = 1
) -> list[float]:
    """Load a HEAR module's model, and `probe` it on each task.

    Args:
        average: take the mean of so many equal parts of each embedding. Ours are of the rows of bands, five of them
            side by side: 5 shows what keeping them apart is worth.

    Raises:
        ValueError: embeddings do not have so many equal parts.
    """
    hear = importlib.import_module(module)
    model = hear.load_model(*([] if weights is None else [weights]), **options)

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
    splits = [_embed_split(task, split, embed, clips, sample_rate) for split in _splits(task)]
    vocabulary = sorted({label for _, labels in splits for label in labels})
    data = [(embeddings, torch.tensor([vocabulary.index(label) for label in labels])) for embeddings, labels in splits]
    tested = range(len(data)) if task.kfold else [1]
    right = total = 0
    for index in tested:
        fitted = [split for other, split in enumerate(data) if other != index]
        embeddings, labels = data[index]
        classify = fit_linear(*(torch.cat(part) for part in zip(*fitted)), len(vocabulary))
        right += int((classify(embeddings).argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


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


def _splits(task: Task) -> Sequence[str]:
    return task.splits[1:] if task.kfold else ("train", "valid")


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
