"""Tasks whose clips are rendered notes, modeled on NSynth: pitch and instrument families.

Each of three sound fonts renders 16 notes from MIDI 36 to 83 with every General MIDI program from 0 to 79 except 55,
which plays a stab of several notes. A clip is 2 s, without reverb and chorus, peak-normalized. The 48 pitches are
shuffled and dealt to the programs, again and again, so all pitches are about equally frequent. A note that a sound font
lacks, such as the highest ones of a few instruments, is left out.

    pitch               trains on FluidR3_GM; tests on the two other fonts with other programs. 5 programs of each
                        family are for training, one of which validates; the rest are for testing
    instrument_family   the same notes; trains on FluidR3_GM, tests on all notes of the two others. The classes are the
                        General MIDI families. Two programs of each validate
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.open_tasks.fluidsynth import render, synthesizer_packages
from evaluation.open_tasks.folder import Clip, TaskSpec
from evaluation.open_tasks.sources import normalize_peak
from hear_encoders.console import progress
from training.corpora import archive

SECONDS = 2.0
NOTES = range(36, 84)
NOTES_PER_PROGRAM = 16
PROGRAMS = tuple(program for program in range(80) if program != 55)

# The General MIDI families, of eight programs each.
FAMILIES = (
    "piano",
    "chromatic percussion",
    "organ",
    "guitar",
    "bass",
    "strings",
    "ensemble",
    "brass",
    "reed",
    "pipe",
)

TRAIN_PROGRAMS = 5  # of each family, in pitch; includes the validation programs
VALID_PROGRAMS = {"pitch": 1, "instrument_family": 2}  # of each family

# A peak below this means that the sound font lacks the note; the quietest notes peak at 0.01.
SILENCE = 1e-4


class SoundFont(NamedTuple):
    """A General MIDI sound font in a Debian package."""

    name: str
    package: str
    path: str


class Instrument(NamedTuple):
    """A program of a sound font, with its notes. All of them are in one split."""

    split: str
    font: SoundFont
    program: int
    notes: tuple[int, ...]


TRAIN_FONT = SoundFont("FluidR3_GM", "fluid-soundfont-gm", "usr/share/sounds/sf2/FluidR3_GM.sf2")
TEST_FONTS = (
    SoundFont("GeneralUser", "minuet-data", "usr/share/minuet/soundfonts/GeneralUser-v1.47.sf2"),
    SoundFont("TimGM6mb", "timgm6mb-soundfont", "usr/share/sounds/sf2/TimGM6mb.sf2"),
)


def rendered_spec(name: str) -> TaskSpec:
    """Return the description of one of these tasks."""
    splits = ("train", "valid", "test")
    if name == "pitch":
        # Ascending, because chroma_acc compares label indices modulo 12.
        return TaskSpec(name, SECONDS, splits, ("pitch_acc", "chroma_acc"), tuple(str(note) for note in NOTES))
    return TaskSpec(name, SECONDS, splits, ("top1_acc",), FAMILIES)


def rendered_sources() -> list[str]:
    """Return the sound fonts that these tasks need, as PACKAGE/PATH."""
    return [f"{font.package}/{font.path}" for font in (TRAIN_FONT, *TEST_FONTS)]


def split_programs(name: str) -> dict[str, tuple[int, ...]]:
    """Return each split's programs: drawn per family, the same in every run."""
    splits: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for family in range(len(FAMILIES)):
        programs = [program for program in PROGRAMS if program // 8 == family]
        random.Random(f"programs of family {family}").shuffle(programs)
        for_training = programs[:TRAIN_PROGRAMS] if name == "pitch" else programs
        splits["valid"] += for_training[: VALID_PROGRAMS[name]]
        splits["train"] += for_training[VALID_PROGRAMS[name] :]
        splits["test"] += programs[TRAIN_PROGRAMS:] if name == "pitch" else programs
    return {split: tuple(sorted(programs)) for split, programs in splits.items()}


def deal_notes(font: str) -> dict[int, tuple[int, ...]]:
    """Return the notes of each program in a sound font, the same in every run and in both tasks."""
    rng = random.Random(f"notes of {font}")
    deck: list[int] = []
    dealt = {}
    for program in PROGRAMS:
        if not deck:
            deck = list(NOTES)
            rng.shuffle(deck)
        dealt[program] = tuple(sorted(deck[:NOTES_PER_PROGRAM]))
        deck = deck[NOTES_PER_PROGRAM:]  # a deck of 48 serves three programs
    return dealt


def rendered_clips(name: str, cache: Path, jobs: int = 1) -> list[Clip]:
    """Return the clips of one of these tasks. This renders all notes, to leave out those that a sound font lacks.

    Args:
        name: the task.
        cache: cache of `training.corpora.archive` with the sound fonts' packages; gets FluidSynth's packages.
        jobs: number of instruments rendered at a time.
    """
    synthesizer = list(archive.fetch(synthesizer_packages(), cache).values())
    instruments = [
        Instrument(split, font, program, deal_notes(font.name)[program])
        for split, programs in split_programs(name).items()
        for font in (TEST_FONTS if split == "test" else (TRAIN_FONT,))
        for program in programs
    ]

    def render_one(instrument: Instrument) -> dict[int, np.ndarray]:
        path = archive.locate(cache / instrument.font.package, instrument.font.path)
        rendered = render(instrument.notes, instrument.program, path, SECONDS, synthesizer)
        return {
            # 16 bits, as in the clips' files, take half the memory.
            note: np.rint(normalize_peak(samples) * 32767).astype(np.int16)
            for note, samples in zip(instrument.notes, rendered)
            if np.abs(samples).max() > SILENCE
        }

    clips: list[Clip] = []
    with (
        progress(len(instruments), "instrument", f"{name}: rendering") as advance,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for instrument, rendered in zip(instruments, pool.map(render_one, instruments)):
            clips += _clips(name, instrument, rendered)
            advance()
    return clips


def _clips(name: str, instrument: Instrument, rendered: dict[int, np.ndarray]) -> Iterator[Clip]:
    """Yield the clips of an instrument from its notes, 16-bit samples."""
    split, font, program, _ = instrument
    for note, samples in rendered.items():
        yield Clip(
            name=f"{font.name}-{program:02d}-{note}.wav",
            split=split,
            labels=(str(note) if name == "pitch" else FAMILIES[program // 8],),
            groups=(f"program {program}" if name == "pitch" else f"{font.name} program {program}",),
            sources=(f"{font.package}/{font.path} program {program} note {note}",),
            make=partial(_to_float, samples),
        )


def _to_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 32767
