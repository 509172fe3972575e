# SPDX-License-Identifier: Apache-2.0
"""llama-server's own metrics, under the name of its declaration.

Its names hold a colon (``llamacpp:prompt_tokens_total``), which Prometheus keeps for recording
rules and promtool refuses; they are renamed.  Only the ones listed here pass, so that a server
cannot add series.  /metrics answers only where the server was started with ``--metrics``.
"""

from __future__ import annotations

import errno
import http.client
import io
import re
import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, one_of
from infertune.exporter.servers import ports

STATES = ("up", "loading", "no-metrics", "denied", "timeout", "unreachable", "not-understood")
_MAX_BYTES = 64 * 1024
"""A page has 3 KiB."""
_TIMEOUT_S = 1.0
"""All servers' whole answers: they are asked at once, by one thread."""
_SOURCE = "llama.cpp, tools/server/README.md, GET /metrics (build 11669)"

_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n"
# Name, labels, value, time: the text format of Prometheus.
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(\{.*\})? +(\S+)(?: +-?\d{1,19})?", re.ASCII)

# Its name, type, unit and meaning.
_KNOWN: tuple[tuple[str, Literal["gauge", "counter"], str, str], ...] = (
    ("prompt_tokens_total", "counter", "items", "Prompt tokens processed."),
    ("prompt_tokens_cached_total", "counter", "items", "Prompt tokens taken from the cache."),
    ("prompt_seconds_total", "counter", "seconds", "Time spent on prompts."),
    ("tokens_predicted_total", "counter", "items", "Tokens generated."),
    ("tokens_predicted_seconds_total", "counter", "seconds", "Time spent generating."),
    ("n_decode_total", "counter", "items", "Calls of llama_decode()."),
    ("n_busy_slots_per_decode", "gauge", "items", "Slots busy per call, on average."),
    ("requests_processing", "gauge", "items", "Requests in work."),
    ("requests_deferred", "gauge", "items", "Requests that wait for a slot."),
    ("n_tokens_max", "gauge", "items", "Largest context seen."),
    ("spec_decode_num_drafts_total", "counter", "items", "Drafts made."),
    ("spec_decode_num_draft_tokens_total", "counter", "items", "Tokens drafted."),
    ("spec_decode_num_accepted_tokens_total", "counter", "items", "Drafted tokens accepted."),
)

METRICS = (
    Metric(
        name="infertune_server_state",
        help="1 for how a declared server answers its /metrics now.",
        labels=("server", "state"),
        source=_SOURCE,
        series=f"{len(STATES)} per declared server (at most 64)",
    ),
    *(
        Metric(
            name=f"infertune_llama_{name}",
            kind=kind,
            unit=unit,
            help=text,
            labels=("server",),
            source=_SOURCE,
            series="one per declared server",
        )
        for name, kind, unit, text in _KNOWN
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Every declared server.  Raises Absent where none is declared, or on a recorded machine."""
    declared = ports(root)
    if not declared:
        raise Absent("no server is declared")
    if not root.live:
        raise Absent("a recorded machine does not answer")
    for server, answer in ask(declared).items():
        yield from _of_one(server, answer)


def _of_one(server: str, answer: bytes | str) -> list[Sample]:
    """One server's samples.  Never raises: whatever it sends, the others keep theirs."""
    samples: list[Sample] = []
    try:
        state, text = understood(answer) if isinstance(answer, bytes) else (answer, "")
        if state == "up":
            samples = list(parse(server, text))
    except Exception:  # the library does not say what it raises
        state = "not-understood"
    return [*one_of("infertune_server_state", (server,), STATES, state), *samples]


@dataclass(slots=True)
class _Asked:
    """One server that was asked."""

    server: str
    connection: socket.socket
    unsent: bytes
    answer: bytes = b""


def ask(ports: Mapping[str, int]) -> dict[str, bytes | str]:
    """What each server on this machine answers to GET /metrics, or in which state it is instead."""
    found: dict[str, bytes | str] = dict.fromkeys(ports, "unreachable")
    end = time.monotonic() + _TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        for server, port in ports.items():
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            if connection.connect_ex(("127.0.0.1", port)) not in (0, errno.EINPROGRESS):
                connection.close()
                continue
            asked = _Asked(server, connection, _REQUEST % port)
            selector.register(connection, selectors.EVENT_WRITE, asked)
            found[server] = "timeout"
        while (asking := selector.get_map()) and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                result = _talk(key.data, selector)
                if result is not None:
                    found[key.data.server] = result
                    _hang_up(key.data, selector)
        for key in list(asking.values()):
            _hang_up(key.data, selector)
    return found


def _talk(asked: _Asked, selector: selectors.BaseSelector) -> bytes | str | None:
    """Say or hear what is possible without waiting; the result once there is one."""
    try:
        if asked.unsent:
            asked.unsent = asked.unsent[asked.connection.send(asked.unsent) :]
            if not asked.unsent:
                selector.modify(asked.connection, selectors.EVENT_READ, asked)
            return None
        part = asked.connection.recv(_MAX_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return "unreachable"
    asked.answer += part
    if len(asked.answer) > _MAX_BYTES:
        return "not-understood"
    return asked.answer if not part or _is_whole(asked.answer) else None


def _hang_up(asked: _Asked, selector: selectors.BaseSelector) -> None:
    selector.unregister(asked.connection)
    asked.connection.close()


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


def understood(answer: bytes) -> tuple[str, str]:
    """State, and text of /metrics where the state is ``up``."""
    response = http.client.HTTPResponse(_Heard(answer), method="GET")  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError):
        return ("not-understood" if answer else "unreachable"), ""
    # 501: started without --metrics; 503: the model is still loading; 401: it wants an API key.
    named = {200: "up", 401: "denied", 403: "denied", 404: "no-metrics", 501: "no-metrics"}
    named[503] = "loading"
    return named.get(response.status, "not-understood"), body.decode("utf-8", "replace")


def parse(server: str, text: str) -> Iterable[Sample]:
    """The known metrics of a page.  Raises ValueError where it is no page of metrics."""
    known = {f"llamacpp:{name}": f"infertune_llama_{name}" for name, *_ in _KNOWN}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError("no page of metrics")
        name = known.pop(match[1], None)
        if name and not match[2]:
            yield Sample(name, (server,), float(match[3]))


LLAMA = Collector(
    id="llama",
    summary="llama-server's own metrics, by declared server. It tells sums and no histograms: what "
    "is made of them is an average, and says nothing of the slowest request.",
    metrics=METRICS,
    read=read,
    timeout_s=4.0,
)
