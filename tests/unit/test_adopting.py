# SPDX-License-Identifier: Apache-2.0
"""Units of others: what they are given, and that all of it goes back, whatever happens between.

The systemd is made up: after a reload its files decide what a unit is, as with the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infertune.base.errors import Failed, UsageError
from infertune.base.names import NAME
from infertune.base.records import replace
from infertune.base.root import Root, Step
from infertune.base.units import format_cpulist, parse_cpulist
from infertune.cli import adopt as cli
from infertune.cli.main import main
from infertune.profiles.profile import Source
from infertune.profiles.resolve import Desired, Setting
from infertune.servers import placing
from infertune.servers.adopted import (
    ADOPTED,
    SYSTEM,
    Adopted,
    Book,
    Changed,
    Places,
    Wanted,
    read_book,
    write_book,
)
from infertune.servers.unit import wanted as wanted_of
from support import GENEROUS_S, At, Counter
from support import desired as desired_knobs

pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from infertune.service.adopting import Adopting

MIB = 2**20
NOT_SET = 2**64 - 1
DEFAULTS: dict[str, Any] = {
    "MemoryMin": 0,
    "MemorySwapMax": NOT_SET,
    "CPUWeight": NOT_SET,
    "AllowedCPUs": [],
}
UNITS = {
    "ollama.service": ("system.slice", "[Service]\nMemoryMin=1048576\n"),
    "llm@one.service": ("system-llm.slice", "[Service]\nCPUWeight=50\n"),
    "libpod-77.scope": ("machine.slice", ""),
    "system.slice": ("-.slice", ""),
    "system-llm.slice": ("system.slice", ""),
    "machine.slice": ("-.slice", "[Slice]\nMemoryMin=4194304\n"),
}


class Killed(Exception):
    """The daemon is gone, with whatever it was about to do."""


class Manager:
    """systemd: loaded properties, files that say what they are after a reload, and a scope."""

    def __init__(
        self,
        base: Path,
        before: Callable[[str], object] = lambda _: None,
        units: Mapping[str, tuple[str, str]] = UNITS,
        places: Places = SYSTEM,
    ) -> None:
        self.base = base
        self.before = before
        self.units = units
        self._installed = base / "usr/lib/systemd" / places.units.rpartition("/")[2]
        self._drop_ins = [
            base / place.lstrip("/")
            for place in (places.notes, places.units, "/etc/systemd/system")
        ]
        self._notes = self._drop_ins[0]
        for unit, (_, text) in units.items():
            if not unit.endswith(".scope"):
                file = self._installed / unit
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    file.write_text(text)
        self.now = {unit: self._from_files(unit) for unit in units}
        self.environment: dict[str, str] = {}
        """What a unit itself sets; one variable is enough."""
        self.reloads = 0
        self.ran: list[str] = []

    def _from_files(self, unit: str) -> dict[str, Any]:
        found = dict(DEFAULTS)
        drop_ins = [file for each in self._drop_ins for file in each.glob(f"{unit}.d/*.conf")]
        main = self._installed / unit
        for file in (main, *sorted(drop_ins, key=lambda path: path.name)):
            for line in file.read_text().splitlines() if file.exists() else []:
                name, _, value = line.partition("=")
                if name in DEFAULTS:
                    found[name] = _parsed(name, value)
        return found

    async def unit(self, unit: str) -> dict[str, Any] | None:
        unit = {"alias.service": "ollama.service"}.get(unit, unit)
        if unit not in self.now:
            return None
        about = {"Id": unit, "ActiveState": "active", "Slice": self.units[unit][0]}
        about["Environment"] = self._environment(unit)
        about |= {"Transient": unit.endswith(".scope"), "ControlGroup": f"/x/{unit}"}
        # A mask has as many bytes as systemd likes.
        mask = self.now[unit]["AllowedCPUs"]
        return {**about, **self.now[unit], "AllowedCPUs": mask and [*mask, 0, 0]}

    def _environment(self, unit: str) -> list[str]:
        """As systemd has it: of several lines for one variable the last."""
        found = [self.environment.get(unit, "")]
        for each in (each for place in self._drop_ins for each in place.glob(f"{unit}.d/*.conf")):
            found += re.findall(r'^Environment="(GLIBC_TUNABLES=.*)"$', each.read_text(), re.M)
        return ["LANG=C", found[-1]]

    async def set_properties(self, unit: str, values: Mapping[str, Any]) -> None:
        self.before(f"set {unit}")
        self.now[unit] |= {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        where = self._notes.parent / "transient" if unit.endswith(".scope") else self._notes
        directory = where / f"{unit}.d"
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (directory / f"50-{name}.conf").write_text(f"[X]\n{name}={_written(value)}\n")

    async def run(self, unit: str) -> None:
        self.before(f"run {unit}")
        self.ran.append(unit)

    async def reload(self) -> None:
        self.before("reload")
        self.reloads += 1
        for unit in self.now:
            if not unit.endswith(".scope"):
                self.now[unit] = self._from_files(unit)


def _parsed(name: str, value: str) -> Any:
    if name == "AllowedCPUs":
        mask = sum(1 << cpu for cpu in parse_cpulist(value)) if value else 0
        return list(mask.to_bytes((mask.bit_length() + 7) // 8, "little"))
    return NOT_SET if value in ("infinity", "") else int(value)


def _written(value: Any) -> str:
    if isinstance(value, int):
        return "infinity" if value == NOT_SET else str(value)
    mask = int.from_bytes(bytes(value), "little")
    return format_cpulist(cpu for cpu in range(64) if mask >> cpu & 1)


def wanted(megabytes: int = 64, **more: str) -> Wanted:
    """A profile's launch settings."""
    launch = {"memory_min": str(megabytes * MIB), "memory_swap_max": "0", "cpus": "1-7", **more}
    return wanted_of(_desired({**launch, "memlock": "unlimited", "oom_score_adj": "-500"}))


def _desired(launch: Mapping[str, str]) -> Desired:
    def setting(name: str, value: str) -> Setting:
        return Setting(
            id=name,
            configured=value,
            canonical=value,
            required=False,
            because=None,
            source=Source("x.toml", 1, "x"),
            overridden=(),
        )

    env = {"GGML_TEST": setting("GGML_TEST", 'a "b" 100%')}
    return replace(
        desired_knobs("kept", {}),
        launch={name: setting(name, value) for name, value in launch.items()},
        env=env,
    )


def tree(base: Path) -> dict[str, str]:
    """Every file that systemd or we keep, without what a scope has of its own."""
    return {
        str(path.relative_to(base)): path.read_text()
        for path in sorted(base.rglob("*"))
        if path.is_file() and "transient" not in path.parts
    }


def world(base: Path) -> tuple[Manager, Adopting]:
    manager = Manager(base)
    return manager, Adopting(Root(base), manager)  # type: ignore[arg-type]


def state(manager: Manager) -> Any:
    return json.loads(json.dumps(manager.now)), tree(manager.base)


def test_adopted_and_given_back(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)

    async def scene() -> None:
        done = await adopting.adopt("ollama", "alias.service", wanted())
        assert done["unit"] == "ollama.service"
        assert manager.now["ollama.service"] == {
            "MemoryMin": 64 * MIB,
            "MemorySwapMax": 0,
            "CPUWeight": NOT_SET,
            "AllowedCPUs": [0xFE],
        }
        assert manager.now["system.slice"]["MemoryMin"] == 64 * MIB
        text = tree(tmp_path)["run/systemd/system/ollama.service.d/zz-infertune.conf"]
        assert "LimitMEMLOCK=infinity\n" in text
        assert 'Environment="GGML_TEST=a \\"b\\" 100%%"\n' in text
        assert "ExecStart" not in text
        assert not list(tmp_path.glob("run/systemd/system.control/*")), "notes say it twice"
        # It stays so for whoever reloads systemd, or restarts the unit.
        held = json.loads(json.dumps(manager.now))
        await manager.reload()
        assert manager.now == held
        assert await adopting.give_back("ollama") == []

    asyncio.run(scene())
    assert state(manager) == before


def test_a_slice_has_the_sum_and_its_own(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)

    async def scene() -> None:
        for name, unit in (("a", "ollama.service"), ("b", "llm@one.service")):
            await adopting.adopt(name, unit, wanted())
        await adopting.adopt("c", "libpod-77.scope", wanted(32))
        minimum = {unit: each["MemoryMin"] // MIB for unit, each in manager.now.items()}
        assert minimum["system.slice"] == 128
        assert minimum["system-llm.slice"] == 64
        assert minimum["machine.slice"] == 4 + 32
        await adopting.adopt("a", "ollama.service", wanted(16))
        assert manager.now["system.slice"]["MemoryMin"] == 80 * MIB
        for name in ("b", "a", "c"):
            await adopting.give_back(name)

    asyncio.run(scene())
    assert state(manager) == before


def test_tunables_of_the_unit_itself_stay(tmp_path: Path) -> None:
    """Its drop-in comes last, and a variable has one value: it has to hold both."""
    manager, adopting = world(tmp_path)
    manager.environment["ollama.service"] = "GLIBC_TUNABLES=glibc.rtld.nns=4"
    before = state(manager)
    drop_in = "run/systemd/system/ollama.service.d/zz-infertune.conf"

    async def scene() -> None:
        for value in ("1", "0"):
            huge = wanted(malloc_hugetlb=value)
            planned = await adopting.plan("ollama", "ollama.service", huge)
            await adopting.adopt("ollama", "ollama.service", huge)
            both = f"glibc.rtld.nns=4:glibc.malloc.hugetlb={value}"
            rows = {each["property"]: each for each in planned["items"]}
            assert rows["Environment GLIBC_TUNABLES"]["wanted"] == both
            assert rows["Environment GLIBC_TUNABLES"]["when"] == "next start"
            assert f'Environment="GLIBC_TUNABLES={both}"\n' in tree(tmp_path)[drop_in]
        await adopting.adopt("ollama", "ollama.service", wanted())
        assert "GLIBC_TUNABLES" not in tree(tmp_path)[drop_in]
        await adopting.give_back("ollama")

    asyncio.run(scene())
    assert state(manager) == before


def test_processes_of_all_units_are_seen_to_at_once(tmp_path: Path) -> None:
    """A daemon that stops has 30 s, and a unit that puts processes back takes its time."""
    manager, adopting = world(tmp_path)
    under_way: list[str] = []
    all_there = asyncio.Event()

    async def run(unit: str) -> None:
        under_way.append(unit)
        if len(under_way) == 2:
            all_there.set()
        await all_there.wait()

    async def scene() -> None:
        for name, unit in (("a", "ollama.service"), ("b", "llm@one.service")):
            await adopting.adopt(name, unit, wanted())
        manager.run = run  # type: ignore[method-assign]
        await asyncio.wait_for(adopting.give_all_back(), GENEROUS_S)

    asyncio.run(scene())
    assert sorted(under_way[:2]) == ["infertune-adopted@a.service", "infertune-adopted@b.service"]


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)
    done = asyncio.run(adopting.plan("ollama", "ollama.service", wanted()))
    assert state(manager) == before
    rows = {(each["unit"], each["property"]): each for each in done["items"]}
    assert rows["system.slice", "MemoryMin"]["wanted"] == str(64 * MIB)
    assert rows["ollama.service", "MemoryMin"]["before"] == str(MIB)
    assert rows["ollama.service", "AllowedCPUs"] | {"unit": ""} == {
        "unit": "",
        "property": "AllowedCPUs",
        "before": "not set",
        "wanted": "1-7",
        "when": "now",
    }
    assert rows["ollama.service", "LimitMEMLOCK"]["when"] == "next start"
    assert rows["ollama.service", "Environment GGML_TEST"]["when"] == "next start"


def test_what_a_person_had_set_at_run_time_comes_back(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)

    async def scene() -> None:
        await manager.set_properties("ollama.service", {"MemoryMin": 7 * MIB})
        await manager.set_properties("system.slice", {"MemoryMin": 9 * MIB})
        before = state(manager)
        await adopting.adopt("ollama", "ollama.service", wanted())
        assert manager.now["system.slice"]["MemoryMin"] == 73 * MIB
        await manager.reload()
        assert manager.now["ollama.service"]["MemoryMin"] == 64 * MIB
        await adopting.give_back("ollama")
        assert state(manager) == before

    asyncio.run(scene())


def test_what_another_program_changed_since_is_left(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)

    async def scene() -> None:
        await adopting.adopt("c", "libpod-77.scope", wanted())
        await manager.set_properties("libpod-77.scope", {"MemorySwapMax": 5})
        left = await adopting.give_back("c")
        assert left == [
            "libpod-77.scope: MemorySwapMax was changed by another program and is left as it is"
        ]
        assert manager.now["libpod-77.scope"]["MemorySwapMax"] == 5
        assert manager.now["libpod-77.scope"]["MemoryMin"] == 0

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ("dbus.service", "cannot be adopted"),
        ("systemd-journald.service", "cannot be adopted"),
        ("user@1000.service", "cannot be adopted"),
        ("infertune.service", "cannot be adopted"),
        ("infertune-server@x.service", "cannot be adopted"),
        ("system.slice", "cannot be adopted"),
        ("init.scope", "cannot be adopted"),
        ("../etc/passwd.service", "cannot be adopted"),
        ("a b.service", "cannot be adopted"),
        ("a\n.service", "cannot be adopted"),
        (f"{'a' * 250}.service", "cannot be adopted"),
        ("nothing.service", "there is no unit 'nothing.service'"),
    ],
)
def test_what_is_refused(unit: str, says: str, tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)
    with pytest.raises(UsageError, match=says):
        asyncio.run(adopting.adopt("x", unit, wanted()))
    assert state(manager) == before


def test_a_unit_that_only_starts_a_container_is_refused(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    before = state(manager)
    argv = ["/usr/bin/docker", "run", "--name", "llm", "image"]
    manager.now["ollama.service"]["ExecStart"] = [["/usr/bin/docker", argv, False, 0, 0]]
    with pytest.raises(UsageError, match=r"ollama\.service starts a container with docker"):
        asyncio.run(adopting.adopt("x", "ollama.service", wanted()))
    del manager.now["ollama.service"]["ExecStart"]
    assert state(manager) == before


def test_a_unit_is_adopted_under_one_name(tmp_path: Path) -> None:
    _, adopting = world(tmp_path)

    async def scene() -> None:
        await adopting.adopt("a", "ollama.service", wanted())
        with pytest.raises(UsageError, match="adopted already, as 'a'"):
            await adopting.adopt("b", "alias.service", wanted())
        with pytest.raises(UsageError, match=r"'a' is ollama\.service already"):
            await adopting.adopt("a", "llm@one.service", wanted())
        with pytest.raises(UsageError, match="no unit is adopted as 'b'"):
            await adopting.give_back("b")

    asyncio.run(scene())


def test_a_damaged_book_is_said_and_nothing_is_touched(tmp_path: Path) -> None:
    manager, adopting = world(tmp_path)
    file = tmp_path / ADOPTED.lstrip("/")
    for text in ("", "[]", "{", '{"units": {"a": {}}, "slices": {}}', '{"units": []}', "[" * 9999):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        before = state(manager)
        for work in (
            adopting.adopt("a", "ollama.service", wanted()),
            adopting.give_back("a"),
        ):
            with pytest.raises(Failed, match="is damaged"):
                asyncio.run(work)
        assert state(manager) == before


async def _both(adopting: Adopting) -> None:
    """Everything that can be under way: new, another profile, a second unit, one given back."""
    await adopting.adopt("a", "ollama.service", wanted())
    await adopting.adopt("b", "llm@one.service", wanted(32))
    await adopting.adopt("a", "ollama.service", wanted(16, cpu_weight="250"))
    await adopting.give_back("b")


def _steps(base: Path) -> int:
    counter = Counter()
    manager = Manager(base, lambda _: counter(Step("systemd", "", 0)))
    adopting = Adopting(Root(base, hook=counter), manager)  # type: ignore[arg-type]
    asyncio.run(_both(adopting))
    asyncio.run(adopting.give_all_back())
    return len(counter.steps)


def test_adopted_and_killed_at_every_step(tmp_path: Path) -> None:
    """A new daemon finds the book, and puts back everything."""
    total = _steps(tmp_path / "count")
    assert total > 40
    for number in range(1, total + 1):
        base = tmp_path / str(number)
        at = At(number, _killed)
        manager = Manager(base, lambda _, at=at: at(Step("systemd", "", 0)))  # type: ignore[misc]
        before = state(manager)
        adopting = Adopting(Root(base, hook=at), manager)  # type: ignore[arg-type]
        with pytest.raises(Killed):
            asyncio.run(_until_killed(adopting))
        manager.before = lambda _: None
        asyncio.run(Adopting(Root(base), manager).give_all_back())  # type: ignore[arg-type]
        assert _cleaned(state(manager)) == before, number
        assert read_book(Root(base)).units == {}


async def _until_killed(adopting: Adopting) -> None:
    await _both(adopting)
    await adopting.give_all_back()


def _killed(step: Step) -> None:
    raise Killed(step)


def _cleaned(found: Any) -> Any:
    """Half-written successors of a file are not what it says."""
    now, files = found
    return now, {name: text for name, text in files.items() if not name.endswith(".infertune")}


TREE = "sys/fs/cgroup/system.slice/ollama.service"


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adopted unit with two processes, one of them in a group below, of three threads."""
    write_book(
        Root(tmp_path),
        Book({"ollama": ADOPTED_ONE}),
    )
    mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
    files = {"proc/self/mounts": mounts, "proc/mounts": mounts}
    files |= {f"{TREE}/cgroup.procs": "10\n", f"{TREE}/inner/cgroup.procs": "20\n"}
    files |= {f"proc/{pid}/oom_score_adj": "0\n" for pid in (10, 20)}
    for tid, pid in ((10, 10), (20, 20), (21, 20)):
        for path in (f"proc/{tid}/stat", f"proc/{pid}/task/{tid}/stat"):
            files[path] = f"{tid} (x) S " + "0 " * 18 + f"{tid}00 0\n"
        inner = "/inner" if pid == 20 else ""
        files[f"proc/{tid}/cgroup"] = f"0::/system.slice/ollama.service{inner}\n"
        files[f"nice/{tid}"] = "0"
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setitem(placing.READ, "nice", lambda root, tid: int(root.read(f"/nice/{tid}")))
    monkeypatch.setitem(
        placing.WRITE, "nice", lambda root, tid, value: root.write_value(f"/nice/{tid}", str(value))
    )
    return tmp_path


ADOPTED_ONE = Adopted(
    name="ollama",
    group="/system.slice/ollama.service",
    slices=("system.slice",),
    unit=Changed("ollama.service", {}, {}),
    wanted=Wanted("kept", "cpu", processes={"oom_score_adj": -300, "nice": -5}),
    unit_values={"oom_score_adj": 0, "nice": 3},
)


def given_now(base: Path) -> list[int]:
    paths = ("proc/10/oom_score_adj", "proc/20/oom_score_adj", "nice/10", "nice/20", "nice/21")
    return [int((base / path).read_text()) for path in paths]


def test_processes_that_run_are_given_it_and_get_their_own_back(running: Path) -> None:
    root = Root(running)
    assert placing.place(root, "ollama") == (5, 0)
    assert given_now(running) == [-300, -300, -5, -5, -5]
    assert placing.place(root, "ollama") == (0, 0)
    # One thread was given something else by somebody, one process was started with ours since.
    (running / "nice/21").write_text("7")
    for path in ("proc/30/oom_score_adj", "nice/30"):
        (running / path).parent.mkdir(exist_ok=True)
        (running / path).write_text("-300" if "oom" in path else "-5")
    for path in ("proc/30/stat", "proc/30/task/30/stat"):
        (running / path).parent.mkdir(parents=True, exist_ok=True)
        (running / path).write_text("30 (x) S " + "0 " * 18 + "3000 0\n")
    (running / "proc/30/cgroup").write_text("0::/system.slice/ollama.service\n")
    (running / f"{TREE}/cgroup.procs").write_text("10\n30\n")
    placing.place(root, "ollama")
    write_book(root, Book())
    placing.place(root, "ollama")
    assert given_now(running) == [0, 0, 0, 0, 7]
    assert (running / "proc/30/oom_score_adj").read_text() == "0"
    assert (running / "nice/30").read_text() == "3", "as its unit says"
    assert not list(running.glob("run/infertune-adopted/*"))


def test_another_process_of_the_same_number_is_not_touched(running: Path) -> None:
    root = Root(running)
    placing.place(root, "ollama")
    for path in ("proc/10/stat", "proc/10/task/10/stat"):
        (running / path).write_text("10 (y) S " + "0 " * 18 + "999 0\n")
    write_book(root, Book())
    placing.place(root, "ollama")
    assert given_now(running) == [-300, 0, -5, 0, 0]


def test_a_process_that_left_the_unit_is_not_touched(running: Path) -> None:
    """Or another that has its number: between the list and the look at it anything can happen."""
    (running / "proc/20/cgroup").write_text("0::/system.slice/ollama.service-of-another\n")
    assert placing.place(Root(running), "ollama") == (2, 0)
    assert given_now(running) == [-300, 0, -5, 0, 0]


def test_a_placing_that_is_killed_can_be_taken_back(running: Path) -> None:
    total = 0
    for number in range(1, 40):
        at = At(number, _killed)
        try:
            placing.place(Root(running, hook=at), "ollama")
            break
        except Killed:
            total += 1
        write_book(Root(running), Book())
        placing.place(Root(running), "ollama")
        assert given_now(running) == [0] * 5, number
        write_book(
            Root(running),
            Book({"ollama": ADOPTED_ONE}),
        )
    assert total > 8


@pytest.mark.parametrize("number", range(12))
def test_systemd_refuses(number: int, tmp_path: Path) -> None:
    """Whichever call it refuses, everything is as it was before that verb."""
    calls = []

    def refuse(what: str) -> None:
        calls.append(what)
        if len(calls) == number + 1:
            raise Failed("systemd: refused")

    manager, adopting = world(tmp_path)
    asyncio.run(adopting.adopt("a", "ollama.service", wanted()))
    before = state(manager)
    manager.before = refuse
    try:
        asyncio.run(adopting.adopt("b", "llm@one.service", wanted(32)))
    except Failed:
        assert state(manager) == before
        return
    # Only that the processes of one that runs are as they were does not undo the rest.
    assert len(calls) <= number or calls[number] == "run infertune-adopted@b.service"
    before = state(manager)
    try:
        asyncio.run(adopting.adopt("a", "ollama.service", wanted(8)))
    except Failed:
        assert state(manager) == before


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["adopt", "release", "reload", "restart"]),
            st.sampled_from([("a", "ollama.service"), ("b", "llm@one.service"),
                             ("c", "libpod-77.scope")]),
            st.integers(0, 200),
            st.integers(1, 60),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_any_sequence_with_kills_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, tuple[str, str], int, int]],
) -> None:
    base = tmp_path_factory.mktemp("world")
    manager = Manager(base)
    before = state(manager)
    for verb, (name, unit), megabytes, at in steps:
        hook = At(at, _killed)
        manager.before = lambda _, hook=hook: hook(Step("systemd", "", 0))  # type: ignore[misc]
        adopting = Adopting(Root(base, hook=hook), manager)  # type: ignore[arg-type]
        try:
            if verb == "adopt":
                asyncio.run(adopting.adopt(name, unit, wanted(megabytes)))
            elif verb == "release":
                asyncio.run(adopting.give_back(name))
            elif verb == "reload":
                asyncio.run(manager.reload())
        except (Killed, UsageError):
            pass
    manager.before = lambda _: None
    asyncio.run(Adopting(Root(base), manager).give_all_back())  # type: ignore[arg-type]
    assert _cleaned(state(manager)) == before


# -- the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        ("ollama.service", "ollama"),
        ("llm-server@qwen.service", "llm-server-qwen"),
        (f"libpod-{'0123456789ab' + 52 * 'f'}.scope", "libpod-0123456789ab"),
        (f"docker-{'0123456789ab' + 52 * 'f'}.scope", "docker-0123456789ab"),
        (r"app\x2dllm.service", "app-x2dllm"),
        ("my.llm", "my-llm"),
    ],
)
def test_what_a_unit_is_called_as_a_server(unit: str, name: str) -> None:
    assert cli.name_for(unit) == name
    assert NAME.fullmatch(name)


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """A command line whose daemon answers from a machine that is made up."""
    manager, adopting = world(tmp_path)

    def call(member: str, signature: str, *words: str) -> Any:
        if member == "Servers":
            return [{"name": "mine", "unit": "ollama.service"}]
        if member == "GiveBack":
            left = asyncio.run(adopting.give_back(words[0]))
            return {"name": words[0], "unit": "ollama.service", "notes": left}
        unit, _, name = words[:3]
        work = adopting.plan if member == "PlanAdoption" else adopting.adopt
        return asyncio.run(work(name, unit, wanted()))

    monkeypatch.setattr(cli, "_call", call)
    monkeypatch.setattr(cli, "daemon_runs", lambda ctx: True)
    return manager


def test_what_is_said_of_an_adoption(daemon: Manager) -> None:
    before = state(daemon)
    code, out, err = run("adopt", "ollama", "--name", "mine", "--plan")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "5 properties to change; nothing written"
    assert state(daemon) == before
    code, out, _ = run("adopt", "ollama", "--name", "mine")
    assert code == 0
    assert "the rest takes effect at its next start: systemctl restart ollama.service" in out
    assert out.splitlines()[-1] == "infertune release mine puts everything back"
    code, out, _ = run("release", "ollama.service")
    assert (code, out) == (0, "ollama.service: given back\n")
    assert state(daemon) == before


def test_what_the_command_line_refuses(daemon: Manager) -> None:
    for unit, says in (
        ("dbus", "'dbus' cannot be adopted"),
        ("system.slice", "'system.slice' cannot be adopted"),
        ("nothing", "there is no unit 'nothing.service'"),
    ):
        code, out, err = run("adopt", unit)
        assert code == 2, unit
        assert out == ""
        assert says in err
    # What is no user is said before anybody is asked.
    for user, says in (
        ("x y", "'x y' is not a user"),
        ("0", "'0' is not a user"),
        ("root", "are the sys"),
    ):
        assert run("--root", "/nowhere", "adopt", "a", "--user", user)[0] == 2
        assert says in run("adopt", "a", "--user", user)[2]
    assert max(map(len, run("adopt", "a" * 5000)[2].splitlines())) < 200
    code, _, err = run("adopt", "_.service")
    assert code == 2
    assert "'_' is not a server name" in err
    assert "give a --name" in err


@pytest.mark.parametrize(
    "words", [["adopt", "ollama"], ["adopt", "ollama", "--plan"], ["release", "x"]]
)
def test_without_a_daemon_nothing_is_adopted(words: list[str], tmp_path: Path) -> None:
    code, out, err = run("--root", str(tmp_path), *words)
    assert (code, out) == (5, "")
    assert "infertuned is not running" in err
    assert "systemctl" not in err, "to start it would not help a recorded machine"


@pytest.mark.parametrize("idle", ["4s", "25h"])
def test_how_long_idle_may_be_is_said_by_the_command_line(idle: str, tmp_path: Path) -> None:
    words = ["apply", "quiet", "--while-serving", "--idle", idle]
    code, out, err = run("--root", str(tmp_path), *words)
    assert (code, out) == (2, "")
    assert err == "infertune: --idle is 5s to 24h; nothing was touched\n"
