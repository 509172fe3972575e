#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether 'infertune top' grows: an hour of looks, one each two seconds, without the waiting.

    .venv/bin/python benchmarks/top_growth.py [--looks 1800] [--exporter ADDRESS]

Two tables.  This machine: what is read of it, and the lines made of that.  Made-up readings: the
screen itself, driven without a terminal, each look drawn.  Memory is what the kernel has resident.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import runpy
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infertune.cli.base import Context
from infertune.cli.probes import ADDRESS
from infertune.cli.top import Eye
from infertune.views.app import Machine, Top
from infertune.views.board import board
from infertune.views.load import load

READINGS = Path(__file__).resolve().parents[1] / "tests" / "top_readings.py"
PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class Row:
    """Prints what the process holds, at the looks that matter."""

    def __init__(self, looks: int) -> None:
        self.at = {20, looks // 18, *range(looks // 6, looks + 1, looks // 6)}
        self.began = time.process_time()
        print("| looks | KiB resident | descriptors | threads | ms of CPU a look |")
        print("|---|---|---|---|---|")

    def __call__(self, looks: int) -> None:
        if looks not in self.at:
            return
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_KIB
        descriptors = len(os.listdir("/proc/self/fd")) - 1
        spent = (time.process_time() - self.began) / looks * 1000
        print(
            f"| {looks} | {resident} | {descriptors} | {threading.active_count()} | {spent:.1f} |",
            flush=True,
        )


def this_machine(looks: int, exporter: str) -> None:
    args = SimpleNamespace(root="/", exporter=exporter, every=2)
    eye, told = Eye(Context(None, args)), Row(looks)
    for number in range(1, looks + 1):
        board(eye.look(), 80, 22)
        told(number)


def screen(looks: int) -> None:
    reading = runpy.run_path(str(READINGS))["reading"]
    told, seen = Row(looks), [0, None, None]

    def look() -> Any:
        seen[0] += 1
        now = reading(seen[0])
        seen[1:] = [now, load(seen[1], now, seen[2])]
        told(seen[0])
        return seen[2]

    app = Top(Machine(look, list, lambda words: "", lambda: None), 0.0)

    async def run() -> None:
        async with app.run_test(size=(80, 24)):
            while seen[0] <= looks:
                await asyncio.sleep(0.1)

    asyncio.run(run())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looks", type=int, default=1800)
    parser.add_argument("--exporter", default=ADDRESS)
    args = parser.parse_args()
    print("This machine:\n")
    this_machine(args.looks, args.exporter)
    print("\nThe screen, 80 by 24:\n")
    screen(args.looks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
