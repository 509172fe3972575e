# SPDX-License-Identifier: Apache-2.0
"""/etc/infertune/infertuned.toml, what the daemon is told by the admin."""

from __future__ import annotations

import tomllib

from infertune.backends import BACKENDS
from infertune.errors import UsageError
from infertune.profile import NAME
from infertune.records import dataclass
from infertune.root import Root

CONFIG = "/etc/infertune/infertuned.toml"
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """The daemon's settings."""

    profile: str | None = None
    """Applied at start, and the profile of servers that name none; None to start idle."""
    backend: str = "auto"
    enforce: bool = False
    """Whether a value that somebody else changed is set again, a few times (ownership.py)."""


def read_config(root: Root) -> Config:
    """The daemon's settings; a missing file is all defaults.  Raises UsageError.

    One that is there and cannot be read is not missing: what the admin wants is not known then.
    """
    try:
        text = root.read_small(CONFIG, _MAX_BYTES)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and root.readlink(CONFIG) is None:
            return Config()
        raise UsageError(
            f"{CONFIG}: cannot be read: {error.strerror}", hint="mend it, or remove it"
        ) from None
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{CONFIG}: {error}") from None
    kinds: dict[str, type] = {"profile": str, "backend": str, "enforce": bool}
    for key, value in found.items():
        if key not in kinds:
            raise UsageError(f"{CONFIG}: unknown key '{key}'; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise UsageError(f"{CONFIG}: {key} must be a {kinds[key].__name__}")
    config = Config(**found)
    if config.profile is not None and not NAME.fullmatch(config.profile):
        raise UsageError(f"{CONFIG}: profile is not a profile name")
    if config.backend not in ("auto", *BACKENDS):
        raise UsageError(f"{CONFIG}: backend is one of auto, {', '.join(BACKENDS)}")
    return config
