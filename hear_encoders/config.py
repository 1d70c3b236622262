"""Encoder configs: frozen dataclasses that are saved as `config.json` beside the weights.

A config describes the weights, their architecture and shapes. Options for running them (framing, precision, batching)
belong to `hear_encoders.embedder.Embedder`. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hear_encoders.files import read_json

TransformerFamily = Literal["audiomaepp", "mae", "ssast"]
Rope = Literal["none", "patch", "sequence"]
PositionTable = Literal["sincos", "none"]
SwiGLUNorm = Literal["own", "attention"]
InputGate = Literal["exponential", "sigmoid"]

# Fields that config.json files written before them lack, with the value that a missing one means.
ADDED_FIELDS = {"position_table": "sincos"}

# Fields that transformers adds to a config.json (see `hear_encoders.adapters.folder`). They are ignored.
TRANSFORMERS_FIELDS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version"}

# Bounds far above any sensible encoder: a damaged or hostile config.json must not ask for absurd memory and time. They
# keep the position table below 300 MB.
LARGEST = {
    "dim": 8192,
    "depth": 1000,
    "heads": 8192,
    "expansion": 64,
    "conv_kernel": 1024,
    "projection_block": 8192,
    "chunk_frames": 100_000,
    "bands": 1024,
    "patch_frames": 100_000,
    "patch_bands": 1024,
    "patches": 8192,
}
MOST_PARAMETERS = 10**10

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # 6 items at each of the default 6 levels would make long texts


def shorten(value: object) -> str:
    """Return a value as text for an error: its beginning and end, if it is long, whatever its size and depth."""
    if type(value) is int and value.bit_length() > 100:  # Python refuses to print more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


def _check_types(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        label = f"{type(config).__name__}.{name}"
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{label} must be one of {', '.join(map(repr, get_args(hint)))}; got {shorten(value)}")
        elif type(value) is not hint:  # exact: isinstance(True, int) holds
            raise TypeError(f"{label} must be {hint.__name__}, got {shorten(value)}")


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        value, label = getattr(config, name), f"{type(config).__name__}.{name}"
        if value < 1:
            raise ValueError(f"{label} must be at least 1, got {shorten(value)}")
        if value > LARGEST[name]:
            raise ValueError(f"{label} must be at most {LARGEST[name]}, got {shorten(value)}")


def _check_divides(config: Any, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{type(config).__name__}.{part} = {getattr(config, part)} must divide {whole} = {getattr(config, whole)}"
        )


def _check_sincos_dim(dim: int) -> None:
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 (sines and cosines of two axes), got {dim}")


def _check_parameters(config: EncoderConfig) -> None:
    if config.parameters > MOST_PARAMETERS:
        raise ValueError(
            f"{type(config).__name__}: {config.parameters:.2e} parameters are more than {MOST_PARAMETERS:.0e}"
        )


@dataclass(frozen=True)
class PatchConfig:
    """The grid of patches that a segment of log-mel frames is cut into (section 3.2 of both papers).

    The default segment is 2 s, 200 frames x 80 bands. Patches of 4 frames x 16 bands make a grid of 50 steps x 5 rows:
    250 patches in time-major order (patch index = step * rows + row).

    Attributes:
        chunk_frames: frames of one segment. The name dates from before the word "segment" and is kept because
            `config.json` files contain it.
        bands: mel bands.
        patch_frames: frames of one patch.
        patch_bands: mel bands of one patch.
    """

    chunk_frames: int = 200
    bands: int = 80
    patch_frames: int = 4
    patch_bands: int = 16

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self, "chunk_frames", "bands", "patch_frames", "patch_bands")
        _check_divides(self, "chunk_frames", "patch_frames")
        _check_divides(self, "bands", "patch_bands")
        _check_sizes(self, "patches")

    @property
    def steps(self) -> int:
        """Time steps of a full segment (50)."""
        return self.chunk_frames // self.patch_frames

    @property
    def rows(self) -> int:
        """Patches in one time step, one per group of bands (5)."""
        return self.bands // self.patch_bands

    @property
    def patches(self) -> int:
        """Patches of a full segment (250)."""
        return self.steps * self.rows

    @property
    def patch_size(self) -> int:
        """Log-mel values of one patch (64)."""
        return self.patch_frames * self.patch_bands


@dataclass(frozen=True)
class TransformerConfig:
    """An encoder of transformer blocks: AudioMAE++ (transformer++ blocks), MAE and SSAST (plain blocks).

    Attributes:
        family: "audiomaepp" has macaron/SwiGLU blocks (AudioMAE++ equations 1-3); "mae" and "ssast" have plain
            pre-norm blocks. "mae" and "ssast" are the same encoder, pretrained differently.
        dim: channels of a token.
        depth: number of blocks.
        heads: attention heads; must divide `dim`.
        rope: rotary position embedding (AudioMAE++ section 2.1). "none" is the papers' default. "sequence", as
            published, rotates by a patch's place in the segment's sequence of patches. "patch" rotates by its row and
            step.
        position_table: "sincos" adds the fixed table to the patches' tokens. "none" adds nothing: in the paper's text
            RoPE replaces the table, in the released code it comes on top.
        swiglu_norm: the LayerNorm before SwiGLU. "own" is a separate one (equation 3). "attention" shares the
            attention's, as the released code does; only "audiomaepp" allows it.
        patches: the patch grid.
    """

    family: TransformerFamily
    dim: int
    depth: int
    heads: int
    rope: Rope = "none"
    position_table: PositionTable = "sincos"
    swiglu_norm: SwiGLUNorm = "own"
    patches: PatchConfig = PatchConfig()

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self, "dim", "depth", "heads")
        _check_divides(self, "dim", "heads")
        _check_sincos_dim(self.dim)
        if self.rope != "none":
            multiple = 4 if self.rope == "patch" else 2  # channel pairs; "patch" has one for each of two axes
            if (self.dim // self.heads) % multiple:
                raise ValueError(
                    f"TransformerConfig.rope = {self.rope!r} needs a head size divisible by {multiple}, "
                    f"got dim / heads = {self.dim // self.heads}"
                )
        elif self.position_table == "none":
            raise ValueError("TransformerConfig.position_table = 'none' needs rope, or there are no positions")
        if self.swiglu_norm != "own" and self.family != "audiomaepp":
            raise ValueError(f"TransformerConfig.swiglu_norm must be 'own' for family {self.family!r}: no SwiGLU there")
        _check_parameters(self)

    @property
    def parameters(self) -> int:
        """Number of the encoder's parameters."""
        d = self.dim
        block = 12 * d * d + 13 * d  # attention, MLP, two norms
        if self.family == "audiomaepp":
            hidden = int(4 * d * 2 / 3)  # SwiGLU
            block += 3 * d * hidden + 4 * hidden + d + (2 * d if self.swiglu_norm == "own" else 0)
        return self.depth * block + (self.patches.patch_size + 4) * d


@dataclass(frozen=True)
class AxLSTMConfig:
    """An encoder of mLSTM blocks (AxLSTM section 2.2).

    Attributes:
        family: always "axlstm".
        dim: channels of a token.
        depth: number of blocks.
        heads: heads of the mLSTM cell, each of size expansion * dim / heads.
        expansion: the block's expansion factor E (AxLSTM table 3; the paper's best is 3).
        flip: reverse the token sequence before and after every second block (the paper's best is False).
        input_gate: "exponential" or "sigmoid" (AxLSTM table 5).
        conv_kernel: kernel size of the causal depthwise convolution.
        projection_block: block size of the block-diagonal q, k and v projections.
        patches: the patch grid.
    """

    family: Literal["axlstm"]
    dim: int
    depth: int
    heads: int = 4
    expansion: int = 3
    flip: bool = False
    input_gate: InputGate = "exponential"
    conv_kernel: int = 4
    projection_block: int = 4
    patches: PatchConfig = PatchConfig()

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self, "dim", "depth", "heads", "expansion", "conv_kernel", "projection_block")
        _check_divides(self, "inner_dim", "heads")
        _check_divides(self, "inner_dim", "projection_block")
        _check_sincos_dim(self.dim)
        _check_parameters(self)

    @property
    def inner_dim(self) -> int:
        """Channels inside a block: expansion * dim."""
        return self.expansion * self.dim

    @property
    def parameters(self) -> int:
        """Number of the encoder's parameters."""
        inner = self.inner_dim
        gates = 2 * (3 * inner + 1) * self.heads
        projections = 3 * inner * (self.dim + self.projection_block)
        block = self.dim + projections + gates + inner * (self.conv_kernel + 3)
        return self.depth * block + (self.patches.patch_size + 4) * self.dim


EncoderConfig = TransformerConfig | AxLSTMConfig

CONFIG_OF_FAMILY: dict[str, type[TransformerConfig] | type[AxLSTMConfig]] = {
    "audiomaepp": TransformerConfig,
    "mae": TransformerConfig,
    "ssast": TransformerConfig,
    "axlstm": AxLSTMConfig,
}

PRESETS: dict[str, EncoderConfig] = {
    # AudioMAE++ sections 3.2 and 4; MAE is its baseline.
    "audiomaepp_tiny": TransformerConfig("audiomaepp", dim=192, depth=12, heads=3),
    "audiomaepp_base": TransformerConfig("audiomaepp", dim=768, depth=12, heads=12),
    "audiomaepp_large": TransformerConfig("audiomaepp", dim=1024, depth=24, heads=16),
    "mae_tiny": TransformerConfig("mae", dim=192, depth=12, heads=3),
    "mae_base": TransformerConfig("mae", dim=768, depth=12, heads=12),
    # AxLSTM section 3.2; SSAST is its baseline.
    "axlstm_tiny": AxLSTMConfig("axlstm", dim=192, depth=12),
    "axlstm_small": AxLSTMConfig("axlstm", dim=384, depth=12),
    "axlstm_base": AxLSTMConfig("axlstm", dim=768, depth=12),
    "ssast_tiny": TransformerConfig("ssast", dim=192, depth=12, heads=3),
    "ssast_small": TransformerConfig("ssast", dim=384, depth=12, heads=6),
    "ssast_base": TransformerConfig("ssast", dim=768, depth=12, heads=12),
}


def preset(name: str) -> EncoderConfig:
    """Return a named model's config, such as that of "audiomaepp_tiny".

    Raises:
        ValueError: the name is not in `PRESETS`.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown preset {name!r}; expected one of: {', '.join(PRESETS)}") from None


def config_to_dict(config: EncoderConfig) -> dict[str, Any]:
    """Return a config as plain JSON values, with every field."""
    return dataclasses.asdict(config)


def config_from_dict(values: Any, source: str = "config") -> EncoderConfig:
    """Build a config from parsed JSON. Every field must be present, except `ADDED_FIELDS`, and known.

    `TRANSFORMERS_FIELDS` are ignored.

    Args:
        values: the parsed JSON object.
        source: its origin for error messages, such as the file's path.

    Raises:
        ValueError: it is not an object, the family is unknown, a field is missing or unknown, or a value is invalid.
    """
    family = values.get("family") if isinstance(values, dict) else None
    if not isinstance(family, str) or family not in CONFIG_OF_FAMILY:
        raise ValueError(
            f"{source}: field 'family' must be one of {', '.join(sorted(CONFIG_OF_FAMILY))}; got {shorten(family)}"
        )
    own = {name: value for name, value in values.items() if name not in TRANSFORMERS_FIELDS}
    return _build(CONFIG_OF_FAMILY[family], own, source)


def read_config(path: str | Path) -> EncoderConfig:
    """Read a `config.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a config (see `config_from_dict`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    return config_from_dict(read_json(path), str(path))


def _build(cls: type, values: Any, source: str) -> Any:
    """Build a config dataclass from a dict. Errors name the file and the field."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}")
    hints = get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    values = {**{name: value for name, value in ADDED_FIELDS.items() if name in hints}, **values}
    missing = [name for name in hints if name not in values]
    if unknown:
        raise ValueError(f"{source}: unknown field {unknown[0]!r}; known fields: {', '.join(hints)}")
    if missing:
        raise ValueError(f"{source}: missing field {missing[0]!r}")
    arguments = {
        name: _build(hint, values[name], f"{source}: {name}") if hint is PatchConfig else values[name]
        for name, hint in hints.items()
    }
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
