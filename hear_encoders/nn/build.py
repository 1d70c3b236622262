"""Build an encoder from its configuration."""

from __future__ import annotations

import torch

from hear_encoders.config import AxLSTMConfig, EncoderConfig, TransformerConfig
from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.nn.transformer import TransformerEncoder

Encoder = TransformerEncoder | AxLSTMEncoder

ENCODER_OF_CONFIG = {TransformerConfig: TransformerEncoder, AxLSTMConfig: AxLSTMEncoder}


def build_encoder(config: EncoderConfig, seed: int | None = None) -> Encoder:
    """Build an encoder with freshly initialized weights.

    Args:
        config: such as `preset("axlstm_tiny")`.
        seed: initialize from this seed and leave torch's global generator alone; None draws from that generator.

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
