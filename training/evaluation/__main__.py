"""The command: `python -m training.evaluation setup | run | report`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hear_encoders.cli import BAD_USAGE, FAILED, INTERRUPTED, say
from training.evaluation import environment
from training.evaluation.run import Driver, Model, default_label, find_tasks

PROG = "python -m training.evaluation"

_EPILOG = f"""\
examples:
  {PROG} setup .heareval
  {PROG} run --module hear_axlstm --weights weights/ --tasks-dir tasks/ --out results/
  {PROG} run --module training.evaluation.baselines --name logmel --tasks-dir tasks/ --out results/
  {PROG} report --help

Any HEAR module can be evaluated: install it into heareval's environment (.heareval/bin/pip install ...), or start the
command in the folder that it lies in.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["report"]:  # has its own parser
        from training.evaluation import report

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
    options = parser.parse_args(arguments)
    command = _setup if options.command == "setup" else _run
    try:
        return command(options)
    except KeyboardInterrupt:
        say(PROG, "interrupted; run the same command again to go on")
        return INTERRUPTED
    except (OSError, ValueError) as error:
        say(PROG, f"error: {error}")
        return BAD_USAGE


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", required=True, help="import name of the HEAR module")
    parser.add_argument("--weights", metavar="PATH_OR_NAME", help="for load_model; default: what the module has")
    parser.add_argument("--name", metavar="LABEL", help="name in the results; default: from module, weights, options")
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


def _setup(options: argparse.Namespace) -> int:
    try:
        made = environment.setup(options.env)
    except subprocess.CalledProcessError:
        say(PROG, "error: pip failed (above); run the same command again to go on")
        return FAILED
    print(f"{options.env}: {'ready' if made else 'was ready'}")
    return 0


def _run(options: argparse.Namespace) -> int:
    environment.check(options.env)
    keywords = dict(options.option)
    label = options.name or default_label(options.module, options.weights, keywords)
    model = Model(label, options.module, options.weights, keywords)
    folders = find_tasks(options.tasks_dir, options.tasks)
    kit = [str(environment.python(options.env).absolute()), "-m", "training.evaluation.kit"]
    driver = Driver(model, options.out, kit, options.jobs, lambda line: print(line, flush=True))
    failures = driver.run(folders, range(options.seeds), options.keep_embeddings)
    for failure in failures:
        say(PROG, f"failed: {failure}")
    if failures:
        return FAILED
    print(f"{driver.results.folder}: {len(folders)} tasks, {options.seeds} seeds")
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
