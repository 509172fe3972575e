# SPDX-License-Identifier: Apache-2.0
"""The exporter's side of the eBPF probes: attach, retry, and say what is attached.

The probes are in infertune.exporter.probes.  Where that module, libbpf or the capability is not
there, they are absent, and the rest of the exporter works.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import Metric as Family

from infertune.exporter.base import Metric, Sample, one_of

STATES = ("attached", "absent", "failed")
RETRY_S = 5.0

PROBE_METRICS = (
    Metric(
        name="infertune_probe_state",
        unit="1",
        help="1 for what became of the probe. absent: this kernel or machine does not have what "
        "it attaches to.",
        labels=("probe", "state"),
        source="infertune probes",
        series=f"{len(STATES)} per probe",
    ),
    Metric(
        name="infertune_probe_info",
        unit="1",
        help="Why a probe is not attached.",
        labels=("probe", "why"),
        source="infertune probes",
        series="one per probe",
    ),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe as people see it."""

    name: str
    state: str
    why: str
    programs: tuple[str, ...] = ()


class Probing:
    """The probes of this machine, or the reason why there are none."""

    def __init__(self, cgroups: Callable[[], Mapping[int, str]]) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._probes: Any = None
        self._none = ""
        try:
            module = importlib.import_module("infertune.exporter.probes")
            self._probes = module.Probes(cgroups=cgroups)
        except ImportError as error:
            self._none = f"not installed: {error}"
        except OSError as error:
            self._none = str(error)

    def attach(self) -> tuple[Probe, ...]:
        """Attach what this kernel has.  Needs CAP_BPF and CAP_PERFMON."""
        if self._probes:
            with self._lock:
                self._probes.attach()
        return self.states()

    def states(self) -> tuple[Probe, ...]:
        """What became of each probe."""
        if self._probes is None:
            return (Probe("all", "absent", self._none),)
        return tuple(
            Probe(each.name, each.state, each.why or "", tuple(map(str, each.programs or ())))
            for each in self._probes.states()
        )

    def samples(self) -> Iterable[Sample]:
        """The states as metrics."""
        for probe in self.states():
            state = probe.state if probe.state in STATES else "failed"
            yield from one_of("infertune_probe_state", (probe.name,), STATES, state)
            if probe.why:
                yield Sample("infertune_probe_info", (probe.name, probe.why), 1)

    def families(self) -> tuple[Family, ...]:
        """What the probes have counted, and what they cost."""
        if self._probes is None:
            return ()
        with self._lock:
            return tuple(self._probes.collect())

    def retry_while_absent(self) -> None:
        """Try again every few seconds, in a thread that ends when nothing is absent any more."""
        if self._probes and any(probe.state == "absent" for probe in self.states()):
            threading.Thread(target=self._retry, name="probes", daemon=True).start()

    def _retry(self) -> None:
        while not self._stop.wait(RETRY_S):
            with self._lock:
                self._probes.retry()
            if not any(probe.state == "absent" for probe in self.states()):
                return

    def close(self) -> None:
        self._stop.set()
        if self._probes:
            with self._lock:
                self._probes.close()
