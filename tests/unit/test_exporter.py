# SPDX-License-Identifier: Apache-2.0
"""The exporter: what it says of a recorded machine, and what it does when a read goes wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.boot import record
from infertune.boot.record import Phase
from infertune.exporter import asking
from infertune.exporter.base import Absent, Collector, Histogram, Metric, Sample
from infertune.exporter.collectors import COLLECTORS, knobs
from infertune.exporter.collectors.engines import ENGINES_COLLECTOR
from infertune.exporter.collectors.memory import Group, effective
from infertune.exporter.energy import ENERGY_METRICS
from infertune.exporter.page import (
    EXPORTER_METRICS,
    RUNNER_METRICS,
    Page,
    render,
)
from infertune.exporter.probes import metrics as probe_metrics
from infertune.exporter.runner import Runner, collect
from infertune.exporter.servers import MAX_SERVERS, asked, cgroup_ids, processes
from infertune.host import gpu_metrics
from infertune.host.gpu import DpmClock, amdgpu_cards, dpm_levels
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_snapshot
from infertune.servers.adopted import ADOPTED, Adopted, Book, Changed, Wanted, write_book

TESTS = Path(__file__).resolve().parents[1]
SERVING = TESTS / "golden" / "strix-halo-128-serving.snapshot"
GOLDEN = TESTS / "golden" / "strix-halo-128-serving.metrics"

ALL = (
    *(metric for collector in COLLECTORS.values() for metric in collector.metrics),
    *RUNNER_METRICS,
    *EXPORTER_METRICS,
    *probe_metrics(),
    *ENERGY_METRICS,
)


@pytest.fixture
def serving() -> Iterator[Root]:
    with open_snapshot(str(SERVING)) as root:
        yield root


def values(root: Root, collector: str) -> dict[tuple[str, ...], float]:
    """Value by metric and labels; the collector must not fail."""
    result = collect(COLLECTORS[collector], root)
    assert result.state == "ok", result.why
    return {(sample.metric, *sample.labels): sample.value for sample in result.samples}


def write(base: Path, path: str, text: str | bytes) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


# -- declarations --------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_declarations_follow_the_rules_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"infertune_[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"percent|_ms\b|_kb\b|_mb\b|_mhz", metric.name)
    stem = metric.name.removesuffix("_total")
    named = {
        "bytes",
        "seconds",
        "celsius",
        "watts",
        "hertz",
        "volts",
        "ratio",
        "rpm",
        "cycles",
        "joules",
    }
    if metric.unit in named:
        assert stem.endswith(f"_{metric.unit}")
    assert metric.help.endswith(".")
    assert metric.series
    assert metric.source
    assert bool(metric.bounds) == (metric.kind == "histogram")
    assert not {"pid", "path", "type", "job", "instance"} & set(metric.labels)


def test_no_metric_is_declared_twice() -> None:
    names = [metric.name for metric in ALL]
    assert sorted(names) == sorted(set(names))


def test_every_declared_metric_is_produced_or_named_here(serving: Root) -> None:
    # What the recorded machine does not have, and why.
    lacking = {
        "infertune_boot_staged_timestamp_seconds",  # nothing is staged
        "infertune_measured_change_ratio",  # nothing was measured there: test_measured_here.py
        "infertune_measured_kept_ratio",
    }
    produced = {
        sample.metric
        for collector in COLLECTORS.values()
        for sample in collect(collector, serving).samples
    }
    declared = {m.name for c in COLLECTORS.values() for m in c.metrics if c.id != "engines"}
    assert declared - produced == lacking


def test_a_sample_that_is_not_declared_fails_its_collector(tmp_path: Path) -> None:
    metric = Metric(name="infertune_a", unit="1", help="A.", source="-", series="1")

    def collector(*samples: Sample) -> Collector:
        return Collector(id="a", summary="", metrics=(metric,), read=lambda root: samples)

    root = Root(tmp_path)
    assert collect(collector(Sample("infertune_a", (), 1)), root).state == "ok"
    assert "not declared" in collect(collector(Sample("infertune_b", (), 1)), root).why
    assert "not declared" in collect(collector(Sample("infertune_a", ("x",), 1)), root).why
    twice = collect(collector(Sample("infertune_a", (), 1), Sample("infertune_a", (), 2)), root)
    assert twice.state == "failed"
    assert not twice.samples


# -- staged boot settings --------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        ("staging", "interrupted"),
        ("staged", "pending-reboot"),
        ("trying", "trying"),
        ("confirmed", "confirmed"),
        ("undoing", "interrupted"),
        ("undone", "none"),
        ("failed", "failed"),
    ],
)
def test_boot_settings_by_their_record(phase: Phase, state: str, tmp_path: Path) -> None:
    root = Root(tmp_path)
    since = "2026-11-24T10:00:00+00:00"
    record.save(root, record.Stage(phase=phase, profile="size", since=since, boot_id="1"))
    found = values(root, "boot")
    assert [key[1] for key, value in found.items() if value == 1] == [state]
    staged = found.get(("infertune_boot_staged_timestamp_seconds",))
    assert staged == (1795514400 if phase in ("staged", "trying", "confirmed") else None)


def test_a_damaged_boot_record_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, record.PATH, "torn")
    assert values(Root(tmp_path), "boot")["infertune_boot_state", "unknown"] == 1


# -- the golden page -------------------------------------------------------------------


def golden_page(root: Root) -> bytes:
    parts = [render(c.metrics, collect(c, root).samples) for c in COLLECTORS.values()]
    return b"".join(parts)


def test_page_of_the_recorded_machine(serving: Root, request: pytest.FixtureRequest) -> None:
    page = golden_page(serving)
    if request.config.getoption("--update-golden"):
        GOLDEN.write_bytes(page)
    assert page.decode() == GOLDEN.read_text(), "pytest --update-golden, and look at the diff"


def test_promtool_finds_nothing(serving: Root) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    page = Page(serving)
    text = page.text()
    page.close()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "snapshot", sorted((TESTS / "fixtures").glob("*.snapshot")), ids=lambda path: path.stem
)
def test_no_collector_fails_on_any_recorded_machine(snapshot: Path) -> None:
    with open_snapshot(str(snapshot)) as root:
        for collector in COLLECTORS.values():
            result = collect(collector, root)
            assert result.success, f"{collector.id}: {result.why}"
            assert bool(result.why) == (result.state == "absent")


def test_an_empty_machine_has_nothing_and_is_no_failure(tmp_path: Path) -> None:
    for collector in COLLECTORS.values():
        result = collect(collector, Root(tmp_path))
        assert result.success, f"{collector.id}: {result.why}"


def of_the_library(metrics: Iterable[Metric], samples: Iterable[Sample]) -> bytes:
    """The same, as the library writes it."""
    kinds = {
        "gauge": GaugeMetricFamily,
        "counter": CounterMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    made: dict[str, Any] = {m.name: kinds[m.kind](m.name, m.help, labels=m.labels) for m in metrics}
    bounds = {metric.name: metric.bounds for metric in metrics}
    for sample in samples:
        if isinstance(sample.value, Histogram):
            sums = list(itertools.accumulate(sample.value.counts))
            buckets = zip([*map(repr, bounds[sample.metric]), "+Inf"], sums, strict=True)
            made[sample.metric].add_metric(sample.labels, list(buckets), sample.value.sum)
        else:
            made[sample.metric].add_metric(sample.labels, sample.value)

    class Made:
        def collect(self) -> Iterable[Family]:
            return [family for family in made.values() if family.samples]

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Made())
    return generate_latest(registry)


@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.text(max_size=8), st.floats(allow_nan=True)),
        unique_by=lambda row: row[:2],
    ),
    st.sampled_from(["gauge", "counter"]),
    st.text(max_size=20),
)
def test_text_is_byte_for_byte_the_librarys(
    rows: list[tuple[str, str, float]], kind: Literal["gauge", "counter"], about: str
) -> None:
    name = "infertune_x_total" if kind == "counter" else "infertune_x"
    metrics = [
        Metric(
            name=name, kind=kind, unit="1", help=about, labels=("b", "a"), source="-", series="1"
        ),
        Metric(name="infertune_none", unit="1", help="N.", source="-", series="1"),
        Metric(name="infertune_plain", unit="1", help="P.", source="-", series="1"),
    ]
    samples = [Sample(name, (b, a), value) for b, a, value in rows]
    samples.append(Sample("infertune_plain", (), 1))
    assert render(metrics, samples) == of_the_library(metrics, samples)


@given(
    st.lists(st.integers(0, 1 << 40), min_size=4, max_size=4),
    st.sampled_from([("server", "limit"), ("a",), ("z", "le1"), ()]),
    st.text(max_size=5),
)
def test_histograms_are_byte_for_byte_the_librarys(
    counts: list[int], labels: tuple[str, ...], text: str
) -> None:
    metric = Metric(
        name="infertune_x_seconds",
        kind="histogram",
        unit="seconds",
        help="X.",
        labels=labels,
        source="-",
        series="1",
        bounds=(1e-6, 0.5, 17.179869184),
    )
    samples = [Sample(metric.name, (text,) * len(labels), Histogram(tuple(counts), 1.5))]
    assert render([metric], samples) == of_the_library([metric], samples)


def test_text_of_the_recorded_machine_is_the_librarys(serving: Root) -> None:
    made = b"".join(
        of_the_library(collector.metrics, collect(collector, serving).samples)
        for collector in COLLECTORS.values()
    )
    assert made == golden_page(serving)


# -- single collectors -----------------------------------------------------------------


def test_gpu(serving: Root) -> None:
    found = values(serving, "amdgpu")
    assert found["infertune_gpu_busy_ratio", "card1"] == 0.87
    assert found["infertune_gpu_clock_hertz", "card1", "sclk"] == 2_850_000_000
    assert found["infertune_gpu_dpm_clock_max_hertz", "card1", "sclk"] > 1_248_000_000
    assert found["infertune_gpu_power_watts", "card1", "average"] == 78.042
    assert found["infertune_gpu_memory_used_bytes", "card1", "gtt"] == 42949672960


@pytest.mark.parametrize(
    ("table", "levels"),
    [
        ("0: 400Mhz \n1: 800Mhz *\n", (800_000_000, 800_000_000)),
        ("0: 400Mhz *\n1: 800Mhz \n", (400_000_000, 800_000_000)),
        ("S: 19Mhz *\n0: 600Mhz \n", (19_000_000, 600_000_000)),
        ("0: 400Mhz \n", (None, 400_000_000)),
        ("", (None, None)),
    ],
)
def test_dpm_table(table: str, levels: tuple[int | None, int | None]) -> None:
    assert dpm_levels(table) == DpmClock(*levels)


def test_gpu_metrics_layouts_are_the_compilers() -> None:
    # sizeof of the structs of kgd_pp_interface.h on x86-64.
    sizes = {version: layout.size for version, layout in gpu_metrics.LAYOUTS.items()}
    assert sizes == {(2, 4): 168, (3, 0): 264}


def test_gpu_metrics_2_4() -> None:
    layout = gpu_metrics.LAYOUTS[2, 4]
    data = bytearray(b"\xff" * layout.size)
    struct.pack_into("=HBB", data, 0, layout.size, 2, 4)
    struct.pack_into("=H", data, 4, 5025)  # temperature_gfx follows the header
    struct.pack_into("=H", data, 40, 15000)  # average_socket_power follows the timestamp
    table = gpu_metrics.parse(bytes(data))
    assert table.version == (2, 4)
    assert table.fields["temperature_gfx"] == [5025]
    assert table.fields["average_socket_power"] == [15000]
    assert table.fields["average_core_power"] == [None] * 8


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes"),
        (struct.pack("=HBB", 264, 3, 1) + bytes(260), "version 3.1; known are 2.4, 3.0"),
        (struct.pack("=HBB", 264, 3, 0) + bytes(100), "the file has 104"),
        (struct.pack("=HBB", 300, 3, 0) + bytes(260), "header says 300"),
    ],
)
def test_gpu_metrics_that_is_not_known_is_absent(serving: Root, data: bytes, why: str) -> None:
    file = serving.at("/sys/class/drm/card1/device/gpu_metrics")
    file.chmod(0o644)
    file.write_bytes(data)
    result = collect(COLLECTORS["gpu_metrics"], serving)
    assert result.state == "absent"
    assert why in result.why


def test_a_gpu_that_cannot_be_read_costs_only_its_own_values(
    serving: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = sys.modules["infertune.exporter.collectors.gpu_metrics"]
    [card] = amdgpu_cards(serving)
    broken = replace(card, name="card0", device="/sys/broken")
    serving.at("/sys/broken/gpu_metrics").mkdir(parents=True)
    monkeypatch.setattr(collector, "amdgpu_cards", lambda _: [card, broken])
    result = collect(COLLECTORS["gpu_metrics"], serving)
    assert (result.state, {sample.labels[0] for sample in result.samples}) == ("ok", {"card1"})
    monkeypatch.setattr(collector, "amdgpu_cards", lambda _: [broken])
    assert collect(COLLECTORS["gpu_metrics"], serving).state == "failed"


def test_unset_fields_of_gpu_metrics_are_left_out(serving: Root) -> None:
    found = values(serving, "gpu_metrics")
    assert found["infertune_gpu_metrics_power_watts", "card1", "socket"] == 81.007
    assert ("infertune_gpu_metrics_power_watts", "card1", "system") not in found
    assert found["infertune_gpu_metrics_throttle_cycles_total", "card1", "spl"] == 1200345


def test_probes_know_servers_and_not_their_slice(serving: Root) -> None:
    """Its zeros would stand beside theirs as a server's."""
    assert sorted(cgroup_ids(serving).values()) == ["coder", "gemma"]


def test_a_drm_client_counts_once(serving: Root) -> None:
    found = values(serving, "fdinfo")
    # Open under two descriptors and in two processes.
    assert found["infertune_drm_engine_busy_seconds_total", "gemma", "card1", "compute"] == 73.5
    gtt = found["infertune_drm_memory_resident_bytes", "gemma", "card1", "gtt"]
    assert gtt == 40894464 * 1024


def test_fdinfo_that_may_not_be_read_is_a_failure_and_not_nothing(tmp_path: Path) -> None:
    class Refusing(Root):
        def listed(self, path: str) -> list[str]:
            raise PermissionError(13, "Permission denied", path)

    write(tmp_path, "/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    unit = "/sys/fs/cgroup/infertune.slice/infertune-server@a.service"
    write(tmp_path, f"{unit}/cgroup.procs", "12\n")
    result = collect(COLLECTORS["fdinfo"], Refusing(tmp_path))
    assert result.state == "failed"
    assert "Permission denied" in result.why


def test_old_memory_keys_of_fdinfo(tmp_path: Path) -> None:
    write(tmp_path, "/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    unit = "/sys/fs/cgroup/infertune.slice/infertune-server@a.service"
    write(tmp_path, f"{unit}/cgroup.procs", "12\n")
    text = (
        "drm-pdev:\t0000:01:00.0\ndrm-client-id:\t7\ndrm-memory-vram:\t4 KiB\ndrm-memory-gtt: 512\n"
    )
    write(tmp_path, "/proc/12/fdinfo/5", text)
    found = values(Root(tmp_path), "fdinfo")
    assert found["infertune_drm_memory_resident_bytes", "a", "0000:01:00.0", "vram"] == 4096
    assert found["infertune_drm_memory_resident_bytes", "a", "0000:01:00.0", "gtt"] == 512


def test_kfd_by_server(serving: Root) -> None:
    found = values(serving, "kfd")
    assert found["infertune_kfd_node_info", "card1", "gfx1151"] == 1
    assert found["infertune_kfd_evicted_seconds_total", "gemma", "card1"] == 1.53
    assert found["infertune_kfd_queues", "gemma", "card1"] == 3


def test_protection_of_the_units(serving: Root) -> None:
    found = values(serving, "memory")
    gib = 1 << 30
    # Each asks for 4 GiB and uses it; the slice has 6 for both.
    for server in ("gemma", "coder"):
        unit = f"infertune-server@{server}.service"
        assert found["infertune_unit_memory_protected_bytes", unit, server, "min"] == 3 * gib


@pytest.mark.parametrize(
    ("group", "parent", "given", "claimed", "recursive", "protected"),
    [
        # cgroup-v2.rst and the comment of effective_protection().
        (Group(100, 60), Group(200, 100), 100, 60, False, 60),  # all of what it claims
        (Group(40, 60), Group(200, 100), 100, 40, False, 40),  # no more than it uses
        (Group(100, 80), Group(200, 100), 100, 160, False, 50),  # shared out
        (Group(100, 0), Group(200, 100), 100, 60, False, 0),
        (Group(100, 0), Group(200, 100), 100, 60, True, 28),  # 40 unclaimed * 100 / 140
        (Group(100, 0), Group(100, 0), 0, 0, True, 0),
    ],
)
def test_effective_protection(
    group: Group, parent: Group, given: int, claimed: int, recursive: bool, protected: int
) -> None:
    assert effective(group, parent, given, claimed, recursive=recursive) == protected


def test_knobs_say_who_set_them(serving: Root) -> None:
    found = values(serving, "knobs")
    assert found["infertune_knob_owner", "transparent_hugepage.enabled", "infertune"] == 1
    assert found["infertune_knob_owner", "vm.swappiness", "other"] == 1
    assert found["infertune_knob_drifted", "vm.swappiness"] == 1
    assert found["infertune_knob_drifted", "transparent_hugepage.enabled"] == 0
    assert found["infertune_knob_value", "vm.swappiness"] == 100
    assert found["infertune_knob_wanted_info", "vm.swappiness", "10"] == 1
    assert found["infertune_knob_files", "cpufreq.scaling_governor", "powersave"] == 32


def test_where_knobs_are_is_looked_for_once_a_minute(
    serving: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking costs several times what reading does; what they hold is read each time."""
    looked, now = [], [0.0]

    def machine(root: Root) -> Machine:
        looked.append(now[0])
        return read_machine(root)

    monkeypatch.setattr(knobs, "read_machine", machine)
    monkeypatch.setattr(knobs, "_places", knobs._Places(lambda: now[0]))
    file = serving.at("/proc/sys/vm/swappiness")
    file.chmod(0o644)
    for number in range(5):
        now[0] = 20.0 * number
        file.write_text(f"{number}\n")
        assert values(serving, "knobs")["infertune_knob_value", "vm.swappiness"] == number
    assert looked == [0.0, 80.0]
    file.unlink()
    found = values(serving, "knobs")
    assert found["infertune_knob_owner", "vm.swappiness", "gone"] == 1


def test_journal_of_another_boot_is_not_applied(serving: Root) -> None:
    boot = serving.at("/proc/sys/kernel/random/boot_id")
    boot.chmod(0o644)
    boot.write_text("11111111-0000-0000-0000-000000000000\n")
    assert not values(serving, "profile")
    found = values(serving, "journal")
    assert found["infertune_journal_state", "idle"] == 1
    assert found["infertune_journal_earlier_boot", "runtime"] == 1


def test_damaged_journal_is_degraded(serving: Root) -> None:
    file = serving.at("/run/infertune/journal")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    found = values(serving, "journal")
    assert found["infertune_journal_state", "degraded"] == 1
    assert found[("infertune_journal_damaged_files",)] == 1


def declare(base: Path, name: str, port: int) -> None:
    write(base, f"/etc/infertune/servers.d/{name}.toml", f'profile = "quiet"\nport = {port}\n')


def ports(root: Root) -> dict[str, int]:
    return {name: each.port for name, each in asked(root).items()}


def test_ports_of_declared_servers(serving: Root, tmp_path: Path) -> None:
    assert ports(serving) == {"gemma": 8101, "coder": 8102}
    for name, text in (
        ("a", 'profile = "quiet"\nport = 8099'),
        ("misspelt", 'profle = "quiet"\nport = 8098'),
        ("b", 'port = "x"'),
        ("c", "port ="),
        ("D", "port=2"),
        ("e", f"port = 2\nx = {5000 * '['}"),
        ("f", f"port = {5000 * '1'}"),
    ):
        write(tmp_path, f"/etc/infertune/servers.d/{name}.toml", text)
    assert ports(Root(tmp_path)) == {"a": 8099}


def unending(chunk: bytes, pause_s: float = 0.0) -> Callable[[socket.socket], None]:
    """A server that says this again and again."""

    def talk(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            client.sendall(chunk)
            time.sleep(pause_s)

    return talk


def page_of(text: bytes) -> Callable[[socket.socket], None]:
    """A llama-server of one model with this page of metrics."""
    props = b'{"build_info": "b11669-x", "model_alias": "m", "is_sleeping": false}'

    def talk(client: socket.socket) -> None:
        body = props if client.recv(1000).startswith(b"GET /props ") else text
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    return talk


def drip_header(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        client.sendall(b"x")
        time.sleep(0.05)


@contextlib.contextmanager
def listening(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server for one client after the other; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while listener.fileno() >= 0:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            with contextlib.suppress(OSError), client:
                talk(client)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # where nobody came
        listener.close()
        thread.join(30)


def test_a_broken_server_costs_only_its_own_values(tmp_path: Path) -> None:
    page = b"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 1"
    with (
        listening(page_of(page + b" " + b"9" * 400 + b"\n")) as broken,
        listening(page_of(page + b"\n")) as good,
    ):
        declare(tmp_path, "broken", broken)
        declare(tmp_path, "good", good)
        root = Root(tmp_path)
        root.live = True
        result = Runner(root).run([ENGINES_COLLECTOR])["engines"]
    assert (result.state, result.why) == ("ok", "")
    found = {s[:2]: s.value for s in result.samples}
    assert found["infertune_model_requests_processing", ("good", "m")] == 1
    assert found["infertune_server_state", ("broken", "not-understood")] == 1


@pytest.mark.parametrize("error", [OverflowError, RecursionError, KeyError, OSError])
def test_whatever_the_libraries_raise_is_one_server_s_own(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def understood(answer: bytes) -> asking.Answer:
        if b"broken" in answer:
            raise error
        return as_ever(answer)

    as_ever = asking.understood
    monkeypatch.setattr(asking, "understood", understood)
    page = b"llamacpp:n_tokens_max 7\n"
    with listening(page_of(b"broken")) as broken, listening(page_of(page)) as good:
        declare(tmp_path, "broken", broken)
        declare(tmp_path, "good", good)
        root = Root(tmp_path)
        root.live = True
        result = Runner(root).run([ENGINES_COLLECTOR])["engines"]
    assert (result.state, result.why) == ("ok", "")
    assert Sample("infertune_model_tokens_max", ("good", "m"), 7) in result.samples


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b"", "unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "up"),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", "up"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "up"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not-understood"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "not-understood"),
        (b"HTTP/1.1 503 Loading\r\n\r\n", "loading"),
        (b"HTTP/1.1 401 No\r\n\r\n", "denied"),
        (b"HTTP/1.1 501 No\r\n\r\n", "no-metrics"),
        (b"HTTP/1.1 302 No\r\n\r\n", "not-understood"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not-understood"),
    ],
)
def test_answers_of_a_server(answer: bytes, state: str) -> None:
    assert asking.understood(answer) == asking.Answer(state, "abc" if state == "up" else "")


@pytest.mark.real_time
def test_a_slow_server_costs_only_its_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is slow, and however many of them: the others keep theirs within the time."""
    monkeypatch.setattr(asking, "TIMEOUT_S", 2.0)
    good = page_of(b"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 1\n")
    servers = {
        "a-silent": (lambda client: client.recv(1000) and time.sleep(6), "timeout"),
        "b-body": (unending(b"x", 0.05), "timeout"),
        "c-header": (drip_header, "timeout"),
        "d-large": (unending(1000 * b"llamacpp:n_tokens_max 1\n"), "not-understood"),
        **{f"e-body{n}": (unending(b"x", 0.05), "timeout") for n in range(20)},
        "z-good": (good, "up"),
    }
    with contextlib.ExitStack() as stack:
        for name, (talk, _) in servers.items():
            port = stack.enter_context(listening(talk))  # type: ignore[arg-type]
            write(
                tmp_path,
                f"/etc/infertune/servers.d/{name}.toml",
                f'profile = "quiet"\nport = {port}\n',
            )
        root = Root(tmp_path)
        root.live = True
        result = Runner(root).run([ENGINES_COLLECTOR])["engines"]
    assert (result.state, result.why) == ("ok", "")
    found = {s[:2]: s.value for s in result.samples}
    assert found["infertune_model_requests_processing", ("z-good", "m")] == 1
    states = {
        labels[0]: labels[1]
        for (name, labels), value in found.items()
        if name == "infertune_server_state" and value
    }
    assert states == {name: state for name, (_, state) in servers.items()}


# -- the runner and the page -------------------------------------------------------------


def made_up(name: str, read: object, **options: object) -> Collector:
    metric = Metric(name=f"infertune_{name}", unit="1", help="A.", source="-", series="1")
    return Collector(id=name, summary="", metrics=(metric,), read=read, **options)  # type: ignore[arg-type]


def one(name: str) -> object:
    return lambda root: [Sample(f"infertune_{name}", (), 1)]


def test_a_read_that_hangs_cuts_only_its_collector(tmp_path: Path) -> None:
    fifo = tmp_path / "hangs"
    os.mkfifo(fifo)
    readers = 0

    def hang(root: Root) -> Iterable[Sample]:
        nonlocal readers
        readers += 1
        fifo.read_bytes()  # opening blocks until somebody writes
        return [Sample("infertune_hangs", (), 1)]

    collectors = (
        made_up("before", one("before")),
        made_up("hangs", hang, timeout_s=0.2),
        made_up("after", one("after")),
    )
    runner = Runner(Root(tmp_path))
    threads = threading.active_count()
    for _ in range(5):
        results = runner.run(collectors)
        states = {name: result.state for name, result in results.items()}
        assert states == {"before": "ok", "hangs": "timeout", "after": "ok"}
    # It is not tried again while it hangs: one thread is lost, and one works.
    assert readers == 1
    assert threading.active_count() == threads + 2
    fifo.write_bytes(b"")
    lost = runner._lost["hangs"]
    assert lost.idle.wait(60)
    # It ends as soon as its read has come back, and not only when the collector is asked again.
    lost._thread.join(60)
    assert threading.active_count() == threads + 1
    os.unlink(fifo)
    fifo.write_bytes(b"")
    assert runner.run(collectors)["hangs"].state == "ok"
    runner.close()
    assert threading.active_count() == threads


def test_outcomes(tmp_path: Path) -> None:
    def absent(root: Root) -> Iterable[Sample]:
        raise Absent("no such thing")

    def refused(root: Root) -> Iterable[Sample]:
        raise PermissionError(13, "Permission denied", "/x")

    def bug(root: Root) -> Iterable[Sample]:
        raise KeyError("x")

    runner = Runner(Root(tmp_path))
    found = runner.run([made_up("a", absent), made_up("b", refused), made_up("c", bug)])
    runner.close()
    assert [(r.state, r.success) for r in found.values()] == [
        ("absent", True),
        ("failed", False),
        ("failed", False),
    ]


def test_what_a_bound_leaves_out_is_told(serving: Root) -> None:
    """More servers than have series: the page is cut, and says so."""
    for number in range(MAX_SERVERS + 3):
        unit = f"/sys/fs/cgroup/infertune.slice/infertune-server@z{number}.service"
        write(serving.base, f"{unit}/memory.current", "1")
        declare(serving.base, f"z{number}", 1)
    runner = Runner(serving)
    results = runner.run(COLLECTORS[name] for name in ("memory", "pressure", "cpufreq", "engines"))
    runner.close()
    # Two servers were there before.  engines: not known, a recorded machine is not asked.
    found = {name: result.left_out for name, result in results.items()}
    assert found == {"memory": 5, "pressure": 5, "cpufreq": 0, "engines": None}
    page = Page(serving)
    text = page.text(["memory"]).decode()
    page.close()
    assert 'infertune_collector_left_out{collector="memory"} 5.0' in text
    servers = re.findall(r'^infertune_unit_memory_bytes{server="[^"]', text, re.MULTILINE)
    assert len(servers) == MAX_SERVERS


def test_engines_that_a_bound_leaves_out_are_told(serving: Root) -> None:
    [client] = serving.glob("/proc/5151/fdinfo/*")
    more = "".join(f"drm-engine-z{n}:\t1 ns\n" for n in range(20))
    write(serving.base, client, serving.read(client) + more)
    left_out = collect(COLLECTORS["fdinfo"], serving).left_out
    assert left_out is not None
    assert left_out >= 4


def test_an_adopted_unit_has_series_by_its_name(serving: Root) -> None:
    group = "/sys/fs/cgroup/system.slice/ollama.service"
    write(serving.base, f"{group}/memory.current", "4096\n")
    write(serving.base, f"{group}/cgroup.procs", "77\n")
    unit = Changed("ollama.service", {}, {})
    slices = ("system.slice",)
    given = Wanted("quiet", "cpu")
    one = Adopted("ollama", "/system.slice/ollama.service", slices, unit, given)
    write_book(serving, Book({"ollama": one}))
    found = values(serving, "memory")
    assert found["infertune_unit_memory_bytes", "ollama.service", "ollama"] == 4096
    assert ("infertune_unit_memory_bytes", "infertune.slice", "") in found
    assert processes(serving)[77] == "ollama"
    assert "ollama" in cgroup_ids(serving).values()
    # Nobody but the daemon says what is adopted; one that it cannot read names nothing.
    write(serving.base, ADOPTED, "{")
    assert ("infertune_unit_memory_bytes", "ollama.service", "ollama") not in values(
        serving, "memory"
    )


def test_a_page_is_read_once_for_all_who_ask_at_the_same_time(tmp_path: Path) -> None:
    reads = 0

    def read(root: Root) -> Iterable[Sample]:
        nonlocal reads
        reads += 1
        return [Sample("infertune_a", (), reads)]

    now = [100.0]
    collectors = {"a": made_up("a", read), "slow": made_up("slow", one("slow"), max_age_s=30.0)}
    page = Page(Root(tmp_path), collectors=collectors, clock=lambda: now[0])
    threads = [threading.Thread(target=page.text) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == 1
    now[0] += 0.9
    page.text()
    assert reads == 1
    now[0] += 0.2
    text = page.text().decode()
    assert reads == 2
    assert "infertune_a 2.0" in text
    only = page.text(["slow"]).decode()
    page.close()
    assert "infertune_a" not in only
    assert "infertune_slow 1.0" in only


def test_pages_stay_whole_while_values_change(serving: Root) -> None:
    busy = serving.at("/sys/class/drm/card1/device/gpu_busy_percent")
    busy.chmod(0o644)
    page = Page(
        serving, collectors={"amdgpu": COLLECTORS["amdgpu"]}, clock=iter(range(10**9)).__next__
    )
    seen = set()
    for number in range(50):
        busy.write_text(f"{number}\n")
        for family in text_string_to_metric_families(page.text().decode()):
            if family.name == "infertune_gpu_busy_ratio":
                seen.add(family.samples[0].value)
    page.close()
    assert seen == {number / 100 for number in range(50)}
