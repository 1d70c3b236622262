"""The command `hear-map`: one page to look at and listen to what `hear-embed` embedded.

`sound_map` computes what the page shows; `map.html`, `map.css` and `map.js` beside this file show it, with Plotly.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import math
import os
import string
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, get_args
from urllib.parse import quote

import numpy as np
import soundfile

from hear_encoders import __version__
from hear_encoders.audio import load_audio
from hear_encoders.cli.embeddings import Embeddings, read_embeddings
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    output_path,
    positive,
    print_error,
    progress,
    warnings_as_messages,
)
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE

Projection = Literal["auto", "tsne", "pca"]

NEIGHBORS = 10
TSNE_FILES = range(10, 5001)  # for which "auto" is t-SNE; it takes about a minute for the most
TSNE_COMPONENTS = 50  # t-SNE starts from this many principal components
MATRIX_ROWS = 160  # most rows of a similarity matrix over time; 17 kB of the page

_EPILOG = """\
examples:
  hear-embed recordings/ -o embeddings.npz && hear-map embeddings.npz -o map.html
  hear-embed recordings/ -o steps.npz --timestamps && hear-map steps.npz -o map.html
  hear-map embeddings.npz -o map.html --embed-audio

The page works offline and links to the audio files where they are now: move them together, or use --embed-audio, which
puts the sounds into the page as MP3 (16 kHz mono, as the models hear them; about 9 kB per second).

exit status:
  0    the page was written
  1    the page could not be written
  2    bad usage, or unreadable embeddings or audio
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hear-map` and return its exit code."""
    parser = argparse.ArgumentParser(
        "hear-map",
        description="Make a page with a map of sounds: similar ones lie close together. Click to hear one and to see "
        "its nearest neighbors; search by name. With timestamp embeddings, also each sound's similarity over time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "embeddings", type=Path, metavar="EMBEDDINGS", help="from hear-embed: .npz file, .parquet file or folder"
    )
    parser.add_argument("-o", "--output", type=output_path, required=True, metavar="OUT.html")
    parser.add_argument(
        "--projection",
        choices=get_args(Projection),
        default="auto",
        help=f"auto is t-SNE for {TSNE_FILES.start} to {TSNE_FILES.stop - 1} files, else PCA; default: %(default)s",
    )
    parser.add_argument(
        "--depth",
        type=positive(int),
        default=1,
        metavar="N",
        help="color by the first N folders below the common one; default: %(default)s",
    )
    parser.add_argument(
        "--audio-root",
        type=output_path,
        metavar="DIR",
        help="folder that relative paths in EMBEDDINGS are below, and the new place of the common folder of absolute "
        "ones; default: the current folder, or what a folder of embeddings has recorded",
    )
    parser.add_argument("--embed-audio", action="store_true", help="put the sounds into the page")
    options = parser.parse_args(arguments)

    with warnings_as_messages(parser.prog):
        try:
            page = _page(options, parser.prog)
        except KeyboardInterrupt:
            print_error(parser.prog, "interrupted")
            return INTERRUPTED
        except (OSError, ValueError) as error:
            print_error(parser.prog, f"error: {error}")
            return BAD_USAGE
    try:
        with atomic_write(options.output) as file:
            file.write(page.encode())
    except OSError as error:
        print_error(parser.prog, f"error: {options.output}: {error}")
        return FAILED
    print(f"{options.output}: {len(page) / 1e6:.1f} MB")
    return 0


def _page(options: argparse.Namespace, prog: str) -> str:
    if missing := [name for name in ("plotly", "sklearn") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"a map needs {' and '.join(missing)}: pip install 'hear-audiomaepp[map]'")
    if options.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{options.output}: expected a name ending in .html")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {options.output.parent}")
    embeddings = read_embeddings(options.embeddings)
    files = audio_files(embeddings, options.audio_root)
    if options.embed_audio:
        with progress(len(files), "file", "audio") as advance:
            audio: list[str | None] = []
            for file in files:
                audio.append(data_url(file))
                advance()
    else:
        audio = [relative_url(file, options.output.parent) if file.is_file() else None for file in files]
        if absent := [file for file, url in zip(files, audio) if url is None]:
            found = f"{len(absent)} of {len(files)} audio files not found, such as {absent[0]}"
            print_error(prog, f"warning: {found}; --audio-root says where they are")
    return render(sound_map(embeddings, audio, options.projection, options.depth))


# ---- what the page shows ----


def sound_map(
    embeddings: Embeddings, audio: Sequence[str | None], projection: Projection = "auto", depth: int = 1
) -> dict[str, Any]:
    """Return what the page shows, as plain JSON values.

    Args:
        embeddings: N files.
        audio: each file's URL; None for one that cannot be heard.
        projection: how the map is made; "auto" as `TSNE_FILES` says.
        depth: folders below the common one that determine a sound's color.

    Returns:
        `names`, `folder` (rows of `folders`), `x`, `y`, `neighbors` (rows), `similarity` (cosines, most similar first),
        `audio`, `steps` (None, or for each file as `similarity_over_time` returns it): lists of N. `folders`, `title`
        and `method`.

    Raises:
        ValueError: t-SNE of fewer than three files.
    """
    common, names = names_below_common(embeddings.paths)
    folder_of = ["/".join(name.split("/")[:-1][:depth]) or "." for name in names]
    folders = sorted(set(folder_of))
    directions = centered_directions(embeddings.scenes)
    if projection == "auto":
        projection = "tsne" if len(names) in TSNE_FILES else "pca"
    points = project(directions, projection)
    neighbors, similarity = nearest(directions, min(NEIGHBORS, len(names) - 1))
    steps = None
    if embeddings.steps is not None and embeddings.timestamps_ms is not None:
        steps = [similarity_over_time(*pair) for pair in zip(embeddings.steps, embeddings.timestamps_ms)]
    return {
        "title": PurePath(common or embeddings.root or "").name or "sounds",
        "method": {"tsne": "t-SNE", "pca": "PCA"}[projection],
        "names": names,
        "folders": folders,
        "folder": [folders.index(folder) for folder in folder_of],
        "x": _rounded(points[:, 0], 4),
        "y": _rounded(points[:, 1], 4),
        "neighbors": neighbors.tolist(),
        "similarity": [_rounded(row, 3) for row in similarity],
        "audio": list(audio),
        "steps": steps,
    }


def names_below_common(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the paths' common folder, and the paths below it with forward slashes."""
    if len({os.path.isabs(path) for path in paths}) == 2:
        paths = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(os.path.normpath(path)) for path in paths])
    return common, [PurePath(os.path.relpath(path, common or ".")).as_posix() for path in paths]


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def centered_directions(scenes: np.ndarray) -> np.ndarray:
    """Return unit vectors whose dot products are cosine similarities after subtracting the mean over all files.

    A vector that equals the mean, up to rounding, becomes zero.

    Args:
        scenes: (N, E).

    Returns:
        (N, E) float32.
    """
    scenes = scenes.astype(np.float64)
    centered = scenes - scenes.mean(axis=0)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    negligible = norms <= 1e-6 * np.linalg.norm(scenes, axis=1, keepdims=True)
    return np.where(negligible, 0.0, centered / np.where(negligible, 1.0, norms)).astype(np.float32)


def nearest(directions: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most similar other rows of each row, most similar first.

    Args:
        directions: (N, E), from `centered_directions`.
        count: less than N.

    Returns:
        Rows (N, count) and their cosine similarities (N, count).
    """
    rows = np.empty((len(directions), count), dtype=np.int64)
    similarity = np.empty((len(directions), count), dtype=np.float32)
    block_rows = 512
    for start in range(0, len(directions) if count else 0, block_rows):
        cosines = directions[start : start + block_rows] @ directions.T  # (block, N)
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        most = np.sort(np.argpartition(-cosines, count - 1, axis=1)[:, :count], axis=1)
        values = np.take_along_axis(cosines, most, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        rows[start : start + block_rows] = np.take_along_axis(most, order, axis=1)
        similarity[start : start + block_rows] = np.take_along_axis(values, order, axis=1)
    return rows, similarity


def project(directions: np.ndarray, method: Literal["tsne", "pca"]) -> np.ndarray:
    """Place rows (N, E) in two dimensions, (N, 2). The same rows get the same points.

    Raises:
        ValueError: t-SNE of fewer than three files.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count = len(directions)
    if method == "tsne" and count < 3:
        raise ValueError(f"t-SNE needs at least 3 files, got {count}: use --projection pca")
    if count < 2 or not directions.any():
        return np.zeros((count, 2))
    components = min(TSNE_COMPONENTS if method == "tsne" else 2, *directions.shape)
    # One thread: t-SNE adds up across threads, in an order that varies; and its threads spin, slowly on a busy machine.
    with threadpool_limits(1):
        points = PCA(components, random_state=0).fit_transform(directions)
        if method == "tsne":
            points = TSNE(perplexity=min(30, (count - 1) / 3), random_state=0).fit_transform(points)
            points = PCA(2).fit_transform(points)  # turns the map: screens are wide
    return np.pad(points, [(0, 0), (0, 2 - points.shape[1])])


def similarity_over_time(steps: np.ndarray, timestamps_ms: np.ndarray) -> dict[str, Any]:
    """Compare all moments of a file: cosine similarities after subtracting the mean over the file.

    Args:
        steps: (T, E).
        timestamps_ms: (T,).

    Returns:
        `rows`, up to `MATRIX_ROWS`, each the mean of the same number of steps (the last of fewer); `row_s`, their
        duration in seconds; `lower`, the rows of the lower triangle with the diagonal, one after the other, as bytes
        in base64: 0 is a cosine of -1, 255 one of 1.
    """
    stretch = math.ceil(len(steps) / MATRIX_ROWS)
    starts = np.arange(0, len(steps), stretch)
    means = np.add.reduceat(steps, starts, axis=0, dtype=np.float64)
    means /= np.diff(np.append(starts, len(steps)))[:, None]
    directions = centered_directions(means)
    cosines = directions @ directions.T
    lower = np.rint((cosines[np.tril_indices(len(starts))] + 1) * 127.5).clip(0, 255).astype(np.uint8)
    step_ms = float(timestamps_ms[-1] - timestamps_ms[0]) / (len(steps) - 1) if len(steps) > 1 else 40.0
    return {
        "rows": len(starts),
        "row_s": round(stretch * step_ms / 1000, 4),
        "lower": base64.b64encode(lower.tobytes()).decode(),
    }


# ---- audio ----


def audio_files(embeddings: Embeddings, root: Path | None) -> list[Path]:
    """Return the audio files, which need not exist.

    Args:
        embeddings: their relative paths are below `root`, or without one below their own `root` or the current folder.
        root: for absolute paths, the folder that takes the place of their common one.
    """
    if root is None:
        return [Path(embeddings.root or "", path) for path in embeddings.paths]
    absolute = any(os.path.isabs(path) for path in embeddings.paths)
    return [Path(root, name) for name in (names_below_common(embeddings.paths)[1] if absolute else embeddings.paths)]


def relative_url(file: Path, folder: Path) -> str:
    """Return a URL that leads from a page in a folder to a file; an absolute one if they are on different drives."""
    try:
        relative = os.path.relpath(file, folder)
    except ValueError:  # Windows
        return file.absolute().as_uri()
    return quote(os.fsencode(PurePath(relative).as_posix()))


def data_url(file: Path) -> str:
    """Return an audio file as a data URL: MP3, 16 kHz mono.

    Raises:
        OSError, ValueError: as `load_audio`.
    """
    samples = load_audio(file).clamp(-1, 1).numpy()
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return f"data:audio/mpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


# ---- the page ----


def render(shown: dict[str, Any]) -> str:
    """Return the page that shows what `sound_map` returned. It loads nothing but audio, and runs only its own scripts.

    Names come from files and may be anything. They are in the page only as JSON without "<", and its script writes them
    as text.
    """
    from plotly.offline import get_plotlyjs

    # A browser that reads a page makes "\n" of other line ends, before it computes the hash of a script.
    scripts = [script.replace("\r\n", "\n").replace("\r", "\n") for script in (get_plotlyjs(), _part("map.js"))]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    return string.Template(_part("map.html")).substitute(
        css=_part("map.css"),
        data=data,
        plotly=scripts[0],
        script=scripts[1],
        script_hashes=" ".join(f"'sha256-{value}'" for value in hashes),
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
