# SPDX-License-Identifier: Apache-2.0
"""The machine before and after a sample, and what makes the sample unfit.

This module cannot see speeds, nor import what knows them (pyproject.toml): who throws samples away
for what they show can prove anything.  It is the same rule for every arm.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from statistics import median

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.cpu import clock, online_cpus, policy_numbers
from infertune.host.gpu import amdgpu_cards, hwmon, kfd_pids
from infertune.host.gpu_metrics import gpu_metrics
from infertune.host.memory import pressure
from infertune.host.processes import Usage, children, pids, process, usage
from infertune.host.system import cpu_time

FOREIGN_CPU = 0.05
"""Share of all CPUs that others may take."""
STOLEN = 0.01
PRESSURE_FACTOR = 3.0
PRESSURE_FLOOR = 0.05
"""Share of the time; three times nothing would be nothing."""
CLOCK = 0.95
"""Of the baseline's median."""
_TICKS = 100
"""USER_HZ of x86-64 (proc_stat(5))."""
_MOST = 256
"""Processes of ours that are followed."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """One look at the machine; a figure is None where it is not told."""

    at: float
    """Monotonic clock, in seconds."""
    cpus: int
    busy_ticks: int | None
    stolen_ticks: int | None
    total_ticks: int | None
    processes: Mapping[int, Usage]
    ours: frozenset[int]
    """Ids of the server's processes and of ours."""
    servers: frozenset[int]
    stalled_s: Mapping[str, float]
    """Pressure ``some`` by resource, since boot."""
    cpu_khz: float | None
    """Mean clock of all policies."""
    gpu_hz: int | None
    throttled: int | None
    """Counter of the GPU's time at a thermal limit; its unit is the firmware's own."""
    kfd: frozenset[int]
    """Processes that have ROCm open."""
    slots: int | None = None
    """Requests of others that the server works on."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks at one moment; None where they are not told."""

    cpu_khz: float | None
    """Mean of all policies."""
    gpu_hz: int | None


@dataclass(frozen=True, slots=True)
class Between:
    """What went on during a sample: no speed of it."""

    foreign_cpu: float | None
    """Share of all CPUs that others took."""
    stolen: float | None
    stalled: Mapping[str, float]
    """Share of the time, by resource."""
    major_faults: int
    cpu_khz: float | None
    gpu_hz: float | None
    """Clocks: medians of those seen."""
    throttled: bool | None
    others_on_gpu: int
    others_in_server: int | None
    busiest: tuple[str, ...]
    """Who else took most of the CPUs: three at most, as ``NAME 0.40``."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is usual in this run: medians over the samples of the baseline against itself."""

    stalled: Mapping[str, float]
    cpu_khz: float | None
    gpu_hz: float | None


def look_at(root: Root, servers: Collection[int], own: int, slots: int | None = None) -> Conditions:
    """The machine now.  ``servers``: ids of the servers' processes; ``own``: of this program."""
    theirs = family(root, servers)
    time_used = cpu_time(root)
    card = next(iter(amdgpu_cards(root)), None)
    now = clocks(root)
    used = {pid: found for pid in pids(root) if (found := usage(root, pid)) is not None}
    return Conditions(
        at=time.monotonic(),
        cpus=len(online_cpus(root)) or 1,
        busy_ticks=time_used.busy if time_used else None,
        stolen_ticks=time_used.stolen if time_used else None,
        total_ticks=time_used.total if time_used else None,
        processes=used,
        ours=theirs | family(root, [own]),
        servers=theirs,
        stalled_s={
            resource: line.stalled_seconds
            for resource, lines in pressure(root).items()
            for line in lines
            if line.share == "some"
        },
        cpu_khz=now.cpu_khz,
        gpu_hz=now.gpu_hz,
        throttled=_throttled(root, card.device) if card else None,
        kfd=frozenset(kfd_pids(root)),
        slots=slots,
    )


def clocks(root: Root) -> Clocks:
    """The clocks now; cheap enough to be asked for while a sample runs."""
    found = [khz for number in policy_numbers(root) if (khz := clock(root, number)) is not None]
    card = next(iter(amdgpu_cards(root)), None)
    monitor = hwmon(root, card.device) if card else None
    return Clocks(
        sum(found) / len(found) if found else None,
        monitor.clocks_hz.get("sclk") if monitor else None,
    )


def family(root: Root, first: Collection[int]) -> frozenset[int]:
    """Processes and all they have started, as far as that is told."""
    found, waiting = set(first), list(first)
    while waiting and len(found) < _MOST:
        new = set(children(root, waiting.pop())) - found
        found |= new
        waiting += new
    return frozenset(found)


def _throttled(root: Root, device: str) -> int | None:
    try:
        fields = gpu_metrics(root, device).fields
    except (OSError, ValueError):
        return None
    names = (f"throttle_residency_{each}" for each in ("prochot", "thm_core", "thm_gfx", "thm_soc"))
    values = [value for name in names for value in fields.get(name, []) if value is not None]
    return sum(values) if values else None


def between(
    root: Root, before: Conditions, after: Conditions, during: Sequence[Clocks] = ()
) -> Between:
    """What went on from one look to the other.  Names of processes are read now.

    ``during``: clocks seen on the way; without any those at the end count, when the work is done
    and they may have fallen already.
    """
    seen = during or [Clocks(after.cpu_khz, after.gpu_hz)]
    seconds = after.at - before.at
    ours = before.ours | after.ours
    ticks = _difference(before.total_ticks, after.total_ticks)
    busy = _difference(before.busy_ticks, after.busy_ticks)
    stolen = _difference(before.stolen_ticks, after.stolen_ticks)
    taken = _taken(before, after)
    own = sum(count for pid, count in taken.items() if pid in ours)
    others = sorted(
        ((count, pid) for pid, count in taken.items() if count > 0 and pid not in ours),
        reverse=True,
    )
    faults = {pid: one.major_faults for pid, one in before.processes.items()}
    grown = None
    if before.throttled is not None and after.throttled is not None:
        grown = after.throttled > before.throttled
    cpus_s = max(seconds, 0.01) * _TICKS
    return Between(
        foreign_cpu=max(busy - own, 0) / ticks if busy is not None and ticks else None,
        stolen=stolen / ticks if stolen is not None and ticks else None,
        stalled={
            resource: (value - before.stalled_s[resource]) / seconds
            for resource, value in after.stalled_s.items()
            if resource in before.stalled_s and seconds > 0
        },
        major_faults=sum(
            max(one.major_faults - faults[pid], 0)
            for pid, one in after.processes.items()
            if pid in after.servers and pid in faults
        ),
        cpu_khz=_median([each.cpu_khz for each in seen]),
        gpu_hz=_median([each.gpu_hz for each in seen]),
        throttled=grown,
        others_on_gpu=len((before.kfd | after.kfd) - ours),
        others_in_server=max(
            (each for each in (before.slots, after.slots) if each is not None), default=None
        ),
        busiest=tuple(
            f"{process(root, pid).name} {count / cpus_s:.2f}" for count, pid in others[:3]
        ),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return median(known) if known else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _taken(before: Conditions, after: Conditions) -> dict[int, int]:
    """Ticks by process; one that was not there before has taken all it has."""
    found = {}
    for pid, one in after.processes.items():
        old = before.processes.get(pid)
        known = old.cpu_ticks if old and old.started == one.started else 0
        found[pid] = one.cpu_ticks - known
    return found


def usual(found: Sequence[Between]) -> Baseline:
    """The medians that PSI and clocks are held against."""
    resources = {name for each in found for name in each.stalled}
    return Baseline(
        stalled={
            name: median([each.stalled[name] for each in found if name in each.stalled])
            for name in sorted(resources)
        },
        cpu_khz=_median([each.cpu_khz for each in found]),
        gpu_hz=_median([each.gpu_hz for each in found]),
    )


def contamination(
    found: Between,
    baseline: Baseline | None = None,
    *,
    busy: bool = False,
    on_purpose: Collection[str] = (),
) -> list[str]:
    """Why a sample does not count; empty where it does.

    ``busy``: the user measures among others on purpose, and their CPU time and the waiting for it
    are no reason.  ``on_purpose``: what the measurement itself makes scarce (``cpu``, ``memory``),
    so that waiting for it, and pages read again, are what is measured.  What is not told is no
    reason either.  Without a ``baseline`` nothing is held against what is usual.
    """
    expected = {"memory", "io"} if "memory" in on_purpose else set()
    expected |= {"cpu"} if busy or "cpu" in on_purpose else set()
    reasons = []
    if not busy and found.foreign_cpu is not None and found.foreign_cpu > FOREIGN_CPU:
        who = f" ({', '.join(found.busiest)})" if found.busiest else ""
        reasons.append(f"others took {found.foreign_cpu:.0%} of the CPUs{who}")
    if found.stolen is not None and found.stolen > STOLEN:
        reasons.append(f"{found.stolen:.0%} of the CPU time was stolen by the hypervisor")
    if found.major_faults and "memory" not in on_purpose:
        reasons.append(f"the server read {found.major_faults} pages from a disk")
    if found.throttled:
        reasons.append("the GPU was throttled by heat")
    if found.others_on_gpu:
        reasons.append(f"{found.others_on_gpu} other programs had the GPU open (ROCm)")
    if found.others_in_server:
        reasons.append(f"the server worked on {found.others_in_server} requests of others")
    if baseline is not None:
        reasons += _unusual(found, baseline, expected)
    return reasons


def _unusual(found: Between, baseline: Baseline, expected: Collection[str]) -> list[str]:
    reasons = []
    for name, share in found.stalled.items():
        limit = max(PRESSURE_FACTOR * baseline.stalled.get(name, 0), PRESSURE_FLOOR)
        if share > limit and name not in expected:
            reasons.append(f"{name} pressure {share:.0%} of the time, usual is less")
    for what, now, then in (
        ("CPU", found.cpu_khz, baseline.cpu_khz),
        ("GPU", found.gpu_hz, baseline.gpu_hz),
    ):
        if now is not None and then and now < CLOCK * then:
            reasons.append(f"the {what}'s clock was at {now / then:.0%} of the usual")
    return reasons
