# SPDX-License-Identifier: Apache-2.0
"""Dataclasses without the code that the standard library writes and compiles for each of them.

Half of what a verb did was that: 712 million instructions for ``infertune status``, 347 with this
(Python 3.11, callgrind).  Names and meaning are those of ``dataclasses``, which is what types are
checked against (records.pyi) and what tests compare with; what is not used is not here.  ``slots``
and ``kw_only`` are promises to the type checker alone.
"""

from __future__ import annotations

_MISSING = object()


class _Field:
    """What a class says of one of its fields: a value, or who makes one."""

    def __init__(self, name, default, factory, compare):
        self.name = name
        self.default = default
        self.factory = factory
        self.compare = compare


def field(*, default=_MISSING, default_factory=None, compare=True):
    """More about a field than its default: who makes it, and whether it counts in comparisons."""
    return _Field("", default, default_factory, compare)


def dataclass(cls=None, *, frozen=False, slots=False, kw_only=False):
    """A class whose annotated attributes are its fields: made, compared and shown by them."""
    del slots, kw_only
    if cls is None:
        return lambda decorated: dataclass(decorated, frozen=frozen)
    known = dict(getattr(cls, "_fields", {}))
    for name in cls.__annotations__:
        given = cls.__dict__.get(name, _MISSING)
        if not isinstance(given, _Field):
            given = _Field(name, given, None, True)
        elif given.default is _MISSING:
            delattr(cls, name)
        given.name = name
        known[name] = given
    cls._fields = known
    cls._names = frozenset(known)
    cls._defaults = {
        each.name: each.default for each in known.values() if each.default is not _MISSING
    }
    cls._factories = {each.name: each.factory for each in known.values() if each.factory}
    cls._compared = tuple(each.name for each in known.values() if each.compare)
    cls.__match_args__ = tuple(known)
    cls.__init__ = _init
    cls.__repr__ = _repr
    cls.__eq__ = _eq
    cls.__hash__ = _hash if frozen else None
    if frozen:
        cls.__setattr__ = cls.__delattr__ = _refuse
    return cls


def is_dataclass(value):
    """Whether it is a record, or a class of them."""
    return hasattr(value, "_fields")


def fields(record):
    """The fields of a record, or of a class of them, in the order in which they are written."""
    return tuple(record._fields.values())


def replace(record, /, **changes):
    """A copy in which some fields are others."""
    return type(record)(**{**record.__dict__, **changes})


def asdict(value):
    """A record as a dictionary, and so are those in it."""
    if is_dataclass(type(value)):
        return {name: asdict(getattr(value, name)) for name in value._fields}
    if isinstance(value, list | tuple):
        return type(value)(map(asdict, value))
    if isinstance(value, dict):
        return {asdict(key): asdict(each) for key, each in value.items()}
    return value


def _init(self, *values, **named):
    mine = self.__dict__  # past __setattr__, which refuses
    if self._defaults:
        mine.update(self._defaults)
    if values:
        mine.update(zip(self._fields, values, strict=False))
    if named:
        mine.update(named)
    for name, make in self._factories.items():
        if name not in mine:
            mine[name] = make()
    if mine.keys() != self._names or len(values) + len(named) > len(mine):
        wrong = ", ".join(sorted(mine.keys() ^ self._names)) or "some fields twice"
        raise TypeError(f"{type(self).__name__}: missing or unknown: {wrong}")


def _repr(self):
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
    return f"{type(self).__qualname__}({shown})"


def _eq(self, other):
    if type(self) is not type(other):
        return NotImplemented
    mine, its = self.__dict__, other.__dict__
    return mine == its or all(mine[name] == its[name] for name in self._compared)


def _hash(self):
    return hash(tuple(map(self.__dict__.__getitem__, self._compared)))


def _refuse(self, name, *value):
    raise AttributeError(f"cannot assign to field {name!r}")
