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
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

_starting = threading.Lock()


def encode_side_by_side(encode: Callable[[Tensor], Tensor], frames: Tensor, threads: int) -> Tensor:
    """`encode(frames)`, each of so many threads with as large a part of the batch.

    Args:
        encode: from (B, ...) to (B, ...), each row by itself. With more than one thread it is called in all of them at
            once, without gradients, and whatever else is set for one thread only, such as autocast, is not set.
        frames: (B, ...), on the CPU if there is more than one thread.
        threads: 1 calls `encode` here, where torch spreads every operation as it would. So it is where no threads can
            be had, as when the process is about to end.
    """
    if threads == 1:
        return encode(frames)
    inference = torch.is_inference_mode_enabled()

    def encode_part(part: Tensor) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            return encode(part)

    try:
        pool = _pool(threads, os.getpid())
        encoded = [pool.submit(encode_part, part) for part in frames.tensor_split(threads)]
    except RuntimeError:
        return encode(frames)
    return torch.cat([part.result() for part in encoded])


@lru_cache(maxsize=8)  # a few numbers of threads may be in use at a time
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads with one core each. They belong to a process: a fork of it would wait for threads that it does not have.

    How many cores a thread has can only be set together with what threads begin with that are yet to come. One more
    thread sets that back at once; so the caller's own setting is not touched.
    """
    all_there, all_set = (threading.Barrier(threads + 1) for _ in range(2))

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread takes over what the process has set
        with suppress(threading.BrokenBarrierError):  # some could not be started
            all_there.wait()
            torch.set_num_threads(1)
            all_set.wait()

    def set_back() -> None:
        process_has = torch.get_num_threads()
        with suppress(threading.BrokenBarrierError):
            all_there.wait()
            all_set.wait()
            torch.set_num_threads(process_has)

    with _starting:
        setting_back = threading.Thread(target=set_back)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="hear_encoders", initializer=start)
        try:
            setting_back.start()
            for _ in range(threads):
                pool.submit(int)  # starts a thread, as the others still wait
            setting_back.join()
        except BaseException:
            all_there.abort()  # or those that were started would wait for ever
            raise
    return pool
