# SPDX-License-Identifier: Apache-2.0
"""Values that are known to hurt on some machines: refused there, with the reason.

One guard is one row.  Every condition that is given must hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from infertune.base.records import dataclass
from infertune.host.machine import Machine

STRIX_HALO = "1002:1586"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Refuses ``value`` of ``knob`` where the machine fits the description."""

    id: str
    knob: str
    values: tuple[str, ...]
    reason: str
    source: str
    product: str | None = None
    """Shell pattern on the DMI product name."""
    gpu: str | None = None
    """PCI id of the inference GPU."""
    kernel_before: tuple[int, ...] | None = None

    def fits(self, machine: Machine) -> bool:
        gpu = machine.inference_gpu
        # An unknown kernel or product does not fit: a guard needs a reason, not a doubt.
        if self.product is not None and not fnmatchcase(machine.dmi.product or "", self.product):
            return False
        if self.gpu is not None and (gpu is None or gpu.pci_id != self.gpu):
            return False
        version = machine.kernel_version
        return self.kernel_before is None or (bool(version) and version < self.kernel_before)


GUARDS: tuple[Guard, ...] = (
    Guard(
        id="z13-platform-profile",
        knob="platform_profile",
        values=("performance", "max-power"),
        product="*GZ302*",
        reason="this model has switched itself off under sustained load in this profile",
        source="amd-debug-tools issues #47 and #48",
    ),
    Guard(
        id="smu14-perf-level",
        knob="amdgpu.power_dpm_force_performance_level",
        values=("high", "profile_peak"),
        gpu=STRIX_HALO,
        kernel_before=(7, 1),
        reason="before Linux 7.1 this held a hard minimum clock and could lock the machine up",
        source="Linux commit 03b70e0d8aa26bab (7.1); Launchpad bug 2156858",
    ),
)


def refusal(
    knob: str, value: str, machine: Machine, guards: Iterable[Guard] = GUARDS
) -> Guard | None:
    """The first guard that refuses ``value``, or None."""
    for guard in guards:
        if guard.knob == knob and value in guard.values and guard.fits(machine):
            return guard
    return None
