# SPDX-License-Identifier: Apache-2.0
"""Ask a llama-server on this machine for an answer, time it, and say how others can ask.

llama-server's own HTTP interface (tools/server/README.md): /health, and
/completion and /v1/chat/completions as server-sent events.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from infertune.base.errors import Failed
from infertune.base.records import dataclass, field
from infertune.base.units import MIB, printable_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

COMPLETES_ONLY = "this model has no chat template: it completes text, it does not chat"
_ANSWER_S = 5.0
_MAX_EVENT = MIB
"""Bytes of one event; an answer's are a few hundred."""
_MAX_DOCUMENT = 16 * MIB
"""Bytes of an answer that comes as one document."""
_MAX_ANSWER = 512 * MIB
"""Bytes of all events: a million tokens, the most that are asked for, take some 300 MB."""

# No proxy: http_proxy of the caller must not send loopback requests elsewhere.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion and its times, seen from the client; latency = TTFT + TPOT x (n - 1)."""

    text: str
    """The answer; of a chat that got no further than thinking, the thoughts."""
    tokens: int
    """Tokens generated."""
    ttft_s: float
    """Seconds to the first token, prompt processing included."""
    tpot_s: float | None
    """Seconds per token after the first; None when there was only one."""
    latency_s: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None when there was only one."""
        return 1 / self.tpot_s if self.tpot_s else None


def healthy(base_url: str, timeout_s: float = 2.0, path: str = "/health") -> bool:
    """Whether the server says it is ready (it answers 503 while it loads, or not at all)."""
    try:
        with _opener.open(f"{base_url}{path}", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _unheard(_: str) -> None:
    """For whoever waits for the whole answer."""


def complete(
    base_url: str,
    prompt: str,
    n_predict: int,
    *,
    timeout_s: float = 300.0,
    hear: Callable[[str], None] = _unheard,
) -> Completion:
    """Generate up to ``n_predict`` tokens after ``prompt``, which is taken as it is.

    ``timeout_s`` bounds the wait for each piece, not the whole; ``hear`` is given each piece of
    the answer as it comes.  Raises Failed.
    """
    body = {"prompt": prompt, "n_predict": n_predict, "stream": True, "return_tokens": True}
    return _timed(f"{base_url}/completion", body, _piece_of_text, timeout_s, hear)


def chat(
    base_url: str,
    question: str,
    max_tokens: int,
    *,
    timeout_s: float = 300.0,
    hear: Callable[[str], None] = _unheard,
) -> Completion:
    """Ask ``question`` through the model's chat template; else as ``complete``."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return _timed(f"{base_url}/v1/chat/completions", body, _piece_of_chat, timeout_s, hear)


def ask(
    base_url: str, path: str, body: Mapping[str, Any], *, timeout_s: float = 300.0
) -> dict[str, Any]:
    """What a server answers to a document, as one JSON object.  Raises Failed."""
    try:
        with _post(f"{base_url}{path}", body, timeout_s) as reply:
            found = json.loads(reply.read(_MAX_DOCUMENT))
    except urllib.error.HTTPError as error:
        detail = error.read(1000).decode("utf-8", "replace").strip()
        raise Failed(f"the server answered {error.code}: {detail}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"the server broke off the answer: {error}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Failed("the server's answer is not one of llama-server's")
    return found


def how_to_talk(base_url: str, *, chats: bool | None = None, keyed: bool = False) -> list[str]:
    """Lines that say where a browser and a program find this server, which is ready.

    ``chats``: whether the model has a chat template.  llama.cpp lends ChatML to one that has none
    (common/chat.cpp) and shows that in /props, so the server cannot be asked.  ``keyed``: it asks
    for a key.
    """
    models = _get_json(f"{base_url}/v1/models").get("data")
    first = models[0] if isinstance(models, list) and models else None
    name = first.get("id") if isinstance(first, dict) else None
    model = f', model "{printable_line(name, 80)}"' if name and isinstance(name, str) else ""
    key = "a key of its file" if keyed else "any key"
    lines = [f"  API      {base_url}/v1  (OpenAI{model}, {key})"]
    lines += _curl(base_url, chats=chats is not False, keyed=keyed)
    if chats is False:
        return [*lines, COMPLETES_ONLY]
    if _has_page(base_url):
        lines.insert(0, f"  chat     {base_url}  (in a browser)")
    return lines


def _curl(base_url: str, *, chats: bool, keyed: bool) -> list[str]:
    """The same for a shell, in lines that can be copied."""
    door = "v1/chat/completions" if chats else "v1/completions"
    asked = (
        '"messages": [{"role": "user", "content": "Hello"}]'
        if chats
        else '"prompt": "The sky is blue because", "max_tokens": 64'
    )
    key = ["           -H 'Authorization: Bearer KEY' \\"] if keyed else []
    # --json (curl 7.82) says what it is: engines beside llama-server take nothing else.
    return [f"  shell    curl {base_url}/{door} \\", *key, f"           --json '{{{asked}}}'"]


def _has_page(base_url: str) -> bool:
    """Whether there is a page for browsers: a build may come without it."""
    # It is kept compressed, and refused to whoever does not say that this will do.
    request = urllib.request.Request(f"{base_url}/", headers={"Accept-Encoding": "gzip"})  # noqa: S310 - http to loopback
    try:
        with _opener.open(request, timeout=_ANSWER_S) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one event of an answer brings."""

    text: str = ""
    thought: str = ""
    tokens: int = 0
    total: int | None = None
    """All tokens of the answer, where the server says so."""
    last: bool = False


def _piece_of_text(event: Mapping[str, Any]) -> _Piece:
    text, tokens = _text(event.get("content")), event.get("tokens") or []
    # A token that is half a character carries no text yet, and counts all the same.
    return _Piece(text=text, tokens=len(tokens) or bool(text), last=bool(event.get("stop")))


def _piece_of_chat(event: Mapping[str, Any]) -> _Piece:
    choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
    delta = choice.get("delta") or {}
    text, thought = _text(delta.get("content")), _text(delta.get("reasoning_content"))
    total = (event.get("usage") or {}).get("completion_tokens")
    return _Piece(
        text=text,
        thought=thought,
        tokens=bool(text or thought),
        total=total if type(total) is int and total > 0 else None,
        last=bool(choice.get("finish_reason")),
    )


def _text(found: object) -> str:
    return found if isinstance(found, str) else ""


def _timed(
    url: str,
    body: dict[str, Any],
    read: Callable[[Mapping[str, Any]], _Piece],
    timeout_s: float,
    hear: Callable[[str], None],
) -> Completion:
    """Post ``body``, read the answer to its end, and time it."""
    start = time.monotonic()
    whole = _Answer()
    with failures_of_a_server(), _post(url, body, timeout_s) as reply:
        for event in events(reply):
            whole.take(piece := read(event))
            if piece.text:
                hear(piece.text)
        if not whole.complete:
            raise Failed("the server broke off the answer")
    if whole.first is None:
        raise Failed("the server generated no token")
    tokens = whole.total or whole.tokens
    latency, ttft = whole.latest - start, whole.first - start
    return Completion(
        text="".join(whole.texts) or "".join(whole.thoughts),
        tokens=tokens,
        ttft_s=ttft,
        tpot_s=(latency - ttft) / (tokens - 1) if tokens > 1 else None,
        latency_s=latency,
    )


@contextlib.contextmanager
def failures_of_a_server() -> Iterator[None]:
    """What can go wrong while a server answers, as Failed with one line."""
    try:
        yield
    except urllib.error.HTTPError as error:
        detail = error.read(1000).decode("utf-8", "replace").strip()
        raise Failed(f"the server answered {error.code}: {detail}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Failed(f"the server broke off the answer: {error}") from error
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Failed("the server's answer is not one of llama-server's") from error


@dataclass(slots=True)
class _Answer:
    """What has come of an answer so far, and when."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    tokens: int = 0
    total: int | None = None
    first: float | None = None
    latest: float = 0.0
    complete: bool = False

    def take(self, piece: _Piece) -> None:
        self.complete = self.complete or piece.last
        self.total = piece.total or self.total
        if not piece.tokens:
            return
        self.latest = time.monotonic()
        self.first = self.first or self.latest
        self.tokens += piece.tokens
        self.texts.append(piece.text)
        self.thoughts.append(piece.thought)


def _get_json(url: str) -> dict[str, Any]:
    """A small JSON object of the server; empty where it has none."""
    try:
        with _opener.open(url, timeout=_ANSWER_S) as reply:
            found = json.loads(reply.read(MIB))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _post(url: str, body: Mapping[str, Any], timeout_s: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(  # noqa: S310 - always http to loopback
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply: http.client.HTTPResponse = _opener.open(request, timeout=timeout_s)
    return reply


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of an answer (text/event-stream), each a JSON object.

    Raises Failed where the server says that it failed, ValueError for what is larger than any
    answer, or not JSON.
    """
    room = _MAX_ANSWER
    while line := reply.readline(_MAX_EVENT):
        room -= len(line)
        if room < 0 or len(line) == _MAX_EVENT:
            raise ValueError("it has no end")
        name, _, data = line.decode("utf-8", "replace").partition(":")
        if name in ("data", "error") and data.strip() not in ("", "[DONE]"):
            event = json.loads(data)
            if isinstance(event, dict):
                if name == "error" or "error" in event:
                    said = _message(event.get("error", event))
                    raise Failed(f"the server refused the prompt: {said}")
                yield event


def _message(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
