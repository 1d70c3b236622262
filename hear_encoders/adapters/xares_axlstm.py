"""AxLSTM-Tiny for `python -m xares.run hear_encoders/adapters/xares_axlstm.py TASK.py ...`."""

import hear_axlstm
from hear_encoders.adapters.xares import XaresModel


class AxLSTMEncoder(XaresModel):
    """The bundled weights. X-ARES keeps embeddings and scores under this class's name."""

    def __init__(self) -> None:
        super().__init__(hear_axlstm.load_model())
