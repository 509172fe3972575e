# SPDX-License-Identifier: Apache-2.0
"""The command line where infertuned does the work: what it says, and what it does not import."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast import DBusError, Message, NameFlag  # noqa: E402
from dbus_fast.aio import MessageBus  # noqa: E402
from dbus_fast.service import ServiceInterface, dbus_method  # noqa: E402

from infertune.service.api import Document, S, remember_caller  # noqa: E402
from infertune.service.names import BUS_NAME, INTERFACE, OBJECT_PATH  # noqa: E402
from infertune.service.wire import to_bus  # noqa: E402
from support import GENEROUS_S, values  # noqa: E402
from unit.test_service import (  # noqa: E402
    REPOSITORY,
    World,
    ask,
    bus_address,  # noqa: F401
    close,
    scenario,
)

HEAVY = {
    "argparse",
    "asyncio",
    "dataclasses",
    "dbus_fast",
    "infertune.engine",
    "infertune.catalogue.knobs",
    "infertune.host.machine",
    "infertune.profiles.profile",
    "infertune.base.root",
    "inspect",
    "json",
    "re",
    "typing",
}
"""What a verb that the daemon does may not cost: each takes a good part of all that it takes."""

# The lock of the daemon that a test runs is its recorded machine's, not this system's.
SCRIPT = """
import sys
before = set(sys.modules)  # what Python itself imports here, to measure coverage for example
from infertune.cli import engine
from infertune.cli.main import main
engine.owner = lambda path: "the daemon of a test"
code = main(sys.argv[1:])
print(*(set(sys.modules) - before), sep="\\n", file=open({listed!r}, "w"))
sys.exit(code)
"""


class Said(NamedTuple):
    code: int
    out: str
    error: str
    modules: set[str]


async def infertune(address: str, base: Path, *words: str) -> Said:
    """Run a verb beside a daemon, in an interpreter that has imported nothing else."""
    listed = base / "modules"
    script = SCRIPT.format(listed=str(listed))
    environment = {
        "DBUS_SYSTEM_BUS_ADDRESS": address,
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY / "daemon"),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-B", "-c", script, *words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await asyncio.wait_for(process.communicate(), GENEROUS_S)
    assert process.returncode is not None
    modules = set(listed.read_text().split()) if listed.exists() else set()
    return Said(process.returncode, out.decode(), error.decode(), modules)


def test_a_verb_of_the_daemon_costs_little(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        for words, said in (
            (["apply", "long"], "4 settings changed (5 files), 0 ok"),
            (["status"], "applied: long (cpu) since "),
            (["confirm"], "nothing waits for a confirmation"),
            (["revert"], "restored: 8 of 8"),
            (["recover"], "nothing to put back"),
        ):
            done = await infertune(bus_address, tmp_path, *words)
            assert done.code == (1 if words == ["confirm"] else 0), done
            assert said in done.out
            assert done.error == ""
            assert "infertune.service.client" in done.modules
            assert not done.modules & HEAVY
            assert (values(world.base) == original) == (words[0] in ("revert", "recover"))

    scenario(work, tmp_path, bus_address)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_asks_where_nobody_else_can(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def work(world: World, bus: MessageBus) -> None:
        assert world.daemon is not None
        heard: list[str | None] = []
        world.daemon._bus.add_message_handler(lambda message: heard.append(message.member))
        assert (await infertune(bus_address, tmp_path, "status")).out == "idle\n"
        assert "Status" in heard

    scenario(work, tmp_path, bus_address)


def test_options_reach_the_daemon(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def work(world: World, bus: MessageBus) -> None:
        def run(*words: str) -> Awaitable[Said]:
            return infertune(bus_address, tmp_path, *words)

        left_out = ["--without", "vm.swappiness", "--without", "ksm.run"]
        done = await run("apply", "long", *left_out, "--backend", "cpu", "--confirm-within", "5min")
        assert "goes back in 300 s unless you run 'infertune confirm'" in done.out
        assert values(world.base)["/proc/sys/vm/swappiness"] == "60\n"
        assert (await ask(bus, "Status"))["applied"]["confirm_by_s"] is not None
        assert (await run("confirm")).out == "confirmed\n"
        status = json.loads((await run("status", "--json")).out)
        assert status["schema"] == "infertune.status/1"
        # None, numbers, lists and dictionaries come through as they are.
        assert {"schema": "infertune.status/1", **await ask(bus, "Status")} == status
        assert status["applied"]["confirm_by_s"] is None
        assert {each["unit_bytes"] for each in status["items"]} == {None, 1024}
        assert (await run("--root", "/", "revert", "--json")).code == 0

    scenario(work, tmp_path, bus_address)


def test_a_profile_on_demand(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def work(world: World, bus: MessageBus) -> None:
        def run(*words: str) -> Awaitable[Said]:
            return infertune(bus_address, tmp_path, *words)

        original = values(world.base)
        done = await run("apply", "long", "--while-serving", "--idle", "5min")
        assert "4 settings to change while servers work (5 files), 0 ok\n" in done.out
        assert "idle for 300 s; 'infertune revert' ends this\n" in done.out
        assert (done.code, values(world.base)) == (0, original)
        done = await run("status")
        assert "idle\nwhile servers work: long (auto); they are idle\n" in done.out
        assert done.code == 0
        document = json.loads((await run("apply", "long", "--while-serving", "--json")).out)
        assert (document["schema"], document["failed"]) == ("infertune.apply/1", None)
        assert (await run("revert")).code == 0
        assert "while servers work" not in (await run("status")).out
        for words, said in (
            (["--idle", "60s"], "--idle goes with --while-serving"),
            (["--while-serving", "--confirm-within", "60s"], "exclude each other"),
            (["--while-serving", "--idle", "4s"], "--idle is 5s to 24h"),
        ):
            done = await run("apply", "long", *words)
            assert (done.code, said in done.error) == (2, True), done
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def test_what_the_daemon_refuses_is_said_as_the_engine_says_it(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        profiles = "/etc/infertune/profiles"
        there = world.root.at(profiles)
        (there / "wrong.toml").write_text('description = "x"\n[now]\nvm.swappines = 7\n')
        (there / "needs.toml").write_text(
            'description = "x"\n[now]\nvm.swappiness = 7\n'
            "ksm.run = { value = 0, required = true }\n"
        )
        for words, code, error in (
            (["nosuch"], 2, "there is no profile 'nosuch'\n  'infertune profiles' lists them.\n"),
            (["lonk"], 2, "there is no profile 'lonk'; did you mean 'long'?\n"),
            (["LONG"], 2, "'LONG' is not a profile name\n  A name is lower-case"),
            (["l\udcff"], 2, "is not a profile name"),
            (["wrong"], 2, f"{profiles}/wrong.toml:3: unknown knob 'vm.swappines'; did you mean"),
            (["long", "--without", "vm.x\x1b"], 2, "no such knob to leave out: 'vm.x\\x1b'; "),
            (["long", "--backend", "cuda"], 2, "apply: --backend: invalid choice: 'cuda'"),
            (["long", "--confirm-within", "99999h"], 2, "at the most"),
            (["needs"], 3, f"ksm.run: absent, but {profiles}/needs.toml:4 requires it"),
        ):
            done = await infertune(bus_address, tmp_path, "apply", *words)
            assert (done.code, error in done.error) == (code, True), done
            assert values(world.base) == original
        done = await infertune(bus_address, tmp_path, "apply", "needs", "--json")
        assert json.loads(done.out)["failed"].startswith("ksm.run: absent")

    scenario(work, tmp_path, bus_address)


def test_without_a_bus_or_a_daemon(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    for address, said in (
        (f"unix:path={tmp_path}/nothing", "infertune: there is no system bus\n"),
        (bus_address, "infertune: the daemon does not answer: "),
    ):
        done = asyncio.run(infertune(address, tmp_path, "status"))
        assert done.code == 5
        assert done.out == ""
        assert done.error.startswith(said)
        assert done.error.count("\n") == 1


def test_without_libsystemd(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    script = (
        "from infertune.cli import engine\nfrom infertune.cli.main import main\n"
        "from infertune.service import client\nengine.owner = lambda path: 'x'\n"
        "client._NAME = 'libnothing.so.9'\nraise SystemExit(main(['status']))"
    )

    async def run() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-B", "-c", script),
            env={"PYTHONPATH": str(REPOSITORY / "daemon"), "DBUS_SYSTEM_BUS_ADDRESS": bus_address},
            stderr=asyncio.subprocess.PIPE,
        )
        error = (await process.communicate())[1].decode()
        return process.returncode, error

    code, error = asyncio.run(run())
    assert code == 5
    assert error.startswith("infertune: libnothing.so.9 of systemd cannot be used, and infertuned ")
    assert error.count("\n") == 1


class Stranger(ServiceInterface):
    """Somebody who has the daemon's name and answers what he likes, when he likes."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__(INTERFACE)
        self._answer = answer
        self.asked = asyncio.Event()
        self.adopted: list[str] = []

    @dbus_method()
    async def Status(self) -> Document:
        self.asked.set()
        return to_bus(await self._answer())

    @dbus_method()
    async def Serve(self, name: S) -> S:
        return name

    @dbus_method()
    async def Adopt(self, unit: S, user: S, name: S, profile: S, backend: S) -> Document:
        self.adopted = [unit, user, name, profile, backend]
        about = {"unit": unit, "user": None, "name": name, "profile": profile, "backend": backend}
        return to_bus({**about, "active": True, "items": [], "notes": []})


@contextlib.asynccontextmanager
async def _in_its_place(address: str, answer: Callable[[], Any]) -> Any:
    bus = await MessageBus(bus_address=address).connect()
    stranger = Stranger(answer)
    bus.add_message_handler(remember_caller)
    bus.export(OBJECT_PATH, stranger)
    await bus.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE)
    try:
        yield stranger, bus
    finally:
        await close(bus)


def test_errors_of_others_and_signals_are_no_answer(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def play() -> None:
        async def refuse() -> Any:
            raise DBusError("org.example.Nonsense", "not \x1b[2J today")

        async with _in_its_place(bus_address, refuse) as (stranger, bus):
            done = await infertune(bus_address, tmp_path, "status")
            assert done.code == 5
            assert done.error == "infertune: the daemon does not answer: not \\x1b[2J today\n"

            async def after_a_signal() -> Any:
                bus.send(Message.new_signal(OBJECT_PATH, INTERFACE, "Anything", "s", ["x"]))
                return {
                    "state": "idle", "applied": None, "notes": [], "damaged_journals": [],
                    "items": [], "drift": [],
                }  # fmt: skip

            stranger._answer = after_a_signal
            done = await infertune(bus_address, tmp_path, "status")
            assert (done.code, done.out) == (0, "idle\n")

    asyncio.run(play())


def test_a_daemon_of_another_version(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    """What it has is asked as it knows it; what it has not is one line that says what to do."""

    async def play() -> None:
        async def nothing() -> Any:
            return {}

        async with _in_its_place(bus_address, nothing) as (stranger, _):
            unit = ("adopt", "box", "--profile", "long")
            done = await infertune(bus_address, tmp_path, *unit)
            assert (done.code, done.error) == (0, "")
            assert stranger.adopted == ["box.service", "", "box", "long", "auto"]
            done = await infertune(bus_address, tmp_path, *unit, "--port", "8000")
            assert done.code == 5
            assert done.error == (
                "infertune: the infertuned that runs is not of this version: it does not know "
                "AdoptWith\n  systemctl reload infertune replaces it, and keeps what is applied\n"
            )

    asyncio.run(play())


def test_ctrl_c_ends_the_wait(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def play() -> None:
        async def never() -> Any:
            await asyncio.Event().wait()

        async with _in_its_place(bus_address, never) as (stranger, _):
            environment = {
                "DBUS_SYSTEM_BUS_ADDRESS": bus_address,
                "PYTHONPATH": str(REPOSITORY / "daemon"),
            }
            script = (
                "from infertune.cli import engine\nfrom infertune.cli.main import main\n"
                "engine.owner = lambda path: 'x'\nraise SystemExit(main(['status']))"
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-B", "-c", script, env=environment
            )
            await asyncio.wait_for(stranger.asked.wait(), GENEROUS_S)
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), GENEROUS_S) == 130

    asyncio.run(play())


def test_the_daemon_takes_no_tls_along() -> None:
    """Also where a library of its own would: what is not there cannot be imported."""
    script = (
        "import sys; from infertune.service.start import main\n"
        "sys.argv[1:] = ['--version']; code = main()\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(code, 'asyncio.sslproto' in sys.modules, 'libssl' in maps, 'libcrypto' in maps)"
    )
    environment = {"PYTHONPATH": str(REPOSITORY / "daemon")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], env=environment, capture_output=True, check=True
    )
    assert done.stdout.split()[-4:] == [b"0", b"True", b"False", b"False"]
    unit = (REPOSITORY / "systemd/infertune.service").read_text()
    assert "-m infertune.service.start" in unit
