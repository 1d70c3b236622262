"""The command: `python -m evaluation setup | run | report | probe`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation import environment
from evaluation.driver import Driver, Model, default_label
from evaluation.probe import DEFAULT_CLIPS, can_probe, probe_model
from evaluation.tasks import find_tasks, read_task
from hear_encoders.console import BAD_USAGE, FAILED, INTERRUPTED, print_error

PROG = "python -m evaluation"

_EPILOG = f"""\
examples:
  {PROG} setup .heareval
  {PROG} run --module hear_axlstm --weights weights/ --tasks-dir tasks/ --out results/
  {PROG} run --module evaluation.baselines --name logmel --tasks-dir tasks/ --out results/
  {PROG} report --help

Any HEAR module can be evaluated: install it into heareval's environment (.heareval/bin/pip install ...), or start the
command in the folder that it lies in.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["report"]:  # has its own parser
        from evaluation import report

        return report.main(arguments[1:])
    parser = argparse.ArgumentParser(
        PROG,
        description="Evaluate HEAR modules with heareval, as in the papers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    setup = commands.add_parser("setup", help="make the environment that heareval runs in (about 3 GB)")
    setup.add_argument("env", type=Path, nargs="?", default=Path(environment.DEFAULT_ENVIRONMENT), metavar="ENV_DIR")
    _add_run_arguments(commands.add_parser("run", help="embed tasks, train and test the papers' classifiers on them"))
    commands.add_parser("report", help="tables and pictures of results", add_help=False)
    _add_probe_arguments(commands.add_parser("probe", help="compare weights quickly, on validation clips"))
    options = parser.parse_args(arguments)
    command = {"setup": _setup, "run": _run, "probe": _probe}[options.command]
    try:
        return command(options)
    except KeyboardInterrupt:
        print_error(PROG, "interrupted; run the same command again to go on")
        return INTERRUPTED
    except (OSError, ValueError) as error:
        print_error(PROG, f"error: {error}")
        return BAD_USAGE


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", required=True, help="import name of the HEAR module")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="keyword argument for load_model, such as framing=reference; the value is JSON or else text",
    )
    parser.add_argument("--tasks-dir", required=True, type=Path, metavar="TASKS", help="folder of HEAR task folders")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these folders")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument("--weights", metavar="PATH_OR_NAME", help="for load_model; default: what the module has")
    parser.add_argument("--name", metavar="LABEL", help="name in the results; default: from module, weights, options")
    parser.add_argument("--out", required=True, type=Path, metavar="RESULTS", help="folder for LABEL/TASK/...")
    parser.add_argument("--seeds", type=_at_least_1, default=10, metavar="N", help="seeds 0..N-1; default: %(default)s")
    parser.add_argument("--jobs", type=_at_least_1, default=1, metavar="N", help="processes at once, sharing the cores")
    parser.add_argument("--keep-embeddings", action="store_true", help="in RESULTS/LABEL/.work/")
    parser.add_argument(
        "--env",
        type=Path,
        default=Path(environment.DEFAULT_ENVIRONMENT),
        metavar="ENV_DIR",
        help="environment made by setup; default: %(default)s",
    )


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument(
        "--weights", nargs="+", metavar="PATH_OR_NAME", help="to compare; default: what the module has, alone"
    )
    parser.add_argument(
        "--clips", type=_at_least_1, default=DEFAULT_CLIPS, help="at most so many of a split; default: %(default)s"
    )
    parser.add_argument(
        "--average",
        type=_at_least_1,
        default=1,
        metavar="PARTS",
        help="of each embedding; 5 averages our rows of bands",
    )


def _setup(options: argparse.Namespace) -> int:
    try:
        made = environment.setup(options.env)
    except subprocess.CalledProcessError:
        print_error(PROG, "error: pip failed (above); run the same command again to go on")
        return FAILED
    print(f"{options.env}: {'ready' if made else 'was ready'}")
    return 0


def _run(options: argparse.Namespace) -> int:
    environment.check(options.env)
    keywords = dict(options.option)
    label = options.name or default_label(options.module, options.weights, keywords)
    model = Model(label, options.module, options.weights, keywords)
    folders = find_tasks(options.tasks_dir, options.tasks)
    kit = [str(environment.python(options.env).absolute()), "-m", "evaluation.kit"]
    driver = Driver(model, options.out, kit, options.jobs, lambda line: print(line, flush=True))
    failures = driver.run(folders, range(options.seeds), options.keep_embeddings)
    for failure in failures:
        print_error(PROG, f"failed: {failure}")
    if failures:
        return FAILED
    print(f"{driver.results.path}: {len(folders)} tasks, {options.seeds} seeds")
    return 0


def _probe(options: argparse.Namespace) -> int:
    tasks = [read_task(folder) for folder in find_tasks(options.tasks_dir, options.tasks)]
    left_out = [task.name for task in tasks if not can_probe(task)]
    tasks = [task for task in tasks if can_probe(task)]
    if left_out:
        why = "without clips for validation alone, or not scored by accuracy on whole clips"
        print_error(PROG, f"left out, {why}: {', '.join(left_out)}")
    if not tasks:
        raise ValueError(f"{options.tasks_dir}: no task to probe")
    print(" | ".join(["", *(task.title for task in tasks), "mean"]))
    print("|".join(["---", *["--:"] * (len(tasks) + 1)]))
    for weights in options.weights or [None]:
        keywords = dict(options.option)
        scores = probe_model(options.module, weights, keywords, tasks, options.clips, options.average)
        shown = [f"{100 * score:.1f}" for score in [*scores, sum(scores) / len(scores)]]
        print(" | ".join([options.module if weights is None else weights, *shown]), flush=True)
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _at_least_1(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
