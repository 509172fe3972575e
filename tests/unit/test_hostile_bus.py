# SPDX-License-Identifier: Apache-2.0
"""What one user can do to the daemon over the bus, and to those who need it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast import Message, MessageFlag, MessageType  # noqa: E402
from dbus_fast.aio import MessageBus  # noqa: E402

from infertune.base.errors import Busy, Failed, InfertuneError, NotPermitted  # noqa: E402
from infertune.service import authority, log  # noqa: E402
from infertune.service.authority import MAX_QUESTIONS, Authority  # noqa: E402
from infertune.service.callers import (  # noqa: E402
    MAX_CALLS,
    MAX_CALLS_OF_ONE,
    MAX_KNOWN,
    MAX_UNKNOWN,
    Callers,
)
from infertune.service.calls import Questions, Refused, Remote, call  # noqa: E402
from infertune.service.guarded import (  # noqa: E402
    MAX_MESSAGE,
    MAX_OTHER,
    MAX_REPLY,
    SIGNATURES,
    Guard,
    GuardedBus,
)
from infertune.service.log import MAX_DEBUG_LINES, MAX_LINE, MAX_LINES  # noqa: E402
from infertune.service.names import (  # noqa: E402
    ACTION_APPLY,
    ACTION_READ,
    BUS_NAME,
    ERROR,
    INTERFACE,
    OBJECT_PATH,
)
from support import build  # noqa: E402
from unit.test_service import (  # noqa: E402
    CALLS,
    REPOSITORY,
    World,
    ask,
    bus_address,  # noqa: F401
    close,
    properties,
    scenario,
)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")}

HOSTILE = "Version\n<1>kernel: Out of memory: root login by a user\n\x1b[2J\x1b]0;pwned\x07\r\u2028"


@contextlib.asynccontextmanager
async def daemon(base: Path, address: str, *options: str) -> AsyncIterator[tuple[int, MessageBus]]:
    """A daemon of its own process, whose standard error is ``base/err``, and a caller."""
    (base / "machine").mkdir()
    build(base / "machine")
    program = (
        "from infertune.base.root import Root; from infertune.service.daemon import main; "
        f"raise SystemExit(main(Root({str(base / 'machine')!r})))"
    )
    environment = {**ENVIRONMENT, "DBUS_SYSTEM_BUS_ADDRESS": address}
    with (base / "err").open("wb") as err:
        command = [sys.executable, "-c", program, *options]
        process = subprocess.Popen(command, env=environment, stderr=err)
    bus = await MessageBus(bus_address=address).connect()
    try:
        while not await _has_owner(bus, BUS_NAME):
            assert process.poll() is None, (base / "err").read_text()
            await asyncio.sleep(0.05)
        yield process.pid, bus
    finally:
        await close(bus)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 0


async def _has_owner(bus: MessageBus, name: str) -> bool:
    reply = await bus.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="NameHasOwner",
            signature="s",
            body=[name],
        )
    )
    assert reply is not None
    return reply.body == [True]


def assert_lines(text: bytes) -> list[str]:
    """Every line begins with a priority, is of a bounded length, and can move no cursor."""
    assert text.endswith(b"\n")
    lines = text.decode().split("\n")[:-1]
    for line in lines:
        assert re.match("<[2-7]>[A-Za-z]", line), line
        assert line.isprintable(), line
        assert len(line) <= MAX_LINE + 3
    return lines


def test_nobody_writes_lines_of_root(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def scene() -> None:
        async with daemon(tmp_path, bus_address) as (_, bus):
            for member, body in (
                ("Get", [INTERFACE, HOSTILE]),
                ("Get", [HOSTILE, "Version"]),
                *[("GetAll", [HOSTILE + "x" * 60_000])] * 100,
            ):
                for flags in (MessageFlag.NO_REPLY_EXPECTED, MessageFlag.NONE):
                    await bus.send(
                        Message(
                            destination=BUS_NAME,
                            path=OBJECT_PATH,
                            interface="org.freedesktop.DBus.Properties",
                            member=member,
                            signature="s" * len(body),
                            body=body,
                            flags=flags,
                        )
                    )
                if member == "GetAll":
                    await ask(bus, "Status")  # more than 128 at a time the bus refuses

    asyncio.run(asyncio.wait_for(scene(), 120))
    lines = assert_lines((tmp_path / "err").read_bytes())
    assert len(lines) < MAX_LINES
    assert any("was dropped" in line or "were dropped" in line for line in lines)


def test_each_call_is_logged_where_that_was_asked_for(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    async def calls(address: str, base: Path, *options: str) -> list[str]:
        base.mkdir()
        async with daemon(base, address, *options) as (_, bus):
            profiles = base / "machine/etc/infertune/profiles"
            profiles.mkdir(parents=True)
            (profiles / "low.toml").write_text('description = "x"\n[now]\nvm.swappiness = 1\n')
            await ask(bus, "Status")
            cookie = await ask(bus, "Hold", "sss", "low", "cpu", "secret reason")
            await ask(bus, "Release", "s", cookie)
            with pytest.raises(RuntimeError, match="not a profile name"):
                await ask(bus, "Plan", "ssas", HOSTILE, "cpu", [])
            await properties(bus)
            me, uid = bus.unique_name, os.geteuid()
        lines = assert_lines((base / "err").read_bytes() or b"<7>x\n")
        assert not [line for line in lines if cookie in line or "secret" in line]
        if options:
            assert f"<7>Status of {me}, uid {uid}: done" in lines
            assert f"<7>turn done, held: low (cpu), held by {me}" in lines
            assert "<7>turn done, idle" in lines
            assert any(
                line.startswith(f"<7>Plan of {me}, uid {uid}: {ERROR}.InvalidArgument: ")
                for line in lines
            )
            assert f"<7>org.freedesktop.DBus.Properties.GetAll of {me}" in lines
        return lines

    with_it = asyncio.run(asyncio.wait_for(calls(bus_address, tmp_path / "a", "--debug"), 60))
    assert len(with_it) > 5
    without = asyncio.run(asyncio.wait_for(calls(bus_address, tmp_path / "b"), 60))
    assert without == ["<7>x"]


def test_lines_for_debugging_have_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    asked = 0

    def text() -> str:
        nonlocal asked
        asked += 1
        return HOSTILE + "x" * 60_000

    log.debug(text)
    assert not asked, "off"
    log.log_debug()
    try:
        for _ in range(MAX_DEBUG_LINES + 500):
            log.debug(text)
    finally:
        log._debug = None
    assert asked == MAX_DEBUG_LINES
    assert len(assert_lines(capsys.readouterr().err.encode())) == MAX_DEBUG_LINES


OF_LIBRARIES = f"""
import asyncio, logging, warnings
from infertune.service.log import listen_to_libraries

listen_to_libraries()
hostile = {HOSTILE!r}

class Lost:
    def __del__(self):
        raise ValueError(hostile)

async def broken():
    raise ValueError(hostile)

async def work():
    task = asyncio.create_task(broken())
    await asyncio.sleep(0.01)
    del task

asyncio.run(work())
asyncio.new_event_loop().call_exception_handler(dict(message=hostile))
warnings.warn(hostile)
logging.error("%d", hostile)
logging.getLogger(hostile).critical("x")
del (lost := [Lost()])[0]
raise ValueError(hostile)
"""


def test_what_libraries_log_is_one_line_each() -> None:
    command = [sys.executable, "-c", OF_LIBRARIES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
    lines = assert_lines(done.stderr)
    assert len(lines) >= 6
    assert lines[-1].startswith("<2>a bug: ValueError (<string>:")


MIB = 2**20


def variants(size: int, serial: int) -> bytes:
    """A call with ``size`` bytes of variants, each of them an object when unpacked."""
    message = Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=INTERFACE,
        member="Status",
        signature="ay",
        body=[b"\x01y\0\7" * (size // 4)],
        serial=serial,
    )
    # An array of bytes lies as one of variants does, and is made in no time.
    return bytes(message._marshall(False)).replace(b"\x02ay\0", b"\x02av\0", 1)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1]) // 1024


def test_what_is_too_long_is_not_unpacked(tmp_path: Path, bus_address: str) -> None:  # noqa: F811
    async def scene() -> None:
        async with daemon(tmp_path, bus_address) as (pid, bus):
            await ask(bus, "Status")
            flooder = await MessageBus(bus_address=bus_address).connect()
            cpu, peak = cpu_s(pid), peak_mib(pid)
            sizes = (8 * MIB, 8 * MIB, *[60_000] * 100)
            last = Message(
                destination=BUS_NAME,
                path=OBJECT_PATH,
                interface=INTERFACE,
                member="Status",
                serial=2000,
            )
            sent = [variants(size, serial) for serial, size in enumerate(sizes, 1000)]
            data = b"".join([*sent, last._marshall(False)])
            answered = asyncio.Event()

            def hear(message: Message) -> None:
                if message.reply_serial == last.serial:
                    answered.set()

            flooder.add_message_handler(hear)
            # Not through dbus-fast, which gives up where the socket takes nothing at the moment.
            loop = asyncio.get_running_loop()
            sending = asyncio.create_task(loop.sock_sendall(flooder._sock, data))
            # Another is answered meanwhile; the flooder itself after all that it sent before.
            await asyncio.wait_for(ask(bus, "Status"), 30)
            await sending
            await answered.wait()
            assert cpu_s(pid) - cpu < 0.6
            assert peak_mib(pid) - peak < 32
            await close(flooder)

    asyncio.run(asyncio.wait_for(scene(), 150))
    lines = assert_lines((tmp_path / "err").read_bytes())
    assert sum("dropped" in line for line in lines) == 1, "one in a minute"


def frame(
    length: int, kind: int = 1, order: str = "<", signature: bytes = b"ssas", flags: int = 0
) -> bytes:
    """A message of ``length`` bytes, as far as the guard reads it."""
    fields = b"\1\1o\0" + struct.pack(order + "I", 1) + b"/\0\0\0\0\0\0\0"
    fields += b"\x08\1g\0" + bytes([len(signature)]) + signature + b"\0"
    end = 16 + len(fields) + -len(fields) % 8
    order_byte = ord("B" if order == ">" else "l")
    head = struct.pack(order + "BBBBIII", order_byte, kind, flags, 1, length - end, 1, len(fields))
    return (head + fields).ljust(end, b"\0") + bytes([length % 251]) * (length - end)


def through(pieces: Iterable[bytes]) -> bytes:
    """What a guard lets through of what arrives in pieces."""
    ours, theirs = socket.socketpair()
    passed = b""
    with ours, theirs:
        ours.setblocking(False)
        guard = Guard(ours)
        for piece in pieces:
            theirs.sendall(piece)
            while select.select([ours], [], [], 0)[0]:
                with contextlib.suppress(BlockingIOError):
                    passed += guard.recv(8192)
    return passed


@pytest.mark.parametrize("size", [1, 7, 16, 1000, 60_000])
def test_what_passes_is_whole(size: int) -> None:
    few, most = frame(64, signature=b"av"), frame(MAX_MESSAGE)
    over = frame(MAX_MESSAGE + 1, order=">")
    answer, too_much = frame(MAX_MESSAGE + 1, kind=2), frame(MAX_REPLY + 1, kind=3, order=">")
    other = frame(MAX_OTHER + 41, signature=b"av") + frame(MAX_MESSAGE, 4, ">", b"a{sv}")
    sent = few + over + other + most + answer + few + (too_much if size > 16 else b"") + most
    pieces = (sent[at : at + size] for at in range(0, len(sent), size))
    assert through(pieces) == few + most + answer + few + most


def test_types_of_the_interface_pass() -> None:
    assert {signature.encode() for _, signature, _ in CALLS} <= {b"", *SIGNATURES}
    twice = frame(MAX_OTHER + 41, signature=b"av").replace(
        b"\x01\x01o\0\x01\0\0\0", b"\x08\x01g\0\x01s\0\0"
    )
    assert through([twice + frame(64)]) == frame(64), "which of two it would be is not guessed"


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_call_that_wants_no_answer_is_dropped(order: str) -> None:
    unheard, unknown = frame(64, order=order, flags=1), frame(64, kind=5, order=order)
    signal_, asks = frame(64, 4, order, flags=1), frame(80, order=order, flags=4)
    assert through([unheard + signal_ + unknown + asks + unheard]) == signal_ + asks


def test_a_bus_that_reads_slowly_is_not_taken_for_gone(bus_address: str) -> None:  # noqa: F811
    """Who is asked much has much to send, and dbus-fast would end at the first EAGAIN."""

    async def scene() -> None:
        bus = await GuardedBus(bus_address=bus_address).connect()
        assert bus._sock is not None
        bus._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        asked = Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="NameHasOwner",
            signature="s",
            body=["a." + "x" * 200],
        )
        replies = await asyncio.gather(*[bus.call(copy.copy(asked)) for _ in range(500)])
        assert all(reply.body == [False] for reply in replies)
        await close(bus)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_nobody_keeps_the_loop_by_sending_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        guard = Guard(ours)
        read = 0
        for turn in itertools.count():
            with contextlib.suppress(BlockingIOError):
                theirs.send(frame(100) * 300)
            try:
                read += len(guard.recv(8192))
            except BlockingIOError:
                break
            assert turn < 100
        assert 0 < read <= MAX_MESSAGE
        assert guard.recv(8192), "the next turn is ours again"


def test_a_library_that_reads_past_the_guard_is_refused(
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        bus = GuardedBus(bus_address=bus_address)
        with pytest.raises(Failed, match="past the guard"):
            await bus.connect()
        await bus.wait_for_disconnect()

    monkeypatch.setattr(GuardedBus, "_authenticate", MessageBus._authenticate)
    asyncio.run(scene())


class SilentPolkit:
    """Reading is allowed; whoever wants more is asked for a password, and never types one."""

    def __init__(self) -> None:
        self.open: dict[str, Message] = {}

    def hear(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL:
            return None
        if message.member == "CancelCheckAuthorization":
            asked = self.open.pop(message.body[0])
            self.bus.send(Message.new_error(asked, "org.freedesktop.PolicyKit1.Error.Cancelled"))
            return Message.new_method_return(message)
        if message.member != "CheckAuthorization":
            return None
        _, action, _, flags, name = message.body
        if flags & 1:
            self.open[name] = message
            return True
        allowed = action == ACTION_READ
        return Message.new_method_return(message, "(bba{ss})", [(allowed, not allowed, {})])

    def answer_all(self, allowed: bool) -> None:
        for asked in self.open.values():
            self.bus.send(Message.new_method_return(asked, "(bba{ss})", [(allowed, False, {})]))
        self.open.clear()

    async def start(self, bus: MessageBus) -> None:
        self.bus = bus
        bus.add_message_handler(self.hear)
        await bus.request_name("org.freedesktop.PolicyKit1")


def test_prompts_that_nobody_answers_are_few(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        service = await MessageBus(bus_address=bus_address).connect()
        client = await MessageBus(bus_address=bus_address).connect()
        polkit = SilentPolkit()
        await polkit.start(service)
        asker = Authority(client)

        async def outcome(sender: str, action: str = ACTION_APPLY) -> type[InfertuneError] | None:
            try:
                uid = int(sender.rpartition(".")[2]) // 100
                await asker.check(sender, uid, action, interactive=True)
            except InfertuneError as error:
                return type(error)
            return None

        # Users 10 to 14, each from ten connections of its own.
        senders = [f":1.{user}{number:02}" for user in range(10, 15) for number in range(10)]
        waiting = [asyncio.create_task(outcome(sender)) for sender in senders]
        while sum(task.done() for task in waiting) < len(waiting) - 16:
            assert len(polkit.open) <= 16
            await asyncio.sleep(0.02)
        for user in range(4):
            of_one = waiting[user * 10 : user * 10 + 10]
            assert [task.done() for task in of_one] == [False] * 4 + [True] * 6
        assert all(task.done() for task in waiting[40:]), "the fifth user has no room left"
        assert {task.result() for task in waiting if task.done()} == {Busy}
        # Meanwhile, what needs no password is answered.
        assert await outcome(":1.2000", ACTION_READ) is None
        polkit.answer_all(False)
        assert {await task for task in waiting} == {Busy, NotPermitted}
        # There is room again, and what waited too long is over in polkit too.
        with monkeypatch.context() as patch:
            patch.setattr(authority, "_INTERACTION_TIMEOUT_S", 0.3)
            assert await outcome(":1.1000") is NotPermitted
        assert not polkit.open
        again = asyncio.create_task(outcome(":1.1000"))
        while not polkit.open:
            assert not again.done()
            await asyncio.sleep(0.02)
        polkit.answer_all(True)
        assert await again is None
        await close(client)
        await close(service)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_only_who_says_so_is_asked_for_a_password(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script in the background must not make a window appear that asks for a password."""

    async def user(self: Callers, sender: str) -> int:
        return 1000

    monkeypatch.setattr(Callers, "_user", user)

    async def work(world: World, bus: MessageBus) -> None:
        polkit = SilentPolkit()
        service = await world.client()
        await polkit.start(service)

        def revert(flags: MessageFlag) -> Message:
            return Message(
                destination=BUS_NAME,
                path=OBJECT_PATH,
                interface=INTERFACE,
                member="Revert",
                flags=flags,
            )

        call = asyncio.ensure_future(bus.call(revert(MessageFlag.NONE)))
        while not call.done():
            assert not polkit.open
            await asyncio.sleep(0.02)
        denied = call.result()
        assert denied is not None
        assert denied.error_name == f"{ERROR}.NotAuthorized"
        assert not polkit.open
        waiting = asyncio.ensure_future(
            bus.call(revert(MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION))
        )
        while not polkit.open:
            assert not waiting.done()
            await asyncio.sleep(0.02)
        polkit.answer_all(True)
        answer = await waiting
        assert answer is not None
        assert answer.message_type is MessageType.METHOD_RETURN
        await close(service)

    scenario(work, tmp_path, bus_address)


def test_how_long_polkit_may_take(
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A person has minutes, a program seconds: nobody waits for a polkit that says nothing."""
    asked: list[tuple[str, float]] = []
    real = Questions.call

    async def call(self: Questions, member: str, *rest: str, timeout_s: float) -> Message:
        asked.append((member, timeout_s))
        return await real(self, member, *rest, timeout_s=timeout_s)

    async def scene() -> None:
        service = await MessageBus(bus_address=bus_address).connect()
        client = await MessageBus(bus_address=bus_address).connect()
        polkit = SilentPolkit()
        await polkit.start(service)
        asker = Authority(client)
        await asker.check(":1.1", 0, ACTION_APPLY)  # root, by the bus's word
        assert asked == []
        waiting = asyncio.create_task(asker.check(":1.1", 1000, ACTION_APPLY, interactive=True))
        while not polkit.open:
            assert not waiting.done()
            await asyncio.sleep(0.02)
        polkit.answer_all(True)
        await waiting
        assert asked == [("CheckAuthorization", 5.0), ("CheckAuthorization", 120.0)]
        await close(client)
        await close(service)

    with monkeypatch.context() as patch:
        patch.setattr(Questions, "call", call)
        asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_polkit_that_hangs_takes_nobody_else_s_answers(
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bus lets a connection wait for 128 answers, also those that nobody waits for any more."""

    async def scene() -> None:
        service = await MessageBus(bus_address=bus_address).connect()
        client = await MessageBus(bus_address=bus_address).connect()
        hanging: list[Message] = []
        answers = False

        def hear(message: Message) -> Message | bool | None:
            if message.member != "CheckAuthorization" or answers:
                called = message.message_type is MessageType.METHOD_CALL
                yes = "(bba{ss})", [(True, False, {})]
                return Message.new_method_return(message, *yes) if called else None
            hanging.append(message)
            return True

        service.add_message_handler(hear)
        await service.request_name("org.freedesktop.PolicyKit1")
        asker = Authority(client)
        monkeypatch.setattr(authority, "_TIMEOUT_S", 0.05)
        for number in range(MAX_QUESTIONS + 100):
            with pytest.raises(NotPermitted, match="polkit gave no answer"):
                await asker.check(":1.1", 1000 + number, ACTION_READ)
        # What was asked in vain before it counts, and no more was asked.
        assert len(hanging) == MAX_QUESTIONS
        other = Remote(str(service.unique_name), "/x", "x.y")
        for _ in range(30):
            await call(client, other, "Anything", timeout_s=30)
        # It goes on, and so do we: the answers that are late count no more.
        answers = True
        for message in hanging:
            service.send(Message.new_method_return(message, "(bba{ss})", [(True, False, {})]))
        await call(client, other, "Anything", timeout_s=30)
        monkeypatch.setattr(authority, "_TIMEOUT_S", 30.0)
        await asker.check(":1.1", 1000, ACTION_READ)
        # Or it ends, and the bus answers for it.
        answers = False
        waiting = asyncio.create_task(asker.check(":1.1", 1000, ACTION_READ))
        while len(hanging) == MAX_QUESTIONS:
            await asyncio.sleep(0.01)
        await close(service)
        with pytest.raises(NotPermitted, match="polkit gave no answer") as refused:
            await waiting
        assert isinstance(refused.value.__cause__, Refused)
        assert not asker._polkit._open
        await close(client)

    asyncio.run(asyncio.wait_for(scene(), 60))


FLOOD = """
import asyncio, sys
from dbus_fast.aio import MessageBus

async def scene():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    bus._loop.remove_reader(bus._fd)
    bus._sock.setblocking(True)
    print("begun", flush=True)
    while True:
        bus._sock.sendall(data)

data = sys.stdin.buffer.read()
asyncio.run(scene())
"""


def test_a_deadline_is_kept_while_somebody_sends_without_an_end(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    async def scene() -> None:
        async with daemon(tmp_path, bus_address) as (pid, bus):
            profiles = tmp_path / "machine/etc/infertune/profiles"
            profiles.mkdir(parents=True)
            (profiles / "low.toml").write_text('description = "x"\n[now]\nvm.swappiness = 1\n')
            swappiness = tmp_path / "machine/proc/sys/vm/swappiness"
            command, pipe = [sys.executable, "-c", FLOOD, bus_address], subprocess.PIPE
            with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe) as flooder:
                try:
                    assert flooder.stdin is not None
                    assert flooder.stdout is not None
                    await ask(bus, "Apply", "ssasu", "low", "cpu", [], 3)
                    with flooder.stdin:
                        flooder.stdin.write(variants(2 * MIB, 1000))
                    assert flooder.stdout.readline() == b"begun\n"
                    cpu, peak = cpu_s(pid), peak_mib(pid)
                    assert (await properties(bus))["State"] == "unconfirmed"
                    while swappiness.read_text() != "60\n":
                        await asyncio.sleep(0.05)
                    # Its loop was free for the timer all the time, and not busy with unpacking.
                    assert cpu_s(pid) - cpu < 0.5
                    assert peak_mib(pid) - peak < 16
                    assert flooder.poll() is None
                finally:
                    flooder.kill()
            while (await properties(bus))["State"] != "idle":
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(scene(), 50))
    assert b"dropped" in (tmp_path / "err").read_bytes()


async def turns_of_the_loop(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Crowd:
    """Calls of many users that last until they are let go."""

    def __init__(self) -> None:
        self.callers = Callers(None)  # type: ignore[arg-type]
        self.callers._ask = self._ask  # type: ignore[method-assign]
        self.asked: list[str] = []
        self.bus_answers = asyncio.Event()
        self.over = asyncio.Event()

    async def _ask(self, sender: str) -> int:
        self.asked.append(sender)
        await self.bus_answers.wait()
        return int(sender.rpartition(".")[2]) // 1000

    async def _call(self, sender: str) -> type[InfertuneError] | None:
        try:
            await self.callers.begin(sender)
        except InfertuneError as error:
            return type(error)
        await self.over.wait()
        return None

    def calls(self, count: int, sender: str) -> list[asyncio.Task[type[InfertuneError] | None]]:
        return [asyncio.create_task(self._call(sender)) for _ in range(count)]


def refused(calls: list[asyncio.Task[type[InfertuneError] | None]]) -> int:
    assert {call.result() for call in calls if call.done()} <= {Busy}
    return sum(call.done() for call in calls)


def test_calls_of_one_and_of_all_are_bounded_but_for_root() -> None:
    async def scene() -> None:
        crowd = Crowd()
        early = crowd.calls(MAX_UNKNOWN + 3, ":1.7000")
        await turns_of_the_loop()
        assert refused(early) == 3, "who it is, is not known yet"
        crowd.bus_answers.set()
        await turns_of_the_loop()
        assert refused(early) == MAX_UNKNOWN + 3 - MAX_CALLS_OF_ONE
        assert crowd.asked == [":1.7000"], "once for all of them"
        more = crowd.calls(1, ":1.7001")
        of_others = [crowd.calls(MAX_CALLS_OF_ONE, f":1.{user}000") for user in (8, 9, 10)]
        await turns_of_the_loop()
        assert refused(more) == 1, "another connection of the same user"
        assert [refused(calls) for calls in of_others] == [0, 0, 0]
        assert MAX_CALLS == 4 * MAX_CALLS_OF_ONE
        too_many, root = crowd.calls(1, ":1.11000"), crowd.calls(50, ":1.0")
        await turns_of_the_loop()
        assert refused(too_many) == 1
        of_root = crowd.calls(50, ":1.0")
        await turns_of_the_loop()
        assert refused(of_root) == 0, "root is known, and not counted"
        crowd.over.set()
        await asyncio.gather(*early, *more, *too_many, *root, *of_root)
        await asyncio.gather(*itertools.chain.from_iterable(of_others))
        assert not crowd.callers._calls
        assert not crowd.callers._unknown
        again = crowd.calls(MAX_CALLS_OF_ONE, ":1.7000")
        assert set(await asyncio.gather(*again)) == {None}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_who_called_long_ago_is_forgotten() -> None:
    async def scene() -> None:
        crowd = Crowd()
        crowd.bus_answers.set()
        for number in range(MAX_KNOWN + 100):
            await crowd.callers.begin(f":1.{number}")
        assert len(crowd.callers._users) == MAX_KNOWN
        assert len(crowd.asked) == MAX_KNOWN + 100

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_whom_the_bus_does_not_know_may_nothing() -> None:
    async def scene() -> None:
        crowd = Crowd()

        async def fails(sender: str) -> int:
            raise TimeoutError

        for _ in range(2):
            crowd.callers._ask = fails  # type: ignore[method-assign]
            with pytest.raises(NotPermitted, match="who asks"):
                await crowd.callers.begin(":1.0")
        crowd.callers._ask = crowd._ask  # type: ignore[method-assign]
        crowd.bus_answers.set()
        assert await crowd.callers.begin(":1.0") == 0, "a failure is not remembered"

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_between_two_readings_of_others_it_is_everybody_s_turn() -> None:
    async def scene() -> None:
        callers = Callers(None)  # type: ignore[arg-type]
        turn, at = 0, list[int]()

        async def reading() -> None:
            await callers.read()
            at.append(turn)

        calls = [asyncio.create_task(reading()) for _ in range(8)]
        while not all(call.done() for call in calls):
            turn += 1
            await asyncio.sleep(0)
        assert len(set(at)) == 8

    asyncio.run(asyncio.wait_for(scene(), 60))
