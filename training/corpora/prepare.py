"""Audio to shards of log-mel records: `python -m training.corpora.prepare SOURCE... OUT_DIR`.

What is written is described in `training.corpora.shards`. A recording (an audio file, or the segment of it that a list
names) is cut into records; the records of many recordings make a shard. Which recordings go into which shard is
decided first, from the lengths in the files' headers, and kept in plan.json. Then worker processes make one shard
each at a time and put it in place whole. So a run that was interrupted, however it ended, goes on where it was,
and what it writes depends neither on that nor on the number of workers.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hear_encoders.audio import AudioFile, duration_s, find_audio, load_audio
from hear_encoders.console import BAD_USAGE, FAILED, INTERRUPTED, print_error
from hear_encoders.embedder import check_audio
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE, LogMel
from training.corpora.shards import FORMAT_VERSION, INDEX_FILE, frontend_settings, shard_name
from training.locks import locked

PLAN_FILE = "plan.json"

# A shorter remainder of a recording is left out.
SHORTEST_REMAINDER_S = 0.3

_ORDER_SEED = b"order of recordings 1"

_EPILOG = """\
examples:
  python -m training.corpora.prepare music/ speech/ shards/
  python -m training.corpora.prepare audioset/ shards/ --csv unbalanced_train_segments.csv --jobs 16

Run the same command again to go on after an interruption: shards that are there are skipped. Exit code 1: some
files could not be read, or the run could not go on; 2: nothing was done; 130: interrupted.
"""

Segment = tuple[float, float]  # start_s, end_s


@dataclass(frozen=True)
class Recording:
    """An audio file, and what of it is wanted."""

    name: str  # path relative to the root
    size_bytes: int  # tells a file that was replaced between two runs
    segments: tuple[Segment, ...] = ()  # none: all of it


@dataclass(frozen=True)
class Plan:
    """What is made from what: `shards[n]` holds the recordings of shard n, in order."""

    settings: dict[str, Any]
    shards: list[list[Recording]]


class _Stopped(Exception):
    """The main process wants no more shards."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare a folder of shards. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m training.corpora.prepare",
        description="Turn folders of audio into shards of log-mel records for pretraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder (recursive), audio file or glob pattern")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder for the shards")
    parser.add_argument("--csv", type=Path, help="take only what this list in AudioSet's format names")
    parser.add_argument("--record-seconds", type=float, default=10.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--shard-records", type=int, default=1000, metavar="N", help="default: about %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="worker processes")
    options = parser.parse_args(arguments)
    if not SHORTEST_REMAINDER_S <= options.record_seconds < math.inf:
        parser.error(f"--record-seconds must be at least {SHORTEST_REMAINDER_S}")
    if min(options.shard_records, options.jobs) < 1:
        parser.error("--shard-records and --jobs must be at least 1")
    try:
        with _sigterm_interrupts():
            return _prepare(parser.prog, options)
    except KeyboardInterrupt:
        print_error(parser.prog, "interrupted; run the same command again to go on")
        return INTERRUPTED


def _prepare(prog: str, options: argparse.Namespace) -> int:
    out_dir: Path = options.out_dir
    with ExitStack() as stack:
        try:
            root, files = find_audio(options.sources)
            recordings = select(files, read_segments(options.csv) if options.csv else None)
            out_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out_dir))
            plan = _open_plan(out_dir, _settings(options), root, recordings, options.jobs)
        except (OSError, ValueError) as error:
            print_error(prog, f"error: {error}")
            return BAD_USAGE
        todo = [number for number in range(len(plan.shards)) if not _is_done(out_dir, number)]
        try:
            _remove_leftovers(out_dir)
            if todo:
                (out_dir / INDEX_FILE).unlink(missing_ok=True)  # an index says that all is there
                _make_shards(prog, root, out_dir, plan, todo, options.jobs)
            index, failed = _write_index(out_dir, len(plan.shards))
        except (OSError, MemoryError, BrokenProcessPool) as error:
            print_error(prog, f"error: {str(error) or type(error).__name__}; what is done is kept")
            return FAILED
    print(
        f"{out_dir}: {index['records']} records, {index['hours']:.2f} hours, {len(plan.shards)} shards"
        f" ({len(plan.shards) - len(todo)} there before)"
    )
    for failure in failed:
        print_error(prog, f"failed: {failure['reason']}")
    return FAILED if failed else 0


# ---- what is made: selection and plan ----


def read_segments(path: Path) -> dict[str, list[Segment]]:
    """Read a list in AudioSet's format: lines `YTID, start_seconds, end_seconds, labels`, `#` before comments.

    Raises:
        OSError: it cannot be read.
        ValueError: a line that is neither, or nothing in it.
    """
    segments: dict[str, list[Segment]] = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                name, start_s, end_s = next(csv.reader([line], skipinitialspace=True))[:3]
                segment = (float(start_s), float(end_s))
                if not 0 <= segment[0] < segment[1] < math.inf:
                    raise ValueError
            except (ValueError, csv.Error) as error:
                raise ValueError(
                    f"{path}, line {number}: expected YTID, start_seconds, end_seconds, labels; got {line.strip()!r}"
                ) from error
            segments.setdefault(name.strip(), []).append(segment)
    if not segments:
        raise ValueError(f"{path} lists no segments")
    return segments


def select(files: Sequence[AudioFile], segments: dict[str, list[Segment]] | None) -> list[Recording]:
    """The recordings to prepare, in the files' order: with a list, those whose name is an id or an id and `_...`.

    Raises:
        ValueError: the list names none of the files.
    """
    recordings = []
    for file in files:
        wanted: tuple[Segment, ...] = ()
        if segments is not None:
            listed = next((segments[name] for name in _possible_ids(file.path.stem) if name in segments), None)
            if listed is None:
                continue
            wanted = tuple(sorted(set(listed)))
        recordings.append(Recording(file.name, file.path.stat().st_size, wanted))
    if not recordings:
        raise ValueError(f"the list names none of the {len(files)} audio files")
    return recordings


def _possible_ids(stem: str) -> Iterator[str]:
    """The stem, then what is before each `_` in it, longest first: ids themselves may have `_` in them."""
    yield stem
    for match in reversed(list(re.finditer("_", stem))):
        yield stem[: match.start()]


def cut(samples: int, segments: Sequence[Segment], record_samples: int) -> Iterator[tuple[int, int]]:
    """Yield the records of a recording, as (first sample, last sample + 1) at 16 kHz.

    A segment is cut out where the file is long enough to hold it. A file that holds none of its segments is
    taken to be the segment already.
    """
    spans = [(round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)) for start_s, end_s in segments]
    for first, last in [span for span in spans if span[1] <= samples] or [(0, samples)]:
        for start in range(first, last, record_samples):
            stop = min(start + record_samples, last)
            if start == first or stop - start >= SHORTEST_REMAINDER_S * SAMPLE_RATE:
                yield start, stop


def make_plan(settings: dict[str, Any], recordings: Sequence[Recording], durations_s: Sequence[float]) -> Plan:
    """Distribute recordings over shards. Depends on its arguments alone, not on the recordings' order.

    Args:
        settings: with record_seconds and shard_records, which only a recording of more records than that exceeds.
        recordings: what to distribute.
        durations_s: of the recordings, 0 for unreadable ones. Need not be exact.
    """
    record_samples, shard_records = _record_samples(settings), settings["shard_records"]
    # Neighbours on disk are alike (albums, speakers): a shuffled order mixes them in each shard.
    order = sorted(range(len(recordings)), key=lambda i: _digest(_ORDER_SEED, recordings[i].name))
    shards: list[list[Recording]] = []
    free = 0
    for i in order:
        # islice: a damaged header may claim years. At least 1, so that a shard has a bounded number of files.
        records = cut(round(durations_s[i] * SAMPLE_RATE), recordings[i].segments, record_samples)
        count = max(1, sum(1 for _ in islice(records, shard_records)))
        if count > free:
            shards.append([])
            free = shard_records
        shards[-1].append(recordings[i])
        free -= count
    return Plan(settings, shards)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the shards depend on besides the files."""
    return {
        "sources": sorted(os.path.abspath(source) for source in options.sources),
        "csv": hashlib.sha256(options.csv.read_bytes()).hexdigest() if options.csv else None,
        "record_seconds": options.record_seconds,
        "shard_records": options.shard_records,
        "frontend": frontend_settings(),
    }


def _open_plan(out_dir: Path, settings: dict[str, Any], root: Path, recordings: list[Recording], jobs: int) -> Plan:
    """The plan that is there, or a new one.

    Raises:
        ValueError: the plan that is there was made with other settings or from other files, or there are
            shards without a plan.
    """
    path = out_dir / PLAN_FILE
    if path.exists():
        plan = _read_plan(path)
        _check_settings(out_dir, plan.settings, settings)
        _check_recordings(out_dir, plan, recordings)
        return plan
    if any(out_dir.glob("shard-*")):
        raise ValueError(f"{out_dir} holds shards but no {PLAN_FILE}; take another folder")
    plan = make_plan(settings, recordings, _durations_s(root, recordings, jobs))
    # Compact: for AudioSet this is 2 million recordings.
    shards = [[[item.name, item.size_bytes, item.segments] for item in shard] for shard in plan.shards]
    _write_json(path, {"version": FORMAT_VERSION, "settings": settings, "shards": shards})
    return plan


def _durations_s(root: Path, recordings: Sequence[Recording], jobs: int) -> list[float]:
    paths = [root / recording.name for recording in recordings]
    parts = [paths[first : first + 256] for first in range(0, len(paths), 256)]
    durations_s: list[float] = []
    with (
        tqdm(total=len(paths), desc="reading headers", unit="file", leave=False, disable=None) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for part in pool.map(lambda part: [duration_s(path) for path in part], parts):
            durations_s += part
            bar.update(len(part))
    return durations_s


def _read_plan(path: Path) -> Plan:
    saved = json.loads(path.read_bytes())
    if saved.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path}: version {saved.get('version')}, this code has {FORMAT_VERSION}; take another folder")
    shards = [
        [Recording(name, size, tuple(map(tuple, parts))) for name, size, parts in shard] for shard in saved["shards"]
    ]
    return Plan(saved["settings"], shards)


def _check_settings(out_dir: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    differences = [f"{name} was {there.get(name)}, is {now[name]}" for name in now if there.get(name) != now[name]]
    if differences:
        raise ValueError(f"{out_dir} was begun with other settings, take another folder: {'; '.join(differences)}")


def _check_recordings(out_dir: Path, plan: Plan, recordings: list[Recording]) -> None:
    there = {recording.name: recording for shard in plan.shards for recording in shard}
    now = {recording.name: recording for recording in recordings}
    kinds = {
        "new": now.keys() - there.keys(),
        "gone": there.keys() - now.keys(),
        "changed": {name for name in now.keys() & there.keys() if now[name] != there[name]},
    }
    differences = [f"{len(names)} {kind}, such as {min(names)}" for kind, names in kinds.items() if names]
    if differences:
        raise ValueError(f"the audio files are not those {out_dir} was begun with: {'; '.join(differences)}")


# ---- making it: shards by worker processes, then the index ----


def _make_shards(prog: str, root: Path, out_dir: Path, plan: Plan, todo: list[int], jobs: int) -> None:
    """Make the shards with these numbers. When it is interrupted, whole shards are there or nothing of them.

    Raises:
        OSError: of the output, or of a source that is no longer there.
        BrokenProcessPool: a worker died.
    """
    # Workers also for one job: the values' last bits depend on torch's threads, which are not this process's to set.
    context = _worker_context()
    stop = context.Event()
    pool = ProcessPoolExecutor(min(jobs, len(todo)), context, _start_worker, (stop,))
    record_samples = _record_samples(plan.settings)
    try:
        with _ctrl_c_ignored():  # by the workers: a terminal sends it to them too, even while they start
            futures = [
                pool.submit(_write_shard, root, out_dir, number, plan.shards[number], record_samples) for number in todo
            ]
        with tqdm(total=len(plan.shards), initial=len(plan.shards) - len(todo), unit="shard", disable=None) as bar:
            for future in as_completed(futures):
                for warning in future.result():
                    print_error(prog, f"warning: {warning}")
                bar.update()
    finally:
        stop.set()  # the workers then stop at their next recording
        pool.shutdown(cancel_futures=True)


def _worker_context() -> BaseContext:
    """How workers are started. Forking this process, which has threads, might hang them."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.corpora.prepare"])  # torch is imported once, not in every worker
    return context


_stop: Event | None = None  # in a worker: set once the main process wants no more


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a server that forks it may have been there before
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(
    root: Path, out_dir: Path, number: int, recordings: Sequence[Recording], record_samples: int
) -> list[str]:
    """Make one shard and its sidecar, in a worker. Returns the warnings that came up.

    Raises:
        OSError: the output cannot be written, or a source is no longer there: that is no damaged file but a
            disk that went away, and the shard must not count as done.
    """
    logmel = LogMel()
    records: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    path = out_dir / shard_name(number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for recording in recordings:
                if _stop is not None and _stop.is_set():
                    raise _Stopped
                source = root / recording.name
                try:
                    audio = check_audio(load_audio(source), name=str(source))
                except ValueError as error:
                    failed.append({"source": recording.name, "reason": str(error).replace(str(source), recording.name)})
                    continue
                records += _add_recording(file, tar, recording, audio, record_samples, logmel)
    _write_json(_sidecar(out_dir, number), {"records": records, "failed": failed})
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _add_recording(
    file: BinaryIO, tar: tarfile.TarFile, recording: Recording, audio: Tensor, record_samples: int, logmel: LogMel
) -> Iterator[dict[str, Any]]:
    """Write the records of a recording, and yield what the sidecar says about each.

    Args:
        file: what `tar` writes to.
        tar: the shard.
        recording: where `audio` comes from.
        audio: (1, samples) float32 at 16 kHz.
        record_samples: length of a full record.
        logmel: the front end.
    """
    for i, (first, last) in enumerate(cut(audio.shape[1], recording.segments, record_samples)):
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
        _add_member(file, tar, f"{key}.json", _json_bytes(about))
        yield {"key": key, "offset": end - values.nbytes, **about}


def _add_member(file: BinaryIO, tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file to the shard, without a time or an owner. Returns where its data end, in bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    first = file.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return first + len(data)


def record_key(source: str, number: int) -> str:
    """Name of a record: readable, without dots or slashes, of at most 80 characters, unique by its hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(source)[0])[-60:]
    return f"{readable}-{_digest(b'', source).hex()[:12]}-{number:06d}"


def _write_index(out_dir: Path, shards: int) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Sum up the finished shards in index.json. Returns that and the sources that failed, sorted."""
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for number in range(shards):
        sidecar = json.loads(_sidecar(out_dir, number).read_bytes())
        hours = math.fsum(record["duration_s"] for record in sidecar["records"]) / 3600
        path = out_dir / shard_name(number)
        rows.append(
            {"name": path.name, "records": len(sidecar["records"]), "hours": hours, "bytes": path.stat().st_size}
        )
        failed += sidecar["failed"]
    index = {
        "version": FORMAT_VERSION,
        "frontend": frontend_settings(),
        "records": sum(row["records"] for row in rows),
        "hours": math.fsum(row["hours"] for row in rows),
        "shards": rows,
        "failed": len(failed),
    }
    _write_json(out_dir / INDEX_FILE, index)
    return index, sorted(failed, key=lambda failure: failure["source"])


def _remove_leftovers(out_dir: Path) -> None:
    """Remove what killed processes had not finished (see `atomic_write`)."""
    for unfinished in out_dir.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


def _is_done(out_dir: Path, number: int) -> bool:
    return (out_dir / shard_name(number)).is_file() and _sidecar(out_dir, number).is_file()


def _sidecar(out_dir: Path, number: int) -> Path:
    return (out_dir / shard_name(number)).with_suffix(".json")


def _record_samples(settings: dict[str, Any]) -> int:
    return round(settings["record_seconds"] * SAMPLE_RATE)


def _digest(salt: bytes, name: str) -> bytes:
    # surrogateescape: file names need not be Unicode
    return hashlib.sha256(salt + name.encode("utf-8", "surrogateescape")).digest()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(_json_bytes(value) + b"\n")


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started meanwhile ignore it for good."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals, and may say what becomes of them
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that workers stop too."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
