"""A progress bar: tqdm's, or one line on stderr where that is not installed."""

from __future__ import annotations

import sys
from typing import Any


class _PlainProgress:
    """What is used of tqdm, where that is not installed: one line on stderr, written over where it is a terminal."""

    def __init__(self, total: int, unit: str) -> None:
        self.count, self.total, self.unit, self.words = 0, total, unit, ""

    def __enter__(self) -> _PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        print(f"\r{self.count:,} of {self.total:,} {self.unit}{' ' * len(self.words)}", file=sys.stderr)

    def update(self, count: int) -> None:
        self.count += count
        self._show()

    def set_postfix_str(self, words: str) -> None:
        # The line written over may have been longer.
        self.words = f", {words}".ljust(len(self.words))
        self._show()

    def _show(self) -> None:
        if sys.stderr.isatty():
            print(f"\r{self.count:,} of {self.total:,} {self.unit}{self.words}", end="", file=sys.stderr, flush=True)


class _NoProgress(_PlainProgress):
    def __exit__(self, *_: object) -> None:
        pass

    def _show(self) -> None:
        pass


def progress(total: int, unit: str, *, show: bool = True) -> Any:
    """Return a context manager whose ``update(count)`` moves the bar, and ``set_postfix_str(words)`` adds words to it.

    Parameters
    ----------
    total
        Count at the end.
    unit
        What is counted, in the plural.
    show
        Without it nothing is printed.
    """
    if not show:
        return _NoProgress(total, unit)
    try:
        from tqdm import tqdm
    except ImportError:
        return _PlainProgress(total, unit)
    return tqdm(total=total, unit=f" {unit}", unit_scale=True)
