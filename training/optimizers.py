"""What turns gradients into steps: AdamW as in the papers, or Muon, which needs far fewer steps at small batches.

Muon (https://kellerjordan.github.io/posts/muon/) makes a matrix's momentum orthogonal before it is added. torch
scales that to the size of an AdamW step, so both share a learning rate and weight decay.
"""

from __future__ import annotations

import torch
from torch import nn

from training.config import RunConfig

# A side of a matrix from which on Muon takes it: below are gates (a row per head) and convolution kernels.
_LEAST_SIDE = 8


def build_optimizers(model: nn.Module, config: RunConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """The optimisers of a run: AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    There is no weight decay on parameters of one dimension (biases, norms, tokens).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    of_muon = {
        name
        for name, p in named
        if config.optimizer == "muon" and "blocks." in name and p.ndim == 2 and min(p.shape) >= _LEAST_SIDE
    }
    rest = [p for name, p in named if name not in of_muon]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type == "cuda")
    ]
    if of_muon:
        matrices = [p for name, p in named if name in of_muon]
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers
