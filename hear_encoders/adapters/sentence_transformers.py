"""Our encoders as models of sentence-transformers (extra `sentence-transformers`).

`SentenceTransformer(folder, trust_remote_code=True)` finds `AudioModule` through the `modules.json` that
`hear_encoders.adapters.folder` writes. `SentenceTransformer(modules=[AudioModule(load_model())])` needs no folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hear_encoders.adapters.folder import save_folder
from hear_encoders.checkpoint import load_checkpoint
from hear_encoders.clips import as_clip
from hear_encoders.embedder import Embedder
from hear_encoders.hub import CONFIG_FILE, WEIGHTS_FILE

try:
    from sentence_transformers.base.modules import InputModule
except ModuleNotFoundError as error:
    message = "sentence-transformers is missing: pip install 'hear-audiomaepp[sentence-transformers]'"
    raise ModuleNotFoundError(message) from error


class AudioModule(InputModule):
    """A model from `load_model` as the only module of a SentenceTransformer: paths and arrays to scene embeddings."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    @property
    def modalities(self) -> list[str]:
        return ["audio"]

    def get_embedding_dimension(self) -> int:
        return self.embedder.scene_embedding_size

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Decode clips and pad them.

        Args:
            inputs: clips as for `Embedder.encode`, also as `{"audio": clip}`.

        Returns:
            "input_values" (B, samples) and "lengths" (B,), each clip's samples.

        Raises:
            ValueError: a prompt was given. Other errors are those of `Embedder.encode`.
        """
        if prompt:
            raise ValueError(f"audio is embedded without a prompt, got {prompt!r}")
        clips = []
        for place, given in enumerate(inputs):
            clip = given["audio"] if isinstance(given, dict) and set(given) == {"audio"} else given
            clips.append(as_clip(clip, f"inputs[{place}]").load()[0])
        return {
            "input_values": pad_sequence(clips, batch_first=True),
            "lengths": torch.tensor([len(clip) for clip in clips]),
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add "sentence_embedding" (B, E), with gradients where they are enabled; else as `Embedder.encode`."""
        audio, lengths = features["input_values"], features["lengths"].tolist()
        if torch.is_grad_enabled():
            scenes = self.embedder.pool(self.embedder(audio, lengths), lengths)
        else:
            clips = [clip[:samples] for clip, samples in zip(audio, lengths)]
            scenes = torch.from_numpy(self.embedder.encode(clips, show_progress_bar=False)).to(audio.device)
        return {**features, "sentence_embedding": scenes}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the checkpoint, without the model's options such as `layer`."""
        save_folder(output_path, self.embedder.encoder)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> AudioModule:
        """Load a folder or a Hub repository.

        Args:
            model_kwargs: options of `Embedder`, such as `{"pooling": "mean_std"}`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: a damaged checkpoint, or an invalid option.
        """
        paths = [
            cls.load_file_path(
                model_name_or_path, name, subfolder, token, cache_folder, revision, local_files_only=local_files_only
            )
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
        if None in paths:
            raise FileNotFoundError(f"{model_name_or_path}: expected {CONFIG_FILE} and {WEIGHTS_FILE}")
        return cls(Embedder(load_checkpoint(Path(str(paths[1]))), **(model_kwargs or {})).eval())
