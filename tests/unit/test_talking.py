# SPDX-License-Identifier: Apache-2.0
"""Talking to the model: an answer is read and timed, and where others can ask is said."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gguf_files
from infertune.base.errors import Failed
from infertune.catalogue.server_settings import alias
from infertune.cli.run import _chats
from infertune.launch.client import COMPLETES_ONLY, chat, how_to_talk
from talking_server import Canned, talking


@pytest.fixture
def server() -> Iterator[Canned]:
    with talking() as one:
        yield one


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": None}]}


END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def test_a_chat_goes_through_the_template_and_counts_every_token(server: Canned) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 9}}
    server.events = (
        delta(role="assistant"), delta(reasoning_content="Hm."), delta(content="Par"),
        delta(content="is"), END, usage,
    )  # fmt: skip
    heard: list[str] = []
    answer = chat(server.url, "What is the capital of France?", 12, hear=heard.append)
    assert (answer.text, answer.tokens) == ("Paris", 9)
    assert heard == ["Par", "is"]
    assert answer.latency_s >= answer.ttft_s > 0
    path, body = server.asked
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert body["max_tokens"] == 12


def test_a_chat_that_got_no_further_than_thinking_shows_its_thoughts(server: Canned) -> None:
    server.events = (delta(reasoning_content="They "), delta(reasoning_content="ask"), END)
    answer = chat(server.url, "x", 2)
    assert (answer.text, answer.tokens) == ("They ask", 2)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ((delta(content="Par"),), "broke off"),
        ((END,), "generated no token"),
        (({"error": {"message": "too long"}},), "too long"),
    ],
)
def test_a_chat_that_fails_says_why(
    events: tuple[dict[str, Any], ...], why: str, server: Canned
) -> None:
    server.events = events
    with pytest.raises(Failed, match=why):
        chat(server.url, "x", 2)


def test_where_to_talk_is_what_the_server_says(server: Canned) -> None:
    browser, api, *shell = how_to_talk(server.url, chats=True)
    assert f"{server.url}  (in a browser)" in browser
    assert f"{server.url}/v1 " in api
    assert 'model "gpt-oss-20b"' in api
    assert len(shell) == 2


def test_a_build_without_the_page_has_no_address_for_a_browser(server: Canned) -> None:
    server.page, server.models = False, None
    api, *_ = how_to_talk(server.url)
    assert "browser" not in api
    assert api.endswith("/v1  (OpenAI, any key)")


def test_a_model_without_a_template_is_not_called_one_to_chat_with(server: Canned) -> None:
    lines = how_to_talk(server.url, chats=False)
    assert COMPLETES_ONLY in lines
    assert not [line for line in lines if "browser" in line]


@pytest.mark.parametrize(
    ("how", "door", "fields"),
    [
        ({"chats": True}, "/v1/chat/completions", {"messages"}),
        ({"chats": None, "keyed": True}, "/v1/chat/completions", {"messages"}),
        ({"chats": False}, "/v1/completions", {"prompt", "max_tokens"}),
    ],
)
def test_the_line_for_a_shell_can_be_typed(
    how: dict[str, Any], door: str, fields: set[str], server: Canned
) -> None:
    """What it says is one command for sh, and the request it makes is one that servers take."""
    told = how_to_talk(server.url, **how)
    start = next(at for at, line in enumerate(told) if line.startswith("  shell"))
    end = next(at for at in range(start, len(told)) if not told[at].endswith("\\"))
    command = told[start : end + 1]
    assert max(map(len, command)) <= 80
    words = shlex.split("\n".join(command))[1:]
    assert words[:2] == ["curl", f"{server.url}{door}"]
    assert json.loads(words[words.index("--json") + 1]).keys() == fields
    assert ("Authorization: Bearer KEY" in words) == how.get("keyed", False)


def test_whether_a_file_has_a_chat_template(tmp_path: Path) -> None:
    about, tensors = {"general.architecture": "llama"}, [gguf_files.Spec("a", (32,), "f32")]
    long = "{{ x }}" * 5000
    chats = gguf_files.write(tmp_path / "it", {**about, "tokenizer.chat_template": long}, tensors)
    completes = gguf_files.write(tmp_path / "base", about, tensors)
    (tmp_path / "odd").write_bytes(b"GGUF" + bytes(100))
    assert _chats(str(chats)) is True
    assert _chats(str(completes)) is False
    assert _chats(str(tmp_path / "odd")) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/srv/models/gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b-mxfp4"),
        ("kimi-Q2_K-00001-of-00009.gguf", "kimi-Q2_K"),
        ("/m/a,b.gguf", "a_b"),
    ],
)
def test_the_name_that_clients_see(path: str, name: str) -> None:
    assert alias(path) == name
