"""A HEAR module of openSMILE's ComParE_2016 functionals: the 6373 numbers that many embed a clip with today.

    .heareval/bin/pip install opensmile==2.6.0
    .heareval/bin/python -m evaluation.functionals corpus/recordings/held_out -o functionals.npz
    python -m evaluation run --module evaluation.functionals --weights functionals.npz \
        --tasks SCENE_TASK ...

It is not part of `baselines`, nor of any list of requirements, because openSMILE is licensed for research only. Its
functionals differ in size by ten orders of magnitude, and heareval's classifiers take embeddings as they are: so they
are standardised, with mean and standard deviation over recordings of the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hear_encoders.audio import find_audio, load_audio
from hear_encoders.console import BAD_USAGE, positive
from hear_encoders.embedder import check_audio
from hear_encoders.files import atomic_write
from hear_encoders.nn.frontend import SAMPLE_RATE

# Its library corrupts memory if TensorFlow's, which heareval brings, was loaded before it: so it is loaded first, and
# `Functionals` says what is missing without it.
with contextlib.suppress(ModuleNotFoundError):
    import opensmile  # noqa: F401

SIZE = 6373
CLIP_SECONDS = 2.0  # of the clips that the standardisation is made from, as tasks have them
LARGEST = 10.0  # standard deviations: what lies further out is set to it


class Functionals(nn.Module):
    """ComParE_2016 functionals of whole clips, standardised.

    Args:
        mean, std: of each functional, (6373,); zero and one where they are to be left as they are.
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
        """Functionals of (samples,) float32 as openSMILE gives them; NaN where it cannot tell."""
        values = self.smile.process_signal(clip, self.sample_rate).to_numpy()[0]  # (6373,)
        return np.where(np.isfinite(values), values, np.nan)

    def scene_embeddings(self, audio: Tensor) -> Tensor:
        """(B, samples) -> (B, 6373) on the audio's device."""
        audio = check_audio(audio)
        values = torch.from_numpy(np.stack([self.raw(clip) for clip in audio.cpu().numpy()])).to(self.mean.device)
        standardised = ((values - self.mean) / self.std).clamp(-LARGEST, LARGEST)
        return standardised.nan_to_num(nan=0.0).float().to(audio.device)  # of what it cannot tell, the mean


def load_model(model_file_path: str = "") -> Functionals:
    """Make the module.

    Args:
        model_file_path: an `.npz` that this file's command wrote.

    Raises:
        ValueError: no file was given.
        ModuleNotFoundError: opensmile is not installed.
    """
    if not model_file_path:
        raise ValueError("give it the .npz that `python -m evaluation.functionals RECORDINGS -o OUT.npz` writes")
    with np.load(model_file_path) as file:
        return Functionals(torch.from_numpy(file["mean"]), torch.from_numpy(file["std"])).eval()


def get_scene_embeddings(audio: Tensor, model: Functionals) -> Tensor:
    """One embedding per clip: (clips, samples) -> (clips, 6373)."""
    return model.scene_embeddings(audio)


def get_timestamp_embeddings(audio: Tensor, model: Functionals) -> tuple[Tensor, Tensor]:
    """Functionals are of whole clips: there are none per time step."""
    raise ValueError("ComParE functionals describe whole clips; evaluate them on scene tasks, with --tasks")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: measure mean and standard deviation. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m evaluation.functionals",
        description="Measure what ComParE functionals are standardised with.",
    )
    parser.add_argument("recordings", nargs="+", help="files or folders of audio")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT.npz")
    parser.add_argument(
        "--clips", type=positive(int), default=1000, metavar="N", help="of 2 s, at random; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        _, files = find_audio(options.recordings)
        model = Functionals(torch.zeros(SIZE), torch.ones(SIZE))
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return BAD_USAGE
    random, values = np.random.default_rng(0), []
    samples = round(CLIP_SECONDS * SAMPLE_RATE)
    for number in tqdm(random.integers(len(files), size=options.clips), unit="clip", disable=None):
        try:
            audio = load_audio(files[number].path).numpy()
        except ValueError as error:
            tqdm.write(f"{parser.prog}: left out: {error}", file=sys.stderr)
            continue
        begin = int(random.integers(max(1, len(audio) - samples + 1)))
        values.append(model.raw(audio[begin : begin + samples]).astype(np.float64))
    known = [[value for value in column if np.isfinite(value)] or [0.0] for column in np.transpose(values)]
    mean, std = (np.array([measure(column) for column in known]) for measure in (np.mean, np.std))
    std[std == 0] = 1
    with atomic_write(options.output) as file:
        np.savez(file, mean=mean, std=std)
    print(f"{options.output}: from {len(values)} clips of {len(files)} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
