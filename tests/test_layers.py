"""`layer=`: embeddings of intermediate blocks, in every form of the encoder."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SMALL_CONFIGS

from hear_encoders import Embedder, build_encoder
from hear_encoders.stream import AxLSTMStream

DEPTH = 3
LAYERS = [1, 2, 3, [2], [3, 1], (1, 2, 3)]


def deep_encoder(kind: str):
    config = SMALL_CONFIGS[kind]
    encoder = build_encoder(type(config)(**{**vars(config), "depth": DEPTH}), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def hooked_outputs(encoder, frames: torch.Tensor) -> list[torch.Tensor]:
    """Each block's output in the order of the sequence, without cls: the plain modules, watched from outside."""
    outputs = []
    handles = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in encoder.blocks]
    if hasattr(encoder, "mode"):
        encoder.mode = "recurrent"
    with torch.no_grad():
        encoder(frames)
    for handle in handles:
        handle.remove()
    if hasattr(encoder, "mode"):
        encoder.mode = "auto"
    flips = getattr(encoder.config, "flip", False)
    in_order = [output.flip(1) if flips and index % 2 else output for index, output in enumerate(outputs)]
    return [output[:, 1:] for output in in_order]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", list(SMALL_CONFIGS))
def test_a_layer_is_the_output_of_its_block_as_it_is(noise, kind, layer):
    encoder, audio = deep_encoder(kind), noise(2, 40_000)
    model, layers = Embedder(encoder, layer=layer), [layer] if isinstance(layer, int) else list(layer)
    assert model.timestamp_embedding_size == model.scene_embedding_size == 240 * len(layers)
    with torch.no_grad():
        frames = [segment.frames[None] for segment in model._segments(audio[:1])]
    watched = [hooked_outputs(encoder, piece) for piece in frames]
    steps = [[outputs[number - 1].unflatten(1, (-1, 5)).flatten(2) for outputs in watched] for number in layers]
    expected = torch.cat([torch.cat(pieces, dim=1) for pieces in steps], dim=2)
    got, _ = model.timestamp_embeddings(audio)
    torch.testing.assert_close(got[:1], expected, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        torch.testing.assert_close(model(audio), got, rtol=1e-4, atol=1e-4)
    in_blocks, _ = model.embed_blocks(lambda: audio[0].split(3000), per_step=True)
    torch.testing.assert_close(in_blocks, got[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.scene_embeddings(audio), got.mean(1), rtol=1e-4, atol=1e-4)


def test_the_default_is_the_last_blocks_output_after_the_final_norm(small_encoder, noise):
    audio, depth = noise(1, 20_000), small_encoder.config.depth
    last, _ = Embedder(small_encoder, layer=depth).timestamp_embeddings(audio)
    normed = small_encoder.norm(last.unflatten(2, (5, 48))).flatten(2)
    torch.testing.assert_close(Embedder(small_encoder).timestamp_embeddings(audio)[0], normed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_threads_and_reference_framing_give_the_same_layers(noise, layer):
    encoder, audio = deep_encoder("axlstm"), noise(4, 64_000)
    expected = Embedder(encoder, layer=layer).scene_embeddings(audio)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(Embedder(encoder, layer=layer).scene_embeddings(audio), expected)
    finally:
        torch.set_num_threads(1)
    model = Embedder(encoder, layer=[1, 2], framing="reference")
    both, _ = model.timestamp_embeddings(audio)
    for number, part in zip((1, 2), both.chunk(2, dim=2)):
        single, _ = Embedder(encoder, layer=number, framing="reference").timestamp_embeddings(audio)
        torch.testing.assert_close(part, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_stream_gives_the_models_layers(noise, layer):
    model = Embedder(deep_encoder("axlstm"), layer=layer, statistics=(-6.0, 3.5))
    audio = noise(1, 50_001)
    stream = AxLSTMStream(model)
    parts = [stream.push(block)[0] for block in audio[0].split(1111)] + [stream.finish()[0]]
    expected, _ = model.timestamp_embeddings(audio)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 4, -1, 1.0, True, "2", [], [1, 1], [1, 4], [1, "2"]])
def test_layers_that_are_not_there_are_refused(layer):
    with pytest.raises(ValueError, match="layer must be the number of a block, from 1 to 3, or a list of these; got"):
        Embedder(deep_encoder("axlstm"), layer=layer)


COMPILED = """
import torch
from hear_encoders import Embedder, TransformerConfig, build_encoder

audio = 0.1 * torch.randn(5, 72_000, generator=torch.Generator().manual_seed(0))
encoder = build_encoder(TransformerConfig("audiomaepp", dim=48, depth=2, heads=3), seed=1).eval()
plain, compiled = (Embedder(encoder, layer=[2, 1], compile=compile) for compile in (False, True))
torch.testing.assert_close(compiled.scene_embeddings(audio), plain.scene_embeddings(audio), rtol=0, atol=2e-5)
"""


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_encoder_gives_the_same_layers():
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=600)
