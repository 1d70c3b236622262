"""Saving and resuming a run.

A checkpoint is a directory `checkpoint-00001200` with the model as safetensors and the rest (optimiser, scaler, step)
as a file that `torch.load(weights_only=True)` reads. It is written under another name and renamed when it is
complete and on disk, so a directory of that name is always whole. Data order, crops and masks are functions of the
seed and the step, so nothing of them needs saving.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL_FILE, STATE_FILE = "model.safetensors", "state.pt"
_NAME = re.compile(r"checkpoint-(\d{8})")


def save(run: Path, step: int, model: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; one that is there already stays.

    Args:
        run: the run's directory.
        step: optimiser steps made so far.
        model: the pretraining model's tensors.
        state: whatever else resuming needs, of tensors, numbers, strings, lists and dictionaries.

    Returns:
        The checkpoint's directory.
    """
    final = run / f"checkpoint-{step:08d}"
    if final.exists():
        return final
    unfinished = run / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}, unfinished / MODEL_FILE)
    torch.save(state, unfinished / STATE_FILE)
    for path in (unfinished / MODEL_FILE, unfinished / STATE_FILE, unfinished):
        _flush(path)
    os.rename(unfinished, final)
    _flush(run)
    return final


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: the model's tensors, and the rest."""
    return load_file(checkpoint / MODEL_FILE), torch.load(checkpoint / STATE_FILE, weights_only=True)


def steps_saved(run: Path) -> list[int]:
    """Steps of the run's checkpoints, in order."""
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    steps = steps_saved(run)
    return run / f"checkpoint-{steps[-1]:08d}" if steps else None


def prune(run: Path, keep_last: int, milestone_every: int | None) -> None:
    """Delete all but the newest checkpoints and the milestones, and what killed processes left unfinished."""
    for step in steps_saved(run)[:-keep_last]:
        if milestone_every is None or step % milestone_every:
            doomed = run / f".checkpoint-{step:08d}.deleted.tmp"
            os.rename(run / f"checkpoint-{step:08d}", doomed)  # a directory half deleted must not bear the name
            shutil.rmtree(doomed)
    for leftover in run.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
