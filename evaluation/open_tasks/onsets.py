"""onsets: drum hits at random, known times on quiet music or ambience, as in DCASE 2016 task 2.

The hits are those of drum_stroke; a split has the kits of whole folds, and its own backgrounds, so that neither
crosses (every group below is a kit's maker or a background's author). A clip is 5 s long and has one background,
repeated without a gap where it is shorter, and 6 to 14 hits of classes drawn evenly. What is loud as 100 ms of a hit
stands 6 to 30 dB above the background; then the whole clip is peak-normalised.

An event begins where its hit first reaches a tenth of its peak, and ends when it has decayed by 30 dB, but lasts at
least 0.2 s and at most 1 s. Onsets are at least 0.2 s apart, and 0.3 s of silence in a class separate two of its
events, so that each can be found after smoothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, Label, Task
from evaluation.open_tasks.sources import level, read_list
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.recordings import read_recording

SECONDS = 5.0
CLIPS = {"train": 40, "valid": 20, "test": 40}
MAX_EPOCHS = 100

# Folds of drum_stroke. Every class is in each of the three.
FOLDS = {"train": ("fold0", "fold3"), "valid": ("fold2",), "test": ("fold1", "fold4")}

HITS = (6, 14)  # per clip
ABOVE_BACKGROUND_DB = (6.0, 30.0)
SPACING_S = 0.2  # between onsets
SILENCE_S = 0.3  # of a class, between its events
EVENT_S = (0.2, 1.0)  # shortest and longest
DECAY_DB = 30.0

ONSET_SHARE = 0.1  # of the peak
BEFORE_ONSET_S = 0.005
HIT_S = 1.5  # a hit that goes on is faded out
FADE_S = 0.1
CROSSFADE_S = 0.25  # where a background is repeated
LAST_ONSET_S = SECONDS - EVENT_S[1]


@dataclass(frozen=True)
class Hit:
    """A hit, ready to be mixed.

    Attributes:
        samples: (N,) float32; 100 ms from the onset on have a root mean square of 1.
        onset: index of the sample at which its event begins.
        event_s: how long its event lasts.
    """

    samples: np.ndarray
    onset: int
    event_s: float


@dataclass(frozen=True)
class Placed:
    """A hit in a clip."""

    path: str
    label: str
    onset_s: float
    above_db: float
    event_s: float


def onsets_task() -> Task:
    return Task(
        "onsets",
        SECONDS,
        ("train", "valid", "test"),
        ("event_onset_200ms_fms", "event_onset_50ms_fms"),
        tuple(sorted({row["label"] for row in read_list("drum_stroke")})),
        events=True,
        parameters={
            "use_scoring_for_early_stopping": True,
            "evaluation_params": {
                # heareval's own (250 ms, at least 125 ms) would smooth the shortest events away.
                "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]},
                # Every step of 40 ms is an example: an epoch has 5 batches, where clips of most tasks fill one.
                "task_specific_param_grid": {"max_epochs": [MAX_EPOCHS]},
            },
        },
    )


def onsets_sources() -> list[str]:
    return [row["path"] for name in ("drum_stroke", "onset_backgrounds") for row in read_list(name)]


def onsets_clips(cache: Path) -> list[Clip]:
    """The clips of this task. Reads every hit, since events end when they have decayed."""
    clips = []
    for split, folds in FOLDS.items():
        rows = [row for row in read_list("drum_stroke") if row["split"] in folds]
        hits = {row["path"]: prepare_hit(read_recording(row["path"], cache)) for row in rows}
        by_label: dict[str, list[str]] = {}
        for row in rows:
            by_label.setdefault(row["label"], []).append(row["path"])
        backgrounds = [row for row in read_list("onset_backgrounds") if row["split"] == split]
        group_of = {row["path"]: row["group"] for row in (*rows, *backgrounds)}
        for number in range(CLIPS[split]):
            rng = random.Random(f"onsets {split} {number}")
            background = backgrounds[number % len(backgrounds)]["path"]
            placed = place_hits(by_label, {path: hit.event_s for path, hit in hits.items()}, rng)
            sources = (background, *(hit.path for hit in placed))
            clips.append(
                Clip(
                    f"{split}-{number:03d}.wav",
                    split,
                    tuple(events_of(placed)),
                    tuple(dict.fromkeys(group_of[path] for path in sources)),
                    sources,
                    partial(_mix, background, placed, hits, rng.random(), cache),
                )
            )
    return clips


def prepare_hit(samples: np.ndarray) -> Hit:
    """Cut a recording of a hit to what is heard of it, and find out how long that is."""
    onset = int(np.argmax(np.abs(samples) >= ONSET_SHARE * np.abs(samples).max()))
    first = max(0, onset - round(BEFORE_ONSET_S * SAMPLE_RATE))
    hit = samples[first : first + round(HIT_S * SAMPLE_RATE)].astype(np.float32)
    if first + len(hit) < len(samples):
        fade = round(FADE_S * SAMPLE_RATE)
        hit[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    onset -= first
    heard = hit[onset:]
    hit /= np.sqrt(np.mean(heard[: SAMPLE_RATE // 10] ** 2))
    return Hit(hit, onset, float(np.clip(_decay_s(heard), *EVENT_S)))


def place_hits(by_label: dict[str, list[str]], event_s: dict[str, float], rng: random.Random) -> list[Placed]:
    """Draw hits and their times.

    Args:
        by_label: the recordings of each class.
        event_s: how long the event of each recording lasts.
        rng: what is drawn from.

    Returns:
        Hits in the order of their onsets.
    """
    placed: list[Placed] = []
    wanted = rng.randint(*HITS)
    for _ in range(100 * wanted):  # far more than needed: the clip has room
        if len(placed) == wanted:
            break
        label = rng.choice(sorted(by_label))
        path = rng.choice(by_label[label])
        onset_s = round(rng.uniform(BEFORE_ONSET_S, LAST_ONSET_S), 3)
        hit = Placed(path, label, onset_s, rng.uniform(*ABOVE_BACKGROUND_DB), event_s[path])
        if all(_apart(hit, other) for other in placed):
            placed.append(hit)
    return sorted(placed, key=lambda hit: hit.onset_s)


def events_of(placed: list[Placed]) -> list[Label]:
    return [
        {
            "label": hit.label,
            "start": round(1000 * hit.onset_s, 1),
            "end": round(1000 * (hit.onset_s + hit.event_s), 1),
        }
        for hit in placed
    ]


def repeat(samples: np.ndarray, length: int, first: int) -> np.ndarray:
    """A recording from sample `first` on, repeated with crossfades up to `length` samples."""
    fade = min(round(CROSSFADE_S * SAMPLE_RATE), len(samples) // 4)
    ramp = np.sqrt(np.linspace(0, 1, fade, dtype=np.float32))  # equal power
    loop = samples[fade:].copy()
    loop[-fade:] = loop[-fade:] * ramp[::-1] + samples[:fade] * ramp
    first %= len(loop)
    return np.tile(loop, -(-(first + length) // len(loop)))[first : first + length]


def _apart(hit: Placed, other: Placed) -> bool:
    if abs(hit.onset_s - other.onset_s) < SPACING_S:
        return False
    earlier, later = sorted((hit, other), key=lambda one: one.onset_s)
    return hit.label != other.label or later.onset_s >= earlier.onset_s + earlier.event_s + SILENCE_S


def _decay_s(heard: np.ndarray) -> float:
    """Time after which 20 ms of a hit stay `DECAY_DB` below its loudest 20 ms."""
    window = SAMPLE_RATE // 50
    padded = np.pad(heard, (0, -len(heard) % window))
    power = np.mean(padded.reshape(-1, window) ** 2, axis=1)
    last = np.flatnonzero(power >= power.max() * 10 ** (-DECAY_DB / 10))[-1]
    return (last + 1) * window / SAMPLE_RATE


def _mix(background: str, placed: list[Placed], hits: dict[str, Hit], phase: float, cache: Path) -> np.ndarray:
    length = round(SECONDS * SAMPLE_RATE)
    samples = read_recording(background, cache)
    mix = repeat(samples, length, int(phase * len(samples)))
    mix = mix / np.sqrt(np.mean(mix**2))
    for hit in placed:
        drum = hits[hit.path]
        first = round(hit.onset_s * SAMPLE_RATE) - drum.onset
        heard = drum.samples[: length - first]
        mix[first : first + len(heard)] += heard * np.float32(10 ** (hit.above_db / 20))
    return level(mix)
