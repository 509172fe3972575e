# SPDX-License-Identifier: Apache-2.0
"""Plain documents as typed D-Bus values, and back.

The bus has no type for None: it travels as an empty array of variants, which nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbus_fast import Variant

_NONE = "av"


def to_bus(document: Mapping[str, Any]) -> dict[str, Variant]:
    """An ``a{sv}`` of a document."""
    return {key: _variant(value) for key, value in document.items()}


def from_bus(value: Any) -> Any:
    """The document of what came over the bus."""
    if isinstance(value, Variant):
        return None if value.signature == _NONE else from_bus(value.value)
    if isinstance(value, dict):
        return {key: from_bus(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [from_bus(each) for each in value]
    return value


def _variant(value: Any) -> Variant:
    match value:
        case None:
            return Variant(_NONE, [])
        case bool():
            return Variant("b", value)
        case int():
            return Variant("x", value)
        case float():
            return Variant("d", value)
        case str():
            return Variant("s", value)
        case {}:
            return Variant("a{sv}", to_bus(value))
        case list() if all(isinstance(each, str) for each in value):
            return Variant("as", value)
        case list():
            return Variant("aa{sv}", [to_bus(each) for each in value])
    raise TypeError(f"{type(value).__name__} has no form on the bus")
