# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: kill_daemon.py ROUNDS SEED PORT FILE...

Kills infertuned with SIGKILL at random moments of applies, reverts and serves.  After each
restart the files must be those of the untuned machine or of one profile, whole, and the server
that was running before (on PORT) must have gone on.  Prints JSON.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from infertune.base.errors import InfertuneError
from infertune.service.client import call

PROFILES = ("long-context", "throughput", "low-latency", "quiet")


def read(paths: list[str]) -> dict[str, str]:
    # What the kernel computes from free memory moves by itself.
    return {path: Path(path).read_text() for path in paths if not path.endswith("_kbytes")}


def main_pid() -> int:
    command = ["systemctl", "show", "-P", "MainPID", "infertune.service"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def wait_for_daemon() -> None:
    end = time.monotonic() + 120
    while True:
        try:
            call("Status")
            return
        except InfertuneError:
            assert time.monotonic() < end, "the daemon did not come back"
            time.sleep(0.2)


def work(kind: str, profile: str) -> None:
    with contextlib.suppress(InfertuneError):  # killed meanwhile
        if kind == "serve":
            call("Serve", "s", ["other"])
        elif kind == "revert":
            call("Revert")
        else:
            call("Apply", "ssasu", [profile, "auto", [], 0])


def answers(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as reply:
        return reply.status == 200


def rounds(count: int, seed: int, port: int, paths: list[str]) -> dict[str, object]:
    chance = random.Random(seed)
    whole = [("original", read(paths))]
    took = {}
    for profile in PROFILES:
        begin = time.monotonic()
        work("apply", profile)
        took["apply"] = time.monotonic() - begin
        whole.append((profile, read(paths)))
        work("revert", "")
    begin = time.monotonic()
    work("serve", "")
    took["serve"] = time.monotonic() - begin
    call("Stop", "s", ["other"])
    call("Revert")
    took["revert"] = took["apply"]
    mixed: list[object] = []
    silent = 0
    seen: dict[str, int] = {}
    for number in range(count):
        kind = chance.choice(("apply", "apply", "apply", "serve", "revert"))
        profile = chance.choice(PROFILES)
        thread = threading.Thread(target=work, args=(kind, profile))
        pid = main_pid()
        thread.start()
        time.sleep(chance.uniform(0, took[kind]))
        os.kill(pid, signal.SIGKILL)
        thread.join()
        wait_for_daemon()
        now = read(paths)
        state = next((name for name, files in whole if files == now), None)
        seen[state or "mixed"] = seen.get(state or "mixed", 0) + 1
        if state is None:
            wrong = {p: t for p, t in now.items() if t != whole[0][1][p]}
            mixed.append({"round": number, "kind": kind, "profile": profile, "wrong": wrong})
        silent += not answers(port)
        with contextlib.suppress(InfertuneError):  # killed before there was one
            if kind == "serve":
                call("Stop", "s", ["other"])
    return {"killed": count, "seen": seen, "mixed": mixed, "silent": silent}


print(json.dumps(rounds(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
