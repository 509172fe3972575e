#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What two checkouts of infertune cost, measured in turns in one run.

    git worktree add /tmp/before COMMIT && (cd /tmp/before && python hatch_build.py)
    sudo .venv/bin/python benchmarks/paired.py /tmp/before [--repeat 15] [--output results/NAME.md]

Probes: a slice of some 20 ms with those of one checkout attached, between two without any; what is
reported is the difference to the mean of those two.  The bench runs alone on the last CPU with a
real-time priority.  Exporters: one of each checkout at a time, in turns; CPU time of the process.
Growth: the code of each checkout on the same made-up maps, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import made_up

HERE = Path(__file__).resolve().parents[1]
CPU = max(os.sched_getaffinity(0))
EVENTS = {
    "page fault": ("faults",),
    "context switch": ("switches",),
    "a thread's life": ("threads", "threads"),
    "a process's life": ("threads", "processes"),
}
HOLD = """
from infertune.exporter.probes import Probes
probes = Probes()
print(sum(state.state == "attached" for state in probes.attach()), flush=True)
input()
probes.close()
"""
WRITE = """
import statistics, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import made_up
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.page import render
from infertune.exporter.runner import collect
from infertune.base.root import Root
kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}

class Made:
    def __init__(self, families): self.families = families
    def collect(self): return self.families

def library(metrics, samples):
    made = {m.name: kinds[m.kind](m.name, m.help, labels=m.labels) for m in metrics}
    for sample in samples:
        made[sample.metric].add_metric(sample.labels, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Made([family for family in made.values() if family.samples]))
    return generate_latest(registry)

with tempfile.TemporaryDirectory() as tree:
    made_up.machine(Path(tree), 90)
    root = Root(tree)
    samples = [s for each in COLLECTORS.values() for s in collect(each, root).samples]
    metrics = [metric for each in COLLECTORS.values() for metric in each.metrics]
assert render(metrics, samples) == library(metrics, samples)
took = {render: [], library: []}
for _ in range(int(sys.argv[2])):
    for write, times in took.items():
        began = time.thread_time()
        write(metrics, samples)
        times.append((time.thread_time() - began) * 1e3)
print(len(samples), *(statistics.median(times) for times in took.values()))
"""
GROW = """
import random, sys
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import exporter_growth
random.seed(1)
row = exporter_growth.made_up_map(*map(int, sys.argv[2:]), 5)
print(row[3], row[4].split()[0])
"""
MAPS = ((100, 32, 2), (1000, 32, 2), (1000, 32, 32))


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{checkout}/daemon"}


@contextlib.contextmanager
def attached(checkout: Path) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-B", "-c", HOLD],
        env=environment(checkout),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert int(process.stdout.readline()) >= 4, checkout
        yield
        process.stdin.write("\n")
    time.sleep(0.05)  # the kernel takes programs away with a delay


def slice_of(bench: list[str]) -> float:
    command = ["taskset", "-c", str(CPU), "chrt", "-f", "10", *bench]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def quartiles(values: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def probes(checkouts: dict[str, Path], repeat: int, events: list[str]) -> list[str]:
    lines = ["| event | base, ns | " + " | ".join(f"{name}, added ns" for name in checkouts) + " |"]
    lines.append("|---" * (2 + len(checkouts)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in {program for program, *_ in EVENTS.values()}:
            compiler = shutil.which("cc") or shutil.which("clang") or "cc"
            source = HERE / "benchmarks" / f"{name}.c"
            command = [compiler, "-O2", "-pthread", "-o", f"{scratch}/{name}", str(source)]
            subprocess.run(command, check=True)
        for event in events:
            program, *words = EVENTS[event]
            bench = [f"{scratch}/{program}", *words]
            base: list[float] = []
            added: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(repeat):
                for name in random.sample(list(checkouts), len(checkouts)):
                    before = slice_of(bench)
                    with attached(checkouts[name]):
                        during = slice_of(bench)
                    base.append((before + slice_of(bench)) / 2)
                    added[name].append(during - base[-1])
            cells = [quartiles(values, "+.0f") for values in added.values()]
            lines.append(f"| {event} | {statistics.median(base):.0f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def scrape(port: int) -> bytes:
    """As Prometheus does it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body


def cpu_s(pid: int) -> float:
    """CPU time of a process with its threads, also those that ended (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


@contextlib.contextmanager
def exporter(checkout: Path, tree: Path, groups: dict[int, str]) -> Iterator[tuple[int, int]]:
    """One checkout's exporter, as its own benchmark starts it: process and port."""
    script = checkout / "benchmarks" / "exporter_cost.py"
    words = ["--exporter", str(tree), json.dumps(groups), "--with-probes"]
    with subprocess.Popen(
        [sys.executable, "-B", str(script), *words],
        env=environment(checkout),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        try:
            yield process.pid, json.loads(process.stdout.readline())[0]
        finally:
            process.kill()


def exporters(checkouts: dict[str, Path], repeat: int, sizes: list[int]) -> list[str]:
    names = list(checkouts)
    head = " | ".join(f"{name}: series | CPU of a scrape, ms" for name in names)
    lines = [f"| servers added | {head} | ratio |", "|---" * (2 + 2 * len(names)) + "|"]
    for servers in sizes:
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(made_up.llama())
            groups = stack.enter_context(made_up.groups(servers, busy=True))
            running: dict[str, tuple[int, int]] = {}
            for name, checkout in checkouts.items():
                tree = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                made_up.machine(tree, servers, port)
                running[name] = stack.enter_context(exporter(checkout, tree, groups))
            used: dict[str, list[float]] = {name: [] for name in names}
            series = {}
            for number in range(repeat + 3):
                for name in names:  # a page within a second would come from the snapshot
                    pid, at = running[name]
                    before = cpu_s(pid)
                    text = scrape(at)
                    time.sleep(0.6)
                    if number >= 3:
                        used[name].append((cpu_s(pid) - before) * 1e3)
                    series[name] = sum(not line.startswith(b"#") for line in text.splitlines())
        cells = " | ".join(f"{series[name]} | {quartiles(used[name], '.1f')}" for name in names)
        ratio = statistics.median(used[names[-1]]) / statistics.median(used[names[0]])
        lines.append(f"| {servers} | {cells} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def growth(checkouts: dict[str, Path], repeat: int) -> list[str]:
    names = list(checkouts)
    head = " | ".join(f"{name}: series | CPU, ms" for name in names)
    lines = [f"| groups | CPUs | ran on | {head} | ratio |", "|---" * (4 + 2 * len(names)) + "|"]
    for size in MAPS:
        took: dict[str, list[float]] = {name: [] for name in names}
        series = {}
        for _ in range(repeat):
            for name in random.sample(names, len(names)):
                checkout = checkouts[name]
                command = [sys.executable, "-B", "-c", GROW, str(checkout), *map(str, size)]
                said = subprocess.run(
                    command, env=environment(checkout), check=True, capture_output=True, text=True
                ).stdout.split()
                series[name] = said[0]
                took[name].append(float(said[1]))
        cells = " | ".join(f"{series[name]} | {quartiles(took[name], '.1f')}" for name in names)
        ratio = statistics.median(took[names[-1]]) / statistics.median(took[names[0]])
        lines.append(f"| {' | '.join(map(str, size))} | {cells} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def writers(repeat: int) -> list[str]:
    command = [sys.executable, "-B", "-c", WRITE, str(HERE), str(repeat)]
    done = subprocess.run(
        command, env=environment(HERE), check=True, capture_output=True, text=True
    )
    series, ours, library = map(float, done.stdout.split())
    lines = ["| series | ours, ms | prometheus_client, ms | ratio |", "|---|---|---|---|"]
    lines.append(f"| {series:.0f} | {ours:.1f} | {library:.1f} | {ours / library:.2f} |")
    print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path, help="a checkout whose probes are compiled")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS))
    parser.add_argument("--servers", type=int, nargs="+", default=[0, 13, 45])
    parser.add_argument("--output", type=Path, help="write the results there, as Markdown")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("paired: needs root")
    checkouts = {"before": given.before.resolve(), "now": HERE}
    parts = {
        "Probes": lambda: probes(checkouts, given.repeat, given.events),
        "A scrape": lambda: exporters(checkouts, given.repeat, given.servers),
        "Groups and CPUs": lambda: growth(checkouts, 3),
        "Who writes the page": lambda: writers(given.repeat),
    }
    lines: list[str] = []
    for title, measure in parts.items():
        lines += [f"## {title}", "", *measure(), ""]
    if given.output:
        commits = [
            subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"],
                cwd=checkout,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            for checkout in checkouts.values()
        ]
        given.output.write_text(
            f"# Before and now: {' and '.join(commits)}\n\n{made_up.environment()} "
            f"{given.repeat} pairs each, in turns; medians with quartiles. Made by "
            "`benchmarks/paired.py`, which says what is measured.\n\n" + "\n".join(lines)
        )


if __name__ == "__main__":
    main()
