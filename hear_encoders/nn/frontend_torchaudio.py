"""torchaudio's log-mel, in the papers' settings, for results that equal theirs to the last bit; front ends by name.

`LogMel` computes the same and needs no torchaudio: both differ by float32's rounding errors in torchaudio's FFT, which
show in bands that are silent beside a loud sound. Needs the extra `torchaudio`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.nn.frontend import (
    BANDS,
    HIGHEST_HZ,
    HOP,
    LOG_OFFSET,
    LOWEST_HZ,
    SAMPLE_RATE,
    SHORTEST_CLIP,
    WINDOW,
    LogMel,
)

FrontendName = Literal["own", "torchaudio"]


class TorchaudioLogMel(nn.Module):
    """Log-mel spectrogram of a batch of waveforms through `torchaudio.transforms.MelSpectrogram`, in float32.

    Raises:
        ImportError: torchaudio is not installed, or was built for another torch.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchaudio.transforms import MelSpectrogram
        except (ImportError, OSError) as error:  # OSError: its compiled part was built for another torch
            raise ImportError(
                f"frontend='torchaudio' needs torchaudio and the torch that it was built for, got {torch.__version__}: "
                f"pip install 'hear-audiomaepp[torchaudio]' ({error})"
            ) from error
        self.spectrogram = MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=WINDOW,
            win_length=WINDOW,
            hop_length=HOP,
            f_min=LOWEST_HZ,
            f_max=HIGHEST_HZ,
            n_mels=BANDS,
        )

    @property
    def mel(self) -> Tensor:
        """The (201, 80) matrix of mel filters."""
        return self.spectrogram.mel_scale.fb

    def forward(self, audio: Tensor) -> Tensor:
        """Compute log-mel frames: (B, samples) float32 at 16 kHz -> (B, samples // 160 + 1, 80), as `LogMel` does."""
        if audio.shape[1] < SHORTEST_CLIP:
            audio = F.pad(audio, (0, SHORTEST_CLIP - audio.shape[1]))
        with torch.autocast(audio.device.type, enabled=False):
            return (self.spectrogram(audio) + LOG_OFFSET).log().transpose(1, 2)


FRONTENDS: dict[FrontendName, type[LogMel] | type[TorchaudioLogMel]] = {"own": LogMel, "torchaudio": TorchaudioLogMel}
