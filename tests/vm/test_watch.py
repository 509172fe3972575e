# SPDX-License-Identifier: Apache-2.0
"""The daemon among others: TuneD, power-profiles-daemon, an admin, and hardware that comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from vm.guest import Guest
from vm.test_daemon import status, wait_until

pytestmark = pytest.mark.quick_on("7.x")

SWAPPINESS = "/proc/sys/vm/swappiness"
GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy1/scaling_governor"


def drift(guest: Guest) -> dict[str, dict[str, Any]]:
    entries: Any = status(guest)["drift"]
    return {entry["knob"]: entry for entry in entries}


@pytest.fixture
def tuned(service: Guest) -> Iterator[Guest]:
    """TuneD beside the daemon, with two profiles that set what ours sets too."""
    for name, value in (("calm", None), ("one", 33), ("two", 34)):
        service.sh(f"mkdir -p /etc/tuned/profiles/{name}")
        text = "[main]\nsummary=test\n"
        text += f"[sysctl]\nvm.swappiness={value}\n" if value else ""
        service.write(f"/etc/tuned/profiles/{name}/tuned.conf", text)
    before = service.read(SWAPPINESS)
    kept = service.sh("mkdir -p /root/kept && cp -a /etc/tuned /root/kept/ && ls /etc/tuned")
    service.sh("systemctl start tuned.service && tuned-adm profile calm", timeout=300)
    yield service
    service.run("systemctl stop tuned.service infertune.service", timeout=300)
    service.sh("rm -rf /etc/tuned && mv /root/kept/tuned /etc/ && rmdir /root/kept")
    service.sh("rm -rf /etc/tuned/profiles/calm /etc/tuned/profiles/one /etc/tuned/profiles/two")
    service.write(SWAPPINESS, before)
    assert kept


def test_tuned_is_named_before_and_not_fought_after(tuned: Guest) -> None:
    plan = tuned.infertune("plan long-context").out
    assert "TuneD" in plan
    assert "vm.swappiness" in next(line for line in plan.splitlines() if "may set" in line)
    tuned.infertune("apply long-context")
    assert tuned.read(SWAPPINESS) == "10"
    tuned.sh("tuned-adm profile one", timeout=300)
    wait_until(lambda: "vm.swappiness" in drift(tuned))
    found = drift(tuned)["vm.swappiness"]
    assert (found["state"], found["value"]) == ("external", "33")
    assert "TuneD" in str(found["by"])
    time.sleep(5)
    assert tuned.read(SWAPPINESS) == "33", "ping-pong"
    done = tuned.infertune("revert", codes=(1,))
    assert "conflict" in done.out
    assert tuned.read(SWAPPINESS) == "33"


@pytest.mark.quick_on
def test_enforced_once_against_a_tuner_and_then_contested(tuned: Guest) -> None:
    tuned.write("/etc/infertune/infertuned.toml", "enforce = true\n")
    tuned.sh("systemctl restart infertune.service")
    tuned.infertune("apply long-context")
    tuned.sh("tuned-adm profile one", timeout=300)
    wait_until(lambda: tuned.read(SWAPPINESS) == "10")
    tuned.sh("tuned-adm profile two", timeout=300)
    wait_until(lambda: drift(tuned).get("vm.swappiness", {}).get("state") == "contested")
    time.sleep(3)
    assert tuned.read(SWAPPINESS) == "34", "ping-pong"


def test_an_admin_is_right(service: Guest) -> None:
    before = service.read(SWAPPINESS)
    service.infertune("apply long-context")
    service.write(SWAPPINESS, "42")
    assert drift(service)["vm.swappiness"]["state"] == "external"
    assert service.infertune("status", codes=(1,)).out.count("externally owned") >= 1
    service.infertune("revert", codes=(1,))
    assert service.read(SWAPPINESS) == "42"
    service.write(SWAPPINESS, before)


@pytest.mark.quick_on
def test_a_cpu_that_comes_back_is_tuned_again(service: Guest) -> None:
    service.sh("modprobe mock_cpufreq epp=1")
    try:
        service.infertune("apply throughput")
        assert service.read(GOVERNOR) == "performance"
        service.sh("echo 0 >/sys/devices/system/cpu/cpu1/online")
        assert drift(service)["cpufreq.scaling_governor"]["state"] == "gone"
        service.sh("echo 1 >/sys/devices/system/cpu/cpu1/online")
        wait_until(lambda: service.read(GOVERNOR) == "performance")
        service.infertune("revert")
        assert service.read(GOVERNOR) == "powersave"
    finally:
        service.run("infertune revert")
        service.sh("echo 1 >/sys/devices/system/cpu/cpu1/online; rmmod mock_cpufreq")


@pytest.mark.quick_on
def test_power_profiles_that_offer_no_performance_are_no_obstacle(service: Guest) -> None:
    service.sh("modprobe mock_cpufreq epp=1; systemctl start power-profiles-daemon.service")
    try:
        service.infertune("apply throughput")
        assert service.read(GOVERNOR) == "performance"
        service.infertune("verify throughput")
        service.infertune("revert")
        assert service.read(GOVERNOR) == "powersave"
    finally:
        service.run("infertune revert")
        service.sh("systemctl stop power-profiles-daemon.service; rmmod mock_cpufreq")
