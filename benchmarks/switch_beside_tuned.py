# SPDX-License-Identifier: Apache-2.0
"""A profile switch as people do it, beside a real TuneD, and the verbs beside an older version.

    sudo .venv/bin/python benchmarks/switch_beside_tuned.py [--rounds N] [--before COMMIT]
                                                            [--processes N]

Needs root, dbus-daemon and TuneD (Debian: tuned); no guest, and nothing of this system is changed:
it runs in a mount namespace of its own, with a bus of its own, and the six kernel files are copies.
Prints a table and writes it to benchmarks/results.  Everything alternates within one run: the
ratios count, not the milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from made_up import REPOSITORY, environment

VALUES = {
    "/proc/sys/vm/swappiness": (60, 11),
    "/proc/sys/vm/compaction_proactiveness": (20, 10),
    "/proc/sys/vm/watermark_scale_factor": (10, 50),
    "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan": (4096, 1024),
    "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs": (10000, 50000),
    "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs": (60000, 90000),
}
"""What is found and what is set; of the same length, since a copy is not cut off as sysfs does."""

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/>
    <allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""
ADDRESS = "unix:path=/run/bus"

OURS = ("org.infertune.Infertune1", "/org/infertune/Infertune1", "org.infertune.Infertune1")
THEIRS = ("com.redhat.tuned", "/Tuned", "com.redhat.tuned.control")

Took = tuple[float, float]
"""Milliseconds on the clock, and of the processor (of the daemon too, where there is one)."""


# -- surroundings ---------------------------------------------------------------------------------


def set_up(scratch: Path) -> None:
    """A /run, an /etc/tuned and six kernel files that are nobody else's."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    tuned = scratch / "tuned"
    subprocess.run(["cp", "-a", "/etc/tuned", tuned], check=True)
    subprocess.run(["mount", "--bind", tuned, "/etc/tuned"], check=True)
    profile = ["description = 'six settings'", "[now]"]
    theirs: dict[str, list[tuple[str, str]]] = {"calm": [], "six": []}
    for number, (path, values) in enumerate(VALUES.items()):
        copy = Path("/run") / f"copy-{number}"
        copy.write_text(f"{values[0]}\n")
        subprocess.run(["mount", "--bind", copy, path], check=True)
        section = "transparent_hugepage." if "hugepage" in path else ""
        name = path.removeprefix("/proc/sys/").removeprefix("/sys/kernel/mm/transparent_hugepage/")
        profile.append(f"{section}{name.replace('/', '.')} = {values[1]}")
        for which, value in zip(theirs, values, strict=True):
            if section:
                theirs[which].append(("sysfs", f"{path}={value}"))
            else:
                theirs[which].append(("sysctl", f"{name.replace('/', '.')}={value}"))
    ours = Path("/run/infertune/profiles")
    ours.mkdir(parents=True)
    (ours / "six.toml").write_text("\n".join(profile) + "\n")
    for which, lines in theirs.items():
        place = tuned / which
        place.mkdir()
        (place / "tuned.conf").write_text(_tuned_profile(lines))
    Path("/run/bus.conf").write_text(CONFIG)
    Path("/run/tuned").mkdir()


def _tuned_profile(settings: list[tuple[str, str]]) -> str:
    lines = ["[main]", "summary=x"]
    for section in ("sysctl", "sysfs"):
        lines += [f"[{section}]", *(setting for where, setting in settings if where == section)]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def running(*command: str | Path, until: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            if until() or process.poll() is not None:
                break
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def holds(values: int) -> bool:
    """Whether the six files hold the values before (0) or after (1)."""
    return all(Path(path).read_text().strip() == str(v[values]) for path, v in VALUES.items())


def on_the_bus(name: str) -> bool:
    done = subprocess.run(
        [
            *("dbus-send", f"--bus={ADDRESS}", "--print-reply", "--dest=org.freedesktop.DBus"),
            *("/", "org.freedesktop.DBus.NameHasOwner", f"string:{name}"),
        ],
        capture_output=True,
        check=False,
    )
    return b"true" in done.stdout


# -- measuring ------------------------------------------------------------------------------------


def cpu_ms(pid: int) -> float:
    """What a process and all its threads, also those that ended, have used so far."""
    return time.clock_gettime(~pid << 3 | 2) * 1e3  # CPUCLOCK_SCHED of another process


def call(*command: str | Path, daemon: int | None = None) -> Took:
    """Run a command that must succeed."""
    before = cpu_ms(daemon) if daemon else 0.0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = (time.perf_counter() - begin) * 1e3
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    after = cpu_ms(daemon) if daemon else 0.0
    return wall, (used.ru_utime + used.ru_stime) * 1e3 + after - before


def version(python: str, daemon: Path, cache: Path) -> list[str | Path]:
    """The command of one version of infertune; the package has the same in its script."""
    script = (
        f"import sys; sys.path.insert(0, {str(daemon)!r}); sys.argv[0] = 'infertune'\n"
        "from infertune.cli.main import main\nsys.exit(main())"
    )
    return [python, "-I", "-X", f"pycache_prefix={cache}", "-c", script]


def infertuned(python: str, cache: Path) -> list[str | Path]:
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'daemon')!r}); sys.argv[1:] = []\n"
        f"sys.path.append({sysconfig.get_paths()['platlib']!r})\n"  # dbus-fast
        "from infertune.service.start import main\nsys.exit(main())"
    )
    return [python, "-I", "-X", f"pycache_prefix={cache}", "-c", script]


def switches(
    rounds: int, tool: list[str | Path], tuned: int, ours: int | None
) -> dict[str, list[Took]]:
    """``tuned-adm profile`` and ``infertune apply``, by turns."""
    took: dict[str, list[Took]] = {"tuned-adm profile": [], "infertune apply": []}
    for _ in range(rounds + 1):
        took["tuned-adm profile"].append(call("tuned-adm", "profile", "six", daemon=tuned))
        assert holds(1)
        call("tuned-adm", "profile", "calm")
        assert holds(0)
        took["infertune apply"].append(call(*tool, "apply", "six", daemon=ours))
        assert holds(1)
        call(*tool, "revert")
        assert holds(0)
    return {name: each[1:] for name, each in took.items()}


async def calls(rounds: int, pids: dict[str, int]) -> dict[str, list[Took]]:
    """The same over one connection that is there already: what the daemons themselves take."""
    from dbus_fast import BusType, Message
    from dbus_fast.aio import MessageBus

    bus = await MessageBus(bus_address=ADDRESS, bus_type=BusType.SYSTEM).connect()

    async def ask(where: tuple[str, str, str], member: str, kind: str = "", *body: object) -> Took:
        pid = pids["TuneD" if where is THEIRS else "infertuned"]
        before, begin = cpu_ms(pid), time.perf_counter()
        reply = await bus.call(Message(*where, member, signature=kind, body=list(body)))
        wall = (time.perf_counter() - begin) * 1e3
        assert reply is not None
        assert reply.message_type.name == "METHOD_RETURN", reply.body
        await asyncio.sleep(0.05)  # what it does after its answer is its work too
        return wall, cpu_ms(pid) - before

    took: dict[str, list[Took]] = {name: [] for name in ("switch_profile", "Apply", "Status")}
    for _ in range(rounds + 1):
        took["switch_profile"].append(await ask(THEIRS, "switch_profile", "s", "six"))
        await ask(THEIRS, "switch_profile", "s", "calm")
        took["Apply"].append(await ask(OURS, "Apply", "ssasu", "six", "auto", [], 0))
        took["Status"].append(await ask(OURS, "Status"))
        await ask(OURS, "Revert")
    bus.disconnect()
    return {name: each[1:] for name, each in took.items()}


def wake_ups(pid: int) -> int:
    """Voluntary context switches of all threads so far."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("voluntary")]
    return sum(int(line.split()[1]) for line in lines)


def pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def verbs(
    rounds: int, python: str, now: list[str | Path], before: list[str | Path]
) -> dict[str, list[Took]]:
    """Verbs that need no daemon, of both versions, and of Python alone."""
    bare = [python, "-I", "-c", "pass"]
    took: dict[str, list[Took]] = {"python -I -c pass": []}
    for number in range(rounds + 1):
        each = {"python -I -c pass": call(*bare)}
        for words in ("--version", "plan long-context", "status", "doctor"):
            for name, tool in (("now", now), ("before", before)):
                each[f"{words}, {name}"] = call("sh", "-c", '"$@" || [ $? -le 1 ]', "sh", *tool,
                                                *words.split())  # fmt: skip
        if number:
            for name, one in each.items():
                took.setdefault(name, []).append(one)
    return took


@contextlib.contextmanager
def processes(count: int) -> Iterator[None]:
    """So many more processes that sleep."""
    parent = os.fork()
    if parent == 0:
        os.setpgid(0, 0)
        for _ in range(count - 1):
            if os.fork() == 0:
                break
        signal.pause()
        os._exit(0)
    try:
        while len([name for name in os.listdir("/proc") if name.isdecimal()]) < count:
            time.sleep(0.2)
        yield
    finally:
        os.killpg(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        while len([name for name in os.listdir("/proc") if name.isdecimal()]) > count:
            time.sleep(0.2)


# -- telling --------------------------------------------------------------------------------


def median(took: list[Took]) -> Took:
    return statistics.median(one[0] for one in took), statistics.median(one[1] for one in took)


def rows(title: str, took: dict[str, list[Took]], base: str | None) -> list[str]:
    """One table: medians, and ratios to one of its rows."""
    of = median(took[base]) if base else None
    lines = [
        "",
        f"## {title}",
        "",
        "| | wall ms | CPU ms | wall x | CPU x |",
        "|---|---|---|---|---|",
    ]
    for name, each in took.items():
        wall, cpu = median(each)
        ratios = f"{wall / of[0]:.3f} | {cpu / of[1]:.3f}" if of else " | "
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {ratios} |")
    return lines


def beside(took: dict[str, list[Took]]) -> list[str]:
    """Now over before, for each verb."""
    lines = ["", "| | wall x before | CPU x before |", "|---|---|---|"]
    for name in took:
        if name.endswith(", now"):
            old, new = median(took[name.replace(", now", ", before")]), median(took[name])
            lines.append(f"| {name[:-5]} | {new[0] / old[0]:.2f} | {new[1] / old[1]:.2f} |")
    return lines


def measure(args: argparse.Namespace, scratch: Path) -> list[str]:
    cache = scratch / "cache"
    now = version(args.python, REPOSITORY / "daemon", cache)
    old = scratch / "before"
    git = ["git", "-C", str(REPOSITORY)]
    subprocess.run([*git, "worktree", "add", "--detach", "-f", old, args.before], check=True,
                   capture_output=True)  # fmt: skip
    lines: list[str] = []
    try:
        then = version(args.python, old / "daemon", cache)
        plain = verbs(args.rounds, args.python, now, then)
        lines += rows(f"Verbs without a daemon, beside {args.before}", plain, "python -I -c pass")
        lines += beside(plain)
        if args.processes:
            with processes(args.processes):
                many = verbs(args.rounds, args.python, now, then)
            lines += ["", f"With {args.processes} processes more, over without:", ""]
            lines += ["| | wall x | CPU x |", "|---|---|---|"]
            for name, each in many.items():
                (wall, cpu), (wall0, cpu0) = median(each), median(plain[name])
                lines.append(f"| {name} | {wall / wall0:.2f} | {cpu / cpu0:.2f} |")
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", old], check=True)
    bus = running("dbus-daemon", "--config-file=/run/bus.conf", "--nofork",
                  until=Path("/run/bus").exists)  # fmt: skip
    tuned = ("tuned", "-l", str(scratch / "tuned.log"), "-P", "/run/tuned/tuned.pid")
    with bus, running(*tuned, until=lambda: on_the_bus(THEIRS[0])) as theirs:
        call("tuned-adm", "profile", "calm")
        # Once before: a daemon that compiles its modules keeps 4 MiB of that, and a package or pip
        # has compiled them, as TuneD's are.
        with running(*infertuned(args.python, cache), until=lambda: on_the_bus(OURS[0])):
            pass
        with running(*infertuned(args.python, cache), until=lambda: on_the_bus(OURS[0])) as ours:
            time.sleep(3)  # a profile that was just written is not kept
            pids = {"TuneD": theirs.pid, "infertuned": ours.pid}
            found = switches(args.rounds, now, theirs.pid, ours.pid)
            lines += rows("Six settings through the daemon", found, "tuned-adm profile")
            asked = asyncio.run(calls(args.rounds, pids))
            lines += rows("The call alone", asked, "switch_profile")
            memory = {name: pss_mib(pid) for name, pid in pids.items()}
            woken = {name: wake_ups(pid) for name, pid in pids.items()}
            time.sleep(args.idle)
            woken = {name: wake_ups(pid) - woken[name] for name, pid in pids.items()}
            lines += ["", "| | PSS MiB | wake-ups per second, idle |", "|---|---|---|"]
            lines += [
                f"| {name} | {memory[name]:.1f} | {woken[name] / args.idle:.2f} |" for name in pids
            ]
        found = switches(args.rounds, now, theirs.pid, None)
        lines += rows("Six settings without infertuned", found, "tuned-adm profile")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--idle", type=int, default=30)
    parser.add_argument("--before", default="v0.1.0", help="what the verbs are compared with")
    parser.add_argument(
        "--python",
        default="/usr/bin/python3",
        help="runs the verbs; TuneD's own, so that nothing but the programs differs",
    )
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("INFERTUNE_BENCHMARK") is None:
        os.environ["INFERTUNE_BENCHMARK"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = ADDRESS
    with tempfile.TemporaryDirectory() as directory:
        set_up(Path(directory))
        lines = measure(args, Path(directory))
    tuned = subprocess.run(["tuned", "--version"], capture_output=True, text=True, check=True)
    about = (
        f"{environment()} {tuned.stdout.strip()}; medians of {args.rounds} rounds, everything by "
        "turns; the CPU of a call is that of client and daemon together.  infertuned asks who "
        "calls, keeps a journal before and after, and reads each value back; TuneD writes.  The "
        "kernel files are copies.  Made by `benchmarks/switch_beside_tuned.py`."
    )
    text = "\n".join(["# A profile switch beside TuneD, and verbs beside an older version", "",
                      about, *lines, ""])  # fmt: skip
    day = time.strftime("%Y-%m-%d", time.gmtime())
    (REPOSITORY / f"benchmarks/results/switch-beside-tuned-{day}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
