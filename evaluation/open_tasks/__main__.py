"""The command `python -m evaluation.open_tasks OUT_DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from evaluation.open_tasks.folder import Clip, TaskSpec, write_task
from evaluation.open_tasks.onsets import onsets_clips, onsets_sources, onsets_spec
from evaluation.open_tasks.recorded import recorded_clips, recorded_sources, recorded_spec
from evaluation.open_tasks.rendered import rendered_clips, rendered_sources, rendered_spec
from evaluation.open_tasks.speakers import speakers_clips, speakers_sources, speakers_spec
from hear_encoders.console import FAILED, INTERRUPTED, output_path, positive, print_error
from training.corpora import archive
from training.corpora.recordings import check_decoders, packages_of

PROG = "python -m evaluation.open_tasks"

_EPILOG = f"""\
examples:
  {PROG} tasks/
  {PROG} tasks/ --tasks drum_stroke onsets --cache /data/debian

After an interruption, run the same command again: it skips finished tasks and fetched packages.
Exit code 1: a task could not be made; 2: bad usage; 130: interrupted.
"""


class Recipe(NamedTuple):
    """How to make a task."""

    spec: Callable[[], TaskSpec]
    sources: Callable[[], list[str]]  # its recordings, PACKAGE/PATH
    clips: Callable[[Path, int], list[Clip]]  # from the cache, with this many threads


def _recorded(name: str) -> Recipe:
    return Recipe(
        partial(recorded_spec, name), partial(recorded_sources, name), lambda cache, _: recorded_clips(name, cache)
    )


def _rendered(name: str) -> Recipe:
    return Recipe(partial(rendered_spec, name), rendered_sources, partial(rendered_clips, name))


RECIPES: dict[str, Recipe] = {
    "drum_stroke": _recorded("drum_stroke"),
    "everyday_sounds": _recorded("everyday_sounds"),
    "pitch": _rendered("pitch"),
    "instrument_family": _rendered("instrument_family"),
    "spoken_words": _recorded("spoken_words"),
    "speaker_count": Recipe(speakers_spec, speakers_sources, lambda cache, _: speakers_clips(cache)),
    "onsets": Recipe(onsets_spec, onsets_sources, lambda cache, _: onsets_clips(cache)),
    "language_id": _recorded("language_id"),
}


def build(name: str, out_dir: Path, cache: Path, jobs: int = 1) -> tuple[Path, bool]:
    """Make a task unless its folder exists.

    Returns:
        The folder, and whether this call made it.
    """
    recipe = RECIPES[name]
    spec = recipe.spec()
    folder = out_dir / spec.folder_name
    if folder.is_dir():
        return folder, False
    sources = recipe.sources()
    check_decoders(sources)
    packages = packages_of(sources)
    archive.fetch(packages, cache)
    return write_task(out_dir, spec, recipe.clips(cache, jobs), packages, cache, jobs), True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Make HEAR tasks from freely licensed recordings in Debian's packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out_dir",
        type=output_path,
        metavar="OUT_DIR",
        help="folder for task folders and nothing else, as heareval's --tasks-dir expects",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="TASK",
        help=f"make only these tasks; all are {', '.join(RECIPES)}",
    )
    parser.add_argument(
        "--cache",
        type=output_path,
        metavar="FOLDER",
        default=archive.default_cache(),
        help="folder for unpacked packages; default: %(default)s",
    )
    parser.add_argument(
        "--jobs", type=positive(int), default=2, metavar="N", help="threads that make clips; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if args.cache.resolve().is_relative_to(args.out_dir.resolve()):
        parser.error("--cache must not be inside OUT_DIR, which is for tasks only")
    failed = False
    try:
        for name in args.tasks:
            try:
                folder, made = build(name, args.out_dir, args.cache, args.jobs)
                print(folder if made else f"{folder} (already there)", flush=True)
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                failed = True
                print_error(PROG, f"{name}: {error}")
    except KeyboardInterrupt:
        print_error(PROG, "interrupted; run the same command again to continue")
        return INTERRUPTED
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
