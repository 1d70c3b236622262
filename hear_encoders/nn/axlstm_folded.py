"""AxLSTM's folded weights: small linear maps multiplied into fewer and larger ones, for both fast forms.

`hear_encoders.nn.axlstm_offline` runs whole segments on a CPU, `hear_encoders.nn.axlstm_online` a few tokens at a time
on any device; `hear_encoders.nn.axlstm` is the plain form, with which the tests compare both. With c the convolution's
output, x its input and u the block's normalized input (x = W_up u), three things are folded:

- Keys and queries are linear in c, and only their products count: q_t . k_s = c_t . (Wq^T Wk) c_s. So one map makes
  the keys, and c itself serves as queries.
- The gates are linear in q, k and v, so they are linear in c and u.
- A block-diagonal map of 4 x 4 blocks becomes one of `MAP_SIZE` channels per block, zeros between: nearly all of a
  4 x 4 matmul is overhead.

Letters in shape comments: D channels of a token, H heads, K channels of a head, I = H * K, P channels of a merged map.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hear_encoders.config import AxLSTMConfig
from hear_encoders.nn.axlstm import AxLSTMEncoder, MLSTMBlock

MAP_SIZE = 24  # P at most; measured on CPUs of two cores, see docs/performance.md


class FoldedBlock(NamedTuple):
    """One block's weights. In float32, those that are not folded share the encoder's memory."""

    norm: Tensor  # (D,)
    up_x: Tensor  # (I, D), to the convolution's input x
    up_z: Tensor  # (I, D), to the output gate z
    taps: Tensor  # (kernel, I), the latest first
    conv_bias: Tensor  # (I,)
    gates_of_u: Tensor  # (2 H, D)
    gates_of_c: Tensor  # (2 H, I)
    gate_bias: Tensor  # (2 H,)
    c_to_q: Tensor | None  # (I / P, P, P) for inputs from the left; None: c itself serves as queries
    c_to_k: Tensor  # (I / P, P, P), scaled by 1 / sqrt(K)
    x_to_v: Tensor  # (I / P, P, P)
    head_norm: Tensor  # (I,)
    skip: Tensor  # (I,)
    down: Tensor  # (D, I)


class FoldedAxLSTM:
    """An AxLSTM encoder's folded blocks.

    They are a snapshot. `is_current` tells whether the encoder still has the weights they were made from.

    Attributes:
        blocks: a `FoldedBlock` for each block.
        map_size: P.
    """

    def __init__(self, encoder: AxLSTMEncoder) -> None:
        config = encoder.config
        head_dim = config.inner_dim // config.heads
        self.straddles = _straddles(config)
        step = config.projection_block
        sizes = range(step, max(step, MAP_SIZE) + 1, step)
        self.map_size = config.inner_dim if self.straddles else max(size for size in sizes if head_dim % size == 0)
        with torch.no_grad():
            self.blocks = [self._fold(block, head_dim**-0.5) for block in cast("list[MLSTMBlock]", encoder.blocks)]
        _count_optimizer_steps()
        self._versions = _versions(encoder)

    @classmethod
    def of(cls, encoder: AxLSTMEncoder) -> FoldedAxLSTM | None:
        """Fold an encoder for `OfflineEncoder`, or return None if only its plain form gives the right result.

        The plain form is left to encoders on other devices, in other dtypes, with other parameters than their
        configuration says (adapters, parametrizations), and with projection blocks that span two heads.
        """
        if _straddles(encoder.config):
            return None
        parameters = dict(encoder.named_parameters())
        plain = all(parameter.dtype is torch.float32 and parameter.is_cpu for parameter in parameters.values())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        if not plain or shapes != encoder.built_shapes:
            return None
        return cls(encoder)

    def to(self, dtype: torch.dtype) -> FoldedAxLSTM:
        """Return these blocks with all weights but the norm's and the gates' in another dtype."""
        converted = copy(self)
        kept = ("norm", "gates_of_u", "gates_of_c", "gate_bias")
        converted.blocks = [
            FoldedBlock(*(w if w is None or name in kept else w.to(dtype) for name, w in block._asdict().items()))
            for block in self.blocks
        ]
        return converted

    def is_current(self, encoder: AxLSTMEncoder) -> bool:
        """Return whether the encoder's parameters are those that were folded, unchanged.

        Writes to a parameter are noticed, assignments and moves too; only writes through `.data` or another view that
        autograd does not track are not. Make a new `Embedder` after those. Parameters made in inference mode count as
        changed: they have no version counter, and may be written to in inference mode.
        """
        if any(parameter.is_inference() for parameter in encoder.parameters()):
            return False
        return self._versions == _versions(encoder)

    def _fold(self, block: MLSTMBlock, scale: float) -> FoldedBlock:
        up_x, up_z = block.up.weight.detach().chunk(2)
        gates_of_q, gates_of_k, gates_of_v = torch.cat([block.gate_i.weight, block.gate_f.weight]).chunk(3, dim=1)
        q, k = block.q.weight, block.k.weight  # (I / size, out, in)
        return FoldedBlock(
            norm=block.norm.weight.detach(),
            up_x=up_x,
            up_z=up_z,
            taps=block.conv.weight.detach().T.flip(0).contiguous(),
            conv_bias=block.conv.bias.detach(),
            gates_of_u=block.v.fold(gates_of_v) @ up_x,
            gates_of_c=block.q.fold(gates_of_q) + block.k.fold(gates_of_k),
            gate_bias=torch.cat([block.gate_i.bias, block.gate_f.bias]),
            c_to_q=self._merge(q.mT) if self.straddles else None,
            c_to_k=self._merge((k.mT if self.straddles else k.mT @ q) * scale),
            x_to_v=self._merge(block.v.weight.mT),
            head_norm=block.head_norm.weight.detach(),
            skip=block.skip.detach(),
            down=block.down.weight.detach(),
        )

    def _merge(self, weight: Tensor) -> Tensor:
        """Put several blocks (I / size, in, out) on the diagonal of each matrix: (I / P, P, P)."""
        merged = weight.unflatten(0, (-1, self.map_size // weight.shape[-1]))  # (I / P, merged, in, out)
        return torch.diag_embed(merged.permute(0, 2, 3, 1), dim1=1, dim2=3).flatten(3).flatten(1, 2)


def _straddles(config: AxLSTMConfig) -> bool:
    """Return whether a projection block spans two heads."""
    return config.inner_dim // config.heads % config.projection_block != 0


def _versions(encoder: AxLSTMEncoder) -> tuple[int, list[tuple[str, int, int]]]:
    """Return values that change when a parameter is written to, replaced, renamed (as by pruning) or moved."""
    versions = [(name, p.data_ptr(), 0 if p.is_inference() else p._version) for name, p in encoder.named_parameters()]
    return _optimizer_steps, versions


_optimizer_steps = 0  # by all optimizers, since fused ones do not count up their parameters' versions


@lru_cache(maxsize=1)
def _count_optimizer_steps() -> None:
    """Count optimizer steps from the first call on. Importing this module registers no hook."""

    def count(*_: object) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)
