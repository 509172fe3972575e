# SPDX-License-Identifier: Apache-2.0
"""The command line on stock kernels under systemd: values, groups, kills and power cuts."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infertune.engine.journal import PERSISTENT, RUNTIME, left_unclean, parse
from vm.guest import Guest

HERE = Path(__file__).parent
PROFILES = sorted(path.stem for path in (HERE.parents[1] / "profiles").glob("*.toml"))
PYTHON = "/usr/lib/infertune/bin/python"
CPUFREQ = "/sys/devices/system/cpu/cpufreq"
GOVERNORS = f"{CPUFREQ}/policy?/scaling_governor"
PREFERENCES = f"{CPUFREQ}/policy?/energy_performance_preference"


@pytest.fixture
def unchanged(guest: Guest) -> Iterator[dict[str, str | None]]:
    """The kernel's values before the test, which must be those after it."""
    before = guest.settings()
    yield before
    after = guest.settings()
    journals = guest.run(f"ls {RUNTIME} {PERSISTENT}").out
    if after != before or journals:
        guest.run("infertune revert")  # a test that failed must not fail the next
    assert after == before
    assert journals == ""


@pytest.fixture
def epp(guest: Guest) -> Iterator[None]:
    """Two CPUs whose driver looks like amd-pstate in active mode."""
    guest.sh("modprobe mock_cpufreq epp=1")
    yield
    guest.sh("rmmod mock_cpufreq")


def profile(guest: Guest, name: str, text: str) -> None:
    guest.sh("mkdir -p /etc/infertune/profiles")
    assert guest.write(f"/etc/infertune/profiles/{name}.toml", text).code == 0


def values(guest: Guest, pattern: str) -> set[str]:
    return set(guest.sh(f"cat {pattern}").split())


def test_what_the_guest_is(guest: Guest) -> None:
    machine = json.loads(guest.infertune("machine --json").out)
    assert machine["kernel"] == (guest.image / guest.kernel / "release").read_text().strip()
    assert machine["memory"]["numa_nodes"] == (2 if guest.kernel == "6.12" else 1)
    assert machine["cgroup"]["version"] == 2
    assert {"cpuset", "cpu", "memory"} <= set(machine["cgroup"]["controllers"])
    assert not [tuner["id"] for tuner in machine["tuners"] if tuner["running"]]
    assert {"tuned", "power-profiles-daemon"} <= {tuner["id"] for tuner in machine["tuners"]}


def test_who_is_not_root_may_look_and_no_more(
    guest: Guest, unchanged: dict[str, str | None]
) -> None:
    assert guest.run("infertune plan long-context", user="user").code == 0
    assert guest.run("infertune status", user="user").code == 0
    for verb in ("apply long-context", "revert", "recover"):
        done = guest.run(f"infertune {verb}", user="user")
        assert done.code == 4
        assert "nothing was touched" in done.err


@pytest.mark.quick_on("6.12")
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_applies_verifies_and_reverts(
    guest: Guest, name: str, unchanged: dict[str, str | None]
) -> None:
    report = json.loads(guest.infertune(f"apply {name} --json").out)
    now = {path: text for path, text in guest.settings().items() if text is not None}
    changed = [item for item in report["items"] if item["outcome"] == "applied"]
    assert changed
    for item in changed:
        words = now[item["path"]].split()
        assert item["want"] in words or f"[{item['want']}]" in words
    guest.infertune(f"verify {name}")
    guest.infertune("status")
    guest.infertune("revert")


def test_numa_balancing_on_two_nodes(guest_612: Guest) -> None:
    path = "/proc/sys/kernel/numa_balancing"
    assert guest_612.read(path) == "1"
    guest_612.infertune("apply long-context")
    assert guest_612.read(path) == "0"
    guest_612.infertune("revert")
    assert guest_612.read(path) == "1"


def test_zram_is_seen(guest: Guest) -> None:
    guest.sh("modprobe zram && echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0")
    guest.sh("swapon /dev/zram0")
    try:
        machine = json.loads(guest.infertune("machine --json").out)
        assert machine["memory"]["swap_bytes"] == 256 * 2**20 - 4096
    finally:
        guest.sh(
            "swapoff /dev/zram0 && udevadm settle && echo 1 >/sys/block/zram0/reset && rmmod zram"
        )


# -- frequency drivers ---------------------------------------------------------------


def test_governor_takes_the_preference_along_and_both_come_back(
    guest: Guest, epp: None, unchanged: dict[str, str | None]
) -> None:
    assert values(guest, PREFERENCES) == {"balance_performance"}
    guest.infertune("apply throughput")
    assert values(guest, GOVERNORS) == {"performance"}
    assert values(guest, PREFERENCES) == {"performance"}
    guest.infertune("revert")
    assert values(guest, GOVERNORS) == {"powersave"}
    # Only possible once the governor is back: before, the driver says EBUSY.
    assert values(guest, PREFERENCES) == {"balance_performance"}


@pytest.mark.quick_on("6.12")
def test_a_preference_that_the_governor_locks(
    guest: Guest, epp: None, unchanged: dict[str, str | None]
) -> None:
    text = """
        description = "a preference that this governor refuses"
        [now]
        vm.swappiness = 7
        cpufreq.scaling_governor = "performance"
        cpufreq.energy_performance_preference = { value = "power", required = REQUIRED }
    """
    profile(guest, "locked", text.replace("REQUIRED", "true"))
    done = guest.infertune("apply locked", codes=(3,))
    assert "nothing was touched" in done.err
    assert guest.settings() == unchanged
    profile(guest, "locked", text.replace("REQUIRED", "false"))
    assert "refused" in guest.infertune("apply locked").out
    assert values(guest, GOVERNORS) == {"performance"}
    assert values(guest, PREFERENCES) == {"performance"}
    guest.infertune("revert")


@pytest.mark.quick_on("6.12")
def test_from_a_preference_to_a_governor_and_back_to_the_original(
    guest: Guest, epp: None, unchanged: dict[str, str | None]
) -> None:
    profile(
        guest,
        "saver",
        """
        description = "a preference alone"
        [now]
        cpufreq.energy_performance_preference = "power"
        """,
    )
    guest.infertune("apply saver")
    assert values(guest, PREFERENCES) == {"power"}
    guest.infertune("apply throughput")
    assert values(guest, PREFERENCES) == {"performance"}
    guest.infertune("apply saver")
    assert values(guest, GOVERNORS) == {"powersave"}
    assert values(guest, PREFERENCES) == {"power"}
    guest.infertune("revert")


def test_table_driver(guest: Guest) -> None:
    guest.sh("modprobe mock_cpufreq")
    try:
        before = guest.settings()
        assert values(guest, GOVERNORS) == {"schedutil"}
        guest.infertune("apply low-latency")
        assert values(guest, GOVERNORS) == {"performance"}
        guest.infertune("revert")
        assert guest.settings() == before
    finally:
        guest.sh("rmmod mock_cpufreq")


# -- the process ---------------------------------------------------------------------

LOOK = r"""
import json, os, resource
group = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().removeprefix("0::")
def read(name):  # a controller that no setting needs is not switched on
    return open(f"{group}/{name}").read().strip() if os.path.exists(f"{group}/{name}") else None
names = ("memory.min", "memory.swap.max", "cpuset.cpus", "cpuset.cpus.effective", "cpu.weight")
print(json.dumps({
    **{name: read(name) for name in names},
    "group": group,
    "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    "oom": int(open("/proc/self/oom_score_adj").read()),
    "nice": os.nice(0),
    "affinity": sorted(os.sched_getaffinity(0)),
    "swappiness": int(open("/proc/sys/vm/swappiness").read()),
}))
"""


def run_under(guest: Guest, name: str) -> tuple[dict[str, object], str]:
    """What a command sees of itself under ``infertune run``, and what was said beside it."""
    guest.write("/root/look.py", LOOK)
    guest.sh("systemctl set-property --runtime infertune.slice MemoryMin=512M")
    done = guest.run(
        "systemd-run -q --scope --slice=infertune.slice -p Delegate=yes -p MemoryMin=512M "
        f"infertune run {name} -- python3 /root/look.py"
    )
    assert done.code == 0, done
    return json.loads(done.out), done.err


def test_run_in_a_delegated_scope(guest: Guest, unchanged: dict[str, str | None]) -> None:
    seen, said = run_under(guest, "long-context")
    total = int(guest.sh("awk '/^MemTotal/ { print $2 * 1024 }' /proc/meminfo"))
    asked = total // 10  # "4GiB, at most 10%"
    assert isinstance(seen["memory.min"], str)
    assert 0 <= asked - int(seen["memory.min"]) < 4096
    assert seen["memory.swap.max"] == "0"
    assert seen["oom"] == -500
    assert seen["swappiness"] == 10
    assert "clamped" not in said
    left = guest.sh("find /sys/fs/cgroup/infertune.slice -mindepth 1 -type d")
    assert left == "", "groups left behind"


def test_every_launch_setting_reaches_the_process(
    guest: Guest, unchanged: dict[str, str | None]
) -> None:
    profile(
        guest,
        "placed",
        """
        description = "every launch setting"
        [launch]
        cpus = "1"
        memory_min = "64MiB"
        memory_swap_max = "32MiB"
        memlock = "unlimited"
        oom_score_adj = 300
        nice = -5
        cpu_weight = 250
        """,
    )
    seen, said = run_under(guest, "placed")
    group = seen.pop("group")
    assert isinstance(group, str)
    assert "/infertune.slice/run-" in group
    assert seen == {
        "memory.min": str(64 * 2**20),
        "memory.swap.max": str(32 * 2**20),
        "cpuset.cpus": "1",
        "cpuset.cpus.effective": "1",
        "cpu.weight": "250",
        "memlock": [-1, -1],
        "oom": 300,
        "nice": -5,
        "affinity": [1],
        "swappiness": 60,
    }, said


def test_protection_that_no_group_above_grants_is_said(
    guest: Guest, unchanged: dict[str, str | None]
) -> None:
    done = guest.run("systemd-run -q --scope -p Delegate=yes infertune run long-context -- true")
    assert done.code == 0, done
    [line] = [line for line in done.err.splitlines() if line.startswith("memory_min")]
    assert "clamped" in line
    assert "no more than those above it" in line


@pytest.mark.quick_on  # test_serve.py has it with the daemon
def test_a_real_server_answers(guest: Guest, unchanged: dict[str, str | None]) -> None:
    # 1 GiB is too little for this profile: that it does not fit is said, and here meant.
    done = guest.run(
        "systemd-run -q --scope -p Delegate=yes infertune run long-context --json --force "
        "--ask 'The capital of France is' --tokens 4",
        timeout=600,
    )
    assert done.code == 0, done
    report = json.loads(done.out)
    assert report["embedded"]
    assert report["completion"]["tokens"] == 4
    assert {each["id"]: each["outcome"] for each in report["launch"]} == {
        "memory_min": "clamped",  # the scope itself is promised nothing
        "memory_swap_max": "applied",
        "oom_score_adj": "applied",
        "malloc_hugetlb": "applied",
    }


# -- kills and power cuts ------------------------------------------------------------


@pytest.mark.quick_on  # test_serve.py has it with the daemon
def test_killed_at_random_moments(
    guest: Guest, unchanged: dict[str, str | None], thorough: bool
) -> None:
    kills = 50 if thorough else 15
    seed = random.randrange(2**32)
    guest.put(HERE / "in_guest", "/root")
    script = "/root/in_guest/kill_at_random.py"
    words = f"{kills} {seed} {' '.join(unchanged)}"
    report = json.loads(guest.sh(f"{PYTHON} {script} {words}", timeout=600))
    print(f"seed {seed}: {report}")
    assert report["mixed"] == []
    assert report["killed"] == kills
    assert report["interrupted"] >= kills // 15, (
        "too few of the kills came while values were changing"
    )


@pytest.mark.quick_on  # test_daemon.py has it with the daemon
def test_power_cut_while_applying(guest: Guest) -> None:
    with cpufreq_at_boot(guest):
        own = guest.settings()
        for cut in (guest.power_cut, guest.reset):
            apply_until(guest, cut)
            after_power_cut(guest, own)


@contextlib.contextmanager
def cpufreq_at_boot(guest: Guest) -> Iterator[None]:
    """The mock of a cpufreq driver, there again after each boot."""
    guest.sh("echo mock_cpufreq >/etc/modules-load.d/mock.conf")
    guest.sh("echo options mock_cpufreq epp=1 >/etc/modprobe.d/mock.conf")
    guest.sh("modprobe mock_cpufreq && sync")
    try:
        yield
    finally:
        guest.sh("rm -f /etc/modules-load.d/mock.conf /etc/modprobe.d/mock.conf")
        guest.sh("rmmod mock_cpufreq; sync")


def apply_until(guest: Guest, cut: Callable[[], None]) -> None:
    """Apply, replace and revert without a pause, and ``cut`` at a random moment of it."""
    guest.put(HERE / "in_guest", "/root")
    guest.sh(
        "systemd-run -q --unit=appliers --setenv=PYTHONDONTWRITEBYTECODE=1 "
        f"{PYTHON} /root/in_guest/apply_for_ever.py"
    )
    deadline = time.monotonic() + 60
    while not guest.run(f"ls {PERSISTENT}").out:
        assert time.monotonic() < deadline, guest.run("systemctl status appliers").out
    time.sleep(random.uniform(0.5, 4))
    cut()


def after_power_cut(guest: Guest, own: dict[str, str | None]) -> None:
    assert guest.settings() == own, "values are not the kernel's own"
    assert not guest.sh("ls -A /run/infertune 2>/dev/null || :")
    damaged = guest.sh(f"ls {PERSISTENT}.damaged-* 2>/dev/null || :")
    assert damaged == ""
    status = json.loads(guest.infertune("status --json", codes=(0, 1)).out)
    assert status["state"] == "idle"
    lasting = guest.run(f"cat {PERSISTENT}").out.encode()
    if lasting:
        loaded = parse(lasting)
        assert loaded.damage == ()
        assert loaded.journal is not None
        assert loaded.journal.profile in ("throughput", "low-latency")
        unclean = left_unclean(loaded.journal, None) is not None
        assert unclean == any("earlier boot" in note for note in status["notes"])
    guest.infertune("apply throughput")
    guest.infertune("verify throughput")
    guest.infertune("revert")
    assert guest.settings() == own
    assert guest.run(f"ls {PERSISTENT}").out == ""
