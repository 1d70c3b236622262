"""Embed a corpus on many cores, GPUs or machines: `torchrun -m hear_encoders.cli.embed_corpus INPUT... -o OUT`.

The files are cut into parts, and each process embeds every so-manieth part that is missing. In OUT (NNNNNN: number of
the part)

    part-NNNNNN.parquet       rows as of `hear-embed -o .parquet`, with absolute paths: path, embedding, and of time
                              steps timestamp_ms
    _part-NNNNNN.json         written after it: how many files the part has, which could not be embedded, and why
    _part-NNNNNN.files.json   which files go into the part
    _plan.json                how many parts there are, and what the embeddings are made with

pyarrow, pandas and Spark take the folder as one table, as they pass over names that begin with _; others take
OUT/part-*.parquet. A part is there as a whole or not at all, so that whatever becomes of a process, the same command
goes on where it was, on any number of processes; what is lost is work on the parts in hand. Files that are new since
then become parts of their own. One launch at a time may work on a folder. Processes that were killed may leave hidden
`.*.tmp` files in it.
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
from hear_encoders.cli.outputs import ParquetOutput, check_parquet, output_kind, settings_difference
from hear_encoders.console import BAD_USAGE, output_path, positive, print_error, warnings_as_messages
from hear_encoders.embedder import Embedder
from hear_encoders.files import write_json

PLAN_FILE = "_plan.json"
POLL_S = 1.0
LONGEST_PLANNING = timedelta(days=1)

_EPILOG = """\
examples:
  torchrun --nproc-per-node=8 -m hear_encoders.cli.embed_corpus recordings/ -o embeddings/
  torchrun --nnodes=4 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=first:29500 \\
      -m hear_encoders.cli.embed_corpus /data/recordings -o /data/embeddings

All machines need the recordings and OUT under the same paths. After an interruption give the same command again. Files
that cannot be embedded do not end the work, nor change the exit code, at which torchrun would stop the others: they are
listed at the end and in OUT/_part-*.json. Delete such a file to have its part made again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, in one of the processes. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m hear_encoders.cli.embed_corpus",
        description="Embed a corpus on several processes, under torchrun, into parts of Parquet; can be resumed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", required=True, type=output_path, metavar="OUT", help="folder")
    parser.add_argument(
        "--part-files", type=positive(int), default=1000, metavar="N", help="files in a part; default: %(default)s"
    )
    parser.add_argument(
        "--part-mb", type=positive(float), default=256.0, metavar="N", help="audio in a part; default: %(default)g MB"
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
            todo = _agree_on_parts(options, embedder, rank, processes)
            root = Path(_read_plan(options.output)["settings"]["root"])
            _check_settings(options, embedder, root)
        except (OSError, ValueError) as error:
            print_error(parser.prog, f"error: {error}")
            return BAD_USAGE
        failures = []
        mine = todo[rank::processes]
        for done, number in enumerate(mine, start=1):
            if not _record(options.output, number).exists():  # as it may after a restart
                failures += _embed_part(embedder, root, number, options)
                print_error(parser.prog, f"part {number} done, {done} of {len(mine)}")
        for failure in failures:
            print_error(parser.prog, f"failed: {failure.reason}")
        # Torchrun takes the whole launch down some minutes after the first machine has ended.
        while processes > 1 and not all(_record(options.output, number).exists() for number in todo):
            time.sleep(POLL_S)
    return 0


def _own_device(device: str | None) -> str | None:
    """The GPU of this process among those of its machine, where a GPU is to be taken."""
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device not in (None, "cuda") or gpus == 0:
        return device
    if local >= gpus:
        raise ValueError(f"this is process {local + 1} of its machine, which has {gpus} GPUs: start as many, or choose")
    return f"cuda:{local}"


def _agree_on_parts(options: argparse.Namespace, embedder: Embedder, rank: int, processes: int) -> list[int]:
    """Numbers of the parts that are missing as the work begins, the same list in all processes.

    The first process makes it, and the others get it through the launcher's key-value store. Torchrun's store outlives
    processes: after a restart the list is still there and still good, only some of its parts are done by now.

    Raises:
        FileNotFoundError, ValueError: as `_make_plan`, in the first process; torchrun then ends the others.
    """
    if processes == 1:
        return _make_plan(options, embedder)
    store, _, _ = next(dist.rendezvous("env://"))
    if rank == 0 and not store.check(["missing parts"]):
        store.set("missing parts", json.dumps(_make_plan(options, embedder)))
    store.wait(["missing parts"], LONGEST_PLANNING)
    return json.loads(store.get("missing parts"))


def _make_plan(options: argparse.Namespace, embedder: Embedder) -> list[int]:
    """Write the plan, or add to it what is new; return the numbers of the parts that are missing.

    Raises:
        FileNotFoundError: no such input, or no audio in it.
        ValueError: the folder is of embeddings that were made differently, or holds something else.
    """
    output, parts, known = options.output, 0, set()
    if output_kind(output) != "folder":
        raise ValueError(f"{output}: expected a folder")
    root, files = find_audio(options.inputs)
    if (output / PLAN_FILE).exists():
        _check_settings(options, embedder, root)
        parts = _read_plan(output)["parts"]
        known = {name for number in range(parts) for name in _read_files(output, number)}
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and has no {PLAN_FILE}: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    settings = _settings(options, embedder, root)
    if parts == 0:  # before all else, so that a planning that is cut short can be begun again
        write_json(output / PLAN_FILE, {"settings": settings, "parts": 0})
    part, size = [], 0.0
    for file in [*(file for file in files if file.name not in known), None]:
        megabytes = 0.0 if file is None else _size_mb(file.path)
        if part and (file is None or len(part) == options.part_files or size + megabytes > options.part_mb):
            write_json(_files_file(output, parts), part)
            part, size, parts = [], 0.0, parts + 1
        if file is not None:
            part.append(file.name)
            size += megabytes
    write_json(output / PLAN_FILE, {"settings": settings, "parts": parts})
    return [number for number in range(parts) if not _record(output, number).exists()]


def _size_mb(path: Path) -> float:
    """Size of a file in MB; 0 where it has gone since it was found, which embedding it will report."""
    try:
        return path.stat().st_size / 1e6
    except OSError:
        return 0.0


def _settings(options: argparse.Namespace, embedder: Embedder, root: Path) -> dict[str, Any]:
    """What the embeddings are made with."""
    return {**embedding_settings(embedder, options.model, root), "timestamps": options.timestamps}


def _check_settings(options: argparse.Namespace, embedder: Embedder, root: Path) -> None:
    """Raise ValueError where the plan was made with other settings: also by a machine with, say, other weights."""
    if difference := settings_difference(_read_plan(options.output)["settings"], _settings(options, embedder, root)):
        raise ValueError(f"{options.output} holds embeddings made with {difference}")


def _read_plan(output: Path) -> dict[str, Any]:
    try:
        plan = json.loads((output / PLAN_FILE).read_text(encoding="utf-8"))
        plan["settings"]["root"], range(plan["parts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output / PLAN_FILE}: damaged ({error!r}); choose another folder") from error
    return plan


def _record(output: Path, number: int) -> Path:
    return output / f"_part-{number:06d}.json"


def _files_file(output: Path, number: int) -> Path:
    return output / f"_part-{number:06d}.files.json"


def _read_files(output: Path, number: int) -> list[str]:
    return json.loads(_files_file(output, number).read_text(encoding="utf-8"))


def _deleted(files: list[AudioFile], root: Path) -> bool:
    """Is none of the files there any more? Where nothing else is either, it is rather their disk that is not there."""
    return not any(file.path.exists() for file in files) and root.is_dir() and any(root.iterdir())


def _embed_part(embedder: Embedder, root: Path, number: int, options: argparse.Namespace) -> list[Failure]:
    """Embed a part and write it; return the files that failed.

    Raises:
        RuntimeError: all files failed, and not for what is in them: this machine is not fit for it, or does not have
            the recordings. (Files that were deleted while others are still there have just failed.)
    """
    files = [AudioFile(root / name, name) for name in _read_files(options.output, number)]
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
        unfit = len(failures) == len(files) and all(failure.machine for failure in failures)
        if unfit and not _deleted(files, root):
            raise RuntimeError(
                f"none of the {len(files)} files of part {number} could be embedded: {failures[0].reason}"
            )
        if len(failures) < len(files):
            output.close()
        else:
            output.abort()
            path.unlink(missing_ok=True)  # of an earlier attempt
    except BaseException:
        output.abort()
        raise
    write_json(_record(options.output, number), {"files": len(files), "failures": [f.reason for f in failures]})
    return failures


if __name__ == "__main__":
    sys.exit(main())
