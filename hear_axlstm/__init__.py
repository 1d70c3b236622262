"""HEAR module of AxLSTM and of its SSAST baseline.

import hear_axlstm

model = hear_axlstm.load_model()
embeddings = hear_axlstm.get_scene_embeddings(audio, model)  # (clips, samples) -> (clips, size)
embeddings, timestamps_ms = hear_axlstm.get_timestamp_embeddings(audio, model)
"""

from pathlib import Path

from hear_encoders.hear import HearModule

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]

MODULE = HearModule(
    name=__name__,
    families=("axlstm", "ssast"),
    default_preset="axlstm_tiny",
    bundled=Path(__file__).parent / "weights",
)

load_model = MODULE.load_model
get_scene_embeddings = MODULE.get_scene_embeddings
get_timestamp_embeddings = MODULE.get_timestamp_embeddings
