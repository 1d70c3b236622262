"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only once it is complete and on disk.

    An error inside the `with` block, or a killed process, leaves what was at `path` before; a killed process
    may leave `.PID-RANDOM.tmp` beside it.
    """
    path = Path(path)
    # The target's name is not in it: with anything added, a long one would be too long.
    unfinished = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values as JSON for people to read, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
