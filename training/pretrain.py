"""Pretrain an encoder: `python -m training.pretrain --config CONFIG.yaml --data SHARDS --out RUN [key=value ...]`.

Runs in one process, or in several that torchrun starts. A run that was stopped or killed resumes from its newest
checkpoint when the same command is given again, and ends with the weights it would have had.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from hear_encoders.checkpoint import load_checkpoint, resolve
from hear_encoders.console import BAD_USAGE, FAILED, positive, print_error
from hear_encoders.execution import raise_mmap_threshold
from hear_encoders.files import locked
from hear_encoders.threads import use_threads
from training.config import RunConfig, learning_rate_factor, load_run_config
from training.corpora.shards import DamagedShardsError, JoinedShards, ShardIndex
from training.data import RowBatches, crop_loader, run_crops
from training.flops import matmul_rate
from training.held_out import FixedCrops
from training.masking import Masking, masking_noise, random_masking
from training.objectives import MaskedAutoencoder, MaskedModel, autocast, build_model, count_clip_flop
from training.optimizers import build_optimizers
from training.run_dir import (
    CONFIG_FILE,
    latest_checkpoint,
    load_latest_checkpoint,
    prune_checkpoints,
    read_log,
    read_run_config,
    save_checkpoint,
    set_aside_checkpoints_after,
    write_or_check_config,
    write_or_check_data,
)
from training.run_log import RunLog

PROG = "python -m training.pretrain"
PICTURE_CLIPS = 4
NOT_FINITE = 3  # exit code

logger = logging.getLogger("training")


@dataclasses.dataclass(frozen=True)
class DistributedContext:
    """This process's place among the processes of the run."""

    rank: int
    processes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the process that writes the run's directory and reports progress."""
        return self.rank == 0


def join_processes(device: str | None) -> DistributedContext:
    """Join the processes that torchrun started, if it did; `device` is "cpu", "cuda" or None for the best there is."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    context = DistributedContext(rank, processes, torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind))
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    if processes > 1:
        dist.init_process_group("nccl" if context.device.type == "cuda" else "gloo")
    return context


def load_initial_weights(model: MaskedAutoencoder | MaskedModel, config: RunConfig) -> None:
    """Replace a new model's weights by those that `config.start_from` names.

    Raises:
        FileNotFoundError: no such weights, or a run without a checkpoint.
        ValueError: damaged weights, or those of another encoder.
    """
    run = Path(config.start_from)
    if (run / CONFIG_FILE).is_file():
        earlier = read_run_config(run)
        checkpoint, tensors, _ = load_latest_checkpoint(run)
        encoder_config, source = earlier.encoder, str(checkpoint)
        takes_all = earlier.decoder == config.decoder
    else:
        encoder = load_checkpoint(resolve(config.start_from))
        tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        encoder_config, source = encoder.config, config.start_from
        takes_all = False
    for field in dataclasses.fields(config.encoder):
        got, expected = getattr(encoder_config, field.name, None), getattr(config.encoder, field.name)
        if got != expected:
            raise ValueError(f"start_from: the encoder of {source} has {field.name} = {got!r}, this run {expected!r}")
    if not takes_all:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    model.load_state_dict(tensors, strict=takes_all)
    logger.info("started from %s of %s", "all weights" if takes_all else "the encoder", source)


def shard_model(model: MaskedAutoencoder | MaskedModel, context: DistributedContext) -> None:
    """Shard parameters, gradients and optimizer state over all processes (FSDP2), block by block."""
    mesh = init_device_mesh(context.device.type, (context.processes,))
    blocks = [*model.encoder.blocks, *(model.decoder.blocks if isinstance(model, MaskedAutoencoder) else ())]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


class Trainer:
    """One run in this process: its data, model and optimizers, and the loop.

    Args:
        config: the run's config.
        data: the records it trains on.
        run: its directory.
        context: this process among the run's processes.
        held_out: records to test on while it trains, if any.

    Raises:
        FileNotFoundError: `config.start_from` names no weights.
        ValueError: `config.start_from` names another encoder's weights; fsdp without several processes.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ShardIndex | JoinedShards,
        run: Path,
        context: DistributedContext,
        held_out: ShardIndex | None = None,
    ) -> None:
        raise_mmap_threshold()
        self.config, self.run, self.context = config, run, context
        if config.fsdp and not dist.is_initialized():
            raise ValueError("fsdp = true needs processes to shard the model over: start with torchrun")

        self.crops = run_crops(data, config)
        self.total_steps, self.warmup_steps = config.steps(len(data)), config.warmup(len(data))

        self.model = build_model(config)
        if config.start_from is not None and latest_checkpoint(run) is None:
            load_initial_weights(self.model, config)
        self.model.to(context.device)
        if config.fsdp:
            shard_model(self.model, context)
        self.optimizers = build_optimizers(self.model, config, context.device)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.precision == "float16")
        self.step = 0  # optimizer steps made
        self.resume()
        self.forward: nn.Module = torch.compile(self.model) if config.compile else self.model
        if context.processes > 1 and not config.fsdp:
            devices = [context.device.index] if context.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices)

        self.held_out = None if held_out is None else FixedCrops(held_out, config, config.held_out_clips)
        self.picture_crops: FixedCrops | None = None
        if config.picture_every is not None:
            self.picture_crops = FixedCrops(data if held_out is None else held_out, config, PICTURE_CLIPS)

        self.deadline = math.inf
        self.stop_requested = False  # of this process alone, by a signal
        self.stopping = False  # agreed by all processes

    # ---- checkpoints ----

    def resume(self) -> None:
        """Load the newest checkpoint that is not damaged, if there is any."""
        if latest_checkpoint(self.run) is None:
            return
        checkpoint, tensors, state = load_latest_checkpoint(self.run)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, tensors, options=options)
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=options)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.context.is_main:
            set_aside_checkpoints_after(self.run, self.step)
        logger.info("resumed from %s", checkpoint)

    def save(self) -> None:
        """Save a checkpoint. All processes must call this; the main one writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizers, options=options)
        if self.context.is_main:
            state = {"step": self.step, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
            save_checkpoint(self.run, self.step, model, state)
            prune_checkpoints(self.run, self.config.keep_last, self.config.milestone_every)

    # ---- the loop ----

    def fit(self) -> bool:
        """Train to the end or until asked to stop, save, and return whether the end was reached.

        Raises:
            FloatingPointError: an optimizer step's loss or gradient is not finite. The state before it is saved.
        """
        config, context = self.config, self.context
        batches = RowBatches(
            config.batch_size, config.accumulate, context.rank, context.processes, self.step, self.total_steps
        )
        loader = iter(crop_loader(self.crops, batches, config.workers, pin_memory=context.device.type == "cuda"))
        self.deadline = math.inf if config.max_hours is None else time.monotonic() + 3600 * config.max_hours
        log = self.open_log() if context.is_main else None
        first_step = self.step
        if self.step == 0:
            self.test_and_draw(log)
        can_save = True
        try:
            while self.step < self.total_steps and not self.stopping:
                begun = time.monotonic()
                loss, norm = self.train_step([next(loader) for _ in range(config.accumulate)])
                if log is not None:
                    rate = self.optimizers[0].param_groups[0]["lr"]
                    log.add(loss, norm, rate, config.batch_size, time.monotonic() - begun)
                    if self.step % config.log_every == 0 or self.step == self.total_steps:
                        log.write(self.step)
                    elif self.step == first_step + 1:  # on a slow machine the next line may be minutes away
                        log.print_progress(self.step)
                self.test_and_draw(log)
                if self.step % config.save_every == 0:
                    self.save()
        except Exception as error:
            # Saving a sharded model takes all processes, and all see the same loss, but not the same other errors.
            can_save = not config.fsdp or isinstance(error, FloatingPointError)
            raise
        finally:
            if can_save:
                self.save()
            if log is not None:
                log.close()
        return self.step == self.total_steps

    def train_step(self, micro_batches: Sequence[Tensor]) -> tuple[float, float]:
        """Make one optimizer step from this process's micro-batches; return loss and gradient norm.

        Args:
            micro_batches: normalized log-mel (rows, frames, bands), `accumulate` of them.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are as they were before the step.
        """
        config, device = self.config, self.context.device
        rate = config.learning_rate * learning_rate_factor(
            self.step, self.warmup_steps, self.total_steps, config.cooldown_steps
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)

        noise = masking_noise(config.seed, self.step, config.batch_size, config.encoder.patches.patches)
        outcome = torch.zeros(2, device=device)  # loss; above 0 if any process wants to stop
        for i, logmel in enumerate(micro_batches):
            masking = self.masking(noise, i)
            logmel = logmel.to(device, non_blocking=True)
            with self.gradient_sync(i == len(micro_batches) - 1):
                with autocast(device, config.precision):
                    loss = self.forward(logmel, masking).loss / len(micro_batches)
                self.scaler.scale(loss).backward()
            outcome[0] += loss.detach()
        outcome[1] = self.stop_requested or time.monotonic() > self.deadline
        if self.context.processes > 1:  # all processes must see the same, or some would wait forever
            dist.all_reduce(outcome)
            outcome[0] /= self.context.processes

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = math.inf if config.clip_grad is None else config.clip_grad
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Reading these waits for the device, which then idles while the optimizers are queued. In return, values that
        # are not finite stay out of the weights.
        mean_loss, stop, norm = torch.stack([*outcome, norm.float()]).tolist()
        self.stopping = stop > 0
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss of step {self.step} is {mean_loss}")
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        elif not self.scaler.is_enabled():  # with float16 the scaler tries a smaller scale instead
            raise FloatingPointError(f"the gradient of step {self.step} is {norm}")
        self.scaler.update()
        self.step += 1
        return mean_loss, norm

    def masking(self, noise: Tensor, i: int) -> Masking:
        """Return the masks of this process's micro-batch i, from the noise of the whole batch."""
        config, context = self.config, self.context
        rows = config.batch_size // context.processes // config.accumulate
        first = (context.rank * config.accumulate + i) * rows
        noise = noise[first : first + rows].to(context.device, non_blocking=True)
        return random_masking(noise, config.mask_ratio)

    def gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Return a context in which processes exchange gradients only for the last micro-batch of a step."""
        if self.config.fsdp:
            self.model.set_requires_gradient_sync(is_last)
        elif self.context.processes > 1 and not is_last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    # ---- progress ----

    def open_log(self) -> RunLog:
        """Open the run's log, from this optimizer step on."""
        config, context = self.config, self.context
        rate = context.processes * matmul_rate(context.device, getattr(torch, config.precision))
        return RunLog(self.run, self.step, self.total_steps, count_clip_flop(config), rate, self.deadline)

    def test_and_draw(self, log: RunLog | None) -> None:
        """Log the held-out error and draw a reconstruction, if they are due at this step."""
        config, device = self.config, self.context.device
        is_end = self.step == self.total_steps
        if self.held_out is not None and (self.step % config.held_out_every == 0 or is_end):
            error = self.held_out.error(self.held_out.predict(self.model, device))
            if log is not None:
                log.write_held_out(self.step, self.step * config.batch_size, error, *self.held_out.baselines)
        if self.picture_crops is not None and (self.step % config.picture_every == 0 or is_end):
            predicted = self.picture_crops.predict(self.model, device)
            if log is not None:
                log.add_picture(self.step, *self.picture_crops.spectrograms(predicted))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        PROG,
        description="Pretrain an encoder. To resume a run that was stopped, give the same command again.",
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
        help="directory written by training.corpora.prepare; may be repeated, with percentages shares=[...]",
    )
    parser.add_argument("--out", required=True, type=Path, help="the run's directory")
    parser.add_argument("--held-out", type=Path, metavar="SHARDS", help="shards to test on during training")
    parser.add_argument("--max-hours", type=float, help="save and stop after this long (max_hours=...)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available, else cpu")
    parser.add_argument(
        "--threads", type=positive(int), metavar="N", help="CPU threads; default: as many as this process may use"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    return parser.parse_args(arguments)


def prepare_trainer(options: argparse.Namespace, context: DistributedContext, stack: contextlib.ExitStack) -> Trainer:
    """Read the config, open the data and build the trainer. The main process's lock on the run enters `stack`."""
    config = load_run_config(options.config, options.overrides)
    if options.max_hours is not None:
        config = dataclasses.replace(config, max_hours=options.max_hours)
    write_or_check_config(config, options.out, write=context.is_main)
    if context.is_main:
        # Not inherited: data workers may outlive a killed run by seconds, in which it could not be started again.
        stack.enter_context(locked(options.out, inherited=False))
    read_log(options.out)  # raises here, before anything is trained, if it is damaged
    held_out = None if options.held_out is None else ShardIndex.open(options.held_out)
    data = JoinedShards([ShardIndex.open(path) for path in options.data])
    write_or_check_data(data, options.out, write=context.is_main)
    return Trainer(config, data, options.out, context, held_out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse_arguments(arguments)
    use_threads(options.threads)
    context = join_processes(options.device)
    level = logging.INFO if context.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    with contextlib.ExitStack() as stack:
        try:
            trainer = prepare_trainer(options, context, stack)
        except (OSError, ValueError) as error:
            print_error(PROG, f"error: {error}")
            return BAD_USAGE

        def request_stop(*_: object) -> None:
            trainer.stop_requested = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, request_stop)
        try:
            finished = trainer.fit()
        except FloatingPointError as error:
            print_error(PROG, f"error: {error}; the state before it is saved")
            return NOT_FINITE
        except (OSError, DamagedShardsError) as error:
            # From a worker that reads data, the message is a whole traceback, whose last line says what happened.
            reason = str(error).strip().splitlines()[-1]
            print_error(PROG, f"error: {reason}; the run can go on from its newest checkpoint")
            return FAILED
    if context.processes > 1:
        dist.barrier()  # a process that left while others still talk to it would end them with an error
        dist.destroy_process_group()
    logger.info("%s at step %d", "finished" if finished else "stopped and saved", trainer.step)
    return 0


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # torch's remaining threads may abort the process while Python shuts down ("terminate called without an active
        # exception"), and torchrun would report a finished run as failed. Everything is written, so leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
