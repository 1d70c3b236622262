"""The AxLSTM block against the equations; causality, flipping, gates, patch sizes."""

from __future__ import annotations

import pytest
import torch
from plain import plain_mlstm_block

from hear_encoders import AxLSTMConfig, PatchConfig, build_encoder


def encoder_with(seed=0, **options):
    encoder = build_encoder(AxLSTMConfig(**{"family": "axlstm", "dim": 48, "depth": 2, **options}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for block in encoder.blocks:  # initial gates do not look at their input; let them
        for parameter in (
            block.gate_i.weight,
            block.gate_f.weight,
            block.norm.weight,
            block.head_norm.weight,
            block.skip,
        ):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return encoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", ["auto", "parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("expansion", [2, 3, 4])
def test_block_equals_the_equations_in_values_and_gradients(expansion, mode, dtype, tolerance):
    block = encoder_with(expansion=expansion).blocks[0]
    x = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    expected = plain_mlstm_block(x, {name: tensor.double() for name, tensor in block.state_dict().items()}, heads=4)
    expected_gradient = torch.autograd.grad(expected.square().sum(), x)[0]

    actual_x = x.detach().to(dtype).requires_grad_()
    actual = block.to(dtype)(actual_x, mode, 8)
    gradient = torch.autograd.grad(actual.square().sum(), actual_x)[0]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    scale = expected_gradient.abs().max()
    torch.testing.assert_close(gradient.double() / scale, expected_gradient / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("projection_block", [1, 3, 8, 16])  # heads of 24 and 12 channels
@pytest.mark.parametrize("heads", [2, 4])
def test_projection_blocks_may_span_two_heads(heads, projection_block):
    block = encoder_with(expansion=1, heads=heads, projection_block=projection_block).blocks[0].double()
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(block(x), plain_mlstm_block(x, block.state_dict(), heads), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_gradients_of_the_convolution_are_those_of_its_values(length):
    conv = encoder_with().blocks[0].conv.double()
    x = torch.randn(2, length, 144, dtype=torch.float64)[..., :5].requires_grad_()
    parameters = [x, conv.weight[:5].detach().requires_grad_(), conv.bias[:5].detach().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x), parameters
    )


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"input_gate": "sigmoid"}])
def test_modes_agree_in_the_whole_encoder(options):
    encoder = encoder_with(**options)
    logmel = torch.randn(2, 200, 80)
    outputs = []
    with torch.no_grad():
        for encoder.mode, encoder.chunk_size in [
            ("parallel", 1),
            ("chunkwise", 64),
            ("chunkwise", 17),
            ("recurrent", 1),
        ]:
            outputs.append(encoder(logmel))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_tokens_do_not_look_ahead_without_flip(mode):
    encoder = encoder_with()
    encoder.mode = mode
    logmel = torch.randn(1, 200, 80)
    changed = logmel.clone()
    changed[:, 120:] += 1
    with torch.no_grad():
        difference = (encoder(logmel) - encoder(changed)).abs().amax(-1)[0]
    assert difference[: 30 * 5].max() < 1e-6 and difference[30 * 5 :].min() > 1e-4


def test_flip_lets_tokens_look_ahead():
    encoder = encoder_with(flip=True)
    logmel = torch.randn(1, 200, 80)
    changed = logmel.clone()
    changed[:, 120:] += 1
    with torch.no_grad():
        assert (encoder(logmel) - encoder(changed)).abs().amax(-1)[0].min() > 1e-5


def test_sigmoid_input_gate_is_the_logsigmoid_of_the_preactivation():
    exponential, sigmoid = encoder_with(), encoder_with(input_gate="sigmoid")
    inputs = torch.randn(2, 2, 9, 144)
    raw, log_f = exponential.blocks[0].gates(*inputs)
    squashed, same_log_f = sigmoid.blocks[0].gates(*inputs)
    torch.testing.assert_close(squashed, torch.log(torch.sigmoid(raw)))
    torch.testing.assert_close(log_f, same_log_f)
    assert (squashed < 0).all() and (raw > 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_float32_under_autocast(dtype):
    block = encoder_with().blocks[0]
    with torch.autocast("cpu", dtype=dtype):
        log_i, log_f = block.gates(*torch.randn(2, 1, 5, 144, dtype=dtype))
    assert log_i.dtype == log_f.dtype == torch.float32


@pytest.mark.parametrize(("frames", "bands", "tokens"), [(4, 16, 250), (8, 16, 125), (4, 8, 500)])
def test_patch_sizes_of_the_paper_run(frames, bands, tokens):
    encoder = encoder_with(patches=PatchConfig(patch_frames=frames, patch_bands=bands))
    with torch.no_grad():
        assert encoder(torch.randn(1, 200, 80)).shape == (1, tokens, 48)


def test_initial_weights_are_the_references():
    encoder = build_encoder(AxLSTMConfig("axlstm", dim=192, depth=2), seed=0)
    block = encoder.blocks[0]
    assert torch.equal(block.gate_f.bias, torch.linspace(3.0, 6.0, 4)) and not block.gate_f.weight.any()
    assert not block.gate_i.weight.any() and block.gate_i.bias.abs().max() < 0.5
    small = (2 / (5 * 192)) ** 0.5
    for weight in (block.up.weight, block.q.weight, block.k.weight, block.v.weight):
        assert weight.std().item() == pytest.approx(small, rel=0.1)
    assert block.down.weight.std().item() == pytest.approx(2 / 192**0.5, rel=0.1)
