# SPDX-License-Identifier: Apache-2.0
"""Which other settings are worth a try for a server: a fixed, short list.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from infertune.base.records import dataclass
from infertune.catalogue.server_settings import parse_server_setting

MOST = 8
"""Each costs a minute and more; a search over all combinations would cost days, and find noise."""

Configured = Mapping[str, str | int | bool]
"""Server settings as a profile says them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings to try in place of, or beside, the baseline's."""

    settings: Configured

    @property
    def name(self) -> str:
        """As they are written on a command line."""
        return " ".join(f"{name}={said(value)}" for name, value in self.settings.items())


def said(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def canonical(settings: Configured) -> dict[str, str]:
    """As a server is started with them.  Raises ValueError."""
    return {name: parse_server_setting(name, value) for name, value in settings.items()}


def candidates(baseline: Configured, cores: int) -> list[Candidate]:
    """What to try, the most promising first; nothing that the baseline has already.

    ``cores``: physical ones that a server may use.  Threads first: too many of them, or too few,
    cost most (one per core is the server's own choice, one less leaves a core to others).
    """
    tries: list[Configured] = [{"threads": count} for count in _threads(cores)]
    tries += [
        {"ubatch_size": 512},
        {"flash_attn": "on"},
        {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        {"spec_type": "ngram-simple"},
        {"ubatch_size": 2048, "batch_size": 2048},
        {"load_mode": "none"},
    ]
    has = canonical(baseline)
    return [Candidate(each) for each in tries if not canonical(each).items() <= has.items()][:MOST]


def _threads(cores: int) -> Sequence[int]:
    found = (cores, max(cores - 1, 1), max(cores // 2, 1))
    return tuple(dict.fromkeys(found))


def together(winners: Sequence[Candidate]) -> Candidate:
    """The settings of several, those of the earlier ones first."""
    found: dict[str, str | int | bool] = {}
    for each in winners:
        if not found.keys() & each.settings.keys():
            found |= each.settings
    return Candidate(found)
