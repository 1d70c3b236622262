"""A run's progress: lines on the terminal, log.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from hear_encoders.files import atomic_write, file_named
from training.run_dir import LOG_FILE, read_log

TENSORBOARD_FOLDER, PICTURES_FOLDER = "tensorboard", "pictures"

logger = logging.getLogger("training")


class RunLog:
    """Writes a run's progress into its directory.

    Args:
        run: the run's directory.
        step: the optimizer step that the run resumes from. Lines of later steps are dropped, since those steps are
            made again.
        total_steps: optimizer steps of the whole run.
        clip_flop: FLOPs of training on one clip.
        flop_rate: FLOP/s that all the run's devices together can reach.
        deadline: when training stops at the latest, on the clock of `time.monotonic`; infinity if it does not.
    """

    def __init__(
        self, run: Path, step: int, total_steps: int, clip_flop: int, flop_rate: float, deadline: float = math.inf
    ) -> None:
        self.run, self.total_steps = run, total_steps
        self.clip_flop, self.flop_rate, self.deadline = clip_flop, flop_rate, deadline
        run.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(run) if step and line["step"] <= step]  # step 0 is tested again
        with atomic_write(run / LOG_FILE) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self.tensorboard = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1 if step else 0)
        self._reset()

    def add(self, loss: float, gradient_norm: float, learning_rate: float, clips: int, seconds: float) -> None:
        """Note one optimizer step and its duration, waiting for data included."""
        self.losses.append(loss)
        self.gradient_norm, self.learning_rate = gradient_norm, learning_rate
        self.clips += clips
        self.seconds += seconds

    def write(self, step: int) -> None:
        """Write and print a line about the optimizer steps since the last one."""
        self._write(step, self._values())
        self.print_progress(step)
        self._reset()

    def print_progress(self, step: int) -> None:
        """Print the line that `write` would print, and write nothing."""
        values = self._values()
        remaining_s = (self.total_steps - step) * self.seconds / len(self.losses)
        remaining_s = max(0, min(remaining_s, self.deadline - time.monotonic()))
        logger.info(
            "step %d of %d  loss %.4f  rate %.2e  gradient %.2f  %s clips/s  MFU %.0f %%  %s left",
            *(step, self.total_steps, values["loss"], values["learning_rate"], values["gradient_norm"]),
            *(_format_rate(values["clips_per_s"]), 100 * values["mfu"], tqdm.format_interval(remaining_s)),
        )

    def write_held_out(self, step: int, clips: int, error: float, mean: float, interpolation: float) -> None:
        """Write and print the held-out error beside its baselines; `clips` is how many were trained on so far."""
        values = {"held_out_loss": error, "held_out_mean": mean, "held_out_interpolation": interpolation}
        self._write(step, values, clips=clips)
        logger.info(
            "step %d of %d  held-out error %.4f  (predicting the mean %.4f, interpolating %.4f)",
            *(step, self.total_steps, *values.values()),
        )

    def add_picture(self, step: int, logmel: np.ndarray, visible: np.ndarray, predicted: np.ndarray) -> None:
        """Draw a reconstruction, as PNG and for TensorBoard; arguments as for `reconstruction_figure`."""
        from training.figures import reconstruction_figure, save_png  # imports matplotlib, which takes seconds

        figure = reconstruction_figure(logmel, visible, predicted, f"{self.run.name}, step {step}")
        save_png(figure, self.run / PICTURES_FOLDER / f"step-{step:08d}.png")
        self.tensorboard.add_figure("reconstruction", figure, step)
        self._flush_tensorboard()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self.tensorboard.close()

    def _values(self) -> dict[str, float]:
        clips_per_s = self.clips / self.seconds
        return {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "clips_per_s": clips_per_s,
            "mfu": clips_per_s * self.clip_flop / self.flop_rate,
        }

    def _write(self, step: int, values: dict[str, float], **more: int) -> None:
        path = self.run / LOG_FILE
        with file_named(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **more, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self._flush_tensorboard()

    def _flush_tensorboard(self) -> None:
        with file_named(self.run / TENSORBOARD_FOLDER):
            self.tensorboard.flush()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.clips, self.seconds = 0, 0.0


def _format_rate(rate: float) -> str:
    """Format a positive number with at least two significant digits: 0.43, 4.3, 430."""
    return f"{rate:.{max(0, 1 - math.floor(math.log10(rate)))}f}"
