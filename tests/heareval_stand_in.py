"""Stand-ins for heareval: a small script for the kit, its environment, and task folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import soundfile

from evaluation import environment

CLIP_S = 0.5

# Appends each call to calls.txt and fails if fail.txt lists the call. Imports only the standard library: starts fast.
FAKE_KIT = """
import json, sys
from pathlib import Path
here = Path(__file__).parent
step, a = sys.argv[1], json.loads(sys.argv[2])
if step == "describe":
    call = "describe"
elif step == "embed":
    call = f"embed {a['task']}"
else:
    call = " ".join(map(str, [step, Path(a["embeddings"]).parent.name, *([a["seed"]] if step == "predict" else [])]))
with open(here / "calls.txt", "a") as file:
    file.write(call + "\\n")
if (here / "fail.txt").exists() and call in (here / "fail.txt").read_text().splitlines():
    print("0 %\\r50 %\\r99 %\\nit went wrong")
    sys.exit(3)
if step == "describe":
    facts = {"sample_rate": 16000, "embedding_size": 4, "fingerprint": a["module"], "versions": {"torch": "2"}}
    Path(a["output"]).write_text(json.dumps(facts))
elif step == "embed":
    Path(a["output"]).mkdir()
    Path(a["output"], "profile.embeddings.json").write_text('{"time_elapsed": 1.5}')
elif step == "map":
    Path(a["output"]).write_text('{"method": "t-SNE", "points": [[0, 1]], "labels": ["a"]}')
else:
    folder = Path(a["folder"])
    folder.mkdir()
    scores = {"test": {"test_loss": 1.0, "test_score": 0.5, "test_top1_acc": 0.25 + a["seed"] / 100}}
    (folder / "test.predicted-scores.json").write_text(json.dumps(scores))
"""


def make_task(tasks: Path, name: str, **fields) -> Path:
    folder = tasks / name
    splits = fields.get("splits", ["train", "valid", "test"])
    metadata = {
        "task_name": name.partition("-")[0],
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "evaluation": ["top1_acc", "d_prime"],
        "splits": splits,
    } | fields
    for split in splits:
        (folder / "16000" / split).mkdir(parents=True)
        soundfile.write(folder / "16000" / split / f"{split}.wav", np.zeros(int(16000 * CLIP_S)), 16000)
        (folder / f"{split}.json").write_text(json.dumps({f"{split}.wav": ["a"]}))
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,a\n1,b\n")
    return folder


def make_environment(folder: Path, kit: Path) -> Path:
    """Make a folder that passes for heareval's environment and runs the script `kit`."""
    (folder / "bin").mkdir(parents=True)
    (folder / environment.STAMP_FILE).write_text("{}")
    interpreter = environment.python(folder)
    # Called as `python -m evaluation.kit STEP ARGUMENTS`.
    interpreter.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S "{kit}" "$@"\n')
    interpreter.chmod(0o755)
    return folder
