"""Build a free corpus from Debian packages: `python -m training.corpora.debian OUT_DIR`.

It holds about 56 hours of freely licensed recordings from Debian 12, four fifths of them music. debian.csv.gz lists
their packages, paths and kinds, and gives each a role: "pretraining" and "both" belong to this corpus; "evaluation"
never does, so that no task is tested on training data. Games copy sounds from each other, though: about five of the
661 clips of everyday_sounds are also here, in other packages (blobwars' pistol is openarena's machine gun).

    OUT_DIR/recordings/PART/PACKAGE/PATH    the files: links into the cache, or FLAC if soundfile cannot read them
    OUT_DIR/shards/PART/                    their shards, from `training.corpora.prepare`
    OUT_DIR/LICENCES.md                     the packages with their versions and licences

PART is a kind (music, speech, sounds) or held_out: six packages of all kinds to test a run on while it trains.
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

from hear_encoders.console import BAD_USAGE, FAILED, INTERRUPTED, output_path, positive, print_error, progress
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora import archive, prepare
from training.corpora.plan import PLAN_FILE
from training.corpora.recordings import check_decoders, is_plain_file, read_recording
from training.corpora.workers import sigterm_interrupts

PROG = "python -m training.corpora.debian"
MANIFEST = Path(__file__).with_name("debian.csv.gz")
ROLES = ("pretraining", "both")
KINDS = ("music", "speech", "sounds")  # sounds: effects, ambience, animals and everything else

# About 1.8 hours: orchestral and electronic music, Italian and English speech, effects and ringtones.
HELD_OUT = ("asterisk-core-sounds-it-g722", "enigma-data", "fillets-ng-data", "freecol", "krank", "lomiri-sounds")
PARTS = (*KINDS, "held_out")

_EPILOG = """\
examples:
  python -m training.corpora.debian corpus/
  python -m training.corpora.debian corpus/ --skip redeclipse-data berusky2-data torcs-data

The three packages in the second example are 1.8 GB for 2 hours of audio. Run the same command again to continue after
an interruption. Exit codes: 0 success; 1 some recordings could not be read, the rest are done; 2 bad usage, or the
packages could not be fetched; 130 interrupted.
"""


@dataclass(frozen=True)
class Entry:
    """A recording of the corpus."""

    package: str
    path: str  # in the package; see `training.corpora.recordings`
    seconds: float
    kind: str  # one of KINDS

    @property
    def recording(self) -> str:
        """The name that `read_recording` takes."""
        return f"{self.package}/{self.path}"

    @property
    def part(self) -> str:
        """One of PARTS: the kind, or held_out."""
        return "held_out" if self.package in HELD_OUT else self.kind


def read_manifest(roles: Sequence[str] = ROLES) -> list[Entry]:
    """Return the recordings with one of these roles, sorted by package and path."""
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
    """Put recordings into FOLDER/PART/PACKAGE/PATH, except those that are there already.

    Args:
        entries: recordings whose packages are in the cache.
        cache: of `training.corpora.archive`.
        folder: gets a link to each file, or 16 kHz FLAC if soundfile cannot read it.
        jobs: threads.

    Returns:
        An error for each recording that is not in its package, or is not audio.

    Raises:
        OSError: the disk failed; another attempt may succeed.
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
                    wanted.unlink(missing_ok=True)  # a dangling link: the cache was moved
                    wanted.symlink_to(file.resolve())
                    return None
            samples = read_recording(entry.recording, cache)
            with atomic_write(converted) as flac:
                soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC")
        except (FileNotFoundError, ValueError) as error:
            return f"{entry.recording}: {error}"
        return None

    errors = []
    with progress(len(entries), "file", "recordings") as advance, ThreadPoolExecutor(jobs) as pool:
        for error in pool.map(collect_one, entries):
            if error is not None:
                errors.append(error)
            advance()
    return errors


def soundfile_reads(path: Path) -> bool:
    """Return True if libsndfile opens the file."""
    try:
        soundfile.info(str(path))
    except (RuntimeError, OSError):
        return False
    return True


def write_licences(entries: Sequence[Entry], cache: Path, path: Path) -> None:
    """Write a table of the packages with their hours in the corpus and their licences."""
    seconds: dict[str, float] = {}
    for entry in entries:
        seconds[entry.package] = seconds.get(entry.package, 0.0) + entry.seconds
    lines = [
        "# Licences of the corpus",
        "",
        "The recordings come from these packages in Debian's main archive. The licences are all those named in each",
        "package's copyright file, usr/share/doc/PACKAGE/copyright, including those of files that are not recordings.",
        "",
        "| package | version | hours | licences |",
        "|---|---|--:|---|",
    ]
    for package, length in sorted(seconds.items()):
        licences = archive.licence_cell(archive.licence_text(package, cache))
        lines.append(f"| {package} | {archive.version(package, cache)} | {length / 3600:.2f} | {licences} |")
    with atomic_write(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def build(out_dir: Path, cache: Path, skip: Sequence[str], jobs: int) -> int:
    """Fetch, collect and prepare the corpus. Return the command's exit code."""
    entries = read_manifest()
    if unknown := sorted(set(skip) - {entry.package for entry in entries}):
        raise ValueError(f"not in the corpus: {', '.join(unknown)}")
    for part, package in itertools.product(PARTS, skip):
        if (out_dir / "recordings" / part / package).exists():
            raise ValueError(f"{out_dir} already holds {package}: to skip it, choose another folder")
    entries = [entry for entry in entries if entry.package not in skip]
    for part, package in sorted({(entry.part, entry.package) for entry in entries}):
        begun = (out_dir / "shards" / part / PLAN_FILE).exists()
        if begun and not (out_dir / "recordings" / part / package).exists():
            raise ValueError(f"{out_dir} was begun without {package}: repeat --skip, or choose another folder")
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
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        PROG,
        description="Fetch freely licensed recordings from Debian's packages and prepare them for pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=output_path, metavar="OUT_DIR", help="folder for the corpus")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PACKAGE", help="packages to leave out")
    parser.add_argument(
        "--cache",
        type=Path,
        default=archive.default_cache(),
        help="folder for unpacked packages, about 20 GB; default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    try:
        with sigterm_interrupts():
            return build(options.out_dir, options.cache, options.skip, options.jobs)
    except KeyboardInterrupt:
        print_error(PROG, "interrupted; run the same command again to continue")
        return INTERRUPTED
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print_error(PROG, f"error: {error}")
        return BAD_USAGE


if __name__ == "__main__":
    sys.exit(main())
