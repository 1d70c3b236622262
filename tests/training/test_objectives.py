"""Pretraining models: the released code's predictions and losses, masking, and which patches the loss covers."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN

from hear_encoders import AxLSTMConfig, TransformerConfig
from hear_encoders.nn.patches import patchify
from hear_encoders.released import import_checkpoint, read_released_tensors, translate_name
from training.masking import Masking, masking_noise, random_masking
from training.objectives import MaskedAutoencoder, MaskedModel, masked_loss

AUTOENCODERS = ["mae", "audiomaepp", "audiomaepp_rope"]
MASKED_MODELS = ["axlstm_e2_flip", "axlstm_e3_flip", "axlstm_e3_noflip", "ssast"]


def released_model(name, released):
    """Build the pretraining model with a golden checkpoint's weights, decoder or head included."""
    path = GOLDEN / f"{name}.pth"
    config, encoder = import_checkpoint(path, heads=released["num_heads"], flip=released.get("flip", True))
    state = {f"encoder.{key}": tensor for key, tensor in encoder.items()}
    tensors = read_released_tensors(path)
    if name in MASKED_MODELS:
        model = MaskedModel(config, mask_positions=False)
        state["mask_token"] = tensors["mask_token"].flatten()
        state.update({f"head.{key[5:]}": tensor for key, tensor in tensors.items() if key.startswith("pred.")})
    else:
        decoder = TransformerConfig(
            config.family,
            dim=released["decoder_embed_dim"],
            depth=released["decoder_depth"],
            heads=released["decoder_num_heads"],
            rope=config.rope,
            swiglu_norm=config.swiglu_norm,
        )
        model = MaskedAutoencoder(config, decoder, shuffled_rope=config.rope == "sequence")
        outer = {"decoder_embed": "project", "decoder_norm": "norm", "decoder_pred": "predict"}
        for key, tensor in tensors.items():
            module, _, parameter = key.removeprefix("decoder.").rpartition(".")
            if not key.startswith("decoder.") or ".norm3." in key or parameter == "decoder_pos_embed":
                continue
            if parameter == "mask_token":
                state["decoder.mask_token"] = tensor.flatten()
            elif module in outer:
                state[f"decoder.{outer[module]}.{parameter}"] = tensor
            else:
                inner = key.removeprefix("decoder.").replace("decoder_blocks", "blocks")
                state[f"decoder.{translate_name(inner)}"] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", AUTOENCODERS + MASKED_MODELS)
def test_predictions_and_loss_equal_the_released_code(golden, name):
    tensors, released = golden(name)
    model = released_model(name, released)
    nothing = torch.empty(2, 0, dtype=torch.int64)
    masking = Masking(tensors["io/mask"], tensors.get("io/ids_keep", nothing), tensors.get("io/ids_restore", nothing))
    with torch.no_grad():
        prediction = model(tensors["io/spectrogram"][:, 0], masking)
    torch.testing.assert_close(prediction.patches, tensors["io/pred"], rtol=0, atol=5e-5)
    loss = tensors["io/loss"] if name in AUTOENCODERS else tensors["io/loss_masked"]
    torch.testing.assert_close(prediction.loss, loss[0], rtol=0, atol=5e-5)


def small_model(family: str):
    if family == "axlstm":
        return MaskedModel(AxLSTMConfig("axlstm", dim=48, depth=1))
    encoder = TransformerConfig(family, dim=48, depth=1, heads=3)
    return MaskedModel(encoder) if family == "ssast" else MaskedAutoencoder(encoder, encoder)


FAMILIES = ["audiomaepp", "mae", "axlstm", "ssast"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained(family):
    torch.manual_seed(0)
    model = small_model(family)
    model.reset_parameters()
    model(torch.randn(2, 200, 80), random_masking(torch.rand(2, 250), 0.8)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_do_not_depend_on_masked_patches(family):
    torch.manual_seed(0)
    model = small_model(family)
    model.reset_parameters()
    masking = random_masking(torch.rand(1, 250), 0.5)
    logmel = torch.randn(1, 200, 80)
    hidden = int(masking.mask[0].argmax())
    changed = logmel.clone()
    step, row = divmod(hidden, 5)
    changed[0, 4 * step : 4 * step + 4, 16 * row : 16 * row + 16] += 5
    with torch.no_grad():
        torch.testing.assert_close(model(changed, masking).patches, model(logmel, masking).patches)


def test_without_positions_attention_predicts_the_same_for_all_masked_patches():
    torch.manual_seed(0)
    masking = random_masking(torch.rand(1, 250), 0.5)
    logmel = torch.randn(1, 200, 80)
    spread = {}
    for mask_positions in (False, True):
        model = MaskedModel(TransformerConfig("ssast", dim=48, depth=2, heads=3), mask_positions)
        model.reset_parameters()
        with torch.no_grad():
            masked = model(logmel, masking).patches[masking.mask > 0]
        spread[mask_positions] = masked.std(dim=0).mean().item()
    assert spread[False] < 1e-6 < 1e-2 < spread[True]


def test_the_loss_covers_only_masked_patches():
    target = torch.randn(2, 10, 4)
    mask = torch.zeros(2, 10)
    mask[0, :3] = 1
    prediction = target.clone()
    prediction[0, 5] += 100  # visible
    assert masked_loss(prediction, target, mask) == 0
    prediction[0, 1] += 3
    assert masked_loss(prediction, target, mask).item() == pytest.approx(9 / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_can_cover_all_patches(family):
    torch.manual_seed(0)
    model = small_model(family)
    model.reset_parameters()
    model.loss_on = "all"
    logmel = torch.randn(2, 200, 80)
    with torch.no_grad():
        prediction = model(logmel, random_masking(torch.rand(2, 250), 0.5))
    target = patchify(logmel, model.encoder.config.patches)
    torch.testing.assert_close(prediction.loss, (prediction.patches - target).square().mean())


def small_rope_model(**options):
    rope = TransformerConfig("audiomaepp", dim=48, depth=1, heads=3, rope="sequence", position_table="none")
    model = MaskedAutoencoder(rope, rope, **options)
    torch.manual_seed(0)
    model.reset_parameters()
    return model.eval()


@pytest.mark.parametrize("shuffled", [False, True])
def test_rope_turns_by_true_place_unless_shuffled_as_in_the_released_code(shuffled):
    """The order in which the encoder sees the visible patches matters only to the released code."""
    model = small_rope_model(shuffled_rope=shuffled)
    generator = torch.Generator().manual_seed(1)
    logmel = torch.randn(1, 200, 80, generator=generator)
    order = torch.randperm(250, generator=generator)
    reordered = torch.cat([order[:50].flip(0), order[50:]])
    predictions = []
    for ids in (order, reordered):
        masking = Masking(torch.ones(1, 250), ids[None, :50], ids.argsort()[None])
        with torch.no_grad():
            predictions.append(model(logmel, masking).patches)
    difference = (predictions[0] - predictions[1]).abs().max()
    assert difference > 1e-3 if shuffled else difference < 1e-5


def test_rope_in_place_of_the_table_tells_masked_patches_apart():
    model = small_rope_model()
    assert not model.encoder.position_table.any() and not model.decoder.position_table.any()
    masking = random_masking(torch.rand(1, 250), 0.8)
    with torch.no_grad():
        masked = model(torch.randn(1, 200, 80), masking).patches[masking.mask > 0]
    assert masked.std(dim=0).mean() > 1e-3


@pytest.mark.parametrize(("ratio", "visible"), [(0.8, 50), (0.5, 125), (0.75, 62)])
def test_masking_keeps_as_many_patches_as_the_papers(ratio, visible):
    noise = torch.rand(3, 250)
    mask, keep, restore = random_masking(noise, ratio)
    assert keep.shape == (3, visible) and mask.sum(1).tolist() == [250 - visible] * 3
    for clip in range(3):
        assert sorted(keep[clip].tolist()) == (mask[clip] == 0).nonzero().flatten().tolist()
        order = torch.cat([keep[clip], torch.full((250 - visible,), -1)])
        assert (order[restore[clip]][mask[clip] == 0] == torch.arange(250)[mask[clip] == 0]).all()


def test_masks_are_a_function_of_seed_and_step():
    one = masking_noise(seed=1, step=7, clips=8, patches=250)
    assert torch.equal(one, masking_noise(1, 7, 8, 250))
    for other in (masking_noise(1, 8, 8, 250), masking_noise(2, 7, 8, 250), masking_noise(7, 1, 8, 250)):
        assert not torch.equal(one, other)


def test_the_decoder_puts_patches_back_in_order():
    """Without blocks, a visible patch's prediction depends on that patch alone."""
    model = small_model("mae")
    model.reset_parameters()
    model.encoder.blocks = torch.nn.ModuleList()
    model.decoder.blocks = torch.nn.ModuleList()
    masking = random_masking(torch.rand(1, 250), 0.8)
    logmel = torch.randn(1, 200, 80)
    seen = int(masking.keep[0, 17])
    step, row = divmod(seen, 5)
    changed = logmel.clone()
    changed[0, 4 * step : 4 * step + 4, 16 * row : 16 * row + 16] += 5
    with torch.no_grad():
        moved = (model(changed, masking).patches - model(logmel, masking).patches).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [seen]
    assert (
        patchify(changed, model.encoder.config.patches)[0, seen]
        .ne(patchify(logmel, model.encoder.config.patches)[0, seen])
        .all()
    )
