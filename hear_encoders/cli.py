"""The two commands: `hear-embed` (audio files to embeddings) and `hear-weights` (show, convert and publish)."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from hear_encoders import checkpoint, hub
from hear_encoders.config import AxLSTMConfig, InputGate, config_to_dict
from hear_encoders.corpus import AudioFile, embed_files, find_audio
from hear_encoders.embedder import DEFAULT_MAX_CHUNKS, Embedder, Framing, Pooling, Precision, resolve_precision
from hear_encoders.outputs import Output, open_output, output_kind
from hear_encoders.pcm import ENCODINGS, PCM, read_pipe
from hear_encoders.reference import import_checkpoint
from hear_encoders.stream import DEFAULT_WARM_UP_S, AxLSTMStream

MODELS = ("hear_audiomaepp", "hear_axlstm")
STREAMING_MODEL = "hear_axlstm"
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130  # exit codes

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


def embed_main(arguments: Sequence[str] | None = None) -> int:
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
        type=_not_negative,
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
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: say(parser.prog, f"warning: {message}")
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
            say(parser.prog, f"error: {error}")
            return BAD_USAGE
        return _embed(parser.prog, embedder, todo, len(files), output, options)


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that embeds files takes, besides --output and --model: of what, which weights, and how."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file, folder (recursive) or glob pattern")
    parser.add_argument("--weights", default="", help="directory, .safetensors or Hub org/name; default: bundled")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--timestamps", action="store_true", help="one embedding per time step instead of per file")
    parser.add_argument("--framing", choices=get_args(Framing), default="exact", help="default: %(default)s")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1; default: cuda where there is one, else cpu")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        default="mean",
        help="of a file's steps: their mean, or with their standard deviation after it; default: %(default)s",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile: for GPUs and bfloat16; takes a minute or more at first",
    )
    parser.add_argument(
        "--statistics",
        nargs=2,
        type=float,
        metavar=("MEAN", "STD"),
        help="of log-mel, to normalise with; default: each file's own, of a stream those of what it has heard",
    )
    parser.add_argument(
        "--batch-seconds",
        type=positive(float),
        default=120.0,
        metavar="N",
        help="audio decoded and grouped at a time; default: 120",
    )
    parser.add_argument(
        "--jobs",
        type=positive(int),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="decoding threads; default: %(default)s",
    )


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
        say(prog, "interrupted")
        return INTERRUPTED
    except OSError as error:  # of the output: those of inputs are failures of their files
        output.abort()
        say(prog, f"error: {options.output}: {error}")
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
        say(prog, f"failed: {failure.reason}")
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
        say(prog, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the lines has gone; Python must not try to write the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, ValueError) as error:
        say(prog, f"error: {error}")
        return FAILED if began else BAD_USAGE
    return 0


def _write_steps(embeddings: torch.Tensor, timestamps_ms: torch.Tensor) -> None:
    """Lines for (1, T, E) and (1, T). Nine digits are all that float32 has."""
    for embedding, timestamp_ms in zip(embeddings[0].tolist(), timestamps_ms[0].tolist()):
        values = ", ".join(map("{:.9g}".format, embedding))
        sys.stdout.write(f'{{"timestamp_ms": {timestamp_ms:.10g}, "embedding": [{values}]}}\n')
    sys.stdout.flush()


def load_embedder(options: argparse.Namespace) -> Embedder:
    """The model that the arguments of `add_embedding_arguments` ask for, on its device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A CPU likes few chunks at a time, which stay in its cache; a GPU likes as many as there are.
    chunks = max(1, int(options.batch_seconds / 2)) if device.startswith("cuda") else DEFAULT_MAX_CHUNKS
    embedder = importlib.import_module(options.model).load_model(
        options.weights,
        revision=options.revision,
        framing=options.framing,
        precision=options.precision,
        max_chunks=chunks,
        statistics=options.statistics,
        pooling=options.pooling,
        compile=options.compile,
    )
    try:
        return embedder.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise ValueError(f"--device {device}: {error}") from error


def embedding_settings(embedder: Embedder, model: str, root: Path) -> dict[str, Any]:
    """What the names and numbers in an output depend on."""
    return {
        "root": str(root),
        "model": model,
        "weights": checkpoint.fingerprint(embedder.encoder),
        "framing": embedder.framing,
        "statistics": embedder.statistics and list(embedder.statistics),
        **({} if embedder.pooling == "mean" else {"pooling": embedder.pooling}),
        "precision": str(resolve_precision(embedder.precision, embedder.device)).removeprefix("torch."),
    }


def weights_main(arguments: Sequence[str] | None = None) -> int:
    """`hear-weights`: show a checkpoint, import one of the papers' released code, or publish one on the Hub.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "hear-weights",
        description="Look at checkpoints, convert released ones and publish them.",
        epilog="examples: hear-weights show weights/    hear-weights import mae_base.pth mae-base/ --heads 12",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="print a checkpoint's configuration, size, parameters and SHA-256")
    show.add_argument("source", metavar="PATH", help="directory, .safetensors file or Hub org/name")
    show.add_argument("--revision", help="branch, tag or commit of the Hub repository")

    convert = commands.add_parser(
        "import",
        help="convert a .pth of the papers' released code; its pickle is not executed",
        epilog="example: hear-weights import axlstm_tiny.pth axlstm-tiny/ --no-flip",
    )
    convert.add_argument("checkpoint", metavar="CHECKPOINT.pth", type=Path)
    convert.add_argument("output", metavar="OUT_DIR", type=Path)
    convert.add_argument(
        "--heads", type=positive(int), metavar="N", help="attention heads (3 Tiny, 6 Small, 12 Base, 16 Large)"
    )
    convert.add_argument("--no-flip", action="store_true", help="an AxLSTM that was trained without flipping")
    convert.add_argument("--input-gate", choices=get_args(InputGate), default="exponential", help="of an AxLSTM")

    push = commands.add_parser(
        "push",
        help="publish a checkpoint on the Hugging Face Hub; without --yes, only show what would be uploaded",
        epilog="example: hear-weights push weights/ org/name --card MODEL_CARD.md",
    )
    push.add_argument("folder", metavar="DIR", type=Path, help="with config.json, model.safetensors and README.md")
    push.add_argument("repository", metavar="ORG/NAME", help="made if it does not exist")
    push.add_argument("--card", type=Path, metavar="PATH", help="the model card; default: README.md in DIR")
    push.add_argument("--private", action="store_true", help="make the repository private, refuse a public one")
    push.add_argument("--message", type=_text, default="Upload checkpoint", help="of the commit; default: %(default)s")
    push.add_argument("--yes", action="store_true", help="upload; needs a token: HF_TOKEN or `hf auth login`")

    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            _show(checkpoint.resolve(options.source, options.revision))
        elif options.command == "push":
            words = sys.argv[1:] if arguments is None else arguments
            _push(options, shlex.join([parser.prog, "push", "--yes", *words[1:]]))
        else:
            config, tensors = import_checkpoint(
                options.checkpoint, options.heads, flip=not options.no_flip, input_gate=options.input_gate
            )
            encoder = checkpoint.encoder_from_tensors(config, tensors, str(options.checkpoint))
            checkpoint.save_checkpoint(options.output, encoder)
            if isinstance(config, AxLSTMConfig) and config.flip:
                say(
                    parser.prog,
                    "taken for an AxLSTM trained with flip, which the file does not say; if it was not, give --no-flip",
                )
            _show(options.output / checkpoint.WEIGHTS_FILE)
    except (OSError, ValueError) as error:
        say(parser.prog, f"error: {error}")
        return BAD_USAGE
    return 0


def _show(weights: Path) -> None:
    encoder = checkpoint.load_checkpoint(weights)
    rows = {
        "file": weights,
        "size": f"{weights.stat().st_size / 1e6:.1f} MB",
        "SHA-256": checkpoint.sha256(weights),
        "parameters": f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
    }
    for field, value in config_to_dict(encoder.config).items():
        rows.update(value if isinstance(value, dict) else {field: value})
    for name, value in rows.items():
        print(f"{name:<16}  {value}")


def _push(options: argparse.Namespace, command: str) -> None:
    """Publish a checkpoint, or show what would be published; `command` is the line that does."""
    hub.check_repo_id(options.repository)
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder}: expected a directory with {hub.CONFIG_FILE} and {hub.WEIGHTS_FILE}")
    checkpoint.load_checkpoint(options.folder)  # what does not load is not published
    card = options.card or options.folder / hub.CARD_FILE
    text = _read_card(card)
    files = {name: options.folder / name for name in (hub.CONFIG_FILE, hub.WEIGHTS_FILE)} | {hub.CARD_FILE: card}
    print(f"{'repository':<18}{options.repository}{' (private)' if options.private else ''}")
    print(f"{'commit message':<18}{options.message}")
    for name, path in files.items():
        print(f"{name:<18}{path.stat().st_size:>13,} bytes  SHA-256 {checkpoint.sha256(path)}  {path}")
    if options.yes:
        url, commit = hub.push_files(options.repository, files, options.message, private=options.private)
        print(f"{'commit':<18}{commit}\n{url}")
    else:
        print(f"\n{hub.CARD_FILE}:\n\n{text.rstrip()}\n\nNothing was uploaded. To upload this:\n{command}")


def _read_card(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no model card {path}: write one there, or give one with --card PATH")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a model card is UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"{path}: the model card is empty")
    return text


def say(prog: str, message: str) -> None:
    """Write a line to standard error."""
    tqdm.write(f"{prog}: {message}", file=sys.stderr)  # above a progress bar, if there is one


def output_path(text: str) -> Path:
    """An argparse type: a path that is not empty, as an unset variable of the shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _text(text: str) -> str:
    """An argparse type: text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _not_negative(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def positive(kind: type[float]) -> Callable[[str], float]:
    """An argparse type: a number of this kind above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse
