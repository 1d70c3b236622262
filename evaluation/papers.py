"""Assign a model evaluated here to the papers' tables, by its encoder's config.

The model's paper is that of its encoder's family: AudioMAE++ and its baseline MAE, or AxLSTM and its baseline SSAST. A
model of another kind (log-mel statistics, wav2vec 2.0) is shown beside the rows of both papers. In Tables 3 to 5 a
model is listed below the printed rows of the same encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from evaluation.results import ModelRecord
from hear_encoders.config import EncoderConfig, PatchConfig, preset

PAPERS = {"audiomaepp": "AudioMAE++", "axlstm": "AxLSTM"}  # name in file names -> name in published.csv

_PAPER_OF_FAMILY = {"audiomaepp": "AudioMAE++", "mae": "AudioMAE++", "axlstm": "AxLSTM", "ssast": "AxLSTM"}
_PAPER_OF_MODULE = {"hear_audiomaepp": "AudioMAE++", "hear_axlstm": "AxLSTM"}  # for results without a config

_BASE, _LARGE = preset("audiomaepp_base"), preset("audiomaepp_large")
_SSAST = preset("ssast_tiny")
_AXLSTM = replace(preset("axlstm_tiny"), expansion=2, flip=True)  # the ablations' default
_PATCHES = {125: PatchConfig(patch_frames=8), 250: PatchConfig(), 500: PatchConfig(patch_bands=8)}

# The encoders of Tables 3 to 5 by paper, table and the row's name in published.csv.
ENCODERS: dict[tuple[str, int, str], EncoderConfig] = {
    ("AudioMAE++", 3, "AudioMAE++-Base, RoPE in encoder and decoder"): replace(_BASE, rope="sequence"),
    ("AudioMAE++", 3, "AudioMAE++-Base, RoPE in decoder"): _BASE,
    ("AudioMAE++", 3, "AudioMAE++-Base, no RoPE"): _BASE,
    **{("AudioMAE++", 4, f"AudioMAE++-Large, decoder {dim}"): _LARGE for dim in (384, 512, 768)},
    ("AxLSTM", 3, "SSAST-T"): _SSAST,
    **{("AxLSTM", 3, f"AxLSTM-T, expansion {e}"): replace(_AXLSTM, expansion=e) for e in (2, 3, 4)},
    **{
        ("AxLSTM", 4, f"{name}, {count} patches"): replace(encoder, patches=grid)
        for count, grid in _PATCHES.items()
        for name, encoder in (("SSAST-T", _SSAST), ("AxLSTM-T", _AXLSTM))
    },
    **{
        ("AxLSTM", 5, f"AxLSTM-T, expansion {e}, {gate} gate, {'flip' if flip else 'no flip'}"): replace(
            _AXLSTM, expansion=e, input_gate=gate, flip=flip
        )
        for e, gate, flip in (
            (2, "exponential", True),
            (2, "exponential", False),
            (2, "sigmoid", True),
            (3, "exponential", True),
            (3, "exponential", False),
            (3, "sigmoid", False),
        )
    },
}


def in_paper(card: ModelRecord, paper: str) -> bool:
    """Return whether a model is shown beside the rows of a paper."""
    if card.encoder is None:
        return _PAPER_OF_MODULE.get(card.module, paper) == paper
    return _PAPER_OF_FAMILY[card.encoder["family"]] == paper


def has_encoder(card: ModelRecord, row: tuple[str, int, str]) -> bool:
    """Return whether a model has the encoder of a row of Tables 3 to 5: (paper, table, the row's name)."""
    return card.encoder is not None and _features(card.encoder) == _features(asdict(ENCODERS[row]))


def _features(encoder: Mapping[str, Any]) -> list[Any]:
    """Return the features of an encoder's config that distinguish the papers' rows."""
    names = ("family", "dim", "depth", "heads", "expansion", "flip", "input_gate", "patches", "rope")
    return [encoder.get(name) for name in names]
