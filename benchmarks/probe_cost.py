#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the probes cost a page fault and a context switch, beside bpftrace and BCC.

    sudo .venv/bin/python benchmarks/probe_cost.py [--repeat 15] [--output results/NAME.json]

Paired: a slice of 20 to 50 ms with the probe, between two without; what is reported is the
difference to the mean of those two.  The machine's own drift is in both.  The bench runs alone
on the last CPU with a real-time priority.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from infertune.exporter.probes import Probes, package_directories

HERE = Path(__file__).resolve().parent
CPU = max(os.sched_getaffinity(0))
DECLARED, COMPILED = package_directories()

# The same jobs in bpftrace: faults by group; switches by group, and run-queue latency.
FAULTS_BPFTRACE = "software:page-faults:1 { @[cgroup] = count(); }"
SWITCHES_BPFTRACE = """
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new { @q[args->pid] = nsecs; }
tracepoint:sched:sched_switch {
    @n[cgroup, args->prev_state] = count();
    if (args->prev_state == 0) { @q[args->prev_pid] = nsecs; }
    if (@q[args->next_pid]) {
        @latency = hist((nsecs - @q[args->next_pid]) / 1000);
        delete(@q[args->next_pid]);
    }
}"""

# The same in BCC, in a process of the distribution's Python: it attaches and detaches on request.
FAULTS_BCC = """
BPF_PERCPU_HASH(faults, u64, u64, 4096);
RAW_TRACEPOINT_PROBE(page_fault_user) {
    u64 group = bpf_get_current_cgroup_id();
    faults.increment(group);
    return 0;
}"""
SWITCHES_BCC = """
#include <linux/sched.h>
BPF_HASH(queued, u32, u64, 65536);
BPF_HISTOGRAM(latency, int);
BPF_PERCPU_HASH(switches, u64, u64, 4096);
static int enqueue(struct task_struct *p) {
    u32 pid = 0; u64 now = bpf_ktime_get_ns();
    bpf_probe_read_kernel(&pid, sizeof(pid), &p->pid);
    if (pid) queued.update(&pid, &now);
    return 0;
}
RAW_TRACEPOINT_PROBE(sched_wakeup) { return enqueue((void *)ctx->args[0]); }
RAW_TRACEPOINT_PROBE(sched_wakeup_new) { return enqueue((void *)ctx->args[0]); }
RAW_TRACEPOINT_PROBE(sched_switch) {
    u64 group = bpf_get_current_cgroup_id();
    struct task_struct *next = (void *)ctx->args[2];
    u32 pid = 0; u64 *at;
    bpf_probe_read_kernel(&pid, sizeof(pid), &next->pid);
    switches.increment(group);
    if (ctx->args[0] || !ctx->args[3]) enqueue((void *)ctx->args[1]);
    at = queued.lookup(&pid);
    if (!at) return 0;
    latency.increment(bpf_log2l((bpf_ktime_get_ns() - *at) / 1000));
    queued.delete(&pid);
    return 0;
}"""
BCC = """
import re, sys
from bcc import BPF
text = sys.argv[1]
program = BPF(text=text)
names = re.findall(r"RAW_TRACEPOINT_PROBE\\((\\w+)\\)", text)
for name in names: program.detach_raw_tracepoint(name)
print("ready", flush=True)
for line in sys.stdin:
    for name in names:
        if line == "on\\n": program.attach_raw_tracepoint(name, "raw_tracepoint__" + name)
        else: program.detach_raw_tracepoint(name)
    print("done", flush=True)
"""
# debugfs and tracefs for tools that want them, in a mount namespace of their own.
MOUNTS = """
mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing
mountpoint -q /sys/kernel/debug/tracing || mount -t tracefs none /sys/kernel/debug/tracing
if [ -n "$HEADERS" ]; then
    build=$(readlink -f "$HEADERS/build") source=$(readlink -f "$HEADERS/source")
    mount -t tmpfs none /lib/modules && mkdir "/lib/modules/$(uname -r)"
    ln -s "$build" "/lib/modules/$(uname -r)/build"
    ln -s "$source" "/lib/modules/$(uname -r)/source"
fi
exec "$@"
"""
IN_NAMESPACE = ("unshare", "-m", "sh", "-c", MOUNTS, "sh")

Variant = Callable[[], AbstractContextManager[None]]


class Unavailable(Exception):
    """Why a variant cannot be measured here."""


@contextlib.contextmanager
def ours(*names: str) -> Iterator[None]:
    """These probes, or all, attached as the exporter does it."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in [*DECLARED.glob("*.toml"), *COMPILED.glob("*.bpf.o")]:
            if not names or path.name.partition(".")[0] in names:
                shutil.copy(path, scratch)
        probes = Probes(Path(scratch))
        states = probes.attach()
        # A machine without a GPU has no GPU scheduler; nothing else may be missing.
        assert {s.name for s in states if s.state != "attached"} <= {"drm_scheduler"}, states
        try:
            yield
        finally:
            probes.close()
    time.sleep(0.02)  # the kernel takes programs away with a delay


@contextlib.contextmanager
def bpftrace(script: str) -> Iterator[None]:
    if shutil.which("bpftrace") is None:
        raise Unavailable("bpftrace is not installed")
    whole = 'BEGIN { printf("ready\\n"); } ' + script
    with subprocess.Popen(
        [*IN_NAMESPACE, "bpftrace", "-e", whole],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if line == "ready\n":
                break
        else:
            raise Unavailable(f"bpftrace: {' '.join(said).strip()[-300:]}")
        time.sleep(0.1)
        try:
            yield
        finally:
            process.kill()
    time.sleep(0.2)


class Refused(contextlib.AbstractContextManager[None]):
    """Stands for a variant that cannot be measured."""

    def __init__(self, why: Exception) -> None:
        self._why = why

    def __enter__(self) -> None:
        raise self._why

    def __exit__(self, *_: object) -> None:
        pass


class Bcc:
    """A BCC program, compiled once."""

    def __init__(self, text: str, headers: str) -> None:
        self._process = subprocess.Popen(
            [*IN_NAMESPACE, "/usr/bin/python3", "-c", BCC, text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "HEADERS": headers},
            text=True,
        )
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            _, errors = self._process.communicate()
            raise Unavailable(f"BCC: {' '.join(errors.split())[-200:]}")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        self._say("on")
        try:
            yield
        finally:
            self._say("off")

    def _say(self, word: str) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
        time.sleep(0.02)

    def close(self) -> None:
        self._process.communicate()


def slice_of(bench: Path) -> float:
    """One slice of a bench; nanoseconds an event."""
    command = ["taskset", "-c", str(CPU), "chrt", "-f", "10", str(bench)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(bench: Path, variants: dict[str, Variant], repeat: int) -> dict[str, Any]:
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    why: dict[str, str] = {}
    for _ in range(repeat):
        for name in random.sample(sorted(variants), len(variants)):
            if name in why:
                continue
            try:
                before = slice_of(bench)
                with variants[name]():
                    during = slice_of(bench)
                pairs[name].append(((before + slice_of(bench)) / 2, during))
            except Unavailable as reason:
                why[name] = str(reason)
    found: dict[str, Any] = {}
    for name, measured in pairs.items():
        if name in why:
            found[name] = {"not measured": why[name]}
            continue
        added = sorted(during - base for base, during in measured)
        first, middle, third = statistics.quantiles(added, n=4)
        found[name] = {
            "base_ns": round(statistics.median(base for base, _ in measured), 1),
            "added_ns": round(middle, 1),
            "added_ns_quartiles": [round(first, 1), round(third, 1)],
            "ratio": round(statistics.median(during / base for base, during in measured), 3),
        }
    return found


def compiled(name: str, directory: Path) -> Path:
    target = directory / name
    compiler = shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        sys.exit("probe_cost: no C compiler here; install gcc or clang")
    subprocess.run([compiler, "-O2", "-o", target, HERE / f"{name}.c"], check=True)
    return target


def processor() -> str:
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def table(results: dict[str, Any]) -> str:
    lines = []
    for event in ("page fault", "context switch"):
        lines += [f"| {event} | base ns | added ns (quartiles) | ratio |", "|---|---|---|---|"]
        for name, row in results[event].items():
            if "not measured" in row:
                lines.append(f"| {name} | not measured: {row['not measured']} | | |")
                continue
            low, high = row["added_ns_quartiles"]
            lines.append(
                f"| {name} | {row['base_ns']:.0f} | {row['added_ns']:+.0f} ({low:+.0f} to "
                f"{high:+.0f}) | {row['ratio']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the results there, as JSON and Markdown")
    parser.add_argument(
        "--bcc-headers",
        default="",
        metavar="DIR",
        help="below /lib/modules: headers of another kernel, where this one has none",
    )
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("probe_cost: needs root")
    closing = contextlib.ExitStack()

    def bcc(text: str) -> Variant:
        try:
            program = Bcc(text, given.bcc_headers)
        except Unavailable as reason:
            refused = Refused(reason)
            return lambda: refused
        closing.callback(program.close)
        return program.attached

    with tempfile.TemporaryDirectory() as scratch, closing:
        faults, switches = compiled("faults", Path(scratch)), compiled("switches", Path(scratch))
        results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "kernel": platform.release(),
            "processor": processor(),
            "cpus": os.cpu_count(),
            "repeat": given.repeat,
            "bcc_headers": given.bcc_headers or platform.release(),
            "page fault": measure(
                faults,
                {
                    "nothing": contextlib.nullcontext,
                    "page_faults": lambda: ours("page_faults"),
                    "all probes": ours,
                    "bpftrace": lambda: bpftrace(FAULTS_BPFTRACE),
                    "BCC": bcc(FAULTS_BCC),
                },
                given.repeat,
            ),
            "context switch": measure(
                switches,
                {
                    "nothing": contextlib.nullcontext,
                    "context_switches": lambda: ours("context_switches"),
                    "all probes": ours,
                    "bpftrace": lambda: bpftrace(SWITCHES_BPFTRACE),
                    "BCC": bcc(SWITCHES_BCC),
                },
                given.repeat,
            ),
        }
    print(table(results))
    if given.output:
        head = (
            f"Linux {results['kernel']}, {results['processor']}, {results['cpus']} CPUs, "
            f"{results['date']}, {given.repeat} pairs each. "
            f"Made by `benchmarks/probe_cost.py`.\n\n"
        )
        given.output.write_text(json.dumps(results, indent=2) + "\n")
        given.output.with_suffix(".md").write_text(
            f"# Cost of the probes\n\n{head}{table(results)}"
        )


if __name__ == "__main__":
    main()
