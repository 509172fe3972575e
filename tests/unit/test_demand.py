# SPDX-License-Identifier: Apache-2.0
"""A profile that is in force while servers work: when, and what is left of it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import DeclarationError
from infertune.base.root import Root, Step
from infertune.profiles.config import Config, read_config
from support import At, Counter, build, in_child, kill, reset, values, with_hook

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast.aio import MessageBus  # noqa: E402

from infertune.service import load  # noqa: E402
from infertune.service.demand import DEMAND, Choice, Demand, read_demand, write_demand  # noqa: E402
from infertune.service.inotify import Groups  # noqa: E402
from infertune.service.keeper import Keeper  # noqa: E402
from infertune.service.load import LOOK_S, Load, used  # noqa: E402
from unit.test_service import GENEROUS_S, World, ask, bus_address, running  # noqa: E402, F401

SLICE = "sys/fs/cgroup/infertune.slice"
SECOND = 1_000_000
LONG = Demand(Choice("long", "cpu"), 60)


def test_whoever_uses_the_cpu_works_and_is_idle_after_a_while() -> None:
    one = Load(60)
    assert not one.look(0, {"a": 900 * SECOND}), "what it had used before says nothing of now"
    assert not one.look(2, {"a": 900 * SECOND + 10_000}), "a scrape of its metrics"
    assert one.look(4, {"a": 900 * SECOND + 60_000})
    for now in range(6, 64, 2):
        assert one.look(now, {"a": 900 * SECOND + 60_000}), now
    assert not one.look(64, {"a": 900 * SECOND + 60_000})
    assert one.look(66, {"a": 901 * SECOND})


def test_one_that_works_is_enough_and_a_new_one_is_not_one_that_works() -> None:
    one = Load(60)
    one.look(0, {"a": 0})
    assert not one.look(2, {"a": 0, "b": 500 * SECOND})
    assert one.look(4, {"a": 0, "b": 501 * SECOND})


def test_a_server_that_was_started_again_counts_from_nothing() -> None:
    one = Load(60)
    one.look(0, {"a": 900 * SECOND})
    assert one.look(2, {"a": SECOND})


def test_looks_that_follow_each_other_closely_say_nothing() -> None:
    one = Load(60)
    one.look(0, {"a": 0})
    for tenth in range(1, 10):
        assert not one.look(tenth / 10, {"a": tenth * 5_000}), "half a CPU for a moment"
    assert one.look(1.0, {"a": 50_000})


def test_the_clock_is_asked_only_while_a_server_is_up() -> None:
    one = Load(60)
    assert one.next_look(0) is None
    one.look(0, {})
    assert one.next_look(0) is None
    one.look(10, {"a": 0})
    assert one.next_look(10) == LOOK_S == 2.0
    one.look(12, {"a": SECOND})
    # The server ends: one more look, when the time is over.
    assert one.look(14, {})
    assert one.next_look(14) == 58
    assert not one.look(72, {})
    assert one.next_look(72) is None


def test_groups_that_come_and_go_are_heard_and_others_are_not(tmp_path: Path) -> None:
    groups = Groups()
    heard = lambda: os.read(groups.fd, 4096)  # noqa: E731
    try:
        groups.watch([tmp_path, tmp_path / "none"])
        (tmp_path / "one").mkdir()
        assert heard()
        groups.watch([tmp_path / "one"])
        groups.drain()
        (tmp_path / "two").mkdir()
        with pytest.raises(BlockingIOError):
            heard()
        (tmp_path / "one/unit").mkdir()
        assert heard()
        (tmp_path / "one/unit").rmdir()
        assert heard()
        (tmp_path / "one").rmdir()
        groups.watch([tmp_path])
        groups.drain()
        (tmp_path / "one").mkdir()
        assert heard()
    finally:
        groups.close()


def test_what_is_kept_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    root = Root(tmp_path)
    (tmp_path / "run").mkdir()
    assert read_demand(root) is None
    write_demand(root, LONG)
    assert read_demand(root) == LONG
    file = tmp_path / DEMAND.lstrip("/")
    good = file.read_text()
    for bad in ("", "[]", "7", good.replace("60", "1"), good.replace("long", "../x"), good[:-3]):
        file.write_text(bad)
        assert read_demand(root) is None, bad
    for without in ('"abc"', '{"vm.swappiness": 1}', '["no-knob"]', '["\\ud800"]', "[[]]", "5"):
        bad = good.replace('"without": []', f'"without": {without}')
        assert bad != good
        file.write_text(bad)
        assert read_demand(root) is None, bad
    write_demand(root, None)
    assert not file.exists()


def test_what_the_administrator_may_say(tmp_path: Path) -> None:
    file = tmp_path / "etc/infertune/infertuned.toml"
    file.parent.mkdir(parents=True)
    file.write_text('profile = "quiet"\ndemand = true\nidle_seconds = 300\n')
    assert read_config(Root(tmp_path)) == Config("quiet", demand=True, idle_seconds=300)
    assert Config().idle_seconds == 60
    for text, says in (
        ("demand = true", r":1: 'demand' needs a 'profile'"),
        ('profile = "quiet"\nidle_seconds = 1', ":2: 'idle_seconds' is a number from 5"),
        ('profile = "quiet"\ndemand = 1', ":2: 'demand' is true or false"),
    ):
        file.write_text(text)
        with pytest.raises(DeclarationError, match=says):
            read_config(Root(tmp_path))


class Server:
    """Its control group, and a clock that is set by hand."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self._group = world.base / SLICE / "infertune-server@chat.service"
        self._time = 0.0
        self._used = 0
        monkeypatch.setattr(load, "LOOK_S", 0.02)
        monkeypatch.setattr(load, "monotonic", lambda: self._time)

    def starts(self) -> None:
        self._group.mkdir(parents=True)
        self._write()

    def ends(self) -> None:
        (self._group / "cpu.stat").unlink()
        self._group.rmdir()

    def passes(self, seconds: float, *, working: bool) -> None:
        self._used += int(seconds * SECOND) if working else 0
        self._write()
        self._time += seconds

    def _write(self) -> None:
        new = self._group / "cpu.stat.new"
        new.write_text(f"usage_usec {self._used}\nuser_usec 0\n")
        new.rename(self._group / "cpu.stat")


def with_cgroups(base: Path) -> None:
    mounts = base / "proc/self/mounts"
    mounts.parent.mkdir(parents=True, exist_ok=True)
    mounts.write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    (base / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GENEROUS_S):
        while not condition():
            await asyncio.sleep(0.01)


async def until_known(world: World, seconds: float) -> None:
    """The daemon has seen how much was used until now."""
    watching = world.daemon._load._watching  # type: ignore[union-attr]
    assert watching
    await until(lambda: watching.load._seen.get("chat", (-1.0, 0))[0] == seconds)


Work = Callable[[World, MessageBus, Server], Awaitable[None]]


async def put_in_force(world: World, bus: MessageBus, server: Server) -> dict[str, str]:
    """Have ``long`` in force because a server works; returns what the files said before."""
    before = values(world.base)
    await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
    server.starts()
    await until_known(world, 0)
    server.passes(2, working=True)
    await until(lambda: values(world.base) != before)
    await until(lambda: world.daemon._meeting is None)  # type: ignore[union-attr]
    return before


def play(
    work: Work, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, config: str = ""
) -> None:
    async def scene() -> None:
        async with running(tmp_path, address) as (world, bus):
            await asyncio.wait_for(work(world, bus, Server(world, monkeypatch)), GENEROUS_S)

    with_cgroups(tmp_path)
    if config:
        file = tmp_path / "etc/infertune/infertuned.toml"
        file.parent.mkdir(parents=True)
        file.write_text(config)
    asyncio.run(scene())


async def demand(bus: MessageBus) -> Any:
    return (await ask(bus, "Status"))["demand"]


def test_in_force_while_a_server_works_and_exactly_gone_after_it(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = values(world.base)
        plan = await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
        assert plan["counts"]["set"] > 0
        assert values(world.base) == before
        server.starts()
        await until_known(world, 0)
        server.passes(2, working=False)
        await until_known(world, 2)
        assert values(world.base) == before
        assert (await demand(bus))["in_force"] is False
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)
        await until(lambda: world.daemon._meeting is None)  # type: ignore[union-attr]
        status = await ask(bus, "Status")
        assert status["demand"]["in_force"] is True
        assert status["applied"]["profile"] == "long"
        assert status["applied"]["held"] is True
        server.passes(58, working=False)
        await until_known(world, 62)
        assert values(world.base) != before
        server.passes(2, working=False)
        await until(lambda: values(world.base) == before)
        await until(lambda: world.daemon._meeting is None)  # type: ignore[union-attr]
        assert (await ask(bus, "Status"))["state"] == "idle"
        assert (await demand(bus))["in_force"] is False
        # And again, and the server ends while it is in force: the time is over all the same.
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)
        server.passes(60, working=False)
        server.ends()
        await until(lambda: values(world.base) == before)
        assert world.daemon._load._watching.timer is None  # type: ignore[union-attr]

    play(scene, tmp_path, bus_address, monkeypatch)


def test_killed_while_it_is_in_force(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = values(world.base)
        await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", ["platform_profile"], 60)
        server.starts()
        await until_known(world, 0)
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)
        await world.die()
        assert values(world.base) != before
        world.notified.clear()
        await world.start()
        assert values(world.base) == before
        document = await demand(bus)
        assert document["profile"] == "long"
        # The next one goes on with it.
        await until_known(world, 2)
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)
        await world.stop()
        assert values(world.base) == before
        assert not (world.base / DEMAND.lstrip("/")).exists()

    play(scene, tmp_path, bus_address, monkeypatch)


@pytest.mark.parametrize("member", ["Revert", "Apply"])
def test_whoever_decides_ends_it(
    member: str,
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = await put_in_force(world, bus, server)
        with pytest.raises(RuntimeError, match="profile"):
            await ask(bus, "Apply", "ssasu", "none", "cpu", [], 0)
        assert (await demand(bus))["in_force"] is True
        if member == "Revert":
            report = await ask(bus, "Revert")
            assert report["counts"]["restored"] > 0
            assert values(world.base) == before
        else:
            await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
            changed = {path for path, value in values(world.base).items() if value != before[path]}
            assert changed == {"/proc/sys/vm/swappiness"}
        assert await demand(bus) is None
        assert world.daemon._load._watching is None  # type: ignore[union-attr]

    play(scene, tmp_path, bus_address, monkeypatch)


def test_a_hold_of_somebody_counts_first(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = values(world.base)
        await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
        cookie = await ask(bus, "Hold", "sss", "low", "cpu", "test")
        held = values(world.base)
        server.starts()
        await until_known(world, 0)
        server.passes(2, working=True)
        await until(lambda: world.daemon._keeper.is_met)  # type: ignore[union-attr]
        assert values(world.base) == held
        with pytest.raises(RuntimeError, match="busy: 'low' is held by :"):
            await ask(bus, "Revert")
        await ask(bus, "Release", "s", cookie)
        assert values(world.base) not in (held, before)
        server.passes(60, working=False)
        await until(lambda: values(world.base) == before)

    play(scene, tmp_path, bus_address, monkeypatch)


def test_the_default_profile_on_demand(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = values(world.base)
        assert (await ask(bus, "Status"))["state"] == "idle"
        assert await demand(bus) == {
            "profile": "long",
            "backend": "cpu",
            "idle_seconds": 7,
            "in_force": False,
        }
        server.starts()
        await until_known(world, 0)
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)
        server.passes(7, working=False)
        await until(lambda: values(world.base) == before)

    config = 'profile = "long"\nbackend = "cpu"\ndemand = true\nidle_seconds = 7\n'
    play(scene, tmp_path, bus_address, monkeypatch, config)


def test_what_cannot_be_applied_is_not_tried_again_at_every_look(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = values(world.base)
        profile = world.base / "etc/infertune/profiles/long.toml"
        text = profile.read_text()
        needs = "ksm.run = { value = 0, required = true }\n"
        profile.write_text(text + needs)
        with pytest.raises(RuntimeError, match=r"ksm\.run: absent, but .* requires it"):
            await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
        assert await demand(bus) is None
        profile.write_text(text)
        await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
        profile.write_text(text + needs)
        tried = 0
        meet = Keeper.meet

        def count(keeper: Keeper, working: bool) -> None:
            nonlocal tried
            tried += 1
            meet(keeper, working)

        monkeypatch.setattr(Keeper, "meet", count)
        server.starts()
        await until_known(world, 0)
        for turn in range(1, 8):
            server.passes(2, working=True)
            await until_known(world, 2 * turn)
        await until(lambda: tried > 0 and world.daemon._meeting is None)  # type: ignore[union-attr]
        assert tried == 1
        assert values(world.base) == before
        assert capsys.readouterr().err.count("ksm.run: absent") == 1
        # Half a minute later it is another matter.
        profile.write_text(text)
        world.daemon._meet_from = 0.0  # type: ignore[union-attr]
        await until(lambda: values(world.base) != before)

    play(scene, tmp_path, bus_address, monkeypatch)


def test_a_new_version_goes_on_with_it(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        before = await put_in_force(world, bus, server)
        assert world.task
        world.daemon._execute_again()  # type: ignore[union-attr]
        assert await asyncio.wait_for(world.task, GENEROUS_S)
        assert values(world.base) == before
        world.notified.clear()
        await world.start()
        assert (await demand(bus))["profile"] == "long"
        await until_known(world, 2)
        server.passes(2, working=True)
        await until(lambda: values(world.base) != before)

    play(scene, tmp_path, bus_address, monkeypatch)


def test_groups_without_an_end_cost_few_looks(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], 60)
        watch = world.daemon._load  # type: ignore[union-attr]
        looks = 0
        say = watch._say

        def count(working: bool) -> None:
            nonlocal looks
            looks += 1
            say(working)

        watch._say = count
        monkeypatch.setattr(load, "_SETTLE_S", 3600)
        for number in range(200):
            (world.base / "sys/fs/cgroup" / f"{number}.slice").mkdir()
            await asyncio.sleep(0)
        assert looks == 0
        timer = watch._watching.timer  # type: ignore[union-attr]
        assert timer
        watch.look()
        assert (looks, timer.cancelled()) == (1, True)

    play(scene, tmp_path, bus_address, monkeypatch)


def test_idle_times_that_are_none(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(world: World, bus: MessageBus, server: Server) -> None:
        for seconds in (0, 4, 86401, 2**32 - 1):
            with pytest.raises(RuntimeError, match="idle seconds: 5 to 86400"):
                await ask(bus, "ApplyWhileServing", "ssasu", "long", "cpu", [], seconds)
        assert await demand(bus) is None

    play(scene, tmp_path, bus_address, monkeypatch)


def test_killed_at_every_step_on_demand(tmp_path: Path, unflushed: None) -> None:
    """Of being put in force and taken back; the next daemon puts the originals back."""
    low = Demand(Choice("low", "cpu"), 60)

    def fresh() -> None:
        reset(tmp_path)
        profiles = tmp_path / "etc/infertune/profiles"
        profiles.mkdir(parents=True, exist_ok=True)
        (profiles / "low.toml").write_text(
            'description = "test"\n[now]\nvm.swappiness = 1\n'
            '"transparent_hugepage.enabled" = "always"\n'
        )

    def served(root: Root) -> None:
        one = Keeper(root)
        one.while_serving(low)
        one.meet(True)
        one.meet(False)

    build(tmp_path)
    fresh()
    original = values(tmp_path)
    counter = Counter()
    served(with_hook(tmp_path, counter))
    assert values(tmp_path) == original
    total = len(counter.steps)
    assert total > 10
    for number in range(1, total + 1):
        fresh()
        hook = At(number, kill)
        assert in_child(lambda hook=hook: served(with_hook(tmp_path, hook))) == 9  # type: ignore[misc]
        after = Keeper(with_hook(tmp_path, Counter()))
        after.take_over()
        assert values(tmp_path) == original, f"killed at step {number}"
        assert after.demand in (None, low)
        after.stop()


def test_a_run_that_takes_no_writes_keeps_no_value_from_going_back(tmp_path: Path) -> None:
    root = build(tmp_path)
    profiles = tmp_path / "etc/infertune/profiles"
    profiles.mkdir(parents=True)
    (profiles / "low.toml").write_text('description = "test"\n[now]\nvm.swappiness = 1\n')
    original = values(tmp_path)
    Keeper(root).while_serving(Demand(Choice("low", "cpu"), 60))

    def full(step: Step) -> None:
        if step.path == DEMAND:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), step.path)

    one = Keeper(with_hook(tmp_path, full))
    one.take_over()
    one.meet(True)
    assert values(tmp_path) != original
    one.revert()
    assert (values(tmp_path), one.demand, one.is_met) == (original, None, False)
    assert any("on demand again" in note for note in one.status()["notes"])


def test_not_by_itself_after_the_machine_stopped_under_it(tmp_path: Path) -> None:
    one = Keeper(build(tmp_path))
    one._unclean = "low"
    one.demand_default(Demand(Choice("low", "cpu"), 60))
    assert one.demand is None
    assert one.refused_at_start
    one.demand_default(LONG)
    assert one.demand == LONG


def test_nothing_is_used_where_there_is_no_server(tmp_path: Path) -> None:
    with_cgroups(tmp_path)
    assert used(Root(tmp_path)) == {}
    group = tmp_path / SLICE / "infertune-server@chat.service"
    group.mkdir(parents=True)
    assert used(Root(tmp_path)) == {}, "not known is not nothing"
    (group / "cpu.stat").write_text("usage_usec 5\n")
    assert used(Root(tmp_path)) == {"chat": 5}
