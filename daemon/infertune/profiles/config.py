# SPDX-License-Identifier: Apache-2.0
"""/etc/infertune/infertuned.toml, what the daemon is told by the admin."""

from __future__ import annotations

from infertune.base.errors import DeclarationError
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.tables import Key, read_table
from infertune.catalogue.backends import BACKENDS

CONFIG = "/etc/infertune/infertuned.toml"
_MAX_BYTES = 64 * 1024
SHORTEST_IDLE_S = 5
LONGEST_IDLE_S = 24 * 3600
CONFIG_KEYS = (
    Key(
        "profile",
        "a profile's name",
        "profile applied when the daemon starts, and of every server that names none",
        "nothing is applied",
    ),
    Key(
        "backend",
        ", ".join(("auto", *BACKENDS)),
        "backend whose part of the profile holds; auto: as the machine has it",
        "auto",
    ),
    Key(
        "enforce",
        "true, false",
        "set a value again that another program changed; three times, then it is left and said",
        "false",
    ),
    Key(
        "demand",
        "true, false",
        "the profile is in force only while a known server works; needs `profile`",
        "false",
    ),
    Key(
        "idle_seconds",
        f"{SHORTEST_IDLE_S} to {LONGEST_IDLE_S}",
        "seconds that all servers have to be idle before a profile on demand goes back",
        "60",
    ),
)


@dataclass(frozen=True, slots=True)
class Config:
    """The daemon's settings."""

    profile: str | None = None
    """Applied at start, and the profile of servers that name none; None to start idle."""
    backend: str = "auto"
    enforce: bool = False
    """Whether a value that another program changed is set again, a few times (ownership.py)."""
    demand: bool = False
    """Whether the profile is in force only while servers work."""
    idle_seconds: int = 60
    """Seconds that all servers have to be idle until it goes back."""


def read_config(root: Root) -> Config:
    """The daemon's settings; a missing file is all defaults.  Raises DeclarationError.

    One that is there and cannot be read is not missing: what the admin wants is not known then.
    """
    try:
        text = root.read_small(CONFIG, _MAX_BYTES)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and root.readlink(CONFIG) is None:
            return Config()
        raise DeclarationError(
            f"cannot be read: {error.strerror}", file=CONFIG, hint="mend it, or remove it"
        ) from None
    return _parse(text)


def _parse(text: str) -> Config:
    table = read_table(text, CONFIG, DeclarationError)
    table.only((), [key.name for key in CONFIG_KEYS])
    if table.flag("demand", False) and "profile" not in table:
        raise table.wrong(
            "demand", "'demand' needs a 'profile', which is in force while servers work"
        )
    return Config(
        profile=table.name("profile", "profile") if "profile" in table else None,
        backend=table.one_of("backend", ("auto", *BACKENDS), "auto"),
        enforce=table.flag("enforce", False),
        demand=table.flag("demand", False),
        idle_seconds=table.whole("idle_seconds", SHORTEST_IDLE_S, LONGEST_IDLE_S)
        if "idle_seconds" in table
        else 60,
    )
