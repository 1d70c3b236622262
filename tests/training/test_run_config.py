"""Run configs: every system of both papers, inheritance, overrides, mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from hear_encoders import PRESETS
from hear_encoders.config import PatchConfig
from training.config import RunConfig, learning_rate_factor, load_run_config, run_config_from_dict
from training.objectives import build_model, count_clip_flop
from training.optimizers import build_optimizers

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_complete_and_survives_json(name):
    config = load_run_config(CONFIGS / f"{name}.yaml")
    assert run_config_from_dict(json.loads(json.dumps(dataclasses.asdict(config))), name) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_config_with_the_papers_pretraining(name):
    config = load_run_config(CONFIGS / f"{name}.yaml")
    assert config.encoder == PRESETS[name]
    autoencoder = config.encoder.family in ("audiomaepp", "mae")
    assert config.mask_ratio == (0.8 if autoencoder else 0.5)
    if autoencoder:
        decoder = config.decoder_blocks()
        assert (decoder.dim, decoder.depth, decoder.heads) == (512 if name.endswith("large") else 384, 4, 8)
        assert decoder.family == config.encoder.family and decoder.rope == "none"
    assert (config.batch_size, config.epochs, config.warmup_epochs) == (1024, 100, 10)
    assert config.learning_rate == pytest.approx(6e-4) and config.weight_decay == 0.05
    assert (config.beta1, config.beta2) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("axlstm_tiny_e2_flip", {"expansion": 2, "flip": True}),
        ("axlstm_tiny_e3_flip", {"flip": True}),
        ("axlstm_tiny_e4_flip", {"expansion": 4, "flip": True}),
        ("axlstm_tiny_e2", {"expansion": 2}),
        ("axlstm_tiny_e2_flip_sigmoid", {"expansion": 2, "flip": True, "input_gate": "sigmoid"}),
        ("axlstm_tiny_e3_sigmoid", {"input_gate": "sigmoid"}),
    ],
)
def test_ablations_differ_from_the_model_only_in_what_they_ablate(name, changes):
    assert load_run_config(CONFIGS / f"{name}.yaml").encoder == dataclasses.replace(PRESETS["axlstm_tiny"], **changes)


def test_overrides_reach_groups_that_the_file_does_not_mention():
    config = load_run_config(CONFIGS / "mae_tiny.yaml", ["encoder.patches.patch_frames=8"])
    assert config.encoder.patches == PatchConfig(patch_frames=8)


def test_small_machines_have_a_config_per_family_with_the_papers_tiny_encoder():
    for family in ("audiomaepp", "axlstm", "mae", "ssast"):
        config, paper = (load_run_config(CONFIGS / f"{family}_tiny{suffix}.yaml") for suffix in ("_cpu", ""))
        assert config.encoder == paper.encoder and config.mask_ratio == paper.mask_ratio
        assert config.batch_size == 16
        if config.decoder is not None:  # a smaller decoder makes steps cheaper
            assert config.decoder.depth < paper.decoder.depth and config.decoder.dim < paper.decoder.dim
            assert count_clip_flop(config) < 0.35 * count_clip_flop(paper)


def test_ablations_of_patch_size_and_rope():
    def config(name):
        return load_run_config(CONFIGS / f"{name}.yaml")

    for family in ("ssast_tiny", "axlstm_tiny_e2_flip"):
        assert config(f"{family}_8x16").encoder.patches.patches == 125
        assert config(f"{family}_4x8").encoder.patches.patches == 500
    both, decoder_only = config("audiomaepp_base_rope"), config("audiomaepp_base_rope_decoder")
    assert (both.encoder.rope, both.decoder.rope) == ("patch", "patch")
    assert (decoder_only.encoder.rope, decoder_only.decoder.rope) == ("none", "patch")


def test_overrides_change_nested_values_too():
    config = load_run_config(
        CONFIGS / "mae_tiny.yaml", ["max_steps=3", "batch_size=4", "encoder.dim=48", "decoder.dim=32", "base_lr=1e-3"]
    )
    assert (config.max_steps, config.batch_size, config.encoder.dim, config.decoder.dim) == (3, 4, 48, 32)
    assert config.base_lr == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("colour=red", "unknown key 'colour'"),
        ("encoder.colour=red", "unknown key 'encoder.colour'"),
        ("max_steps=2.5", "max_steps must be int or null, got 2.5"),
        ("base_lr=fast", "base_lr must be float, got 'fast'"),
        ("compile=1", "compile must be bool, got 1"),
        ("precision=int8", "precision must be one of 'float32', 'bfloat16', 'float16'; got 'int8'"),
        ("decoder=null", "family 'mae' needs a decoder"),
        ("mask_ratio=1", "mask_ratio must lie between 0 and 1, got 1.0"),
        ("batch_size=0", "batch_size must lie between 1 and 1000000, got 0"),
        ("max_steps=0", "max_steps must lie between 1 and 99999999, got 0"),
        ("milestone_every=0", "milestone_every must lie between 1 and 99999999, got 0"),
        ("batch_size=1000000000000", "batch_size must lie between 1 and 1000000, got 1000000000000"),
        ("workers=100000", "workers must lie between 0 and 1024, got 100000"),
        ("base_lr=.nan", "base_lr must be finite, got nan"),
        ("base_lr=" + "9" * 400, "base_lr must be float, got an integer of 1329 bits"),
        ("batch_size=" + "9" * 5000, "not valid YAML"),
        ("decoder.dim=1000000000", "decoder: TransformerConfig.dim must be at most 8192, got 10{9}"),
        ("decoder.heads=7", "decoder: TransformerConfig.heads = 7 must divide dim = 384"),
        ("encoder.depth=1000000000", "TransformerConfig.depth must be at most 1000, got 10{9}"),
        ("encoder=[mae]", r"encoder: expected keys and values, got \['mae'\]"),
        ("encoder.patches=[4]", r"encoder.patches: expected keys and values, got \[4\]"),
        ("epochs=.inf", "epochs must be finite, got inf"),
        ("epochs=0", "epochs must be above 0"),
        ("shares=[50,50", r"shares=\[50,50: not valid YAML"),
        ("crops_per_record=3", "crops_per_record = 3 must divide batch_size = 1024"),
        ("encoder.heads=5", "heads = 5 must divide dim = 192"),
        ("batch_size", "expected key=value, got 'batch_size'"),
        ("nothing.here=1", "unknown key 'nothing'"),
        ("mask_ratio.here=1", "'mask_ratio' holds a value, not keys"),
    ],
)
def test_a_mistaken_override_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(CONFIGS / "mae_tiny.yaml", [override])


def test_missing_keys_and_files_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("encoder: {family: axlstm, dim: 48, depth: 1}\n")
    with pytest.raises(ValueError, match=r"run\.yaml: missing key 'mask_ratio'"):
        load_run_config(path)
    path.write_text("mask_ratio: 0.5\n")
    with pytest.raises(ValueError, match=r"run\.yaml: missing key 'encoder'"):
        load_run_config(path)
    path.write_text("inherits: nothing.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        load_run_config(path)


def test_a_file_that_inherits_itself_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("inherits: [sub/b.yaml]\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("inherits: ../a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml inherits itself: a\.yaml > b\.yaml > a\.yaml"):
        load_run_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 5000, "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("inherits: [3]", r"inherits must be a file's name or a list of names, got \[3\]"),
        ("inherits: {b.yaml: 1}", "inherits must be a file's name or a list of names"),
        ("inherits: base.yaml\nencoder: &e {patches: *e}", "nested too deeply"),
        ("[1]", "expected keys and values, got list"),
        ("3: 4\nencoder: {family: axlstm, dim: 48, depth: 1}\nmask_ratio: 0.5", "unknown key '3'"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    (tmp_path / "base.yaml").write_text("encoder: &e {patches: *e}")
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"run\.yaml: {message}"):
        load_run_config(tmp_path / "run.yaml")


def test_an_error_quotes_little_of_a_value_that_expands_without_end(tmp_path):
    lists = "\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 30))
    (tmp_path / "run.yaml").write_text(f"x0: &x0 lol\n{lists}\nencoder: *x29\n")
    with pytest.raises(ValueError, match=r"run\.yaml: encoder: expected keys and values") as caught:
        load_run_config(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 1000


def test_a_config_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"run\.json: expected keys and values, got \[1\]"):
        run_config_from_dict([1], "run.json")


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [learning_rate_factor(step, warmup=10, total=110) for step in range(111)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_with_a_cooldown_the_learning_rate_stays_at_its_peak_and_then_falls_linearly():
    rates = [learning_rate_factor(step, warmup=10, total=110, cooldown=20) for step in range(111)]
    assert rates[5] == 0.5 and set(rates[10:91]) == {1.0}
    assert rates[100] == 0.5 and rates[110] == 0


def test_a_cooldown_needs_max_steps_and_warmup_steps():
    settings = ["max_steps=100", "warmup_steps=10", "cooldown_steps=90"]
    assert load_run_config(CONFIGS / "axlstm_tiny.yaml", settings).cooldown_steps == 90
    with pytest.raises(ValueError, match="needs both max_steps and warmup_steps"):
        load_run_config(CONFIGS / "axlstm_tiny.yaml", settings[1:])
    with pytest.raises(ValueError, match="between 1 and max_steps - warmup_steps = 90, got 91"):
        load_run_config(CONFIGS / "axlstm_tiny.yaml", [*settings, "cooldown_steps=91"])


def test_epochs_become_optimizer_steps():
    config = load_run_config(CONFIGS / "axlstm_tiny.yaml")
    assert config.steps(2_000_000) == 195_313 and config.warmup(2_000_000) == 19_532  # AudioSet, 100 and 10 epochs
    twice = dataclasses.replace(config, crops_per_record=2)
    assert twice.steps(1_000_000) == config.steps(2_000_000)
    short = dataclasses.replace(config, max_steps=50)
    assert short.steps(2_000_000) == 50 and short.warmup(2_000_000) == 5
    assert dataclasses.replace(short, warmup_steps=7).warmup(10) == 7


@pytest.mark.parametrize("name", ["audiomaepp_tiny", "axlstm_tiny"])
def test_weight_decay_spares_biases_norms_and_tokens(name):
    config = load_run_config(CONFIGS / f"{name}.yaml", ["encoder.depth=1"])
    model = build_model(config)
    (adamw,) = build_optimizers(model, config, torch.device("cpu"))
    decayed, spared = adamw.param_groups
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    ids = {id(parameter) for parameter in spared["params"]}
    spared_names = {parameter_name for parameter_name, p in model.named_parameters() if id(p) in ids}
    tokens_biases_norms = re.compile(r".*(bias|_token|skip|norm\d?\.weight)")
    assert all(tokens_biases_norms.fullmatch(parameter_name) for parameter_name in spared_names)
    assert any(parameter_name.endswith("mask_token") for parameter_name in spared_names)


@pytest.mark.parametrize("name", ["audiomaepp_tiny_cpu", "axlstm_tiny_cpu"])
def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(name):
    config = load_run_config(CONFIGS / f"{name}.yaml", ["encoder.depth=1", "optimizer=muon"])
    model = build_model(config)
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    adamw, muon = (
        [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for optimizer in build_optimizers(model, config, torch.device("cpu"))
    )
    assert sorted(adamw + muon) == sorted(names.values())
    assert all("blocks." in n for n in muon) and not [n for n in muon if "gate_" in n or "conv" in n]
    linear = re.compile(r".*blocks\..*(qkv|out|up|down|value|gate)\.weight")
    assert [n for n in muon if not linear.fullmatch(n)] == [] == [n for n in adamw if linear.fullmatch(n)]


def test_a_run_config_is_frozen():
    config = load_run_config(CONFIGS / "mae_tiny.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert isinstance(config, RunConfig)
