"""The installed commands. They import PyTorch only after what has to precede it, so this module must not."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from hear_encoders.threads import wait_passively

_INTERRUPTED = 130  # as in hear_encoders.console


def hear_embed() -> int:
    """Run `hear-embed` and return its exit code."""
    wait_passively()
    return _run("hear-embed", "hear_encoders.cli.embed")


def hear_embed_corpus() -> int:
    """Run `hear-embed-corpus` and return its exit code."""
    wait_passively()
    return _run("hear-embed-corpus", "hear_encoders.cli.embed_corpus")


def hear_weights() -> int:
    """Run `hear-weights` and return its exit code."""
    return _run("hear-weights", "hear_encoders.cli.weights")


def hear_map() -> int:
    """Run `hear-map` and return its exit code."""
    return _run("hear-map", "hear_encoders.cli.map")


def _run(prog: str, module: str) -> int:
    """Import a command, which takes a second, and run it. An interruption is one line at any time."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell ignores it
    message = f"{prog}: interrupted\n"

    def leave(*_: object) -> None:  # nothing is written yet, and libraries may hide or translate an exception
        os.write(2, message.encode())
        os._exit(_INTERRUPTED)

    if ours:
        signal.signal(signal.SIGINT, leave)
    main = importlib.import_module(module).main
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        sys.stderr.write(message)
        return _INTERRUPTED
