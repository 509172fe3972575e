# SPDX-License-Identifier: Apache-2.0
"""Lines for the journal.  Whoever wrote the text, it is one line, and its priority is ours.

The journal takes a line that begins with ``<1>`` for an alert of this daemon, and libraries log
tracebacks with what a caller sent: anybody could have written in root's name (CVE-2024-52337).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from infertune.base.units import printable_line

MAX_LINE = 1500
MAX_LINES = 20
MAX_DEBUG_LINES = 3000
WINDOW_S = 60.0
"""Lines of libraries, and of ``--debug``, in so many seconds: a caller decides how many there
would be."""


def log(priority: int, text: str) -> None:
    """One line for the journal, with its priority (sd-daemon(3))."""
    line = printable_line(text[: MAX_LINE + 1], MAX_LINE)
    print(f"<{priority}>{line}", file=sys.stderr, flush=True)


class _Few:
    """So many lines in a window of time; then how many there would have been."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._since = -WINDOW_S
        self._lines = 0

    def another(self) -> bool:
        """Whether there may be one more."""
        now = time.monotonic()
        if now - self._since >= WINDOW_S:
            if self._lines > self._most:
                log(4, f"{self._lines - self._most} more {self._what} were left out")
            self._since, self._lines = now, 0
        self._lines += 1
        return self._lines <= self._most


_debug: _Few | None = None


def log_debug() -> None:
    """From now on lines of ``debug`` are printed, too."""
    global _debug
    _debug = _Few(MAX_DEBUG_LINES, "lines for debugging")


def debug(text: Callable[[], str]) -> None:
    """One line of priority 7 where ``--debug`` was given; else ``text`` is not even asked."""
    if _debug and _debug.another():
        log(7, text())


def listen_to_libraries() -> None:
    """From now on nothing but lines of ``log`` reaches the journal: no traceback, no warning."""
    logging.captureWarnings(True)
    logging.getLogger().handlers = [_Lines()]
    sys.excepthook = _ended
    sys.unraisablehook = lambda lost: logging.error("lost", exc_info=lost.exc_value)


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log(2, f"a bug: {_described(error)}")


class _Lines(logging.Handler):
    """Prints what libraries log."""

    def __init__(self) -> None:
        super().__init__()
        self._few = _Few(MAX_LINES, "messages of libraries")

    def emit(self, record: logging.LogRecord) -> None:
        if not self._few.another():
            return
        try:
            error = record.exc_info[1] if record.exc_info else None
            why = f": {_described(error)}" if error else ""
            log(_priority(record.levelno), f"{record.name}: {record.getMessage()}{why}")
        except Exception as bug:
            log(3, f"{record.name}: a message that cannot be shown ({type(bug).__name__})")


def _priority(level: int) -> int:
    priorities = (
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
    )
    return next((priority for least, priority in priorities if level >= least), 7)


def _described(error: BaseException) -> str:
    """What went wrong and where, as a traceback would end."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    file = os.path.basename(trace.tb_frame.f_code.co_filename) if trace else "?"
    return f"{type(error).__name__} ({file}:{trace.tb_lineno if trace else 0}): {error}"
