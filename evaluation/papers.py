"""Assign a model evaluated here to the papers' tables, by its encoder's config.

The model's paper is that of its encoder's family: AudioMAE++ and its baseline MAE, or AxLSTM and its baseline SSAST. A
model of another kind (log-mel statistics, wav2vec 2.0) is shown beside the rows of both papers. In Tables 3 to 5 a
model is listed below the printed rows of the same encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from evaluation.results import ModelRecord
from hear_encoders.config import EncoderConfig
from hear_encoders.papers import FEATURES, ROWS

PAPERS = {"audiomaepp": "AudioMAE++", "axlstm": "AxLSTM"}  # name in file names -> name in published.csv

MODULE_OF_FAMILY = {
    "audiomaepp": "hear_audiomaepp",
    "mae": "hear_audiomaepp",
    "axlstm": "hear_axlstm",
    "ssast": "hear_axlstm",
}
_PAPER_OF_MODULE = {"hear_audiomaepp": "AudioMAE++", "hear_axlstm": "AxLSTM"}

# The encoders of Tables 3 to 5 by paper, table and the row's name in published.csv.
ENCODERS: dict[tuple[str, int, str], EncoderConfig] = {row: encoder for row, (encoder, _) in ROWS.items() if row[1] > 2}


def in_paper(card: ModelRecord, paper: str) -> bool:
    """Return whether a model is shown beside the rows of a paper."""
    module = card.module if card.encoder is None else MODULE_OF_FAMILY[card.encoder["family"]]
    return _PAPER_OF_MODULE.get(module, paper) == paper


def has_encoder(card: ModelRecord, row: tuple[str, int, str]) -> bool:
    """Return whether a model has the encoder of a row of Tables 3 to 5: (paper, table, the row's name)."""
    return card.encoder is not None and _features(card.encoder) == _features(asdict(ENCODERS[row]))


def _features(encoder: Mapping[str, Any]) -> list[Any]:
    """Return the features of an encoder's config that distinguish the papers' rows."""
    return [encoder.get(name) for name in FEATURES]
