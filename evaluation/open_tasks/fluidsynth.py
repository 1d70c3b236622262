"""Notes of General MIDI instruments, rendered with FluidSynth from Debian's packages.

FluidSynth and its libraries run from the cache of unpacked packages, so nothing has to be installed. One run renders
one program of a sound font: a MIDI file plays its notes so far apart that they do not overlap, without reverb and
chorus, and the result is cut into notes. The render rate is three times the target rate, so that resampling filters out
higher frequencies instead of folding them back.
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

# Library packages except the C library, which has to be the system's own.
_LIBRARY = re.compile(r"lib(?!c6$|c-bin$)[a-z0-9+.-]+")

VELOCITY = 100
KEY_DOWN_S = 1.5
NOTE_SPACING_S = 4.0  # from one note to the next; all sound is cut off before the next one
_TICKS_PER_S = 1000  # 500 per quarter note at 120 quarter notes per minute


def synthesizer_packages() -> list[str]:
    """Return the names of FluidSynth's package and of those with the libraries that it needs."""
    return [PACKAGE, *(name for name in archive.dependencies(PACKAGE) if _LIBRARY.fullmatch(name))]


def render(
    notes: Sequence[int], program: int, sound_font: Path, seconds: float, synthesizer: Sequence[Path]
) -> list[np.ndarray]:
    """Render notes of an instrument.

    Args:
        notes: MIDI numbers; 69 is the A of 440 Hz.
        program: General MIDI program, counted from 0.
        sound_font: an .sf2 file.
        seconds: duration of each result, from the key press; at most `NOTE_SPACING_S`.
        synthesizer: folders of the unpacked `synthesizer_packages()`.

    Returns:
        For each note (N,) float32 at 16 kHz, averaged over both channels; silence for notes that the sound font lacks.

    Raises:
        RuntimeError: FluidSynth failed; the message has its output.
    """
    if not 0 < seconds <= NOTE_SPACING_S:
        raise ValueError(f"seconds must be above 0 and at most {NOTE_SPACING_S}, got {seconds}")
    with tempfile.TemporaryDirectory() as work:
        midi, wav = Path(work) / "notes.mid", Path(work) / "notes.wav"
        midi.write_bytes(midi_file(notes, program))
        options = ["--quiet", "--no-shell", "--no-midi-in", "--disable-lash", "--reverb=no", "--chorus=no"]
        options += [f"--sample-rate={RENDER_RATE}", "--audio-file-type=wav", "--audio-file-format=float"]
        options += ["-o", "synth.dynamic-sample-loading=1", f"--fast-render={wav}"]
        _run([*options, str(sound_font), str(midi)], synthesizer)
        rendered, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    mono = rendered.mean(axis=1)
    spacing, length = round(NOTE_SPACING_S * rate), round(seconds * rate)
    if rate != RENDER_RATE or len(mono) < spacing * (len(notes) - 1) + length:
        raise RuntimeError(f"FluidSynth rendered {len(mono)} samples at {rate} Hz for {len(notes)} notes")
    starts = [spacing * number for number in range(len(notes))]
    return [soxr.resample(mono[start : start + length], rate, SAMPLE_RATE) for start in starts]


def midi_file(notes: Sequence[int], program: int) -> bytes:
    """Return a MIDI file that plays notes one at a time, every `NOTE_SPACING_S`.

    Its only track has the program, then for each note: key on, key off, all sound off. Times are in milliseconds.
    """
    spacing, key_down = round(NOTE_SPACING_S * _TICKS_PER_S), round(KEY_DOWN_S * _TICKS_PER_S)
    track = _event(0, 0xC0, program)
    for note in notes:
        track += _event(0, 0x90, note, VELOCITY)
        track += _event(key_down, 0x80, note, 0)
        track += _event(spacing - key_down - 1, 0xB0, 120, 0)  # all sound off
        track += _event(1, 0xB0, 123, 0)  # all notes off: has no effect but makes the file last until here
    track += b"\x00\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, _TICKS_PER_S // 2)  # MIDI's default is 120 quarter notes a minute
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _event(ticks: int, *values: int) -> bytes:
    """Return an event `ticks` after the previous one. Times are coded in 7 bits per byte, high bits first."""
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
    # A nearly empty environment: the user's settings or a sound server must not change the result.
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries)), "HOME": os.devnull, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        output = (done.stderr or done.stdout).strip()[-500:]
        raise RuntimeError(f"FluidSynth failed with exit code {done.returncode}: {output}")
