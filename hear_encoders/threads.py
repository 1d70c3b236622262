"""CPU threads of a command: how many, and how they wait. Commands call this; importing a package sets nothing."""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# Environment variables that decide how OpenMP's threads wait, of all OpenMP libraries.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let PyTorch's threads sleep while they wait for each other, unless the user has chosen how they wait.

    By default they spin, which takes the cores from other processes, and from each other.

    Args:
        environment: of a process that is yet to be started, or this one's. Then call this before torch is imported:
            OpenMP reads the environment when it is loaded.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def use_threads(threads: int | None = None) -> None:
    """Set the number of PyTorch's threads in this process.

    Args:
        threads: None lowers PyTorch's own choice to what the process may use, unless OMP_NUM_THREADS is set.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


def usable_cpus() -> int:
    """Return how many CPUs this process may use: those it may run on, or its container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: str | os.PathLike[str] = "/") -> float:
    """Return the CPU time that Linux's control groups grant this process, in CPUs; infinite without a quota.

    The smallest quota counts: of the process's group, and of all groups above it that it can see.

    Args:
        root: the folder with `proc` and the control groups' file systems; another one for tests.
    """
    root = Path(root)
    quotas = [math.inf]
    try:
        groups = _groups(root)
        for version, mounted, mount_point in _mounts(root):
            if version in groups:
                quotas += _quotas(version, root / mount_point.lstrip("/"), _below(groups[version], mounted))
    except (OSError, ValueError):  # not Linux, or nothing that this knows
        pass
    return min(quotas)


def _groups(root: Path) -> dict[int, str]:
    """Return the process's group by the version of control groups: 1 (of the controller cpu) and 2."""
    groups = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            groups[2] = group
        elif "cpu" in controllers.split(","):
            groups[1] = group
    return groups


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """Yield where control groups are mounted: version, the group that is mounted, the place."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        first, _, second = line.partition(" - ")  # proc_pid_mountinfo(5)
        kind, _, options = second.split(" ", 2)
        mounted, place = (_unescape(field) for field in first.split(" ")[3:5])
        if kind == "cgroup2":
            yield 2, mounted, place
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield 1, mounted, place


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _below(group: str, mounted: str) -> str:
    """Return a group's path below the group that is mounted; that one itself if it lies elsewhere."""
    relative = posixpath.relpath(group, mounted)
    return "" if relative.startswith("..") or relative == "." else relative


def _quotas(version: int, mount_point: Path, group: str) -> Iterator[float]:
    """Yield the quotas of a group and of those above it, in CPUs."""
    folder = mount_point / group
    while True:
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # -1: none
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # the root has no such file
            pass
        if folder == mount_point:
            return
        folder = folder.parent
