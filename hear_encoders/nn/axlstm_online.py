"""AxLSTM a few tokens at a time: the encoder's second form, which `hear_encoders.stream` runs.

A step is small: five tokens in twelve blocks, where weights and memories are read once and little is computed. What
counts is the number of operations and of bytes, and making a view is an operation too. So the weights are folded once,
the state is updated in place, and all room for what is in between is made once for each length of input, with all its
views. `hear_encoders.nn.axlstm` holds the plain form, and the tests hold this one against it.

Letters in shape comments: B streams, S tokens (time steps times the rows of patches, one more where a chunk begins),
D channels of a token, H heads, K channels of a head, I = H * K, P channels that a block-diagonal map takes at once.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hear_encoders.nn.axlstm import (
    BLOCK_NORM_EPS,
    FINAL_NORM_EPS,
    HEAD_NORM_EPS,
    AxLSTMEncoder,
    BlockDiagonal,
    MLSTMBlock,
    merged_blocks,
)
from hear_encoders.nn.mlstm import LOG_WEIGHT_FLOOR, NORMALIZER_EPS
from hear_encoders.nn.patches import patchify

FEW_ROWS = 16
SMALLEST_WEIGHT = math.exp(LOG_WEIGHT_FLOOR[torch.float32])  # of a token, relative to the largest


class StepEncoder:
    """An AxLSTM encoder that goes on from where it was, a few columns of patches at a time.

    Attributes:
        state: what it remembers, updated in place: "conv" (blocks, B, kernel - 1, H, K) inputs of the convolutions,
            "memory" (blocks, H, B, K, K + 1) the cell's C with its n as last column, "stabilizer" (blocks, H, B).
    """

    def __init__(self, encoder: AxLSTMEncoder, streams: int) -> None:
        config, device = encoder.config, encoder.cls_token.device
        self.patches = config.patches
        self.patch_weight = encoder.patch_projection.weight.detach().clone()
        self.patch_bias = encoder.patch_projection.bias.detach().clone()
        self.position_table = encoder.position_table.clone()
        self.cls_token = encoder.cls_token.detach().clone()
        self.norm_weight, self.norm_bias = encoder.norm.weight.detach().clone(), encoder.norm.bias.detach().clone()
        self.blocks = [_StepBlock(block) for block in encoder.blocks]
        depth, heads, head_dim = config.depth, config.heads, config.inner_dim // config.heads
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.conv = zeros(depth, streams, config.conv_kernel - 1, heads, head_dim)
        self.memory = zeros(depth, heads, streams, head_dim, head_dim + 1)
        self.stabilizer = zeros(depth, heads, streams)
        self.state_of_block = [
            (conv.flatten(2), memory.flatten(0, 1), stabilizer.view(-1, 1))
            for conv, memory, stabilizer in zip(self.conv, self.memory, self.stabilizer)
        ]
        self.state = {"conv": self.conv, "memory": self.memory, "stabilizer": self.stabilizer}
        self.rooms: dict[int, _Room] = {}

    def reset(self) -> None:
        """Begin a chunk."""
        self.conv.zero_()
        self.memory.zero_()
        self.stabilizer.fill_(-torch.inf)

    def __call__(self, logmel: Tensor, position: int) -> Tensor:
        """Encode columns of one chunk: (B, T * frames of a patch, bands) normalised -> (B, T, rows * D).

        Args:
            position: the first column's place in the chunk; at 0 everything begins anew.
        """
        rows = self.patches.rows
        tokens = F.linear(patchify(logmel, self.patches), self.patch_weight, self.patch_bias)
        tokens += self.position_table[rows * position : rows * position + tokens.shape[1]]
        if position == 0:
            self.reset()
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        batch, length, dim = tokens.shape
        if length not in self.rooms:
            self.rooms[length] = _Room(self.blocks[0], batch, length)
        x, room = tokens.flatten(0, 1), self.rooms[length]  # (B S, D)
        for block, state in zip(self.blocks, self.state_of_block):
            block(x, room, *state)
        x = x.view(batch, length, dim)[:, 1 if position == 0 else 0 :]
        x = F.layer_norm(x, (dim,), self.norm_weight, self.norm_bias, FINAL_NORM_EPS)
        return x.unflatten(1, (-1, rows)).flatten(2)


class _Room:
    """Where a block works on S tokens of each stream, and its views as the block needs them. Blocks take turns."""

    def __init__(self, block: _StepBlock, batch: int, length: int) -> None:
        heads, head_dim, inner, past = block.heads, block.head_dim, block.inner, len(block.taps) - 1
        rows, size, groups = batch * length, block.size, inner // block.size
        empty = partial(torch.empty, dtype=torch.float32, device=block.up.device)

        width = 2 * inner + 2 * heads
        # A product of few rows takes a third less time when it is written column by column.
        self.up = empty(width, rows).T if rows <= FEW_ROWS else empty(rows, width)
        x, self.z, self.gates_of_input = self.up.split([inner, inner, 2 * heads], dim=1)
        self.x = x.unflatten(0, (batch, length))
        seen = empty(batch, past + length, inner)  # inputs of the convolution
        self.past, self.now, self.latest = seen[:, :past], seen[:, past:], seen[:, length:]
        self.shifted = [seen[:, past - ago : past - ago + length] for ago in range(past + 1)]  # latest first
        self.convolved = empty(batch, length, inner)
        self.convolved_rows = self.convolved.view(rows, inner)
        self.y = empty(rows, heads, head_dim)
        self.y_rows = self.y.view(rows, inner)

        self.gates = empty(rows, 2 * heads)
        self.gates_by_stream = self.gates.view(batch, length, 2, heads).permute(2, 3, 0, 1)
        self.gates_by_head = empty(2, heads, batch, length)
        self.input_gate, self.forget_gate = self.gates_by_head.flatten(1, 2)  # (H B, S) each

        # Block-diagonal maps: (groups, rows, P) in, (groups, rows, maps * P) out, then put in order of heads.
        self.convolved_groups = self.convolved_rows.view(rows, groups, size).transpose(0, 1)
        self.x_groups = x.unflatten(1, (groups, size)).transpose(0, 1)
        self.qk_groups, self.v_groups = empty(groups, rows, 2 * size), empty(groups, rows, size)
        qk, v = empty(2, heads, rows, head_dim), empty(heads, rows, head_dim + 1)
        v[..., head_dim] = 1  # sums up the normaliser
        if size <= head_dim:
            self.qk_ordered = self.qk_groups.view(heads, -1, rows, 2, size).permute(3, 0, 2, 1, 4)
            self.v_ordered = self.v_groups.view(heads, -1, rows, size).transpose(1, 2)
            self.qk, self.v_values = qk.unflatten(3, (-1, size)), v[..., :head_dim].unflatten(2, (-1, size))
        else:  # a single group
            self.qk_ordered = self.qk_groups.view(rows, 2, heads, head_dim).permute(1, 2, 0, 3)
            self.v_ordered = self.v_groups.view(rows, heads, head_dim).transpose(0, 1)
            self.qk, self.v_values = qk, v[..., :head_dim]
        self.q, self.k = qk.view(2, heads * batch, length, head_dim)
        self.k_transposed, self.v = self.k.transpose(1, 2), v.view(heads * batch, length, head_dim + 1)

        # The cell: the memory is one more token, the first.
        self.g = empty(heads * batch, 1 + length)
        self.g_of_memory, self.g_of_tokens, self.g_row = self.g[:, :1], self.g[:, 1:], self.g[:, None]
        self.largest = torch.empty_like(self.g), torch.empty(self.g.shape, dtype=torch.int64, device=self.g.device)
        self.largest_of_tokens = self.largest[0][:, 1:]
        self.largest_column = self.largest_of_tokens[:, :, None]
        self.weights = empty(heads * batch, length, 1 + length)
        self.of_memory, self.of_tokens = self.weights[:, :, :1], self.weights[:, :, 1:]
        self.kept, self.written = self.of_memory[:, -1:], self.of_tokens[:, -1, :, None]
        self.scores = empty(heads * batch, length, length)
        self.q_of_memory = torch.empty_like(self.q)
        self.read = empty(heads * batch, length, head_dim + 1)
        self.values, self.normalizer = self.read[..., :head_dim], self.read[..., head_dim]
        self.normalizer_column = self.normalizer[..., None]
        self.h = empty(heads * batch, length, head_dim)


class _StepBlock:
    """`MLSTMBlock` with its weights in the form in which a few tokens need the fewest operations.

    What of the gates depends on v is taken from the block's input, with the expanding matrix.
    """

    def __init__(self, block: MLSTMBlock) -> None:
        inner, dim = block.down.in_features, block.down.out_features
        self.heads, self.inner, self.dim, self.head_dim = block.heads, inner, dim, inner // block.heads
        self.sigmoid_gate = block.input_gate == "sigmoid"
        self.norm = block.norm.weight.detach().clone()
        of_q, of_k, of_v = torch.cat([block.gate_i.weight, block.gate_f.weight]).detach().chunk(3, dim=1)
        up = block.up.weight.detach()
        self.up = torch.cat([up, block.v.fold(of_v).detach() @ up[:inner]]).T  # (D, 2 I + 2 H)
        bias = torch.cat([block.gate_i.bias, block.gate_f.bias]).detach()
        self.up_bias = torch.cat([bias.new_zeros(2 * inner), bias])
        self.taps = list(block.conv.weight.detach().T.flip(0).contiguous())  # (I,) each, latest first
        self.conv_bias = block.conv.bias.detach().clone()
        self.gates = (block.q.fold(of_q) + block.k.fold(of_k)).detach().T.contiguous()  # (I, 2 H)
        blocks, size, _ = block.q.weight.shape
        self.size = inner if blocks % block.heads else size * merged_blocks(blocks, block.heads, size)
        self.qk = torch.cat([_groups(block.q, self.size), _groups(block.k, self.size) * self.head_dim**-0.5], dim=2)
        self.v = _groups(block.v, self.size)
        self.head_norm = block.head_norm.weight.detach().clone().view(self.heads, self.head_dim)
        self.skip = block.skip.detach().clone()
        self.down = block.down.weight.detach().T.contiguous()  # (I, D)

    def __call__(self, x: Tensor, room: _Room, conv: Tensor, memory: Tensor, stabilizer: Tensor) -> None:
        """Add to x, (B S, D), what the block makes of it. The state goes on in place: (B, kernel - 1, I),
        (H B, K, K + 1) and (H B, 1), see `StepEncoder`."""
        normed = F.layer_norm(x, (self.dim,), self.norm, None, BLOCK_NORM_EPS)
        torch.addmm(self.up_bias, normed, self.up, out=room.up)
        room.past.copy_(conv)
        room.now.copy_(room.x)
        convolved = torch.addcmul(self.conv_bias, room.shifted[0], self.taps[0], out=room.convolved)
        for shifted, tap in zip(room.shifted[1:], self.taps[1:]):
            convolved.addcmul_(shifted, tap)
        conv.copy_(room.latest)
        F.silu(convolved, inplace=True)

        torch.addmm(room.gates_of_input, room.convolved_rows, self.gates, out=room.gates)
        room.gates_by_head.copy_(room.gates_by_stream)
        torch.bmm(room.convolved_groups, self.qk, out=room.qk_groups)
        room.qk.copy_(room.qk_ordered)
        torch.bmm(room.x_groups, self.v, out=room.v_groups)
        room.v_values.copy_(room.v_ordered)
        self._cell(room, memory, stabilizer)

        h = F.layer_norm(room.h, (self.head_dim,), eps=HEAD_NORM_EPS).view(self.heads, -1, self.head_dim)
        torch.mul(room.convolved_rows, self.skip, out=room.y_rows)
        room.y.addcmul_(h.transpose(0, 1), self.head_norm)
        room.y_rows.mul_(F.silu(room.z, inplace=True))
        x.addmm_(room.y_rows, self.down)

    def _cell(self, room: _Room, memory: Tensor, stabilizer: Tensor) -> None:
        """The mLSTM cell in its chunkwise form, see `hear_encoders.nn.mlstm`: fills `room.h`."""
        log_i = F.logsigmoid(room.input_gate) if self.sigmoid_gate else room.input_gate
        forgotten = F.logsigmoid(room.forget_gate).cumsum(1)  # (H B, S)
        room.g_of_memory.copy_(stabilizer)
        torch.sub(log_i, forgotten, out=room.g_of_tokens)
        torch.cummax(room.g, 1, out=room.largest)
        weights = torch.sub(room.g_row, room.largest_column, out=room.weights).exp_()  # (H B, S, 1 + S)
        F.threshold_(weights.tril_(1), SMALLEST_WEIGHT, 0.0)  # tril_ takes the future
        m = forgotten.add_(room.largest_of_tokens)
        torch.bmm(room.q, room.k_transposed, out=room.scores).mul_(room.of_tokens)
        torch.mul(room.q, room.of_memory, out=room.q_of_memory)
        torch.bmm(room.scores, room.v, out=room.read).baddbmm_(room.q_of_memory, memory)  # (H B, S, K + 1)
        stabilizer.copy_(m[:, -1:])
        bound = m.neg_().exp_()  # may be infinite: then nothing is read out
        torch.maximum(room.normalizer.abs_(), bound, out=room.normalizer).add_(NORMALIZER_EPS)
        torch.div(room.values, room.normalizer_column, out=room.h)
        room.k.mul_(room.written)
        memory.mul_(room.kept).baddbmm_(room.k_transposed, room.v)


def _groups(projection: BlockDiagonal, size: int) -> Tensor:
    """The map's matrix as matrices of this size on the diagonal, for inputs from the left: (I / P, in, out)."""
    whole = torch.block_diag(*projection.weight.detach())  # (out, in)
    groups = whole.shape[0] // size
    whole = whole.view(groups, size, groups, size)
    return whole.diagonal(dim1=0, dim2=2).permute(2, 1, 0).contiguous()
