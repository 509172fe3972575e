# SPDX-License-Identifier: Apache-2.0
"""infertune as tools of an agent: what it may ask for, and what it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
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
    "goal": "latency",
    "minutes": 20,
    "resume": "/tmp/run",
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
    for wrong in ("0s", "29s", "61min", "2h", "1000s", "3٣s"):
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


ONCE = """
import os, sys, time
path = {path!r}
try:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(600)
except KeyboardInterrupt:
    try:
        while not os.path.exists(path + ".go"):
            time.sleep(0.01)
        open(path + ".back", "w").close()
    except KeyboardInterrupt:
        open(path + ".cut-short", "w").close()
"""
HOST = """
import sys
from infertune.cli import main, mcp
mcp.PROGRAM = (sys.executable, "-c", {stub!r})
sys.exit(main.main(["mcp"]))
"""
HELLO = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}


def spoken(method: str, params: Any, **more: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **more}).encode()


def started(script: str, **streams: Any) -> subprocess.Popen[bytes]:
    """A program of its own, as a client or a terminal has it."""
    return subprocess.Popen(
        [sys.executable, "-B", "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
        start_new_session=True,
        **{"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, **streams},
    )


def wait_for(path: Path) -> str:
    until = time.monotonic() + GENEROUS_S
    while not (path.exists() and path.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_was_asked_for_and_once(tmp_path: Path, number: int) -> None:
    """A client that never speaks again does not keep it; Ctrl-C goes to the whole group."""
    path = tmp_path / "pid"
    with started(HOST.format(stub=ONCE.format(path=str(path)))) as host:
        assert host.stdin
        assert host.stdout
        assert host.stderr
        lines = (
            spoken("initialize", HELLO, id=1),
            spoken("notifications/initialized", {}),
            spoken("tools/call", {"name": "bench", "arguments": {}}, id=2),
        )
        host.stdin.write(b"\n".join(lines) + b"\n")
        host.stdin.flush()
        asked = int(wait_for(path))
        assert os.getpgid(asked) != host.pid
        os.killpg(host.pid, number)
        Path(f"{path}.go").touch()
        assert host.wait(GENEROUS_S) == 128 + number
        assert host.stderr.read() == b""
    assert Path(f"{path}.back").exists()
    assert not Path(f"{path}.cut-short").exists()


@pytest.mark.parametrize(
    ("script", "said", "streams", "code", "error"),
    [
        ("", b"x" * 3000, {}, 3, "a message is longer than 1000 B"),
        ("sys.stdin = None", b"", {}, 2, "one of them is closed"),
        ("sys.stdout = None", b"", {}, 2, "one of them is closed"),
        ("sys.modules['mcp'] = None", b"", {}, 2, "needs the MCP SDK"),
        ("", spoken("initialize", HELLO, id=1), {"stdout": "/dev/full"}, 3, "No space left"),
        ("", b'{\n\xff\n\nnull\n[]\n{"jsonrpc": "2.0", "id": 1}', {}, 0, ""),
    ],
)
def test_a_fault_of_its_streams_is_one_line(
    script: str, said: bytes, streams: dict[str, str], code: int, error: str
) -> None:
    before = f"import sys\nfrom infertune.cli import mcp\nmcp.MAX_MESSAGE = 1000\n{script}\n"
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(open(path, "wb")) for name, path in streams.items()}
        host = stack.enter_context(started(before + HOST.format(stub="pass"), **opened))
        _, errors = host.communicate(said, GENEROUS_S)
    assert host.returncode == code
    told = errors.decode()
    assert error in told
    assert "bug" not in told
    assert "Traceback" not in told
    assert len([line for line in told.splitlines() if line.startswith("infertune: ")]) <= 1


def test_a_client_that_reads_nothing_more_is_no_fault() -> None:
    with started(HOST.format(stub="pass")) as host:
        assert host.stdin
        assert host.stdout
        assert host.stderr
        host.stdout.close()
        host.stdin.write(spoken("initialize", HELLO, id=1) + b"\n")
        host.stdin.close()
        assert host.wait(GENEROUS_S) == 0
        assert host.stderr.read() == b""


def test_messages_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "messages"
    file.write_bytes(spoken("initialize", HELLO, id=1) + b"\n")
    with file.open("rb") as stdin, started(HOST.format(stub="pass"), stdin=stdin) as host:
        out, errors = host.communicate(timeout=GENEROUS_S)
    assert host.returncode == 0, errors
    assert json.loads(out)["result"]["serverInfo"]["name"] == "infertune"


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
