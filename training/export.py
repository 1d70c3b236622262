"""From a run to weights: `python -m training.export RUN OUT_DIR` writes what `load_model(OUT_DIR)` takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hear_encoders.checkpoint import encoder_from_tensors, save_checkpoint
from hear_encoders.files import atomic_write
from training import checkpoints
from training.config import RunConfig
from training.pretrain import CONFIG_FILE, read_run_config


def export(run: Path, output: Path, half: bool = False) -> None:
    """Write the encoder of a run's newest checkpoint, and the beginning of a model card where there is none.

    Args:
        run: directory of the run.
        output: directory to write.
        half: store the weights as float16, in half the space; `load_model` makes float32 of them.

    Raises:
        FileNotFoundError: no such run, or one without a checkpoint.
        ValueError: a weight does not fit into float16.
    """
    if not (run / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {CONFIG_FILE}")
    config = read_run_config(run)
    newest = checkpoints.latest(run)
    if newest is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    tensors, state = checkpoints.load(newest)
    prefix = "encoder."
    encoder_tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if half:
        encoder_tensors = {name: tensor.half() for name, tensor in encoder_tensors.items()}  # checked just below
    encoder = encoder_from_tensors(config.encoder, encoder_tensors, str(newest))
    save_checkpoint(output, encoder.half() if half else encoder)
    card = output / "README.md"
    if card.exists():  # somebody may have completed it
        print(f"{card}: left as it is")
        return
    with atomic_write(card) as file:
        file.write(_model_card(config, run, state["step"]).encode())


def _model_card(config: RunConfig, run: Path, step: int) -> str:
    """A card to be completed by whoever publishes the weights: what is known for certain is filled in."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    except OSError:  # there is no git
        commit = ""
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    family = config.encoder.family
    module = "hear_audiomaepp" if family in ("audiomaepp", "mae") else "hear_axlstm"
    return f"""---
library_name: hear-audiomaepp
tags: [audio, feature-extraction, self-supervised, {family}]
---

# {run.name}

An encoder of family `{family}`, pretrained with `training.pretrain` of hear-audiomaepp.

- Steps: {step}, of {config.batch_size} crops of 2 s
- Code: commit {commit or "unknown"}
- Training data: (to be described: sources, hours, licences)

```python
import {module}

model = {module}.load_model("path/to/this/directory")
```

## Configuration

```json
{settings}
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m training.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("output", type=Path, metavar="OUT_DIR")
    parser.add_argument("--half", action="store_true", help="store the weights as float16, in half the space")
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.output, options.half)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: config.json, model.safetensors, README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
