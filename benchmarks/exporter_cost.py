#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the exporter itself costs: memory, time to attach, and time and CPU of a scrape.

    sudo .venv/bin/python benchmarks/exporter_cost.py [--scrapes 30] [--output results/NAME.md]

For each size twice: without the probes, and with them.  The exporter is a process of its
own, made of the exporter's parts as infertune.exporter.main puts them together; what is not real
is said in benchmarks/made_up.py.  Scraped over HTTP a little less often than once a second, so
that no page comes from the snapshot of the one before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import made_up

INTERVAL_S = 1.05


def exporter(tree: str, groups: str, attach: bool) -> None:
    """The process that is measured."""
    from infertune.base.root import Root
    from infertune.exporter import capabilities, web, webconfig
    from infertune.exporter.page import Page
    from infertune.exporter.probes import Probes

    root = Root(tree)
    root.live = True  # so that servers are asked for their metrics; an exporter writes nothing
    names = {int(key): name for key, name in json.loads(groups).items()}
    probes = Probes(cgroups=lambda: names)
    began = time.perf_counter()
    states = probes.attach() if attach else ()
    attached_s = time.perf_counter() - began
    capabilities.drop_all()
    listener = web.listening_socket("127.0.0.1:0")
    page = Page(root, *[probes.collector()] * attach)
    server = web.Server(listener, webconfig.WebConfig(), page, probes if attach else None)
    attached = sum(state.state == "attached" for state in states)
    print(json.dumps([listener.getsockname()[1], attached_s, attached]), flush=True)
    server.serve_forever(poll_interval=3600)


def scrape(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read()
    connection.close()
    return text


def pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise ValueError("no Pss")


def cpu_s(pid: int) -> float:
    """CPU time of a process with its threads, also those that ended (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def measure(servers: int, probes: bool, scrapes: int) -> dict[str, Any]:
    with (
        made_up.llama() as port,
        made_up.groups(servers, busy=True) as groups,
        tempfile.TemporaryDirectory() as tree,
    ):
        made_up.machine(Path(tree), servers, port)
        command = [sys.executable, __file__, "--exporter", tree, json.dumps(groups)]
        with subprocess.Popen(
            [*command, "--with-probes"] if probes else command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout
            own, attach_s, attached = json.loads(process.stdout.readline())
            for _ in range(3):
                text = scrape(own)
                time.sleep(INTERVAL_S)
            early, took, used = pss_kib(process.pid), [], []
            for _ in range(scrapes):
                cpu, began = cpu_s(process.pid), time.perf_counter()
                text = scrape(own)
                took.append(time.perf_counter() - began)
                time.sleep(INTERVAL_S)
                used.append(cpu_s(process.pid) - cpu)
            late = pss_kib(process.pid)
            process.kill()
    return {
        "servers": servers,
        "probes": attached,
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "bytes": len(text),
        "attach_s": attach_s,
        "took_s": took,
        "cpu_s": used,
        "pss_kib": (early, late),
    }


def row(found: dict[str, Any]) -> str:
    def ms(values: list[float]) -> str:
        low, middle, high = statistics.quantiles(values, n=4)
        return f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})"

    attach = f"{found['attach_s'] * 1e3:.0f}" if found["probes"] else "-"
    mean = statistics.mean(found["cpu_s"])
    early, late = found["pss_kib"]
    return (
        f"| {found['servers']} | {found['probes']} | {found['series']} | {found['bytes'] // 1024} "
        f"| {attach} | {ms(found['took_s'])} | {ms(found['cpu_s'])} "
        f"| {100 * mean / INTERVAL_S:.1f} | {early / 1024:.1f} / {late / 1024:.1f} |"
    )


HEAD = (
    "| servers added | probes | series | page, KiB | attach, ms | scrape, ms (quartiles) "
    "| CPU of a scrape, ms (quartiles) | % of one CPU | PSS, MiB: after 3 scrapes / at the end |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--servers", type=int, nargs="+", default=[0, 13, 45])
    parser.add_argument("--scrapes", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the results there, as Markdown")
    parser.add_argument("--exporter", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--with-probes", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.exporter:
        exporter(*given.exporter, given.with_probes)
        return
    if os.geteuid() != 0:
        sys.exit("exporter_cost: needs root")
    lines = [HEAD, "|" + HEAD.count(" |") * "---|"]
    for servers in given.servers:
        for probes in (False, True):
            lines.append(row(measure(servers, probes, given.scrapes)))
            print(lines[-1], flush=True)
    if given.output:
        given.output.write_text(
            f"# Cost of the exporter\n\n{made_up.environment()} {given.scrapes} scrapes each, "
            f"{INTERVAL_S} s between two, after three that do not count. Made by "
            "`benchmarks/exporter_cost.py`; what is real and what is not: "
            "`benchmarks/made_up.py`.\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
