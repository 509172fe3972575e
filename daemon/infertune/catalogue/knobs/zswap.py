# SPDX-License-Identifier: Apache-2.0
"""Compressed swap cache in memory."""

from functools import partial

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Integer, Switch
from infertune.host.machine import Machine

_ZSWAP = "/sys/module/zswap/parameters"
_DOC = "Documentation/admin-guide/mm/zswap.rst"
_ABSENT = "this kernel is built without CONFIG_ZSWAP"
_EVIDENCE = Evidence(
    "protective, unmeasured",
    "Quantised weights do not compress; for the rest of the desktop it saves disk swap.",
    _DOC,
)


def _needs_swap(machine: Machine) -> str | None:
    swap = machine.swap
    if swap is None:
        return None
    if not swap.areas:
        return "no effect here: there is no swap"
    if swap.in_memory == "zram":
        return "all swap here is zram: with zswap in front of it pages are compressed twice"
    return None


_knob = partial(Knob, evidence=_EVIDENCE, doc=_DOC, absent=_ABSENT, note=_needs_swap)

KNOBS: tuple[Knob, ...] = (
    _knob(
        id="zswap.enabled",
        paths=(f"{_ZSWAP}/enabled",),
        value=Switch("Y", "N"),
        summary="Whether pages on their way to swap are compressed into memory first.",
    ),
    _knob(
        id="zswap.shrinker_enabled",
        paths=(f"{_ZSWAP}/shrinker_enabled",),
        value=Switch("Y", "N"),
        summary="Whether cold compressed pages are written out under pressure (Linux 6.8).",
    ),
    _knob(
        id="zswap.max_pool_percent",
        paths=(f"{_ZSWAP}/max_pool_percent",),
        value=Integer(0, 100, "%"),
        summary="Share of memory the compressed pool may take.",
    ),
)
