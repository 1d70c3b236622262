"""Files from Debian packages: fetched, checked and unpacked into a cache, without installing anything.

Everything in Debian's `main` has a free licence, and its archive keeps packages for years, so it is a good source of
recordings. apt knows each package's size and hash and downloads it; dpkg-deb unpacks it. Debian and its derivatives
have both, and neither needs root. For packages in the cache, apt is not needed:

    CACHE/PACKAGE/        the package's files, as they would lie below /
    CACHE/PACKAGE.json    its version, size and hash

Lists of recordings write a member of a zip archive as a file in a folder: `usr/share/sounds.zip.d/bell.wav` is
`bell.wav` in `usr/share/sounds.zip`; the archive may have any extension. They add its format's extension to a file
without one. `locate` understands such paths.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from hear_encoders.checkpoint import sha256
from hear_encoders.console import progress
from hear_encoders.files import atomic_write, locked, read_json, write_json

# A package's name (Debian policy 5.6.1). A match is neither a path nor an option.
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")

# Packages per call of apt-cache.
_BATCH = 200

_POLL_S = 0.2


@dataclass(frozen=True)
class Package:
    """A package's entry in the archive's index."""

    name: str
    version: str
    size: int  # bytes of the .deb
    sha256: str


def default_cache() -> Path:
    """Return the default cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hear-audiomaepp" / "debian"


def describe(packages: Iterable[str]) -> dict[str, Package]:
    """Ask apt for the packages' index entries, each of the version it would download.

    Raises:
        ValueError: not a package's name, or unknown packages.
        FileNotFoundError: apt is not installed.
    """
    names = _check_names(packages)
    found: dict[str, Package] = {}
    for first in range(0, len(names), _BATCH):
        # check=False: one unknown package makes it fail, although it shows the others.
        shown = _run(["apt-cache", "show", "--no-all-versions", *names[first : first + _BATCH]], check=False)
        for stanza in shown.split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
            if {"Package", "Version", "Size", "SHA256"} <= fields.keys():
                package = Package(fields["Package"], fields["Version"], int(fields["Size"]), fields["SHA256"])
                found.setdefault(package.name, package)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"apt does not know {', '.join(missing)}: run `apt-get update` if its lists are missing; "
            "or this Debian release has no such package"
        )
    return {name: found[name] for name in names}


def dependencies(package: str) -> list[str]:
    """Return the names of a package's direct and indirect dependencies, including alternatives."""
    (name,) = _check_names([package])
    without = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    shown = _run(["apt-cache", "depends", "--recurse", *without, name])
    return sorted({line for line in shown.splitlines() if _NAME.fullmatch(line)} - {name})


def fetch(packages: Iterable[str], cache: str | os.PathLike[str], jobs: int = 4) -> dict[str, Path]:
    """Download and unpack the packages that are not in the cache yet.

    Args:
        packages: names.
        cache: folder, created if needed. Several processes may use it: one fetches, the others wait.
        jobs: simultaneous downloads.

    Returns:
        Each package's folder, in the given order.

    Raises:
        ValueError: an unknown package, or a download that does not match the archive's index.
        RuntimeError: apt or dpkg failed; the message quotes it.
        FileNotFoundError: a package is not in the cache, and apt is not installed.
    """
    cache = Path(cache)
    names = _check_names(packages)
    folders = {name: cache / name for name in names}
    if all(folder.is_dir() for folder in folders.values()):
        return folders
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, wait_s=math.inf):
        for leftover in cache.glob(".*.tmp"):  # left by a killed process: nobody else holds the lock
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        todo = describe(name for name, folder in folders.items() if not folder.is_dir())
        total = sum(package.size for package in todo.values())
        stop = threading.Event()
        with progress(total, "B", "packages", scale=True) as advance, ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(_fetch_one, package, cache, stop): package for package in todo.values()}
                pending = set(futures)
                while pending:
                    # A signal may reach another thread, and then this one notices it only when it wakes up.
                    done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        advance(futures[future].size)
            except KeyboardInterrupt:
                stop.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
    return folders


def version(package: str, cache: str | os.PathLike[str]) -> str:
    """Return the version of a package in the cache."""
    return read_json(Path(cache) / f"{package}.json")["version"]


def locate(folder: str | os.PathLike[str], path: str) -> Path:
    """Find a file of an unpacked package. A member of a zip archive is unpacked beside the archive first.

    Args:
        folder: the package's, from `fetch`.
        path: relative to the folder; `ARCHIVE.d/MEMBER` for a member of ARCHIVE. The file may lack the extension.

    Raises:
        FileNotFoundError: no such file in the package, or no such member in the archive.
        ValueError: the path leads out of the folder, perhaps through a link.
    """
    folder = Path(folder)
    full = folder / path
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"not a path inside a package: {path}")
    for candidate in (full, full.with_suffix("")):
        _check_inside(folder, candidate)
        if candidate.is_file():
            return candidate
    for parent in full.parents:
        if parent == folder:
            break
        archive = parent.with_name(parent.name.removesuffix(".d"))
        _check_inside(folder, archive)
        if parent.suffix == ".d" and archive.is_file():
            with zipfile.ZipFile(archive) as opened:
                try:
                    data = opened.read(full.relative_to(parent).as_posix())
                except KeyError:
                    break
            full.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(full) as file:
                file.write(data)
            return full
    raise FileNotFoundError(f"package {folder.name} has no file {path}")


def _check_inside(folder: Path, path: Path) -> None:
    """Raise ValueError if a link leads from a path in a package's folder to the outside."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"a link leads out of package {folder.name}: {path.relative_to(folder)}")


def licence_text(package: str, cache: str | os.PathLike[str]) -> str:
    """Return the text of a package's copyright file, which may be a link into another package of the same source.

    Raises:
        FileNotFoundError: the package has none.
    """
    folder = fetch([package], cache)[package]
    own = folder / "usr/share/doc" / package
    for link in (own, own / "copyright"):
        if link.is_symlink():
            target = Path(os.readlink(link))
            other = target.name if link == own else target.parent.name
            if other not in ("", "..", package):
                return licence_text(other, cache)
    if not (own / "copyright").is_file():
        raise FileNotFoundError(f"package {package} has no file usr/share/doc/{package}/copyright")
    return (own / "copyright").read_text(encoding="utf-8", errors="replace")


def licence_cell(text: str) -> str:
    """Return a copyright file's licences for a cell of a Markdown table."""
    return (", ".join(licence_names(text)) or "see its copyright file").replace("|", "/")


def licence_names(text: str) -> list[str]:
    """Return the licences' names in a machine-readable copyright file, without repetitions; none in a free-form one."""
    return list(dict.fromkeys(name.strip() for name in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))


def _fetch_one(package: Package, cache: Path, stop: threading.Event) -> None:
    work = cache / f".{package.name}-{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        options = ["-q", "-o", "Acquire::Retries=3"]
        _run(["apt-get", "download", *options, f"{package.name}={package.version}"], cwd=work, stop=stop)
        debs = list(work.glob("*.deb"))
        if len(debs) != 1:
            raise RuntimeError(f"apt-get download {package.name} wrote {len(debs)} packages, expected 1")
        check_download(debs[0], package)
        _run(["dpkg-deb", "--extract", str(debs[0]), str(work / "files")], stop=stop)
        write_json(cache / f"{package.name}.json", asdict(package))
        os.replace(work / "files", cache / package.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_download(path: Path, package: Package) -> None:
    """Check a downloaded package's size and hash against the archive's index.

    Raises:
        ValueError: they differ.
    """
    got = (path.stat().st_size, sha256(path))
    if got != (package.size, package.sha256):
        raise ValueError(
            f"package {package.name} {package.version} has {got[0]} bytes, SHA256 {got[1]}; "
            f"expected {package.size} bytes, SHA256 {package.sha256}"
        )


def _check_names(packages: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(packages))
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise ValueError(f"not a Debian package name: {', '.join(map(repr, wrong))}")
    return names


def _run(
    command: Sequence[str], cwd: Path | None = None, check: bool = True, stop: threading.Event | None = None
) -> str:
    """Run a command and return its output.

    Args:
        command: with arguments.
        cwd: working directory.
        check: raise RuntimeError if the command fails.
        stop: another thread sets it to end the command.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # the output is parsed, and quoted in errors
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{command[0]} not found: these recordings come from Debian packages, and fetching them takes apt and "
            "dpkg (on Debian, Ubuntu and their derivatives)"
        ) from error
    with process:
        try:
            while True:
                try:
                    output, errors = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if stop is not None and stop.is_set():
                        process.terminate()
        except BaseException:
            process.terminate()
            raise
    if check and process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}: {errors.strip()[-500:]}")
    return output
