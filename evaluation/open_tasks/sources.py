"""Helpers that the tasks share: lists of recordings, and clips of one length and level made from them."""

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

LISTS_DIR = Path(__file__).parent / "lists"

# Peak of every clip, just below full scale. Levels differ between packages, so they would give the package away.
PEAK = 0.9

WINDOW = SAMPLE_RATE // 50  # samples in 20 ms


def read_list(name: str) -> list[dict[str, str]]:
    """Read the rows of a list in `lists/`: NAME.csv or NAME.csv.gz."""
    path = LISTS_DIR / f"{name}.csv"
    text = path.read_bytes() if path.is_file() else gzip.decompress(path.with_suffix(".csv.gz").read_bytes())
    return list(csv.DictReader(io.StringIO(text.decode(), newline="")))


def cut_or_pad(samples: np.ndarray, seconds: float) -> np.ndarray:
    """Return the first `seconds` of a recording (16 kHz), with silence after a shorter one."""
    length = round(seconds * SAMPLE_RATE)
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def normalize_peak(samples: np.ndarray) -> np.ndarray:
    """Scale samples to a peak of `PEAK`; silence stays silent."""
    peak = np.abs(samples).max()
    return samples * np.float32(PEAK / peak) if peak > 0 else samples


def loud_windows(samples: np.ndarray, below_db: float) -> np.ndarray:
    """Return the indices of the 20 ms windows whose power is at most `below_db` below that of the loudest."""
    padded = np.pad(samples, (0, -len(samples) % WINDOW))
    power = np.mean(padded.reshape(-1, WINDOW) ** 2, axis=1)
    return np.flatnonzero(power >= power.max() * 10 ** (-below_db / 10))


def clip_name(recording: str) -> str:
    """Return a readable file name for a recording, made unique by a hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(recording)[0])[-60:].strip("_")
    return f"{readable}-{hashlib.sha256(recording.encode()).hexdigest()[:8]}.wav"
