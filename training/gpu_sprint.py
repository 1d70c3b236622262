"""Pretrain for a few minutes on one GPU: `python -m training.gpu_sprint --config C.yaml --pack FOLDER --out OUT
--minutes M [key=value ...]`.

All frames of a pack (`training.corpora.pack`) stay in the device's memory, where crops and masks are drawn: no loader
can starve the device. The learning rate follows the clock, so that it has reached 0 when time is up. The encoder is
saved once a minute. There is no state to resume from.

Crops, masks and normalization are drawn as in `training.data` and `training.masking`, but from the device's own random
numbers, each row from a random record.

OUT holds, all written atomically or line by line, so that the process may be killed at any time:

    config.json, model.safetensors    the encoder in float16, for `load_model`
    log.jsonl                         a line a minute: step, clips, clips/s, loss, learning rate, MFU, held-out error
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hear_encoders.checkpoint import load_checkpoint, resolve, save_checkpoint
from hear_encoders.console import BAD_USAGE, positive, print_error
from hear_encoders.nn.frontend import STD_OFFSET, clip_statistics, normalize
from training.config import RunConfig, load_run_config
from training.corpora.pack import PackedRecords, read_pack
from training.flops import matmul_rate
from training.held_out import FixedCrops
from training.masking import random_masking
from training.objectives import MaskedAutoencoder, MaskedModel, autocast, build_model, count_clip_flop
from training.optimizers import build_optimizers

PROG = "python -m training.gpu_sprint"
NOT_FINITE = 3  # exit code, as of training.pretrain
KINDS = ("music", "speech", "sounds")
HELD_OUT = "held_out"
WARMUP, COOLDOWN = 0.03, 0.3  # shares of the time

# Before the config's overrides. The peak rate is 2e-3 at batch 1024: 8e-4 at batch 16 is the CPU configs', and larger
# batches stand larger rates.
DEFAULTS = (
    *("batch_size=1024", "accumulate=1", "base_lr=5e-4", "optimizer=muon", "clip_grad=1.0"),
    *("precision=bfloat16", "compile=true", "shares=[50,30,20]"),
)

_LOG_EVERY_S = 60.0
_SYNC_EVERY = 10  # optimizer steps; between, the device works through what is queued


class DeviceCrops:
    """Random crops of records that lie in a device's memory.

    Args:
        folders: the records of each kind.
        config: the run's config, for crop length, normalization and mixture.
        device: the device for records and crops.
        generator: random numbers on this device.

    Raises:
        ValueError: not one percentage per kind.
    """

    def __init__(
        self, folders: Sequence[PackedRecords], config: RunConfig, device: torch.device, generator: torch.Generator
    ) -> None:
        if config.shares is None or len(config.shares) != len(folders):
            raise ValueError(f"shares must have a percentage for each of {len(folders)} kinds, got {config.shares}")
        self.length = config.encoder.patches.chunk_frames
        self.normalize = config.normalize
        self.device, self.generator = device, generator
        self.frames = torch.cat([folder.frames for folder in folders]).to(device)  # (F, 80) float16
        starts = torch.tensor([0, *(len(folder.frames) for folder in folders)]).cumsum(0).tolist()
        self.first = torch.cat([folder.offsets[:-1] + start for folder, start in zip(folders, starts)]).to(device)
        self.lengths = torch.cat([folder.offsets.diff() for folder in folders]).to(device)
        sizes = torch.tensor([len(folder) for folder in folders])
        self.sizes, self.ends = sizes.to(device), sizes.cumsum(0).to(device)
        self.percent_ends = torch.tensor(config.shares).cumsum(0).to(device)
        self.statistics = None if config.normalize == "crop" else self._record_statistics()  # (records, 2)

    def __call__(self, rows: int) -> Tensor:
        """Draw normalized crops: (rows, frames, 80) float32."""
        kind, within, position = torch.rand(3, rows, device=self.device, generator=self.generator, dtype=torch.float64)
        kind = torch.bucketize(100 * kind, self.percent_ends, right=True)
        record = self.ends[kind] - self.sizes[kind] + (within * self.sizes[kind]).long()
        length = self.lengths[record]
        # A record shorter than a crop is repeated; a crop of it may begin anywhere that leaves a whole crop.
        repeated = length * (-(-self.length // length))
        start = (position * (repeated - self.length + 1)).long()
        offset = (start[:, None] + torch.arange(self.length, device=self.device)) % length[:, None]
        crops = self.frames[self.first[record][:, None] + offset].float()
        if self.statistics is None:
            return normalize(crops, *clip_statistics(crops))
        mean, std = self.statistics[record].unbind(1)
        return (crops - mean[:, None, None]) / (std[:, None, None] + STD_OFFSET)

    def _record_statistics(self) -> Tensor:
        """Return each record's mean and standard deviation: (records, 2) float32."""
        # The sums per frame are taken in slices, since all frames in float32 are gigabytes.
        slices = self.frames.split(1_000_000)
        sums = torch.cat([frames.double().sum(1) for frames in slices])
        squares = torch.cat([frames.double().square().sum(1) for frames in slices])
        zero = sums.new_zeros(1)
        count = self.lengths * self.frames.shape[1]
        last = self.first + self.lengths
        total, total_squares = (
            (ends := torch.cat([zero, values.cumsum(0)]))[last] - ends[self.first] for values in (sums, squares)
        )
        mean = total / count
        variance = (total_squares - count * mean.square()).clamp_min(0) / (count - 1)
        return torch.stack([mean, variance.sqrt()], dim=1).float()


class Sprint:
    """One run: model, optimizers, data, and a loop that ends with the clock.

    Args:
        config: the run's config.
        pack: records by kind.
        out: the folder for encoder and log.
        device: the device to train on.
        end_s: when to end, by `time.monotonic`.

    Raises:
        FileNotFoundError: `config.start_from` names no weights.
        ValueError: weights of another encoder, or a kind of records is missing.
    """

    def __init__(
        self, config: RunConfig, pack: dict[str, PackedRecords], out: Path, device: torch.device, end_s: float
    ) -> None:
        missing = [kind for kind in KINDS if kind not in pack]
        if missing:
            raise ValueError(f"the pack holds no records of kind {missing[0]!r}")
        self.config, self.out, self.device, self.end_s = config, out, device, end_s
        self.accumulate = config.accumulate
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.crops = DeviceCrops([pack[kind] for kind in KINDS], config, device, self.generator)
        self.held_out = FixedCrops(pack[HELD_OUT], config, config.held_out_clips) if HELD_OUT in pack else None
        self.model = build_model(config)
        if config.start_from is not None:
            load_encoder(self.model, config)
        self.model.to(device)
        self.optimizers = build_optimizers(self.model, config, device)
        if config.compile:
            compile_blocks(self.model)
        self.mfu_per_clip = count_clip_flop(config) / matmul_rate(device, getattr(torch, config.precision))
        self.stop_requested = False
        self.step = 0  # optimizer steps made
        out.mkdir(parents=True, exist_ok=True)

    def run(self, begin_s: float) -> None:
        """Train until time is up or a stop is requested, and save.

        Args:
            begin_s: when the process began, for the log.

        Raises:
            FloatingPointError: the loss is not finite. What was saved before stays.
        """
        self.train_step(0.0)  # compiles, and finds micro-batches that fit; at rate 0 it changes nothing
        self.step = 0
        trained_from = logged_at = time.monotonic()
        print(f"ready after {trained_from - begin_s:.0f} s, {self.accumulate} micro-batches", flush=True)
        losses: list[Tensor] = []
        logged_step = 0
        reserve_s = 0.0  # for the last log line and save, as long as the longest so far
        while True:
            now = time.monotonic()
            ends = self.stop_requested or now >= self.end_s - reserve_s
            if ends or now - logged_at >= _LOG_EVERY_S:
                loss = torch.stack(losses).mean().item() if losses else None  # waits for the device
                if loss is not None and not math.isfinite(loss):
                    raise FloatingPointError(f"the loss before step {self.step} is {loss}")
                clips_per_s = (self.step - logged_step) * self.config.batch_size / (time.monotonic() - logged_at)
                self.save()
                self.log(
                    elapsed_s=round(time.monotonic() - begin_s, 1),
                    step=self.step,
                    clips=self.step * self.config.batch_size,
                    clips_per_s=round(clips_per_s, 1),
                    mfu=round(clips_per_s * self.mfu_per_clip, 4),
                    rate=self.optimizers[0].param_groups[0]["lr"],
                    loss=loss,
                    held_out=self.held_out_error(),
                )
                if ends:
                    return
                losses, logged_step, logged_at = [], self.step, time.monotonic()
                reserve_s = max(reserve_s, logged_at - now)
            span_s = max(1e-3, self.end_s - reserve_s - trained_from)
            losses.append(self.train_step(rate_factor((now - trained_from) / span_s)))
            if self.step % _SYNC_EVERY == 0:
                losses[-1].item()

    def train_step(self, factor: float) -> Tensor:
        """Make an optimizer step at this fraction of the peak rate. Return the loss: () float32 on the device.

        The first step divides the batch further until it fits.
        """
        while True:
            try:
                loss = self._backward()
                break
            except torch.OutOfMemoryError:
                if self.step or self.accumulate >= self.config.batch_size:
                    raise
            self.accumulate *= 2
            torch.cuda.empty_cache()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            optimizer.step()
        self.step += 1
        return loss

    def _backward(self) -> Tensor:
        """Compute the gradient of a new batch; return its loss."""
        config, patches = self.config, self.config.encoder.patches.patches
        rows = config.batch_size // self.accumulate
        loss = torch.zeros((), device=self.device)
        self.model.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            noise = torch.rand(rows, patches, device=self.device, generator=self.generator)
            masking = random_masking(noise, config.mask_ratio)
            with autocast(self.device, config.precision):
                part = self.model(self.crops(rows), masking).loss / self.accumulate
            part.backward()
            loss += part.detach()
        return loss

    def held_out_error(self) -> float | None:
        """Return the error on fixed crops of held-out records, if the pack holds any."""
        if self.held_out is None:
            return None
        with torch.compiler.set_stance("force_eager"):  # compiling for these few batches would cost more
            return self.held_out.error(self.held_out.predict(self.model, self.device))

    def save(self) -> None:
        """Write the encoder in float16."""
        with torch.no_grad():
            encoder = copy.deepcopy(self.model.encoder).half()
        save_checkpoint(self.out, encoder)

    def log(self, **values: object) -> None:
        """Print values, and append them to log.jsonl."""
        line = json.dumps(values)
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def rate_factor(progress: float) -> float:
    """Return the learning rate as a fraction of its peak, at a point between 0 (begin) and 1 (end of the time)."""
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / COOLDOWN))


def compile_blocks(model: MaskedAutoencoder | MaskedModel) -> None:
    """Compile the blocks, not the whole model: equal blocks share the result, which takes seconds, not minutes.

    What cannot be compiled runs as it is.
    """
    torch._dynamo.config.suppress_errors = True
    for block in [*model.encoder.blocks, *(model.decoder.blocks if isinstance(model, MaskedAutoencoder) else ())]:
        block.compile(dynamic=False)


def load_encoder(model: MaskedAutoencoder | MaskedModel, config: RunConfig) -> None:
    """Replace a new model's encoder by that of `config.start_from`."""
    encoder = load_checkpoint(resolve(config.start_from))
    if encoder.config != config.encoder:
        raise ValueError(f"start_from: {config.start_from} holds {encoder.config}, this run trains {config.encoder}")
    model.encoder.load_state_dict(encoder.state_dict())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    begin_s = time.monotonic()
    parser = argparse.ArgumentParser(PROG, description="Pretrain on one GPU for a few minutes, from a pack.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file, such as training/configs/mae_tiny.yaml")
    parser.add_argument("--pack", required=True, type=Path, help="folder written by training.corpora.pack")
    parser.add_argument("--out", required=True, type=Path, help="folder for encoder and log")
    parser.add_argument("--minutes", required=True, type=positive(float), help="time from the start of this process")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"changes to the config, after {' '.join(DEFAULTS)}"
    )
    options = parser.parse_args(arguments)
    sprint: Sprint | None = None
    stop_requested = False

    def request_stop(*_: object) -> None:
        nonlocal stop_requested
        stop_requested = True
        if sprint is not None:
            sprint.stop_requested = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    try:
        config = load_run_config(options.config, [*DEFAULTS, *options.overrides])
        end_s = begin_s + 60 * options.minutes
        sprint = Sprint(config, read_pack(options.pack), options.out, torch.device(options.device), end_s)
    except (OSError, ValueError) as error:
        print_error(PROG, f"error: {error}")
        return BAD_USAGE
    if stop_requested:  # before there was anything to save
        return 0
    print(json.dumps(dataclasses.asdict(config)), flush=True)
    try:
        sprint.run(begin_s)
    except FloatingPointError as error:
        print_error(PROG, f"error: {error}; what was saved before stays")
        return NOT_FINITE
    return 0


if __name__ == "__main__":
    sys.exit(main())
