# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: kill_at_random.py ROUNDS SEED FILE...

Kills ``infertune apply`` with SIGKILL, half of the times anywhere in its life and half of
them shortly after it has written its journal, recovers, and compares the files.  Prints JSON.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def infertune(*words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["infertune", *words], stdout=subprocess.DEVNULL)


def main(rounds: int, seed: int, paths: list[str]) -> None:
    chance = random.Random(seed)
    before = read(paths)
    began = time.monotonic()
    assert infertune("apply", PROFILES[0]).wait() == 0
    lasts = time.monotonic() - began
    assert infertune("revert").wait() == 0
    killed = interrupted = 0
    mixed: list[dict[str, object]] = []
    while killed < rounds:
        process = infertune("apply", chance.choice(PROFILES))
        if killed % 2:
            time.sleep(chance.uniform(0, lasts))
        else:
            while not JOURNAL.exists() and process.poll() is None:
                pass
            time.sleep(chance.uniform(0, lasts / 20))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        status = subprocess.run(["infertune", "status", "--json"], stdout=subprocess.PIPE)
        interrupted += json.loads(status.stdout)["state"] == "interrupted"
        code = infertune("recover").wait()
        after = read(paths)
        if code or after != before or JOURNAL.exists():
            wrong = {path: text for path, text in after.items() if text != before[path]}
            mixed.append({"round": killed, "code": code, "wrong": wrong})
    print(json.dumps({"killed": killed, "interrupted": interrupted, "mixed": mixed}))


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
