# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a structure lie, from the type information (BTF) in a compiled object.

So a structure is written down once, in C.  Format: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from infertune.base.records import dataclass

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_ARRAY = struct.Struct("<III")

_INT, _POINTER, _ARRAY_KIND, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC_PROTO, _VAR, _DATASEC = 8, 9, 10, 11, 13, 14, 15
_DECL_TAG, _TYPE_TAG, _ENUM64 = 17, 18, 19
_ALIASES = {_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG}
# Bytes after the common part of a type: fixed, and for each of its members.
_TAIL = {
    _INT: (4, 0),
    _ARRAY_KIND: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}
_SIGNED = 1


@dataclass(frozen=True, slots=True)
class Field:
    """One number, or an array of them."""

    offset: int
    """Bytes from the start of the structure."""
    size: int
    """Bytes of one element."""
    count: int
    """Elements; 1 for a plain number."""
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A type, flattened: nested structures have dotted names, a plain number the name ``""``."""

    size: int
    fields: dict[str, Field]

    def read(self, data: bytes, name: str) -> tuple[int, ...]:
        """The elements of a field."""
        field = self.fields[name]
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}[field.size]
        if field.signed:
            code = code.lower()
        return struct.unpack_from(f"<{field.count}{code}", data, field.offset)

    def text(self, data: bytes, name: str) -> str:
        """An array of characters as text."""
        field = self.fields[name]
        raw = data[field.offset : field.offset + field.size * field.count]
        return raw.partition(b"\0")[0].decode("utf-8", "replace")


class _Type(NamedTuple):
    name: str
    kind: int
    members: int
    size_or_type: int
    tail: int
    """Where what follows the common part begins."""


class Types:
    """The types in a piece of BTF.  Raises ValueError if it is none."""

    def __init__(self, data: bytes) -> None:
        header = _header(data)
        self._data = data
        self._strings = header.strings
        self._types = list(self._scan(header))

    def layout(self, type_id: int) -> Layout:
        """Layout of the type with this id.  Raises ValueError for what counters are not made of."""
        fields: dict[str, Field] = {}
        size = self._collect(type_id, "", 0, fields)
        return Layout(size, fields)

    def _scan(self, header: _Header) -> Iterator[_Type]:
        yield _Type("void", 0, 0, 0, 0)
        position = header.types
        while position < header.types + header.types_size:
            name, info, size_or_type = _TYPE.unpack_from(self._data, position)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            position += _TYPE.size
            yield _Type(self._string(name), kind, members, size_or_type, position)
            fixed, each = _TAIL.get(kind, (0, 0))
            position += fixed + each * members

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _resolved(self, type_id: int) -> _Type:
        each = self._types[type_id]
        while each.kind in _ALIASES:
            each = self._types[each.size_or_type]
        return each

    def _collect(self, type_id: int, name: str, offset: int, fields: dict[str, Field]) -> int:
        """Add the fields below a type; returns its size."""
        found = self._resolved(type_id)
        if found.kind in (_INT, _ENUM):
            fields[name] = Field(offset, found.size_or_type, 1, self._signed(found))
            return found.size_or_type
        if found.kind == _ARRAY_KIND:
            element, _, count = _ARRAY.unpack_from(self._data, found.tail)
            item = self._resolved(element)
            if item.kind != _INT:
                raise ValueError(f"'{name}' is an array of something that is not a number")
            fields[name] = Field(offset, item.size_or_type, count, self._signed(item))
            return int(item.size_or_type * count)
        if found.kind == _STRUCT:
            for index in range(found.members):
                place = found.tail + index * _MEMBER.size
                member, member_type, bits = _MEMBER.unpack_from(self._data, place)
                path = f"{name}.{self._string(member)}".lstrip(".")
                self._collect(member_type, path, offset + (bits & 0xFFFFFF) // 8, fields)
            return found.size_or_type
        raise ValueError(f"'{name or found.name}' is neither a number nor made of numbers")

    def _signed(self, found: _Type) -> bool:
        if found.kind != _INT:
            return False
        (encoding,) = struct.unpack_from("<I", self._data, found.tail)
        return bool(encoding >> 24 & _SIGNED)


class _Header(NamedTuple):
    raw: bytes
    types: int
    types_size: int
    strings: int
    strings_size: int


def _header(data: bytes) -> _Header:
    if len(data) < _HEADER.size or struct.unpack_from("<H", data)[0] != _MAGIC:
        raise ValueError("this is no BTF of a little-endian machine")
    _, _, _, size, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
    return _Header(data[:size], size + types, types_size, size + strings, strings_size)


def check(data: bytes) -> None:
    """Raises ValueError where this is no BTF."""
    header = _header(data)
    if header.strings + header.strings_size > len(data):
        raise ValueError("this BTF is cut short")


def join(base: bytes, split: bytes) -> bytes:
    """BTF of the kernel and of one module as one that stands alone.

    A module's BTF continues the kernel's: its type ids and string offsets begin where those of
    the kernel end.  So nothing has to be renumbered.  Raises ValueError if one of them is no BTF.
    """
    first, second = _header(base), _header(split)
    types = base[first.types :][: first.types_size] + split[second.types :][: second.types_size]
    strings = (
        base[first.strings :][: first.strings_size] + split[second.strings :][: second.strings_size]
    )
    magic, version, flags, *_ = _HEADER.unpack_from(base)
    header = _HEADER.pack(
        magic, version, flags, _HEADER.size, 0, len(types), len(types), len(strings)
    )
    return header + types + strings
