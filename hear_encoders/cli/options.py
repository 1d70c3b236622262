"""Options that the embedding commands share, and the model they ask for."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any, get_args

import torch

from hear_encoders import checkpoint
from hear_encoders.console import positive
from hear_encoders.embedder import DEFAULT_MAX_CHUNKS, Embedder, Framing, Pooling, Precision, resolve_precision

MODELS = ("hear_audiomaepp", "hear_axlstm")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that embeds files takes, besides --output and --model: of what, which weights, and how."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file, folder (recursive) or glob pattern")
    parser.add_argument("--weights", default="", help="directory, .safetensors or Hub org/name; default: bundled")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--timestamps", action="store_true", help="one embedding per time step instead of per file")
    parser.add_argument("--framing", choices=get_args(Framing), default="exact", help="default: %(default)s")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1; default: cuda where there is one, else cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        default="mean",
        help="of a file's steps: their mean, or with their standard deviation after it; default: %(default)s",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile: for GPUs and bfloat16; takes a minute or more at first",
    )
    parser.add_argument(
        "--statistics",
        nargs=2,
        type=float,
        metavar=("MEAN", "STD"),
        help="of log-mel, to normalise with; default: each file's own, of a stream those of what it has heard",
    )
    parser.add_argument(
        "--batch-seconds",
        type=positive(float),
        default=120.0,
        metavar="N",
        help="audio decoded and grouped at a time; default: 120",
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="decoding threads; default: %(default)s",
    )


def load_embedder(options: argparse.Namespace) -> Embedder:
    """The model that the arguments of `add_embedding_arguments` ask for, on its device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A CPU likes few chunks at a time, which stay in its cache; a GPU likes as many as there are.
    chunks = max(1, int(options.batch_seconds / 2)) if device.startswith("cuda") else DEFAULT_MAX_CHUNKS
    embedder = importlib.import_module(options.model).load_model(
        options.weights,
        revision=options.revision,
        framing=options.framing,
        precision=options.precision,
        max_chunks=chunks,
        statistics=options.statistics,
        pooling=options.pooling,
        compile=options.compile,
    )
    try:
        return embedder.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise ValueError(f"--device {device}: {error}") from error


def embedding_settings(embedder: Embedder, model: str, root: Path) -> dict[str, Any]:
    """What the names and numbers in an output depend on."""
    return {
        "root": str(root),
        "model": model,
        "weights": checkpoint.fingerprint(embedder.encoder),
        "framing": embedder.framing,
        "statistics": embedder.statistics and list(embedder.statistics),
        **({} if embedder.pooling == "mean" else {"pooling": embedder.pooling}),
        "precision": str(resolve_precision(embedder.precision, embedder.device)).removeprefix("torch."),
    }
