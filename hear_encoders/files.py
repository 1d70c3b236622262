"""Atomic writes, JSON, locks, and folders that belong to one run's settings."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_POLL_S = 0.05
_LEFTOVER = re.compile(r"\.\d+-[0-9a-f]{8}\.tmp")
_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EIO} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only once it is complete and on disk.

    After an error inside the `with` block, or if the process is killed, `path` is as it was before. A killed process
    may leave `.PID-RANDOM.tmp` beside it, which `remove_leftovers` removes. An existing file's permissions are kept.

    Raises:
        OSError: also if the disk is full while a library writes that reports this in other ways; names `path`.
    """
    path = Path(path)
    with ExitStack() as stack:
        unfinished, file = _open_unfinished(path, stack)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(unfinished, stat.S_IMODE(path.stat().st_mode))
            os.replace(unfinished, path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if cause := _disk_error(error):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def _open_unfinished(path: Path, stack: ExitStack) -> tuple[Path, BinaryIO]:
    """Create a temporary file beside `path`; until the stack is closed, a lock shows that its writer lives."""
    while True:
        unfinished = _unfinished(path)
        file = open(unfinished, "wb")  # noqa: SIM115  the caller closes it
        if fcntl is None:
            return unfinished, file
        lock = os.dup(file.fileno())  # holds the lock while the file is closed and renamed
        stack.callback(os.close, lock)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if unfinished.exists():  # else another process has just removed it, before it was locked
            return unfinished, file
        file.close()


def _disk_error(error: BaseException | None) -> OSError | None:
    """Find the error without a file's name that says that nothing more can be written, in the chain of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is None and error.errno in _DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def file_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add a file's name to the system's errors of reading or writing it, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files in a folder that killed processes have left. Those of living processes are locked.

    Where there are no locks this does nothing.
    """
    if fcntl is None:
        return
    for entry in os.scandir(folder):
        if not _LEFTOVER.fullmatch(entry.name):
            continue
        with suppress(OSError), open(entry.path, "rb+") as file:  # OSError: locked, removed, or no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)


def _unfinished(path: Path) -> Path:
    """Return a new name beside `path`, without the target's own name, which may be as long as names can be."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write plain values as JSON, atomically.

    Args:
        indent: None writes one line without spaces, for files that nobody reads.
    """
    with atomic_write(path) as file:
        file.write(_json_bytes(value, indent))


def _json_bytes(value: Any, indent: int | None = 2) -> bytes:
    separators = (",", ":") if indent is None else None
    return (json.dumps(value, indent=indent, separators=separators) + "\n").encode()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not valid JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from error


@contextmanager
def locked(
    folder: str | os.PathLike[str],
    *,
    name: str | os.PathLike[str] | None = None,
    wait_s: float = 0.0,
    inherited: bool = True,
) -> Iterator[int | None]:
    """Hold the only lock on a folder. The system frees it when this process ends, even if killed.

    Where there are no locks (Windows, some cluster file systems) this does nothing.

    Args:
        folder: an existing folder; gets the file `.lock`.
        name: the folder's name in the error; default: its path.
        wait_s: how long to wait while another process holds it; `math.inf` waits forever.
        inherited: child processes hold the lock too. Right for children that write to the folder. Wrong for children
            that only read: they may outlive a killed parent by seconds, in which it could not be started again.

    Yields:
        The lock's file descriptor, to pass to child processes that must hold it; None where there are no locks.

    Raises:
        ValueError: another process holds the lock.
    """
    if fcntl is None:
        yield None
        return
    lock = fcntl.flock if inherited else fcntl.lockf
    deadline = time.monotonic() + wait_s
    with open(Path(folder) / LOCK_FILE, "wb") as file:
        while True:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ValueError(f"another process is writing to {name or folder}") from error
                time.sleep(_POLL_S)
            except OSError:  # a file system without locks
                break
        yield file.fileno()


def write_or_check_settings(
    record: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    holds: str,
    advice: str,
    free: Container[str] = (),
    write: bool = True,
) -> dict[str, Any] | None:
    """Make a folder belong to these settings, or check that it does.

    The first run writes its settings into `record`; later ones must have the same. Of several first runs at once, one
    writes and the others compare.

    Args:
        record: JSON file in the folder; the folder is made if need be.
        settings: plain JSON values.
        holds: the folder's content with a past participle, for the error: "embeddings made", "a run begun".
        advice: the end of the error: "choose another folder".
        free: settings that may differ.
        write: False only checks.

    Returns:
        The settings in the record; None if there is none and `write` is False.

    Raises:
        ValueError: the record is damaged, or holds other settings; the message names the first difference.
    """
    record = Path(record)
    settings = dict(json.loads(json.dumps(settings)))  # tuples become lists, as in the record
    if not record.exists():
        if not write:
            return None
        record.parent.mkdir(parents=True, exist_ok=True)
        if _create(record, _json_bytes(settings)):
            return settings
    try:
        earlier = read_json(record)
        if not isinstance(earlier, dict):
            raise ValueError(f"{record}: expected a JSON object, got {type(earlier).__name__}")
    except ValueError as error:
        raise ValueError(f"{error}: damaged; {advice}") from error
    if difference := settings_difference(earlier, settings, free):
        raise ValueError(f"{record.parent} holds {holds} with {difference}: {advice}")
    return earlier


def settings_difference(earlier: Mapping[str, Any], now: Mapping[str, Any], free: Container[str] = ()) -> str:
    """Name the first setting that differs, such as "seed = 1, now 2"; empty if none does."""
    for key in {**now, **earlier}:
        if key not in free and earlier.get(key) != now.get(key):
            return f"{key} = {earlier.get(key)!r}, now {now.get(key)!r}"
    return ""


def _create(path: Path, content: bytes) -> bool:
    """Create a file atomically; return False, and write nothing, if it exists already."""
    with ExitStack() as stack:
        unfinished, file = _open_unfinished(path, stack)
        stack.callback(unfinished.unlink, missing_ok=True)
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)  # fails if the name is taken, unlike a rename
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(unfinished, path)
        return True
