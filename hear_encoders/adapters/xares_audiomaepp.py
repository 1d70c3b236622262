"""AudioMAE++-Tiny for `python -m xares.run hear_encoders/adapters/xares_audiomaepp.py TASK.py ...`."""

import hear_audiomaepp
from hear_encoders.adapters.xares import XaresModel


class AudioMAEppEncoder(XaresModel):
    """The bundled weights. X-ARES keeps embeddings and scores under this class's name."""

    def __init__(self) -> None:
        super().__init__(hear_audiomaepp.load_model())
