"""Transformer encoders: transformer++ blocks (AudioMAE++) and plain blocks (MAE, SSAST).

Read top to bottom: rotary positions, attention, feed-forward layers, blocks, encoder.
Letters in shape comments: B segments, S tokens of the sequence (cls first), H heads, D channels of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.config import TransformerConfig
from hear_encoders.nn.patches import PatchEncoder

NORM_EPS = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision; leave float32 and float64 alone. Norms and gates never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SequenceRotary(nn.Module):
    """Angles by each patch's place in the segment's sequence of patches, counted from 1; cls, at 0, does not turn.

    The frequencies are part of the checkpoint, because released checkpoints store them in every block.
    """

    frequencies: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", rotary_frequencies(head_dim // 2))

    def forward(self, length: int, positions: Tensor | None) -> Tensor:
        if positions is None:
            return torch.arange(length, device=self.frequencies.device)[:, None] * self.frequencies  # (S, pairs)
        return (F.pad(positions + 1, (1, 0))[..., None] * self.frequencies)[:, None]  # (B, 1, S, pairs)


class PatchRotary(nn.Module):
    """Angles by each patch's true row and step, in any order and for any subset.

    As in the sin-cos table, the first half of the channel pairs turns by row and the second half by step. Rows and
    steps count from 1, so that the cls token, at 0, does not turn.
    """

    frequencies: Tensor

    def __init__(self, head_dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("frequencies", rotary_frequencies(head_dim // 4), persistent=False)

    def forward(self, length: int, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = torch.arange(length - 1, device=self.frequencies.device)[None]
        row_angles = (positions % self.rows + 1)[..., None] * self.frequencies
        step_angles = (positions // self.rows + 1)[..., None] * self.frequencies
        angles = torch.cat([row_angles, step_angles], dim=-1)  # (B, S - 1, pairs)
        return F.pad(angles, (0, 0, 1, 0))[:, None]  # (B, 1, S, pairs)


def rotary_frequencies(pairs: int) -> Tensor:
    """Return frequencies 10000^(-j/pairs) for j = 0..pairs-1, float32."""
    return (10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channel pairs (2j, 2j+1) of x (B, H, S, D/H) by angles (..., S, D/H/2) (RoFormer section 3.4.2)."""
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, scale 1 / sqrt(head size), biases everywhere."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.rotary: nn.Module | None = None
        if config.rope == "sequence":
            self.rotary = SequenceRotary(config.dim // config.heads)
        elif config.rope == "patch":
            self.rotary = PatchRotary(config.dim // config.heads, config.patches.rows)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, S, D/H)
        if self.rotary is not None:
            angles = self.rotary(length, positions)
            q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, S, D/H)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    """Linear d -> 4d, activation, Linear 4d -> d."""

    def __init__(self, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.activation = activation
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward with a norm inside: out( norm( silu(gate(x)) * value(x) ) ), hidden int(4 d * 2/3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(4 * dim * 2 / 3)
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Widened before the product, which may exceed the range of float16.
        hidden = F.silu(at_least_float32(self.gate(x))) * at_least_float32(self.value(x))
        return self.out(self.norm(hidden))


class PlainBlock(nn.Module):
    """Pre-norm transformer block of the baselines: attention, then MLP with GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mlp = MLP(config.dim, nn.GELU())

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class TransformerPlusPlusBlock(nn.Module):
    """Macaron block: half an MLP, attention, SwiGLU (AudioMAE++ equations 1-3, figure 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mlp = MLP(config.dim, nn.SiLU())
        self.norm2 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config)
        # The released code's last step reuses norm2; its norm3 exists and is never used.
        self.norm3 = nn.LayerNorm(config.dim, eps=NORM_EPS) if config.swiglu_norm == "own" else None
        self.swiglu = SwiGLU(config.dim)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = torch.add(x, self.mlp(self.norm1(x)), alpha=0.5)
        x = x + self.attention(self.norm2(x), positions)
        norm = self.norm2 if self.norm3 is None else self.norm3
        return x + self.swiglu(norm(x))


class TransformerEncoder(PatchEncoder):
    """The encoder of AudioMAE++, MAE or SSAST; see `PatchEncoder` for its input and output."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.position_table == "none":
            self.position_table.zero_()
        block = TransformerPlusPlusBlock if config.family == "audiomaepp" else PlainBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

    def run_block(self, number: int, block: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
        return block(x, positions)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as the released code does: xavier-uniform linears, zero biases, cls normal with std 0.02."""
        initialize_transformer(self)
        nn.init.normal_(self.cls_token, std=0.02)


@torch.no_grad()
def initialize_transformer(module: nn.Module) -> None:
    """Initialize all linears of a module xavier-uniform with zero bias, and its norms as the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
