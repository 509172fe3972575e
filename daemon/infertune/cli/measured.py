# SPDX-License-Identifier: Apache-2.0
"""What ``infertune prove`` has found on this machine, for the verbs that show settings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from infertune.base.records import dataclass
from infertune.cli.base import Context
from infertune.host.machine import Machine
from infertune.measure.store import OF_ROOT, directory_of, machine_key
from infertune.measure.verdicts import Measured, load, sentence, stale

_SHOWN = 3
"""Verdicts of one setting that are printed, the newest; JSON has all."""


@dataclass(frozen=True, slots=True)
class Told:
    """A verdict, and what has changed since."""

    measured: Measured
    stale: tuple[str, ...]

    @property
    def line(self) -> str:
        return sentence(self.measured, self.stale)

    @property
    def document(self) -> dict[str, Any]:
        one = self.measured
        return {
            "profile": one.profile,
            "value": one.value,
            "arm": one.arm,
            "verdict": one.word,
            "estimate": one.estimate,
            "low": one.low,
            "high": one.high,
            "pairs": one.pairs,
            "keeps": one.keeps,
            "bare": one.bare,
            "day": one.day,
            "model": one.model.name,
            "stale": list(self.stale),
        }


def directories() -> list[str]:
    """Where verdicts are: root's, and those of whoever calls."""
    return [OF_ROOT, directory_of(os.environ, os.path.expanduser("~"), root=False)]


def measured_here(ctx: Context, machine: Machine) -> list[Measured]:
    """All verdicts of this machine, the newest first."""
    return load(ctx.root, directories(), machine_key(machine))


def told(
    ctx: Context,
    machine: Machine,
    verdicts: Iterable[Measured],
    setting: str,
    *,
    profile: str | None = None,
    value: str | None = None,
) -> list[Told]:
    """Those of one setting; with ``profile``, in that one, which has ``value`` now."""
    return [
        Told(one, tuple(stale(ctx.root, one, machine.kernel, value)))
        for one in verdicts
        if one.setting == setting and profile in (None, one.profile)
    ]


def lines(found: Iterable[Told]) -> list[str]:
    """For people."""
    return [each.line for each in found][:_SHOWN]
