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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path, help="a checkout whose probes are compiled")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS))
    parser.add_argument("--output", type=Path, help="write the results there, as Markdown")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("paired: needs root")
    checkouts = {"before": given.before.resolve(), "now": HERE}
    lines = ["## Probes", "", *probes(checkouts, given.repeat, given.events), ""]
    if given.output:
        given.output.write_text("\n".join([made_up.environment(), "", *lines]))


if __name__ == "__main__":
    main()
