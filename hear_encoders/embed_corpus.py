"""Embed a corpus on many cores, GPUs or machines: `torchrun -m hear_encoders.embed_corpus INPUT... -o OUT`.

The files are dealt out in parts of equally many, and each process embeds every so-manieth part that is missing. In OUT
(NNNNNN: number of the part)

    part-NNNNNN.parquet   rows as of `hear-embed -o .parquet`: path, embedding, of time steps also timestamp_ms
    _part-NNNNNN.json     written last: how many files the part has, and which of them could not be embedded, and why
    _plan.json            what the embeddings were made with, and which files go into which part

Readers of Parquet take the folder as one table; they pass over names that begin with _. A part is there as a whole or
not at all, so that whatever becomes of a process, the same command goes on where it was, on any number of processes,
and loses and doubles nothing. Files that are new since then become parts of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hear_encoders.atomic import write_json
from hear_encoders.cli import (
    BAD_USAGE,
    MODELS,
    add_embedding_arguments,
    embedding_settings,
    load_embedder,
    output_path,
    positive,
    say,
)
from hear_encoders.corpus import AudioFile, embed_files, find_audio
from hear_encoders.embedder import Embedder
from hear_encoders.outputs import ParquetOutput, check_parquet, output_kind

PLAN_FILE = "_plan.json"

_EPILOG = """\
examples:
  torchrun --nproc-per-node=8 -m hear_encoders.embed_corpus recordings/ -o embeddings/
  torchrun --nnodes=4 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=first:29500 \\
      -m hear_encoders.embed_corpus /data/recordings -o /data/embeddings

All machines need the recordings and OUT under the same paths. After an interruption give the same command again. Files
that cannot be embedded do not end the work, nor change the exit code, at which torchrun would stop the others: they are
listed at the end and in OUT/_part-*.json. Delete such a file to have its part made again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, in one of the processes. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m hear_encoders.embed_corpus",
        description="Embed a corpus on several processes, under torchrun, into parts of Parquet; can be resumed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file, folder (recursive) or glob pattern")
    parser.add_argument("-o", "--output", required=True, type=output_path, metavar="OUT", help="folder")
    parser.add_argument(
        "--part-files", type=positive(int), default=1000, metavar="N", help="files in a part; default: %(default)s"
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add_embedding_arguments(parser)
    options = parser.parse_args(arguments)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.device == "cuda" or options.device is None:
        options.device = _own_device(options.device)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: say(parser.prog, f"warning: {message}")
        try:
            embedder = load_embedder(options)
            todo = _missing_parts(options, embedder, rank, processes)
        except (OSError, ValueError) as error:
            say(parser.prog, f"error: {error}")
            return BAD_USAGE
        _embed_parts(parser.prog, embedder, todo[rank::processes], options)
    return 0


def _own_device(device: str | None) -> str | None:
    """The GPU of this process among those of its machine; None where there is none to be had and none was asked for."""
    if device is None and not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def _missing_parts(options: argparse.Namespace, embedder: Embedder, rank: int, processes: int) -> list[int]:
    """Numbers of the parts that are missing, as the first process sees it, which makes the plan.

    That one list is all that the processes say to each other, through the launcher's key-value store: from there on
    nobody waits for anybody.

    Raises:
        FileNotFoundError, ValueError: as `_make_plan`, in all processes.
    """
    if processes == 1:
        return _make_plan(options, embedder)
    # Torchrun's store outlives the processes: in it, what those before a restart said is still there.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {processes}"
    store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
    if rank > 0:
        answer = json.loads(store.get("plan"))  # waits for it
        store.set(f"read by {rank}", "")
    else:
        try:
            answer = {"todo": _make_plan(options, embedder)}
        except (OSError, ValueError) as error:
            answer = {"problem": str(error)}
        store.set("plan", json.dumps(answer))
        store.wait([f"read by {other}" for other in range(1, processes)])  # the store may be this process's
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return answer["todo"]


def _make_plan(options: argparse.Namespace, embedder: Embedder) -> list[int]:
    """Write the plan, or add to it what is new; return the numbers of the parts that are missing.

    Raises:
        FileNotFoundError: no such input, or no audio in it.
        ValueError: the folder is of embeddings that were made differently, or holds something else.
    """
    check_parquet()
    output, plan_file = options.output, options.output / PLAN_FILE
    if output_kind(output) != "folder":
        raise ValueError(f"{output}: expected a folder")
    root, files = find_audio(options.inputs)
    settings = {**embedding_settings(embedder, options.model, root), "timestamps": options.timestamps}
    parts: list[list[str]] = []
    if plan_file.exists():
        plan = _read_plan(output)
        for key, value in settings.items():
            if plan["settings"].get(key) != value:
                before = plan["settings"].get(key)
                raise ValueError(f"{output} holds embeddings made with {key} = {before!r}, now {value!r}")
        parts = plan["parts"]
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and has no {PLAN_FILE}: choose another folder")
    known = {name for part in parts for name in part}
    new = [file.name for file in files if file.name not in known]
    if new:
        parts += [new[first : first + options.part_files] for first in range(0, len(new), options.part_files)]
        output.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, {"settings": settings, "parts": parts})
    return [number for number in range(len(parts)) if not _record(output, number).exists()]


def _read_plan(output: Path) -> dict[str, Any]:
    try:
        plan = json.loads((output / PLAN_FILE).read_text(encoding="utf-8"))
        plan["settings"]["root"], plan["parts"][0][0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{output / PLAN_FILE}: damaged ({error!r}); choose another folder") from error
    return plan


def _record(output: Path, number: int) -> Path:
    return output / f"_part-{number:06d}.json"


def _embed_parts(prog: str, embedder: Embedder, numbers: Sequence[int], options: argparse.Namespace) -> None:
    """Embed this process's parts."""
    if not numbers:
        return
    plan = _read_plan(options.output)
    root, failed = Path(plan["settings"]["root"]), []
    for done, number in enumerate(numbers, start=1):
        files = [AudioFile(root / name, name) for name in plan["parts"][number]]
        begin = time.monotonic()
        output = ParquetOutput(options.output / f"part-{number:06d}.parquet", options.timestamps)
        try:
            failures = embed_files(
                embedder,
                files,
                output,
                timestamps=options.timestamps,
                batch_seconds=options.batch_seconds,
                jobs=options.jobs,
            )
            if len(failures) < len(files):
                output.close()
            else:
                output.abort()
        except BaseException:
            output.abort()
            raise
        reasons = [failure.reason for failure in failures]
        write_json(_record(options.output, number), {"files": len(files), "failures": reasons})
        rate = len(files) / (time.monotonic() - begin)
        say(prog, f"part {number} ({done} of {len(numbers)}): {len(files)} files, {rate:.1f} a second")
        failed += reasons
    for reason in failed:
        say(prog, f"failed: {reason}")


if __name__ == "__main__":
    sys.exit(main())
