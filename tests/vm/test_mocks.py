# SPDX-License-Identifier: Apache-2.0
"""The stand-ins for hardware behave as what they stand in for; other tests rest on it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from vm.guest import Guest

POLICY = "/sys/devices/system/cpu/cpufreq/policy0"
GOVERNOR = f"{POLICY}/scaling_governor"
EPP = f"{POLICY}/energy_performance_preference"
EVENTS = "/sys/kernel/tracing/events/gpu_scheduler"


@pytest.fixture
def cpufreq(guest: Guest) -> Iterator[Guest]:
    yield guest
    guest.sh("rmmod mock_cpufreq")


def test_table_driver(cpufreq: Guest) -> None:
    cpufreq.sh("modprobe -a cpufreq_powersave cpufreq_ondemand mock_cpufreq")
    assert cpufreq.read(f"{POLICY}/scaling_driver") == "mock-cpufreq"
    for governor, khz in {"performance": "5100000", "powersave": "625000"}.items():
        assert cpufreq.write(GOVERNOR, governor).code == 0
        assert cpufreq.read(f"{POLICY}/scaling_cur_freq") == khz
    assert "Invalid argument" in cpufreq.write(GOVERNOR, "fastest").err
    clock = cpufreq.read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    assert clock == "tsc", "the mock made the kernel drop its clock"


def test_amd_pstate_look_alike(cpufreq: Guest) -> None:
    cpufreq.sh("modprobe mock_cpufreq epp=1")
    assert cpufreq.read(f"{POLICY}/scaling_driver") == "amd-pstate-epp"
    assert cpufreq.read(f"{POLICY}/scaling_available_governors") == "performance powersave"
    assert (cpufreq.read(GOVERNOR), cpufreq.read(EPP)) == ("powersave", "balance_performance")
    assert cpufreq.write(EPP, "power").code == 0
    assert "Invalid argument" in cpufreq.write(EPP, "turbo").err
    assert cpufreq.write(GOVERNOR, "performance").code == 0
    assert cpufreq.read(EPP) == "performance"
    assert "Device or resource busy" in cpufreq.write(EPP, "power").err
    assert cpufreq.write(EPP, "performance").code == 0
    assert cpufreq.write(GOVERNOR, "powersave").code == 0
    assert cpufreq.write(EPP, "balance_power").code == 0
    assert cpufreq.read(EPP) == "balance_power"


def test_rings_fire_the_scheduler_s_tracepoints(guest: Guest) -> None:
    guest.sh("mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing")
    guest.sh("modprobe mock_gpusched")
    try:
        # Renamed in Linux 6.17: a reader has to look which of the two there is.
        names = guest.sh(f"ls {EVENTS}").split()
        queued, run, done = (
            ("drm_sched_job_queue", "drm_sched_job_run", "drm_sched_job_done")
            if "drm_sched_job_queue" in names
            else ("drm_sched_job", "drm_run_job", "drm_sched_process_job")
        )
        guest.sh(f"echo >/sys/kernel/tracing/trace; echo 1 >{EVENTS}/enable")
        guest.sh("echo '20 2000 1' >/dev/mock_gpu; echo '3 0 0' >/dev/mock_gpu")
        time.sleep(0.5)
        guest.sh(f"echo 0 >{EVENTS}/enable")
        trace = guest.sh("cat /sys/kernel/tracing/trace")
        for event in (queued, run, done):
            assert trace.count(f" {event}: ") == 23, trace
        assert "comp_1.0.0" in trace
        assert "gfx_0.0.0" in trace
        assert "Invalid argument" in guest.write("/dev/mock_gpu", "1 1 7").err
    finally:
        guest.sh("rmmod mock_gpusched")
