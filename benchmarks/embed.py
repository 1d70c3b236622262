"""How fast waveforms become embeddings: this package against the released algorithm's plan.

What is timed is the whole call, waveform in and timestamp embeddings out (`Embedder.timestamp_embeddings`, exact
framing, the embedder's defaults), with freshly initialised weights and noise for audio. The opponent is
`released_plan.ReleasedPlan` on the same weights. Before anything is timed it is checked to compute what
`Embedder(encoder, framing="reference")` computes. Ours, the plan and a plain matmul take turns, so that a
machine that slows down slows all three; every figure is a median over the turns of its cell.

FLOPs are those of matmuls, attention and convolutions in one call of ours, a multiply-add being two, counted by
`torch.utils.flop_counter`. It counts einsum (as bmm) and convolutions, and it lacks the attention kernel of the
CPU, which is added here. Not counted: the FFT and the logarithm of the log-mel (its product with the mel matrix
is), norms, softmax, activations, and all other elementwise work, so also a convolution written as shifted products.
Zeros that a matmul multiplies are counted: the masked half of causal weights, the gaps of merged diagonal blocks.

Example:
    python -m benchmarks.embed --presets audiomaepp_tiny axlstm_tiny --seconds 2 10 --batch 1 8
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import (
    LEAST_TURNS,
    argument_parser,
    format_machine,
    format_table,
    peak_bytes,
    progress,
    take_turns,
)
from benchmarks.released_plan import ReleasedPlan
from hear_encoders.config import PRESETS, AxLSTMConfig, EncoderConfig, TransformerConfig
from hear_encoders.embedder import DEFAULT_MAX_CHUNKS, Embedder, Precision, resolve_precision
from hear_encoders.nn.build import build_encoder
from hear_encoders.nn.frontend import HOP, SAMPLE_RATE
from training.flops import MATMUL_SIZE, Matmul, count_flop

TOLERANCE = 1e-3  # between the plan's embeddings and ours in reference framing, which are of order 1

# What fraction of the matmul rate a turn is expected to reach, until a cell of its kind has been measured.
ASSUMED_FRACTION = 0.25


@dataclass(frozen=True)
class Cell:
    """One row of the table: what is embedded with what."""

    preset: str
    seconds: float
    batch: int


@dataclass(frozen=True)
class Result:
    """What was measured in one cell, or why nothing was."""

    cell: Cell
    ours_s: float = math.nan
    plan_s: float = math.nan
    flop: float = math.nan
    matmul_rate: float = math.nan  # FLOP/s
    peak_bytes: int | None = None
    skipped: str = ""


# ---------------------------------------------------------------------------------------------------------
# Counting and measuring


def check_flop_counter(device: torch.device) -> None:
    """Stop if attention is not counted, as happens silently when torch names a kernel anew."""
    heads, length, head_dim = 2, 64, 32
    q = torch.zeros(1, heads, length, head_dim, device=device)
    with torch.inference_mode():
        counted = count_flop(lambda: F.scaled_dot_product_attention(q, q, q))
    expected = 2 * 2 * heads * length * length * head_dim  # two products of S x S x D
    if counted != expected:
        raise RuntimeError(f"attention is not counted right by this torch: expected {expected} FLOP, got {counted}")


def count_chunk_flop(config: EncoderConfig) -> int:
    """FLOPs of one 2 s chunk, counted without memory or arithmetic."""
    patches = config.patches
    with FakeTensorMode(), torch.inference_mode():
        encoder = build_encoder(config)
        frames = torch.empty(1, patches.chunk_frames, patches.bands)
        return count_flop(lambda: encoder(frames))


# ---------------------------------------------------------------------------------------------------------
# The comparison is between equals


@torch.no_grad()
def check_plan(config: EncoderConfig, device: torch.device) -> None:
    """Hold the plan against reference framing, with every parameter away from its initial value."""
    encoder = build_encoder(config, seed=0).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    fits = HOP * (config.patches.chunk_frames - 1)  # so many samples make a full chunk, which then doubles
    for samples in (SAMPLE_RATE // 2, fits, 2 * SAMPLE_RATE, 5 * SAMPLE_RATE + 123):
        _assert_same(ReleasedPlan(encoder), Embedder(encoder, framing="reference", precision="float32"), samples)


def _assert_same(plan: ReleasedPlan, embedder: Embedder, samples: int) -> None:
    embedder = embedder.to(embedder.device).eval()
    audio = make_audio(samples, 2, embedder.device)
    for name, got, expected in zip(
        ("embeddings", "timestamps"), plan.timestamp_embeddings(audio), embedder.timestamp_embeddings(audio)
    ):
        if got.shape != expected.shape:
            raise RuntimeError(f"the plan's {name} have shape {tuple(got.shape)}, ours {tuple(expected.shape)}")
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE:  # so that NaN fails too
            raise RuntimeError(f"the plan's {name} differ from ours in reference framing by {difference:.2g}")


def small_configs() -> list[EncoderConfig]:
    """Every variant of block that the plan knows, in a size that takes no time."""
    return [
        TransformerConfig("audiomaepp", dim=32, depth=2, heads=2),
        TransformerConfig("audiomaepp", dim=32, depth=2, heads=2, swiglu_norm="attention"),
        TransformerConfig("mae", dim=32, depth=2, heads=2),
        AxLSTMConfig("axlstm", dim=32, depth=2),
        AxLSTMConfig("axlstm", dim=32, depth=2, flip=True, input_gate="sigmoid"),
    ]


# ---------------------------------------------------------------------------------------------------------
# The run


def make_audio(samples: int, batch: int, device: torch.device) -> Tensor:
    """Noise, (B, samples): the time does not depend on what is heard."""
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)).to(device)


class Benchmark:
    """Measures cells in turn and keeps within a budget of time.

    Args:
        device, precision, max_chunks, compile: as for `Embedder`.
        budget_s: a cell that would end later than this after now is not begun.
        turns: at least so many in a cell.
    """

    def __init__(
        self, device: torch.device, precision: Precision, max_chunks: int, compile: bool, budget_s: float, turns: int
    ) -> None:
        self.device, self.precision, self.turns = device, precision, turns
        self.options = {"precision": precision, "max_chunks": max_chunks, "compile": compile}
        self.dtype = resolve_precision(precision, device)
        self.deadline = time.perf_counter() + budget_s
        check_flop_counter(device)
        for config in small_configs():
            check_plan(config, device)
        self.matmul = Matmul(device, self.dtype)
        for _ in range(3):
            self.matmul()
        self.matmul_rate = self.matmul.flop / take_turns([self.matmul], device)[0]
        self.fraction_of_kind: dict[type, float] = {}  # of the matmul rate, in the last cell of a kind of encoder

    def run_preset(self, name: str, cells: Sequence[Cell], chunk_flop: int, results: list[Result]) -> None:
        """Measure the cells of one preset and append to `results`; its weights live only as long."""
        config = PRESETS[name]
        embedder = plan = None
        for cell in cells:
            turn = self.chunks_of_turn(cell, config) * chunk_flop
            # Before a preset's first cell the plan is checked: two clips, ours in the plan's framing too.
            check = 2 * self.chunks_of_turn(Cell(name, 2.0, 2), config) * chunk_flop if embedder is None else 0
            fraction = self.fraction_of_kind.get(type(config), ASSUMED_FRACTION)
            needed_s = ((self.turns + 2) * turn + check) / (fraction * self.matmul_rate)  # 2: counting, warming up
            if time.perf_counter() + needed_s > self.deadline:
                reason = f"skipped: would exceed the time budget (needs about {needed_s / 60:.1f} min)"
                results.append(Result(cell, skipped=reason))
                progress(f"{name}, {cell.seconds:g} s x {cell.batch}: {reason}")
                continue
            if embedder is None:
                encoder = build_encoder(config, seed=0).to(self.device).eval()
                plan = ReleasedPlan(encoder, self.dtype)
                embedder = Embedder(encoder, **self.options).to(self.device).eval()
                same = Embedder(encoder, framing="reference", precision="float32")
                _assert_same(ReleasedPlan(encoder), same, 2 * SAMPLE_RATE)
            result = self.measure(cell, embedder, plan)
            results.append(result)
            self.fraction_of_kind[type(config)] = turn / (result.ours_s + result.plan_s) / result.matmul_rate
            times = f"ours {1e3 * result.ours_s:.1f} ms, released plan {1e3 * result.plan_s:.1f} ms"
            progress(f"{name}, {cell.seconds:g} s x {cell.batch}: {times}")

    def measure(self, cell: Cell, embedder: Embedder, plan: ReleasedPlan) -> Result:
        audio = make_audio(round(cell.seconds * SAMPLE_RATE), cell.batch, self.device)

        def ours() -> object:
            return embedder.timestamp_embeddings(audio)

        def theirs() -> object:
            return plan.timestamp_embeddings(audio)

        # Counted in float32, where the number is the same: under autocast the counter breaks torch.einsum.
        plain = Embedder(embedder.encoder, precision="float32").to(self.device).eval()
        flop = count_flop(lambda: plain.timestamp_embeddings(audio))
        ours()
        peak = peak_bytes(ours, self.device)  # returns memory to the system, so the plan warms up after it
        theirs()
        self.matmul()
        ours_s, plan_s, matmul_s = take_turns([ours, theirs, self.matmul], self.device, self.turns)
        return Result(cell, ours_s, plan_s, flop, self.matmul.flop / matmul_s, peak)

    @staticmethod
    def chunks_of_turn(cell: Cell, config: EncoderConfig) -> int:
        """Chunks that ours and the plan together encode in one turn."""
        frames = cell.seconds * SAMPLE_RATE / HOP
        ours = math.ceil(frames / config.patches.chunk_frames)
        theirs = int(frames + 1) // config.patches.chunk_frames + 1
        return cell.batch * (ours + theirs)


# ---------------------------------------------------------------------------------------------------------
# The report

COLUMNS = (
    "preset",
    "clip s",
    "batch",
    "ours ms",
    "x real time",
    "GFLOP",
    "of matmul rate",
    "peak MB",
    "released plan ms",
    "plan / ours",
)


def format_row(result: Result) -> list[str]:
    cell = result.cell
    row = [cell.preset, f"{cell.seconds:g}", str(cell.batch)]
    if result.skipped:
        return [*row, result.skipped] + [""] * (len(COLUMNS) - len(row) - 1)
    real_time = cell.seconds * cell.batch / result.ours_s
    return [
        *row,
        f"{1e3 * result.ours_s:.1f}",
        f"{real_time:.0f}" if real_time >= 10 else f"{real_time:.1f}",
        f"{result.flop / 1e9:.1f}",
        f"{100 * result.flop / result.ours_s / result.matmul_rate:.0f} %",
        "n/a" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}",
        f"{1e3 * result.plan_s:.1f}",
        f"{result.plan_s / result.ours_s:.2f}",
    ]


def format_conditions(benchmark: Benchmark, results: Sequence[Result]) -> str:
    """On what the figures were measured."""
    size, dtype = benchmark.matmul.size, str(benchmark.dtype).removeprefix("torch.")
    rates = [result.matmul_rate / 1e9 for result in results if not result.skipped] or [benchmark.matmul_rate / 1e9]
    compiled = ", compiled" if benchmark.options["compile"] else ""
    return (
        f"{format_machine(benchmark.device)}\n"
        f"- ours: up to {benchmark.options['max_chunks']} chunks in a forward pass{compiled}\n"
        f"- {dtype} matmul {size} x {size} x {size}, in turns with the rest: median {median(rates):.0f} GFLOP/s, "
        f"{min(rates):.0f} to {max(rates):.0f} over the rows; each row is held against its own"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.embed", __doc__)
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, metavar="NAME", default=list(PRESETS), help="default: all of them"
    )
    parser.add_argument("--seconds", nargs="+", type=float, default=[2.0, 10.0], help="clip lengths (default: 2 10)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="clips per call (default: 1 8)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="as for Embedder (default: auto)"
    )
    parser.add_argument(
        "--max-chunks", type=int, default=DEFAULT_MAX_CHUNKS, help="in a forward pass (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--turns", type=int, default=LEAST_TURNS, help="at least, for each row (default: %(default)s)")
    parser.add_argument(
        "--budget-minutes", type=float, default=30.0, help="cells that would end later are skipped (default: 30)"
    )
    options = parser.parse_args(arguments)
    try:
        options.device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(str(error).splitlines()[0])
    if options.device.type not in MATMUL_SIZE:
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if min(options.seconds) * SAMPLE_RATE < 1:
        parser.error(f"--seconds: expected at least one sample, got {min(options.seconds)}")
    if min(options.max_chunks, options.turns, *options.batch, options.threads or 1) < 1 or options.threads == 0:
        parser.error("--batch, --max-chunks, --turns and --threads must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    budget_s = 60 * options.budget_minutes
    benchmark = Benchmark(
        options.device, options.precision, options.max_chunks, options.compile, budget_s, options.turns
    )
    chunk_flop = {name: count_chunk_flop(PRESETS[name]) for name in dict.fromkeys(options.presets)}
    results: list[Result] = []
    try:
        for name in sorted(chunk_flop, key=chunk_flop.__getitem__):
            cells = [Cell(name, seconds, batch) for seconds in options.seconds for batch in options.batch]
            benchmark.run_preset(name, cells, chunk_flop[name], results)
    except KeyboardInterrupt:
        progress("interrupted; this is what was measured")
    print(format_conditions(benchmark, results), end="\n\n")
    print(format_table(COLUMNS, [format_row(result) for result in results]))


if __name__ == "__main__":
    main()
