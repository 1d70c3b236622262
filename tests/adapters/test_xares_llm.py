"""Our encoders for XARES-LLM, which is not on PyPI: what its README and its encoder checker ask for.

https://github.com/xiaomi-research/xares-llm, version 0.0.12: `forward(audio, audio_attention_mask)` returns features
(B, T, output_dim) and a mask (B, T), 1 to keep and 0 to leave out; the mask given may be None.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hear_encoders.adapters.xares_llm import AudioMAEppEncoder, AxLSTMEncoder, XaresLLMModel


@pytest.mark.parametrize("encoder", [AudioMAEppEncoder, AxLSTMEncoder])
def test_shapes_are_those_that_the_checker_asks_for(encoder):
    encoder = encoder().eval()
    with torch.no_grad():
        features, mask = encoder(0.1 * torch.randn(3, 50_000), None)
    assert features.shape == (3, mask.shape[1], encoder.output_dim) and mask.all()
    assert next(encoder.parameters()).device.type == "cpu"


def test_steps_of_padding_are_masked_and_the_others_are_the_clips_own(small_embedder, noise):
    ours = small_embedder("axlstm")
    clips = [noise(1, samples, seed=samples)[0] for samples in (20_000, 7_000)]
    mask = pad_sequence([torch.ones(len(clip), dtype=torch.int32) for clip in clips], batch_first=True)
    with torch.no_grad():
        features, kept = XaresLLMModel(ours)(pad_sequence(clips, batch_first=True), mask)
    for row, own, (steps, _) in zip(features.numpy(), kept, ours.encode(clips, timestamps=True)):
        assert own.tolist() == [1] * len(steps) + [0] * (len(own) - len(steps))
        np.testing.assert_allclose(row[: len(steps)], steps, atol=2e-6)


def test_options_are_those_of_load_model():
    assert AxLSTMEncoder(layer=[4, 8]).output_dim == 1920
