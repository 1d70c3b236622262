"""Code that the benchmarks share: command line, interleaved timing, memory, tables."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

MIN_TURNS = 3
MIN_SECONDS = 1.0  # of turns, in total


def argument_parser(prog: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the first line and the examples of a module's docstring."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog,
        description=summary,
        epilog="Example:" + rest.partition("Example:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(calls: Sequence[Callable[[], object]], device: torch.device, min_turns: int = MIN_TURNS) -> list[float]:
    """Run A B C A B C ... and return the median time of each in seconds. The caller warms them up."""
    times: list[list[float]] = [[] for _ in calls]
    first = time.perf_counter()
    while len(times[0]) < min_turns or time.perf_counter() - first < MIN_SECONDS:
        for call, elapsed in zip(calls, times):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            elapsed.append(time.perf_counter() - start)
    return [median(elapsed) for elapsed in times]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory while `call` runs, or None if the system does not report it.

    On CUDA this is the memory that torch has allocated. On a CPU (Linux only) it is the resident memory of the whole
    process, including Python, torch's libraries and the weights.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by earlier calls still counts as resident
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current size
        call()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes)


def print_progress(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it also reads as plain text.

    A row with an empty last cell is a remark: its text may run over the empty columns and does not widen its own.
    """
    measured = [row for row in rows if row[-1]]
    names = max(len(name) for name in [columns[0], *(row[0] for row in rows)])
    widths = [names] + [max(len(cell) for cell in column) for column in list(zip(columns, *measured))[1:]]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(line(cells) for cells in [columns, rule, *rows])


def format_machine(device: torch.device) -> str:
    """Return lines that name the machine and the software versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"- CPU: {cpu_name()}, {cores} cores, {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        lines.append(f"- GPU: {torch.cuda.get_device_name(device)}")
    lines.append(f"- torch {torch.__version__} on {device}, Python {platform.python_version()}")
    return "\n".join(lines)
