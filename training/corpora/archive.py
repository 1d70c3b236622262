"""Debian's packages as folders of files: fetched, checked and unpacked into a cache, with nothing installed.

Everything in Debian's `main` is under a free licence, and its archive stays where it is for years: a good place to
take recordings from. apt says what a package's size and hash are and downloads it, dpkg-deb unpacks it; so this
runs where these are, on Debian and what descends from it, without root. What is in the cache already is not asked
for again, also not where apt is missing:

    CACHE/PACKAGE/        the package's files, as they would lie below /
    CACHE/PACKAGE.json    its version, size and hash

Lists of files write a member of a zip archive as a file in a folder: `usr/share/sounds.zip.d/bell.wav` is `bell.wav`
in `usr/share/sounds.zip`, whatever the archive's own extension; and they give files without an extension the one of
their format. `locate` takes such paths.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from hear_encoders.checkpoint import sha256
from hear_encoders.files import atomic_write, write_json
from training.locks import locked

# What may stand in a package's name (Debian policy 5.6.1): no path can be made of it.
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")

# Packages asked for in one call of apt-cache.
_AT_ONCE = 200


@dataclass(frozen=True)
class Package:
    """A package as the archive's index has it."""

    name: str
    version: str
    size: int  # bytes of the .deb
    sha256: str


def default_cache() -> Path:
    """Where fetched packages go if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hear-audiomaepp" / "debian"


def describe(packages: Iterable[str]) -> dict[str, Package]:
    """Ask apt which version of each package it would take.

    Raises:
        ValueError: a name that is none, or packages that the archive does not have.
        FileNotFoundError: there is no apt here.
    """
    names = _check_names(packages)
    found: dict[str, Package] = {}
    for first in range(0, len(names), _AT_ONCE):
        # It ends with an error for a single unknown package, although it shows the others.
        shown = _run(["apt-cache", "show", "--no-all-versions", *names[first : first + _AT_ONCE]], check=False)
        for stanza in shown.split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
            if {"Package", "Version", "Size", "SHA256"} <= fields.keys():
                package = Package(fields["Package"], fields["Version"], int(fields["Size"]), fields["SHA256"])
                found.setdefault(package.name, package)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"apt knows no package {', '.join(missing)}: its lists may be missing (`apt-get update` gets them), "
            "or the package is not in this release of Debian"
        )
    return {name: found[name] for name in names}


def dependencies(package: str) -> list[str]:
    """Names of the packages that a package needs, all the way down, alternatives included; without itself."""
    (name,) = _check_names([package])
    without = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    shown = _run(["apt-cache", "depends", "--recurse", *without, name])
    return sorted({line for line in shown.splitlines() if _NAME.fullmatch(line)} - {name})


def fetch(packages: Iterable[str], cache: str | os.PathLike[str], jobs: int = 4) -> dict[str, Path]:
    """Download and unpack packages that are not in the cache yet.

    Args:
        packages: names.
        cache: where they go; made if needed. Several processes may use it: one fetches, the others wait for it.
        jobs: how many are downloaded at a time.

    Returns:
        The folder of each package, in the order given.

    Raises:
        ValueError: an unknown package, or a download that is not what the archive's index says.
        RuntimeError: apt or dpkg failed, with what it said.
        FileNotFoundError: there is no apt here, and not everything is in the cache.
    """
    cache = Path(cache)
    names = _check_names(packages)
    folders = {name: cache / name for name in names}
    if all(folder.is_dir() for folder in folders.values()):
        return folders
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache, wait=True):
        for leftover in cache.glob(".*.tmp"):  # of a process that was killed: this one holds the lock
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        todo = describe(name for name, folder in folders.items() if not folder.is_dir())
        total = sum(package.size for package in todo.values())
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="packages", disable=None) as bar,
            ThreadPoolExecutor(jobs) as pool,
        ):
            futures = {pool.submit(_fetch_one, package, cache): package for package in todo.values()}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(futures[future].size)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return folders


def version(package: str, cache: str | os.PathLike[str]) -> str:
    """The version of a package that is in the cache."""
    return json.loads((Path(cache) / f"{package}.json").read_text())["version"]


def locate(folder: str | os.PathLike[str], path: str) -> Path:
    """Find a file of an unpacked package; a member of a zip archive is unpacked beside the archive first.

    Args:
        folder: the package's, from `fetch`.
        path: below it, `ARCHIVE.d/MEMBER` for a member of ARCHIVE; the extension may be one that the file lacks.

    Raises:
        FileNotFoundError: the package has no such file, or the archive no such member.
        ValueError: the path leads out of the folder.
    """
    folder = Path(folder)
    full = folder / path
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"not a path inside a package: {path}")
    for there in (full, full.with_suffix("")):
        if there.is_file():
            return there
    for parent in full.parents:
        if parent == folder:
            break
        archive = parent.with_name(parent.name.removesuffix(".d"))
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
    raise FileNotFoundError(f"package {folder.name} holds no {path}")


def licence_text(package: str, cache: str | os.PathLike[str]) -> str:
    """The copyright file that every package has; a package may leave it to another one of the same source.

    Raises:
        FileNotFoundError: it has none.
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
        raise FileNotFoundError(f"package {package} holds no usr/share/doc/{package}/copyright")
    return (own / "copyright").read_text(encoding="utf-8", errors="replace")


def licence_names(text: str) -> list[str]:
    """Names of the licences in a copyright file, each once in their order; none where it is not in the fixed form."""
    return list(dict.fromkeys(name.strip() for name in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))


def _fetch_one(package: Package, cache: Path) -> None:
    work = cache / f".{package.name}-{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        options = ["-q", "-o", "Acquire::Retries=3"]
        _run(["apt-get", "download", *options, f"{package.name}={package.version}"], cwd=work)
        debs = list(work.glob("*.deb"))
        if len(debs) != 1:
            raise RuntimeError(f"apt-get download {package.name} left {len(debs)} packages, expected 1")
        check_download(debs[0], package)
        _run(["dpkg-deb", "--extract", str(debs[0]), str(work / "files")])
        write_json(cache / f"{package.name}.json", asdict(package))
        os.replace(work / "files", cache / package.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_download(path: Path, package: Package) -> None:
    """Compare a downloaded package with the archive's index.

    Raises:
        ValueError: another size or hash.
    """
    got = (path.stat().st_size, sha256(path))
    if got != (package.size, package.sha256):
        raise ValueError(
            f"package {package.name} {package.version} came as {got[0]} bytes, SHA256 {got[1]}; "
            f"expected {package.size} bytes, SHA256 {package.sha256}"
        )


def _check_names(packages: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(packages))
    if wrong := [name for name in names if not _NAME.fullmatch(name)]:
        raise ValueError(f"not the name of a Debian package: {', '.join(map(repr, wrong))}")
    return names


def _run(command: Sequence[str], cwd: Path | None = None, check: bool = True) -> str:
    # In plain English, as it is parsed and shown.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{command[0]} is not here: these recordings come from Debian's packages, which are fetched with apt "
            "and dpkg (Debian, Ubuntu and the like)"
        ) from error
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
