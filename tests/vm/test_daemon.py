# SPDX-License-Identifier: Apache-2.0
"""infertuned under systemd on stock kernels: from set-up to removal, with nothing of ours left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vm.guest import Guest
from vm.test_guest import apply_until, cpufreq_at_boot

pytestmark = pytest.mark.quick_on("7.x")

HERE = Path(__file__).parent
PYTHON = "/usr/lib/infertune/bin/python"
ALIVE = "/run/infertune/alive"


def status(guest: Guest) -> dict[str, object]:
    found: dict[str, object] = json.loads(guest.infertune("status --json", codes=(0, 1)).out)
    return found


def show(guest: Guest, name: str) -> str:
    return guest.sh(f"systemctl show -P {name} infertune.service").strip()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


def test_apply_goes_through_the_daemon_and_stop_puts_back(service: Guest) -> None:
    before = service.settings()
    assert show(service, "StatusText") == "idle"
    service.infertune("apply long-context")
    now = status(service)
    assert now["state"] == "applied"
    assert "infertuned" in now["applied"]["owner"]  # type: ignore[index]
    assert show(service, "StatusText") == "applied: long-context (auto)"
    service.infertune("verify long-context")
    assert service.settings() != before
    service.sh("systemctl stop infertune.service")
    assert service.settings() == before
    service.sh("systemctl start infertune.service")
    assert status(service)["state"] == "idle"


def test_the_unit_is_what_it_says(service: Guest) -> None:
    verify = service.run("systemd-analyze verify --man=no infertune.service infertune.slice")
    assert (verify.code, verify.out, verify.err) == (0, "", "")
    score = service.run(
        "systemd-analyze security --threshold=20 --no-pager infertune.service | tail -n 1"
    )
    assert "2.0" in score.out or "1." in score.out, score.out
    # kernel.numa_balancing needs the one capability the unit has.
    service.infertune("apply base")
    report = json.loads(service.infertune("verify base --json").out)
    assert not report["differs"]


def test_kill_9_changes_nothing_and_the_next_one_knows(service: Guest) -> None:
    before = service.settings()
    service.infertune("apply long-context")
    tuned = service.settings()
    pid = show(service, "MainPID")
    service.sh(f"kill -9 {pid}")
    wait_until(lambda: show(service, "MainPID") not in ("0", pid))
    wait_until(lambda: show(service, "ActiveState") == "active")
    assert service.settings() == tuned
    assert status(service)["state"] == "applied"
    service.infertune("revert")
    assert service.settings() == before


def test_reload_is_a_new_process_image_on_an_untouched_machine(service: Guest) -> None:
    service.infertune("apply long-context")
    tuned, pid = service.settings(), show(service, "MainPID")
    service.sh("systemctl reload infertune.service")
    wait_until(lambda: status(service)["state"] == "applied")  # "running" while it looks around
    assert show(service, "MainPID") == pid
    assert service.settings() == tuned


def test_without_confirmation_it_goes_back(service: Guest) -> None:
    before = service.settings()
    service.infertune("apply long-context --confirm-within 15s")
    assert status(service)["state"] == "applied"
    assert show(service, "StatusText").startswith("unconfirmed")
    # The command line is gone, the daemon dies: the deadline stays.
    service.sh("systemctl kill -s KILL infertune.service")
    wait_until(lambda: service.settings() == before)
    service.infertune("apply long-context --confirm-within 15s")
    service.infertune("confirm")
    time.sleep(16)
    assert status(service)["state"] == "applied"
    service.infertune("confirm", codes=(1,))


def test_who_may(service: Guest) -> None:
    before = service.settings()

    def denied(command: str) -> None:
        done = service.run(command, user="user")
        assert done.code == 4, done
        assert "not authorized" in done.err
        assert service.settings() == before

    assert service.run("infertune status", user="user").code == 0
    for polkit in ("start", "stop"):
        service.sh(f"systemctl {polkit} polkit.service")
        if polkit == "stop":
            service.sh("systemctl mask -q --runtime polkit.service")
        denied("infertune apply long-context")
        denied("infertune revert")
        denied("infertune confirm")
    service.sh("systemctl unmask -q --runtime polkit.service")


def mixed_calls(guest: Guest, count: int) -> dict[str, int]:
    """The number of answers by kind."""
    command = f"{PYTHON} /opt/in_guest/mixed_calls.py {count}"
    done = guest.run(command, user="user", timeout=1800)
    assert done.code == 0, done
    answers: dict[str, int] = json.loads(done.out)
    assert sum(answers.values()) == count
    assert answers["NotAuthorized"] > count // 10
    assert answers["answered"] > count // 40
    return answers


@pytest.mark.timeout(7200)
def test_calls_of_all_kinds_leave_nothing_behind(service: Guest, thorough: bool) -> None:
    guest, count = service, 2500 if thorough else 50
    guest.put(HERE / "in_guest", "/opt")
    before = guest.settings()

    def cost() -> tuple[int, int, int]:
        pid = show(guest, "MainPID")
        fds = len(guest.sh(f"ls /proc/{pid}/fd").split())
        tasks = len(guest.sh(f"ls /proc/{pid}/task").split())
        memory = guest.sh(f"awk '/^Pss:/ {{ print $2 }}' /proc/{pid}/smaps_rollup")
        return fds, tasks, int(memory)

    mixed_calls(guest, 100)  # what is loaded at the first use
    costs = [cost()]
    for _ in range(4):
        print(f"{count} calls: {mixed_calls(guest, count)}")
        costs.append(cost())
    print(f"fds, tasks, PSS in KiB: {costs}")
    assert len({each[:2] for each in costs}) == 1
    # Names of 60 KB leave holes in the heap, a few MiB that come and go.  That nothing but holes
    # is there is seen by test_no_object_is_left_of_many_calls.
    assert costs[-1][2] - costs[0][2] < 8 * 1024
    assert guest.settings() == before


@pytest.mark.quick_on
@pytest.mark.timeout(7200)
def test_no_object_is_left_of_many_calls(service: Guest) -> None:
    guest, drop_in = service, "/run/systemd/system/infertune.service.d"
    guest.put(HERE / "in_guest", "/opt")
    traced = f"[Service]\nExecStart=\nExecStart={PYTHON} -I /opt/in_guest/traced_daemon.py\n"
    guest.sh(f"mkdir -p {drop_in}")
    assert guest.write(f"{drop_in}/traced.conf", traced).code == 0

    def alive_kib() -> int:
        guest.sh(f"rm -f {ALIVE}; kill -USR1 {show(guest, 'MainPID')}")
        wait_until(lambda: guest.run(f"test -e {ALIVE}").code == 0)
        return int(guest.read(ALIVE))

    try:
        guest.sh("systemctl daemon-reload && systemctl restart infertune.service")
        alive = []
        for _ in range(5):
            mixed_calls(guest, 500)
            alive.append(alive_kib())
    finally:
        guest.sh(f"rm -rf {drop_in} {ALIVE}; systemctl daemon-reload")
        guest.sh("systemctl restart infertune.service")
    print(f"alive in KiB after each 500 calls: {alive}")
    assert max(alive[1:]) - alive[1] < 64  # the first are not all that is loaded once


def test_nobody_else_can_be_the_daemon(service: Guest) -> None:
    service.sh("systemctl stop infertune.service")
    done = service.run(
        "busctl --system call org.freedesktop.DBus / org.freedesktop.DBus RequestName su "
        "org.infertune.Infertune1 4",
        user="user",
    )
    assert done.code != 0
    service.sh("systemctl start infertune.service")


def test_idle_means_asleep(service: Guest) -> None:
    """No wake-up of its own: the watchdog once a minute is the only one."""
    pid = show(service, "MainPID")
    time.sleep(2)

    def switches() -> int:
        text = service.read(f"/proc/{pid}/status")
        lines = (line for line in text.splitlines() if line.startswith("voluntary_ctxt"))
        return int(next(lines).split()[1])

    first = switches()
    time.sleep(20)
    assert switches() - first <= 2


def test_power_cut_while_the_daemon_applies(service: Guest, thorough: bool) -> None:
    with cpufreq_at_boot(service):
        own = service.settings()
        for cut in (service.power_cut, service.reset) if thorough else (service.power_cut,):
            apply_until(service, cut)
            wait_until(lambda: show(service, "ActiveState") == "active")
            assert service.settings() == own, "values are not the kernel's own"
            assert status(service)["state"] == "idle"
            service.infertune("apply throughput")
            service.infertune("verify throughput")
            service.infertune("revert")
            assert service.settings() == own


@pytest.mark.quick_on
def test_default_profile_is_applied_at_start_and_not_after_a_power_cut(service: Guest) -> None:
    with cpufreq_at_boot(service):
        service.sh(
            "mkdir -p /etc/infertune; echo 'profile = \"throughput\"' "
            ">/etc/infertune/infertuned.toml; systemctl restart infertune.service; sync"
        )
        assert status(service)["state"] == "applied"
        service.power_cut()
        wait_until(lambda: show(service, "ActiveState") == "active")
        now = status(service)
        assert now["state"] == "idle"
        assert "stopped without warning while 'throughput'" in str(now["notes"])
        assert "scaling_governor" in str(now["notes"])
        # Applied by hand, then stopped in order: the next start applies it again.
        service.infertune("apply throughput")
        service.sh("systemctl restart infertune.service")
        assert status(service)["state"] == "applied"
        service.infertune("revert")
