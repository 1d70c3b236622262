"""speaker_count: how many people speak at once, one to four, in the manner of LibriCount.

A mixture has one to four different voices of its split, each for all of its 2 s and all at the same root mean square;
then it is peak-normalised. A voice is one person as far as the packages tell: a telephone announcer, a reader, or who
spoke a language of a children's program. Voices of one language that might be the same volunteer in two programs, and
the kajongg players who may have spoken two languages, are in the same split; and of the test split's recordings none
is meant to be pretrained on.

A voice's 2 s are a random part of a longer recording, or shorter ones one after the other, silence at their edges
cut off. These are neighbours in the list, so that they come from one session where several people took turns. A
task's sources.csv names the recording that each voice begins with.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, Task
from evaluation.open_tasks.sources import level, read_list
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.recordings import read_recording

SECONDS = 2.0
COUNTS = (1, 2, 3, 4)
MIXTURES = {"train": 1200, "valid": 200, "test": 400}  # as many of each count

GAP_S = 0.1  # between a voice's recordings
SILENCE_DB = 35.0  # below a recording's loudest 20 ms

# Recordings that a voice's 2 s may be put together from: the shortest last a third of a second.
_AT_MOST = 8


def speakers_task() -> Task:
    return Task("speaker_count", SECONDS, tuple(MIXTURES), ("top1_acc",), tuple(map(str, COUNTS)))


def speakers_sources() -> list[str]:
    return [row["path"] for row in read_list("speaker_count")]


def speakers_clips(cache: Path) -> list[Clip]:
    voices: dict[str, dict[str, list[str]]] = {split: {} for split in MIXTURES}
    for row in read_list("speaker_count"):
        voices[row["split"]].setdefault(row["group"], []).append(row["path"])
    clips = []
    for split, mixtures in MIXTURES.items():
        for number in range(mixtures):
            rng = random.Random(f"speaker_count {split} {number}")
            count = COUNTS[number % len(COUNTS)]
            speaking = rng.sample(sorted(voices[split]), count)
            parts = []
            for voice in speaking:
                recordings = voices[split][voice]
                first = rng.randrange(len(recordings))
                parts.append([recordings[(first + i) % len(recordings)] for i in range(_AT_MOST)])
            clips.append(
                Clip(
                    f"{split}-{number:04d}.wav",
                    split,
                    (str(count),),
                    tuple(speaking),
                    tuple(part[0] for part in parts),
                    partial(_mix, parts, [rng.random() for _ in parts], cache),
                )
            )
    return clips


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut off what is silent at the edges, in steps of 20 ms."""
    window = SAMPLE_RATE // 50
    padded = np.pad(samples, (0, -len(samples) % window))
    power = np.mean(padded.reshape(-1, window) ** 2, axis=1)
    loud = np.flatnonzero(power >= power.max() * 10 ** (-SILENCE_DB / 10))
    return samples[loud[0] * window : (loud[-1] + 1) * window]


def utterance(recordings: list[str], place: float, cache: Path) -> np.ndarray:
    """What one voice says.

    Args:
        recordings: of the voice; as many as are needed are taken, from the first one on.
        place: between 0 and 1, which part to take if there is more than enough.
        cache: of `training.corpora.archive`.

    Returns:
        `SECONDS` of samples with a root mean square of 1.
    """
    length, gap = round(SECONDS * SAMPLE_RATE), round(GAP_S * SAMPLE_RATE)
    said = trim(read_recording(recordings[0], cache))
    for recording in recordings[1:]:
        if len(said) >= length:
            break
        said = np.concatenate([said, np.zeros(gap, np.float32), trim(read_recording(recording, cache))])
    if len(said) < length:
        raise ValueError(f"{recordings[0]} and the {len(recordings) - 1} after it are shorter than {SECONDS} s")
    first = int(place * (len(said) - length))
    part = said[first : first + length]
    return part / np.sqrt(np.mean(part**2))


def _mix(parts: list[list[str]], places: list[float], cache: Path) -> np.ndarray:
    return level(np.sum([utterance(part, place, cache) for part, place in zip(parts, places)], axis=0))
