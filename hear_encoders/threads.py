"""Chunks side by side on a CPU: threads that have one core each, and chunks of their own.

Left to itself torch spreads every operation over all cores, and all wait for the slowest of them at the end of each:
hundreds of times in a forward pass, over pieces of a millisecond, while each core fetches what another one wrote.
Chunks do not depend on each other, so threads that each take some through the whole encoder need to meet only once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor


def encode_side_by_side(encode: Callable[[Tensor], Tensor], frames: Tensor, threads: int) -> Tensor:
    """`encode(frames)`, each of so many threads with as large a part of the batch.

    Args:
        encode: from (B, ...) to (B, ...), each row by itself. With more than one thread it is called in all of them at
            once, without gradients, and whatever else is set for one thread only, such as autocast, is not set.
        frames: (B, ...), on the CPU if there is more than one thread.
        threads: 1 calls `encode` here, where torch spreads every operation as it would.
    """
    if threads == 1:
        return encode(frames)
    inference = torch.is_inference_mode_enabled()

    def encode_part(part: Tensor) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            return encode(part)

    return torch.cat(list(_pool(threads, os.getpid()).map(encode_part, frames.tensor_split(threads))))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads with one core each. They belong to a process: a fork of it has none of them, and starts its own."""
    all_there = threading.Barrier(threads + 1)
    callers = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # gives the thread what the process has set, as the first call in a thread does
        torch.set_num_threads(1)
        all_there.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="hear_encoders", initializer=start)
    try:
        for _ in range(threads):
            pool.submit(int)  # starts a thread, as the others still wait
        all_there.wait()
    except BaseException:
        all_there.abort()  # or those that were started would wait for ever
        raise
    finally:
        torch.set_num_threads(callers)  # what threads begin with that are yet to come; it was 1 for a moment
    return pool
