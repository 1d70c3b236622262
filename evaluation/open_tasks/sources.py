"""What the tasks share: lists of recordings, and clips of one length and level from them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np

from hear_encoders.nn.frontend import SAMPLE_RATE

# Lists of what the tasks are made of.
LISTS = Path(__file__).parent / "lists"

# Peak of clips: almost full scale. Where a recording's level says only which package it is from, it is levelled out.
PEAK = 0.9


def read_list(name: str) -> list[dict[str, str]]:
    """Read one of the lists in `tasks/`: a CSV file, plain or compressed."""
    plain = LISTS / f"{name}.csv"
    if plain.is_file():
        return list(csv.DictReader(io.StringIO(plain.read_text(encoding="utf-8"))))
    with gzip.open(plain.with_suffix(".csv.gz"), "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fit(samples: np.ndarray, seconds: float) -> np.ndarray:
    """The beginning of a recording: cut, or followed by silence."""
    length = round(seconds * SAMPLE_RATE)
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def level(samples: np.ndarray) -> np.ndarray:
    """Bring the peak to `PEAK`; silence stays silent."""
    peak = np.abs(samples).max()
    return samples * np.float32(PEAK / peak) if peak > 0 else samples


def clip_name(recording: str) -> str:
    """A file name for a recording: readable, and unique by its hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(recording)[0])[-60:].strip("_")
    return f"{readable}-{hashlib.sha256(recording.encode()).hexdigest()[:8]}.wav"
