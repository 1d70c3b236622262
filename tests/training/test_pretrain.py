"""Training: resumed runs end bit for bit the same, processes share a batch, and training stops when it must."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tensorboardX.proto import event_pb2

import hear_audiomaepp
import hear_axlstm
from hear_encoders import AxLSTMConfig, Embedder, build_encoder
from hear_encoders.nn.patches import patchify
from training import curves, export, figures, pretrain, run_dir
from training.config import load_run_config
from training.corpora import prepare
from training.corpora.shards import JoinedShards, ShardIndex
from training.data import Crops, RowBatches, crop_loader
from training.flops import count_flop
from training.held_out import FixedCrops
from training.objectives import count_clip_flop
from training.run_log import RunLog

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
CPU = pretrain.DistributedContext(0, 1, torch.device("cpu"))
FAMILIES = ["audiomaepp", "mae", "axlstm", "ssast"]
SMALL = [
    "encoder.dim=48",
    "encoder.depth=1",
    "batch_size=8",
    "max_steps=12",
    "warmup_steps=2",
    "workers=0",
    "picture_every=null",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of eight short recordings: tones that glide, each differently."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(8):
        seconds = np.arange(4 * 16000) / 16000
        tone = np.sin(2 * np.pi * (200 + 150 * number) * seconds * (1 + 0.1 * number * seconds))
        soundfile.write(folder / f"{number}.wav", 0.3 * tone, 16000)
    output = tmp_path_factory.mktemp("shards") / "out"
    assert prepare.main([str(folder), str(output), "--jobs", "1"]) == 0
    return output


@pytest.fixture(scope="session")
def eight_clips(tmp_path_factory):
    """Shards of eight 2 s clips, each with its own harmonics and rhythm."""
    folder = tmp_path_factory.mktemp("clips")
    seconds = np.arange(2 * 16000) / 16000
    for number in range(8):
        pitch = (150 + 120 * number) * (1 + 0.05 * number * seconds)
        tone = sum(np.sin(2 * np.pi * harmonic * pitch * seconds) / harmonic for harmonic in range(1, 8))
        beat = 0.6 + 0.4 * np.sign(np.sin(2 * np.pi * (1 + number) * seconds))
        soundfile.write(folder / f"{number}.wav", 0.1 * tone * beat, 16000)
    output = tmp_path_factory.mktemp("shards") / "out"
    assert prepare.main([str(folder), str(output), "--jobs", "1"]) == 0
    return output


def small(family):
    overrides = list(SMALL)
    if family != "axlstm":
        overrides.append("encoder.heads=3")
    if family in ("audiomaepp", "mae"):
        overrides += ["decoder.dim=32", "decoder.depth=1", "decoder.heads=4"]
    return overrides


def command(family, shards, out, *overrides):
    return [
        *("-m", "training.pretrain", "--config", str(CONFIGS / f"{family}_tiny.yaml")),
        *("--data", str(shards), "--out", str(out), "--device", "cpu", *small(family), *overrides),
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}


def train(family, shards, out, *overrides, launcher=None):
    """Run the command, in this process or in those that `launcher` starts; return its last weights."""
    arguments = command(family, shards, out, *overrides)
    if launcher is None:
        assert pretrain.main(arguments[2:]) == 0
    else:
        result = subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return latest_weights(out)


def latest_weights(run):
    return load_file(run_dir.latest_checkpoint(run) / "model.safetensors")


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(weights, expected):
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-5)


# ---- initial weights ----


def test_a_run_can_start_from_another_runs_weights(shards, tmp_path):
    train("audiomaepp", shards, tmp_path / "first", "max_steps=4")
    begun = command("audiomaepp", shards, tmp_path / "second", f"start_from={tmp_path / 'first'}", "mask_ratio=0.5")
    assert pretrain.main([*begun[2:], "base_lr=0"]) == 0
    first, second = (latest_weights(tmp_path / run) for run in ("first", "second"))
    assert_same_bits(second, first)


def test_a_run_can_start_from_an_exported_encoder_with_a_new_head(shards, tmp_path):
    weights = train("axlstm", shards, tmp_path / "first", "max_steps=4")
    export.export(tmp_path / "first", tmp_path / "weights")
    begun = train("axlstm", shards, tmp_path / "second", f"start_from={tmp_path / 'weights'}", "seed=1", "base_lr=0")
    differing = [name for name in weights if not torch.equal(weights[name], begun[name])]
    assert differing and not [name for name in differing if name.startswith("encoder.")]


def test_a_run_with_another_decoder_takes_only_the_encoder(shards, tmp_path):
    weights = train("mae", shards, tmp_path / "first", "max_steps=4")
    start = f"start_from={tmp_path / 'first'}"
    begun = train("mae", shards, tmp_path / "second", start, "decoder.dim=16", "base_lr=0")
    assert begun["decoder.norm.weight"].shape == (16,)
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    assert_same_bits({name: begun[name] for name in encoder}, encoder)


def test_a_resumed_run_ignores_start_from(shards, tmp_path):
    train("axlstm", shards, tmp_path / "first", "max_steps=4")
    start = f"start_from={tmp_path / 'first'}"
    whole = train("axlstm", shards, tmp_path / "whole", start)
    train("axlstm", shards, tmp_path / "parts", start, "max_hours=0")
    shutil.rmtree(tmp_path / "first")  # no longer needed
    assert run_dir.latest_checkpoint(tmp_path / "parts").name == "checkpoint-00000001"
    parts = train("axlstm", shards, tmp_path / "parts", start)
    assert_same_bits(parts, whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start_from=nowhere"], "nowhere: no such file or directory"),
        (["start_from={run}", "encoder.depth=2"], "has depth = 1, this run 2"),
        (["start_from={empty}"], "has no checkpoint yet"),
    ],
)
def test_unusable_initial_weights_are_refused(overrides, message, shards, tmp_path, capsys):
    train("axlstm", shards, tmp_path / "run", "max_steps=2", "warmup_steps=1")
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "empty")
    places = {"run": tmp_path / "run", "empty": tmp_path / "empty"}
    overrides = [override.format(**places) for override in overrides]
    assert pretrain.main(command("axlstm", shards, tmp_path / "second", *overrides)[2:]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_clips_are_learned_better_than_interpolation_predicts_them(family, eight_clips, tmp_path):
    overrides = [
        *("encoder.dim=96", "encoder.depth=1", "encoder.patches.patch_frames=20", "batch_size=8", "mask_ratio=0.5"),
        *("max_steps=300", "warmup_steps=10", "base_lr=0.1", "clip_grad=1", "workers=0", "picture_every=null"),
        *("held_out_every=1000", "held_out_clips=8"),  # at the beginning and at the end
    ]
    if family == "mae":  # learns more slowly, computes faster
        overrides.append("max_steps=400")
    if family != "axlstm":
        overrides.append("encoder.heads=3")
    if family in ("audiomaepp", "mae"):
        overrides += ["decoder.dim=96", "decoder.depth=1", "decoder.heads=3"]
    config = load_run_config(CONFIGS / f"{family}_tiny.yaml", overrides)
    index = ShardIndex.open(eight_clips)
    assert pretrain.Trainer(config, index, tmp_path, CPU, held_out=index).fit()
    first, last = [line for line in read_log(tmp_path) if "held_out_loss" in line]
    assert first["step"] == 0 and first["held_out_loss"] > first["held_out_mean"]  # untrained
    assert last["held_out_loss"] < 0.5 * last["held_out_mean"]
    assert last["held_out_loss"] < last["held_out_interpolation"] < last["held_out_mean"]


def kill_again_and_again(run, arguments):
    """Start and kill the run twenty times, in forks of this process, which need not import anything again."""
    import torch._dynamo  # the first optimizer would import it, for seconds

    torch.set_num_threads(1)
    chance = random.Random(0)
    for _ in range(20):
        said, output = os.pipe()
        process = os.fork()  # safe: this process has no threads
        if process == 0:
            os.dup2(output, sys.stdout.fileno())
            os._exit(pretrain.main(arguments))
        os.close(output)
        with os.fdopen(said) as lines:
            if lines.readline():  # the first line, or "resumed from ..."
                time.sleep(chance.uniform(0, 0.4))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert all((path / "state.pt").exists() for path in run.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(shards, tmp_path):
    overrides = ["max_steps=60", "save_every=2", "encoder.dim=96"]  # saves often, so that some kills hit a save
    expected = train("audiomaepp", shards, tmp_path / "whole", *overrides)
    run = tmp_path / "killed"
    arguments = command("audiomaepp", shards, run, *overrides)[2:]
    killer = multiprocessing.get_context("spawn").Process(target=kill_again_and_again, args=(run, arguments))
    killer.start()
    killer.join()
    assert killer.exitcode == 0
    assert_same_bits(train("audiomaepp", shards, run, *overrides), expected)
    assert [line["step"] for line in read_log(run)] == [10, 20, 30, 40, 50, 60]


def test_a_second_command_on_a_run_is_refused_while_the_first_lives(shards, tmp_path, capsys):
    overrides = ["max_steps=100000", "workers=1", "max_hours=0"]
    first = subprocess.Popen(
        [sys.executable, *command("mae", shards, tmp_path / "run", *overrides[:2])],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline()  # it trains, and its worker runs
        assert pretrain.main(command("mae", shards, tmp_path / "run", *overrides)[2:]) == 2
        assert "another process is writing" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()
    train("mae", shards, tmp_path / "run", *overrides)  # at once: the orphaned worker does not hold the lock


@pytest.mark.parametrize(
    ("family", "optimizer"), [*((family, "adamw") for family in FAMILIES), ("axlstm", "muon"), ("mae", "muon")]
)
def test_a_stopped_and_resumed_run_ends_bit_for_bit_the_same(family, optimizer, shards, tmp_path):
    def trainer(out, *overrides):
        settings = [*small(family), f"optimizer={optimizer}", *overrides]
        config = load_run_config(CONFIGS / f"{family}_tiny.yaml", settings)
        return pretrain.Trainer(config, ShardIndex.open(shards), out, CPU)

    whole = trainer(tmp_path / "whole")
    assert whole.fit()
    first = trainer(tmp_path / "parts", "max_hours=1e-9")
    assert not first.fit() and first.step == 1
    second = trainer(tmp_path / "parts")
    assert second.step == 1 and second.fit()
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_hashes(checkpoint):
    """Make a checkpoint one of an older version."""
    (checkpoint / "sha256.json").unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip_bit(c / "model.safetensors"), "model.safetensors has another SHA-256 than sha256.json says"),
        (lambda c: flip_bit(c / "state.pt"), "state.pt has another SHA-256"),
        (lambda c: (c / "sha256.json").write_text("{"), "not valid JSON"),
        (lambda c: (c / "sha256.json").write_text("[]"), "checkpoint-00000008 is damaged"),
        (lambda c: (c / "state.pt").unlink(), "No such file"),
        (lambda c: (without_hashes(c), truncate(c / "model.safetensors")), "checkpoint-00000008 is damaged"),
        (lambda c: (without_hashes(c), truncate(c / "state.pt")), "checkpoint-00000008 is damaged"),
        (lambda c: shutil.rmtree(c) or c.mkdir(), "checkpoint-00000008 is damaged"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, message, tmp_path, caplog):
    for step in (4, 8):
        run_dir.save_checkpoint(tmp_path, step, {"weight": torch.full((99,), float(step))}, {"step": step})
    damage(tmp_path / "checkpoint-00000008")
    checkpoint, tensors, state = run_dir.load_latest_checkpoint(tmp_path)
    assert (checkpoint.name, tensors["weight"][0], state["step"]) == ("checkpoint-00000004", 4, 4)
    assert message in caplog.text and "looking for an earlier checkpoint" in caplog.text
    truncate(tmp_path / "checkpoint-00000004" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no undamaged checkpoint: .*checkpoint-00000008 is damaged"):
        run_dir.load_latest_checkpoint(tmp_path)


def test_checkpoints_of_older_versions_have_no_hashes_and_load(tmp_path):
    without_hashes(run_dir.save_checkpoint(tmp_path, 3, {"weight": torch.ones(3)}, {"step": 3}))
    assert run_dir.load_latest_checkpoint(tmp_path)[2] == {"step": 3}


def test_a_run_whose_newest_checkpoint_is_damaged_ends_bit_for_bit_the_same(shards, tmp_path, capsys):
    whole = train("mae", shards, tmp_path / "whole", "save_every=4")
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)  # with the checkpoints of steps 8 and 12
    flip_bit(parts / "checkpoint-00000012" / "state.pt")
    assert_same_bits(train("mae", shards, parts, "save_every=4"), whole)
    run_dir.load_checkpoint(parts / "checkpoint-00000012")  # written again
    assert (parts / "damaged-checkpoint-00000012").is_dir()
    for checkpoint in parts.glob("checkpoint-*"):
        flip_bit(checkpoint / "model.safetensors")
    assert pretrain.main(command("mae", shards, parts, "save_every=4")[2:]) == 2
    assert "has no undamaged checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", b'{"step": 1}\n{"ste\xff": 2}\n', r"log\.jsonl, line 2: damaged"),
        ("log.jsonl", b"[1]\n", r"log\.jsonl, line 1: damaged"),
        ("run.json", b"[1]", r"run\.json: expected a JSON object, got list: damaged"),
        ("run.json", b"{}", r"run\.json: missing key 'encoder'"),
        ("data.json", b"{", r"data\.json: not valid JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_before_anything_is_trained(name, content, message, shards, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert pretrain.main(command("mae", shards, tmp_path)[2:]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert run_dir.steps_saved(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_damaged_during_a_run_is_one_line_and_the_state_is_saved(workers, shards, tmp_path, capsys):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    index = ShardIndex.open(copy)
    content = bytearray((copy / "shard-000000.tar").read_bytes())
    content[int(index.offsets[5]) + 99] ^= 1
    (copy / "shard-000000.tar").write_bytes(content)
    overrides = ["batch_size=1", "log_every=1", f"workers={workers}"]
    assert pretrain.main(command("mae", copy, tmp_path / "run", *overrides)[2:]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "shard-000000.tar is damaged: the checksum of record 5 differs; the run can go on" in line
    assert run_dir.steps_saved(tmp_path / "run") == [len(read_log(tmp_path / "run"))]


@pytest.mark.parametrize("large", ["model.safetensors", "state.pt"])
def test_a_full_disk_is_named_with_the_file_and_leaves_earlier_checkpoints(tmp_path, large):
    resource = pytest.importorskip("resource")
    run_dir.save_checkpoint(tmp_path, 1, {"weight": torch.zeros(3)}, {"step": 1})
    model = {"weight": torch.zeros(10_000 if large == "model.safetensors" else 3)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match=rf"File too large.*{large}|{large}.*File too large"):
            run_dir.save_checkpoint(tmp_path, 2, model, {"step": 2, "optimizer": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run_dir.steps_saved(tmp_path) == [1]


def test_a_full_disk_is_named_with_the_log(tmp_path):
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, 0, 9, 1, 1.0)
    log.add(1.0, 1.0, 0.1, 1, 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*log\.jsonl'"):
            log.write(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()


def test_an_error_of_the_disk_is_one_line(shards, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.pt")

    monkeypatch.setattr(pretrain, "save_checkpoint", fail)
    assert pretrain.main(command("mae", shards, tmp_path)[2:]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("No space left on device: 'state.pt'; the run can go on from its newest checkpoint")


TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.long
@pytest.mark.parametrize(("family", "overrides"), [("axlstm", ()), ("audiomaepp", ("fsdp=true", "accumulate=2"))])
def test_two_stopped_and_resumed_processes_match_one_on_the_same_global_batch(family, overrides, shards, tmp_path):
    one = train(family, shards, tmp_path / "one", "clip_grad=1")
    run, more = tmp_path / "two", ("clip_grad=1", "save_every=5", *overrides)
    train(family, shards, run, "max_hours=1e-9", *more, launcher=TWO_PROCESSES)
    assert run_dir.steps_saved(run) == [1]
    assert_close(train(family, shards, run, *more, launcher=TWO_PROCESSES), one)


def test_processes_with_different_deadlines_stop_together(shards, tmp_path):
    train("axlstm", shards, tmp_path, "max_hours=5e-5", "max_steps=100000", launcher=TWO_PROCESSES)
    (step,) = run_dir.steps_saved(tmp_path)
    assert step < 100000


def test_sharding_a_model_needs_processes(shards, tmp_path, capsys):
    assert pretrain.main(command("mae", shards, tmp_path, "fsdp=true")[2:]) == 2
    assert "start with torchrun" in capsys.readouterr().err
    assert pretrain.main(command("mae", shards, tmp_path / "half", "fsdp=true", "precision=float16")[2:]) == 2
    assert "use bfloat16" in capsys.readouterr().err
    assert pretrain.main(command("mae", shards, tmp_path / "muon", "fsdp=true", "optimizer=muon")[2:]) == 2
    assert "use adamw" in capsys.readouterr().err


def test_accumulated_micro_batches_match_the_whole_batch(shards, tmp_path):
    one, parts = train("mae", shards, tmp_path / "one"), train("mae", shards, tmp_path / "parts", "accumulate=4")
    assert_close(parts, one)


def test_sigterm_saves_and_exits_cleanly(shards, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *command("ssast", shards, tmp_path, "max_steps=100000", "log_every=1")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("step 1 of 100000")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped and saved at step" in output
    step = int(output.rsplit("step ", 1)[1])
    assert run_dir.steps_saved(tmp_path) == [step]


def test_the_first_optimizer_step_prints_rate_and_time_left_and_leaves_the_log_alone(tmp_path, caplog):
    log = RunLog(tmp_path, 0, total_steps=101, clip_flop=1, flop_rate=100)
    log.add(1.0, 1.0, 0.1, clips=1, seconds=36.0)
    with caplog.at_level("INFO", "training"):
        log.print_progress(1)
        log.deadline = time.monotonic() + 61.5
        log.write(1)
    first, second = caplog.messages
    assert "0.028 clips/s" in first and first.endswith("1:00:00 left")
    assert second.endswith("01:01 left")
    assert [line["step"] for line in read_log(tmp_path)] == [1]


def test_a_non_finite_loss_stops_training_with_the_state_before_it_saved(shards, tmp_path, monkeypatch, capsys):
    step = pretrain.Trainer.train_step

    def poisoned(self, parts):
        return step(self, [part * float("nan") for part in parts] if self.step == 5 else parts)

    monkeypatch.setattr(pretrain.Trainer, "train_step", poisoned)
    assert pretrain.main(command("axlstm", shards, tmp_path)[2:]) == pretrain.NOT_FINITE
    assert "the loss of step 5 is nan" in capsys.readouterr().err
    assert run_dir.steps_saved(tmp_path) == [5]
    assert all(tensor.isfinite().all() for tensor in latest_weights(tmp_path).values())


@pytest.mark.parametrize(
    ("overrides", "survives"), [((), False), (("precision=float16", "optimizer=muon", "clip_grad=null"), True)]
)
def test_a_non_finite_gradient_stays_out_of_the_weights(overrides, survives, shards, tmp_path, monkeypatch, capsys):
    """With float16 it is normal: the scale was too large, and the optimizer step is skipped."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, limit):
        parameters = list(parameters)
        calls.append(limit)
        if len(calls) == 6:
            parameters[-1].grad.view(-1)[0] = torch.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    outcome = pretrain.main(command("axlstm", shards, tmp_path, "max_steps=7", *overrides)[2:])
    assert outcome == (0 if survives else pretrain.NOT_FINITE)
    assert ("the gradient of step 5 is inf" in capsys.readouterr().err) != survives
    assert run_dir.steps_saved(tmp_path) == [7 if survives else 5]
    assert all(tensor.isfinite().all() for tensor in latest_weights(tmp_path).values())


def test_a_signal_during_an_optimizer_step_is_remembered(shards, tmp_path, monkeypatch):
    config = load_run_config(CONFIGS / "mae_tiny.yaml", small("mae"))
    trainer = pretrain.Trainer(config, ShardIndex.open(shards), tmp_path, CPU)
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_signal(*arguments):  # after the step has asked for signals
        trainer.stop_requested = trainer.stop_requested or trainer.step == 3
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)
    assert not trainer.fit()
    assert run_dir.steps_saved(tmp_path) == [5]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains(precision, shards, tmp_path):
    weights = train("axlstm", shards, tmp_path, f"precision={precision}", "max_steps=4")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_trains_like_the_eager_one(shards, tmp_path):
    one = train("ssast", shards, tmp_path / "one")
    # in its own process, so that torch.compile leaves no state for other tests
    compiled = train("ssast", shards, tmp_path / "compiled", "compile=true", launcher=[sys.executable])
    assert_close(compiled, one)


def read_tensorboard(run):
    """Read a run's events: {(step, tag): value} of scalars, {(step, tag)} of pictures."""
    scalars, pictures = {}, set()
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records: length, its checksum, an event, its checksum
            length = int.from_bytes(data[:8], "little")
            event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.add((event.step, value.tag))
                else:
                    scalars[event.step, value.tag] = value.simple_value
    return scalars, pictures


def test_a_run_logs_held_out_errors_and_writes_tensorboard(shards, eight_clips, tmp_path):
    more = ["log_every=2", "max_steps=4", "held_out_every=2", "held_out_clips=5", "picture_every=2", "accumulate=2"]
    arguments = [*command("mae", shards, tmp_path, *more)[2:], "--held-out", str(eight_clips)]
    assert pretrain.main(arguments) == 0
    lines = read_log(tmp_path)
    training, held_out = ([line for line in lines if key in line] for key in ("loss", "held_out_loss"))
    assert [line["step"] for line in training] == [2, 4]
    assert [(line["step"], line["clips"]) for line in held_out] == [(0, 0), (2, 16), (4, 32)]
    scalars, drawn = read_tensorboard(tmp_path)
    for line in lines:
        for name in line.keys() - {"step", "clips"}:
            assert scalars[line["step"], name] == pytest.approx(line[name], rel=1e-6)
    assert {"loss", "learning_rate", "gradient_norm", "clips_per_s", "mfu"} < training[0].keys()
    assert training[0]["mfu"] > 0  # above 1 if the machine was busier when its matmul rate was measured
    assert drawn == {(0, "reconstruction"), (2, "reconstruction"), (4, "reconstruction")}
    for step in (0, 2, 4):
        assert (tmp_path / "pictures" / f"step-{step:08d}.png").read_bytes().startswith(b"\x89PNG")
    # The error is that of the saved weights, on the same crops and masks.
    config, index = run_dir.read_run_config(tmp_path), ShardIndex.open(eight_clips)
    model = pretrain.build_model(config)
    model.load_state_dict(latest_weights(tmp_path))
    fixed = FixedCrops(index, config, 5)
    assert fixed.error(fixed.predict(model, CPU.device)) == pytest.approx(held_out[-1]["held_out_loss"], abs=1e-5)
    assert curves.main([str(tmp_path / "curve.png"), str(tmp_path)]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_a_run_started_from_another_begins_where_that_one_ended(eight_clips, tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("first", "second", "third")]
    for run, before in zip(runs, [None, *runs]):
        more = [f"start_from={before}"] if before else []
        settings = ["max_steps=2", "held_out_every=1", "held_out_clips=2", *more]
        train("ssast", eight_clips, run, *settings, f"--held-out={eight_clips}")
    drawn = []
    monkeypatch.setattr(curves, "held_out_figure", lambda lines: drawn.append(lines) or figures.Figure())
    assert curves.main([str(tmp_path / "curve.png"), *map(str, reversed(runs))]) == 0
    assert curves.main([str(tmp_path / "curve.png"), str(runs[2])]) == 0
    clips = [
        {name: [line["clips"] for line in lines] for name, lines in lines_of_runs.items()} for lines_of_runs in drawn
    ]
    assert [clips[0][run.name][0] for run in runs] == [0, 16, 32] and clips[0]["third"][-1] == 48
    assert clips[1]["third"][0] == 0  # runs that are not given do not count


def test_curves_of_a_run_without_held_out_records_are_an_error(shards, tmp_path, capsys):
    assert curves.main([str(tmp_path / "curve.png"), str(tmp_path / "nothing")]) == 2
    train("mae", shards, tmp_path / "run")
    assert curves.main([str(tmp_path / "curve.png"), str(tmp_path / "run")]) == 2
    assert "was trained without --held-out" in capsys.readouterr().err


def test_baselines_use_the_visible_patches(eight_clips):
    config = load_run_config(CONFIGS / "mae_tiny.yaml")
    fixed = FixedCrops(ShardIndex.open(eight_clips), config, 8)
    seen = fixed.masking.mask == 0
    errors = []
    for patches, visible in zip(fixed.target, seen):
        errors.append((patches[~visible] - patches[visible].mean()).square().mean().item())
    assert fixed.baselines.mean == pytest.approx(np.mean(errors), rel=1e-4)
    # A spectrogram that is constant in time is known from any visible patch of the same bands.
    fixed = FixedCrops(ShardIndex.open(eight_clips), config, 8)
    fixed.logmel = torch.linspace(-1, 1, 80).expand(8, 200, 80).contiguous()
    fixed.target = patchify(fixed.logmel, config.encoder.patches)
    assert fixed.baselines.interpolation < 0.01 * fixed.baselines.mean


def test_flops_per_clip_are_those_of_its_matmuls():
    overrides = ["encoder.dim=64", "encoder.depth=2", "encoder.heads=2"]
    config = load_run_config(CONFIGS / "ssast_tiny.yaml", overrides)
    dim, tokens, patches = 64, 251, 250
    block = 2 * tokens * dim * (3 * dim + dim + 2 * 4 * dim)
    attention = 2 * 2 * tokens * tokens * dim
    ends = 2 * patches * 64 * dim  # projection of patches, whose input needs no gradient
    head = 2 * patches * (dim * dim + dim * 64)
    # The backward pass of attention recomputes the scores.
    expected = 2 * (3 * block + attention + 2.5 * attention) + 2 * ends + 3 * head
    assert count_clip_flop(config) == pytest.approx(expected, rel=0.01)


def test_flops_of_an_embedder_do_not_depend_on_its_threads(noise):
    embedder = Embedder(build_encoder(AxLSTMConfig("axlstm", dim=48, depth=1)).eval())
    embedder.scene_embeddings(noise(2, 32_000))  # the first call folds weights
    counts, threads = [], torch.get_num_threads()
    for torch_threads in (1, 2):
        torch.set_num_threads(torch_threads)
        counts.append(count_flop(lambda: embedder.scene_embeddings(noise(2, 32_000))))
    torch.set_num_threads(threads)
    assert counts[0] == counts[1] > 5e7


def test_the_newest_checkpoints_and_the_milestones_are_kept(shards, tmp_path):
    train("mae", shards, tmp_path, "save_every=1", "keep_last=2", "milestone_every=5")
    assert run_dir.steps_saved(tmp_path) == [5, 10, 11, 12]
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_a_run_refuses_to_resume_with_another_config(shards, tmp_path, capsys):
    train("mae", shards, tmp_path)
    assert pretrain.main(command("mae", shards, tmp_path, "base_lr=1")[2:]) == 2
    assert "was begun with base_lr = 0.00015, now 1.0" in capsys.readouterr().err
    assert pretrain.main(command("mae", shards, tmp_path, "log_every=3")[2:]) == 0


def test_a_run_of_an_older_version_whose_config_lacks_settings_resumes(shards, tmp_path):
    train("axlstm", shards, tmp_path, "max_hours=0")
    path = tmp_path / "run.json"
    settings = json.loads(path.read_text())
    assert settings.pop("mask_positions") is True and settings.pop("optimizer") == "adamw"
    path.write_text(json.dumps(settings))
    train("axlstm", shards, tmp_path)
    assert run_dir.steps_saved(tmp_path)[-1] == 12


def test_a_run_refuses_to_resume_with_other_data(shards, eight_clips, tmp_path, capsys):
    train("mae", shards, tmp_path / "run", "max_hours=0")
    assert pretrain.main(command("mae", eight_clips, tmp_path / "run")[2:]) == 2
    assert "was begun with other records than those of --data" in capsys.readouterr().err
    shutil.copytree(shards, tmp_path / "moved")
    assert pretrain.main(command("mae", tmp_path / "moved", tmp_path / "run")[2:]) == 0


def test_a_run_can_be_made_longer_until_it_cools_down(shards, tmp_path, capsys):
    straight = train("mae", shards, tmp_path / "straight", "cooldown_steps=4")
    train("mae", shards, tmp_path / "longer", "cooldown_steps=4", "max_steps=8", "max_hours=0")
    assert run_dir.steps_saved(tmp_path / "longer") == [1]
    longer = train("mae", shards, tmp_path / "longer", "cooldown_steps=4")
    assert_same_bits(longer, straight)
    arguments = command("mae", shards, tmp_path / "longer", "cooldown_steps=4", "max_steps=20")[2:]
    assert pretrain.main(arguments) == 2
    assert "has made 12 optimizer steps and cools down from step 8" in capsys.readouterr().err
    assert run_dir.read_run_config(tmp_path / "longer").max_steps == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_run_gives_the_features_of_the_trained_encoder(family, shards, tmp_path, capsys):
    weights = train(family, shards, tmp_path / "run")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    module = hear_audiomaepp if family in ("audiomaepp", "mae") else hear_axlstm
    embedder = module.load_model(tmp_path / "out")
    model = pretrain.build_model(load_run_config(CONFIGS / f"{family}_tiny.yaml", small(family)))
    model.load_state_dict(weights)
    logmel = torch.randn(2, 200, 80)
    with torch.no_grad():
        assert torch.equal(embedder.encoder(logmel), model.eval().encoder(logmel))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Optimizer steps: 12, of 8 crops" in card and '"max_steps": 12' in card
    (tmp_path / "out" / "README.md").write_text("completed")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == "completed"


def test_weights_exported_as_float16_take_half_the_space_and_lose_little_accuracy(shards, tmp_path):
    train("axlstm", shards, tmp_path / "run")
    for name, options in (("whole", []), ("half", ["--half"])):
        assert export.main([str(tmp_path / "run"), str(tmp_path / name), *options]) == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    audio = torch.randn(1, 32000, generator=torch.Generator().manual_seed(0)) / 10
    models = [hear_axlstm.load_model(tmp_path / name) for name in ("whole", "half")]
    assert all(parameter.dtype == torch.float32 for parameter in models[1].parameters())
    whole, half = (hear_axlstm.get_scene_embeddings(audio, model) for model in models)
    assert 0 < (half - whole).norm() / whole.norm() < 1e-3


def test_exporting_needs_no_git(shards, tmp_path, monkeypatch):
    train("mae", shards, tmp_path / "run", "max_hours=0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "commit unknown" in (tmp_path / "out" / "README.md").read_text()


def test_exporting_another_directory_is_an_error(tmp_path, capsys):
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_each_epoch_has_every_record_once_in_a_new_order(shards):
    crops = Crops(ShardIndex.open(shards), 200, 2, "record", seed=3)
    epochs = [[crops.record_at(place) for place in range(8 * epoch, 8 * epoch + 8)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_do_not_depend_on_processes_workers_or_the_first_step(shards):
    crops = Crops(ShardIndex.open(shards), 200, 2, "record", seed=3)
    expected = torch.stack([crops[row] for row in range(3 * 8)])
    halves = [list(RowBatches(8, 2, rank, 2, first_step=0, steps=3)) for rank in (0, 1)]
    rows = [row for step in range(3) for half in halves for part in half[2 * step : 2 * step + 2] for row in part]
    assert rows == list(range(24))
    batches = RowBatches(8, 1, 0, 1, first_step=1, steps=3)
    read = torch.cat(list(crop_loader(crops, batches, workers=2, pin_memory=False)))
    assert torch.equal(read, expected[8:])


def test_a_mixture_draws_its_percentages_and_every_record_of_each_folder_in_turn(shards, eight_clips):
    joined = JoinedShards([ShardIndex.open(shards), ShardIndex.open(eight_clips)])
    assert joined.sizes == [8, 8] and joined.record(11) == joined.indices[1].record(3)
    assert np.array_equal(joined.read(-1), joined.indices[1].read(7))
    with pytest.raises(IndexError):
        joined.read(16)
    crops = Crops(joined, 200, 2, "record", seed=3, mixture_percent=(75, 25))
    places = [crops.record_at(place) for place in range(400)]
    assert all(sum(record >= 8 for record in places[first : first + 100]) == 25 for first in range(0, 400, 100))
    for folder in (range(8), range(8, 16)):
        drawn = [record for record in places if record in folder]
        assert all(sorted(drawn[first : first + 8]) == list(folder) for first in range(0, len(drawn) // 8 * 8, 8))
    again = Crops(joined, 200, 2, "record", seed=3, mixture_percent=(75, 25))
    assert [again.record_at(place) for place in reversed(range(400))] == places[::-1]
    alike = Crops(joined, 200, 2, "record", seed=3)
    assert sorted(alike.record_at(place) for place in range(16)) == list(range(16))


def test_shares_that_do_not_match_the_folders_are_refused(shards, tmp_path, capsys):
    for shares, expected in (("[50,50]", "a percentage for each of 1 folders"), ("[60,50]", "sum to 100")):
        run = command("mae", shards, tmp_path / "run", f"shares={shares}")[2:]
        assert pretrain.main(run) == 2
        assert expected in capsys.readouterr().err


def test_a_run_mixes_several_folders_and_records_their_shares(shards, eight_clips, tmp_path):
    run = command("mae", shards, tmp_path, "shares=[40,60]", "max_steps=1")[2:]
    run[2:2] = ["--data", str(eight_clips)]
    assert pretrain.main(run) == 0
    assert run_dir.read_run_config(tmp_path).shares == (40, 60)
    assert pretrain.main([*run, "shares=[50,50]"]) == 2


def test_crops_are_normalized_over_the_record_or_the_crop(shards):
    index = ShardIndex.open(shards)
    by_crop = Crops(index, 200, 1, "crop", seed=0)[0]
    assert by_crop.mean().item() == pytest.approx(0, abs=1e-4) and by_crop.std().item() == pytest.approx(1, abs=1e-3)
    whole = Crops(index, 401, 1, "record", seed=0)[0]
    assert whole.mean().item() == pytest.approx(0, abs=1e-4)


def test_a_record_shorter_than_a_crop_is_repeated(shards):
    crop = Crops(ShardIndex.open(shards), 500, 1, "record", seed=0)[0]
    assert crop.shape == (500, 80)
    assert torch.equal(crop[:99], crop[401:])  # the record has 401 frames


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="batch_size = 10 must be divisible by accumulate x processes = 2 x 2"):
        RowBatches(10, 2, 0, 2, 0, 1)
