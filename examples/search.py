"""List the five sounds of a folder that are most similar to a query: python examples/search.py FOLDER QUERY"""

import sys

import hear_audiomaepp
from hear_encoders.audio import find_audio

files = [file.path for file in find_audio([sys.argv[1]])[1]]
model = hear_audiomaepp.load_model(device="auto")
embeddings = model.encode([sys.argv[2], *files], show_progress_bar=True)
embeddings -= embeddings[1:].mean(axis=0)  # what all sounds have in common hides their differences
embeddings /= (embeddings**2).sum(axis=1, keepdims=True) ** 0.5
similarities = embeddings[1:] @ embeddings[0]
for index in similarities.argsort()[::-1][:5]:
    print(f"{similarities[index]:.3f}  {files[index]}")
