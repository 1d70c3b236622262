"""The list of the papers' ten HEAR tasks, on small fake folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from evaluation import __main__ as command
from evaluation.tasks import HEAR_TASKS, HearTask

BY_NAME = {task.abbreviation: task for task in HEAR_TASKS}


def make_task(tasks_dir: Path, task: HearTask, name: str | None = None, rate: int = 16000) -> Path:
    folder = tasks_dir / (name or task.folder)
    folds = task.split == "5 folds"
    splits = [f"fold{number:02}" for number in range(5)] if folds else ["train", "valid", "test"]
    folder.mkdir(parents=True)
    metadata = {
        "task_name": task.folder.partition("-")[0],
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "new_split_kfold" if folds else "trainvaltest",
        "evaluation": [task.metric],
        "splits": splits,
    }
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,a\n1,b\n")
    for split in splits:
        clips = {f"{split}-{number}.wav": ["a"] for number in range(2)}
        (folder / f"{split}.json").write_text(json.dumps(clips))
        (folder / str(rate) / split).mkdir(parents=True)
        for clip in clips:
            soundfile.write(folder / str(rate) / split / clip, np.zeros(160), rate)
    return folder


@pytest.fixture
def tasks_dir(tmp_path):
    for task in HEAR_TASKS:
        make_task(tmp_path, task)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the command: run(folder) -> exit code, the task's lines by abbreviation, all lines."""

    def run(folder: Path) -> tuple[int, dict[str, str], list[str]]:
        code = command.main(["hear-tasks", str(folder)])
        lines = capsys.readouterr().out.splitlines()
        return code, {line.split()[0]: line for line in lines[1:11]}, lines

    return run


def test_all_ten_tasks_are_there(run, tasks_dir):
    code, tasks, lines = run(tasks_dir)
    assert code == 0 and list(tasks) == list(BY_NAME)
    assert all("complete, " in line for line in tasks.values())
    assert lines[-1].endswith("10 of 10 tasks, complete and at 16 kHz")
    assert tasks["E50"].split("  ")[0] == "E50"
    for fact in ("ESC-50", "esc50-v2.0.0-full", "top1_acc", "2.77", "5 folds", "complete, 10 clips"):
        assert fact in tasks["E50"]
    for fact in ("fsd50k-v1.0-full", "mAP", "100", "train, valid, test", "complete, 6 clips"):
        assert fact in tasks["F50K"]


def test_missing_tasks_are_listed_with_their_folders_and_sources(run, tasks_dir):
    shutil.rmtree(tasks_dir / BY_NAME["VL"].folder)
    code, tasks, lines = run(tasks_dir)
    assert code == 1
    assert "vox_lingua_top10-hear2021-full" in tasks["VL"] and tasks["VL"].endswith("missing")
    text = "\n".join(lines)
    assert "9 of 10 tasks" in text
    assert "gs://hear2021-archive/tasks/" in text and "https://zenodo.org/record/5887964" in text


def test_a_folder_that_does_not_exist_has_no_tasks(run, tmp_path):
    code, tasks, lines = run(tmp_path / "nothing")
    assert code == 1 and all(line.endswith("missing") for line in tasks.values())
    assert any("0 of 10 tasks" in line for line in lines)


def remove_clip(folder: Path) -> None:
    (folder / "16000/fold01/fold01-1.wav").unlink()


def remove_split(folder: Path) -> None:
    (folder / "fold02.json").unlink()


def remove_audio(folder: Path) -> None:
    shutil.rmtree(folder / "16000/fold03")


def keep_48_khz(folder: Path) -> None:
    (folder / "16000").rename(folder / "48000")


def pretend_16_khz(folder: Path) -> None:
    soundfile.write(folder / "16000/fold04/fold04-0.wav", np.zeros(160), 48000)


def break_clip(folder: Path) -> None:
    (folder / "16000/fold00/fold00-0.wav").write_bytes(b"no audio")


def change_metric(folder: Path) -> None:
    metadata = json.loads((folder / "task_metadata.json").read_text())
    (folder / "task_metadata.json").write_text(json.dumps(metadata | {"evaluation": ["mAP"]}))


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (remove_clip, "incomplete: 1 of 10 clips are missing"),
        (remove_audio, "incomplete: 2 of 10 clips are missing"),
        (remove_split, "fold02.json"),
        (keep_48_khz, "no audio at 16000 Hz, only at 48000 Hz"),
        (pretend_16_khz, "16000/fold04/fold04-0.wav is at 48000 Hz"),
        (break_clip, "cannot read 16000/fold00/fold00-0.wav"),
        (change_metric, "scored by mAP, not top1_acc"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(run, tasks_dir, damage, state):
    damage(tasks_dir / BY_NAME["BO"].folder)
    code, tasks, _ = run(tasks_dir)
    assert code == 1 and state in tasks["BO"]
    assert sum("complete, " in line for line in tasks.values()) == 9


def test_other_versions_count_and_other_sizes_do_not(run, tasks_dir):
    (tasks_dir / BY_NAME["E50"].folder).rename(tasks_dir / "esc50-v3.0.0-full")
    (tasks_dir / BY_NAME["NS-5h"].folder).rename(tasks_dir / "nsynth_pitch-v2.2.3-50h")
    code, tasks, _ = run(tasks_dir)
    assert code == 1
    assert "esc50-v3.0.0-full" in tasks["E50"] and "complete, " in tasks["E50"]
    assert tasks["NS-5h"].endswith("missing")
