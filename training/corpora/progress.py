"""Progress of a long command, on a terminal and in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


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
