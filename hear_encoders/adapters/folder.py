"""Folders that load in other programs, too: what transformers and sentence-transformers need beside a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from hear_encoders.checkpoint import save_checkpoint
from hear_encoders.config import EncoderConfig, config_to_dict
from hear_encoders.files import atomic_write, write_json
from hear_encoders.hub import CONFIG_FILE
from hear_encoders.nn.build import Encoder
from hear_encoders.nn.frontend import SAMPLE_RATE

MODELING_FILE = "modeling_hear.py"
PREPROCESSOR_FILE = "preprocessor_config.json"
MODULES_FILE = "modules.json"
MODALITIES_FILE = "sentence_bert_config.json"

# transformers' padding and check of the sampling rate, without any normalization.
_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": SAMPLE_RATE,
    "padding_side": "right",
    "padding_value": 0.0,
    "do_normalize": False,
    "return_attention_mask": True,
}

_TRANSFORMERS = {
    "architectures": ["HearModel"],
    "auto_map": {"AutoConfig": "modeling_hear.HearConfig", "AutoModel": "modeling_hear.HearModel"},
    "dtype": "float32",
    "model_type": "hear_encoder",
}

_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "hear_encoders.adapters.sentence_transformers.AudioModule"}]

# mteb reads the modalities of a model of sentence-transformers from here.
_MODALITIES = {"modality_config": {"audio": {"method": "forward", "method_output_name": "sentence_embedding"}}}


def save_folder(directory: str | os.PathLike[str], encoder: Encoder) -> None:
    """Write a checkpoint that transformers and sentence-transformers load, too.

    Raises:
        TypeError: the arguments are not a path and an encoder.
    """
    save_checkpoint(directory, encoder)
    write_files(directory, encoder.config)


def write_files(directory: str | os.PathLike[str], config: EncoderConfig) -> list[str]:
    """Write all files of such a folder except the weights. Return their names."""
    folder = Path(directory)
    write_json(folder / CONFIG_FILE, {**config_to_dict(config), **_TRANSFORMERS})
    write_json(folder / PREPROCESSOR_FILE, _PREPROCESSOR)
    write_json(folder / MODULES_FILE, _MODULES)
    write_json(folder / MODALITIES_FILE, _MODALITIES)
    with atomic_write(folder / MODELING_FILE) as file:
        file.write(Path(__file__).with_name(MODELING_FILE).read_bytes())
    return [CONFIG_FILE, PREPROCESSOR_FILE, MODULES_FILE, MODALITIES_FILE, MODELING_FILE]
