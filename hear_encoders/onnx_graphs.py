"""The modules that `hear_encoders.onnx_export` traces: a model in operations that ONNX has.

ONNX has neither an FFT that all runtimes support, nor a running maximum, nor writing in place. So the front end and an
AxLSTM have a form of their own here: an FFT as one matrix product, and folded blocks (see
`hear_encoders.nn.axlstm_folded`) around a cell that weights all pairs of tokens. A transformer is exported as it is.

Letters in shape comments: B clips, segments or streams, N samples, F frames, T time steps, E embedding size, S tokens
(cls first), D channels of a token, H heads, K channels of a head, I = H * K, P channels of a merged map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hear_encoders.embedder import Embedder
from hear_encoders.nn.axlstm import BLOCK_NORM_EPS, HEAD_NORM_EPS, AxLSTMEncoder
from hear_encoders.nn.axlstm_folded import FoldedAxLSTM, FoldedBlock
from hear_encoders.nn.frontend import (
    HOP,
    LOG_OFFSET,
    SHORTEST_CLIP,
    WINDOW,
    clip_statistics,
    mel_matrix,
    normalize,
)
from hear_encoders.nn.mlstm import LOG_WEIGHT_FLOOR, NORMALIZER_EPS
from hear_encoders.nn.patches import patchify
from hear_encoders.pooling import POOLINGS
from hear_encoders.stream import streamable_encoder


class LogMelGraph(nn.Module):
    """`LogMel` as plain operations."""

    basis: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        window = torch.hann_window(WINDOW, dtype=torch.float64, device="cpu")
        samples, bins = torch.arange(WINDOW, device="cpu"), torch.arange(WINDOW // 2 + 1, device="cpu")
        angles = 2 * math.pi / WINDOW * (samples[:, None] * bins % WINDOW).double()
        # float64, as in `LogMel`: beside a loud sound, a silent band has only rounding errors.
        self.register_buffer("basis", window[:, None] * torch.cat([angles.cos(), angles.sin()], dim=1))
        self.register_buffer("mel", mel_matrix())

    def forward(self, audio: Tensor) -> Tensor:
        """Compute all frames of clips: (B, N) -> (B, N // 160 + 1, 80), N at least 1."""
        samples = torch.sym_max(audio.shape[1], SHORTEST_CLIP)
        indices = _window_samples(samples // HOP + 1, -WINDOW // 2).abs()  # the beginning reflected
        indices = (samples - 1) - ((samples - 1) - indices).abs()  # and the end
        return self.of_windows(F.pad(audio, (0, SHORTEST_CLIP - 1))[:, indices])  # zeros extend a short clip

    def of_windows(self, windows: Tensor) -> Tensor:
        """Compute the frame of each window: (B, F, 400) -> (B, F, 80)."""
        real, imaginary = (windows.double() @ self.basis).chunk(2, dim=2)  # (B, F, 201) each
        power = (real * real + imaginary * imaginary).float()
        return (power @ self.mel + LOG_OFFSET).log()


def _window_samples(frames: int, first: int) -> Tensor:
    """Return the samples of each frame's window, of which the first begins at sample `first`: (F, 400)."""
    return first + HOP * torch.arange(frames)[:, None] + torch.arange(WINDOW)


class EncoderGraph(nn.Module):
    """From normalized log-mel of whole steps (B, F, bands) to embeddings (B, T, E)."""

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.encoder, self.layers, self.group = model.encoder, model.layers, model.framer.group
        self.blocks, self.flip = None, False
        if isinstance(model.encoder, AxLSTMEncoder):
            self.blocks, self.flip = _fold(model.encoder, model.layers), model.encoder.config.flip

    def forward(self, frames: Tensor) -> Tensor:
        if self.blocks is None:
            parts = list(self.encoder(frames, self.layers).chunk(len(self.layers or [0]), dim=2))  # (B, N, D) each
        else:
            parts = self._run_blocks(self.blocks, self.encoder.with_cls(self.encoder.embed(frames)))
        return torch.cat([self.group(part) for part in parts], dim=2)

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
        """Return the tokens after each layer: (B, S, D) -> (B, N, D) each."""
        outputs = {}
        for number, block in enumerate(blocks, start=1):
            flipped = self.flip and number % 2 == 0
            x = x.flip(1) if flipped else x
            x, _ = block(x)
            x = x.flip(1) if flipped else x
            outputs[number] = x[:, 1:]
        return [outputs[layer] for layer in self.layers] if self.layers else [self.encoder.norm(x)[:, 1:]]


class ClipGraph(nn.Module):
    """From clips of at most a segment (B, N) to embeddings (B, T, E) and scene embeddings."""

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.log_mel, self.encoder = LogMelGraph(), EncoderGraph(model)
        self.statistics, self.pooling = model.statistics, POOLINGS[model.pooling]()
        self.patch_frames = model.encoder.config.patches.patch_frames

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        logmel = self.log_mel(audio)
        frames = normalize(logmel, *(self.statistics or clip_statistics(logmel)))
        step_samples, first_sample = HOP * self.patch_frames, HOP * (self.patch_frames - 1) // 2
        steps = torch.sym_max((audio.shape[1] + step_samples - first_sample) // step_samples, 1)
        # The last frame is repeated to reach whole steps.
        indices = torch.arange(steps * self.patch_frames).clamp(max=logmel.shape[1] - 1)
        embeddings = self.encoder(frames[:, indices])
        return embeddings, self.pooling.finish(self.pooling.summarize(embeddings), embeddings.shape[1])


class StepGraph(nn.Module):
    """The next step of streams, as `hear_encoders.stream` encodes it.

    Args:
        model: can be streamed.
        waveform: the input is the audio that the step's windows reach (B, N), else normalized log-mel (B, F, bands).

    Attributes:
        initial: the state before a segment's first step, (1, blocks, ...) each.
    """

    position_table: Tensor
    initial_conv: Tensor
    initial_memory: Tensor
    initial_stabilizer: Tensor

    def __init__(self, model: Embedder, waveform: bool) -> None:
        super().__init__()
        self.encoder, self.layers, self.statistics = streamable_encoder(model), model.layers, model.statistics
        self.patches = self.encoder.config.patches
        self.log_mel = LogMelGraph() if waveform else None
        self.blocks = _fold(self.encoder, self.layers)
        self.register_buffer("position_table", self.encoder.position_table.unflatten(0, (-1, self.patches.rows)))
        for name, tensors in zip(CellState._fields, zip(*self._states_after_cls())):
            self.register_buffer(f"initial_{name}", torch.stack(tensors, dim=1))

    @property
    def initial(self) -> CellState:
        return CellState(self.initial_conv, self.initial_memory, self.initial_stabilizer)

    @torch.no_grad()
    def _states_after_cls(self) -> list[CellState]:
        """Run the cls token, which is a segment's first, from an empty memory."""
        config, states = self.encoder.config, []
        head_dim = config.inner_dim // config.heads
        empty = CellState(
            conv=torch.zeros(1, config.conv_kernel - 1, config.inner_dim),
            memory=torch.zeros(1, config.heads, head_dim, head_dim + 1),
            stabilizer=torch.full((1, config.heads), -torch.inf),
        )
        x = self.encoder.cls_token[None, None]
        for block in self.blocks:
            x, state = block(x, empty)
            states.append(state)
        return states

    def forward(
        self, audio: Tensor, position: Tensor, conv: Tensor, memory: Tensor, stabilizer: Tensor
    ) -> tuple[Tensor, ...]:
        """Encode the step at `position` (B,) of its segment; at 0, the rest of the state has no effect.

        Returns:
            Embeddings (B, E), then the next position, conv, memory and stabilizer.
        """
        frames = audio
        if self.log_mel is not None:
            assert self.statistics is not None
            windows = audio[:, _window_samples(self.patches.patch_frames, 0)]
            frames = normalize(self.log_mel.of_windows(windows), *self.statistics)
        x = self.encoder.patch_projection(patchify(frames, self.patches)) + self.position_table[position]  # (B, S, D)
        before = []
        for tensor, initial in zip((conv, memory, stabilizer), self.initial):
            begins = (position == 0).view(-1, *[1] * (tensor.ndim - 1))
            before.append(torch.where(begins, initial, tensor))
        outputs, after = {}, []
        for index, block in enumerate(self.blocks):
            x, after_block = block(x, CellState(*(tensor[:, index] for tensor in before)))
            outputs[index + 1] = x
            after.append(after_block)
        parts = [outputs[layer] for layer in self.layers] if self.layers else [self.encoder.norm(x)]
        embeddings = torch.cat([part.flatten(1) for part in parts], dim=1)
        state = [torch.stack(tensors, dim=1) for tensors in zip(*after)]
        return embeddings, (position + 1) % self.patches.steps, *state


class CellState(NamedTuple):
    """What a stream remembers of one block, as in `hear_encoders.nn.axlstm_online`."""

    conv: Tensor  # (B, kernel - 1, I) the convolution's last inputs
    memory: Tensor  # (B, H, K, K + 1) the cell's C, with its n as the last column
    stabilizer: Tensor  # (B, H) the cell's m


class BlockGraph(nn.Module):
    """A folded mLSTM block."""

    def __init__(self, weights: FoldedBlock, heads: int, sigmoid_gate: bool) -> None:
        super().__init__()
        self.weights, self.heads, self.sigmoid_gate = weights, heads, sigmoid_gate

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState | None]:
        """Add the block's output to x, (B, S, D). With a state, continue from it and return the next one."""
        weights, length, past = self.weights, x.shape[1], len(self.weights.taps) - 1
        u = F.layer_norm(x, x.shape[2:], weights.norm, None, BLOCK_NORM_EPS)
        inner = u @ weights.up_x.T  # (B, S, I)
        padded = F.pad(inner, (0, 0, past, 0)) if state is None else torch.cat([state.conv, inner], dim=1)
        c = weights.conv_bias
        for ago, tap in enumerate(weights.taps):
            c = c + tap * padded[:, past - ago : past - ago + length]
        c = F.silu(c)
        gates = u @ weights.gates_of_u.T + c @ weights.gates_of_c.T + weights.gate_bias  # (B, S, 2 H)
        log_i, forget = gates.transpose(1, 2).chunk(2, dim=1)  # (B, H, S) each
        log_i = F.logsigmoid(log_i) if self.sigmoid_gate else log_i
        q = self._by_head(c) if weights.c_to_q is None else self._map(c, weights.c_to_q)
        k, v = self._map(c, weights.c_to_k), self._map(inner, weights.x_to_v)
        h, memory, stabilizer = _run_cell(q, k, v, log_i, F.logsigmoid(forget), state)
        normed = F.layer_norm(h, h.shape[3:], eps=HEAD_NORM_EPS).transpose(1, 2).flatten(2)  # (B, S, I)
        y = (normed * weights.head_norm + c * weights.skip) * F.silu(u @ weights.up_z.T)
        next_state = None if memory is None or stabilizer is None else CellState(padded[:, length:], memory, stabilizer)
        return x + y @ weights.down.T, next_state

    def _map(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a block-diagonal map and split into heads: (B, S, I) -> (B, H, S, K)."""
        mapped = x.unflatten(2, weight.shape[:2]).transpose(1, 2) @ weight  # (B, I / P, S, P)
        return self._by_head(mapped.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _run_cell(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: CellState | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the mLSTM cell in its parallel form (see `hear_encoders.nn.mlstm`).

    Args:
        q, k, v: (B, H, S, K), the keys scaled.
        log_i, log_f: (B, H, S) logarithms of the gates.
        state: before the first token; None: empty.

    Returns:
        h (B, H, S, K); memory and stabilizer after the last token, None without a state.
    """
    # float64: sums over a segment may be large, and their differences matter.
    forgotten = log_f.double().cumsum(2)[..., None]  # (B, H, S, 1)
    g = log_i.double()[:, :, None] - forgotten.mT  # (B, H, 1, S)
    base = g.amax(3, keepdim=True)  # cancels; without it, float32 is enough
    g = (g - base).float()
    future = torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2])
    largest = g.masked_fill(future, -torch.inf).amax(3, keepdim=True)  # (B, H, S, 1)
    if state is not None:
        before = (state.stabilizer[:, :, None, None].double() - base).float()
        largest = torch.maximum(largest, before)
    m = forgotten + base + largest
    weights = _weights(g - largest).tril()  # (B, H, S, S)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=3)  # the ones sum up the normalizer
    read = (weights * (q @ k.mT)) @ v  # (B, H, S, K + 1)
    memory = stabilizer = None
    if state is not None:
        kept = _weights(before - largest)  # (B, H, S, 1)
        read = read + kept * (q @ state.memory)
        memory = kept[:, :, -1:] * state.memory + (weights[:, :, -1, :, None] * k).mT @ v
        stabilizer = m[:, :, -1, 0].float()
    bound = (-m).float().exp()  # may be infinite: then h is zero
    return read[..., :-1] / (torch.maximum(read[..., -1:].abs(), bound) + NORMALIZER_EPS), memory, stabilizer


def _weights(log_weights: Tensor) -> Tensor:
    """Return exp of relative log weights. The floor prevents denormal numbers; only the future lies above 0."""
    return log_weights.clamp(LOG_WEIGHT_FLOOR[torch.float32], 0.0).exp()


def _fold(encoder: AxLSTMEncoder, layers: Sequence[int] | None) -> nn.ModuleList:
    """Fold an encoder's blocks, up to the last of these layers."""
    config = encoder.config
    folded = FoldedAxLSTM(encoder).blocks[: max(layers or [config.depth])]
    return nn.ModuleList(BlockGraph(block, config.heads, config.input_gate == "sigmoid") for block in folded)
