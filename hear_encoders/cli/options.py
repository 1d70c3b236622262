"""Options shared by the embedding commands, and the model that they select."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, get_args

import torch

from hear_encoders import checkpoint
from hear_encoders.console import positive
from hear_encoders.embedder import Embedder
from hear_encoders.execution import Precision, resolve_device, resolve_precision
from hear_encoders.framing import FRAMINGS
from hear_encoders.hear import EMBEDDINGS, HearModule
from hear_encoders.pooling import POOLINGS
from hear_encoders.threads import use_threads

MODELS = ("hear_audiomaepp", "hear_axlstm")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs and all options that embedding commands share, except --output, --model and --jobs."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file, folder (recursive) or glob pattern")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files whose name, or a folder's on the way, matches, such as '*.mp4'; can be repeated",
    )
    parser.add_argument("--weights", default="", help="directory, .safetensors file or Hub org/name; default: bundled")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--timestamps", action="store_true", help="write one embedding per 40 ms time step instead of one per file"
    )
    parser.add_argument(
        "--framing",
        choices=tuple(FRAMINGS),
        default="exact",
        help="time steps: exact, or as in the papers' released code; default: %(default)s",
    )
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1 or auto; default: cuda if available, else cpu")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="of matrix products; auto is half precision on CUDA, else float32; default: %(default)s",
    )
    parser.add_argument(
        "--embedding",
        choices=tuple(EMBEDDINGS),
        default="paper",
        help="the papers' embedding, or the layer and pooling that are best for other tasks; default: %(default)s",
    )
    parser.add_argument(
        "--layer",
        type=layers,
        metavar="N[,N...]",
        help="embed with the output of this block, from 1; several are concatenated; default: as --embedding",
    )
    parser.add_argument(
        "--pooling",
        choices=tuple(POOLINGS),
        help="scene embedding: the mean of the time steps, or mean and standard deviation; default: as --embedding",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile, which helps on GPUs and in bfloat16; the first batch takes a minute or more",
    )
    parser.add_argument(
        "--statistics",
        nargs=2,
        type=float,
        metavar=("MEAN", "STD"),
        help="normalize log-mel with these; default: each file's own, or those of a stream so far",
    )
    parser.add_argument(
        "--batch-seconds",
        type=positive(float),
        default=120.0,
        metavar="N",
        help="seconds of audio per batch; default: %(default)g",
    )
    parser.add_argument(
        "--threads",
        type=positive(int),
        metavar="N",
        help="CPU threads of the model; default: as many as this process may use, but 1 for a stream and for each "
        "worker of hear-embed-corpus",
    )


def layers(text: str) -> list[int]:
    """Parse numbers of blocks, separated by commas."""
    return [int(number) for number in text.split(",")]


def hear_module(name: str) -> HearModule:
    """Import a HEAR module, one of MODELS."""
    return importlib.import_module(name).MODULE


def load_embedder(options: argparse.Namespace) -> Embedder:
    """Set the CPU threads, and load the model selected by `add_embedding_arguments` and --model, on its device."""
    use_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = resolve_device(name)
    except ValueError as error:
        raise ValueError(f"--device {name}: {error}") from error
    # On a CPU few segments at a time are faster: they stay in the cache. A GPU takes the whole batch.
    segments = max(1, int(options.batch_seconds / 2)) if device.type != "cpu" else None
    return hear_module(options.model).load_model(
        options.weights,
        revision=options.revision,
        framing=options.framing,
        precision=options.precision,
        max_segments=segments,
        statistics=options.statistics,
        embedding=options.embedding,
        layer=options.layer,
        pooling=options.pooling,
        device=device,
        compile=options.compile,
    )


def embedding_settings(embedder: Embedder, model: str, root: Path) -> dict[str, Any]:
    """Return the settings that names and values in an output depend on, as plain JSON values."""
    return {
        "root": str(root),
        "model": model,
        "weights": checkpoint.fingerprint(embedder.encoder),
        "framing": embedder.framing,
        "statistics": embedder.statistics and list(embedder.statistics),
        # Left out at their defaults, as in the records of versions before these options.
        **({} if embedder.layers is None else {"layer": list(embedder.layers)}),
        **({} if embedder.pooling == "mean" else {"pooling": embedder.pooling}),
        "precision": str(resolve_precision(embedder.precision, embedder.device)).removeprefix("torch."),
    }
