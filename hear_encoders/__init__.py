"""Encoders of AudioMAE++ and AxLSTM made for inference, and everything from an audio file to its embedding.

Most users want `hear_audiomaepp` or `hear_axlstm`. What those are made of:

    config      what an encoder is: frozen dataclasses, presets, config.json
    frontend    waveform -> log-mel                     patches      log-mel -> patches and their positions
    transformer AudioMAE++, MAE and SSAST encoders      mlstm, axlstm    the mLSTM cell, the AxLSTM encoder
    embedder    framing, batching, embeddings, times    checkpoint, hub  reading and writing weights
    reference   the released code's framing and files   audio, cli       files of audio, the two commands
"""

from hear_encoders.audio import load_audio
from hear_encoders.checkpoint import load_checkpoint, save_checkpoint
from hear_encoders.config import PRESETS, AxLSTMConfig, PatchConfig, TransformerConfig, preset
from hear_encoders.embedder import Embedder
from hear_encoders.encoders import build_encoder

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AxLSTMConfig",
    "Embedder",
    "PatchConfig",
    "TransformerConfig",
    "build_encoder",
    "load_audio",
    "load_checkpoint",
    "preset",
    "save_checkpoint",
]
