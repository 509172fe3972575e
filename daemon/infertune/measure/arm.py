# SPDX-License-Identifier: Apache-2.0
"""One server to be measured: started with its settings, asked, and ended whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass
from infertune.catalogue.server_settings import check_together, server_arguments
from infertune.launch.binary import Server
from infertune.launch.client import ask, healthy
from infertune.launch.process import Child, Signals, cause, environment, start
from infertune.launch.ready import any_port
from infertune.measure.answers import Ask

GRACE_S = 2.0
"""From SIGTERM to SIGKILL: a server ends its requests first, and one may take minutes."""
READY_S = 600.0
"""For a large model from a slow disk."""
ANSWER_S = 300.0
"""For one request."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Arm:
    """A server as it is to be started."""

    model: str
    settings: Mapping[str, str]
    """Canonical server settings."""


Serve = Callable[[Arm], AbstractContextManager[Ask]]
"""Starts a server, gives what asks it, and ends it.  Raises Failed."""


def server_of(
    server: Server, caller: Mapping[str, str], signals: Signals, answer_s: float = ANSWER_S
) -> Serve:
    """How this program serves an arm."""
    return lambda arm: serving(server, arm, caller, signals, answer_s)


@contextmanager
def serving(
    server: Server,
    arm: Arm,
    caller: Mapping[str, str],
    signals: Signals,
    answer_s: float = ANSWER_S,
) -> Iterator[Ask]:
    """A ready server, while it lasts.

    Raises UsageError for a setting that it cannot be given, and Failed where it does not get ready
    or a question is not answered in ``answer_s``.
    """
    try:
        check_together(arm.settings)
        port = any_port()
        arguments, refused = server_arguments(arm.settings, server.help, model=arm.model, port=port)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if refused:
        raise UsageError(f"{refused[0].setting} = {refused[0].value}: {refused[0].reason}")
    if signals.received():
        raise KeyboardInterrupt
    child = None
    try:
        child = start(
            (*server.program, *arguments),
            environment(server.env, caller),
            lambda _: None,
            capture=True,
            program=server.program[0],
        )
        signals.child = child
        url = f"http://127.0.0.1:{port}"
        _wait(child, url, signals)
        yield partial(ask, url, timeout_s=answer_s)
    except Failed:
        if signals.received():
            raise KeyboardInterrupt from None
        raise
    finally:
        signals.child = None
        if child:
            child.stop(GRACE_S)


def _wait(child: Child, url: str, signals: Signals) -> None:
    """Until it is ready.  Raises Failed, with the server's last lines, where it never is."""
    end = time.monotonic() + READY_S
    while (status := child.poll()) is None:
        if signals.received():
            raise KeyboardInterrupt
        if healthy(url):
            return
        if time.monotonic() > end:
            raise Failed(f"the server did not get ready in {READY_S:.0f} s")
        time.sleep(_POLL_S)
    lines = child.last_lines()
    why = cause(status, lines)
    raise Failed(f"the server did not get ready: {why}", hint="\n  ".join(lines[-6:]) or None)
