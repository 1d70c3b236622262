"""HEAR module of AxLSTM and its SSAST baseline.

import hear_axlstm

model = hear_axlstm.load_model()
embeddings = model.encode(["a.wav", "b.mp3"])  # or arrays, of any lengths; NumPy arrays (2, size)
embeddings = hear_axlstm.get_scene_embeddings(audio, model)  # (clips, samples) -> (clips, size)
embeddings, timestamps_ms = hear_axlstm.get_timestamp_embeddings(audio, model)

For audio that is still arriving (an AxLSTM without flip):

stream = hear_axlstm.stream(model)
embeddings, timestamps_ms = stream.push(samples)  # any number of samples -> the 40 ms steps that they complete
"""

from pathlib import Path

from hear_encoders.hear import HearModule
from hear_encoders.stream import AxLSTMStream

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model", "stream"]

MODULE = HearModule(
    name=__name__,
    families=("axlstm", "ssast"),
    bundled=Path(__file__).parent / "weights",
)

load_model = MODULE.load_model
get_scene_embeddings = MODULE.get_scene_embeddings
get_timestamp_embeddings = MODULE.get_timestamp_embeddings
stream = AxLSTMStream
