"""AxLSTM, a few tokens at a time: the form that `hear_encoders.stream` runs.

A time step is small: five tokens in twelve blocks, where weights and memories are read once and little is computed.
The number of operations and of bytes decides the speed, and creating a view is an operation too. So the folded weights
are copied once into the layout they are read in, the state is updated in place, and all buffers and their views are
made once for each input length. `hear_encoders.nn.axlstm` is the plain form, with which the tests compare it.

Letters in shape comments: B streams, S tokens (time steps times rows of patches, plus one where a segment begins),
D channels of a token, H heads, K channels of a head, I = H * K, P channels of a merged map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hear_encoders.config import AxLSTMConfig
from hear_encoders.nn.axlstm import BLOCK_NORM_EPS, FINAL_NORM_EPS, HEAD_NORM_EPS, AxLSTMEncoder
from hear_encoders.nn.axlstm_folded import FoldedAxLSTM, FoldedBlock
from hear_encoders.nn.mlstm import LOG_WEIGHT_FLOOR, NORMALIZER_EPS
from hear_encoders.nn.patches import patchify

FEW_ROWS = 16
MIN_WEIGHT = math.exp(LOG_WEIGHT_FLOOR[torch.float32])  # of a token, relative to the largest


class OnlineEncoder:
    """An AxLSTM encoder that continues where it stopped, a few columns of patches at a time.

    Args:
        encoder: the weights are copied.
        streams: B.
        layers: give the outputs of these blocks, as `PatchEncoder.encode` does; later blocks are left out.

    Attributes:
        state: updated in place: "conv" (blocks, B, kernel - 1, H, K), the convolutions' inputs; "folded_memory"
            (blocks, H, B, K, K + 1), the cell's C with its n as the last column, made with folded keys; "stabilizer"
            (blocks, H, B), the cell's m.
    """

    def __init__(self, encoder: AxLSTMEncoder, streams: int, layers: Sequence[int] | None = None) -> None:
        config, device = encoder.config, encoder.cls_token.device
        self._patches = config.patches
        self._patch_weight = encoder.patch_projection.weight.detach().clone()
        self._patch_bias = encoder.patch_projection.bias.detach().clone()
        self._position_table = encoder.position_table.clone()
        self._cls_token = encoder.cls_token.detach().clone()
        self._norm_weight, self._norm_bias = encoder.norm.weight.detach().clone(), encoder.norm.bias.detach().clone()
        self._blocks = [_Block(block, config) for block in FoldedAxLSTM(encoder).blocks]
        self._layers = layers
        depth = config.depth if layers is None else max(layers)
        self._blocks = self._blocks[:depth]
        heads, head_dim = config.heads, config.inner_dim // config.heads
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.state = {
            "conv": zeros(depth, streams, config.conv_kernel - 1, heads, head_dim),
            "folded_memory": zeros(depth, heads, streams, head_dim, head_dim + 1),
            "stabilizer": zeros(depth, heads, streams),
        }
        self._state_of_block = [
            (conv.flatten(2), memory.flatten(0, 1), stabilizer.view(-1, 1))
            for conv, memory, stabilizer in zip(*self.state.values())
        ]
        self._workspaces: dict[int, _Workspace] = {}

    def reset(self) -> None:
        """Begin a segment."""
        self.state["conv"].zero_()
        self.state["folded_memory"].zero_()
        self.state["stabilizer"].fill_(-torch.inf)

    def __call__(self, logmel: Tensor, position: int) -> Tensor:
        """Encode columns of one segment: (B, T * frames of a patch, bands) normalized -> (B, T, layers * rows * D).

        Args:
            position: the first column's place in the segment; at 0 the state is reset.
        """
        rows = self._patches.rows
        tokens = F.linear(patchify(logmel, self._patches), self._patch_weight, self._patch_bias)
        tokens += self._position_table[rows * position : rows * position + tokens.shape[1]]
        if position == 0:
            self.reset()
            tokens = torch.cat([self._cls_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        batch, length, dim = tokens.shape
        if length not in self._workspaces:
            self._workspaces[length] = _Workspace(self._blocks[0], batch, length)
        x, workspace = tokens.flatten(0, 1), self._workspaces[length]  # (B S, D)
        outputs = {}
        for number, (block, state) in enumerate(zip(self._blocks, self._state_of_block), start=1):
            block(x, workspace, *state)
            if self._layers is not None and number in self._layers:
                outputs[number] = x.clone()  # blocks work in place
        if self._layers is None:
            outputs[0] = F.layer_norm(x, (dim,), self._norm_weight, self._norm_bias, FINAL_NORM_EPS)
        first = 1 if position == 0 else 0  # leave out cls
        parts = [outputs[layer].view(batch, length, dim)[:, first:] for layer in self._layers or [0]]
        return torch.cat([part.unflatten(1, (-1, rows)).flatten(2) for part in parts], dim=2)


class _Workspace:
    """The buffers of a block for S tokens of each stream, and its views of them. Blocks take turns."""

    def __init__(self, block: _Block, batch: int, length: int) -> None:
        heads, head_dim, inner, past = block.heads, block.head_dim, block.inner_dim, len(block.taps) - 1
        rows, size, groups = batch * length, block.map_size, block.inner_dim // block.map_size
        empty = partial(torch.empty, dtype=torch.float32, device=block.up.device)

        width = 2 * inner + 2 * heads
        # A product with few rows takes a third less time when it is written column by column.
        self.up = empty(width, rows).T if rows <= FEW_ROWS else empty(rows, width)
        x, self.z, self.gates_of_u = self.up.split([inner, inner, 2 * heads], dim=1)
        self.x = x.unflatten(0, (batch, length))
        conv_input = empty(batch, past + length, inner)
        self.past, self.now, self.latest = conv_input[:, :past], conv_input[:, past:], conv_input[:, length:]
        self.shifted = [conv_input[:, past - ago : past - ago + length] for ago in range(past + 1)]  # latest first
        self.c = empty(batch, length, inner)
        self.c_rows = self.c.view(rows, inner)
        self.y = empty(rows, heads, head_dim)
        self.y_rows = self.y.view(rows, inner)

        self.gates = empty(rows, 2 * heads)
        self.gates_by_stream = self.gates.view(batch, length, 2, heads).permute(2, 3, 0, 1)
        self.gates_by_head = empty(2, heads, batch, length)
        self.input_gate, self.forget_gate = self.gates_by_head.flatten(1, 2)  # (H B, S) each

        # Block-diagonal maps: (groups, rows, P) in and out, then in the order of heads.
        self.c_groups = self.c_rows.view(rows, groups, size).transpose(0, 1)
        self.x_groups = x.unflatten(1, (groups, size)).transpose(0, 1)
        self.mapped = empty(groups, rows, size)
        q, k, v = empty(heads, rows, head_dim), empty(heads, rows, head_dim), empty(heads, rows, head_dim + 1)
        v[..., head_dim] = 1  # sums up the normalizer
        self.c_by_head, self.q_by_head = self.c_rows.view(rows, heads, head_dim).transpose(0, 1), q
        if size <= head_dim:
            self.mapped_by_head = self.mapped.view(heads, -1, rows, size).transpose(1, 2)
            self.by_group = (-1, size)
        else:  # a single group
            self.mapped_by_head = self.mapped.view(rows, heads, 1, head_dim).transpose(0, 1)
            self.by_group = (1, head_dim)
        self.q_groups, self.k_groups = q.unflatten(2, self.by_group), k.unflatten(2, self.by_group)
        self.v_groups = v[..., :head_dim].unflatten(2, self.by_group)
        self.q, self.k = q.view(heads * batch, length, head_dim), k.view(heads * batch, length, head_dim)
        self.k_transposed, self.v = self.k.transpose(1, 2), v.view(heads * batch, length, head_dim + 1)

        # The cell: the memory counts as one more token, the first.
        self.g = empty(heads * batch, 1 + length)
        self.g_of_memory, self.g_of_tokens, self.g_row = self.g[:, :1], self.g[:, 1:], self.g[:, None]
        self.largest = torch.empty_like(self.g), torch.empty(self.g.shape, dtype=torch.int64, device=self.g.device)
        self.largest_of_tokens = self.largest[0][:, 1:]
        self.largest_column = self.largest_of_tokens[:, :, None]
        self.weights = empty(heads * batch, length, 1 + length)
        self.memory_weights, self.token_weights = self.weights[:, :, :1], self.weights[:, :, 1:]
        self.kept, self.written = self.memory_weights[:, -1:], self.token_weights[:, -1, :, None]
        self.scores = empty(heads * batch, length, length)
        self.q_of_memory = torch.empty_like(self.q)
        self.read = empty(heads * batch, length, head_dim + 1)
        self.values, self.normalizer = self.read[..., :head_dim], self.read[..., head_dim]
        self.normalizer_column = self.normalizer[..., None]
        self.h = empty(heads * batch, length, head_dim)


class _Block:
    """A folded block's weights, copied into the layout in which a few tokens need the fewest operations."""

    def __init__(self, folded: FoldedBlock, config: AxLSTMConfig) -> None:
        self.heads, self.inner_dim, self.dim = config.heads, config.inner_dim, config.dim
        self.head_dim, self.map_size = config.inner_dim // config.heads, folded.c_to_k.shape[1]
        self.sigmoid_gate = config.input_gate == "sigmoid"
        self.norm = folded.norm.clone()
        self.up = torch.cat([folded.up_x, folded.up_z, folded.gates_of_u]).T  # (D, 2 I + 2 H)
        self.up_bias = torch.cat([folded.gate_bias.new_zeros(2 * config.inner_dim), folded.gate_bias])
        self.taps = list(folded.taps)  # (I,) each, latest first
        self.conv_bias = folded.conv_bias.clone()
        self.gates_of_c = folded.gates_of_c.T.contiguous()  # (I, 2 H)
        self.c_to_q, self.c_to_k, self.x_to_v = folded.c_to_q, folded.c_to_k, folded.x_to_v
        self.head_norm = folded.head_norm.clone().view(self.heads, self.head_dim)
        self.skip = folded.skip.clone()
        self.down = folded.down.T.contiguous()  # (I, D)

    def __call__(self, x: Tensor, workspace: _Workspace, conv: Tensor, memory: Tensor, stabilizer: Tensor) -> None:
        """Add the block's output to x, (B S, D), and update the state in place: (B, kernel - 1, I), (H B, K, K + 1)
        and (H B, 1), see `OnlineEncoder`."""
        u = F.layer_norm(x, (self.dim,), self.norm, None, BLOCK_NORM_EPS)
        torch.addmm(self.up_bias, u, self.up, out=workspace.up)
        workspace.past.copy_(conv)
        workspace.now.copy_(workspace.x)
        c = torch.addcmul(self.conv_bias, workspace.shifted[0], self.taps[0], out=workspace.c)
        for shifted, tap in zip(workspace.shifted[1:], self.taps[1:]):
            c.addcmul_(shifted, tap)
        conv.copy_(workspace.latest)
        F.silu(c, inplace=True)

        torch.addmm(workspace.gates_of_u, workspace.c_rows, self.gates_of_c, out=workspace.gates)
        workspace.gates_by_head.copy_(workspace.gates_by_stream)
        if self.c_to_q is None:
            workspace.q_by_head.copy_(workspace.c_by_head)
        else:
            torch.bmm(workspace.c_groups, self.c_to_q, out=workspace.mapped)
            workspace.q_groups.copy_(workspace.mapped_by_head)
        torch.bmm(workspace.c_groups, self.c_to_k, out=workspace.mapped)
        workspace.k_groups.copy_(workspace.mapped_by_head)
        torch.bmm(workspace.x_groups, self.x_to_v, out=workspace.mapped)
        workspace.v_groups.copy_(workspace.mapped_by_head)
        self._run_cell(workspace, memory, stabilizer)

        h = F.layer_norm(workspace.h, (self.head_dim,), eps=HEAD_NORM_EPS).view(self.heads, -1, self.head_dim)
        torch.mul(workspace.c_rows, self.skip, out=workspace.y_rows)
        workspace.y.addcmul_(h.transpose(0, 1), self.head_norm)
        workspace.y_rows.mul_(F.silu(workspace.z, inplace=True))
        x.addmm_(workspace.y_rows, self.down)

    def _run_cell(self, workspace: _Workspace, memory: Tensor, stabilizer: Tensor) -> None:
        """Run the mLSTM cell in its chunkwise form (see `hear_encoders.nn.mlstm`), into `workspace.h`."""
        log_i = F.logsigmoid(workspace.input_gate) if self.sigmoid_gate else workspace.input_gate
        forgotten = F.logsigmoid(workspace.forget_gate).cumsum(1)  # (H B, S)
        workspace.g_of_memory.copy_(stabilizer)
        torch.sub(log_i, forgotten, out=workspace.g_of_tokens)
        torch.cummax(workspace.g, 1, out=workspace.largest)
        weights = torch.sub(workspace.g_row, workspace.largest_column, out=workspace.weights).exp_()  # (H B, S, 1 + S)
        F.threshold(weights.tril_(1), MIN_WEIGHT, 0.0, inplace=True)  # tril_ removes the future
        m = forgotten.add_(workspace.largest_of_tokens)
        torch.bmm(workspace.q, workspace.k_transposed, out=workspace.scores).mul_(workspace.token_weights)
        torch.mul(workspace.q, workspace.memory_weights, out=workspace.q_of_memory)
        torch.bmm(workspace.scores, workspace.v, out=workspace.read)
        workspace.read.baddbmm_(workspace.q_of_memory, memory)  # (H B, S, K + 1)
        stabilizer.copy_(m[:, -1:])
        bound = m.neg_().exp_()  # may be infinite: then h is zero
        torch.maximum(workspace.normalizer.abs_(), bound, out=workspace.normalizer).add_(NORMALIZER_EPS)
        torch.div(workspace.values, workspace.normalizer_column, out=workspace.h)
        workspace.k.mul_(workspace.written)
        memory.mul_(workspace.kept).baddbmm_(workspace.k_transposed, workspace.v)
