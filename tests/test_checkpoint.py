"""Checkpoints: saved encoders are read back unchanged; errors name the file and the tensor or field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import pytest
import torch
from conftest import SMALL_CONFIGS
from safetensors.torch import load_file, save_file

from hear_encoders import build_encoder, checkpoint, load_checkpoint, save_checkpoint
from hear_encoders.checkpoint import fingerprint, resolve, saved_fingerprint
from hear_encoders.cli.weights import main as weights_main
from hear_encoders.config import config_to_dict
from hear_encoders.files import atomic_write


@pytest.fixture
def saved(tmp_path):
    """Return a directory with a small AxLSTM checkpoint."""
    save_checkpoint(tmp_path / "model", build_encoder(SMALL_CONFIGS["axlstm"], seed=1))
    return tmp_path / "model"


def test_saved_encoder_is_loaded_unchanged(small_encoder, tmp_path):
    save_checkpoint(tmp_path, small_encoder)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == load_checkpoint(tmp_path / "model.safetensors").config == small_encoder.config
    logmel = torch.randn(1, 200, 80)
    with torch.no_grad():
        assert torch.equal(loaded(logmel), small_encoder(logmel))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_loaded_encoder_can_be_trained_and_moved(saved):
    encoder = load_checkpoint(saved / "model.safetensors")
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in encoder.parameters())
    assert not any(buffer.is_meta for buffer in encoder.buffers())
    encoder(torch.randn(1, 200, 80)).sum().backward()
    encoder.to(torch.float64)


def test_loaded_encoder_does_not_change_with_its_file(saved):
    weights = saved / "model.safetensors"
    encoder, expected = load_checkpoint(weights), load_file(weights)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    with open(weights, "r+b") as file:
        file.seek(-weights.stat().st_size // 2, os.SEEK_END)
        file.write(bytes(weights.stat().st_size // 2))
        file.flush()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_precision_are_loaded_as_float32(saved, dtype):
    weights = saved / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    assert all(parameter.dtype == torch.float32 for parameter in load_checkpoint(weights).parameters())


@pytest.mark.parametrize("part", range(8))
def test_a_flipped_bit_is_noticed(saved, part):
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    position = header + part * (len(content) - header) // 8  # in the sign or the low bits of a weight, often
    content[position] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or .* SHA-256 is \w{64}, expected \w{64}"):
        load_checkpoint(weights)


def test_a_config_changed_after_saving_is_noticed(tmp_path):
    save_checkpoint(tmp_path, build_encoder(SMALL_CONFIGS["ssast"], seed=1))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "heads": 2}))  # the same shapes
    with pytest.raises(ValueError, match=r"damaged, or it or its config\.json was changed after saving"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "hear_encoder"}))  # as transformers does
    assert load_checkpoint(tmp_path).config == SMALL_CONFIGS["ssast"]


def test_the_checksum_is_the_fingerprint_and_files_without_one_load(saved):
    weights = saved / "model.safetensors"
    assert saved_fingerprint(weights) == fingerprint(load_checkpoint(saved))
    save_file(load_file(weights), weights)
    assert saved_fingerprint(weights) is None
    load_checkpoint(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_in_half_precision_is_saved_with_a_checksum(saved, dtype):
    encoder = load_checkpoint(saved).to(dtype)
    save_checkpoint(saved, encoder)
    assert saved_fingerprint(saved / "model.safetensors") == fingerprint(encoder)
    assert torch.equal(load_checkpoint(saved).cls_token, encoder.cls_token.float())


def test_shapes_are_compared_with_the_header_before_tensors_are_built(saved, monkeypatch):
    def no_tensors(*_):
        raise AssertionError

    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "dim": 8192, "depth": 3}))
    monkeypatch.setattr(checkpoint, "_fill", no_tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: missing tensor 'blocks\.2\."):
        load_checkpoint(saved)


def test_verify_compares_a_checkpoint_with_its_checksum(saved, capsys):
    weights = saved / "model.safetensors"
    assert weights_main(["verify", str(saved)]) == 0
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert capsys.readouterr().out.splitlines() == [
        f"file              {weights}",
        "checksum          matches config and weights",
        f"SHA-256           {digest}",
    ]
    tensors = load_file(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_main(["verify", str(saved)]) == 1
    assert "model.safetensors: damaged" in capsys.readouterr().err
    save_file(tensors, weights)
    assert weights_main(["verify", str(weights)]) == 0
    assert "none in this file; it loads" in capsys.readouterr().out
    assert weights_main(["verify", str(saved / "nowhere")]) == 2


@pytest.mark.skipif(os.name == "nt", reason="links need privileges on Windows")
def test_verify_compares_a_file_of_the_hubs_cache_with_its_name_there(saved, tmp_path, capsys):
    snapshot, blobs = tmp_path / "snapshots" / ("0" * 40), tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "config.json").write_bytes((saved / "config.json").read_bytes())
    content = (saved / "model.safetensors").read_bytes()
    for name, code in ((hashlib.sha256(content).hexdigest(), 0), ("1" * 64, 1)):
        (blobs / name).write_bytes(content)
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(blobs / name)
        assert weights_main(["verify", str(snapshot)]) == code
        out, err = capsys.readouterr()
        assert ("(matches the Hub)" in out) == (code == 0)
        assert ("damaged in the Hub's cache" in err) == (code == 1)


def change_tensors(directory, change):
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "missing tensor 'norm.weight'"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "tensor 'norm.weight' holds NaN or infinity"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensor 'extra'"),
        (
            lambda t: t.update({"blocks.0.up.weight": torch.ones(5, 48)}),
            r"tensor 'blocks.0.up.weight' has shape \(5, 48\), expected \(288, 48\)",
        ),
        (
            lambda t: t.update(cls_token=torch.ones(48, dtype=torch.int64)),
            "'cls_token' is torch.int64, expected floating",
        ),
    ],
)
def test_invalid_tensor_is_named(saved, change, message):
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load_checkpoint(saved / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 9, 500, -1])
def test_truncated_file_is_named(saved, kept):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_checkpoint(weights)


@pytest.mark.parametrize("content", [b"not tensors at all", b"PK\x03\x04" + bytes(100), b"\xff" * 100])
def test_file_of_another_format_is_named(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_checkpoint(saved / "model.safetensors")


def test_unknown_config_field_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'colour'"):
        load_checkpoint(saved / "model.safetensors")


def test_config_of_another_model_does_not_match_the_weights(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ValueError, match=r"model\.safetensors: missing tensor 'blocks\.2\."):
        load_checkpoint(saved / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_checkpoint(saved / "model.safetensors")


def test_directory_and_file_resolve_to_the_weights(saved):
    assert resolve(saved) == resolve(str(saved)) == resolve(saved / "model.safetensors") == saved / "model.safetensors"


def test_other_sources_do_not_resolve(saved, tmp_path):
    (tmp_path / "old.pth").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"old\.pth: expected a directory .* run `hear-weights import`"):
        resolve(tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"notes\.txt: expected a directory or a \.safetensors file$"):
        resolve(tmp_path / "notes.txt")
    for missing in ("nothing", "/nothing/here", "a/b/c", "./a/b"):
        with pytest.raises(FileNotFoundError, match="no such file or directory, and not the name of a Hub repository"):
            resolve(missing)
    with pytest.raises(ValueError, match=r"revision 'main' was given, but .* is a local path"):
        resolve(saved, revision="main")


def test_existing_directory_takes_precedence_over_a_repository_of_that_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("org")
    saved.rename("org/name")
    monkeypatch.setattr(checkpoint.hub, "fetch_checkpoint", lambda *a: pytest.fail("the Hub was asked"))
    assert resolve("org/name").is_file()


def test_saving_again_replaces_both_files(saved):
    save_checkpoint(saved, build_encoder(SMALL_CONFIGS["ssast"], seed=2))
    assert load_checkpoint(saved / "model.safetensors").config.family == "ssast"


def test_arguments_of_save_checkpoint_in_the_wrong_order_are_named(tmp_path):
    encoder = build_encoder(SMALL_CONFIGS["axlstm"], seed=1)
    with pytest.raises(TypeError, match=r"expected save_checkpoint\(directory, encoder\), got .*AxLSTM.*, \w*Path\)"):
        save_checkpoint(encoder, tmp_path)
    with pytest.raises(TypeError, match=r"expected save_checkpoint\(directory, encoder\)"):
        save_checkpoint(tmp_path, encoder.config)
    assert os.listdir(tmp_path) == []


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_fingerprint_depends_on_weights_and_config():
    one, same, other = (build_encoder(SMALL_CONFIGS["axlstm"], seed=seed) for seed in (1, 1, 2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    flipped = build_encoder(SMALL_CONFIGS["axlstm_flip"], seed=1)  # the same tensors
    assert fingerprint(flipped) != fingerprint(one)


def test_fingerprint_is_that_of_versions_without_position_table():
    encoder = build_encoder(SMALL_CONFIGS["audiomaepp_rope"], seed=1)
    config = config_to_dict(encoder.config)
    del config["position_table"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert fingerprint(encoder) == digest.hexdigest()
    no_table = build_encoder(dataclasses.replace(encoder.config, position_table="none"), seed=1)
    assert fingerprint(no_table) != fingerprint(encoder)
