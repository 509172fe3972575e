# SPDX-License-Identifier: Apache-2.0
"""infertune as tools of an agent: what it may ask for, and what it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import UsageError
from infertune.cli.main import commands
from infertune.cli.parser import build_parser
from infertune.cli.tools import MAX_WORD, TOOLS, schema, words
from support import GENEROUS_S, values

REPOSITORY = Path(__file__).parents[2]
MACHINE = REPOSITORY / "tests/fixtures/strix-halo-128.snapshot"
GIVEN: dict[str, Any] = {
    "profile": "low-latency",
    "backend": "cpu",
    "model": "/srv/models/a b.gguf",
    "confirm_within": "90s",
    "url": "http://127.0.0.1:8080",
    "samples": 8,
    "against": "base",
    "budget": "5m",
    "launch_only": True,
    "busy": True,
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=lambda tool: tool.name)
def test_a_tool_is_a_command_line_that_the_verb_takes(tool: Any) -> None:
    given = {each.name: GIVEN[each.name] for each in tool.parameters}
    args = build_parser(commands()).parse_args(words(tool, given))
    assert args.json
    least = {each.name: GIVEN[each.name] for each in tool.parameters if each.required}
    build_parser(commands()).parse_args(words(tool, least))
    about = schema(tool)
    assert about["additionalProperties"] is False
    json.dumps(about)


@pytest.mark.parametrize("tool", TOOLS.values(), ids=lambda tool: tool.name)
@pytest.mark.parametrize(
    "value", ["--debug", "-h", "", "a\nb", "a\0", "x" * (MAX_WORD + 1), 1.5, None, ["a"], {}, True]
)
def test_no_argument_becomes_an_option(tool: Any, value: Any) -> None:
    for parameter in tool.parameters:
        given = {each.name: GIVEN[each.name] for each in tool.parameters if each.required}
        if (parameter.flag and value is True) or (value is None and not parameter.required):
            continue
        with pytest.raises(UsageError):
            words(tool, {**given, parameter.name: value})


def test_what_a_tool_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'profile'"):
        words(TOOLS["plan"], {"profil": "low-latency"})
    with pytest.raises(UsageError, match="has no argument '--root'"):
        words(TOOLS["status"], {"--root": "/"})


def test_nothing_is_applied_for_good() -> None:
    assert "--confirm-within=5min" in words(TOOLS["apply"], {"profile": "low-latency"})
    for wrong in ("0s", "29s", "61min", "2h", "1000s"):
        with pytest.raises(UsageError, match="confirm_within"):
            words(TOOLS["apply"], {"profile": "low-latency", "confirm_within": wrong})
    changing = {name for name, tool in TOOLS.items() if tool.changes}
    assert changing == {"apply", "confirm", "revert"}


mcp = pytest.importorskip("mcp", reason="extra 'mcp' is not installed")

from mcp import Client, StdioServerParameters  # noqa: E402

from infertune.cli import mcp as ours  # noqa: E402


def test_a_client_lists_and_calls_the_tools() -> None:
    async def work() -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")}
        program = StdioServerParameters(
            command=sys.executable,
            args=["-B", "-m", "infertune", "--root", str(MACHINE), "mcp"],
            env=environment,
        )
        async with Client(program) as client:
            listed = (await client.list_tools()).tools
            assert [tool.name for tool in listed] == list(TOOLS)
            done = await client.call_tool("plan", {"profile": "low-latency"})
            assert not done.is_error
            assert done.structured_content["document"]["schema"] == "infertune.plan/1"
            for name, given, error in (
                ("plan", {"profile": "low-latncy"}, "did you mean 'low-latency'"),
                ("plan", {"profile": "--debug"}, "'profile' is not valid"),
                ("apply", {"profile": "low-latency"}, "needs infertuned"),
                ("rm", {}, "no tool 'rm'"),
            ):
                done = await client.call_tool(name, given)
                assert done.is_error
                assert error in done.structured_content["errors"]
                assert done.structured_content["document"] is None

    asyncio.run(asyncio.wait_for(work(), GENEROUS_S))


SLEEPS = """
import os, signal, sys, time
open({path!r}, "w").write(str(os.getpid()))
try:
    time.sleep(600)
except KeyboardInterrupt:
    open({path!r} + ".back", "w").close()
"""


def test_a_client_that_goes_away_ends_what_it_asked_for(tmp_path: Path) -> None:
    """With SIGINT, as Ctrl-C would: what was set goes back."""
    path = tmp_path / "pid"

    async def work() -> None:
        program = (sys.executable, "-c", SLEEPS.format(path=str(path)))
        async with Client(ours.server(program)) as client:
            call = asyncio.create_task(client.call_tool("bench", {}))
            while not path.exists() or not path.read_text():
                await asyncio.sleep(0.01)
            call.cancel()
            while not Path(f"{path}.back").exists():
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), GENEROUS_S))


def test_an_answer_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_ANSWER", 1000)

    async def work() -> None:
        script = "import sys; sys.stdout.write('x' * 10**7); sys.stderr.write('y' * 10**6)"
        async with Client(ours.server((sys.executable, "-c", script))) as client:
            done = await client.call_tool("status", {})
            assert done.structured_content["document"] is None
            assert len(done.structured_content["errors"]) <= ours.MAX_ERRORS

    asyncio.run(asyncio.wait_for(work(), GENEROUS_S))


dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast.aio import MessageBus  # noqa: E402

from unit.test_client import SCRIPT  # noqa: E402
from unit.test_service import World, bus_address, expire, later, scenario  # noqa: E402, F401


def test_what_nobody_confirms_goes_back(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        program = (sys.executable, "-B", "-c", SCRIPT.format(listed=os.devnull))
        async with Client(ours.server(program)) as client:
            done = await client.call_tool("apply", {"profile": "long", "confirm_within": "30s"})
            assert not done.is_error, done
            assert values(world.base) != original
            later(monkeypatch, 40)
            await expire(world)
            assert values(world.base) == original
            done = await client.call_tool("confirm", {})
            assert done.structured_content["exit_code"] == 1

    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "daemon"))
    scenario(work, tmp_path, bus_address)
