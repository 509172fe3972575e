# SPDX-License-Identifier: Apache-2.0
"""Ask a server as a client does, and time every token of the answer.

llama-server by its own /completion (tools/server/README.md), which takes token ids and says what it
had in its cache; any other engine by /v1/completions of OpenAI's interface, as vLLM and SGLang have
it.  Times are the client's: TTFT is from the request to the first token, TPOT what each token after
it took, (latency - TTFT) / (n - 1), as MLPerf and the benchmarks of vLLM have them.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass
from infertune.base.units import MIB, printable_line
from infertune.launch.client import events, failures_of_a_server

_ANSWER_S = 10.0
"""Patience with a small question."""
_MAX_ANSWER = 8 * MIB
"""Bytes of a small answer: ids of the tokens of a long text."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer, and when each part of it came, in seconds from the request."""

    times_s: tuple[float, ...]
    """One for each event with tokens: one token, unless the engine sends several at once."""
    tokens: int
    """Tokens generated."""
    prompt_tokens: int | None
    """Tokens of the prompt, cached ones among them; None where the server does not say."""
    cached_tokens: int | None
    """Those of them that the server had in its cache."""
    server_prefill_s: float | None = None
    """What the server says that the prompt took; without the way to it, and the first token."""

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def latency_s(self) -> float:
        return self.times_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """None where there was one token only, or all came at once."""
        spent = self.latency_s - self.ttft_s
        return spent / (self.tokens - 1) if self.tokens > 1 and spent > 0 else None

    @property
    def prefill_per_s(self) -> float | None:
        """Tokens of the prompt in a second; by the client's clock where the server has none."""
        if self.prompt_tokens is None:
            return None
        fresh = self.prompt_tokens - (self.cached_tokens or 0)
        seconds = self.server_prefill_s or self.ttft_s
        return fresh / seconds if fresh > 0 and seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is asked."""

    base_url: str
    """Without a path: ``http://127.0.0.1:8080``."""
    api: Literal["llama-server", "openai"]
    model: str | None = None
    """The name that it has for the model; None where it serves one and needs no name."""
    key: str | None = None
    """API key."""
    build: str | None = None
    context: int | None = None
    """Tokens of context of one slot; None where it does not say."""
    slots: int | None = None

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.base_url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def base_of(text: str) -> str:
    """The base of an URL that a user gave, without ``/v1``.  Raises UsageError."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    path = parts.path.rstrip("/")
    if "@" in parts.netloc:
        raise UsageError(
            "--url: a name or a password is not kept with measurements, so it cannot stand there",
            hint="--key-file names a file with the key",
        )
    known = parts.scheme in ("http", "https") and parts.hostname and path in ("", "/v1")
    if not known or port == 0:
        raise UsageError(
            f"--url {printable_line(text, 80)}: not the address of a server",
            hint="write it as http://127.0.0.1:8080",
        )
    return f"{parts.scheme}://{parts.netloc}"


def find_out(base_url: str, model: str | None = None, key: str | None = None) -> Target:
    """Which interface a server has, and what it serves.

    Raises Failed where nobody answers, UsageError where it has several models and none is named.
    """
    plain = Target(base_url, "openai", model, key)
    props = _get(plain, "/props")
    names = [
        each["id"]
        for each in (_get(plain, "/v1/models") or {}).get("data") or []
        if isinstance(each, dict) and isinstance(each.get("id"), str)
    ]
    router = props is not None and props.get("role") == "router"
    if model is None and len(names) != 1 and (router or props is None):
        known = ", ".join(printable_line(each, 60) for each in names[:8]) or "none that it names"
        raise UsageError(f"{base_url} has these models: {known}", hint="name one after 'bench'")
    if model is not None and names and model not in names:
        # A single model's server takes any name; a router would load another one, or refuse.
        raise UsageError(
            f"{base_url} has no model '{printable_line(model, 80)}'",
            hint=f"it has {', '.join(printable_line(each, 60) for each in names[:8])}",
        )
    name = model or (names[0] if len(names) == 1 else None)
    if props is None:
        return Target(base_url, "openai", name, key)
    if router:
        # Its own /props says nothing of a model; which is loaded for the question.
        return Target(base_url, "llama-server", name, key, _word(props.get("build_info")))
    settings = props.get("default_generation_settings")
    about = settings if isinstance(settings, dict) else {}
    return Target(
        base_url,
        "llama-server",
        name,
        key,
        _word(props.get("build_info")),
        _count(about.get("n_ctx")),
        _count(props.get("total_slots")),
    )


def ids_of(target: Target, text: str) -> list[int] | None:
    """The text as token ids, with what the model wants at a beginning; None where none are told."""
    if target.api != "llama-server":
        return None
    body = {"content": text, "add_special": True, **_named(target)}
    with failures_of_a_server():
        found = _small(target, "POST", "/tokenize", body)
        ids = (found or {}).get("tokens")
    if not isinstance(ids, list) or not ids or not all(type(each) is int for each in ids):
        return None
    return ids


def busy_slots(target: Target) -> int | None:
    """Requests that the server works on now; None where it does not say."""
    if target.api != "llama-server":
        return None
    try:
        with failures_of_a_server():
            # A router must not load a model for being asked.
            which = f"?model={quote(target.model or '', safe='')}&autoload=false"
            path = f"/slots{which if target.slots is None else ''}"
            reply = _request(target, "GET", path, None, _ANSWER_S)
            found = json.loads(reply.read(_MAX_ANSWER)) if reply.status == 200 else None
    except Failed:
        return None
    if not isinstance(found, list):
        return None
    return sum(isinstance(each, dict) and each.get("is_processing") is True for each in found)


def generate(target: Target, prompt: str | Sequence[int], tokens: int, deadline_s: float) -> Timed:
    """Have ``tokens`` tokens generated after ``prompt``, whatever the model would like to say.

    Raises Failed, also where not all of it is there after ``deadline_s``.  Hanging up is all a
    client can do then; a server of llama.cpp's notices, and gives the slot free.
    """
    body: dict[str, Any] = {"prompt": prompt, "stream": True, "temperature": 0, "ignore_eos": True}
    if target.api == "llama-server":
        path = "/completion"
        body |= {"n_predict": tokens, "return_tokens": True, "cache_prompt": False}
    else:
        path = "/v1/completions"
        body |= {"max_tokens": tokens, "stream_options": {"include_usage": True}}
    start = time.monotonic()
    found = _Collected()
    with failures_of_a_server():
        try:
            for event in _stream(target, path, {**body, **_named(target)}, start + deadline_s):
                found.take(event, time.monotonic() - start)
        except TimeoutError:
            raise Failed(f"no whole answer in {deadline_s:g} s") from None
        return found.timed()


class _Collected:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counted = 0
        self.ended = False
        self.usage: Mapping[str, Any] = {}
        self.timings: Mapping[str, Any] = {}

    def take(self, event: Mapping[str, Any], at: float) -> None:
        choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        ids, text = event.get("tokens"), event.get("content") or choice.get("text")
        # A token that is half a character carries no text yet, and counts all the same.
        count = len(ids) if isinstance(ids, list) else int(bool(text))
        if count and not event.get("stop"):
            self.times.append(at)
            self.counted += count
        self.ended = self.ended or bool(event.get("stop") or choice.get("finish_reason"))
        self.usage = event.get("usage") or self.usage
        self.timings = event.get("timings") or self.timings

    def timed(self) -> Timed:
        """Raises Failed for an answer without a token, or without its end."""
        if not self.ended:
            raise Failed("the server broke off the answer")
        if not self.times:
            raise Failed("the server generated no token")
        details = self.usage.get("prompt_tokens_details") or {}
        processed = _count(self.timings.get("prompt_n"))
        cached = _count(self.timings.get("cache_n"))
        whole = None if processed is None else processed + (cached or 0)
        took = self.timings.get("prompt_ms")
        return Timed(
            times_s=tuple(self.times),
            tokens=_count(self.usage.get("completion_tokens")) or self.counted,
            prompt_tokens=whole if whole is not None else _count(self.usage.get("prompt_tokens")),
            cached_tokens=cached if whole is not None else _count(details.get("cached_tokens")),
            server_prefill_s=took / 1000 if isinstance(took, int | float) and took > 0 else None,
        )


def _named(target: Target) -> dict[str, str]:
    return {"model": target.model} if target.model else {}


def _word(found: object) -> str | None:
    return printable_line(found, 80) if isinstance(found, str) and found else None


def _count(found: object) -> int | None:
    return found if type(found) is int and found >= 0 else None


def _get(target: Target, path: str) -> dict[str, Any] | None:
    with failures_of_a_server():
        return _small(target, "GET", path, None)


def _small(target: Target, method: str, path: str, body: object) -> dict[str, Any] | None:
    """A small JSON object; None where there is no such page, or another thing."""
    reply = _request(target, method, path, body, _ANSWER_S)
    if reply.status in (404, 405, 501):
        return None
    if reply.status != 200:
        raise _refused(reply)
    found = json.loads(reply.read(_MAX_ANSWER))
    return found if isinstance(found, dict) else None


def _refused(reply: http.client.HTTPResponse) -> Failed:
    detail = printable_line(reply.read(1000).decode("utf-8", "replace").strip(), 300)
    return Failed(f"the server answered {reply.status}: {detail}")


def _stream(target: Target, path: str, body: object, end: float) -> Iterator[dict[str, Any]]:
    """Events of an answer.  Raises TimeoutError at ``end`` (monotonic), else as ``events``."""
    connection, reply = _connect(target, "POST", path, body, end - time.monotonic())
    with reply:
        if reply.status != 200:
            raise _refused(reply)
        for event in events(reply):
            # A server that sends now and then must not have the whole time for each part.
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError
            connection.settimeout(left)
            yield event


def _request(
    target: Target, method: str, path: str, body: object, timeout_s: float
) -> http.client.HTTPResponse:
    return _connect(target, method, path, body, timeout_s)[1]


def _connect(
    target: Target, method: str, path: str, body: object, timeout_s: float
) -> tuple[socket.socket, http.client.HTTPResponse]:
    """Not by urllib: no proxy, no redirection that would carry the key elsewhere."""
    host, port = target.address
    kind = (
        http.client.HTTPSConnection
        if target.base_url.startswith("https:")
        else http.client.HTTPConnection
    )
    connection = kind(host, port, timeout=timeout_s)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    used = connection.sock
    # With "close" the answer has the socket alone, and closes it.
    return used, connection.getresponse()
