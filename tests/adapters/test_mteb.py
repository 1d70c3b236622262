"""Our models in mteb itself, on a small audio task made here."""

from __future__ import annotations

import numpy as np
import pytest

import hear_axlstm

mteb = pytest.importorskip("mteb")
adapter = pytest.importorskip("hear_encoders.adapters.mteb")
datasets = pytest.importorskip("datasets")


def tones(count: int) -> list[dict]:
    """Low and high tones in noise, at 16 and 22.05 kHz, of different lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        hz, rate = (300, 3000)[index % 2], (16_000, 22_050)[index // 2 % 2]
        times = np.arange(rate // 2 + 100 * index) / rate
        samples = 0.3 * np.sin(2 * np.pi * hz * times) + rng.normal(0, 0.01, len(times))
        rows.append({"audio": {"array": samples.astype(np.float32), "sampling_rate": rate}, "label": index % 2})
    return rows


class Tones(mteb.abstasks.AbsTaskClassification):
    metadata = mteb.abstasks.task_metadata.TaskMetadata(
        name="Tones",
        description="Tell low from high tones.",
        dataset={"path": "local/tones", "revision": "1"},
        type="AudioClassification",
        category="a2c",
        modalities=["audio"],
        eval_splits=["test"],
        eval_langs=["zxx-Zxxx"],
        main_score="accuracy",
    )
    input_column_name = "audio"
    samples_per_label = 4
    n_experiments = 2

    def load_data(self, **kwargs) -> None:
        rows = datasets.Dataset.from_list(tones(8))
        self.dataset = datasets.DatasetDict({"train": rows, "test": rows})
        self.data_loaded = True


def evaluate(model):
    result = mteb.evaluate(model, Tones(), cache=None, co2_tracker=False, show_progress_bar=False)
    return result, result.task_results[0].scores["test"][0]["main_score"]


def test_an_audio_task_is_solved_by_any_model(small_embedder):
    model = small_embedder("axlstm", layer=1)
    result, accuracy = evaluate(adapter.AudioEncoder(model, "org/small"))
    assert (result.model_name, accuracy) == ("org/small", 1.0)


@pytest.mark.parametrize("meta", [adapter.audiomaepp_tiny, adapter.axlstm_tiny], ids=lambda meta: meta.name)
def test_metadata_is_that_of_the_bundled_weights(meta):
    model = meta.load_model(device="cpu")
    encoder = model.model.encoder
    assert meta.n_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert meta.embed_dim == model.model.scene_embedding_size == 960
    assert encoder.config.family == meta.name.partition("/")[2].partition("-")[0]
    assert model.mteb_model_meta.name == meta.name and meta.modalities == ["audio"]


def test_bundled_weights_are_evaluated_by_their_metadata():
    result, accuracy = evaluate(adapter.axlstm_tiny)
    assert (result.model_name, accuracy) == ("hear-audiomaepp/axlstm-tiny", 1.0)


def test_options_of_load_model_are_recorded():
    model = adapter.axlstm_tiny.load_model(device="cpu", layer=6)
    assert model.model.layers == (6,) and model.mteb_model_meta.experiment_kwargs == {"layer": 6}


def test_embeddings_are_those_of_encode_in_order():
    rows = [row["audio"] for row in tones(5)]
    stereo = {"array": np.stack([rows[4]["array"], 0 * rows[4]["array"]]), "sampling_rate": 16_000}
    half = {"array": rows[4]["array"] / 2, "sampling_rate": 16_000}
    model = hear_axlstm.load_model()
    batches = [{"audio": rows[:3]}, {"audio": [rows[3], stereo]}]
    encoder = adapter.AudioEncoder(model)
    got = encoder.encode(batches, task_metadata=Tones.metadata, hf_split="test", hf_subset="default")
    np.testing.assert_allclose(got, model.encode([*rows[:4], half]), atol=1e-5)


def test_batches_with_anything_but_audio_are_refused(small_embedder):
    model = adapter.AudioEncoder(small_embedder())
    for batch in ({"text": ["a"]}, {"text": ["a"], "audio": [tones(1)[0]["audio"]]}):
        with pytest.raises(ValueError, match="only audio"):
            model.encode([batch], task_metadata=Tones.metadata, hf_split="test", hf_subset="default")
