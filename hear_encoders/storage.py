"""Files on this machine and on object storage: s3://, gs://, https://, hf:// and whatever else fsspec reads.

fsspec comes with PyTorch; each kind of storage needs a package of its own, such as s3fs. All are imported on use.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hear_encoders.files import atomic_write, remove_leftovers, settings_difference, write_or_check_settings

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters or more: not a Windows drive


def is_url(location: str) -> bool:
    """Return whether this is an address rather than a path on this machine."""
    return _URL.match(location) is not None


def open_storage(url: str) -> tuple[Any, str]:
    """Return an address's fsspec filesystem, and the path in it.

    Raises:
        ValueError: an unknown kind of address, or its package is not installed; the message says which.
    """
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}; pip install what it names") from error


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Name the address in errors. Storage libraries raise many kinds, such as those of missing credentials."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file or folder: {url}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def find_files(url: str) -> dict[str, int]:
    """Return the files that an address selects, sorted, each with its size in bytes, or 0 if that is not known.

    Args:
        url: a file, a folder (searched recursively) or a glob pattern.

    Raises:
        FileNotFoundError: none.
        OSError, ValueError: it cannot be reached, or as `open_storage`.
    """
    storage, path = open_storage(url)
    with _reaching(url):
        if glob.has_magic(path) and not storage.exists(path):
            found = storage.glob(path, detail=True)
        elif storage.isdir(path):
            found = storage.find(path, detail=True)
        else:
            found = {path: storage.info(path)}
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    if not files:
        raise FileNotFoundError(f"no files in {url}")
    return {storage.unstrip_protocol(name): int(files[name].get("size") or 0) for name in sorted(files)}


def open_file(location: str) -> BinaryIO:
    """Open a path or an address for reading; the file can seek.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_url(location):
        return open(location, "rb")
    storage, path = open_storage(location)
    with _reaching(location):
        return storage.open(path, "rb")


@contextmanager
def local_copy(source: str | bytes, suffix: str = "") -> Iterator[Path]:
    """Yield a path with a file's content: of a path itself, else of a temporary copy.

    Args:
        source: a path, an address, or the content.
        suffix: of the copy's name, with its dot.
    """
    if isinstance(source, str) and not is_url(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="hear-") as folder:
        copy = Path(folder) / f"audio{suffix}"
        if isinstance(source, bytes):
            copy.write_bytes(source)
        else:
            storage, path = open_storage(source)
            storage.get_file(path, str(copy))
        yield copy


class Folder:
    """A folder to write to, on this machine or on object storage. A file in it is complete or absent.

    Args:
        location: its path or address; it need not exist.
    """

    def __init__(self, location: str) -> None:
        self.location = location if is_url(location) else os.path.abspath(location)

    def __str__(self) -> str:
        return self.location

    def names(self, below: str = "") -> list[str]:
        """Return the sorted names of the files directly in it, or in its subfolder `below`."""
        if not is_url(self.location):
            folder = Path(self.location, below)
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else []
        storage, path = open_storage(self._join(below) if below else self.location)
        storage.invalidate_cache()
        try:
            with _reaching(self.location):
                entries = storage.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file")

    def open(self, name: str) -> BinaryIO:
        """Open one of its files for reading."""
        return open_file(self._join(name))

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for writing that appears, or replaces another, when the `with` block is left without an error."""
        target = self._join(name)
        if not is_url(target):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                yield file
            return
        with tempfile.TemporaryFile() as file:  # so that an error within the block uploads nothing
            yield file
            file.seek(0)
            storage, path = open_storage(target)
            storage.makedirs(posixpath.dirname(path), exist_ok=True)
            with storage.open(path, "wb") as upload:
                while block := file.read(1 << 24):
                    upload.write(block)

    def claim(self, record: str, settings: Mapping[str, Any], *, holds: str, advice: str) -> None:
        """Make the folder belong to these settings, or check that it does: `files.write_or_check_settings`.

        Raises:
            ValueError: it holds other settings, or a damaged record of them.
        """
        if not is_url(self.location):
            write_or_check_settings(self._join(record), settings, holds=holds, advice=advice)
            return
        settings = json.loads(json.dumps(settings))
        storage, path = open_storage(self._join(record))
        storage.makedirs(posixpath.dirname(path), exist_ok=True)
        if not storage.exists(path):
            try:
                storage.pipe_file(path, (json.dumps(settings, indent=2) + "\n").encode(), mode="create")
                return
            except FileExistsError:  # written by another first run meanwhile
                storage.invalidate_cache()
        try:
            earlier = json.loads(storage.cat_file(path))
            difference = settings_difference(earlier, settings)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self._join(record)}: damaged ({error}); {advice}") from error
        if difference:
            raise ValueError(f"{self} holds {holds} with {difference}: {advice}")

    def tidy(self, below: str = "") -> None:
        """Remove what killed processes of this machine have left half-written."""
        folder = Path(self.location, below)
        if not is_url(self.location) and folder.is_dir():
            remove_leftovers(folder)

    def _join(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}" if is_url(self.location) else os.path.join(self.location, name)
