"""The command: `python -m evaluation setup | hear-tasks | run | table | report | probe`."""

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
from evaluation.hear_tasks import list_tasks
from evaluation.probe import DEFAULT_CLIPS, can_probe, probe_model
from evaluation.tasks import find_tasks, read_task
from hear_encoders.console import BAD_USAGE, FAILED, INTERRUPTED, output_path, positive, print_error
from hear_encoders.files import atomic_write
from training.corpora.workers import sigterm_interrupts

PROG = "python -m evaluation"

_DEFAULT_ENVIRONMENT = Path(environment.DEFAULT_ENVIRONMENT)

_EPILOG = f"""\
examples:
  {PROG} setup
  {PROG} hear-tasks tasks/
  {PROG} run --module hear_axlstm --weights weights/ --tasks-dir tasks/ --out results/
  {PROG} run --module evaluation.baselines --name logmel --tasks-dir tasks/ --out results/
  {PROG} table axlstm/5 --data shards/ --tasks-dir tasks/ --out small/ --steps 750 --batch-size 16
  {PROG} report results/

To evaluate another HEAR module, install it into heareval's environment (.heareval/bin/pip install ...), or start the
command in the module's folder.
"""

_RUN_DESCRIPTION = """\
Evaluate a model on HEAR tasks. For each task, `run` takes these steps, each in a separate process:

  embed    compute the embeddings of all clips
  seed N   train the papers' classifiers on the embeddings and test them
  map      lay out a scene task's test clips in two dimensions, for the report

Give the same command again to do the missing steps.
"""

_TABLE_DESCRIPTION = """\
Train each row of a paper's table that has a config in training/configs/papers/, export it, evaluate it as `run` does,
and print it beside the printed row. Rows that are finished are kept: give the same command again to continue. Commands
that share DIR, on one or several machines, take different rows.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["report"]:
        return _report(arguments[1:])
    parser = argparse.ArgumentParser(
        PROG,
        description="Evaluate HEAR modules with heareval, as in the papers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    setup = commands.add_parser("setup", help="create heareval's environment (about 3 GB)")
    setup.add_argument("env", type=output_path, nargs="?", default=_DEFAULT_ENVIRONMENT, metavar="ENV_DIR")
    hear_tasks = commands.add_parser(
        "hear-tasks",
        help="list the papers' ten tasks, which are here, and where HEAR publishes the rest",
        description="List the papers' ten HEAR tasks, which of them DIR has, and where HEAR publishes the rest. "
        "The exit code is 0 if DIR has all ten, complete and at 16 kHz, and 1 otherwise.",
    )
    hear_tasks.add_argument("tasks_dir", type=output_path, metavar="DIR", help="folder of HEAR task folders")
    run = commands.add_parser(
        "run",
        help="embed tasks, train and test the papers' classifiers",
        description=_RUN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_run_arguments(run)
    table = commands.add_parser(
        "table",
        help="train and evaluate the rows of a paper's table",
        description=_TABLE_DESCRIPTION,
        epilog=f"example: {PROG} table axlstm/5 --data shards/ --tasks-dir tasks/ --out small/ --steps 750 "
        "--batch-size 16 --set precision=bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_table_arguments(table)
    commands.add_parser("report", help="show results as tables and charts", add_help=False)
    _add_probe_arguments(commands.add_parser("probe", help="compare weights quickly, on validation clips"))
    options = parser.parse_args(arguments)
    command = {"setup": _setup, "hear-tasks": _hear_tasks, "run": _run, "table": _table, "probe": _probe}[
        options.command
    ]
    try:
        with sigterm_interrupts():
            return command(options)
    except KeyboardInterrupt:
        print_error(PROG, "interrupted; run the same command again to continue")
        return INTERRUPTED
    except (OSError, ValueError) as error:
        print_error(PROG, f"error: {error}")
        return BAD_USAGE


def _report(arguments: Sequence[str]) -> int:
    """Run the report command, which has its own parser and needs libraries that the other commands do not."""
    try:
        from evaluation import report
    except ModuleNotFoundError as error:
        print_error(PROG, f"error: {error}; the report needs: pip install '.[eval]'")
        return BAD_USAGE
    return report.main(arguments)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", required=True, help="import name of the HEAR module")
    _add_option_and_tasks(parser)


def _add_option_and_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="keyword argument for load_model, such as framing=reference; a value that is not JSON is text",
    )
    parser.add_argument("--tasks-dir", required=True, type=Path, metavar="TASKS", help="folder of HEAR task folders")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these task folders")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument("--weights", metavar="PATH_OR_NAME", help="weights for load_model; default: the module's own")
    parser.add_argument(
        "--name", metavar="LABEL", help="the model's name in the results; default: from module, weights and options"
    )
    parser.add_argument("--out", required=True, type=output_path, metavar="RESULTS", help="folder for LABEL/TASK/...")
    parser.add_argument(
        "--keep-embeddings", action="store_true", help="keep the embeddings of finished tasks in RESULTS/LABEL/.work/"
    )
    _add_kit_arguments(parser)


def _add_kit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=positive(int), default=10, metavar="N", help="use seeds 0 to N-1; default: %(default)s"
    )
    parser.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="processes that share the CPU cores")
    parser.add_argument(
        "--env",
        type=Path,
        default=_DEFAULT_ENVIRONMENT,
        metavar="ENV_DIR",
        help="environment created by setup; default: %(default)s",
    )


def _add_table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="PAPER/TABLE", help="audiomaepp/2 to /4, or axlstm/2 to /5")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        action="append",
        metavar="SHARDS",
        help="shards to train on (training.corpora.prepare); may be repeated, with --set shares=[...]",
    )
    parser.add_argument("--held-out", type=Path, metavar="SHARDS", help="shards to test on during training")
    parser.add_argument("--out", required=True, type=output_path, metavar="DIR", help="folder for the rows")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these: config names without the table")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="optimizer steps, instead of 100 epochs")
    parser.add_argument("--batch-size", type=positive(int), metavar="N", help="crops per step; default: 1024")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes to the rows' configs, as for training.pretrain: precision=bfloat16 base_lr=1.28e-2",
    )
    _add_option_and_tasks(parser)
    _add_kit_arguments(parser)


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument(
        "--weights", nargs="+", metavar="PATH_OR_NAME", help="weights to compare; default: the module's own"
    )
    parser.add_argument(
        "--clips",
        type=positive(int),
        default=DEFAULT_CLIPS,
        metavar="N",
        help="use at most N clips per split; default: %(default)s",
    )
    parser.add_argument(
        "--average",
        type=positive(int),
        default=1,
        metavar="PARTS",
        help="average this many equal parts of each embedding; 5 averages over the bands of this project's encoders",
    )


def _setup(options: argparse.Namespace) -> int:
    try:
        made = environment.setup(options.env)
    except subprocess.CalledProcessError:
        print_error(PROG, "error: pip failed (see above); run the same command again to continue")
        return FAILED
    print(f"{options.env}: {'ready' if made else 'already complete'}")
    return 0


def _hear_tasks(options: argparse.Namespace) -> int:
    lines, complete = list_tasks(options.tasks_dir)
    print("\n".join(lines))
    return 0 if complete else FAILED


def _run(options: argparse.Namespace) -> int:
    kit = _kit(options)
    keywords = dict(options.option)
    label = options.name or default_label(options.module, options.weights, keywords)
    model = Model(label, options.module, options.weights, keywords)
    folders = find_tasks(options.tasks_dir, options.tasks)
    driver = Driver(model, options.out, kit, options.jobs, _print_line)
    failures = driver.run(folders, range(options.seeds), options.keep_embeddings)
    for failure in failures:
        print_error(PROG, f"failed: {failure}")
    if failures:
        return FAILED
    print(f"{driver.results.path}: {len(folders)} tasks, {options.seeds} seeds")
    return 0


def _kit(options: argparse.Namespace) -> list[str]:
    """Return the command of a kit step, without the step's arguments."""
    environment.check(options.env)
    return [str(environment.python(options.env).absolute()), "-m", "evaluation.kit"]


def _print_line(line: str) -> None:
    print(line, flush=True)


def _table(options: argparse.Namespace) -> int:
    try:
        from evaluation.reproduce import Reproduction, table_rows
        from evaluation.tables import markdown
    except ModuleNotFoundError as error:
        print_error(PROG, f"error: {error}; tables need: pip install '.[train,eval]'")
        return BAD_USAGE
    kit = _kit(options)
    rows = table_rows(options.table, options.rows)
    folders = find_tasks(options.tasks_dir, options.tasks)
    overrides = [] if options.steps is None else [f"max_steps={options.steps}"]
    overrides += [] if options.batch_size is None else [f"batch_size={options.batch_size}"]
    overrides += options.set
    reproduction = Reproduction(
        options.out, options.data, overrides, dict(options.option), options.held_out, _print_line
    )
    failures, elsewhere = reproduction.run(rows, folders, range(options.seeds), kit, options.jobs)
    if tables := reproduction.tables(rows):
        text = "\n".join(map(markdown, tables))
        path = options.out / f"{options.table.replace('/', '_table')}.md"
        with atomic_write(path) as file:
            file.write(text.encode())
        print(f"\n{text}\n{path}")
    for name in elsewhere:
        print_error(PROG, f"not finished: another process is working on {name}")
    for failure in failures:
        print_error(PROG, f"failed: {failure}")
    return FAILED if failures or elsewhere else 0


def _probe(options: argparse.Namespace) -> int:
    tasks = [read_task(folder) for folder in find_tasks(options.tasks_dir, options.tasks)]
    left_out = [task.name for task in tasks if not can_probe(task)]
    tasks = [task for task in tasks if can_probe(task)]
    if left_out:
        why = "they have no validation split, or are not scored by accuracy on whole clips"
        print_error(PROG, f"left out {', '.join(left_out)}: {why}")
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


if __name__ == "__main__":
    sys.exit(main())
