# SPDX-License-Identifier: Apache-2.0
"""The probes of this kernel: attached, read as a collector, and taken away.

    probes = Probes(names)
    probes.attach()       # needs CAP_BPF and CAP_PERFMON; what follows needs neither
    probes.collector()    # for the page
    probes.retry()        # a module has appeared: needs the capabilities again
    probes.close()

A probe that cannot be attached costs only itself, and its state says why.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from infertune.base.errors import (
    BpfError,
    FieldMissing,
    ObjectMissing,
    TracepointMissing,
)
from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.bpf import kernel
from infertune.bpf.object import Object
from infertune.exporter import declarations as declared
from infertune.exporter.base import Collector, Metric, Sample, one_of
from infertune.exporter.declarations import Declaration, Program
from infertune.exporter.totals import Totals, check, with_those_below
from infertune.host.memory import has_pressure
from infertune.host.processes import sees_all_processes

State = Literal["attached", "absent", "not applicable", "failed"]
STATES: tuple[State, ...] = ("attached", "absent", "not applicable", "failed")
RETRY_S = 5.0
_ABOVE = "above"
"""The map that every probe has: which control group is in which."""
_CLOSE_S = 1.0
"""How long a collection that hangs in the kernel is waited for at the end."""

PROBE_METRICS = (
    Metric(
        name="infertune_probe_state",
        help=f"1 for the state that a probe is in: {', '.join(STATES)}.",
        labels=("probe", "state"),
        source="infertune probes",
        series=f"{len(STATES)} per probe",
    ),
    Metric(
        name="infertune_probe_lost_total",
        kind="counter",
        unit="items",
        help="Events that a probe could not count, because a map was full or there was no memory; "
        "of a thread that has ended all it did since the last look is one.",
        labels=("probe",),
        source="probes/probe.h",
        series="one per probe",
    ),
    Metric(
        name="infertune_probe_runs_total",
        kind="counter",
        unit="items",
        help="Runs of a BPF program while the sysctl kernel.bpf_stats_enabled was 1.",
        labels=("probe", "program"),
        source="Documentation/admin-guide/sysctl/kernel.rst",
        series="one per program, while it is 1",
    ),
    Metric(
        name="infertune_probe_run_seconds_total",
        kind="counter",
        unit="seconds",
        help="Run time of a BPF program while the sysctl kernel.bpf_stats_enabled was 1.",
        labels=("probe", "program"),
        source="Documentation/admin-guide/sysctl/kernel.rst",
        series="one per program, while it is 1",
    ),
)
"""What is told about the probes themselves."""


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What became of a probe."""

    name: str
    state: State
    """absent: what it watches is not there now; not applicable: it cannot work on this kernel."""
    why: str
    """Empty when attached."""
    programs: tuple[str, ...] = ()
    """BPF programs that are attached."""


def package_directories() -> tuple[Path, Path]:
    """Where declarations and compiled programs are: package data, or those of the checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "probes"
    if os.path.isdir(installed):
        return installed, installed
    checkout = here.parents[1]
    return checkout / "probes", checkout / "build" / "probes"


def metrics() -> tuple[Metric, ...]:
    """Every metric the probes may give.  Raises DeclarationError."""
    directory, _ = package_directories()
    return _metrics(declared.load(directory))


def _metrics(declarations: Iterable[Declaration]) -> tuple[Metric, ...]:
    counted = (each.metric for declaration in declarations for each in declaration.counted)
    return (*counted, *PROBE_METRICS)


class Probes:
    """All probes.  Safe to use from several threads.

    ``directory`` holds declarations and compiled programs, None those that come with infertune.
    ``cgroups`` tells which control groups are a server's: the inode number of the directory below
    the v2 hierarchy, and the server's name.  It is asked once for each collection; all others are
    counted together.  Raises DeclarationError.
    """

    def __init__(
        self,
        directory: Path | None = None,
        cgroups: Callable[[], Mapping[int, str]] = dict,
        *,
        root: Root | None = None,
    ) -> None:
        where, self._objects = (directory, directory) if directory else package_directories()
        self._declarations = declared.load(where)
        self._cgroups = cgroups
        self._root = root or Root()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._states: Mapping[str, ProbeState] = {}
        self._attached: dict[str, _Attached] = {}

    def attach(self) -> tuple[ProbeState, ...]:
        """Attach what is not attached yet; never raises for a probe that cannot be."""
        return self._attach(lambda declaration, types: True)

    def retry(self) -> tuple[ProbeState, ...]:
        """Attach what was absent and whose module is there now.  Cheap where nothing changed."""
        return self._attach(self._has_appeared)

    def states(self) -> tuple[ProbeState, ...]:
        """The state of each probe.  Waits for nobody."""
        return tuple(self._states.values())

    def collector(self) -> Collector:
        """The probes as one of the page's collectors, which bounds their time."""
        return Collector(
            id="probes",
            summary="Counted by eBPF programs in the kernel; see `probes/`.",
            metrics=_metrics(self._declarations),
            read=lambda _: self.samples(),
            timeout_s=3.0,
        )

    def samples(self) -> list[Sample]:
        """What the probes that are attached have counted, and how they are."""
        with self._lock:
            names = self._cgroups()
            found: list[Sample] = []
            for name, probe in self._attached.items():
                state = replace(self._states[name], state="attached", why="")
                try:
                    probe.update(names)
                    found += probe.samples()
                except OSError as error:  # the next collection tries again
                    why = f"its maps cannot be read: {error.strerror}"
                    state = replace(state, state="failed", why=why)
                self._states = {**self._states, name: state}
            return [*found, *self._about_ourselves()]

    def retry_while_absent(self, appeared: Callable[[], None]) -> None:
        """Look every few seconds whether what is absent is there now (a module was loaded).

        The thread ends when nothing is absent any more; without anything absent none is started.
        ``appeared`` is called where something is there but could not be attached: loading takes a
        capability that was given up, so a new process has to.
        """
        if any(probe.state == "absent" for probe in self.states()):
            work = threading.Thread(target=self._retry, args=[appeared], name="probes", daemon=True)
            work.start()

    def close(self) -> None:
        """Detach everything."""
        self._stop.set()
        if self._lock.acquire(timeout=_CLOSE_S):
            try:
                for probe in self._attached.values():
                    probe.object.close()
                self._attached.clear()
                self._states = {}
            finally:
                self._lock.release()

    # -- inside ----------------------------------------------------------------

    def _retry(self, appeared: Callable[[], None]) -> None:
        while absent := {probe.name for probe in self.states() if probe.state == "absent"}:
            if self._stop.wait(RETRY_S):
                return
            self.retry()
            if any(probe.state == "failed" for probe in self.states() if probe.name in absent):
                appeared()
                return

    def _attach(
        self, wanted: Callable[[Declaration, kernel.Types], bool]
    ) -> tuple[ProbeState, ...]:
        with self._lock:
            types = kernel.Types(self._root)
            for each in self._declarations:
                if each.name not in self._attached and wanted(each, types):
                    self._states = {**self._states, each.name: self._try(each, types)}
        return self.states()

    def _has_appeared(self, declaration: Declaration, types: kernel.Types) -> bool:
        known = self._states.get(declaration.name)
        absent = known is not None and known.state == "absent"
        return absent and bool(declaration.module) and types.has_module(declaration.module or "")

    def _try(self, declaration: Declaration, types: kernel.Types) -> ProbeState:
        def not_attached(state: State, why: str) -> ProbeState:
            return ProbeState(declaration.name, state, why)

        if declaration.needs == "pressure" and not has_pressure(self._root):
            return not_attached("not applicable", declaration.not_applicable)
        if not sees_all_processes(self._root):
            why = "it would count a part for the whole: this is a PID namespace of its own"
            return not_attached("not applicable", f"{why}; run the exporter on the host")
        try:
            programs = _generation(declaration, types)
            probe = _Attached(declaration, programs, self._objects, types, self._root)
        except TracepointMissing as error:
            return not_attached("absent", f"{declaration.absent} ({error.message})")
        except FieldMissing as error:
            why = f"{declaration.not_applicable} ({error.message})"
            return not_attached("not applicable", why)
        except BpfError as error:
            hint = f"; {error.hint}" if error.hint else ""
            return not_attached("failed", error.message + hint)
        except (ValueError, OSError) as error:
            return not_attached("failed", str(error))
        self._attached[declaration.name] = probe
        attached = tuple(p.name for p in programs if p.when != "attach")
        return ProbeState(declaration.name, "attached", "", attached)

    def _about_ourselves(self) -> Iterator[Sample]:
        for each in self._states.values():
            yield from one_of("infertune_probe_state", (each.name,), STATES, each.state)
        measured = kernel.statistics_enabled(self._root)
        for name, probe in self._attached.items():
            yield Sample("infertune_probe_lost_total", (name,), probe.lost())
            for program in probe.programs:
                cost = probe.object.statistics(program.name)
                # Not measured is not zero.
                if cost and (cost.runs or measured):
                    labels = (name, program.name)
                    yield Sample("infertune_probe_runs_total", labels, cost.runs)
                    seconds = cost.run_time_ns / 1e9
                    yield Sample("infertune_probe_run_seconds_total", labels, seconds)


class _Attached:
    """One probe that is in the kernel.  Raises BpfError, or ValueError for a bad declaration."""

    def __init__(
        self,
        declaration: Declaration,
        programs: Sequence[Program],
        objects: Path,
        types: kernel.Types,
        root: Root,
    ) -> None:
        self.programs = programs
        self._counted = declaration.counted
        path = objects / f"{declaration.name}.bpf.o"
        if not path.exists():
            raise ObjectMissing(
                f"{path.name} was not compiled when infertune was built",
                hint="install clang, llvm and libbpf-dev, and install infertune again",
            )
        module = declaration.module
        alone = module is None or not types.has_module(module)
        self.object = Object(path, btf=None if alone else types.module(module or ""), root=root)
        try:
            self._totals = self._layouts()
            self._start()
        except BaseException:
            self.object.close()
            raise

    def _layouts(self) -> dict[str, Totals]:
        missing = {p.name for p in self.programs} - set(self.object.programs)
        missing |= {each.map for each in self._counted} - set(self.object.maps)
        if missing:
            raise ValueError(f"declared, but not in the object: {', '.join(sorted(missing))}")
        found = {}
        for name in dict.fromkeys(each.map for each in self._counted):
            key, value = self.object.layout(name)
            counted = [each for each in self._counted if each.map == name]
            for each in counted:
                check(each, key, value)
            found[name] = Totals(counted, key, value)
        return found

    def _start(self) -> None:
        self.object.load({program.name for program in self.programs})
        for program in self.programs:
            if program.when == "attach":
                self.object.attach(program.name)
                self.object.visit(program.name)
                self.object.detach(program.name)
        for program in self.programs:
            if program.when != "attach":
                self.object.attach(program.name)

    def update(self, names: Mapping[int, str]) -> None:
        """Take in what was counted until now.  Raises OSError."""
        for program in self.programs:
            if program.when == "collect":
                self.object.visit(program.name)
        above = {_number(group): _number(parent) for group, parent in self.object.entries(_ABOVE)}
        known = with_those_below(names, above)
        for name, totals in self._totals.items():
            entries = self.object.entries(name)
            idle = totals.update(entries, known)
            # Control groups come and go; those that are gone must not fill the map.
            if 2 * len(entries) > self.object.capacity(name):
                for key in idle:
                    self.object.forget(name, key)
                    totals.forget(key)
        if 2 * len(above) > self.object.capacity(_ABOVE):
            self._forget_above(above)

    def _forget_above(self, above: Mapping[int, int]) -> None:
        """What is above no group that is counted in any more."""
        needed: set[int] = set()
        for group in set().union(*(totals.groups() for totals in self._totals.values())):
            while group in above and group not in needed:
                needed.add(group)
                group = above[group]
        for group in above.keys() - needed:
            self.object.forget(_ABOVE, group.to_bytes(8, "little"))

    def samples(self) -> Iterator[Sample]:
        for counted in self._counted:
            yield from self._totals[counted.map].samples(counted)

    def lost(self) -> int:
        return sum(
            sum(struct.unpack(f"<{len(raw) // 8}Q", raw)) for _, raw in self.object.entries("lost")
        )


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _generation(declaration: Declaration, types: kernel.Types) -> Sequence[Program]:
    """The programs that this kernel has the tracepoints for.  Raises TracepointMissing."""
    module = declaration.module
    missing: list[str] = []
    for programs in declaration.generations():
        wanted = [p.tracepoint for p in programs if p.tracepoint]
        missing = [name for name in wanted if not types.has_tracepoint(name, module)]
        if not missing:
            return programs
    if module and not types.has_module(module):
        raise TracepointMissing(f"the module {module} is not loaded")
    raise TracepointMissing(f"no tracepoint {', '.join(missing)}")
