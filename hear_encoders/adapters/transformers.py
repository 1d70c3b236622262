"""Our encoders as models of transformers (extra `transformers`).

`AutoModel.from_pretrained(folder, trust_remote_code=True)` finds these classes through `modeling_hear.py`, which
`hear_encoders.adapters.folder` puts beside the weights.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import Any

from torch import Tensor

from hear_encoders.checkpoint import encoder_from_tensors
from hear_encoders.config import CONFIG_OF_FAMILY, EncoderConfig, config_from_dict
from hear_encoders.embedder import Embedder
from hear_encoders.nn.build import build_encoder

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("transformers is missing: pip install 'hear-audiomaepp[transformers]'") from error

_PREFIX = "encoder."  # of tensors of `HearModel`, compared with those of a checkpoint


class HearConfig(PreTrainedConfig):
    """Our `config.json` with what transformers adds to it."""

    model_type = "hear_encoder"

    @property
    def encoder_config(self) -> EncoderConfig:
        """Our part of it."""
        cls = CONFIG_OF_FAMILY[self.family]
        values = {field.name: getattr(self, field.name) for field in fields(cls) if hasattr(self, field.name)}
        return config_from_dict(values, self.name_or_path or "config")

    @property
    def hidden_size(self) -> int:
        """E, the size of an embedding: rows of patches times channels of a token."""
        return self.encoder_config.patches.rows * self.encoder_config.dim


class HearModel(PreTrainedModel):
    """An encoder with its front end, from padded waveforms to embeddings. Its weights stay float32."""

    config_class = HearConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    input_modalities = ("audio",)

    def __init__(self, config: HearConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_config)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Do nothing: `build_encoder` initializes, and `from_pretrained` needs every tensor."""

    @cached_property
    def _embedder(self) -> Embedder:
        # Not a submodule, since it holds `self.encoder` once more.
        return Embedder(self.encoder)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint strictly. Arguments are those of transformers.

        Raises:
            ValueError: a tensor is missing, unexpected, of the wrong shape, or not finite.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        source = model.config.name_or_path
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(info[kind]):
                raise ValueError(f"{source}: {kind.replace('_', ' ')} {', '.join(map(str, names))}")
        # transformers does not restore buffers that are not in the checkpoint.
        encoder = encoder_from_tensors(model.config.encoder_config, model.encoder.state_dict(), source)
        model.encoder = encoder.to(model.device)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Save a checkpoint that `load_model` loads, too. Arguments are those of transformers."""
        tensors = self.state_dict() if state_dict is None else state_dict
        kwargs["state_dict"] = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Embed padded clips, with gradients where they are enabled.

        Args:
            input_values: (B, samples) 16 kHz mono in [-1, 1], padded at the end.
            attention_mask: (B, samples), 1 for samples and 0 for padding, in any dtype. None: there is no padding.

        Returns:
            `last_hidden_state` (B, T, E), one embedding per 40 ms, zero where only padding is; and `pooler_output`
            (B, E), the mean over a clip's own steps. Both are what `model(audio, lengths)` and `model.pool` return.

        Raises:
            TypeError, ValueError: not audio, or a mask that is not ones and then zeros.
        """
        lengths = None
        if attention_mask is not None:
            mask = attention_mask.long()  # of booleans and unsigned integers, differences have no sign
            if mask.shape != input_values.shape or (mask.diff(dim=1) > 0).any():
                raise ValueError(
                    f"attention_mask must be {tuple(input_values.shape)}, in each row ones and then zeros: "
                    "pad at the end"
                )
            lengths = mask.sum(1)
        embedder = self._embedder
        embedder.log_mel.to(self.device)
        steps = embedder(input_values, lengths)
        output = BaseModelOutputWithPooling(last_hidden_state=steps, pooler_output=embedder.pool(steps, lengths))
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()
