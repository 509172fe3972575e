# SPDX-License-Identifier: Apache-2.0
"""Asks the servers of this machine, all at once, by one thread and within one time.

A server is whatever program listens on its port: nothing it sends may cost more than its own
values.  Only GET is sent, only to 127.0.0.1, and no redirection is followed.
"""

from __future__ import annotations

import errno
import http.client
import io
import re
import selectors
import socket
import time
from collections.abc import Mapping

from infertune.base.records import dataclass
from infertune.servers.engines.base import MAX_ASKED, Answer, Reading, Talk

STATES = (
    *("up", "loading", "no-metrics", "denied", "timeout", "unreachable", "not-understood"),
    "unknown-engine",
)
MAX_BYTES = 512 * 1024
"""Of one answer.  llama-server's page has 3 KiB, vLLM's 100; a router's list 1 for each model."""
TIMEOUT_S = 1.0
"""All answers of all servers."""
_MAX_QUESTIONS = MAX_ASKED + 4

_REQUEST = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n"
_PATH = re.compile(r"/[\x21-\x7e]*", re.ASCII)


@dataclass(slots=True)
class _Asked:
    """One server that is being asked."""

    server: str
    port: int
    talk: Talk
    questions: int = 0
    connection: socket.socket | None = None
    unsent: bytes = b""
    answer: bytes = b""
    reading: Reading | None = None


def ask(talks: Mapping[str, tuple[int, Talk]]) -> dict[str, Reading]:
    """What each server says: its port and what is asked of it, by its name.  Never raises."""
    asked = [_Asked(server, port, talk) for server, (port, talk) in talks.items()]
    end = time.monotonic() + TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        for each in asked:
            _go_on(each, None, selector)
        while (asking := selector.get_map()) and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                result = _exchange(key.data, selector)
                if result is not None:
                    _hang_up(key.data, selector)
                    _go_on(key.data, result, selector)
        for key in list(asking.values()):
            _hang_up(key.data, selector)
    for each in asked:
        while each.reading is None:  # what it has so far
            _next(each, Answer("timeout"))
    return {each.server: each.reading for each in asked if each.reading is not None}


def _go_on(asked: _Asked, answer: Answer | None, selector: selectors.BaseSelector) -> None:
    """Ask the next question; one that cannot be asked is answered at once."""
    while (path := _next(asked, answer)) is not None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if connection.connect_ex(("127.0.0.1", asked.port)) in (0, errno.EINPROGRESS):
            asked.unsent, asked.answer = _REQUEST % (path.encode("ascii"), asked.port), b""
            asked.connection = connection
            selector.register(connection, selectors.EVENT_WRITE, asked)
            return
        connection.close()
        answer = Answer("unreachable")


def _next(asked: _Asked, answer: Answer | None) -> str | None:
    """The path of the next question, or None where the reading is there."""
    try:
        if asked.questions >= _MAX_QUESTIONS:
            asked.talk.close()
            raise ValueError("it asks without end")
        asked.questions += 1
        path = next(asked.talk) if answer is None else asked.talk.send(answer)
        if _PATH.fullmatch(path):
            return path
        asked.talk.close()
        raise ValueError("no path")
    except StopIteration as end:
        asked.reading = end.value
    except Exception:  # whatever a server sends, the others keep their values
        asked.reading = Reading("not-understood")
    return None


def _exchange(asked: _Asked, selector: selectors.BaseSelector) -> Answer | None:
    """Say or hear what is possible without waiting; the answer once it is there."""
    assert asked.connection is not None
    try:
        if asked.unsent:
            asked.unsent = asked.unsent[asked.connection.send(asked.unsent) :]
            if not asked.unsent:
                selector.modify(asked.connection, selectors.EVENT_READ, asked)
            return None
        part = asked.connection.recv(64 * 1024)
    except BlockingIOError:
        return None
    except OSError:
        return Answer("unreachable")
    asked.answer += part
    if len(asked.answer) > MAX_BYTES:
        return Answer("not-understood")
    return _heard(asked.answer) if not part or _is_whole(asked.answer) else None


def _heard(answer: bytes) -> Answer:
    try:
        return understood(answer)
    except Exception:  # the library does not say what it raises
        return Answer("not-understood")


def _hang_up(asked: _Asked, selector: selectors.BaseSelector) -> None:
    assert asked.connection is not None
    selector.unregister(asked.connection)
    asked.connection.close()
    asked.connection = None


def _is_whole(answer: bytes) -> bool:
    """Whether all that a server has announced is there; who announces nothing has to hang up."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d{1,9})\r\n", head + b"\r\n")
    return length is not None and len(body) >= int(length[1])


class _Heard:
    """An answer that is there already, for http.client."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._answer)


def understood(answer: bytes) -> Answer:
    """A whole answer, read."""
    response = http.client.HTTPResponse(_Heard(answer), method="GET")  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError):
        return Answer("not-understood" if answer else "unreachable")
    # 501: started without --metrics; 503: the model is still loading; 401: it wants an API key.
    named = {200: "up", 401: "denied", 403: "denied", 404: "no-metrics", 501: "no-metrics"}
    named[503] = "loading"
    state = named.get(response.status, "not-understood")
    return Answer(state, body.decode("utf-8", "replace") if state == "up" else "")
