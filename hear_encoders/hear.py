"""The functions that the two HEAR modules, `hear_audiomaepp` and `hear_axlstm`, share.

The HEAR API (https://hearbenchmark.com/hear-api.html) asks a module for `load_model`, `get_scene_embeddings` and
`get_timestamp_embeddings`. The modules differ in the encoder families they support and in their bundled weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hear_encoders.checkpoint import WEIGHTS_FILE, load_checkpoint, resolve
from hear_encoders.checks import check_choice
from hear_encoders.embedder import Embedder
from hear_encoders.execution import Precision, resolve_device
from hear_encoders.framing import FramingName
from hear_encoders.nn.axlstm import AxLSTMEncoder, EncoderMode
from hear_encoders.nn.frontend_torchaudio import FrontendName
from hear_encoders.pooling import PoolingName


class EmbeddingSetting(NamedTuple):
    """What the option `embedding` stands for: values of `layer` and `pooling`."""

    layer: int | tuple[int, ...] | None = None
    pooling: PoolingName = "mean"


EmbeddingName = Literal["paper", "best"]

EMBEDDINGS = {"paper": EmbeddingSetting(), "best": EmbeddingSetting(pooling="mean_std")}


@dataclass(frozen=True)
class HearModule:
    """One HEAR module.

    Attributes:
        name: the import package.
        families: the encoder families it supports: its own first, then its paper's baselines.
        bundled: the directory of the weights that come with the package.
    """

    name: str
    families: tuple[str, ...]
    bundled: Path

    def load_model(
        self,
        model_file_path: str | os.PathLike[str] = "",
        *,
        revision: str | None = None,
        framing: FramingName | None = None,
        precision: Precision = "auto",
        max_segments: int | None = None,
        statistics: Sequence[float] | None = None,
        embedding: EmbeddingName = "paper",
        layer: int | Sequence[int] | None = None,
        pooling: PoolingName | None = None,
        device: str | torch.device = "cpu",
        mode: EncoderMode | None = None,
        frontend: FrontendName = "own",
        compile: bool = False,
        released: bool = False,
        max_chunks: int | None = None,
    ) -> Embedder:
        """Load a model.

        Args:
            model_file_path: a directory with `config.json` and `model.safetensors`, the `.safetensors` file in it, or
                a Hugging Face Hub repository "org/name". Empty: the weights bundled with the package.
            revision: branch, tag or commit of the Hub repository; None is its default branch.
            framing: "exact", or "reference" for the released code's framing. None is "exact" unless `released`.
            precision: dtype of the encoder's matmuls: "auto", "float32", "bfloat16" or "float16".
            max_segments: 2 s segments per forward pass; bounds memory, does not change the result. None is 8 on a CPU
                and 60 on a GPU.
            statistics: mean and standard deviation of log-mel to normalize with instead of each clip's own.
            embedding: "paper" is the papers' embedding. "best" is the layer and pooling that we recommend for
                downstream tasks, today `pooling="mean_std"`; it may change with the bundled weights.
            layer: embed with the output of this block, counted from 1, as it is; a list concatenates the embeddings of
                several. None: as `embedding` says, and in the papers the last block's output after the final norm.
            pooling: how a clip's time steps become its scene embedding: "mean", as in the papers, or "mean_std", which
                appends their standard deviation and is twice as long. None: as `embedding` says.
            device: "cpu", "cuda", "cuda:1", "mps" and so on; "auto" is a GPU if there is one, else the CPU. `.to`
                moves the model later.
            mode: form of an AxLSTM's mLSTM cell; none changes the result. "auto", also the meaning of None, is the
                fastest on each device. The others are plain forms, for experiments: "parallel" compares all pairs of
                tokens, "chunkwise" does so in chunks and carries a memory between them, and "recurrent" goes token by
                token.
            frontend: "own", or "torchaudio", whose log-mel equals the papers' to the last bit; needs the extra
                `torchaudio`.
            compile: run the encoder through `torch.compile`, which takes a minute or more at the first call. An AxLSTM
                in float32 or bfloat16 on the CPU has a faster form and is not compiled.
            released: embed as the papers' released code does, in reference framing. Its other quirks belong to the
                weights; `hear-weights import` writes them into `config.json`.
            max_chunks: the former name of `max_segments`.

        Returns:
            A `torch.nn.Module` with `sample_rate` (16000 Hz), `scene_embedding_size`,
            `timestamp_embedding_size`. See `hear_encoders.Embedder` for the options in full.

        Raises:
            FileNotFoundError: there are no such weights, or an offline machine does not have them in its cache.
            PermissionError, ConnectionError: the Hub asks for a token, or failed.
            ValueError: a damaged or foreign checkpoint, one of another family, an invalid option, or a device that is
                not there.
        """
        check_choice("embedding", embedding, tuple(EMBEDDINGS))
        if embedding != "paper" and (layer is not None or pooling is not None):
            raise ValueError(f"embedding={embedding!r} selects the layer and the pooling: give it alone, or give these")
        if mode is not None:
            check_choice("mode", mode, get_args(EncoderMode))
        target = resolve_device(device)
        if framing is None:
            framing = "reference" if released else "exact"
        elif released and framing != "reference":
            raise ValueError(f"released=True means framing='reference', got framing={framing!r}")
        if model_file_path:
            source = resolve(model_file_path, revision)
        elif revision is not None:
            raise ValueError(f"revision {revision!r} was given without a Hub repository")
        else:
            source = self.bundled / WEIGHTS_FILE
        encoder = load_checkpoint(source)
        if encoder.config.family not in self.families:
            raise ValueError(f"{source}: holds a model of family {encoder.config.family!r}, {self._supported()}")
        if mode is not None:
            if not isinstance(encoder, AxLSTMEncoder):
                raise ValueError(f"mode is for AxLSTM, but {source} holds a model of family {encoder.config.family!r}")
            encoder.mode = mode
        setting = EMBEDDINGS[embedding]
        embedder = Embedder(
            encoder,
            framing=framing,
            precision=precision,
            max_segments=max_segments if max_chunks is None else max_chunks,
            layer=setting.layer if layer is None else layer,
            statistics=statistics,
            pooling=setting.pooling if pooling is None else pooling,
            frontend=frontend,
            compile=compile,
        )
        return embedder.eval().to(target)

    def get_scene_embeddings(self, audio: Tensor, model: Embedder) -> Tensor:
        """Return one embedding per clip, its time steps' embeddings pooled, without gradients.

        To fine-tune, call `model(audio, lengths)`, which has gradients.

        Args:
            audio: (clips, samples) floating point, 16 kHz mono in [-1, 1].
            model: from this module's `load_model`.

        Returns:
            (clips, model.scene_embedding_size) float32 on the audio's device.

        Raises:
            TypeError: not a tensor of floating-point samples, or not a model.
            ValueError: another shape, audio that is empty or not finite, or a model of another family.
        """
        return self._check(model).scene_embeddings(audio)

    def get_timestamp_embeddings(self, audio: Tensor, model: Embedder) -> tuple[Tensor, Tensor]:
        """Return one embedding per time step of each clip, without gradients.

        Args, Raises: as for `get_scene_embeddings`.

        Returns:
            Embeddings (clips, steps, model.timestamp_embedding_size) and timestamps (clips, steps) in
            milliseconds, float32 on the audio's device. In exact framing, step i has timestamp 40 i + 15 ms.
        """
        return self._check(model).timestamp_embeddings(audio)

    def _check(self, model: Embedder) -> Embedder:
        if not isinstance(model, Embedder):
            raise TypeError(f"model must come from {self.name}.load_model, got {type(model).__name__}")
        if model.encoder.config.family not in self.families:
            raise ValueError(f"the model is of family {model.encoder.config.family!r}, {self._supported()}")
        return model

    def _supported(self) -> str:
        return f"but {self.name} supports {' and '.join(self.families)}"
