"""The configs in configs/papers, one per trained row of the papers' Tables 2 to 5, against the papers' numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from hear_encoders.papers import Decoder, find_rows
from training.config import load_run_config, run_config_from_dict
from training.masking import random_masking
from training.objectives import build_model

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "training" / "configs" / "papers"
TRAINED = re.compile(r"AudioMAE\+\+-|MAE-|SSAST-|AxLSTM-")  # of the published models, those trained here

# file: blocks, dim, depth, heads, RoPE in the encoder, RoPE in the decoder, the decoder's dim
AUTOENCODERS = {
    "table2_audiomaepp_tiny": ("audiomaepp", 192, 12, 3, False, False, 384),
    "table2_audiomaepp_base": ("audiomaepp", 768, 12, 12, False, False, 384),
    "table2_audiomaepp_large": ("audiomaepp", 1024, 24, 16, False, False, 512),
    "table2_mae_tiny": ("mae", 192, 12, 3, False, False, 384),
    "table2_mae_base": ("mae", 768, 12, 12, False, False, 384),
    "table2_mae_huge": ("mae", 1280, 32, 16, False, False, 384),
    "table3_rope_encoder_decoder": ("audiomaepp", 768, 12, 12, True, True, 384),
    "table3_rope_decoder": ("audiomaepp", 768, 12, 12, False, True, 384),
    "table3_no_rope": ("audiomaepp", 768, 12, 12, False, False, 384),
    "table4_decoder384": ("audiomaepp", 1024, 24, 16, False, False, 384),
    "table4_decoder512": ("audiomaepp", 1024, 24, 16, False, False, 512),
    "table4_decoder768": ("audiomaepp", 1024, 24, 16, False, False, 768),
}

# file: dim, expansion, exponential gate, flip, frames and bands of a patch, patches
AXLSTM = {
    "table2_axlstm_tiny": (192, 3, True, False, (4, 16), 250),
    "table2_axlstm_small": (384, 3, True, False, (4, 16), 250),
    "table2_axlstm_base": (768, 3, True, False, (4, 16), 250),
    "table3_expansion2": (192, 2, True, True, (4, 16), 250),
    "table3_expansion3": (192, 3, True, True, (4, 16), 250),
    "table3_expansion4": (192, 4, True, True, (4, 16), 250),
    "table4_axlstm_8x16": (192, 2, True, True, (8, 16), 125),
    "table4_axlstm_4x16": (192, 2, True, True, (4, 16), 250),
    "table4_axlstm_4x8": (192, 2, True, True, (4, 8), 500),
    "table5_expansion2_exponential_flip": (192, 2, True, True, (4, 16), 250),
    "table5_expansion2_exponential_no_flip": (192, 2, True, False, (4, 16), 250),
    "table5_expansion2_sigmoid_flip": (192, 2, False, True, (4, 16), 250),
    "table5_expansion3_exponential_flip": (192, 3, True, True, (4, 16), 250),
    "table5_expansion3_exponential_no_flip": (192, 3, True, False, (4, 16), 250),
    "table5_expansion3_sigmoid_no_flip": (192, 3, False, False, (4, 16), 250),
}

# file: dim, heads, frames and bands of a patch, patches
SSAST = {
    "table2_ssast_tiny": (192, 3, (4, 16), 250),
    "table2_ssast_small": (384, 6, (4, 16), 250),
    "table2_ssast_base": (768, 12, (4, 16), 250),
    "table3_ssast": (192, 3, (4, 16), 250),
    "table4_ssast_8x16": (192, 3, (8, 16), 125),
    "table4_ssast_4x16": (192, 3, (4, 16), 250),
    "table4_ssast_4x8": (192, 3, (4, 8), 500),
}

MILLION_PARAMETERS = {  # AxLSTM table 3
    "axlstm/table3_expansion2": 2.9,
    "axlstm/table3_expansion3": 4.3,
    "axlstm/table3_expansion4": 5.8,
    "axlstm/table3_ssast": 5.4,
}


def load(name, *overrides):
    return load_run_config(PAPERS / f"{name}.yaml", overrides)


def row_of(name):
    """The paper, table and model that the config's first line names."""
    first_line = (PAPERS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return re.fullmatch(r"# (\S+), table (\d): (.+)", first_line).groups()


NAMES = [*(f"audiomaepp/{name}" for name in AUTOENCODERS), *(f"axlstm/{name}" for name in [*AXLSTM, *SSAST])]


def test_every_config_is_in_these_tables():
    assert sorted(NAMES) == sorted(str(path.relative_to(PAPERS))[:-5] for path in PAPERS.rglob("*.yaml"))


def test_every_config_names_its_row_and_every_trained_row_has_a_config():
    with open(ROOT / "evaluation" / "published.csv", newline="", encoding="utf-8") as file:
        published = {(row["paper"], row["table"], row["model"]) for row in csv.DictReader(file)}
    named = []
    for name in NAMES:
        paper, table, model = row_of(name)
        assert name.startswith({"AudioMAE++": "audiomaepp/", "AxLSTM": "axlstm/"}[paper] + f"table{table}_")
        named.append((paper, table, model))
    assert len(set(named)) == len(named)
    assert set(named) == {row for row in published if TRAINED.match(row[2])}


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_is_the_papers(name):
    config = load(name)
    assert config.batch_size == 1024 and config.base_lr == 1.5e-4 and config.learning_rate == 1.5e-4 * 1024 / 256
    assert (config.epochs, config.warmup_epochs, config.max_steps, config.cooldown_steps) == (100, 10, None, None)
    assert (config.optimizer, config.weight_decay, config.clip_grad) == ("adamw", 0.05, None)
    assert (config.beta1, config.beta2) == (0.9, 0.95)
    assert config.precision == "float16"
    assert config.loss_on == "masked" and not config.mask_positions and not config.shuffled_rope
    assert (config.encoder.patches.chunk_frames, config.encoder.patches.bands) == (200, 80)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_are_the_papers(name):
    config = load(f"audiomaepp/{name}")
    family, dim, depth, heads, encoder_rope, decoder_rope, decoder_dim = AUTOENCODERS[name]
    encoder, decoder = config.encoder, config.decoder_blocks()
    assert (encoder.family, encoder.dim, encoder.depth, encoder.heads) == (family, dim, depth, heads)
    assert (decoder.family, decoder.dim, decoder.depth, decoder.heads) == (family, decoder_dim, 4, 8)
    for part, has_rope in ((encoder, encoder_rope), (decoder, decoder_rope)):
        assert (part.rope, part.position_table) == (("sequence", "none") if has_rope else ("none", "sincos"))
        assert part.swiglu_norm == "own"
    assert (encoder.patches.patch_frames, encoder.patches.patch_bands, encoder.patches.patches) == (4, 16, 250)
    assert config.mask_ratio == 0.8


@pytest.mark.parametrize("name", AXLSTM)
def test_axlstms_are_the_papers(name):
    config = load(f"axlstm/{name}")
    dim, expansion, exponential, flip, patch, patches = AXLSTM[name]
    encoder = config.encoder
    assert (encoder.family, encoder.dim, encoder.depth, encoder.heads) == ("axlstm", dim, 12, 4)
    assert (encoder.expansion, encoder.flip) == (expansion, flip)
    assert encoder.input_gate == ("exponential" if exponential else "sigmoid")
    assert (encoder.patches.patch_frames, encoder.patches.patch_bands) == patch
    assert encoder.patches.patches == patches
    assert config.decoder is None and config.mask_ratio == 0.5


@pytest.mark.parametrize("name", SSAST)
def test_ssasts_are_the_papers(name):
    config = load(f"axlstm/{name}")
    dim, heads, patch, patches = SSAST[name]
    encoder = config.encoder
    assert (encoder.family, encoder.dim, encoder.depth, encoder.heads) == ("ssast", dim, 12, heads)
    assert (encoder.rope, encoder.position_table) == ("none", "sincos")
    assert (encoder.patches.patch_frames, encoder.patches.patch_bands) == patch
    assert encoder.patches.patches == patches
    assert config.decoder is None and config.mask_ratio == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_of_a_row_is_named_after_it(name):
    config = load(name)
    decoder = config.decoder and Decoder(config.decoder.dim, config.decoder.rope != "none")
    paper, table, model = row_of(name)
    rows = find_rows(config.encoder, decoder)
    assert any(row.startswith(f"{model}: {paper} paper, Table {table}") for row in rows)
    assert len(rows) <= 3


@pytest.mark.parametrize("name", MILLION_PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    model = build_model(load(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == MILLION_PARAMETERS[name]


def test_released_audiomaepp_shares_a_norm_and_has_shuffled_rope_on_top_of_the_table():
    config = load("audiomaepp/table3_rope_encoder_decoder", "released=true")
    for part in (config.encoder, config.decoder_blocks()):
        assert (part.rope, part.position_table, part.swiglu_norm) == ("sequence", "sincos", "attention")
    assert config.shuffled_rope and config.loss_on == "masked"
    plain = load("audiomaepp/table3_no_rope", "released=true")
    assert (plain.encoder.rope, plain.decoder.rope, plain.encoder.swiglu_norm) == ("none", "none", "attention")
    assert not plain.shuffled_rope
    assert load("audiomaepp/table2_mae_base", "released=true") == load("audiomaepp/table2_mae_base")


@pytest.mark.parametrize("name", ["table2_axlstm_tiny", "table2_ssast_tiny"])
def test_released_axlstm_and_ssast_have_the_loss_on_all_patches(name):
    config, text = load(f"axlstm/{name}", "released=true"), load(f"axlstm/{name}")
    assert config.loss_on == "all" and not config.mask_positions
    assert config.encoder == text.encoder
    with_positions = load(f"axlstm/{name}", "mask_positions=true", "released=true")
    assert with_positions == config  # neither text nor code has them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("released", ["false", "true"])
def test_the_saved_config_states_the_resulting_values(name, released):
    config = load(name, f"released={released}")
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert "released" not in saved and run_config_from_dict(saved, name) == config


def test_released_is_a_switch():
    assert load("axlstm/table2_axlstm_tiny", "released=false") == load("axlstm/table2_axlstm_tiny")
    with pytest.raises(ValueError, match="released must be bool, got 1"):
        load("axlstm/table2_axlstm_tiny", "released=1")


@pytest.mark.parametrize("name", ["audiomaepp/table3_rope_encoder_decoder", "axlstm/table5_expansion3_sigmoid_no_flip"])
@pytest.mark.parametrize("released", [False, True])
def test_a_small_model_of_a_row_trains(name, released):
    sizes = ["encoder.dim=48", "encoder.depth=1", "encoder.heads=2"]
    decoder = ["decoder.dim=32", "decoder.depth=1", "decoder.heads=2"] if name.startswith("audiomaepp") else []
    config = load(name, *sizes, *decoder, f"released={str(released).lower()}")
    model = build_model(config)
    loss = model(torch.randn(2, 200, 80), random_masking(torch.rand(2, 250), config.mask_ratio)).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
