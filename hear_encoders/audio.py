"""Audio files to 16 kHz mono, by soundfile (decoding) and soxr (resampling)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from hear_encoders.frontend import SAMPLE_RATE

# Frames decoded at a time: what is in memory is the 16 kHz mono result, however large the file.
BLOCK_FRAMES = 1 << 18


def audio_extensions() -> set[str]:
    """Lower-case file extensions, with the dot, that the installed libsndfile is likely to read."""
    names = {f".{name.lower()}" for name in soundfile.available_formats()}
    return (names - {".raw"}) | {".aif", ".aifc", ".oga", ".opus", ".mp3"}


def load_audio(path: str | os.PathLike[str]) -> Tensor:
    """Read an audio file as 16 kHz mono: channels are averaged, other sample rates resampled.

    Returns:
        (samples,) float32, nominally in [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an audio file that libsndfile reads, damaged, or without samples.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        with soundfile.SoundFile(path) as file:
            mono = _read_mono(file)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not readable as audio ({error.error_string})") from error
    if mono.size == 0:
        raise ValueError(f"{path}: holds no samples")
    return torch.from_numpy(mono)


def _read_mono(file: soundfile.SoundFile) -> np.ndarray:
    resampler = None
    if file.samplerate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, num_channels=1, dtype="float32")
    blocks = []
    while True:
        block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True).mean(axis=1)
        last = len(block) < BLOCK_FRAMES
        blocks.append(block if resampler is None else resampler.resample_chunk(block, last=last))
        if last:
            return np.concatenate(blocks)
