# SPDX-License-Identifier: Apache-2.0
"""infertuned beside TuneD in one guest: the same six settings, by turns.

    .venv/bin/python benchmarks/daemon_beside_tuned.py [6.12|7.x]

Starts a Debian guest (tests/vm), prints a table, and writes it to benchmarks/results.  An
emulated processor is some ten times slower than a real one: the ratios count, not the
milliseconds.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from vm import lab  # noqa: E402
from vm.guest import Guest  # noqa: E402

ROUNDS = 7
IDLE_S = 60

OURS = """
description = "six settings"
[now]
transparent_hugepage.enabled = "madvise"
transparent_hugepage.defrag = "defer"
transparent_hugepage.khugepaged.scan_sleep_millisecs = 5000
vm.swappiness = 11
vm.compaction_proactiveness = 0
vm.watermark_scale_factor = 50
"""
THEIRS = """
[main]
summary=six settings
[vm]
transparent_hugepages=madvise
transparent_hugepage.defrag=defer
[sysfs]
/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs=5000
[sysctl]
vm.swappiness=11
vm.compaction_proactiveness=0
vm.watermark_scale_factor=50
"""
CALM = "[main]\nsummary=nothing\n"

# Runs in the guest: seconds of each call, over one connection, by turns.
CALLS = """
import asyncio, json, time
from dbus_fast import BusType, Message
from dbus_fast.aio import MessageBus
OURS = ("org.infertune.Infertune1", "/org/infertune/Infertune1", "org.infertune.Infertune1")
THEIRS = ("com.redhat.tuned", "/Tuned", "com.redhat.tuned.control")
async def main():
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    async def call(where, member, signature="", *body):
        begin = time.perf_counter()
        message = Message(*where, member, signature=signature, body=list(body))
        reply = await bus.call(message)
        assert reply.message_type.name == "METHOD_RETURN", reply.body
        return time.perf_counter() - begin
    took = {"infertuned": [], "TuneD": []}
    for _ in range(ROUNDS):
        await call(THEIRS, "switch_profile", "s", "calm")
        took["infertuned"].append(await call(OURS, "Apply", "ssasu", "six", "auto", [], 0))
        await call(OURS, "Revert")
        took["TuneD"].append(await call(THEIRS, "switch_profile", "s", "six"))
    await call(THEIRS, "switch_profile", "s", "calm")
    print(json.dumps(took))
asyncio.run(main())
"""

UNITS = {"infertuned": "infertune.service", "TuneD": "tuned.service"}


def show(guest: Guest, unit: str, name: str) -> str:
    return guest.sh(f"systemctl show -P {name} {unit}").strip()


def start_s(guest: Guest, unit: str) -> float:
    """From the start of the unit to its READY (TuneD: to its name on the bus)."""
    guest.sh(f"systemctl restart {unit}", timeout=300)
    begin, end = (
        int(show(guest, unit, f"{name}TimestampMonotonic"))
        for name in ("InactiveExit", "ActiveEnter")
    )
    return (end - begin) / 1e6


def wake_ups(guest: Guest, unit: str) -> int:
    """Voluntary context switches of all threads so far."""
    pid = show(guest, unit, "MainPID")
    text = guest.sh(f"grep -h ^voluntary /proc/{pid}/task/*/status")
    return sum(int(line.split()[1]) for line in text.splitlines())


def pss_mib(guest: Guest, unit: str) -> float:
    pid = show(guest, unit, "MainPID")
    return int(guest.sh(f"awk '/^Pss:/ {{ print $2 }}' /proc/{pid}/smaps_rollup")) / 1024


def measure(guest: Guest) -> dict[str, dict[str, list[float]]]:
    guest.sh("mkdir -p /etc/infertune/profiles /etc/tuned/profiles/six /etc/tuned/profiles/calm")
    guest.write("/etc/infertune/profiles/six.toml", OURS)
    for name, text in (("six", THEIRS), ("calm", CALM)):
        guest.write(f"/etc/tuned/profiles/{name}/tuned.conf", text)
    guest.infertune("setup")
    guest.sh("systemctl start tuned.service && tuned-adm profile calm", timeout=300)
    starts: dict[str, list[float]] = {name: [] for name in UNITS}
    for _ in range(ROUNDS):
        for name, unit in UNITS.items():
            starts[name].append(start_s(guest, unit))
    script = CALLS.replace("ROUNDS", str(ROUNDS)).encode()
    done = guest.run("/usr/lib/infertune/bin/python -", stdin=script, timeout=600)
    assert done.code == 0, done
    applies = json.loads(done.out)
    before = {name: wake_ups(guest, unit) for name, unit in UNITS.items()}
    guest.sh(f"sleep {IDLE_S}", timeout=IDLE_S + 60)
    idle = {name: [(wake_ups(guest, unit) - before[name]) / IDLE_S] for name, unit in UNITS.items()}
    return {
        "start to ready, s": starts,
        "apply six settings over D-Bus, s": applies,
        "wake-ups per second, idle": idle,
        "PSS, MiB": {name: [pss_mib(guest, unit)] for name, unit in UNITS.items()},
    }


def table(found: dict[str, dict[str, list[float]]], about: str) -> str:
    lines = [
        "# infertuned beside TuneD",
        "",
        about,
        "",
        "| | infertuned | TuneD |",
        "|---|---|---|",
    ]
    for what, by_name in found.items():
        cells = [_cell(by_name[name]) for name in UNITS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.3f} ({low:.3f} to {high:.3f}, n={len(values)})"


def main() -> None:
    kernel = sys.argv[1] if len(sys.argv) > 1 else "7.x"
    guest = Guest(lab.image(), kernel)
    try:
        guest.start()
        with tempfile.TemporaryDirectory() as scratch:
            guest.install(lab.wheel(Path(scratch)))
        found = measure(guest)
        release = guest.read("/proc/sys/kernel/osrelease")
        tuned = guest.sh("dpkg-query -W -f '${Version}' tuned")
        today = datetime.datetime.now(datetime.UTC).date()
    finally:
        guest.stop()
    about = (
        f"{today}, Debian guest with Linux {release} on an emulated processor, TuneD {tuned}; "
        "median (lowest to highest).  Both keep running; the calls alternate.  "
        "infertuned asks polkit, keeps a journal on disk before and after, and reads each value "
        "back; TuneD writes.  Made by `benchmarks/daemon_beside_tuned.py`."
    )
    text = table(found, about)
    name = f"daemon-beside-tuned-{kernel}-{today}.md"
    (REPOSITORY / "benchmarks/results" / name).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
