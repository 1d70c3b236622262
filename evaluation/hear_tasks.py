"""Lists the papers' ten HEAR tasks: which of them a folder has, and where HEAR publishes the rest."""

from __future__ import annotations

import os
from pathlib import Path

import soundfile

from evaluation.tasks import HEAR_TASKS, HearTask, find_hear_task, read_task
from hear_encoders.files import read_json
from hear_encoders.nn.frontend import SAMPLE_RATE

# From https://hearbenchmark.com/hear-tasks.html.
SOURCES = """\
HEAR publishes its tasks in two places (https://hearbenchmark.com/hear-tasks.html):
  at 16 kHz   gs://hear2021-archive/tasks/ (Google Storage) or s3://hear2021-archive/tasks/ (AWS); you pay the transfer
  at 48 kHz   https://zenodo.org/record/5887964; resample the audio in FOLDER/48000/ to 16 kHz, into FOLDER/16000/
The archives unpack to tasks/FOLDER or hear-2021.0.6/tasks/FOLDER: move each FOLDER into the folder of tasks."""


def list_tasks(tasks_dir: Path) -> tuple[list[str], bool]:
    """Describe the ten tasks, and say which of them a folder has.

    Returns:
        Lines of text, and whether all ten tasks are there, complete and at 16 kHz.
    """
    folders = sorted(path for path in tasks_dir.iterdir() if path.is_dir()) if tasks_dir.is_dir() else []
    rows = [("Task", "Name", "Folder", "Metric", "Hours", "Split", "Here")]
    complete = 0
    for task in HEAR_TASKS:
        found = [folder for folder in folders if find_hear_task(folder.name) == task]
        problems = {folder: find_problem(folder, task) for folder in found}
        # If there are several versions, a complete one counts.
        folder = min(found, key=lambda folder: problems[folder] is not None, default=None)
        state = "missing" if folder is None else problems[folder] or f"complete, {read_task(folder).clips} clips"
        complete += folder is not None and problems[folder] is None
        name = folder.name if folder else task.folder
        rows.append((task.abbreviation, task.title, name, task.metric, f"{task.hours:g}", task.split, state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += ["", f"{tasks_dir}: {complete} of {len(HEAR_TASKS)} tasks, complete and at 16 kHz"]
    if complete < len(HEAR_TASKS):
        lines += ["", SOURCES]
    return lines, complete == len(HEAR_TASKS)


def find_problem(folder: Path, task: HearTask) -> str | None:
    """Return why a task folder cannot be used at 16 kHz, in a few words; None if it can."""
    try:
        found = read_task(folder)
        clips = {split: list(read_json(folder / f"{split}.json")) for split in found.splits}
    except (OSError, ValueError) as error:
        return f"incomplete: {error}"
    if found.metric != task.metric:
        return f"scored by {found.metric}, not {task.metric}"
    audio = folder / str(SAMPLE_RATE)
    if not audio.is_dir():
        rates = sorted((path.name for path in folder.iterdir() if path.name.isdigit()), key=int)
        return f"no audio at {SAMPLE_RATE} Hz" + (f", only at {', '.join(rates)} Hz" if rates else "")
    missing = 0
    for split, names in clips.items():
        present = set(os.listdir(audio / split)) if (audio / split).is_dir() else set()
        missing += sum(name not in present for name in names)
    if missing:
        return f"incomplete: {missing} of {found.clips} clips are missing"
    for split, names in clips.items():
        for name in names[:1]:  # one clip per split: HEAR's folders have one sample rate each
            try:
                rate = soundfile.info(str(audio / split / name)).samplerate
            except soundfile.LibsndfileError:
                return f"cannot read {SAMPLE_RATE}/{split}/{name}"
            if rate != SAMPLE_RATE:
                return f"{SAMPLE_RATE}/{split}/{name} is at {rate} Hz"
    return None
