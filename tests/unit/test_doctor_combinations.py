# SPDX-License-Identifier: Apache-2.0
"""The doctor: what an absent value says, what a boot changes, whose a device is, and one cause."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from doctor_support import (
    CPUFREQ,
    HEALTHY,
    KERNEL,
    MODPROBE,
    Overlay,
    build,
    cmdline,
    log,
    surroundings,
    swaps,
)
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import GIB, KIB
from infertune.boot.sources import WORDS, ignored_words, mistake_in
from infertune.catalogue.knobs import KNOBS
from infertune.cli import doctor as cli
from infertune.cli.main import main
from infertune.doctor.base import Finding, Rule
from infertune.doctor.diagnose import Result, diagnose
from infertune.doctor.facts import read_facts
from infertune.doctor.rules import RULES
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import recorded
from infertune.host.boot_writes import BootWrite, boot_writes
from infertune.host.container import container_kind
from infertune.host.coredump import CoreDumps, core_dumps
from infertune.host.ini import sections
from infertune.host.machine import read_machine
from infertune.host.memory import PAGE
from infertune.host.nodes import Node, gpu_nodes
from infertune.host.power_at_boot import power_at_boot
from infertune.host.redaction import reduce_file
from infertune.host.swap import SwapArea, Swaps
from infertune.host.swap import swaps as swaps_of
from infertune.host.unknown import Unknown
from infertune.pools.boot import most_for_gpu


def ask(root: Root, *ids: str) -> dict[str, Result]:
    rules = [RULES[each] for each in ids] if ids else RULES.values()
    return {each.rule.id: each for each in diagnose(read_facts(root, recorded(root)), rules)}


def finding(root: Root, rule: str) -> Finding:
    answer = ask(root, rule)[rule].answer
    assert isinstance(answer, Finding), answer
    return answer


def tree(base: Path, files: Overlay) -> Root:
    for path, text in files.items():
        where = base / path.lstrip("/")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(str(text))
    return Root(base)


# -- a value that is not shown is not a good one -----------------------------------------

PARAMETERS = ("amdgpu", "ttm", "amdttm", "amd_ttm")
NO_PARAMETERS: Overlay = {f"/sys/module/{module}/parameters": None for module in PARAMETERS}


@pytest.mark.parametrize("rule", ["kernel-old-workaround", "option-unknown", "option-not-in-force"])
def test_without_the_files_of_modules_nothing_is_fine(rule: str, tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, {**NO_PARAMETERS, "/sys/module/ttm/refcnt": "1\n"})
    result = ask(root, rule)[rule]
    assert result.outcome == "unknown", result


def test_without_modules_at_all_their_rules_are_not_fine(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, {"/sys/module": None})
    results = ask(root, "driver-dkms", "firmware-leftover", "option-unknown", "ttm-wrong-module")
    assert {each.outcome for each in results.values()} == {"unknown"}, results


def test_the_command_line_speaks_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    given = cmdline("amdgpu.cwsr_enable=0", "ttm.pages_limit=25165824")
    root = build(tmp_path, HEALTHY, NO_PARAMETERS, given)
    assert "(the kernel command line) is set" in finding(root, "kernel-old-workaround").text
    # On a kernel without the fix, it is what keeps ROCm running.
    old = build(tmp_path / "old", HEALTHY, NO_PARAMETERS, given, {KERNEL: "6.17.1\n"})
    assert ask(old, "kernel-save-area")["kernel-save-area"].outcome == "fine"


def test_the_value_in_force_counts_before_the_configured_one(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, cmdline("amdgpu.cwsr_enable=0"))
    assert ask(root, "kernel-old-workaround")["kernel-old-workaround"].outcome == "fine"


# -- values the kernel does not know -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "ignored"),
    [
        ("amd_iommu", "on", ("on",)),
        ("amd_iommu", "pt", ("pt",)),
        ("amd_iommu", "off", ()),
        ("amd_iommu", "pgtbl_v2,on", ("on",)),
        ("amd_iommu", "offline", ()),  # strncmp: it begins with off
        ("iommu", "pt", ()),
        ("iommu", "on", ("on",)),
        ("transparent_hugepage", "banana", ()),
    ],
)
def test_ignored_words(name: str, value: str, ignored: tuple[str, ...]) -> None:
    assert ignored_words(name, value) == ignored
    if name in WORDS:
        mistake = mistake_in("", name, value)
        assert bool(ignored) == bool(mistake and "does not know" in mistake.what)


@pytest.mark.parametrize(
    ("words", "severity", "says"),
    [
        ("amd_iommu=on", "info", "the IOMMU is on anyway"),
        ("iommu=on", "info", "iommu=on: the kernel does not know on"),
        ("amd_iommu=pt", "warning", "iommu=pt is meant"),
        ("amd_iommu=onn", "warning", "does not know onn"),
    ],
)
def test_iommu_values(words: str, severity: str, says: str, tmp_path: Path) -> None:
    result = ask(build(tmp_path, HEALTHY, cmdline(words)), "iommu-invalid")["iommu-invalid"]
    assert isinstance(result.answer, Finding)
    assert (result.severity, says in result.answer.text) == (severity, True)


# -- whose a device node is ------------------------------------------------------------------


def devices(container: str | None, **nodes: dict[str, object]) -> Overlay:
    document = json.loads(surroundings()[SURROUNDINGS])
    document["devices"] = {f"/dev/{name}": node for name, node in nodes.items()}
    more = {"/run/systemd/container": f"{container}\n"} if container else {}
    return {SURROUNDINGS: json.dumps(document), **more}


def node(group: str, mode: str, usable: bool = False) -> dict[str, object]:
    return {"usable": usable, "owner": "root", "group": group, "mode": mode}


@pytest.mark.parametrize(
    ("container", "group", "mode", "fix"),
    [
        (None, "render", "0660", "join the group render (usermod -aG render NAME)"),
        (None, "gpu", "0660", "usermod -aG gpu NAME"),
        (None, "root", "0660", "no group helps"),
        (None, "render", "0600", "no group helps"),
        ("lxc", "root", "0660", "on the host (Proxmox: dev0: /dev/kfd,gid="),
        ("podman", "nobody", "0660", "--group-add keep-groups"),
        ("docker", "993", "0660", "--group-add NUMBER"),
        ("systemd-nspawn", "root", "0660", "on the host"),
    ],
)
def test_who_opens_a_node(
    container: str | None, group: str, mode: str, fix: str, tmp_path: Path
) -> None:
    answer = finding(
        build(tmp_path, HEALTHY, devices(container, kfd=node(group, mode))), "gpu-not-permitted"
    )
    assert f"/dev/kfd (root:{group}, mode {mode})" in answer.text
    assert fix in (answer.fix or "")


def test_no_node_in_a_container_was_not_passed_in(tmp_path: Path) -> None:
    answer = finding(build(tmp_path, HEALTHY, devices("podman")), "gpu-not-permitted")
    assert "no /dev/kfd and no /dev/dri/renderD* in this container" in answer.text
    assert "--device /dev/kfd" in (answer.fix or "")
    outside = ask(build(tmp_path / "host", HEALTHY, devices(None)), "gpu-not-permitted")
    assert outside["gpu-not-permitted"].outcome == "unknown"


def test_a_container_without_kfd_has_vulkan(tmp_path: Path) -> None:
    document = json.loads(surroundings()[SURROUNDINGS])
    document["devices"] = {"/dev/dri/renderD128": node("render", "0666", usable=True)}
    files = {SURROUNDINGS: json.dumps(document), "/.dockerenv": ""}
    result = ask(build(tmp_path, HEALTHY, files), "gpu-not-permitted")["gpu-not-permitted"]
    assert isinstance(result.answer, Finding)
    assert (result.severity, "Vulkan can" in result.answer.text) == ("info", True)


def test_a_snapshot_of_before_owners_still_loads(tmp_path: Path) -> None:
    assert recorded(build(tmp_path, HEALTHY)).devices == {
        "/dev/kfd": Node(True),
        "/dev/dri/renderD128": Node(True),
    }


@pytest.mark.parametrize("broken", [{"usable": 1, "mode": "rw"}, {"mode": "0660"}, {"mode": []}])
def test_broken_devices_are_unknown(broken: dict[str, object], tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, devices(None, kfd=broken))
    assert ask(root, "gpu-not-permitted")["gpu-not-permitted"].outcome == "unknown"


def test_nodes_are_read_with_owner_and_mode(tmp_path: Path) -> None:
    root = tree(tmp_path, {"/dev/kfd": "", "/dev/dri/renderD128": ""})
    (tmp_path / "dev/kfd").chmod(0o640)
    found = gpu_nodes(root)
    assert list(found) == ["/dev/kfd", "/dev/dri/renderD128"]
    assert (found["/dev/kfd"].owner, found["/dev/kfd"].mode) == (str(os.getuid()), 0o640)
    around = replace(recorded(root), devices=found)
    tree(tmp_path, {SURROUNDINGS: replace(around, environment={}).to_file().decode()})
    assert recorded(root).devices == found


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"/run/systemd/container": "lxc\n"}, "lxc"),
        ({"/run/.containerenv": "", "/run/.toolboxenv": ""}, "toolbox"),
        ({"/run/.containerenv": 'name="alice"\n'}, "podman"),
        ({"/.dockerenv": ""}, "docker"),
        ({"/run/systemd/container": "A B\n"}, None),
        ({"/etc/x": ""}, None),
    ],
)
def test_kind_of_container(files: Overlay, kind: str | None, tmp_path: Path) -> None:
    assert container_kind(tree(tmp_path, files)) == kind


# -- what a boot changes ---------------------------------------------------------------------

ASUSD = (
    "(\n    platform_profile_on_battery: Quiet,\n    platform_profile_on_ac: {},\n"
    "    change_platform_profile_on_ac: {},\n)\n"
)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"/etc/tuned/ppd.conf": "[main]\ndefault=balanced\n[profiles]\nbalanced=desktop\n"},
            [("tuned-ppd", "TuneD profile", "desktop")],
        ),
        (
            {"/var/lib/power-profiles-daemon/state.ini": "[State]\nProfile=power-saver\n"},
            [("power-profiles-daemon", "platform profile", "low-power")],
        ),
        (
            {
                "/etc/tlp.d/10-a.conf": "PLATFORM_PROFILE_ON_AC=performance\n",
                "/etc/tlp.conf": '# PLATFORM_PROFILE_ON_AC=x\nPLATFORM_PROFILE_ON_AC="balanced"\n',
            },
            [("tlp", "platform profile", "balanced")],
        ),
        (
            {"/etc/auto-cpufreq.conf": "[charger]\ngovernor=powersave\n[battery]\ngovernor=x\n"},
            [("auto-cpufreq", "governor", "powersave")],
        ),
        (
            {
                "/etc/asusd/asusd.ron": ASUSD.format("LowPower", "true"),
                "/sys/fs/cgroup/system.slice/asusd.service/cgroup.procs": "",
            },
            [("asusd", "platform profile", "low-power")],
        ),
        (
            {"/etc/asusd/asusd.ron": ASUSD.format("Quiet", "true")},
            [("asusd", "platform profile", "quiet")],
        ),
        (
            {
                "/etc/asusd/asusd.ron": ASUSD.format("Quiet", "false"),
                "/sys/fs/cgroup/system.slice/asusd.service/cgroup.procs": "",
            },
            [],
        ),
        ({"/etc/tuned/ppd.conf": "[profiles]\nbalanced=desktop\n"}, []),  # no base, no default
    ],
)
def test_power_at_boot(files: Overlay, told: list[tuple[str, ...]], tmp_path: Path) -> None:
    found = power_at_boot(tree(tmp_path, files))
    assert [(each.service, each.setting, each.value) for each in found] == told


FAST: Overlay = {
    f"{CPUFREQ}/policy{number}/scaling_governor": "performance\n" for number in range(32)
}
BACK: Overlay = {
    "/etc/tuned/ppd_base_profile": "balanced\n",
    "/etc/tuned/ppd.conf": "[profiles]\nbalanced=balanced\nperformance=throughput-performance\n",
}


def test_the_survey_says_until_when_clocks_are_held_up(tmp_path: Path) -> None:
    kept = ask(build(tmp_path / "kept", HEALTHY, FAST), "survey-clocks")["survey-clocks"]
    assert kept.answer.why == "clocks are kept high"  # type: ignore[union-attr]
    back = ask(build(tmp_path / "back", HEALTHY, FAST, BACK), "survey-clocks")["survey-clocks"]
    assert back.answer.why.endswith(  # type: ignore[union-attr]
        "until tuned-ppd next starts (then: balanced)"
    )


def test_where_the_profile_of_tuned_ppd_is_set(tmp_path: Path) -> None:
    fix = finding(build(tmp_path, HEALTHY, BACK), "tuned-ppd-base").fix or ""
    assert "performance=accelerator-performance below [profiles] in /etc/tuned/ppd.conf" in fix


def test_asusd_sets_the_platform_profile_back(tmp_path: Path) -> None:
    files: dict[str, str | None] = {
        "/sys/firmware/acpi/platform_profile": "performance\n",
        "/etc/asusd/asusd.ron": ASUSD.format("Quiet", "true"),
        "/sys/fs/cgroup/system.slice/asusd.service/cgroup.procs": "",
    }
    answer = finding(build(tmp_path / "runs", HEALTHY, files), "power-set-back")
    # asus-wmi of this kernel calls quiet low-power.
    assert "then sets low-power (/etc/asusd/asusd.ron)" in answer.text
    stopped = files | {"/sys/fs/cgroup/system.slice/asusd.service/cgroup.procs": None}
    quiet = build(tmp_path / "stopped", HEALTHY, stopped)
    assert ask(quiet, "power-set-back")["power-set-back"].outcome == "fine"


def test_boot_writes(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "/usr/lib/sysctl.d/10-a.conf": "vm.swappiness=60\nkernel.hostname=alice\n",
            "/etc/sysctl.d/99-b.conf": "-vm/swappiness = 180\n# vm.swappiness=1\n",
            "/etc/tmpfiles.d/thp.conf": "w /sys/kernel/mm/transparent_hugepage/enabled - - - - "
            "madvise\nd /home/alice 0700\n",
            "/proc/sys/vm/swappiness": "10\n",
            "/sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
        },
    )
    assert boot_writes(root) == (
        BootWrite("/proc/sys/vm/swappiness", "180", "/etc/sysctl.d/99-b.conf", "10"),
        BootWrite(
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "madvise",
            "/etc/tmpfiles.d/thp.conf",
            "always",
        ),
    )


def test_a_drop_in_of_etc_hides_its_namesake(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "/usr/lib/sysctl.d/50-a.conf": "vm.swappiness=60\n",
            "/etc/sysctl.d/50-a.conf": "vm.compaction_proactiveness=0\n",
        },
    )
    found = boot_writes(root)
    assert not isinstance(found, Unknown)
    assert [each.path for each in found] == ["/proc/sys/vm/compaction_proactiveness"]


def test_a_fifo_of_sysctl_d_hangs_nobody(tmp_path: Path) -> None:
    (tmp_path / "etc/sysctl.d").mkdir(parents=True)
    os.mkfifo(tmp_path / "etc/sysctl.d/a.conf")
    assert boot_writes(Root(tmp_path)) == ()


def test_what_an_old_snapshot_lacks_is_not_fine(tmp_path: Path) -> None:
    gone = {"/proc/sys/kernel/core_pattern": None, "/proc/swaps": None}
    root = build(tmp_path, HEALTHY, gone, {"/usr/lib/sysctl.d": None})
    results = ask(root, "coredump-large", "swap-zram-large", "swap-swappiness", "boot-writes-again")
    assert {each.outcome for each in results.values()} == {"unknown"}, results


def test_a_profile_that_its_service_has_not_saved(tmp_path: Path) -> None:
    files = {
        "/sys/firmware/acpi/platform_profile": "performance\n",
        "/sys/fs/cgroup/system.slice/power-profiles-daemon.service/cgroup.procs": "",
    }
    assert ask(build(tmp_path, HEALTHY, files), "power-set-back")["power-set-back"].outcome == (
        "unknown"
    )


def test_only_what_matters_is_recorded() -> None:
    private = b"kernel.hostname=alice\nvm.swappiness=10\n"
    assert reduce_file("/etc/sysctl.d/a.conf", private) == b"vm.swappiness=10\n"
    area = b"Filename\tType\tSize\tUsed\tPriority\n/home/alice/swap file\t8\t0\t-2\n"
    assert b"alice" not in (reduce_file("/proc/swaps", area) or b"")
    assert reduce_file("/etc/asusd/asusd.ron", b'    bat_command: "alice",\n') == b""


# -- swap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "zswap", "where"),
    [
        (swaps("/dev/zram0"), "N\n", "zram"),
        (swaps("/dev/zram0", "/dev/dm-1"), "N\n", None),
        (swaps("/dev/dm-1"), "Y\n", "zswap"),
        (swaps("/dev/dm-1"), "N\n", None),
        (swaps(), "Y\n", None),
    ],
)
def test_where_swapped_pages_are(text: str, zswap: str, where: str | None, tmp_path: Path) -> None:
    files = {"/proc/swaps": text, "/sys/module/zswap/parameters/enabled": zswap}
    found = swaps_of(tree(tmp_path, files))
    assert found is not None
    assert found.in_memory == where


def test_swap_areas(tmp_path: Path) -> None:
    text = swaps("/dev/zram0", kib=4) + "/swapfile file\t8\t0\t-2\n" + "short line\n"
    assert swaps_of(tree(tmp_path, {"/proc/swaps": text})) == Swaps(
        (SwapArea("zram", 4 * KIB), SwapArea("file", 8 * KIB)), None
    )
    assert swaps_of(Root(tmp_path / "nowhere")) is None


def test_the_knob_says_what_it_acts_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path, HEALTHY, {"/proc/swaps": swaps("/dev/zram0")})
    note = KNOBS["vm.swappiness"].note(read_machine(root))
    assert note is not None
    assert note.startswith("all swap here is zram")
    assert main(["--root", str(root.base), "plan", "long-context"]) in (0, 1)
    assert "all swap here is zram" in capsys.readouterr().out
    plain = build(tmp_path / "disk", HEALTHY)
    assert KNOBS["vm.swappiness"].note(read_machine(plain)) is None


def test_swappiness_of_a_disk(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, {"/proc/sys/vm/swappiness": "180\n"})
    assert "swap is on a disk" in finding(root, "swap-swappiness").text


# -- dumps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dumps"),
    [
        ("", CoreDumps(32 * GIB, None)),
        ("[Coredump]\nProcessSizeMax=infinity\n", CoreDumps(32 * GIB, None)),
        ("[Coredump]\nProcessSizeMax=infinity\nExternalSizeMax=infinity\n", CoreDumps(None, "F")),
        ("[Coredump]\nProcessSizeMax=1G\n", CoreDumps(1 * GIB, "F")),
        ("[Coredump]\nProcessSizeMax=banana\n", CoreDumps(32 * GIB, None)),
    ],
)
def test_limit_of_dumps(config: str, dumps: CoreDumps, tmp_path: Path) -> None:
    path = "/etc/systemd/coredump.conf"
    files = {
        path: config,
        "/proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P\n",
    }
    wanted = replace(dumps, source=path) if dumps.source else dumps
    assert core_dumps(tree(tmp_path, files)) == wanted


def test_dumps_of_another_handler_are_not_ours(tmp_path: Path) -> None:
    root = tree(tmp_path, {"/proc/sys/kernel/core_pattern": "core\n"})
    assert core_dumps(root) is None


def test_sections() -> None:
    text = "a=1\n[x]\nb = '2'\nb=3\n; c=4\nno\n[y]\n"
    assert sections(text) == {"": {"a": "1"}, "x": {"b": "3"}}
    assert sections(None) == {}


# -- Vulkan ----------------------------------------------------------------------------------------

VULKAN = ("vulkan", "cpu")


@pytest.mark.parametrize(
    ("build_number", "says"),
    [(9660, None), (9661, "in one report"), (9672, "in one report"), (9800, "may load"),
     (10005, None), (10729, None)],
)  # fmt: skip
def test_vulkan_that_computes_on_the_cpu(
    build_number: int, says: str | None, tmp_path: Path
) -> None:
    root = build(tmp_path, HEALTHY, surroundings(f"{build_number} (1234567)", VULKAN))
    result = ask(root, "vulkan-cpu-compute")["vulkan-cpu-compute"]
    text = result.answer.text if isinstance(result.answer, Finding) else None
    assert (says is None and text is None) or (says or "") in (text or "")
    assert result.rule.confidence == "likely"


@pytest.mark.parametrize(
    ("release", "option", "fires"),
    [("6.19.12", "", False), ("7.0.13", "", True), ("7.2.4", "", True), ("7.1.3", "0", True),
     ("7.1.3", "10000,60000,10000,10000", False)],
)  # fmt: skip
def test_two_seconds_for_a_job(release: str, option: str, fires: bool, tmp_path: Path) -> None:
    overlay = {
        **surroundings(backends=VULKAN),
        KERNEL: f"{release}\n",
        "/sys/module/amdgpu/parameters/lockup_timeout": f"{option}\n",
    }
    result = ask(build(tmp_path, HEALTHY, overlay), "vulkan-short-lockup")["vulkan-short-lockup"]
    assert (result.outcome == "finding") == fires


# -- one cause, one finding ------------------------------------------------------------------------


def test_covered_rules_exist() -> None:
    for rule in RULES.values():
        assert rule.id not in rule.covers
        assert set(rule.covers) <= RULES.keys(), rule.id


def test_one_cause_is_told_once(tmp_path: Path) -> None:
    results = ask(
        build(
            tmp_path,
            HEALTHY,
            cmdline("amd_iommu=pt"),
            log("AMD-Vi: Unknown option - 'pt'"),
        )
    )
    assert results["iommu-invalid"].covers == ("log-iommu-option",)
    assert results["log-iommu-option"].outcome == "covered"
    assert results["log-iommu-option"].severity is None


def test_a_finding_takes_the_worse_severity_of_what_it_covers(tmp_path: Path) -> None:
    lines = ("amdgpu: ring comp_1.1.0 timeout", "amdgpu: MES failed to respond to msg=X")
    results = ask(build(tmp_path, HEALTHY, log(*lines)))
    assert results["log-mes"].severity == "error"
    assert results["log-mes"].covers == ("log-ring-timeout",)
    newer = replace(RULES["log-ring-timeout"], covers=("log-mes",))
    facts = read_facts(build(tmp_path / "b", HEALTHY, log(*lines)), recorded(Root(tmp_path / "b")))
    ring, mes = diagnose(facts, [newer, RULES["log-mes"]])
    assert (ring.severity, mes.outcome) == ("error", "covered")


def test_another_setting_is_another_cause(tmp_path: Path) -> None:
    """What a wrong module has of one option hides nothing of another."""
    files = {MODPROBE: "options amdttm pages_limit=1\noptions amdgpu cwsr_enable=0\n"}
    root = build(tmp_path, HEALTHY, files)
    results = ask(root, "ttm-wrong-module", "option-not-in-force")
    assert {each.outcome for each in results.values()} == {"finding"}, results


# -- numbers to write ---------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "rule", "fix"),
    [
        (cmdline("amdgpu.gttsize=98304"), "gttsize-deprecated", "ttm.pages_limit=25165824"),
        ({MODPROBE: "options ttm pages_limit=98304\n"}, "ttm-wrong-unit", "=25165824 for 96 GiB"),
        ({MODPROBE: "options ttm pages_limit=96\n"}, "ttm-wrong-unit", "=25165824 for 96 GiB"),
        ({MODPROBE: "options amdttm pages_limit=9\n"}, "ttm-wrong-module", "ttm.pages_limit=9"),
    ],
)
def test_the_fix_has_the_number(overlay: Overlay, rule: str, fix: str, tmp_path: Path) -> None:
    assert fix in (finding(build(tmp_path, HEALTHY, overlay), rule).fix or "")


@pytest.mark.parametrize(
    ("overlay", "rule"),
    [
        (cmdline("amdgpu.gttsize=524288"), "gttsize-deprecated"),
        ({MODPROBE: "options ttm pages_limit=512G\n"}, "ttm-wrong-unit"),
        ({MODPROBE: "options ttm pages_limit=262143\n"}, "ttm-wrong-unit"),
        ({MODPROBE: "options ttm pages_limit=500\n"}, "ttm-wrong-unit"),
    ],
)
def test_no_number_is_more_than_boot_plan_accepts(
    overlay: Overlay, rule: str, tmp_path: Path
) -> None:
    root = build(tmp_path, HEALTHY, overlay)
    total = read_machine(root).memory.total_bytes
    assert total is not None
    fix = finding(root, rule).fix or ""
    assert f"ttm.pages_limit={most_for_gpu(total) // PAGE} for " in fix


# -- the command line ---------------------------------------------------------


@pytest.fixture
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(root: Root, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["--root", str(root.base), "doctor", *words])
    return capsys.readouterr().out


@pytest.mark.usefixtures("eighty")
def test_what_is_not_known_takes_three_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build(tmp_path, machine="strix-halo-128")
    lines = printed(root, capsys).splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("not known ("))
    end = next(at for at in range(start + 1, len(lines)) if not lines[at].startswith("  "))
    told = lines[start:end]
    assert len(told) <= 3
    assert max(map(len, told)) <= 80
    total = int(re.search(r"\((\d+) rules\)", told[0])[1])  # type: ignore[index]
    parts = [int(each) for each in re.findall(r"\((\d+)\)", " ".join(told))]
    assert sum(parts) == total
    assert f"{total} not known" in " ".join(lines[end:])


@pytest.mark.usefixtures("eighty")
def test_all_shows_every_rule_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path, machine="strix-halo-128")
    out = printed(root, capsys, "--all")
    block = out[out.index("\nnot known:") :].split("\nfine:")[0]
    assert max(map(len, block.splitlines())) <= 80
    for result in ask(root).values():
        assert (result.outcome == "unknown") == (
            re.search(rf"(?<![\w-]){re.escape(result.rule.id)}(?![\w-])", block) is not None
        )


@pytest.mark.parametrize(
    ("counts", "said"),
    [((0, 0, 0), "no errors, no warnings, no notes"), ((1, 1, 1), "1 error, 1 warning, 1 note"),
     ((2, 0, 3), "2 errors, no warnings, 3 notes")],
)  # fmt: skip
def test_counts_in_grammar(counts: tuple[int, int, int], said: str) -> None:
    rule: Rule = RULES["swap-none"]
    results = [
        Result(replace(rule, severity=severity), "finding", Finding("x"))
        for severity, count in zip(("error", "warning", "info"), counts, strict=True)
        for _ in range(count)
    ]
    assert cli._counts(results).startswith(f"{said}; of ")
