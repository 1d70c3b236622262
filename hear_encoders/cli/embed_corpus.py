"""Embed a corpus on many cores, GPUs or machines: `torchrun -m hear_encoders.cli.embed_corpus INPUT... -o OUT`.

The files are cut into parts; rank r of n takes missing parts r, r + n, r + 2n, ... OUT holds (NNNNNN: part number)

    part-NNNNNN.parquet       rows as in `hear-embed -o .parquet`, with absolute paths: path, embedding, and with
                              --timestamps timestamp_ms
    _part-NNNNNN.json         written after it: number of files in the part, and the error of each that failed
    _part-NNNNNN.files.json   files in the part
    _plan.json                number of parts, and settings of the embeddings

pyarrow, pandas and Spark read the folder as one table, since they skip names that begin with _; for other tools, pass
OUT/part-*.parquet. Parts are written atomically. If processes die, give the same command again, with any number of
processes: only the parts they were working on are lost. Files added in the meantime go into new parts. Run one launch
at a time on a folder. Killed processes may leave hidden `.*.tmp` files in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hear_encoders.audio import AudioFile, find_audio
from hear_encoders.cli.corpus import Failure, embed_files
from hear_encoders.cli.options import MODELS, add_embedding_arguments, embedding_settings, load_embedder
from hear_encoders.cli.outputs import ParquetOutput, check_parquet, output_kind
from hear_encoders.console import BAD_USAGE, output_path, positive, print_error, warnings_as_messages
from hear_encoders.embedder import Embedder
from hear_encoders.files import read_json, settings_difference, write_json

PLAN_FILE = "_plan.json"
POLL_S = 1.0
PLANNING_TIMEOUT = timedelta(days=1)
MISSING_PARTS = "missing parts"  # key in torchrun's key-value store

_EPILOG = """\
examples:
  torchrun --nproc-per-node=8 -m hear_encoders.cli.embed_corpus recordings/ -o embeddings/
  torchrun --nnodes=4 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=first:29500 \\
      -m hear_encoders.cli.embed_corpus /data/recordings -o /data/embeddings

On all machines, the recordings and OUT must have the same paths. To resume an interrupted run, give the same command
again. Files that cannot be embedded neither stop the run nor change the exit status, which would make torchrun stop the
other processes. They are listed at the end and in OUT/_part-*.json; delete such a file to redo its part.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in one of the processes and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m hear_encoders.cli.embed_corpus",
        description="Embed a corpus into a folder of Parquet files, with several processes under torchrun. "
        "An interrupted run can be resumed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", required=True, type=output_path, metavar="OUT", help="folder")
    parser.add_argument(
        "--part-files", type=positive(int), default=1000, metavar="N", help="files per part; default: %(default)s"
    )
    parser.add_argument(
        "--part-mb", type=positive(float), default=256.0, metavar="N", help="MB of audio per part; default: %(default)g"
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add_embedding_arguments(parser)
    options = parser.parse_args(arguments)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with warnings_as_messages(parser.prog):
        try:
            check_parquet()
            options.device = _own_device(options.device)
            embedder = load_embedder(options)
            missing = _agree_on_parts(options, embedder, rank, processes)
            root = Path(_read_plan(options.output)["settings"]["root"])
            _check_settings(options, embedder, root)
        except (OSError, ValueError) as error:
            print_error(parser.prog, f"error: {error}")
            return BAD_USAGE
        failures = []
        own = missing[rank::processes]
        for done, number in enumerate(own, start=1):
            if not _record_file(options.output, number).exists():  # it may exist after a restart
                failures += _embed_part(embedder, root, number, options)
                print_error(parser.prog, f"part {number} done, {done} of {len(own)}")
        for failure in failures:
            print_error(parser.prog, f"failed: {failure.reason}")
        # A few minutes after the first machine has finished, torchrun would stop the others.
        while processes > 1 and not all(_record_file(options.output, number).exists() for number in missing):
            time.sleep(POLL_S)
    return 0


def _own_device(device: str | None) -> str | None:
    """Return this process's own GPU if the option asks for a GPU, else the option.

    Raises:
        ValueError: the machine has more processes than GPUs.
    """
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device not in (None, "cuda") or gpus == 0:
        return device
    if local_rank >= gpus:
        raise ValueError(
            f"this is process {local_rank + 1} of a machine with {gpus} GPUs: start one process per GPU or set --device"
        )
    return f"cuda:{local_rank}"


def _agree_on_parts(options: argparse.Namespace, embedder: Embedder, rank: int, processes: int) -> list[int]:
    """Return the numbers of the parts that are missing when the run begins, the same list in all processes.

    Rank 0 makes the list; the others read it from torchrun's key-value store. The store outlives the processes, so the
    list survives a restart; some of its parts are then done already.

    Raises:
        FileNotFoundError, ValueError: as `_make_plan`, in rank 0; torchrun then stops the others.
    """
    if processes == 1:
        return _make_plan(options, embedder)
    store, _, _ = next(dist.rendezvous("env://"))
    if rank == 0 and not store.check([MISSING_PARTS]):
        store.set(MISSING_PARTS, json.dumps(_make_plan(options, embedder)))
    store.wait([MISSING_PARTS], PLANNING_TIMEOUT)
    return json.loads(store.get(MISSING_PARTS))


def _make_plan(options: argparse.Namespace, embedder: Embedder) -> list[int]:
    """Write the plan, or add new files to it, and return the numbers of the missing parts.

    Raises:
        FileNotFoundError: no such input, or no audio in it.
        ValueError: the folder holds embeddings made with other settings, or something else.
    """
    output, parts, known = options.output, 0, set()
    if output_kind(output) != "folder":
        raise ValueError(f"{output}: expected a folder")
    root, files = find_audio(options.inputs, options.exclude)
    if (output / PLAN_FILE).exists():
        _check_settings(options, embedder, root)
        parts = _read_plan(output)["parts"]
        known = {name for number in range(parts) for name in read_json(_files_file(output, number))}
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and has no {PLAN_FILE}: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    settings = _settings(options, embedder, root)
    if parts == 0:  # before the parts, so that interrupted planning can be resumed
        write_json(output / PLAN_FILE, {"settings": settings, "parts": 0})
    part: list[str] = []
    size = 0.0
    for file in [*(file for file in files if file.name not in known), None]:
        megabytes = 0.0 if file is None else _size_mb(file.path)
        if part and (file is None or len(part) == options.part_files or size + megabytes > options.part_mb):
            write_json(_files_file(output, parts), part)
            part, size, parts = [], 0.0, parts + 1
        if file is not None:
            part.append(file.name)
            size += megabytes
    write_json(output / PLAN_FILE, {"settings": settings, "parts": parts})
    return [number for number in range(parts) if not _record_file(output, number).exists()]


def _size_mb(path: Path) -> float:
    """Return a file's size in MB, or 0 if it has been deleted since it was found; embedding it will fail later."""
    try:
        return path.stat().st_size / 1e6
    except OSError:
        return 0.0


def _settings(options: argparse.Namespace, embedder: Embedder, root: Path) -> dict[str, Any]:
    return {**embedding_settings(embedder, options.model, root), "timestamps": options.timestamps}


def _check_settings(options: argparse.Namespace, embedder: Embedder, root: Path) -> None:
    """Raise ValueError if the plan has other settings. Each process checks: a machine may have other weights."""
    if difference := settings_difference(_read_plan(options.output)["settings"], _settings(options, embedder, root)):
        raise ValueError(f"{options.output} holds embeddings made with {difference}: choose another folder")


def _read_plan(output: Path) -> dict[str, Any]:
    path = output / PLAN_FILE
    try:
        plan = read_json(path)
        plan["settings"]["root"], range(plan["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged; choose another folder") from error
    return plan


def _record_file(output: Path, number: int) -> Path:
    return output / f"_part-{number:06d}.json"


def _files_file(output: Path, number: int) -> Path:
    return output / f"_part-{number:06d}.files.json"


def _embed_part(embedder: Embedder, root: Path, number: int, options: argparse.Namespace) -> list[Failure]:
    """Embed a part, write it, and return the files that failed.

    Raises:
        RuntimeError: all files failed, and not because of their content: this machine is broken, or cannot reach the
            recordings. (Files that were deleted while others remain count as ordinary failures.)
    """
    files = [AudioFile(root / name, name) for name in read_json(_files_file(options.output, number))]
    path = options.output / f"part-{number:06d}.parquet"
    output = ParquetOutput(path, options.timestamps)
    try:
        failures = embed_files(
            embedder,
            files,
            output,
            timestamps=options.timestamps,
            batch_seconds=options.batch_seconds,
            jobs=options.jobs,
        )
        all_machine_faults = len(failures) == len(files) and all(failure.machine_fault for failure in failures)
        if all_machine_faults and not _all_deleted(files, root):
            raise RuntimeError(
                f"none of the {len(files)} files of part {number} could be embedded: {failures[0].reason}"
            )
        if len(failures) < len(files):
            output.close()
        else:
            output.abort()
            path.unlink(missing_ok=True)  # from an earlier attempt
    except BaseException:
        output.abort()
        raise
    reasons = [failure.reason for failure in failures]
    write_json(_record_file(options.output, number), {"files": len(files), "failures": reasons})
    return failures


def _all_deleted(files: list[AudioFile], root: Path) -> bool:
    """Return whether all files were deleted. If nothing else is left either, their disk is missing instead."""
    return not any(file.path.exists() for file in files) and root.is_dir() and any(root.iterdir())


if __name__ == "__main__":
    sys.exit(main())
