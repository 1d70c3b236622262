"""`model(audio, lengths)`: time steps with gradients; padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from hear_encoders import Embedder

LENGTHS = [1, 201, 479, 16000, 31999, 32241, 70001, 479]


def padded(noise, fill: float = 0.0, extra: int = 0) -> torch.Tensor:
    audio = torch.full((len(LENGTHS), max(LENGTHS) + extra), fill)
    for row, samples in enumerate(LENGTHS):
        audio[row, :samples] = noise(1, samples, seed=row)
    return audio


@pytest.mark.parametrize("framing", ["exact", "reference"])
@pytest.mark.parametrize(("fill", "extra"), [(0.0, 0), (0.0, 12345), (0.3, 1), (math.nan, 7)])
def test_padding_changes_nothing_given_lengths(small_encoder, noise, framing, fill, extra):
    model, audio = Embedder(small_encoder, framing=framing), padded(noise, fill, extra)
    steps = model(audio, torch.tensor(LENGTHS))
    assert steps.shape == (len(LENGTHS), model.step_count(audio.shape[1]), 240) and steps.dtype == torch.float32
    for row, samples in enumerate(LENGTHS):
        clip, count = audio[row, :samples], model.step_count(samples)
        torch.testing.assert_close(steps[row, :count], model.timestamp_embeddings(clip)[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(steps[row, :count], model(clip)[0], rtol=1e-5, atol=1e-5)
        assert (steps[row, count:] == 0).all()
    scenes = model.pool(steps, LENGTHS)
    expected = [model.scene_embeddings(audio[row, :samples]) for row, samples in enumerate(LENGTHS)]
    torch.testing.assert_close(scenes, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_zeros_count_as_audio_without_lengths(small_encoder, noise):
    model, clip = Embedder(small_encoder), noise(1, 16000)
    longer = torch.nn.functional.pad(clip, (0, 16000))
    alone, with_zeros = model(clip), model(longer)
    assert (with_zeros[:, : alone.shape[1] - 1] - alone[:, :-1]).abs().max() > 0.01
    torch.testing.assert_close(model(longer, [16000])[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
def test_gradients_equal_those_of_each_clip_alone(small_encoder, noise, pooling):
    model, audio = Embedder(small_encoder, pooling=pooling), padded(noise)

    def gradients(scenes: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (scenes * torch.linspace(-1, 1, scenes.shape[1])).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = gradients(model.pool(model(audio, LENGTHS), LENGTHS))
    clips = [audio[row, :samples] for row, samples in enumerate(LENGTHS)]
    alone = gradients(torch.cat([model.pool(model(clip)) for clip in clips]))
    assert len(together) > 10
    for got, expected in zip(together, alone):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6)


def test_a_frozen_encoder_gives_no_gradients_and_its_head_still_trains(small_encoder, noise):
    model = Embedder(small_encoder).requires_grad_(False)
    head = torch.nn.Linear(240, 3)
    steps = model(noise(3, 20000))
    assert not steps.requires_grad
    head(model.pool(steps)).sum().backward()
    assert head.weight.grad is not None


def test_an_optimizer_step_changes_what_is_embedded(small_encoder, noise):
    model, audio = Embedder(small_encoder), noise(2, 20000)
    before = model.scene_embeddings(audio)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.pool(model(audio)).square().mean().backward()
    optimizer.step()
    after = model.scene_embeddings(audio)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(model.pool(model(audio)), after, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_audio(small_embedder, noise):
    audio = noise(1, 20000).requires_grad_()
    small_embedder()(audio).square().sum().backward()
    assert audio.grad.isfinite().all() and audio.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([0.5, 1.0], TypeError, r"lengths must be integers, in samples; got \[0.5, 1.0\]"),
        (torch.tensor([1.0, 0.5]), TypeError, "lengths must be integers"),
        ([True, True], TypeError, "lengths must be integers"),
        ([100], ValueError, r"lengths must be 2 numbers of samples from 1 to 20000, got \[100\]"),
        ([0, 100], ValueError, "from 1 to 20000"),
        ([100, 20001], ValueError, "from 1 to 20000"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(small_embedder, noise, lengths, error, message):
    with pytest.raises(error, match=message):
        small_embedder()(noise(2, 20000), lengths)


def test_bad_audio_is_refused(small_embedder, noise):
    with pytest.raises(TypeError, match="got list"):
        small_embedder()([0.1], [1])
    audio = noise(2, 2000)
    audio[0, 5] = math.nan
    with pytest.raises(ValueError, match="finite samples"):
        small_embedder()(audio, [6, 6])
    with pytest.raises(ValueError, match=r"do not fit lengths \[20000\]"):
        model = small_embedder()
        model.pool(model(noise(1, 2000)), [20000])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_steps_and_gradients_of_the_cpu(small_encoder, noise):
    audio, results = padded(noise), []
    for device in ("cpu", "cuda"):
        model = Embedder(small_encoder, precision="float32").to(device)
        model.zero_grad()
        scenes = model.pool(model(audio, LENGTHS), LENGTHS)
        scenes.square().sum().backward()
        gradient = model.encoder.patch_projection.weight.grad.cpu()
        results.append((scenes.detach(), gradient / gradient.norm(), torch.from_numpy(model.encode(list(audio)))))
    for cpu, cuda in zip(*results):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)
