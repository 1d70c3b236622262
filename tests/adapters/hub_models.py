"""Clients of the stand-in Hub, for `hub_client.call`: a repository by its name in other programs."""

from __future__ import annotations

import numpy as np


def encode_by_sentence_transformers(repo_id: str, audio: np.ndarray) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(repo_id, trust_remote_code=True, device="cpu").encode(audio)


def embed_by_transformers(repo_id: str, audio: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModel

    with torch.no_grad():
        return AutoModel.from_pretrained(repo_id, trust_remote_code=True)(torch.from_numpy(audio)[None])[1][0].numpy()


def encode_by_mteb(repo_id: str, audio: np.ndarray) -> np.ndarray:
    import mteb
    from datasets import Dataset
    from torch.utils.data import DataLoader

    model = mteb.get_model(repo_id, device="cpu", trust_remote_code=True)
    rows = Dataset.from_list([{"audio": {"array": audio, "sampling_rate": 16_000}}])
    return model.encode(
        DataLoader(rows), task_metadata=mteb.get_task("BeijingOpera").metadata, hf_split="test", hf_subset="default"
    )[0]
