"""The plan of a folder of shards, which assigns excerpts of audio files to shards.

It is made once, from the lengths in the files' headers, and kept in plan.json. An interrupted run continues with the
same plan, so its shards come out the same as those of a run without interruptions.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hear_encoders.audio import AudioFile, duration_s
from hear_encoders.console import progress
from hear_encoders.files import settings_difference, write_json
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.shards import FORMAT_VERSION, damage_named, read_object

PLAN_FILE = "plan.json"

# If the last record of an excerpt would be shorter, it is dropped.
SHORTEST_REMAINDER_S = 0.3

_SHUFFLE_SALT = b"order of recordings 1"

Excerpt = tuple[float, float]  # start_s, end_s


@dataclass(frozen=True)
class Recording:
    """An audio file and the excerpts to take from it."""

    name: str  # path relative to the root
    size_bytes: int  # detects a file that was replaced between two runs
    excerpts: tuple[Excerpt, ...] = ()  # empty: the whole file


@dataclass(frozen=True)
class Plan:
    """`shards[n]` holds the recordings of shard n, in order."""

    settings: dict[str, Any]
    shards: list[list[Recording]]


def read_excerpts(*paths: str | os.PathLike[str]) -> dict[str, list[Excerpt]]:
    """Read lists in AudioSet's format (`unbalanced_train_segments.csv`): excerpts by YouTube id.

    Its lines are `YTID, start_seconds, end_seconds, labels`, or comments that begin with `#`.

    Raises:
        OSError: a list cannot be read.
        ValueError: a malformed line, or a list without excerpts.
    """
    excerpts: dict[str, list[Excerpt]] = {}
    for path in paths:
        found = list(_read_list(path))
        if not found:
            raise ValueError(f"{path} lists no excerpts")
        for name, excerpt in found:
            excerpts.setdefault(name, []).append(excerpt)
    return excerpts


def _read_list(path: str | os.PathLike[str]) -> Iterator[tuple[str, Excerpt]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                name, start_s, end_s = next(csv.reader([line], skipinitialspace=True))[:3]
                excerpt = (float(start_s), float(end_s))
                if not 0 <= excerpt[0] < excerpt[1] < math.inf:
                    raise ValueError
            except (ValueError, csv.Error) as error:
                raise ValueError(
                    f"{path}, line {number}: expected YTID, start_seconds, end_seconds, labels; got {line.strip()!r}"
                ) from error
            yield name.strip(), excerpt


def select(files: Sequence[AudioFile], excerpts: dict[str, list[Excerpt]] | None) -> list[Recording]:
    """Return the recordings to prepare, in the files' order.

    Args:
        files: candidates.
        excerpts: by id; selects the files whose name is an id, or an id followed by `_` and anything. None selects
            all files whole.

    Raises:
        ValueError: no file matches an id.
    """
    recordings = []
    for file in files:
        wanted: tuple[Excerpt, ...] = ()
        if excerpts is not None:
            listed = _find_id(file.path.stem, excerpts)
            if listed is None:
                continue
            wanted = tuple(sorted(set(excerpts[listed])))
        recordings.append(Recording(file.name, file.path.stat().st_size, wanted))
    if not recordings:
        raise ValueError(f"none of the {len(files)} audio files is in the list")
    return recordings


def missing_ids(files: Sequence[AudioFile], excerpts: dict[str, list[Excerpt]]) -> list[str]:
    """Return the listed ids that no file belongs to, sorted."""
    return sorted(excerpts.keys() - {_find_id(file.path.stem, excerpts) for file in files})


def _find_id(stem: str, excerpts: Container[str]) -> str | None:
    """Return the listed id that a file's name stands for: the stem, or else the longest part before a `_`.

    Ids themselves may contain `_`.
    """
    ends = [len(stem), *(match.start() for match in reversed(list(re.finditer("_", stem))))]
    return next((stem[:end] for end in ends if stem[:end] in excerpts), None)


def cut(samples: int, excerpts: Sequence[Excerpt], record_samples: int) -> Iterator[tuple[int, int]]:
    """Yield a recording's records as (first sample, last sample + 1) at 16 kHz.

    Excerpts that end within the file are cut out of it. If none does, the file is taken to be the excerpt itself.
    """
    spans = [(round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)) for start_s, end_s in excerpts]
    for first, last in [span for span in spans if span[1] <= samples] or [(0, samples)]:
        for start in range(first, last, record_samples):
            stop = min(start + record_samples, last)
            if start == first or stop - start >= SHORTEST_REMAINDER_S * SAMPLE_RATE:
                yield start, stop


def make_plan(settings: dict[str, Any], recordings: Sequence[Recording], durations_s: Sequence[float]) -> Plan:
    """Distribute recordings over shards. The plan does not depend on their order.

    Args:
        settings: with record_seconds and shard_records. A shard exceeds shard_records only if it is a single
            recording.
        recordings: to distribute.
        durations_s: the recordings' lengths; 0 for an unreadable file. Need not be exact.
    """
    record_samples, shard_records = samples_per_record(settings), settings["shard_records"]
    # Neighbors on disk are alike (albums, speakers), so shuffle them across the shards.
    order = sorted(range(len(recordings)), key=lambda i: digest(recordings[i].name, _SHUFFLE_SALT))
    shards: list[list[Recording]] = []
    free = 0
    for i in order:
        # islice: a damaged header may claim years. Count at least 1, so that a shard has a bounded number of files.
        records = cut(round(durations_s[i] * SAMPLE_RATE), recordings[i].excerpts, record_samples)
        count = max(1, sum(1 for _ in islice(records, shard_records)))
        if count > free:
            shards.append([])
            free = shard_records
        shards[-1].append(recordings[i])
        free -= count
    return Plan(settings, shards)


def read_or_make_plan(
    out_dir: Path, settings: dict[str, Any], root: Path, recordings: Sequence[Recording], jobs: int
) -> Plan:
    """Read the folder's plan, or make one and write it.

    Raises:
        ValueError: the plan was made with other settings or from other files; or the folder has shards but no plan.
    """
    path = out_dir / PLAN_FILE
    if path.exists():
        plan = _read_plan(path)
        if difference := settings_difference(plan.settings, settings):
            raise ValueError(f"{out_dir} holds shards made with {difference}: choose another folder")
        _check_recordings(out_dir, plan, recordings)
        return plan
    if any(out_dir.glob("shard-*")):
        raise ValueError(f"{out_dir} holds shards but no {PLAN_FILE}: choose another folder")
    plan = make_plan(settings, recordings, _read_durations_s(root, recordings, jobs))
    shards = [[[item.name, item.size_bytes, item.excerpts] for item in shard] for shard in plan.shards]
    # Compact: AudioSet has 2 million recordings.
    write_json(path, {"version": FORMAT_VERSION, "settings": settings, "shards": shards}, indent=None)
    return plan


def _read_durations_s(root: Path, recordings: Sequence[Recording], jobs: int) -> list[float]:
    paths = [root / recording.name for recording in recordings]
    batches = [paths[first : first + 256] for first in range(0, len(paths), 256)]
    durations_s: list[float] = []
    with progress(len(paths), "file", "reading headers") as advance, ThreadPoolExecutor(jobs) as pool:
        for batch in pool.map(lambda batch: [duration_s(path) for path in batch], batches):
            durations_s += batch
            advance(len(batch))
    return durations_s


def _read_plan(path: Path) -> Plan:
    saved = read_object(path)
    if saved.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: version {saved.get('version')}, this code writes {FORMAT_VERSION}: choose another folder"
        )
    with damage_named(path):
        shards = [
            [Recording(name, size, tuple(map(tuple, excerpts))) for name, size, excerpts in shard]
            for shard in saved["shards"]
        ]
        return Plan(dict(saved["settings"]), shards)


def _check_recordings(out_dir: Path, plan: Plan, recordings: Sequence[Recording]) -> None:
    earlier = {recording.name: recording for shard in plan.shards for recording in shard}
    now = {recording.name: recording for recording in recordings}
    kinds = {
        "new": now.keys() - earlier.keys(),
        "gone": earlier.keys() - now.keys(),
        "changed": {name for name in now.keys() & earlier.keys() if now[name] != earlier[name]},
    }
    differences = [f"{len(names)} {kind}, such as {min(names)}" for kind, names in kinds.items() if names]
    if differences:
        raise ValueError(f"the audio files have changed since {out_dir} was begun: {'; '.join(differences)}")


def samples_per_record(settings: dict[str, Any]) -> int:
    """Return the length of a full record in samples at 16 kHz."""
    return round(settings["record_seconds"] * SAMPLE_RATE)


def digest(name: str, salt: bytes = b"") -> bytes:
    """Return the SHA-256 of a file name, which need not be Unicode."""
    return hashlib.sha256(salt + name.encode("utf-8", "surrogateescape")).digest()
