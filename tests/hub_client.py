"""Clients of the stand-in Hub: functions that `call` runs in new processes, which know only the test's server.

huggingface_hub reads its settings from the environment when it is imported, so each call needs a separate process.
On Linux these are forked from a server that has imported the slow modules already, but not huggingface_hub.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":  # of the HTTP libraries, those that are installed
    _context.set_forkserver_preload(["hear_axlstm", "hear_encoders.cli.weights", "requests", "httpx", "httpx2"])


def call(function: Callable[..., Any], *arguments: Any, endpoint: str, home: Path, **settings: str) -> Any:
    """Return the result of one of the functions below, called in a new process.

    Args:
        endpoint: the server's URL.
        home: the directory of the Hub cache.
        settings: further environment variables.
    """
    hub_names = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(hub_names) and not name.lower().endswith("_proxy")
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | settings
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(sender, environment, function, arguments))
    process.start()
    sender.close()
    try:
        assert receiver.poll(TIMEOUT_S), f"{function.__name__} did not end within {TIMEOUT_S} s"
        return receiver.recv()  # EOFError: the function failed; its traceback is on standard error
    finally:
        process.kill()
        process.join()


def _serve(sender: Any, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert "huggingface_hub" not in sys.modules  # importing the packages and the commands does not import it
    os.environ.clear()
    os.environ.update(environment)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # huggingface_hub waits between its retries
    sender.send(function(*arguments))


def _outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    try:
        return {"result": function(*arguments, **options)}
    except Exception as error:
        is_builtin = type(error).__module__ == "builtins"
        return {
            "error": type(error).__qualname__ if is_builtin else repr(type(error)),
            "message": str(error),
            "cause": type(error.__cause__).__qualname__,
        }


def fetch(repo_id: str, revision: str | None) -> dict[str, Any]:
    """Call `fetch_checkpoint`; return its "result", or the "error", its "message" and its "cause"."""
    from hear_encoders.hub import fetch_checkpoint

    return _outcome(fetch_checkpoint, repo_id, revision)


def push(repo_id: str, files: dict[str, Path], private: bool) -> dict[str, Any]:
    """Call `push_files`; return what `fetch` returns."""
    from hear_encoders.hub import push_files

    return _outcome(push_files, repo_id, files, "a message", private=private)


def run_weights(commands: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """Run `hear-weights` in a folder with each list of arguments; return "code", "out" and "err" of each."""
    from hear_encoders.cli.weights import main

    os.chdir(folder)
    results = []
    for arguments in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main(arguments)
            except SystemExit as end:  # argparse
                code = end.code
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    return results


def embed(repo_id: str, revision: str | None = None) -> list[list[float]]:
    """Return the scene embedding of one second of a ramp by an AxLSTM."""
    import torch

    import hear_axlstm

    torch.set_num_threads(1)
    model = hear_axlstm.load_model(repo_id, revision=revision)
    return hear_axlstm.get_scene_embeddings(torch.linspace(-1, 1, 16000)[None], model).tolist()
