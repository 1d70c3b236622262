"""Our models as encoders of X-ARES (extra `xares`), of padded batches to one embedding per 40 ms.

X-ARES takes a file or module with exactly one class that ends in "Encoder": `xares_audiomaepp.py` and `xares_axlstm.py`
have the bundled weights. For others, subclass `XaresModel` in a file of your own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hear_encoders.embedder import Embedder
from hear_encoders.nn.frontend import SAMPLE_RATE


class XaresModel(nn.Module):
    """What X-ARES asks of an encoder.

    Args:
        model: from `load_model`.

    Attributes:
        sampling_rate: 16000, in Hz.
        output_dim: E, the size of an embedding.
        hop_size_in_ms: 40.
    """

    sampling_rate = SAMPLE_RATE
    hop_size_in_ms = 40

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.model = model
        self.output_dim = model.timestamp_embedding_size

    def forward(self, audio: Tensor) -> Tensor:
        """Embed clips that are padded with zeros: (B, samples) -> (B, T, E) float32.

        A clip ends with its last sample that is not zero; a silent one is as long as the batch. Steps after its end
        hold the mean of its own, so that X-ARES's mean over all steps is that of the clip alone.
        """
        ends = torch.arange(1, audio.shape[1] + 1, device=audio.device)
        lengths = (ends * (audio != 0)).amax(1)
        steps, own = embed_padded(self.model, audio, torch.where(lengths == 0, audio.shape[1], lengths))
        means = steps.sum(1, keepdim=True) / own.sum(1)[:, None, None]
        return torch.where(own[:, :, None], steps, means)


def embed_padded(model: Embedder, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, T, E), zero after each clip's end, and (B, T) whether a step is the clip's."""
    counts = torch.tensor([model.step_count(samples) for samples in lengths.tolist()], device=audio.device)
    steps = model(audio, lengths)
    return steps, torch.arange(steps.shape[1], device=audio.device) < counts[:, None]
