"""Damaged audio files: any outcome but a ValueError that names the file, or samples, is a bug."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hear_encoders import load_audio


def assert_damage_raises_only_value_errors(original: Path, attempts: int, header: int) -> None:
    """Change five bytes of a file at a time, every other time within its first `header` bytes, and read it."""
    intact = original.read_bytes()
    random = np.random.default_rng(0)
    path = original.with_name(f"damaged{original.suffix}")
    for attempt in range(attempts):
        content = bytearray(intact)
        for place in random.integers(0, len(content) if attempt % 2 else header, 5):
            content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            load_audio(path)  # it may still be decodable
        except ValueError as error:
            assert str(path) in str(error)
