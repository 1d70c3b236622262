"""The modules that are exported to ONNX equal the plain encoder. tests/test_onnx.py runs the graphs made of them."""

from __future__ import annotations

import pytest
import torch
from conftest import SMALL_CONFIGS
from torch import Tensor

from hear_encoders import AxLSTMConfig, Embedder, build_encoder
from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.onnx_graphs import EncoderGraph, StepGraph

CONFIGS = {
    "plain": SMALL_CONFIGS["axlstm"],
    "flip": SMALL_CONFIGS["axlstm_flip"],
    "sigmoid_gate": AxLSTMConfig("axlstm", dim=16, depth=2, input_gate="sigmoid", conv_kernel=2),
    "blocks_span_heads": AxLSTMConfig("axlstm", dim=16, depth=2, expansion=1, projection_block=8),
}


def spread_encoder(config: AxLSTMConfig) -> AxLSTMEncoder:
    """An encoder with every parameter moved off its initial value."""
    encoder = build_encoder(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def frames_of(steps: int, clips: int = 2) -> Tensor:
    return torch.randn(clips, 4 * steps, 80, generator=torch.Generator().manual_seed(0))


def embeddings_of(encoder: AxLSTMEncoder, frames: Tensor, layers: tuple[int, ...] | None = None) -> Tensor:
    """The plain encoder's embeddings (clips, steps, E)."""
    parts = encoder(frames, layers).chunk(len(layers or [0]), dim=2)
    return torch.cat([part.unflatten(1, (-1, 5)).flatten(2) for part in parts], dim=2)


def run_steps(model: Embedder, frames: Tensor) -> Tensor:
    """Run (clips, frames, 80) step by step, from a state that holds anything but sense."""
    step = StepGraph(model, waveform=False)
    state = [torch.full_like(tensor.expand(len(frames), *tensor.shape[1:]), 7.0) for tensor in step.initial]
    position, embeddings = torch.zeros(len(frames), dtype=torch.int64), []
    for columns in frames.split(4, dim=1):
        output, position, *state = step(columns, position, *state)
        embeddings.append(output)
    return torch.stack(embeddings, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [None, (1,), (2, 1)])
def test_axlstm_segments_equal_the_plain_encoder(name, layers):
    encoder = spread_encoder(CONFIGS[name])
    model = Embedder(encoder, layer=layers)
    for steps in (1, 17, 50):
        frames = frames_of(steps)
        torch.testing.assert_close(EncoderGraph(model)(frames), embeddings_of(encoder, frames, layers))


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "sigmoid_gate", "blocks_span_heads"])
@pytest.mark.parametrize("layers", [None, (1,), (2, 1)])
def test_steps_equal_segments(name, layers):
    encoder = spread_encoder(CONFIGS[name])
    frames = frames_of(60)
    expected = torch.cat([embeddings_of(encoder, part, layers) for part in frames.split(200, dim=1)], dim=1)
    torch.testing.assert_close(run_steps(Embedder(encoder, layer=layers), frames), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("gate_i", "gate_f"), [(20.0, -20.0), (-60.0, 5.0), (60.0, -3.0)])
def test_extreme_gates_equal_the_plain_encoder(gate_i, gate_f):
    encoder = spread_encoder(CONFIGS["plain"])
    for block in encoder.blocks:
        block.gate_i.bias += gate_i
        block.gate_f.bias += gate_f
    frames = frames_of(50, clips=1)
    expected = embeddings_of(encoder, frames)
    assert expected.isfinite().all()
    torch.testing.assert_close(EncoderGraph(Embedder(encoder))(frames), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run_steps(Embedder(encoder), frames), expected, rtol=1e-4, atol=1e-5)


def test_streams_at_different_positions_of_their_segments_share_a_step():
    encoder = spread_encoder(CONFIGS["plain"])
    step, frames = StepGraph(Embedder(encoder), waveform=False), frames_of(4, clips=1)
    with torch.no_grad():
        alone = run_steps(Embedder(encoder), frames)
        state, position = [torch.zeros_like(tensor) for tensor in step.initial], torch.zeros(1, dtype=torch.int64)
        for columns in frames.split(4, dim=1)[:2]:
            _, position, *state = step(columns, position, *state)
        columns = torch.cat([frames[:, 8:12], frames[:, :4]])  # the third step of one stream, the first of another
        both = [torch.cat([tensor, torch.zeros_like(tensor)]) for tensor in (position, *state)]
        embeddings, position, *_ = step(columns, *both)
    torch.testing.assert_close(embeddings, torch.stack([alone[0, 2], alone[0, 0]]), rtol=1e-4, atol=1e-5)
    assert position.tolist() == [3, 1]
