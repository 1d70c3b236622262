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

MATMUL_SIZE = 16  # least size at which small matmuls are worth it, measured on a CPU


class BlockDiagonal(nn.Module):
    """Linear map without bias whose matrix has `size` x `size` blocks on its diagonal."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels // size, size, size))  # (blocks, out, in)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        blocks, size, _ = self.weight.shape
        # Matmuls of 4 x 4 are nearly all overhead: several blocks go into one, between them zeros.
        merged = math.gcd(blocks, max(1, MATMUL_SIZE // size))
        weight = self.weight.transpose(1, 2).unflatten(0, (-1, merged))  # (groups, merged, in, out)
        weight = torch.diag_embed(weight.movedim(1, -1), dim1=1, dim2=3)  # (groups, merged, in, merged, out)
        weight = weight.flatten(3).flatten(1, 2)  # (groups, merged * in, merged * out)
        x = x.reshape(batch * length, -1, merged * size).transpose(0, 1)  # (groups, B S, merged * in)
        return (x @ weight).transpose(0, 1).reshape(batch, length, channels)


class CausalConv(nn.Module):
    """Depthwise convolution along the sequence that sees a token and the kernel - 1 before it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        # A few shifted products keep the channels last; conv1d would want them transposed, twice.
        length, kernel = x.shape[1], self.weight.shape[1]
        padded = F.pad(x, (0, 0, kernel - 1, 0))  # (B, kernel - 1 + S, I)
        weight = self.weight.to(x.dtype).T  # (kernel, I)
        y = self.bias.to(x.dtype)
        for tap in range(kernel):
            y = torch.addcmul(y, padded[:, tap : tap + length], weight[tap])
        return y


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
        log_i, log_f = self.gates(q, k, v)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, S, I/H)
        h, _ = mlstm(q, k, v, log_i, log_f, mode=mode, chunk_size=chunk_size)
        h = self.head_norm(h) + self.skip * convolved  # (B, S, I) float32
        return x + self.down(h * F.silu(z))

    def gates(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the input and the forget gate, float32: three (B, S, I) -> two (B, H, S)."""
        with torch.autocast(q.device.type, enabled=False):
            # Both gates in one product, and cat(q, k, v) left where it is: its parts meet their columns.
            weight = torch.cat([self.gate_i.weight, self.gate_f.weight])  # (2 H, 3 I)
            gates = torch.cat([self.gate_i.bias, self.gate_f.bias])
            for part, columns in zip((q, k, v), weight.chunk(3, dim=1)):
                gates = gates + part.to(weight.dtype) @ columns.T  # (B, S, 2 H)
            log_i, forget = gates.transpose(1, 2).chunk(2, dim=1)
            return (F.logsigmoid(log_i) if self.input_gate == "sigmoid" else log_i), F.logsigmoid(forget)


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
        """Initialise as the released code does: small normal projections, gates that begin independent of the input,
        forgetting slowly (bias 3 to 6) and writing evenly (bias near 0)."""
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
