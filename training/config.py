"""A pretraining run's config: a dataclass, read from YAML files that inherit, with overrides from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from hear_encoders.config import (
    CONFIG_OF_FAMILY,
    AxLSTMConfig,
    EncoderConfig,
    PatchConfig,
    PositionTable,
    Rope,
    TransformerConfig,
    shorten,
)

LossOn = Literal["masked", "all"]

# Bounds far above any sensible run: a mistaken config must not ask for absurd memory. A checkpoint's name has 8 digits.
MOST_CLIPS, MOST_STEPS, MOST_WORKERS = 10**6, 10**8 - 1, 1024


@dataclass(frozen=True)
class DecoderConfig:
    """A masked autoencoder's decoder; its blocks are of the encoder's kind (AudioMAE++ section 3.2)."""

    dim: int = 384
    depth: int = 4
    heads: int = 8
    rope: Rope = "none"
    position_table: PositionTable = "sincos"


@dataclass(frozen=True)
class RunConfig:
    """A pretraining run's config. The defaults are the papers' (AudioMAE++ section 3.2, AxLSTM section 3.2).

    Attributes:
        encoder: the encoder, as in its `config.json`; missing fields have their defaults.
        decoder: a masked autoencoder's decoder (families audiomaepp and mae); None for axlstm and ssast.
        mask_ratio: share of patches masked.
        mask_positions: axlstm and ssast: mask tokens have positions. Those of published models have none (see
            `MaskedModel`).
        loss_on: patches that the loss covers: "masked", as published, or "all", as in the released code of
            AxLSTM and SSAST.
        shuffled_rope: audiomaepp and mae with encoder.rope = sequence: the encoder rotates by place in the shuffled
            sequence of visible patches, as in the released code, instead of by place in the segment.
        batch_size: crops per optimizer step, over all processes and micro-batches.
        accumulate: micro-batches per process and optimizer step.
        crops_per_record: crops of 2 s taken from a record each time it is read.
        shares: percentages in which the --data folders are mixed, one per folder; None draws every record equally
            often.
        normalize: range over which log-mel is normalized: the whole "record", as inference does with a clip, or the
            "crop".
        base_lr: learning rate per 256 crops of batch: the peak rate is base_lr * batch_size / 256.
        epochs, warmup_epochs: length of training and of its linear warm-up, in passes over the records.
        max_steps, warmup_steps: the same in optimizer steps; they override epochs.
        cooldown_steps: None lets the learning rate fall along a cosine over the whole run, as published. A number
            keeps it at its peak until the last cooldown_steps optimizer steps, over which it falls linearly to 0;
            before they begin, max_steps may still be changed. Needs max_steps and warmup_steps.
        optimizer: "adamw", as published, or "muon": Muon for the blocks' matrices, AdamW for the rest.
        weight_decay: weight decay, except on biases, norms and other one-dimensional parameters.
        beta1, beta2: AdamW's.
        clip_grad: largest gradient norm; None does not clip.
        start_from: initial weights instead of random ones: a run's directory, or anything that `load_model` takes,
            with the same encoder. From a run with the same decoder, the decoder or head is taken too.
        precision: precision of the forward pass, by autocast unless float32.
        compile: run the model through torch.compile.
        fsdp: shard the model over the processes (FSDP2) instead of keeping all of it in each.
        workers: processes that read data, per training process; 0 reads in the training process.
        seed: seed of initial weights, data order, crops and masks.
        log_every, save_every: intervals in optimizer steps.
        held_out_every, held_out_clips: with --held-out: interval in optimizer steps, and crops to test on.
        picture_every: interval in optimizer steps at which a reconstruction is drawn; None draws none.
        keep_last: newest checkpoints to keep.
        milestone_every: interval in optimizer steps of checkpoints to keep for good; None keeps none.
        max_hours: save and stop after this long; None does not.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig | None
    mask_ratio: float
    mask_positions: bool = True
    loss_on: LossOn = "masked"
    shuffled_rope: bool = False
    batch_size: int = 1024
    accumulate: int = 1
    crops_per_record: int = 1
    shares: tuple[int, ...] | None = None
    normalize: Literal["record", "crop"] = "record"
    base_lr: float = 1.5e-4
    epochs: float = 100.0
    warmup_epochs: float = 10.0
    max_steps: int | None = None
    warmup_steps: int | None = None
    cooldown_steps: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float | None = None
    start_from: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    fsdp: bool = False
    workers: int = 2
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    held_out_every: int = 500
    held_out_clips: int = 512
    picture_every: int | None = 5000
    keep_last: int = 2
    milestone_every: int | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        needs_decoder = self.encoder.family in ("audiomaepp", "mae")
        if needs_decoder != (self.decoder is not None):
            raise ValueError(f"family {self.encoder.family!r} {'needs a' if needs_decoder else 'has no'} decoder")
        if self.shuffled_rope and not (needs_decoder and self.encoder.rope == "sequence"):
            raise ValueError("shuffled_rope needs a masked autoencoder with encoder.rope = sequence")
        if self.decoder is not None:
            try:
                self.decoder_blocks()
            except (TypeError, ValueError) as error:
                raise ValueError(f"decoder: {error}") from error
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")
        bounds = {
            **dict.fromkeys(("batch_size", "accumulate", "crops_per_record", "held_out_clips"), (1, MOST_CLIPS)),
            **dict.fromkeys(("log_every", "save_every", "held_out_every", "keep_last"), (1, MOST_STEPS)),
            **dict.fromkeys(("max_steps", "picture_every", "milestone_every"), (1, MOST_STEPS)),
            "warmup_steps": (0, MOST_STEPS),
            "workers": (0, MOST_WORKERS),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must lie between {least} and {most}, got {shorten(value)}")
        if not (self.epochs > 0 and self.warmup_epochs >= 0):
            raise ValueError(
                f"epochs must be above 0 and warmup_epochs at least 0, got {self.epochs} and {self.warmup_epochs}"
            )
        if self.shares is not None and (sum(self.shares) != 100 or min(self.shares) < 1):
            raise ValueError(f"shares must be percentages of at least 1 that sum to 100, got {self.shares}")
        if self.cooldown_steps is not None:
            if self.max_steps is None or self.warmup_steps is None:
                raise ValueError("cooldown_steps needs both max_steps and warmup_steps")
            if not 1 <= self.cooldown_steps <= self.max_steps - self.warmup_steps:
                raise ValueError(
                    f"cooldown_steps must lie between 1 and max_steps - warmup_steps = "
                    f"{self.max_steps - self.warmup_steps}, got {self.cooldown_steps}"
                )
        if self.batch_size % self.crops_per_record:
            raise ValueError(f"crops_per_record = {self.crops_per_record} must divide batch_size = {self.batch_size}")
        if self.fsdp and self.precision == "float16":
            raise ValueError("fsdp does not support precision = float16; use bfloat16")
        if self.fsdp and self.optimizer == "muon":
            raise ValueError("fsdp does not support optimizer = muon, which needs whole matrices; use adamw")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.base_lr * self.batch_size / 256

    def decoder_blocks(self) -> TransformerConfig:
        """Return the config of the decoder's blocks: the encoder's kind and patch grid, the decoder's size."""
        return TransformerConfig(
            family=self.encoder.family,
            swiglu_norm=self.encoder.swiglu_norm,
            patches=self.encoder.patches,
            **dataclasses.asdict(self.decoder),
        )

    def steps(self, records: int) -> int:
        """Return the optimizer steps of the whole run on this many records."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.epochs * records * self.crops_per_record / self.batch_size)

    def warmup(self, records: int) -> int:
        """Return the optimizer steps of the warm-up on this many records."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.max_steps is not None:  # in the papers 10 of 100 epochs
            return round(self.max_steps * self.warmup_epochs / self.epochs)
        return math.ceil(self.warmup_epochs * records * self.crops_per_record / self.batch_size)


def learning_rate_factor(step: int, warmup: int, total: int, cooldown: int | None = None) -> float:
    """Return the learning rate at an optimizer step as a fraction of its peak.

    It rises linearly from 0, then falls along half a cosine to 0, or as `RunConfig.cooldown_steps` says.
    """
    if step < warmup:
        return step / warmup
    if cooldown is not None:
        return min(1.0, max(0, total - step) / cooldown)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's config from a YAML file.

    The key `released`, false by default, selects all quirks of the papers' released code (see `as_released`). It is
    not a field of the config, which states the resulting values.

    Args:
        path: the YAML file. Its key `inherits` names one or several other files, relative to it. Each file's values
            replace those of the files before it, and the values of `path` replace them all.
        overrides: "key=value" with dots for nested keys ("encoder.dim=96"), values in YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed override, an unknown or missing key, or a value of the wrong type.
    """
    try:
        values = _read(Path(path))
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {override!r}")
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{override!r}: {parent!r} holds a value, not keys")
        target[last] = _parse(text, override)
    released = values.pop("released", False)
    if type(released) is not bool:
        raise ValueError(f"{path}: released must be bool, got {shorten(released)}")
    config = run_config_from_dict(values, str(path))
    return as_released(config) if released else config


def as_released(config: RunConfig) -> RunConfig:
    """Return a run's config with the settings in which the papers' released code differs from their text.

    AxLSTM and SSAST: the loss covers all patches, and mask tokens have no positions, which is also the text's.
    AudioMAE++: attention's norm is SwiGLU's too. RoPE, if it is on, comes on top of the position table, and the encoder
    rotates by place in the shuffled sequence of visible patches.
    """
    encoder, decoder = config.encoder, config.decoder
    if isinstance(encoder, AxLSTMConfig) or decoder is None:
        return dataclasses.replace(config, mask_positions=False, loss_on="all")
    encoder = dataclasses.replace(
        encoder,
        rope=_released_rope(encoder.rope),
        position_table="sincos",
        swiglu_norm="attention" if encoder.family == "audiomaepp" else "own",
    )
    decoder = dataclasses.replace(decoder, rope=_released_rope(decoder.rope), position_table="sincos")
    return dataclasses.replace(config, encoder=encoder, decoder=decoder, shuffled_rope=encoder.rope != "none")


def _released_rope(rope: Rope) -> Rope:
    return "none" if rope == "none" else "sequence"


def run_config_from_dict(values: Any, source: str) -> RunConfig:
    """Build a run's config from plain values; the inverse of `dataclasses.asdict`."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected keys and values, got {shorten(values)}")
    values = dict(values)
    try:
        encoder = values.pop("encoder")
        if not isinstance(encoder, dict):
            raise ValueError(f"encoder: expected keys and values, got {shorten(encoder)}")
        encoder = dict(encoder)
        decoder = values.pop("decoder", None)
        family = encoder.get("family")
        if family not in CONFIG_OF_FAMILY:
            raise ValueError(f"encoder.family must be one of {', '.join(CONFIG_OF_FAMILY)}; got {shorten(family)}")
        encoder["patches"] = _make(PatchConfig, encoder.get("patches") or {}, "encoder.patches.")
        return _make(
            RunConfig,
            {
                **values,
                "encoder": _make(CONFIG_OF_FAMILY[family], encoder, "encoder."),
                "decoder": None if decoder is None else _make(DecoderConfig, decoder, "decoder."),
            },
        )
    except KeyError as error:
        raise ValueError(f"{source}: missing key {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _read(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and those it inherits; `heirs` are the files that inherit this one."""
    if not path.is_file():
        raise FileNotFoundError(f"no such config: {path}")
    heirs = (*heirs, path.resolve())
    if heirs[-1] in heirs[:-1]:
        raise ValueError(f"{path} inherits itself: {' > '.join(heir.name for heir in heirs)}")
    values = _parse(path.read_bytes(), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(values).__name__}")
    inherited = values.pop("inherits", [])
    names = [inherited] if isinstance(inherited, str) else inherited
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: inherits must be a file's name or a list of names, got {shorten(inherited)}")
    merged: dict[str, Any] = {}
    for name in names:
        merged = _merge(merged, _read(path.parent / name, heirs))
    return _merge(merged, values)


def _parse(text: str | bytes, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    # ValueError: a date or an integer that Python refuses. RecursionError: thousands of brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _make(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a dataclass, checking keys and the types of plain values."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')}: expected keys and values, got {shorten(values)}")
    hints = typing.get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key '{prefix}{key}'; known: {', '.join(hints)}")
        types = tuple(typing.get_origin(hint) or hint for hint in typing.get_args(hints[key]) or (hints[key],))
        if float in types and type(value) in (int, str):
            with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-3, which has no dot, as text
                value = float(value)
        if tuple in types and isinstance(value, list) and all(type(item) is int for item in value):
            value = tuple(value)  # YAML and JSON have no tuples
        if typing.get_origin(hints[key]) is Literal:
            if value not in types:
                raise ValueError(f"{prefix}{key} must be one of {', '.join(map(repr, types))}; got {shorten(value)}")
        elif type(value) not in types:
            names = " or ".join("null" if type_ is type(None) else type_.__name__ for type_ in types)
            raise TypeError(f"{prefix}{key} must be {names}, got {shorten(value)}")
        checked[key] = value
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in checked and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing key {prefix + missing[0]!r}")
    return cls(**checked)
