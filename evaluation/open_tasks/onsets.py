"""onsets: drum hits at random, known times over quiet music or ambience, modeled on DCASE 2016 task 2.

The hits are those of drum_stroke. A split has the kits of whole folds and its own backgrounds, so neither crosses
splits; a group is a kit's maker or a background's author. A clip is 5 s long and has one background, looped without a
gap if it is shorter, and 6 to 14 hits with classes drawn uniformly. The first 100 ms of a hit are 6 to 30 dB above the
background in root mean square; then the clip is peak-normalized.

An event begins where its hit first reaches a tenth of its peak. It ends where the hit has decayed by 30 dB, after at
least 0.2 s and at most 1 s. Onsets are at least 0.2 s apart, and events of one class are separated by at least 0.3 s,
so that smoothed predictions can tell them apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, Label, TaskSpec
from evaluation.open_tasks.sources import WINDOW, loud_windows, normalize_peak, read_list
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.recordings import read_recording

SECONDS = 5.0
CLIPS = {"train": 40, "valid": 20, "test": 40}
MAX_EPOCHS = 100

# The folds of drum_stroke in each split. Every split has all classes.
FOLDS = {"train": ("fold0", "fold3"), "valid": ("fold2",), "test": ("fold1", "fold4")}

HITS_PER_CLIP = (6, 14)
ABOVE_BACKGROUND_DB = (6.0, 30.0)
ONSET_SPACING_S = 0.2
CLASS_GAP_S = 0.3  # from an event's end to the next onset of its class
EVENT_S = (0.2, 1.0)  # shortest and longest event
DECAY_DB = 30.0

ONSET_LEVEL = 0.1  # fraction of a hit's peak
BEFORE_ONSET_S = 0.005  # kept of the recording before the onset
MAX_HIT_S = 1.5  # longer hits are faded out
FADE_S = 0.1
CROSSFADE_S = 0.25  # where a background loops
LAST_ONSET_S = SECONDS - EVENT_S[1]


@dataclass(frozen=True)
class Hit:
    """A hit, ready to be mixed.

    Attributes:
        samples: (N,) float32, scaled so that the 100 ms from the onset have a root mean square of 1.
        onset: index of the sample at which the event begins.
        event_s: duration of the event.
    """

    samples: np.ndarray
    onset: int
    event_s: float


@dataclass(frozen=True)
class PlacedHit:
    """A hit with its time and level in a clip."""

    path: str
    label: str
    onset_s: float
    above_db: float
    event_s: float


def onsets_spec() -> TaskSpec:
    """Return the description of onsets."""
    return TaskSpec(
        "onsets",
        SECONDS,
        ("train", "valid", "test"),
        ("event_onset_200ms_fms", "event_onset_50ms_fms"),
        tuple(sorted({row["label"] for row in read_list("drum_stroke")})),
        events=True,
        parameters={
            "use_scoring_for_early_stopping": True,
            "evaluation_params": {
                # heareval's defaults (250 ms median filter, at least 125 ms) would remove the shortest events.
                "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]},
                # Every 40 ms step is an example, so an epoch has 5 batches; most tasks have one.
                "task_specific_param_grid": {"max_epochs": [MAX_EPOCHS]},
            },
        },
    )


def onsets_sources() -> list[str]:
    """Return the recordings that onsets needs, as PACKAGE/PATH."""
    return [row["path"] for name in ("drum_stroke", "onset_backgrounds") for row in read_list(name)]


def onsets_clips(cache: Path) -> list[Clip]:
    """Return the clips of onsets. This reads every hit, because its decay determines its event's end.

    Args:
        cache: cache of `training.corpora.archive` with the task's packages.
    """
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
                    name=f"{split}-{number:03d}.wav",
                    split=split,
                    labels=tuple(events_of(placed)),
                    groups=tuple(dict.fromkeys(group_of[path] for path in sources)),
                    sources=sources,
                    make=partial(_mix, background, placed, hits, rng.random(), cache),
                )
            )
    return clips


def prepare_hit(samples: np.ndarray) -> Hit:
    """Cut a recording to its audible hit, scale it and measure its duration."""
    onset = int(np.argmax(np.abs(samples) >= ONSET_LEVEL * np.abs(samples).max()))
    first = max(0, onset - round(BEFORE_ONSET_S * SAMPLE_RATE))
    hit = samples[first : first + round(MAX_HIT_S * SAMPLE_RATE)].astype(np.float32)
    if first + len(hit) < len(samples):
        fade = round(FADE_S * SAMPLE_RATE)
        hit[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    onset -= first
    from_onset = hit[onset:]
    hit /= np.sqrt(np.mean(from_onset[: SAMPLE_RATE // 10] ** 2))
    return Hit(hit, onset, float(np.clip(_decay_s(from_onset), *EVENT_S)))


def place_hits(by_label: dict[str, list[str]], event_s: dict[str, float], rng: random.Random) -> list[PlacedHit]:
    """Draw a clip's hits and their times.

    Args:
        by_label: recordings of each class.
        event_s: event duration of each recording.
        rng: source of randomness.

    Returns:
        Hits in order of their onsets.
    """
    placed: list[PlacedHit] = []
    wanted = rng.randint(*HITS_PER_CLIP)
    for _ in range(100 * wanted):  # far more tries than it takes to find room for all
        if len(placed) == wanted:
            break
        label = rng.choice(sorted(by_label))
        path = rng.choice(by_label[label])
        onset_s = round(rng.uniform(BEFORE_ONSET_S, LAST_ONSET_S), 3)
        hit = PlacedHit(path, label, onset_s, rng.uniform(*ABOVE_BACKGROUND_DB), event_s[path])
        if all(_far_enough_apart(hit, other) for other in placed):
            placed.append(hit)
    return sorted(placed, key=lambda hit: hit.onset_s)


def events_of(placed: list[PlacedHit]) -> list[Label]:
    """Return hits as HEAR's events, with times in milliseconds."""
    return [
        {
            "label": hit.label,
            "start": round(1000 * hit.onset_s, 1),
            "end": round(1000 * (hit.onset_s + hit.event_s), 1),
        }
        for hit in placed
    ]


def loop(samples: np.ndarray, length: int, first: int) -> np.ndarray:
    """Return `length` samples of a recording from sample `first` on, looped with crossfades."""
    fade = min(round(CROSSFADE_S * SAMPLE_RATE), len(samples) // 4)
    ramp = np.sqrt(np.linspace(0, 1, fade, dtype=np.float32))  # equal power
    cycle = samples[fade:].copy()
    cycle[-fade:] = cycle[-fade:] * ramp[::-1] + samples[:fade] * ramp
    first %= len(cycle)
    return np.tile(cycle, -(-(first + length) // len(cycle)))[first : first + length]


def _far_enough_apart(hit: PlacedHit, other: PlacedHit) -> bool:
    if abs(hit.onset_s - other.onset_s) < ONSET_SPACING_S:
        return False
    earlier, later = sorted((hit, other), key=lambda one: one.onset_s)
    return hit.label != other.label or later.onset_s >= earlier.onset_s + earlier.event_s + CLASS_GAP_S


def _decay_s(from_onset: np.ndarray) -> float:
    """Return the time after which every 20 ms of a hit are more than `DECAY_DB` below the loudest 20 ms."""
    return (loud_windows(from_onset, DECAY_DB)[-1] + 1) * WINDOW / SAMPLE_RATE


def _mix(background: str, placed: list[PlacedHit], hits: dict[str, Hit], phase: float, cache: Path) -> np.ndarray:
    length = round(SECONDS * SAMPLE_RATE)
    samples = read_recording(background, cache)
    mix = loop(samples, length, int(phase * len(samples)))
    mix = mix / np.sqrt(np.mean(mix**2))
    for placed_hit in placed:
        hit = hits[placed_hit.path]
        first = round(placed_hit.onset_s * SAMPLE_RATE) - hit.onset
        part = hit.samples[: length - first]
        mix[first : first + len(part)] += part * np.float32(10 ** (placed_hit.above_db / 20))
    return normalize_peak(mix)
