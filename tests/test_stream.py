"""Streaming: equal to the whole clip however the samples are cut; state; running statistics; what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import hear_axlstm
from hear_encoders import AxLSTMConfig, Embedder, PatchConfig, build_encoder
from hear_encoders.nn.axlstm_online import OnlineEncoder

STATISTICS = (-6.0, 3.5)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def model_with(statistics=STATISTICS, spread=0.05, **options) -> Embedder:
    """A small AxLSTM with every parameter moved off its initial value."""
    encoder = build_encoder(AxLSTMConfig(**{"family": "axlstm", "dim": 48, "depth": 2, **options}), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return Embedder(encoder, statistics=statistics)


@pytest.fixture(scope="module")
def model() -> Embedder:
    return model_with()


def run(stream, audio: Tensor, blocks, finish: bool = True) -> tuple[Tensor, Tensor]:
    """Push audio in blocks of these sizes, repeating the last; return all results, joined."""
    sizes, parts, begin = list(blocks), [], 0
    while begin < audio.shape[-1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(stream.push(audio[..., begin : begin + size]))
        begin += size
    if finish:
        parts.append(stream.finish())
    return tuple(torch.cat(each, dim=1) for each in zip(*parts))


def random_blocks(largest: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randint(largest, (400,), generator=generator)).tolist()


def test_loud_samples_are_warned_of_once_until_reset(model, noise):
    stream = hear_axlstm.stream(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for part in (32768 * noise(1, 6400)).split(640, dim=1):
                stream.push(part)
            stream.reset()
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert "samples are expected in [-1, 1]" in str(caught[0].message)


@pytest.mark.parametrize("samples", [1, 200, 201, 239, 240, 500, 679, 680, 8000, 8041, 32000, 32041, 75200, 75321])
def test_a_stream_equals_the_whole_clip(model, noise, samples):
    audio = noise(1, samples)
    expected, times = model.timestamp_embeddings(audio)
    embeddings, timestamps = run(hear_axlstm.stream(model), audio, [640])
    torch.testing.assert_close(embeddings, expected, **TOLERANCE)
    assert embeddings.dtype == torch.float32 and timestamps.dtype == torch.float64
    assert timestamps.tolist() == times.tolist()


def test_a_stream_runs_on_one_core_whatever_torch_is_set_to(model, noise, monkeypatch):
    before, cores, encode = torch.get_num_threads(), [], OnlineEncoder.__call__

    def encoding(self, *arguments):
        cores.append(torch.get_num_threads())
        return encode(self, *arguments)

    monkeypatch.setattr(OnlineEncoder, "__call__", encoding)
    audio = noise(1, 8000)
    expected, _ = run(hear_axlstm.stream(model), audio, [640])
    try:
        torch.set_num_threads(3)
        stream = hear_axlstm.stream(model)
        with torch.inference_mode(), torch.autocast("cpu"):
            embeddings, _ = run(stream, audio, [640])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(cores) == {1} and len(cores) > 20
    assert torch.equal(embeddings, expected)


@pytest.mark.parametrize("blocks", [[10**6], [1, 2, 3, 31999, 5, 10**6], [160], [7777], [3000, 1]])
def test_the_split_does_not_matter(model, noise, blocks):
    audio = noise(1, 33500 if blocks[-1] > 1 else 4000)
    expected, _ = model.timestamp_embeddings(audio)
    torch.testing.assert_close(run(hear_axlstm.stream(model), audio, blocks)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_random_splits_do_not_matter(model, noise, seed):
    audio = noise(1, 70001)
    expected, _ = model.timestamp_embeddings(audio)
    blocks = random_blocks([600, 3000, 40000][seed], seed)
    torch.testing.assert_close(run(hear_axlstm.stream(model), audio, blocks)[0], expected, **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"input_gate": "sigmoid"},
        {"conv_kernel": 1},
        {"expansion": 1, "projection_block": 8},  # blocks of the projections that lie in two heads
        {"expansion": 2, "heads": 2, "projection_block": 16},
        {"patches": PatchConfig(patch_frames=8)},
        {"patches": PatchConfig(patch_frames=2, patch_bands=40)},
        {"patches": PatchConfig(patch_frames=1, patch_bands=80)},
    ],
)
def test_other_configurations_equal_the_whole_clip(noise, options):
    model, audio = model_with(**options), noise(2, 34567)
    expected, times = model.timestamp_embeddings(audio)
    embeddings, timestamps = run(hear_axlstm.stream(model, streams=2), audio, random_blocks(2000, 0))
    torch.testing.assert_close(embeddings, expected, **TOLERANCE)
    assert timestamps.tolist() == times.tolist()


@pytest.mark.parametrize(("gate_i", "gate_f"), [(20.0, -20.0), (-60.0, 5.0), (60.0, -3.0)])
def test_extreme_gates_equal_the_whole_clip(noise, gate_i, gate_f):
    model, audio = model_with(), noise(1, 20000)
    for block in model.encoder.blocks:
        block.gate_i.bias.data += gate_i
        block.gate_f.bias.data += gate_f
    expected, _ = model.timestamp_embeddings(audio)
    assert expected.isfinite().all()
    for blocks in ([640], [20000]):
        torch.testing.assert_close(run(hear_axlstm.stream(model), audio, blocks)[0], expected, **TOLERANCE)


def test_a_step_comes_with_the_last_sample_that_its_window_reaches(model, noise):
    stream, audio = hear_axlstm.stream(model), noise(1, 2000)
    counts = [stream.push(sample)[0].shape[1] for sample in audio.split(1, dim=1)]
    # 40 ms a step, and 2.5 ms that the window of its last frame reaches further: 640 (i + 1) + 40 samples
    assert [index + 1 for index, count in enumerate(counts) if count] == [680, 1320, 1960]
    assert sum(counts) == 3


def test_streams_in_a_batch_equal_single_ones(model, noise):
    audio = noise(3, 40000)
    audio[1] *= 0.01
    audio[2] = 0
    for given in (STATISTICS, None):
        batched = hear_axlstm.stream(model_with(given), streams=3)
        embeddings, timestamps = run(batched, audio, [1000])
        assert embeddings.shape == (3, 63, 240) and timestamps.shape == (3, 63)
        for clip, embedding in zip(audio, embeddings):
            single, _ = run(hear_axlstm.stream(model_with(given)), clip, [1000])
            torch.testing.assert_close(single[0], embedding, **TOLERANCE)


@pytest.mark.parametrize("given", [STATISTICS, None])
@pytest.mark.parametrize("cut", [0, 100, 5000, 33000])
def test_a_saved_state_continues_identically_in_another_stream(noise, tmp_path, given, cut):
    model, audio = model_with(given), noise(2, 40000)
    options = {"streams": 2, "warm_up_s": 0.5}
    stream, other = hear_axlstm.stream(model, **options), hear_axlstm.stream(model, **options)
    if cut:
        run(stream, audio[:, :cut], [777], finish=False)
    run(other, noise(2, 9000, seed=1), [500], finish=False)  # something else to forget
    torch.save(stream.state, tmp_path / "state.pt")
    expected, times = run(stream, audio[:, cut:], [900])
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    embeddings, timestamps = run(other, audio[:, cut:], [900])
    assert torch.equal(embeddings, expected) and torch.equal(timestamps, times)


def test_the_state_is_a_copy(model, noise):
    stream, audio = hear_axlstm.stream(model), noise(1, 9000)
    stream.push(audio)
    state = stream.state
    expected = stream.push(audio)[0]
    stream.load_state(state)
    stream.push(audio)
    stream.load_state(state)
    assert torch.equal(stream.push(audio)[0], expected)


@pytest.mark.parametrize("given", [STATISTICS, None])
def test_the_state_has_a_constant_size(noise, given):
    stream, audio = hear_axlstm.stream(model_with(given)), noise(1, 70000)
    sizes = {name: tensor.shape for name, tensor in stream.state.items()}
    for block in audio.split(4321, dim=1):
        stream.push(block)
        assert {name: tensor.shape for name, tensor in stream.state.items()} == sizes
    for tensor in stream.state.values():  # nor does a saved view drag more along
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("given", [STATISTICS, None])
def test_reset_and_finish_start_over(noise, given):
    stream, audio = hear_axlstm.stream(model_with(given), warm_up_s=0.3), noise(1, 9000)
    fresh = stream.state
    expected, times = run(stream, audio, [1234])
    for name, tensor in stream.state.items():
        assert torch.equal(tensor, fresh[name]), name
    stream.push(noise(1, 5000, seed=1))
    stream.reset()
    embeddings, timestamps = run(stream, audio, [1234])
    assert torch.equal(embeddings, expected) and torch.equal(timestamps, times)


def test_nothing_pushed_gives_nothing(model):
    stream = hear_axlstm.stream(model, streams=2)
    for embeddings, timestamps in (stream.push(torch.zeros(2, 0)), stream.finish()):
        assert embeddings.shape == (2, 0, 240) and timestamps.shape == (2, 0)


@pytest.mark.parametrize("warm_up_s", [0, 0.25, 0.5, 10])
@pytest.mark.parametrize("samples", [150, 5000, 37001])
def test_running_statistics_equal_a_plain_computation(model, noise, warm_up_s, samples):
    """Step by step: all log-mel up to the step's end, or up to the warm-up's, in float64."""
    audio = noise(1, samples) * torch.linspace(0.01, 1, samples)
    steps = model.step_count(samples)
    warm = max(1, -(-int(1000 * warm_up_s) // 40))
    logmel = model.log_mel(audio)[0]
    logmel = torch.cat([logmel, logmel[-1:].expand(4, -1)])[: 4 * steps]  # the last step may lack frames
    normalized = []
    for step in range(steps):
        so_far = logmel[: 4 * max(step + 1, min(warm, steps))].double()
        column = (logmel[4 * step : 4 * step + 4].double() - so_far.mean()) / (so_far.std() + 1e-8)
        normalized.append(column.float())
    with torch.no_grad():
        segments = [model.encoder(segment[None])[0] for segment in torch.cat(normalized).split(200)]
    expected = torch.cat(segments).unflatten(0, (-1, 5)).flatten(1)
    for blocks in ([640], [samples], [1, 700, 3333]):
        stream = hear_axlstm.stream(model_with(None), warm_up_s=warm_up_s)
        embeddings, timestamps = run(stream, audio, blocks)
        torch.testing.assert_close(embeddings[0], expected, **TOLERANCE)
        assert timestamps[0].tolist() == [15 + 40 * step for step in range(steps)]


def test_the_warm_up_is_held_back_and_comes_at_once(noise):
    stream, audio = hear_axlstm.stream(model_with(None), warm_up_s=0.5), noise(1, 10001)  # 13 steps, 520 ms
    counts = [stream.push(block)[0].shape[1] for block in audio.split(640, dim=1)]
    assert counts == [0] * 13 + [13, 1, 1]


def test_given_statistics_come_before_the_models(model, noise):
    audio = noise(1, 9000)
    expected, _ = model_with((-3.0, 2.0)).timestamp_embeddings(audio)
    for other in (model, model_with(None)):
        stream = hear_axlstm.stream(other, statistics=(-3.0, 2.0))
        torch.testing.assert_close(run(stream, audio, [640])[0], expected, **TOLERANCE)


def test_silence_and_dc_give_finite_embeddings_in_running_statistics():
    for audio in (torch.zeros(1, 9000), torch.full((1, 9000), 0.5), torch.zeros(1, 10)):
        assert run(hear_axlstm.stream(model_with(None), warm_up_s=0), audio, [640])[0].isfinite().all()


def test_results_can_be_trained_on_and_gradients_of_samples_are_not_kept(model, noise):
    embeddings, _ = hear_axlstm.stream(model).push(noise(1, 5000).requires_grad_())
    head = torch.nn.Linear(240, 3)
    head(embeddings).sum().backward()  # would raise for an inference tensor
    assert head.weight.grad is not None


def test_later_changes_of_the_model_do_not_reach_a_stream(noise):
    model, audio = model_with(), noise(1, 9000)
    expected, _ = model.timestamp_embeddings(audio)
    stream = hear_axlstm.stream(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(stream, audio, [640])[0], expected, **TOLERANCE)


def test_a_callers_settings_do_not_leak_in(model, noise):
    audio = noise(1, 9000)
    expected, _ = run(hear_axlstm.stream(model), audio, [640])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings, _ = run(hear_axlstm.stream(model), audio.float(), [640])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(embeddings, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_dtypes_of_samples_are_taken(model, noise, dtype):
    audio = noise(1, 5000).to(dtype)
    expected, _ = run(hear_axlstm.stream(model), audio.float(), [640])
    embeddings, _ = run(hear_axlstm.stream(model), audio, [640])
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([0.1], TypeError, r"samples must be a torch.Tensor of shape \(streams, n\), got list"),
        (torch.zeros(2, 5, dtype=torch.int16), TypeError, "floating-point samples in .-1, 1., got torch.int16"),
        (torch.zeros(2, 0, dtype=torch.int16), TypeError, "got torch.int16"),
        (
            torch.zeros(2, 5).to_sparse(),
            TypeError,
            "samples must be a dense tensor with samples in memory, got torch.sp",
        ),
        (torch.zeros(2, 0, device="meta"), TypeError, "got torch.strided on device meta"),
        (torch.zeros(3, 100), ValueError, r"samples must have shape \(2, n\), got \(3, 100\)"),
        (torch.zeros(100), ValueError, r"samples must have shape \(2, n\), got \(100,\)"),
        (torch.zeros(3, 0), ValueError, r"samples must have shape \(2, n\), got \(3, 0\)"),
        (torch.zeros(1, 2, 100), ValueError, r"must have shape \(2, n\), got \(1, 2, 100\)"),
        (torch.zeros(1, 2, 0), ValueError, r"got \(1, 2, 0\)"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), ValueError, "finite samples"),
        (torch.tensor([[0.0, float("inf")], [0.0, 0.0]]), ValueError, "finite samples"),
    ],
)
def test_bad_samples_are_refused_and_leave_the_stream_as_it_was(model, noise, samples, error, message):
    stream = hear_axlstm.stream(model, streams=2)
    stream.push(noise(2, 900))
    before = stream.state
    with pytest.raises(error, match=message):
        stream.push(samples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stream.state.items())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("axlstm_flip", {}, "flip cannot be streamed: every second block reads its 2 s segment from the end"),
        ("audiomaepp", {}, "'audiomaepp' cannot be streamed: its attention spans a whole 2 s segment"),
        ("ssast", {}, "'ssast' cannot be streamed"),
        ("axlstm", {"framing": "reference"}, "only exact framing can be streamed, got 'reference'"),
    ],
)
def test_a_model_that_cannot_be_streamed_is_refused_with_the_reason(small_embedder, kind, options, message):
    with pytest.raises(ValueError, match=message):
        hear_axlstm.stream(small_embedder(kind, **options))


def test_no_model_and_weights_of_another_dtype_are_refused(small_embedder):
    with pytest.raises(TypeError, match=r"must come from hear_axlstm.load_model, got AxLSTMEncoder"):
        hear_axlstm.stream(small_embedder("axlstm").encoder)
    with pytest.raises(ValueError, match=r"weights must be float32, got torch.float64"):
        hear_axlstm.stream(small_embedder("axlstm").double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 0}, "streams must be an integer of at least 1, got 0"),
        ({"streams": 2.0}, r"streams must be an integer of at least 1, got 2\.0"),
        ({"statistics": (0.0, 0.0)}, r"the latter above 0; got \(0\.0, 0\.0\)"),
        ({"warm_up_s": -1}, "warm_up_s must be a finite number of seconds of at least 0, got -1"),
        ({"warm_up_s": float("nan")}, "of at least 0, got nan"),
        ({"warm_up_s": "2"}, "of at least 0, got '2'"),
    ],
)
def test_impossible_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        hear_axlstm.stream(model, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state.pop("folded_memory"), ValueError, "missing tensor 'folded_memory'"),
        # A state of the version before weights were folded: another memory, of the same shape.
        (lambda state: state.update(memory=state.pop("folded_memory")), ValueError, "missing tensor 'folded_memory'"),
        (lambda state: state.update(more=torch.zeros(1)), ValueError, "unknown tensor 'more'"),
        (lambda state: state.update(conv=state["conv"][:1]), ValueError, "'conv' must have shape .* got .1, "),
        (lambda state: state.update(samples=state["samples"].double()), ValueError, "got .* and torch.float64"),
        (lambda state: state.update(received=torch.tensor(-1)), ValueError, "must be a number of samples, got -1"),
        (lambda state: state.update(received=3), TypeError, "state must be a mapping of tensors"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(model, noise, change, error, message):
    stream = hear_axlstm.stream(model)
    foreign = stream.state
    change(foreign)
    stream.push(noise(1, 3000))
    before = stream.state
    with pytest.raises(error, match=message):
        stream.load_state(foreign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stream.state.items())


def test_a_state_of_running_statistics_does_not_fit_given_ones(model):
    with pytest.raises(ValueError, match="unknown tensor 'sums'; is it from a stream with other options"):
        hear_axlstm.stream(model).load_state(hear_axlstm.stream(model_with(None)).state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(noise):
    model, audio = model_with(), noise(2, 40000)
    expected, _ = run(hear_axlstm.stream(model, streams=2), audio, [1000])
    stream = hear_axlstm.stream(model.cuda(), streams=2)
    torch.testing.assert_close(run(stream, audio.cuda(), [1000])[0].cpu(), expected, rtol=1e-3, atol=1e-3)
    assert stream.push(audio)[0].device.type == "cpu"  # results follow the audio
