# SPDX-License-Identifier: Apache-2.0
"""What profiles, servers and their units are called."""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
NAME_RULE = "lower-case letters, digits, '-' and '_', at most 64, starting with a letter or digit"

SLICE = "infertune.slice"
"""The slice of all servers that infertune starts."""
_UNIT = re.compile(rf"infertune-server@({NAME.pattern})\.service")


def server_unit(name: str) -> str:
    """The unit of a declared server; ``*`` stands for all of them."""
    return f"infertune-server@{name}.service"


def server_of_unit(unit: str) -> str | None:
    """The server of a unit; None for a unit that is not a server of ours."""
    match = _UNIT.fullmatch(unit)
    return match[1] if match else None
