"""How much a training step computes, and how much a device can: what model FLOPs utilisation (MFU) is made of.

FLOPs are those of matmuls, attention and convolutions, a multiply-add being two, counted by torch from what is
really run; norms, activations and other elementwise work are not counted. The device's rate is that of a large
square matmul in the same precision, measured, not a data sheet's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough for the full rate
_MATMUL_SECONDS = 0.2


def _cpu_attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flop(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter knows the attention kernels of CUDA only.
_ADDED_FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flop,
}


def count_flop(call: Callable[[], object]) -> int:
    """Multiplications and additions of the matmuls, attention and convolutions of one call."""
    with FlopCounterMode(display=False, custom_mapping=_ADDED_FLOP_FORMULAS) as counter:
        call()
    return counter.get_total_flops()


class Matmul:
    """Square matmul in a precision: the rate that nothing can exceed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size = MATMUL_SIZE[device.type]
        self.flop = 2 * self.size**3
        self.a, self.b = torch.randn(2, self.size, self.size, device=device).to(dtype)

    def __call__(self) -> Tensor:
        return self.a @ self.b


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul on a device, the median over a fifth of a second."""
    matmul = Matmul(device, dtype)

    def seconds() -> float:
        begin = time.perf_counter()
        matmul()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    for _ in range(3):
        seconds()
    begin, taken = time.perf_counter(), []
    while time.perf_counter() - begin < _MATMUL_SECONDS:
        taken.append(seconds())
    return matmul.flop / median(taken)
