"""AxLSTM encoder: blocks around the mLSTM cell (AxLSTM section 2.2, figure 1).

Read top to bottom: block-diagonal projection, causal convolution, head norm, block, encoder.
Letters in shape comments: B segments, S tokens of the sequence (cls first), D channels of a token,
I = expansion * D channels inside a block, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hear_encoders.config import AxLSTMConfig
from hear_encoders.nn.mlstm import DEFAULT_CHUNK, MLSTMMode, mlstm
from hear_encoders.nn.mlstm_segment import mlstm_segment
from hear_encoders.nn.patches import PatchEncoder

BLOCK_NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6

EncoderMode = Literal["auto", "parallel", "chunkwise", "recurrent"]

MATMUL_SIZE = 16  # the least size at which small matmuls pay off, measured on a CPU


class BlockDiagonal(nn.Module):
    """A linear map without bias, whose matrix has `size` x `size` blocks on its diagonal; see `project_to_heads`."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels // size, size, size))  # (blocks, out, in)

    def fold(self, after: Tensor) -> Tensor:
        """Return the matrix that applies this map and then `after`: (outputs, I) -> (outputs, I)."""
        # Elementwise with the many small blocks last: thousands of 4 x 4 matmuls take three times as long.
        after = after.unflatten(1, self.weight.shape[:2]).mT.contiguous()  # (outputs, out, blocks)
        weight = self.weight.permute(1, 2, 0).contiguous()  # (out, in, blocks)
        return (after[:, :, None] * weight).sum(1).mT.flatten(1)


def merged_blocks(blocks: int, heads: int, size: int) -> int:
    """Return how many blocks of a block-diagonal map to merge into one matmul: 4 x 4 is nearly all overhead.

    Merged blocks stay within one head, unless a single block already spans two.
    """
    return math.gcd(blocks if blocks % heads else blocks // heads, max(1, MATMUL_SIZE // size))


def project_to_heads(x: Tensor, weights: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Apply block-diagonal maps to one input and split each into heads: (B, S, I) -> (B, H, S, I/H), contiguous.

    Args:
        weights: (blocks, out, in) each.
    """
    batch, length, _ = x.shape
    weight = torch.stack(list(weights), dim=1)  # (blocks, maps, out, in)
    blocks, _, _, size = weight.shape
    aligned = blocks % heads == 0
    merged = merged_blocks(blocks, heads, size)
    weight = weight.unflatten(0, (-1, merged)).permute(0, 4, 2, 3, 1)  # (groups, in, maps, out, merged)
    weight = torch.diag_embed(weight, dim1=1, dim2=4)  # zeros between: (groups, merged, in, maps, merged, out)
    weight = weight.flatten(3).flatten(1, 2)  # (groups, merged * in, maps * merged * out)
    x = x.reshape(batch * length, -1, merged * size).transpose(0, 1)  # (groups, B S, merged * in)
    y = (x @ weight).unflatten(2, (len(weights), -1)).unflatten(1, (batch, length))
    if not aligned:  # some blocks span two heads: order the channels first
        y = y.permute(3, 1, 2, 0, 4).flatten(3).unflatten(3, (heads, -1))  # (maps, B, S, H, I/H)
        return [part.transpose(1, 2).contiguous() for part in y]
    y = y.unflatten(0, (heads, -1))  # (H, groups of a head, B, S, maps, merged * out)
    return [part.permute(2, 0, 3, 1, 4).flatten(3) for part in y.unbind(4)]


class CausalConv(nn.Module):
    """Depthwise convolution along the sequence: each token sees itself and the kernel - 1 tokens before it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _CausalProducts.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _CausalProducts(torch.autograd.Function):
    """The convolution as a sum of shifted products. Channels stay last; conv1d would transpose them.

    The gradient is written by hand: with autograd, each shift costs a tensor of zeros as large as the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        length, (now, *past) = x.shape[1], weight.T.contiguous().flip(0)  # (I,) each, latest first
        y = torch.addcmul(bias, x, now)
        for ago, tap in enumerate(past[: length - 1], start=1):
            y[:, ago:].addcmul_(x[:, :-ago], tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length, (now, *past) = x.shape[1], weight.T.contiguous().flip(0)
        grad_x = grad_y * now
        grad_weight = torch.zeros_like(weight)  # (I, kernel); taps before the beginning have no gradient
        grad_weight[:, -1] = (grad_y * x).sum((0, 1))
        for ago, tap in enumerate(past[: length - 1], start=1):
            grad_x[:, :-ago].addcmul_(grad_y[:, ago:], tap)
            grad_weight[:, -1 - ago] = (grad_y[:, ago:] * x[:, :-ago]).sum((0, 1))
        return grad_x, grad_weight, grad_y.sum((0, 1))


class HeadNorm(nn.Module):
    """Normalize each head of each token separately; one weight per channel, no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        """Normalize h and add the skip connection: (B, H, S, I/H), (B, S, I) -> (B, S, I)."""
        normed = F.layer_norm(h, h.shape[-1:], eps=HEAD_NORM_EPS).transpose(1, 2)  # (B, S, H, I/H)
        weight = self.weight.unflatten(0, normed.shape[2:])
        return torch.addcmul(skip.unflatten(2, normed.shape[2:]), normed, weight).flatten(2)


class MLSTMBlock(nn.Module):
    """One residual block: expand, convolve, remember, gate, project back (AxLSTM figure 1)."""

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

    def forward(self, x: Tensor, mode: EncoderMode = "auto", chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        normed, (up_x, up_z) = self.norm(x), self.up.weight.chunk(2)
        inner, z = F.linear(normed, up_x), F.linear(normed, up_z)  # each (B, S, I)
        convolved = F.silu(self.conv(inner))
        (v,) = project_to_heads(inner, [self.v.weight], self.heads)  # (B, H, S, I/H)
        log_i, log_f = self.gates(convolved, inner)
        h = None
        if mode == "auto" and self._trains_on_cpu(x):
            with torch.autocast("cpu", enabled=False):
                # Only the products of queries and keys matter: q_t . k_s = c_t . (Wq^T Wk) c_s.
                c_to_k = self.q.weight.mT @ self.k.weight
            (k,) = project_to_heads(convolved, [c_to_k], self.heads)
            h = mlstm_segment(convolved.unflatten(2, (self.heads, -1)).transpose(1, 2), k, v, log_i, log_f)
        if h is None:
            q, k = project_to_heads(convolved, [self.q.weight, self.k.weight], self.heads)
            cell_mode: MLSTMMode = "chunkwise" if mode == "auto" else mode
            h, _ = mlstm(q, k, v, log_i, log_f, mode=cell_mode, chunk_size=chunk_size, want_state=False)
        h = self.head_norm(h, self.skip * convolved.to(h.dtype))  # (B, S, I) float32
        return x + self.down(h * F.silu(z))

    def _trains_on_cpu(self, x: Tensor) -> bool:
        """Return whether `mlstm_segment` applies: on a CPU, with gradients, and if no block spans two heads."""
        return (
            type(x) is Tensor  # not one without values, as FLOP counters use
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.q.weight.shape[0] % self.heads == 0
            and not torch.compiler.is_compiling()
        )

    def gates(self, convolved: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logarithms of the input and forget gates, float32: two (B, S, I) -> two (B, H, S).

        The gates are linear in cat(q, k, v), and q, k and v are linear in the convolution's output and input. So the
        matrices are multiplied first: that is less work, and q, k and v need not be concatenated.
        """
        with torch.autocast(inner.device.type, enabled=False):
            weight = torch.cat([self.gate_i.weight, self.gate_f.weight])  # (2 H, 3 I)
            bias = torch.cat([self.gate_i.bias, self.gate_f.bias])
            for_q, for_k, for_v = weight.chunk(3, dim=1)
            gates = F.linear(convolved.to(weight.dtype), self.q.fold(for_q) + self.k.fold(for_k), bias)
            gates = gates + F.linear(inner.to(weight.dtype), self.v.fold(for_v))  # (B, S, 2 H)
            log_i, forget = gates.transpose(1, 2).chunk(2, dim=1)
            return (F.logsigmoid(log_i) if self.input_gate == "sigmoid" else log_i), F.logsigmoid(forget)


class AxLSTMEncoder(PatchEncoder):
    """The AxLSTM encoder; see `PatchEncoder` for its input and output.

    Attributes:
        mode: how to compute the mLSTM cell. "auto" selects the fastest form, here and in `hear_encoders.execution`;
            the others are the plain forms, see `mlstm`. It does not change the result.
        chunk_size: tokens per chunk of the chunkwise cell; it does not change the result.
        built_shapes: the shape of each parameter when the encoder was built; adapters and the like change them.
    """

    config: AxLSTMConfig

    def __init__(self, config: AxLSTMConfig) -> None:
        super().__init__(config)
        self.mode: EncoderMode = "auto"
        self.chunk_size = DEFAULT_CHUNK
        self.blocks = nn.ModuleList(MLSTMBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=FINAL_NORM_EPS)
        self.built_shapes = {name: parameter.shape for name, parameter in self.named_parameters()}

    def run_block(self, number: int, block: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
        """Run one block; `positions` has no effect, since the tokens contain them."""
        flipped = self.config.flip and number % 2 == 0
        x = x.flip(1) if flipped else x
        x = block(x, self.mode, self.chunk_size)
        return x.flip(1) if flipped else x

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as the released code does: small normal projections, and gates that start independent of the
        input, forget slowly (bias 3 to 6) and write evenly (bias near 0)."""
        config = self.config
        small_std = math.sqrt(2 / (5 * config.dim))
        nn.init.xavier_uniform_(self.patch_projection.weight)
        nn.init.zeros_(self.patch_projection.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        self.norm.reset_parameters()
        for block in cast("list[MLSTMBlock]", self.blocks):
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
