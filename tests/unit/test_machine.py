# SPDX-License-Identifier: Apache-2.0
"""Facts: from whole recorded machines, and from small trees for each way they can differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.base.units import GIB, MIB
from infertune.cli.machine import COMMANDS as MACHINE_COMMANDS
from infertune.cli.main import main
from infertune.host.cpu import Core
from infertune.host.gpu import Ttm
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_snapshot
from infertune.host.tuners import TUNERS

FIXTURES = Path(__file__).parents[1] / "fixtures"
SNAPSHOTS = sorted(FIXTURES.glob("*.snapshot"))


def recorded(name: str) -> Machine:
    with open_snapshot(str(FIXTURES / f"{name}.snapshot")) as root:
        return read_machine(root)


class Tree:
    """A small machine of a few files."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def file(self, path: str, text: str = "") -> Tree:
        where = self.base / path.lstrip("/")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text + "\n")
        return self

    def directory(self, path: str) -> Tree:
        (self.base / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return self

    def link(self, path: str, target: str) -> Tree:
        where = self.base / path.lstrip("/")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.symlink_to(target)
        return self

    def card(self, number: int, driver: str, vendor: str, device: str) -> Tree:
        base = f"/sys/class/drm/card{number}/device"
        self.file(f"{base}/vendor", vendor).file(f"{base}/device", device)
        return self.link(f"{base}/driver", f"../../bus/pci/drivers/{driver}")

    def read(self) -> Machine:
        return read_machine(Root(self.base))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# -- whole machines ----------------------------------------------------------------


def test_strix_halo_128() -> None:
    machine = recorded("strix-halo-128")
    gpu = machine.inference_gpu
    assert gpu is not None
    assert (gpu.pci_id, gpu.name, gpu.gfx_target) == ("1002:1586", "Radeon 8060S", "gfx1151")
    assert (gpu.driver, gpu.integrated) == ("amdgpu", True)
    assert gpu.vram_bytes == 512 * MIB
    assert gpu.carveout == "Minimum (512 MB)"
    assert gpu.carveout_options[-1] == "High (32 GB)"
    assert machine.memory.total_bytes is not None
    # The kernel's default: half of RAM, in both places.
    assert machine.ttm == Ttm("ttm", sure=True, pages_limit=machine.memory.total_bytes // 8192)
    assert gpu.gtt_bytes == machine.ttm.pages_limit * 4096
    assert machine.memory.gpu_active_bytes == 1 * GIB
    assert machine.memory.numa_nodes == 1
    assert len(machine.cpu.cores) == 16
    assert machine.cpu.cores[0] == Core(cpus=(0, 16), package=0, l3=0, kind=None)
    assert [core.l3 for core in machine.cpu.cores] == [0] * 8 + [8] * 8
    assert (machine.cpu.scaling_driver, machine.cpu.amd_pstate) == ("amd-pstate-epp", "active")
    assert machine.kernel_version == (7, 1, 3)
    assert (machine.distro_id, machine.boot_style) == ("fedora", "bls")
    assert machine.dmi.board == "FRANMFCP06"
    assert (machine.kfd, machine.npu) == (True, "amdxdna")
    assert (machine.cgroup.version, machine.cgroup.mount) == (2, "/sys/fs/cgroup")
    assert {"cpuset", "memory"} <= set(machine.cgroup.controllers)
    running = {tuner.id: tuner.running for tuner in machine.tuners}
    assert running == {"tuned": True, "tuned-ppd": True, "irqbalance": False}


def test_laptop_has_two_groups_of_six_and_a_set_limit() -> None:
    machine = recorded("strix-halo-64-laptop")
    gpu = machine.inference_gpu
    assert gpu is not None
    assert gpu.name == "Radeon 8050S"
    assert gpu.gtt_bytes == 59 * GIB
    assert (gpu.carveout, gpu.carveout_options) == (None, ())
    assert [core.l3 for core in machine.cpu.cores] == [0] * 6 + [6] * 6
    assert "ttm.pages_limit=15466496" in (machine.cmdline or "")


def test_dkms_limit_is_the_one_amdgpu_holds() -> None:
    machine = recorded("dkms-amdttm")
    assert machine.ttm == Ttm("amdttm", sure=True, pages_limit=27525120)
    assert machine.boot_style == "grub"
    assert {tuner.id for tuner in machine.tuners if tuner.running} == {
        "power-profiles-daemon",
        "irqbalance",
    }


def test_machine_without_amd_part() -> None:
    machine = recorded("intel-desktop")
    assert machine.inference_gpu is None
    assert (machine.ttm, machine.kfd, machine.npu) == (None, False, None)
    kinds = [core.kind for core in machine.cpu.cores]
    assert kinds == ["performance"] * 8 + ["efficiency"] * 16
    assert {core.l3 for core in machine.cpu.cores} == {0}
    assert machine.cpu.amd_pstate is None
    assert [gpu.driver for gpu in machine.gpus] == ["i915"]
    assert machine.boot_style == "systemd-boot"


def test_discrete_radeon_is_the_inference_gpu_where_it_is_alone() -> None:
    gpu = recorded("radeon-desktop").inference_gpu
    assert gpu is not None
    assert (gpu.gfx_target, gpu.integrated, gpu.name) == ("gfx1102", False, None)


# -- one difference each ----------------------------------------------------------


def test_nothing_there_is_nothing_known(tree: Tree) -> None:
    machine = tree.read()
    assert machine.kernel is None
    assert machine.cmdline is None
    assert machine.boot_style is None
    assert machine.memory.total_bytes is None
    assert machine.memory.numa_nodes is None
    assert machine.cpu.cores == machine.gpus == machine.tuners == ()
    assert machine.ttm is None
    assert machine.cgroup.version is None


@pytest.mark.parametrize("text", ["", "\0\xff garbage", "9-1", "a: b: c", "MemTotal: x kB"])
def test_nonsense_is_not_an_error(tree: Tree, text: str) -> None:
    for path in (
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/self/mounts",
        "/etc/os-release",
        "/sys/devices/system/cpu/online",
        "/sys/devices/system/node/online",
        "/sys/class/kfd/kfd/topology/nodes/1/properties",
        "/sys/class/drm/card0/device/vendor",
        "/sys/class/drm/card0/device/uma/carveout_options",
        "/sys/module/amdgpu/version",
        "/sys/module/ttm/parameters/pages_limit",
    ):
        tree.file(path, text)
    machine = tree.read()
    assert machine.memory.total_bytes is None
    assert machine.ttm == Ttm("ttm", sure=True, pages_limit=None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_forbidden_directory_is_not_an_error(tree: Tree) -> None:
    tree.file("/boot/loader/loader.conf").file("/etc/default/grub")
    (tree.base / "boot").chmod(0)
    try:
        assert tree.read().boot_style == "grub"
    finally:
        (tree.base / "boot").chmod(0o755)


def test_offline_cpus_are_no_siblings(tree: Tree) -> None:
    tree.file("/sys/devices/system/cpu/online", "0-2")
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2")):
        tree.file(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    assert [core.cpus for core in tree.read().cpu.cores] == [(0, 2), (1,)]


def test_small_cores_by_capacity_but_not_by_a_favoured_core(tree: Tree) -> None:
    tree.file("/sys/devices/system/cpu/online", "0-2")
    for cpu, capacity in enumerate((1024, 1009, 600)):
        tree.file(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity", str(capacity))
    kinds = [core.kind for core in tree.read().cpu.cores]
    assert kinds == ["performance", "performance", "efficiency"]


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (("amdttm",), Ttm("amdttm", sure=True, pages_limit=1)),
        (("ttm",), Ttm("ttm", sure=True, pages_limit=3)),
        (("amd_ttm",), Ttm("amd_ttm", sure=True, pages_limit=2)),
        # Built in, or holders hidden: nothing rules one out.
        ((), Ttm("amdttm", sure=False, pages_limit=1)),
    ],
)
def test_ttm_is_the_one_amdgpu_holds(tree: Tree, held: tuple[str, ...], expected: Ttm) -> None:
    tree.directory("/sys/module/amdgpu")
    for pages, module in enumerate(("amdttm", "amd_ttm", "ttm"), start=1):
        tree.file(f"/sys/module/{module}/parameters/pages_limit", str(pages))
    for module in held:
        tree.directory(f"/sys/module/{module}/holders/amdgpu")
    assert tree.read().ttm == expected


def test_ttm_of_another_driver_is_not_ours(tree: Tree) -> None:
    tree.file("/sys/module/ttm/parameters/pages_limit", "5").directory("/sys/module/xe")
    assert tree.read().ttm is None


def test_apu_comes_before_a_discrete_card(tree: Tree) -> None:
    tree.card(0, "amdgpu", "0x1002", "0x744c").card(1, "amdgpu", "0x1002", "0x1586")
    tree.file("/sys/class/drm/card1-DP-1/status", "connected")
    machine = tree.read()
    assert [gpu.path for gpu in machine.gpus] == [
        "/sys/class/drm/card0/device",
        "/sys/class/drm/card1/device",
    ]
    assert machine.inference_gpu is machine.gpus[1]
    assert machine.inference_gpu.name == "Strix Halo (Radeon 8060S, 8050S or 8040S)"


def test_two_discrete_cards_leave_no_choice(tree: Tree) -> None:
    tree.card(0, "amdgpu", "0x1002", "0x744c").card(1, "amdgpu", "0x1002", "0x744c")
    assert tree.read().inference_gpu is None


def test_vddnb_tells_an_unlisted_apu(tree: Tree) -> None:
    tree.card(0, "amdgpu", "0x1002", "0x15bf")
    tree.file("/sys/class/drm/card0/device/hwmon/hwmon4/in1_label", "vddnb")
    assert tree.read().gpus[0].integrated is True


@pytest.mark.parametrize(
    ("version", "name"), [("110501", "gfx1151"), ("90010", "gfx90a"), ("0", None)]
)
def test_gfx_name(tree: Tree, version: str, name: str | None) -> None:
    tree.card(0, "amdgpu", "0x1002", "0x1586").directory(
        "/sys/class/drm/card0/device/drm/renderD129"
    )
    tree.file(
        "/sys/class/kfd/kfd/topology/nodes/1/properties",
        f"gfx_target_version {version}\ndrm_render_minor 129",
    )
    assert tree.read().gpus[0].gfx_target == name


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", (2, "/sys/fs/cgroup")),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0", (1, None)),
        (
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /c cgroup rw,cpu 0 0",
            (1, "/sys/fs/cgroup/unified"),
        ),
    ],
)
def test_cgroup_version(tree: Tree, mounts: str, expected: tuple[int, str | None]) -> None:
    tree.file("/proc/self/mounts", mounts)
    cgroup = tree.read().cgroup
    assert (cgroup.version, cgroup.mount) == expected


@pytest.mark.parametrize("known", TUNERS, ids=lambda known: known.id)
def test_each_tuner_installed_and_running(tree: Tree, known: object) -> None:
    assert known in TUNERS
    unit, comm = known.units[0], known.comms[0]  # type: ignore[attr-defined]
    tree.file("/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0")
    tree.file(f"/usr/lib/systemd/system/{unit}")
    assert [(t.id, t.running) for t in tree.read().tuners] == [(known.id, False)]  # type: ignore[attr-defined]
    tree.directory(f"/sys/fs/cgroup/system.slice/{unit}")
    assert tree.read().tuners[0].running
    # Without systemd the process itself is the sign, under the 15 characters the kernel keeps.
    (tree.base / f"sys/fs/cgroup/system.slice/{unit}").rmdir()
    tree.file("/proc/77/comm", comm)
    assert tree.read().tuners[0].running
    assert len(comm) <= 15


# -- the verb -------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=lambda path: path.stem)
def test_every_fixture_prints(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(snapshot), "machine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("kernel        6.") or "7." in line for line in lines)
    # Labels in one column, text in the next.
    assert {line[12:14] for line in lines} == {"  "}
    assert all(line[14] != " " for line in lines)


def test_unknown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "machine"]) == 0
    out = capsys.readouterr().out
    assert "machine       unknown" in out
    assert "memory        unknown, unknown available" in out
    assert "None" not in out


def test_verbs_have_json_and_a_description() -> None:
    for command in MACHINE_COMMANDS:
        assert command.description
        assert any("--json" in argument.names for argument in command.arguments)


class CountingNames(Root):
    """How many processes are asked for their name."""

    asked = 0

    def get(self, path: str) -> str | None:
        self.asked += path.endswith("/comm")
        return super().get(path)


def test_thousands_of_processes_are_not_all_asked_for_their_name(tree: Tree) -> None:
    for pid in range(2, 1300):
        tree.file(f"/proc/{pid}/comm", "sh")
    tree.file("/proc/1001/comm", "tuned-ppd")
    tree.file("/proc/1002/comm", "tuned")
    root = CountingNames(tree.base)
    assert [each.id for each in read_machine(root).tuners] == ["tuned-ppd"]
    assert root.asked == 1000


def test_a_known_machine_is_asked_for_what_the_kernel_tells_nobody_of(tree: Tree) -> None:
    """And for the rest once: a file of another CPU, of DMI, of the boot loader is not opened."""
    tree.file("/sys/devices/system/cpu/online", "0-1")
    tree.file("/proc/meminfo", "MemTotal: 1000 kB\n")
    tree.file("/proc/swaps", "Filename Type Size Used Priority\n")
    tree.file("/sys/class/dmi/id/product_name", "one")
    known = read_machine(Root(tree.base))
    tree.file("/sys/class/dmi/id/product_name", "another")
    tree.file("/proc/meminfo", "MemTotal: 2000 kB\n")
    tree.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 8 0 100\n")
    tree.file("/sys/devices/system/cpu/amd_pstate/status", "active")
    tree.file("/sys/devices/system/cpu/cpufreq/policy0/scaling_driver", "amd-pstate-epp")
    tree.directory("/sys/module/amdgpu")
    tree.file("/sys/module/ttm/parameters/pages_limit", "7")
    now = read_machine(Root(tree.base), known)
    assert now.dmi.product == "one"
    assert now.memory.total_bytes == 2000 * 1024
    assert now.swap is not None
    assert now.swap.in_memory == "zram"
    assert (now.cpu.amd_pstate, now.cpu.scaling_driver) == ("active", "amd-pstate-epp")
    assert now.ttm is not None
    assert now.ttm.pages_limit == 7
    # A CPU that went offline is news, whoever tells of it.
    tree.file("/sys/devices/system/cpu/online", "0")
    assert read_machine(Root(tree.base), known).dmi.product == "another"
    assert read_machine(Root(tree.base), known).cpu.online == (0,)
