"""From a configuration to an encoder."""

from __future__ import annotations

import torch
from torch import nn

from hear_encoders.config import AxLSTMConfig, EncoderConfig, TransformerConfig
from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.nn.transformer import TransformerEncoder

Encoder = TransformerEncoder | AxLSTMEncoder

ENCODER_OF_CONFIG = {TransformerConfig: TransformerEncoder, AxLSTMConfig: AxLSTMEncoder}


def build_encoder(config: EncoderConfig, seed: int | None = None) -> Encoder:
    """Build an encoder with freshly initialised weights.

    Args:
        config: a configuration, such as `preset("axlstm_tiny")`.
        seed: initialise from this seed, leaving torch's global generator as it was; None draws from it.

    Raises:
        TypeError: not a configuration.
    """
    if type(config) not in ENCODER_OF_CONFIG:
        raise TypeError(f"config must be a configuration, such as preset('axlstm_tiny'), got {config!r}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        encoder = ENCODER_OF_CONFIG[type(config)](config)
        encoder.reset_parameters()
    return encoder


def is_as_built(module: nn.Module) -> bool:
    """Whether a module and all in it are of this package's or torch's own kinds, with nothing hung on them, nor on all
    modules there are, that would notice in which order, or in which thread, they are called."""
    of_all = torch.nn.modules.module
    return not (of_all._global_forward_hooks or of_all._global_forward_pre_hooks) and all(
        type(part).__module__.startswith(("hear_encoders.", "torch.nn.modules.")) and not is_hooked(part)
        for part in module.modules()
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something is called when this module is, or in place of what its class does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
