"""Turn audio into shards of log-mel records: `python -m training.corpora.prepare SOURCE... OUT_DIR`.

`training.corpora.shards` describes the output. A recording, or each excerpt of it that a list names, is cut into
records; the records of many recordings make a shard. First `training.corpora.plan` assigns the recordings to shards.
Then worker processes make one shard each at a time, and a shard gets its name only once it is complete. So a run can be
interrupted at any time and continued; neither that nor the number of workers changes the output.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor, nn

from hear_encoders.audio import find_audio, load_audio
from hear_encoders.checkpoint import sha256
from hear_encoders.checks import check_audio
from hear_encoders.cluster import check_ray
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    output_path,
    positive,
    print_error,
    print_line,
    progress,
)
from hear_encoders.files import atomic_write, locked, write_json
from hear_encoders.nn.frontend import SAMPLE_RATE
from hear_encoders.nn.frontend_torchaudio import FRONTENDS, FrontendName
from training.corpora.plan import (
    SHORTEST_REMAINDER_S,
    Plan,
    Recording,
    cut,
    digest,
    missing_ids,
    read_excerpts,
    read_or_make_plan,
    samples_per_record,
    select,
)
from training.corpora.shards import (
    FORMAT_VERSION,
    INDEX_FILE,
    ShardIndex,
    damage_named,
    frontend_settings,
    read_object,
    shard_name,
    sidecar_name,
    verify,
)
from training.corpora.workers import check_stopped, run_in_workers, run_on_ray, sigterm_interrupts

MISSING_NAMED = 5  # of listed clips without a file

_EPILOG = """\
examples:
  python -m training.corpora.prepare music/ speech/ shards/
  python -m training.corpora.prepare audioset/ shards/ --jobs 16 \\
      --csv unbalanced_train_segments.csv --csv balanced_train_segments.csv
  python -m training.corpora.prepare --verify shards/

Run the same command again to continue after an interruption: finished shards are kept. Exit codes: 0 all files are in
the shards; 1 some files could not be read, or the run had to stop; 2 bad usage, nothing was done; 130 interrupted.
"""


class _Verify(argparse.Action):
    """The option --verify, which like --help needs no other arguments and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        parser.exit(_verify(parser.prog, values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m training.corpora.prepare",
        description="Turn folders of audio into shards of log-mel records for pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="folder (searched recursively), audio file or glob pattern"
    )
    parser.add_argument("out_dir", type=output_path, metavar="OUT_DIR", help="folder for the shards")
    parser.add_argument(
        "--csv",
        type=Path,
        action="append",
        metavar="LIST.csv",
        help="prepare only the excerpts in this list, in AudioSet's format; may be repeated",
    )
    parser.add_argument(
        "--record-seconds", type=float, default=10.0, metavar="S", help="length of a record; default: %(default)s"
    )
    parser.add_argument(
        "--shard-records",
        type=positive(int),
        default=1000,
        metavar="N",
        help="records in a shard; default: about %(default)s",
    )
    parser.add_argument(
        "--frontend",
        choices=tuple(FRONTENDS),
        default="own",
        help="torchaudio gives the papers' log-mel to the last bit; needs the extra torchaudio; default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes; default: %(default)s",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="make the shards on a Ray cluster that sees the same folders, such as auto, or without ADDRESS on this "
        "machine; the shards are the same",
    )
    parser.add_argument(
        "--verify", type=Path, action=_Verify, metavar="SHARDS", help="only check that a folder of shards is undamaged"
    )
    try:
        options = parser.parse_args(arguments)  # --verify does its work here
        if not SHORTEST_REMAINDER_S <= options.record_seconds < math.inf:
            parser.error(f"--record-seconds must be at least {SHORTEST_REMAINDER_S}")
        with sigterm_interrupts():
            return _prepare(parser.prog, options)
    except KeyboardInterrupt:
        print_error(parser.prog, "interrupted; run the same command again to continue")
        return INTERRUPTED


def _prepare(prog: str, options: argparse.Namespace) -> int:
    out_dir: Path = options.out_dir
    with ExitStack() as stack:
        try:
            if options.ray:
                check_ray()
            FRONTENDS[options.frontend]()  # raises here, and not in a worker, if torchaudio does not import
            root, files = find_audio(options.sources)
            excerpts = read_excerpts(*options.csv) if options.csv else None
            recordings = select(files, excerpts)
            out_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out_dir))
            plan = read_or_make_plan(out_dir, _settings(options), root, recordings, options.jobs)
        except (OSError, ValueError, ImportError) as error:
            print_error(prog, f"error: {error}")
            return BAD_USAGE
        if excerpts is not None and (missing := missing_ids(files, excerpts)):
            names = ", ".join(missing[:MISSING_NAMED]) + (", ..." if len(missing) > MISSING_NAMED else "")
            print_error(prog, f"{len(missing)} of {len(excerpts)} listed clips have no audio file: {names}")
        todo = [number for number in range(len(plan.shards)) if not _is_done(out_dir, number)]
        try:
            _remove_leftovers(out_dir)
            if todo:
                (out_dir / INDEX_FILE).unlink(missing_ok=True)  # it marks a complete folder
                _make_shards(prog, root, out_dir, plan, todo, options)
            index, failed = _write_index(out_dir, len(plan.shards), plan.settings["frontend"])
        except (OSError, ValueError, MemoryError, BrokenProcessPool) as error:
            print_error(prog, f"error: {str(error) or type(error).__name__}; finished shards are kept")
            return FAILED
    print(
        f"{out_dir}: {index['records']} records, {index['hours']:.2f} hours, {len(plan.shards)} shards"
        f" ({len(plan.shards) - len(todo)} made earlier)"
    )
    for failure in failed:
        print_error(prog, f"failed: {failure['reason']}")
    return FAILED if failed else 0


def _verify(prog: str, path: Path) -> int:
    """Check a folder of shards, print what is wrong with it, and return the exit code."""
    try:
        index = ShardIndex.open(path)
        shards = len(read_object(path / INDEX_FILE)["shards"])
        whole: list[bool | None] = []
        with progress(shards, "shard", "verifying") as advance:
            for number in range(shards):
                whole.append(verify(path, number))
                if whole[-1] is False:
                    names = f"{shard_name(number)} and {sidecar_name(number)}"
                    print_error(prog, f"{path / shard_name(number)} is damaged: delete {names} and prepare again")
                advance()
    except (OSError, ValueError) as error:
        print_error(prog, f"error: {error}")
        return FAILED
    print_line(f"{path}: {len(index)} records in {len(whole)} shards; {whole.count(True)} shards are undamaged")
    if unknown := whole.count(None):
        print_line(f"{unknown} shards of an older version have no checksums: only their sizes were compared")
    return FAILED if False in whole else 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything besides the audio files that determines the shards."""
    return {
        "sources": sorted(os.path.abspath(source) for source in options.sources),
        "csv": _hash_lists(options.csv) if options.csv else None,
        "record_seconds": options.record_seconds,
        "shard_records": options.shard_records,
        "frontend": frontend_settings(options.frontend),
    }


def _hash_lists(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one list, or of the lists' hashes, in any order."""
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _make_shards(
    prog: str, root: Path, out_dir: Path, plan: Plan, todo: list[int], options: argparse.Namespace
) -> None:
    """Make the shards with these numbers. An interruption leaves each of them complete or absent.

    Raises:
        OSError: the output cannot be written, or a source has disappeared.
        BrokenProcessPool: a worker died.
    """
    samples = samples_per_record(plan.settings)
    calls = [(root, out_dir.absolute(), number, plan.shards[number], samples, options.frontend) for number in todo]
    done = len(plan.shards) - len(todo)
    workers = (
        run_on_ray(_write_shard, calls, options.ray)
        if options.ray
        else run_in_workers(_write_shard, calls, min(options.jobs, len(todo)))
    )
    with (
        workers as futures,
        progress(len(plan.shards), "shard", "shards", done=done) as advance,
    ):
        for future in as_completed(futures):
            for warning in future.result():
                print_error(prog, f"warning: {warning}")
            advance()


def _write_shard(
    root: Path,
    out_dir: Path,
    number: int,
    recordings: Sequence[Recording],
    record_samples: int,
    frontend: FrontendName,
) -> list[str]:
    """Make one shard and its sidecar, in a worker. Return the warnings.

    Raises:
        OSError: the output cannot be written, or a source has disappeared. Unlike a damaged file, that is probably a
            lost disk, so the shard must not count as done.
        Stopped: see `training.corpora.workers`.
    """
    logmel = FRONTENDS[frontend]()
    records: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    path = out_dir / shard_name(number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for recording in recordings:
                check_stopped()
                source = root / recording.name
                try:
                    audio = check_audio(load_audio(source), name=str(source))
                except ValueError as error:
                    failed.append({"source": recording.name, "reason": str(error).replace(str(source), recording.name)})
                    continue
                records += _add_recording(file, tar, recording, audio, record_samples, logmel)
    sidecar = {"sha256": sha256(path), "records": records, "failed": failed}
    write_json(out_dir / sidecar_name(number), sidecar, indent=None)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _add_recording(
    file: BinaryIO, tar: tarfile.TarFile, recording: Recording, audio: Tensor, record_samples: int, logmel: nn.Module
) -> Iterator[dict[str, Any]]:
    """Write a recording's records and yield the sidecar's entry for each.

    Args:
        file: the file that `tar` writes to.
        tar: the shard.
        recording: source of `audio`.
        audio: (1, samples) float32 at 16 kHz.
        record_samples: length of a full record.
        logmel: the front end.
    """
    for i, (first, last) in enumerate(cut(audio.shape[1], recording.excerpts, record_samples)):
        values = logmel(audio[:, first:last])[0].numpy().astype("<f2")
        about = {
            "source": recording.name,
            "start_s": first / SAMPLE_RATE,
            "duration_s": (last - first) / SAMPLE_RATE,
            "frames": len(values),
        }
        key = record_key(recording.name, i)
        npy = io.BytesIO()
        np.save(npy, values)
        end = _add_member(file, tar, f"{key}.logmel.npy", npy.getvalue())
        _add_member(file, tar, f"{key}.json", json.dumps(about).encode())
        yield {"key": key, "offset": end - values.nbytes, "crc32": zlib.crc32(values.tobytes()), **about}


def _add_member(file: BinaryIO, tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file without time or owner to the shard. Return the offset of its data's end, in bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    first = file.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return first + len(data)


def record_key(source: str, number: int) -> str:
    """Name a record: readable, unique by its hash, without dots or slashes, at most 80 characters."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(source)[0])[-60:]
    return f"{readable}-{digest(source).hex()[:12]}-{number:06d}"


def _write_index(out_dir: Path, shards: int, frontend: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Write index.json from the finished shards' sidecars. Return it and the sources that failed, sorted."""
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for number in range(shards):
        path, sidecar_path = out_dir / shard_name(number), out_dir / sidecar_name(number)
        sidecar = read_object(sidecar_path)
        with damage_named(sidecar_path):
            hours = math.fsum(record["duration_s"] for record in sidecar["records"]) / 3600
            failed += sidecar["failed"]
        rows.append(
            {
                "name": path.name,
                "records": len(sidecar["records"]),
                "hours": hours,
                "bytes": path.stat().st_size,
                "sidecar_sha256": sha256(sidecar_path),
            }
        )
    index = {
        "version": FORMAT_VERSION,
        "frontend": frontend,
        "records": sum(row["records"] for row in rows),
        "hours": math.fsum(row["hours"] for row in rows),
        "shards": rows,
        "failed": len(failed),
    }
    write_json(out_dir / INDEX_FILE, index, indent=None)
    return index, sorted(failed, key=lambda failure: failure["source"])


def _remove_leftovers(out_dir: Path) -> None:
    """Remove the unfinished files of killed processes (see `atomic_write`)."""
    for unfinished in out_dir.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


def _is_done(out_dir: Path, number: int) -> bool:
    return (out_dir / shard_name(number)).is_file() and (out_dir / sidecar_name(number)).is_file()


if __name__ == "__main__":
    sys.exit(main())
