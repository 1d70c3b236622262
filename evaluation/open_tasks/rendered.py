"""Tasks whose clips are rendered notes: pitch, and families of instruments, in the manner of NSynth.

From each of three sound fonts come 16 notes of MIDI 36 to 83 for every General MIDI program from 0 to 79 but 55 (a
stab of several notes): 2 s, without reverb and chorus, peak-normalised. The notes are random: the 48 pitches are
shuffled and dealt to the programs, again and again, so every pitch is about as frequent as any other. A note that a
sound font does not have, as a few instruments' highest ones, is left out.

    pitch               trained on FluidR3_GM and tested on the two others, with other programs: 5 of each family of
                        programs are for training, the rest for testing. One of the 5 validates.
    instrument_family   the same notes; trained on FluidR3_GM, tested on all notes of the two others. The classes are
                        General MIDI's families. Two programs of each validate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from evaluation.open_tasks.fluidsynth import render, synthesizer_packages
from evaluation.open_tasks.folder import Clip, Task
from evaluation.open_tasks.sources import level
from training.corpora import archive

SECONDS = 2.0
NOTES = range(36, 84)
NOTES_PER_PROGRAM = 16
PROGRAMS = tuple(program for program in range(80) if program != 55)

# General MIDI's families of eight programs.
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

TRAIN_PROGRAMS = 5  # of each family, in pitch
VALID_PROGRAMS = {"pitch": 1, "instrument_family": 2}  # of those of each family that are for training

# Peak below which a sound font has nothing to play: its quietest notes are at 0.01.
SILENCE = 1e-4


class SoundFont(NamedTuple):
    """A sound font of General MIDI instruments."""

    name: str
    package: str
    path: str


class Instrument(NamedTuple):
    """A program of a sound font with its notes, which are all in one split."""

    split: str
    font: SoundFont
    program: int
    notes: tuple[int, ...]


TRAIN_FONT = SoundFont("FluidR3_GM", "fluid-soundfont-gm", "usr/share/sounds/sf2/FluidR3_GM.sf2")
TEST_FONTS = (
    SoundFont("GeneralUser", "minuet-data", "usr/share/minuet/soundfonts/GeneralUser-v1.47.sf2"),
    SoundFont("TimGM6mb", "timgm6mb-soundfont", "usr/share/sounds/sf2/TimGM6mb.sf2"),
)


def rendered_task(name: str) -> Task:
    """The description of one of these tasks."""
    splits = ("train", "valid", "test")
    if name == "pitch":
        # In this order chroma_acc, which takes indices modulo 12, does what it says.
        return Task(name, SECONDS, splits, ("pitch_acc", "chroma_acc"), tuple(str(note) for note in NOTES))
    return Task(name, SECONDS, splits, ("top1_acc",), FAMILIES)


def rendered_sources() -> list[str]:
    return [f"{font.package}/{font.path}" for font in (TRAIN_FONT, *TEST_FONTS)]


def split_programs(name: str) -> dict[str, tuple[int, ...]]:
    """Which programs of which splits: drawn family by family, the same for every run."""
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
    """The notes of each program in a sound font, the same for every run and in both tasks."""
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
    """The clips of one of these tasks. Renders all of them, since notes that a sound font does not have are left out.

    Args:
        name: the task's.
        cache: of `training.corpora.archive`; holds the sound fonts' packages, and gets FluidSynth's.
        jobs: instruments rendered at a time.
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
            # As the clips will have them, which also takes half as much memory.
            note: np.rint(level(samples) * 32767).astype(np.int16)
            for note, samples in zip(instrument.notes, rendered)
            if np.abs(samples).max() > SILENCE
        }

    clips = []
    with ThreadPoolExecutor(jobs) as pool:
        rendering = tqdm(pool.map(render_one, instruments), f"{name}: rendering", len(instruments), disable=None)
        for instrument, rendered in zip(instruments, rendering):
            clips += _clips(name, instrument, rendered)
    return clips


def _clips(name: str, instrument: Instrument, rendered: dict[int, np.ndarray]) -> Iterator[Clip]:
    """The clips of an instrument, from its notes as 16-bit samples."""
    split, font, program, _ = instrument
    for note, samples in rendered.items():
        yield Clip(
            f"{font.name}-{program:02d}-{note}.wav",
            split,
            (str(note) if name == "pitch" else FAMILIES[program // 8],),
            (f"program {program}" if name == "pitch" else f"{font.name} program {program}",),
            (f"{font.package}/{font.path} program {program} note {note}",),
            partial(_samples, samples),
        )


def _samples(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 32767
