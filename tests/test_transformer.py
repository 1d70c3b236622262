"""Transformer encoders against plain attention; rotary positions; half precision."""

from __future__ import annotations

import pytest
import torch
from plain import plain_attention

from hear_encoders import TransformerConfig, build_encoder, preset
from hear_encoders.nn.patches import patchify
from hear_encoders.nn.transformer import Attention, rotary_frequencies


def config(**options):
    return TransformerConfig(**{"family": "audiomaepp", "dim": 48, "depth": 2, "heads": 3, **options})


def attention_with_weights(**options) -> Attention:
    attention = Attention(config(**options))
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rope", ["none", "patch", "sequence"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_attention_equals_plain_attention_in_values_and_gradients(steps, rope, dtype, tolerance):
    attention = attention_with_weights(rope=rope)
    length = 1 + 5 * steps
    x = torch.randn(2, length, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    if rope == "none":
        angles = None
    elif rope == "sequence":
        angles = torch.arange(length)[:, None] * rotary_frequencies(8).double()
    else:
        rows, columns = torch.arange(length - 1) % 5 + 1, torch.arange(length - 1) // 5 + 1
        halves = [
            torch.cat([torch.zeros(1), axis])[:, None] * rotary_frequencies(4).double() for axis in (rows, columns)
        ]
        angles = torch.cat(halves, dim=1)
    tensors = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    expected = plain_attention(x, tensors, 3, angles)
    expected_gradient = torch.autograd.grad(expected.square().sum(), x)[0]

    actual_x = x.detach().to(dtype).requires_grad_()
    actual = attention.to(dtype)(actual_x)
    gradient = torch.autograd.grad(actual.square().sum(), actual_x)[0]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    scale = expected_gradient.abs().max()
    torch.testing.assert_close(gradient.double() / scale, expected_gradient / scale, rtol=tolerance, atol=tolerance)


def test_attention_is_scaled_dot_product_attention(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    build_encoder(config(), seed=0)(torch.randn(1, 200, 80))
    assert len(calls) == 2  # one a block


@pytest.mark.parametrize("family", ["audiomaepp", "mae"])
def test_without_a_position_table_tokens_are_the_projected_patches(family):
    with_table = build_encoder(config(family=family, rope="sequence"), seed=0)
    without = build_encoder(config(family=family, rope="sequence", position_table="none"), seed=0)
    assert with_table.state_dict().keys() == without.state_dict().keys()
    logmel = torch.randn(2, 120, 80)
    projected = without.patch_projection(patchify(logmel, without.config.patches))
    assert torch.equal(without.embed(logmel), projected)
    assert torch.equal(with_table.embed(logmel), projected + with_table.position_table[:150])
    tokens = without.embed(logmel)
    assert torch.equal(without.with_cls(tokens)[:, 0], with_table.with_cls(tokens)[:, 0])


@pytest.mark.parametrize("family", ["audiomaepp", "mae"])
def test_patch_rope_turns_by_true_place_whatever_order_or_subset_is_present(family):
    encoder = build_encoder(config(family=family, rope="patch"), seed=0)
    tokens = encoder.embed(torch.randn(2, 200, 80))
    order = torch.randperm(250, generator=torch.Generator().manual_seed(2))
    ordered = encoder.encode(tokens)
    shuffled = encoder.encode(tokens[:, order], order.expand(2, -1))
    torch.testing.assert_close(shuffled[:, 1:], ordered[:, 1:][:, order], rtol=1e-4, atol=1e-4)
    kept = order[:50]
    one = encoder.encode(tokens[:, kept], kept.expand(2, -1))
    other = encoder.encode(tokens[:, kept.flip(0)], kept.flip(0).expand(2, -1))
    torch.testing.assert_close(one[:, 1:].flip(1), other[:, 1:], rtol=1e-4, atol=1e-4)


def test_sequence_rope_turns_by_the_place_in_the_sequence():
    encoder = build_encoder(config(rope="sequence"), seed=0)
    tokens = encoder.embed(torch.randn(1, 200, 80))
    order = torch.arange(249, -1, -1)
    in_order = encoder.encode(tokens)[:, 1:][:, order]
    torch.testing.assert_close(encoder.encode(tokens[:, order], order[None])[:, 1:], in_order, rtol=1e-4, atol=1e-4)
    as_released = encoder.encode(tokens[:, order])[:, 1:]  # by place among the tokens that it sees
    assert (as_released - in_order).abs().max() > 1e-2
    assert any("rotary.frequencies" in name for name in encoder.state_dict())  # they belong to the checkpoint


def test_rope_is_off_unless_asked_for():
    assert all(block.attention.rotary is None for block in build_encoder(config(), seed=0).blocks)


def test_swiglu_has_a_norm_of_its_own_unless_it_shares_the_attentions():
    own, shared = (build_encoder(config(swiglu_norm=norm), seed=0) for norm in ("own", "attention"))
    assert own.blocks[0].norm3 is not None and shared.blocks[0].norm3 is None
    logmel = torch.randn(1, 200, 80)
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if "norm3" not in k})
    torch.testing.assert_close(own(logmel), shared(logmel))  # both norms are at their initial values
    own.blocks[1].norm3.weight.data *= 2
    assert (own(logmel) - shared(logmel)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast_is_finite_and_near_float32(small_encoder, dtype):
    logmel = torch.randn(2, 200, 80)
    with torch.no_grad():
        expected = small_encoder(logmel)
        with torch.autocast("cpu", dtype=dtype):
            actual = small_encoder(logmel)
            loud = small_encoder(100 * logmel)
    assert actual.isfinite().all() and loud.isfinite().all()
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < (0.03 if dtype is torch.bfloat16 else 0.005)


@pytest.mark.parametrize("name", ["mae_tiny", "ssast_tiny", "audiomaepp_tiny", "axlstm_tiny"])
def test_tiny_presets_encode_a_segment(name):
    encoder = build_encoder(preset(name), seed=0)
    with torch.no_grad():
        tokens = encoder(torch.randn(1, 200, 80))
    assert tokens.shape == (1, 250, 192) and tokens.isfinite().all()
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 250), atol=1e-5, rtol=0)  # the final norm


def test_each_token_depends_on_every_patch():
    encoder = build_encoder(config(), seed=0)
    logmel = torch.randn(1, 200, 80, requires_grad=True)
    encoder(logmel)[0, 0].pow(2).sum().backward()
    assert (logmel.grad.abs().sum((0, 2)) > 0).all()
