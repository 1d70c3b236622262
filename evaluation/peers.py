"""A HEAR module of models that the papers compare with: wav2vec 2.0, WavLM, HuBERT and AST, through transformers.

    .heareval/bin/pip install -c constraints.txt transformers
    python -m evaluation run --module evaluation.peers --weights facebook/wav2vec2-large-100k-voxpopuli ...

The weights are a local folder in transformers' format or a name on the Hugging Face Hub. An embedding is the mean over
time of the last layer, over whole clips. AST takes inputs of a fixed length, so longer clips are cut into pieces; its
bands are averaged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hear_encoders.checks import check_audio

WAVEFORM_TYPES = ("wav2vec2", "wavlm", "hubert")
AST_TYPE = "audio-spectrogram-transformer"
AST_WINDOW_MS, AST_HOP_MS = 25, 10  # of AST's mel frames
AST_EXTRA_TOKENS = 2  # cls and distillation


class Peer(nn.Module):
    """A pretrained encoder and its feature extractor.

    Args:
        model: of transformers.
        extractor: the feature extractor saved with it.
    """

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        super().__init__()
        self.model = model
        self.extractor = extractor
        self.sample_rate = extractor.sampling_rate
        self.scene_embedding_size = self.timestamp_embedding_size = model.config.hidden_size

    @torch.inference_mode()
    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return the mean over time steps: (B, samples) -> (B, D), on the audio's device."""
        return self.timestamp_embeddings(audio)[0].mean(1)

    @torch.inference_mode()
    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's time steps, (B, T, D), and their centers (B, T) in milliseconds."""
        batch = check_audio(audio)
        steps = self._ast_steps if self.model.config.model_type == AST_TYPE else self._waveform_steps
        embeddings, times = steps(batch)
        return embeddings.float().to(audio.device), times.expand(len(batch), -1).to(audio.device)

    def _encode(self, clips: Tensor) -> Tensor:
        """Return the last layer: (B, samples) -> (B, tokens, D)."""
        inputs = self.extractor(list(clips.cpu().numpy()), sampling_rate=self.sample_rate, return_tensors="pt")
        return self.model(inputs["input_values"].to(self.model.device)).last_hidden_state

    def _waveform_steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        stride, window = 1, 1  # of the convolutions together, in samples
        for kernel, step in zip(config.conv_kernel, config.conv_stride):
            window += (kernel - 1) * stride
            stride *= step
        audio = nn.functional.pad(audio, (0, max(0, window - audio.shape[1])))
        embeddings = self._encode(audio)
        times = (torch.arange(embeddings.shape[1]) * stride + window / 2) * (1000 / self.sample_rate)
        return embeddings, times

    def _ast_steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        per_ms = self.sample_rate // 1000
        columns = (config.max_length - config.patch_size) // config.time_stride + 1
        step_ms = config.time_stride * AST_HOP_MS
        first_ms = ((config.patch_size - 1) * AST_HOP_MS + AST_WINDOW_MS) / 2  # center of the first patch
        # Pieces overlap so that time steps stay evenly spaced.
        piece = ((config.max_length - 1) * AST_HOP_MS + AST_WINDOW_MS) * per_ms
        hop_ms = columns * step_ms
        duration_ms = audio.shape[1] / per_ms
        steps = max(1, math.ceil((duration_ms - first_ms) / step_ms))  # whose centers are in the clip
        pieces = []
        for start in range(0, math.ceil(steps / columns) * hop_ms * per_ms, hop_ms * per_ms):
            clip = audio[:, start : start + piece]
            clip = nn.functional.pad(clip, (0, max(0, AST_WINDOW_MS * per_ms - clip.shape[1])))
            tokens = self._encode(clip)[:, AST_EXTRA_TOKENS:]  # band by band
            pieces.append(tokens.unflatten(1, (-1, columns)).mean(1))  # (B, columns, D)
        times = torch.arange(steps) * float(step_ms) + first_ms
        return torch.cat(pieces, dim=1)[:, :steps], times


def load_model(model_file_path: str = "") -> Peer:
    """Load a model.

    Args:
        model_file_path: a folder in transformers' format, or a name on the Hugging Face Hub.

    Raises:
        ValueError: no model was named, or one of another type.
        ModuleNotFoundError: transformers is not installed.
    """
    if not model_file_path:
        raise ValueError("name a model: a folder, or a name on the Hugging Face Hub (--weights)")
    try:
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install '.[peers]'") from error
    kind = AutoConfig.from_pretrained(model_file_path).model_type
    if kind not in (*WAVEFORM_TYPES, AST_TYPE):
        raise ValueError(f"{model_file_path} is of type {kind!r}; expected {', '.join((*WAVEFORM_TYPES, AST_TYPE))}")
    model = AutoModel.from_pretrained(model_file_path)
    return Peer(model, AutoFeatureExtractor.from_pretrained(model_file_path)).eval()


def get_scene_embeddings(audio: Tensor, model: Peer) -> Tensor:
    """Return one embedding per clip: (clips, samples) -> (clips, size)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: Peer) -> tuple[Tensor, Tensor]:
    """Return an embedding per time step, (clips, steps, size), and timestamps (clips, steps) in milliseconds."""
    return model.timestamp_embeddings(audio)
