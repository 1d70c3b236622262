"""The mLSTM cell over a whole segment at once: its fast form on a CPU, with a gradient written by hand.

`hear_encoders.nn.mlstm` is the plain reference, with which the tests compare this form. With g_s = log i_s - F_s (see
there), the weight exp(g_s - max(g_1..g_t)) of token s at token t separates: exp(g_s - base) scales the keys, and the
factor of t cancels in h. So S x S weights are never computed, and a part's scores come from one matmul. This works as
long as the running maximum of g moves by less than `MAX_LOG_RANGE` over the segment.

Letters in shape comments: B sequences, H heads, S tokens, K channels of a head, L tokens of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hear_encoders.nn.mlstm import NORMALIZER_EPS

# exp(g_s) is float32 relative to the middle between the first and the last of max(g_1..g_t), which lie at most this
# far apart. Scales too small to be seen beside the smallest maximum become zero: their products would be denormal.
MAX_LOG_RANGE = 80.0
MIN_LOG_SCALE = -MAX_LOG_RANGE / 2 - 25.0

LOG_BOUND_CEILING = 80.0  # past it the bound on the normalizer only has to stay finite, so that gradients do

PART_TOKENS = 84  # L at most: a part's products include all tokens up to its last; half of the last L x L is wasted


def mlstm_segment(q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor) -> Tensor | None:
    """Run the mLSTM cell over a segment, from an empty memory.

    Args:
        q, k, v: (B, H, S, K) any floating dtype; the keys are not yet scaled by 1 / sqrt(K). bfloat16 inputs are
            multiplied in bfloat16, others in float32 (float64 for float64 inputs), also under autocast. Gates, sums
            and the normalizer are float32 at least.
        log_i, log_f: (B, H, S) logarithms of the gates, float32 or float64.

    Returns:
        h (B, H, S, K) float32 (float64 for float64 inputs), or None if the gates are too extreme for this form.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        forgotten = log_f.double().cumsum(-1)  # (B, H, S); float64: sums may be large and their differences matter
        g = log_i.double() - forgotten
        largest, largest_at = g.cummax(-1)
        lowest, highest = largest[..., :1], largest[..., -1:]
        if not bool((highest - lowest).max() < MAX_LOG_RANGE):
            return None
        base = (lowest + highest) / 2  # cancels in h
        scale = F.threshold(g - base, MIN_LOG_SCALE, -torch.inf).exp_().mul_(k.shape[-1] ** -0.5)
        bound = (-forgotten - base).clamp_(max=LOG_BOUND_CEILING).exp_()
        eps = (largest - base).exp_().mul_(NORMALIZER_EPS)
    with torch.autocast(q.device.type, enabled=False):
        return _Cell.apply(q, k, v, log_i, log_f, scale, bound, eps, largest_at)


class _Cell(torch.autograd.Function):
    """The cell, part by part; the scores of the future are zero.

    The gates' gradients come from M = scores * grad_scores, whose entry (t, s) is the gradient of the log weight of
    token s at token t. A column's sum is the gradient of log i_s. A row's sum would be the gradient of log F_t in
    log i_s + F_t - F_s, and the sum over all rows and columns from t on, that of log f_t: what is left of it are the
    pairs s < t <= t'. As both sums are of the same rounded numbers, the rest cancels exactly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_i: Tensor,
        log_f: Tensor,
        scale: Tensor,
        bound: Tensor,
        eps: Tensor,
        largest_at: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        narrow = torch.bfloat16 if q.dtype is torch.bfloat16 else wide
        ctx.shape, ctx.dtypes = q.shape, [x.dtype for x in (q, k, v, log_i, log_f)]
        scale, bound, eps = (x.to(wide) for x in (scale, bound, eps))
        keys = torch.empty(k.shape, dtype=narrow, device=k.device)
        torch.mul(k, scale[..., None], out=keys) if k.dtype is wide else keys.copy_(k * scale[..., None])
        q, v = (x.to(narrow).flatten(0, 1) for x in (q, v))  # (B H, S, K)
        keys, bound, eps = keys.flatten(0, 1), bound.flatten(0, 1), eps.flatten(0, 1)
        h = torch.empty(q.shape, dtype=wide, device=q.device)
        totals = torch.empty_like(bound)
        parts = []
        for begin, end in cut_into_parts(q.shape[1]):
            scores = torch.bmm(q[:, begin:end], keys[:, :end].mT)  # (B H, L, tokens so far)
            scores[:, :, begin:].tril_()
            totals[:, begin:end] = scores.sum(2, dtype=wide)
            h[:, begin:end] = torch.bmm(scores, v[:, :end])
            parts.append(scores)
        normalizer = torch.maximum(totals.abs(), bound) + eps
        h /= normalizer[..., None]
        ctx.save_for_backward(q, keys, v, scale, bound, eps, largest_at, totals, normalizer, h, *parts)
        return h.unflatten(0, ctx.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, v, scale, bound, eps, largest_at, totals, normalizer, h, *parts = ctx.saved_tensors
        grad_h = grad_h.to(h.dtype).flatten(0, 1)
        free = totals.abs() >= bound  # where the bound does not hold the normalizer
        grad_normalizer = (grad_h * h).sum(2).div_(-normalizer)
        grad_totals = (grad_normalizer * totals.sign() * free).to(q.dtype)[..., None]
        grad_read = (grad_h / normalizer[..., None]).to(q.dtype)  # (B H, S, K), gradient of scores @ v
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(h), torch.zeros_like(h)
        of_rows, of_columns = torch.empty_like(totals), torch.zeros_like(totals)
        for (begin, end), scores in zip(cut_into_parts(q.shape[1]), parts):
            part = slice(begin, end)
            grad_scores = torch.bmm(grad_read[:, part], v[:, :end].mT).add_(grad_totals[:, part])
            grad_scores[:, :, begin:].tril_()
            grad_q[:, part] = torch.bmm(grad_scores, keys[:, :end])
            grad_k[:, :end] += torch.bmm(grad_scores.mT, q[:, part])
            grad_v[:, :end] += torch.bmm(scores.mT, grad_read[:, part])
            of_pairs = scores.to(h.dtype) * grad_scores
            of_rows[:, part] = of_pairs.sum(2)
            of_columns[:, :end] += of_pairs.sum(1)
        grad_k = grad_k.unflatten(0, ctx.shape[:2]) * scale[..., None]
        of_eps = grad_normalizer * eps  # NORMALIZER_EPS is relative to the largest g up to t
        of_rows += of_eps
        of_columns.scatter_add_(1, largest_at.flatten(0, 1), of_eps)
        grad_f = (of_rows - of_columns).double().flip(1).cumsum(1).flip(1)
        gradients = (grad_q, grad_k.flatten(0, 1), grad_v, of_columns, grad_f)
        shaped = (grad.unflatten(0, ctx.shape[:2]).to(dtype) for grad, dtype in zip(gradients, ctx.dtypes))
        return *shaped, None, None, None, None


def cut_into_parts(length: int, most: int = PART_TOKENS) -> Iterator[tuple[int, int]]:
    """Cut a segment into the fewest parts of at most `most` tokens, as equal as possible: (begin, end) each."""
    size = -(-length // -(-length // most))
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)
