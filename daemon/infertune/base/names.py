# SPDX-License-Identifier: Apache-2.0
"""What profiles, servers and their units are called."""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
NAME_RULE = "lower-case letters, digits, '-' and '_', at most 64, starting with a letter or digit"

USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}|[1-9][0-9]{0,9}")
"""A user by name or number; never root, whose units are the system's."""

DECLARED = "/etc/infertune/servers.d"
"""Declarations of servers that start with the daemon: NAME.toml each."""


OF_CONTAINER = "container/"
"""What a container's name is given with, in place of a unit: no unit has a slash in its name."""


def declared_server(file: str) -> str | None:
    """The server that a file there declares, by its name; None for any other file."""
    name = file.removesuffix(".toml")
    return name if name != file and NAME.fullmatch(name) else None


SLICE = "infertune.slice"
"""The slice of all servers that infertune starts."""
_UNIT = re.compile(rf"infertune-server@({NAME.pattern})\.service")


def server_unit(name: str) -> str:
    """The unit of a declared server; ``*`` stands for all of them."""
    return f"infertune-server@{name}.service"


def placing_unit(name: str) -> str:
    """The unit that gives processes of an adopted server what the profile says."""
    return f"infertune-adopted@{name}.service"


def user_unit(uid: int) -> str:
    """The unit that does in a user's manager what the daemon asks for."""
    return f"infertune-user@{uid}.service"


def manager_unit(uid: int) -> str:
    """The unit that a user's manager is."""
    return f"user@{uid}.service"


def server_of_unit(unit: str) -> str | None:
    """The server of a unit; None for a unit that is not a server of ours."""
    match = _UNIT.fullmatch(unit)
    return match[1] if match else None


_FOREIGN = re.compile(r"[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]+)?\.(?:service|scope)")
_LONGEST_UNIT = 255


def is_foreign_unit(unit: str) -> bool:
    """Whether this can be a service or scope that is not one of infertune's own (systemd.unit(5)).

    Nor one without which there is no system, or no way to say so.
    """
    return (
        len(unit) <= _LONGEST_UNIT
        and _FOREIGN.fullmatch(unit) is not None
        and not unit.startswith(("infertune", "systemd-", "dbus", "user@", "init."))
    )
