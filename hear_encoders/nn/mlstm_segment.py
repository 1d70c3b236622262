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
        q, k, v: (B, H, S, K) any floating dtype; the keys are not yet scaled by 1 / sqrt(K). The products run in
            float32 (float64 for float64 inputs), also under autocast: bfloat16 products cost the forget gates'
            gradients half of their digits.
        log_i, log_f: (B, H, S) logarithms of the gates, float32 or float64.

    Returns:
        h (B, H, S, K) float32 (float64 for float64 inputs), or None if the gates are too extreme for this form.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    forgotten = log_f.double().cumsum(-1)  # (B, H, S); float64: sums may be large and their differences matter
    g = log_i.double() - forgotten
    largest = g.cummax(-1).values
    lowest, highest = largest[..., :1].detach(), largest[..., -1:].detach()
    if not bool((highest - lowest).max() < MAX_LOG_RANGE):
        return None
    base = (lowest + highest) / 2  # cancels in h, so it needs no gradient
    eps = NORMALIZER_EPS * (largest - base).exp()
    scale = F.threshold(g - base, MIN_LOG_SCALE, -torch.inf).exp().to(dtype)  # (B, H, S)
    bound = (-forgotten - base).clamp(max=LOG_BOUND_CEILING).exp().to(dtype)
    keys = k.to(dtype) * (scale * k.shape[-1] ** -0.5)[..., None]
    flat = (x.to(dtype).flatten(0, 1) for x in (q, keys, v, bound, eps))
    with torch.autocast(q.device.type, enabled=False):
        return _Cell.apply(*flat).unflatten(0, q.shape[:2])


class _Cell(torch.autograd.Function):
    """From queries, scaled keys and values (B H, S, K) to h, part by part; the scores of the future are zero."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bound: Tensor, eps: Tensor) -> Tensor:
        h = torch.empty_like(q)
        totals = torch.empty_like(bound)
        parts = []
        for begin, end in cut_into_parts(q.shape[1]):
            scores = torch.bmm(q[:, begin:end], k[:, :end].mT)  # (B H, L, tokens so far)
            scores[:, :, begin:].tril_()
            torch.sum(scores, 2, out=totals[:, begin:end])
            h[:, begin:end] = torch.bmm(scores, v[:, :end])
            parts.append(scores)
        normalizer = torch.maximum(totals.abs(), bound) + eps
        h /= normalizer[..., None]
        ctx.save_for_backward(q, k, v, bound, totals, normalizer, h, *parts)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bound, totals, normalizer, h, *parts = ctx.saved_tensors
        grad_read = grad_h / normalizer[..., None]  # (B H, S, K), gradient of scores @ v
        grad_normalizer = (grad_h * h).sum(2).div_(normalizer).neg_()
        bounded = totals.abs() < bound
        grad_bound = grad_normalizer * bounded
        grad_totals = (grad_normalizer - grad_bound).mul_(totals.sign())
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (begin, end), scores in reversed(list(zip(cut_into_parts(q.shape[1]), parts))):
            part = slice(begin, end)
            grad_scores = torch.bmm(grad_read[:, part], v[:, :end].mT).add_(grad_totals[:, part, None])
            grad_scores[:, :, begin:].tril_()
            grad_q[:, part] = torch.bmm(grad_scores, k[:, :end])
            if end == q.shape[1]:  # the last part sees all tokens, and comes first here
                torch.bmm(grad_scores.mT, q[:, part], out=grad_k)
                torch.bmm(scores.mT, grad_read[:, part], out=grad_v)
            else:
                grad_k[:, :end] += torch.bmm(grad_scores.mT, q[:, part])
                grad_v[:, :end] += torch.bmm(scores.mT, grad_read[:, part])
        return grad_q, grad_k, grad_v, grad_bound, grad_normalizer


def cut_into_parts(length: int, most: int = PART_TOKENS) -> Iterator[tuple[int, int]]:
    """Cut a segment into the fewest parts of at most `most` tokens, as equal as possible: (begin, end) each."""
    size = -(-length // -(-length // most))
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)
