"""HEAR module of AudioMAE++ and its MAE baseline.

import hear_audiomaepp

model = hear_audiomaepp.load_model()
embeddings = model.encode(["a.wav", "b.mp3"])  # or arrays, of any lengths; NumPy arrays (2, size)
embeddings = hear_audiomaepp.get_scene_embeddings(audio, model)  # (clips, samples) -> (clips, size)
embeddings, timestamps_ms = hear_audiomaepp.get_timestamp_embeddings(audio, model)
"""

from pathlib import Path

from hear_encoders.hear import HearModule

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]

MODULE = HearModule(
    name=__name__,
    families=("audiomaepp", "mae"),
    bundled=Path(__file__).parent / "weights",
)

load_model = MODULE.load_model
get_scene_embeddings = MODULE.get_scene_embeddings
get_timestamp_embeddings = MODULE.get_timestamp_embeddings
