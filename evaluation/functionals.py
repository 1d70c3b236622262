"""A HEAR module of openSMILE's ComParE_2016 functionals, a widely used description of a clip by 6373 values.

    .heareval/bin/pip install opensmile==2.6.0
    .heareval/bin/python -m evaluation.functionals corpus/recordings/held_out -o functionals.npz
    python -m evaluation run --module evaluation.functionals --weights functionals.npz \
        --tasks SCENE_TASK ...

openSMILE is licensed for research only, so it is in no list of requirements and this module is separate from
`baselines`. The functionals' magnitudes differ by ten orders, and heareval's classifiers do not scale their input, so
they are standardized with mean and standard deviation over recordings of the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hear_encoders.audio import find_audio, load_audio
from hear_encoders.checks import check_audio
from hear_encoders.console import BAD_USAGE, output_path, positive, print_error
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE

# openSMILE's library corrupts memory if TensorFlow's, which heareval needs, was loaded before it; so load it first. If
# it is missing, `Functionals` raises the error.
with contextlib.suppress(ModuleNotFoundError):
    import opensmile  # noqa: F401

SIZE = 6373
CLIP_SECONDS = 2.0  # clips to measure mean and standard deviation on; about as long as the tasks' clips
LARGEST = 10.0  # standard deviations; larger values are clipped


class Functionals(nn.Module):
    """Standardized ComParE_2016 functionals of whole clips.

    Args:
        mean, std: mean and standard deviation of each functional, (6373,).
    """

    sample_rate = SAMPLE_RATE
    scene_embedding_size = timestamp_embedding_size = SIZE

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        import opensmile

        self.smile = opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def raw(self, clip: np.ndarray) -> np.ndarray:
        """Return the unscaled functionals of one clip, (samples,) float32; NaN where one is undefined."""
        values = self.smile.process_signal(clip, self.sample_rate).to_numpy()[0]  # (6373,)
        return np.where(np.isfinite(values), values, np.nan)

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """Return standardized functionals: (B, samples) -> (B, 6373) float32, on the audio's device."""
        audio = check_audio(audio)
        values = torch.from_numpy(np.stack([self.raw(clip) for clip in audio.cpu().numpy()])).to(self.mean.device)
        standardized = ((values - self.mean) / self.std).clamp(-LARGEST, LARGEST)
        return standardized.nan_to_num(nan=0.0).float().to(audio.device)  # the mean replaces undefined values


def load_model(model_file_path: str = "") -> Functionals:
    """Load mean and standard deviation.

    Args:
        model_file_path: an `.npz` file from `python -m evaluation.functionals`.

    Raises:
        ValueError: no file was given.
        ModuleNotFoundError: opensmile is not installed.
    """
    if not model_file_path:
        raise ValueError("no weights: pass the file that `python -m evaluation.functionals` writes")
    with np.load(model_file_path) as file:
        return Functionals(torch.from_numpy(file["mean"]), torch.from_numpy(file["std"])).eval()


def get_scene_embeddings(audio: Tensor, model: Functionals) -> Tensor:
    """Return one embedding per clip: (clips, samples) -> (clips, 6373)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: Functionals) -> tuple[Tensor, Tensor]:
    """Raise ValueError: functionals describe whole clips, not time steps."""
    raise ValueError("ComParE functionals describe whole clips; select scene tasks with --tasks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, which measures mean and standard deviation. Return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m evaluation.functionals",
        description="Measure mean and standard deviation of ComParE functionals, to standardize by.",
    )
    parser.add_argument("recordings", nargs="+", help="audio files or folders")
    parser.add_argument("-o", "--output", required=True, type=output_path, metavar="OUT.npz")
    parser.add_argument(
        "--clips",
        type=positive(int),
        default=1000,
        metavar="N",
        help="random clips of 2 s; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    try:
        _, files = find_audio(options.recordings)
        model = Functionals(torch.zeros(SIZE), torch.ones(SIZE))
    except (OSError, ValueError, ImportError) as error:
        print_error(parser.prog, f"error: {error}")
        return BAD_USAGE
    random, values = np.random.default_rng(0), []
    samples = round(CLIP_SECONDS * SAMPLE_RATE)
    for number in tqdm(random.integers(len(files), size=options.clips), unit="clip", disable=None):
        try:
            audio = load_audio(files[number].path).numpy()
        except ValueError as error:
            print_error(parser.prog, f"left out: {error}")
            continue
        begin = int(random.integers(max(1, len(audio) - samples + 1)))
        values.append(model.raw(audio[begin : begin + samples]).astype(np.float64))
    # Per functional, over the clips where it is defined; 0 and 1 if there are none.
    defined = [[value for value in column if np.isfinite(value)] or [0.0] for column in np.transpose(values)]
    mean, std = (np.array([measure(column) for column in defined]) for measure in (np.mean, np.std))
    std[std == 0] = 1
    with atomic_write(options.output) as file:
        np.savez(file, mean=mean, std=std)
    print(f"{options.output}: from {len(values)} clips out of {len(files)} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
