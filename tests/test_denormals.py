"""Denormal numbers, which slow a CPU many times over, do not arise: silence takes no longer than sound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hear_audiomaepp
import hear_axlstm

SAMPLES = 16000
SOUNDS = {
    "silence": torch.zeros(SAMPLES),
    "a constant": torch.full((SAMPLES,), 0.5),
    "a click in silence": torch.cat([torch.ones(1), torch.zeros(SAMPLES - 1)]),
    "inaudible noise": 1e-30 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)),
}


class Denormals(TorchDispatchMode):
    """Count the numbers that torch's operations return, and the denormal ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.denormal = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
                continue
            if "empty" in str(function):
                tensor.zero_()  # uninitialized memory is no result
            magnitude = tensor.abs()
            self.numbers += tensor.numel()
            self.denormal += int(((magnitude > 0) & (magnitude < torch.finfo(tensor.dtype).tiny)).sum())
        return result


@pytest.mark.parametrize("sound", SOUNDS)
@pytest.mark.parametrize("package", [hear_audiomaepp, hear_axlstm])
def test_no_sound_makes_denormal_numbers(package, sound):
    model = package.load_model()
    with Denormals() as counted:
        model.timestamp_embeddings(SOUNDS[sound])
    # The power spectrum of inaudible noise has a few.
    assert counted.numbers > 1e6 and counted.denormal <= (10 if sound == "inaudible noise" else 0)


@pytest.mark.parametrize("sound", ["silence", "a constant", "a click in silence"])
def test_no_sound_makes_denormal_numbers_in_a_stream(sound):
    stream = hear_axlstm.stream(hear_axlstm.load_model(statistics=(-6.0, 3.5)))
    with Denormals() as counted:
        for block in SOUNDS[sound].split(4000):
            stream.push(block)
    assert counted.numbers > 1e6 and counted.denormal == 0


@pytest.mark.parametrize(("gate_i", "gate_f"), [(20.0, -20.0), (0.0, -8.0), (-90.0, 90.0)])
def test_extreme_gates_make_hardly_any_denormal_numbers(gate_i, gate_f):
    model = hear_axlstm.load_model()
    for block in model.encoder.blocks:
        block.gate_i.bias.data += gate_i
        block.gate_f.bias.data += gate_f
    with Denormals() as counted:
        model.timestamp_embeddings(SOUNDS["silence"])
    assert counted.denormal < 3e-4 * counted.numbers  # logarithms of the gates, a few numbers per token
