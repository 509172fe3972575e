# SPDX-License-Identifier: Apache-2.0
"""An adopted unit whose port and engine nobody can read in its ExecStart=."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infertune.base.errors import UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.servers.adopted import Wanted
from infertune.servers.declaration import Foreign
from infertune.servers.store import find_declaration
from infertune.service.api import _asked
from infertune.service.keeper import Choice
from infertune.service.serving import Asked, Serving
from support import desired as desired_knobs
from unit.test_adopting import Manager, state, wanted, world

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


def test_starts_are_judged_until_nobody_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = serving(tmp_path, monkeypatch)

    def adopt(asked: Asked, unit: str = "box.service", user: str | None = None) -> Foreign:
        asyncio.run(one.adopt("box", unit, CHOICE, user, asked=asked))
        found = find_declaration(Root(tmp_path), "box")
        assert isinstance(found, Foreign)
        return found

    assert adopt(Asked(admission="warn")).admission == "warn"
    found = adopt(Asked(memory=1 << 30))
    assert (found.admission, found.memory) == ("warn", 1 << 30)
    assert adopt(Asked()) == found
    assert adopt(Asked(admission="refuse")).memory == 1 << 30
    found = adopt(Asked(admission="off"))
    assert (found.admission, found.memory) == (None, None)
    with pytest.raises(UsageError, match="only where its starts are judged"):
        adopt(Asked(memory=1))
    with pytest.raises(UsageError, match=r"box\.scope is not started by systemd"):
        adopt(Asked(admission="warn"), "box.scope")
    with pytest.raises(UsageError, match="only starts of the system's units"):
        adopt(Asked(admission="warn"), user="1000")


def test_the_step_is_part_of_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Serving(Root(tmp_path), None)  # type: ignore[arg-type]
    monkeypatch.setattr(one, "_desired", lambda _: desired_knobs("quiet", {}))
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    plain, judged = (
        one._wanted(Foreign("box", "quiet", "box.service", admission=word))
        for word in (None, "warn")
    )
    assert "ExecStartPre" not in plain.directives
    assert judged.directives["ExecStartPre"] == "-/usr/bin/python3 -I -m infertune.admit box"


def test_a_declaration_of_etc_has_its_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "etc/infertune/servers.d/box.toml"
    file.parent.mkdir(parents=True)
    file.write_text('profile = "quiet"\nunit = "box.service"\nport = 1234\n')
    one = serving(tmp_path, monkeypatch)
    asyncio.run(one.adopt("box", "box.service", CHOICE))
    with pytest.raises(UsageError, match=r"box\.toml: what is said of it stands there"):
        asyncio.run(one.adopt("box", "box.service", CHOICE, asked=Asked(8000)))


def test_what_a_caller_may_not_say() -> None:
    assert _asked(0, "") == Asked()
    assert _asked(65535, "vllm") == Asked(65535, "vllm")
    assert _asked(0, "", "refuse", 1 << 30) == Asked(admission="refuse", memory=1 << 30)
    with pytest.raises(UsageError, match="not an admission"):
        _asked(0, "", "root")
    with pytest.raises(UsageError, match="no machine has so much"):
        _asked(0, "", "warn", 1 << 60)
    with pytest.raises(UsageError, match="not a port"):
        _asked(65536, "")
    for engine in ("llama", "../x", "ollama\n"):
        with pytest.raises(UsageError, match="not an engine"):
            _asked(0, engine)


def test_what_is_judged_is_adopted_first_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared_in = tmp_path / "etc/infertune/servers.d"
    declared_in.mkdir(parents=True)
    for name, more in (
        ("bad", "admission = 7"),
        ("judged", 'admission = "refuse"'),
        ("plain", ""),
    ):
        text = f'profile = "quiet"\nbackend = "cpu"\nunit = "{name}.service"\n{more}\n'
        (declared_in / f"{name}.toml").write_text(text)
    one = serving(tmp_path, monkeypatch)
    adopted: list[str] = []

    async def adopt(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        adopted.append(name)
        return {"unit": f"{name}.service", "notes": []}

    async def states(_: str) -> dict[str, str]:
        return {}

    monkeypatch.setattr(one._adopting, "adopt", adopt)
    monkeypatch.setattr(one, "_systemd", SimpleNamespace(states=states))
    [problem] = asyncio.run(one.adopt_judged())
    assert problem.startswith("server bad: ")
    assert adopted == ["judged"]
    asyncio.run(one.start_declared())
    assert adopted == ["judged", "plain"]


# -- the step before its start ---------------------------------------------------------------

STEP = "-/usr/bin/python3 -I -m infertune.admit box"


def judged() -> Wanted:
    one = wanted()
    return replace(one, directives={**one.directives, "ExecStartPre": STEP})


def test_the_step_is_in_the_drop_in_until_it_is_given_back(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)
    planned = asyncio.run(adopting.plan("box", "ollama.service", judged()))
    [row] = [each for each in planned["items"] if each["property"] == "ExecStartPre"]
    assert (row["wanted"], row["before"], row["when"]) == (STEP, None, "next start")
    asyncio.run(adopting.adopt("box", "ollama.service", judged()))
    file = tmp_path / "run/systemd/system/ollama.service.d/zz-infertune.conf"
    assert f"\nExecStartPre={STEP}\n" in file.read_text()
    # Another adoption, without it, takes it away; the last word counts.
    asyncio.run(adopting.adopt("box", "ollama.service", wanted()))
    assert "ExecStartPre" not in file.read_text()
    asyncio.run(adopting.adopt("box", "ollama.service", judged()))
    assert asyncio.run(adopting.give_back("box")) == []
    assert state(manager) == before


def test_where_infertune_is_not_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)

    async def rooted(self: Manager, unit: str) -> dict[str, Any] | None:
        about = await known(self, unit)
        return about and {**about, "RootDirectory": "/srv/root"}

    known = Manager.unit
    monkeypatch.setattr(Manager, "unit", rooted)
    for work in (adopting.plan, adopting.adopt):
        with pytest.raises(UsageError, match="RootDirectory=/srv/root, in which infertune is not"):
            asyncio.run(work("box", "ollama.service", judged()))
    assert state(manager) == before
    asyncio.run(adopting.adopt("box", "ollama.service", wanted()))
