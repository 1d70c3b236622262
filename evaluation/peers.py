"""A HEAR module of models that the papers compare with, through the packages that load them.

    .heareval/bin/pip install -c constraints.txt transformers
    python -m evaluation run --module evaluation.peers --weights facebook/wav2vec2-large-100k-voxpopuli ...

--weights                                             models                          package
folder in transformers' format, or name on the Hub    wav2vec 2.0, WavLM, HuBERT,     transformers
                                                      AST, SSAST as an AST
folder in timm's format, or hf-hub:NAME               AudioMAE                        timm and transformers
BEATs' checkpoint, NAME.pt                            BEATs                           speechbrain
passt                                                 PaSST                           hear21passt

The last three need torchaudio or torchvision: `.heareval/bin/pip install -r evaluation/peers-requirements.txt`.

An embedding is the mean over time of the last layer, over whole clips. Models that take inputs of a fixed length get
longer clips in pieces. Patches of one time in several bands are averaged. PaSST's are those of hear21passt.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hear_encoders.checks import check_audio
from hear_encoders.files import read_json

WAVEFORM_TYPES = ("wav2vec2", "wavlm", "hubert")
AST_TYPE = "audio-spectrogram-transformer"
SAMPLE_RATE = 16_000
WINDOW_MS, HOP_MS = 25, 10  # of the mel frames of AST, AudioMAE and BEATs
PATCH_FRAMES = 16
FIRST_MS = ((PATCH_FRAMES - 1) * HOP_MS + WINDOW_MS) / 2  # center of the first patch
AST_EXTRA_TOKENS = 2  # cls and distillation
PASST, PASST_RATE = "passt", 32_000
REQUIREMENTS = "evaluation/peers-requirements.txt"


class Peer(nn.Module):
    """A pretrained encoder. Subclasses implement `steps`.

    Args:
        model: the encoder.
        size: of an embedding.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.scene_embedding_size = self.timestamp_embedding_size = size

    def steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return time steps (B, T, D), and their centers (T,) or (B, T) in milliseconds."""
        raise NotImplementedError

    @torch.inference_mode()
    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return the mean over time steps: (B, samples) -> (B, D), on the audio's device."""
        return self.timestamp_embeddings(audio)[0].mean(1)

    @torch.inference_mode()
    def timestamp_embeddings(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's time steps, (B, T, D), and their centers (B, T) in milliseconds."""
        batch = check_audio(audio)
        embeddings, times = self.steps(batch)
        return embeddings.float().to(audio.device), times.expand(len(batch), -1).to(audio.device)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device


class WaveformPeer(Peer):
    """wav2vec 2.0, WavLM or HuBERT, and the feature extractor saved with it, both of transformers."""

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        super().__init__(model, model.config.hidden_size)
        self.extractor, self.sample_rate = extractor, extractor.sampling_rate

    def steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's time steps, a step per 20 ms."""
        config = self.model.config
        stride, window = 1, 1  # of the convolutions together, in samples
        for kernel, step in zip(config.conv_kernel, config.conv_stride):
            window += (kernel - 1) * stride
            stride *= step
        audio = nn.functional.pad(audio, (0, max(0, window - audio.shape[1])))
        inputs = self.extractor(list(audio.cpu().numpy()), sampling_rate=self.sample_rate, return_tensors="pt")
        embeddings = self.model(inputs["input_values"].to(self.device)).last_hidden_state
        times = (torch.arange(embeddings.shape[1]) * stride + window / 2) * (1000 / self.sample_rate)
        return embeddings, times


class SpectrogramPeer(Peer):
    """A vision transformer on mel frames of a fixed number.

    Args:
        model: the encoder.
        size: of an embedding.
        extractor: transformers' feature extractor of AST, which makes the frames.
        time_stride: frames from one patch to the next.
    """

    def __init__(self, model: nn.Module, size: int, extractor: Any, time_stride: int) -> None:
        super().__init__(model, size)
        self.extractor, self.time_stride = extractor, time_stride
        self.columns = (extractor.max_length - PATCH_FRAMES) // time_stride + 1

    def encode(self, frames: Tensor) -> Tensor:
        """Return the last layer, averaged over bands: (B, frames, bands) -> (B, columns, D)."""
        raise NotImplementedError

    def steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step per column of patches whose center is in the clip."""
        per_ms = self.sample_rate // 1000
        step_ms = self.time_stride * HOP_MS
        # Pieces overlap so that time steps stay evenly spaced.
        piece = ((self.extractor.max_length - 1) * HOP_MS + WINDOW_MS) * per_ms
        hop_ms = self.columns * step_ms
        steps = max(1, math.ceil((audio.shape[1] / per_ms - FIRST_MS) / step_ms))
        pieces = []
        for start in range(0, math.ceil(steps / self.columns) * hop_ms * per_ms, hop_ms * per_ms):
            clip = audio[:, start : start + piece]
            clip = nn.functional.pad(clip, (0, max(0, WINDOW_MS * per_ms - clip.shape[1])))
            frames = self.extractor(list(clip.cpu().numpy()), sampling_rate=self.sample_rate, return_tensors="pt")
            pieces.append(self.encode(frames["input_values"].to(self.device)))
        times = torch.arange(steps) * float(step_ms) + FIRST_MS
        return torch.cat(pieces, dim=1)[:, :steps], times


class ASTPeer(SpectrogramPeer):
    """AST, or SSAST's weights in its format, of transformers."""

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        config = model.config
        if config.patch_size != PATCH_FRAMES:
            raise ValueError(f"expected an AST with patches of {PATCH_FRAMES} frames, got {config.patch_size}")
        super().__init__(model, config.hidden_size, extractor, config.time_stride)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the last layer, averaged over bands: (B, frames, bands) -> (B, columns, D)."""
        tokens = self.model(frames).last_hidden_state[:, AST_EXTRA_TOKENS:]  # band by band
        return tokens.unflatten(1, (-1, self.columns)).mean(1)


class AudioMAEPeer(SpectrogramPeer):
    """AudioMAE's encoder as a vision transformer of timm, on AST's frames, whose constants are AudioMAE's too."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import ASTFeatureExtractor

        patch = model.patch_embed
        if patch.patch_size[0] != PATCH_FRAMES or model.patch_embed.proj.in_channels != 1:
            raise ValueError(f"expected a vision transformer on one channel with patches of {PATCH_FRAMES} frames")
        frames, bands = patch.img_size
        extractor = ASTFeatureExtractor(max_length=frames, num_mel_bins=bands)
        super().__init__(model, model.num_features, extractor, PATCH_FRAMES)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the last layer, normalized and averaged over bands: (B, frames, bands) -> (B, columns, D)."""
        tokens = self.model.forward_features(frames[:, None])[:, self.model.num_prefix_tokens :]  # column by column
        return self.model.fc_norm(tokens).unflatten(1, (self.columns, -1)).mean(2)


class BEATsPeer(Peer):
    """BEATs, of speechbrain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, model.cfg.encoder_embed_dim)

    def steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step per 160 ms."""
        shortest = ((PATCH_FRAMES - 1) * HOP_MS + WINDOW_MS) * self.sample_rate // 1000
        audio = nn.functional.pad(audio, (0, max(0, shortest - audio.shape[1])))
        whole = torch.ones(len(audio), device=self.device)  # relative lengths
        tokens = self.model.extract_features(audio.to(self.device), whole)[0]  # (B, patches, D), column by column
        rows = 128 // self.model.input_patch_size
        embeddings = tokens.unflatten(1, (-1, rows)).mean(2)
        times = torch.arange(embeddings.shape[1]) * float(PATCH_FRAMES * HOP_MS) + FIRST_MS
        return embeddings, times


class PaSSTPeer(Peer):
    """PaSST, as hear21passt makes embeddings, from audio at 16 kHz."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, model.scene_embedding_size)

    def _resample(self, audio: Tensor) -> Tensor:
        import soxr

        resampled = soxr.resample(audio.cpu().numpy().T, self.sample_rate, PASST_RATE)
        return torch.from_numpy(resampled.reshape(-1, len(audio)).T.copy())

    def steps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step per 50 ms."""
        shortest_ms = 2 * 80 + 1  # hear21passt mirrors half a window of 160 ms at both ends
        audio = nn.functional.pad(audio, (0, max(0, shortest_ms * self.sample_rate // 1000 - audio.shape[1])))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints shapes
            return self.model.get_timestamp_embeddings(self._resample(audio))

    @torch.inference_mode()
    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return hear21passt's scene embeddings: (B, samples) -> (B, D), on the audio's device."""
        batch = self._resample(check_audio(audio))
        with contextlib.redirect_stdout(io.StringIO()):
            return self.model.get_scene_embeddings(batch).float().to(audio.device)


def load_model(model_file_path: str = "") -> Peer:
    """Load a model.

    Args:
        model_file_path: see the table above.

    Raises:
        ValueError: no model was named, or one of another type.
        ModuleNotFoundError: its package is not installed.
    """
    if not model_file_path:
        raise ValueError("name a model: a folder, a file, or a name on the Hugging Face Hub (--weights)")
    path = Path(model_file_path)
    try:
        if model_file_path == PASST:
            return _load_passt()
        if path.suffix == ".pt":
            from speechbrain.lobes.models.beats import BEATs

            return BEATsPeer(BEATs(model_file_path)).eval()
        if model_file_path.startswith("hf-hub:") or _is_timm(path):
            import timm

            name = f"local-dir:{path}" if path.is_dir() else model_file_path
            return AudioMAEPeer(timm.create_model(name, pretrained=True, num_classes=0)).eval()
        return _load_transformers(model_file_path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; pip install '.[peers]', or -r {REQUIREMENTS} for timm and others"
        ) from error


def _is_timm(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "architecture" in read_json(config)


def _load_transformers(name: str) -> Peer:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in (*WAVEFORM_TYPES, AST_TYPE):
        raise ValueError(f"{name} is of type {kind!r}; expected {', '.join((*WAVEFORM_TYPES, AST_TYPE))}")
    model, extractor = AutoModel.from_pretrained(name), AutoFeatureExtractor.from_pretrained(name)
    return (ASTPeer if kind == AST_TYPE else WaveformPeer)(model, extractor).eval()


def _load_passt() -> Peer:
    from hear21passt.base import load_model

    with contextlib.redirect_stdout(io.StringIO()):
        return PaSSTPeer(load_model()).eval()


def get_scene_embeddings(audio: Tensor, model: Peer) -> Tensor:
    """Return one embedding per clip: (clips, samples) -> (clips, size)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: Peer) -> tuple[Tensor, Tensor]:
    """Return an embedding per time step, (clips, steps, size), and timestamps (clips, steps) in milliseconds."""
    return model.timestamp_embeddings(audio)
