"""Read what `hear-embed` wrote: `.npz`, `.parquet`, a folder of `.npy` files; or the folder of `hear-embed-corpus`."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hear_encoders.cli.outputs import SETTINGS_FILE, check_parquet
from hear_encoders.files import read_json

_TIMES_SUFFIX = ".timestamps_ms.npy"


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a collection of audio files, sorted by path. N files, E embedding size, T steps of one file.

    Attributes:
        paths: of the audio files (N), as recorded.
        root: the folder that relative paths are below; None: the one in which `hear-embed` was called.
        scenes: (N, E) float32; for timestamp embeddings, the mean over each file's steps.
        steps: timestamp embeddings, (T, E) for each file; None for scene embeddings.
        timestamps_ms: (T,) for each file; None for scene embeddings.
    """

    paths: list[str]
    root: Path | None
    scenes: np.ndarray
    steps: list[np.ndarray] | None = None
    timestamps_ms: list[np.ndarray] | None = None


def read_embeddings(path: Path) -> Embeddings:
    """Read an output of `hear-embed`.

    Raises:
        FileNotFoundError: no such file or folder.
        OSError: it cannot be read.
        ValueError: it is not an output of `hear-embed`, or holds no files or values that are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    root = None
    if path.is_dir() and (path / SETTINGS_FILE).exists():
        paths, root, arrays, times = _read_folder(path)
    elif path.suffix.lower() == ".npz" and path.is_file():
        paths, arrays, times = _read_npz(path)
    elif path.suffix.lower() == ".parquet" or (path.is_dir() and any(path.glob("part-*.parquet"))):
        paths, arrays, times = _read_parquet(path)
    else:
        raise ValueError(f"{path}: expected a .npz file, a .parquet file or a folder that hear-embed has written")
    if not paths:
        raise ValueError(f"{path}: holds no embeddings")
    order = sorted(range(len(paths)), key=paths.__getitem__)
    paths, arrays = [paths[row] for row in order], [arrays[row] for row in order]
    times = None if times is None else [times[row] for row in order]
    sizes = {array.shape[-1] for array in arrays}
    if len(sizes) > 1:
        raise ValueError(f"{path}: expected embeddings of one size, got {sorted(sizes)}")
    if times is None:
        scenes = np.stack(arrays).astype(np.float32)
    else:
        if empty := [name for name, array in zip(paths, arrays) if len(array) == 0]:
            raise ValueError(f"{path}: {empty[0]} has no steps")
        scenes = np.stack([array.mean(axis=0, dtype=np.float32) for array in arrays])
    if bad := [name for name, scene in zip(paths, scenes) if not np.isfinite(scene).all()]:
        raise ValueError(f"{path}: the embedding of {bad[0]} is not finite")
    return Embeddings(paths, root, scenes, None if times is None else arrays, times)


def _read_npz(path: Path) -> tuple[list[str], list[np.ndarray], list[np.ndarray] | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not readable as .npz ({error})") from error
    expected = {"paths", "embeddings"}
    if per_step := "offsets" in content:
        expected |= {"offsets", "timestamps_ms"}
    if content.keys() != expected:
        raise ValueError(f"{path}: expected the arrays {sorted(expected)}, as hear-embed writes, got {sorted(content)}")
    names, embeddings = content["paths"], content["embeddings"]
    if names.ndim != 1 or names.dtype.kind != "U" or embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise ValueError(
            f"{path}: expected text paths (files,) and floating-point embeddings (rows, E), "
            f"got {names.dtype} {names.shape} and {embeddings.dtype} {embeddings.shape}"
        )
    offsets = content["offsets"] if per_step else np.arange(len(names) + 1)
    rows = len(content["timestamps_ms"]) if per_step else len(names)
    whole = offsets.shape == (len(names) + 1,) and offsets[0] == 0 and (np.diff(offsets) >= 0).all()
    if not whole or not offsets[-1] == rows == len(embeddings):
        raise ValueError(f"{path}: expected {rows} rows of embeddings for {len(names)} paths, got {len(embeddings)}")
    if not per_step:
        return names.tolist(), list(embeddings), None
    bounds = list(itertools.pairwise(offsets.tolist()))
    times = [content["timestamps_ms"][start:stop] for start, stop in bounds]
    return names.tolist(), [embeddings[start:stop] for start, stop in bounds], times


def _read_parquet(path: Path) -> tuple[list[str], list[np.ndarray], list[np.ndarray] | None]:
    check_parquet()
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error
    expected = {"path", "embedding"}
    if not expected <= set(table.column_names):  # a corpus has others, too
        raise ValueError(
            f"{path}: expected the columns {sorted(expected)}, as hear-embed writes, got {table.column_names}"
        )
    kind = table.schema.field("embedding").type
    if not pyarrow.types.is_fixed_size_list(kind):
        raise ValueError(f"{path}: expected lists of one size as embeddings, got {kind}")
    names = table["path"].to_pylist()
    values = table["embedding"].combine_chunks()
    embeddings = values.flatten().to_numpy(zero_copy_only=False).reshape(len(names), kind.list_size)
    if "timestamp_ms" not in table.column_names:
        return names, list(embeddings), None
    times = table["timestamp_ms"].to_numpy()
    bounds = list(_runs(names))
    paths = [names[start] for start, _ in bounds]
    return paths, [embeddings[start:stop] for start, stop in bounds], [times[start:stop] for start, stop in bounds]


def _runs(names: list[str]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of equal names: a file's rows follow each other."""
    start = 0
    for stop in range(1, len(names) + 1):
        if stop == len(names) or names[stop] != names[start]:
            yield start, stop
            start = stop


def _read_folder(path: Path) -> tuple[list[str], Path, list[np.ndarray], list[np.ndarray] | None]:
    settings: Any = read_json(path / SETTINGS_FILE)
    if not isinstance(settings, dict) or not settings.keys() >= {"root", "timestamps"}:
        raise ValueError(f"{path / SETTINGS_FILE}: not a record of hear-embed")
    files = sorted(file for file in path.rglob("*.npy") if not file.name.endswith(_TIMES_SUFFIX))
    names = [file.relative_to(path).as_posix().removesuffix(".npy") for file in files]
    dims = 2 if settings["timestamps"] else 1
    arrays = [_load_npy(file, dims) for file in files]
    if not settings["timestamps"]:
        return names, Path(settings["root"]), arrays, None
    times = [_load_npy(file.with_name(file.name.removesuffix(".npy") + _TIMES_SUFFIX), 1) for file in files]
    for file, steps, file_times in zip(files, arrays, times):
        if len(steps) != len(file_times):
            raise ValueError(f"{file}: expected {len(file_times)} steps, as many as timestamps, got {len(steps)}")
    return names, Path(settings["root"]), arrays, times


def _load_npy(path: Path, dims: int) -> np.ndarray:
    """Read an array; one of steps stays on disk until it is used."""
    try:
        array = np.load(path, mmap_mode="r" if dims == 2 else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not readable as .npy ({error})") from error
    if array.ndim != dims or array.dtype.kind != "f":
        raise ValueError(f"{path}: expected {dims} dimensions of floating point, got {array.dtype} {array.shape}")
    return array
