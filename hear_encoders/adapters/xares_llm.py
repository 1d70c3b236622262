"""Our models as encoders of XARES-LLM: `python -m xares_llm.run hear_encoders.adapters.xares_llm.AxLSTMEncoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hear_audiomaepp
import hear_axlstm
from hear_encoders.adapters.xares import embed_padded
from hear_encoders.embedder import Embedder


class XaresLLMModel(nn.Module):
    """What XARES-LLM asks of an encoder.

    Args:
        model: from `load_model`.

    Attributes:
        output_dim: E, the size of an embedding.
    """

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.model = model
        self.output_dim = model.timestamp_embedding_size

    def forward(self, audio: Tensor, audio_attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed padded clips.

        Args:
            audio: (B, samples) at 16 kHz, padded at the end.
            audio_attention_mask: (B, samples), 1 for samples and 0 for padding. None: there is no padding.

        Returns:
            Embeddings (B, T, E) float32, one per 40 ms, and their mask (B, T), 1 for the clip's steps.
        """
        whole = torch.full((len(audio),), audio.shape[1], device=audio.device)
        lengths = whole if audio_attention_mask is None else audio_attention_mask.sum(1).long()
        steps, own = embed_padded(self.model, audio, lengths)
        return steps, own.long()


class AudioMAEppEncoder(XaresLLMModel):
    """AudioMAE++; options are those of `load_model`. Default: the bundled weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(hear_audiomaepp.load_model(**options))


class AxLSTMEncoder(XaresLLMModel):
    """AxLSTM; options are those of `load_model`. Default: the bundled weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(hear_axlstm.load_model(**options))
