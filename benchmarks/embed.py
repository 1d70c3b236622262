"""Embedding speed: this package against the released algorithm's plan.

The benchmark times the whole call, waveform in and timestamp embeddings out (`Embedder.timestamp_embeddings`, exact
framing, default options), with freshly initialized weights and noise as audio. The baseline is
`released_plan.ReleasedPlan` on the same weights, after a check that it computes the same as
`Embedder(encoder, framing="reference")`. Ours, the plan and a plain matmul take turns, so that a slower machine slows
down all three; each figure is a median over its row's turns.

`torch.utils.flop_counter` counts the FLOPs of matmuls, attention and convolutions in one of our calls, two per
multiply-add; `training.flops` adds the CPU's attention kernel, which it does not know. Not counted are the log-mel's
FFT and logarithm, norms, softmax, activations and all other elementwise operations, including a convolution written as
shifted products. Zeros in a matmul count: the masked half of causal weights, the gaps between merged diagonal blocks.

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
    MIN_TURNS,
    argument_parser,
    format_machine,
    format_table,
    peak_bytes,
    print_progress,
    take_turns,
)
from benchmarks.released_plan import ReleasedPlan
from hear_encoders.config import PRESETS, AxLSTMConfig, EncoderConfig, TransformerConfig
from hear_encoders.embedder import Embedder
from hear_encoders.execution import CPU_SEGMENTS, Precision, resolve_precision
from hear_encoders.nn.build import build_encoder
from hear_encoders.nn.frontend import HOP, SAMPLE_RATE
from training.flops import MATMUL_SIZE, Matmul, count_flop

TOLERANCE = 1e-3  # between the plan's embeddings and ours in reference framing, which are of order 1

# Expected fraction of the matmul rate, until a case with the same kind of encoder has been measured.
ASSUMED_FRACTION = 0.25


@dataclass(frozen=True)
class Case:
    """One row of the table: the model and the clips it embeds."""

    preset: str
    seconds: float
    batch: int


@dataclass(frozen=True)
class Result:
    """The measurements of one case, or why it was skipped."""

    case: Case
    ours_s: float = math.nan
    plan_s: float = math.nan
    flop: float = math.nan
    matmul_rate: float = math.nan  # FLOP/s
    peak_bytes: int | None = None
    skipped: str = ""


# ---------------------------------------------------------------------------------------------------------
# Counting and measuring


def check_flop_counter(device: torch.device) -> None:
    """Stop if attention is not counted, which happens silently when torch renames a kernel."""
    heads, length, head_dim = 2, 64, 32
    q = torch.zeros(1, heads, length, head_dim, device=device)
    with torch.inference_mode():
        counted = count_flop(lambda: F.scaled_dot_product_attention(q, q, q))
    expected = 2 * 2 * heads * length * length * head_dim  # two products of S x S x D
    if counted != expected:
        raise RuntimeError(f"this torch counts attention wrongly: expected {expected} FLOP, got {counted}")


def count_segment_flop(config: EncoderConfig) -> int:
    """Count the FLOPs of one 2 s segment with fake tensors, which need no memory and no arithmetic."""
    patches = config.patches
    with FakeTensorMode(), torch.inference_mode():
        encoder = build_encoder(config)
        frames = torch.empty(1, patches.chunk_frames, patches.bands)
        return count_flop(lambda: encoder(frames))


# ---------------------------------------------------------------------------------------------------------
# Checking the baseline


@torch.no_grad()
def check_plan(config: EncoderConfig, device: torch.device) -> None:
    """Compare the plan with reference framing, with every parameter moved away from its initial value."""
    encoder = build_encoder(config, seed=0).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    fits = HOP * (config.patches.chunk_frames - 1)  # samples of a full segment, to which the plan adds another one
    for samples in (SAMPLE_RATE // 2, fits, 2 * SAMPLE_RATE, 5 * SAMPLE_RATE + 123):
        _assert_same(ReleasedPlan(encoder), Embedder(encoder, framing="reference", precision="float32"), samples)


def _assert_same(plan: ReleasedPlan, embedder: Embedder, samples: int) -> None:
    """Raise RuntimeError if the plan's embeddings or timestamps differ from the embedder's."""
    embedder = embedder.to(embedder.device).eval()
    audio = make_audio(samples, 2, embedder.device)
    for name, got, expected in zip(
        ("embeddings", "timestamps"), plan.timestamp_embeddings(audio), embedder.timestamp_embeddings(audio)
    ):
        if got.shape != expected.shape:
            raise RuntimeError(f"the plan's {name} have shape {tuple(got.shape)}, ours {tuple(expected.shape)}")
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE:  # NaN fails too
            raise RuntimeError(f"the plan's {name} differ from ours in reference framing by {difference:.2g}")


def small_configs() -> list[EncoderConfig]:
    """Return a tiny config for each kind of block that the plan supports."""
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
    """Return noise (B, samples): the time does not depend on the sound."""
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)).to(device)


class Benchmark:
    """Measure cases one after the other within a time budget.

    Args:
        device, precision, max_segments, compile: as for `Embedder`.
        budget_s: seconds from now; a case that would end later is skipped.
        turns: minimum number of turns per case.
    """

    def __init__(
        self, device: torch.device, precision: Precision, max_segments: int, compile: bool, budget_s: float, turns: int
    ) -> None:
        self.device, self.precision, self.turns = device, precision, turns
        self.options = {"precision": precision, "max_segments": max_segments, "compile": compile}
        self.dtype = resolve_precision(precision, device)
        self.deadline = time.perf_counter() + budget_s
        check_flop_counter(device)
        for config in small_configs():
            check_plan(config, device)
        self.matmul = Matmul(device, self.dtype)
        for _ in range(3):
            self.matmul()
        self.matmul_rate = self.matmul.flop / take_turns([self.matmul], device)[0]
        self.fraction_by_kind: dict[type, float] = {}  # of the matmul rate, in the last case with this kind of encoder

    def run_preset(self, name: str, cases: Sequence[Case], segment_flop: int, results: list[Result]) -> None:
        """Measure the cases of one preset and append them to `results`."""
        config = PRESETS[name]
        embedder = plan = None
        for case in cases:
            turn = self.segments_per_turn(case, config) * segment_flop
            # Before a preset's first case, the plan is compared with ours on two clips.
            check = 2 * self.segments_per_turn(Case(name, 2.0, 2), config) * segment_flop if embedder is None else 0
            fraction = self.fraction_by_kind.get(type(config), ASSUMED_FRACTION)
            needed_s = ((self.turns + 2) * turn + check) / (fraction * self.matmul_rate)  # 2: counting and warm-up
            if time.perf_counter() + needed_s > self.deadline:
                reason = f"skipped: would exceed the time budget (needs about {needed_s / 60:.1f} min)"
                results.append(Result(case, skipped=reason))
                print_progress(f"{name}, {case.seconds:g} s x {case.batch}: {reason}")
                continue
            if embedder is None:
                encoder = build_encoder(config, seed=0).to(self.device).eval()
                plan = ReleasedPlan(encoder, self.dtype)
                embedder = Embedder(encoder, **self.options).to(self.device).eval()
                reference = Embedder(encoder, framing="reference", precision="float32")
                _assert_same(ReleasedPlan(encoder), reference, 2 * SAMPLE_RATE)
            result = self.measure(case, embedder, plan)
            results.append(result)
            self.fraction_by_kind[type(config)] = turn / (result.ours_s + result.plan_s) / result.matmul_rate
            times = f"ours {1e3 * result.ours_s:.1f} ms, released plan {1e3 * result.plan_s:.1f} ms"
            print_progress(f"{name}, {case.seconds:g} s x {case.batch}: {times}")

    def measure(self, case: Case, embedder: Embedder, plan: ReleasedPlan) -> Result:
        """Count the FLOPs of one case, then let ours, the plan and the matmul take turns."""
        audio = make_audio(round(case.seconds * SAMPLE_RATE), case.batch, self.device)

        def ours() -> object:
            return embedder.timestamp_embeddings(audio)

        def baseline() -> object:
            return plan.timestamp_embeddings(audio)

        # Counted in float32, with the same result: under autocast the counter breaks torch.einsum.
        plain = Embedder(embedder.encoder, precision="float32").to(self.device).eval()
        flop = count_flop(lambda: plain.timestamp_embeddings(audio))
        ours()
        peak = peak_bytes(ours, self.device)  # returns memory to the system, so the plan warms up after it
        baseline()
        self.matmul()
        ours_s, plan_s, matmul_s = take_turns([ours, baseline, self.matmul], self.device, self.turns)
        return Result(case, ours_s, plan_s, flop, self.matmul.flop / matmul_s, peak)

    @staticmethod
    def segments_per_turn(case: Case, config: EncoderConfig) -> int:
        """Return how many segments ours and the plan together encode in one turn."""
        frames = case.seconds * SAMPLE_RATE / HOP
        ours = math.ceil(frames / config.patches.chunk_frames)
        plan = int(frames + 1) // config.patches.chunk_frames + 1
        return case.batch * (ours + plan)


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
    case = result.case
    row = [case.preset, f"{case.seconds:g}", str(case.batch)]
    if result.skipped:
        return [*row, result.skipped] + [""] * (len(COLUMNS) - len(row) - 1)
    real_time = case.seconds * case.batch / result.ours_s
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
    """Return lines that describe the machine, the options and the matmul rate."""
    size, dtype = benchmark.matmul.size, str(benchmark.dtype).removeprefix("torch.")
    rates = [result.matmul_rate / 1e9 for result in results if not result.skipped] or [benchmark.matmul_rate / 1e9]
    compiled = ", compiled" if benchmark.options["compile"] else ""
    return (
        f"{format_machine(benchmark.device)}\n"
        f"- ours: up to {benchmark.options['max_segments']} segments in a forward pass{compiled}\n"
        f"- {dtype} matmul {size} x {size} x {size}, taking turns with the rest: median {median(rates):.0f} GFLOP/s, "
        f"{min(rates):.0f} to {max(rates):.0f} over the rows; each row is compared with its own"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.embed", __doc__)
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, metavar="NAME", default=list(PRESETS), help="default: all of them"
    )
    parser.add_argument("--seconds", nargs="+", type=float, default=[2.0, 10.0], help="clip lengths; default: 2 10")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="clips per call; default: 1 8")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="as for Embedder; default: auto"
    )
    parser.add_argument("--max-segments", type=int, default=CPU_SEGMENTS, help="per forward pass; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="run ours with torch.compile")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--turns", type=int, default=MIN_TURNS, help="minimum per row; default: %(default)s")
    parser.add_argument(
        "--budget-minutes", type=float, default=30.0, help="skip rows that would end later; default: 30"
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
    if min(options.max_segments, options.turns, *options.batch, options.threads or 1) < 1 or options.threads == 0:
        parser.error("--batch, --max-segments, --turns and --threads must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    budget_s = 60 * options.budget_minutes
    benchmark = Benchmark(
        options.device, options.precision, options.max_segments, options.compile, budget_s, options.turns
    )
    segment_flop = {name: count_segment_flop(PRESETS[name]) for name in dict.fromkeys(options.presets)}
    results: list[Result] = []
    try:
        for name in sorted(segment_flop, key=segment_flop.__getitem__):
            cases = [Case(name, seconds, batch) for seconds in options.seconds for batch in options.batch]
            benchmark.run_preset(name, cases, segment_flop[name], results)
    except KeyboardInterrupt:
        print_progress("interrupted; these are the rows measured so far")
    print(format_conditions(benchmark, results), end="\n\n")
    print(format_table(COLUMNS, [format_row(result) for result in results]))


if __name__ == "__main__":
    main()
