# SPDX-License-Identifier: Apache-2.0
"""An adopted unit whose port and engine nobody can read in its ExecStart=."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import UsageError
from infertune.base.root import Root
from infertune.servers.adopted import Wanted
from infertune.servers.declaration import Foreign
from infertune.servers.store import find_declaration
from infertune.service.api import _asked
from infertune.service.keeper import Choice
from infertune.service.serving import Asked, Serving

CHOICE = Choice("quiet", "cpu")


def serving(base: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    found = Serving(Root(base), None)  # type: ignore[arg-type]

    async def adopt(_name: str, unit: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"unit": unit, "notes": []}

    monkeypatch.setattr(found._adopting, "adopt", adopt)
    monkeypatch.setattr(found, "_wanted", lambda _: Wanted("quiet", "cpu"))
    return found


def declared(base: Path) -> tuple[int | None, str | None]:
    found = find_declaration(Root(base), "box")
    assert isinstance(found, Foreign)
    return found.port, found.engine


def test_what_is_said_is_kept_until_something_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = serving(tmp_path, monkeypatch)

    def adopt(asked: Asked) -> None:
        asyncio.run(one.adopt("box", "box.service", CHOICE, asked=asked))

    adopt(Asked())
    assert declared(tmp_path) == (None, None)
    adopt(Asked(11434, "ollama"))
    assert declared(tmp_path) == (11434, "ollama")
    adopt(Asked())  # another profile, say
    assert declared(tmp_path) == (11434, "ollama")
    adopt(Asked(8000))
    assert declared(tmp_path) == (8000, "ollama")


def test_a_declaration_of_etc_has_its_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "etc/infertune/servers.d/box.toml"
    file.parent.mkdir(parents=True)
    file.write_text('profile = "quiet"\nunit = "box.service"\nport = 1234\n')
    one = serving(tmp_path, monkeypatch)
    asyncio.run(one.adopt("box", "box.service", CHOICE))
    with pytest.raises(UsageError, match=r"box\.toml: its port and engine stand there"):
        asyncio.run(one.adopt("box", "box.service", CHOICE, asked=Asked(8000)))


def test_what_a_caller_may_not_say() -> None:
    assert _asked(0, "") == Asked()
    assert _asked(65535, "vllm") == Asked(65535, "vllm")
    with pytest.raises(UsageError, match="not a port"):
        _asked(65536, "")
    for engine in ("llama", "../x", "ollama\n"):
        with pytest.raises(UsageError, match="not an engine"):
            _asked(0, engine)
