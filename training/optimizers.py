"""A run's optimizers: AdamW as in the papers, or Muon, which needs far fewer optimizer steps at small batches.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalizes a matrix's momentum before adding it. torch scales the
update to the size of AdamW's, so both share a learning rate and weight decay.
"""

from __future__ import annotations

import torch
from torch import nn

from training.config import RunConfig

# Muon takes matrices whose smaller side is at least this: not gates (a row per head) and convolution kernels.
_LEAST_SIDE = 8


def build_optimizers(model: nn.Module, config: RunConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Build a run's optimizers: AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    One-dimensional parameters (biases, norms, tokens) have no weight decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon_names = {
        name
        for name, p in named
        if config.optimizer == "muon" and "blocks." in name and p.ndim == 2 and min(p.shape) >= _LEAST_SIDE
    }
    rest = [p for name, p in named if name not in muon_names]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type == "cuda")
    ]
    if muon_names:
        matrices = [p for name, p in named if name in muon_names]
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers
