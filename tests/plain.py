"""Plain float64 references, written from the equations alone: slow, and as little like the package as possible."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_mlstm(q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor) -> Tensor:
    """AxLSTM equations 1-9 token by token, with the stabilizer of the xLSTM paper. (B, H, S, D) -> (B, H, S, D)."""
    batch, heads, length, dim = q.shape
    C = torch.zeros(batch, heads, dim, dim, dtype=q.dtype)
    n = torch.zeros(batch, heads, dim, dtype=q.dtype)
    m = None
    outputs = []
    for t in range(length):
        i, f = log_i[:, :, t], log_f[:, :, t]
        new_m = i if m is None else torch.maximum(f + m, i)
        write = torch.exp(i - new_m)
        if m is not None:
            forget = torch.exp(f + m - new_m)
            C, n = forget[..., None, None] * C, forget[..., None] * n
        m = new_m
        key = k[:, :, t] / math.sqrt(dim)
        C = C + write[..., None, None] * torch.einsum("bhk,bhv->bhkv", key, v[:, :, t])
        n = n + write[..., None] * key
        read = torch.einsum("bhkv,bhk->bhv", C, q[:, :, t])
        norm = torch.einsum("bhk,bhk->bh", n, q[:, :, t]).abs()
        # exp(-m) overflows float64 at m < -709; there the output is zero either way.
        bound = torch.exp((-m).clamp(max=700.0))
        outputs.append(read / (torch.maximum(norm, bound) + 1e-6)[..., None])
    return torch.stack(outputs, dim=2)


def plain_mlstm_block(x: Tensor, tensors: dict[str, Tensor], heads: int) -> Tensor:
    """The mLSTM block (AxLSTM figure 1), token by token where that is simplest. (B, S, D) -> (B, S, D)."""
    w = tensors
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    up = ((x - mean) / torch.sqrt(variance + 1e-5) * w["norm.weight"]) @ w["up.weight"].T
    inner, z = up[..., : up.shape[-1] // 2], up[..., up.shape[-1] // 2 :]
    batch, length, channels = inner.shape
    kernel = w["conv.weight"].shape[1]
    convolved = w["conv.bias"].expand_as(inner).clone()
    for t in range(length):
        for tap in range(kernel):
            past = t - (kernel - 1) + tap
            if past >= 0:
                convolved[:, t] += w["conv.weight"][:, tap] * inner[:, past]
    convolved = convolved * torch.sigmoid(convolved)

    def project(name: str, inputs: Tensor) -> Tensor:
        return inputs @ torch.block_diag(*w[f"{name}.weight"]).T

    q, k, v = project("q", convolved), project("k", convolved), project("v", inner)
    qkv = torch.cat([q, k, v], dim=-1)
    log_i = (qkv @ w["gate_i.weight"].T + w["gate_i.bias"]).transpose(1, 2)
    log_f = torch.nn.functional.logsigmoid(qkv @ w["gate_f.weight"].T + w["gate_f.bias"]).transpose(1, 2)
    split = [y.reshape(batch, length, heads, channels // heads).transpose(1, 2) for y in (q, k, v)]
    h = plain_mlstm(*split, log_i, log_f)
    variance, mean = torch.var_mean(h, dim=-1, keepdim=True, correction=0)
    h = ((h - mean) / torch.sqrt(variance + 1e-5)).transpose(1, 2).reshape(batch, length, channels)
    h = h * w["head_norm.weight"] + w["skip"] * convolved
    return x + (h * (z * torch.sigmoid(z))) @ w["down.weight"].T


def plain_attention(x: Tensor, tensors: dict[str, Tensor], heads: int, angles: Tensor | None = None) -> Tensor:
    """Softmax attention one head at a time; angles (S, D/H/2) rotate channel pairs as complex numbers."""
    w = tensors
    dim = x.shape[-1]
    q, k, v = (x @ w["qkv.weight"].T + w["qkv.bias"]).split(dim, dim=-1)
    size = dim // heads
    outputs = []
    for head in range(heads):
        qh, kh, vh = (y[..., head * size : (head + 1) * size] for y in (q, k, v))
        if angles is not None:
            turn = torch.polar(torch.ones_like(angles), angles)
            qh, kh = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
                for y in (qh, kh)
            )
        scores = qh @ kh.transpose(-1, -2) / math.sqrt(size)
        outputs.append(torch.softmax(scores, dim=-1) @ vh)
    return torch.cat(outputs, dim=-1) @ w["out.weight"].T + w["out.bias"]
