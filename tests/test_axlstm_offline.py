"""AxLSTM from folded weights on a CPU: equal to the plain form in float64, and used only where it does the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from hear_encoders import AxLSTMConfig, Embedder, PatchConfig, build_encoder
from hear_encoders.nn import axlstm_offline
from hear_encoders.nn.axlstm import AxLSTMEncoder
from hear_encoders.nn.axlstm_folded import FoldedAxLSTM
from hear_encoders.nn.axlstm_offline import OfflineEncoder


def encoder_with(spread: float = 0.05, **options) -> AxLSTMEncoder:
    """A small AxLSTM with every parameter moved off its initial value."""
    encoder = build_encoder(AxLSTMConfig(**{"family": "axlstm", "dim": 48, "depth": 2, **options}), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return encoder


def offline(encoder: AxLSTMEncoder) -> OfflineEncoder:
    folded = FoldedAxLSTM.of(encoder)
    assert folded is not None
    return OfflineEncoder(encoder, folded)


def segments(batch: int, frames: int, bands: int = 80) -> Tensor:
    return torch.randn(batch, frames, bands, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_equals_plain(encoder: AxLSTMEncoder, logmel: Tensor, tolerance: float = 2e-5) -> None:
    expected = copy.deepcopy(encoder).double()(logmel.double())
    torch.testing.assert_close(offline(encoder)(logmel).double(), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("frames", [4, 60, 196, 200])
@pytest.mark.parametrize("options", [{}, {"flip": True}, {"input_gate": "sigmoid"}, {"expansion": 4, "heads": 8}])
def test_bfloat16_changes_embeddings_by_less_than_one_percent(options, frames):
    encoder, logmel = encoder_with(**options), segments(3, frames)
    folded = FoldedAxLSTM.of(encoder)
    assert folded is not None
    tokens, expected = OfflineEncoder(encoder, folded.to(torch.bfloat16))(logmel), encoder(logmel)
    assert tokens.dtype is torch.float32
    got, wanted = (x.unflatten(1, (-1, 5)).flatten(2).mean(1) for x in (tokens, expected))
    assert ((got - wanted).norm(dim=1) < 0.01 * wanted.norm(dim=1)).all()


@torch.no_grad()
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_bfloat16_stays_finite_for_extreme_gates(bias):
    encoder = encoder_with()
    for block in encoder.blocks:
        block.gate_i.bias += bias
        block.gate_f.bias -= bias
    folded = FoldedAxLSTM.of(encoder)
    assert folded is not None
    tokens, expected = OfflineEncoder(encoder, folded.to(torch.bfloat16))(segments(2, 200)), encoder(segments(2, 200))
    assert tokens.isfinite().all()
    assert (tokens - expected).norm() < 0.1 * expected.norm()  # a few normalizers near zero change their sign


def test_an_embedder_in_bfloat16_uses_it(noise, monkeypatch):
    used, call = [], OfflineEncoder.__call__
    monkeypatch.setattr(OfflineEncoder, "__call__", lambda self, *args: used.append(self) or call(self, *args))
    exact = Embedder(encoder_with()).scene_embeddings(noise(2, 40_000))
    used.clear()
    half = Embedder(encoder_with(), precision="bfloat16").scene_embeddings(noise(2, 40_000))
    assert used and used[0]._folded.blocks[0].down.dtype is torch.bfloat16
    assert 0 < (half - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("frames", [4, 8, 12, 60, 100, 104, 196, 200])  # 6 to 251 tokens: up to three parts
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_equals_the_plain_form_at_any_length(batch, frames):
    assert_equals_plain(encoder_with(), segments(batch, frames))


@pytest.mark.parametrize(
    "options",
    [
        {"flip": True, "depth": 3},
        {"input_gate": "sigmoid"},
        {"expansion": 2},
        {"expansion": 4, "heads": 8},
        {"expansion": 1, "heads": 1},
        {"conv_kernel": 1},
        {"conv_kernel": 7},
        {"projection_block": 2},
        {"expansion": 2, "heads": 2, "projection_block": 16},
        {"dim": 192, "depth": 1},
        {"dim": 64, "heads": 2, "projection_block": 96},  # larger than maps are merged to
    ],
)
def test_it_equals_the_plain_form_in_every_configuration(options):
    assert_equals_plain(encoder_with(**options), segments(3, 88))


@pytest.mark.parametrize("size", [(8, 16), (4, 8), (2, 40)])
def test_it_equals_the_plain_form_for_other_patches(size):
    patches = PatchConfig(patch_frames=size[0], patch_bands=size[1])
    assert_equals_plain(encoder_with(patches=patches), segments(2, 200))


@pytest.mark.parametrize("together", [1, 100, 251, 600, 10_000])
def test_how_many_segments_go_together_does_not_matter(monkeypatch, together):
    monkeypatch.setattr(axlstm_offline, "SEGMENT_TOKENS", together)
    assert_equals_plain(encoder_with(), segments(5, 200))


@pytest.mark.parametrize("part", [1, 2, 7, 64, 250, 251, 1000])
def test_how_long_its_parts_are_does_not_matter(monkeypatch, part):
    monkeypatch.setattr(axlstm_offline, "PART_TOKENS", part)
    assert_equals_plain(encoder_with(), segments(2, 200))


@pytest.mark.parametrize(
    ("gate_i", "gate_f"), [(20.0, -20.0), (-60.0, 5.0), (60.0, -3.0), (0.0, -8.0), (-300.0, 300.0), (100.0, -100.0)]
)
def test_extreme_gates_equal_the_plain_form(gate_i, gate_f):
    encoder = encoder_with()
    for block in encoder.blocks:
        block.gate_i.bias.data += gate_i
        block.gate_f.bias.data += gate_f
    assert_equals_plain(encoder, segments(2, 200))


@pytest.mark.parametrize("distance", [30.0, 79.0, 81.0, 400.0])
def test_weights_near_and_past_the_reach_of_float32_equal_the_plain_form(monkeypatch, distance):
    encoder, scaled = encoder_with(), []
    for block in encoder.blocks:
        block.gate_i.weight.data.zero_()
        block.gate_f.weight.data.zero_()
        block.gate_f.bias.data.fill_(-math.log(math.expm1(distance / 250)))  # a step forgets so much, 250 steps all
    threshold = F.threshold
    monkeypatch.setattr(F, "threshold", lambda *arguments: scaled.append(1) or threshold(*arguments))
    with torch.no_grad():
        offline(encoder)(segments(1, 200))
    assert len(scaled) == (2 if distance < axlstm_offline.MAX_LOG_RANGE else 0)  # blocks whose keys are scaled
    monkeypatch.undo()
    assert_equals_plain(encoder, segments(2, 200))


@pytest.mark.parametrize("frames", [4, 60, 196, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_made_one_by_one_equal_the_plain_form(monkeypatch, frames, batch):
    monkeypatch.setattr(axlstm_offline, "MAX_LOG_RANGE", 0.0)
    assert_equals_plain(encoder_with(), segments(batch, frames))


def test_gates_that_open_and_close_equal_the_plain_form():
    encoder = encoder_with()
    for block in encoder.blocks:
        block.gate_i.weight.data *= 300
        block.gate_f.weight.data *= 300  # from all forgotten to nothing, token by token
    assert_equals_plain(encoder, segments(2, 200), tolerance=2e-4)


def test_an_embedder_runs_it_and_gives_what_the_plain_form_gives(noise, monkeypatch):
    encoder, audio, runs, encode = encoder_with(), noise(3, 80_000), [], OfflineEncoder._encode

    def counted(self: OfflineEncoder, tokens: Tensor, layers: list[int]) -> Tensor:
        runs.append(len(tokens))
        return encode(self, tokens, layers)

    monkeypatch.setattr(OfflineEncoder, "_encode", counted)
    embeddings, _ = Embedder(encoder).timestamp_embeddings(audio)
    assert sum(runs) == 9  # 5 s are three segments
    encoder.mode = "parallel"  # an explicit choice, which the folded form does not override
    plain, _ = Embedder(encoder).timestamp_embeddings(audio)
    assert sum(runs) == 9
    torch.testing.assert_close(embeddings, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.q.weight.mul_(1.5),
        lambda block: setattr(block, "skip", nn.Parameter(block.skip.detach() + 1)),
        lambda block: block.load_state_dict({name: 1.1 * value for name, value in block.state_dict().items()}),
        lambda block: [parameter.mul_(1.1) for parameter in block.parameters()],  # as optimizers do
        lambda block: block.to(torch.bfloat16).to(torch.float32),
    ],
)
def test_changed_weights_are_noticed_at_the_next_call(noise, change):
    encoder, audio = encoder_with(), noise(1, 20_000)
    model = Embedder(encoder)
    before = model.scene_embeddings(audio)
    with torch.no_grad():
        change(encoder.blocks[1])
    changed = model.scene_embeddings(audio)
    assert not torch.allclose(changed, before, atol=1e-5)
    assert torch.equal(changed, Embedder(copy.deepcopy(encoder)).scene_embeddings(audio))


def test_a_step_of_a_fused_optimizer_is_noticed(noise):
    encoder, audio = encoder_with(), noise(1, 20_000)
    model = Embedder(encoder)
    before = model.scene_embeddings(audio)
    optimizer = torch.optim.AdamW([block.q.weight for block in encoder.blocks], lr=0.1, fused=True)
    encoder(segments(1, 200)).square().sum().backward()
    optimizer.step()  # counts up no versions
    changed = model.scene_embeddings(audio)
    assert not torch.allclose(changed, before, atol=1e-5)
    assert torch.equal(changed, Embedder(encoder).scene_embeddings(audio))


def test_pruning_after_a_call_is_noticed(noise):
    encoder, audio = encoder_with(), noise(1, 20_000)
    model = Embedder(encoder)
    model.scene_embeddings(audio)
    prune.random_unstructured(encoder.blocks[0].up, "weight", 0.5)  # the same parameter, under another name
    pruned = model.scene_embeddings(audio)
    encoder.mode = "parallel"
    torch.testing.assert_close(pruned, model.scene_embeddings(audio), rtol=2e-5, atol=2e-5)


@torch.inference_mode()
def test_weights_written_in_inference_mode_are_noticed(noise):
    encoder, audio = encoder_with(), noise(1, 20_000)
    model = Embedder(encoder)
    model.scene_embeddings(audio)
    encoder.blocks[0].q.weight.mul_(3)
    assert torch.equal(model.scene_embeddings(audio), Embedder(encoder).scene_embeddings(audio))


def test_weights_are_folded_once(noise, monkeypatch):
    encoder, folded, fold = encoder_with(), [], FoldedAxLSTM._fold
    monkeypatch.setattr(FoldedAxLSTM, "_fold", lambda *arguments: folded.append(1) or fold(*arguments))
    model = Embedder(encoder)
    for _ in range(3):
        model.scene_embeddings(noise(2, 20_000))
    assert len(folded) == len(encoder.blocks)


def test_weights_made_in_inference_mode_are_folded_too(noise):
    with torch.inference_mode():
        encoder = build_encoder(AxLSTMConfig("axlstm", dim=48, depth=2), seed=1).eval()
        embeddings = Embedder(encoder).scene_embeddings(noise(1, 20_000))
    plain = build_encoder(AxLSTMConfig("axlstm", dim=48, depth=2), seed=1).eval()
    assert torch.equal(embeddings, Embedder(plain).scene_embeddings(noise(1, 20_000)))


def test_the_encoder_and_its_input_stay_as_they_are():
    encoder, logmel = encoder_with(), segments(2, 100)
    weights, given = copy.deepcopy(encoder.state_dict()), logmel.clone()
    with torch.no_grad():
        first = offline(encoder)(logmel)
        assert torch.equal(offline(encoder)(logmel), first)
    assert torch.equal(logmel, given)
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())


def _double(encoder: AxLSTMEncoder) -> None:
    encoder.double()


def _other_module(encoder: AxLSTMEncoder) -> None:
    encoder.blocks[0].down = nn.Sequential(encoder.blocks[0].down)


def _parametrized(encoder: AxLSTMEncoder) -> None:
    nn.utils.parametrizations.weight_norm(encoder.blocks[0].up)


def _bias(encoder: AxLSTMEncoder) -> None:
    encoder.blocks[0].up = nn.Linear(encoder.config.dim, 2 * encoder.config.inner_dim)


def _no_bias(encoder: AxLSTMEncoder) -> None:
    encoder.blocks[1].gate_i.bias = None


@pytest.mark.parametrize("change", [_bias, _no_bias, _double, _other_module, _parametrized])
def test_an_encoder_with_other_parameters_runs_in_its_plain_form(change):
    encoder = encoder_with()
    assert FoldedAxLSTM.of(encoder) is not None
    change(encoder)
    assert FoldedAxLSTM.of(encoder) is None


def test_projection_blocks_in_two_heads_run_in_the_plain_form(monkeypatch):
    monkeypatch.setattr(FoldedAxLSTM, "_fold", None)  # nothing is folded in vain
    assert FoldedAxLSTM.of(encoder_with(dim=24, expansion=1, projection_block=4)) is None  # 6 channels per head


def test_an_adapter_put_in_after_folding_is_run(noise):
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)

    encoder, audio = encoder_with(), noise(1, 20_000)
    model = Embedder(encoder)
    before = model.scene_embeddings(audio)
    encoder.blocks[0].down = Adapter(encoder.blocks[0].down)
    with torch.no_grad():
        expected = copy.deepcopy(encoder)
        expected.mode = "parallel"
    torch.testing.assert_close(model.scene_embeddings(audio), Embedder(expected).scene_embeddings(audio))
    assert not torch.allclose(model.scene_embeddings(audio), before, atol=1e-3)
