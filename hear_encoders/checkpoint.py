"""Read and write checkpoints: directories with `config.json` and `model.safetensors`.

`resolve` finds one, in a local path or on the Hugging Face Hub. Loading is strict and never unpickles. The metadata of
`model.safetensors` hold a checksum of config and weights, which loading verifies; files without one load as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hear_encoders import hub
from hear_encoders.config import ADDED_FIELDS, EncoderConfig, config_to_dict, read_config
from hear_encoders.files import atomic_write, write_json
from hear_encoders.hub import CONFIG_FILE, REPO_ID, WEIGHTS_FILE
from hear_encoders.nn.build import ENCODER_OF_CONFIG, Encoder

FINGERPRINT = "fingerprint"  # the checksum's name in the metadata

_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a checkpoint's weights file; its `config.json` lies beside it.

    Args:
        source: an existing directory, an existing `.safetensors` file, or a Hub repository "org/name". An existing
            path takes precedence over a repository of the same name.
        revision: the repository's branch, tag or commit; None is its default branch.

    Returns:
        The path of the `.safetensors` file. Repositories are fetched by `hub.fetch_checkpoint`, from the local cache if
        possible; its errors pass through.

    Raises:
        FileNotFoundError: no such path, and not a repository's name.
        ValueError: the file is of another kind, or a revision was given for a local path.
    """
    path = Path(os.path.expanduser(source))
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given, but {path} is a local path, not a Hub repository")
        if path.is_dir():
            return path / WEIGHTS_FILE
        if path.suffix == ".safetensors":
            return path
        hint = "; for a checkpoint of the released code run `hear-weights import`" if path.suffix in _PICKLES else ""
        raise ValueError(f"{path}: expected a directory or a .safetensors file{hint}")
    if REPO_ID.fullmatch(str(source)):
        return hub.fetch_checkpoint(str(source), revision) / WEIGHTS_FILE
    raise FileNotFoundError(f"{source}: no such file or directory, and not the name of a Hub repository (org/name)")


def load_checkpoint(path: str | os.PathLike[str]) -> Encoder:
    """Load an encoder as float32 on the CPU.

    Args:
        path: a directory with `config.json` and `model.safetensors`, or a `.safetensors` file beside its
            `config.json`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged or of another format, or the two do not match: a tensor is missing, extra or of
            the wrong shape, a field is missing or unknown, or the checksum of both does not match. The message names
            the file and the tensor or field.
    """
    weights = Path(path) / WEIGHTS_FILE if os.path.isdir(path) else Path(path)
    config = read_config(weights.parent / CONFIG_FILE)
    with _open_tensors(weights) as file:
        names = list(file.keys())
        # From the file's header, before any tensor is built.
        encoder = _build_empty(config, {name: file.get_slice(name).get_shape() for name in names}, str(weights))
        tensors = {name: file.get_tensor(name) for name in names}
        return _fill(encoder, tensors, str(weights), (file.metadata() or {}).get(FINGERPRINT))


def encoder_from_tensors(config: EncoderConfig, tensors: dict[str, Tensor], source: str) -> Encoder:
    """Build a config's encoder from exactly its tensors. Return it in eval mode, in float32.

    Args:
        source: the tensors' origin, for error messages.

    Raises:
        ValueError: a tensor is missing, extra, of the wrong shape, not floating point, or not finite.
    """
    encoder = _build_empty(config, {name: tensor.shape for name, tensor in tensors.items()}, source)
    return _fill(encoder, tensors, source)


def _build_empty(config: EncoderConfig, shapes: Mapping[str, Sequence[int]], source: str) -> Encoder:
    """Build an encoder without weights, if tensors of these names and shapes are exactly its own."""
    with torch.device("meta"):  # no memory and no initialization for weights that are replaced at once
        encoder = ENCODER_OF_CONFIG[type(config)](config)
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    if missing:
        raise ValueError(f"{source}: missing tensor {missing[0]!r} ({len(missing)} missing in all)")
    if extra:
        raise ValueError(f"{source}: unexpected tensor {extra[0]!r} ({len(extra)} unexpected in all)")
    for name, shape in shapes.items():
        if tuple(shape) != expected[name]:
            raise ValueError(f"{source}: tensor {name!r} has shape {tuple(shape)}, expected {expected[name]}")
    return encoder


def _fill(encoder: Encoder, tensors: dict[str, Tensor], source: str, saved: str | None = None) -> Encoder:
    """Give an empty encoder its weights, as float32, after checking them and their fingerprint, if there is one."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: tensor {name!r} is {tensor.dtype}, expected floating point")
    # Copy the tensors: they may be memory maps of a file that may change or shrink while the model is in use.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    if saved is not None and (got := _fingerprint(encoder.config, own)) != saved:
        raise ValueError(
            f"{source}: damaged, or it or its {CONFIG_FILE} was changed after saving: their SHA-256 is {got}, "
            f"expected {saved}"
        )
    for name, tensor in own.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: tensor {name!r} holds NaN or infinity")
    encoder.load_state_dict({name: tensor.to(torch.float32) for name, tensor in own.items()}, assign=True)
    return encoder.eval()


def saved_fingerprint(path: str | os.PathLike[str]) -> str | None:
    """Return the fingerprint in a weights file, of the encoder that was saved; None if there is none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or not a safetensors file.
    """
    with _open_tensors(path) as file:
        return (file.metadata() or {}).get(FINGERPRINT)


@contextmanager
def _open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file, whose header is then read; errors name it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def save_checkpoint(directory: str | os.PathLike[str], encoder: Encoder) -> None:
    """Write `config.json` and `model.safetensors` to a directory, which is created if need be.

    Each file is written atomically: readers never see half of it.

    Raises:
        TypeError: the arguments are not a path and an encoder.
    """
    if isinstance(directory, torch.nn.Module) or not isinstance(encoder, torch.nn.Module):
        raise TypeError(
            "expected save_checkpoint(directory, encoder), got "
            f"save_checkpoint({type(directory).__name__}, {type(encoder).__name__})"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    metadata = {"format": "pt", FINGERPRINT: _fingerprint(encoder.config, tensors)}
    with atomic_write(directory / WEIGHTS_FILE) as file:
        file.write(save(tensors, metadata=metadata))
    write_json(directory / CONFIG_FILE, config_to_dict(encoder.config))


def sha256(path: str | os.PathLike[str]) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(encoder: Encoder) -> str:
    """Return the SHA-256 of an encoder's config and weights: the same for equal encoders from different sources."""
    return _fingerprint(encoder.config, {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()})


def _fingerprint(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> str:
    # Added fields count only if they differ from the default, so that older records of fingerprints stay valid.
    values = {name: value for name, value in config_to_dict(config).items() if value != ADDED_FIELDS.get(name)}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
