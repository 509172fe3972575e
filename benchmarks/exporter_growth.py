#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How the exporter's time and memory grow with control groups and with CPUs.

    sudo .venv/bin/python benchmarks/exporter_growth.py [--repeat 15] [--output results/NAME.md]

Three tables.  Real control groups: the probes attached, a process has run in each group, and at
most 64 of them have a name, as in the exporter.  Made-up maps: what the probes' largest map would
hold on a machine with so many CPUs, through the code that decodes it and the page that shows it.
Since the collection before, every group has run on so many of them: all is the worst there can be.
Made-up files: all collectors on the recorded machine with fewer CPUs, and with its 32.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_up

from infertune.base.root import Root
from infertune.bpf.object import Object, _Map
from infertune.exporter.declarations import load
from infertune.exporter.page import Page, render
from infertune.exporter.probes import Probes, package_directories
from infertune.exporter.servers import MAX_SERVERS
from infertune.exporter.totals import Totals

DECLARED, COMPILED = package_directories()
Row = tuple[object, ...]


def milliseconds(work: Callable[[], object], repeat: int) -> str:
    """Median and quartiles of the CPU time of this thread."""
    took = []
    for _ in range(repeat):
        began = time.thread_time()
        work()
        took.append((time.thread_time() - began) * 1e3)
    low, middle, high = statistics.quantiles(took, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def kept(work: Callable[[], object]) -> str:
    """MiB that are allocated by Python after the work and were not before."""
    tracemalloc.start()
    work()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{size / 2**20:.1f} / {peak / 2**20:.1f}"


def series(text: bytes) -> int:
    return sum(not line.startswith(b"#") for line in text.splitlines())


def lost(text: bytes) -> int:
    found = [line for line in text.splitlines() if line.startswith(b"infertune_probe_lost_total")]
    return round(sum(float(line.split()[-1]) for line in found))


def real_groups(count: int, repeat: int) -> Row:
    probes = Probes(cgroups=lambda: names)
    names: dict[int, str] = {}
    try:
        probes.attach()
        with made_up.groups(count, busy=False) as groups:
            names.update(list(groups.items())[:MAX_SERVERS])
            metrics = probes.collector().metrics
            memory = kept(probes.samples)
            took = milliseconds(probes.samples, repeat)
            text = render(metrics, probes.samples())
        return count, min(count, MAX_SERVERS), series(text), took, memory, lost(text)
    finally:
        probes.close()


def made_up_map(count: int, cpus: int, ran_on: int, repeat: int) -> Row:
    """The map of context switches: two counters and a histogram by group and CPU."""
    [declaration] = [each for each in load(DECLARED) if each.name == "context_switches"]
    counted_here = [each for each in declaration.counted if each.map == "switches"]
    with Object(COMPILED / "context_switches.bpf.o") as program:
        key, value = program.layout("switches")
    numbers = value.size // 8
    totals = Totals(counted_here, key, value)
    names = {group: f"made-up-{group}" for group in range(MAX_SERVERS)}
    split: Any = SimpleNamespace(key_size=8, value_size=value.size, values=cpus)
    keys = b"".join(struct.pack("<Q", group) for group in range(count))
    counted = [[random.randrange(1000) for _ in range(numbers)] for _ in range(cpus)]

    def batch() -> list[tuple[bytes, bytes]]:
        for cpu in random.sample(range(cpus), ran_on):
            counted[cpu] = [number + 1 for number in counted[cpu]]
        whole = b"".join(struct.pack(f"<{numbers}Q", *numbers_there) for numbers_there in counted)
        found: list[tuple[bytes, bytes]] = []
        for first in range(0, count, 256):  # as many as one call of the kernel gives
            size = min(256, count - first)
            found += _Map._unpacked(split, keys[8 * first :], whole * size, size)
        return found

    def collect() -> bytes:
        totals.update(batch(), names)
        samples = [sample for each in counted_here for sample in totals.samples(each)]
        return render([each.metric for each in counted_here], samples)

    memory = kept(collect)
    return count, cpus, ran_on, series(collect()), milliseconds(collect, repeat), memory


def made_up_files(cpus: int, servers: int, repeat: int) -> Row:
    with tempfile.TemporaryDirectory() as tree:
        made_up.machine(Path(tree), servers)
        for policy in (Path(tree) / "sys/devices/system/cpu/cpufreq").glob("policy*"):
            if int(policy.name.removeprefix("policy")) >= cpus:
                shutil.rmtree(policy)
        pages = []

        def collect() -> bytes:
            pages.append(Page(Root(tree)))
            return pages[-1].text()

        memory = kept(collect)
        text = collect()
        wall = []
        for _ in range(repeat):
            page, began = Page(Root(tree)), time.process_time()
            page.text()
            wall.append((time.process_time() - began) * 1e3)
            page.close()
        for page in pages:
            page.close()
    low, middle, high = statistics.quantiles(wall, n=4)
    took = f"{middle:.1f} ({low:.1f} to {high:.1f})"
    return cpus, servers, series(text), took, memory


TABLES: tuple[tuple[str, str, Callable[..., Row], tuple[tuple[int, ...], ...]], ...] = (
    (
        "Real control groups",
        "groups | with a name | series | CPU, ms (quartiles) | MiB kept / at most | lost events",
        real_groups,
        ((10,), (100,), (1000,)),
    ),
    (
        "Made-up maps",
        "groups | CPUs | ran on | series | CPU, ms (quartiles) | MiB kept / at most",
        made_up_map,
        tuple(
            (groups, cpus, ran_on)
            for groups in (10, 100, 1000)
            for cpus, ran_on in ((2, 2), (32, 2), (32, 32))
        ),
    ),
    (
        "Made-up files",
        "CPUs | servers added | series | CPU, ms (quartiles) | MiB kept / at most",
        made_up_files,
        ((2, 0), (8, 0), (32, 0), (32, 10), (32, 62), (32, 100)),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the results there, as Markdown")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("exporter_growth: needs root")
    lines = []
    for title, head, measure, sizes in TABLES:
        lines += [f"## {title}", "", f"| {head} |", "|" + (head.count("|") + 1) * "---|"]
        for size in sizes:
            lines.append("| " + " | ".join(map(str, measure(*size, given.repeat))) + " |")
            print(lines[-1], flush=True)
        lines.append("")
    if given.output:
        given.output.write_text(
            f"# Growth of the exporter\n\n{made_up.environment()} Medians of {given.repeat}. Made "
            "by `benchmarks/exporter_growth.py`, which says what is measured; memory is what "
            "Python's allocator holds.\n\n" + "\n".join(lines)
        )


if __name__ == "__main__":
    main()
