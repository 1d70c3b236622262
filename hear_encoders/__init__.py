"""AudioMAE++ and AxLSTM encoders for inference, and everything from an audio file to its embedding.

Most users want `hear_audiomaepp` or `hear_axlstm`. Behind them, from the user down to the maths:

    cli                         the commands: hear-embed, hear-embed-corpus, hear-map, hear-weights
    adapters                    our models in transformers, sentence-transformers, mteb and X-ARES
    hear                        the HEAR functions that the two modules share
    onnx_export, onnx_graphs    models as ONNX graphs, for programs without PyTorch
    stream                      AxLSTM on audio that is still arriving
    embedder                    the object that load_model returns
    clips                       encode: files, arrays and rows of tables, decoded ahead of the encoder, in batches
    framing, pooling            clip -> segments -> time steps -> scene embedding
    execution                   which implementation encodes a batch: precision, compile, CPU threads
    nn                          the encoders: front end, patches, transformer, mLSTM, AxLSTM and its fast forms
    config                      frozen dataclasses, presets, config.json
    checkpoint, hub, released   weights: bundled, from a path, from the Hugging Face Hub, from the authors' code
    audio, media, pcm           audio files, what only FFmpeg reads, and pipes -> 16 kHz mono
    checks                      errors for input that is not audio
    papers                      the encoders of the papers' tables, and the rows that an encoder can stand for
    storage                     files at addresses: object storage, the Hub
    files                       atomic writes, locks, folders that belong to one run's settings
    threads                     CPU threads of the commands
    cluster                     Ray, for commands on many machines
    console                     exit codes, messages, progress, argument types

Imports only go down this list; tests/test_imports.py checks it. Names that this package gives are imported on use:
the commands set what has to be set before PyTorch is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hear_encoders.audio import load_audio
    from hear_encoders.checkpoint import load_checkpoint, save_checkpoint
    from hear_encoders.config import PRESETS, AxLSTMConfig, PatchConfig, TransformerConfig, preset
    from hear_encoders.embedder import Embedder
    from hear_encoders.nn.build import build_encoder

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

_MODULES = {
    "AxLSTMConfig": "config",
    "Embedder": "embedder",
    "PRESETS": "config",
    "PatchConfig": "config",
    "TransformerConfig": "config",
    "build_encoder": "nn.build",
    "load_audio": "audio",
    "load_checkpoint": "checkpoint",
    "preset": "config",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
