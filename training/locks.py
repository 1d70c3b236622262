"""One process at a time on a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


@contextmanager
def locked(
    folder: Path, out_dir: Path | None = None, *, wait: bool = False, shared_with_children: bool = True
) -> Iterator[None]:
    """Hold the only lock on a folder; the system frees it when this process ends, however it does.

    Args:
        folder: gets the file that is locked.
        out_dir: what the error calls the folder, where it goes by another name.
        wait: for a process that holds it, instead of raising.
        shared_with_children: processes forked while it is held hold it too. Right for those that write, wrong for
            those that only read, which outlive a killed parent by seconds in which it could not be started again.

    Raises:
        ValueError: another process holds it.
    """
    lock = fcntl.flock if shared_with_children else fcntl.lockf
    with open(folder / LOCK_FILE, "wb") as file:
        try:
            lock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {out_dir or folder}") from error
        except OSError:
            pass  # a file system without locks, as clusters have them
        yield
