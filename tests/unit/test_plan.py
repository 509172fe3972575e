# SPDX-License-Identifier: Apache-2.0
"""What is planned, in which order, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.knobs.guards import GUARDS, STRIX_HALO
from infertune.cli.main import main
from infertune.engine.journal import RUNTIME
from infertune.engine.plan import Item, restore_order, set_order
from infertune.engine.session import ApplyFailed, session
from infertune.engine.state import make_plan, status
from infertune.engine.store import Store
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_root
from support import (
    CPUFREQ,
    LONG,
    QUIET,
    THP,
    FakeKernel,
    Values,
    apply,
    build,
    desired,
    recover,
    revert,
    values,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"

GOVERNOR = "cpufreq.scaling_governor"
EPP = "cpufreq.energy_performance_preference"


def _items(root: Root, wanted: Values, **options: bool) -> dict[str | None, Item]:
    report = make_plan(root, read_machine(root), desired("p", wanted), **options)  # type: ignore[arg-type]
    return {item.path: item for item in report.items}


def test_order_of_the_whole_catalogue_has_no_cycle() -> None:
    order = set_order(KNOBS)
    back = restore_order(KNOBS)
    assert sorted(order) == sorted(back) == sorted(KNOBS)
    for knob in KNOBS.values():
        for earlier in knob.after:
            assert order.index(earlier) < order.index(knob.id)
        for earlier in knob.restore_after:
            assert back.index(earlier) < back.index(knob.id)
        for touched in knob.touches:
            assert order.index(knob.id) < order.index(touched)
            assert back.index(knob.id) < back.index(touched)


def test_governor_goes_first_both_ways() -> None:
    assert set_order([EPP, GOVERNOR]) == [GOVERNOR, EPP]
    assert restore_order([GOVERNOR, EPP]) == [GOVERNOR, EPP]


def test_level_is_set_first_and_restored_last() -> None:
    level, mode = "amdgpu.power_dpm_force_performance_level", "amdgpu.pp_power_profile_mode"
    assert set_order([mode, level]) == [level, mode]
    assert restore_order([level, mode]) == [mode, level]


def test_switch_touches_only_what_differs(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    plan = _items(root, QUIET)
    assert plan[f"{THP}/enabled"].outcome == "already"
    assert plan["/proc/sys/vm/swappiness"].original == "60"
    assert plan["/sys/firmware/acpi/platform_profile"].outcome == "restore"
    assert plan[f"{CPUFREQ}/policy0/scaling_governor"].outcome == "restore"
    apply(root, "quiet", QUIET)
    apply(root, "long", LONG)
    apply(root, "quiet", QUIET)
    revert(root)
    assert values(tmp_path) == original


def test_what_the_kernel_moves_along_goes_back_too(tmp_path: Path) -> None:
    """THP moves min_free_kbytes, the governor moves the preference; nobody asked for either."""
    root = build(tmp_path)
    apply(root, "long", LONG)
    now = values(tmp_path)
    assert now["/proc/sys/vm/min_free_kbytes"] == "90112\n"
    assert now[f"{CPUFREQ}/policy1/energy_performance_preference"] == "performance\n"
    revert(root)
    assert values(tmp_path)["/proc/sys/vm/min_free_kbytes"] == "67584\n"
    policy = values(tmp_path)[f"{CPUFREQ}/policy1/energy_performance_preference"]
    assert policy == "balance_performance\n"


def test_a_foreign_value_survives_our_own_side_effects(tmp_path: Path) -> None:
    """Somebody set the reserve after us; putting THP back would move it, and must not."""
    root = build(tmp_path)
    apply(root, "thp", {"transparent_hugepage.enabled": "always"})
    (tmp_path / "proc/sys/vm/min_free_kbytes").write_text("80000\n")
    with session(root, "revert") as ours:
        report = ours.revert()
    outcomes = {item.knob: item.outcome for item in report.items}
    assert outcomes == {
        "transparent_hugepage.enabled": "restored",
        "vm.min_free_kbytes": "conflict",
    }
    assert values(tmp_path)["/proc/sys/vm/min_free_kbytes"] == "80000\n"


def test_a_wanted_value_that_was_moved_along_is_set_again(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    wanted: Values = {"transparent_hugepage.enabled": "always", "vm.min_free_kbytes": "66MiB"}
    apply(root, "p", wanted)
    assert values(tmp_path)["/proc/sys/vm/min_free_kbytes"] == "67584\n"
    assert not make_plan(root, read_machine(root), desired("p", wanted)).differs
    revert(root)
    assert values(tmp_path) == original


def test_clamped_value_is_said_and_does_not_drift(tmp_path: Path) -> None:
    root = build(tmp_path)
    wanted: Values = {"transparent_hugepage.khugepaged.pages_to_scan": 8192}
    with session(root, "apply p") as ours:
        report = ours.apply(desired("p", wanted))
    assert [(item.outcome, item.got) for item in report.items] == [("clamped", "5000")]
    again = make_plan(root, read_machine(root), desired("p", wanted))
    assert [item.outcome for item in again.items] == ["already"]
    assert again.items[0].reason == "the kernel makes 5000 of 8192"


def test_foreign_value_becomes_the_one_to_go_back_to(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "p", {"vm.swappiness": 10})
    (tmp_path / "proc/sys/vm/swappiness").write_text("33\n")
    item = _items(root, {"vm.swappiness": 20})["/proc/sys/vm/swappiness"]
    assert (item.outcome, item.original) == ("set", "33")
    assert item.reason is not None
    assert "changed by someone else" in item.reason


def test_absent_is_neither_error_nor_success(tmp_path: Path) -> None:
    root = build(tmp_path)
    item = _items(root, {"ksm.run": 0})[None]
    assert item.outcome == "absent"
    assert item.before is None
    assert item.reason == "this kernel is built without CONFIG_KSM"


def test_word_that_this_kernel_does_not_offer(tmp_path: Path) -> None:
    item = _items(build(tmp_path), {GOVERNOR: "schedutil"})[f"{CPUFREQ}/policy0/scaling_governor"]
    assert item.outcome == "refused"
    assert item.reason == "this kernel offers only performance, powersave"


def test_value_that_could_not_be_put_back_is_left_alone(tmp_path: Path) -> None:
    root = build(tmp_path)
    (tmp_path / "sys/firmware/acpi/platform_profile").write_text("custom\n")
    item = _items(root, {"platform_profile": "balanced"})["/sys/firmware/acpi/platform_profile"]
    assert item.outcome == "refused"
    assert item.reason == "the present value 'custom' could not be written back"


def test_file_that_cannot_be_understood_is_left_alone(tmp_path: Path) -> None:
    root = build(tmp_path)
    (tmp_path / "proc/sys/vm/swappiness").write_text("many\n")
    item = _items(root, {"vm.swappiness": 1})["/proc/sys/vm/swappiness"]
    assert item.outcome == "rejected"
    assert item.reason is not None
    assert "could not be put back" in item.reason


def test_a_required_file_that_cannot_be_understood_stops_the_apply(tmp_path: Path) -> None:
    root = build(tmp_path)
    (tmp_path / "proc/sys/vm/swappiness").write_text("many\n")
    before = values(tmp_path)
    wanted = {"transparent_hugepage.enabled": "always", "vm.swappiness": 1}
    with session(root, "apply") as ours, pytest.raises(ApplyFailed, match="rejected, but"):
        ours.apply(desired("x", wanted, required=True))
    assert values(tmp_path) == before


class Clamping(FakeKernel):
    """Takes any swappiness and makes 20 of what is not 10: no error, another value."""

    def write_value(self, path: str, text: str) -> None:
        super().write_value(path, "20" if path.endswith("swappiness") and text != "10" else text)


def test_an_original_that_the_kernel_alters_is_not_back(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "a", {"vm.swappiness": 10})
    failed = pytest.raises(ApplyFailed, match="the kernel made 20 of 60")
    with session(Clamping(tmp_path), "revert") as ours, failed:
        ours.revert()
    journal = Store(root, RUNTIME).load().journal
    assert journal is not None
    assert [record.original for record in journal.records] == ["60"]
    recover(root)
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "60\n"


class OfflineCpu(FakeKernel):
    """The files of a policy whose CPUs are all offline are there, and answer EBUSY."""

    def read_value(self, path: str, size: int) -> bytes:
        if "/policy1/" in path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        return super().read_value(path, size)


def test_a_policy_whose_cpus_are_offline_is_away_and_its_original_is_kept(tmp_path: Path) -> None:
    build(tmp_path)
    original = values(tmp_path)
    apply(Root(tmp_path), "a", {GOVERNOR: "performance"})
    offline = OfflineCpu(tmp_path)
    outcomes = {item.path: item.outcome for item in status(offline).items}
    assert outcomes[f"{CPUFREQ}/policy1/scaling_governor"] == "absent"
    with session(offline, "test") as one:
        report = one.revert()
    assert {"restored", "absent"} <= {item.outcome for item in report.items}
    revert(Root(tmp_path))
    assert values(tmp_path) == original


def test_refused_knob_keeps_nothing_of_an_earlier_profile(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "a", {GOVERNOR: "performance"})
    apply(root, "b", {GOVERNOR: "schedutil"})
    assert values(tmp_path) == original


def test_a_file_that_is_away_for_a_while_keeps_its_original(tmp_path: Path) -> None:
    """A CPU that is offline during a second apply: its policy directory is gone, then back."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "a", {GOVERNOR: "performance"})
    policy, aside = tmp_path / f"{CPUFREQ}/policy1".lstrip("/"), tmp_path / "aside"
    policy.rename(aside)
    apply(root, "a", {GOVERNOR: "performance"})
    apply(root, "b", {"vm.swappiness": 1})
    aside.rename(policy)
    revert(root)
    assert values(tmp_path) == original


def test_a_knob_that_is_refused_on_one_file_only(tmp_path: Path) -> None:
    root = build(tmp_path)
    offered = tmp_path / f"{CPUFREQ}/policy0/scaling_available_governors".lstrip("/")
    offered.write_text("performance powersave schedutil\n")
    before = values(tmp_path)
    apply(root, "a", {GOVERNOR: "performance"})
    apply(root, "b", {GOVERNOR: "schedutil"})
    now = values(tmp_path)
    assert now[f"{CPUFREQ}/policy0/scaling_governor"] == "schedutil\n"
    assert now[f"{CPUFREQ}/policy1/scaling_governor"] == "powersave\n"
    revert(root)
    assert values(tmp_path) == before


def test_what_moves_only_on_the_way_back_is_put_back_too(tmp_path: Path) -> None:
    """Switching THP on leaves the reserve where it is; switching it off again moves it."""
    root = build(tmp_path)
    reserve = tmp_path / "proc/sys/vm/min_free_kbytes"
    reserve.write_text("90112\n")
    apply(root, "p", {"transparent_hugepage.enabled": "always"})
    assert reserve.read_text() == "90112\n"
    revert(root)
    assert reserve.read_text() == "90112\n"


def test_a_knob_of_the_old_profile_that_the_new_one_only_moves(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    thp: Values = {"transparent_hugepage.enabled": "always"}
    apply(root, "a", {**thp, "vm.min_free_kbytes": "128MiB"})
    apply(root, "b", thp)
    assert values(tmp_path)["/proc/sys/vm/min_free_kbytes"] == "67584\n"
    revert(root)
    assert values(tmp_path) == original


def test_a_locked_preference_is_refused_and_later_goes_back(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    both: Values = {GOVERNOR: "performance", EPP: "power"}
    item = _items(root, both)[f"{CPUFREQ}/policy0/energy_performance_preference"]
    assert (item.outcome, item.reason) == (
        "refused",
        "cpufreq.scaling_governor performance locks it",
    )
    apply(root, "a", {GOVERNOR: "powersave", EPP: "power"})
    apply(root, "b", {GOVERNOR: "performance", EPP: "performance"})
    apply(root, "c", {GOVERNOR: "performance"})
    apply(root, "d", {GOVERNOR: "powersave"})
    assert values(tmp_path) == original
    revert(root)
    assert values(tmp_path) == original


@pytest.mark.parametrize(
    "before", [{EPP: "power"}, {GOVERNOR: "performance"}], ids=["ours", "along"]
)
def test_a_preference_that_a_wanted_governor_locks_is_refused_whatever_it_holds(
    before: Values, tmp_path: Path
) -> None:
    """It holds the value, until the governor takes it; or it went along with the governor."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "a", before)
    both: Values = {GOVERNOR: "performance", EPP: "power"}
    preference = f"{CPUFREQ}/policy0/energy_performance_preference"
    assert _items(root, both)[preference].outcome == "refused"
    for _ in range(2):
        apply(root, "b", both)
        assert values(tmp_path)[preference] == "performance\n"
    revert(root)
    assert values(tmp_path) == original


def test_a_lock_that_goes_with_the_old_profile_holds_nothing_back(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "a", {EPP: "power"})
    apply(root, "b", {GOVERNOR: "performance"})
    apply(root, "c", {EPP: "power"})
    now = values(tmp_path)
    assert now[f"{CPUFREQ}/policy0/scaling_governor"] == "powersave\n"
    assert now[f"{CPUFREQ}/policy0/energy_performance_preference"] == "power\n"
    revert(root)
    assert values(tmp_path) == original


def test_a_governor_that_somebody_else_set_locks_too(tmp_path: Path) -> None:
    root = build(tmp_path)
    for policy in (0, 1):
        root.write_value(f"{CPUFREQ}/policy{policy}/scaling_governor", "performance")
    items = _items(root, {EPP: "power"})
    assert {item.outcome for item in items.values()} == {"refused"}


def test_a_knob_of_another_version_stays_in_the_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build(tmp_path)
    apply(root, "a", {"vm.swappiness": 10})
    store = Store(root, RUNTIME)
    journal = store.load().journal
    assert journal is not None
    strange = replace(journal.records[0], knob="vm.gone", path="/proc/sys/vm/gone")
    elsewhere = replace(journal.records[0], path="/home/somebody/file")
    store.save(journal.with_records([*journal.records, strange, elsewhere]))
    (tmp_path / "home/somebody").mkdir(parents=True)
    (tmp_path / "home/somebody/file").write_text("mine\n")
    apply(root, "b", {"vm.swappiness": 20})
    assert main(["--root", str(tmp_path), "revert"]) == 3
    assert "restored: 1 of 3" in capsys.readouterr().err
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "60\n"
    assert (tmp_path / "home/somebody/file").read_text() == "mine\n"


def test_verify_differs_where_something_required_is_missing(tmp_path: Path) -> None:
    root = build(tmp_path)
    wanted = desired("p", {"ksm.run": 0}, required=True)
    assert make_plan(root, read_machine(root), wanted).differs


def test_latency_needs_somebody_who_holds_it(tmp_path: Path) -> None:
    root = build(tmp_path)
    device = tmp_path / "dev/cpu_dma_latency"
    device.parent.mkdir()
    device.write_bytes((2_000_000_000).to_bytes(4, "little"))
    held = _items(root, {"cpu_dma_latency": 99}, may_keep=True)["/dev/cpu_dma_latency"]
    assert held.outcome == "set"
    once = _items(root, {"cpu_dma_latency": 99}, may_keep=False)["/dev/cpu_dma_latency"]
    assert once.outcome == "refused"


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.id)
def test_guards_are_complete(guard: object) -> None:
    entry = next(each for each in GUARDS if each is guard)
    assert entry.knob in KNOBS
    assert entry.reason
    assert entry.source
    for value in entry.values:
        KNOBS[entry.knob].value.parse(value)
    assert entry.product or entry.gpu or entry.kernel_before


@pytest.mark.parametrize(
    ("fixture", "refused"),
    [
        ("rog-z13", {"platform_profile", "amdgpu.power_dpm_force_performance_level"}),
        ("strix-halo-64-laptop", {"amdgpu.power_dpm_force_performance_level"}),
        ("strix-halo-128", set()),
        ("radeon-desktop", set()),
    ],
)
def test_guards_on_recorded_machines(fixture: str, refused: set[str]) -> None:
    """The Z13 on 6.19 fits both rows, the 6.18 laptop one, a 7.1 desktop none."""
    wanted: Values = {
        "platform_profile": "performance",
        "amdgpu.power_dpm_force_performance_level": "high",
    }
    with open_root(str(FIXTURES / f"{fixture}.snapshot")) as root:
        machine = read_machine(root)
        report = make_plan(root, machine, desired("p", wanted))
        guarded = {
            i.knob for i in report.items if i.outcome == "refused" and "(" in (i.reason or "")
        }
        assert guarded == refused
        if fixture == "rog-z13":
            assert machine.inference_gpu is not None
            assert machine.inference_gpu.pci_id == STRIX_HALO


# What the owner of a 128 GB machine checks by hand, per backend.
STRIX_HALO_128 = {
    "now": {
        "transparent_hugepage.defrag": ("madvise", "defer", "set"),
        "vm.swappiness": ("60", "10", "set"),
        "kernel.numa_balancing": ("0", "0", "already"),
        "ksm.run": ("0", "0", "already"),
        # 96 GiB x 262144 pages
        "ttm.pages_limit": ("16376221", "25165824", "pending-reboot"),
    },
    "rocm": {
        "env": {"ROCBLAS_USE_HIPBLASLT": "1"},
        "server": {"ubatch_size": "2048", "gpu_layers": "999", "ctx_size": "131072"},
    },
    "vulkan": {
        "env": {"AMD_VULKAN_ICD": "RADV"},
        "server": {"ubatch_size": "512", "gpu_layers": "999", "ctx_size": "131072"},
    },
}


@pytest.mark.parametrize("backend", ["rocm", "vulkan"])
def test_long_context_on_a_128_gb_strix_halo(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = str(FIXTURES / "strix-halo-128.snapshot")
    assert main(["--root", fixture, "plan", "long-context", "--backend", backend, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "infertune.plan/1"
    found = {i["knob"]: (i["before"], i["want"], i["outcome"]) for i in document["items"]}
    assert found == STRIX_HALO_128["now"]
    numa = next(i for i in document["items"] if i["knob"] == "kernel.numa_balancing")
    assert "no effect here" in numa["note"]
    expected = STRIX_HALO_128[backend]
    assert document["env"] == expected["env"]
    assert expected["server"].items() <= document["server"].items()
    assert document["launch"]["memory_min"] == str(4 * 2**30)
    assert document["launch"]["malloc_hugetlb"] == "1"

    # The recorded machine is not what the profile says, and verify says so by its exit code.
    assert main(["--root", fixture, "verify", "long-context", "--backend", backend]) == 1
    assert "3 settings differ" in capsys.readouterr().out
    assert (
        main(["--root", fixture, "profile", "explain", "long-context", "--backend", backend]) == 0
    )
    explained = capsys.readouterr().out
    assert "long-context.toml:" in explained
    assert "96 GiB" in explained or "96GiB" in explained


def test_apply_to_a_recorded_machine_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole profile on a 128 GB Strix Halo tree: applied, verified, reverted."""
    from infertune.host.snapshot import open_snapshot

    with open_snapshot(str(FIXTURES / "strix-halo-128.snapshot")) as root:
        tree = str(root.base)
        before = {p: p.read_bytes() for p in sorted(root.base.rglob("*")) if p.is_file()}
        assert main(["--root", tree, "apply", "throughput", "--backend", "rocm"]) == 0
        assert main(["--root", tree, "apply", "long-context", "--backend", "vulkan"]) == 0
        capsys.readouterr()
        assert main(["--root", tree, "status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == "applied"
        assert main(["--root", tree, "revert"]) == 0
        assert "restored: 2 of 2" in capsys.readouterr().out
        after = {p: p.read_bytes() for p in before}
        assert after == before
