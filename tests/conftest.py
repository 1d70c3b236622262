"""Fixtures that more than one test file uses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

# `training` is not installed: it is taken from the checkout, after everything that is.
sys.path.append(str(Path(__file__).parents[1]))

from hear_encoders import AxLSTMConfig, Embedder, TransformerConfig, build_encoder

# Small tensors gain nothing from threads, and on a machine that is shared they wait for each other: the tests of
# the mLSTM cell alone take 5 s on one thread, and minutes on two of two busy cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """Load a golden file: golden(name) -> its tensors, and the released configuration it was made with."""

    def load(name: str) -> tuple[dict[str, Tensor], dict]:
        path = GOLDEN / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata.get("config", "{}"))

    return load


SMALL_CONFIGS = {
    "audiomaepp": TransformerConfig("audiomaepp", dim=48, depth=2, heads=3),
    "audiomaepp_rope": TransformerConfig("audiomaepp", dim=48, depth=2, heads=3, rope="patch"),
    "ssast": TransformerConfig("ssast", dim=48, depth=2, heads=3),
    "axlstm": AxLSTMConfig("axlstm", dim=48, depth=2),
    "axlstm_flip": AxLSTMConfig("axlstm", dim=48, depth=2, flip=True),
}


@pytest.fixture(params=list(SMALL_CONFIGS))
def small_encoder(request):
    """One small encoder of every kind, with weights of a fixed seed."""
    return build_encoder(SMALL_CONFIGS[request.param], seed=1).eval()


@pytest.fixture
def small_embedder():
    """Build an embedder on a small encoder: small_embedder("axlstm", max_segments=2)."""

    def build(kind: str = "audiomaepp", **options) -> Embedder:
        return Embedder(build_encoder(SMALL_CONFIGS[kind], seed=1).eval(), **options)

    return build


@pytest.fixture
def noise():
    """White noise in [-1, 1] of a fixed seed: noise(clips, samples)."""

    def make(clips: int, samples: int, seed: int = 0) -> Tensor:
        return 2 * torch.rand(clips, samples, generator=torch.Generator().manual_seed(seed)) - 1

    return make
