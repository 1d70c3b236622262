"""Draw the held-out errors of runs against the clips they trained on: `python -m training.curves OUT.png RUN...`.

The curve of a run that started from another of them (`start_from`) begins where that one ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hear_encoders.console import BAD_USAGE, print_error
from training.figures import held_out_figure, save_png
from training.run_dir import LOG_FILE, read_log, read_run_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("python -m training.curves", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run trained with --held-out")
    options = parser.parse_args(arguments)
    logs = {run: read_log(run) for run in options.runs}
    for run, lines in logs.items():
        if not (run / LOG_FILE).is_file():
            print_error(parser.prog, f"error: {run} is not a run: it has no {LOG_FILE}")
            return BAD_USAGE
        if not any("held_out_loss" in line for line in lines):
            print_error(parser.prog, f"error: {run} was trained without --held-out")
            return BAD_USAGE
    curves = {}
    for run, lines in logs.items():
        before = _clips_before(run, logs)
        curves[run.name] = [{**line, "clips": line["clips"] + before} for line in lines if "held_out_loss" in line]
    save_png(held_out_figure(curves), options.output)
    return 0


def _clips_before(run: Path, logs: dict[Path, list[dict[str, Any]]]) -> int:
    """Return how many clips a run's first weights had seen in other runs of `logs`."""
    start_from = read_run_config(run).start_from
    for earlier, lines in logs.items():
        if start_from is not None and earlier.resolve() == Path(start_from).resolve():
            return _clips_before(earlier, logs) + lines[-1]["step"] * read_run_config(earlier).batch_size
    return 0


if __name__ == "__main__":
    sys.exit(main())
