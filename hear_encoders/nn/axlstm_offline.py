"""AxLSTM, whole segments at a time on a CPU: the form that `hear_encoders.execution` runs in float32 and bfloat16.

Between matmuls this small, memory traffic dominates. So this form makes few passes over little memory: a few segments
go through a block together, as many as fit in the cores' caches; tokens lie time step by time step, so that each head
is a view; buffers are reused; and since a segment is short, its parts look back at all earlier tokens instead of
carrying a memory C.

The cell scales keys instead of weighting pairs of tokens, as `hear_encoders.nn.mlstm_segment` explains. Only if the
gates are so extreme that float32 cannot hold the scales of a whole segment are the weights computed pair by pair.

In bfloat16 the tokens inside a block and all large products are bfloat16. The residual stream, the gates with their
running sums, and the normalizer stay float32.

Letters in shape comments: N segments that go through a block together, S tokens of a segment (cls first), D channels
of a token, H heads, K channels of a head, I = H * K, P channels of a merged map, L tokens of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hear_encoders.nn.axlstm import BLOCK_NORM_EPS, HEAD_NORM_EPS, AxLSTMEncoder
from hear_encoders.nn.axlstm_folded import FoldedAxLSTM, FoldedBlock
from hear_encoders.nn.mlstm import LOG_WEIGHT_FLOOR, NORMALIZER_EPS
from hear_encoders.nn.mlstm_segment import MAX_LOG_RANGE, MIN_LOG_SCALE, PART_TOKENS, cut_into_parts

SEGMENT_TOKENS = 512  # tokens of the N segments, per thread; measured on CPUs of two cores, see docs/performance.md


class OfflineEncoder:
    """An AxLSTM encoder in this form. Call it as the encoder itself, without gradients.

    Args:
        encoder: float32 on the CPU.
        folded: its weights from `FoldedAxLSTM.of`, in the dtype to compute in.
    """

    def __init__(self, encoder: AxLSTMEncoder, folded: FoldedAxLSTM) -> None:
        self._encoder, self._folded = encoder, folded
        self._config = encoder.config

    def __call__(self, logmel: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Encode normalized log-mel segments: (B, frames, bands) -> (B, tokens, D), or (B, tokens, layers * D)."""
        tokens = self._encoder.with_cls(self._encoder.embed(logmel))  # (B, S, D)
        batch, length, _ = tokens.shape
        together = max(1, SEGMENT_TOKENS * torch.get_num_threads() // length)
        parts = tokens.tensor_split(-(-batch // together))
        if layers is None:
            return self._encoder.norm(torch.cat([self._encode(part, [self._config.depth]) for part in parts]))[:, 1:]
        return torch.cat([self._encode(part, layers) for part in parts])[:, 1:]

    def _encode(self, tokens: Tensor, layers: Sequence[int]) -> Tensor:
        """Run the blocks up to the last of these layers: (N, S, D) -> (N, S, layers * D)."""
        segments, length, dim = tokens.shape
        x = tokens.transpose(0, 1).flatten(0, 1).clone()  # (S N, D)
        workspace = _Workspace(self._config.heads, self._folded, segments, length)
        sigmoid_gate = self._config.input_gate == "sigmoid"
        outputs = {}
        for index, block in enumerate(self._folded.blocks[: max(layers)]):
            flipped = self._config.flip and index % 2 == 1
            x = x.view(length, -1).flip(0).view(-1, dim) if flipped else x
            _add_block(x, block, workspace, sigmoid_gate)
            x = x.view(length, -1).flip(0).view(-1, dim) if flipped else x
            if index + 1 in layers:
                outputs[index + 1] = x.clone() if index + 1 < max(layers) else x  # blocks work in place
        x = torch.cat([outputs[layer] for layer in layers], dim=1) if len(layers) > 1 else x
        return x.view(length, segments, -1).transpose(0, 1)


def _add_block(x: Tensor, block: FoldedBlock, workspace: _Workspace, sigmoid_gate: bool) -> None:
    """Add a block's output to x, (S N, D)."""
    wide_u = F.layer_norm(x, x.shape[1:], block.norm, None, BLOCK_NORM_EPS)
    u = wide_u.to(workspace.x.dtype)
    torch.mm(u, block.up_x.T, out=workspace.x)
    c = torch.addcmul(block.conv_bias, workspace.shifted[0], block.taps[0], out=workspace.c)
    for shifted, tap in zip(workspace.shifted[1:], block.taps[1:]):
        c.addcmul_(shifted, tap)
    F.silu(c, inplace=True)

    # Few rows by many columns: transposed, the product takes three times as long. float64, because sums over a segment
    # may be large and their differences matter.
    gates = torch.mm(block.gates_of_u, wide_u.T).addmm_(block.gates_of_c, c.float().T)
    gates = gates.double().add_(block.gate_bias[:, None])
    gates = gates.view(2, workspace.heads, workspace.length, -1).permute(0, 3, 1, 2).flatten(1, 2)  # (2, N H, S)
    torch.bmm(workspace.x_groups, block.x_to_v, out=workspace.mapped)
    workspace.v_groups.copy_(workspace.mapped)
    torch.bmm(workspace.c_groups, block.c_to_k, out=workspace.mapped)
    _run_cell(workspace, F.logsigmoid(gates[0]) if sigmoid_gate else gates[0], F.logsigmoid(gates[1]))

    h = F.layer_norm(workspace.h, workspace.h.shape[2:], eps=HEAD_NORM_EPS).flatten(1)  # (S N, I)
    z = torch.mm(u, block.up_z.T, out=workspace.z)
    y = c.mul_(block.skip).addcmul_(h, block.head_norm).mul_(F.silu(z, inplace=True))
    if x.dtype is y.dtype:
        torch.addmm(x, y, block.down.T, out=x)
    else:
        x += y @ block.down.T


def _run_cell(workspace: _Workspace, log_i: Tensor, log_f: Tensor) -> None:
    """Run the mLSTM cell in its parallel form, part by part (see `hear_encoders.nn.mlstm`): c, mapped and v become h.

    Args:
        log_i, log_f: (N H, S) logarithms of the gates, float64.
    """
    forgotten = log_f.cumsum(1)
    g = log_i - forgotten
    largest = g.cummax(1).values
    lowest, highest = largest[:, :1], largest[:, -1:]
    in_range = bool((highest - lowest).max() < MAX_LOG_RANGE)
    # Weights at token t are relative to this, and so is everything the normalizer is compared with.
    base = (lowest + highest) / 2 if in_range else largest
    bound = (forgotten + base).neg_().exp_().float()  # may be infinite: then h is zero
    eps = (largest - base).exp_().mul_(NORMALIZER_EPS).float()
    workspace.k_groups.copy_(workspace.mapped)
    if in_range:
        scale = F.threshold(g - base, MIN_LOG_SCALE, -torch.inf).exp_()  # (N H, S)
        scale = scale.T.reshape(-1, workspace.heads, 1)  # (S N, H, 1)
        workspace.k_heads.mul_(scale.to(workspace.k_heads.dtype))
    for begin, end, q, keys, v, h, scores in workspace.parts:
        torch.bmm(q, keys, out=scores)  # (N H, L, tokens so far)
        if not in_range:
            # The floor prevents denormal numbers. Only the future lies above 0, and tril_ removes it.
            log_weights = (g[:, None, :end] - base[:, begin:end, None]).float()
            scores.mul_(log_weights.clamp_(LOG_WEIGHT_FLOOR[torch.float32], 0.0).exp_())
        scores[:, :, begin:].tril_()
        totals = scores.sum(2, dtype=torch.float32)
        normalizer = torch.maximum(totals.abs_(), bound[:, begin:end]).add_(eps[:, begin:end]).to(h.dtype)
        torch.div(scores @ v, normalizer[:, :, None], out=h)


class _Workspace:
    """The buffers of a block, and its views of them. Blocks take turns; h reuses x's memory, and z reuses v's."""

    def __init__(self, heads: int, folded: FoldedAxLSTM, segments: int, length: int) -> None:
        inner, size = folded.blocks[0].skip.numel(), folded.map_size
        head_dim, tokens = inner // heads, length * segments
        past = segments * (len(folded.blocks[0].taps) - 1)
        empty = partial(torch.empty, dtype=folded.blocks[0].up_x.dtype, device="cpu")
        self.heads, self.length = heads, length

        def by_head(x: Tensor) -> Tensor:  # (S N, I) -> (N H, S, K)
            return x.view(length, segments * heads, head_dim).transpose(0, 1)

        def by_group(x: Tensor) -> Tensor:  # (S N, I) -> (I / P, S N, P)
            return x.view(tokens, -1, size).transpose(0, 1)

        padded = empty(past + tokens, inner)  # the convolution's input, after zeros for the time before it
        padded[:past] = 0
        self.shifted = [padded[past - ago : past - ago + tokens] for ago in range(0, past + 1, segments)]
        self.x, self.c, k, v = padded[past:], empty(tokens, inner), empty(tokens, inner), empty(tokens, inner)
        self.z = v
        self.x_groups, self.c_groups, self.k_groups, self.v_groups = map(by_group, (self.x, self.c, k, v))
        self.mapped = empty(inner // size, tokens, size)
        self.h, self.k_heads = (x.view(-1, heads, head_dim) for x in (self.x, k))

        q, keys, v, h = by_head(self.c), by_head(k).mT, by_head(v), by_head(self.x)
        self.parts = []
        for begin, end in cut_into_parts(length, PART_TOKENS):
            scores = empty(segments * heads, end - begin, end)
            self.parts.append((begin, end, q[:, begin:end], keys[:, :, :end], v[:, :end], h[:, begin:end], scores))
