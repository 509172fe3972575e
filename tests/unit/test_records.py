# SPDX-License-Identifier: Apache-2.0
"""Our dataclasses are those of the standard library, as far as they go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from infertune.base import records

BOTH = pytest.mark.parametrize("module", [dataclasses, records])


def made(module: Any) -> tuple[type, type]:
    @module.dataclass(frozen=True)
    class Base:
        first: int
        second: str = "two"

    @module.dataclass(frozen=True, kw_only=True)
    class Child(Base):
        third: tuple[Any, ...] = ()
        made: dict[str, int] = module.field(default_factory=dict)
        apart: int = module.field(default=0, compare=False)

        def twice(self) -> int:
            return self.first * 2

    return Base, Child


@BOTH
def test_fields_defaults_and_inheritance(module: ModuleType) -> None:
    base, child = made(module)
    assert (base(1).first, base(1).second, base(1, "x").second) == (1, "two", "x")
    one = child(first=3, third=(1,))
    assert (one.first, one.second, one.third, one.made, one.apart) == (3, "two", (1,), {}, 0)
    assert one.twice() == 6
    assert child(first=1).made is not child(first=1).made
    names = ["first", "second", "third", "made", "apart"]
    assert [each.name for each in module.fields(child)] == names
    assert module.is_dataclass(one)
    assert module.is_dataclass(child)
    assert not module.is_dataclass({})


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        lambda base: base(),
        lambda base: base(second="x"),
        lambda base: base(1, third=2),
        lambda base: base(third=2),
        lambda base: base(1, "x", "y"),
    ],
)
def test_what_is_missing_or_unknown_is_refused(
    module: ModuleType, make: Callable[[type], object]
) -> None:
    with pytest.raises(TypeError):
        make(made(module)[0])


@BOTH
def test_comparison_hash_and_text(module: ModuleType) -> None:
    base, child = made(module)
    assert base(1) == base(1, "two") != base(2)
    assert hash(base(1)) == hash(base(1, "two"))
    assert len({base(1), base(1), base(2)}) == 2
    assert child(first=1, apart=1) == child(first=1, apart=2)
    assert child(first=1) != base(1)
    assert repr(base(1)).endswith("Base(first=1, second='two')")

    @module.dataclass
    class Loose:
        value: int

    loose = Loose(1)
    loose.value = 2
    assert loose == Loose(2)
    with pytest.raises(TypeError, match="unhashable"):
        hash(loose)


@BOTH
def test_a_frozen_one_stays_as_it_is(module: ModuleType) -> None:
    one = made(module)[0](1)
    for name in ("first", "other"):
        with pytest.raises(AttributeError, match="cannot"):
            setattr(one, name, 2)
    with pytest.raises(AttributeError, match="cannot"):
        del one.first
    assert copy.deepcopy(one) == one


@BOTH
def test_replace_asdict_and_match(module: ModuleType) -> None:
    base, child = made(module)
    assert module.replace(base(1), second="x") == base(1, "x")
    with pytest.raises(TypeError):
        module.replace(base(1), third=1)
    one = child(first=1, third=(base(2), {"in": base(3)}), made={"a": 1})
    assert module.asdict(one) == {
        "first": 1,
        "second": "two",
        "third": ({"first": 2, "second": "two"}, {"in": {"first": 3, "second": "two"}}),
        "made": {"a": 1},
        "apart": 0,
    }
    match base(7):
        case base(first, second):
            assert (first, second) == (7, "two")
        case _:
            raise AssertionError
