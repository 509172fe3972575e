# SPDX-License-Identifier: Apache-2.0
"""llama-server's own metrics, under the name of its declaration.

Its names hold a colon (``llamacpp:prompt_tokens_total``), which Prometheus keeps for recording
rules and promtool refuses; they are renamed.  Only the ones listed here pass, so that a server
cannot add series.  /metrics answers only where the server was started with ``--metrics``.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

from infertune.exporter import deadline
from infertune.exporter.base import Absent, Collector, Metric, Sample, one_of
from infertune.exporter.servers import ports
from infertune.root import Root

STATES = ("up", "loading", "no-metrics", "denied", "timeout", "unreachable", "not-understood")
_MAX_BYTES = 64 * 1024
"""A page has 3 KiB."""
_TIMEOUT_S = 1.0
"""One server's whole answer.  All are asked at once, so it is also the time for all of them."""
_SOURCE = "llama.cpp, tools/server/README.md, GET /metrics (build 11669)"

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
    ("kv_cache_usage_ratio", "gauge", "ratio", "Share of the KV cache in use (older builds)."),
    ("kv_cache_tokens", "gauge", "items", "Tokens in the KV cache (older builds)."),
    ("spec_decode_num_drafts_total", "counter", "items", "Drafts made."),
    ("spec_decode_num_draft_tokens_total", "counter", "items", "Tokens drafted."),
    ("spec_decode_num_accepted_tokens_total", "counter", "items", "Drafted tokens accepted."),
)

METRICS = (
    Metric(
        name="infertune_server_state",
        unit="1",
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
    with ThreadPoolExecutor(len(declared), "llama") as threads:
        for samples in list(threads.map(_of_one, declared, declared.values())):
            yield from samples


def _of_one(server: str, port: int) -> list[Sample]:
    """One server's samples.  Never raises: whatever it sends, the others keep theirs."""
    samples: list[Sample] = []
    try:
        state, text = fetch(port)
        if state == "up":
            samples = list(parse(server, text))
    except Exception:  # the libraries do not say what they raise: OverflowError is among it
        state = "not-understood"
    return [*one_of("infertune_server_state", (server,), STATES, state), *samples]


def fetch(port: int) -> tuple[str, str]:
    """State, and text of /metrics where the state is ``up``."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.sock = limited = deadline.Socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        limited.limit(_TIMEOUT_S)
        limited.connect(("127.0.0.1", port))
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        body = answer.read(_MAX_BYTES + 1)
    except TimeoutError:
        return "timeout", ""
    except OSError:
        return "unreachable", ""
    except http.client.HTTPException:
        return "not-understood", ""
    finally:
        connection.close()
    if len(body) > _MAX_BYTES:
        return "not-understood", ""
    # 501: started without --metrics; 503: the model is still loading; 401: it wants an API key.
    named = {200: "up", 401: "denied", 403: "denied", 404: "no-metrics", 501: "no-metrics"}
    named[503] = "loading"
    return named.get(answer.status, "not-understood"), body.decode("utf-8", "replace")


def parse(server: str, text: str) -> Iterable[Sample]:
    """The known metrics of a page.  Raises ValueError where it is no page of metrics."""
    known = {f"llamacpp:{name}": f"infertune_llama_{name}" for name, *_ in _KNOWN}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = known.pop(sample.name, None)
            if name and not sample.labels:
                yield Sample(name, (server,), sample.value)


LLAMA = Collector(
    id="llama",
    summary="llama-server's own metrics, by declared server.",
    metrics=METRICS,
    read=read,
    timeout_s=4.0,
)
