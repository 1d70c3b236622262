"""Configs: the presets, reading and writing, and the values that are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import SMALL_CONFIGS

from hear_encoders import PRESETS, AxLSTMConfig, PatchConfig, TransformerConfig, build_encoder, preset
from hear_encoders.config import config_from_dict, config_to_dict, read_config
from hear_encoders.nn.build import ENCODER_OF_CONFIG

WIDE_BLOCKS = AxLSTMConfig(
    "axlstm", 24, 1, heads=2, conv_kernel=3, projection_block=8, patches=PatchConfig(8, 80, 8, 8)
)
SHARED_NORM = TransformerConfig("audiomaepp", dim=48, depth=2, heads=3, swiglu_norm="attention")


def parameters(config) -> int:
    with torch.device("meta"):
        encoder = ENCODER_OF_CONFIG[type(config)](config)
    return sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read_back_from_json(name):
    config = preset(name)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_presets_have_the_papers_dimensions():
    shapes = {name: (config.dim, config.depth, config.heads) for name, config in PRESETS.items()}
    assert shapes == {
        "audiomaepp_tiny": (192, 12, 3),
        "audiomaepp_base": (768, 12, 12),
        "audiomaepp_large": (1024, 24, 16),
        "mae_tiny": (192, 12, 3),
        "mae_base": (768, 12, 12),
        "axlstm_tiny": (192, 12, 4),
        "axlstm_small": (384, 12, 4),
        "axlstm_base": (768, 12, 4),
        "ssast_tiny": (192, 12, 3),
        "ssast_small": (384, 12, 6),
        "ssast_base": (768, 12, 12),
    }
    assert all(config.rope == "none" for config in PRESETS.values() if isinstance(config, TransformerConfig))
    assert PRESETS["axlstm_tiny"].expansion == 3 and not PRESETS["axlstm_tiny"].flip


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (AxLSTMConfig("axlstm", dim=192, depth=12, expansion=2), 2.9),  # AxLSTM table 3
        (AxLSTMConfig("axlstm", dim=192, depth=12, expansion=3), 4.3),
        (AxLSTMConfig("axlstm", dim=192, depth=12, expansion=4), 5.8),
        (PRESETS["ssast_tiny"], 5.4),
    ],
)
def test_parameter_counts_equal_the_papers(config, millions):
    # The paper counts the pretrained model, with its mask token and its head: Linear, GELU, Linear(patch size).
    dim = config.dim
    head = dim + (dim * dim + dim) + (dim * config.patches.patch_size + config.patches.patch_size)
    assert round((parameters(config) + head) / 1e6, 1) == millions


@pytest.mark.parametrize("config", [*PRESETS.values(), *SMALL_CONFIGS.values(), WIDE_BLOCKS, SHARED_NORM])
def test_parameters_of_a_config_are_those_of_its_encoder(config):
    assert config.parameters == parameters(config)


def test_error_for_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'axlstm_huge'; expected one of: audiomaepp_tiny, "):
        preset("axlstm_huge")


@pytest.mark.parametrize("patch", [(4, 16, 250), (8, 16, 125), (4, 8, 500)])
def test_patch_sizes_of_the_axlstm_paper_give_its_patch_counts(patch):
    frames, bands, count = patch
    assert PatchConfig(patch_frames=frames, patch_bands=bands).patches == count


def patches(**changes):
    """Return the values of the usual patch grid with changes."""
    return {**dataclasses.asdict(PatchConfig()), **changes}


def invalid(**changes):
    """Return a valid config's values with changes; `...` deletes a field."""
    values = config_to_dict(preset("axlstm_tiny"))
    for name, value in changes.items():
        if value is ...:
            del values[name]
        else:
            values[name] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (invalid(colour="red"), "config.json: unknown field 'colour'"),
        (invalid(expansion=...), "config.json: missing field 'expansion'"),
        (invalid(patches=...), "config.json: missing field 'patches'"),
        (invalid(patches={"bands": 80}), "config.json: patches: missing field 'chunk_frames'"),
        (invalid(patches=3), "config.json: patches: expected a JSON object, got int"),
        (
            invalid(family="lstm"),
            "config.json: field 'family' must be one of audiomaepp, axlstm, mae, ssast; got 'lstm'",
        ),
        (invalid(family=["mae"]), r"config.json: field 'family' must be one of .*; got \['mae'\]"),
        (invalid(family=...), "config.json: field 'family' must be one of .*; got None"),
        (invalid(dim="192"), "config.json: AxLSTMConfig.dim must be int, got '192'"),
        (invalid(dim=192.0), "config.json: AxLSTMConfig.dim must be int, got 192.0"),
        (invalid(flip=1), "config.json: AxLSTMConfig.flip must be bool, got 1"),
        (invalid(depth=0), "config.json: AxLSTMConfig.depth must be at least 1, got 0"),
        (invalid(depth=True), "config.json: AxLSTMConfig.depth must be int, got True"),
        (invalid(heads=5), "config.json: AxLSTMConfig.heads = 5 must divide inner_dim = 576"),
        (invalid(input_gate="tanh"), "AxLSTMConfig.input_gate must be one of 'exponential', 'sigmoid'; got 'tanh'"),
        (invalid(dim=8196), "config.json: AxLSTMConfig.dim must be at most 8192, got 8196"),
        (invalid(dim=10**30), "config.json: AxLSTMConfig.dim must be at most 8192, got 10{30}$"),
        (invalid(dim=10**4000), "config.json: AxLSTMConfig.dim must be at most 8192, got an integer of 13288 bits"),
        (invalid(depth=10**9), "config.json: AxLSTMConfig.depth must be at most 1000, got 10{9}"),
        (invalid(patches=patches(chunk_frames=10**8)), "PatchConfig.chunk_frames must be at most 100000, got 10{8}"),
        (invalid(patches=patches(chunk_frames=10**5)), "PatchConfig.patches must be at most 8192, got 125000"),
        (invalid(dim=8192, depth=1000), "config.json: AxLSTMConfig: 6.05e.11 parameters are more than 1e.10"),
        (invalid(flip=[[[[[[[["deep"]]]]]]]]), r"AxLSTMConfig.flip must be bool, got \[\[\[...\]\]\]"),
        ([1, 2], "config.json: field 'family' must be one of"),
        ("axlstm", "config.json: field 'family' must be one of"),
    ],
)
def test_error_for_an_invalid_config_names_file_and_field(values, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_a_config_file_older_than_the_position_table_has_the_table(tmp_path):
    path = tmp_path / "config.json"
    for config in (preset("audiomaepp_tiny"), TransformerConfig("mae", 48, 1, 3, "sequence", position_table="none")):
        values = config_to_dict(config)
        path.write_text(json.dumps(values))
        assert read_config(path) == config
        assert values.pop("position_table") == config.position_table
        path.write_text(json.dumps(values))
        assert read_config(path) == dataclasses.replace(config, position_table="sincos")
    path.write_text(json.dumps(invalid(position_table="none")))
    with pytest.raises(ValueError, match="unknown field 'position_table'"):  # AxLSTM always has it
        read_config(path)


def test_config_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe\x00", b"", b'{"dim": ' + b"1" * 5000 + b"}", b"[" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
            read_config(path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "audiomaepp", "dim": 192, "heads": 5}, "heads = 5 must divide dim = 192"),
        ({"family": "ssast", "dim": 192, "heads": 3, "swiglu_norm": "attention"}, "must be 'own' for family 'ssast'"),
        ({"family": "mae", "dim": 12, "heads": 6, "rope": "patch"}, "head size divisible by 4, got dim / heads = 2"),
        ({"family": "mae", "dim": 12, "heads": 12, "rope": "sequence"}, "head size divisible by 2"),
        ({"family": "mae", "dim": 6, "heads": 3}, r"dim must be divisible by 4 .*, got 6"),
        ({"family": "mae", "dim": 192, "heads": 3, "rope": "yes"}, "rope must be one of 'none', 'patch', 'sequence'"),
        ({"family": "mae", "dim": 192, "heads": 3, "position_table": "none"}, "position_table = 'none' needs rope"),
    ],
)
def test_impossible_transformers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(depth=2, **arguments)


def test_patches_must_tile_the_segment():
    with pytest.raises(ValueError, match="patch_bands = 24 must divide bands = 80"):
        PatchConfig(patch_bands=24)


def test_configs_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("mae_tiny").dim = 3


def test_seed_determines_the_encoder_and_leaves_the_global_generator_alone():
    config = TransformerConfig("mae", dim=48, depth=1, heads=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (build_encoder(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.patch_projection.weight, other.patch_projection.weight)


def test_building_from_anything_but_a_config_is_an_error():
    with pytest.raises(TypeError, match=r"such as preset\('axlstm_tiny'\), got 'axlstm_tiny'"):
        build_encoder("axlstm_tiny")
