"""Report results beside the papers' tables: an HTML page, and the same tables as Markdown and CSV.

    python -m evaluation report RESULTS... [--out DIR] [--tasks TASK ...] [--scale paper|all]

The report has, per task, the mean over seeds with its 95 % interval; the papers' aggregate s(m), ranked among their
models; the papers' Tables 3 to 5; onset F-measures of event tasks; maps of embeddings; and the time taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.page import page
from evaluation.results import Results, read_results
from evaluation.tables import SCALES, TABLE_NAMES, comma_separated, escape_markdown, markdown, standings, tables
from hear_encoders.console import BAD_USAGE, print_error
from hear_encoders.files import atomic_write

PAGE_FILE = "report.html"
MARKDOWN_FILE = "report.md"


def write_report(results: Results, out: Path, scale: str = "paper") -> None:
    """Write report.html, report.md and one CSV file per table.

    Args:
        results: from `read_results`.
        out: output folder; created if missing.
        scale: of s(m) on HEAR's tasks, see `evaluation.tables.compare_hear`.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = tables(results, scale)
    files = {f"{table.name}.csv": comma_separated(table) for table in found}
    files[MARKDOWN_FILE] = _markdown_report(standings(results, scale) + results.remarks, [*map(markdown, found)])
    files[PAGE_FILE] = page(results, scale)
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content.encode())
    for name in TABLE_NAMES:  # an earlier report of other results may have had more tables
        if f"{name}.csv" not in files:
            (out / f"{name}.csv").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m evaluation report",
        description="Compare results with each other and with the papers' tables.",
        epilog="example: python -m evaluation report results/ --tasks BO CD E50",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="folder with one folder per model")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder; default: report/ in the first RESULTS")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these: HEAR abbreviations or folder names")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="paper",
        help="worst and best run in s(m): of each paper's own models, as in print, or of all models; default: paper",
    )
    options = parser.parse_args(arguments)
    out = options.out or options.results[0] / "report"
    try:
        results = read_results(options.results, options.tasks)
        write_report(results, out, options.scale)
    except (OSError, ValueError) as error:
        print_error(parser.prog, f"error: {error}")
        return BAD_USAGE
    for line in standings(results, options.scale):
        print(line)
    print(out / PAGE_FILE)
    return 0


def _markdown_report(lead: Sequence[str], parts: Sequence[str]) -> str:
    lines = "".join(f"- {escape_markdown(line)}\n" for line in lead)
    note = f"Bars, the ranked chart and the maps of embeddings are in [{PAGE_FILE}]({PAGE_FILE}).\n"
    return "\n".join(["# Evaluation of audio embeddings\n", lines, note, *parts]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
