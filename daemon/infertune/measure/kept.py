# SPDX-License-Identifier: Apache-2.0
"""What was kept as JSON, read back as the types that it was made of.  Pure.

A file of measurements may be edited, torn, or another user's.  What is wrong in it is found here,
by the declared types, and not by whoever computes with it later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from infertune.base.records import fields

T = TypeVar("T")

_MOST = 2**63
"""No count, size or time here is larger; more does not go into a float."""


def made_of(kind: type[T], found: Any) -> T:
    """``found``, a JSON value, as a ``kind``: a record, or any type that a record's field may have.

    Numbers are finite; a float may be written as a whole number.  Raises ValueError for anything
    else than what ``asdict`` would have given.
    """
    made: T = _made(kind, found)
    return made


def _made(kind: Any, found: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _one_of(get_args(kind), found)
    if origin is Literal:
        if isinstance(found, str) and found in get_args(kind):
            return found
    elif origin in (tuple, Sequence):
        if isinstance(found, list | tuple):
            made = [_made(get_args(kind)[0], each) for each in found]
            return tuple(made) if origin is tuple else made
    elif origin is Mapping:
        if isinstance(found, dict):
            return {str(name): _made(get_args(kind)[1], each) for name, each in found.items()}
    elif hasattr(kind, "_fields"):
        if isinstance(found, dict):
            return _record(kind, found)
    elif kind is float:
        if type(found) in (int, float) and abs(found) < _MOST:  # NaN is not less
            return float(found)
    elif kind is int:
        if type(found) is int and abs(found) < _MOST:
            return found
    elif type(found) is kind:
        return found
    raise ValueError(f"{str(found)[:40]!r} is not what was kept")


def _one_of(kinds: Sequence[Any], found: Any) -> Any:
    for kind in kinds:
        try:
            return _made(kind, found)
        except ValueError:
            continue
    raise ValueError(f"{str(found)[:40]!r} is not what was kept")


def _record(kind: Any, found: Mapping[str, Any]) -> Any:
    hints = _hints(kind)
    names = {each.name for each in fields(kind)}
    if not found.keys() <= names:
        raise ValueError(f"{kind.__name__} has no such field")
    try:
        return kind(**{name: _made(hints[name], value) for name, value in found.items()})
    except TypeError as error:  # one without a default is missing
        raise ValueError(str(error)) from None


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)
