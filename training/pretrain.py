"""Train: `python -m training.pretrain --config CONFIG.yaml --data SHARDS --out RUN [key=value ...]`.

On one device as it stands, on several processes under torchrun. A run that was stopped, in whatever way, goes on from
its newest checkpoint when the same command is given again, and ends with the weights it would have had.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hear_encoders.allocator import keep_freed_memory
from hear_encoders.checkpoint import load_checkpoint, resolve
from hear_encoders.console import BAD_USAGE
from hear_encoders.files import write_json
from training import checkpoints
from training.config import RunConfig, learning_rate_factor, load_run_config, run_config_from_dict
from training.corpora.shards import JoinedShards, ShardIndex
from training.data import RowBatches, crop_loader, run_crops
from training.flops import matmul_rate
from training.held_out import FixedCrops
from training.locks import locked
from training.masking import Masking, masking_noise, random_masking
from training.objectives import MaskedAutoencoder, MaskedModel, autocast, build_model, count_clip_flop
from training.optimizers import build_optimizers
from training.run_log import RunLog

CONFIG_FILE, DATA_FILE = "run.json", "data.json"
PICTURED_CLIPS = 4
NOT_FINITE = 3  # exit code

logger = logging.getLogger("training")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run."""

    rank: int
    processes: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


def join_processes(device: str | None) -> Place:
    """Join the processes that torchrun started, if it did."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(rank, processes, torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind))
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if processes > 1:
        dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo")
    return place


class Trainer:
    """One run in this process: model, optimiser, and the steps between two checkpoints.

    Args:
        config, index: of the run, and the records it trains on.
        run: its directory.
        place: of this process among those of the run.
        held_out: records it is tested on as it trains, if any.
    """

    def __init__(
        self,
        config: RunConfig,
        index: ShardIndex | JoinedShards,
        run: Path,
        place: Place,
        held_out: ShardIndex | None = None,
    ) -> None:
        keep_freed_memory()
        self.config, self.run, self.place = config, run, place
        self.crops = run_crops(index, config)
        self.total_steps, self.warmup_steps = config.steps(len(index)), config.warmup(len(index))
        if config.fsdp and config.precision == "float16":
            raise ValueError("fsdp does not go with precision = float16; use bfloat16")
        if config.fsdp and config.optimizer == "muon":
            raise ValueError("fsdp does not go with optimizer = muon, which needs whole matrices; use adamw")
        if config.fsdp and not dist.is_initialized():
            raise ValueError("fsdp = true needs processes to share the model: start with torchrun")
        self.model = build_model(config)
        if config.start_from is not None and checkpoints.latest(run) is None:
            begin_with(self.model, config)
        self.model.to(place.device)
        if config.fsdp:
            shard(self.model, place)
        self.optimizers = build_optimizers(self.model, config, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "float16")
        self.step = 0
        self.stop_requested = False  # of this process, by a signal; `stopping` is what all have agreed on
        self.stopping = False
        self.deadline = math.inf
        self.resume()
        self.forward: nn.Module = torch.compile(self.model) if config.compile else self.model
        if place.processes > 1 and not config.fsdp:
            devices = [place.device.index] if place.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices)
        self.held_out = None if held_out is None else FixedCrops(held_out, config, config.held_out_clips)
        self.pictured: FixedCrops | None = None
        if config.picture_every is not None:
            self.pictured = FixedCrops(index if held_out is None else held_out, config, PICTURED_CLIPS)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = checkpoints.latest(self.run)
        if newest is None:
            return
        tensors, state = checkpoints.load(newest)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, tensors, options=options)
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=options)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        logger.info("resumed from %s", newest)

    def save(self) -> None:
        """Save this step. All processes take part, the leading one writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizers, options=options)
        if self.place.leads:
            state = {"step": self.step, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
            checkpoints.save(self.run, self.step, model, state)
            checkpoints.prune(self.run, self.config.keep_last, self.config.milestone_every)

    def masking(self, noise: Tensor, part: int) -> Masking:
        """Masks of one part of this process's share of the batch that the noise is for."""
        config, place = self.config, self.place
        rows = config.batch_size // place.processes // config.accumulate
        first = (place.rank * config.accumulate + part) * rows
        noise = noise[first : first + rows].to(place.device, non_blocking=True)
        return random_masking(noise, config.mask_ratio)

    def train_step(self, parts: Sequence[Tensor]) -> tuple[float, float]:
        """Make one optimiser step from this process's parts of the batch; return loss and gradient norm.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are as they were before the step.
        """
        config = self.config
        rate = config.learning_rate * learning_rate_factor(
            self.step, self.warmup_steps, self.total_steps, config.cooldown_steps
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        noise = masking_noise(config.seed, self.step, config.batch_size, config.encoder.patches.patches)
        outcome = torch.zeros(2, device=self.place.device)  # loss; whether a process was asked to stop
        for part, logmel in enumerate(parts):
            masking = self.masking(noise, part)
            logmel = logmel.to(self.place.device, non_blocking=True)
            with self.gradients_shared(part == len(parts) - 1):
                with autocast(self.place.device, config.precision):
                    loss = self.forward(logmel, masking).loss / len(parts)
                self.scaler.scale(loss).backward()
            outcome[0] += loss.detach()
        outcome[1] = self.stop_requested or time.monotonic() > self.deadline
        if self.place.processes > 1:  # all processes must see the same, or some would wait for ever
            dist.all_reduce(outcome)
            outcome[0] /= self.place.processes
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = math.inf if config.clip_grad is None else config.clip_grad
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Reading these waits for the device, which costs it the time to queue an optimiser step; so what is not
        # finite is seen before it gets into the weights.
        mean_loss, stop, norm = torch.stack([*outcome, norm.float()]).tolist()
        self.stopping = stop > 0
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss of step {self.step} is {mean_loss}")
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        elif not self.scaler.is_enabled():  # of float16 the scaler tries a smaller scale, and no optimiser steps
            raise FloatingPointError(f"the gradient of step {self.step} is {norm}")
        self.scaler.update()
        self.step += 1
        return mean_loss, norm

    def gradients_shared(self, last_part: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once a step, with its last part."""
        if self.config.fsdp:
            self.model.set_requires_gradient_sync(last_part)
        elif self.place.processes > 1 and not last_part:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def fit(self) -> bool:
        """Train to the end, or until asked to stop; save either way. Return whether the end was reached.

        Raises:
            FloatingPointError: the loss or the gradient of a step is not finite. The state before it is saved.
        """
        config, place = self.config, self.place
        batches = RowBatches(
            config.batch_size, config.accumulate, place.rank, place.processes, self.step, self.total_steps
        )
        loader = iter(crop_loader(self.crops, batches, config.workers, pin_memory=place.device.type == "cuda"))
        log = self.open_log() if place.leads else None
        self.deadline = math.inf if config.max_hours is None else time.monotonic() + 3600 * config.max_hours
        if self.step == 0:
            self.show(log)
        saves = True
        try:
            while self.step < self.total_steps and not self.stopping:
                begun = time.monotonic()
                loss, norm = self.train_step([next(loader) for _ in range(config.accumulate)])
                ends = self.step == self.total_steps
                if log is not None:
                    rate = self.optimizers[0].param_groups[0]["lr"]
                    log.add(loss, norm, rate, config.batch_size, time.monotonic() - begun)
                    if self.step % config.log_every == 0 or ends:
                        log.write(self.step)
                self.show(log)
                if self.step % config.save_every == 0:
                    self.save()
        except Exception as error:
            # One process alone cannot save a model that is shared out; all see the same loss, though.
            saves = not config.fsdp or isinstance(error, FloatingPointError)
            raise
        finally:
            if saves:
                self.save()
            if log is not None:
                log.close()
        return self.step == self.total_steps

    def open_log(self) -> RunLog:
        """The run's log, from this step on."""
        config, place = self.config, self.place
        rate = place.processes * matmul_rate(place.device, getattr(torch, config.precision))
        return RunLog(self.run, self.step, self.total_steps, count_clip_flop(config), rate)

    def show(self, log: RunLog | None) -> None:
        """Test and draw what the model makes of crops it does not train on, where this step is one for it."""
        config, place = self.config, self.place
        ends = self.step == self.total_steps
        if self.held_out is not None and (self.step % config.held_out_every == 0 or ends):
            error = self.held_out.error(self.held_out.predict(self.model, place.device))
            if log is not None:
                log.write_held_out(self.step, self.step * config.batch_size, error, *self.held_out.baselines)
        if self.pictured is not None and (self.step % config.picture_every == 0 or ends):
            predicted = self.pictured.predict(self.model, place.device)
            if log is not None:
                log.add_picture(self.step, self.pictured.figure(predicted, f"{self.run.name}, step {self.step}"))


def begin_with(model: MaskedAutoencoder | MaskedModel, config: RunConfig) -> None:
    """Replace a new model's weights by those that `config.start_from` names.

    Raises:
        FileNotFoundError: nothing there, or a run without a checkpoint.
        ValueError: weights of another encoder, or damaged ones.
    """
    run = Path(config.start_from)
    if (run / CONFIG_FILE).is_file():
        begun, newest = read_run_config(run), checkpoints.latest(run)
        if newest is None:
            raise FileNotFoundError(f"start_from: {run} has no checkpoint yet")
        tensors, _ = checkpoints.load(newest)
        encoder_config, whole, source = begun.encoder, begun.decoder == config.decoder, str(newest)
    else:
        encoder = load_checkpoint(resolve(config.start_from))
        tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        encoder_config, whole, source = encoder.config, False, config.start_from
    for field in dataclasses.fields(config.encoder):
        got, expected = getattr(encoder_config, field.name, None), getattr(config.encoder, field.name)
        if got != expected:
            raise ValueError(f"start_from: the encoder of {source} has {field.name} = {got!r}, this run {expected!r}")
    if not whole:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    model.load_state_dict(tensors, strict=whole)
    logger.info("begun with %s from %s", "all weights" if whole else "the encoder", source)


def shard(model: MaskedAutoencoder | MaskedModel, place: Place) -> None:
    """Share out a model's parameters, gradients and optimiser state over all processes (FSDP2), block by block."""
    mesh = init_device_mesh(place.device.type, (place.processes,))
    blocks = [*model.encoder.blocks, *(model.decoder.blocks if isinstance(model, MaskedAutoencoder) else ())]
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


# Settings that may change between two sittings of a run, because they do not change its result.
_FREE_SETTINGS = {
    *("workers", "log_every", "save_every", "keep_last", "milestone_every", "max_hours"),
    *("held_out_every", "held_out_clips", "picture_every"),
}


def read_run_config(run: Path) -> RunConfig:
    """The configuration a run was begun with."""
    path = run / CONFIG_FILE
    return run_config_from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))


def settle_config(config: RunConfig, run: Path, write: bool) -> None:
    """Keep a run's configuration in its directory; refuse to go on with another one.

    Raises:
        ValueError: the run was begun with a setting of another value. Only the length may change, of a run with
            cooldown_steps, as long as the steps it has made are the same in both.
    """
    if (run / CONFIG_FILE).exists():
        begun = read_run_config(run)
        for field in dataclasses.fields(RunConfig):
            before, now = getattr(begun, field.name), getattr(config, field.name)
            if before == now or field.name in _FREE_SETTINGS:
                continue
            if field.name == "max_steps" and None not in (begun.cooldown_steps, config.cooldown_steps):
                made = max(checkpoints.steps_saved(run), default=0)
                cools = min(before, now) - config.cooldown_steps
                if made <= cools:
                    continue
                raise ValueError(
                    f"{run} has made {made} steps and cools down from step {cools}: max_steps can be changed before "
                    f"that, but no more from {before} to {now}"
                )
            raise ValueError(f"{run} was begun with {field.name} = {before!r}, now {now!r}; choose another --out")
        if write and config.max_steps != begun.max_steps:
            write_json(run / CONFIG_FILE, dataclasses.asdict(dataclasses.replace(begun, max_steps=config.max_steps)))
    elif write:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / CONFIG_FILE, dataclasses.asdict(config))


def settle_data(data: JoinedShards, run: Path, write: bool) -> None:
    """Keep in a run's directory which records it was begun with; refuse to go on with others. Folders may move.

    Raises:
        ValueError: other records than before.
    """
    path = run / DATA_FILE
    now = [index.fingerprint() for index in data.indices]
    if path.exists():
        if now != json.loads(path.read_text(encoding="utf-8")):
            raise ValueError(f"{run} was begun with other records than those of --data; choose another --out")
    elif write:
        write_json(path, now)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m training.pretrain",
        description="Pretrain an encoder; give the same command again to go on with a run that was stopped.",
        epilog="example: torchrun --nproc-per-node=2 -m training.pretrain --config training/configs/axlstm_tiny.yaml "
        "--data shards/ --out runs/axlstm_tiny batch_size=256 max_steps=10000",
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file, such as training/configs/mae_tiny.yaml")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        action="append",
        metavar="SHARDS",
        help="directory that training.corpora.prepare wrote; may be given several times, with shares=[...] or without",
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the run")
    parser.add_argument("--held-out", type=Path, metavar="SHARDS", help="shards to test on while it trains")
    parser.add_argument("--max-hours", type=float, help="stop and save after this long (max_hours=...)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    options = parser.parse_args(arguments)
    place = join_processes(options.device)
    logging.basicConfig(level=logging.INFO if place.leads else logging.WARNING, format="%(message)s", stream=sys.stdout)
    with contextlib.ExitStack() as held:
        try:
            config = load_run_config(options.config, options.overrides)
            if options.max_hours is not None:
                config = dataclasses.replace(config, max_hours=options.max_hours)
            settle_config(config, options.out, write=place.leads)
            if place.leads:
                held.enter_context(locked(options.out, shared_with_children=False))
            held_out = None if options.held_out is None else ShardIndex.open(options.held_out)
            data = JoinedShards([ShardIndex.open(path) for path in options.data])
            settle_data(data, options.out, write=place.leads)
            trainer = Trainer(config, data, options.out, place, held_out)
        except (OSError, ValueError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return BAD_USAGE

        def stop(*_: object) -> None:
            trainer.stop_requested = True

        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, stop)
        try:
            finished = trainer.fit()
        except FloatingPointError as error:
            print(f"{parser.prog}: error: {error}; the state before it is saved", file=sys.stderr)
            return NOT_FINITE
    if place.processes > 1:
        dist.barrier()  # a process that left while another still talks to it would end both with an error
        dist.destroy_process_group()
    logger.info("%s at step %d", "finished" if finished else "stopped and saved", trainer.step)
    return 0


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written. Threads of torch that are still there may abort a process while Python is taken down around
        # them ("terminate called without an active exception"), and torchrun would call a finished run a failed one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
