"""Encoders of AudioMAE++ and AxLSTM made for inference, and everything from an audio file to its embedding.

Most users want `hear_audiomaepp` or `hear_axlstm`. What those are made of:

    config                      what an encoder is: frozen dataclasses, presets, config.json
    frontend, patches           waveform -> log-mel -> patches and their positions
    transformer                 encoders of AudioMAE++, MAE and SSAST
    mlstm, axlstm               the mLSTM cell, the AxLSTM encoder
    axlstm_chunks               the AxLSTM encoder as a CPU runs it fastest
    encoders                    from a configuration to an encoder
    embedder                    framing, batching, embeddings, timestamps
    stream, axlstm_steps        AxLSTM on audio that is still arriving; its encoder a few tokens at a time
    checkpoint, hub             reading and writing weights: bundled, path, Hugging Face Hub
    reference                   the papers' released code: its framing, its checkpoints
    audio, corpus, outputs      audio files in, embeddings out: many files at a time
    embed_corpus                the same on many machines, under torchrun
    pcm                         audio from a pipe
    threads, allocator          chunks side by side on a CPU; memory that is used again
    atomic                      files that are written whole
    hear, cli                   what the HEAR modules share; the commands hear-embed and hear-weights
"""

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
