"""Our models in mteb, whose audio tasks are MAEB (extra `mteb`).

`mteb.evaluate(axlstm_tiny, tasks)` evaluates the bundled weights, `mteb.evaluate(AudioEncoder(model), tasks)` any model
from `load_model`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from hear_encoders import __version__
from hear_encoders.checkpoint import fingerprint
from hear_encoders.config import EncoderConfig, read_config
from hear_encoders.embedder import Embedder
from hear_encoders.hear import HearModule
from hear_encoders.hub import CONFIG_FILE
from hear_encoders.nn.build import ENCODER_OF_CONFIG

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("mteb is missing: pip install 'hear-audiomaepp[mteb]'") from error

HOMEPAGE = "https://pypi.org/project/hear-audiomaepp/"


class AudioEncoder(AbsEncoder):
    """A model from `load_model` as mteb's encoder: each clip's scene embedding.

    Args:
        model: from `load_model`.
        name: "org/name" that mteb files results under, together with a fingerprint of the weights. None: our name
            and the encoder's family. Options of `load_model` are not part of either.
    """

    def __init__(self, model: Embedder, name: str | None = None) -> None:
        self.model = model
        config = model.encoder.config
        metadata = _metadata(
            config,
            name=name or f"hear-audiomaepp/{config.family}",
            revision=fingerprint(model.encoder)[:16],
            embed_dim=model.scene_embedding_size,
        )
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=metadata)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed the batches of a data loader.

        Args:
            inputs: each batch has a list "audio" of rows with "array" and "sampling_rate", or of torchcodec decoders.

        Returns:
            (clips, E) float32.

        Raises:
            ValueError: a batch without audio.
        """
        show = kwargs.get("show_progress_bar", False)
        return self.model.encode((clip for batch in inputs for clip in _audio(batch)), show_progress_bar=show)


def _audio(batch: Mapping[str, Any]) -> list[Any]:
    if set(batch) & {"text", "image", "video"} or "audio" not in batch:
        raise ValueError(f"only audio can be embedded, got a batch with {', '.join(map(str, batch))}")
    return [_mono(clip) for clip in batch["audio"]]


def _mono(clip: Any) -> Any:
    """Average a row's channels (channels, samples). torchcodec's decoders stay as they are."""
    if not isinstance(clip, Mapping):
        return clip
    array = np.asarray(clip["array"])
    return {**clip, "array": array.mean(0) if array.ndim == 2 else array}


class _BundledMeta(ModelMeta):
    def load_model(self, device: str | None = None, *, embed_dim: int | None = None, **options: Any) -> AudioEncoder:
        """Load the model, with options of `load_model`.

        mteb's own method asks for torchaudio wherever there is audio. `AudioEncoder` does not need it, and torchaudio
        does not import beside CPU-only builds of PyTorch.
        """
        if embed_dim not in (None, self.embed_dim):
            raise ValueError(f"embeddings have {self.embed_dim} dimensions, got embed_dim={embed_dim}")
        assert self.loader is not None
        model = self.loader(self.name, self.revision, device=device, **options)
        model.mteb_model_meta = self.model_copy(update={"experiment_kwargs": options or None})
        return model


def _metadata(config: EncoderConfig, **fields: Any) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in ENCODER_OF_CONFIG[type(config)](config).parameters())
    return {
        "loader": None,
        "n_parameters": parameters,
        "n_embedding_parameters": 0,
        "memory_usage_mb": round(4 * parameters / 2**20),
        "max_tokens": float("inf"),
        "embed_dim": config.patches.rows * config.dim,
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": False,
        "modalities": ["audio"],
        **fields,
    }


def _hear_module(name: str) -> HearModule:
    return importlib.import_module(name).MODULE


def _bundled_meta(module: str, name: str) -> ModelMeta:
    """Return the metadata of the weights that come with the package."""

    def load(name: str, revision: str | None, device: str | None = None, **options: Any) -> AudioEncoder:
        """Load the model as mteb asks for it. Options are those of `load_model`."""
        return AudioEncoder(_hear_module(module).load_model(device=device or "auto", **options), name)

    metadata = _metadata(
        read_config(_hear_module(module).bundled / CONFIG_FILE),
        loader=load,
        name=f"hear-audiomaepp/{name}",
        revision=__version__,
        license="apache-2.0",
        open_weights=True,
        public_training_code=HOMEPAGE,
        public_training_data=True,
        training_datasets=set(),
        reference=HOMEPAGE,
    )
    return _BundledMeta.create_empty(overwrites=metadata)


audiomaepp_tiny = _bundled_meta("hear_audiomaepp", "audiomaepp-tiny")
axlstm_tiny = _bundled_meta("hear_axlstm", "axlstm-tiny")
