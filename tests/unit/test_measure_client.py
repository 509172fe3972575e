# SPDX-License-Identifier: Apache-2.0
"""What a client sees of a server: times of each token, what was cached, and no prompt twice."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from infertune.base.errors import Failed, UsageError
from infertune.measure.client import (
    Target,
    Timed,
    base_of,
    busy_slots,
    find_out,
    generate,
    ids_of,
)
from infertune.measure.prompts import Prompts, text
from talking_server import Canned, talking

PROPS = {
    "build_info": "b11669-Debian",
    "total_slots": 4,
    "default_generation_settings": {"n_ctx": 8192},
}
TIMINGS = {"cache_n": 3, "prompt_n": 509, "prompt_ms": 250.0, "predicted_n": 3}
ANSWER: tuple[dict[str, Any], ...] = (
    {"content": " a", "tokens": [5], "stop": False},
    {"content": "", "tokens": [6], "stop": False},
    {"content": " b c", "tokens": [7, 8], "stop": False},
    {"content": "", "tokens": [], "stop": True, "timings": TIMINGS},
)


@pytest.fixture
def server() -> Iterator[Canned]:
    with talking() as one:
        yield one


def llama(server: Canned) -> Target:
    return Target(server.url, "llama-server", build="b11669")


def test_every_token_has_its_time(server: Canned) -> None:
    server.events, server.pause_s = ANSWER, 0.01
    found = generate(llama(server), [1, 2, 3], 4, deadline_s=400)
    assert (found.tokens, found.prompt_tokens, found.cached_tokens) == (4, 512, 3)
    assert len(found.times_s) == 3
    assert 0 < found.ttft_s < found.latency_s
    assert found.tpot_s == pytest.approx((found.latency_s - found.ttft_s) / 3)
    assert found.prefill_per_s == pytest.approx(509 / 0.25)
    path, body = server.asked
    assert path == "/completion"
    assert (body["prompt"], body["n_predict"], body["ignore_eos"]) == ([1, 2, 3], 4, True)
    assert body["cache_prompt"] is False
    assert "model" not in body


def test_another_engine_is_asked_as_openai_has_it(server: Canned) -> None:
    usage = {
        "completion_tokens": 4,
        "prompt_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    server.events = (
        {"choices": [{"text": "a"}]},
        {"choices": [{"text": " b c"}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": usage},
    )
    server.pause_s = 0.01
    target = Target(server.url, "openai", "m", key="secret-key-of-mine")
    found = generate(target, "a prompt", 4, deadline_s=400)
    assert (found.tokens, found.prompt_tokens, found.cached_tokens) == (4, 20, 5)
    assert found.prefill_per_s == pytest.approx(15 / found.ttft_s)
    path, body = server.asked
    assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "m", 4)
    assert server.heads["Authorization"] == "Bearer secret-key-of-mine"


def test_one_token_has_no_time_per_token() -> None:
    assert Timed((0.5,), 1, None, None).tpot_s is None
    assert Timed((0.5, 0.5), 2, None, None).tpot_s is None
    assert Timed((0.5,), 1, None, None).prefill_per_s is None


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ((), "broke off"),
        (ANSWER[:2], "broke off"),
        ((ANSWER[-1],), "no token"),
        (({"error": {"message": "too long"}},), "too long"),
        (({"choices": 5},), "not one of"),
    ],
)
def test_an_answer_that_is_none(events: Any, why: str, server: Canned) -> None:
    server.events = events
    with pytest.raises(Failed, match=why):
        generate(llama(server), "x", 4, deadline_s=400)


def test_a_server_that_dawdles_is_given_up(server: Canned) -> None:
    """It sends often enough that no single wait is too long."""
    server.events, server.pause_s = ANSWER[:1] * 1000, 0.02
    with pytest.raises(Failed, match=r"no whole answer in 0\.2 s"):
        generate(llama(server), "x", 4, deadline_s=0.2)


def test_what_a_server_is_it_says_itself(server: Canned) -> None:
    server.pages["/props"] = PROPS
    found = find_out(server.url)
    assert (found.api, found.build, found.context) == ("llama-server", "b11669-Debian", 8192)
    assert (found.model, found.slots) == ("gpt-oss-20b", 4)
    del server.pages["/props"]
    assert find_out(server.url) == Target(server.url, "openai", "gpt-oss-20b")


def test_a_router_has_to_be_told_which_model(server: Canned) -> None:
    server.pages["/props"] = {"role": "router", "build_info": "b11669"}
    server.models = {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(UsageError, match="has these models: a, b"):
        find_out(server.url)
    with pytest.raises(UsageError, match="no model 'c'"):
        find_out(server.url, "c")
    found = find_out(server.url, "b")
    assert (found.api, found.model) == ("llama-server", "b")
    server.events = ANSWER
    generate(found, "x", 4, deadline_s=400)
    assert server.asked[1]["model"] == "b"


def test_a_server_that_wants_a_key_says_so(server: Canned) -> None:
    server.pages["/props"] = (401, {"error": {"message": "Invalid API Key"}})
    with pytest.raises(Failed, match=r"answered 401.*Invalid API Key"):
        find_out(server.url)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(Failed, match=re.escape(f"[Errno {errno.ECONNREFUSED}]")):
        find_out(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("localhost:8080/v1/", "http://localhost:8080"),
        ("https://box.lan/v1", "https://box.lan"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_an_address(given: str, base: str) -> None:
    assert base_of(given) == base


@pytest.mark.parametrize("given", ["ftp://x", "http://", "http://x/a/b", "http://x:99999999", ""])
def test_no_address(given: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        base_of(given)


def test_ids_are_the_servers(server: Canned) -> None:
    server.pages["/tokenize"] = {"tokens": [1, 2, 3]}
    assert ids_of(llama(server), "a b c") == [1, 2, 3]
    assert server.asked[1] == {"content": "a b c", "add_special": True}
    for odd in ({"tokens": []}, {"tokens": ["x"]}, {}, [1]):
        server.pages["/tokenize"] = odd
        assert ids_of(llama(server), "a") is None
    assert ids_of(Target(server.url, "openai", "m"), "a") is None


def test_requests_of_others_are_counted_where_told(server: Canned) -> None:
    target = Target(server.url, "llama-server", slots=2)
    assert busy_slots(target) is None
    server.pages["/slots"] = [{"id": 0, "is_processing": True}, {"id": 1, "is_processing": False}]
    assert busy_slots(target) == 1
    server.pages["/slots"] = (501, {"error": {}})
    assert busy_slots(target) is None


def test_no_prompt_is_like_another() -> None:
    prompts = Prompts(7)
    numbers = [*prompts.take(3), *prompts.take(2)]
    assert numbers == [0, 1, 2, 3, 4]
    texts = [text(7, number, 300) for number in numbers] + [text(8, 0, 300)]
    assert len({each[:12] for each in texts}) == len(texts), "not even how they begin"
    assert text(7, 1, 300) == texts[1]
    assert abs(len(texts[0].split()) - 302) < 2
