# SPDX-License-Identifier: Apache-2.0
"""From the start of a server to its first token: cold, prewarmed, warm, and warm with prewarm.

    python benchmarks/prewarm_start.py --rounds 12 [--model FILE] [--load-mode none] [--json FILE]

Every round has all four in an order drawn by a seeded coin, so what the machine does beside it
falls on each of them alike, and what is compared lies within one round.  Without --model one of
random weights is written (1.2 GB) and removed afterwards.  Cold is this file dropped from the page
cache (posix_fadvise DONTNEED, nothing else); the disk, and a host below this machine, may still
have it in a cache of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import random_model

from infertune.base.root import Root
from infertune.catalogue.server_settings import server_arguments
from infertune.host.memory import meminfo
from infertune.launch.binary import embedded_program
from infertune.launch.client import healthy
from infertune.launch.embedded import help_text
from infertune.launch.prewarm import LINE, for_server
from infertune.launch.process import environment, start
from infertune.launch.ready import choose_port
from infertune.launch.residency import resident

ARMS = ("cold", "prewarm", "warm", "warm+prewarm")
ROOT = Root("/")


def make_cold(model: str) -> None:
    fd = os.open(model, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def make_warm(model: str) -> None:
    with open(model, "rb", buffering=0) as file:
        while file.read(2**22):
            pass


def busy_s() -> float:
    """CPU time that all programs of the machine had since boot (proc_stat(5))."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """That of what we started and waited for, and our own."""
    own = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in own)


def wait_for_quiet(patience_s: float) -> None:
    """Until others leave half of the machine idle for half a second, or patience ends."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(0.5)
        if busy_s() - before < 0.25 * (os.cpu_count() or 1):
            return


def first_token(url: str) -> None:
    """Of random weights the end may be the likeliest: it does not count."""
    asked = {"prompt": "x", "n_predict": 1, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()  # not always text: tokens are bytes here


def sample(arm: str, model: str, load_mode: str, threads: int, patience_s: float) -> dict[str, Any]:
    """One start, to its first token; the server is gone afterwards."""
    (make_warm if arm.startswith("warm") else make_cold)(model)
    before = resident([model])
    port = choose_port(None)
    program, own = embedded_program()
    settings = {"ctx_size": "256", "warmup": "0", "threads": str(threads), "load_mode": load_mode}
    arguments, _ = server_arguments(settings, help_text(), model=model, port=port)
    env = environment(own, os.environ)
    wanted = {"prewarm": "on" if "prewarm" in arm else "off", "load_mode": load_mode}
    ahead = for_server(ROOT, model, wanted, "cpu", print)
    wait_for_quiet(patience_s)
    load, busy, own = os.getloadavg()[0], busy_s(), own_s()
    began = time.monotonic()
    child = start(
        (*program, *arguments),
        env,
        lambda _: None,
        capture=True,
        program=program[0],
        before=ahead,
        keep=LINE,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while not healthy(url):
            if child.poll() is not None:
                sys.exit("\n".join(child.last_lines()))
            time.sleep(0.01)
        ready = time.monotonic() - began
        first_token(url)
        token = time.monotonic() - began
        said = [*child.tail.kept] if child.tail else []
    finally:
        child.stop()
    others = (busy_s() - busy) - (own_s() - own)
    return {
        "arm": arm,
        "others": round(others / (time.monotonic() - began) / (os.cpu_count() or 1), 2),
        "ready_s": round(ready, 3),
        "token_s": round(token, 3),
        "resident_before": before,
        "resident_after": resident([model]),
        "prewarm": said,
        "load": round(load, 2),
    }


def summary(samples: list[dict[str, Any]], size: int) -> str:
    """A table of medians, and the ratios within rounds."""
    rounds: dict[int, dict[str, dict[str, Any]]] = {}
    for each in samples:
        rounds.setdefault(each["round"], {})[each["arm"]] = each
    whole = [each for each in rounds.values() if len(each) == len(ARMS)]
    lines = ["| start | to /health, s | to the first token, s | file in memory before, after |"]
    lines += ["|---|---|---|---|"]
    for arm in ARMS:
        of = [each[arm] for each in whole]
        share = [
            f"{100 * statistics.median(each[key] for each in of) / size:.0f} %"
            for key in ("resident_before", "resident_after")
        ]
        times = [
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in ([each[key] for each in of] for key in ("ready_s", "token_s"))
        ]
        lines.append(f"| {arm} | {times[0]} | {times[1]} | {', '.join(share)} |")
    lines += ["", f"Ratios within each of the {len(whole)} rounds, to the first token:", ""]
    lines += ["| ratio | median | all, sorted |", "|---|---|---|"]
    for above, below in (
        ("prewarm", "cold"),
        ("warm", "cold"),
        ("prewarm", "warm"),
        ("warm+prewarm", "warm"),
    ):
        ratios = sorted(each[above]["token_s"] / each[below]["token_s"] for each in whole)
        shown = " ".join(f"{each:.2f}" for each in ratios)
        lines.append(f"| {above} / {below} | {statistics.median(ratios):.2f} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=20, help="58 MB each")
    parser.add_argument("--model")
    parser.add_argument("--load-mode", default="mmap", choices=("mmap", "none"))
    parser.add_argument(
        "--threads", type=int, default=1, help="two wait for each other where CPUs are shared"
    )
    parser.add_argument("--patience", type=float, default=20, help="s, for a quiet moment")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    coin = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        model = args.model or str(random_model.write(Path(directory) / "m.gguf", args.layers))
        size = os.stat(model).st_size
        samples = []
        for number in range(args.rounds):
            for arm in coin.sample(ARMS, len(ARMS)):
                found = {
                    "round": number,
                    **sample(arm, model, args.load_mode, args.threads, args.patience),
                }
                samples.append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
    loads = [each["load"] for each in samples]
    print(
        f"{size / 1e9:.2f} GB, load_mode {args.load_mode}, {os.cpu_count()} CPUs, "
        f"{meminfo(ROOT)['MemTotal'] / 1e9:.0f} GB, load {min(loads)} to {max(loads)}\n"
    )
    print(summary(samples, size))
    if args.json:
        Path(args.json).write_text("\n".join(map(json.dumps, samples)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
