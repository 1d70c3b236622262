"""The command: `python -m evaluation.open_tasks OUT_DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.open_tasks.folder import Clip, Task, write_task
from evaluation.open_tasks.onsets import onsets_clips, onsets_sources, onsets_task
from evaluation.open_tasks.recorded import recorded_clips, recorded_sources, recorded_task
from evaluation.open_tasks.rendered import rendered_clips, rendered_sources, rendered_task
from evaluation.open_tasks.speakers import speakers_clips, speakers_sources, speakers_task
from hear_encoders.console import FAILED, INTERRUPTED
from training.corpora import archive
from training.corpora.recordings import check_decoders, packages_of

_EPILOG = """\
examples:
  python -m evaluation.open_tasks tasks/
  python -m evaluation.open_tasks tasks/ --tasks drum_stroke onsets --cache /data/debian

Run the same command again to go on after an interruption: finished tasks and fetched packages are skipped.
Exit code 1: a task could not be made; 2: bad usage; 130: interrupted.
"""


class Recipe(NamedTuple):
    """How a task is made: its description, the recordings it takes, its clips from the cache with so many threads."""

    task: Callable[[], Task]
    sources: Callable[[], list[str]]
    clips: Callable[[Path, int], list[Clip]]


def _recorded(name: str) -> Recipe:
    return Recipe(
        lambda: recorded_task(name), lambda: recorded_sources(name), lambda cache, _: recorded_clips(name, cache)
    )


def _rendered(name: str) -> Recipe:
    return Recipe(lambda: rendered_task(name), rendered_sources, lambda cache, jobs: rendered_clips(name, cache, jobs))


RECIPES: dict[str, Recipe] = {
    "drum_stroke": _recorded("drum_stroke"),
    "everyday_sounds": _recorded("everyday_sounds"),
    "pitch": _rendered("pitch"),
    "instrument_family": _rendered("instrument_family"),
    "spoken_words": _recorded("spoken_words"),
    "speaker_count": Recipe(speakers_task, speakers_sources, lambda cache, _: speakers_clips(cache)),
    "onsets": Recipe(onsets_task, onsets_sources, lambda cache, _: onsets_clips(cache)),
    "language_id": _recorded("language_id"),
}


def build(name: str, out_dir: Path, cache: Path, jobs: int = 1) -> tuple[Path, bool]:
    """Make a task, unless its folder is there.

    Returns:
        The folder, and whether it was made now.
    """
    recipe = RECIPES[name]
    task = recipe.task()
    folder = out_dir / task.folder_name
    if folder.is_dir():
        return folder, False
    sources = recipe.sources()
    check_decoders(sources)
    packages = packages_of(sources)
    archive.fetch(packages, cache)
    return write_task(out_dir, task, recipe.clips(cache, jobs), packages, cache, jobs), True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.open_tasks",
        description="Make HEAR tasks from freely licensed recordings in Debian's packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=Path, help="gets a folder per task, and nothing else: heareval's --tasks-dir")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="TASK",
        help=f"only these of {', '.join(RECIPES)}",
    )
    parser.add_argument(
        "--cache", type=Path, default=archive.default_cache(), help="unpacked packages (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="threads that make clips (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.cache.resolve().is_relative_to(args.out_dir.resolve()):
        parser.error("--cache must not be inside OUT_DIR, which is for tasks only")
    failed = False
    try:
        for name in args.tasks:
            try:
                folder, made = build(name, args.out_dir, args.cache, args.jobs)
                print(f"{folder}{'' if made else ' (was there)'}")
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                failed = True
                print(f"{parser.prog}: {name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
