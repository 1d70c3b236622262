"""Models as ONNX graphs, for programs without PyTorch.

`export_onnx` writes one graph: the encoder of a segment, one step of an AxLSTM's stream, or the front end. The first
two take waveforms or log-mel. `hear_encoders.onnx_graphs` has the modules that it traces. docs/onnx.md describes how
they make up what an `Embedder` or a stream does, and `examples/onnx_embed.py` does it in numpy.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hear_encoders import checkpoint
from hear_encoders.checks import check_choice
from hear_encoders.config import config_to_dict
from hear_encoders.embedder import Embedder
from hear_encoders.files import atomic_write
from hear_encoders.framing import ExactFraming
from hear_encoders.nn.frontend import BANDS, HOP, SAMPLE_RATE, WINDOW
from hear_encoders.onnx_graphs import CellState, ClipGraph, EncoderGraph, LogMelGraph, StepGraph
from hear_encoders.stream import streamable_encoder

PartName = Literal["encoder", "step", "frontend"]
InputName = Literal["waveform", "logmel"]

INSTALL = "pip install 'hear-audiomaepp[onnx]'"
OPSET = 18
MAX_BYTES = 2**31 - 1  # of a protobuf message


class Graph(NamedTuple):
    """A module to trace, with an example of its inputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    sizes: dict[str, dict[int, Any]]  # of the inputs' dimensions that may have any size
    outputs: dict[str, dict[int, str]]  # with the names of their dimensions


def export_onnx(
    model: Embedder, path: str | os.PathLike[str], *, part: PartName = "encoder", input: InputName = "waveform"
) -> list[str]:
    """Write one graph, in float32.

    Args:
        model: on the CPU, in exact framing. Its options `layer`, `pooling` and `statistics` go into the graph, or into
            its metadata as settings for the program around it; other options have no effect.
        path: the file; written atomically.
        part: "encoder" takes clips or segments of up to 2 s. "step" takes the next 40 ms of streams. "frontend" makes
            log-mel of clips of any length.
        input: for "encoder" and "step": "waveform", or "logmel" that is already normalized.

    Returns:
        Lines that tell the graph's inputs, then its outputs: name, dtype and shape.

    Raises:
        ValueError: the extra `onnx` is not installed, reference framing, no statistics for steps from waveforms, a
            model that cannot be streamed, or one of more than 2 GB.
    """
    check_choice("part", part, get_args(PartName))
    check_choice("input", input, get_args(InputName))
    if part == "frontend" and input != "waveform":
        raise ValueError(f"a front end takes waveforms, got input={input!r}")
    graph = _graph(model, part, input)
    proto = _trace(graph)
    for name, value in _metadata(model, part, input).items():
        proto.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    if proto.ByteSize() > MAX_BYTES:
        raise ValueError(f"an ONNX file has at most {MAX_BYTES:,} bytes, and this one would have {proto.ByteSize():,}")
    with atomic_write(path) as file:
        file.write(proto.SerializeToString())
    return [_describe(value) for value in [*proto.graph.input, *proto.graph.output]]


def _describe(value: Any) -> str:
    """Return a line about an `onnx.ValueInfoProto`."""
    onnx = importlib.import_module("onnx")
    tensor = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{value.name:<16}  {onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)} ({shape})"


def _graph(model: Embedder, part: PartName, input: InputName) -> Graph:
    if not model.framer.is_local:
        raise ValueError(f"only exact framing can be exported, got {model.framing!r}")
    patches = model.encoder.config.patches
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples")
    clips, clip_sizes = {"audio": torch.zeros(2, SAMPLE_RATE)}, {"audio": {0: batch, 1: samples}}
    if part == "frontend":
        return Graph(LogMelGraph(), clips, clip_sizes, {"logmel": {0: "batch", 1: "frames"}})
    embeddings = {"embeddings": {0: "batch", 1: "steps"}}
    if part == "encoder" and input == "waveform":
        return Graph(ClipGraph(model), clips, clip_sizes, {**embeddings, "scene_embeddings": {0: "batch"}})
    if part == "encoder":
        frames = {"frames": torch.zeros(2, 3 * patches.patch_frames, BANDS)}
        sizes = {"frames": {0: batch, 1: patches.patch_frames * torch.export.Dim("steps")}}
        return Graph(EncoderGraph(model), frames, sizes, embeddings)
    streamable_encoder(model)  # raises if it is none
    if input == "waveform" and model.statistics is None:
        raise ValueError("steps from waveforms need statistics: give [mean, standard deviation] of log-mel")
    step = StepGraph(model, input == "waveform")
    if input == "waveform":
        inputs = {"audio": torch.zeros(2, WINDOW + HOP * (patches.patch_frames - 1))}
    else:
        inputs = {"frames": torch.zeros(2, patches.patch_frames, BANDS)}
    inputs["position"] = torch.zeros(2, dtype=torch.int64)
    inputs |= {name: tensor.expand(2, *tensor.shape[1:]).clone() for name, tensor in step.initial._asdict().items()}
    outputs = ["embeddings", *(f"next_{name}" for name in ("position", *CellState._fields))]
    return Graph(step, inputs, {name: {0: batch} for name in inputs}, {name: {0: "batch"} for name in outputs})


def _trace(graph: Graph) -> Any:
    """Trace a module into an `onnx.ModelProto` that mentions nothing of this machine."""
    try:
        importlib.import_module("onnxscript")  # torch would import it later
    except ImportError as error:
        raise ValueError(f"export needs onnx and onnxscript: {INSTALL}") from error
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    try:
        registration.setLevel(logging.ERROR)  # it warns that torchvision is not there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch, and dimensions that share a name
            program = torch.onnx.export(
                graph.module.eval(),
                tuple(graph.inputs.values()),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=tuple(graph.sizes.values()),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        registration.setLevel(level)
    assert program is not None
    proto = program.model_proto
    for part in [proto, proto.graph, *proto.graph.node]:
        part.ClearField("metadata_props")  # paths of source files
    proto.graph.ClearField("value_info")  # formulas of sizes
    for value in [*proto.graph.input, *proto.graph.output]:
        names = graph.outputs.get(value.name) or {axis: dim.__name__ for axis, dim in graph.sizes[value.name].items()}
        for axis, name in names.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return proto


def _metadata(model: Embedder, part: PartName, input: InputName) -> dict[str, Any]:
    """Return what the program around the graph has to know; strings, or values for JSON."""
    patches = model.encoder.config.patches
    framing = ExactFraming(patches)
    metadata: dict[str, Any] = {"part": part, "sample_rate": SAMPLE_RATE}
    if part == "frontend":
        return metadata
    return {
        **metadata,
        "input": input,
        "family": model.encoder.config.family,
        "weights": checkpoint.fingerprint(model.encoder),
        "config": config_to_dict(model.encoder.config),
        "layer": model.layers,
        "pooling": model.pooling,
        "statistics": model.statistics,
        "framing": model.framing,
        "step_frames": patches.patch_frames,
        "segment_frames": patches.chunk_frames,
        "step_ms": framing.step_ms,
        "first_step_ms": framing.first_step_ms,
    }
