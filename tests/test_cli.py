"""`hear-embed` and `hear-weights` from arguments to files: output, messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import hear_audiomaepp
import hear_axlstm
import hear_encoders
from hear_encoders import (
    AxLSTMConfig,
    Embedder,
    TransformerConfig,
    audio,
    build_encoder,
    load_audio,
    save_checkpoint,
)
from hear_encoders.audio import find_audio
from hear_encoders.cli import embed_files, outputs
from hear_encoders.cli.embed import main as embed_main
from hear_encoders.cli.weights import main as weights_main

EXAMPLES = Path(__file__).parents[1] / "examples"
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {
    "audiomaepp": TransformerConfig("audiomaepp", dim=48, depth=1, heads=3),
    "mae": TransformerConfig("mae", dim=48, depth=1, heads=3),
    "axlstm": AxLSTMConfig("axlstm", dim=48, depth=1),
}
SIZE = 5 * 48
OUTPUTS = ["out.npz", "out.parquet", "out"]
RECORDINGS = ["a.flac", "a.wav", "nested/a.wav", "nested/d.MP3", "nested/deeper/c.ogg"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints by name; "other" has the configuration of "audiomaepp" and other weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in {**CONFIGS, "other": CONFIGS["audiomaepp"]}.items():
        save_checkpoint(folder / name, build_encoder(config, seed=2 if name == "other" else 1).eval())
    return {path.name: path for path in folder.iterdir()}


def tone(rate: int, seconds: float, channels: int, seed: int) -> np.ndarray:
    """Return a tone with noise, different for each seed, each channel at another level."""
    random = np.random.default_rng(seed)
    times = np.arange(int(rate * seconds)) / rate
    sound = 0.3 * np.sin(2 * np.pi * (200 + 300 * seed) * times) + random.normal(0, 0.02, times.shape)
    return sound[:, None] * np.linspace(1, 0.2, channels)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RECORDINGS and a file that is not audio. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "nested" / "deeper").mkdir(parents=True)
    for seed, (name, rate, seconds, channels) in enumerate(
        [
            ("a.wav", 16_000, 1.0, 1),
            ("a.flac", 44_100, 2.7, 2),
            ("nested/a.wav", 8000, 0.5, 3),
            ("nested/deeper/c.ogg", 22_050, 4.3, 2),
        ]
    ):
        soundfile.write(folder / name, tone(rate, seconds, channels, seed), rate)
    soundfile.write(folder / "nested" / "d.MP3", tone(48_000, 0.3, 1, 4), 48_000, format="MP3")
    (folder / "nested" / "notes.txt").write_text("not audio")
    return folder


@dataclass(frozen=True)
class Outcome:
    """A command's exit code and output."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def embed(capsys: pytest.CaptureFixture[str], checkpoints: dict[str, Path]) -> Run:
    """Run `hear-embed` in this process, by default with the small AudioMAE++ on the CPU."""

    def run(*arguments: object) -> Outcome:
        words = [str(argument) for argument in arguments]
        if "--weights" not in words:
            words = ["--weights", str(checkpoints["audiomaepp"]), *words]
        if "--device" not in words:
            words = ["--device", "cpu", *words]
        return _run(embed_main, words, capsys)

    return run


@pytest.fixture
def weights(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `hear-weights` in this process."""
    return lambda *arguments: _run(weights_main, [str(argument) for argument in arguments], capsys)


def _run(main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]) -> Outcome:
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = end.code
    return Outcome(code, *capsys.readouterr())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a separate process, with the package on its path."""
    home = str(Path(hear_audiomaepp.__file__).parents[1])
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    env = {**os.environ, "PYTHONPATH": home}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def needs_pyarrow(output: str) -> None:
    if output.endswith(".parquet"):
        pytest.importorskip("pyarrow")


def read_scenes(output: Path, root: Path) -> dict[str, np.ndarray]:
    """Read scene embeddings from any kind of output, by file name relative to `root`."""
    if output.is_dir():
        return {name.removesuffix(".npy"): np.load(output / name) for name in files_in(output) if ".npy" in name}
    if output.suffix == ".npz":
        with np.load(output) as arrays:
            assert sorted(arrays) == ["embeddings", "paths"]
            assert len(arrays["paths"]) == len(arrays["embeddings"])
            return dict(zip(below(root, arrays["paths"]), arrays["embeddings"]))
    from pyarrow import parquet

    table = parquet.read_table(output)
    assert table.column_names == ["path", "embedding"]
    names = below(root, table["path"].to_pylist())
    assert len(set(names)) == len(names)
    return dict(zip(names, np.array(table["embedding"].to_pylist(), dtype=np.float32)))


def read_timestamps(output: Path, root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read embeddings (T, E) and times (T,) from any kind of output, by file name relative to `root`."""
    if output.is_dir():
        names = [name for name in files_in(output) if name.endswith(".npy") and ".timestamps_ms" not in name]
        return {
            name.removesuffix(".npy"): (
                np.load(output / name),
                np.load(output / f"{name.removesuffix('.npy')}.timestamps_ms.npy"),
            )
            for name in names
        }
    if output.suffix == ".npz":
        with np.load(output) as arrays:
            assert sorted(arrays) == ["embeddings", "offsets", "paths", "timestamps_ms"]
            offsets, embeddings, times = arrays["offsets"], arrays["embeddings"], arrays["timestamps_ms"]
            names = below(root, arrays["paths"])
        assert offsets[0] == 0 and offsets[-1] == len(embeddings) == len(times) and len(offsets) == len(names) + 1
        return {
            name: (embeddings[first:last], times[first:last])
            for name, first, last in zip(names, offsets[:-1], offsets[1:])
        }
    from pyarrow import parquet

    table = parquet.read_table(output)
    assert table.column_names == ["path", "timestamp_ms", "embedding"]
    names = np.array(below(root, table["path"].to_pylist()))
    times = table["timestamp_ms"].to_numpy()
    embeddings = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    return {str(name): (embeddings[names == name], times[names == name]) for name in np.unique(names)}


def below(root: Path, paths: list[str] | np.ndarray) -> list[str]:
    return [Path(os.path.relpath(str(path), root)).as_posix() for path in paths]


def files_in(folder: Path) -> list[str]:
    """List all files below a folder, including hidden ones."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def expected(checkpoints: dict[str, Path]) -> Callable[..., np.ndarray]:
    """Embed one file alone, with the HEAR functions."""

    def compute(path: Path, name: str = "audiomaepp", timestamps: bool = False):
        module = hear_axlstm if name == "axlstm" else hear_audiomaepp
        model = module.load_model(checkpoints[name])
        audio = load_audio(path)[None]
        if timestamps:
            return tuple(result[0].numpy() for result in module.get_timestamp_embeddings(audio, model))
        return module.get_scene_embeddings(audio, model)[0].numpy()

    return compute


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("output", OUTPUTS)
def test_scene_embeddings_equal_those_of_each_file_alone(embed, recordings, expected, workplace, output: str) -> None:
    needs_pyarrow(output)
    outcome = embed(recordings, "-o", output)
    assert outcome.code == 0
    assert outcome.out == f"{output}: 5 of 5 files embedded\n"
    assert outcome.err == ""
    scenes = read_scenes(workplace / output, recordings)
    assert sorted(scenes) == RECORDINGS
    for name, scene in scenes.items():
        assert_close(scene, expected(recordings / name))
    assert np.stack(list(scenes.values())).std(axis=0).max() > 0.01  # or the comparison would be vacuous


@pytest.mark.parametrize("output", OUTPUTS)
def test_timestamps_line_up_with_their_embeddings(embed, recordings, expected, workplace, output: str) -> None:
    needs_pyarrow(output)
    assert embed(recordings, "-o", output, "--timestamps").code == 0
    found = read_timestamps(workplace / output, recordings)
    assert sorted(found) == RECORDINGS
    for name, (embeddings, times) in found.items():
        wanted_embeddings, wanted_times = expected(recordings / name, timestamps=True)
        assert_close(embeddings, wanted_embeddings)
        assert_close(times, wanted_times)
        np.testing.assert_allclose(times, 15 + 40 * np.arange(len(times)))


def test_scene_is_the_mean_of_the_timestamps(embed, recordings, workplace) -> None:
    embed(recordings, "-o", "scenes.npz")
    embed(recordings, "-o", "steps.npz", "--timestamps")
    scenes = read_scenes(workplace / "scenes.npz", recordings)
    for name, (embeddings, _) in read_timestamps(workplace / "steps.npz", recordings).items():
        assert_close(scenes[name], embeddings.mean(axis=0))


def test_folder_output_holds_one_array_per_file_and_its_settings(embed, recordings, workplace) -> None:
    embed(recordings, "-o", "scenes")
    assert files_in(workplace / "scenes") == sorted(["hear-embed.json"] + [f"{name}.npy" for name in RECORDINGS])
    assert np.load("scenes/a.wav.npy").shape == (SIZE,)
    embed(recordings, "-o", "steps", "--timestamps")
    assert files_in(workplace / "steps") == sorted(
        ["hear-embed.json"] + [f"{name}{end}" for name in RECORDINGS for end in (".npy", ".timestamps_ms.npy")]
    )


@pytest.mark.parametrize("output", ["OUT.NPZ", "new/folder/out.npz", "new/folder/out.parquet", "v1.2", "new/folder"])
def test_output_name_selects_its_kind_and_folders_are_created(embed, recordings, workplace, output: str) -> None:
    needs_pyarrow(output)
    assert embed(recordings / "a.wav", "-o", output).code == 0
    path = workplace / output
    assert path.is_dir() == (path.suffix.lower() not in (".npz", ".parquet"))
    if path.suffix == ".NPZ":
        assert np.load(path)["embeddings"].shape == (1, SIZE)
    else:
        assert list(read_scenes(path, recordings)) == ["a.wav"]


def test_axlstm_module_takes_its_own_weights(embed, recordings, checkpoints, expected, workplace) -> None:
    outcome = embed(recordings, "-o", "out.npz", "--model", "hear_axlstm", "--weights", checkpoints["axlstm"])
    assert outcome.code == 0
    for name, scene in read_scenes(workplace / "out.npz", recordings).items():
        assert_close(scene, expected(recordings / name, "axlstm"))


def test_weights_may_be_the_safetensors_file(embed, recordings, checkpoints, expected, workplace) -> None:
    weights = checkpoints["other"] / "model.safetensors"
    assert embed(recordings / "a.wav", "-o", "out.npz", "--weights", weights).code == 0
    assert_close(np.load("out.npz")["embeddings"][0], expected(recordings / "a.wav", "other"))


def test_framing_precision_and_layer_reach_the_model(embed, recordings, checkpoints, workplace) -> None:
    path = recordings / "a.flac"
    audio = load_audio(path)[None]
    for options in ({"framing": "reference"}, {"precision": "bfloat16"}, {"layer": 1}):
        words = [word for option, value in options.items() for word in (f"--{option}", value)]
        assert embed(path, "-o", "out.npz", "--timestamps", *words).code == 0
        model = hear_audiomaepp.load_model(checkpoints["audiomaepp"], **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "precision='bfloat16' takes several times as long")  # on some CPUs
            wanted, times = model.timestamp_embeddings(audio)
        with np.load("out.npz") as arrays:
            assert_close(arrays["embeddings"], wanted[0].numpy())
            assert_close(arrays["timestamps_ms"], times[0].numpy())


@pytest.mark.parametrize("batch_seconds, jobs", [(0.01, 1), (3, 2), (5.5, 7), (1000, 1), ("inf", 3)])
@pytest.mark.parametrize("timestamps", [[], ["--timestamps"]])
def test_batch_seconds_and_jobs_change_no_value(
    embed, recordings, expected, workplace, batch_seconds, jobs, timestamps: list[str]
) -> None:
    outcome = embed(recordings, "-o", "out", "--batch-seconds", batch_seconds, "--jobs", jobs, *timestamps)
    assert outcome.code == 0
    for name in RECORDINGS:
        wanted = expected(recordings / name, timestamps=bool(timestamps))
        assert_close(np.load(f"out/{name}.npy"), wanted[0] if timestamps else wanted)


def test_examples_folder(embed, expected, workplace) -> None:
    assert embed(EXAMPLES, "-o", "out.npz").code == 0
    scenes = read_scenes(workplace / "out.npz", EXAMPLES)
    assert sorted(scenes) == ["bell.mp3", "music.ogg", "speech.flac", "till.wav"]
    for name, scene in scenes.items():
        assert_close(scene, expected(EXAMPLES / name))


# ---------------------------------------------------------------------------------------------------------
# Inputs


def test_glob_is_expanded_by_the_command(embed, recordings, workplace) -> None:
    for pattern, names in [
        ("*.wav", ["a.wav"]),
        ("**/*.wav", ["a.wav", "nested/a.wav"]),
        ("nested/[a-d].*", ["nested/a.wav", "nested/d.MP3"]),
        ("n*", ["nested/a.wav", "nested/d.MP3", "nested/deeper/c.ogg"]),
    ]:
        assert embed(recordings / pattern, "-o", "out.npz").code == 0
        assert sorted(read_scenes(workplace / "out.npz", recordings)) == names, pattern


def test_links_to_folders_are_followed_without_finding_a_file_twice(recordings, tmp_path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    os.link(recordings / "a.wav", tmp_path / "in" / "b" / "a.wav")
    for name, target in {"a": "b", "loop": "..", "nested": recordings / "nested"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    _, files = find_audio([str(tmp_path / "in")])
    assert [file.name for file in files if not file.name.startswith("loop")] == [
        "b/a.wav",
        *(name for name in RECORDINGS if name.startswith("nested/")),
    ]
    real = [file.path.resolve() for file in files]
    assert len(set(real)) == len(real)


def test_unreadable_folder_is_named_in_a_warning(embed, recordings, workplace, monkeypatch) -> None:
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("nested"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    outcome = embed(recordings, "-o", "out.npz")
    assert outcome.code == 0
    assert f"warning: {recordings / 'nested'} cannot be searched: Permission denied" in outcome.err


def test_inputs_of_all_kinds_combine(embed, recordings, workplace) -> None:
    inputs = [recordings / "a.flac", recordings / "nested" / "deeper", recordings / "nested" / "*.wav"]
    for output in ("out.npz", "out"):
        assert embed(*inputs, "-o", output).code == 0
        found = read_scenes(workplace / output, recordings)
        assert sorted(found) == ["a.flac", "nested/a.wav", "nested/deeper/c.ogg"]


def test_same_file_given_twice_counts_once(embed, recordings, workplace, monkeypatch) -> None:
    monkeypatch.chdir(recordings)
    output = workplace / "out.npz"
    outcome = embed("a.wav", "./a.wav", recordings / "a.wav", "nested/../a.wav", "*.wav", ".", "-o", output)
    assert outcome.code == 0
    assert "5 of 5 files" in outcome.out
    assert sorted(read_scenes(output, recordings)) == RECORDINGS


def test_paths_in_the_output_are_as_they_were_given(embed, recordings, workplace, monkeypatch) -> None:
    monkeypatch.chdir(recordings.parent)
    embed(recordings.name, "-o", workplace / "out.npz")
    paths = np.load(workplace / "out.npz")["paths"].tolist()
    assert paths == sorted(str(Path(recordings.name, name)) for name in RECORDINGS)


def test_names_may_hold_spaces_brackets_and_any_script(embed, recordings, workplace) -> None:
    names = ["take [1].wav", "größe 音.wav", "-dash.wav"]
    for name in names:
        shutil.copy(recordings / "a.wav", name)
    assert embed("-o", "out", "--", *names).code == 0
    assert sorted(read_scenes(workplace / "out", workplace)) == sorted(names)
    assert embed(".", "-o", "out.npz").code == 0
    assert sorted(read_scenes(workplace / "out.npz", workplace)) == sorted(names)


def test_file_given_by_name_may_have_any_extension(embed, recordings, workplace) -> None:
    shutil.copy(recordings / "a.wav", "recording.bin")
    assert embed("recording.bin", "-o", "out").code == 0
    assert list(read_scenes(workplace / "out", workplace)) == ["recording.bin"]


@pytest.fixture
def mixed(recordings, workplace) -> Path:
    """A folder with RECORDINGS, two m4a files, a .webm that is none, a .raw file and text."""
    av = pytest.importorskip("av")
    shutil.copytree(recordings, "mixed")
    for name in ("b.m4a", "nested/B.M4A"):
        with av.open(str(Path("mixed", name)), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=16_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.float32(tone(16_000, 0.512, 1, 5)).T.copy(), "fltp", "mono")
            frame.sample_rate = 16_000
            for part in [*av.AudioResampler("fltp", "mono", 16_000, frame_size=1024).resample(frame), None]:
                container.mux(stream.encode(part))
    Path("mixed/c.webm").write_bytes(b"not a video" * 100)
    Path("mixed/d.raw").write_bytes(bytes(32_000))
    return Path("mixed")


def test_media_that_libsndfile_does_not_read_are_embedded_with_pyav(embed, mixed, expected) -> None:
    outcome = embed(mixed, "-o", "out.npz")
    assert (outcome.code, outcome.out) == (1, "out.npz: 7 of 9 files embedded\n")
    failed, left_out = outcome.err.splitlines()
    assert failed.startswith("hear-embed: failed: mixed/c.webm: not readable")
    assert left_out.startswith("hear-embed: 1 file left out (1 .raw): they have no header")
    scenes = read_scenes(Path("out.npz"), mixed)
    assert sorted(scenes) == sorted([*RECORDINGS, "b.m4a", "nested/B.M4A"])
    assert_close(scenes["b.m4a"], expected(mixed / "b.m4a"))


def test_left_out_media_are_counted_and_fail_the_run(embed, mixed, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for output, start in [("out.npz", "5 of 9 files embedded"), ("out", "5 of 9"), ("out", "nothing new, all 5 files")]:
        outcome = embed(mixed, "-o", output)
        assert outcome.code == 1
        assert outcome.out.startswith(f"{output}: {start}")
        (line, _) = outcome.err.splitlines()
        assert line == (
            "hear-embed: 3 files left out (2 .m4a, 1 .webm): reading them needs PyAV: pip install 'hear-audiomaepp[av]'"
        )
    outcome = embed(mixed / "*.m4a", "-o", "out.npz")
    assert outcome.code == 2
    assert "no audio files in mixed/*.m4a; 1 file left out (1 .m4a): reading them needs PyAV" in outcome.err
    outcome = embed(mixed / "b.m4a", mixed / "a.wav", "-o", "out.npz")  # given by name
    assert (outcome.code, outcome.out) == (1, "out.npz: 1 of 2 files embedded\n")
    assert "mixed/b.m4a: needs PyAV: pip install" in outcome.err


def test_excluded_files_are_neither_embedded_nor_counted(embed, mixed, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    excluded = ["--exclude", "*.[mM]4[aA]", "--exclude", "c.*", "--exclude", "*.raw"]
    outcome = embed(mixed, "-o", "out.npz", *excluded)
    assert (outcome.code, outcome.out, outcome.err) == (0, "out.npz: 4 of 4 files embedded\n", "")
    assert sorted(read_scenes(Path("out.npz"), mixed)) == [name for name in RECORDINGS if not name.endswith("c.ogg")]
    for pattern in ("nested", "nested/", "nested/*"):
        assert embed(mixed, "-o", "out.npz", *excluded, "--exclude", pattern).code == 0
        assert sorted(read_scenes(Path("out.npz"), mixed)) == ["a.flac", "a.wav"]
    assert embed(mixed, "-o", "out.npz", "--exclude", "n*d/*/*").code == 1
    assert "nested/deeper/c.ogg" not in read_scenes(Path("out.npz"), mixed)
    outcome = embed(mixed, "-o", "none.npz", "--exclude", "*")
    assert (outcome.code, outcome.err) == (2, "hear-embed: error: no audio files left: all 5 are excluded\n")


def test_list_shows_what_would_be_embedded(embed, mixed, monkeypatch) -> None:
    write_bad(mixed / "junk.wav")
    outcome = embed(mixed, "--list")
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert "      2.70 s  mixed/a.flac" in lines and any(line.endswith(" s  mixed/b.m4a") for line in lines)
    assert "         -    mixed/junk.wav: not readable as audio (Format not recognised.)" in lines
    assert "         -    mixed/d.raw: left out" in lines
    assert len(lines) == 11
    seconds = float(lines[-1].split()[0])
    assert seconds == pytest.approx(1 + 2.7 + 0.5 + 4.3 + 0.3 + 2 * 0.512, abs=0.2)
    assert lines[-1].endswith("s  in 7 files (0.00 hours)")
    assert outcome.err == (
        "hear-embed: 1 file left out (1 .raw): they have no header that states their sample rate: convert them to WAV\n"
        "hear-embed: 2 files cannot be read\n"
    )
    outcome = embed(mixed, "--list", "--exclude", "*.raw", "--exclude", "junk*", "--exclude", "*.webm")
    assert (outcome.code, outcome.err) == (0, "")
    assert embed("nothere", "--list").code == 2
    assert files_in(Path()) == files_in(mixed.parent)


# ---------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record each encoded batch as its files' lengths in samples."""
    batches: list[list[int]] = []
    embed_batches = Embedder.embed_batches

    def watched(self, audio, *args, **kwargs):
        batches.append([clip.shape[1] for clip in audio])
        return embed_batches(self, audio, *args, **kwargs)

    monkeypatch.setattr(Embedder, "embed_batches", watched)
    return batches


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of decoded files."""
    names: list[str] = []

    def watched(path):
        names.append(Path(path).name)
        return load_audio(path)

    monkeypatch.setattr(embed_files, "load_audio", watched)
    return names


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the encoder raise an error at its n-th batch, once; call `look` at each: interrupt(n, error, look)."""
    embed_batches = Embedder.embed_batches

    def arm(batch: int, error: BaseException, look: Callable[[], None] = lambda: None) -> None:
        calls = 0

        def interrupted(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            look()
            if calls == batch:
                raise error
            return embed_batches(self, *args, **kwargs)

        monkeypatch.setattr(Embedder, "embed_batches", interrupted)

    return arm


def write_clips(folder: Path, seconds: list[float]) -> None:
    for index, length in enumerate(seconds):
        soundfile.write(folder / f"{index:02}.wav", tone(16_000, length, 1, index), 16_000)


def test_files_of_similar_length_are_encoded_together(embed, encoded, workplace) -> None:
    lengths = [2.0, 0.5, 1.5, 0.4, 1.9, 0.6, 9.0, 1.6]
    write_clips(workplace, lengths)
    assert embed(".", "-o", "out.npz", "--batch-seconds", 4).code == 0
    in_order = [samples for batch in encoded for samples in batch]
    assert in_order == sorted(round(16_000 * length) for length in lengths)
    assert all(sum(batch) <= 4 * 16_000 or len(batch) == 1 for batch in encoded)
    assert len(encoded) == 4  # 0.4 0.5 0.6 1.5 | 1.6 1.9 | 2 | 9


def test_decoding_runs_ahead_of_the_encoder_within_bounds(embed, workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(workplace, [1.0] * 30)
    decoded_count, encoded_count, ahead = 0, 0, []
    grown = threading.Condition()
    embed_batches = Embedder.embed_batches

    def counting_load(path):
        nonlocal decoded_count
        audio = load_audio(path)
        with grown:
            decoded_count += 1
            grown.notify_all()
        return audio

    def slow_encode(self, audio, *args, **kwargs):
        nonlocal encoded_count
        encoded_count += len(audio)
        with grown:  # wait until the decoders are a batch ahead
            wanted = min(30, encoded_count + 3)
            assert grown.wait_for(lambda: decoded_count >= wanted, timeout=20), "too little was decoded ahead"
            grown.wait_for(lambda: decoded_count > encoded_count + 10, timeout=0.02)
            ahead.append(decoded_count - encoded_count)
        return embed_batches(self, audio, *args, **kwargs)

    monkeypatch.setattr(embed_files, "load_audio", counting_load)
    monkeypatch.setattr(Embedder, "embed_batches", slow_encode)
    assert embed(".", "-o", "out.npz", "--batch-seconds", 2, "--jobs", 4).code == 0
    assert encoded_count == 30
    assert max(ahead) <= 6  # two batches, and the file that does not fit


@pytest.mark.parametrize("timestamps", [[], ["--timestamps"]])
def test_long_files_embedded_in_pieces_give_the_same_result(
    embed, encoded, recordings, workplace, monkeypatch, timestamps: list[str]
) -> None:
    assert embed(recordings, "-o", "whole", *timestamps).code == 0
    assert encoded
    encoded.clear()
    monkeypatch.setattr(embed_files, "LONG_S", 0.1)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5000)
    shutil.copytree(recordings, "in")
    write_bad(Path("in/cut.flac"))
    write_bad(Path("in/junk.wav"))
    outcome = embed("in", "-o", "pieces", *timestamps)
    assert outcome.code == 1 and outcome.err.count("failed: ") == 2 and not encoded
    assert "in/junk.wav: not readable" in outcome.err and "in/cut.flac: not readable" in outcome.err
    names = [name for name in files_in(workplace / "whole") if name.endswith(".npy")]
    assert names == [name for name in files_in(workplace / "pieces") if name.endswith(".npy")]
    for name in names:
        np.testing.assert_allclose(
            np.load(workplace / "pieces" / name), np.load(workplace / "whole" / name), rtol=1e-4, atol=1e-4
        )


# ---------------------------------------------------------------------------------------------------------
# Failures


def write_bad(path: Path) -> Path:
    """Write a bad file of the kind that its stem names."""
    stem = path.stem
    samples = tone(44_100, 1.0, 2, 3)
    if stem == "junk":
        path.write_bytes(b"not audio at all " * 100)
    elif stem == "nothing":
        path.write_bytes(b"")
    elif stem == "cut":
        soundfile.write(path, samples, 44_100)
        path.write_bytes(path.read_bytes()[:20_000])
    elif stem == "empty":
        soundfile.write(path, samples[:0], 44_100)
    elif stem == "headerless":
        path.write_bytes(bytes(32_000))
    else:
        samples[1234] = {"nan": np.nan, "inf": np.inf}[stem]
        soundfile.write(path, samples, 44_100, subtype="FLOAT")
    return path


BAD = ["junk.wav", "junk.mp3", "nothing.wav", "cut.flac", "empty.wav", "nan.wav", "inf.wav", "headerless.raw"]


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_reported_and_the_rest_is_embedded(embed, recordings, expected, workplace, name: str) -> None:
    bad = write_bad(workplace / name)
    outcome = embed(recordings / "a.wav", bad, recordings / "a.flac", "-o", "out.npz")
    assert outcome.code == 1
    assert outcome.out == "out.npz: 2 of 3 files embedded\n"
    (line,) = outcome.err.splitlines()
    assert line.startswith("hear-embed: failed: ")
    assert line.count(str(bad)) == 1
    assert len(line) > len("hear-embed: failed: ") + len(str(bad)) + 10  # a reason follows
    scenes = read_scenes(workplace / "out.npz", recordings)
    assert sorted(scenes) == ["a.flac", "a.wav"]
    assert_close(scenes["a.wav"], expected(recordings / "a.wav"))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("timestamps", [[], ["--timestamps"]])
def test_bad_files_among_good_ones(embed, recordings, workplace, output: str, timestamps: list[str]) -> None:
    needs_pyarrow(output)
    folder = workplace / "mixed"
    shutil.copytree(recordings, folder)
    for name in ("junk.wav", "cut.flac", "nested/nan.wav"):
        write_bad(folder / name)
    outcome = embed(folder, "-o", output, "--batch-seconds", 2, *timestamps)
    assert outcome.code == 1
    assert "5 of 8 files" in outcome.out
    failed = re.findall(r"^hear-embed: failed: (\S+?)(?::| must) ", outcome.err, flags=re.MULTILINE)
    assert failed == [str(folder / name) for name in ("cut.flac", "junk.wav", "nested/nan.wav")]
    read = read_timestamps if timestamps else read_scenes
    assert sorted(read(workplace / output, folder)) == RECORDINGS


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only on Linux")
@pytest.mark.parametrize("output", OUTPUTS)
def test_files_whose_names_are_not_unicode_are_embedded(embed, recordings, expected, workplace, output: str) -> None:
    needs_pyarrow(output)
    folder = workplace / "old"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.wav")
    shutil.copy(recordings / "a.wav", folder / name)
    write_bad(workplace / "junk.wav").rename(folder / os.fsdecode(b"\xff.wav"))
    outcome = embed(folder, "-o", output)
    assert (outcome.code, outcome.out) == (1, f"{output}: 1 of 2 files embedded\n")
    assert outcome.err.startswith(f"hear-embed: failed: {folder}/\\xff.wav: not readable")
    ((found, scene),) = read_scenes(Path(output), folder).items()
    assert found == ("caf\\xe9.wav" if output.endswith(".parquet") else name)
    assert_close(scene, expected(folder / name))
    assert r"1.00 s  old/caf\xe9.wav" in embed("old", "--list").out


def test_control_characters_in_names_are_escaped(embed, recordings, workplace) -> None:
    name = "red\x1b[31m\nfailed: a\u202e.wav"
    write_bad(workplace / "junk.wav").rename(name)
    shutil.copy(recordings / "a.wav", "größe 音.wav")
    outcome = embed(".", "-o", "out.npz")
    assert outcome.code == 1
    assert outcome.err.startswith(r"hear-embed: failed: red\x1b[31m\nfailed: a\u202e.wav: not readable")
    assert outcome.err.count("\n") == 1
    listed = embed(".", "--list").out
    assert r"red\x1b[31m\nfailed: a\u202e.wav" in listed and "1.00 s  größe 音.wav" in listed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_pipes_and_devices_are_refused_without_being_opened(embed, recordings, workplace) -> None:
    os.mkfifo("f.wav")
    Path("null.wav").symlink_to("/dev/null")
    outcome = embed("f.wav", "null.wav", "/dev/stdin", recordings / "a.wav", "-o", "out.npz")
    assert (outcome.code, outcome.out) == (1, "out.npz: 1 of 4 files embedded\n")
    assert outcome.err.count("not a regular file") == 3 or "/dev/stdin" in outcome.err  # it may be a file
    assert embed("f.wav", "--list").code == 1


def test_wav_that_claims_an_absurd_rate_is_refused(embed, recordings, workplace) -> None:
    for rate in (1, 999, 768_001):
        soundfile.write(f"{rate}.wav", tone(16_000, 1.0, 1, 1), rate)
    outcome = embed(".", recordings / "a.wav", "-o", "out.npz")
    assert (outcome.code, outcome.out) == (1, "out.npz: 1 of 4 files embedded\n")
    for line, rate in zip(outcome.err.splitlines(), (1, 768_001, 999)):
        assert line == f"hear-embed: failed: {rate}.wav: expected a sample rate from 1000 to 768000 Hz, got {rate}"


def test_embedding_that_is_not_finite_fails_its_file(embed, recordings, checkpoints, workplace) -> None:
    encoder = build_encoder(CONFIGS["audiomaepp"], seed=1)
    with torch.no_grad():
        list(encoder.parameters())[-1].fill_(3e38)
        list(encoder.parameters())[-2].fill_(3e38)
    save_checkpoint(workplace / "huge", encoder)
    for timestamps in ([], ["--timestamps"]):
        outcome = embed(recordings, "-o", "out.npz", "--weights", "huge", *timestamps)
        assert (outcome.code, outcome.out) == (1, "out.npz: 0 of 5 files embedded\n")
        assert outcome.err.count("the embedding is not finite; are the weights damaged?") == 5
        assert not Path("out.npz").exists()


def test_file_deleted_during_the_run_is_a_failure(embed, recordings, workplace, monkeypatch) -> None:
    shutil.copytree(recordings, "folder")

    def vanish(path):
        if Path(path).name == "c.ogg":
            Path(path).unlink(missing_ok=True)
        return load_audio(path)

    monkeypatch.setattr(embed_files, "load_audio", vanish)
    outcome = embed("folder", "-o", "out.npz")
    assert outcome.code == 1
    assert outcome.err.count("c.ogg") == 1
    assert len(np.load("out.npz")["paths"]) == 4


def test_batch_that_runs_out_of_memory_fails_alone(embed, interrupt, recordings, workplace) -> None:
    interrupt(2, torch.OutOfMemoryError("no memory left"))
    outcome = embed(recordings, "-o", "out.npz", "--batch-seconds", 0.1)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert str(recordings / "nested" / "a.wav") in line  # the second shortest
    assert "OutOfMemoryError" in line
    assert len(np.load("out.npz")["paths"]) == 4


def test_batch_is_written_while_the_next_is_encoded(embed, recordings, workplace, monkeypatch) -> None:
    events = []
    embed_batches, wait = Embedder.embed_batches, embed_files._EncodedBatch.wait

    def embedding(self, batches, per_step=False):
        events.append("embed")
        return embed_batches(self, batches, per_step)

    def waiting(self):
        events.append("wait")
        return wait(self)

    monkeypatch.setattr(Embedder, "embed_batches", embedding)
    monkeypatch.setattr(embed_files._EncodedBatch, "wait", waiting)
    assert embed(recordings, "-o", "out.npz", "--batch-seconds", 0.1).code == 0
    assert events == ["embed", *["embed", "wait"] * (len(RECORDINGS) - 1), "wait"]


def test_interrupted_write_loses_no_other_embedding(embed, recordings, workplace, monkeypatch) -> None:
    add, calls = outputs.FolderOutput.add, []

    def adding(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr(outputs.FolderOutput, "add", adding)
    with contextlib.suppress(KeyboardInterrupt):
        embed(recordings, "-o", "out", "--batch-seconds", 0.1)
    # The second file was being written, the third embedded.
    assert len(read_scenes(workplace / "out", workplace)) == 3


def test_batch_that_fails_on_the_gpu_fails_alone(embed, recordings, workplace, monkeypatch) -> None:
    wait = embed_files._EncodedBatch.wait

    def waiting(self):
        if self.unwritten[0][0].name == "nested/a.wav":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return wait(self)

    monkeypatch.setattr(embed_files._EncodedBatch, "wait", waiting)
    outcome = embed(recordings, "-o", "out.npz", "--batch-seconds", 0.1)
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert str(recordings / "nested" / "a.wav") in line and "in a batch of 1 files: CUDA error" in line
    assert len(np.load("out.npz")["paths"]) == 4


@pytest.mark.parametrize("output", ["out.npz", "out.parquet"])
def test_no_output_when_every_file_is_bad(embed, workplace, output: str) -> None:
    needs_pyarrow(output)
    bad = [write_bad(workplace / name) for name in ("junk.wav", "cut.flac", "nan.wav")]
    before = files_in(workplace)
    outcome = embed(*bad, "-o", output)
    assert outcome.code == 1
    assert outcome.err.count("failed: ") == 3
    assert files_in(workplace) == before


@pytest.mark.parametrize("output", ["out.npz", "out.parquet"])
def test_earlier_output_is_kept_when_every_file_is_bad(embed, recordings, workplace, output: str) -> None:
    needs_pyarrow(output)
    embed(recordings, "-o", output)
    before = Path(output).read_bytes()
    assert embed(write_bad(workplace / "junk.wav"), "-o", output).code == 1
    assert Path(output).read_bytes() == before


def test_run_that_embeds_nothing_does_not_fix_a_folders_settings(embed, checkpoints, recordings, workplace) -> None:
    bad = write_bad(workplace / "junk.wav")
    assert embed(bad, "-o", "out").code == 1
    assert not list(workplace.rglob("*.npy"))
    outcome = embed(bad, recordings / "a.wav", "-o", "out", "--weights", checkpoints["other"])
    assert (outcome.code, outcome.out) == (1, "out: 1 of 2 files embedded\n")


def test_unscaled_integer_samples_are_named_in_a_warning(embed, recordings, workplace) -> None:
    loud = workplace / "loud.wav"
    soundfile.write(loud, 20_000 * tone(16_000, 0.5, 1, 1), 16_000, subtype="FLOAT")
    outcome = embed(loud, recordings / "a.wav", "-o", "out.npz")
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"hear-embed: warning: {loud} ")
    assert "32768" in line
    assert np.isfinite(np.load("out.npz")["embeddings"]).all()


# ---------------------------------------------------------------------------------------------------------
# Bad usage


def test_help_shows_examples(embed, weights) -> None:
    outcome = embed("--help")
    assert outcome.code == 0
    assert "\n  hear-embed recordings/ -o embeddings.npz\n" in outcome.out
    for option in ("--model", "--weights", "--timestamps", "--device", "--precision", "--batch-seconds", "--jobs"):
        assert option in outcome.out
    assert "\n  hear-weights show weights/\n  hear-weights import " in weights("--help").out
    assert "example: hear-weights import " in weights("import", "--help").out


def test_version_is_that_of_the_package(embed, weights) -> None:
    for command, name in ((embed, "hear-embed"), (weights, "hear-weights")):
        outcome = command("--version")
        assert (outcome.code, outcome.out, outcome.err) == (0, f"{name} {hear_encoders.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "required"),
        (["a.wav"], "required"),
        (["-o", "new/out.npz"], "required"),
        (["nothere.wav", "-o", "new/out.npz"], "nothere.wav"),
        (["a.wav", "nothere/", "-o", "new/out.npz"], "nothere/"),
        (["*.mp3", "-o", "new/out.npz"], "*.mp3"),
        (["", "-o", "new/out.npz"], "no such file"),
        (["silent", "-o", "new/out.npz"], "no audio files in silent"),
        (["a.wav", "silent", "-o", "new/out.npz"], "no audio files in silent"),
        (["a.wav", "-o", "new/out.csv"], "new/out.csv"),
        (["a.wav", "-o", "new/out.npy"], ".npz"),
        (["a.wav", "-o", "new/out.h5"], ".parquet"),
        (["a.wav", "-o", "a.wav"], "a.wav"),
        (["a.wav", "-o", "/"], "the root folder"),
        (["a.wav", "-o", "/dev/null"], "neither a file nor a folder"),
        (["a.wav", "-o", "a.wav/out.npz"], "a.wav"),
        (["a.wav", "-o", "new/out.npz", "--device", "nosuch"], "nosuch"),
        (["a.wav", "-o", "new/out.npz", "--model", "hear_nosuch"], "hear_nosuch"),
        (["a.wav", "-o", "new/out.npz", "--precision", "int8"], "int8"),
        (["a.wav", "-o", "new/out.npz", "--framing", "loose"], "loose"),
        (["a.wav", "-o", "new/out.npz", "--weights", "/no/such/place"], "/no/such/place"),
        (["a.wav", "-o", "new/out.npz", "--weights", "a.wav"], "a.wav"),
        (["a.wav", "-o", "new/out.npz", "--weights", "silent"], "config.json"),
        (["a.wav", "-o", "new/out.npz", "--weights", "", "--revision", "main"], "revision"),
        (["a.wav", "-o", "new/out.npz", "--jobs", "-1"], "--jobs"),
        (["a.wav", "-o", "new/out.npz", "--jobs", "0"], "--jobs"),
        (["a.wav", "-o", "new/out.npz", "--jobs", "1.5"], "--jobs"),
        (["a.wav", "-o", "new/out.npz", "--jobs", "many"], "--jobs"),
        (["a.wav", "-o", "new/out.npz", "--batch-seconds", "0"], "--batch-seconds"),
        (["a.wav", "-o", "new/out.npz", "--batch-seconds", "-3"], "--batch-seconds"),
        (["a.wav", "-o", "new/out.npz", "--batch-seconds", "nan"], "--batch-seconds"),
        (["a.wav", "-o", "new/out.npz", "--nosuch"], "--nosuch"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_usage_writes_nothing_and_says_why(
    embed, recordings, workplace, arguments: list[str], complaint: str
) -> None:
    shutil.copy(recordings / "a.wav", workplace)
    (workplace / "silent").mkdir()
    (workplace / "silent" / "notes.txt").write_text("no audio")
    content = Path("a.wav").read_bytes()
    outcome = embed(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    *usage, error = outcome.err.splitlines()
    assert error.startswith("hear-embed: error: ")
    assert complaint in error
    assert not usage or usage[0].startswith("usage: ")
    assert files_in(workplace) == ["a.wav", "silent/notes.txt"]
    assert not Path("new").exists()
    assert Path("a.wav").read_bytes() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_device_is_bad_usage(embed, recordings, workplace) -> None:
    outcome = embed(recordings, "-o", "out.npz", "--device", "cuda:99")
    assert outcome.code == 2
    assert "--device cuda:99: " in outcome.err
    assert files_in(workplace) == []


@pytest.mark.parametrize(
    "model, name, supported", [("hear_audiomaepp", "axlstm", "audiomaepp"), ("hear_axlstm", "mae", "axlstm")]
)
def test_weights_of_the_other_family_are_refused(
    embed, recordings, checkpoints, workplace, model: str, name: str, supported: str
) -> None:
    outcome = embed(recordings, "-o", "new/out.npz", "--model", model, "--weights", checkpoints[name])
    assert outcome.code == 2
    assert f"'{name}'" in outcome.err and f"{model} supports {supported}" in outcome.err
    assert not Path("new").exists()


def test_released_checkpoint_as_weights_suggests_importing_it(embed, recordings, workplace) -> None:
    Path("released.pth").write_bytes(b"anything")
    outcome = embed(recordings, "-o", "out.npz", "--weights", "released.pth")
    assert outcome.code == 2
    assert "hear-weights import" in outcome.err
    assert not Path("out.npz").exists()


def test_damaged_weights_are_named(embed, recordings, checkpoints, workplace) -> None:
    shutil.copytree(checkpoints["audiomaepp"], "damaged")
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = embed(recordings, "-o", "out.npz", "--weights", "damaged")
    assert outcome.code == 2
    assert str(weights) in outcome.err
    assert not Path("out.npz").exists()


def test_parquet_without_pyarrow_says_what_to_install(embed, recordings, workplace, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = embed(recordings, "-o", "new/out.parquet")
    assert outcome.code == 2
    assert "pip install 'hear-audiomaepp[parquet]'" in outcome.err
    assert not Path("new").exists()
    assert embed(recordings, "-o", "out.npz").code == 0  # needs no pyarrow


# ---------------------------------------------------------------------------------------------------------
# Interrupted runs


class Interruption(Exception):
    """An error that the command does not expect."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interruption()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("output", ["out.npz", "out.parquet"])
@pytest.mark.parametrize("timestamps", [[], ["--timestamps"]])
def test_interrupted_run_leaves_no_partial_or_temporary_file(
    embed, interrupt, recordings, workplace, output: str, error: BaseException, timestamps: list[str]
) -> None:
    needs_pyarrow(output)

    def look() -> None:
        assert not Path(output).exists()

    interrupt(3, error, look)
    with contextlib.suppress(KeyboardInterrupt, Interruption):
        assert embed(recordings, "-o", output, "--batch-seconds", 0.1, *timestamps).code not in (0, 2)
    assert files_in(workplace) == []


@pytest.mark.parametrize("output", ["out.npz", "out.parquet"])
def test_interrupted_run_keeps_the_earlier_output(embed, interrupt, recordings, workplace, output: str) -> None:
    needs_pyarrow(output)
    embed(recordings / "a.wav", "-o", output)
    before = Path(output).read_bytes()
    interrupt(2, KeyboardInterrupt())
    with contextlib.suppress(KeyboardInterrupt):
        embed(recordings, "-o", output, "--batch-seconds", 0.1)
    assert Path(output).read_bytes() == before
    assert files_in(workplace) == [output]


def test_interrupted_folder_run_resumes(embed, interrupt, decoded, recordings, expected, workplace) -> None:
    interrupt(3, KeyboardInterrupt())
    with contextlib.suppress(KeyboardInterrupt):
        embed(recordings, "-o", "out", "--batch-seconds", 0.1)
    done = {name: Path("out", f"{name}.npy").stat().st_mtime_ns for name in read_scenes(workplace / "out", workplace)}
    assert sorted(done) == ["nested/a.wav", "nested/d.MP3"]  # the two shortest
    assert not [name for name in files_in(workplace) if "tmp" in name]

    decoded.clear()
    outcome = embed(recordings, "-o", "out")
    assert (outcome.code, outcome.out) == (0, "out: 3 of 5 files embedded, 2 already there\n")
    assert sorted(decoded) == ["a.flac", "a.wav", "c.ogg"]
    for name in RECORDINGS:
        assert_close(np.load(f"out/{name}.npy"), expected(recordings / name))
    assert done == {name: Path("out", f"{name}.npy").stat().st_mtime_ns for name in done}


@pytest.mark.parametrize("output, function", [("out.npz", "savez"), ("out", "save")])
def test_failed_write_leaves_no_embedding_file(
    embed, recordings, workplace, monkeypatch, output: str, function: str
) -> None:
    write = getattr(np, function)

    def full(file, *args, **kwargs):
        file.write(b"the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, function, full)
    with contextlib.suppress(OSError):
        assert embed(recordings, "-o", output).code == 1
    assert [name for name in files_in(workplace) if not name.endswith("hear-embed.json")] == []
    monkeypatch.setattr(np, function, write)
    assert embed(recordings, "-o", output).code == 0
    assert sorted(read_scenes(workplace / output, recordings)) == RECORDINGS


@pytest.mark.parametrize("output", ["out.npz", "out.parquet", "out"])
def test_full_disk_gives_a_one_line_error(embed, recordings, workplace, output: str) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # Python ignores the signal that comes with it
    try:
        outcome = embed(recordings, "-o", output, "--timestamps")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"hear-embed: error: {output}: ")
    assert re.search(r"File too large: 'out/[^']*\.npy'$" if output == "out" else "File too large$", line)
    assert not [name for name in files_in(workplace) if not name.endswith((".npy", "hear-embed.json"))]


@pytest.mark.skipif(os.name == "nt", reason="needs locks")
@pytest.mark.parametrize("output", OUTPUTS)
def test_what_a_killed_run_left_is_removed_by_the_next(embed, recordings, workplace, output: str) -> None:
    needs_pyarrow(output)
    shutil.copytree(recordings, "in")
    folders = [Path("out"), Path("out/nested")] if output == "out" else [Path()]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / ".1234-0123abcd.tmp").write_bytes(b"half")
    assert embed("in", "-o", output).code == 0
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_overwritten_output_keeps_its_permissions(embed, recordings, workplace) -> None:
    Path("out.npz").touch(mode=0o600)
    assert embed(recordings / "a.wav", "-o", "out.npz").code == 0
    assert Path("out.npz").stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------------------------------------------------
# Resuming a folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    arrays = [name for name in files_in(folder) if name.endswith(".npy")]
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in arrays}


@pytest.mark.parametrize("timestamps", [[], ["--timestamps"]])
def test_second_run_on_a_folder_embeds_only_missing_files(
    embed, decoded, recordings, workplace, timestamps: list[str]
) -> None:
    assert embed(recordings, "-o", "out", *timestamps).code == 0
    before = snapshot(workplace / "out")
    decoded.clear()

    outcome = embed(recordings, "-o", "out", *timestamps)
    assert (outcome.code, outcome.out) == (0, "out: nothing new, all 5 files already there\n")
    assert decoded == []
    assert snapshot(workplace / "out") == before

    missing = "nested/deeper/c.ogg.npy"
    (workplace / "out" / missing).unlink()
    outcome = embed(recordings, "-o", "out", *timestamps)
    assert (outcome.code, outcome.out) == (0, "out: 1 of 5 files embedded, 4 already there\n")
    assert decoded == ["c.ogg"]
    after = snapshot(workplace / "out")
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    assert {name for name in before if before[name] != after[name]} >= {missing}
    assert all("c.ogg" in name for name in before if before[name] != after[name])


def test_output_folder_may_be_inside_the_input_folder(embed, recordings, workplace) -> None:
    shutil.copytree(recordings, "in")
    for expected_end in ("5 of 5 files embedded\n", "nothing new, all 5 files already there\n"):
        outcome = embed("in", "-o", "in/embeddings")
        assert outcome.code == 0
        assert outcome.out.endswith(expected_end)


def test_embeddings_with_unknown_settings_are_neither_used_nor_replaced(embed, recordings, workplace) -> None:
    assert embed(recordings, "-o", "out").code == 0
    Path("out/hear-embed.json").unlink()
    before = snapshot(workplace / "out")
    outcome = embed(recordings, "-o", "out", "--timestamps")
    assert outcome.code == 2
    assert "no out/hear-embed.json says how it was made" in outcome.err
    assert snapshot(workplace / "out") == before


def test_file_name_that_is_too_long_fails_alone_in_every_run(embed, recordings, workplace) -> None:
    long = recordings.with_name("long")
    long.mkdir()
    os.link(recordings / "a.wav", long / "a.wav")
    os.link(recordings / "a.wav", long / f"{'x' * 251}.wav")
    for expected_start in ("out: 1 of 2 files embedded\n", "out: 0 of 2 files embedded, 1 already there\n"):
        outcome = embed(long, "-o", "out")
        assert (outcome.code, outcome.out) == (1, expected_start)
        assert "its name is too long for the output" in outcome.err


def test_failed_files_are_tried_again(embed, recordings, workplace) -> None:
    shutil.copytree(recordings, "in")
    write_bad(Path("in/junk.wav"))
    for _ in range(2):
        outcome = embed("in", "-o", "out")
        assert outcome.code == 1
        assert outcome.err.count("junk.wav") == 1
    shutil.copy(recordings / "a.wav", "in/junk.wav")
    outcome = embed("in", "-o", "out")
    assert (outcome.code, outcome.out) == (0, "out: 1 of 6 files embedded, 5 already there\n")


@pytest.mark.parametrize(
    "first, second, word",
    [
        ([], ["--weights", "other"], "weights"),
        ([], ["--timestamps"], "timestamps"),
        (["--timestamps"], [], "timestamps"),
        ([], ["--framing", "reference"], "framing"),
        ([], ["--precision", "bfloat16"], "precision"),
        (["--statistics", "-6", "3.5"], [], "statistics"),
        ([], ["--layer", "1"], "layer"),
        ([], ["--embedding", "best"], "pooling"),
        ([], ["--pooling", "mean_std"], "pooling"),
        (["--pooling", "mean_std"], [], "pooling"),
        ([], ["--model", "hear_axlstm", "--weights", "axlstm"], "model"),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, list) else "",
)
def test_folder_does_not_mix_settings(
    embed, recordings, checkpoints, workplace, first: list[str], second: list[str], word: str
) -> None:
    first, second = ([str(checkpoints.get(argument, argument)) for argument in words] for words in (first, second))
    assert embed(recordings, "-o", "out", *first).code == 0
    (workplace / "out" / "a.wav.npy").unlink()  # so that there is something to do
    names, before = files_in(workplace), snapshot(workplace / "out")
    outcome = embed(recordings, "-o", "out", *second)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "out holds embeddings made with" in outcome.err and word in outcome.err
    assert (files_in(workplace), snapshot(workplace / "out")) == (names, before)
    assert embed(recordings, "-o", "out", *first).code == 0


def test_runs_that_begin_together_do_not_mix_settings(embed, interrupt, recordings, workplace) -> None:
    def claim() -> None:
        outputs.FolderOutput(Path("out"), False, {"weights": "other"}).add("", "b.wav", np.zeros(3), None)

    interrupt(99, KeyboardInterrupt(), claim)
    outcome = embed(recordings / "a.wav", "-o", "out")
    assert (outcome.code, outcome.out) == (1, "")
    assert "out holds embeddings made with" in outcome.err and outcome.err.count("\n") == 1
    assert files_in(workplace) == ["out/b.wav.npy", "out/hear-embed.json"]


def test_moved_weights_are_the_same_settings(embed, recordings, checkpoints, workplace) -> None:
    assert embed(recordings, "-o", "out").code == 0
    shutil.copytree(checkpoints["audiomaepp"], "moved")
    assert embed(recordings, "-o", "out", "--weights", "moved/model.safetensors").code == 0
    assert embed(recordings, "-o", "out", "--batch-seconds", 1, "--jobs", 1, "--precision", "float32").code == 0


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings_record_is_named(embed, recordings, workplace, content: str) -> None:
    embed(recordings, "-o", "out")
    Path("out/hear-embed.json").write_text(content)
    outcome = embed(recordings, "-o", "out")
    assert outcome.code == 2
    assert str(Path("out/hear-embed.json")) in outcome.err


def test_file_of_the_same_name_in_another_folder_is_not_skipped(embed, recordings, expected, workplace) -> None:
    """Two runs embed a.wav from two folders into one output folder."""
    first, second = recordings / "a.wav", recordings / "nested" / "a.wav"
    assert embed(first, "-o", "out").code == 0
    outcome = embed(second, "-o", "out")
    if outcome.code == 0:  # then the folder holds both
        found = list(read_scenes(workplace / "out", workplace).values())
        assert len(found) == 2
        for path in (first, second):
            assert min(np.abs(scene - expected(path)).max() for scene in found) < 1e-5
    else:
        assert outcome.code == 2
        assert "out" in outcome.err


def test_glob_that_later_matches_more_folders_embeds_nothing_twice(embed, decoded, recordings, workplace) -> None:
    Path("calls/2024").mkdir(parents=True)
    shutil.copy(recordings / "a.wav", "calls/2024/x.wav")
    assert embed("calls/**/*.wav", "-o", "out").code == 0
    Path("calls/2025").mkdir()
    shutil.copy(recordings / "nested" / "a.wav", "calls/2025/y.wav")
    decoded.clear()
    assert embed("calls/**/*.wav", "-o", "out").code == 0
    assert decoded == ["y.wav"]
    assert len(read_scenes(workplace / "out", workplace)) == 2


# ---------------------------------------------------------------------------------------------------------
# Processes and terminals

WATCHED_ENTRY = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        raise SystemExit(f"network: {event} {arguments}")

sys.addaudithook(refuse)
from hear_encoders.cli.embed import main as embed_main
code = embed_main()
unwanted = {"torchaudio", "training", "huggingface_hub", "tensorflow", "xlstm", "mlstm_kernels"} & sys.modules.keys()
sys.exit(f"imported {unwanted}" if unwanted else code)
"""


def test_process_prints_only_its_result_and_needs_no_network(recordings, checkpoints, expected, workplace) -> None:
    junk = write_bad(workplace / "junk.wav")
    arguments = [recordings, junk, "-o", "out.npz", "--device", "cpu", "--weights", checkpoints["audiomaepp"]]
    process = run_python(WATCHED_ENTRY, *arguments)
    assert process.stdout == "out.npz: 5 of 6 files embedded\n"
    assert process.stderr == f"hear-embed: failed: {junk}: not readable as audio (Format not recognised.)\n"  # no bar
    assert process.returncode == 1
    for name, scene in read_scenes(workplace / "out.npz", recordings).items():
        assert_close(scene, expected(recordings / name))


def test_terminal_shows_a_progress_bar(embed, recordings, workplace, monkeypatch) -> None:
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    with ThreadPoolExecutor(1) as pool:
        shown_later = pool.submit(read_terminal, terminal)
        with os.fdopen(end, "w") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            outcome = embed(recordings, "-o", "out.npz")
        shown = shown_later.result()
    assert (outcome.code, outcome.out) == (0, "out.npz: 5 of 5 files embedded\n")
    assert b"100%" in shown and b"5/5" in shown and b"file" in shown


def read_terminal(terminal: int) -> bytes:
    """Read all that is written to a pseudo-terminal, until its other end is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    return shown


def test_without_a_terminal_progress_is_a_line_now_and_then(embed, recordings, workplace, monkeypatch) -> None:
    monkeypatch.setattr("hear_encoders.console._SECONDS_BETWEEN_LINES", 0)
    outcome = embed(recordings, "-o", "out.npz", "--batch-seconds", 0.1)
    assert outcome.code == 0
    counts = [re.match(r"hear-embed: +\d+% (\d/5) ", line)[1] for line in outcome.err.splitlines()]
    assert counts == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_no_progress_bar_without_a_terminal(embed, recordings, workplace) -> None:
    assert embed(recordings, "-o", "out.npz", "--batch-seconds", 0.1).err == ""


# ---------------------------------------------------------------------------------------------------------
# hear-weights


@pytest.mark.parametrize("name", CONFIGS)
def test_show_describes_a_checkpoint(weights, checkpoints, name: str) -> None:
    file = checkpoints[name] / "model.safetensors"
    parameters = sum(parameter.numel() for parameter in build_encoder(CONFIGS[name]).parameters())
    for source in (checkpoints[name], file):
        outcome = weights("show", source)
        assert outcome.code == 0
        assert outcome.err == ""
        lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
        assert (
            lines.items()
            >= {
                "file": str(file),
                "size": f"{file.stat().st_size / 1e6:.1f} MB",
                "SHA-256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "parameters": f"{parameters:,}",
                "family": name,
                "dim": "48",
                "depth": "1",
                "heads": "4" if name == "axlstm" else "3",
                "chunk_frames": "200",
                "patch_bands": "16",
            }.items()
        )
    assert ("flip" in lines) == (name == "axlstm")


def test_show_names_the_problem(weights, checkpoints, workplace) -> None:
    Path("released.pth").write_bytes(b"anything")
    Path("notes.txt").write_text("anything")
    Path("empty").mkdir()
    shutil.copytree(checkpoints["mae"], "half")
    Path("half/model.safetensors").unlink()
    shutil.copytree(checkpoints["mae"], "unfit")
    shutil.copy(checkpoints["audiomaepp"] / "model.safetensors", "unfit")
    for source, complaints in {
        "/no/such/place": ["/no/such/place"],
        "released.pth": ["released.pth", "hear-weights import"],
        "notes.txt": ["notes.txt", ".safetensors"],
        "empty": ["config.json"],
        "half": ["model.safetensors"],
        "unfit": ["unfit", "tensor"],
    }.items():
        outcome = weights("show", source)
        assert outcome.code == 2, source
        assert outcome.out == ""
        (line,) = outcome.err.splitlines()
        assert line.startswith("hear-weights: error: ")
        for complaint in complaints:
            assert complaint in line


@pytest.mark.parametrize("module", [hear_audiomaepp, hear_axlstm], ids=lambda module: module.__name__)
def test_show_describes_bundled_weights_by_the_name_of_their_module(weights, workplace, module) -> None:
    Path(module.__name__).mkdir()  # as in a checkout; not a checkpoint
    outcome = weights("show", module.__name__)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == weights("show", Path(module.__file__).parent / "weights").out
    outcome = weights("show", module.__name__, "--revision", "main")
    assert outcome.code == 2 and "bundled weights" in outcome.err


def test_show_into_a_closed_pipe_ends_quietly(weights, checkpoints, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        outcome = weights("show", checkpoints["mae"])
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "")


def test_import_describes_its_result_which_embeds(weights, embed, recordings, workplace) -> None:
    outcome = weights("import", GOLDEN / "ssast.pth", "new/ssast", "--heads", 3)
    assert (outcome.code, outcome.err) == (0, "")
    assert files_in(workplace / "new") == ["ssast/config.json", "ssast/model.safetensors"]
    shown = weights("show", "new/ssast").out
    assert outcome.out == shown + "published as      none of the papers' tables has this encoder\n"
    assert "ssast" in outcome.out
    assert embed(recordings / "a.wav", "-o", "out.npz", "--model", "hear_axlstm", "--weights", "new/ssast").code == 0


def test_import_options_set_what_the_tensors_do_not_tell(weights, workplace) -> None:
    for output, words, flip, gate in [
        ("default", ["--flip"], "True", "exponential"),
        ("given", ["--no-flip", "--input-gate", "sigmoid"], "False", "sigmoid"),
    ]:
        outcome = weights("import", GOLDEN / "axlstm_e3_noflip.pth", output, *words)
        assert (outcome.code, outcome.err) == (0, "")
        assert re.search(rf"^flip +{flip}$", outcome.out, re.MULTILINE)
        assert re.search(rf"^input_gate +{gate}$", outcome.out, re.MULTILINE)


def test_failed_import_names_the_problem_and_writes_nothing(weights, workplace) -> None:
    Path("junk.pth").write_bytes(b"junk")
    torch.save({"model": {"weight": torch.zeros(3)}}, "foreign.pth")
    torch.save([1, 2], "list.pth")
    names = files_in(workplace)
    for source, complaint in {
        "nothere.pth": "nothere.pth",
        "junk.pth": "junk.pth",
        "foreign.pth": "foreign.pth",
        "list.pth": "list.pth",
        str(GOLDEN / "ssast.pth"): "--heads",
        str(GOLDEN / "axlstm_e2_flip.pth"): "--flip, --no-flip",
    }.items():
        outcome = weights("import", source, "out")
        assert outcome.code == 2, source
        assert outcome.out == ""
        assert outcome.err.startswith("hear-weights: error: ")
        assert complaint in outcome.err
        assert files_in(workplace) == names
        assert not Path("out").exists()
    outcome = weights("import", GOLDEN / "ssast.pth", "junk.pth", "--heads", 3)  # a file is in the way
    assert outcome.code == 2
    assert "junk.pth" in outcome.err
    assert Path("junk.pth").read_bytes() == b"junk"


def test_import_refuses_a_directory_that_is_not_empty(weights, workplace) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("anything")
    Path("empty").mkdir()
    outcome = weights("import", GOLDEN / "ssast.pth", "full", "--heads", 3)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "hear-weights: error: full is not empty: choose another directory\n"
    assert files_in(workplace) == ["full/notes.txt"]
    assert weights("import", GOLDEN / "ssast.pth", "empty", "--heads", 3).code == 0


def test_missing_or_invalid_arguments_are_bad_usage(weights) -> None:
    for arguments in ([], ["show"], ["import", "x.pth"], ["nosuch"], ["import", "x.pth", "out", "--heads", "0"]):
        outcome = weights(*arguments)
        assert outcome.code == 2
        assert "hear-weights" in outcome.err and "error: " in outcome.err
