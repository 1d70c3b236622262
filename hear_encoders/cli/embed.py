"""The command `hear-embed`: embed audio files, or audio that arrives on standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hear_encoders import __version__
from hear_encoders.audio import AudioFile, Search, probe_s, search_audio, summarize
from hear_encoders.cli.embed_files import NOT_FINITE, embed_files
from hear_encoders.cli.options import MODELS, add_embedding_arguments, embedding_settings, load_embedder
from hear_encoders.cli.outputs import Output, open_output, output_kind
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    discard_stdout,
    non_negative,
    output_path,
    positive,
    print_error,
    print_line,
    progress,
    warnings_as_messages,
)
from hear_encoders.embedder import Embedder
from hear_encoders.pcm import ENCODINGS, PCM, read_pipe
from hear_encoders.stream import DEFAULT_WARM_UP_S, AxLSTMStream
from hear_encoders.threads import usable_cpus

STREAMING_MODEL = "hear_axlstm"

_EPILOG = """\
examples:
  hear-embed recordings/ -o embeddings.npz
  hear-embed 'calls/**/*.mp3' -o steps.parquet --timestamps --model hear_axlstm
  hear-embed a.wav b.flac -o embeddings/ --weights org/name --device cuda
  hear-embed recordings/ --list --exclude '*.mp4'
  arecord -f S16_LE -r 16000 | hear-embed --stream - > steps.jsonl

Writes one scene embedding per file, or with --timestamps one embedding per 40 ms. If OUT is a folder, files that it
already holds are skipped, so an interrupted run can be resumed.

With --stream, reads WAV or raw samples from standard input. As soon as each 40 ms step is complete, writes it to
standard output as one line of JSON: {"timestamp_ms": ..., "embedding": [...]}.

exit status:
  0    all files were embedded
  1    some files failed or were left out, the rest were embedded; or the output could not be written
  2    bad usage: nothing was embedded
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hear-embed` and return its exit code."""
    options = _parse(arguments)
    with warnings_as_messages(options.prog):
        if options.stream:
            return _embed_stream(options)
        return _list_files(options) if options.list else _embed_files(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hear-embed",
        description="Embed audio files, at any sample rate, with any number of channels: all formats that libsndfile "
        "reads, and with the extra `av` m4a, mp4, webm and all others that FFmpeg reads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(prog=parser.prog)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-o", "--output", type=output_path, metavar="OUT", help=".npz file, .parquet file or folder")
    parser.add_argument(
        "--list",
        action="store_true",
        help="embed nothing: list the files that INPUT selects, with durations, and those left out, with reasons",
    )
    parser.add_argument("--model", choices=MODELS, help=f"default: {MODELS[0]}, or {STREAMING_MODEL} with --stream")
    add_embedding_arguments(parser)
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=min(8, usable_cpus()),
        metavar="N",
        help="decoding threads; default: %(default)s",
    )
    live = parser.add_argument_group("streaming")
    live.add_argument("--stream", action="store_true", help="embed standard input; INPUT must be -")
    live.add_argument(
        "--warm-up",
        type=non_negative,
        metavar="N",
        help=f"seconds to listen before the first step, unless --statistics are given; default: {DEFAULT_WARM_UP_S:g}",
    )
    raw = PCM()
    live.add_argument("--encoding", choices=ENCODINGS, help=f"for raw samples; default: {raw.encoding}")
    live.add_argument(
        "--sample-rate",
        type=positive(int),
        metavar="HZ",
        help=f"for raw samples; default: {raw.sample_rate}",
    )
    live.add_argument("--channels", type=positive(int), metavar="N", help=f"for raw samples; default: {raw.channels}")
    options = parser.parse_args(arguments)

    options.model = options.model or (STREAMING_MODEL if options.stream else MODELS[0])
    file_options = (
        *(options.output, options.timestamps, options.compile, options.pooling is not None),
        *(options.list, options.exclude),
    )
    if options.stream and (options.inputs != ["-"] or any(file_options)):
        parser.error(
            "--stream takes - as its only input, and no --output, --timestamps, --pooling, --compile, --list or "
            "--exclude"
        )
    if not (options.stream or options.list or options.output):
        parser.error("the following arguments are required: -o/--output")
    stream_options = (options.warm_up, options.encoding, options.sample_rate, options.channels)
    if not options.stream and any(value is not None for value in stream_options):
        parser.error("--warm-up, --encoding, --sample-rate and --channels go with --stream")
    return options


def _list_files(options: argparse.Namespace) -> int:
    """List the files with their durations, and those that cannot be embedded, and return the exit code."""
    try:
        search = search_audio(options.inputs, options.exclude)
    except (OSError, ValueError) as error:
        print_error(options.prog, f"error: {error}")
        return BAD_USAGE
    total_s, unreadable = 0.0, 0
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            for file, duration in zip(search.files, pool.map(_probe, search.files)):
                if isinstance(duration, str):
                    unreadable += 1
                    print_line(f"{'-':>10}    {duration}")
                else:
                    total_s += duration
                    print_line(f"{duration:>10.2f} s  {file.path}")
        for other in search.left_out:
            print_line(f"{'-':>10}    {other.path}: left out")
        readable = len(search.files) - unreadable
        print_line(f"{total_s:>10.2f} s  in {_files(readable)} ({total_s / 3600:.2f} hours)")
        sys.stdout.flush()  # here, where a broken pipe is caught
    except BrokenPipeError:
        discard_stdout()
        return FAILED
    for line in summarize(search.left_out):
        print_error(options.prog, line)
    if unreadable:
        print_error(options.prog, f"{_files(unreadable)} cannot be read")
    return FAILED if unreadable or search.left_out else 0


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _probe(file: AudioFile) -> float | str:
    """Return a file's duration in seconds, or the reason why it cannot be read."""
    try:
        return probe_s(file.path)
    except (OSError, ValueError) as error:
        return str(error)


def _embed_files(options: argparse.Namespace) -> int:
    """Embed files and return the exit code."""
    try:
        kind = output_kind(options.output)
        search = search_audio(options.inputs, options.exclude)
        embedder = load_embedder(options)
        settings = embedding_settings(embedder, options.model, search.root) if kind == "folder" else {}
        output = open_output(options.output, options.timestamps, settings)
        missing = [file for file in search.files if not output.has(file.name)]
    except (OSError, ValueError) as error:
        print_error(options.prog, f"error: {error}")
        return BAD_USAGE
    return _embed_missing(embedder, missing, search, output, options)


def _embed_missing(
    embedder: Embedder, missing: list[AudioFile], search: Search, output: Output, options: argparse.Namespace
) -> int:
    """Embed the files, out of those found, that the output lacks, and return the exit code."""
    try:
        with progress(len(missing), "file", options.prog) as advance:
            failures = embed_files(
                embedder,
                missing,
                output,
                timestamps=options.timestamps,
                batch_seconds=options.batch_seconds,
                jobs=options.jobs,
                on_done=advance,
            )
        done = len(missing) - len(failures)
        if done:
            output.close()
        else:
            output.abort()
    except KeyboardInterrupt:
        output.abort()
        print_error(options.prog, "interrupted")
        return INTERRUPTED
    except (OSError, ValueError) as error:  # from the output; an unreadable input is in `failures`
        output.abort()
        print_error(options.prog, f"error: {options.output}: {error}")
        return FAILED
    except BaseException:
        output.abort()
        raise
    skipped, total = len(search.files) - len(missing), len(search.files) + len(search.left_out)
    already_there = f", {skipped} already there" if skipped else ""
    if missing:
        print_line(f"{options.output}: {done} of {total} files embedded{already_there}")
    else:
        print_line(f"{options.output}: nothing new, all {skipped} files already there")
    for failure in failures:
        print_error(options.prog, f"failed: {failure.reason}")
    for line in summarize(search.left_out):
        print_error(options.prog, line)
    return FAILED if failures or search.left_out else 0


def _embed_stream(options: argparse.Namespace) -> int:
    """Embed standard input as it arrives, one line of JSON per step, and return the exit code."""
    began = False
    options.threads = options.threads or 1  # the products of a step are too small to share
    try:
        warm_up_s = DEFAULT_WARM_UP_S if options.warm_up is None else options.warm_up
        stream = AxLSTMStream(load_embedder(options), warm_up_s=warm_up_s)
        raw = PCM()
        pcm = PCM(
            options.encoding or raw.encoding, options.sample_rate or raw.sample_rate, options.channels or raw.channels
        )
        for block in read_pipe(sys.stdin.buffer, pcm):
            began = True
            _write_steps(*stream.push(torch.from_numpy(block)))
        _write_steps(*stream.finish())
    except KeyboardInterrupt:
        print_error(options.prog, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return FAILED
    except (OSError, ValueError) as error:
        print_error(options.prog, f"error: {error}")
        return FAILED if began else BAD_USAGE
    return 0


def _write_steps(embeddings: torch.Tensor, timestamps_ms: torch.Tensor) -> None:
    """Write embeddings (1, T, E) and timestamps (1, T) as T lines of JSON. Nine digits are exact for float32."""
    if not embeddings.isfinite().all():
        raise ValueError(NOT_FINITE)
    for embedding, timestamp_ms in zip(embeddings[0].tolist(), timestamps_ms[0].tolist()):
        values = ", ".join(map("{:.9g}".format, embedding))
        sys.stdout.write(f'{{"timestamp_ms": {timestamp_ms:.10g}, "embedding": [{values}]}}\n')
    sys.stdout.flush()
