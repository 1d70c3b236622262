"""The papers' released code is reproduced: every golden checkpoint, imported by the command."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from conftest import GOLDEN

import hear_audiomaepp
import hear_axlstm
from hear_encoders import PatchConfig, load_checkpoint
from hear_encoders.cli.weights import main as weights_main
from hear_encoders.config import preset
from hear_encoders.framing import ReferenceFraming
from hear_encoders.nn.patches import sincos_2d
from hear_encoders.papers import Decoder, find_rows
from hear_encoders.released import import_checkpoint, read_released_checkpoint

CHECKPOINTS = ["audiomaepp", "audiomaepp_rope", "mae", "axlstm_e2_flip", "axlstm_e3_flip", "axlstm_e3_noflip", "ssast"]
LENGTHS = (17120, 32000, 68801)


def import_arguments(name, config):
    flip = {True: ["--flip"], False: ["--no-flip"], None: []}[config.get("flip")]
    return ["--heads", str(config["num_heads"]), *flip]


@pytest.fixture(params=CHECKPOINTS)
def imported(request, golden, tmp_path):
    """Import a golden checkpoint; return its directory, HEAR module, golden tensors and released config."""
    tensors, config = golden(request.param)
    directory = tmp_path / "imported"
    arguments = import_arguments(request.param, config)
    assert weights_main(["import", str(GOLDEN / f"{request.param}.pth"), str(directory), *arguments]) == 0
    module = hear_audiomaepp if config["model"] == "MAE_PlusPlus" else hear_axlstm
    return directory, module, tensors, config


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("samples", LENGTHS)
def test_reference_framing_equals_the_released_code(imported, samples):
    directory, module, tensors, _ = imported
    model = module.load_model(str(directory), framing="reference")
    audio = tensors[f"io/audio.{samples}"]
    embeddings, timestamps = module.get_timestamp_embeddings(audio, model)
    assert_equal(embeddings, tensors[f"io/timestamp_embeddings.{samples}"])
    assert_equal(timestamps, tensors[f"io/timestamps_ms.{samples}"])
    assert_equal(module.get_scene_embeddings(audio, model), tensors[f"io/scene_embeddings.{samples}"])


def test_encoder_alone_equals_the_released_code(imported):
    directory, _, tensors, _ = imported
    encoder = load_checkpoint(directory / "model.safetensors")
    with torch.no_grad():
        tokens = encoder(tensors["io/spectrogram"][:, 0])
    assert_equal(ReferenceFraming(encoder.config.patches).group(tokens), tensors["io/features"])


def test_architecture_is_inferred_from_the_tensors(imported):
    directory, _, _, released = imported
    config = load_checkpoint(directory / "model.safetensors").config
    family = {"MAE_PlusPlus": "mae", "xLSTM_SSAST": "axlstm", "SSAST": "ssast"}[released["model"]]
    family = "audiomaepp" if released.get("encoder_plusplus_block") else family
    assert (config.family, config.dim, config.depth) == (family, released["embed_dim"], released["depth"])
    assert config.patches == PatchConfig()
    if family == "axlstm":
        assert (config.expansion, config.flip, config.heads) == (released["expansion_factor"], released["flip"], 4)
    else:
        assert config.heads == released["num_heads"]
        assert config.rope == ("sequence" if released.get("encoder_use_rope") else "none")
        assert config.swiglu_norm == ("attention" if family == "audiomaepp" else "own")


def test_exact_framing_is_the_default_for_imported_checkpoints(imported):
    directory, module, tensors, _ = imported
    model = module.load_model(str(directory))
    embeddings, timestamps = module.get_timestamp_embeddings(tensors["io/audio.32000"], model)
    assert embeddings.shape[1] == 50
    assert torch.equal(timestamps[0], 40 * torch.arange(50.0) + 15)


def test_reference_framing_groups_five_times_of_one_row():
    tokens = torch.arange(250.0)[None, :, None]  # token number as its only channel
    regrouped = ReferenceFraming(PatchConfig()).group(tokens)
    assert regrouped.shape == (1, 50, 5)
    assert regrouped[0, 7].tolist() == [7, 57, 107, 157, 207]


def test_reference_framing_pads_full_segments_by_another_one():
    framing = ReferenceFraming(PatchConfig())
    assert [framing.pad_count(frames) for frames in (1, 199, 200, 201, 400)] == [199, 1, 200, 199, 200]
    assert framing.step_count(199 * 160) == 50  # 200 frames: the extra segment is dropped again


def test_heads_are_required_for_attention_without_rope_and_checked_with_it():
    for name in ("mae", "audiomaepp", "ssast"):
        with pytest.raises(ValueError, match=rf"{name}\.pth: its tensors do not show the number of attention heads"):
            import_checkpoint(GOLDEN / f"{name}.pth")
    with pytest.raises(ValueError, match=r"TransformerConfig\.heads = 7 must divide dim = 48"):
        import_checkpoint(GOLDEN / "mae.pth", heads=7)
    with pytest.raises(ValueError, match="RoPE frequencies belong to 3 heads, got 4"):
        import_checkpoint(GOLDEN / "audiomaepp_rope.pth", heads=4)
    assert import_checkpoint(GOLDEN / "audiomaepp_rope.pth")[0].heads == 3
    assert import_checkpoint(GOLDEN / "axlstm_e3_flip.pth", flip=True)[0].heads == 4


def test_flip_is_required_for_an_axlstm():
    with pytest.raises(
        ValueError, match=r"e3_flip\.pth: .* whether this AxLSTM was trained with flip.*--flip, --no-flip"
    ):
        import_checkpoint(GOLDEN / "axlstm_e3_flip.pth")
    for flip in (True, False):
        assert import_checkpoint(GOLDEN / "axlstm_e3_flip.pth", flip=flip)[0].flip == flip


def tiny_checkpoint(name, tmp_path):
    """Write the papers' Tiny model of a golden checkpoint's kind, in the released format, with zeros for weights."""
    golden = torch.load(GOLDEN / f"{name}.pth", weights_only=False)["model"]
    tensors = {}
    for key, tensor in golden.items():
        # 48 channels become 192; only sizes that grow with them are multiples of 12. 2 blocks become 12.
        zeros = torch.zeros([4 * size if size % 12 == 0 else size for size in tensor.shape])
        copies = range(1, 12) if "blocks.1." in key and "decoder" not in key else [1]
        tensors |= {key.replace("blocks.1.", f"blocks.{block}."): zeros.clone() for block in copies}
        if key.endswith("pos_embed") and "decoder" not in key:
            tensors[key] = torch.nn.functional.pad(sincos_2d(PatchConfig(), 192), (0, 0, 1, 0))[None]
        if key == "decoder.decoder_embed.weight":
            tensors[key] = torch.zeros(384, 192)
    path = tmp_path / "tiny.pth"
    torch.save({"model": tensors}, path)
    return path


@pytest.mark.parametrize(
    ("name", "words", "rows"),
    [
        ("mae", ["--heads", "3"], ["MAE-Tiny: AudioMAE++ paper, Table 2"]),
        (
            "axlstm_e2_flip",
            ["--flip"],
            [
                "AxLSTM-T, expansion 2: AxLSTM paper, Table 3, row 2",
                "AxLSTM-T, 250 patches: AxLSTM paper, Table 4, row 4",
                "AxLSTM-T, expansion 2, exponential gate, flip: AxLSTM paper, Table 5, row 1",
            ],
        ),
        (
            "axlstm_e3_noflip",
            ["--no-flip"],
            [
                "AxLSTM-T: AxLSTM paper, Table 2",
                "AxLSTM-T, expansion 3, exponential gate, no flip: AxLSTM paper, Table 5, row 5",
            ],
        ),
        (
            "axlstm_e3_noflip",
            ["--no-flip", "--input-gate", "sigmoid"],
            ["AxLSTM-T, expansion 3, sigmoid gate, no flip: AxLSTM paper, Table 5, row 6"],
        ),
        ("axlstm_e3_noflip", ["--flip", "--input-gate", "sigmoid"], ["none of the papers' tables has this encoder"]),
    ],
)
def test_import_prints_the_papers_rows(name, words, rows, tmp_path, capsys):
    path = tiny_checkpoint(name, tmp_path)
    assert weights_main(["import", str(path), str(tmp_path / "out"), *words]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("published as")]
    assert printed == [f"published as      {row}" for row in rows]


def test_a_decoder_tells_rows_with_the_same_encoder_apart():
    assert read_released_checkpoint(GOLDEN / "audiomaepp.pth", 3).decoder == Decoder(dim=32, rope=False)
    assert read_released_checkpoint(GOLDEN / "audiomaepp_rope.pth").decoder == Decoder(dim=32, rope=True)
    assert read_released_checkpoint(GOLDEN / "ssast.pth", 3).decoder is None
    base, large = preset("audiomaepp_base"), preset("audiomaepp_large")
    assert find_rows(base, Decoder(rope=True)) == ["AudioMAE++-Base, RoPE in decoder: AudioMAE++ paper, Table 3, row 2"]
    assert find_rows(large, Decoder(dim=768)) == ["AudioMAE++-Large, decoder 768: AudioMAE++ paper, Table 4, row 3"]
    assert len(find_rows(base)) == 3 and len(find_rows(large)) == 4


def test_the_input_gate_of_an_axlstm_can_be_given(tmp_path):
    path = str(GOLDEN / "axlstm_e3_noflip.pth")
    assert weights_main(["import", path, str(tmp_path), "--no-flip", "--input-gate", "sigmoid"]) == 0
    assert load_checkpoint(tmp_path / "model.safetensors").config.input_gate == "sigmoid"


def rewrite(tmp_path, change):
    """Apply `change` to the golden MAE checkpoint; return the path of the result."""
    checkpoint = torch.load(GOLDEN / "mae.pth", weights_only=False)
    change(checkpoint)
    path = tmp_path / "changed.pth"
    torch.save(checkpoint, path)
    return path


def test_wrapped_and_bare_checkpoints_are_read(tmp_path):
    expected_config, expected = import_checkpoint(GOLDEN / "mae.pth", heads=3)

    def wrap(checkpoint):
        checkpoint["model"] = {f"module._orig_mod.{name}": t for name, t in checkpoint["model"].items()}

    wrapped = import_checkpoint(rewrite(tmp_path, wrap), heads=3)
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(GOLDEN / "mae.pth", weights_only=False)["model"], bare)
    for config, tensors in (wrapped, import_checkpoint(bare, heads=3)):
        assert config == expected_config
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def add(checkpoint, name, tensor):
    checkpoint["model"][name] = tensor


def set_patches(checkpoint, frames, bands):
    add(checkpoint, "patch_embed.proj.weight", torch.zeros(48, 1, frames, bands))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them, and still reads them
        return torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("cls_token"), "missing tensor 'cls_token'"),
        (lambda c: c["model"].pop("patch_embed.proj.weight"), "missing tensor 'patch_embed.proj.weight'"),
        (lambda c: c["model"].pop("encoder.blocks.1.mlp.layer2.bias"), "missing tensor 'blocks.1.mlp.down.bias'"),
        (lambda c: c["model"].update({"encoder.blocks.0.gamma": torch.ones(3)}), "unknown tensor 'blocks.0.gamma'"),
        (lambda c: c["model"]["encoder.pos_embed"].add_(0.1), "pos_embed is not the fixed sin-cos table"),
        (lambda c: c.update(model={"a": torch.ones(1)}), "found none of the tensors"),
        (lambda c: c.update(model={0: torch.zeros(1)}), "expected a dictionary with the model's tensors under 'model'"),
        (lambda c: c["model"].update({"encoder.pos_embed": torch.zeros(())}), "a tensor has too few dimensions"),
        (lambda c: c["model"].update({"patch_embed.proj.weight": torch.zeros(48)}), "not enough values"),
        (lambda c: set_patches(c, 4, 0), "PatchConfig.patch_bands must be at least 1, got 0"),
        (lambda c: set_patches(c, 4, 81), "PatchConfig.patch_bands = 81 must divide bands = 80"),
        (lambda c: set_patches(c, 0, 16), "PatchConfig.chunk_frames must be at least 1, got 0"),
        (lambda c: add(c, f"encoder.blocks.{'9' * 5000}.norm1.weight", torch.ones(48)), "missing tensor 'blocks.2."),
        (lambda c: add(c, "encoder.blocks.\u00b2.norm1.weight", torch.ones(48)), "missing tensor 'blocks.2."),
        (lambda c: add(c, "encoder.cls_token", torch.ones(48)), "several tensors mean 'cls_token'"),
        (lambda c: add(c, "module.cls_token", torch.ones(48)), "several tensors mean 'cls_token'"),
        (lambda c: add(c, "encoder.blocks.0.ffn1.layer1.bias", torch.ones(192)), "tensors mean 'blocks.0.mlp.up.bias'"),
        (lambda c: add(c, "encoder.pos_embed", torch.ones(1).expand(1, 10**12, 48)), "more than the file has bytes"),
        (lambda c: add(c, "encoder.pos_embed", torch.ones(1).half().expand(1, 10**12, 48)), "more than the file"),
        (
            lambda c: add(c, "cls_token", torch.ones(48).to_sparse()),
            "is torch.float32, torch.sparse_coo on cpu",
        ),
        (
            lambda c: add(c, "cls_token", torch.ones(48, device="meta")),
            "torch.strided on meta; expected a plain",
        ),
        (lambda c: add(c, "cls_token", torch.ones(48).to(torch.float8_e5m2)), "is torch.float8_e5m2"),
        (lambda c: add(c, "cls_token", torch.ones(48, dtype=torch.complex64)), "is torch.complex64"),
        (lambda c: add(c, "cls_token", quantized()), "is torch.quint8"),
        (lambda c: c.update(model=[1, 2]), "expected a dictionary with the model's tensors under 'model'"),
    ],
)
def test_incomplete_or_unknown_checkpoint_is_named(change, message, tmp_path, capsys):
    path = rewrite(tmp_path, change)
    assert weights_main(["import", str(path), str(tmp_path / "out"), "--heads", "3"]) == 2
    error = capsys.readouterr().err
    assert "changed.pth" in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"])
def test_file_of_another_format_is_named(content, tmp_path):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.pth: not a readable torch checkpoint"):
        import_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        import_checkpoint(tmp_path / "nothing.pth")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(10**6)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    with pytest.raises(ValueError, match=r"bomb\.pth: .* unpacks to more than its own size"):
        import_checkpoint(tmp_path / "bomb.pth")


class Trap:
    """An object whose unpickling calls a function that would leave a file behind."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec])
def test_nothing_in_the_pickle_is_executed(function, tmp_path):
    trace = tmp_path / "executed"
    argument = str(trace) if function is os.mkdir else f"import os; os.mkdir({str(trace)!r})"
    path = rewrite(tmp_path, lambda c: c.update(args=argparse.Namespace(trap=Trap(function, argument))))
    try:
        config, _ = import_checkpoint(path, heads=3)
        assert config.dim == 48  # read, with the trap made inert
    except ValueError as error:  # or refused
        assert "changed.pth" in str(error)
    assert not trace.exists()
    with pytest.raises((FileExistsError, pickle.UnpicklingError, TypeError)):  # the trap works
        trace.mkdir()
        torch.load(path, weights_only=False)
        raise TypeError
