# SPDX-License-Identifier: Apache-2.0
"""Declarations, layouts and totals of probes; what is said where they cannot be had."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infertune.base.errors import BpfError, BtfMissing, DeclarationError, LibbpfMissing
from infertune.base.root import Root
from infertune.bpf import btf, kernel, libbpf
from infertune.bpf.btf import Field, Layout
from infertune.exporter import declarations, probes
from infertune.exporter.base import Histogram
from infertune.exporter.declarations import Counted, Declaration, parse
from infertune.exporter.page import render
from infertune.exporter.totals import OTHER, Totals, check, with_those_below

DECLARED, _ = probes.package_directories()
FILES = sorted(DECLARED.glob("*.toml"))

GOOD = """
title = "T"
help = "H"
absent = "A"
not_applicable = "N"

[programs]
visit = { visits = "threads", when = "collect" }
new = { tracepoint = "new_name", generation = "new" }
old = { tracepoint = "old_name", generation = "old" }
both = { tracepoint = "same_name" }

[metrics.infertune_x_total]
type = "counter"
help = "H"
map = "m"
labels = { server = "server" }
value = { kind = ["a", "b"] }
series = "2"

[metrics.infertune_y_seconds]
type = "histogram"
help = "H"
map = "m"
labels = { server = "server" }
value = "h"
buckets = { min = 1, max = 3 }
multiplier = 1e-9
series = "6"
"""


# -- declarations --------------------------------------------------------------------


def test_what_is_declared_is_read() -> None:
    found = parse(GOOD, "x.toml")
    assert found.name == "x"
    first, second = found.counted
    assert (first.metric.name, second.metric.name) == ("infertune_x_total", "infertune_y_seconds")
    assert first.metric.labels == ("server", "kind")
    assert first.fields == ("a", "b")
    assert second.metric.bounds == (2e-9, 4e-9, 8e-9)
    assert second.metric.unit == "seconds"


def test_generations_share_what_belongs_to_both() -> None:
    names = [[p.name for p in programs] for programs in parse(GOOD, "x.toml").generations()]
    assert names == [["visit", "new", "both"], ["visit", "old", "both"]]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ('title = "T"', "title = 3", 2, "'title' is a text"),
        ('title = "T"\n', "", None, "'title' is missing"),
        ('absent = "A"', 'absnt = "A"', 4, "did you mean 'absent'"),
        ('title = "T"', "title = ", 2, "Invalid value"),
        ('help = "H"', 'help = "H"\nneeds = "luck"', 4, "one of pressure"),
        ('when = "collect"', 'when = "often"', 8, "one of attach, collect"),
        ('visits = "threads"', 'visits = "files"', 8, "one of threads"),
        ('tracepoint = "same_name"', "tracepoint = []", 11, "'tracepoint' is a text"),
        ('tracepoint = "same_name"', 'probe = "x"', 11, "unknown key 'probe'"),
        ("infertune_x_total", "infertune_x", 13, "a counter ends with _total"),
        ("infertune_y_seconds", "infertune_y_total", 21, "a counter ends with _total"),
        ("infertune_y_seconds", "infertune_y", 21, "ends with its unit"),
        ("infertune_x_total", "other_x_total", 13, "starts with infertune_"),
        ('type = "counter"', 'type = "summary"', 14, "one of counter, gauge, histogram"),
        ('{ kind = ["a", "b"] }', "3", 18, "'value' is a field"),
        ('{ kind = ["a", "b"] }', '{ server = ["a"] }', 18, "two labels 'server'"),
        ('{ kind = ["a", "b"] }', '{ le = ["a"] }', 18, "not a valid label name"),
        ("min = 1, max = 3", "min = 3, max = 1", 27, "0 <= min < max < 64"),
        ("min = 1, max = 3", "min = 1", 27, "'max' is missing"),
        ("multiplier = 1e-9", "multiplier = 0", 28, "a number above 0"),
        ("multiplier = 1e-9", 'multiplier = "pages"', 28, "a number above 0"),
        ('series = "6"', "", 21, "'series' is missing"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    old: str, new: str, line: int | None, said: str
) -> None:
    assert old in GOOD
    with pytest.raises(DeclarationError) as caught:
        parse(GOOD.replace(old, new, 1), "x.toml")
    assert said in caught.value.message
    where = "x.toml" if line is None else f"x.toml:{line}:"
    assert caught.value.message.startswith(where)


def test_a_label_is_decoded_in_a_known_way() -> None:
    with pytest.raises(DeclarationError, match=r"x.toml:17: a label is decoded as one of server"):
        parse(GOOD.replace('server = "server"', 'server = "inode"', 1), "x.toml")


def test_a_metric_belongs_to_one_probe(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(GOOD)
    with pytest.raises(DeclarationError, match=r"is a metric of a\.toml already"):
        declarations.load(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_declared_programs_are_those_of_the_source(path: Path) -> None:
    source = path.with_name(f"{path.stem}.bpf.c").read_text()
    for program in parse(path.read_text(), path.name).programs:
        if program.tracepoint:
            kinds = [f'SEC("{kind}/{program.tracepoint}")' for kind in ("tp_btf", "raw_tp")]
        else:
            kinds = ['SEC("iter/task")']
        assert any(
            f"{kind}\nint {name}" in source
            for kind in kinds
            for name in (program.name, f"BPF_PROG({program.name},")
        ), program.name


def test_every_source_has_a_declaration() -> None:
    sources = {path.name.removesuffix(".bpf.c") for path in DECLARED.glob("*.bpf.c")}
    assert sources == {path.stem for path in FILES}


# -- layouts ---------------------------------------------------------------------------


def blob(types: bytes, strings: bytes) -> bytes:
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


# 1: u64; 2: char; 3: char[4]; 4: struct { u64 a; struct 5 b; char c[4]; }; 5: struct { s64 sum; }
STRINGS = b"\0u64\0char\0pair\0a\0b\0c\0sum\0s64\0"
TYPES = b"".join(
    [
        struct.pack("<IIII", 1, 1 << 24, 8, 64),
        struct.pack("<IIII", 5, 1 << 24, 1, 8),
        struct.pack("<IIIIII", 0, 3 << 24, 0, 2, 1, 4),
        struct.pack("<III", 10, 4 << 24 | 3, 24),
        struct.pack("<III", 15, 1, 0) + struct.pack("<III", 17, 5, 64),
        struct.pack("<III", 19, 3, 128),
        struct.pack("<III", 0, 4 << 24 | 1, 8) + struct.pack("<III", 21, 6, 0),
        struct.pack("<IIII", 25, 1 << 24, 8, 1 << 24 | 64),
    ]
)


def test_fields_of_a_structure() -> None:
    layout = btf.Types(blob(TYPES, STRINGS)).layout(4)
    assert layout == Layout(
        24,
        {"a": Field(0, 8, 1), "b.sum": Field(8, 8, 1, signed=True), "c": Field(16, 1, 4)},
    )
    data = struct.pack("<Qq4s4x", 7, -3, b"ring")
    assert layout.read(data, "a") == (7,)
    assert layout.read(data, "b.sum") == (-3,)
    assert layout.text(data, "c") == "ring"


def test_a_plain_number_has_no_name() -> None:
    assert btf.Types(blob(TYPES, STRINGS)).layout(1) == Layout(8, {"": Field(0, 8, 1)})


def test_a_module_continues_the_kernel() -> None:
    base = blob(TYPES, STRINGS)
    # 7: struct { u64 added; }, in the module: names start where those of the kernel end.
    end = len(STRINGS)
    split = struct.pack("<III", end, 4 << 24 | 1, 8) + struct.pack("<III", end + 4, 1, 0)
    joined = btf.Types(btf.join(base, blob(split, b"job\0added\0")))
    assert joined.layout(7) == Layout(8, {"added": Field(0, 8, 1)})
    assert joined.layout(4) == btf.Types(base).layout(4)


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(40)])
def test_what_is_no_btf_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no BTF"):
        btf.Types(data)


# -- totals ----------------------------------------------------------------------------

KEY = Layout(8, {"": Field(0, 8, 1)})
VALUE = Layout(
    56,
    {
        "a": Field(0, 8, 1),
        "b": Field(8, 8, 1),
        "h.buckets": Field(16, 8, 4),
        "h.sum": Field(48, 8, 1),
    },
)


def key(cgroup: int) -> bytes:
    return struct.pack("<Q", cgroup)


def counted(a: int = 0, b: int = 0, buckets: tuple[int, ...] = (0,) * 4, total: int = 0) -> bytes:
    return struct.pack("<7Q", a, b, *buckets, total)


@pytest.fixture
def declared() -> Declaration:
    return parse(GOOD, "x.toml")


@pytest.fixture
def totals(declared: Declaration) -> Totals:
    return Totals(declared.counted, KEY, VALUE)


def of(totals: Totals, counted: Counted) -> dict[tuple[str, ...], float | Histogram]:
    return {sample.labels: sample.value for sample in totals.samples(counted)}


def first(totals: Totals, declared: Declaration) -> dict[tuple[str, ...], float | Histogram]:
    return of(totals, declared.counted[0])


def test_processors_are_added_up(declared: Declaration, totals: Totals) -> None:
    cpus = counted(1, 2, (1, 0, 0, 0), 2) + counted(10, 20, (0, 0, 1, 1), 30)
    totals.update([(key(5), cpus)], {5: "llama"})
    found = first(totals, declared)
    assert (found["llama", "a"], found["llama", "b"]) == (11, 22)
    assert of(totals, declared.counted[1])["llama",] == Histogram((1, 0, 1, 1), 32e-9)


def test_groups_of_one_name_are_added_up(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted(1)), (key(6), counted(2))], {5: "llama", 6: "llama"})
    assert first(totals, declared)["llama", "a"] == 3


def test_a_server_has_zeros_before_anything_happens(declared: Declaration, totals: Totals) -> None:
    """Without a zero before it the first burst is seen by no rate()."""
    totals.update([], {5: "llama"})
    assert first(totals, declared) == {(n, f): 0 for n in ("llama", OTHER) for f in "ab"}
    assert of(totals, declared.counted[1])["llama",] == Histogram((0, 0, 0, 0), 0)


def test_every_closed_label_has_its_zero() -> None:
    text = GOOD.replace('server = "server"', 'server = "server", limit = ["machine", "group"]')
    found = parse(text, "x.toml").counted
    layout = Layout(16, {"cgroup": Field(0, 8, 1), "limit": Field(8, 8, 1)})
    totals = Totals(found, layout, VALUE)
    totals.update([], {5: "llama"})
    assert {labels[:2] for labels in of(totals, found[0])} == {
        (name, limit) for name in ("llama", OTHER) for limit in ("machine", "group")
    }


def test_a_name_that_comes_late_takes_nothing_back(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted(100))], {})
    totals.update([(key(5), counted(107))], {5: "llama"})
    found = first(totals, declared)
    assert found[OTHER, "a"] == 100
    assert found["llama", "a"] == 7


def test_the_last_interval_of_a_server_is_its_own(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted(100))], {5: "llama"})
    totals.update([(key(5), counted(107))], {})  # it has ended since we looked
    found = first(totals, declared)
    assert (found["llama", "a"], found[OTHER, "a"]) == (107, 0)
    totals.update([(key(5), counted(107))], {})
    assert set(first(totals, declared)) == {(OTHER, "a"), (OTHER, "b")}


def test_a_restart_between_two_looks_counts_both_lives(
    declared: Declaration, totals: Totals
) -> None:
    totals.update([(key(5), counted(100))], {5: "llama"})
    totals.update([(key(5), counted(2100)), (key(6), counted(500))], {6: "llama"})
    assert first(totals, declared)["llama", "a"] == 2600


def test_what_is_below_a_named_group_has_its_name() -> None:
    #       1 - 2 (llama) - 3 - 4 (other server) - 5;  6 and 7 are in each other
    above = {2: 1, 3: 2, 4: 3, 5: 4, 6: 7, 7: 6}
    found = with_those_below({2: "llama", 4: "other server", 9: "idle"}, above)
    assert found == {
        2: "llama",
        3: "llama",
        4: "other server",
        5: "other server",
        9: "idle",
    }


def test_what_is_above_nothing_any_more_is_forgotten() -> None:
    """Or groups that come and go would fill the map."""
    forgotten: list[tuple[str, int]] = []
    attached: Any = SimpleNamespace(
        object=SimpleNamespace(
            forget=lambda name, key: forgotten.append((name, int.from_bytes(key, "little")))
        ),
        _totals={"a": SimpleNamespace(groups=lambda: {3}), "b": SimpleNamespace(groups=set)},
    )
    probes._Attached._forget_above(attached, {2: 1, 3: 2, 4: 2, 5: 4})
    assert sorted(forgotten) == [("above", 4), ("above", 5)]


def test_a_key_that_was_removed_starts_again(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted(100))], {})
    assert totals.update([(key(5), counted(100))], {}) == [key(5)]
    totals.forget(key(5))
    totals.update([(key(5), counted(3))], {})
    assert first(totals, declared)[OTHER, "a"] == 103


def test_a_key_counted_anew_is_not_negative(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted(100, total=7))], {})
    totals.update([(key(5), counted(3, total=7))], {})
    assert first(totals, declared)[OTHER, "a"] == 103
    found = of(totals, declared.counted[1])[OTHER,]
    assert isinstance(found, Histogram)
    assert found.sum == pytest.approx(7e-9)  # that one did not fall


def test_a_counter_that_wraps_goes_on(declared: Declaration, totals: Totals) -> None:
    totals.update([(key(5), counted((1 << 64) - 10))], {})
    totals.update([(key(5), counted(5))], {5: "llama"})
    assert first(totals, declared)["llama", "a"] == 15


def test_only_what_is_idle_and_has_no_name_may_go(totals: Totals) -> None:
    entries = [(key(n), counted(n)) for n in (5, 6, 7)]
    assert totals.update(entries, {5: "llama"}) == []
    entries[2] = (key(7), counted(8))
    assert totals.update(entries, {5: "llama"}) == [key(6)]


JOBS = GOOD.replace("infertune_x_total", "infertune_x").replace('"counter"', '"gauge"')


def test_a_gauge_may_fall_and_keeps_its_key() -> None:
    found = parse(JOBS, "x.toml").counted[0]
    totals = Totals([found], KEY, VALUE)
    totals.update([(key(5), counted(4))], {})
    assert of(totals, found)[OTHER, "a"] == 4
    assert totals.update([(key(5), counted(4))], {}) == []
    totals.update([(key(5), counted(0))], {})
    assert of(totals, found)[OTHER, "a"] == 0
    assert totals.update([(key(5), counted(0))], {}) == [key(5)]


def test_a_gauge_counted_down_on_another_processor() -> None:
    found = parse(JOBS, "x.toml").counted[0]
    totals = Totals([found], KEY, VALUE)
    totals.update([(key(5), counted(2) + counted((1 << 64) - 1))], {})
    assert of(totals, found)[OTHER, "a"] == 1


def test_words_and_text_as_labels() -> None:
    text = GOOD.replace(
        'server = "server"', 'server = "server", ring = "text", limit = ["machine", "cgroup"]'
    )
    found = parse(text, "x.toml").counted[0]
    layout = Layout(
        24, {"ring": Field(0, 1, 8), "limit": Field(8, 8, 1), "cgroup": Field(16, 8, 1)}
    )
    totals = Totals([found], layout, VALUE)
    totals.update([(struct.pack("<8sQQ", b"gfx", n, 5), counted(n)) for n in (1, 2)], {5: "x"})
    values = of(totals, found)
    assert values["x", "gfx", "cgroup", "a"] == 1
    assert values["x", "gfx", "2", "a"] == 2  # a newer kernel side; not dropped


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('["a", "b"]', '["a", "z"]', "no field 'z'"),
        ("min = 1, max = 3", "min = 1, max = 4", "4 buckets in 'm', 5 between min and max"),
        ('value = "h"', 'value = "g"', "no field 'g.buckets'"),
    ],
)
def test_a_declaration_must_fit_the_object(old: str, new: str, said: str) -> None:
    one, other = parse(GOOD.replace(old, new, 1), "x.toml").counted
    wrong, right = (one, other) if '"z"' in new else (other, one)
    check(right, KEY, VALUE)
    with pytest.raises(ValueError, match=said):
        check(wrong, KEY, VALUE)


def test_a_key_must_have_the_labels(declared: Declaration) -> None:
    with pytest.raises(ValueError, match="no field 'server'"):
        check(declared.counted[0], Layout(8, {"ring": Field(0, 1, 8)}), VALUE)


def test_fields_have_eight_bytes(declared: Declaration) -> None:
    small = Layout(16, {"a": Field(0, 4, 1), "b": Field(8, 8, 1)})
    with pytest.raises(ValueError, match="'a' of 'm' is not a number of eight bytes"):
        check(declared.counted[0], KEY, small)


# -- as metrics ------------------------------------------------------------------------


def test_buckets_are_inclusive_and_cumulated(declared: Declaration, totals: Totals) -> None:
    # Bucket i of the kernel side: more than 2^(i), at most 2^(i+1) here, the last is the rest.
    totals.update([(key(5), counted(0, 0, (3, 2, 0, 1), 40))], {5: "llama"})
    histogram = declared.counted[1]
    page = render([histogram.metric], totals.samples(histogram)).decode()
    found = [line for line in page.splitlines() if 'server="llama"' in line]
    name = "infertune_y_seconds"
    assert found == [
        f'{name}_bucket{{le="2e-09",server="llama"}} 3.0',
        f'{name}_bucket{{le="4e-09",server="llama"}} 5.0',
        f'{name}_bucket{{le="8e-09",server="llama"}} 5.0',
        f'{name}_bucket{{le="+Inf",server="llama"}} 6.0',
        f'{name}_count{{server="llama"}} 6.0',
        f'{name}_sum{{server="llama"}} 4e-08',
    ]


def test_bounds_are_short() -> None:
    text = GOOD.replace("min = 1, max = 3", "min = 10, max = 34")
    bounds = parse(text, "x.toml").counted[1].metric.bounds
    assert [repr(bounds[at]) for at in (0, 10, 24)] == ["1.024e-06", "0.001048576", "17.179869184"]


# -- where probes cannot be had ----------------------------------------------------------


def machine(tmp_path: Path, files: dict[str, bytes]) -> Root:
    for path, data in files.items():
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return Root(tmp_path)


def with_tracepoints(*names: str) -> bytes:
    return blob(b"", b"\0" + b"".join(f"btf_trace_{name}\0".encode() for name in names))


def test_tracepoints_of_kernel_and_module(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            kernel.VMLINUX: with_tracepoints("sched_switch"),
            f"{kernel.BTF}/gpu_sched": with_tracepoints("drm_sched_job_run"),
        },
    )
    types = kernel.Types(root)
    assert types.has_tracepoint("sched_switch")
    assert not types.has_tracepoint("sched_swit")
    assert not types.has_tracepoint("drm_sched_job_run")
    assert types.has_tracepoint("drm_sched_job_run", "gpu_sched")
    assert not types.has_tracepoint("drm_sched_job", "gpu_sched")
    assert not types.has_tracepoint("drm_sched_job_run", "amdgpu")


def test_a_kernel_without_types(tmp_path: Path) -> None:
    with pytest.raises(BtfMissing, match=r"does not tell its types: /sys/kernel/btf/vmlinux"):
        kernel.Types(Root(tmp_path)).has_tracepoint("sched_switch")
    states = probes.Probes(root=machine(tmp_path, {"/proc/pressure/memory": b""})).attach()
    assert {state.state for state in states} == {"failed"}
    assert all("CONFIG_DEBUG_INFO_BTF" in state.why for state in states)


def test_a_module_without_types(tmp_path: Path) -> None:
    files = {kernel.VMLINUX: with_tracepoints(), "/sys/module/gpu_sched/refcnt": b"0\n"}
    found = {s.name: s for s in probes.Probes(root=machine(tmp_path, files)).attach()}
    assert found["drm_scheduler"].state == "failed"
    assert "CONFIG_DEBUG_INFO_BTF_MODULES" in found["drm_scheduler"].why


def test_a_kernel_without_the_tracepoints(tmp_path: Path) -> None:
    files = {kernel.VMLINUX: with_tracepoints(), "/proc/pressure/memory": b""}
    found = probes.Probes(root=machine(tmp_path, files))
    states = {state.name: state for state in found.attach()}
    assert {state.state for state in states.values()} == {"absent"}
    assert "mm_compaction_begin" in states["compaction"].why
    assert "gpu_sched is not loaded" in states["drm_scheduler"].why
    assert found.retry() == tuple(states.values())
    samples = found.samples()
    assert {sample.metric for sample in samples} == {"infertune_probe_state"}
    assert {sample.labels[1] for sample in samples if sample.value} == {"absent"}
    found.close()


@pytest.mark.parametrize(
    ("pid", "state"), [("pid:[4026531836]", "absent"), ("pid:[4026532567]", "not applicable")]
)
def test_in_a_container_it_would_count_a_part_for_the_whole(
    tmp_path: Path, pid: str, state: str
) -> None:
    root = machine(tmp_path, {kernel.VMLINUX: with_tracepoints(), "/proc/pressure/memory": b""})
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to(pid)
    states = probes.Probes(root=root).attach()
    assert {each.state for each in states} == {state}
    assert all(("on the host" in each.why) == (state != "absent") for each in states)


def test_types_that_are_rubbish_are_no_types(tmp_path: Path) -> None:
    for rubbish in (bytes(5000), with_tracepoints("sched_switch")[:-4]):
        root = machine(tmp_path, {kernel.VMLINUX: rubbish, "/proc/pressure/memory": b""})
        states = probes.Probes(root=root).attach()
        assert {each.state for each in states} == {"failed"}
        assert all("does not tell its types" in each.why for each in states)


def test_without_pressure_nobody_knows_who_is_stalled(tmp_path: Path) -> None:
    found = probes.Probes(root=machine(tmp_path, {kernel.VMLINUX: with_tracepoints()}))
    states = {state.name: state for state in found.attach()}
    for name in ("reclaim", "compaction"):
        assert states[name].state == "not applicable"
        assert "psi=0" in states[name].why
    assert states["page_faults"].state == "absent"
    found.close()


def test_a_collection_that_hangs_holds_up_nobody_who_asks_for_states(tmp_path: Path) -> None:
    found = probes.Probes(root=machine(tmp_path, {kernel.VMLINUX: with_tracepoints()}))
    found.attach()
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def hang() -> dict[int, str]:
        begun.set()
        go_on.wait(60)
        over.set()
        return {}

    found._cgroups = hang
    collector = found.collector()
    assert collector.timeout_s < 8  # the runner goes on without it
    reading = threading.Thread(target=lambda: list(collector.read(Root(tmp_path))))
    reading.start()
    assert begun.wait(60)
    assert len(found.states()) == len(FILES)
    found.close()  # nor does the end of the exporter wait for it
    assert not over.is_set()
    go_on.set()
    reading.join()


@pytest.fixture(autouse=True)
def fresh_library() -> Iterator[None]:
    yield
    libbpf.library.cache_clear()


def without_libbpf(monkeypatch: pytest.MonkeyPatch, *, name: str = "libnot-there.so.1") -> None:
    monkeypatch.setattr(libbpf, "NAME", name)
    libbpf.library.cache_clear()


def test_without_libbpf_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_libbpf(monkeypatch)
    with pytest.raises(LibbpfMissing) as caught:
        libbpf.library()
    assert "libnot-there.so.1" in caught.value.message
    assert "apt-get install libbpf1" in (caught.value.hint or "")


def test_another_library_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_libbpf(monkeypatch, name="libc.so.6")
    with pytest.raises(LibbpfMissing, match="cannot be used"):
        libbpf.library()


def test_probes_without_libbpf_fail_and_say_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_libbpf(monkeypatch)
    (tmp_path / "x.toml").write_text(GOOD)
    (tmp_path / "x.bpf.o").write_bytes(b"")
    files = {kernel.VMLINUX: with_tracepoints("new_name", "same_name")}
    found = probes.Probes(tmp_path, root=machine(tmp_path / "root", files))
    [state] = found.attach()
    assert state.state == "failed"
    assert "apt-get install libbpf1" in state.why


def test_probes_that_were_not_compiled_say_so(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(GOOD)
    files = {kernel.VMLINUX: with_tracepoints("old_name", "same_name")}
    found = probes.Probes(tmp_path, root=machine(tmp_path / "root", files))
    [state] = found.attach()
    assert state.state == "failed"
    assert "x.bpf.o was not compiled" in state.why


@pytest.mark.parametrize(
    ("mask", "missing"),
    [
        ("0000000000000000", ("CAP_BPF", "CAP_PERFMON")),
        ("0000008000000000", ("CAP_PERFMON",)),
        ("000000c000000000", ()),
        ("0000000000200000", ()),
    ],
)
def test_capabilities(tmp_path: Path, mask: str, missing: tuple[str, ...]) -> None:
    root = machine(tmp_path, {"/proc/self/status": f"CapEff:\t{mask}\n".encode()})
    assert kernel.missing_capabilities(root) == missing


@pytest.mark.parametrize(
    ("text", "locked"),
    [("none integrity [confidentiality]", True), ("none [integrity] confidentiality", False)],
)
def test_lockdown(tmp_path: Path, text: str, locked: bool) -> None:
    root = machine(tmp_path, {"/sys/kernel/security/lockdown": text.encode()})
    assert kernel.locked_down(root) is locked
    assert not kernel.locked_down(Root(tmp_path / "elsewhere"))


def test_every_error_is_one_line() -> None:
    for kind in BpfError.__subclasses__():
        assert "\n" not in kind("what happened").message
        assert kind.__doc__
