# SPDX-License-Identifier: Apache-2.0
"""A profile that is in force while servers work (``apply --while-serving``), as it is kept."""

from __future__ import annotations

import json

from infertune.base.errors import Failed
from infertune.base.names import NAME
from infertune.base.records import asdict, dataclass
from infertune.base.root import Root
from infertune.catalogue.backends import BACKENDS
from infertune.catalogue.knobs import KNOBS
from infertune.profiles.config import LONGEST_IDLE_S, SHORTEST_IDLE_S

DEMAND = "/run/infertune/demand.json"
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A profile somebody asked for."""

    profile: str
    backend: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be in force while servers work."""

    choice: Choice
    idle_s: int
    """Seconds that all servers have to be idle until it goes back."""


def write_demand(root: Root, demand: Demand | None) -> None:
    """Keep it for a daemon that comes after this one, until the next boot.  Raises Failed."""
    try:
        if demand is None:
            root.unlink(DEMAND)
            return
        root.mkdir(DEMAND.rpartition("/")[0])
        document = {**asdict(demand.choice), "idle_s": demand.idle_s}
        root.replace(DEMAND, json.dumps(document).encode())
    except OSError as error:
        raise Failed(f"{DEMAND}: {error.strerror}") from error


def read_demand(root: Root) -> Demand | None:
    """What was kept; None where nothing was, or not what we write."""
    try:
        found = json.loads(root.read_small(DEMAND, _MAX_BYTES))
        profile, backend, idle_s = found["profile"], found["backend"], found["idle_s"]
        without = found["without"]
        if (
            not NAME.fullmatch(profile)
            or backend not in ("auto", *BACKENDS)
            or not isinstance(without, list)
            or not all(each in KNOBS for each in without)
            or type(idle_s) is not int
            or not SHORTEST_IDLE_S <= idle_s <= LONGEST_IDLE_S
        ):
            return None
        return Demand(Choice(profile, backend, tuple(without)), idle_s)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
