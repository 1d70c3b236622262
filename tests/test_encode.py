"""`Embedder.encode`: any kind of clip, of any length, equals the embedding of the clip alone."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from hear_encoders import clips, load_audio
from hear_encoders.clips import decode_ahead

LENGTHS = [16000, 1, 70001, 480, 16000, 32000, 100, 31999]


@pytest.fixture
def recordings(tmp_path, noise):
    """Files of several rates, formats and numbers of channels."""
    paths = []
    for index, (rate, channels, suffix) in enumerate(
        [(16000, 1, "wav"), (44100, 2, "flac"), (8000, 1, "wav"), (48000, 1, "flac")]
    ):
        path = tmp_path / f"{index}.{suffix}"
        soundfile.write(path, 0.5 * noise(rate + 1000 * index, channels, seed=index).numpy(), rate)
        paths.append(path)
    return paths


def arrays(noise) -> list[np.ndarray]:
    return [noise(1, samples, seed=index)[0].numpy() for index, samples in enumerate(LENGTHS)]


@pytest.mark.parametrize("kind", ["audiomaepp", "axlstm"])
@pytest.mark.parametrize("batch_seconds", [0.5, 2.5, 120])
def test_clips_of_any_lengths_equal_their_scene_embeddings_in_the_order_given(
    small_embedder, noise, kind, batch_seconds
):
    model, given = small_embedder(kind), arrays(noise)
    expected = np.concatenate([model.scene_embeddings(torch.from_numpy(array)).numpy() for array in given])
    encoded = model.encode(given, batch_seconds=batch_seconds)
    assert encoded.dtype == np.float32 and encoded.shape == (len(LENGTHS), 240)
    np.testing.assert_allclose(encoded, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.encode(iter(given), batch_seconds=batch_seconds), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.encode(given[2]), expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framing", ["exact", "reference"])
def test_time_steps_come_with_their_times(small_embedder, noise, framing):
    model, given = small_embedder(framing=framing), arrays(noise)
    encoded = model.encode(given, timestamps=True, batch_seconds=3)
    for array, (embeddings, timestamps_ms) in zip(given, encoded):
        expected, times = model.timestamp_embeddings(torch.from_numpy(array))
        assert embeddings.dtype == timestamps_ms.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected[0].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(timestamps_ms, times[0].numpy())
    embeddings, timestamps_ms = model.encode(given[0], timestamps=True)
    assert embeddings.shape == (len(timestamps_ms), 240)


def test_every_kind_of_clip_gives_what_its_file_gives(small_embedder, recordings):
    model = small_embedder()
    expected = np.concatenate([model.scene_embeddings(load_audio(path)).numpy() for path in recordings])
    mono = []
    for path in recordings:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono.append((samples.mean(1), rate))
    rows = [{"array": samples, "sampling_rate": rate, "path": "x.wav"} for samples, rate in mono]
    channels = [soundfile.read(path, dtype="float32", always_2d=True) for path in recordings]
    decoders = [
        SimpleNamespace(
            get_all_samples=lambda samples=samples, rate=rate: SimpleNamespace(
                data=torch.from_numpy(samples.T.copy()), sample_rate=rate
            )
        )
        for samples, rate in channels
    ]
    for given in (
        recordings,
        [str(path) for path in recordings],
        tuple(recordings),
        rows,
        [{**row, "array": row["array"].tolist()} for row in rows],
        decoders,
        (path for path in recordings),
        [recordings[0], rows[1], decoders[2], torch.from_numpy(load_audio(recordings[3]).numpy())],
    ):
        np.testing.assert_allclose(model.encode(given), expected, rtol=1e-4, atol=1e-5)
    for row, embedding in zip(rows, expected):
        for array in (row["array"], row["array"].astype(np.float64), torch.from_numpy(row["array"])):
            encoded = model.encode(array, sampling_rate=row["sampling_rate"])
            np.testing.assert_allclose(encoded, embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_an_array_is_resampled_bit_for_bit_as_its_file(small_embedder, tmp_path, monkeypatch, noise, rate):
    monkeypatch.setattr(clips, "BLOCK_FRAMES", 1 << 15)
    monkeypatch.setattr("hear_encoders.audio.BLOCK_FRAMES", 1 << 15)
    for samples in (3 << 15, 100_001):
        path, array = tmp_path / "a.wav", 0.5 * noise(1, samples)[0].numpy()
        soundfile.write(path, array, rate, subtype="FLOAT")
        model = small_embedder()
        np.testing.assert_array_equal(model.encode(array, sampling_rate=rate), model.encode(path))


@pytest.mark.parametrize(("dtype", "subtype"), [("uint8", "PCM_U8"), ("int16", "PCM_16"), ("int32", "PCM_32")])
def test_integer_samples_mean_what_they_mean_in_a_wav_file(small_embedder, tmp_path, noise, dtype, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.5 * noise(1, 20000)[0].numpy(), 16000, subtype=subtype)
    # libsndfile has no unsigned samples: take them from the file's own bytes.
    samples = (
        np.frombuffer(path.read_bytes()[-20000:], np.uint8)
        if dtype == "uint8"
        else soundfile.read(path, dtype=dtype)[0]
    )
    assert samples.dtype == dtype
    model = small_embedder()
    for given in (samples, torch.from_numpy(samples.copy())):
        np.testing.assert_allclose(model.encode(given), model.encode(path), rtol=1e-4, atol=1e-5)


def test_normalized_embeddings_have_length_one(small_embedder, noise):
    model, given = small_embedder(), arrays(noise)
    raw, unit = model.encode(given), model.encode(given, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit * np.linalg.norm(raw, axis=1, keepdims=True), raw, rtol=1e-4, atol=1e-5)
    embeddings, _ = model.encode(given[2], timestamps=True, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_long_clip_is_read_in_blocks_and_equals_the_whole(small_embedder, recordings, noise, monkeypatch, timestamps):
    model, given = (
        small_embedder(max_segments=1),
        [recordings[0], noise(1, 250_001)[0], recordings[1], noise(1, 900)[0]],
    )
    expected = model.encode(given, timestamps=timestamps)
    monkeypatch.setattr(clips, "LONG_S", 1.1)
    monkeypatch.setattr(clips, "BLOCK_FRAMES", 5000)
    whole = []
    embed_batches = model.embed_batches
    monkeypatch.setattr(
        model, "embed_batches", lambda batches, per_step: whole.extend(batches) or embed_batches(batches, per_step)
    )
    encoded = model.encode(given, timestamps=timestamps)
    assert len(whole) == 3
    for got, wanted in zip(encoded, expected):
        for part, expected_part in zip(got, wanted):
            np.testing.assert_allclose(part, expected_part, rtol=1e-3, atol=1e-4)


def test_an_iterator_is_read_only_as_far_ahead_as_batches_need(small_embedder, monkeypatch):
    model, taken, most = small_embedder(), [], 0
    embed_batches = model.embed_batches

    def watched(batches, per_step):
        nonlocal most
        most = max(most, len(taken) - watched.done)
        watched.done += len(batches)
        return embed_batches(batches, per_step)

    watched.done = 0
    monkeypatch.setattr(model, "embed_batches", watched)

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield np.full(1600, 0.01 * index, np.float32)

    assert model.encode(itertools.islice(endless(), 200), batch_seconds=1).shape == (200, 240)
    assert most <= 32  # three batches of ten clips


def test_no_clips_give_no_rows(small_embedder):
    model = small_embedder(pooling="mean_std")
    assert model.encode([]).shape == (0, 480)
    assert model.encode(iter([]), timestamps=True) == []


class _Terminal:
    """Standard error on a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("terminal", "show", "shown"), [(False, None, False), (False, True, True), (True, False, False), (True, True, True)]
)
def test_progress_is_shown_on_request(small_embedder, noise, monkeypatch, terminal, show, shown):
    stderr = _Terminal(terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    small_embedder().encode(arrays(noise), show_progress_bar=show)
    assert (f"{len(LENGTHS)}/{len(LENGTHS)}" in stderr.text) == shown
    assert bool(stderr.text) == shown


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "expected a path, .* or a list or iterator of these; got int"),
        ([0.1, 0.2], TypeError, r"inputs\[0\] must be a path, a 1-D array or tensor, .*; got float"),
        ([np.zeros(10, np.float32), b"RIFF"], TypeError, r"inputs\[1\] must be .*; got bytes"),
        (np.zeros(5, bool), TypeError, r"audio must hold floating-point samples .* uint8, int16, int32; got bool"),
        ([np.zeros(5, np.int64)], TypeError, r"inputs\[0\] must hold floating-point .*; got int64"),
        (torch.zeros(5, device="meta"), TypeError, "audio must be a dense tensor with samples in memory, got torch.st"),
        (np.zeros((2, 16000)), ValueError, r"shape \(2, 16000\), expected \(samples,\): average channels, .*list\(x\)"),
        ([np.zeros(0, np.float32)], ValueError, r"inputs\[0\] is empty"),
        ([np.zeros(9), np.full(9, math.nan)], ValueError, r"inputs\[1\] must hold finite samples"),
        ({"path": "a.wav", "bytes": None}, TypeError, r"audio has the keys \['bytes', 'path'\], expected 'array' and"),
        (
            [{"array": np.zeros(9), "sampling_rate": 0}],
            ValueError,
            r"inputs\[0\]: expected a sample rate .* got 0",
        ),
        ("nowhere.wav", FileNotFoundError, "no such audio file: nowhere.wav"),
        ([Path("nowhere.wav")], FileNotFoundError, "no such audio file: nowhere.wav"),
        (".", IsADirectoryError, r"\. is a folder: pass a list of its files, .* or use hear-embed"),
    ],
)
def test_what_is_not_a_clip_is_named(small_embedder, given, error, message):
    with pytest.raises(error, match=message):
        small_embedder().encode(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_seconds": 0}, "batch_seconds must be a number of seconds"),
        ({"sampling_rate": 1e9}, "audio: expected a sample rate from 1000 to"),
    ],
)
def test_impossible_options_are_refused(small_embedder, options, message):
    with pytest.raises(ValueError, match=message):
        small_embedder().encode(np.zeros(100, np.float32), **options)


def test_unscaled_samples_warn_with_their_place(small_embedder, noise):
    with pytest.warns(UserWarning, match=r"inputs\[1\] peaks at 3\d+.*Divide 16-bit integer samples by 32768"):
        small_embedder().encode([noise(1, 900)[0], 32768 * noise(1, 900)[0]])


def test_read_only_and_reversed_arrays_do_not_warn(small_embedder, noise):
    array = noise(1, 20000)[0].numpy()
    array.flags.writeable = False
    model = small_embedder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(model.encode(array[::-1]), model.encode(array[::-1].copy()))


def test_decoding_stays_within_its_limit():
    class Pool:
        submitted = 0

        def submit(self, decode, item):
            self.submitted += 1
            return item

    pool, given = Pool(), ((10.0, index) for index in range(20))
    for index, (_, item, _) in enumerate(decode_ahead(pool, None, given, 35.0)):
        assert item == index and pool.submitted - index <= 3
