"""speaker_count: how many people speak at once, one to four, modeled on LibriCount.

A mixture has one to four different voices of its split, each for the full 2 s and all at the same root mean square;
the sum is peak-normalized. A voice is one person as far as the packages tell: a telephone announcer, a reader, or the
speaker of one language in a children's program. Voices that may belong to one person are in the same split: one
language in two programs, and the kajongg players, who may have spoken two languages. No recording of the test split is
in the pretraining corpus.

A voice's 2 s are a random part of a longer recording, or several shorter ones in a row, trimmed of silence. These are
neighbors in the list, so that they come from one session where several people took turns. sources.csv names each
voice's first recording.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.open_tasks.folder import Clip, TaskSpec
from evaluation.open_tasks.sources import WINDOW, loud_windows, normalize_peak, read_list
from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora.recordings import read_recording

SECONDS = 2.0
COUNTS = (1, 2, 3, 4)
MIXTURES = {"train": 1200, "valid": 200, "test": 400}  # each count equally often

GAP_S = 0.1  # between a voice's recordings
SILENCE_DB = 35.0  # below a recording's loudest 20 ms

# Recordings to fill a voice's 2 s with: the shortest last a third of a second.
MAX_RECORDINGS = 8


def speakers_spec() -> TaskSpec:
    """Return the description of speaker_count."""
    return TaskSpec("speaker_count", SECONDS, tuple(MIXTURES), ("top1_acc",), tuple(map(str, COUNTS)))


def speakers_sources() -> list[str]:
    """Return the recordings that speaker_count needs, as PACKAGE/PATH."""
    return [row["path"] for row in read_list("speaker_count")]


def speakers_clips(cache: Path) -> list[Clip]:
    """Return the clips of speaker_count. `cache` is the cache of `training.corpora.archive` with its packages."""
    voices: dict[str, dict[str, list[str]]] = {split: {} for split in MIXTURES}
    for row in read_list("speaker_count"):
        voices[row["split"]].setdefault(row["group"], []).append(row["path"])
    clips = []
    for split, mixtures in MIXTURES.items():
        for number in range(mixtures):
            rng = random.Random(f"speaker_count {split} {number}")
            count = COUNTS[number % len(COUNTS)]
            speaking = rng.sample(sorted(voices[split]), count)
            recordings = []  # of each voice
            for voice in speaking:
                paths = voices[split][voice]
                first = rng.randrange(len(paths))
                recordings.append([paths[(first + i) % len(paths)] for i in range(MAX_RECORDINGS)])
            clips.append(
                Clip(
                    name=f"{split}-{number:04d}.wav",
                    split=split,
                    labels=(str(count),),
                    groups=tuple(speaking),
                    sources=tuple(paths[0] for paths in recordings),
                    make=partial(_mix, recordings, [rng.random() for _ in recordings], cache),
                )
            )
    return clips


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut off silence at both edges, in units of 20 ms."""
    loud = loud_windows(samples, SILENCE_DB)
    return samples[loud[0] * WINDOW : (loud[-1] + 1) * WINDOW]


def utterance(recordings: list[str], position: float, cache: Path) -> np.ndarray:
    """Return 2 s of speech of one voice.

    Args:
        recordings: the voice's recordings; the first ones are used, as many as fill 2 s.
        position: from 0 to 1: which part to take if there is more than 2 s.
        cache: cache of `training.corpora.archive`.

    Returns:
        `SECONDS` of samples with a root mean square of 1.

    Raises:
        ValueError: the recordings are too short.
    """
    length, gap = round(SECONDS * SAMPLE_RATE), round(GAP_S * SAMPLE_RATE)
    speech = trim(read_recording(recordings[0], cache))
    for recording in recordings[1:]:
        if len(speech) >= length:
            break
        speech = np.concatenate([speech, np.zeros(gap, np.float32), trim(read_recording(recording, cache))])
    if len(speech) < length:
        raise ValueError(f"{recordings[0]} and the {len(recordings) - 1} after it are shorter than {SECONDS} s")
    first = int(position * (len(speech) - length))
    part = speech[first : first + length]
    return part / np.sqrt(np.mean(part**2))


def _mix(recordings: list[list[str]], positions: list[float], cache: Path) -> np.ndarray:
    voices = [utterance(paths, position, cache) for paths, position in zip(recordings, positions)]
    return normalize_peak(np.sum(voices, axis=0))
