"""A run's directory: the config and data that it belongs to, its log, and its checkpoints.

    run.json              the run's config
    data.json             fingerprints of the shards it trains on, one per --data folder
    log.jsonl             training progress and held-out errors, a line each
    tensorboard/          the same for TensorBoard
    pictures/             reconstructions
    checkpoint-00001200/  the state after 1200 optimizer steps

A checkpoint holds the model as safetensors; the optimizer, the gradient scaler and the step are in a file that
`torch.load(weights_only=True)` reads. It is written under another name and renamed once it is complete and on disk, so
a directory of that name is always whole. `sha256.json` has the hashes of both files: if what is read later differs, the
run goes on from the checkpoint before. Data order, crops and masks are functions of the seed and the step, so
checkpoints need not hold them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hear_encoders.checkpoint import sha256
from hear_encoders.files import atomic_write, read_json, settings_difference, write_json, write_or_check_settings
from training.config import RunConfig, run_config_from_dict
from training.corpora.shards import JoinedShards

CONFIG_FILE, DATA_FILE, LOG_FILE = "run.json", "data.json", "log.jsonl"
MODEL_FILE, STATE_FILE, HASHES_FILE = "model.safetensors", "state.pt", "sha256.json"  # of a checkpoint
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{8})")

# Settings that may change when a run is resumed, since they do not change its result.
_FREE_SETTINGS = {
    *("workers", "log_every", "save_every", "keep_last", "milestone_every", "max_hours"),
    *("held_out_every", "held_out_clips", "picture_every"),
}

logger = logging.getLogger("training")


# ---- config and data ----


def write_or_check_config(config: RunConfig, run: Path, *, write: bool) -> None:
    """Make a run's directory belong to this config, or check that it does.

    Settings that do not change the result may differ. So may `max_steps` of a run with `cooldown_steps`, as long as
    the steps already made are the same in both; the new length is then written.

    Args:
        config: the config to train with.
        run: the run's directory; made if need be.
        write: False only checks.

    Raises:
        ValueError: the directory belongs to another config, or its run.json is damaged.
    """
    settings = dataclasses.asdict(config)
    # `free=settings` compares nothing here: a run.json of an older version lacks settings, which have their defaults.
    recorded = write_or_check_settings(
        run / CONFIG_FILE, settings, holds="a run", advice="choose another --out", free=settings, write=write
    )
    if recorded is None:
        return
    begun = run_config_from_dict(recorded, str(run / CONFIG_FILE))
    has_cooldown = None not in (begun.cooldown_steps, config.cooldown_steps)
    free = _FREE_SETTINGS | ({"max_steps"} if has_cooldown else set())
    if difference := settings_difference(dataclasses.asdict(begun), settings, free):
        raise ValueError(f"{run} was begun with {difference}; choose another --out")
    if config.max_steps != begun.max_steps:
        made = max(steps_saved(run), default=0)
        cooldown_start = min(begun.max_steps, config.max_steps) - config.cooldown_steps
        if made > cooldown_start:
            raise ValueError(
                f"{run} has made {made} optimizer steps and cools down from step {cooldown_start}: max_steps can no "
                f"longer be changed from {begun.max_steps} to {config.max_steps}"
            )
        if write:
            longer = dataclasses.replace(begun, max_steps=config.max_steps)
            write_json(run / CONFIG_FILE, dataclasses.asdict(longer))


def read_run_config(run: Path) -> RunConfig:
    """Read the config that a run was begun with.

    Raises:
        FileNotFoundError: the directory is not a run's.
        ValueError: its run.json is damaged.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {CONFIG_FILE}")
    return run_config_from_dict(read_json(path), str(path))


def write_or_check_data(data: JoinedShards, run: Path, *, write: bool) -> None:
    """Make a run's directory belong to these records, or check that it does. The folders of shards may have moved.

    Args:
        data: the records to train on.
        run: the run's directory.
        write: False only checks.

    Raises:
        ValueError: the run was begun with other records, or its data.json is damaged.
    """
    path = run / DATA_FILE
    fingerprints = [index.fingerprint() for index in data.indices]
    if path.exists():
        if read_json(path) != fingerprints:
            raise ValueError(f"{run} was begun with other records than those of --data; choose another --out")
    elif write:
        write_json(path, fingerprints)


# ---- log ----


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read a run's log; empty if there is none. Half a line, which a killed process may leave, is left out.

    Raises:
        ValueError: a line is damaged.
    """
    path = run / LOG_FILE
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: damaged: delete the line")
        lines.append(values)
    return lines


# ---- checkpoints ----


def save_checkpoint(run: Path, step: int, model: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step. One that is already there stays as it is.

    Args:
        run: the run's directory.
        step: optimizer steps made so far.
        model: the pretraining model's tensors.
        state: everything else that resuming needs: tensors, numbers, strings, lists and dictionaries.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full, for example; names the file. Earlier checkpoints are kept.
    """
    final = run / f"checkpoint-{step:08d}"
    if final.exists():
        return final
    unfinished = run / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}
    try:
        save_file(tensors, unfinished / MODEL_FILE)
    except SafetensorError as error:
        raise OSError(f"{unfinished / MODEL_FILE}: {error}") from error
    with atomic_write(unfinished / STATE_FILE) as file:
        torch.save(state, file)
    write_json(unfinished / HASHES_FILE, {name: sha256(unfinished / name) for name in (MODEL_FILE, STATE_FILE)})
    for path in (unfinished / MODEL_FILE, unfinished):
        _flush(path)
    os.rename(unfinished, final)
    _flush(run)
    return final


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's directory: the model's tensors, and everything else.

    Raises:
        ValueError: a file is missing or damaged. Those of older versions have no hashes to compare with.
    """
    try:
        if (checkpoint / HASHES_FILE).exists():
            expected = read_json(checkpoint / HASHES_FILE)
            for name in (MODEL_FILE, STATE_FILE):
                if sha256(checkpoint / name) != expected[name]:
                    raise ValueError(f"{name} has another SHA-256 than {HASHES_FILE} says")
        return load_file(checkpoint / MODEL_FILE), torch.load(checkpoint / STATE_FILE, weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} is damaged: {error}") from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        raise ValueError(f"{checkpoint} is damaged: {error}") from error


def steps_saved(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in order."""
    names = os.listdir(run) if run.is_dir() else []
    return sorted(int(match[1]) for match in map(_CHECKPOINT_NAME.fullmatch, names) if match)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the directory of a run's newest checkpoint, or None if it has none."""
    steps = steps_saved(run)
    return run / f"checkpoint-{steps[-1]:08d}" if steps else None


def load_latest_checkpoint(run: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read a run's newest checkpoint that is not damaged: its directory, the model's tensors, and everything else.

    Damaged ones are named in the log.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: all checkpoints are damaged.
    """
    errors = []
    for step in reversed(steps_saved(run)):
        checkpoint = run / f"checkpoint-{step:08d}"
        try:
            return checkpoint, *load_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("%s; looking for an earlier checkpoint", error)
            errors.append(error)
    if errors:
        raise ValueError(f"{run} has no undamaged checkpoint: {errors[0]}")
    raise FileNotFoundError(f"{run} has no checkpoint yet")


def set_aside_checkpoints_after(run: Path, step: int) -> None:
    """Rename later checkpoints, which are damaged, to `damaged-checkpoint-...`, so that theirs can be written again."""
    for later in steps_saved(run):
        if later > step:
            name = f"checkpoint-{later:08d}"
            shutil.rmtree(run / f"damaged-{name}", ignore_errors=True)  # of an earlier attempt
            os.rename(run / name, run / f"damaged-{name}")


def prune_checkpoints(run: Path, keep_last: int, milestone_every: int | None) -> None:
    """Delete all checkpoints but the newest and the milestones, and unfinished ones of killed processes."""
    for step in steps_saved(run)[:-keep_last]:
        if milestone_every is None or step % milestone_every:
            doomed = run / f".checkpoint-{step:08d}.deleted.tmp"
            os.rename(run / f"checkpoint-{step:08d}", doomed)  # a half-deleted directory must not keep the name
            shutil.rmtree(doomed)
    for leftover in run.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    if os.name == "nt":  # which flushes neither directories nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
