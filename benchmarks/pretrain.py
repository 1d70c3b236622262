"""Pretraining speed: whole optimizer steps, and the data loader on its own.

Times `training.pretrain.Trainer.train_step`: masks, forward, backward, clipping, optimizer. The baseline is the plain
step: the same model in float32, eager, with the plain mLSTM cell, the whole batch at once. Our step, the plain step
and a matmul take turns, and every figure is a median. torch counts the FLOPs of one clip's forward and backward pass
(see `training.flops`); MFU compares them with the matmul rate measured in the same turns and precision. The loader's
rate is that of `crop_loader` alone, as configured, reading records of 10 s from shards.

Examples:
    python -m benchmarks.pretrain --configs audiomaepp_tiny_cpu axlstm_tiny_cpu precision=bfloat16
    python -m benchmarks.pretrain --device cuda batch_size=1024 precision=bfloat16 compile=true
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measure import argument_parser, format_machine, format_table, peak_bytes, print_progress, take_turns
from hear_encoders.nn.axlstm import AxLSTMEncoder
from training.config import RunConfig, load_run_config
from training.corpora import prepare
from training.corpora.shards import ShardIndex
from training.data import RowBatches, crop_loader, run_crops
from training.flops import Matmul
from training.objectives import count_clip_flop
from training.pretrain import DistributedContext, Trainer

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
DEFAULT_CONFIGS = ("mae_tiny_cpu", "audiomaepp_tiny_cpu", "ssast_tiny_cpu", "axlstm_tiny_cpu")
AUDIOSET_CLIPS, EPOCHS = 2_000_000, 100
LOADER_SECONDS = 3.0


@dataclass(frozen=True)
class Result:
    """The measurements of one config."""

    name: str
    config: RunConfig
    clip_flop: int
    matmul_rate: float  # FLOP/s
    step_s: float
    plain_s: float  # NaN if the plain step runs out of memory
    loader_clips_per_s: float
    peak_bytes: int | None

    @property
    def clips_per_s(self) -> float:
        return self.config.batch_size / self.step_s


@contextlib.contextmanager
def noise_shards() -> Iterator[Path]:
    """Make shards of ten minutes of noise: speed does not depend on the audio."""
    with tempfile.TemporaryDirectory() as folder:
        recordings, shards = Path(folder) / "recordings", Path(folder) / "shards"
        recordings.mkdir()
        generator = np.random.default_rng(0)
        for number in range(10):
            soundfile.write(recordings / f"{number}.wav", 0.1 * generator.standard_normal(60 * 16000), 16000)
        if prepare.main([str(recordings), str(shards)]) != 0:
            raise RuntimeError("cannot make shards of noise")
        yield shards


def loader_rate(config: RunConfig, index: ShardIndex) -> float:
    """Measure how many clips per second the data loader delivers when nothing else runs."""
    crops = run_crops(index, config)
    batches = RowBatches(config.batch_size, config.accumulate, 0, 1, 0, 1_000_000)
    loader = iter(crop_loader(crops, batches, config.workers, pin_memory=False))
    clips = len(next(loader))  # waits until the workers run
    for _ in range(4 * config.workers):  # skips the batches read ahead
        next(loader)
    begin, batches_read = time.perf_counter(), 0
    while time.perf_counter() - begin < LOADER_SECONDS:
        next(loader)
        batches_read += 1
    return batches_read * clips / (time.perf_counter() - begin)


def measure(name: str, config: RunConfig, index: ShardIndex, device: torch.device) -> Result:
    """Measure one config."""
    crops = run_crops(index, config)
    batch = torch.stack([crops[row] for row in range(config.batch_size)])
    context = DistributedContext(0, 1, device)
    with tempfile.TemporaryDirectory() as folder:
        ours = Trainer(config, index, Path(folder), context)
        plain_config = replace(config, precision="float32", compile=False, accumulate=1)
        plain = Trainer(plain_config, index, Path(folder), context)
    if isinstance(plain.model.encoder, AxLSTMEncoder):
        plain.model.encoder.mode = "chunkwise"
    matmul = Matmul(device, getattr(torch, config.precision))

    def our_step() -> None:
        ours.train_step(batch.chunk(config.accumulate))

    def plain_step() -> None:
        plain.train_step([batch])

    our_step()  # compiles, and creates the optimizers' state
    peak = peak_bytes(our_step, device)
    calls = [our_step, matmul, plain_step]
    try:
        plain_step()
    except torch.OutOfMemoryError:
        plain.model.zero_grad()
        calls.pop()
    step_s, matmul_s, plain_s = (*take_turns(calls, device), math.nan)[:3]
    return Result(
        name, config, count_clip_flop(config), matmul.flop / matmul_s, step_s, plain_s, loader_rate(config, index), peak
    )


COLUMNS = (
    *("config", "batch", "precision", "clips/s", "GFLOP per clip", "MFU", "x plain step"),
    *("peak MB", "loader clips/s", "AudioSet hours"),
)


def format_row(result: Result) -> list[str]:
    """Return the table's row of one config."""
    config = result.config
    micro_batches = f" ({config.accumulate} micro-batches)" if config.accumulate > 1 else ""
    return [
        result.name,
        f"{config.batch_size}{micro_batches}",
        config.precision + (", compiled" if config.compile else ""),
        f"{result.clips_per_s:.1f}",
        f"{result.clip_flop / 1e9:.2f}",
        f"{100 * result.clips_per_s * result.clip_flop / result.matmul_rate:.0f} %",
        "out of memory" if math.isnan(result.plain_s) else f"{result.plain_s / result.step_s:.2f}",
        "n/a" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}",
        f"{result.loader_clips_per_s:.0f}",
        f"{AUDIOSET_CLIPS * EPOCHS / result.clips_per_s / 3600:.0f}",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and read the configs."""
    parser = argument_parser("python -m benchmarks.pretrain", __doc__)
    parser.add_argument(
        "--configs",
        nargs="+",
        metavar="NAME",
        default=list(DEFAULT_CONFIGS),
        help="names of files in training/configs",
    )
    parser.add_argument("--data", type=Path, help="shards to read; default: ten minutes of noise")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configs")
    options = parser.parse_intermixed_args(arguments)
    # argparse takes the last word of `--configs a b precision=bfloat16` for a config.
    options.overrides += [name for name in options.configs if "=" in name]
    options.configs = [name for name in options.configs if "=" not in name]
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch found no CUDA device")
    options.device = torch.device(options.device)
    try:
        options.configs = {
            name: load_run_config(CONFIGS / f"{name}.yaml", ["picture_every=null", *options.overrides])
            for name in options.configs
        }
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    results = []
    with contextlib.ExitStack() as stack:
        index = ShardIndex.open(options.data or stack.enter_context(noise_shards()))
        for name, config in options.configs.items():
            result = measure(name, config, index, options.device)
            print_progress(f"{name}: {result.clips_per_s:.1f} clips/s")
            results.append(result)
    rates = ", ".join(f"{result.matmul_rate / 1e9:.0f}" for result in results)
    print(f"{format_machine(options.device)}\n- matmul rate, row by row, in the row's precision: {rates} GFLOP/s\n")
    print(format_table(COLUMNS, [format_row(result) for result in results]))


if __name__ == "__main__":
    main()
