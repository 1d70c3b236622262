"""Ray, for the commands that spread their work over machines. It is the extra `ray`, imported on use."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def check_ray() -> None:
    """Raise ValueError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("this needs Ray: pip install 'hear-audiomaepp[ray]'")


@contextmanager
def on_ray(address: str | None) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine; leave or stop it at the end. Nothing if this process has joined.

    Args:
        address: of the cluster, "auto" or "local"; None is $RAY_ADDRESS, or else local.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report over the network
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of Ray's C++, which logs to the console
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()
