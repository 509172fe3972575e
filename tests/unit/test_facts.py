# SPDX-License-Identifier: Apache-2.0
"""What the daemon knows is what is so: everything that makes it untrue is noticed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.errors import ProfileError, UsageError
from infertune.base.root import Root
from infertune.profiles.profile import read_profile
from infertune.service import facts as facts_module
from infertune.service.facts import Facts
from support import build

PROFILES = "/etc/infertune/profiles"


def later() -> int:
    """A time at which what a test wrote a moment ago has settled."""
    return time.time_ns() + 60_000_000_000


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = build(tmp_path)
    write(found, "/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    write(found, "/sys/devices/system/cpu/online", "0-1\n")
    write(found, f"{PROFILES}/mine.toml", 'extends = "below"\n[now]\nvm.swappiness = 7\n')
    write(found, "/usr/lib/infertune/profiles/below.toml", "[now]\nksm.run = 0\n")
    return found


def write(root: Root, path: str, text: str) -> Path:
    file = root.at(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# -- the machine -------------------------------------------------------------------------


@pytest.fixture
def hardware(root: Root) -> Callable[[], Facts]:
    """The daemon's facts; DMI stands for all that is read once."""

    def known() -> Facts:
        write(root, "/sys/class/dmi/id/product_name", "before")
        found = Facts(root)
        found.watch()
        assert found.machine().dmi.product == "before"
        write(root, "/sys/class/dmi/id/product_name", "after")
        return found

    return known


def test_hardware_is_read_once(hardware: Callable[[], Facts]) -> None:
    assert hardware().machine().dmi.product == "before"


def test_an_event_of_a_device_makes_it_read_again(hardware: Callable[[], Facts]) -> None:
    facts = hardware()
    facts.device_changed()
    assert facts.machine().dmi.product == "after"


def test_a_cpu_that_went_offline_is_seen_without_an_event(
    root: Root, hardware: Callable[[], Facts]
) -> None:
    facts = hardware()
    write(root, "/sys/devices/system/cpu/online", "0\n")
    assert facts.machine().cpu.online == (0,)
    assert facts.machine().dmi.product == "after"


def test_where_devices_are_not_watched_nothing_is_known(root: Root) -> None:
    facts = Facts(root, now_ns=later)
    for product in ("one", "two"):
        write(root, "/sys/class/dmi/id/product_name", product)
        assert facts.machine().dmi.product == product
    assert facts.profile("mine") is not facts.profile("mine")


def test_a_tuner_that_starts_and_stops(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Facts(root)
    facts.watch()

    def running() -> list[str]:
        return [each.id for each in facts.machine().tuners if each.running]

    assert running() == []
    # A unit, and a mark: at once.
    unit = root.at("/sys/fs/cgroup/system.slice/tuned.service")
    unit.mkdir(parents=True)
    assert running() == ["tuned"]
    unit.rmdir()
    assert running() == []
    mark = write(root, "/run/tlp/last_pwr", "0\n")
    assert running() == ["tlp"]
    mark.unlink()
    # Started by hand, without a unit: when it comes to the bus, else after a while.
    process = write(root, "/proc/77/comm", "tuned\n")
    assert running() == []
    facts.tuner_changed()
    assert running() == ["tuned"]
    process.unlink()
    assert running() == ["tuned"]
    now = time.monotonic()
    monkeypatch.setattr(facts_module.time, "monotonic", lambda: now + facts_module.NAMES_S + 1)
    assert running() == []


def test_facts_are_the_same_for_one_step_of_the_loop(root: Root) -> None:
    waiting: list[Callable[[], None]] = []
    facts = Facts(root, soon=waiting.append)
    write(root, "/sys/class/dmi/id/product_name", "before")
    first = facts.machine()
    write(root, "/sys/class/dmi/id/product_name", "after")
    assert facts.machine() is first
    while waiting:
        waiting.pop()()
    assert facts.machine().dmi.product == "after"


# -- profiles ----------------------------------------------------------------------------


@pytest.fixture
def profiles(root: Root) -> Facts:
    found = Facts(root, now_ns=later)
    found.watch()
    return found


def swappiness(facts: Facts) -> object:
    given = facts.profile("mine").general.get(("now", "vm.swappiness"))
    return given and given.configured


def test_a_profile_is_read_once(profiles: Facts) -> None:
    assert profiles.profile("mine") is profiles.profile("mine")


def edited(root: Root) -> None:
    write(root, f"{PROFILES}/mine.toml", "[now]\nvm.swappiness = 8\n")


def edited_to_the_same_size(root: Root) -> None:
    file = root.at(f"{PROFILES}/mine.toml")
    before = file.stat()
    file.write_text(file.read_text().replace("7", "8"))
    # An editor that keeps the times cannot keep the one of the change itself.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(root: Root) -> None:
    new = write(root, "/new", 'extends = "below"\n[now]\nvm.swappiness = 8\n')
    new.rename(root.at(f"{PROFILES}/mine.toml"))


def another_directory_in_its_place(root: Root) -> None:
    write(root, "/etc/infertune/other/mine.toml", "[now]\nvm.swappiness = 8\n")
    root.at(PROFILES).rename(root.at("/etc/infertune/aside"))
    root.at("/etc/infertune/other").rename(root.at(PROFILES))


def another_way_to_it(root: Root) -> None:
    write(root, "/etc/other/profiles/mine.toml", "[now]\nvm.swappiness = 8\n")
    root.at("/etc/infertune").rename(root.at("/etc/aside"))
    root.at("/etc/infertune").symlink_to(root.at("/etc/other"))


@pytest.mark.parametrize(
    "change",
    [
        edited,
        edited_to_the_same_size,
        replaced,
        another_directory_in_its_place,
        another_way_to_it,
    ],
)
def test_a_profile_that_changed_is_read_again(
    change: Callable[[Root], None], root: Root, profiles: Facts
) -> None:
    assert swappiness(profiles) == 7
    change(root)
    assert swappiness(profiles) == 8


def test_a_parent_that_changed_is_read_again(root: Root, profiles: Facts) -> None:
    key = ("now", "ksm.run")
    assert profiles.profile("mine").general[key].configured == 0  # type: ignore[index]
    write(root, "/usr/lib/infertune/profiles/below.toml", "[now]\nksm.run = 1\n")
    assert profiles.profile("mine").general[key].configured == 1  # type: ignore[index]
    # Another one that counts before it, in a directory that was not there.
    write(root, "/run/infertune/profiles/below.toml", "[now]\nksm.run = 0\n")
    assert profiles.profile("mine").general[key].configured == 0  # type: ignore[index]
    root.at("/run/infertune/profiles/below.toml").unlink()
    assert profiles.profile("mine").general[key].configured == 1  # type: ignore[index]


def test_a_profile_that_is_gone_or_wrong_is_not_known_any_more(root: Root, profiles: Facts) -> None:
    assert swappiness(profiles) == 7
    file = root.at(f"{PROFILES}/mine.toml")
    text = file.read_text()
    file.write_text("[now]\nvm.swappines = 7\n")
    with pytest.raises(ProfileError):
        profiles.profile("mine")
    file.unlink()
    with pytest.raises(UsageError):
        profiles.profile("mine")
    file.write_text(text)
    assert swappiness(profiles) == 7


def test_who_may_change_it_is_asked_again(
    root: Root, profiles: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noted(where: Root, name: str) -> object:
        read.append(name)
        return read_profile(where, name)

    monkeypatch.setattr(facts_module, "read_profile", noted)
    profiles.profile("mine")
    for path in (f"{PROFILES}/mine.toml", PROFILES, "/etc/infertune", "/etc"):
        before = len(read)
        profiles.profile("mine")
        assert len(read) == before
        mode = root.at(path).stat().st_mode
        root.at(path).chmod(mode | 0o002)
        profiles.profile("mine")
        assert len(read) == before + 1, path
        root.at(path).chmod(mode)
        profiles.profile("mine")
    # What comes and goes in a directory above it is nothing to it.
    before = len(read)
    write(root, "/etc/infertune/anything", "x")
    profiles.profile("mine")
    assert len(read) == before


def test_what_changed_a_moment_ago_is_read_again(root: Root) -> None:
    """Two changes within one tick of the kernel's clock may have the same times."""
    facts = Facts(root)
    facts.watch()
    assert facts.profile("mine") is not facts.profile("mine")


def test_known_profiles_do_not_grow_without_bound(root: Root, profiles: Facts) -> None:
    for number in range(facts_module.MAX_PROFILES + 5):
        write(root, f"{PROFILES}/p{number}.toml", "[now]\nvm.swappiness = 1\n")
    for number in range(facts_module.MAX_PROFILES + 5):
        profiles.profile(f"p{number}")
        assert len(profiles._profiles) <= facts_module.MAX_PROFILES
