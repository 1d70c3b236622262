"""The released algorithm's plan of computation: the baseline of `embed.py`.

The released code of both papers embeds a batch of clips as follows. This file implements it again in plain torch, from
a description of that code, with the weights of one of our encoders, so that both compute the same function:

- normalize the log-mel, then pad it with zero frames to the next multiple of a 2 s segment, by a full segment if it is
  a multiple already;
- encode one 2 s segment after the other, for all clips of the batch together;
- compute attention with an explicit softmax over the S x S matrix, and the mLSTM cell in parallel form, with a separate
  eager operation for each S x S matrix;
- regroup the tokens as the released code does, drop the padding's steps, space timestamps evenly.

The baseline is meant to be fair: it runs in inference mode with the same front end as ours, and nothing is slower than
the plan requires. In half precision it runs under autocast, with float32 gates and cell weights, as ours does.

It shares only the weights' names, the position table and the log-mel front end with `hear_encoders`, so that it stays
the same when the encoders change.

Letters in shape comments: B clips, F frames, S tokens in the sequence (cls first), D channels per token, I channels
inside an mLSTM block, H heads, T time steps, R rows of bands, E embedding size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from hear_encoders.config import AxLSTMConfig, PatchConfig, TransformerConfig
from hear_encoders.nn.build import Encoder
from hear_encoders.nn.frontend import SAMPLE_RATE, LogMel
from hear_encoders.nn.patches import sincos_2d

Weights = dict[str, Tensor]  # name -> parameter, for one block or the whole encoder

BLOCK_NORM_EPS = 1e-5  # the mLSTM block's two norms
NORM_EPS = 1e-6  # all other norms
STD_OFFSET = 1e-8
CELL_EPS = 1e-6


class ReleasedPlan:
    """Embed waveforms as the released code does, with the weights of one of our encoders.

    Args:
        encoder: any encoder without rotary positions. Its weights are shared, not copied.
        dtype: dtype of the matmuls; in half precision the encoder runs under autocast.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype = torch.float32) -> None:
        self.config = encoder.config
        if isinstance(self.config, TransformerConfig) and self.config.rope != "none":
            raise ValueError(f"the released plan supports only rope = 'none', got {self.config.rope!r}")
        # Not a state_dict: autocast would convert its detached tensors again for each segment.
        self.weights: Weights = dict(encoder.named_parameters())
        self.blocks: list[Weights] = [{} for _ in range(self.config.depth)]
        for name, weight in self.weights.items():
            if name.startswith("blocks."):
                _, number, inner = name.split(".", 2)
                self.blocks[int(number)][inner] = weight
        patches, device = self.config.patches, encoder.cls_token.device
        self.device, self.dtype = device, dtype
        self.log_mel = LogMel().to(device)
        self.position_table = sincos_2d(patches, self.config.dim).to(device)
        length = 1 + patches.patches
        self.causal = torch.ones(length, length, dtype=torch.bool, device=device).tril_()  # built once, as released

    @torch.inference_mode()
    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """(B, samples) at 16 kHz -> embeddings (B, T, E), timestamps (B, T) in milliseconds."""
        patches = self.config.patches
        logmel = self.log_mel(audio)  # (B, F, bands)
        mean = logmel.mean(dim=(1, 2), keepdim=True)
        logmel = (logmel - mean) / (logmel.std(dim=(1, 2), keepdim=True) + STD_OFFSET)
        padding = patches.chunk_frames - logmel.shape[1] % patches.chunk_frames  # a full segment if it fits already
        logmel = F.pad(logmel, (0, 0, 0, padding))

        full = self.dtype is torch.float32
        with nullcontext() if full else torch.autocast(self.device.type, dtype=self.dtype):
            segments = [self.encode_segment(frames) for frames in logmel.split(patches.chunk_frames, dim=1)]
        embeddings = torch.cat(segments, dim=1)  # (B, segments * steps, E)
        dropped = int(patches.steps * padding / patches.chunk_frames)
        embeddings = embeddings[:, : embeddings.shape[1] - dropped].float()

        batch, steps, _ = embeddings.shape
        step_ms = 1000 * audio.shape[1] / SAMPLE_RATE / steps
        timestamps = (step_ms * torch.arange(steps, dtype=torch.float64)).float().to(audio.device)
        return embeddings, timestamps.repeat(batch, 1)

    def encode_segment(self, frames: Tensor) -> Tensor:
        """Encode one full segment per clip: (B, frames, bands) -> (B, steps, E), in the released order of tokens."""
        patches = self.config.patches
        tokens = linear(patchify(frames, patches), self.weights, "patch_projection") + self.position_table
        cls = self.weights["cls_token"].to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        x = torch.cat([cls, tokens], dim=1)  # (B, S, D)
        for index, block in enumerate(self.blocks):
            if isinstance(self.config, AxLSTMConfig):
                flipped = self.config.flip and index % 2 == 1
                x = x.flip(1) if flipped else x
                x = mlstm_block(x, block, self.config, self.causal)
                x = x.flip(1) if flipped else x
            elif self.config.family == "audiomaepp":
                x = transformer_plus_plus_block(x, block, self.config.heads)
            else:
                x = plain_block(x, block, self.config.heads)
        tokens = layer_norm(x, self.weights, "norm")[:, 1:]  # (B, N, D)
        # The released code treats the time-major tokens as band-major: step j is tokens j, 50 + j, 100 + j, ...
        grid = tokens.unflatten(1, (patches.rows, patches.steps))  # (B, R, T, D)
        return grid.transpose(1, 2).flatten(2)  # (B, T, R * D)


def patchify(frames: Tensor, patches: PatchConfig) -> Tensor:
    """Cut frames into time-major patches: (B, frames, bands) -> (B, N, values per patch)."""
    grid = frames.unflatten(2, (patches.rows, patches.patch_bands)).unflatten(1, (patches.steps, patches.patch_frames))
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = NORM_EPS) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), eps)


# ---------------------------------------------------------------------------------------------------------
# Transformers


def attention(x: Tensor, weights: Weights, heads: int) -> Tensor:
    """Multi-head self-attention with an explicit S x S matrix and softmax."""
    batch, length, dim = x.shape
    qkv = linear(x, weights, "attention.qkv").view(batch, length, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, S, D/H)
    scores = q @ k.transpose(-2, -1) / math.sqrt(dim // heads)  # (B, H, S, S)
    mixed = scores.softmax(dim=-1) @ v  # (B, H, S, D/H)
    return linear(mixed.transpose(1, 2).reshape(batch, length, dim), weights, "attention.out")


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    hidden = F.silu(linear(x, weights, "swiglu.gate")) * linear(x, weights, "swiglu.value")
    return linear(layer_norm(hidden, weights, "swiglu.norm"), weights, "swiglu.out")


def transformer_plus_plus_block(x: Tensor, weights: Weights, heads: int) -> Tensor:
    """Half an MLP, attention, SwiGLU. Without a norm3, norm2 is used twice."""
    hidden = F.silu(linear(layer_norm(x, weights, "norm1"), weights, "mlp.up"))
    x = x + 0.5 * linear(hidden, weights, "mlp.down")
    x = x + attention(layer_norm(x, weights, "norm2"), weights, heads)
    last_norm = "norm3" if "norm3.weight" in weights else "norm2"
    return x + swiglu(layer_norm(x, weights, last_norm), weights)


def plain_block(x: Tensor, weights: Weights, heads: int) -> Tensor:
    """Attention, then an MLP with GELU."""
    x = x + attention(layer_norm(x, weights, "norm1"), weights, heads)
    hidden = F.gelu(linear(layer_norm(x, weights, "norm2"), weights, "mlp.up"))
    return x + linear(hidden, weights, "mlp.down")


# ---------------------------------------------------------------------------------------------------------
# AxLSTM


def mlstm_block(x: Tensor, weights: Weights, config: AxLSTMConfig, causal: Tensor) -> Tensor:
    """Expand, convolve, mix with the mLSTM cell, gate, project back."""
    heads = config.heads
    up = linear(layer_norm(x, weights, "norm", BLOCK_NORM_EPS), weights, "up")
    inner, z = up.chunk(2, dim=-1)  # each (B, S, I)
    convolved = F.silu(causal_conv(inner, weights["conv.weight"], weights["conv.bias"]))
    q = headwise(convolved, weights["q.weight"])
    k = headwise(convolved, weights["k.weight"])
    v = headwise(inner, weights["v.weight"])  # (B, S, I)
    qkv = torch.cat([q, k, v], dim=-1)
    log_i = linear(qkv, weights, "gate_i").float().transpose(1, 2)  # (B, H, S)
    if config.input_gate == "sigmoid":
        log_i = F.logsigmoid(log_i)
    log_f = F.logsigmoid(linear(qkv, weights, "gate_f").float().transpose(1, 2))
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, S, I/H)
    h = parallel_mlstm(q, k, v, log_i, log_f, causal)
    h = head_norm(h, weights["head_norm.weight"]) + weights["skip"] * convolved
    return x + linear(h * F.silu(z), weights, "down")


def parallel_mlstm(q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, causal: Tensor) -> Tensor:
    """The mLSTM cell in parallel form: q, k, v (B, H, S, I/H), log gates (B, H, S) -> (B, H, S, I/H).

    Each operation creates another float32 matrix (B, H, S, S), except those commented with a smaller shape.
    """
    cumulative = log_f.cumsum(-1)  # (B, H, S)
    log_decay = cumulative[..., :, None] - cumulative[..., None, :]  # [t, s]: log of the decay from s to t
    log_decay = torch.where(causal, log_decay, -torch.inf)
    log_weights = log_decay + log_i[..., None, :]
    largest = log_weights.amax(-1, keepdim=True)  # (B, H, S, 1)
    log_weights = log_weights - largest
    weights = log_weights.exp()
    k = k / math.sqrt(k.shape[-1])  # (B, H, S, I/H)
    scores = q @ k.transpose(-2, -1)
    scores = scores * weights
    normalizer = torch.maximum(scores.sum(-1, keepdim=True).abs(), (-largest).exp())  # (B, H, S, 1)
    scores = scores / (normalizer + CELL_EPS)
    return scores.to(v.dtype) @ v  # (B, H, S, I/H)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution over each token and those before it: (B, S, I) -> (B, S, I).

    The convolution pads both ends; the outputs past the last token are cut off.
    """
    channels, kernel = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=kernel - 1, groups=channels)
    return y[..., : x.shape[1]].transpose(1, 2)


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal projection: x (B, S, I), weight (blocks, out, in)."""
    return torch.einsum("bsni,noi->bsno", x.unflatten(-1, weight.shape[::2]), weight).flatten(-2)


def head_norm(h: Tensor, weight: Tensor) -> Tensor:
    """Group norm with one group per head: (B, H, S, I/H) -> (B, S, I)."""
    batch, heads, length, _ = h.shape
    rows = h.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * S, I)
    return F.group_norm(rows, heads, weight, eps=BLOCK_NORM_EPS).unflatten(0, (batch, length))
