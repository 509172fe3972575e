# SPDX-License-Identifier: Apache-2.0
"""The daemon on a bus of its own, as the product sets it up, under whoever means it harm.

By itself some seconds of each attack; with --thorough all of it, and what it measured:

    scripts/test host --thorough -k hostile_bus
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import hostile_senders
from hostile_senders import FLOODS, SHAPES, SIGNALS

pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast.aio import MessageBus

from infertune.service.calls import BUS, call
from infertune.service.keeper import boottime
from infertune.service.log import MAX_LINES
from infertune.service.names import BUS_NAME, ROOT_NAME
from unit.test_hostile_bus import SilentPolkit, assert_lines, cpu_s, daemon, peak_mib
from unit.test_service import REPOSITORY, ask, bus_of, close

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.timeout(1500),
    pytest.mark.real_time,
]

SENDERS = Path(hostile_senders.__file__)
USERS = (hostile_senders.NOBODY, 1)
"""Two users that every system knows; the bus takes no others."""
PROMISED_S = 2.0
"""What root may have to wait, while two senders flood, longer than for a service to which nobody
sends anything: dbus-daemon has one thread, in which a message of 31 MiB takes half a second."""
IDLE = "org.example.Idle"
MAX_MIB = 80
QUICK = ("large", "small", "status", "unheard", "log", "prompts", "signals")
"""Floods that are tried without --thorough."""

CONFIG = f"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "">
<busconfig>
  <type>system</type>
  <listen>unix:path={{directory}}/bus</listen>
  <auth>EXTERNAL</auth>
  <!-- As in the system.conf of D-Bus. -->
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
    <allow send_destination="{IDLE}"/>
  </policy>
  <policy user="root">
    <allow own="org.freedesktop.PolicyKit1"/><allow own="{IDLE}"/>
  </policy>
  <include>{REPOSITORY}/systemd/org.infertune.Infertune1.conf</include>
</busconfig>
"""


IDLE_SERVICE = f"""
import asyncio, sys
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

async def scene():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    known = set()
    async def answer(message):
        if message.sender not in known:
            await bus.call(Message(
                destination="{BUS.name}", path="{BUS.path}", interface="{BUS.interface}",
                member="GetConnectionUnixUser", signature="s", body=[message.sender]))
            known.add(message.sender)
        bus.send(Message.new_method_return(message))
    def hear(message):
        if message.member != "Status":
            return None
        answering.add(asyncio.create_task(answer(message)))
        return True
    answering = set()
    bus.add_message_handler(hear)
    await bus.request_name("{IDLE}")
    print("there", flush=True)
    await bus.wait_for_disconnect()

asyncio.run(scene())
"""
"""What infertuned does for a call, on the same bus, and nothing else."""


@contextlib.asynccontextmanager
async def idle_service(address: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IDLE_SERVICE, address), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"there\n"
        yield
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
def bus_address() -> Iterator[str]:
    """A bus with the product's own policy."""
    with bus_of(CONFIG) as address:
        yield address


def kept_waiting_s(pid: int) -> float:
    """How long a process could have run and did not, since other processes had the processors."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


class Waited:
    """Seconds of calls that root began at the same time."""

    def __init__(self) -> None:
        self.held: list[tuple[float, ...]] = []
        """By root's name, to a service to which nobody else sends, by the name for everybody."""
        self.new: list[tuple[float, ...]] = []
        """The first two, with a connection that is made for it."""

    def late(self) -> float:
        """How much longer infertuned kept root waiting than a service that is left in peace."""
        return max(ours - idle for ours, idle, *_ in (*self.held, *self.new))

    def __str__(self) -> str:
        most = [
            " and ".join(f"{max(column):.2f}" for column in zip(*rows, strict=True))
            for rows in (self.held, self.new)
        ]
        return (
            f"root waited, by its name and for an idle service, and by everybody's name, at most "
            f"{most[0]} s; with a new connection {most[1]} s; {self.late():.2f} s longer than "
            f"for the idle one ({len(self.held)} of each, promised {PROMISED_S:.0f} s)"
        )


class Attacked:
    """A daemon, root who needs it, and a machine on which it may do something."""

    def __init__(self, base: Path, address: str, bus: int, pid: int, root: MessageBus) -> None:
        self.base = base
        self.address = address
        self.bus = bus
        """The bus's process."""
        self.pid = pid
        self.root = root
        self.refused_by_the_bus = 0
        profiles = base / "machine/etc/infertune/profiles"
        profiles.mkdir(parents=True)
        (profiles / "low.toml").write_text('description = "test"\n[now]\nvm.swappiness = 1\n')
        self.value = base / "machine/proc/sys/vm/swappiness"

    async def send(self, user: int, *what: str) -> Counter[str]:
        """What a hostile user sends, by a process of its own; what it saw."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-B", str(SENDERS), self.address, str(user), *what),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            told, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0
        return Counter(json.loads(told))

    async def root_asks(self, to: str = ROOT_NAME, bus: MessageBus | None = None) -> float:
        """Seconds until root has an answer; raises what the answer is, if it is an error.

        A bus whose queue for a connection is full (127 MiB) refuses by itself, at once: root asks
        again.  It happens to the daemon's public name alone.
        """
        begin = boottime()
        while True:
            try:
                await ask(bus or self.root, "Status", to=to)
            except RuntimeError as error:
                if "LimitsExceeded" not in str(error) or to != BUS_NAME:
                    raise
                self.refused_by_the_bus += 1
                await asyncio.sleep(0.02)
            else:
                return boottime() - begin

    async def root_comes(self, to: str = ROOT_NAME) -> float:
        """The same for a connection that is made for it, as the command line does."""
        begin = boottime()
        bus = await MessageBus(bus_address=self.address).connect()
        try:
            await self.root_asks(to, bus)
        finally:
            await close(bus)
        return boottime() - begin

    async def root_waits(self, attack: asyncio.Future[Any]) -> Waited:
        """How long root waits as long as an attack goes on, each time for all at once."""
        found = Waited()
        while not attack.done():
            held = [self.root_asks(to) for to in (ROOT_NAME, IDLE, BUS_NAME)]
            found.held.append(tuple(await asyncio.gather(*held)))
            new = [self.root_comes(to) for to in (ROOT_NAME, IDLE)]
            found.new.append(tuple(await asyncio.gather(*new)))
            await asyncio.sleep(0.05)
        return found

    def state(self) -> dict[str, int]:
        """What must not grow."""
        return {
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
        }

    def log(self) -> list[str]:
        text = (self.base / "err").read_bytes()
        return assert_lines(text) if text else []

    def rss_mib(self) -> int:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.M)
        assert found
        return int(found[1]) // 1024


@contextlib.asynccontextmanager
async def attacked(base: Path, address: str) -> AsyncIterator[Attacked]:
    polkit = await MessageBus(bus_address=address).connect()
    await SilentPolkit().start(polkit)
    async with idle_service(address), daemon(base, address) as (pid, root):
        bus = await call(root, BUS, "GetConnectionUnixProcessID", "s", BUS.name, timeout_s=None)
        one = Attacked(base, address, bus.body[0], pid, root)
        await one.root_asks()
        yield one
        # Whatever it was: nothing is applied, held or promised, and it still works.
        status = await ask(root, "Status")
        assert status["state"] == "idle"
        assert not [note for note in status["notes"] if "held" in note]
    await close(polkit)


class Told:
    """What was measured, as lines."""

    def __init__(self, thorough: bool, capsys: pytest.CaptureFixture[str]) -> None:
        self._shown = capsys.disabled if thorough else contextlib.nullcontext

    def __call__(self, line: str) -> None:
        with self._shown():
            print(line, flush=True)


@pytest.fixture
def told(thorough: bool, capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(thorough, capsys)


@pytest.mark.parametrize("what", [*FLOODS, *SIGNALS])
def test_root_is_answered_while_two_flood(
    what: str, tmp_path: Path, bus_address: str, thorough: bool, told: Told
) -> None:
    if not thorough and what not in QUICK:
        pytest.skip("takes long: with --thorough")

    async def scene() -> None:
        async with attacked(tmp_path, bus_address) as one:
            before, cpu, of_the_bus = one.state(), cpu_s(one.pid), cpu_s(one.bus)
            busy = kept_waiting_s(one.pid)
            seconds = "10" if thorough else "1"
            flood = asyncio.gather(*[one.send(user, "flood", what, seconds) for user in USERS])
            waited = await one.root_waits(flood)
            seen = sum(await flood, Counter())
            busy = kept_waiting_s(one.pid) - busy
            told(
                f"\n{what}: {seen['sent']} sent by two, {one.refused_by_the_bus} refused by the "
                f"bus; {waited}; CPU of the bus {cpu_s(one.bus) - of_the_bus:.1f} s, of the daemon "
                f"{cpu_s(one.pid) - cpu:.1f} s, for which it waited {busy:.1f} s; peak "
                f"{peak_mib(one.pid)} MiB; {len(one.log())} lines"
            )
            assert seen["sent"]
            assert one.state() == before
            assert peak_mib(one.pid) < MAX_MIB
            assert not seen["bad"]
            if thorough:
                # On a machine with other work, what the others took is not the daemon's delay.
                assert waited.late() < PROMISED_S + busy
        assert len(one.log()) <= MAX_LINES

    asyncio.run(asyncio.wait_for(scene(), 300))


def test_a_deadline_is_kept_while_two_flood(
    tmp_path: Path, bus_address: str, thorough: bool, told: Told
) -> None:
    async def late(one: Attacked, what: str) -> float:
        """Seconds between the deadline and the original value."""
        within = 4 if thorough else 2
        await ask(one.root, "Apply", "ssasu", "low", "cpu", [], within)
        at = boottime() + within
        assert one.value.read_text() == "1\n"
        flood = asyncio.gather(*[one.send(user, "flood", what, f"{within + 2}") for user in USERS])
        while one.value.read_text() == "1\n":
            await asyncio.sleep(0.01)
        seconds = boottime() - at
        await flood
        return seconds

    async def scene() -> None:
        async with attacked(tmp_path, bus_address) as one:
            for what in ("large", "small", "status", "log") if thorough else ("small",):
                seconds = await late(one, what)
                told(f"\n{what}: put back {seconds:.2f} s after the deadline (promised 1 s)")
                assert seconds > -0.5, "boottime() was read after the daemon read it"
                if thorough:
                    assert seconds < 5

    asyncio.run(asyncio.wait_for(scene(), 300))


def test_odd_shapes_change_nothing(
    tmp_path: Path, bus_address: str, thorough: bool, told: Told
) -> None:
    async def scene() -> None:
        async with attacked(tmp_path, bus_address) as one:
            before = one.state()
            shapes = [*SHAPES, *SIGNALS]
            # One at a time it would be known which of them it was.
            at_a_time = 1 if thorough else 10
            for begin in range(0, len(shapes), at_a_time):
                what = shapes[begin : begin + at_a_time]
                await asyncio.gather(*[one.send(user, "shape", *what) for user in USERS])
                try:
                    await one.root_asks()
                except (EOFError, RuntimeError) as error:
                    raise AssertionError(f"the daemon does not answer after: {what}") from error
            assert one.state() == before
            assert peak_mib(one.pid) < MAX_MIB
            told(
                f"\n{len(SHAPES) + len(SIGNALS)} shapes; peak {peak_mib(one.pid)} MiB, {one.log()}"
            )
        assert len(one.log()) <= MAX_LINES

    asyncio.run(asyncio.wait_for(scene(), 300))


def test_noise_leaves_nothing_behind(
    tmp_path: Path, bus_address: str, thorough: bool, told: Told
) -> None:
    async def scene() -> None:
        rounds, count = (10, 5000) if thorough else (1, 1000)
        async with attacked(tmp_path, bus_address) as one:
            await asyncio.gather(*[one.send(user, "noise", "300", "0") for user in USERS])
            before, rss = one.state(), one.rss_mib()
            seen: Counter[str] = Counter()
            for number in range(rounds):
                for part in await asyncio.gather(
                    *[one.send(u, "noise", str(count), f"{number}{u}") for u in USERS]
                ):
                    seen += part
                await one.root_asks()
            told(
                f"\n{seen['sent']} random messages, {seen['new connections']} new connections: "
                f"RSS {rss} to {one.rss_mib()} MiB, peak {peak_mib(one.pid)}; {dict(seen)}"
            )
            assert one.state() == before
            assert one.rss_mib() - rss < 8
            assert not seen["bad"]
        assert len(one.log()) <= MAX_LINES + 5

    asyncio.run(asyncio.wait_for(scene(), 1400))
