"""Compare weights quickly: the accuracy of a linear classifier on validation clips, in a minute or two per model.

`python -m evaluation run` produces results: it trains the papers' classifiers for hours and scores them on test splits,
which must not guide any choice. The probe is for making choices: it fits a logistic regression on scene embeddings of
the split "train" and scores it on "valid". k-fold tasks are excluded because every clip of theirs is a test clip.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable
from typing import Any

import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from evaluation.tasks import Task
from hear_encoders.files import read_json

METRICS = ("top1_acc", "pitch_acc")  # both are the fraction of clips that are classified correctly
DEFAULT_CLIPS = 500
BATCH_CLIPS = 32
WEIGHT_DECAY = 0.1  # for standardized embeddings and a loss averaged over clips
MAX_ITERATIONS = 200

SceneEmbeddings = Callable[[Tensor], Tensor]


def can_probe(task: Task) -> bool:
    """Return whether each clip has one embedding and one label, and the task has a validation split."""
    return task.embedding_type == "scene" and task.metric in METRICS and not task.kfold


def probe_model(
    module: str, weights: str | None, options: dict[str, Any], tasks: Iterable[Task], clips: int, average: int = 1
) -> list[float]:
    """Load a HEAR module's model and `probe` it on each task.

    Args:
        average: number of equal parts that each embedding is split into and averaged over; 1 leaves it whole. Our
            embeddings concatenate the tokens of five band rows, so 5 shows how much keeping these apart helps.

    Raises:
        ValueError: the module or its model cannot be loaded, or an embedding cannot be split into equal parts.
        FileNotFoundError: the weights do not exist, or a task has no audio at the model's sample rate.
    """
    try:
        hear = importlib.import_module(module)
        model = hear.load_model(*([] if weights is None else [weights]), **options)
    except (ImportError, TypeError) as error:  # a mistyped module or option
        raise ValueError(f"{module} could not be loaded with options {options}: {error}") from error

    @torch.no_grad()
    def embed(audio: Tensor) -> Tensor:
        embeddings = hear.get_scene_embeddings(audio, model)
        if embeddings.shape[1] % average:
            raise ValueError(f"embeddings of {embeddings.shape[1]} values cannot be split into {average} equal parts")
        return embeddings.unflatten(1, (average, -1)).mean(1)

    return [probe(task, embed, model.sample_rate, clips) for task in tasks]


def probe(task: Task, embed: SceneEmbeddings, sample_rate: int, clips: int = DEFAULT_CLIPS) -> float:
    """Return the accuracy of a linear classifier on validation clips, from 0 to 1.

    Args:
        task: a task for which `can_probe` is true.
        embed: maps audio (clips, samples) at `sample_rate` to embeddings (clips, size).
        clips: maximum number of clips per split; the same ones for every model.

    Raises:
        FileNotFoundError: the task has no audio at that sample rate.
    """
    train_embeddings, train_labels = _embed_split(task, "train", embed, clips, sample_rate)
    valid_embeddings, valid_labels = _embed_split(task, "valid", embed, clips, sample_rate)
    vocabulary = sorted({*train_labels, *valid_labels})
    train_indices = torch.tensor([vocabulary.index(label) for label in train_labels])
    classify = fit_linear(train_embeddings, train_indices, len(vocabulary))
    predicted = [vocabulary[index] for index in classify(valid_embeddings).argmax(-1)]
    return sum(one == other for one, other in zip(predicted, valid_labels)) / len(valid_labels)


def fit_linear(embeddings: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Fit a multinomial logistic regression on standardized embeddings.

    Args:
        embeddings: (clips, size).
        labels: (clips,), class indices.
        classes: number of classes.

    Returns:
        A function that maps embeddings (clips, size) to logits (clips, classes), float64.
    """
    deviation, mean = torch.std_mean(embeddings.double(), dim=0)

    def standardize(rows: Tensor) -> Tensor:
        return (rows.double() - mean) / deviation.clamp_min(1e-6)

    rows = standardize(embeddings)
    weight = torch.zeros(embeddings.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda rows: standardize(rows) @ weight + bias


def _embed_split(
    task: Task, split: str, embed: SceneEmbeddings, clips: int, sample_rate: int
) -> tuple[Tensor, list[str]]:
    """Return embeddings (clips, size) and labels of a split, or of a fixed random sample of it."""
    labels = read_json(task.folder / f"{split}.json")
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
