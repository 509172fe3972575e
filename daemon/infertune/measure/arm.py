# SPDX-License-Identifier: Apache-2.0
"""One server to be measured: started with its settings, asked, and ended whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from infertune.base.addresses import LOOPBACK
from infertune.base.addresses import url as url_of
from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.catalogue.server_settings import check_together, server_arguments
from infertune.launch.binary import Server
from infertune.launch.client import ask
from infertune.launch.process import Signals, environment, start
from infertune.launch.ready import any_port, wait_ready
from infertune.measure.answers import Ask

GRACE_S = 2.0
"""From SIGTERM to SIGKILL: a server ends its requests first, and one may take minutes."""
READY_S = 600.0
"""For a large model from a slow disk."""
ANSWER_S = 300.0
"""For one request."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A server as it is to be started."""

    model: str
    settings: Mapping[str, str]
    """Canonical server settings."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready."""

    url: str
    pid: int

    def ask(self, answer_s: float = ANSWER_S) -> Ask:
        """How it is asked, with so much patience for each question."""
        return partial(ask, self.url, timeout_s=answer_s)


Serve = Callable[[Arm], AbstractContextManager[Ask]]
"""Starts a server, gives what asks it, and ends it.  Raises Failed."""


@dataclass(frozen=True, slots=True)
class Starter:
    """What starts servers: one program, in one environment."""

    root: Root
    server: Server
    caller: Mapping[str, str]
    """The caller's environment."""
    signals: Signals

    @contextmanager
    def serve(self, arm: Arm) -> Iterator[Ask]:
        """As ``start``, for who only asks."""
        with self.start(arm) as running:
            yield running.ask()

    def paced(self, first_s: float, each_s: float) -> Serve:
        """As ``serve``, of servers that get ``first_s`` and then so much time for each answer.

        So one that is far too slow is given up after a few answers, not after all of them.
        """

        @contextmanager
        def serve(arm: Arm) -> Iterator[Ask]:
            with self.start(arm) as running:
                end = time.monotonic() + first_s

                def asked(path: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
                    nonlocal end
                    end += each_s
                    if (left := end - time.monotonic()) > 0:
                        try:
                            return ask(running.url, path, document, timeout_s=left)
                        except Failed:
                            if time.monotonic() < end:
                                raise
                    raise Failed("it takes too long to answer")

                yield asked

        return serve

    @contextmanager
    def start(self, arm: Arm, ready_s: float = READY_S) -> Iterator[Running]:
        """A ready server, while it lasts.

        Raises UsageError for a setting that it cannot be given, Failed where it is not ready after
        ``ready_s``, and KeyboardInterrupt where a signal ended it.
        """
        argv, url = self._command(arm)
        if self.signals.received():
            raise KeyboardInterrupt
        child = None
        try:
            child = start(
                argv,
                environment(self.server.env, self.caller),
                lambda _: None,
                capture=True,
                program=argv[0],
            )
            self.signals.child = child
            wait_ready(self.root, self.signals, child, url, arm.model, None, ready_s)
            if self.signals.received():
                raise KeyboardInterrupt
            yield Running(url, child.pid)
        except Failed:
            if self.signals.received():
                raise KeyboardInterrupt from None
            raise
        finally:
            self.signals.child = None
            if child:
                child.stop(GRACE_S)

    def _command(self, arm: Arm) -> tuple[tuple[str, ...], str]:
        """What to start, and where it will answer.  Raises UsageError."""
        port = any_port()
        try:
            check_together(arm.settings)
            arguments, refused = server_arguments(
                arm.settings, self.server.help, model=arm.model, port=port
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        if refused:
            raise UsageError(f"{refused[0].setting} = {refused[0].value}: {refused[0].reason}")
        return (*self.server.program, *arguments), url_of(LOOPBACK, port)
