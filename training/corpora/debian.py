"""A corpus that anyone with apt can rebuild: `python -m training.corpora.debian OUT_DIR`.

About 56 hours of freely licensed recordings in Debian 12's packages, four fifths of them music. Which files of which
packages, and of what kind each is, is in debian.csv.gz; its roles keep files that tasks are tested on out of training:
"pretraining" and "both" are read here, "evaluation" never is. Games copy sounds from each other, though: about five of
the 661 clips of everyday_sounds are also here, in other packages (a pistol of blobwars as openarena's machine gun).

    OUT_DIR/recordings/PART/PACKAGE/PATH    the files: links into the cache, or FLAC where soundfile cannot read them
    OUT_DIR/shards/PART/                    what `training.corpora.prepare` made of them
    OUT_DIR/LICENCES.md                     the packages with their versions and licences

PART is a kind (music, speech, sounds), or held_out: six packages of all kinds to test a run on while it trains.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tqdm import tqdm

from hear_encoders.console import BAD_USAGE, FAILED, INTERRUPTED, print_error
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora import archive, prepare
from training.corpora.recordings import check_decoders, is_plain_file, read_recording

PROG = "python -m training.corpora.debian"
MANIFEST = Path(__file__).with_name("debian.csv.gz")
ROLES = ("pretraining", "both")
KINDS = ("music", "speech", "sounds")  # what is neither music nor speech is a sound: effects, ambience, animals, ...

# About 1.7 hours: orchestral and electronic music, a language and speakers of its own, effects and ringtones.
HELD_OUT = ("asterisk-core-sounds-it-g722", "enigma-data", "fillets-ng-data", "freecol", "krank", "lomiri-sounds")
PARTS = (*KINDS, "held_out")

_EPILOG = """\
examples:
  python -m training.corpora.debian corpus/
  python -m training.corpora.debian corpus/ --skip redeclipse-data berusky2-data torcs-data

The three packages of the second example are 1.8 GB for 2 hours of audio. Run the same command again to go on after
an interruption. Exit code 1: some recordings could not be read, the rest are done; 2: bad usage; 130: interrupted.
"""


@dataclass(frozen=True)
class Entry:
    """A recording of the corpus."""

    package: str
    path: str  # in the package; see `training.corpora.recordings`
    seconds: float
    kind: str  # of KINDS

    @property
    def recording(self) -> str:
        """As `read_recording` takes it."""
        return f"{self.package}/{self.path}"

    @property
    def part(self) -> str:
        """Of PARTS: its kind, or that it is kept out of training."""
        return "held_out" if self.package in HELD_OUT else self.kind


def read_manifest(roles: Sequence[str] = ROLES) -> list[Entry]:
    """The recordings with one of these roles, sorted by package and path."""
    with gzip.open(MANIFEST, "rt", encoding="utf-8", newline="") as file:
        return [
            Entry(
                row["package"],
                row["path"],
                float(row["seconds"]),
                row["kind"] if row["kind"] in ("music", "speech") else "sounds",
            )
            for row in csv.DictReader(file)
            if row["role"] in roles
        ]


def collect(entries: Sequence[Entry], cache: Path, folder: Path, jobs: int = 1) -> list[str]:
    """Put recordings into FOLDER/PART/PACKAGE/PATH; what is there stays.

    Args:
        entries: of packages that are in the cache.
        cache: of `training.corpora.archive`.
        folder: gets links to the files, FLAC at 16 kHz of those that soundfile does not read.
        jobs: threads.

    Returns:
        What could not be read, and why: it is not in its package, or not audio.

    Raises:
        OSError: of the disk, which another time may have.
    """

    def collect_one(entry: Entry) -> str | None:
        wanted = folder / entry.part / entry.package / entry.path
        converted = wanted.with_name(wanted.name + ".flac")
        if wanted.exists() or converted.exists():
            return None
        wanted.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_plain_file(entry.path):
                file = archive.locate(cache / entry.package, entry.path)
                if soundfile_reads(file):
                    wanted.unlink(missing_ok=True)  # a link that leads nowhere: the cache was moved
                    wanted.symlink_to(file.resolve())
                    return None
            samples = read_recording(entry.recording, cache)
            with atomic_write(converted) as file:
                soundfile.write(file, samples, SAMPLE_RATE, format="FLAC")
        except (FileNotFoundError, ValueError) as error:
            return f"{entry.recording}: {error}"
        return None

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(collect_one, entries)
        bar = tqdm(outcomes, total=len(entries), desc="recordings", unit="file", disable=None)
        return [outcome for outcome in bar if outcome is not None]


def soundfile_reads(path: Path) -> bool:
    """Whether libsndfile opens a file."""
    try:
        soundfile.info(str(path))
    except (RuntimeError, OSError):
        return False
    return True


def write_licences(entries: Sequence[Entry], cache: Path, path: Path) -> None:
    """Write the list of packages, their hours in the corpus and their licences."""
    seconds: dict[str, float] = {}
    for entry in entries:
        seconds[entry.package] = seconds.get(entry.package, 0.0) + entry.seconds
    lines = [
        "# Licences of the corpus",
        "",
        "Recordings of these packages of Debian's main archive. Licences are those that each package's copyright",
        "file names, for all of its files; the file itself is usr/share/doc/PACKAGE/copyright.",
        "",
        "| package | version | hours | licences |",
        "|---|---|--:|---|",
    ]
    for package, length in sorted(seconds.items()):
        names = ", ".join(archive.licence_names(archive.licence_text(package, cache))) or "see its copyright file"
        escaped = names.replace("|", "/")
        lines.append(f"| {package} | {archive.version(package, cache)} | {length / 3600:.2f} | {escaped} |")
    with atomic_write(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def build(out_dir: Path, cache: Path, skip: Sequence[str], jobs: int) -> int:
    """Fetch, collect and prepare the corpus. Returns the exit code."""
    entries = read_manifest()
    if unknown := sorted(set(skip) - {entry.package for entry in entries}):
        raise ValueError(f"not in the corpus: {', '.join(unknown)}")
    for part, package in itertools.product(PARTS, skip):
        if (out_dir / "recordings" / part / package).exists():
            raise ValueError(f"{out_dir} holds {package} already: to do without it, choose another folder")
    entries = [entry for entry in entries if entry.package not in skip]
    for part, package in sorted({(entry.part, entry.package) for entry in entries}):
        begun = (out_dir / "shards" / part / prepare.PLAN_FILE).exists()
        if begun and not (out_dir / "recordings" / part / package).exists():
            raise ValueError(f"{out_dir} was begun without {package}: give --skip again, or choose another folder")
    check_decoders(entry.recording for entry in entries)
    archive.fetch([entry.package for entry in entries], cache)
    failed = collect(entries, cache, out_dir / "recordings", jobs)
    write_licences(entries, cache, out_dir / "LICENCES.md")
    for failure in failed:
        print_error(PROG, f"failed: {failure}")
    outcome = FAILED if failed else 0
    for part in PARTS:
        if (out_dir / "recordings" / part).is_dir():
            arguments = [str(out_dir / "recordings" / part), str(out_dir / "shards" / part), "--jobs", str(jobs)]
            outcome = max(outcome, prepare.main(arguments))
            if outcome == INTERRUPTED:
                break
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        PROG,
        description="Fetch freely licensed recordings from Debian's packages and prepare them for pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PACKAGE", help="packages to do without")
    parser.add_argument(
        "--cache", type=Path, default=archive.default_cache(), help="unpacked packages, about 20 GB (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="worker processes")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        return build(options.out_dir, options.cache, options.skip, options.jobs)
    except KeyboardInterrupt:
        print_error(PROG, "interrupted; run the same command again to go on")
        return INTERRUPTED
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print_error(PROG, f"error: {error}")
        return BAD_USAGE


if __name__ == "__main__":
    sys.exit(main())
