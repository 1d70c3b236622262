"""FLOPs of a call and FLOP/s of a device: the two halves of model FLOPs utilization (MFU).

torch counts the FLOPs of the matmuls, attention and convolutions that really run, two per multiply-add; norms,
activations and other elementwise work do not count. The device's rate is measured with a large square matmul in the
same precision, not taken from a data sheet.
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
    grad_out: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__
) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# torch's counter knows only CUDA's attention kernels.
_ADDED_FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flop,
}


def count_flop(call: Callable[[], object]) -> int:
    """Count the multiplications and additions in the matmuls, attention and convolutions of one call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees only this thread, and an Embedder shares its work among all it may use
    try:
        with FlopCounterMode(display=False, custom_mapping=_ADDED_FLOP_FORMULAS) as counter:
            call()
    finally:
        torch.set_num_threads(threads)
    return counter.get_total_flops()


class Matmul:
    """A large square matmul, whose rate bounds that of any model in the same precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size = MATMUL_SIZE[device.type]
        self.flop = 2 * self.size**3
        self.a, self.b = torch.randn(2, self.size, self.size, device=device).to(dtype)

    def __call__(self) -> Tensor:
        return self.a @ self.b


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square matmul on a device: the median over a fifth of a second."""
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
