# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: kill_at_random.py ROUNDS SEED FILE...

Kills ``infertune apply`` with SIGKILL at random moments, recovers, and compares the files.
Prints JSON.  The processes are forked: on an emulated processor nine tenths of a real
command are the start of Python, and a kill there shows nothing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from infertune.cli.main import main as infertune

JOURNAL = Path("/run/infertune/journal")
PROFILES = ("long-context", "throughput", "low-latency", "big-moe")


def read(paths: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for path in paths:
        try:
            found[path] = Path(path).read_text()
        except OSError:
            found[path] = None
    return found


def start(*words: str) -> int:
    """Process id of an infertune that runs beside us."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(infertune(words))
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rounds(count: int, seed: int, paths: list[str]) -> dict[str, object]:
    chance = random.Random(seed)
    before = read(paths)
    began = time.monotonic()
    assert wait(start("apply", PROFILES[0])) == 0
    lasts = time.monotonic() - began
    assert wait(start("revert")) == 0
    killed = interrupted = 0
    mixed: list[dict[str, object]] = []
    while killed < count:
        pid = start("apply", chance.choice(PROFILES))
        time.sleep(chance.uniform(0, lasts))
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        interrupted += JOURNAL.exists() and '"settled":false' in JOURNAL.read_text()
        code = wait(start("recover"))
        after = read(paths)
        if code or after != before or JOURNAL.exists():
            wrong = {path: text for path, text in after.items() if text != before[path]}
            mixed.append({"round": killed, "code": code, "wrong": wrong})
    return {"killed": killed, "interrupted": interrupted, "mixed": mixed}


print(json.dumps(rounds(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
