"""The command `hear-weights`: show, verify, convert, publish and export checkpoints."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hear_encoders import __version__, checkpoint, hub
from hear_encoders.adapters.folder import save_folder, write_files
from hear_encoders.cli.options import MODELS, hear_module, layers
from hear_encoders.config import InputGate, config_to_dict
from hear_encoders.console import (
    BAD_USAGE,
    FAILED,
    discard_stdout,
    non_empty_text,
    output_path,
    positive,
    print_error,
    print_line,
)
from hear_encoders.embedder import Embedder
from hear_encoders.onnx_export import InputName, PartName, export_onnx
from hear_encoders.papers import find_rows
from hear_encoders.pooling import POOLINGS
from hear_encoders.released import read_released_checkpoint

_EPILOG = """\
examples:
  hear-weights show hear_axlstm
  hear-weights show weights/
  hear-weights import mae_base.pth mae-base/ --heads 12
  hear-weights import axlstm_tiny.pth axlstm-tiny/ --flip
  hear-weights package hear_axlstm folder/
  hear-weights push weights/ org/name --card MODEL_CARD.md
  hear-weights export hear_axlstm axlstm.onnx
  hear-weights verify weights/

`hear-weights COMMAND --help` describes a command's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hear-weights` and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            _show(_find_weights(options.source, options.revision))
        elif options.command == "verify":
            _verify(_find_weights(options.source, options.revision))
        elif options.command == "import":
            _import(options)
        elif options.command == "package":
            _package(options)
        elif options.command == "export":
            _export(options)
        else:
            words = sys.argv[1:] if arguments is None else arguments
            _push(options, shlex.join([parser.prog, "push", "--yes", *words[1:]]))
        sys.stdout.flush()  # here, where a broken pipe is caught
    except BrokenPipeError:
        discard_stdout()
        return FAILED
    except (OSError, ValueError) as error:
        print_error(parser.prog, f"error: {error}")
        return FAILED if options.command == "verify" and isinstance(error, ValueError) else BAD_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hear-weights",
        description="Show, verify, publish and export checkpoints, and convert those of the papers' released code.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "source",
        metavar="CHECKPOINT",
        help=f"directory, .safetensors file or Hub org/name; bundled weights: {' or '.join(MODELS)}",
    )
    source.add_argument("--revision", help="branch, tag or commit of the Hub repository")

    commands.add_parser(
        "show", parents=[source], help="print a checkpoint's configuration, size, parameter count and SHA-256"
    )

    commands.add_parser(
        "verify",
        parents=[source],
        help="check that a checkpoint is undamaged",
        description="Check that a checkpoint loads and equals the checksums that it was saved and fetched with. "
        "Exit codes: 0 it does, 1 it is damaged, 2 there is none.",
        epilog="example: hear-weights verify org/name",
    )

    convert = commands.add_parser(
        "import",
        help="convert a .pth file of the papers' released code, without executing its pickle",
        epilog="example: hear-weights import axlstm_tiny.pth axlstm-tiny/ --flip",
    )
    convert.add_argument("checkpoint", metavar="CHECKPOINT.pth", type=Path)
    convert.add_argument("output", metavar="OUT_DIR", type=output_path, help="new or empty directory")
    convert.add_argument(
        "--heads", type=positive(int), metavar="N", help="attention heads (Tiny 3, Small 6, Base 12, Large 16)"
    )
    convert.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="an AxLSTM was trained with or without flipping; required for it. The released code flips",
    )
    convert.add_argument(
        "--input-gate", choices=get_args(InputGate), default="exponential", help="of an AxLSTM; default: %(default)s"
    )

    package = commands.add_parser(
        "package",
        parents=[source],
        help="write a folder that transformers and sentence-transformers load, too",
        description="Write a folder that transformers, sentence-transformers and this package load.",
        epilog="example: hear-weights package hear_axlstm folder/",
    )
    package.add_argument("output", metavar="OUT_DIR", type=output_path, help="new or empty directory")

    push = commands.add_parser(
        "push",
        help="publish a checkpoint on the Hugging Face Hub",
        description="Publish a checkpoint on the Hugging Face Hub, with what transformers and sentence-transformers "
        "need. Without --yes, only show what would be uploaded.",
        epilog="example: hear-weights push weights/ org/name --card MODEL_CARD.md",
    )
    push.add_argument("folder", metavar="DIR", type=Path, help="holds config.json, model.safetensors and README.md")
    push.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    push.add_argument("--card", type=Path, metavar="PATH", help="model card; default: README.md in DIR")
    push.add_argument("--private", action="store_true", help="create a private repository, refuse a public one")
    push.add_argument(
        "--message", type=non_empty_text, default="Upload checkpoint", help="commit message; default: %(default)s"
    )
    push.add_argument("--yes", action="store_true", help="upload; needs a token: HF_TOKEN or `hf auth login`")

    export = commands.add_parser(
        "export",
        parents=[source],
        help="write a model as ONNX, for programs without PyTorch",
        description="Write a model as ONNX, for programs without PyTorch. Takes up to a minute; needs the extra onnx.",
        epilog="example: hear-weights export hear_axlstm step.onnx --part step --statistics -6.0 3.5",
    )
    export.add_argument("output", metavar="OUT.onnx", type=output_path, help="a new file")
    export.add_argument(
        "--part",
        choices=get_args(PartName),
        default="encoder",
        help="encoder of clips or segments of up to 2 s, one step of an AxLSTM's stream, or the front end, which makes "
        "log-mel of clips of any length; default: %(default)s",
    )
    export.add_argument(
        "--input",
        choices=get_args(InputName),
        default="waveform",
        help="what an encoder or a step takes: samples, or log-mel that is normalized; default: %(default)s",
    )
    export.add_argument("--layer", type=layers, metavar="N[,N...]", help="embed with the output of this block, from 1")
    export.add_argument("--pooling", choices=tuple(POOLINGS), default="mean", help="default: %(default)s")
    export.add_argument(
        "--statistics", nargs=2, type=float, metavar=("MEAN", "STD"), help="normalize log-mel with these"
    )
    return parser


def _find_weights(source: str, revision: str | None) -> Path:
    if source not in MODELS:
        return checkpoint.resolve(source, revision)
    if revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {source} means the bundled weights")
    return hear_module(source).bundled / checkpoint.WEIGHTS_FILE


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
        print_line(f"{name:<16}  {value}")


def _verify(weights: Path) -> None:
    """Compare a checkpoint with all checksums there are; ValueError if one differs."""
    checkpoint.load_checkpoint(weights)  # raises if the file's own checksum differs
    own, got, fetched = checkpoint.saved_fingerprint(weights), checkpoint.sha256(weights), hub.cached_sha256(weights)
    if fetched not in (None, got):
        raise ValueError(f"{weights}: damaged in the Hub's cache: its SHA-256 is {got}, expected {fetched}; delete it")
    print_line(f"{'file':<16}  {weights}")
    print_line(f"{'checksum':<16}  {'matches config and weights' if own else 'none in this file; it loads'}")
    print_line(f"{'SHA-256':<16}  {got}{' (matches the Hub)' if fetched else ''}")


def _import(options: argparse.Namespace) -> None:
    """Convert a released checkpoint; show the result and the papers' rows that it can stand for."""
    _check_new_or_empty(options.output)
    config, tensors, decoder = read_released_checkpoint(
        options.checkpoint, options.heads, flip=options.flip, input_gate=options.input_gate
    )
    encoder = checkpoint.encoder_from_tensors(config, tensors, str(options.checkpoint))
    checkpoint.save_checkpoint(options.output, encoder)
    _show(options.output / checkpoint.WEIGHTS_FILE)
    for row in find_rows(config, decoder) or ["none of the papers' tables has this encoder"]:
        print(f"{'published as':<16}  {row}")


def _package(options: argparse.Namespace) -> None:
    """Write a folder that other programs load, too, and show its weights."""
    _check_new_or_empty(options.output)
    save_folder(options.output, checkpoint.load_checkpoint(_find_weights(options.source, options.revision)))
    _show(options.output / checkpoint.WEIGHTS_FILE)


def _check_new_or_empty(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: choose another directory")


def _export(options: argparse.Namespace) -> None:
    """Write a model as ONNX and show its inputs and outputs."""
    if options.output.exists():
        raise ValueError(f"{options.output} exists already: choose another name")
    model = Embedder(
        checkpoint.load_checkpoint(_find_weights(options.source, options.revision)),
        layer=options.layer,
        pooling=options.pooling,
        statistics=options.statistics,
    )
    for line in export_onnx(model.eval(), options.output, part=options.part, input=options.input):
        print_line(line)


def _push(options: argparse.Namespace, command: str) -> None:
    """Publish a checkpoint, or show what would be published and `command`, which would publish it."""
    hub.check_repo_id(options.repository)
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder}: expected a directory with {hub.CONFIG_FILE} and {hub.WEIGHTS_FILE}")
    encoder = checkpoint.load_checkpoint(options.folder)  # raises for a checkpoint that does not load
    card = options.card or options.folder / hub.CARD_FILE
    text = _read_card(card)
    with tempfile.TemporaryDirectory() as scratch:
        added = {name: Path(scratch) / name for name in write_files(scratch, encoder.config)}
        files = {hub.WEIGHTS_FILE: options.folder / hub.WEIGHTS_FILE, hub.CARD_FILE: card} | added
        print(f"{'repository':<26}{options.repository}{' (private)' if options.private else ''}")
        print(f"{'commit message':<26}{options.message}")
        for name, path in files.items():
            source = "written from the encoder's configuration" if name in added else path
            digest = checkpoint.sha256(path)
            print_line(f"{name:<26}{path.stat().st_size:>13,} bytes  SHA-256 {digest}  {source}")
        if options.yes:
            url, commit = hub.push_files(options.repository, files, options.message, private=options.private)
            print(f"{'commit':<26}{commit}\n{url}")
        else:
            print(f"\n{hub.CARD_FILE}:\n\n{text.rstrip()}\n\nNothing was uploaded. To upload this:\n{command}")


def _read_card(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no model card {path}: write one there, or give another with --card PATH")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a model card must be UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"{path}: the model card is empty")
    return text
