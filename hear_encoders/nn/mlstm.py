"""The mLSTM cell (AxLSTM equations 1-9; Beck et al. 2024, xLSTM, section 2.3 and appendix A.3).

One operator in three modes that agree: `recurrent` goes token by token, `parallel` computes all tokens at once, and
`chunkwise` carries a state from chunk to chunk and is parallel inside each. The state is a value that goes in and
comes out; no module keeps it. Everything runs in float32 (float64 for float64 inputs), also under autocast.

The modes are the plain reference for `hear_encoders.nn.mlstm_segment`, `axlstm_offline` and `axlstm_online`.

Letters in shape comments: B sequences, H heads, S tokens, D channels of a head.

With F = cumsum(log f), the weight of token s in the output at token t is exp(F_t - F_s + log i_s), for s <= t,
divided by a stabilizer exp(m_t). Writing g_s = log i_s - F_s, its logarithm is g_s - max(g_1..g_t): F_t cancels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MLSTMMode = Literal["parallel", "chunkwise", "recurrent"]

NORMALIZER_EPS = 1e-6
DEFAULT_CHUNK = 64

# Weights are relative to the largest. Those below exp(floor) cannot be seen in the result. They become zero,
# because denormal numbers slow a CPU's matmuls many times over.
LOG_WEIGHT_FLOOR = {torch.float32: -40.0, torch.float64: -80.0}
# exp(-m) bounds the normalizer from below. Past this ceiling it only has to stay finite, so that gradients do.
_LOG_BOUND_CEILING = {torch.float32: 60.0, torch.float64: 600.0}


class MLSTMState(NamedTuple):
    """The cell's state, stabilized: the true memory is exp(m) * C, the true normalizer exp(m) * n."""

    C: Tensor  # (B, H, D, D) memory, keys x values
    n: Tensor  # (B, H, D) normalizer
    m: Tensor  # (B, H) log of the stabilizer; -inf before the first token


def initial_state(
    batch: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> MLSTMState:
    """Return the state before the first token."""
    return MLSTMState(
        C=torch.zeros(batch, heads, head_dim, head_dim, dtype=dtype, device=device),
        n=torch.zeros(batch, heads, head_dim, dtype=dtype, device=device),
        m=torch.full((batch, heads), -torch.inf, dtype=dtype, device=device),
    )


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: MLSTMState | None = None,
    *,
    mode: MLSTMMode = "chunkwise",
    chunk_size: int = DEFAULT_CHUNK,
    want_state: bool = True,
) -> tuple[Tensor, MLSTMState | None]:
    """Run the mLSTM cell over a sequence.

    Args:
        q, k, v: (B, H, S, D) queries, keys, values; any floating dtype.
        log_i: (B, H, S) logarithm of the input gate: its pre-activation (exponential gate), or the log-sigmoid of
            that (sigmoid gate).
        log_f: (B, H, S) logarithm of the forget gate: the log-sigmoid of its pre-activation.
        state: the state before the first token; None is the initial state.
        mode: "parallel" needs S x S memory, "chunkwise" S x chunk_size, "recurrent" neither.
        chunk_size: tokens per chunk in "chunkwise" mode; it does not change the result.
        want_state: False skips computing the state after the last token.

    Returns:
        h (B, H, S, D) and the state after the last token (None if not wanted), float32 (float64 if q is float64).

    Raises:
        ValueError: unknown mode, chunk_size below 1, or an empty sequence.
    """
    length = q.shape[2]
    if length < 1:
        raise ValueError("expected at least one token, got an empty sequence")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_i, log_f = (x.to(dtype) for x in (q, k, v, log_i, log_f))
        if mode == "parallel":
            return _chunk(q, k, v, log_i, log_f, state, want_state)
        if mode == "chunkwise":
            if chunk_size < 1:
                raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
            # Split instead of slice: each slice's gradient would be a tensor of zeros as large as the whole.
            chunks = list(zip(*(x.split(chunk_size, dim=2) for x in (q, k, v, log_i, log_f))))
            outputs = []
            for index, (q_c, k_c, v_c, log_i_c, log_f_c) in enumerate(chunks):
                h, state = _chunk(q_c, k_c, v_c, log_i_c, log_f_c, state, want_state or index + 1 < len(chunks))
                outputs.append(h)
            return torch.cat(outputs, dim=2), state
        if mode == "recurrent":
            outputs = []
            for t in range(length):
                h, state = mlstm_step(q[:, :, t], k[:, :, t], v[:, :, t], log_i[:, :, t], log_f[:, :, t], state)
                outputs.append(h)
            return torch.stack(outputs, dim=2), (state if want_state else None)
    raise ValueError(f"unknown mode {mode!r}; expected 'parallel', 'chunkwise' or 'recurrent'")


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState | None = None
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM cell for one token. Time and memory do not depend on the number of tokens before it.

    Args:
        q, k, v: (B, H, D); log_i, log_f: (B, H), as in `mlstm`.
        state: the state before this token; None is the initial state.

    Returns:
        h (B, H, D) and the state after this token, float32 (float64 if q is float64).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_i, log_f = (x.to(dtype) for x in (q, k, v, log_i, log_f))
        if state is None:
            state = initial_state(*q.shape, dtype=dtype, device=q.device)
        k = k * k.shape[-1] ** -0.5
        m = torch.maximum(log_f + state.m, log_i)
        keep = _exp_weight(log_f + state.m - m)[..., None]  # (B, H, 1)
        write = _exp_weight(log_i - m)[..., None] * k  # (B, H, D)
        C = keep[..., None] * state.C + write[..., :, None] * v[..., None, :]
        n = keep * state.n + write
        h = _normalize((q[..., None, :] @ C).squeeze(-2), (q * n).sum(-1), m)
    return h, MLSTMState(C, n, m)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState | None, want_state: bool
) -> tuple[Tensor, MLSTMState | None]:
    """Run all tokens of one chunk at once, from the state before it to the state after it."""
    # Differences of large running sums lose digits. These tensors are small, so they can be wide.
    wide = torch.float32 if q.device.type == "mps" else torch.float64  # MPS has no float64
    length = q.shape[2]
    k = k * k.shape[-1] ** -0.5
    forgotten = log_f.to(wide).cumsum(-1)  # (B, H, S): F_t from the chunk's beginning
    g = log_i.to(wide) - forgotten
    largest = torch.cummax(g, dim=-1).values  # (B, H, S)
    if state is not None:
        largest = torch.maximum(largest, state.m.to(wide)[..., None])
    m = (forgotten + largest).to(q.dtype)

    log_weights = (g[..., None, :] - largest[..., :, None]).to(q.dtype)  # (B, H, S, S): [t, s]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    weights = _exp_weight(log_weights.masked_fill(future, -torch.inf))
    scores = weights * (q @ k.transpose(-1, -2))
    numerator = scores @ v  # (B, H, S, D)
    normalizer = scores.sum(-1)  # (B, H, S)
    if state is not None:
        seen = _exp_weight((state.m.to(wide)[..., None] - largest).to(q.dtype))  # (B, H, S)
        numerator = torch.addcmul(numerator, seen[..., None], q @ state.C)
        normalizer = normalizer + seen * (q @ state.n[..., None]).squeeze(-1)
    h = _normalize(numerator, normalizer, m)
    if not want_state:
        return h, None

    write = _exp_weight((g - largest[..., -1:]).to(q.dtype))[..., None] * k  # (B, H, S, D)
    C = write.transpose(-1, -2) @ v
    n = write.sum(2)
    if state is not None:
        keep = seen[..., -1:]
        C = torch.addcmul(C, keep[..., None], state.C)
        n = n + keep * state.n
    return h, MLSTMState(C, n, m[..., -1])


def _exp_weight(log_weight: Tensor) -> Tensor:
    """Return exp of a relative log weight (at most 0), and exactly zero below the floor."""
    return F.threshold(log_weight, LOG_WEIGHT_FLOOR[log_weight.dtype], -torch.inf).exp()


def _normalize(numerator: Tensor, normalizer: Tensor, m: Tensor) -> Tensor:
    """Return numerator / (max(|normalizer|, exp(-m)) + eps): (..., D), (...), (...) -> (..., D)."""
    bound = (-m).clamp(max=_LOG_BOUND_CEILING[m.dtype]).exp()
    return numerator / (torch.maximum(normalizer.abs(), bound) + NORMALIZER_EPS)[..., None]
