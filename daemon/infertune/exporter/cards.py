# SPDX-License-Identifier: Apache-2.0
"""GPUs as the exporter sees them: the cards that amdgpu drives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from infertune.exporter.base import bounded
from infertune.host.text import integer, pairs
from infertune.root import Root

MAX_GPUS = 16
"""Bound of the label ``gpu``."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU."""

    name: str
    """``card1``: the label ``gpu``, as other exporters have it."""
    device: str
    pci_address: str
    """``0000:c2:00.0``; empty where it is not known."""
    pci_id: str
    """``1002:1586``; empty where it is not known."""
    render_minor: int | None
    """128 of ``renderD128``."""


def amdgpu_cards(root: Root) -> tuple[Card, ...]:
    """Every card that amdgpu drives, by number."""
    found = []
    for path in root.glob("/sys/class/drm/card*"):
        device = f"{path}/device"
        driver = root.readlink(f"{device}/driver") or ""
        # The class directory also holds connectors (card1-DP-1).
        if not re.search(r"/card\d+$", path) or driver.rpartition("/")[2] != "amdgpu":
            continue
        vendor, part = root.get_int(f"{device}/vendor"), root.get_int(f"{device}/device")
        nodes = [name.removeprefix("renderD") for name in root.names(f"{device}/drm")]
        found.append(
            Card(
                name=path.rpartition("/")[2],
                device=device,
                pci_address=pairs(root.get(f"{device}/uevent"), "=").get("PCI_SLOT_NAME", ""),
                pci_id="" if vendor is None or part is None else f"{vendor:04x}:{part:04x}",
                render_minor=next(filter(None, map(integer, nodes)), None),
            )
        )
    return tuple(bounded(found, MAX_GPUS))
