# SPDX-License-Identifier: Apache-2.0
"""Ask a llama-server on this machine for a completion, and time it.

llama-server's own HTTP interface (tools/server/README.md): /health, and
/completion as server-sent events.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infertune.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

# No proxy: http_proxy of the caller must not send loopback requests elsewhere.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion and its times, seen from the client; latency = TTFT + TPOT x (n - 1)."""

    text: str
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


def healthy(base_url: str, timeout_s: float = 2.0) -> bool:
    """Whether the server says it is ready (it answers 503 while it loads, or not at all)."""
    try:
        with _opener.open(f"{base_url}/health", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def complete(base_url: str, prompt: str, n_predict: int, *, timeout_s: float = 300.0) -> Completion:
    """Generate up to ``n_predict`` tokens after ``prompt``, which is taken as it is.

    ``timeout_s`` bounds the wait for each piece, not the whole.  Raises Failed.
    """
    body = {"prompt": prompt, "n_predict": n_predict, "stream": True, "return_tokens": True}
    start = time.monotonic()
    first = last = None
    text: list[str] = []
    tokens = 0
    try:
        with _post(f"{base_url}/completion", body, timeout_s) as reply:
            for event in _events(reply):
                if "error" in event:
                    raise Failed(f"the server refused the prompt: {_message(event['error'])}")
                new = event.get("tokens") or []
                # A token that is half a character carries no text yet, and counts all the same.
                if new or event.get("content"):
                    last = time.monotonic()
                    first = first or last
                    tokens += len(new) or 1
                    text.append(event.get("content", ""))
                if event.get("stop"):
                    break
            else:
                raise Failed("the server broke off the answer")
    except urllib.error.HTTPError as error:
        detail = error.read(1000).decode("utf-8", "replace").strip()
        raise Failed(f"the server answered {error.code}: {detail}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Failed(f"the server broke off the answer: {error}") from error
    if first is None or last is None:
        raise Failed("the server generated no token")
    latency, ttft = last - start, first - start
    return Completion(
        text="".join(text),
        tokens=tokens,
        ttft_s=ttft,
        tpot_s=(latency - ttft) / (tokens - 1) if tokens > 1 else None,
        latency_s=latency,
    )


def _post(url: str, body: dict[str, Any], timeout_s: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(  # noqa: S310 - always http to loopback
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply: http.client.HTTPResponse = _opener.open(request, timeout=timeout_s)
    return reply


def _events(lines: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in lines:
        name, _, data = line.decode("utf-8", "replace").partition(":")
        if name in ("data", "error") and data.strip() not in ("", "[DONE]"):
            event = json.loads(data)
            if isinstance(event, dict):
                yield {"error": event} if name == "error" else event


def _message(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
