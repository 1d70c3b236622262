"""The command `hear-embed-corpus`: embed a corpus on Ray, on this machine or on a cluster.

OUT, a folder or an address on object storage, holds

    part-HASH.parquet         a row per recording: path, duration_s, embedding, and a manifest's other columns; with
                              --timestamps a row per step, and timestamp_ms
    errors/_part-HASH.jsonl   a line for each recording that failed: {"path": ..., "reason": ...}
    _hear-embed-corpus.json   settings of the embeddings

Tools read the Parquet files as one table and skip names that begin with _. To try failed recordings again, delete
`errors/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hear_encoders import __version__, save_checkpoint
from hear_encoders.cli.corpus_inputs import Plan, plan
from hear_encoders.cli.corpus_stages import (
    ERRORS,
    Embed,
    decode,
    done_paths,
    model_settings,
    settings_or_error,
    write,
)
from hear_encoders.cli.options import MODELS, add_embedding_arguments, load_embedder
from hear_encoders.cluster import check_ray, on_ray
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    non_negative,
    positive,
    print_error,
    print_line,
    progress,
    warnings_as_messages,
)
from hear_encoders.embedder import Embedder
from hear_encoders.storage import Folder, is_url

SETTINGS_FILE = "_hear-embed-corpus.json"
OLD_PLAN_FILE = "_plan.json"  # of the torchrun command before

# CPUs that Ray reserves for a worker on a CPU, which uses --threads of them, and for a task of the other stages beside
# it. They leave room for the workers of another machine that fails. Were they equal, Ray would decode in the workers.
WORKER_CPUS, STAGE_CPUS = 0.3, 0.25
MAX_BLOCKS = 10000  # that Ray keeps track of

_COLUMNS = {"path", "duration_s", "timestamp_ms", "embedding"}

_EPILOG = """\
INPUT is an audio file, a folder (recursive) or a glob pattern, on this machine or at an address such as s3://, gs://,
https:// or hf://. It may also be a manifest (.csv, .parquet) with the paths of recordings, whose other columns are
carried through; a table with audio (.parquet, or a folder of `Dataset.save_to_disk`); or a WebDataset shard (.tar).

examples:
  hear-embed-corpus recordings/ -o embeddings/
  hear-embed-corpus s3://bucket/recordings/ -o s3://bucket/embeddings/ --address auto --gpus-per-worker 1
  hear-embed-corpus manifest.parquet -o embeddings/ --column file --half
  hear-embed-corpus 'shards/*.tar' -o embeddings/ --workers 16

To resume an interrupted run, or to add new files, give the same command again: only what is missing is embedded.

exit status:
  0    all recordings were embedded
  1    some failed, as OUT/errors/ says, or were left out; or the run could not go on
  2    bad usage: nothing was embedded
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hear-embed-corpus` and return its exit code."""
    options = _parse(arguments)
    with warnings_as_messages(options.prog):
        try:
            check_ray()
            output = Folder(options.output)
            _check_output(output)
            checkpoint, embedder = _checkpoint(options)
            work = plan(
                options.inputs,
                exclude=options.exclude,
                column=options.column,
                done=done_paths(output),
                task_mb=options.task_mb,
            )
            if taken := _COLUMNS & set(work.extras.names):
                raise ValueError(f"the manifest's column {min(taken)!r} would take the place of the output's own")
            with on_ray(options.address):
                _complete(options)
                settings = {
                    **_settings(options, checkpoint, embedder),
                    "columns": {field.name: str(field.type) for field in work.extras},
                }
                output.claim(SETTINGS_FILE, settings, holds="embeddings made", advice="choose another folder")
                return _embed(options, output, work, checkpoint, embedder, settings)
        except KeyboardInterrupt:
            print_error(options.prog, "interrupted")
            return INTERRUPTED
        except (OSError, ValueError) as error:
            print_error(options.prog, f"error: {error}")
            return BAD_USAGE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hear-embed-corpus",
        description="Embed a corpus into a folder of Parquet files with Ray, on this machine or on a cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(prog=parser.prog)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder, or its address on object storage")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add_embedding_arguments(parser)
    parser.add_argument("--half", action="store_true", help="write float16 instead of float32")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="of a manifest, with the paths, or of a table, with the audio; default: path, audio",
    )
    cluster = parser.add_argument_group("Ray")
    cluster.add_argument(
        "--address",
        help="of a Ray cluster to join, such as auto; default: $RAY_ADDRESS, else start Ray on this machine",
    )
    cluster.add_argument(
        "--workers", type=positive(int), metavar="N", help="processes with a model; default: one per GPU, else per CPU"
    )
    cluster.add_argument(
        "--gpus-per-worker",
        type=non_negative,
        metavar="N",
        help="such as 0.5, for two workers on each GPU; default: 1 if the cluster has GPUs, else 0",
    )
    cluster.add_argument(
        "--part-seconds",
        type=positive(float),
        default=1800.0,
        metavar="N",
        help="seconds of audio in a file of OUT, at least; lower it for a small corpus, so that every worker gets "
        "several parts; default: %(default)g",
    )
    cluster.add_argument(
        "--task-mb",
        type=positive(float),
        default=128.0,
        metavar="N",
        help="MB of files that a decoding task reads, at least; default: %(default)g",
    )
    return parser.parse_args(arguments)


def _check_output(output: Folder) -> None:
    """Raise ValueError unless the output is new or this command's own."""
    if not is_url(str(output)) and Path(str(output)).is_file():
        raise ValueError(f"{output}: expected a folder")
    names = output.names()
    if OLD_PLAN_FILE in names:
        raise ValueError(f"{output} was made by torchrun -m hear_encoders.cli.embed_corpus: see CHANGELOG.md to go on")
    if SETTINGS_FILE not in names and any(name.endswith(".parquet") for name in names):
        raise ValueError(f"{output} holds Parquet files, but no {SETTINGS_FILE}: choose another folder")
    output.tidy()
    output.tidy(ERRORS)


def _checkpoint(options: argparse.Namespace) -> tuple[dict[str, bytes], Embedder]:
    """Return the content of the files of the weights, and the model on this machine's CPU."""
    embedder = load_embedder(argparse.Namespace(**{**vars(options), "device": "cpu", "compile": False}))
    with tempfile.TemporaryDirectory(prefix="hear-weights-") as folder:
        save_checkpoint(folder, embedder.encoder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, embedder


def _complete(options: argparse.Namespace) -> None:
    """Set the options that depend on the cluster."""
    import ray

    resources = ray.cluster_resources()
    if options.gpus_per_worker is None:
        on_gpu = resources.get("GPU", 0) > 0 and options.device in (None, "auto", "cuda")
        options.gpus_per_worker = 1.0 if on_gpu else 0.0
    if options.device is None:
        options.device = "cuda" if options.gpus_per_worker else "cpu"
    if options.workers is None:
        gpus = resources.get("GPU", 0)
        workers = gpus / options.gpus_per_worker if options.gpus_per_worker else resources.get("CPU", 1)
        options.workers = max(1, int(workers))
    if options.threads is None:
        options.threads = 1


def _resources(options: argparse.Namespace) -> dict[str, float]:
    """Return what Ray reserves for a worker."""
    if options.gpus_per_worker:
        return {"num_cpus": 1, "num_gpus": options.gpus_per_worker}
    return {"num_cpus": WORKER_CPUS}


def _settings(options: argparse.Namespace, checkpoint: dict[str, bytes], embedder: Embedder) -> dict[str, Any]:
    """Return the settings of the embeddings. The precision depends on the device: a worker on a GPU is asked.

    Raises:
        ValueError: a worker cannot load the model.
    """
    import ray

    if options.device == "cpu":
        return model_settings(embedder, options)
    found = ray.get(ray.remote(settings_or_error).options(**_resources(options)).remote(options, checkpoint))
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _embed(
    options: argparse.Namespace,
    output: Folder,
    work: Plan,
    checkpoint: dict[str, bytes],
    embedder: Embedder,
    settings: dict[str, Any],
) -> int:
    """Run the stages, report, and return the exit code."""
    import ray.exceptions

    began = time.time()
    files, failed, seconds = 0, 0, 0.0
    busy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        with progress(work.files, "file", options.prog) as advance:
            for report in _reports(options, output, work, checkpoint, embedder, settings):
                reasons = report["failures"]
                for message in report["warnings"]:
                    print_error(options.prog, f"warning: {message}")
                for reason in reasons:
                    print_error(options.prog, f"failed: {reason}")
                files, failed, seconds = files + report["files"], failed + len(reasons), seconds + report["seconds"]
                busy[report["worker"]].append((report["began"], report["ended"]))
                advance(report["files"] + len(reasons))
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        reason = getattr(cause, "strerror", None) or cause  # Ray writes a text of its own over an OSError's file name
        print_error(options.prog, f"error: {reason}; what is done is kept: give the same command again")
        return FAILED
    already_there = f", {work.done} already there" if work.done else ""
    hours, took = seconds / 3600, time.time() - began
    if files or failed:
        print_line(
            f"{output}: {_recordings(files)} embedded{already_there}, {hours:.2f} hours in {took:.0f} s; "
            f"workers were busy {busy_share(busy):.0%} of the time"
        )
    else:
        print_line(f"{output}: nothing new, {_recordings(work.done)} already there")
    if failed:
        print_error(options.prog, f"{_recordings(failed)} failed: see {output}/{ERRORS}")
    for line in work.left_out:
        print_error(options.prog, line)
    return FAILED if failed or work.left_out else 0


def _recordings(count: int) -> str:
    return f"{count} recording{'' if count == 1 else 's'}"


def _reports(
    options: argparse.Namespace,
    output: Folder,
    work: Plan,
    checkpoint: dict[str, bytes],
    embedder: Embedder,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Run the stages on Ray Data, and yield what `write` tells of each part."""
    import ray.data

    if not work.tasks:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, too
    # Ray Data warns of fewer tasks than workers; but a task is many parts.
    warnings.filterwarnings("ignore", message="The (minimum|maximum) number of concurrent")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = 1 << 20  # bytes; so that each part is a block, which goes to one worker
    tasks = [{"task": pickle.dumps(task)} for task in work.tasks]
    stage: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if options.gpus_per_worker:
        stage |= {"num_cpus": 1}
    else:  # where embedding takes most of the CPUs, a decoder for each worker is plenty
        stage |= {"num_cpus": STAGE_CPUS, "compute": ray.data.TaskPoolStrategy(size=options.workers)}
    size = embedder.timestamp_embedding_size if options.timestamps else embedder.scene_embedding_size
    reports = (
        ray.data.from_items(tasks, override_num_blocks=min(len(tasks), MAX_BLOCKS))
        .map_batches(
            decode, fn_kwargs={"part_seconds": options.part_seconds, "is_local": embedder.framer.is_local}, **stage
        )
        .map_batches(
            Embed,
            fn_constructor_args=(options, partial(ray.get, ray.put(checkpoint)), settings),
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            batch_size=1,
            batch_format="pyarrow",
            **_resources(options),
        )
        .map_batches(
            write,
            fn_kwargs={
                "output": str(output),
                "extras": work.extras,
                "framer": embedder.framer,
                "timestamps": options.timestamps,
                "size": size,
            },
            **stage,
        )
    )
    for row in reports.iter_rows():
        yield json.loads(row["report"])


def busy_share(periods: dict[str, list[tuple[float, float]]]) -> float:
    """Return which share of the time workers were embedding, each from its first part on until the run's last part."""
    embedding = sum(ended - began for parts in periods.values() for began, ended in parts)
    last = max((ended for parts in periods.values() for _, ended in parts), default=0.0)
    there = sum(last - min(began for began, _ in parts) for parts in periods.values())
    return embedding / there if there else 0.0


if __name__ == "__main__":
    sys.exit(main())
