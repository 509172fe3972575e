# SPDX-License-Identifier: Apache-2.0
"""The probes of this kernel: attached, collected as metrics, and taken away.

    probes = Probes(cgroups=names)
    probes.attach()       # needs CAP_BPF and CAP_PERFMON; what follows needs neither
    probes.collect()      # families of prometheus_client
    probes.retry()        # a module has appeared: needs the capabilities again
    probes.close()

A probe that cannot be attached costs only itself, and its state says why.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from infertune.bpf import kernel
from infertune.bpf.object import Object
from infertune.errors import (
    BpfError,
    FieldMissing,
    ObjectMissing,
    TracepointMissing,
)
from infertune.exporter import declarations as declared
from infertune.exporter.declarations import Declaration, MetricRow, Program
from infertune.exporter.totals import Histogram, Totals, check
from infertune.records import dataclass
from infertune.root import Root

State = Literal["attached", "absent", "not applicable", "failed"]
STATES: tuple[State, ...] = ("attached", "absent", "not applicable", "failed")

_STATE = "infertune_probe_state"
_LOST = "infertune_probe_lost_total"
_RUNS = "infertune_probe_runs_total"
_RUN_TIME = "infertune_probe_run_seconds_total"

OWN_METRICS = (
    MetricRow(
        _STATE,
        "gauge",
        "",
        ("probe", "state"),
        "1 for the state that a probe is in: attached, absent, not applicable or failed.",
        "4 for each probe",
        "",
    ),
    MetricRow(
        _LOST,
        "counter",
        "",
        ("probe",),
        "Events that a probe could not count, because a map was full or there was no memory.",
        "1 for each probe",
        "",
    ),
    MetricRow(
        _RUNS,
        "counter",
        "",
        ("probe", "program"),
        "Runs of a BPF program while the sysctl kernel.bpf_stats_enabled was 1.",
        "1 for each program",
        "",
    ),
    MetricRow(
        _RUN_TIME,
        "counter",
        "seconds",
        ("probe", "program"),
        "Run time of a BPF program while the sysctl kernel.bpf_stats_enabled was 1.",
        "1 for each program",
        "",
    ),
)
"""What is told about the probes themselves."""
_OWN = {row.name: row for row in OWN_METRICS}


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What became of a probe."""

    name: str
    state: State
    """absent: what it watches is not there now; not applicable: it cannot work on this kernel."""
    why: str
    """Empty when attached."""
    programs: tuple[str, ...]
    """BPF programs that are attached."""


def package_directories() -> tuple[Path, Path]:
    """Where declarations and compiled programs are: package data, or those of the checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "probes"
    if os.path.isdir(installed):
        return installed, installed
    checkout = here.parents[1]
    return checkout / "probes", checkout / "build" / "probes"


def metric_rows() -> tuple[MetricRow, ...]:
    """Every metric the probes may give, for documents.  Raises DeclarationError."""
    directory, _ = package_directories()
    return declared.metric_rows(declared.load(directory)) + OWN_METRICS


class Probes:
    """All probes.  Safe to use from several threads.

    ``directory`` holds declarations and compiled programs, None those that come with infertune.
    ``cgroups`` tells which control groups have a name: the inode number of the directory below
    the v2 hierarchy, and what to call it.  It is asked once for each collection; all others are
    ``other``.  Raises DeclarationError.
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
        self._states: dict[str, ProbeState] = {}
        self._attached: dict[str, _Attached] = {}

    def attach(self) -> tuple[ProbeState, ...]:
        """Attach what is not attached yet; never raises for a probe that cannot be."""
        return self._attach(lambda declaration, types: True)

    def retry(self) -> tuple[ProbeState, ...]:
        """Attach what was absent and whose module is there now.  Cheap where nothing changed."""
        return self._attach(self._has_appeared)

    def states(self) -> tuple[ProbeState, ...]:
        """The state of each probe, as of the last ``attach`` or ``retry``."""
        with self._lock:
            return tuple(self._states.values())

    def collect(self) -> Iterable[Metric]:
        """All metrics of the probes that are attached, and of the probes themselves."""
        with self._lock:
            names = self._cgroups()
            families: list[Metric] = []
            for declaration in self._declarations:
                probe = self._attached.get(declaration.name)
                if probe is None:
                    continue
                try:
                    probe.update(names)
                except OSError as error:
                    self._give_up(declaration, f"its maps cannot be read: {error.strerror}")
                    continue
                families += probe.families()
            return [*families, *self._about_ourselves()]

    def close(self) -> None:
        """Detach everything."""
        with self._lock:
            for probe in self._attached.values():
                probe.object.close()
            self._attached.clear()
            self._states.clear()

    # -- inside ----------------------------------------------------------------

    def _attach(
        self, wanted: Callable[[Declaration, kernel.Types], bool]
    ) -> tuple[ProbeState, ...]:
        with self._lock:
            types = kernel.Types(self._root)
            for each in self._declarations:
                if each.name not in self._attached and wanted(each, types):
                    self._states[each.name] = self._try(each, types)
            return tuple(self._states.values())

    def _has_appeared(self, declaration: Declaration, types: kernel.Types) -> bool:
        known = self._states.get(declaration.name)
        absent = known is not None and known.state == "absent"
        return absent and bool(declaration.module) and types.has_module(declaration.module or "")

    def _try(self, declaration: Declaration, types: kernel.Types) -> ProbeState:
        def not_attached(state: State, why: str) -> ProbeState:
            return ProbeState(declaration.name, state, why, ())

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

    def _give_up(self, declaration: Declaration, why: str) -> None:
        self._attached.pop(declaration.name).object.close()
        self._states[declaration.name] = ProbeState(declaration.name, "failed", why, ())

    def _about_ourselves(self) -> Iterator[Metric]:
        state = _gauge(_OWN[_STATE])
        for each in self._states.values():
            for possible in STATES:
                state.add_metric([each.name, possible], float(each.state == possible))
        yield state
        lost, runs, run_time = (_counter(_OWN[name]) for name in (_LOST, _RUNS, _RUN_TIME))
        measured = kernel.statistics_enabled(self._root)
        for name, probe in self._attached.items():
            lost.add_metric([name], probe.lost())
            for program in probe.programs:
                cost = probe.object.statistics(program.name)
                # Not measured is not zero.
                if cost and (cost.runs or measured):
                    runs.add_metric([name, program.name], cost.runs)
                    run_time.add_metric([name, program.name], cost.run_time_ns / 1e9)
        yield from (family for family in (lost, runs, run_time) if family.samples)


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
        self._metrics = declaration.metrics
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
        missing |= {m.map for m in self._metrics} - set(self.object.maps)
        if missing:
            raise ValueError(f"declared, but not in the object: {', '.join(sorted(missing))}")
        found = {}
        for name in dict.fromkeys(metric.map for metric in self._metrics):
            key, value = self.object.layout(name)
            metrics = [metric for metric in self._metrics if metric.map == name]
            for metric in metrics:
                check(metric, key, value)
            found[name] = Totals(metrics, key, value)
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
        for name, totals in self._totals.items():
            entries = self.object.entries(name)
            idle = totals.update(entries, names)
            # Control groups come and go; those that are gone must not fill the map.
            if 2 * len(entries) > self.object.capacity(name):
                for key in idle:
                    self.object.forget(name, key)
                    totals.forget(key)

    def families(self) -> Iterator[Metric]:
        for metric in self._metrics:
            family = _family(metric, self._totals[metric.map])
            if family.samples:
                yield family

    def lost(self) -> int:
        return sum(
            int.from_bytes(value, "little")
            for _, values in self.object.entries("lost")
            for value in values
        )


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


def _family(metric: declared.Metric, totals: Totals) -> Metric:
    unit = os.sysconf("SC_PAGE_SIZE") if metric.multiplier == "page" else metric.multiplier
    labels = metric.label_names
    values = totals.values(metric)
    if metric.buckets:
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
        bounds = [
            _bound(power, unit) for power in range(metric.buckets.min, metric.buckets.max + 1)
        ]
        for label, number in values.items():
            assert isinstance(number, Histogram)
            histogram.add_metric(label, _cumulated(bounds, number), number.sum * unit)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.type == "counter":
        family = CounterMetricFamily(metric.name, metric.help, labels=labels)
    else:
        family = GaugeMetricFamily(metric.name, metric.help, labels=labels)
    for label, number in values.items():
        assert isinstance(number, int)
        family.add_metric(label, number * unit)
    return family


def _bound(power: int, unit: float) -> str:
    # Twelve digits: 1.024e-06 and not 1.0240000000000001e-06.
    return repr(float(f"{2**power * unit:.12g}"))


def _cumulated(bounds: Sequence[str], histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus wants in each bucket what is in the smaller ones too."""
    count = 0
    found: list[tuple[str, float]] = []
    for bound, number in zip([*bounds, "+Inf"], histogram.buckets, strict=True):
        count += number
        found.append((bound, count))
    return found


def _gauge(row: MetricRow) -> GaugeMetricFamily:
    return GaugeMetricFamily(row.name, row.help, labels=row.labels)


def _counter(row: MetricRow) -> CounterMetricFamily:
    return CounterMetricFamily(row.name, row.help, labels=row.labels)
