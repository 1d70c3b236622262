"""Embed a WAV file of any length without PyTorch, with NumPy and ONNX Runtime alone.

    hear-weights export hear_audiomaepp frontend.onnx --part frontend
    hear-weights export hear_audiomaepp encoder.onnx --input logmel
    python examples/onnx_embed.py frontend.onnx encoder.onnx sound.wav embedding.npy

The file must be 16-bit mono at 16 kHz: ffmpeg -i sound.mp3 -ac 1 -ar 16000 sound.wav
"""

import json
import sys
import wave

import numpy as np
import onnxruntime

HOP = 160  # samples per frame
PIECE = 6000  # frames of log-mel at once: bounds memory
CONTEXT = 2  # frames that a window reaches to both sides


def read_wav(path):
    with wave.open(path) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            raise SystemExit(f"{path}: expected 16-bit mono at 16 kHz")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def log_mel(audio, frontend):
    """(samples,) -> (frames, 80)."""
    pieces = []
    for first in range(0, len(audio) // HOP + 1, PIECE):
        begin = max(0, first - CONTEXT)
        piece = audio[HOP * begin : HOP * (first + PIECE + CONTEXT)]
        (frames,) = frontend.run(["logmel"], {"audio": piece[None]})
        pieces.append(frames[0, first - begin :][:PIECE])
    return np.concatenate(pieces)


def embed(audio, frontend, encoder):
    """(samples,) -> embeddings (steps, size), their times in milliseconds (steps,), scene embedding (size,)."""
    settings = encoder.get_modelmeta().custom_metadata_map
    step, segment = int(settings["step_frames"]), int(settings["segment_frames"])
    step_ms, first_ms = float(settings["step_ms"]), float(settings["first_step_ms"])

    frames = log_mel(audio, frontend)
    own = np.mean(frames, dtype=np.float64), np.std(frames, ddof=1, dtype=np.float64)
    mean, std = json.loads(settings["statistics"]) or own
    frames = ((frames - mean) / (std + 1e-8)).astype(np.float32)

    steps = max(1, int((len(audio) / 16 - first_ms) // step_ms) + 1)  # those whose times lie within the clip
    missing = max(0, step * steps - len(frames))  # at most two: then the last frame is repeated
    frames = np.pad(frames, ((0, missing), (0, 0)), mode="edge")[: step * steps]
    segments = [frames[None, first : first + segment] for first in range(0, len(frames), segment)]
    embeddings = np.concatenate([encoder.run(["embeddings"], {"frames": part})[0][0] for part in segments])

    scene = embeddings.mean(0, dtype=np.float64)
    if settings["pooling"] == "mean_std":
        scene = np.concatenate([scene, embeddings.std(0, dtype=np.float64)])
    return embeddings, first_ms + step_ms * np.arange(steps), scene.astype(np.float32)


if __name__ == "__main__":
    sessions = [onnxruntime.InferenceSession(path) for path in sys.argv[1:3]]
    np.save(sys.argv[4], embed(read_wav(sys.argv[3]), *sessions)[2])
