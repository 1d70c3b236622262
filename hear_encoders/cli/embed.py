"""The command `hear-embed`: embeddings of audio files, or of audio on standard input."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from hear_encoders.audio import AudioFile, find_audio
from hear_encoders.cli.corpus import embed_files
from hear_encoders.cli.options import MODELS, add_embedding_arguments, embedding_settings, load_embedder
from hear_encoders.cli.outputs import Output, open_output, output_kind
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    not_negative,
    output_path,
    positive,
    print_error,
    warnings_as_messages,
)
from hear_encoders.embedder import Embedder
from hear_encoders.pcm import ENCODINGS, PCM, read_pipe
from hear_encoders.stream import DEFAULT_WARM_UP_S, AxLSTMStream

STREAMING_MODEL = "hear_axlstm"


_EMBED_EPILOG = """\
examples:
  hear-embed recordings/ -o embeddings.npz
  hear-embed 'calls/**/*.mp3' -o steps.parquet --timestamps --model hear_axlstm
  hear-embed a.wav b.flac -o embeddings/ --weights org/name --device cuda
  arecord -f S16_LE -r 16000 | hear-embed --stream - > steps.jsonl

One scene embedding per file, or with --timestamps one embedding per 40 ms. A folder as output can be resumed:
what it holds is skipped. Exit code 1: some files failed, the rest are done. Exit code 2: nothing was done.

--stream reads WAV or raw samples from standard input and writes a line of JSON to standard output for each 40 ms as
soon as they are over: {"timestamp_ms": ..., "embedding": [...]}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`hear-embed`: embed files, folders and globs of audio. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "hear-embed",
        description="Embed audio files: any format libsndfile reads, any sample rate, any channels.",
        epilog=_EMBED_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=output_path, metavar="OUT", help=".npz, .parquet or a folder")
    parser.add_argument(
        "--model", choices=MODELS, help=f"default: {MODELS[0]}, and with --stream {STREAMING_MODEL}, which can"
    )
    add_embedding_arguments(parser)
    live = parser.add_argument_group("audio that is still arriving")
    live.add_argument("--stream", action="store_true", help="embed standard input; INPUT is -")
    live.add_argument(
        "--warm-up",
        type=not_negative,
        metavar="N",
        help=f"without --statistics: seconds to listen for before the first step; default: {DEFAULT_WARM_UP_S:g}",
    )
    raw = PCM()
    live.add_argument("--encoding", choices=ENCODINGS, help=f"of raw samples; default: {raw.encoding}")
    live.add_argument(
        "--sample-rate", type=positive(int), metavar="HZ", help=f"of raw samples; default: {raw.sample_rate}"
    )
    live.add_argument("--channels", type=positive(int), metavar="N", help=f"of raw samples; default: {raw.channels}")
    options = parser.parse_args(arguments)
    options.model = options.model or (STREAMING_MODEL if options.stream else MODELS[0])
    of_files = (options.output, options.timestamps, options.compile, options.pooling != "mean")
    if options.stream and (options.inputs != ["-"] or any(of_files)):
        parser.error("--stream takes - as its only input, and no --output, --timestamps, --pooling or --compile")
    if not options.stream and not options.output:
        parser.error("the following arguments are required: -o/--output")
    of_streams = (options.warm_up, options.encoding, options.sample_rate, options.channels)
    if not options.stream and any(value is not None for value in of_streams):
        parser.error("--warm-up, --encoding, --sample-rate and --channels go with --stream")
    with warnings_as_messages(parser.prog):
        if options.stream:
            return _stream(parser.prog, options)
        try:
            kind = output_kind(options.output)
            root, files = find_audio(options.inputs)
            embedder = load_embedder(options)
            settings = embedding_settings(embedder, options.model, root) if kind == "folder" else {}
            output = open_output(options.output, options.timestamps, settings)
            todo = [file for file in files if not output.has(file.name)]
        except (OSError, ValueError) as error:
            print_error(parser.prog, f"error: {error}")
            return BAD_USAGE
        return _embed(parser.prog, embedder, todo, len(files), output, options)


def _embed(
    prog: str, embedder: Embedder, todo: list[AudioFile], files: int, output: Output, options: argparse.Namespace
) -> int:
    """Embed those of so many files that are not there yet. Returns the exit code."""
    skipped = files - len(todo)
    try:
        with tqdm(total=len(todo), unit="file", disable=None) as bar:  # None: only on a terminal
            failures = embed_files(
                embedder,
                todo,
                output,
                timestamps=options.timestamps,
                batch_seconds=options.batch_seconds,
                jobs=options.jobs,
                on_done=bar.update,
            )
        done = len(todo) - len(failures)
        if done:
            output.close()
        else:
            output.abort()
    except KeyboardInterrupt:
        output.abort()
        print_error(prog, "interrupted")
        return INTERRUPTED
    except OSError as error:  # of the output: those of inputs are failures of their files
        output.abort()
        print_error(prog, f"error: {options.output}: {error}")
        return FAILED
    except BaseException:
        output.abort()
        raise
    there_before = f", {skipped} there before" if skipped else ""
    if todo:
        print(f"{options.output}: {done} of {files} files embedded{there_before}")
    else:
        print(f"{options.output}: nothing new, {skipped} of {files} files there before")
    for failure in failures:
        print_error(prog, f"failed: {failure.reason}")
    return FAILED if failures else 0


def _stream(prog: str, options: argparse.Namespace) -> int:
    """Embed standard input as it comes, a line of JSON for each step."""
    began = False
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
        print_error(prog, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the lines has gone; Python must not try to write the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, ValueError) as error:
        print_error(prog, f"error: {error}")
        return FAILED if began else BAD_USAGE
    return 0


def _write_steps(embeddings: torch.Tensor, timestamps_ms: torch.Tensor) -> None:
    """Lines for (1, T, E) and (1, T). Nine digits are all that float32 has."""
    for embedding, timestamp_ms in zip(embeddings[0].tolist(), timestamps_ms[0].tolist()):
        values = ", ".join(map("{:.9g}".format, embedding))
        sys.stdout.write(f'{{"timestamp_ms": {timestamp_ms:.10g}, "embedding": [{values}]}}\n')
    sys.stdout.flush()
