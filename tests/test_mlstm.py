"""The mLSTM cell: every mode equals the plain reference, however the sequence is cut."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from plain import plain_mlstm

from hear_encoders.nn.mlstm import MLSTMState, initial_state, mlstm, mlstm_step

MODES = {
    "parallel": {"mode": "parallel"},
    "recurrent": {"mode": "recurrent"},
    "chunks of 1": {"mode": "chunkwise", "chunk_size": 1},
    "chunks of 7": {"mode": "chunkwise", "chunk_size": 7},
    "chunks of 64": {"mode": "chunkwise", "chunk_size": 64},
}
LENGTHS = [1, 2, 53, 101]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def cell_inputs(length: int, gates: str = "mild", batch: int = 2, heads: int = 3, dim: int = 24, seed: int = 0):
    """Float64 q, k, v, log_i, log_f; "mild" gates as a trained model's, "extreme" ones up to +-60."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=generator, dtype=torch.float64)
    i, f = torch.randn(2, batch, heads, length, generator=generator, dtype=torch.float64)
    scale, shift = (1.0, 4.0) if gates == "mild" else (25.0, 0.0)
    # Rounded to float32 first, so that every dtype is asked about the same numbers.
    return [x.float().double() for x in (q, k, v, scale * i, F.logsigmoid(scale * f + shift))]


def golden_inputs(tensors, kind):
    log_i = tensors[f"igate_preact{kind}"].squeeze(-1)
    log_f = F.logsigmoid(tensors[f"fgate_preact{kind}"].squeeze(-1))
    return tensors["q"], tensors["k"], tensors["v"], log_i, log_f


def to(dtype, inputs):
    return [x.to(dtype) for x in inputs]


def assert_close(actual, expected, tolerance):
    """Within tolerance of values of order 1, and relative to larger ones."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def weighted_gradients(h, weights, inputs):
    """Gradients of a weighted sum of h, each relative to its largest entry (if that is above 1)."""
    gradients = torch.autograd.grad((h * weights.to(h.dtype)).sum(), inputs, retain_graph=True, materialize_grads=True)
    return [(gradient, gradient.abs().max().clamp(min=1)) for gradient in gradients]


def random_weights(h):
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["", "_extreme"])
def test_equals_the_released_code_in_values_and_the_plain_reference_in_gradients(golden, kind, mode, dtype):
    tensors, _ = golden("mlstm_cell")
    inputs = [x.requires_grad_() for x in golden_inputs(tensors, kind)]
    expected = plain_mlstm(*inputs)
    assert_close(expected, tensors[f"h{kind}"], 1e-9)
    expected_gradients = weighted_gradients(expected, random_weights(expected), inputs)

    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    actual, _ = mlstm(*inputs, **MODES[mode])
    assert actual.dtype == dtype
    assert_close(actual, tensors[f"h{kind}"], TOLERANCE[dtype])
    for (gradient, _), (expected_gradient, scale) in zip(
        weighted_gradients(actual, random_weights(actual), inputs), expected_gradients
    ):
        assert_close(gradient / scale, expected_gradient / scale, TOLERANCE[dtype])


@functools.cache
def expectation(length: int, gates: str):
    """The plain reference's outputs and gradients, and where they are well conditioned.

    The normalizer is a sum that may cancel; h and its gradient then carry the rounding of its terms, whatever
    computes them. Float32 is compared where the terms are less than 100 times their sum (nine steps of ten).
    """
    inputs = [x.requires_grad_() for x in cell_inputs(length, gates)]
    q, k, _, log_i, log_f = inputs
    h = plain_mlstm(*inputs)
    running = log_f.cumsum(-1)
    log_weights = running[..., :, None] - running[..., None, :] + log_i[..., None, :]
    log_weights = log_weights.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    cancelled = (weights * (q @ k.mT)).sum(-1).abs() / (weights * (q.abs() @ k.abs().mT)).sum(-1)
    conditioned = (cancelled > 0.01)[..., None].detach()
    return (
        h.detach(),
        conditioned,
        {
            dtype: weighted_gradients(h, random_weights(h) * keep, inputs)
            for dtype, keep in ((torch.float64, torch.ones_like(conditioned)), (torch.float32, conditioned))
        },
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", ["mild", "extreme"])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_equal_the_plain_reference_at_any_length(length, gates, mode, dtype):
    expected, conditioned, expected_gradients = expectation(length, gates)
    kept = torch.ones_like(conditioned) if dtype is torch.float64 else conditioned
    inputs = [x.requires_grad_() for x in to(dtype, cell_inputs(length, gates))]
    actual, _ = mlstm(*inputs, **MODES[mode])
    assert_close(actual * kept, expected * kept, TOLERANCE[dtype])
    for (gradient, _), (expected_gradient, scale) in zip(
        weighted_gradients(actual, random_weights(actual) * kept, inputs), expected_gradients[dtype]
    ):
        assert_close(gradient / scale, expected_gradient / scale, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [1, 20, 52])
@pytest.mark.parametrize("gates", ["mild", "extreme"])
def test_a_split_sequence_gives_the_same_outputs_and_state(gates, split, mode):
    inputs = cell_inputs(53, gates)
    whole, whole_state = mlstm(*inputs, **MODES[mode])
    first, state = mlstm(*(x[:, :, :split] for x in inputs), **MODES[mode])
    second, state = mlstm(*(x[:, :, split:] for x in inputs), state, **MODES[mode])
    assert_close(torch.cat([first, second], dim=2), whole, 1e-9)
    for part, whole_part in zip(state, whole_state):
        assert_close(part, whole_part, 1e-9)


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", ["parallel", "recurrent", "chunks of 7"])
def test_the_state_of_one_mode_continues_in_another(before, after):
    inputs = cell_inputs(40)
    whole, _ = mlstm(*inputs, mode="parallel")
    _, state = mlstm(*(x[:, :, :17] for x in inputs), **MODES[before])
    rest, _ = mlstm(*(x[:, :, 17:] for x in inputs), state, **MODES[after])
    assert_close(rest, whole[:, :, 17:], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_not_wanted_changes_nothing_else(mode):
    inputs = cell_inputs(40)
    h, state = mlstm(*inputs, **MODES[mode], want_state=False)
    assert state is None and torch.equal(h, mlstm(*inputs, **MODES[mode])[0])


def test_gradients_flow_through_the_state():
    inputs = [x.requires_grad_() for x in cell_inputs(20)]
    whole = torch.autograd.grad(mlstm(*inputs, mode="parallel")[0][:, :, 12:].sum(), inputs)
    _, state = mlstm(*(x[:, :, :12] for x in inputs), mode="parallel")
    rest, _ = mlstm(*(x[:, :, 12:] for x in inputs), state, mode="chunkwise", chunk_size=3)
    for gradient, expected in zip(torch.autograd.grad(rest.sum(), inputs), whole):
        assert_close(gradient, expected, 1e-9)


def test_single_steps_make_the_sequence():
    inputs = cell_inputs(30)
    state, outputs = None, []
    for t in range(30):
        h, state = mlstm_step(*(x[:, :, t] for x in inputs), state)
        outputs.append(h)
    assert_close(torch.stack(outputs, dim=2), plain_mlstm(*inputs), 1e-9)


def test_an_explicit_initial_state_is_none():
    inputs = cell_inputs(9)
    start = initial_state(2, 3, 24, dtype=torch.float64)
    for options in MODES.values():
        assert_close(mlstm(*inputs, start, **options)[0], mlstm(*inputs, **options)[0], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_later_steps_do_not_reach_back(mode):
    inputs = cell_inputs(40)
    changed = [torch.cat([x[:, :, :25], 2 * x[:, :, 25:]], dim=2) for x in inputs]
    assert_close(mlstm(*changed, **MODES[mode])[0][:, :, :25], mlstm(*inputs, **MODES[mode])[0][:, :, :25], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", ["mild", "extreme"])
def test_half_precision_inputs_are_computed_in_float32_without_nan(gates, mode, dtype):
    inputs = to(dtype, cell_inputs(53, gates))
    inputs = [3 * x for x in inputs[:3]] + inputs[3:]  # q.k of up to some thousand
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=dtype):
        h, state = mlstm(*leaves, **MODES[mode])
    gradients = torch.autograd.grad(h.sum(), leaves)
    assert h.dtype == torch.float32 and all(part.dtype == torch.float32 for part in state)
    assert h.isfinite().all() and all(part.isfinite().all() for part in state)
    assert not any(gradient.isnan().any() for gradient in gradients)
    assert_close(h, plain_mlstm(*(x.double() for x in inputs)), 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gates_at_their_limits_stay_finite_with_finite_gradients(mode):
    q, k, v, log_i, log_f = to(torch.float32, cell_inputs(53))
    for i, f in [(-1000.0, -1000.0), (1000.0, -1000.0), (-1000.0, 0.0), (1000.0, 0.0), (0.0, -1e30)]:
        leaves = [q, k, v, torch.full_like(log_i, i), torch.full_like(log_f, f)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        h, state = mlstm(*leaves, **MODES[mode])
        gradients = torch.autograd.grad(h.sum(), leaves)
        assert h.isfinite().all() and all(part.isfinite().all() for part in state), (i, f)
        assert all(gradient.isfinite().all() for gradient in gradients), (i, f)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", ["mild", "extreme"])
def test_no_denormal_numbers_are_made(gates, mode):
    inputs = to(torch.float32, cell_inputs(131, gates))
    h, state = mlstm(*inputs, **MODES[mode])
    for tensor in (h, state.C, state.n):
        magnitude = tensor.abs()
        assert not ((magnitude > 0) & (magnitude < torch.finfo(torch.float32).tiny)).any()


def test_state_has_a_constant_size_and_names_its_parts():
    for length in (1, 200):
        _, state = mlstm(*to(torch.bfloat16, cell_inputs(length)))
        assert isinstance(state, MLSTMState)
        assert [tuple(part.shape) for part in state] == [(2, 3, 24, 24), (2, 3, 24), (2, 3)]
        assert state.C.dtype == state.n.dtype == state.m.dtype == torch.float32


def test_bad_arguments_are_named():
    inputs = cell_inputs(5)
    with pytest.raises(ValueError, match="unknown mode 'serial'"):
        mlstm(*inputs, mode="serial")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        mlstm(*inputs, chunk_size=0)
    with pytest.raises(ValueError, match="empty sequence"):
        mlstm(*(x[:, :, :0] for x in inputs))
