"""What a run tells about itself: a line on the terminal, log.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboardX import SummaryWriter

from hear_encoders.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_FILE, TENSORBOARD_FOLDER, PICTURES_FOLDER = "log.jsonl", "tensorboard", "pictures"

logger = logging.getLogger("training")


class RunLog:
    """Writes the progress of a run into its directory.

    Args:
        run: the run's directory.
        step: the step it goes on from; what was written after it is about to be done again, and is dropped.
        total_steps: of the run.
        clip_flop: FLOPs of training on one clip.
        flop_rate: FLOP/s that all devices of the run together can reach.
    """

    def __init__(self, run: Path, step: int, total_steps: int, clip_flop: int, flop_rate: float) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.total_steps = run, total_steps
        self.clip_flop, self.flop_rate = clip_flop, flop_rate
        path = run / LOG_FILE
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if step and json.loads(line)["step"] <= step]  # step 0 is tested on anew
            with atomic_write(path) as file:
                file.write("".join(kept).encode())
        self.tensorboard = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1 if step else 0)
        self._begin()

    def add(self, loss: float, norm: float, rate: float, clips: int, seconds: float) -> None:
        """Note one step, and how long it took from waiting for its data to its end."""
        self.losses.append(loss)
        self.norm, self.rate = norm, rate
        self.clips += clips
        self.seconds += seconds

    def write(self, step: int) -> None:
        """Write what came since the last line."""
        clips_per_s = self.clips / self.seconds
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self.rate,
            "gradient_norm": self.norm,
            "clips_per_s": clips_per_s,
            "mfu": clips_per_s * self.clip_flop / self.flop_rate,
        }
        self._write(step, values)
        logger.info(
            "step %d of %d  loss %.4f  rate %.2e  gradient %.2f  %.0f clips/s  MFU %.0f %%",
            *(step, self.total_steps, *list(values.values())[:-1], 100 * values["mfu"]),
        )
        self._begin()

    def write_held_out(self, step: int, clips: int, error: float, mean: float, interpolation: float) -> None:
        """Write the reconstruction error of held-out records beside its baselines; `clips` trained on so far."""
        values = {"held_out_loss": error, "held_out_mean": mean, "held_out_interpolation": interpolation}
        self._write(step, values, clips=clips)
        logger.info(
            "step %d of %d  held-out %.4f  (predicting the mean %.4f, interpolating %.4f)",
            *(step, self.total_steps, *values.values()),
        )

    def add_picture(self, step: int, figure: Figure) -> None:
        """Write a reconstruction as PNG and for TensorBoard."""
        from training.curves import save_png  # matplotlib takes a second to import

        save_png(figure, self.run / PICTURES_FOLDER / f"step-{step:08d}.png")
        self.tensorboard.add_figure("reconstruction", figure, step)
        self.tensorboard.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self.tensorboard.close()

    def _write(self, step: int, values: dict[str, float], **more: int) -> None:
        with open(self.run / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **more, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()

    def _begin(self) -> None:
        self.losses: list[float] = []
        self.clips, self.seconds = 0, 0.0
