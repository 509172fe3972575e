# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest, in the place of infertuned: the daemon, whose memory is counted.

At SIGUSR1 it writes what is alive after a garbage collection, in KiB.
"""

import gc
import runpy
import signal
import tracemalloc
from pathlib import Path

ALIVE = Path("/run/infertune/alive")


def count(*_: object) -> None:
    gc.collect()
    kib = tracemalloc.get_traced_memory()[0] // 1024
    new = ALIVE.with_suffix(".new")
    new.write_text(f"{kib}\n")
    new.rename(ALIVE)


tracemalloc.start()
signal.signal(signal.SIGUSR1, count)
runpy.run_module("infertune.service.daemon", run_name="__main__")
