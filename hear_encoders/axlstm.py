"""AxLSTM encoder: blocks around the mLSTM cell (AxLSTM section 2.2, figure 1).

Read top to bottom: block-diagonal projection, causal convolution, head norm, block, encoder.
Letters in shape comments: B chunks, S tokens of the sequence (cls first), D channels of a token,
I = expansion * D channels inside a block, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.config import AxLSTMConfig
from hear_encoders.mlstm import DEFAULT_CHUNK, MLSTMMode, mlstm
from hear_encoders.patches import PatchEncoder

BLOCK_NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


class BlockDiagonal(nn.Module):
    """Linear map without bias whose matrix has `size` x `size` blocks on its diagonal."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels // size, size, size))  # (blocks, out, in)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, self.weight.shape[::2])  # (B, S, blocks, in)
        return torch.einsum("bsni,noi->bsno", blocks, self.weight).flatten(-2)


class CausalConv(nn.Module):
    """Depthwise convolution along the sequence that sees a token and the kernel - 1 before it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        channels, kernel = self.weight.shape
        padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))  # (B, I, kernel - 1 + S)
        return F.conv1d(padded, self.weight[:, None], self.bias, groups=channels).transpose(1, 2)


class HeadNorm(nn.Module):
    """Normalise each head of each step by itself; one weight per channel, no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, h: Tensor) -> Tensor:
        normed = F.layer_norm(h, h.shape[-1:], eps=HEAD_NORM_EPS)  # (B, H, S, I/H)
        return normed.transpose(1, 2).flatten(-2) * self.weight  # (B, S, I)


class MLSTMBlock(nn.Module):
    """One residual block: expand, convolve, remember, gate, project back."""

    def __init__(self, config: AxLSTMConfig) -> None:
        super().__init__()
        inner = config.inner_dim
        self.heads = config.heads
        self.input_gate = config.input_gate
        self.norm = nn.LayerNorm(config.dim, eps=BLOCK_NORM_EPS, bias=False)
        self.up = nn.Linear(config.dim, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.conv_kernel)
        self.q = BlockDiagonal(inner, config.projection_block)
        self.k = BlockDiagonal(inner, config.projection_block)
        self.v = BlockDiagonal(inner, config.projection_block)
        self.gate_i = nn.Linear(3 * inner, config.heads)
        self.gate_f = nn.Linear(3 * inner, config.heads)
        self.head_norm = HeadNorm(inner)
        self.skip = nn.Parameter(torch.empty(inner))
        self.down = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, mode: MLSTMMode = "chunkwise", chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        inner, z = self.up(self.norm(x)).chunk(2, dim=-1)  # each (B, S, I)
        convolved = F.silu(self.conv(inner))
        q, k, v = self.q(convolved), self.k(convolved), self.v(inner)
        log_i, log_f = self.gates(torch.cat([q, k, v], dim=-1))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, S, I/H)
        h, _ = mlstm(q, k, v, log_i, log_f, mode=mode, chunk_size=chunk_size)
        h = self.head_norm(h) + self.skip * convolved  # (B, S, I) float32
        return x + self.down(h * F.silu(z))

    def gates(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the input and forget gates, float32: (B, S, 3 I) -> two (B, H, S)."""
        with torch.autocast(qkv.device.type, enabled=False):
            qkv = qkv.to(self.gate_i.weight.dtype)
            log_i, log_f = self.gate_i(qkv).transpose(1, 2), F.logsigmoid(self.gate_f(qkv)).transpose(1, 2)
            return (F.logsigmoid(log_i) if self.input_gate == "sigmoid" else log_i), log_f


class AxLSTMEncoder(PatchEncoder):
    """Encoder of AxLSTM: see `PatchEncoder` for what goes in and out.

    Attributes:
        mode, chunk_size: how the mLSTM cell is computed (see `mlstm`); the result does not depend on them.
    """

    config: AxLSTMConfig

    def __init__(self, config: AxLSTMConfig) -> None:
        super().__init__(config)
        self.mode: MLSTMMode = "chunkwise"
        self.chunk_size = DEFAULT_CHUNK
        self.blocks = nn.ModuleList(MLSTMBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=FINAL_NORM_EPS)

    def encode(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `PatchEncoder.encode`; `positions` is not needed: the position table is in the tokens."""
        x = self.with_cls(tokens)  # (B, S, D)
        for index, block in enumerate(self.blocks):
            flipped = self.config.flip and index % 2 == 1
            x = x.flip(1) if flipped else x
            x = block(x, self.mode, self.chunk_size)
            x = x.flip(1) if flipped else x
        return self.norm(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the reference does (DESIGN of the papers' code: small normal projections, gates at rest)."""
        config = self.config
        small_std = math.sqrt(2 / (5 * config.dim))
        nn.init.xavier_uniform_(self.patch_projection.weight)
        nn.init.zeros_(self.patch_projection.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        self.norm.reset_parameters()
        for block in self.blocks:
            block.norm.reset_parameters()
            for projection in (block.up, block.q, block.k, block.v):
                nn.init.normal_(projection.weight, std=small_std)
            bound = 1 / math.sqrt(config.conv_kernel)  # torch's default for a depthwise convolution
            nn.init.uniform_(block.conv.weight, -bound, bound)
            nn.init.uniform_(block.conv.bias, -bound, bound)
            nn.init.zeros_(block.gate_i.weight)
            nn.init.normal_(block.gate_i.bias, std=0.1)
            nn.init.zeros_(block.gate_f.weight)
            block.gate_f.bias.copy_(torch.linspace(3.0, 6.0, config.heads))
            nn.init.ones_(block.head_norm.weight)
            nn.init.ones_(block.skip)
            nn.init.normal_(block.down.weight, std=2 / math.sqrt(config.dim))
