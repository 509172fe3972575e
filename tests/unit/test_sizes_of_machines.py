# SPDX-License-Identifier: Apache-2.0
"""The amounts in the profiles that come with infertune, over machines from 32 to 256 GB."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import GIB, KIB, parse_size
from infertune.boot.options import Option
from infertune.boot.sizes import check_sizes
from infertune.host.machine import Machine, read_machine
from infertune.host.memory import PAGE
from infertune.host.snapshot import open_root
from infertune.pools.facts import PoolFacts
from infertune.profiles.profile import Profile, load_profile, package_directory
from infertune.profiles.resolve import resolve

FIXTURE = Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot"
PROFILES = sorted(path.stem for path in package_directory().glob("*.toml"))

ROG_Z13 = 126872424 * KIB
"""MemTotal of a 128 GB machine whose firmware keeps 4 GiB; others show up to 124.9 GiB."""
GORGON = 197132288 * KIB
"""MemTotal of a Ryzen AI MAX+ PRO 495 with 192 GB."""


@cache
def recorded() -> Machine:
    with open_root(str(FIXTURE)) as root:
        return read_machine(root)


@cache
def loaded(profile: str) -> Profile:
    return load_profile(Root("/nowhere"), profile)


def of_size(total: int) -> Machine:
    return replace(recorded(), memory=replace(recorded().memory, total_bytes=total))


def limit(profile: str, total: int) -> Option:
    """The boot option for GTT that a profile comes to with ``total`` bytes of memory."""
    desired = resolve(loaded(profile), of_size(total))
    assert not [each for each in desired.unresolved if each.id == "ttm.pages_limit"]
    [setting] = [each for each in desired.boot if each.id == "ttm.pages_limit"]
    return Option(setting.id, setting.canonical, (), None, False, profile)


def gib(profile: str, total: int) -> float:
    return int(limit(profile, total).value) * PAGE / GIB


@pytest.mark.parametrize(
    ("profile", "pages"), [("base", 25165824), ("long-context", 25165824), ("big-moe", 27262976)]
)
@pytest.mark.parametrize("total", [ROG_Z13, 124 * GIB, round(124.9 * GIB), 126 * GIB])
def test_128_gb_machines_get_what_was_reported_to_work(
    profile: str, pages: int, total: int
) -> None:
    assert limit(profile, total).value == str(pages)


def test_larger_machines_get_as_much_of_theirs() -> None:
    assert gib("long-context", GORGON) == gib("base", GORGON) == 141
    assert gib("big-moe", GORGON) == 154
    assert gib("desktop-share", GORGON) == 94


def test_smaller_machines_keep_a_reserve() -> None:
    assert gib("base", round(62.2 * GIB)) == 49
    assert gib("big-moe", round(62.2 * GIB)) == 53
    assert gib("base", round(94.3 * GIB)) == 75


@pytest.mark.parametrize("profile", PROFILES)
def test_every_limit_is_whole_and_accepted(profile: str) -> None:
    for tenths in range(320, 2561, 13):
        total = tenths * GIB // 10
        option = limit(profile, total)
        assert int(option.value) * PAGE % GIB == 0
        check_sizes(PoolFacts(ram=total), of_size(total), [option])


def test_the_limits_grow_with_the_machine() -> None:
    for profile in PROFILES:
        sizes = [gib(profile, total * GIB) for total in range(32, 257, 3)]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("text", "total_gib", "expected"),
    [
        ("96GiB, at least 75%, at most 80%", 188, 141 * GIB),
        ("96GiB, at least 75%, at most 80%", 125, 96 * GIB),
        ("96GiB, at least 75%, at most 80%", 60, 48 * GIB),
        ("1GiB, at least 2GiB", 60, 2 * GIB),
        ("10%", 125, 12 * GIB),
        ("1%", 60, 60 * GIB // 100),  # less than a step stays what it is
    ],
)
def test_bounds_and_whole_steps(text: str, total_gib: int, expected: int) -> None:
    assert parse_size(text, total=total_gib * GIB, step=GIB) == expected


@pytest.mark.parametrize(
    "text",
    ["1GiB, at most 2GiB, at least 1GiB", "1GiB, at least", "at least 1GiB", "1%, at most x"],
)
def test_bounds_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text, total=GIB)
