"""ONNX speed: exported graphs beside PyTorch, taking turns.

Two rows per preset and batch: `clip` is a clip of 2 s, from waveform to timestamp embeddings (`timestamp_embeddings`
and a graph of the part `encoder`); `step` is the next 40 ms of a stream (`AxLSTMStream.push` and a graph of the part
`step`). Weights are freshly initialized, the audio is noise, everything is float32. First the graphs are exported,
which takes most of the time, and compared with PyTorch. Needs the extra `onnx`; `--openvino` also needs
`pip install openvino`.

Example:
    python -m benchmarks.onnx --presets axlstm_tiny --batch 8 --openvino
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import argument_parser, format_machine, format_table, print_progress, take_turns
from hear_axlstm import stream as make_stream
from hear_encoders.config import PRESETS, AxLSTMConfig
from hear_encoders.embedder import Embedder
from hear_encoders.nn.build import build_encoder
from hear_encoders.onnx_export import export_onnx

STATISTICS = (-6.0, 3.5)
CLIP_SAMPLES, STEP_SAMPLES, STEP_WINDOW = 32_000, 640, 880
TOLERANCE = 1e-4

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def open_onnxruntime(path: Path, threads: int) -> Run:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def open_openvino(path: Path, threads: int) -> Run:
    openvino = importlib.import_module("openvino")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = request.infer(inputs)
        return [results[output] for output in compiled.outputs]

    return run


ENGINES = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


class StepRunner:
    """Runs a graph of the part `step` with its own last state."""

    def __init__(self, run: Run, config: AxLSTMConfig, batch: int) -> None:
        head_dim = config.inner_dim // config.heads
        self.run = run
        self.state = {
            "position": np.zeros(batch, np.int64),
            "conv": np.zeros((batch, config.depth, config.conv_kernel - 1, config.inner_dim), np.float32),
            "memory": np.zeros((batch, config.depth, config.heads, head_dim, head_dim + 1), np.float32),
            "stabilizer": np.zeros((batch, config.depth, config.heads), np.float32),
        }

    def __call__(self, window: np.ndarray) -> np.ndarray:
        embeddings, *after = self.run({"audio": window, **self.state})
        self.state = dict(zip(self.state, after))
        return embeddings


def check(name: str, got: np.ndarray, expected: torch.Tensor) -> None:
    """Raise RuntimeError if an engine's embeddings differ from PyTorch's."""
    difference = float(np.abs(got - expected.numpy()).max())
    if not difference <= TOLERANCE:  # NaN fails too
        raise RuntimeError(f"{name}: embeddings differ from PyTorch's by {difference:.2g}")


def time_clips(model: Embedder, runs: dict[str, Run], batch: int) -> list[float]:
    """Return seconds per call: PyTorch's, then the engines'."""
    audio = 0.1 * torch.randn(batch, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    inputs = {"audio": audio.numpy()}
    expected, _ = model.timestamp_embeddings(audio)
    for name, run in runs.items():
        check(name, run(inputs)[0], expected)
    calls: list[Callable[[], object]] = [lambda: model.timestamp_embeddings(audio)]
    return take_turns([*calls, *((lambda run=run: run(inputs)) for run in runs.values())], torch.device("cpu"))


def time_steps(model: Embedder, runs: dict[str, Run], batch: int) -> list[float]:
    """Return seconds per step: PyTorch's, then the engines'."""
    audio = 0.1 * torch.randn(batch, 60 * STEP_SAMPLES, generator=torch.Generator().manual_seed(0))
    stream = make_stream(model, streams=batch)
    expected, _ = stream.push(audio)  # into a second segment
    padded = np.pad(audio.numpy(), ((0, 0), (200, 0)), mode="reflect")
    windows = [padded[:, STEP_SAMPLES * step :][:, :STEP_WINDOW] for step in range(expected.shape[1])]
    steps = {name: StepRunner(run, model.encoder.config, batch) for name, run in runs.items()}
    for name, step in steps.items():
        check(name, np.stack([step(window) for window in windows], axis=1), expected)
    block = audio[:, :STEP_SAMPLES]
    calls: list[Callable[[], object]] = [lambda: stream.push(block)]
    return take_turns([*calls, *((lambda step=step: step(windows[0])) for step in steps.values())], torch.device("cpu"))


def format_row(preset: str, part: str, batch: int, seconds: Sequence[float]) -> list[str]:
    ours, *others = seconds
    columns = [f"{1e3 * ours:.2f}"]
    for other in others:
        columns += [f"{1e3 * other:.2f}", f"{other / ours:.2f}"]
    return [preset, part, str(batch), *columns]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("python -m benchmarks.onnx", __doc__)
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=PRESETS,
        metavar="NAME",
        default=["audiomaepp_tiny", "axlstm_tiny"],
        help="default: audiomaepp_tiny axlstm_tiny",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="clips or streams per call; default: 1 8")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each; default: 1")
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO, too")
    options = parser.parse_args(arguments)
    if min(options.threads, *options.batch) < 1:
        parser.error("--batch and --threads must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    engines = {name: ENGINES[name] for name in ENGINES if name == "onnxruntime" or options.openvino}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in options.presets:
            config = PRESETS[preset]
            model = Embedder(build_encoder(config, seed=0).eval(), precision="float32", statistics=STATISTICS)
            parts = {"clip": ("encoder", time_clips)}
            if isinstance(config, AxLSTMConfig) and not config.flip:
                parts["step"] = ("step", time_steps)
            for name, (part, measure) in parts.items():
                print_progress(f"{preset}, {name}: exporting")
                path = Path(folder) / f"{preset}_{part}.onnx"
                export_onnx(model, path, part=part)
                runs = {engine: open_graph(path, options.threads) for engine, open_graph in engines.items()}
                for batch in options.batch:
                    rows.append(format_row(preset, name, batch, measure(model, runs, batch)))
                    print_progress(", ".join(rows[-1]))
    print(format_machine(torch.device("cpu")))
    print("- " + ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in engines))
    if hasattr(os, "getloadavg"):
        print(f"- float32; load average over the last minute {os.getloadavg()[0]:.1f}, including this process")
    columns = ["preset", "call", "batch", "PyTorch ms"]
    for engine in engines:
        columns += [f"{engine} ms", f"{engine} / PyTorch"]
    print(f"\n{format_table(columns, rows)}")


if __name__ == "__main__":
    main()
