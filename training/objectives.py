"""Pretraining models, which predict masked patches, and their loss.

There are two objectives. `MaskedAutoencoder` (AudioMAE++ section 2.2; MAE) drops most patches: the encoder sees the
rest, and a decoder puts them back in order among mask tokens and predicts the dropped ones. `MaskedModel` (AxLSTM
section 2.2; SSAST) replaces masked patches by a mask token: the encoder sees all, and a small head predicts.

Shape letters: B clips, N patches of a clip, K visible patches, P values of a patch, D encoder channels, E decoder
channels.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hear_encoders.config import EncoderConfig, TransformerConfig
from hear_encoders.nn.build import ENCODER_OF_CONFIG
from hear_encoders.nn.patches import patchify, sincos_1d
from hear_encoders.nn.transformer import NORM_EPS, PlainBlock, TransformerPlusPlusBlock, initialize_transformer
from training.config import LossOn, RunConfig
from training.flops import count_flop
from training.masking import Masking, visible_count


class Prediction(NamedTuple):
    """The output of a pretraining model."""

    loss: Tensor  # () float32, mean squared error of the masked patches, or of all (`RunConfig.loss_on`)
    patches: Tensor  # (B, N, P) float32, predicted values of all patches


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of the masked patches (both papers, section 2.2).

    Args:
        prediction, target: (B, N, P).
        mask: (B, N) float, 1 where masked.
    """
    error = (prediction.float() - target.float()).square().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


def pretraining_loss(prediction: Tensor, target: Tensor, mask: Tensor, loss_on: LossOn) -> Tensor:
    """Return `masked_loss`, or the mean squared error of all patches."""
    return masked_loss(prediction, target, torch.ones_like(mask) if loss_on == "all" else mask)


class Decoder(nn.Module):
    """A masked autoencoder's decoder: puts patches back in order among mask tokens and predicts all of them.

    Args:
        encoder_dim: channels of the encoder's tokens.
        config: the decoder's blocks; its patch grid is the encoder's.
    """

    def __init__(self, encoder_dim: int, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        patches = config.patches
        self.project = nn.Linear(encoder_dim, config.dim)
        self.mask_token = nn.Parameter(torch.empty(config.dim))
        table = F.pad(sincos_1d(torch.arange(patches.patches, device="cpu"), config.dim), (0, 0, 1, 0)).float()
        if config.position_table == "none":
            table.zero_()
        self.register_buffer("position_table", table, persistent=False)  # (1 + N, E); zeros for cls
        block = TransformerPlusPlusBlock if config.family == "audiomaepp" else PlainBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.predict = nn.Linear(config.dim, patches.patch_size)

    def forward(self, encoded: Tensor, restore: Tensor) -> Tensor:
        """Predict all patches: (B, 1 + K, D), (B, N) -> (B, N, P)."""
        x = self.project(encoded)
        batch, visible, dim = x.shape
        masks = self.mask_token.to(x.dtype).expand(batch, restore.shape[1] - (visible - 1), dim)
        shuffled = torch.cat([x[:, 1:], masks], dim=1)  # (B, N, E)
        patches = shuffled.gather(1, restore[..., None].expand(-1, -1, dim))
        x = torch.cat([x[:, :1], patches], dim=1) + self.position_table  # (B, 1 + N, E)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))[:, 1:]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize like the encoder: xavier-uniform linears, zero biases, the mask token normal with std 0.02."""
        initialize_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)


class MaskedAutoencoder(nn.Module):
    """AudioMAE++ and MAE: the encoder sees only the visible patches.

    Args:
        config: the encoder's config.
        decoder: the decoder's blocks.
        loss_on, shuffled_rope: see `RunConfig`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        decoder: TransformerConfig,
        loss_on: LossOn = "masked",
        shuffled_rope: bool = False,
    ) -> None:
        super().__init__()
        self.loss_on, self.shuffled_rope = loss_on, shuffled_rope
        self.encoder = ENCODER_OF_CONFIG[type(config)](config)
        self.decoder = Decoder(config.dim, decoder)

    def forward(self, logmel: Tensor, masking: Masking) -> Prediction:
        """Predict the patches of normalized log-mel (B, frames, bands)."""
        tokens = self.encoder.embed(logmel)  # (B, N, D)
        visible = tokens.gather(1, masking.keep[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, K, D)
        positions = None if self.shuffled_rope else masking.keep
        encoded = self.encoder.encode(visible, positions)  # (B, 1 + K, D)
        prediction = self.decoder(encoded, masking.restore).float()
        target = patchify(logmel, self.encoder.config.patches)
        return Prediction(pretraining_loss(prediction, target, masking.mask, self.loss_on), prediction)

    def reset_parameters(self) -> None:
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()


class MaskedModel(nn.Module):
    """AxLSTM and SSAST: the encoder sees all patches, the masked ones as a mask token.

    Args:
        config: the encoder's config.
        mask_positions: add to each mask token the position of the patch that it replaces. Text (AxLSTM section 2.2)
            and released code replace the patch and its position by the bare mask token: attention, which sees
            positions in no other way, then predicts the same for all masked patches of a clip.
        loss_on: see `RunConfig`.
    """

    def __init__(self, config: EncoderConfig, mask_positions: bool = True, loss_on: LossOn = "masked") -> None:
        super().__init__()
        self.mask_positions, self.loss_on = mask_positions, loss_on
        self.encoder = ENCODER_OF_CONFIG[type(config)](config)
        self.mask_token = nn.Parameter(torch.empty(config.dim))
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, config.patches.patch_size)
        )

    def forward(self, logmel: Tensor, masking: Masking) -> Prediction:
        """Predict the patches of normalized log-mel (B, frames, bands)."""
        tokens = self.encoder.embed(logmel)  # (B, N, D), positions added
        masks = self.mask_token + self.encoder.position_table if self.mask_positions else self.mask_token
        tokens = torch.where(masking.mask[..., None] > 0, masks.to(tokens.dtype), tokens)
        prediction = self.head(self.encoder.encode(tokens)[:, 1:]).float()
        target = patchify(logmel, self.encoder.config.patches)
        return Prediction(pretraining_loss(prediction, target, masking.mask, self.loss_on), prediction)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.encoder.reset_parameters()
        initialize_transformer(self.head)
        nn.init.normal_(self.mask_token, std=0.02)


def build_model(config: RunConfig) -> MaskedAutoencoder | MaskedModel:
    """Build a run's pretraining model, initialized from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.decoder is not None:
            model = MaskedAutoencoder(config.encoder, config.decoder_blocks(), config.loss_on, config.shuffled_rope)
        else:
            model = MaskedModel(config.encoder, config.mask_positions, config.loss_on)
        model.reset_parameters()
    return model


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass runs in a precision of `RunConfig`."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def count_clip_flop(config: RunConfig) -> int:
    """Count the FLOPs of training on one clip, forward and backward, without computing anything."""
    patches = config.encoder.patches
    visible = visible_count(patches.patches, config.mask_ratio)
    with FakeTensorMode():
        model = build_model(config)
        logmel = torch.empty(1, patches.chunk_frames, patches.bands)
        order = torch.empty(1, patches.patches, dtype=torch.int64)
        masking = Masking(torch.empty(1, patches.patches), order[:, :visible], order)
        return count_flop(lambda: model(logmel, masking).loss.backward())
