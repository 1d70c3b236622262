"""AxLSTM whole chunks at a time on a CPU: the encoder's third form, which `hear_encoders.embedder` runs in float32.

Beside matmuls as small as these, what lies between them costs a CPU much. So this form makes few passes over little
memory: a few chunks go through a block together, as many as the cores' caches hold; they lie step after step of all of
them, so that every head is a view; room is used again and again; and since a chunk is short, its parts look back at all
tokens before them instead of carrying a memory C. `hear_encoders.nn.axlstm` holds the plain form, and the tests hold this
one against it.

Queries and keys are linear maps of the same c, and only their products count: q_t . k_s = c_t . (Wq^T Wk) c_s. So one
map is enough, and c itself serves as queries.

The weight of token s at token t, exp(g_s - max(g_1..g_t)) (see `hear_encoders.nn.mlstm`), need not be made for each pair:
exp(g_s) may scale the keys, and what belongs to t cancels in h. Only where gates are so extreme that float32 does not
hold exp(g_s) of a whole chunk are the weights made one by one.

Letters in shape comments: N chunks that go through a block together, S tokens of a chunk (cls first), D channels of a
token, H heads, K channels of a head, I = H * K, P channels that a block-diagonal map takes at once, L tokens of a part.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.nn.axlstm import HEAD_NORM_EPS, AxLSTMEncoder, BlockDiagonal, CausalConv, HeadNorm, MLSTMBlock
from hear_encoders.nn.build import is_hooked
from hear_encoders.nn.mlstm import LOG_WEIGHT_FLOOR, NORMALIZER_EPS

# Measured on CPUs of two cores; see benchmarks/README.md.
TOKENS_TOGETHER = 512  # of N chunks, for each thread
PART = 84  # L at most: products are made with all tokens up to the part's last, half of the last L x L for nothing
MAP_SIZE = 24  # P at most

# exp(g_s) is float32 relative to the middle of where max(g_1..g_t) begins and ends: at most REACH apart. What is that
# much smaller than the smallest maximum that it cannot be seen is zero, or products of it would be denormal numbers.
REACH = 80.0
SCALE_FLOOR = -REACH / 2 - 25.0

KNOWN_MODULES = {AxLSTMEncoder, MLSTMBlock, BlockDiagonal, CausalConv, HeadNorm, nn.Linear, nn.LayerNorm, nn.ModuleList}


def takes(encoder: nn.Module) -> bool:
    """Whether `ChunkEncoder` does what the encoder does: an AxLSTM in float32 on the CPU, run as it is by default, none
    of whose modules was hooked or replaced by another kind, and no block of whose projections lies in two heads."""
    if type(encoder) is not AxLSTMEncoder:
        return False
    config = encoder.config
    return (
        encoder.mode == "chunkwise"
        and config.inner_dim // config.heads % config.projection_block == 0
        and all(map(_is_plain, encoder.modules()))
        and all(
            (block.up.bias, block.down.bias) == (None, None)
            and block.gate_i.bias is not None
            and block.gate_f.bias is not None
            for block in encoder.blocks
        )
    )


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) in KNOWN_MODULES
        and not is_hooked(module)
        and all(
            parameter is None
            or (type(parameter) is nn.Parameter and parameter.dtype is torch.float32 and parameter.is_cpu)
            for parameter in module._parameters.values()
        )
    )


class ChunkEncoder:
    """An AxLSTM encoder with its small maps multiplied into fewer and larger ones.

    Made anew for each call, in 2 ms for Tiny, so that it never holds other weights than the encoder does.
    """

    def __init__(self, encoder: AxLSTMEncoder) -> None:
        config, blocks = encoder.config, encoder.blocks
        self.encoder = encoder
        self.heads, self.inner_dim, self.flip = config.heads, config.inner_dim, config.flip
        self.head_dim = config.inner_dim // config.heads
        step = config.projection_block
        self.map_size = max(size for size in range(step, max(step, MAP_SIZE) + 1, step) if self.head_dim % size == 0)

        def of_blocks(*names: str) -> Tensor:
            """A parameter of all blocks, or several of them one below the other: (blocks, ...)."""
            return torch.stack([torch.cat([block.get_parameter(name) for name in names]) for block in blocks])

        q, k, v = (of_blocks(f"{name}.weight") for name in "qkv")  # (blocks, I / size, out, in)
        of_q, of_k, of_v = of_blocks("gate_i.weight", "gate_f.weight").chunk(3, dim=2)  # (blocks, 2 H, I) each
        self.folded = list(
            zip(
                of_blocks("conv.weight").mT.flip(1).contiguous(),  # (kernel, I), the latest first
                _fold(of_q, q) + _fold(of_k, k),  # (2 H, I), of c
                _fold(of_v, v),  # (2 H, I), of the convolution's input
                of_blocks("gate_i.bias", "gate_f.bias").double()[..., None],  # (2 H, 1)
                self._groups(k.mT @ q * self.head_dim**-0.5),  # (I / P, P, P), from c to keys
                self._groups(v.mT),
            )
        )

    def _groups(self, weight: Tensor) -> Tensor:
        """Blocks (.., in, out) as matrices with several of them on the diagonal, for inputs from the left."""
        merged = weight.unflatten(1, (-1, self.map_size // weight.shape[-1]))  # (blocks, I / P, merged, in, out)
        return torch.diag_embed(merged.permute(0, 1, 3, 4, 2), dim1=2, dim2=4).flatten(4).flatten(2, 3)

    def __call__(self, logmel: Tensor) -> Tensor:
        """As the encoder's own call, without gradients: (B, frames, bands) -> (B, tokens, D)."""
        tokens = self.encoder.with_cls(self.encoder.embed(logmel))  # (B, S, D)
        batch, length, _ = tokens.shape
        together = max(1, TOKENS_TOGETHER * torch.get_num_threads() // length)
        encoded = [self._encode(part) for part in tokens.tensor_split(-(-batch // together))]
        return self.encoder.norm(torch.cat(encoded))[:, 1:]

    def _encode(self, tokens: Tensor) -> Tensor:
        """All blocks: (N, S, D) -> (N, S, D)."""
        chunks, length, dim = tokens.shape
        x = tokens.transpose(0, 1).flatten(0, 1).clone()  # (S N, D)
        room = _Room(self, chunks, length)
        for index, (block, folded) in enumerate(zip(self.encoder.blocks, self.folded)):
            flipped = self.flip and index % 2 == 1
            x = x.view(length, -1).flip(0).view(-1, dim) if flipped else x
            self._add_block(x, room, block, *folded)
            x = x.view(length, -1).flip(0).view(-1, dim) if flipped else x
        return x.view(length, chunks, dim).transpose(0, 1)

    def _add_block(
        self,
        x: Tensor,
        room: _Room,
        block: MLSTMBlock,
        taps: Tensor,
        gates_of_c: Tensor,
        gates_of_input: Tensor,
        gate_bias: Tensor,
        c_to_k: Tensor,
        input_to_v: Tensor,
    ) -> None:
        """Add to x, (S N, D), what a block makes of it."""
        up, up_z = block.up.weight.T.chunk(2, dim=1)  # (D, I) each
        normed = block.norm(x)
        torch.mm(normed, up, out=room.input)
        c = torch.addcmul(block.conv.bias, room.shifted[0], taps[0], out=room.c)
        for shifted, tap in zip(room.shifted[1:], taps[1:]):
            c.addcmul_(shifted, tap)
        F.silu(c, inplace=True)

        # Few rows by many columns: the other way round it takes three times as long.
        gates = torch.mm(gates_of_input, room.input.T).addmm_(gates_of_c, c.T).double().add_(gate_bias)  # (2 H, S N)
        gates = gates.view(2, self.heads, room.length, -1).permute(0, 3, 1, 2).flatten(1, 2)  # (2, N H, S)
        torch.bmm(room.input_groups, input_to_v, out=room.mapped)
        room.v_groups.copy_(room.mapped)
        torch.bmm(room.c_groups, c_to_k, out=room.mapped)
        room.run_cell(F.logsigmoid(gates[0]) if block.input_gate == "sigmoid" else gates[0], F.logsigmoid(gates[1]))

        h = F.layer_norm(room.h, (self.head_dim,), eps=HEAD_NORM_EPS).view(-1, self.inner_dim)
        z = torch.mm(normed, up_z, out=room.z)
        y = c.mul_(block.skip).addcmul_(h, block.head_norm.weight).mul_(F.silu(z, inplace=True))
        torch.addmm(x, y, block.down.weight.T, out=x)


class _Room:
    """Where a block works, and its views as the block needs them. Blocks take turns, and what is not needed any more
    makes room: h lies where the convolution's input was, z where v was."""

    def __init__(self, encoder: ChunkEncoder, chunks: int, length: int) -> None:
        heads, head_dim, inner, size = encoder.heads, encoder.head_dim, encoder.inner_dim, encoder.map_size
        tokens, past = length * chunks, chunks * (len(encoder.folded[0][0]) - 1)
        empty = partial(torch.empty, dtype=torch.float32, device="cpu")
        self.length = length

        def by_head(x: Tensor) -> Tensor:  # (S N, I) -> (N H, S, K)
            return x.view(length, chunks * heads, head_dim).transpose(0, 1)

        def by_group(x: Tensor) -> Tensor:  # (S N, I) -> (I / P, S N, P)
            return x.view(tokens, -1, size).transpose(0, 1)

        seen = empty(past + tokens, inner)
        seen[:past] = 0  # before the first token there is nothing
        self.shifted = [seen[past - ago : past - ago + tokens] for ago in range(0, past + 1, chunks)]
        self.input, self.c, k, v = seen[past:], empty(tokens, inner), empty(tokens, inner), empty(tokens, inner)
        self.z = v
        self.input_groups, self.c_groups, self.v_groups = by_group(self.input), by_group(self.c), by_group(v)
        self.mapped = empty(inner // size, tokens, size)
        self.unscaled_keys = self.mapped.view(heads, -1, length, chunks, size)
        self.keys = by_group(k).view(heads, -1, length, chunks, size)
        self.h = self.input.view(-1, heads, head_dim)

        q, keys, v, h = by_head(self.c), by_head(k).mT, by_head(v), by_head(self.input)
        part = -(-length // -(-length // PART))
        self.parts = []
        for begin in range(0, length, part):
            end = min(begin + part, length)
            scores = empty(chunks * heads, end - begin, end)
            self.parts.append((begin, end, q[:, begin:end], keys[:, :, :end], v[:, :end], h[:, begin:end], scores))

    def run_cell(self, log_i: Tensor, log_f: Tensor) -> None:
        """The mLSTM cell in its parallel form, part by part, see `hear_encoders.nn.mlstm`: c, mapped and v become h.

        Args:
            log_i, log_f: (N H, S) logarithms of the gates, float64: sums may be large, and differences of them count.
        """
        forgotten = log_f.cumsum(1)
        g = log_i - forgotten
        largest = g.cummax(1).values
        lowest, highest = largest[:, :1], largest[:, -1:]
        in_reach = bool((highest - lowest).max() < REACH)
        # Weights at token t are relative to this; all that the normaliser is held against is, too.
        base = (lowest + highest) / 2 if in_reach else largest
        bound = (forgotten + base).neg_().exp_().float()  # may be infinite: then nothing is read out
        eps = (largest - base).exp_().mul_(NORMALIZER_EPS).float()
        if in_reach:
            scale = F.threshold(g - base, SCALE_FLOOR, -torch.inf).exp_().float()  # (N H, S)
            scale = scale.unflatten(0, (-1, len(self.keys))).permute(1, 2, 0)  # (H, S, N)
            torch.mul(self.unscaled_keys, scale[:, None, :, :, None], out=self.keys)
        else:
            self.keys.copy_(self.unscaled_keys)
        for begin, end, q, keys, v, h, scores in self.parts:
            torch.bmm(q, keys, out=scores)  # (N H, L, tokens so far)
            if not in_reach:
                # The floor keeps denormal numbers away; above 0 is the future only, which is then taken out.
                log_weights = (g[:, None, :end] - base[:, begin:end, None]).float()
                scores.mul_(log_weights.clamp_(LOG_WEIGHT_FLOOR[torch.float32], 0.0).exp_())
            scores[:, :, begin:].tril_()
            normalizer = torch.maximum(scores.sum(2).abs_(), bound[:, begin:end]).add_(eps[:, begin:end])
            torch.div(scores @ v, normalizer[:, :, None], out=h)


def _fold(after: Tensor, weight: Tensor) -> Tensor:
    """Matrices that do a block-diagonal map first: (.., outputs, I), (.., I / size, size, size) -> (.., outputs, I)."""
    # Elementwise with the many small blocks last: thousands of 4 x 4 matmuls take three times as long.
    after = after.unflatten(2, weight.shape[1:3]).permute(0, 1, 3, 2).contiguous()  # (.., outputs, out, blocks)
    weight = weight.permute(0, 2, 3, 1).contiguous()  # (.., out, in, blocks)
    return (after[:, :, :, None] * weight[:, None]).sum(2).mT.flatten(2)
