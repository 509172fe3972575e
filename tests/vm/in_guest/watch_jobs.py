# SPDX-License-Identifier: Apache-2.0
"""Attaches the probes, makes memory short, loads a GPU scheduler and gives it work; prints JSON.

Every step is in one process, as in a service that runs since before the module was loaded.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from infertune.exporter.page import render
from infertune.exporter.probes import Probes

GROUP = Path("/sys/fs/cgroup/infertune-test")
JOBS = (("0", 30, 2000), ("1", 7, 500), ("0", 3, 0))
"""Ring, number of jobs, microseconds each."""
KILLED = 300
"""Jobs of a process that is killed while they are queued."""


def run(*words: str) -> int:
    return subprocess.run(words, check=False, capture_output=True).returncode


def samples(probes: Probes) -> list[dict[str, Any]]:
    return [
        {"name": name, "value": value, **labels}
        for name, labels, value in page(probes)
        if labels.get("server") == "test"
    ]


def page(probes: Probes) -> list[tuple[str, dict[str, str], float]]:
    text = render(probes.collector().metrics, probes.samples()).decode()
    return [
        (s.name, s.labels, s.value)
        for family in text_string_to_metric_families(text)
        for s in family.samples
    ]


def everywhere(probes: Probes, wanted: str, **labels: str) -> float:
    return sum(
        value
        for name, have, value in page(probes)
        if name == wanted and labels.items() <= have.items()
    )


def stalls(probes: Probes) -> dict[str, float]:
    """What the kernel counts of threads that had to make room themselves, and what we count."""
    rows = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    kernel = {name: int(number) for name, number in rows}
    return {
        "kernel: direct reclaim": sum(v for k, v in kernel.items() if k.startswith("allocstall_")),
        "kernel: reclaimed pages": kernel["pgsteal_direct"],
        "direct reclaim": everywhere(
            probes, "infertune_direct_reclaim_seconds_count", limit="machine"
        ),
        "reclaimed pages": everywhere(
            probes, "infertune_direct_reclaimed_bytes_total", limit="machine"
        )
        / mmap.PAGESIZE,
        "seconds": everywhere(probes, "infertune_direct_reclaim_seconds_sum", limit="machine"),
    }


def states(probes: Probes) -> dict[str, tuple[str, str]]:
    return {s.name: (s.state, s.why) for s in probes.states()}


def in_group(code: str) -> Any:
    """Run Python code in the group; its resource usage."""
    inside = f"open({str(GROUP / 'cgroup.procs')!r}, 'w').write('0')\n"
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-S", "-c", inside + code])
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage


def work(jobs: int, usec: int, ring: str) -> None:
    in_group(
        f"import os\nfd = os.open('/dev/mock_gpu', os.O_WRONLY)\n"
        f"os.write(fd, b'{jobs} {usec} {ring}')\n"
    )


def killed_at_work(jobs: int, usec: int, ring: str) -> None:
    """Submit more than the ring takes at once, and be killed: the scheduler drops the rest."""
    code = (
        f"open({str(GROUP / 'cgroup.procs')!r}, 'w').write('0')\n"
        "import os\nfd = os.open('/dev/mock_gpu', os.O_WRONLY)\n"
        "print('ready', flush=True)\n"
        f"os.write(fd, b'{jobs} {usec} {ring}')\n"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.kill()


def in_flight(found: list[dict[str, Any]]) -> float:
    return sum(s["value"] for s in found if s["name"] == "infertune_drm_scheduler_jobs_in_flight")


# More than there is without swap.
SHORT_OF_MEMORY = """
import mmap, os, re
[free] = re.findall(r"MemAvailable: +(\\d+) kB", open("/proc/meminfo").read())
block = os.urandom(64) * (1 << 15)
memory = mmap.mmap(-1, ((int(free) >> 11) + 64) << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for start in range(0, len(memory), len(block)):
    memory[start:start + len(block)] = block
"""
SWAP = Path("/sys/block/zram0")

seen: dict[str, Any] = {}
run("modprobe", "-r", "gpu_sched")
GROUP.mkdir()
inode = GROUP.stat().st_ino
probes = Probes(cgroups=lambda: {inode: "test"})
try:
    probes.attach()
    seen["before"] = states(probes)
    usage = in_group(
        "import mmap\n"
        "memory = mmap.mmap(-1, 5000 * 4096)\n"
        "memory.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "for page in range(5000): memory[page * 4096] = 1\n"
    )
    seen["faults"] = usage.ru_minflt
    seen["after faults"] = samples(probes)

    (GROUP / "memory.max").write_text(str(24 << 20))
    in_group(
        "import os\nfd = os.open('/root/large', os.O_RDWR | os.O_CREAT)\n"
        # Written back on the way: a group full of dirty pages may be out of memory.
        "for _ in range(16): os.write(fd, bytes(4 << 20)); os.fsync(fd)\n"
    )
    (GROUP / "memory.max").write_text("max")
    seen["after reclaim"] = samples(probes)

    run("modprobe", "zram")
    (SWAP / "disksize").write_text(str(1 << 30))
    assert run("mkswap", "/dev/zram0") == run("swapon", "/dev/zram0") == 0
    earlier = stalls(probes)
    in_group(SHORT_OF_MEMORY)
    seen["stalls"] = {name: now - earlier[name] for name, now in stalls(probes).items()}

    assert run("modprobe", "mock_gpusched") == 0
    began = time.monotonic()
    while states(probes)["drm_scheduler"][0] == "absent" and time.monotonic() < began + 30:
        probes.retry()
        time.sleep(0.2)
    seen["seconds"] = time.monotonic() - began
    seen["loaded"] = states(probes)
    for ring, jobs, usec in JOBS:
        work(jobs, usec, ring)
    time.sleep(0.5)
    seen["after jobs"] = samples(probes)

    killed_at_work(KILLED, 5000, "1")
    waited = time.monotonic() + 30
    while in_flight(samples(probes)) and time.monotonic() < waited:
        time.sleep(0.2)
    seen["after a kill"] = samples(probes)

    seen["rmmod mock"] = run("rmmod", "mock_gpusched")
    seen["rmmod scheduler"] = run("rmmod", "gpu_sched")
    samples(probes)
    assert run("modprobe", "mock_gpusched") == 0
    probes.retry()
    work(5, 100, "1")
    time.sleep(0.5)
    seen["after reload"] = samples(probes)
finally:
    probes.close()
    run("swapoff", "/dev/zram0")
    run("udevadm", "settle")
    run("rmmod", "zram")
    Path("/root/large").unlink(missing_ok=True)
    time.sleep(0.5)
    GROUP.rmdir()
    run("rmmod", "mock_gpusched")
    seen["rmmod at the end"] = run("rmmod", "gpu_sched")
print(json.dumps(seen))
