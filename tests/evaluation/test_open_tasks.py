"""The open tasks: lists, random draws, making of clips, and task folders, without any download."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from evaluation.open_tasks import __main__ as command
from evaluation.open_tasks import fluidsynth, onsets, recorded, rendered, sources, speakers
from evaluation.open_tasks.folder import Clip, TaskSpec, check_clips, write_task
from training.corpora import archive, recordings

RATE = 16000


def tone(seconds: float, hz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.fixture
def cache(tmp_path):
    """A cache with the package `toys`, which has a copyright file; tests add sounds."""
    folder = tmp_path / "cache" / "toys"
    doc = folder / "usr/share/doc/toys"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("Files: *\nLicense: CC0-1.0\n")
    (folder.parent / "toys.json").write_text(json.dumps({"version": "1.0"}))
    return folder.parent


def add_sound(cache: Path, name: str, samples: np.ndarray, rate: int = RATE) -> str:
    soundfile.write(cache / "toys" / name, samples, rate)
    return f"toys/{name}"


# ---- lists ----


@pytest.mark.parametrize(
    ("name", "clips", "classes", "splits"),
    [
        ("drum_stroke", 724, 8, {"fold0": 218, "fold1": 120, "fold2": 128, "fold3": 128, "fold4": 130}),
        ("everyday_sounds", 661, 12, {"fold00": 170, "fold01": 173, "fold02": 161, "fold03": 157}),
        ("spoken_words", 335, 84, {"female1": 84, "female2": 84, "male1": 84, "male2": 83}),
        ("language_id", 3474, 4, {"train": 1910, "valid": 220, "test": 1344}),
    ],
)
def test_recorded_tasks_have_their_clips_classes_and_splits(tmp_path, name, clips, classes, splits):
    task, made = recorded.recorded_spec(name), recorded.recorded_clips(name, tmp_path)
    assert len(made) == clips
    assert len(task.labels) == classes
    assert Counter(clip.split for clip in made) == splits
    assert set(task.splits) == set(splits)
    assert {clip.labels[0] for clip in made} == set(task.labels)
    check_clips(task, made)  # no group in two splits, unique names


def test_every_language_is_in_every_split(tmp_path):
    clips = recorded.recorded_clips("language_id", tmp_path)
    assert {(clip.split, clip.labels[0]) for clip in clips} == {
        (split, label) for split in ("train", "valid", "test") for label in ("en", "es", "fr", "ru")
    }


def test_a_speaker_of_two_languages_is_in_one_fold():
    folds = {(row["group"][2:], row["split"]) for row in sources.read_list("spoken_words")}
    assert all(group == fold for group, fold in folds)


def test_each_of_51_voices_is_in_one_split():
    rows = sources.read_list("speaker_count")
    voices = {(row["group"], row["split"]) for row in rows}
    assert len(voices) == len({voice for voice, _ in voices}) == 51
    assert Counter(split for _, split in voices) == {"train": 29, "valid": 7, "test": 15}
    assert len({row["path"] for row in rows}) == len(rows)


def test_onsets_keep_kits_and_backgrounds_apart():
    folds = [fold for split in onsets.FOLDS.values() for fold in split]
    assert sorted(folds) == ["fold0", "fold1", "fold2", "fold3", "fold4"]
    for split in onsets.FOLDS.values():
        rows = [row for row in sources.read_list("drum_stroke") if row["split"] in split]
        assert {row["label"] for row in rows} == set(onsets.onsets_spec().labels)
    authors = {(row["group"], row["split"]) for row in sources.read_list("onset_backgrounds")}
    assert len(authors) == len({author for author, _ in authors})


def test_every_source_is_a_path_in_a_package():
    for recipe in command.RECIPES.values():
        paths = recipe.sources()
        assert all("/" in path and ".." not in path for path in paths)
        assert all(archive._NAME.fullmatch(package) for package in recordings.packages_of(paths))


# ---- descriptions ----


@pytest.mark.parametrize("name", command.RECIPES)
def test_metadata_is_as_heareval_expects(name):
    task = command.RECIPES[name].spec()
    about = task.metadata()
    assert about["task_name"] == name
    assert about["embedding_type"] == ("event" if name == "onsets" else "scene")
    assert about["prediction_type"] == ("multilabel" if name == "onsets" else "multiclass")
    assert about["sample_duration"] > 0
    if about["split_mode"] == "trainvaltest":
        assert about["splits"] == ["train", "valid", "test"]
    else:
        assert about["split_mode"] == "presplit_kfold"
        assert about["nfolds"] == len(about["splits"]) >= 3
    assert about["evaluation"][0] == {"onsets": "event_onset_200ms_fms", "pitch": "pitch_acc"}.get(name, "top1_acc")
    assert len(set(task.labels)) == len(task.labels)
    json.dumps(about)


def test_pitch_indices_an_octave_apart_differ_by_12():
    labels = rendered.rendered_spec("pitch").labels
    assert [int(label) % 12 for label in labels] == [index % 12 for index in range(48)]


# ---- rendered notes ----


def test_each_program_of_pitch_is_in_one_split():
    splits = rendered.split_programs("pitch")
    assert {split: len(programs) for split, programs in splits.items()} == {"train": 40, "valid": 10, "test": 29}
    assert sorted(sum(splits.values(), ())) == list(rendered.PROGRAMS)
    for programs in splits.values():
        assert {program // 8 for program in programs} == set(range(10))


def test_instrument_families_are_tested_on_all_programs():
    splits = rendered.split_programs("instrument_family")
    assert splits["test"] == rendered.PROGRAMS
    assert sorted(splits["train"] + splits["valid"]) == list(rendered.PROGRAMS)
    assert len(splits["valid"]) == 20


def test_pitches_are_dealt_evenly():
    dealt = rendered.deal_notes("FluidR3_GM")
    assert list(dealt) == list(rendered.PROGRAMS)
    assert all(len(set(notes)) == 16 and set(notes) <= set(rendered.NOTES) for notes in dealt.values())
    counts = Counter(note for notes in dealt.values() for note in notes)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert dealt == rendered.deal_notes("FluidR3_GM") != rendered.deal_notes("TimGM6mb")


def test_a_midi_file_plays_notes_one_after_another():
    data = fluidsynth.midi_file([60, 72], program=5)
    assert data[:14] == b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500)
    at, time, events = 22, 0, []
    assert struct.unpack(">I", data[18:22])[0] == len(data) - 22
    while True:
        ticks = 0
        while data[at] & 0x80:
            ticks, at = ticks << 7 | data[at] & 0x7F, at + 1
        ticks, at = ticks << 7 | data[at], at + 1
        time += ticks
        if data[at] == 0xFF:
            break
        length = 2 if data[at] == 0xC0 else 3
        events.append((time, *data[at : at + length]))
        at += length
    assert data[at:] == b"\xff\x2f\x00"
    assert events[0] == (0, 0xC0, 5)
    assert [event for event in events if event[1] == 0x90] == [(0, 0x90, 60, 100), (4000, 0x90, 72, 100)]
    assert [event[:3] for event in events if event[1] == 0x80] == [(1500, 0x80, 60), (5500, 0x80, 72)]
    assert time == 8000


def test_notes_that_a_sound_font_lacks_are_left_out(tmp_path, monkeypatch):
    def fake_render(notes, program, sound_font, seconds, synthesizer):
        return [np.zeros(2 * RATE, np.float32) if note > 60 else 0.02 * tone(2.0) for note in notes]

    monkeypatch.setattr(archive, "fetch", lambda packages, cache: {name: Path(name) for name in packages})
    monkeypatch.setattr(archive, "locate", lambda folder, path: Path(path))
    monkeypatch.setattr(rendered, "synthesizer_packages", lambda: ["fluidsynth"])
    monkeypatch.setattr(rendered, "render", fake_render)
    clips = rendered.rendered_clips("pitch", tmp_path, jobs=2)
    check_clips(rendered.rendered_spec("pitch"), clips)
    expected = sum(
        note <= 60
        for split, programs in rendered.split_programs("pitch").items()
        for font in (rendered.TEST_FONTS if split == "test" else (rendered.TRAIN_FONT,))
        for program in programs
        for note in rendered.deal_notes(font.name)[program]
    )
    assert len(clips) == expected
    assert all(clip.name.endswith(f"-{clip.labels[0]}.wav") for clip in clips)
    assert np.abs(clips[0].make()).max() == pytest.approx(sources.PEAK, abs=1e-4)


# ---- onsets ----


def test_an_event_lasts_from_the_hits_onset_until_it_has_decayed():
    decay = np.exp(-np.arange(RATE) / RATE * np.log(10) * 3).astype(np.float32)  # 60 dB in a second
    hit = onsets.prepare_hit(np.concatenate([np.zeros(4000, np.float32), 0.1 * tone(1.0, 3000) * decay]))
    assert hit.onset == 80  # 5 ms before the onset are kept
    assert np.sqrt(np.mean(hit.samples[hit.onset :][: RATE // 10] ** 2)) == pytest.approx(1, rel=1e-5)
    assert hit.event_s == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("seconds", "event_s"), [(0.05, 0.2), (4.0, 1.0)])
def test_events_are_neither_too_short_nor_too_long(seconds, event_s):
    hit = onsets.prepare_hit(tone(seconds))
    assert hit.event_s == event_s
    assert len(hit.samples) <= 1.5 * RATE
    assert seconds < 1.5 or abs(hit.samples[-1]) < 1e-3  # faded out


def test_hits_keep_their_distance():
    by_label = {label: [f"{label}{i}" for i in range(3)] for label in ("kick", "snare", "tom")}
    event_s = {path: 0.2 + 0.1 * i for paths in by_label.values() for i, path in enumerate(paths)}
    for seed in range(50):
        placed = onsets.place_hits(by_label, event_s, random.Random(seed))
        assert 6 <= len(placed) <= 14
        times = [hit.onset_s for hit in placed]
        assert all(later - earlier >= 0.2 - 1e-9 for earlier, later in itertools.pairwise(times))
        assert times[-1] + 1 <= onsets.SECONDS
        for label in by_label:
            ones = [hit for hit in placed if hit.label == label]
            for one, other in itertools.pairwise(ones):
                assert other.onset_s - one.onset_s - one.event_s >= 0.3 - 1e-9


def test_a_looped_background_has_no_gaps_or_clicks():
    samples = tone(1.0, 440)
    looped = onsets.loop(samples, 5 * RATE, 3000)
    assert looped.shape == (5 * RATE,)
    blocks = np.sqrt(np.mean(looped.reshape(-1, 400) ** 2, axis=1))
    assert blocks.min() > 0.5 * blocks.max()
    assert np.abs(np.diff(looped)).max() < 1.5 * np.abs(np.diff(samples)).max()


def test_onset_clips_get_louder_where_events_begin(cache, monkeypatch):
    rng = np.random.default_rng(0)
    kits = {"train": "fold0", "valid": "fold2", "test": "fold1"}
    labels = onsets.onsets_spec().labels
    decay = np.exp(-np.arange(4800) / 800).astype(np.float32)
    rows = {
        "drum_stroke": [
            {"path": add_sound(cache, f"{split}{i}.wav", 0.3 * rng.standard_normal(4800) * decay)}
            | {"label": label, "group": f"kit of {split}", "split": fold}
            for split, fold in kits.items()
            for i, label in enumerate(labels)
        ],
        "onset_backgrounds": [
            {"path": add_sound(cache, f"wind{split}.wav", 0.1 * rng.standard_normal(2 * RATE))}
            | {"group": f"wind of {split}", "split": split}
            for split in kits
        ],
    }
    task = onsets.onsets_spec()
    monkeypatch.setattr(onsets, "read_list", rows.__getitem__)
    monkeypatch.setattr(onsets, "CLIPS", {"train": 3, "valid": 1, "test": 1})
    clips = onsets.onsets_clips(cache)
    check_clips(task, clips)
    rises = []
    for clip in clips:
        samples = clip.make()
        assert np.array_equal(samples, clip.make())
        for event in clip.labels:
            at = round(event["start"] * RATE / 1000)
            assert 200 <= event["end"] - event["start"] <= 1000
            rises.append(np.mean(samples[at : at + 160] ** 2) / np.mean(samples[max(0, at - 480) : at - 80] ** 2))
    assert len(rises) >= 30
    assert np.median(rises) > 10
    assert min(rises) > 1.2


# ---- speaker_count ----


def test_counts_are_equally_frequent_and_voices_differ(tmp_path):
    clips = speakers.speakers_clips(tmp_path)
    check_clips(speakers.speakers_spec(), clips)
    assert len(clips) == 1800
    counts = Counter((clip.split, clip.labels[0]) for clip in clips)
    assert {counts[split, str(count)] * 4 for split in speakers.MIXTURES for count in (1, 2, 3, 4)} == {1200, 200, 400}
    assert all(len(set(clip.groups)) == int(clip.labels[0]) for clip in clips)


def test_silence_at_the_edges_is_cut_off():
    silence = np.zeros(8000, np.float32)
    assert speakers.trim(np.concatenate([silence, tone(1.0), silence])).shape == (RATE,)


def test_a_voice_speaks_for_two_seconds_at_a_fixed_level(cache):
    short = [add_sound(cache, f"word{i}.wav", 0.01 * (i + 1) * tone(0.7)) for i in range(4)]
    long = [add_sound(cache, "sentence.wav", tone(9.0))]
    for prompts in (short, long):
        said = speakers.utterance(prompts, 0.4, cache)
        assert said.shape == (2 * RATE,)
        assert np.sqrt(np.mean(said**2)) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match=r"word0\.wav and the 1 after it are shorter than 2\.0 s"):
        speakers.utterance(short[:2], 0.4, cache)


# ---- recorded clips ----


def test_a_clip_is_the_beginning_of_a_recording_at_full_level(cache):
    path = add_sound(cache, "beep.wav", 0.1 * tone(0.5, rate=48000), 48000)
    clip = recorded._beginning(path, cache, 1.0)
    assert clip.shape == (RATE,)
    assert np.abs(clip).max() == pytest.approx(sources.PEAK, rel=1e-5)
    assert not clip[RATE // 2 :].any()
    assert np.argmax(np.abs(np.fft.rfft(clip[: RATE // 2]))) * 2 == 440


def test_missing_pyav_is_reported_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(archive, "fetch", lambda *_: pytest.fail("fetched"))
    assert command.main([str(tmp_path / "tasks"), "--tasks", "speaker_count", "--cache", str(tmp_path)]) == 1
    assert "needs PyAV: pip install" in capsys.readouterr().err


# ---- folders ----

TOY_TASK = TaskSpec("toy", 1.0, ("train", "valid", "test"), ("top1_acc",), ("a/b", "c"))


def toy_clips(make=lambda: 0.5 * tone(1.0)) -> list[Clip]:
    return [
        Clip(f"{split}-{number}.wav", split, (label,), (f"kit of {split}",), (f"toys/{number}.wav",), make)
        for split in TOY_TASK.splits
        for number, label in enumerate(TOY_TASK.labels)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_task_folder_is_in_hears_format(cache, tmp_path):
    folder = write_task(tmp_path / "tasks", TOY_TASK, toy_clips(), ["toys"], cache)
    assert folder == tmp_path / "tasks" / "toy-v1.0.0-full"
    about = json.loads((folder / "task_metadata.json").read_text())
    with open(folder / "labelvocabulary.csv", newline="") as file:
        assert list(csv.reader(file)) == [["idx", "label"], ["0", "a/b"], ["1", "c"]]
    assert about["splits"] == ["train", "valid", "test"]
    for split in about["splits"]:
        labels = json.loads((folder / f"{split}.json").read_text())
        assert labels == {f"{split}-0.wav": ["a/b"], f"{split}-1.wav": ["c"]}
        assert {path.name for path in (folder / "16000" / split).iterdir()} == labels.keys()
        for name in labels:
            info = soundfile.info(folder / "16000" / split / name)
            assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 1, "PCM_16", RATE)
    samples, _ = soundfile.read(folder / "16000/test/test-0.wav")
    assert samples == pytest.approx(0.5 * tone(1.0), abs=1e-4)


def test_a_task_folder_lists_its_sources_and_licences(cache, tmp_path):
    folder = write_task(tmp_path / "tasks", TOY_TASK, toy_clips(), ["toys"], cache)
    with open(folder / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[0] == {"file": "test-0.wav", "split": "test", "groups": "kit of test", "sources": "toys/0.wav"}
    assert "| toys | 1.0 | CC0-1.0 |" in (folder / "LICENCES.md").read_text()
    assert "CC0-1.0" in (folder / "licences/toys.txt").read_text()


def test_the_same_input_gives_the_same_bytes(cache, tmp_path):
    folders = [write_task(tmp_path / str(jobs), TOY_TASK, toy_clips(), ["toys"], cache, jobs) for jobs in (1, 4)]
    assert contents(folders[0]) == contents(folders[1])


def test_events_keep_their_times(cache, tmp_path):
    task = TaskSpec("toy", 1.0, ("train", "valid", "test"), ("event_onset_200ms_fms",), ("a/b", "c"), events=True)
    event = {"label": "c", "start": 10.0, "end": 260.5}
    clips = [Clip(f"{split}.wav", split, (event, event), (split,), (), lambda: tone(1.0)) for split in task.splits]
    folder = write_task(tmp_path / "tasks", task, clips, ["toys"], cache)
    assert json.loads((folder / "valid.json").read_text()) == {"valid.wav": [event, event]}


def test_the_output_folder_only_ever_has_complete_tasks(cache, tmp_path):
    out_dir = tmp_path / "tasks"

    def broken() -> np.ndarray:
        assert not list(out_dir.iterdir())
        raise ValueError("no such sound")

    with pytest.raises(ValueError, match="no such sound"):
        write_task(out_dir, TOY_TASK, toy_clips(broken), ["toys"], cache, jobs=2)
    assert not list(out_dir.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tasks"]


def test_leftovers_of_a_killed_run_do_not_get_into_a_task(cache, tmp_path):
    leftover = tmp_path / ".tasks.unfinished" / TOY_TASK.folder_name / "16000" / "train"
    leftover.mkdir(parents=True)
    (leftover / "half.wav").write_bytes(b"RIFF")
    folder = write_task(tmp_path / "tasks", TOY_TASK, toy_clips(), ["toys"], cache)
    assert not (folder / "16000/train/half.wav").exists()
    assert not (tmp_path / ".tasks.unfinished").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ("kit of test",)}, "kit of test is in"),
        ({"split": "fold7"}, "is in split fold7, expected one of"),
        ({"name": "test-0.wav"}, "two clips are called test-0.wav"),
        ({"labels": ("d",)}, r"unknown labels \['d'\]"),
        ({"labels": ("c", "c")}, "2 labels, expected one"),
        ({"make": lambda: tone(0.9)}, r"shape \(14400,\), expected \(16000,\)"),
        ({"make": lambda: 4 * tone(1.0)}, "peak 2.0"),
        ({"make": lambda: np.zeros(RATE, np.float32)}, "peak 0.0"),
        ({"make": lambda: np.full(RATE, np.nan, np.float32)}, "peak nan"),
    ],
)
def test_invalid_clips_are_refused(cache, tmp_path, change, message):
    clips = toy_clips()
    clips[0] = dataclasses.replace(clips[0], **change)
    with pytest.raises(ValueError, match=message):
        write_task(tmp_path / "tasks", TOY_TASK, clips, ["toys"], cache)
    assert not list((tmp_path / "tasks").glob("*"))


def test_a_split_without_clips_is_refused():
    with pytest.raises(ValueError, match=r"no clips in \['test'\]"):
        check_clips(TOY_TASK, [clip for clip in toy_clips() if clip.split != "test"])


# ---- the command ----


@pytest.fixture
def toy_recipes(cache, monkeypatch):
    def fail(cache: Path, jobs: int) -> list[Clip]:
        raise ValueError("no such sound")

    recipes = {
        "toy": command.Recipe(lambda: TOY_TASK, lambda: ["toys/0.wav"], lambda cache, jobs: toy_clips()),
        "broken": command.Recipe(lambda: dataclasses.replace(TOY_TASK, name="broken"), lambda: ["toys/0.wav"], fail),
    }
    monkeypatch.setattr(command, "RECIPES", recipes)


def test_a_finished_task_is_skipped(toy_recipes, cache, tmp_path, monkeypatch, capsys):
    arguments = [str(tmp_path / "tasks"), "--tasks", "toy", "--cache", str(cache)]
    assert command.main(arguments) == 0
    monkeypatch.setattr(archive, "fetch", lambda *_: pytest.fail("fetched again"))
    assert command.main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(tmp_path / "tasks" / "toy-v1.0.0-full")
    assert second == f"{first} (already there)"


def test_other_tasks_are_made_when_one_fails(toy_recipes, cache, tmp_path, capsys):
    assert command.main([str(tmp_path / "tasks"), "--tasks", "broken", "toy", "--cache", str(cache)]) == 1
    assert "broken: no such sound" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["toy-v1.0.0-full"]


@pytest.mark.parametrize(
    "arguments",
    [["tasks", "--tasks", "whistling"], ["tasks", "--jobs", "0"], ["tasks", "--cache", "tasks/cache"], []],
)
def test_bad_usage_exits_with_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert not list(tmp_path.iterdir())
