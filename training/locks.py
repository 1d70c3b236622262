"""One process at a time on a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path, out_dir: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold the only lock on a folder; the system frees it when this process ends, however it does.

    Args:
        folder: gets the file that is locked.
        out_dir: what the error calls the folder, where it goes by another name.
        wait: for a process that holds it, instead of raising.

    Raises:
        ValueError: another process holds it.
    """
    with open(folder / LOCK_FILE, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {out_dir or folder}") from error
        except OSError:
            pass  # a file system without locks, as clusters have them
        yield
