"""Export a run's encoder: `python -m training.export RUN OUT_DIR` writes weights for `load_model(OUT_DIR)`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hear_encoders.checkpoint import encoder_from_tensors, save_checkpoint
from hear_encoders.console import BAD_USAGE, print_error
from hear_encoders.files import atomic_write
from training.config import RunConfig
from training.run_dir import load_latest_checkpoint, read_run_config


def export(run: Path, output: Path, half: bool = False) -> None:
    """Write the encoder of a run's newest checkpoint, and a draft of a model card if there is no card.

    Args:
        run: the run's directory.
        output: the directory to write.
        half: store the weights as float16, in half the space; `load_model` converts them to float32.

    Raises:
        FileNotFoundError: no such run, or a run without a checkpoint.
        ValueError: a weight does not fit into float16.
    """
    config = read_run_config(run)
    checkpoint, tensors, state = load_latest_checkpoint(run)
    prefix = "encoder."
    encoder_tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if half:
        encoder_tensors = {name: tensor.half() for name, tensor in encoder_tensors.items()}  # checked just below
    encoder = encoder_from_tensors(config.encoder, encoder_tensors, str(checkpoint))
    save_checkpoint(output, encoder.half() if half else encoder)
    card = output / "README.md"
    if card.exists():  # somebody may have completed it
        print(f"{card} exists already and stays as it is")
        return
    with atomic_write(card) as file:
        file.write(_model_card(config, run, state["step"]).encode())


def _model_card(config: RunConfig, run: Path, step: int) -> str:
    """Draft a model card with all that the run knows; whoever publishes the weights adds the rest."""
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

- Optimizer steps: {step}, of {config.batch_size} crops of 2 s
- Code: commit {commit or "unknown"}
- Training data: (to be described: sources, hours, licenses)

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
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser("python -m training.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("output", type=Path, metavar="OUT_DIR", help="directory to write")
    parser.add_argument("--half", action="store_true", help="store the weights as float16, in half the space")
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.output, options.half)
    except (OSError, ValueError) as error:
        print_error(parser.prog, f"error: {error}")
        return BAD_USAGE
    print(f"{options.output}: config.json, model.safetensors, README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
