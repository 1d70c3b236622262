"""Import checkpoints of the papers' released code: safely, and with this package's names, shapes and config."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.config import (
    AxLSTMConfig,
    EncoderConfig,
    InputGate,
    PatchConfig,
    TransformerConfig,
    TransformerFamily,
)
from hear_encoders.nn.patches import sincos_2d
from hear_encoders.papers import Decoder

Family = TransformerFamily | Literal["axlstm"]

# Module names within a block, released code -> this package. They mean the same in every family.
_MODULES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv_layer": "attention.qkv",
    "attn.proj_layer": "attention.out",
    "mlp.layer1": "mlp.up",
    "mlp.layer2": "mlp.down",
    "ffn1.layer1": "mlp.up",
    "ffn1.layer2": "mlp.down",
    "ffn2.linear1": "swiglu.value",
    "ffn2.linear2": "swiglu.gate",
    "ffn2.ln": "swiglu.norm",
    "ffn2.project": "swiglu.out",
    "norm": "norm",
    "layer.proj_up": "up",
    "layer.conv1d.conv": "conv",
    "layer.q_proj": "q",
    "layer.k_proj": "k",
    "layer.v_proj": "v",
    "layer.mlstm_cell.igate": "gate_i",
    "layer.mlstm_cell.fgate": "gate_f",
    "layer.mlstm_cell.outnorm": "head_norm",
    "layer.proj_down": "down",
}
_TENSORS = {"rope.freqs": "attention.rotary.frequencies", "layer.learnable_skip": "skip"}

# The tensor that identifies a family.
_FAMILY_OF_TENSOR: dict[str, Family] = {
    "encoder.blocks.0.ffn1.layer1.weight": "audiomaepp",
    "encoder.blocks.0.mlp.layer1.weight": "mae",
    "blocks.0.layer.proj_up.weight": "axlstm",
    "blocks.0.mlp.layer1.weight": "ssast",
}

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel and torch.compile
_PRETRAINING_ONLY = re.compile(r"^(?:decoder\.|pred\.|mask_token$)")
_NEVER_USED = re.compile(r"^encoder\.blocks\.\d+\.norm3\.")  # the released code applies norm2 before SwiGLU


class ReleasedCheckpoint(NamedTuple):
    """A checkpoint of the released code: the encoder, its tensors under this package's names, and its decoder.

    `decoder` is None for AxLSTM and SSAST, which have none, and for a checkpoint without decoder.
    """

    config: EncoderConfig
    tensors: dict[str, Tensor]
    decoder: Decoder | None


def import_checkpoint(
    path: str | Path, heads: int | None = None, *, flip: bool | None = None, input_gate: InputGate = "exponential"
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Read the encoder of a checkpoint of either paper's released code; see `read_released_checkpoint`.

    Returns:
        The encoder's config, and its tensors under this package's names.
    """
    config, tensors, _ = read_released_checkpoint(path, heads, flip=flip, input_gate=input_gate)
    return config, tensors


def read_released_checkpoint(
    path: str | Path, heads: int | None = None, *, flip: bool | None = None, input_gate: InputGate = "exponential"
) -> ReleasedCheckpoint:
    """Read a checkpoint of either paper's released code, without executing anything in its pickle.

    Family, dims, depth, expansion, patch size and RoPE are inferred from the tensors; the arguments cannot be.

    Args:
        path: the `.pth` file.
        heads: number of attention heads. Required for MAE, SSAST and AudioMAE++ without RoPE. Ignored for AxLSTM,
            whose number of heads follows from its gates (the released configs carry an unused number).
        flip: an AxLSTM was trained with the token sequence reversed before and after every second block. Required for
            AxLSTM. The released code has flip; the papers' tables have AxLSTMs with and without.
        input_gate: the input gate that an AxLSTM was trained with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a released checkpoint, a tensor is missing or unknown, `heads` is missing or does not fit, or
            `flip` is missing.
    """
    state = read_released_tensors(Path(path))
    family = next((family for name, family in _FAMILY_OF_TENSOR.items() if name in state), None)
    if family is None:
        raise ValueError(
            f"{path}: not a checkpoint of the released AudioMAE++ or AxLSTM code: found none of the tensors "
            + ", ".join(_FAMILY_OF_TENSOR)
        )
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not _PRETRAINING_ONLY.match(name) and not _NEVER_USED.match(name)
    }
    try:
        released = _rename(kept.items(), lambda name: name.removeprefix("encoder."))
        positions = released.pop("pos_embed")
        config = _read_config(family, released, positions, heads, flip, input_gate)
        tensors = _rename(((name, _translate(name, tensor)) for name, tensor in released.items()), translate_name)
        decoder = None
        if (embed := state.get("decoder.decoder_embed.weight")) is not None:
            decoder = Decoder(dim=len(embed), rope="decoder.decoder_blocks.0.rope.freqs" in state)
    except KeyError as error:
        raise ValueError(f"{path}: missing tensor {error}") from error
    except (IndexError, TypeError) as error:  # a shape has too few entries
        raise ValueError(f"{path}: a tensor has too few dimensions") from error
    except ZeroDivisionError as error:
        raise ValueError(f"{path}: a tensor is empty") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ReleasedCheckpoint(config, tensors, decoder)


def _rename(tensors: Iterable[tuple[str, Tensor]], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Give tensors other names; raise ValueError if two would have the same."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if (new := rename(name)) in renamed:
            raise ValueError(f"several tensors mean {new!r}; one of them is {name!r}")
        renamed[new] = tensor
    return renamed


class _Inert:
    """An inert replacement for every class and function that a checkpoint's pickle names, such as Namespace."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_released_tensors(path: Path) -> dict[str, Tensor]:
    """Read the model's tensors from a released checkpoint with torch's restricted unpickler, as float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, or what it holds is not a dictionary of plain floating-point tensors
            whose numbers are all in the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):  # torch never compresses
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > size:
                    raise ValueError("it unpacks to more than its own size")
        # Replace every class and function that the pickle names, so that none of them is called.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ...
        raise ValueError(f"{path}: not a readable torch checkpoint ({error})") from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: expected a dictionary with the model's tensors under 'model'")
    for name, tensor in state.items():
        # float8, quantized and complex tensors have other dtypes; nested ones and those of other classes other types.
        plain = (
            type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        )
        if not plain or tensor.is_nested or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout} on {tensor.device.type}; "
                "expected a plain floating-point tensor"
            )
    # A tensor may repeat one number without end, and many tensors may share their numbers.
    if (numbers := sum(tensor.numel() for tensor in state.values())) > size:
        raise ValueError(f"{path}: its tensors have {numbers} numbers, more than the file has bytes ({size})")
    try:
        return _rename(((name, tensor.float()) for name, tensor in state.items()), lambda name: _WRAPPERS.sub("", name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_config(
    family: Family,
    state: dict[str, Tensor],
    positions: Tensor,
    heads: int | None,
    flip: bool | None,
    input_gate: InputGate,
) -> EncoderConfig:
    """Infer the config from tensors. Raise KeyError for a missing tensor, ValueError for any other problem."""
    dim, _, patch_frames, patch_bands = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    # One step of patches first: this checks that they have a size, and that whole patches make up the bands.
    patches = PatchConfig(chunk_frames=patch_frames, patch_frames=patch_frames, patch_bands=patch_bands)
    patches = replace(patches, chunk_frames=(positions.shape[1] - 1) // patches.rows * patch_frames)
    not_fixed = "pos_embed is not the fixed sin-cos table of the papers; learned positions are not supported"
    if positions.shape != (1, 1 + patches.patches, dim):
        raise ValueError(not_fixed)
    table = F.pad(sincos_2d(patches, dim), (0, 0, 1, 0))  # zeros for cls
    if positions.shape[1:] != table.shape or not torch.allclose(positions[0], table, atol=1e-4):
        raise ValueError(not_fixed)
    if family == "axlstm":
        if flip is None:
            raise ValueError(
                "its tensors do not show whether this AxLSTM was trained with flip: give flip=True, as in the "
                "released code, or flip=False (--flip, --no-flip)"
            )
        up = state["blocks.0.layer.proj_up.weight"]
        return AxLSTMConfig(
            family="axlstm",
            dim=dim,
            depth=depth,
            heads=state["blocks.0.layer.mlstm_cell.fgate.weight"].shape[0],
            expansion=up.shape[0] // (2 * dim),
            flip=flip,
            input_gate=input_gate,
            conv_kernel=state["blocks.0.layer.conv1d.conv.weight"].shape[-1],
            projection_block=state["blocks.0.layer.q_proj.weight"].shape[-1],
            patches=patches,
        )
    frequencies = state.get("blocks.0.rope.freqs")
    if frequencies is not None:
        rope_heads = dim // (2 * len(frequencies))
        if heads not in (None, rope_heads):
            raise ValueError(f"its RoPE frequencies belong to {rope_heads} heads, got {heads}")
        heads = rope_heads
    if heads is None:
        raise ValueError("its tensors do not show the number of attention heads: give it (heads, --heads)")
    return TransformerConfig(
        family=family,
        dim=dim,
        depth=depth,
        heads=heads,
        rope="none" if frequencies is None else "sequence",
        swiglu_norm="attention" if family == "audiomaepp" else "own",
        patches=patches,
    )


def translate_name(name: str) -> str:
    """Return this package's name of a released tensor, given without the prefix `encoder.`."""
    if name == "cls_token":
        return name
    module, _, parameter = name.rpartition(".")
    if module == "encoder_norm":
        return f"norm.{parameter}"
    if module == "patch_embed.proj":
        return f"patch_projection.{parameter}"
    blocks, _, inner = name.partition(".")
    number, _, inner = inner.partition(".")
    if blocks == "blocks" and number.isdigit():
        if inner in _TENSORS:
            return f"blocks.{number}.{_TENSORS[inner]}"
        module, _, parameter = inner.rpartition(".")
        if module in _MODULES:
            return f"blocks.{number}.{_MODULES[module]}.{parameter}"
    raise ValueError(f"unknown tensor {name!r}")


def _translate(name: str, tensor: Tensor) -> Tensor:
    """Return a released tensor as this package stores it."""
    if name == "cls_token":
        return tensor.flatten()
    if name == "patch_embed.proj.weight":
        return tensor.flatten(1)  # (D, 1, patch_frames, patch_bands) -> (D, P)
    if name.endswith("conv1d.conv.weight"):
        return tensor.squeeze(1)  # (I, 1, kernel) -> (I, kernel)
    if re.fullmatch(r"blocks\.\d+\.(norm|layer\.mlstm_cell\.outnorm)\.weight", name):
        return 1 + tensor  # the released mLSTM block stores its norms' weights as offsets from 1
    return tensor
