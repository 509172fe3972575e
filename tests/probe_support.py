# SPDX-License-Identifier: Apache-2.0
"""What the tests of the probes on this kernel share: a control group, and what is counted in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infertune.exporter import probes as module
from infertune.exporter.page import render
from infertune.exporter.probes import Probes

DECLARED, COMPILED = module.package_directories()

NEEDED = [
    pytest.mark.root_only,
    pytest.mark.skipif(
        not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel has no BTF"
    ),
    pytest.mark.skipif(
        not any(COMPILED.glob("*.bpf.o")), reason="the probes are not compiled (no clang here)"
    ),
]
"""Marks of every test that attaches probes."""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group where units have theirs: in a slice of the v2 hierarchy.  Empty and new."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [Path(m[1]) for m in mounts if m[2] == "cgroup2"]
    if not found:
        pytest.skip("no cgroup v2 hierarchy is mounted here")
    top = found[0] / f"infertune-test-{os.getpid()}.slice"
    path = top / "server"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no control group can be made in {found[0]}: {error.strerror}")
    yield path
    remove(top)


def remove(group: Path) -> None:
    """A control group with all in it, and what a test that failed has left there."""
    if not group.exists():
        return
    for child in [each for each in group.iterdir() if each.is_dir()]:
        remove(child)
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), 0)
    for _ in range(600):  # a process that has ended may still be in it for a moment
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    group.rmdir()


@pytest.fixture
def probes(cgroup: Path) -> Iterator[Probes]:
    """Attached, with the name ``test`` for our control group."""
    inode = cgroup.stat().st_ino
    found = Probes(cgroups=lambda: {inode: "test"})
    states = {each.name: each for each in found.attach()}
    for name in ("page_faults", "context_switches", "reclaim", "compaction"):
        assert states[name].state == "attached", states[name]
    yield found
    found.close()


def samples(probes: Probes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page of the probes, as Prometheus reads it."""
    page = render(probes.collector().metrics, probes.samples()).decode()
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }


def value(probes: Probes, name: str, **labels: str) -> float:
    """The sum of the samples with (at least) these labels."""
    wanted = set(labels.items())
    return sum(
        number for (n, have), number in samples(probes).items() if n == name and wanted <= have
    )


def start(cgroup: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run Python code in the control group."""
    inside = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')\n"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", inside + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def until_asleep(pid: int) -> None:
    """What it said it would do has been done: a reader of a pipe may run before its writer does.

    Counts of what is asleep stand still; those of one moment are the same in the next.
    """
    while (state := process_state(pid)) != "S":
        assert state != "Z", "it has ended"
        time.sleep(0.01)


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def finish(process: subprocess.Popen[str]) -> tuple[str, tuple[int, int]]:
    """What it printed, and its minor and major faults from first to last."""
    assert process.stdin
    assert process.stdout
    process.stdin.close()
    printed = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return printed, (usage.ru_minflt, usage.ru_majflt)
