# SPDX-License-Identifier: Apache-2.0
"""Energy of each processor package.

A gauge of watts says what they were at the moment of a scrape; joules per token take a counter.
The kernel has one (perf_event_open(2)), which takes CAP_PERFMON to open and nothing to read: it is
opened before the exporter gives up its capabilities, as the probes are.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded
from infertune.host.energy import energy_pmu

MAX_PACKAGES = 8
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_ATTRIBUTES = struct.Struct("<IIQ48x")
"""struct perf_event_attr in its first version of 64 bytes: type, size, config."""
_CLOSE_ON_EXEC = 8

ENERGY_METRICS = (
    Metric(
        name="infertune_package_energy_joules_total",
        kind="counter",
        unit="joules",
        help="Energy that a processor package has used since the exporter was started: of an APU "
        "CPU, GPU and memory controller, not the memory.",
        labels=("package",),
        source="arch/x86/events/rapl.c, power/energy-pkg",
        series=f"one per package, at most {MAX_PACKAGES}",
    ),
)


class Energy:
    """The counters of this machine, open once ``open`` was called."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._counters: dict[str, int] = {}
        self._joules = 0.0
        self._failed: OSError | None = None

    def open(self) -> None:
        """Needs CAP_PERFMON.  Never raises: what went wrong is what ``read`` says."""
        pmu = energy_pmu(self._root)
        if pmu is None:
            return
        self._joules = pmu.joules
        try:
            for package, cpu in bounded(list(pmu.packages.items()), MAX_PACKAGES):
                self._counters[package] = _opened(pmu.type, pmu.config, cpu)
        except OSError as error:
            self._failed = error

    def read(self, root: Root) -> Iterable[Sample]:
        """Raises Absent where the processor or the kernel has no counter, OSError."""
        if self._failed:
            raise self._failed
        if not self._counters:
            raise Absent("no counter of energy (the PMU 'power', module rapl)")
        for package, counter in self._counters.items():
            (counted,) = struct.unpack("<Q", os.read(counter, 8))
            yield Sample(ENERGY_METRICS[0].name, (package,), counted * self._joules)

    def close(self) -> None:
        for counter in self._counters.values():
            os.close(counter)
        self._counters.clear()

    def collector(self) -> Collector:
        """For the page."""
        return Collector(
            id="energy",
            summary="Energy of the processor.",
            metrics=ENERGY_METRICS,
            read=self.read,
        )


def _opened(kind: int, config: int, cpu: int) -> int:
    """A counter of everything on a CPU.  Raises OSError."""
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError(0, "this architecture is not known", "perf_event_open")
    libc = ctypes.CDLL(None, use_errno=True)
    # A buffer: the kernel writes into it where it does not know this size.
    attributes = ctypes.create_string_buffer(_ATTRIBUTES.pack(kind, _ATTRIBUTES.size, config))
    counter = libc.syscall(
        ctypes.c_long(number),
        attributes,
        ctypes.c_int(-1),
        ctypes.c_int(cpu),
        ctypes.c_int(-1),
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )
    if counter < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "perf_event_open")
    return int(counter)
