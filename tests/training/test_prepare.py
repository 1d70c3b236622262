"""Preparing shards of log-mel records and reading them: content, interruptions, wrong usage."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
import webdataset
from torch.utils.data import DataLoader

from hear_encoders import load_audio
from hear_encoders.nn.frontend import LogMel
from training.corpora import shards
from training.corpora.plan import Recording, cut, make_plan, read_excerpts
from training.corpora.prepare import main
from training.corpora.shards import ShardIndex

REPOSITORY = Path(__file__).parents[2]

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, locks or descriptors")

# name: sample rate, channels, samples, and the resulting records as (start_s, duration_s)
RECORDINGS = {
    "long.wav": (16_000, 1, 400_000, [(0, 10), (10, 10), (20, 5)]),
    "music/album.one/track 1.flac": (44_100, 2, 890_820, [(0, 10), (10, 10)]),  # 0.2 s are dropped
    "music/album.one/track 1.wav": (8000, 1, 82_400, [(0, 10), (10, 0.3)]),
    "short.ogg": (16_000, 1, 1600, [(0, 0.1)]),
    "nothing much.wav": (16_000, 1, 5, [(0, 5 / 16_000)]),
    "Ünïcode/ö.wav": (48_000, 3, 480_000, [(0, 10)]),
}
BROKEN = ["broken.wav", "music/not finite.wav"]
RECORDS = [(name, start, length) for name in sorted(RECORDINGS) for start, length in RECORDINGS[name][3]]
SETTINGS = ["--shard-records", "4", "--jobs", "1"]


@dataclass(frozen=True)
class Outcome:
    """A run's exit code, output and folder of shards."""

    code: int
    out: str
    err: str
    path: Path


def prepare(*arguments: object) -> Outcome:
    """Run the command in this process (its workers are separate processes)."""
    words = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = end.code
    return Outcome(code, out.getvalue(), err.getvalue(), Path(next(word for word in words if "shards" in word)))


def write_noise(path: Path, rate: int, channels: int, samples: int) -> None:
    """Write white noise, different for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(path.name.encode()))
    soundfile.write(path, random.uniform(-0.5, 0.5, (samples, channels)), rate)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with RECORDINGS and BROKEN. Read-only."""
    folder = tmp_path_factory.mktemp("audio")
    for name, (rate, channels, samples, _) in RECORDINGS.items():
        write_noise(folder / name, rate, channels, samples)
    (folder / "broken.wav").write_bytes(b"RIFF and then nothing")
    soundfile.write(folder / "music/not finite.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "notes.txt").write_text("not audio")
    return folder


@pytest.fixture(scope="module")
def prepared(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Prepare that folder. Read-only."""
    return prepare(audio, tmp_path_factory.mktemp("prepared") / "shards", *SETTINGS)


@pytest.fixture
def copy(prepared: Outcome, tmp_path: Path) -> Path:
    """Return a copy of the prepared shards, to be damaged."""
    return shutil.copytree(prepared.path, tmp_path / "shards")


def hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder of shards except the lock."""
    files = [file for file in path.iterdir() if file.name != ".lock"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def expected_values(audio: Path, name: str, start_s: float, length_s: float) -> np.ndarray:
    """Compute a record's values from its source."""
    samples = load_audio(audio / name)
    first = round(start_s * 16_000)
    piece = samples[first : first + round(length_s * 16_000)]
    return LogMel()(piece[None])[0].numpy().astype(np.float16)


def assert_near(values: np.ndarray, expected: np.ndarray) -> None:
    """Check that values are equal up to rounding to a neighboring float16."""
    assert values.dtype == np.float16
    np.testing.assert_array_almost_equal_nulp(values, expected, nulp=1)


# ---- what is in the shards ----


def test_every_record_is_the_logmel_of_its_part_of_the_source(audio: Path, prepared: Outcome) -> None:
    index = ShardIndex.open(prepared.path)
    records = {(record.source, record.start_s): i for i in range(len(index)) if (record := index.record(i))}
    assert sorted((r.source, r.start_s, r.duration_s) for r in map(index.record, range(len(index)))) == RECORDS
    for name, start_s, length_s in RECORDS:
        assert_near(index.read(records[name, start_s]), expected_values(audio, name, start_s, length_s))


def test_full_records_have_1001_frames_and_shorter_ones_one_more_than_their_hops(prepared: Outcome) -> None:
    index = ShardIndex.open(prepared.path)
    for i, frames in enumerate(index.frames):
        samples = round(index.record(i).duration_s * 16_000)
        assert frames == len(index.read(i)) == max(samples, 201) // 160 + 1  # 201: enough to reflect
    assert sorted(index.frames)[-5:] == [1001] * 5


def test_webdataset_reads_the_shards(audio: Path, prepared: Outcome) -> None:
    paths = [str(path) for path in sorted(prepared.path.glob("shard-*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    keys = [sample["__key__"] for sample in samples]
    assert len(set(keys)) == len(RECORDS) and not any("." in key or "/" in key for key in keys)
    about = [sample["json"] for sample in samples]
    assert sorted((one["source"], one["start_s"], one["duration_s"]) for one in about) == RECORDS
    index = ShardIndex.open(prepared.path)
    for i, sample in enumerate(samples):
        assert index.record(i).key == sample["__key__"]
        assert sample["json"]["frames"] == index.frames[i]
        np.testing.assert_array_equal(sample["logmel.npy"], index.read(i))


def test_the_index_sums_up_the_shards(prepared: Outcome) -> None:
    index = json.loads((prepared.path / "index.json").read_text())
    assert index["version"] == 1
    assert index["frontend"] == {
        **{"sample_rate": 16_000, "window": 400, "hop": 160, "bands": 80},
        **{"lowest_hz": 50.0, "highest_hz": 8000.0, "log_offset": 1.1920929e-07},
    }
    assert index["records"] == sum(shard["records"] for shard in index["shards"]) == len(RECORDS)
    assert index["hours"] == pytest.approx(sum(length for _, _, length in RECORDS) / 3600)
    assert index["failed"] == len(BROKEN)
    for number, shard in enumerate(index["shards"]):
        assert shard["name"] == f"shard-{number:06d}.tar"
        assert shard["bytes"] == (prepared.path / shard["name"]).stat().st_size
        assert shard["records"] <= 4
    assert f"{len(RECORDS)} records" in prepared.out


def test_unreadable_files_are_listed_and_skipped(prepared: Outcome) -> None:
    assert prepared.code == 1
    sidecars = [json.loads(path.read_text()) for path in prepared.path.glob("shard-*.json")]
    failed = [failure for sidecar in sidecars for failure in sidecar["failed"]]
    assert sorted(failure["source"] for failure in failed) == sorted(BROKEN)
    for name in BROKEN:
        assert f"failed: {name}" in prepared.err
    assert not any(record["source"] in BROKEN for sidecar in sidecars for record in sidecar["records"])


def test_a_shard_of_unreadable_files_is_empty(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for name in "ab":
        write_noise(folder / f"{name}.wav", 16_000, 1, 16_000)
    for name in "cde":
        (folder / f"{name}.wav").write_bytes(b"RIFF")
    outcome = prepare(folder, tmp_path / "shards", "--shard-records", 1, "--jobs", 1)
    assert outcome.code == 1 and "2 records" in outcome.out
    index = ShardIndex.open(outcome.path)
    assert sorted(index.record(i).source for i in range(len(index))) == ["a.wav", "b.wav"]
    paths = [str(path) for path in sorted(outcome.path.glob("shard-*.tar"))]
    assert len(paths) == 5
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [index.record(i).key for i in range(len(index))]


# ---- selecting and cutting ----


@pytest.mark.parametrize(
    "samples, expected",
    [
        (1, [(0, 1)]),
        (4799, [(0, 4799)]),
        (160_000, [(0, 160_000)]),
        (164_799, [(0, 160_000)]),
        (164_800, [(0, 160_000), (160_000, 164_800)]),
        (330_000, [(0, 160_000), (160_000, 320_000), (320_000, 330_000)]),
    ],
)
def test_a_recording_is_cut_into_full_records_and_a_remainder_of_at_least_300_ms(samples, expected) -> None:
    assert list(cut(samples, [], 160_000)) == expected


@pytest.mark.parametrize(
    "samples, expected",
    [
        (640_000, [(480_000, 640_000)]),  # long enough: the excerpt
        (
            639_999,
            [(0, 160_000), (160_000, 320_000), (320_000, 480_000), (480_000, 639_999)],
        ),  # is the excerpt
        (160_000, [(0, 160_000)]),
    ],
)
def test_an_excerpt_is_cut_out_of_a_file_that_is_long_enough(samples, expected) -> None:
    assert list(cut(samples, [(30.0, 40.0)], 160_000)) == expected


def test_a_list_selects_files_by_id_and_cuts_them(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    lengths_s = {"--PJHxphWEs": 12, "-a_b": 3, "sub/-a_b_c_7.000": 5, "unlisted": 4, "-a_bc": 2, "-a": 2}
    for name, length_s in lengths_s.items():
        write_noise(folder / f"{name}.wav", 16_000, 1, 16_000 * length_s)
    excerpts = tmp_path / "segments.csv"
    excerpts.write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        '# YTID, start_seconds, end_seconds, "positive_labels\n'
        '--PJHxphWEs, 1.000, 11.500, "/m/09x0r,/t/dd00088"\n'
        "-a_b, 30.000, 40.000, /m/04rlf, /m/05r5wn\n"
        "\n"
        'not_there, 0.000, 10.000, "/m/09x0r"\n'
    )
    outcome = prepare(folder, tmp_path / "shards", "--csv", excerpts, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert "1 of 3 listed clips have no audio file: not_there" in outcome.err
    index = ShardIndex.open(outcome.path)
    records = [index.record(i) for i in range(len(index))]
    assert sorted((record.source, record.start_s, record.duration_s) for record in records) == [
        ("--PJHxphWEs.wav", 1.0, 10.0),
        ("--PJHxphWEs.wav", 11.0, 0.5),
        ("-a_b.wav", 0.0, 3.0),
        ("sub/-a_b_c_7.000.wav", 0.0, 5.0),
    ]
    for i, record in enumerate(records):
        assert_near(index.read(i), expected_values(folder, record.source, record.start_s, record.duration_s))


def test_audiosets_layout_with_missing_and_broken_clips(tmp_path: Path) -> None:
    """Clips are in a folder per list, cut already or not, in the formats that downloads have."""
    folder = tmp_path / "audioset"
    lists = {
        "unbalanced_train": {
            "---1_cCGK4M": (0, 10),
            "---2_BBVHAA": (30, 40),
            "-0FHUc78Gqo": (20, 30),
            "gone000gone": (0, 10),
        },
        "balanced_train": {"--4gqARaEJE": (0, 10), "-0SdAVK79lg": (420, 430)},
        "eval": {"--4PRwhSeB8": (30, 40)},
    }
    for name, clips in lists.items():
        lines = [f'{clip}, {start:.3f}, {end:.3f}, "/m/04rlf,/m/09x0r"' for clip, (start, end) in clips.items()]
        header = [
            "# Segments csv created Sun Mar  5 10:54:31 2017",
            "# num_ytids=3, num_segs=3",
            "# YTID, start_seconds",
        ]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_segments.csv").write_text("\n".join([*header, *lines]) + "\n")
    write_noise(folder / "unbalanced_train/---1_cCGK4M.flac", 16_000, 1, 160_000)
    write_noise(folder / "unbalanced_train/---2_BBVHAA_30.000.wav", 44_100, 2, 441_000)  # cut already
    write_noise(folder / "unbalanced_train/-0FHUc78Gqo.ogg", 16_000, 1, 16_000 * 35)  # the whole video
    (folder / "balanced_train").mkdir()
    (folder / "balanced_train/--4gqARaEJE.flac").write_bytes(b"")  # a download that failed
    write_noise(folder / "balanced_train/-0SdAVK79lg_420.000_430.000.wav", 16_000, 1, 16_000 * 9)  # a short video
    write_noise(folder / "eval/--4PRwhSeB8_30.wav", 16_000, 1, 160_000)

    train = [
        word for name in ("unbalanced_train", "balanced_train") for word in ("--csv", folder / f"{name}_segments.csv")
    ]
    outcome = prepare(folder, tmp_path / "shards", *train, "--jobs", 1)
    assert outcome.code == 1
    assert "1 of 6 listed clips have no audio file: gone000gone" in outcome.err
    failed = [line for line in outcome.err.splitlines() if "failed: " in line]
    assert len(failed) == 1 and "balanced_train/--4gqARaEJE.flac" in failed[0]
    index = ShardIndex.open(outcome.path)
    records = [index.record(i) for i in range(len(index))]
    assert sorted((record.source, record.start_s, record.duration_s) for record in records) == [
        ("balanced_train/-0SdAVK79lg_420.000_430.000.wav", 0.0, 9.0),
        ("unbalanced_train/---1_cCGK4M.flac", 0.0, 10.0),
        ("unbalanced_train/---2_BBVHAA_30.000.wav", 0.0, 10.0),
        ("unbalanced_train/-0FHUc78Gqo.ogg", 20.0, 10.0),
    ]
    for i, record in enumerate(records):
        assert_near(index.read(i), expected_values(folder, record.source, record.start_s, record.duration_s))
    # The same lists in another order are the same corpus; one list is another.
    assert "4 records" in prepare(folder, tmp_path / "shards", *train[2:], *train[:2], "--jobs", 1).out
    assert prepare(folder, tmp_path / "shards", *train[:2], "--jobs", 1).code == 2


@pytest.mark.parametrize(
    "line", ["YTID,start_seconds,end_seconds", "a, 10.0", "a, 20.0, 10.0, x", "a, 1, x\0, y", "a, nan, 1, x"]
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "segments.csv"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(ValueError, match=r"segments\.csv, line 2"):
        read_excerpts(path)


def test_a_plan_mixes_folders_and_fills_shards() -> None:
    recordings = [Recording(f"album {album}/{track}.wav", 1) for album in range(20) for track in range(20)]
    settings = {"record_seconds": 10.0, "shard_records": 100}
    plan = make_plan(settings, recordings, [42.0] * len(recordings))  # five records each
    assert sorted(recording.name for shard in plan.shards for recording in shard) == sorted(r.name for r in recordings)
    assert [len(shard) for shard in plan.shards] == [20] * 20
    assert all(len({recording.name.split("/")[0] for recording in shard}) > 5 for shard in plan.shards)
    assert make_plan(settings, recordings[::-1], [42.0] * len(recordings)) == plan


def test_a_plan_copes_with_unreadable_and_absurdly_long_headers() -> None:
    recordings = [Recording(f"{i}.wav", 1) for i in range(20)]
    plan = make_plan({"record_seconds": 10.0, "shard_records": 5}, recordings, [0.0] * 10 + [1e15] * 10)
    assert 12 <= len(plan.shards) <= 20 and all(1 <= len(shard) <= 5 for shard in plan.shards)


# ---- interruptions ----


def launch(*arguments: object) -> subprocess.Popen[str]:
    """Start the command as a process in its own group."""
    command = [sys.executable, "-m", "training.corpora.prepare", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    # A shell starts background jobs with SIGINT ignored; the process must not inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None, limit_s: float = 60) -> None:
    """Wait for a condition; fail if the process, if any, ends first."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.01)


def is_running(process: psutil.Process) -> bool:
    """Return False also for a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def writing_a_shard(path: Path) -> bool:
    """Return True if a shard is being written."""
    for unfinished in path.glob(".*-*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            return unfinished.stat().st_size > 0
    return False


def finished(path: Path) -> int:
    """Count finished shards."""
    return len(list(path.glob("shard-*.json")))


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with enough audio to interrupt a run."""
    folder = tmp_path_factory.mktemp("music")
    for i in range(24):
        write_noise(folder / f"{i}.flac", 44_100, 2, 44_100 * 20)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(music: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare that folder with one worker and no interruption."""
    outcome = prepare(music, tmp_path_factory.mktemp("uninterrupted") / "shards", *SETTINGS)
    assert outcome.code == 0 and finished(outcome.path) == 12
    return outcome.path


@posix_only
def test_repeated_interruptions_do_not_change_the_shards(music: Path, uninterrupted: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "shards", hashes(uninterrupted)
    interruptions: list[tuple[Callable[[], bool], int]] = [
        (lambda: (path / "plan.json").exists(), signal.SIGKILL),
        (lambda: writing_a_shard(path), signal.SIGKILL),
        (lambda: finished(path) >= 3 and writing_a_shard(path), signal.SIGTERM),
        (lambda: finished(path) >= 5 and writing_a_shard(path), signal.SIGINT),
        (lambda: finished(path) >= 7, signal.SIGKILL),
    ]
    for moment, how in interruptions:
        process = launch(music, path, "--shard-records", 4, "--jobs", 2)
        wait_until(moment, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        if how == signal.SIGINT:  # as a terminal does: to the whole group
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        _, err = process.communicate(timeout=20)
        if how == signal.SIGKILL:
            assert process.returncode == -how
        else:
            assert process.returncode == 130 and "Traceback" not in err, err
            assert "Warning" not in err, err  # of runpy, when workers import the command's module
        wait_until(lambda workers=workers: not any(map(is_running, workers)), None)
        there = hashes(path)
        assert all(whole[name] == there[name] for name in there if not name.startswith("."))
        assert all(name.replace(".json", ".tar") in there for name in there if name.startswith("shard-"))
        assert "index.json" not in there
        if how != signal.SIGKILL:
            assert not any(name.endswith(".tmp") for name in there)
    outcome = prepare(music, path, "--shard-records", 4, "--jobs", 2)
    assert outcome.code == 0, outcome.err
    assert "0 made earlier" not in outcome.out
    assert hashes(path) == whole  # and no leftovers


def test_only_a_shard_without_its_sidecar_is_made_again(audio: Path, prepared: Outcome, copy: Path) -> None:
    (copy / "shard-000001.json").unlink()
    (copy / "shard-000001.tar").write_bytes(b"anything")
    (copy / ".shard-000002.tar.1.tmp").write_bytes(b"half")
    untouched = (copy / "shard-000000.tar").stat().st_mtime_ns
    outcome = prepare(audio, copy, *SETTINGS)
    assert outcome.code == 1  # because of BROKEN
    assert hashes(copy) == hashes(prepared.path)
    assert (copy / "shard-000000.tar").stat().st_mtime_ns == untouched


def test_running_again_on_finished_shards_changes_nothing(audio: Path, prepared: Outcome, copy: Path) -> None:
    outcome = prepare(audio, copy, *SETTINGS)
    assert outcome.code == 1 and "broken.wav" in outcome.err
    assert hashes(copy) == hashes(prepared.path)


def test_a_source_that_disappears_stops_the_run_instead_of_counting_as_unreadable(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(audio, tmp_path / "audio")
    monkeypatch.setattr("training.corpora.prepare._remove_leftovers", lambda path: shutil.rmtree(folder))
    outcome = prepare(folder, tmp_path / "shards", *SETTINGS)
    assert outcome.code == 1 and "no such audio file" in outcome.err
    assert not finished(outcome.path) and not list(outcome.path.glob("*.tar"))


# ---- wrong usage ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--record-seconds", "5"], "record_seconds = 10.0, now 5.0"),
        (["--shard-records", "5"], "shard_records = 4, now 5"),
        (["--csv", "list.csv"], "csv = None, now "),
        (["--record-seconds", "0.1"], "--record-seconds must be"),
        (["--jobs", "0"], "--jobs: invalid positive int"),
        (["--csv", "gone.csv"], "gone.csv"),
    ],
)
def test_other_settings_exit_with_2(
    audio: Path, prepared: Outcome, copy: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    Path("list.csv").write_text('long, 0, 10, "x"\n')
    outcome = prepare(audio, copy, *SETTINGS, *arguments)
    assert outcome.code == 2 and message in outcome.err
    assert hashes(copy) == hashes(prepared.path)


def test_other_files_exit_with_2(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for name in ("changed", "gone", "kept"):
        write_noise(folder / f"{name}.wav", 16_000, 1, 16_000)
    arguments = [folder, tmp_path / "shards", *SETTINGS]
    assert prepare(*arguments).code == 0
    before = hashes(tmp_path / "shards")
    (folder / "gone.wav").rename(folder / "new.wav")
    write_noise(folder / "changed.wav", 16_000, 1, 17_000)
    outcome = prepare(*arguments)
    assert outcome.code == 2
    for difference in ("1 new, such as new.wav", "1 gone, such as gone.wav", "1 changed, such as changed.wav"):
        assert difference in outcome.err
    assert hashes(tmp_path / "shards") == before


def test_unsuitable_folders_exit_with_2(audio: Path, copy: Path, tmp_path: Path) -> None:
    assert "no such file" in prepare(tmp_path / "gone", tmp_path / "a shards").err
    (copy / "plan.json").unlink()
    assert "shards but no plan.json" in prepare(audio, copy).err
    outcome = prepare(copy, tmp_path / "b shards")
    assert outcome.code == 2 and "no audio files" in outcome.err


@posix_only
def test_a_second_run_into_the_same_folder_exits_with_2(music: Path, tmp_path: Path) -> None:
    path = tmp_path / "shards"
    process = launch(music, path, *SETTINGS)
    try:
        wait_until(lambda: (path / "plan.json").exists(), process)
        outcome = prepare(music, path, *SETTINGS)
        assert outcome.code == 2 and "another process is writing" in outcome.err
    finally:
        process.kill()
        process.communicate()


# ---- reading ----


@pytest.fixture
def index(prepared: Outcome) -> ShardIndex:
    return ShardIndex.open(prepared.path)


@pytest.fixture
def one_open_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    yield


def all_records(index: ShardIndex) -> list[np.ndarray]:
    return [index.read(i) for i in range(len(index))]


def test_records_are_read_in_any_order(index: ShardIndex) -> None:
    expected = all_records(index)
    for i in np.random.default_rng(1).integers(0, len(index), 100):
        np.testing.assert_array_equal(index.read(i), expected[i])
        assert index.read(i).shape == (index.frames[i], 80)
    with pytest.raises(IndexError):
        index.read(len(index))
    with pytest.raises(IndexError):
        index.record(len(index))


@posix_only
def test_each_shard_is_opened_once(index: ShardIndex) -> None:
    before = psutil.Process().num_fds()
    for _ in range(3):
        all_records(index)
        assert psutil.Process().num_fds() - before == len(set(index.shards))
    del index


@posix_only
def test_records_are_read_if_there_are_more_shards_than_files_kept_open(
    index: ShardIndex, prepared: Outcome, one_open_file: None
) -> None:
    before = psutil.Process().num_fds()
    for values, expected in zip(all_records(index), all_records(ShardIndex.open(prepared.path)), strict=True):
        np.testing.assert_array_equal(values, expected)
    assert psutil.Process().num_fds() - before == 1


@posix_only
def test_a_pickled_index_opens_its_own_files(index: ShardIndex) -> None:
    expected = all_records(index)
    before = psutil.Process().num_fds()
    other = pickle.loads(pickle.dumps(index))
    assert psutil.Process().num_fds() == before
    for values, wanted in zip(all_records(other), expected, strict=True):
        np.testing.assert_array_equal(values, wanted)
    assert other.record(3) == index.record(3)


def test_records_are_read_without_pread(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_records(index)
    monkeypatch.delattr(os, "pread", raising=False)  # as on Windows
    for values, wanted in zip(all_records(index), expected, strict=True):
        np.testing.assert_array_equal(values, wanted)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
def test_forked_workers_share_an_index(index: ShardIndex) -> None:
    class Frames(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(index)

        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(index.read(i).astype(np.float32))

    expected = all_records(index)
    loader = DataLoader(Frames(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for values, wanted in zip(loader, expected, strict=True):
            np.testing.assert_array_equal(values.numpy(), wanted.astype(np.float32))


def test_an_unfinished_folder_is_refused(copy: Path) -> None:
    (copy / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        ShardIndex.open(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version 2, this code reads 1"),
        ({"frontend": {**shards.frontend_settings(), "hop": 320}}, "hop is 320, expected 160"),
        ({"frontend": {}}, "another front end"),
    ],
)
def test_another_version_or_front_end_is_refused(copy: Path, change: dict, message: str) -> None:
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        ShardIndex.open(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = ShardIndex.open(copy)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard is missing: .*shard-000001\.tar"):
        ShardIndex.open(copy)
    with pytest.raises(FileNotFoundError, match=r"shard is missing: .*shard-000001\.tar"):
        all_records(index)


def test_a_truncated_shard_is_named(copy: Path) -> None:
    index = ShardIndex.open(copy)
    os.truncate(copy / "shard-000001.tar", 1000)
    with pytest.raises(ValueError, match=r"shard-000001\.tar has 1000 bytes, expected .*truncated"):
        ShardIndex.open(copy)
    with pytest.raises(ValueError, match=r"shard-000001\.tar is truncated"):
        all_records(index)


# ---- damage ----


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_record_is_noticed_when_it_is_read(copy: Path) -> None:
    index = ShardIndex.open(copy)
    record = 2
    flip_bit(copy / f"shard-{index.shards[record]:06d}.tar", int(index.offsets[record]) + 17)
    for opened in (index, ShardIndex.open(copy)):
        with pytest.raises(ValueError, match=r"shard-\d{6}\.tar is damaged: the checksum of record 2 differs"):
            opened.read(record)
        for other in set(range(len(opened))) - {record}:
            opened.read(other)


def test_a_changed_sidecar_is_noticed(copy: Path) -> None:
    path = copy / "shard-000001.json"
    path.write_text(path.read_text().replace(".wav", ".mav"))
    with pytest.raises(ValueError, match=r"shard-000001\.json: damaged: its SHA-256 is \w{64}, expected \w{64}"):
        ShardIndex.open(copy)


def without_checksums(folder: Path) -> None:
    """Make a folder of shards one of an older version."""
    for path in folder.glob("shard-*.json"):
        sidecar = json.loads(path.read_text())
        del sidecar["sha256"]
        for record in sidecar["records"]:
            del record["crc32"]
        path.write_text(json.dumps(sidecar))
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        del shard["sidecar_sha256"]
    (folder / "index.json").write_text(json.dumps(index))


def test_folders_of_older_versions_are_the_same_without_checksums(copy: Path, index: ShardIndex) -> None:
    without_checksums(copy)
    older = ShardIndex.open(copy)
    assert older.fingerprint() == index.fingerprint()
    for one, other in zip(all_records(older), all_records(index), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shard-000001.json", "{}"),
        ("shard-000001.json", "[]"),
        ("shard-000001.json", '{"records": 3, "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": 0}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": [1, 2], "frames": 1}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": -1, "frames": 1}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": 0, "frames": 0}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": 9223372036854775807, "frames": 1}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": 0, "frames": 9223372036854775807}], "failed": []}'),
        ("shard-000001.json", '{"records": [{"offset": 0, "frames": 1e400}], "failed": []}'),
        ("index.json", "{}"),
        ("index.json", "[]"),
        ("index.json", "{"),
        ("index.json", '{"shards": 3}'),
        ("index.json", '{"shards": [{"name": "shard-000000.tar"}]}'),
        ("index.json", '{"frontend": [], "shards": []}'),
    ],
)
def test_a_damaged_index_or_sidecar_is_named(copy: Path, name: str, content: str) -> None:
    without_checksums(copy)
    index = json.loads((copy / "index.json").read_text())
    if name == "index.json" and content.startswith('{"'):
        content = json.dumps({**index, **json.loads(content)})
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        ShardIndex.open(copy)


@pytest.mark.parametrize("name", ["shard-000001.json", "plan.json"])
def test_preparing_with_a_damaged_sidecar_or_plan_names_it(audio: Path, copy: Path, name: str) -> None:
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({"version": content["version"]} if name == "plan.json" else {}))
    outcome = prepare(audio, copy, *SETTINGS)
    assert outcome.code in (1, 2) and f"{name}: damaged: KeyError" in outcome.err


def verify(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["--verify", str(folder)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_verify_finds_damaged_shards_and_preparing_replaces_them(
    audio: Path, prepared: Outcome, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    code, out, err = verify(copy, capsys)
    assert (code, err) == (0, "") and f"{len(RECORDS)} records in 3 shards; 3 shards are undamaged" in out
    flip_bit(copy / "shard-000001.tar", 300)  # in a member's header, which training does not read
    code, out, err = verify(copy, capsys)
    assert code == 1 and "2 shards are undamaged" in out
    assert "shard-000001.tar is damaged: delete shard-000001.tar and shard-000001.json and prepare again" in err
    (copy / "shard-000001.tar").unlink()
    (copy / "shard-000001.json").unlink()
    assert prepare(audio, copy, *SETTINGS).code == prepared.code
    assert verify(copy, capsys)[0] == 0 and hashes(copy) == hashes(prepared.path)


def test_verify_names_other_damage_and_folders_without_checksums(copy: Path, capsys: pytest.CaptureFixture) -> None:
    without_checksums(copy)
    code, out, _ = verify(copy, capsys)
    assert code == 0 and "3 shards of an older version have no checksums: only their sizes were compared" in out
    os.truncate(copy / "shard-000000.tar", 1000)
    code, _, err = verify(copy, capsys)
    assert code == 1 and "shard-000000.tar has 1000 bytes, expected" in err
    code, _, err = verify(copy / "nowhere", capsys)
    assert code == 1 and "no index.json" in err


def test_an_interrupted_verification_is_one_line(copy: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.corpora.prepare.verify", interrupt)
    assert main(["--verify", str(copy)]) == 130
    assert "interrupted" in capsys.readouterr().err
