"""The encoders of the papers' Tables 2 to 5, and the rows that an encoder can stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hear_encoders.config import AxLSTMConfig, EncoderConfig, InputGate, PatchConfig, TransformerConfig, preset


@dataclass(frozen=True)
class Decoder:
    """What distinguishes the decoders of AudioMAE++'s rows."""

    dim: int = 384
    rope: bool = False


_BASE = TransformerConfig("audiomaepp", dim=768, depth=12, heads=12)
_LARGE = preset("audiomaepp_large")
_HUGE = TransformerConfig("mae", dim=1280, depth=32, heads=16)
_SSAST = TransformerConfig("ssast", dim=192, depth=12, heads=3)
_AXLSTM = AxLSTMConfig("axlstm", dim=192, depth=12, expansion=2, flip=True)  # the ablations' default
_PATCHES = {125: PatchConfig(patch_frames=8), 250: PatchConfig(), 500: PatchConfig(patch_bands=8)}
_GATE_AND_FLIP: tuple[tuple[int, InputGate, bool], ...] = (
    (2, "exponential", True),
    (2, "exponential", False),
    (2, "sigmoid", True),
    (3, "exponential", True),
    (3, "exponential", False),
    (3, "sigmoid", False),
)

# (paper, table, the row's name) -> encoder and decoder. Tables 3 to 5 are whole, in print order; Table 2 has, besides
# these, models of other authors.
ROWS: dict[tuple[str, int, str], tuple[EncoderConfig, Decoder | None]] = {
    ("AudioMAE++", 2, "MAE-Tiny"): (preset("mae_tiny"), Decoder()),
    ("AudioMAE++", 2, "MAE-Base"): (preset("mae_base"), Decoder()),
    ("AudioMAE++", 2, "MAE-Huge"): (_HUGE, Decoder()),
    ("AudioMAE++", 2, "AudioMAE++-Tiny"): (preset("audiomaepp_tiny"), Decoder()),
    ("AudioMAE++", 2, "AudioMAE++-Base"): (_BASE, Decoder()),
    ("AudioMAE++", 2, "AudioMAE++-Large"): (_LARGE, Decoder(dim=512)),
    ("AudioMAE++", 3, "AudioMAE++-Base, RoPE in encoder and decoder"): (
        replace(_BASE, rope="sequence"),
        Decoder(rope=True),
    ),
    ("AudioMAE++", 3, "AudioMAE++-Base, RoPE in decoder"): (_BASE, Decoder(rope=True)),
    ("AudioMAE++", 3, "AudioMAE++-Base, no RoPE"): (_BASE, Decoder()),
    **{("AudioMAE++", 4, f"AudioMAE++-Large, decoder {dim}"): (_LARGE, Decoder(dim)) for dim in (384, 512, 768)},
    **{
        ("AxLSTM", 2, f"{name}-{size[0].upper()}"): (preset(f"{name.lower()}_{size}"), None)
        for name in ("SSAST", "AxLSTM")
        for size in ("tiny", "small", "base")
    },
    ("AxLSTM", 3, "SSAST-T"): (_SSAST, None),
    **{("AxLSTM", 3, f"AxLSTM-T, expansion {e}"): (replace(_AXLSTM, expansion=e), None) for e in (2, 3, 4)},
    **{
        ("AxLSTM", 4, f"{name}, {count} patches"): (encoder, None)
        for count, patches in _PATCHES.items()
        for name, encoder in (
            ("SSAST-T", replace(_SSAST, patches=patches)),
            ("AxLSTM-T", replace(_AXLSTM, patches=patches)),
        )
    },
    **{
        ("AxLSTM", 5, f"AxLSTM-T, expansion {e}, {gate} gate, {'flip' if flip else 'no flip'}"): (
            replace(_AXLSTM, expansion=e, input_gate=gate, flip=flip),
            None,
        )
        for e, gate, flip in _GATE_AND_FLIP
    },
}

# What tells rows apart. Positions and norms on which the papers' text and code disagree do not.
FEATURES = ("family", "dim", "depth", "heads", "expansion", "flip", "input_gate", "patches", "rope")


def find_rows(encoder: EncoderConfig, decoder: Decoder | None = None) -> list[str]:
    """Return the rows that an encoder can stand for, such as "AxLSTM-T, expansion 2: AxLSTM paper, Table 3, row 2".

    Args:
        encoder: its config.
        decoder: that of its checkpoint; None, if it is not known, matches all.
    """
    found, numbers = [], dict.fromkeys((row[:2] for row in ROWS), 0)
    for (paper, table, name), (row_encoder, row_decoder) in ROWS.items():
        numbers[paper, table] += 1
        same = all(getattr(encoder, field, None) == getattr(row_encoder, field, None) for field in FEATURES)
        if same and (None in (decoder, row_decoder) or decoder == row_decoder):
            number = "" if table == 2 else f", row {numbers[paper, table]}"
            found.append(f"{name}: {paper} paper, Table {table}{number}")
    return found
