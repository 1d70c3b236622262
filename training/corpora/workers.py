"""Worker processes that stop when asked, end with their parent, and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch

from hear_encoders.cluster import on_ray

_T = TypeVar("_T")

_stop: Event | None = None  # in a worker: set when the main process wants no more results


class Stopped(Exception):
    """The main process wants no more results."""


@contextmanager
def run_in_workers(function: Callable[..., _T], calls: Iterable[tuple], jobs: int) -> Iterator[list[Future[_T]]]:
    """Run `function(*call)` for all calls in worker processes, each with one torch thread.

    On leaving the `with` block, calls that have not begun are cancelled, and running ones end at their next
    `check_stopped()`.

    Args:
        function: of a module's top level.
        calls: arguments, which must be picklable.
        jobs: number of worker processes. Even a single job needs one: the number of torch threads can change a
            result's last bits, and this process must keep the number that the user has set.

    Yields:
        The calls' futures. They raise `BrokenProcessPool` if a worker dies.
    """
    context = _context()
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (stop,))
    try:
        # A terminal sends Ctrl-C to workers too, even while they start. They inherit the ignored signal.
        with _ctrl_c_ignored():
            futures = [pool.submit(function, *call) for call in calls]
        yield futures
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def run_on_ray(function: Callable[..., _T], calls: Iterable[tuple], address: str) -> Iterator[list[Future[_T]]]:
    """As `run_in_workers`, but in Ray's tasks of one CPU: on a cluster that sees the same files, or on this machine.

    Args:
        address: of `hear_encoders.cluster.on_ray`.

    Yields:
        The calls' futures. Ray makes a call again if its process or machine dies.
    """
    with on_ray(address):
        import ray

        task = ray.remote(_on_one_thread).options(num_cpus=1, max_retries=-1)
        references = [task.remote(function, *call) for call in calls]
        try:
            yield [reference.future() for reference in references]
        finally:
            for reference in references:
                ray.cancel(reference)


def _on_one_thread(function: Callable[..., _T], *call: Any) -> _T:
    torch.set_num_threads(1)
    return function(*call)


def check_stopped() -> None:
    """In a worker: raise `Stopped` if the main process wants no more results."""
    if _stop is not None and _stop.is_set():
        raise Stopped


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that child processes are ended too.

    Only the first SIGTERM does: a second one would interrupt the clean-up and leave child processes behind.
    """

    def interrupt(number: int, _frame: object) -> None:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which child processes would inherit
        raise KeyboardInterrupt

    with _signal_handler(signal.SIGTERM, interrupt):
        yield


def _ctrl_c_ignored() -> AbstractContextManager[None]:
    return _signal_handler(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _signal_handler(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals and may set handlers
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _context() -> BaseContext:
    """Choose how workers are started: never by forking this process, since its threads might hang them."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Import torch once, not in every worker. The command's own module must not be listed: workers run it again under
    # another name, and runpy warns if it has been imported already.
    context.set_forkserver_preload(["hear_encoders", __name__])
    return context


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork server may have started before it was ignored
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process is gone: it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
