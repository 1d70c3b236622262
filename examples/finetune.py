"""Fine-tune an encoder on labelled recordings, FOLDER/CLASS/FILE: python examples/finetune.py FOLDER OUT

A fifth of the files is held out. First the encoder is frozen and a linear head learns from its embeddings; then both
learn together. OUT gets the encoder, for `load_model(OUT)` and `hear-embed --weights OUT`, and the head.
"""

import argparse
import json
import random

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import hear_audiomaepp
from hear_encoders import load_audio, save_checkpoint
from hear_encoders.audio import find_audio

CROP = 10 * 16_000  # samples of a file in an optimizer step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--weights", default="", help="directory or Hub org/name; default: bundled")
    parser.add_argument("--epochs", type=int, default=10, help="of encoder and head together; default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="files in an optimizer step; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    files = find_audio([options.folder])[1]
    random.Random(0).shuffle(files)
    classes = sorted({file.name.split("/")[0] for file in files})
    labels = torch.tensor([classes.index(file.name.split("/")[0]) for file in files])
    paths = [file.path for file in files]
    held_out = len(files) // 5
    model = hear_audiomaepp.load_model(options.weights, device="auto")
    size = model.scene_embedding_size
    head = nn.Sequential(nn.BatchNorm1d(size, affine=False, momentum=None), nn.Linear(size, len(classes)))

    def accuracy() -> str:
        with torch.no_grad():
            scores = head.eval()(torch.from_numpy(model.encode(paths[:held_out])))
        return f"accuracy {(scores.argmax(1) == labels[:held_out]).float().mean():.3f}"

    scenes = torch.from_numpy(model.encode(paths[held_out:]))  # the encoder is frozen, so these stay the same
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(scenes), labels[held_out:], label_smoothing=0.1).backward()
        optimizer.step()
    print(f"frozen encoder: {accuracy()} on {held_out} held-out files of {len(files)}", flush=True)

    # `accuracy` has put the head into eval mode: from here on it standardizes as it did when it was trained.
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-5)
    for epoch in range(options.epochs):
        for rows in (held_out + torch.randperm(len(files) - held_out)).split(options.batch):
            clips = [load_audio(paths[row]) for row in rows]
            starts = [random.randrange(max(1, len(clip) - CROP + 1)) for clip in clips]
            clips = [clip[start : start + CROP] for clip, start in zip(clips, starts)]
            lengths = [len(clip) for clip in clips]
            steps = model(pad_sequence(clips, batch_first=True), lengths)  # (files, steps, size), with gradients
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(model.pool(steps, lengths)), labels[rows]).backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {accuracy()}", flush=True)

    save_checkpoint(options.out, model.encoder)
    save_file(head.state_dict(), f"{options.out}/head.safetensors", metadata={"classes": json.dumps(classes)})
    model = hear_audiomaepp.load_model(options.out, device="auto")
    head.load_state_dict(load_file(f"{options.out}/head.safetensors"))
    print(f"loaded again: {accuracy()}")


if __name__ == "__main__":
    main()
