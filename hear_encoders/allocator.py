"""What the C library is taught about memory, so that a forward pass need not ask the system for each of its results."""

from __future__ import annotations

import torch

LEARNT_BYTES = 31 * 2**20  # glibc learns from blocks up to 32 MiB


def keep_freed_memory() -> None:
    """Let the memory of a freed tensor serve the next one, where the C library is glibc; elsewhere without effect.

    glibc gives a large block back to the system when it is freed. The next tensor then gets fresh pages, which the
    system zeroes one by one: every intermediate result of a forward pass pays for that, on virtual machines up to a
    third of the whole time. What is large glibc learns from the largest block that it has seen freed (mallopt(3),
    M_MMAP_THRESHOLD). So one is allocated and freed here, untouched. From then on the process may keep up to 62 MB
    that it has freed.
    """
    torch.empty(LEARNT_BYTES, dtype=torch.uint8, device="cpu")
