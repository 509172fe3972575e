# SPDX-License-Identifier: Apache-2.0
"""Servers that do not all fit, under systemd: who is refused, who is told why, and until when."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import gguf_files
from infertune.base.records import replace
from known_models import KNOWN
from vm.guest import Guest
from vm.test_daemon import wait_until
from vm.test_serve import MIB, UNIT, fake, healthy, pid_of, profile

pytestmark = pytest.mark.quick_on("6.12")

ETC = "/etc/infertune/servers.d"
LOCK = "/run/infertune/admission.lock"
PROMISES = "/run/infertune-server/admission"
MODEL = "/opt/model.gguf"
PORTS = {"first": 8090, "second": 8091, "third": 8092}

FLOOR = 256 * MIB
"""What has to stay free of RAM: budget/budget.py."""
OTHER = 45 * MIB
"""What a server of MODEL needs beside its KV cache."""
TOKEN = 64 * 1024
REFUSED = re.compile(
    r"does not fit now: RAM: .* are promised to server '(\w+)' \(pid (\d+)\)"
    r"(?: and server '\w+' \(pid \d+\))?, which (?:is|are) loading"
)


# -- servers and sizes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """2 MiB of weights, and a KV cache of 64 KiB a token: the context says what it needs."""
    [llama] = (each for each in KNOWN if each.name == "Llama 3.1 8B")
    sizes = {"block_count": 16, "embedding_length": 32, "feed_forward_length": 32}
    heads = {"head_count": 1, "head_count_kv": 1, "key_length": 1024, "value_length": 1024}
    keys = {**llama.keys, **sizes, **{f"attention.{name}": size for name, size in heads.items()}}
    small = replace(llama, keys=keys, vocab=32, tied=True)
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return gguf_files.write(path, small.metadata(), small.tensors()).read_bytes()


@pytest.fixture
def crowded(service: Guest, model: bytes) -> Iterator[Guest]:
    """The service, and a server that takes no memory: what it was promised stays promised."""
    engine(service, model)
    yield service
    service.run("systemctl stop infertune.slice 'infertune-server@*'")
    service.run("systemctl reset-failed 'infertune-server@*'")
    service.sh("rm -rf /run/systemd/system/infertune* && systemctl daemon-reload")
    service.sh(
        f"rm -rf /usr/local/bin/llama-server /opt/* {ETC} /run/infertune/servers.d "
        "/etc/infertune/profiles"
    )


def engine(guest: Guest, model: bytes, *words: str) -> None:
    fake(guest, *words)
    assert guest.write(MODEL, model).code == 0


def room(guest: Guest) -> int:
    """Bytes that servers can have together."""
    available = guest.sh("awk '/^MemAvailable/ { print $2 * 1024 }' /proc/meminfo")
    return int(available) - FLOOR


def settings(need: float) -> dict[str, int | str]:
    """Of a server that needs so many bytes."""
    return {"ctx_size": int(need - OTHER) // TOKEN, "cache_ram": "0MiB"}


def toml(given: dict[str, int | str]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


def declare(guest: Guest, name: str, need: float, *, force: bool = False) -> None:
    lines = ['profile = "quiet"', f"port = {PORTS[name]}", f'model = "{MODEL}"', 'backend = "cpu"']
    lines += ["force = true"] if force else []
    guest.sh(f"mkdir -p {ETC}")
    guest.write(f"{ETC}/{name}.toml", "\n".join([*lines, "[settings]", toml(settings(need))]))


def servers(guest: Guest) -> dict[str, dict[str, Any]]:
    found = json.loads(guest.infertune("servers --json").out)["servers"]
    return {each["name"]: each for each in found}


def settled(guest: Guest) -> dict[str, str]:
    """State by server, once each of them is ready or refused."""

    def done() -> bool:
        states.update({name: each["state"] for name, each in servers(guest).items()})
        ready = [name for name, state in states.items() if state == "active"]
        return "activating" not in states.values() and all(
            healthy(guest, PORTS[name]) for name in ready
        )

    states: dict[str, str] = {}
    wait_until(done, 240)
    return states


def shown(guest: Guest, name: str, what: str) -> str:
    return guest.sh(f"systemctl show -P {what} '{UNIT.format(name)}'").strip()


def reservation(guest: Guest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(guest.read(f"{PROMISES}/{name}.json"))
    return found


# -- at boot -------------------------------------------------------------------------


def boot(guest: Guest) -> None:
    """A refused server leaves the system degraded: no error here, and no other unit may be."""
    try:
        guest.reboot()
    except AssertionError as error:
        units = set(re.findall(r"\S+\.service", str(error)))
        if not units or units - {UNIT.format(name) for name in PORTS}:
            raise


def test_two_of_three_start_at_boot_and_the_third_says_why(crowded: Guest, model: bytes) -> None:
    guest = crowded
    need = 0.38 * room(guest)
    # Loading takes a while, then the memory is really held.
    engine(guest, model, f"--load-seconds 20 --hold-mib {int(need) // MIB} --hold-pause-s 3600")
    for name in PORTS:
        declare(guest, name, need)
    boot(guest)
    assert sorted(settled(guest).values()) == ["active", "active", "failed"]
    found = servers(guest)
    [third] = (name for name, each in found.items() if each["state"] == "failed")
    others = {name: pid_of(guest, name) for name in found.keys() - {third}}
    # Everywhere one looks: the list, systemctl status, the log.
    journal = guest.infertune(f"logs {third}").out
    looks = (
        found[third]["error"],
        guest.run(f"systemctl status --no-pager -l '{UNIT.format(third)}'").out,
        journal,
    )
    for text in looks:
        told = REFUSED.findall(text)
        assert told, text
        name, pid = told[-1]  # the journal may have those of earlier boots
        assert others[name] == int(pid)
    assert "with ctx_size=" in journal, "what would fit"
    # Not again and again.
    assert shown(guest, third, "NRestarts") == "0"
    invocation = shown(guest, third, "InvocationID")
    time.sleep(12)  # RestartSec= is 5
    assert shown(guest, third, "InvocationID") == invocation
    # What is taken is not promised any more.
    done = guest.infertune(f"start {third}", codes=(3,))
    assert "does not fit now: RAM: " in done.err
    assert "other programs hold the rest" in done.err
    assert "promised" not in done.err
    # It has asked six times and more, and still is told why: the start limit is for restarts.
    for _ in range(5):
        done = guest.infertune(f"start {third}", codes=(3,))
        assert "does not fit now: RAM: " in done.err
    gone = next(iter(others))
    guest.infertune(f"stop {gone}")
    guest.infertune(f"start {third}")
    assert settled(guest)[third] == "active"


@pytest.mark.quick_on
def test_force_starts_it_and_says_what_it_overrides(crowded: Guest) -> None:
    need = 0.38 * room(crowded)
    for name in PORTS:
        declare(crowded, name, need, force=name == "third")
    for name in ("first", "second"):
        crowded.infertune(f"start {name}")
    crowded.infertune("start third")
    assert set(settled(crowded).values()) == {"active"}
    log = crowded.infertune("logs third").out
    assert re.search(rf"'force = true' overrides: {REFUSED.pattern}", log), log


# -- two at once ---------------------------------------------------------------------


@pytest.mark.timeout(3600)
def test_two_at_once_and_room_for_one(crowded: Guest, thorough: bool) -> None:
    """One runs, the other is told who has the room; which is free when the first is gone."""
    guest = crowded
    given = " ".join(f"{key}={value}" for key, value in settings(0.7 * room(guest)).items())
    command = f"infertune serve quiet --backend cpu --model {MODEL} --name {{}} -- {given}"
    at = []
    for number in range(10 if thorough else 3):
        with ThreadPoolExecutor() as pool:
            names = ("first", "second")
            answers = list(pool.map(lambda name: guest.run(command.format(name)), names))
        done = dict(zip(names, answers, strict=True))
        assert sorted(each.code for each in answers) in ([0, 2], [0, 3]), done
        [winner] = (name for name, each in done.items() if each.code == 0)
        [loser] = done.keys() - {winner}
        said = REFUSED.search(done[loser].err)
        assert said, done[loser].err
        assert (said[1], int(said[2])) == (winner, pid_of(guest, winner))
        at.append("before" if done[loser].code == 2 else "unit")
        # The room is free at once, also for a unit, which does not see all processes.
        if number % 2:
            guest.sh(f"kill -9 {pid_of(guest, winner)}")
        guest.infertune(f"stop {winner}")
        again = guest.run(command.format(loser))
        assert again.code == 0, again
        guest.infertune(f"stop {loser}")
    print(f"refused by: {at}")


def test_a_server_that_crashed_has_its_room_again(crowded: Guest) -> None:
    declare(crowded, "first", 0.7 * room(crowded))
    crowded.infertune("start first")
    pid = pid_of(crowded, "first")
    crowded.sh(f"kill -9 {pid}")
    wait_until(lambda: pid_of(crowded, "first") not in (0, pid))
    assert settled(crowded) == {"first": "active"}
    assert reservation(crowded, "first")["pid"] == pid_of(crowded, "first")
    assert shown(crowded, "first", "NRestarts") == "1"


@pytest.mark.quick_on
def test_what_root_runs_counts_for_units_until_it_is_gone(crowded: Guest, model: bytes) -> None:
    """A unit does not see root's processes: the daemon looks whether they have ended."""
    declare(crowded, "first", 0.7 * room(crowded))
    text = f'description = "much"\n[server]\nparallel = 1\n{toml(settings(0.7 * room(crowded)))}'
    profile(crowded, "large", text)
    engine(crowded, model, "--load-seconds 300")
    crowded.sh(
        f"nohup infertune run large --launch-only --backend cpu --model {MODEL} "
        "</dev/null >/root/run.log 2>&1 & echo $! >/root/run.pid"
    )
    wait_until(lambda: crowded.run("ls /run/infertune/admission/run-*.json").code == 0)
    engine(crowded, model)
    refused = crowded.infertune("start first", codes=(3,)).err
    pid = crowded.read("/root/run.pid")
    assert f"are promised to server 'run-{pid}' (pid {pid}), which is loading" in refused
    crowded.sh(f"kill -9 {pid}")
    crowded.infertune("start first")
    assert crowded.sh("ls /run/infertune/admission") == ""
    crowded.sh("rm /root/run.*")


# -- what the unit may see -----------------------------------------------------------


def test_the_launcher_waits_with_the_lock_and_the_server_has_it_not(crowded: Guest) -> None:
    guest = crowded
    need = 0.7 * room(guest)
    declare(guest, "first", need)
    holder = f"(flock 9 && exec sleep 1000) 9>>{LOCK} </dev/null >/dev/null 2>&1"
    guest.sh(f"umask 077; {holder} & echo $! >/root/holder")
    with ThreadPoolExecutor() as pool:
        started = pool.submit(guest.run, "infertune start first", timeout=300)
        wait_until(lambda: pid_of(guest, "first") != 0)
        pid = pid_of(guest, "first")
        wait_until(lambda: "CPU only" in guest.run(f"journalctl --boot _PID={pid}").out)
        time.sleep(3)
        assert "infertune.launcher" in guest.read(f"/proc/{pid}/cmdline")
        assert guest.sh(f"readlink /proc/{pid}/fd/0").strip() == LOCK
        promised = guest.run(f"cat {PROMISES}/first.json").out
        assert f'"pid": {pid},' not in promised, "judged before its turn"
        guest.sh("kill $(cat /root/holder); rm /root/holder")
        assert started.result().code == 0, started.result()
    assert pid_of(guest, "first") == pid
    assert "fake_llama_server" in guest.read(f"/proc/{pid}/cmdline")
    links = guest.sh(f"cd /proc/{pid}/fd && for each in *; do readlink $each; done").split()
    assert links[0] == "/dev/null"
    assert LOCK not in links
    assert "NOTIFY_SOCKET" not in guest.read(f"/proc/{pid}/environ")
    # In its sandbox it has judged as root does outside; and others may not read its promise.
    assert reservation(guest, "first")["pid"] == pid
    given = " ".join(f"{key}={value}" for key, value in settings(need).items())
    told = guest.infertune(f"fit --backend cpu --json {MODEL} -- parallel=1 {given}", codes=(0, 1))
    [ram] = (each for each in json.loads(told.out)["pools"] if each["name"] == "RAM")
    assert reservation(guest, "first")["host"] == ram["need"]
    assert ram["held"] > ram["need"], "root does not count what a unit was promised"
    for command in (f"cat {PROMISES}/first.json", f"ls {PROMISES}", f"cat {LOCK}"):
        done = guest.run(command, user="user")
        assert done.code != 0
        assert "Permission denied" in done.err


@pytest.mark.quick_on
def test_started_by_hand_before_the_daemon_there_is_no_turn_and_still_a_judge(
    crowded: Guest,
) -> None:
    for name in ("first", "second"):
        declare(crowded, name, 0.7 * room(crowded))
    crowded.sh("systemctl stop infertune.service && rm -rf /run/infertune")
    try:
        crowded.sh(f"systemctl start '{UNIT.format('first')}'")
        wait_until(lambda: healthy(crowded, PORTS["first"]))
        crowded.sh(f"systemctl start '{UNIT.format('second')}'")
        wait_until(lambda: shown(crowded, "second", "ActiveState") == "failed")
        assert REFUSED.search(shown(crowded, "second", "StatusText"))
        assert "Traceback" not in crowded.sh("journalctl --no-pager --boot --unit 'infertune-*'")
    finally:
        crowded.sh("systemctl start infertune.service")


@pytest.mark.quick_on
def test_the_exporter_reads_what_units_were_promised(crowded: Guest) -> None:
    declare(crowded, "first", 0.5 * room(crowded))
    crowded.infertune("start first")
    crowded.sh("systemctl start infertune-exporter.service")
    try:
        pid = crowded.sh("systemctl show -P MainPID infertune-exporter.service").strip()
        uid, gid = crowded.sh(f"stat -c '%u %g' /proc/{pid}").split()
        inside = (
            f"nsenter --target {pid} --mount setpriv --reuid {uid} --regid {gid} --clear-groups"
        )
        assert json.loads(crowded.sh(f"{inside} cat {PROMISES}/first.json"))["name"] == "first"
    finally:
        crowded.sh("systemctl stop infertune-exporter.socket infertune-exporter.service")
