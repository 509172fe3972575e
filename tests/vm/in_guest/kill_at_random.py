# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: kill_at_random.py ROUNDS SEED FILE...

Kills ``infertune apply`` with SIGKILL at random moments, every other time after its journal
is on disk, when values change.  Recovers, and compares the files.  Prints JSON.

The processes are forked: on an emulated processor nine tenths of a real command are the
start of Python, and a kill there shows nothing.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from infertune.cli.main import main as infertune

JOURNAL = Path("/run/infertune/journal")
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
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


def wait_for_journal(pid: int) -> None:
    """Until ``pid`` has written its journal, or has ended without one."""
    while not JOURNAL.exists() and os.waitid(os.P_PID, pid, ENDED) is None:
        pass


def rounds(count: int, seed: int, paths: list[str]) -> dict[str, object]:
    chance = random.Random(seed)
    before = read(paths)
    times = [time.monotonic()]
    pid = start("apply", PROFILES[0])
    wait_for_journal(pid)
    times.append(time.monotonic())
    assert wait(pid) == 0
    times.append(time.monotonic())
    assert wait(start("revert")) == 0
    killed = interrupted = 0
    mixed: list[dict[str, object]] = []
    while killed < count:
        pid = start("apply", chance.choice(PROFILES))
        if killed % 2:
            wait_for_journal(pid)
            time.sleep(chance.uniform(0, (times[2] - times[1]) / 2))
        else:
            time.sleep(chance.uniform(0, times[2] - times[0]))
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        interrupted += JOURNAL.exists() and '"settled":false' in JOURNAL.read_text()
        code = wait(start("recover"))
        after = read(paths)
        if code or after != before or JOURNAL.exists():
            wrong = {path: text for path, text in after.items() if text != before[path]}
            mixed.append({"round": killed, "code": code, "wrong": wrong})
    took = [round(b - a, 3) for a, b in itertools.pairwise(times)]
    return {"took_s": took, "killed": killed, "interrupted": interrupted, "mixed": mixed}


print(json.dumps(rounds(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
