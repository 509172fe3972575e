# SPDX-License-Identifier: Apache-2.0
"""What the collectors take from host/: odd files, processes that end, bounds that are told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.exporter.base import MAX_GPUS
from infertune.exporter.capabilities import held
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.runner import Result, collect
from infertune.host.cgroup import memory_limit, processes_of
from infertune.host.cpu import CPUS, model_name, policies
from infertune.host.energy import EnergyPmu, energy_pmu
from infertune.host.gpu import MAX_PROCESSES, dpm_levels
from infertune.host.processes import MAX_DESCRIPTORS, capability_sets, drm_client, drm_clients
from infertune.host.snapshot import open_snapshot
from infertune.host.system import lockdown
from infertune.host.text import bracketed, counters, sizes
from infertune.launch.place import Group, _protected
from infertune.servers.adopted import Adopted, Book, Changed, Wanted, write_book

SERVING = Path(__file__).resolve().parents[1] / "golden" / "strix-halo-128-serving.snapshot"
SLICE = "/sys/fs/cgroup/infertune.slice"
GEMMA = f"{SLICE}/infertune-server@gemma.service"


@pytest.fixture
def serving() -> Iterator[Root]:
    with open_snapshot(str(SERVING)) as root:
        yield root


def write(root: Root, path: str, text: str) -> None:
    file = root.at(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.chmod(0o644)
    file.write_text(text)


def values(root: Root, collector: str) -> dict[tuple[str, ...], float]:
    result = collected(root, collector)
    return {(sample.metric, *sample.labels): sample.value for sample in result.samples}


def collected(root: Root, collector: str) -> Result:
    result = collect(COLLECTORS[collector], root)
    assert result.state == "ok", result.why
    return result


# -- tables ------------------------------------------------------------------------------


def test_counters() -> None:
    text = f"anon 12\nfile\t7 \nname x\nalone\nnegative -1\nlong {'9' * 21}\nunicode \u0663\n"
    assert counters(text) == {"anon": 12, "file": 7}
    assert counters(None) == {}


def test_sizes() -> None:
    text = (
        "MemTotal:       2 kB\nHugePages_Total:   3\nActive(anon): 1 kB\nBad: x kB\nOther: 4 MB\n"
    )
    assert sizes(text) == {"MemTotal": 2048, "HugePages_Total": 3, "Active(anon)": 1024}


def test_the_word_in_brackets() -> None:
    assert bracketed("always [madvise] never") == "madvise"
    assert bracketed("always") is None
    assert bracketed(None) is None


def test_lockdown_by_its_mode(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert lockdown(root) is None
    write(root, "/sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    assert lockdown(root) == "integrity"


def test_a_clock_of_many_digits_is_passed_over() -> None:
    assert dpm_levels(f"0: {'9' * 5000}Mhz *\n").chosen_hz is None


def test_only_the_first_processor_is_asked_for_its_name(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write(root, "/proc/cpuinfo", "processor : 0\nmodel name : A\n\nprocessor : 1\nflags : b\n")
    assert model_name(root) == "A"
    write(root, "/proc/cpuinfo", "processor : 0\n\nprocessor : 1\nmodel name : B\n")
    assert model_name(root) is None


# -- control groups ----------------------------------------------------------------------


def test_a_limit_is_bytes_or_infinity_or_not_known(tmp_path: Path) -> None:
    root = Root(tmp_path)
    for name, text in (("min", "4096"), ("max", "max"), ("high", "x"), ("low", "")):
        write(root, f"/g/memory.{name}", f"{text}\n")
    assert memory_limit(root, "/g", "min") == 4096
    assert memory_limit(root, "/g", "max") == math.inf
    assert [memory_limit(root, "/g", name) for name in ("high", "low", "swap.max")] == [None] * 3


def test_ids_of_processes_that_are_none_fail_no_collector(serving: Root) -> None:
    [pid] = processes_of(serving, GEMMA)[:1]
    before = {name: values(serving, name) for name in ("kfd", "fdinfo", "smaps")}
    write(serving, f"{GEMMA}/cgroup.procs", serving.read(f"{GEMMA}/cgroup.procs") + "\nx\n-5\n")
    assert pid in processes_of(serving, GEMMA)
    assert {name: values(serving, name) for name in before} == before


def test_groups_that_have_no_series_claim_their_share(serving: Root) -> None:
    gib = 1 << 30
    metric = ("infertune_unit_memory_protected_bytes", "infertune-server@gemma.service", "gemma")
    assert values(serving, "memory")[*metric, "min"] == 3 * gib
    # 6 GiB for three that claim 4 each.
    write(serving, f"{SLICE}/other.scope/memory.current", str(4 * gib))
    write(serving, f"{SLICE}/other.scope/memory.min", "max")
    assert values(serving, "memory")[*metric, "min"] == 2 * gib


APP = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice"


def _adopted_of_a_user(root: Root) -> None:
    """A unit of a user's manager, protected through the whole chain, with something beside it."""
    group = APP.removeprefix("/sys/fs/cgroup").removesuffix("/app.slice")
    unit = Changed("llm.service", {}, {}, lasts=False)
    one = Adopted("llm", group, (), unit, Wanted("kept", "cpu"), {}, 1000)
    write_book(root, Book({"llm": one}))
    gib = 1 << 30
    path, above = f"{APP}/llm.service", [APP]
    while above[-1] != "/sys/fs/cgroup/user.slice":
        above.append(above[-1].rpartition("/")[0])
    for each in (path, *above):
        write(root, f"{each}/memory.current", str(8 * gib))
        write(root, f"{each}/memory.min", str(4 * gib))
        write(root, f"{each}/memory.low", "0")


def test_what_protects_an_adopted_unit_is_all_above_and_beside_it(serving: Root) -> None:
    gib = 1 << 30
    _adopted_of_a_user(serving)
    metric = ("infertune_unit_memory_protected_bytes", "llm.service", "llm")
    assert values(serving, "memory")[*metric, "min"] == 4 * gib
    write(serving, "/sys/fs/cgroup/user.slice/memory.min", str(1 * gib))
    assert values(serving, "memory")[*metric, "min"] == 1 * gib
    write(serving, "/sys/fs/cgroup/user.slice/memory.min", str(4 * gib))
    write(serving, f"{APP}/beside/memory.current", str(4 * gib))
    write(serving, f"{APP}/beside/memory.min", str(4 * gib))
    assert values(serving, "memory")[*metric, "min"] == 2 * gib
    # A chain that is broken at the top protects nothing of it.
    write(serving, "/sys/fs/cgroup/user.slice/memory.min", "0")
    assert values(serving, "memory")[*metric, "min"] == 0
    for number in range(600):
        write(serving, f"{APP}/g{number}/memory.current", "0")
    assert (*metric, "min") not in values(serving, "memory"), "unknown, not zero"


def test_protection_is_looked_for_above_a_group_without_a_bound(tmp_path: Path) -> None:
    """memory.min may be ``max``, which bounds nothing: what counts stands further up."""
    root = Root(tmp_path)
    write(root, "/sys/fs/cgroup/a/memory.min", "1024")
    write(root, "/sys/fs/cgroup/a/b/memory.min", "max")
    group = Group(root, "/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a/b/infertune-1", (), None)
    placed = _protected(root, group, "4096", "4096", "cgroup memory.min")
    assert (placed.outcome, placed.got) == ("clamped", "1024")


# -- processes ---------------------------------------------------------------------------

CLIENT = "drm-driver:\tamdgpu\ndrm-pdev:\t0000:c2:00.0\ndrm-client-id:\t{}\n"


def test_a_drm_client(tmp_path: Path) -> None:
    root = Root(tmp_path)
    text = (
        "pos:\t0\n" + CLIENT.format(7) + "drm-engine-gfx:\t12 ns\ndrm-engine-capacity-gfx:\t2\n"
        "drm-engine-dec:\tx ns\ndrm-engine-enc:\t5 KiB\ndrm-total-gtt:\t3 MiB\n"
        "drm-memory-gtt: \t1 KiB\ndrm-resident-gtt:\t2 KiB\ndrm-memory-vram:\t4\n"
        "drm-shared-cpu:\t9 ns\ndrm-shared-gtt:\t6 kB\namd-evicted-vram:\t8 KiB\n"
    )
    write(root, "/proc/9/fdinfo/4", text)
    found = drm_client(root, 9, 4)
    assert found is not None
    assert (found.pci_address, found.number) == ("0000:c2:00.0", "7")
    assert found.engine_ns == {"gfx": 12}
    assert found.resident_bytes == {"gtt": 2048, "vram": 4}
    assert found.evicted_vram_bytes == 8192


def test_other_files_and_ended_processes_have_no_drm_client(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write(root, "/proc/9/fdinfo/0", "pos:\t0\nflags:\t02\n")
    assert drm_client(root, 9, 0) is None
    assert drm_client(root, 9, 1) is None
    assert list(drm_clients(root, 9)) == []
    assert list(drm_clients(root, 10)) == []


def test_a_server_that_ends_takes_no_other_off_the_page(serving: Root) -> None:
    before = values(serving, "fdinfo")
    assert before
    write(serving, f"{GEMMA}/cgroup.procs", serving.read(f"{GEMMA}/cgroup.procs") + "\n999999\n")
    assert values(serving, "fdinfo") == before


def test_descriptors_beyond_the_bound_are_told_and_the_first_are_read(serving: Root) -> None:
    pid = processes_of(serving, GEMMA)[0]
    there = len(serving.names(f"/proc/{pid}/fdinfo"))
    # As names, 1000 to 1999 come before 2; GPUs are opened early.
    for number in range(1000, 1000 + MAX_DESCRIPTORS):
        write(serving, f"/proc/{pid}/fdinfo/{number}", "pos:\t0\n")
    write(serving, f"/proc/{pid}/fdinfo/999", CLIENT.format(555))
    result = collected(serving, "fdinfo")
    assert result.left_out == there + 1
    assert drm_client(serving, pid, 999) in list(drm_clients(serving, pid))


def test_capabilities_are_bits_by_set(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write(
        root, "/proc/self/status", "Name:\tx\nCapEff:\t0000000000000003\nCapPrm:\tx\nCapAmb:\t4\n"
    )
    assert capability_sets(root) == {"CapEff": 3, "CapAmb": 4}
    assert held(root) == 7
    with pytest.raises(FileNotFoundError):
        held(root, "self/task/1")


def test_programs_of_the_compute_driver_beyond_the_bound_are_told(serving: Root) -> None:
    there = len(serving.names("/sys/class/kfd/kfd/proc"))
    for number in range(MAX_PROCESSES):
        serving.at(f"/sys/class/kfd/kfd/proc/{500_000 + number}").mkdir()
    assert collected(serving, "kfd").left_out == there


# -- devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("collector", ["amdgpu", "gpu_metrics", "kfd", "fdinfo"])
def test_gpus_beyond_the_bound_are_told_once(serving: Root, collector: str) -> None:
    for number in range(2, MAX_GPUS + 3):
        write(serving, f"/sys/class/drm/card{number}/device/uevent", "DRIVER=amdgpu\n")
        link = serving.at(f"/sys/class/drm/card{number}/device/driver")
        link.symlink_to("../../../bus/pci/drivers/amdgpu")
    assert collected(serving, collector).left_out == 2


def test_clocks_and_what_chooses_them(tmp_path: Path) -> None:
    root = Root(tmp_path)
    here = "/sys/devices/system/cpu/cpufreq/policy"
    for number in (10, 2):
        write(root, f"{here}{number}/scaling_cur_freq", f"{number}000\n")
        write(root, f"{here}{number}/scaling_governor", "powersave\n")
    found = policies(root, 8)
    assert [(each.number, each.current) for each in found] == [("2", 2000), ("10", 10000)]
    assert found[0].governor == "powersave"
    assert found[0].preference is None
    assert found[0].firmware_max is None


POWER = "/sys/bus/event_source/devices/power"


def pmu(root: Root, **files: str) -> EnergyPmu | None:
    """The PMU of an AMD processor, with these files otherwise."""
    content = {
        "type": "28",
        "cpumask": "0",
        "events/energy-pkg": "event=0x02",
        "events/energy-pkg.scale": "2.3283064365386962890625e-10",
    }
    for name, text in {**content, **{k.replace("__", "/"): v for k, v in files.items()}}.items():
        write(root, f"{POWER}/{name}", f"{text}\n")
    return energy_pmu(root)


def test_energy_is_counted_by_package(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert energy_pmu(root) is None
    assert pmu(root) == EnergyPmu(28, 2, 2**-32, {"0": 0})
    for cpu, package in ((0, 0), (16, 1), (17, 1)):
        write(root, f"{CPUS}/cpu{cpu}/topology/physical_package_id", f"{package}\n")
    found = pmu(root, cpumask="0,16-17")
    assert found is not None
    assert found.packages == {"0": 0, "1": 16}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("type", "x"),
        ("cpumask", ""),
        ("events__energy-pkg", "event=0x02,umask=0x1"),
        ("events__energy-pkg", ""),
        ("events__energy-pkg.scale", "nan"),
        ("events__energy-pkg.scale", "-1"),
        ("events__energy-pkg.scale", ""),
    ],
)
def test_energy_that_is_told_otherwise_is_not_guessed(tmp_path: Path, file: str, text: str) -> None:
    assert pmu(Root(tmp_path), **{file: text}) is None
