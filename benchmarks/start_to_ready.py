# SPDX-License-Identifier: Apache-2.0
"""From exec to READY: infertuned, an older version of it, and a real TuneD, by turns on one bus.

    sudo .venv/bin/python benchmarks/start_to_ready.py [--rounds N] [--before COMMIT]

Needs root and dbus-daemon; TuneD is left out where it is not installed.  Nothing of this system is
changed: a mount namespace and a bus of its own, as in switch_beside_tuned.py.  READY is what
infertuned says; of TuneD it is its name on the bus, as its unit has it.  CPU is that of all threads
until then.  What systemd does before exec (walls, filters) is not in it; daemon_beside_tuned.py has
that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from made_up import REPOSITORY, environment
from switch_beside_tuned import (
    ADDRESS,
    THEIRS,
    Took,
    call,
    cpu_ms,
    on_the_bus,
    rows,
    running,
    set_up,
)

LIMIT_S = 60
IMPORTS = """import os, sys
sys.modules["ssl"] = sys.modules["_hashlib"] = None  # as service/start.py has it
import infertune.service.daemon
os._exit(0)  # to take an interpreter down is not part of a start"""


def infertuned(python: str, daemon: Path, cache: Path, until: str = "main()") -> list[str | Path]:
    """The command of one version; ``until`` stands for as far as it goes."""
    script = (
        f"import sys; sys.path.insert(0, {str(daemon)!r}); sys.argv[1:] = []\n"
        f"sys.path.append({sysconfig.get_paths()['platlib']!r})\n"  # dbus-fast
        "try: from infertune.service.start import main\n"
        "except ImportError: from infertune.service.daemon import main\n"
        f"{until}"
    )
    return [python, "-I", "-X", f"pycache_prefix={cache}", "-c", script]


def until_ready(command: list[str | Path], scratch: Path) -> Took:
    """Start it, wait for READY=1 and stop it; what it took until then."""
    address = scratch / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        hears.bind(str(address))
        hears.settimeout(LIMIT_S)
        began = time.perf_counter()
        with started(command, NOTIFY_SOCKET=str(address)) as pid:
            while b"READY=1" not in hears.recv(4096):
                pass
            took = (time.perf_counter() - began) * 1e3, cpu_ms(pid)
    address.unlink()
    return took


def until_named(command: list[str | Path], name: str) -> Took:
    """The same for a daemon whose name on the bus says that it is ready."""
    rule = f"type='signal',member='NameOwnerChanged',arg0='{name}'"
    watch = ["dbus-monitor", "--address", ADDRESS, "--profile", rule]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout
        while "NameLost" not in monitor.stdout.readline():  # from now on it hears
            pass
        began = time.perf_counter()
        with started(command) as pid:
            while "NameOwnerChanged" not in monitor.stdout.readline():
                pass
            took = (time.perf_counter() - began) * 1e3, cpu_ms(pid)
        monitor.terminate()
    return took


@contextlib.contextmanager
def started(command: list[str | Path], **more: str) -> Iterator[int]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **more},
    )  # fmt: skip
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)


def measure(args: argparse.Namespace, scratch: Path, before: Path) -> list[str]:
    cache = scratch / "cache"
    versions = {"infertuned, now": REPOSITORY / "daemon", "infertuned, before": before / "daemon"}
    tuned: list[str | Path] = ["tuned", "-l", str(scratch / "tuned.log"), "-P", "/run/tuned.pid"]
    took: dict[str, list[Took]] = {}
    with running("dbus-daemon", "--config-file=/run/bus.conf", "--nofork",
                 until=Path("/run/bus").exists):  # fmt: skip
        if shutil.which("tuned"):
            with running(*tuned, until=lambda: on_the_bus(THEIRS[0])):
                call("tuned-adm", "profile", "calm")
        for number in range(args.rounds + 1):
            each = {"python -I -c pass": call(args.python, "-I", "-c", "pass")}
            if shutil.which("tuned"):
                each["TuneD"] = until_named(tuned, THEIRS[0])
            for name, daemon in versions.items():
                each[name] = until_ready(infertuned(args.python, daemon, cache), scratch)
            imports = infertuned(args.python, REPOSITORY / "daemon", cache, IMPORTS)
            each["its imports alone, now"] = call(*imports)
            if number:  # the first one compiles
                for name, one in each.items():
                    took.setdefault(name, []).append(one)
    return rows("From exec to READY", took, "TuneD" if "TuneD" in took else "infertuned, before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--before", default="v0.1.0", help="the commit it is compared with")
    parser.add_argument("--python", default="/usr/bin/python3", help="TuneD's, as a rule")
    args = parser.parse_args()
    if os.environ.get("INFERTUNE_BENCHMARK") is None:
        os.environ["INFERTUNE_BENCHMARK"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = ADDRESS
    git = ["git", "-C", str(REPOSITORY)]
    with tempfile.TemporaryDirectory() as directory:
        old = Path(directory) / "before"
        subprocess.run([*git, "worktree", "add", "--detach", old, args.before], check=True,
                       capture_output=True)  # fmt: skip
        try:
            set_up(Path(directory))
            lines = measure(args, Path(directory), old)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", old], check=True)
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, text=True,
                                capture_output=True).stdout.strip()  # fmt: skip
    about = (
        f"{commit} beside {args.before}. {environment()} Medians of {args.rounds} rounds, "
        "everything by turns. Made by `benchmarks/start_to_ready.py`."
    )
    text = "\n".join(["# From exec to READY, beside TuneD", "", about, *lines, ""])
    day = time.strftime("%Y-%m-%d", time.gmtime())
    (REPOSITORY / f"benchmarks/results/start-to-ready-{day}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
