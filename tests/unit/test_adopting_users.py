# SPDX-License-Identifier: Apache-2.0
"""Units of users' managers: the user's half, the chain above it, and who is believed what.

Both managers are made up as in test_adopting.py; the wire to a user's is a real socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infertune.base.errors import DeclarationError, Failed, InfertuneError, UsageError
from infertune.base.names import user_unit
from infertune.base.records import asdict, replace
from infertune.base.root import Root, Step
from infertune.servers.adopted import SYSTEM, Wanted, places_of, read_book
from infertune.servers.declaration import Foreign, declaration_text, parse_declaration
from infertune.servers.of_users import (
    MAX_ANSWER,
    Answer,
    One,
    Request,
    answer_text,
    parse_answer,
    read_request,
    write_request,
)
from infertune.servers.running import units as running_units
from infertune.servers.store import user_id
from infertune.servers.unit import of_a_user
from support import At, Counter
from unit.test_adopting import MIB, Killed, Manager, _cleaned, _killed, state, wanted

dbus = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from infertune.service import of_user  # noqa: E402
from infertune.service.adopting import Adopting  # noqa: E402
from infertune.service.client import peer  # noqa: E402
from infertune.service.users import Users  # noqa: E402

UID = 1000
CHAIN = ("user.slice", f"user-{UID}.slice", f"user@{UID}.service")
SYSTEMS = {
    "ollama.service": ("system.slice", "[Service]\nMemoryMin=1048576\n"),
    "llm.service": ("system.slice", ""),
    "system.slice": ("-.slice", ""),
    "user.slice": ("-.slice", ""),
    f"user-{UID}.slice": ("user.slice", "[Slice]\nMemoryMin=2097152\n"),
    f"user@{UID}.service": (f"user-{UID}.slice", ""),
}
OF_USER = {
    "llm.service": ("app.slice", "[Service]\nMemoryMin=1048576\n"),
    "other.service": ("app-more.slice", ""),
    "app.slice": ("-.slice", ""),
    "app-more.slice": ("app.slice", "[Slice]\nMemoryMin=4194304\n"),
}


class World:
    """The system's systemd, a user's, and the unit between them."""

    def __init__(self, base: Path, hook: Callable[[Step], int | None] | None = None) -> None:
        self.base = base
        self.hook = hook
        before: Callable[[str], object] = lambda _: hook and hook(Step("systemd", "", 0))  # noqa: E731
        self.system = Manager(base, before, SYSTEMS, SYSTEM)
        self.user = Manager(base, before, OF_USER, places_of(UID))
        self.runs = True
        self.starts = False
        self.begun: list[str] = []
        self.adopting = self.daemon()

    def daemon(self) -> Adopting:
        root = Root(self.base, hook=self.hook)
        return Adopting(root, self, Users(root, self))  # type: ignore[arg-type]

    # -- the system's systemd, as the daemon sees it

    async def unit(self, unit: str) -> dict[str, Any] | None:
        about = await self.system.unit(unit)
        if about and unit == CHAIN[2]:
            about["ActiveState"] = "active" if self.runs else "inactive"
            about["DelegateControllers"] = ["cpu", "memory", "pids"]
        return about

    async def set_properties(self, unit: str, values: Mapping[str, Any]) -> None:
        await self.system.set_properties(unit, values)

    async def reload(self) -> None:
        await self.system.reload()

    async def run(self, unit: str) -> None:
        await self.system.run(unit)

    async def states(self, unit: str) -> dict[str, str]:
        return {unit: "active"} if self.runs else {unit: "activating"} if self.starts else {}

    async def begin(self, unit: str) -> None:
        self.begun.append(unit)

    async def hear(self, unit: str) -> str | None:
        assert unit == user_unit(UID)
        root = Root(self.base, hook=self.hook)
        return answer_text(await of_user.carry_out(root, UID, self.user))

    # -- what is looked at

    def state(self) -> Any:
        return _cleaned(state(self.system)), _cleaned(state(self.user))

    def minimum(self) -> dict[str, int]:
        found = {f"user {unit}": each["MemoryMin"] // MIB for unit, each in self.user.now.items()}
        return found | {unit: each["MemoryMin"] // MIB for unit, each in self.system.now.items()}


def test_adopted_through_the_whole_chain_and_given_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.state()

    async def scene() -> None:
        await world.adopting.adopt("sys", "llm.service", wanted(8))
        done = await world.adopting.adopt("llm", "llm.service", wanted(), UID)
        minimum = world.minimum()
        assert minimum["user llm.service"] == minimum["user app.slice"] == 64
        assert minimum["user.slice"] == minimum[CHAIN[2]] == 64
        assert minimum[CHAIN[1]] == 2 + 64
        assert minimum["llm.service"] == minimum["system.slice"] == 8, "another one by that name"
        assert world.user.now["llm.service"]["AllowedCPUs"] == [], "not delegated"
        assert [each for each in done["notes"] if each.startswith("AllowedCPUs: user@1000")]
        text = (tmp_path / f"run/systemd/system/{CHAIN[2]}.d/zz-infertune.conf").read_text()
        assert f"[Unit]\nWants={user_unit(UID)}\n[Service]\nMemoryMin=" in text
        drop_in = tmp_path / "run/user/1000/systemd/user/llm.service.d/zz-infertune.conf"
        assert "LimitMEMLOCK=infinity" in drop_in.read_text()
        assert "OOMScoreAdjust" not in drop_in.read_text(), "his manager may not lower it"
        # Its processes are given it by root's unit.
        assert world.system.ran == [
            "infertune-adopted@sys.service",
            "infertune-adopted@llm.service",
        ]
        rows = {(each["unit"], each["property"]): each for each in done["items"]}
        assert rows["user.slice", "MemoryMin"]["wanted"] == str(64 * MIB)
        assert rows["llm.service", "MemoryMin"]["before"] == str(MIB)
        assert rows["app.slice", "MemoryMin"]["before"] == "0"
        held = json.loads(json.dumps(world.user.now))
        await world.user.reload()
        assert world.user.now == held
        assert await world.adopting.give_back("llm") == []
        await world.adopting.give_back("sys")

    asyncio.run(scene())
    assert world.state() == before


def test_a_plan_changes_nothing_and_knows_both_halves(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.state()
    done = asyncio.run(world.adopting.plan("llm", "llm.service", wanted(), UID))
    assert world.state() == before
    minimum = [each["unit"] for each in done["items"] if each["property"] == "MemoryMin"]
    assert minimum == [*CHAIN, "app.slice", "llm.service"]
    assert {each["when"] for each in done["items"]} == {"now", "next start"}


def test_a_manager_that_comes_back_is_told_again(tmp_path: Path) -> None:
    """Its runtime directory was another; the daemon has nothing to do with it."""
    world = World(tmp_path)

    async def scene() -> None:
        await world.adopting.adopt("llm", "llm.service", wanted(), UID)
        held = json.loads(json.dumps(world.user.now))
        for path in sorted((tmp_path / "run/user/1000").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        world.user = Manager(tmp_path, units=OF_USER, places=places_of(UID))
        assert world.user.now != held
        await world.hear(user_unit(UID))
        assert world.user.now == held
        assert await world.adopting.give_back("llm") == []
        assert world.user.now["llm.service"]["MemoryMin"] == MIB

    asyncio.run(scene())


def test_a_controller_that_is_promised_and_not_there_is_not_counted_on(tmp_path: Path) -> None:
    """Delegate= was changed after the manager had started."""
    world = World(tmp_path)
    mounts = tmp_path / "proc/self/mounts"
    mounts.parent.mkdir(parents=True)
    mounts.write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    group = tmp_path / f"sys/fs/cgroup/x/{CHAIN[2]}"
    group.mkdir(parents=True)
    for text, missing in (("cpu memory pids", 0), ("memory pids", 1)):
        (group / "cgroup.controllers").write_text(f"{text}\n")
        given_ = wanted(cpu_weight="200")
        done = asyncio.run(world.adopting.plan("llm", "llm.service", given_, UID))
        assert len([each for each in done["notes"] if "CPUWeight" in each]) == missing
        assert len([each for each in done["items"] if each["property"] == "CPUWeight"]) != missing


def test_a_user_who_is_not_there(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = world.state()
    world.runs = False

    async def scene() -> None:
        with pytest.raises(UsageError, match="no manager of user 1000 runs"):
            await world.adopting.adopt("llm", "llm.service", wanted(), UID)
        assert world.state() == before
        # What is declared waits for him.
        await world.adopting.adopt("llm", "llm.service", wanted(), UID, waits=True)
        assert world.minimum()[CHAIN[0]] == 64
        world.runs = True
        await world.hear(user_unit(UID))
        assert world.minimum()["user llm.service"] == 64
        await world.adopting.give_all_back()

    asyncio.run(scene())
    assert world.state() == before


def test_a_manager_that_is_about_to_start_is_told_after_that(tmp_path: Path) -> None:
    """It has begun without our drop-in, so it does not start our unit."""
    world = World(tmp_path)
    world.runs, world.starts = False, True
    asyncio.run(world.adopting.adopt("llm", "llm.service", wanted(), UID, waits=True))
    assert world.begun == [user_unit(UID)]
    assert read_request(Root(tmp_path), UID).units.keys() == {"llm"}


def test_a_plan_is_not_asked_for_again_when_the_manager_comes_back(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def scene() -> None:
        await world.adopting.adopt("llm", "llm.service", wanted(), UID)
        await world.adopting.plan("b", "other.service", wanted(), UID)

    asyncio.run(scene())
    request = read_request(Root(tmp_path), UID)
    assert (request.units.keys(), request.plan, request.about) == ({"llm"}, None, "")


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ("nothing.service", "there is no unit 'nothing.service'"),
        ("alias.service", "'alias.service' is another name of ollama.service"),
        ("app.slice", "cannot be adopted"),
        ("../x.service", "cannot be adopted"),
        ("dbus.service", "cannot be adopted"),
    ],
)
def test_what_is_refused_of_a_user(unit: str, says: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.user.units = {**OF_USER, "ollama.service": ("app.slice", "")}
    world.user.now["ollama.service"] = dict(world.user.now["llm.service"])
    before = world.state()
    with pytest.raises(UsageError, match=says):
        asyncio.run(world.adopting.adopt("x", unit, wanted(), UID))
    assert world.state() == before


async def _much(world: World) -> None:
    adopting = world.adopting
    await adopting.adopt("a", "llm.service", wanted(), UID)
    await adopting.adopt("b", "other.service", wanted(32), UID)
    await adopting.adopt("a", "llm.service", wanted(16, cpu_weight="250"), UID)
    await adopting.adopt("c", "ollama.service", wanted(8))
    await adopting.give_back("b")
    await adopting.give_all_back()


def test_adopted_of_a_user_and_killed_at_every_step(tmp_path: Path) -> None:
    """Daemon and the user's half die together; a new daemon puts back everything."""
    counter = Counter()
    asyncio.run(_much(World(tmp_path / "count", counter)))
    total = len(counter.steps)
    assert total > 100
    for number in range(1, total + 1, 13):
        world = World(tmp_path / str(number))
        before = world.state()
        world.hook = At(number, _killed)
        for manager in (world.system, world.user):
            manager.before = lambda _, hook=world.hook: hook(Step("systemd", "", 0))  # type: ignore[misc]
        world.adopting = world.daemon()
        with pytest.raises(Killed):
            asyncio.run(_much(world))
        world.hook = None
        for manager in (world.system, world.user):
            manager.before = lambda _: None
        asyncio.run(world.daemon().give_all_back())
        assert world.state() == before, number


def test_a_plan_killed_at_every_step_leaves_no_request(tmp_path: Path) -> None:
    counter = Counter()
    counted = World(tmp_path / "count", counter)
    asyncio.run(counted.adopting.plan("a", "llm.service", wanted(1), UID))
    assert len(counter.steps) > 5
    for number in range(1, len(counter.steps) + 1):
        world = World(tmp_path / str(number))
        before = world.state()
        world.hook = At(number, _killed)
        with pytest.raises(Killed):
            asyncio.run(world.daemon().plan("a", "llm.service", wanted(1), UID))
        world.hook = None
        asyncio.run(world.daemon().give_all_back())
        assert world.state() == before, number


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["adopt", "release", "plan", "logout", "reload"]),
            st.sampled_from([("a", "llm.service", UID), ("b", "other.service", UID),
                             ("c", "llm.service", None)]),
            st.integers(0, 99),
            st.integers(1, 90),
        ),
        max_size=7,
    )
)  # fmt: skip
def test_any_sequence_with_kills_and_logouts_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, tuple[str, str, int | None], int, int]],
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    before = world.state()
    for verb, (name, unit, user), megabytes, at in steps:
        world.hook = At(at, _killed)
        for manager in (world.system, world.user):
            manager.before = lambda _, hook=world.hook: hook(Step("systemd", "", 0))  # type: ignore[misc]
        adopting = world.daemon()
        try:
            if verb == "adopt":
                asyncio.run(adopting.adopt(name, unit, wanted(megabytes), user))
            elif verb == "plan":
                asyncio.run(adopting.plan(name, unit, wanted(megabytes), user))
            elif verb == "release":
                asyncio.run(adopting.give_back(name))
            elif verb == "reload":
                asyncio.run(world.user.reload())
            else:
                for path in sorted((world.base / "run/user/1000").rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                world.user = Manager(world.base, units=OF_USER, places=places_of(UID))
                world.hook = None
                asyncio.run(world.hear(user_unit(UID)))
        except (Killed, UsageError):
            pass
    world.hook = None
    for manager in (world.system, world.user):
        manager.before = lambda _: None
    asyncio.run(world.daemon().give_all_back())
    assert world.state() == before


# -- whoever does not do what he is asked ----------------------------------------------------


class Silent(World):
    """The user's half says what it likes, or nothing."""

    told: str | None = None
    heard = 0

    async def hear(self, unit: str) -> str | None:
        self.heard += 1
        if self.told == "another":
            return answer_text(Answer("another"))
        return self.told


@pytest.mark.parametrize(
    "told", [None, "", "{", "[]", "another", "[" * 4000, '{"serial": 5}', "\x1b[2J", '"x"']
)
def test_a_user_s_half_that_hangs_or_lies(told: str | None, tmp_path: Path) -> None:
    world = Silent(tmp_path)
    world.told = told
    before = world.state()
    with pytest.raises(Failed, match="the manager of user 1000 did not do it"):
        asyncio.run(world.adopting.adopt("llm", "llm.service", wanted(), UID))
    assert world.state() == before
    assert world.heard <= (6 if told else 2), "each time may take as long as it is let"
    assert read_book(Root(tmp_path)).units == {}


def test_whoever_does_not_answer_keeps_nobody_else_s(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def scene() -> list[str]:
        await world.adopting.adopt("llm", "llm.service", wanted(), UID)
        await world.adopting.adopt("c", "ollama.service", wanted(8))
        world.hear = Silent(tmp_path).hear  # type: ignore[method-assign]
        return await world.adopting.give_all_back()

    left = asyncio.run(scene())
    assert left == ["units of user 1000 may be unchanged: the manager of user 1000 did not do it"]
    minimum = world.minimum()
    assert {name: minimum[name] for name in SYSTEMS} == {
        **dict.fromkeys(SYSTEMS, 0), "ollama.service": 1, CHAIN[1]: 2,
    }  # fmt: skip
    assert not list(tmp_path.glob("run/infertune/users/*"))


def test_an_answer_is_short_and_plain_whatever_it_is() -> None:
    row = ("app.slice", "MemoryMin", None, "5")
    answer = Answer("s", True, (row,), ("\x1b[2Jx",), "no")
    told = parse_answer(answer_text(answer), "s")
    assert told == replace(answer, left=("\\x1b[2Jx",))
    much = replace(answer, rows=(row,) * 500, left=("y" * 200,) * 100)
    assert len(answer_text(much)) <= MAX_ANSWER
    assert parse_answer(answer_text(much), "s") is not None
    endless = json.dumps({**asdict(answer), "left": ["x" * 9000] * 9000})
    found = parse_answer(endless, "s")
    assert found
    assert len(found.left) <= 64
    assert max(map(len, found.left)) <= 300


def test_an_answer_is_an_answer_or_none() -> None:
    fields = ("active", "rows", "left", "error", "usage", "hint")
    for name in fields:
        for value in (None, True, 5, "s", [5], [None], {}, {"a": 1}, [[1, 2, 3, 4]], [["a"]], 1e9):
            told = parse_answer(json.dumps({"serial": "s", name: value}), "s")
            assert told is None or isinstance(told, Answer), (name, value)
    assert parse_answer(json.dumps({"serial": "s", "left": "abc"}), "s") is None


def test_a_request_is_read_whole_or_not(tmp_path: Path) -> None:
    root = Root(tmp_path)
    request = Request("s", {"a": One("llm.service", wanted())}, "a", One("b.service", wanted(1)))
    write_request(root, UID, request)
    assert read_request(root, UID) == request
    file = tmp_path / f"run/infertune/users/{UID}.json"
    text = file.read_text()
    for wrong in ("", "[]", "{}", text.replace("llm.service", "dbus.service"), "[" * 9999):
        file.write_text(wrong)
        with pytest.raises(Failed, match="is damaged"):
            read_request(root, UID)


# -- whose, and what of it -----------------------------------------------------------------------


def test_what_a_user_s_manager_cannot_give() -> None:
    both = replace(
        wanted(nice="-5", scheduling_policy="fifo"),
        directives={
            **wanted().directives,
            "Nice": "-5",
            "CPUSchedulingPolicy": "fifo",
            "CPUSchedulingPriority": "1",
        },
    )
    given_, why = of_a_user(both, UID, ["memory", "cpu"])
    assert set(why) == {"AllowedCPUs", "OOMScoreAdjust", "Nice", "CPUSchedulingPolicy"}
    assert not {*why, "CPUSchedulingPriority", "ManagedOOMPreference"} & given_.directives.keys()
    assert "AllowedCPUs" not in given_.values
    assert given_.memory_min == 64 * MIB
    without, _ = of_a_user(both, UID, ["cpu"])
    assert without.memory_min == 0, "nobody above holds what it cannot be given"
    assert of_a_user(both, UID, None)[0].values == both.values
    assert of_a_user(Wanted("p", "cpu", directives={"Nice": "5"}), UID, [])[1] == {}


@pytest.mark.parametrize("user", ["root", "0", "", "nobody2", "4294967295", "65535", "a b", "x:y"])
def test_no_user_of_that_name(user: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/x\nbob:x:1000:1000::/:/x\nbad:x:-1\n")
    root = Root(tmp_path)
    assert user_id(root, "bob") == user_id(root, "1000") == 1000
    for each in (user, "bad"):
        with pytest.raises(UsageError):
            user_id(root, each)


def test_a_declaration_says_whose_unit_it_is() -> None:
    declared = Foreign("llm", "kept", "llm.service", user="bob")
    assert parse_declaration("llm", declaration_text(declared), "x.toml") == declared
    for wrong in ("a b", "../x", "0", ""):
        with pytest.raises(DeclarationError, match="'user'"):
            parse_declaration("x", f'unit = "a.service"\nuser = "{wrong}"\nprofile = "p"\n', "f")


def test_its_group_is_found_wherever_its_manager_has_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    asyncio.run(world.adopting.adopt("llm", "llm.service", wanted(), UID))
    mounts = tmp_path / "proc/self/mounts"
    mounts.parent.mkdir(parents=True)
    mounts.write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    root = Root(tmp_path)
    assert [each for each in running_units(root) if each.server] == []
    top = tmp_path / "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
    # Not that of another user, whatever he calls his.
    for path in (top / "app.slice/app-x.slice/llm.service",
                 top.parent.parent / "user-7.slice/user@7.service/llm.service"):  # fmt: skip
        path.mkdir(parents=True)
        (path / "memory.min").write_text("0\n")
    [found] = [each for each in running_units(root) if each.server]
    assert (found.name, found.server) == ("llm.service", "llm")
    assert found.cgroup.endswith("/user@1000.service/app.slice/app-x.slice/llm.service")
    for number in range(3000):
        (top / f"aa-{number}.slice").mkdir()
    assert [each for each in running_units(root) if each.server] == [], "a bound, not a walk"


# -- the socket of a user's manager ----------------------------------------


class Socket(threading.Thread):
    """A systemd that answers on a socket of its own; ``how`` makes it bad at that."""

    def __init__(self, path: Path, how: str = "") -> None:
        super().__init__(daemon=True)
        self.how = how
        self.calls: list[Any] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()

    def run(self) -> None:
        client, _ = self.server.accept()
        with client:
            said = b""
            while b"BEGIN\r\n" not in said:
                said += client.recv(4096)
            client.sendall(b"DATA\r\nOK " + b"0" * 32 + b"\r\nAGREE_UNIX_FD\r\n")
            stream = client.makefile("rwb")
            while message := self._read(stream):
                self.calls.append((message.member, message.body))
                if self.how == "hangs":
                    continue
                if self.how == "closes":
                    return
                stream.write(b"x" * 4096 if self.how == "lies" else self._answer(message))
                stream.flush()

    def _read(self, stream: Any) -> Any:
        from dbus_fast._private.unmarshaller import Unmarshaller

        try:
            return Unmarshaller(stream).unmarshall()
        except (EOFError, OSError):
            return None

    def _answer(self, message: Any) -> bytes:
        if message.member == "LoadUnit":
            reply = dbus.Message.new_method_return(message, "o", ["/unit"])
        elif message.member == "GetAll":
            about = {"Id": dbus.Variant("s", "a.service"), "LoadState": dbus.Variant("s", "loaded"),
                     "MemoryMin": dbus.Variant("t", 2**64 - 1),
                     "AllowedCPUs": dbus.Variant("ay", b"\x05")}  # fmt: skip
            reply = dbus.Message.new_method_return(message, "a{sv}", [about])
        elif message.member == "Reload":
            reply = dbus.Message.new_error(message, "org.x.No", "not now")
        else:
            reply = dbus.Message.new_method_return(message)
        reply.serial = 1
        return bytes(reply._marshall(False))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[[str], tuple[Socket, of_user.UserManager]]]:
    opened = []

    def start(how: str = "") -> tuple[Socket, of_user.UserManager]:
        thread = Socket(tmp_path / "private", how)
        thread.start()
        connection = peer(f"unix:path={tmp_path}/private")
        opened.append((thread, connection))
        return thread, of_user.UserManager(connection)

    yield start
    for thread, connection in opened:
        connection.close()
        thread.join(10)
        thread.server.close()


def test_a_user_s_manager_is_asked_as_systemctl_does(
    manager: Callable[..., tuple[Socket, of_user.UserManager]],
) -> None:
    thread, user = manager()

    async def scene() -> None:
        about = await user.unit("a.service")
        assert about
        assert (about["MemoryMin"], about["AllowedCPUs"]) == (2**64 - 1, [5])
        await user.set_properties("a.service", {"MemoryMin": 7, "AllowedCPUs": (3, 1)})
        with pytest.raises(Failed, match="Reload: not now"):
            await user.reload()

    asyncio.run(scene())
    member, (unit, runtime, values) = thread.calls[-2]
    assert (member, unit, runtime) == ("SetUnitProperties", "a.service", True)
    assert [(name, each.signature, each.value) for name, each in values] == [
        ("MemoryMin", "t", 7), ("AllowedCPUs", "ay", b"\x03\x01"),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["hangs", "closes", "lies"])
def test_a_manager_that_is_none(
    how: str,
    manager: Callable[..., tuple[Socket, of_user.UserManager]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(of_user, "_TIMEOUT_S", 0.2)
    _, user = manager(how)
    with pytest.raises(InfertuneError, match="LoadUnit: no answer"):
        asyncio.run(user.unit("a.service"))
