"""The mLSTM cell over a whole segment: values and gradients of the plain cell, and None where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hear_encoders import AxLSTMConfig, build_encoder
from hear_encoders.nn import axlstm, mlstm_segment
from hear_encoders.nn.axlstm import MLSTMBlock
from hear_encoders.nn.mlstm import mlstm


def cell_inputs(length: int, dtype: torch.dtype, input_bias: float = 0.0, forget_bias: float = 4.0) -> list[Tensor]:
    """Return q, k, v (2, 3, S, 12) in a dtype and the gates' logarithms (2, 3, S) in at least float32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 12, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    gates = torch.randn(2, 2, 3, length, generator=generator, dtype=torch.float64)
    log_i, log_f = gates[0] + input_bias, torch.nn.functional.logsigmoid(gates[1] + forget_bias)
    wide = torch.promote_types(dtype, torch.float32)
    return [x.detach().requires_grad_() for x in (q, k, v, log_i.to(wide), log_f.to(wide))]


def value_and_gradients(cell, inputs: list[Tensor]) -> list[Tensor]:
    h = cell(*inputs)
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(h.dtype)
    return [h.detach(), *torch.autograd.grad((h * weight).sum(), inputs)]


def plain(*inputs: Tensor) -> Tensor:
    return mlstm(*inputs, want_state=False)[0]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare each tensor relative to its largest value."""
    for got, wanted in zip(actual, expected):
        scale = max(wanted.abs().max().item(), 1e-20)
        torch.testing.assert_close(got.double() / scale, wanted.double() / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [2, 5, 83, 84, 85, 168, 169, 251])
def test_values_and_gradients_equal_the_plain_cell_at_any_length(length):
    inputs = cell_inputs(length, torch.float64)
    assert_equal(
        value_and_gradients(mlstm_segment.mlstm_segment, inputs), value_and_gradients(plain, inputs), tolerance=1e-9
    )


@pytest.mark.parametrize(("input_bias", "forget_bias"), [(-60.0, 5.0), (20.0, 3.0), (-20.0, 0.0), (3.0, 60.0)])
def test_values_and_gradients_equal_the_plain_cell_for_strong_gates(input_bias, forget_bias):
    inputs = cell_inputs(50, torch.float64, input_bias, forget_bias)
    assert_equal(
        value_and_gradients(mlstm_segment.mlstm_segment, inputs), value_and_gradients(plain, inputs), tolerance=1e-9
    )


def test_float32_changes_results_only_by_rounding():
    expected = value_and_gradients(
        plain, [x.double().detach().requires_grad_() for x in cell_inputs(251, torch.float32)]
    )
    for got, wanted in zip(value_and_gradients(mlstm_segment.mlstm_segment, cell_inputs(251, torch.float32)), expected):
        assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_bfloat16_keeps_the_gradients_of_all_gates():
    """The forget gates' gradients are differences of sums that nearly cancel, over the whole segment."""
    q, k, v, log_i, log_f = cell_inputs(251, torch.bfloat16)
    # Queries that agree with the keys: otherwise normalizers near zero magnify any rounding.
    inputs = [(x.detach() + 1).requires_grad_() for x in (q, k)] + [v, log_i, log_f]
    expected = value_and_gradients(plain, [x.double().detach().requires_grad_() for x in inputs])
    for got, wanted in zip(value_and_gradients(mlstm_segment.mlstm_segment, inputs), expected):
        assert (got.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize(("input_bias", "forget_bias"), [(0.0, -3.0), (100.0, -100.0)])
def test_gates_out_of_range_are_left_to_the_plain_cell(input_bias, forget_bias):
    assert mlstm_segment.mlstm_segment(*cell_inputs(251, torch.float64, input_bias, forget_bias)) is None


def test_the_length_of_parts_does_not_matter():
    for length in (1, 2, 84, 250, 251):
        for most in (1, 7, 84, 300):
            parts = list(mlstm_segment.cut_into_parts(length, most))
            assert [token for begin, end in parts for token in range(begin, end)] == list(range(length))
            assert all(end - begin <= most for begin, end in parts)


def trained_block_gradients(monkeypatch, options: dict, fast: bool, gate_scale: float = 1.0) -> list[Tensor]:
    encoder = build_encoder(AxLSTMConfig(**{"family": "axlstm", "dim": 48, "depth": 2, **options}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for block in encoder.blocks:
            block.gate_f.weight *= gate_scale
    if not fast:
        monkeypatch.setattr(MLSTMBlock, "_trains_on_cpu", lambda self, x: False)
    used, cell = [], mlstm_segment.mlstm_segment
    monkeypatch.setattr(axlstm, "mlstm_segment", lambda *inputs: used.append(cell(*inputs)) or used[-1])
    tokens = encoder(torch.randn(2, 200, 80, generator=generator))
    tokens.square().mean().backward()
    monkeypatch.undo()
    trained_blocks = sum(h is not None for h in used)
    assert trained_blocks == (0 if not fast or gate_scale > 1 or "projection_block" in options else len(encoder.blocks))
    return [tokens.detach(), *(parameter.grad for parameter in encoder.parameters())]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"input_gate": "sigmoid"}, {"heads": 8, "expansion": 4}])
def test_an_encoder_trains_as_with_the_plain_cell(monkeypatch, options):
    expected = trained_block_gradients(monkeypatch, options, fast=False)
    assert_equal(trained_block_gradients(monkeypatch, options, fast=True), expected, tolerance=1e-4)


def test_an_encoder_falls_back_to_the_plain_cell(monkeypatch):
    """For gates out of range, and for projection blocks that span two heads."""
    for options, gate_scale in (({}, 1000.0), ({"expansion": 1, "projection_block": 8}, 1.0)):
        expected = trained_block_gradients(monkeypatch, options, False, gate_scale)
        assert_equal(trained_block_gradients(monkeypatch, options, True, gate_scale), expected, tolerance=1e-6)


def test_an_encoder_traces_without_data():
    """FLOP counts and torch.compile run it on tensors without values, which have no range to check."""
    with FakeTensorMode():
        encoder = build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1))
        encoder(torch.empty(2, 200, 80)).sum().backward()
    assert encoder.blocks[0].up.weight.grad.shape == encoder.blocks[0].up.weight.shape
