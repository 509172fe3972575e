# SPDX-License-Identifier: Apache-2.0
"""The exporter's side of the eBPF probes: attach, retry, and say what is attached.

The probes are in infertune.exporter.probes.  Where that module, libbpf or the capability is not
there, they are absent, and the rest of the exporter works.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import Metric as Family

from infertune.exporter.base import Metric, Sample, one_of
from infertune.records import dataclass

STATES = ("attached", "absent", "not applicable", "failed")
RETRY_S = 5.0

PROBE_METRICS = (
    Metric(
        name="infertune_probe_state",
        unit="1",
        help="1 for the state that a probe is in: attached, absent, not applicable or failed.",
        labels=("probe", "state"),
        source="infertune probes",
        series=f"{len(STATES)} per probe",
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
        """That there are no probes, where there are none; else the probes tell it themselves."""
        if self._probes is None:
            yield from one_of("infertune_probe_state", ("all",), STATES, "absent")

    def families(self) -> tuple[Family, ...]:
        """What the probes have counted, and what they cost."""
        if self._probes is None:
            return ()
        with self._lock:
            return tuple(self._probes.collect())

    def retry_while_absent(self, appeared: Callable[[], None]) -> None:
        """Look every few seconds whether what is absent is there now (a module was loaded).

        The thread ends when nothing is absent any more; without anything absent none is started.
        ``appeared`` is called where something is there but could not be attached: loading takes a
        capability that was given up, so a new process has to.
        """
        if any(probe.state == "absent" for probe in self.states()) and self._probes:
            work = threading.Thread(target=self._retry, args=[appeared], name="probes", daemon=True)
            work.start()

    def _retry(self, appeared: Callable[[], None]) -> None:
        while absent := {probe.name for probe in self.states() if probe.state == "absent"}:
            if self._stop.wait(RETRY_S):
                return
            with self._lock:
                self._probes.retry()
            if any(probe.state == "failed" for probe in self.states() if probe.name in absent):
                appeared()
                return

    def close(self) -> None:
        self._stop.set()
        if self._probes:
            with self._lock:
                self._probes.close()
