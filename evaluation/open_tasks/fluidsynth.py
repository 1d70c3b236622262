"""Notes of General MIDI instruments, rendered by FluidSynth out of Debian's packages.

FluidSynth is run from the cache of unpacked packages with all the libraries that it needs, so nothing has to be
installed. A program of a sound font is one run: its notes as a MIDI file, far enough apart not to touch, rendered
without reverb and chorus and cut apart. It renders at three times the rate wanted, so that what lies above half
of that is filtered out rather than folded back.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr

from hear_encoders.nn.frontend import SAMPLE_RATE
from training.corpora import archive

PACKAGE = "fluidsynth"
RENDER_RATE = 3 * SAMPLE_RATE

# What its libraries need, apart from the C library, which has to be the system's own.
_LIBRARY = re.compile(r"lib(?!c6$|c-bin$)[a-z0-9+.-]+")

VELOCITY = 100
HELD_S = 1.5  # then the key is let go
APART_S = 4.0  # from note to note; all sound is cut off before the next one
_TICKS_PER_S = 1000  # 500 per quarter note at 120 quarter notes a minute


def synthesizer_packages() -> list[str]:
    """FluidSynth and the libraries that it needs."""
    return [PACKAGE, *(name for name in archive.dependencies(PACKAGE) if _LIBRARY.fullmatch(name))]


def render(
    notes: Sequence[int], program: int, sound_font: Path, seconds: float, synthesizer: Sequence[Path]
) -> list[np.ndarray]:
    """Render notes of an instrument.

    Args:
        notes: MIDI numbers, 69 is the A of 440 Hz.
        program: General MIDI program, from 0.
        sound_font: an .sf2 file.
        seconds: how much of each note, from when its key is pressed; at most `APART_S`.
        synthesizer: folders of the unpacked `synthesizer_packages()`.

    Returns:
        For each note (N,) float32 at 16 kHz, both channels averaged; silence where the sound font has nothing there.

    Raises:
        RuntimeError: FluidSynth failed, with what it said.
    """
    if not 0 < seconds <= APART_S:
        raise ValueError(f"seconds must be above 0 and at most {APART_S}, got {seconds}")
    with tempfile.TemporaryDirectory() as work:
        midi, wav = Path(work) / "notes.mid", Path(work) / "notes.wav"
        midi.write_bytes(midi_file(notes, program))
        options = ["--quiet", "--no-shell", "--no-midi-in", "--disable-lash", "--reverb=no", "--chorus=no"]
        options += [f"--sample-rate={RENDER_RATE}", "--audio-file-type=wav", "--audio-file-format=float"]
        options += ["-o", "synth.dynamic-sample-loading=1", f"--fast-render={wav}"]
        _run([*options, str(sound_font), str(midi)], synthesizer)
        rendered, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    mono = rendered.mean(axis=1)
    step, length = round(APART_S * rate), round(seconds * rate)
    if rate != RENDER_RATE or len(mono) < step * (len(notes) - 1) + length:
        raise RuntimeError(f"FluidSynth rendered {len(mono)} samples at {rate} Hz of {len(notes)} notes")
    return [
        soxr.resample(mono[number * step : number * step + length], rate, SAMPLE_RATE) for number in range(len(notes))
    ]


def midi_file(notes: Sequence[int], program: int) -> bytes:
    """A MIDI file that plays notes one at a time, `APART_S` from one to the next.

    It has one track: the program, then for each note key on, key off, all sound off. Times are in milliseconds.
    """
    step, held = round(APART_S * _TICKS_PER_S), round(HELD_S * _TICKS_PER_S)
    track = _event(0, 0xC0, program)
    for note in notes:
        track += _event(0, 0x90, note, VELOCITY)
        track += _event(held, 0x80, note, 0)
        track += _event(step - held - 1, 0xB0, 120, 0)  # all sound off
        track += _event(1, 0xB0, 123, 0)  # all notes off: nothing happens, but the time goes on up to here
    track += b"\x00\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, _TICKS_PER_S // 2)  # 120 quarter notes a minute is the default
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _event(ticks: int, *values: int) -> bytes:
    """An event some ticks after the one before; a time takes seven bits per byte, the high ones first."""
    groups = [ticks & 0x7F]
    while ticks := ticks >> 7:
        groups.append(ticks & 0x7F | 0x80)
    return bytes(reversed(groups)) + bytes(values)


def _run(arguments: Sequence[str], synthesizer: Sequence[Path]) -> None:
    programs = [folder / "usr/bin/fluidsynth" for folder in synthesizer]
    program = next((path for path in programs if path.is_file()), None)
    if program is None:
        raise FileNotFoundError(f"no usr/bin/fluidsynth in the packages {[folder.name for folder in synthesizer]}")
    libraries = {str(path.parent.resolve()) for folder in synthesizer for path in folder.rglob("*.so*")}
    # Settings of this user's, or a sound server, are not to change what it renders.
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries)), "HOME": os.devnull, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"FluidSynth failed with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
