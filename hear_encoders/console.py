"""Parts that all commands share: exit codes, messages and progress on standard error, argument types."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import category

from tqdm import tqdm

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130  # exit codes

_SECONDS_BETWEEN_LINES = 30.0

# Unicode categories: control, format (such as the marks that reverse text), surrogate, line and paragraph separator.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    """Escape what would not stay on its line or could command a terminal: control characters, undecodable bytes.

    File names may hold both. `caf\\xe9.wav` is how a name that is not UTF-8 is printed.
    """
    return "".join(_escape(character) if category(character) in _ESCAPED else character for character in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python decodes a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def print_line(text: str) -> None:
    """Write one line to standard output."""
    print(printable(text))


def print_error(prog: str, message: str) -> None:
    """Write one line to standard error, above a progress bar if there is one."""
    tqdm.write(printable(f"{prog}: {message}"), file=sys.stderr)


@contextmanager
def warnings_as_messages(prog: str) -> Iterator[None]:
    """Print each warning as one line on standard error instead of Python's two."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: print_error(prog, f"warning: {message}")
        yield


@contextmanager
def progress(
    total: float, unit: str, label: str, *, done: float = 0, scale: bool = False
) -> Iterator[Callable[..., object]]:
    """Show a progress bar; if standard error is not a terminal, print a line every half minute instead.

    Args:
        total: units at the end.
        unit: "file", "B".
        label: text before the numbers.
        done: units at the start.
        scale: write 2.5M for 2 500 000.

    Yields:
        A function `advance(units=1)` to call whenever units have been done.
    """
    with tqdm(total=total, initial=done, unit=unit, desc=label, unit_scale=scale, disable=None) as bar:
        if not bar.disable:
            yield bar.update
            return
        now = done
        start_s = line_s = time.monotonic()

        def advance(units: float = 1) -> None:
            nonlocal now, line_s
            now += units
            if time.monotonic() - line_s >= _SECONDS_BETWEEN_LINES:
                line_s = time.monotonic()
                line = tqdm.format_meter(
                    now, total, line_s - start_s, ncols=0, prefix=label, unit=unit, unit_scale=scale, initial=done
                )
                print(line, file=sys.stderr, flush=True)

        yield advance


def discard_stdout() -> None:
    """Send the rest of standard output nowhere.

    Call this after a BrokenPipeError: Python flushes the output at exit and would report the broken pipe again.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_path(text: str) -> Path:
    """Parse an argument as a path to write to: a file or a folder, which need not exist.

    It must not be empty, as from an unset shell variable, nor the root folder, a device or a pipe.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    path = Path(text)
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise argparse.ArgumentTypeError(f"{printable(text)} is neither a file nor a folder")
    if os.path.realpath(path) == os.path.realpath(path.absolute().anchor):
        raise argparse.ArgumentTypeError(f"{printable(text)} is the root folder")
    return path


def non_empty_text(text: str) -> str:
    """Parse an argument as text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def non_negative(text: str) -> float:
    """Parse an argument as a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def positive(kind: type[float]) -> Callable[[str], float]:
    """Return an argument type: a number of type `kind` above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse's error message: "invalid positive int value"
    return parse
