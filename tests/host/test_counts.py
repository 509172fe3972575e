# SPDX-License-Identifier: Apache-2.0
"""Counts that hold under every life of a thread: within one per cent of what the kernel says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from infertune.exporter.probes import Probes
from probe_support import (
    NEEDED,
    cgroup,
    probes,
    process_state,
    remove,
    samples,
    start,
    until_asleep,
    value,
)

__all__ = ["cgroup", "probes"]  # fixtures

pytestmark = NEEDED

RUNNING, FAULTS = "infertune_thread_seconds_total", "infertune_page_faults_total"
GIB = 1 << 30


def ended(process: subprocess.Popen[str]) -> tuple[float, int]:
    """Seconds of CPU time, and minor faults, of a process and of the children it waited for."""
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_minflt


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def cpu_time(group: Path) -> float:
    """Seconds that the kernel charged to a control group, to the last instruction of a thread."""
    stat = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(stat["usage_usec"]) / 1e6


THREADS = """
import _thread
done = _thread.allocate_lock()
done.acquire()
for _ in range(2000):
    _thread.start_new_thread(done.release, ())
    done.acquire()
"""
FORKS = """
import os
import re
import shutil
for _ in range(1000):
    if not (pid := os.fork()): os._exit(0)
    os.waitpid(pid, 0)
"""
STORM = """
import os
import re
import shutil
for _ in range(5):
    pids = []
    for _ in range(100):
        if not (pid := os.fork()): os._exit(0)
        pids.append(pid)
    for pid in pids: os.waitpid(pid, 0)
"""
PROGRAMS = """
import os
import re
import shutil
for _ in range(300): os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)
"""
LARGE = """
import mmap
memory = mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, len(memory), 4096): memory[at] = 1
import os; os._exit(0)
"""
"""Its memory is freed by the kernel, after the program has ended."""
LIVES = {
    "2000 threads": THREADS,
    "1000 forks": FORKS,
    "a storm of 500": STORM,
    "300 programs": PROGRAMS,
    "2 GiB": LARGE,
}


@pytest.mark.parametrize("name", LIVES)
def test_cpu_time_and_faults_of_every_life(name: str, probes: Probes, cgroup: Path) -> None:
    if name == "2 GiB" and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 3 * GIB:
        pytest.skip("less than 3 GiB are free")
    process = start(cgroup, "print('ready', flush=True)\ninput()" + LIVES[name])
    said(process)  # it is in the group now, and what it ran before is taken over with this look
    until_asleep(process.pid)
    before, charged = value(probes, RUNNING, server="test", state="running"), cpu_time(cgroup)
    go_on(process)
    seconds, minor = ended(process)
    running = value(probes, RUNNING, server="test", state="running")
    assert running - before == pytest.approx(cpu_time(cgroup) - charged, rel=0.01, abs=0.001)
    assert value(probes, FAULTS, server="test", kind="minor") == pytest.approx(minor, rel=0.01)
    # getrusage(2) has a thread's time as of its last tick, without what it did to end.
    assert running > seconds * 0.99


EXEC_IN_A_THREAD = """
import os, sys, threading, time
time.sleep(2)
print('ready', flush=True)
input()
again = [sys.executable, '-S', '-c', 'print("again", flush=True); input()']
threading.Thread(target=os.execv, args=(sys.executable, again)).start()
time.sleep(60)
"""


def test_exec_in_another_thread_does_not_count_the_past_again(probes: Probes, cgroup: Path) -> None:
    """It takes over the start time of the first thread: its own time must not jump."""
    process = start(cgroup, EXEC_IN_A_THREAD)
    assert said(process) == "ready"
    began = time.monotonic()  # before the page is read: from then on its time counts
    before = value(probes, RUNNING, server="test")
    go_on(process)
    assert said(process) == "again"
    after = value(probes, RUNNING, server="test")
    lasted = time.monotonic() - began
    go_on(process)
    ended(process)
    assert before > 2
    assert after - before < 2 * lasted + 0.5  # two threads at most, for a moment


def test_a_thread_that_is_visited_while_it_ends_counts_once(probes: Probes, cgroup: Path) -> None:
    """All are visited again and again while threads and processes come and go."""
    process = start(cgroup, "print('ready', flush=True)\ninput()" + FORKS + THREADS)
    said(process)
    until_asleep(process.pid)
    before, charged = value(probes, RUNNING, server="test", state="running"), cpu_time(cgroup)
    go_on(process)
    looks = 0
    while process_state(process.pid) != "Z":
        samples(probes)
        looks += 1
    _, minor = ended(process)
    counted = value(probes, RUNNING, server="test", state="running") - before
    assert looks > 10
    assert counted == pytest.approx(cpu_time(cgroup) - charged, rel=0.01, abs=0.001)
    assert value(probes, FAULTS, server="test", kind="minor") == pytest.approx(minor, rel=0.01)


SPIN = """
import time
print('ready', flush=True)
input()
end = time.monotonic() + 1.5
while time.monotonic() < end: pass
print('ready', flush=True)
input()
"""


def run_delay(pid: int) -> float:
    """Seconds in run queues that the kernel has counted of a process that is asleep now."""
    until_asleep(pid)
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def test_waiting_survives_a_move_to_another_cpu(probes: Probes, cgroup: Path) -> None:
    """The kernel begins to wait anew in each run queue; run_delay has all of it."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("one CPU")

    def told() -> tuple[float, float]:
        return (
            value(probes, "infertune_run_queue_latency_seconds_sum", server="test"),
            value(probes, RUNNING, server="test", state="waiting"),
        )

    processes = [start(cgroup, SPIN) for _ in range(6)]
    for each in processes:
        said(each)
    delays, before = [run_delay(each.pid) for each in processes], told()
    for each in processes:
        go_on(each)
    end, turn = time.monotonic() + 1.6, 0
    while time.monotonic() < end:
        turn += 1
        for each in processes:
            os.sched_setaffinity(each.pid, {cpus[turn % 2]})
        time.sleep(0.004)
    for each in processes:
        said(each)
    waited = sum(run_delay(each.pid) for each in processes) - sum(delays)
    latency, waiting = (now - then for now, then in zip(told(), before, strict=True))
    for each in processes:
        go_on(each)
        ended(each)
    assert waited > 2, "six processes on two CPUs must wait"
    assert waiting == pytest.approx(waited, rel=1e-6)
    assert latency == pytest.approx(waited, rel=0.01)


def test_a_group_that_is_gone_before_anybody_looks(cgroup: Path) -> None:
    """A server ends, or is started again: what it did since the last look is its own."""
    names = {cgroup.stat().st_ino: "test"}
    probes = Probes(cgroups=lambda: dict(names))
    try:
        probes.attach()
        first = start(cgroup, "print('ready', flush=True)\ninput()" + FORKS)
        said(first)
        before = value(probes, FAULTS, server="test")
        go_on(first)
        _, minor = ended(first)
        # systemd removes the directory, and makes a new one for the next start.
        remove(cgroup)
        names.clear()
        cgroup.mkdir()
        names[cgroup.stat().st_ino] = "test"
        _, again = ended(start(cgroup, FORKS))
        found = value(probes, FAULTS, server="test")
        assert found == pytest.approx(minor + again, rel=0.01)
        assert found - before > minor  # before the first look it had a few
    finally:
        probes.close()


def test_a_server_has_zeros_before_anything_happens(probes: Probes) -> None:
    found = samples(probes)
    for limit in ("machine", "cgroup"):
        labels = frozenset({("server", "test"), ("limit", limit)})
        assert found["infertune_direct_reclaim_seconds_count", labels] == 0
    assert found["infertune_compaction_stall_seconds_sum", frozenset({("server", "test")})] == 0
    assert not [name for name, _ in found if name.startswith("infertune_drm")]


def test_what_is_below_a_unit_is_the_unit_s(probes: Probes, cgroup: Path) -> None:
    """A container engine makes groups in the unit's, as deep as it likes."""
    deep = cgroup
    for name in ("inner", *(f"deeper{n}" for n in range(5))):
        deep /= name
        deep.mkdir()
        process = start(deep, "print('ready', flush=True)\ninput()" + THREADS)
        said(process)
        before, charged = value(probes, RUNNING, server="test", state="running"), cpu_time(cgroup)
        go_on(process)
        ended(process)
        running = value(probes, RUNNING, server="test", state="running") - before
        assert running == pytest.approx(cpu_time(cgroup) - charged, rel=0.01, abs=0.001)


def test_a_group_below_a_unit_that_nobody_ever_saw(probes: Probes, cgroup: Path) -> None:
    """It was made and removed between two looks."""
    before = value(probes, FAULTS, server="test")
    minor = 0
    for number in range(5):
        inner = cgroup / f"inner{number}" / "most"
        inner.mkdir(parents=True)
        minor += ended(start(inner, THREADS))[1]
        remove(inner.parent)
    assert value(probes, FAULTS, server="test") - before == pytest.approx(minor, rel=0.01)


PERF = """
mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing
cd "$1" || exit 1
perf sched record -q -o data -- sh -c 'echo ready; read -r line' 2>said || exec cat said
exec perf sched latency -p -i data 2>&1
"""
PINNED = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + SPIN


def test_perf_sched_sees_the_same_waiting(probes: Probes, cgroup: Path, tmp_path: Path) -> None:
    if shutil.which("perf") is None or shutil.which("unshare") is None:
        pytest.skip("perf is not installed")
    name = "infertune_run_queue_latency_seconds_sum"
    processes = [start(cgroup, PINNED) for _ in range(3)]
    for each in processes:
        said(each)
    waited = 0.0
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", PERF, "sh", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as perf:
        recording = said(perf) == "ready"
        if recording:
            before = value(probes, name, server="test")
            for each in processes:
                go_on(each)
            for each in processes:
                said(each)
            waited = value(probes, name, server="test") - before
        printed, _ = perf.communicate("\n")
    for each in processes:
        each.kill()
        each.communicate()
    if not recording or "lost" in printed:
        pytest.skip(f"perf cannot record here: {printed.strip()[-200:]}")
    rows = re.findall(r":(\d+) +\|[^|]*\| +(\d+) \| avg: +([\d.]+) ms", printed)
    theirs = {int(pid): int(switches) * float(average) / 1e3 for pid, switches, average in rows}
    total = sum(theirs[each.pid] for each in processes)
    assert total > 1, "three processes on one CPU must wait"
    # It begins a wait at other events than the kernel does; run_delay, above, is the exact one.
    assert waited == pytest.approx(total, rel=0.05)
