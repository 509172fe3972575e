# SPDX-License-Identifier: Apache-2.0
"""Servers under infertuned, on stock kernels: what they are given, and what is left."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vm.guest import STATE, Guest
from vm.test_daemon import PYTHON, status, wait_until

pytestmark = pytest.mark.quick_on("6.12")

HERE = Path(__file__).parent
FAKE = HERE.parent / "fake_llama_server"
GROUP = "/sys/fs/cgroup/infertune.slice"
UNIT = "infertune-server@{}.service"
MIB = 2**20

PLACED = """
description = "every launch setting"
[now]
vm.swappiness = 7
[launch]
cpus = "1"
cpus_partition = "{partition}"
memory_min = "64MiB"
memory_swap_max = "32MiB"
memlock = "unlimited"
oom_score_adj = 300
nice = -5
cpu_weight = 250
scheduling_policy = "batch"
[launch.env]
GGML_TEST = "1"
"""


def fake(guest: Guest, *words: str) -> None:
    """Put a server without a model where the distribution's would be; it starts at once."""
    guest.put(FAKE, "/opt")
    text = f'#!/bin/sh\nexec /opt/fake_llama_server {" ".join(words)} -- "$@"\n'
    assert guest.write("/usr/local/bin/llama-server", text).code == 0
    guest.sh("chmod 755 /usr/local/bin/llama-server /opt/fake_llama_server")
    guest.write("/opt/model.gguf", b"GGUF" + bytes(60))


def profile(guest: Guest, name: str, text: str) -> None:
    guest.sh("mkdir -p /etc/infertune/profiles")
    assert guest.write(f"/etc/infertune/profiles/{name}.toml", text).code == 0


def pid_of(guest: Guest, name: str) -> int:
    return int(guest.sh(f"systemctl show -P MainPID '{UNIT.format(name)}'"))


def healthy(guest: Guest, port: int) -> bool:
    request = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=20)"
    return guest.run(f'python3 -c "{request}"').code == 0


@pytest.fixture
def serving(service: Guest) -> Iterator[Guest]:
    """The service, with a fake llama-server on PATH; afterwards without any server."""
    fake(service)
    yield service
    service.run("systemctl stop infertune.slice 'infertune-server@*'")
    # What a server was promised it keeps until `infertune stop`.
    service.sh("rm -rf /run/systemd/system/infertune* && systemctl daemon-reload")
    service.sh("rm -rf /usr/local/bin/llama-server /opt/* /etc/infertune/profiles "
               "/etc/infertune/servers.d")  # fmt: skip


# -- from nothing to nothing ---------------------------------------------------------


def serve_and_ask(guest: Guest) -> None:
    """The way of a new user, to the completion of a real model."""
    guest.sh("infertune setup && systemctl enable -q --now infertune")
    guest.sh("infertune apply long-context")
    served = guest.run("infertune serve long-context --json -- ctx_size=2048", timeout=900)
    assert served.code == 0, served
    url = json.loads(served.out)["url"]
    ask = (
        "import json, urllib.request as u; "
        "data = json.dumps({'prompt': 'The capital of France is', 'n_predict': 3}).encode(); "
        f"request = u.Request('{url}/completion', data, {{'Content-Type': 'application/json'}}); "
        "print(json.load(u.urlopen(request, timeout=600))['tokens_predicted'])"
    )
    assert guest.sh(f'python3 -c "{ask}"', timeout=600).strip() == "3"
    unit = UNIT.format("long-context")
    total = int(guest.sh("awk '/^MemTotal/ { print $2 * 1024 }' /proc/meminfo"))
    for group in (GROUP, f"{GROUP}/{unit}"):
        assert 0 <= total // 10 - int(guest.read(f"{group}/memory.min")) < 4096
    assert guest.read(f"{GROUP}/{unit}/memory.swap.max") == "0"
    pid = pid_of(guest, "long-context")
    assert guest.read(f"/proc/{pid}/oom_score_adj") == "-500"
    facts = guest.read(f"/proc/{pid}/status")
    assert "CapEff:\t0000000000000000" in facts
    assert "NoNewPrivs:\t1" in facts
    assert "Uid:\t0" not in facts


MOVING = ("/etc/ld.so.cache", "/proc/sys/fs/", "/proc/sys/kernel/random", "/proc/sys/kernel/ns_")
"""What changes by itself."""


def changes(before: dict[str, str], after: dict[str, str]) -> tuple[dict[str, object], list[str]]:
    """Files that differ, and new ones with our name."""
    changed: dict[str, object] = {
        path: (before[path], after[path])
        for path in before.keys() & after.keys()
        if before[path] != after[path] and not path.startswith(MOVING)
    }
    return changed, [path for path in after.keys() - before.keys() if "infertune" in path]


def test_from_a_wheel_to_an_answer_and_back_to_nothing(guest: Guest) -> None:
    guest.put(HERE / "in_guest", "/root")
    guest.sh("rm -rf /root/in_guest/__pycache__")

    def tree() -> dict[str, str]:
        found: dict[str, str] = json.loads(guest.sh("python3 /root/in_guest/tree.py", timeout=300))
        return found

    before = tree()
    try:
        serve_and_ask(guest)
    finally:
        guest.run("infertune revert; systemctl stop infertune; systemctl disable -q infertune")
        guest.sh("infertune setup --remove")
        guest.sh(f"rm -rf {STATE}")
    assert changes(before, tree()) == ({}, [])


# -- what a server is given ----------------------------------------------------------


@pytest.mark.quick_on  # test_guest.py has it without the daemon
def test_every_launch_setting_reaches_the_server(serving: Guest) -> None:
    profile(serving, "placed", PLACED.format(partition="member"))
    serving.infertune("serve placed --model /opt/model.gguf --name chat")
    pid, group = pid_of(serving, "chat"), f"{GROUP}/{UNIT.format('chat')}"
    found = {
        name: serving.read(f"{group}/{name}")
        for name in ("memory.min", "memory.swap.max", "cpuset.cpus.effective", "cpu.weight")
    }
    assert found == {
        "memory.min": str(64 * MIB),
        "memory.swap.max": str(32 * MIB),
        "cpuset.cpus.effective": "1",
        "cpu.weight": "250",
    }
    assert serving.read(f"{GROUP}/memory.min") == str(64 * MIB)
    limits = serving.read(f"/proc/{pid}/limits")
    assert "Max locked memory         unlimited            unlimited" in limits
    assert serving.read(f"/proc/{pid}/oom_score_adj") == "300"
    assert "Cpus_allowed_list:\t1\n" in serving.read(f"/proc/{pid}/status")
    fields = serving.read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    assert (fields[16], fields[38]) == ("-5", "3"), "nice, and SCHED_BATCH"
    assert "GGML_TEST=1" in serving.sh(f"tr '\\0' '\\n' </proc/{pid}/environ")
    assert serving.read("/proc/sys/vm/swappiness") == "7"
    # Another server: the slice is promised the sum, and the first keeps running.
    serving.infertune("serve placed --model /opt/model.gguf --name second")
    assert serving.read(f"{GROUP}/memory.min") == str(128 * MIB)
    serving.infertune("stop second")
    assert serving.read(f"{GROUP}/memory.min") == str(64 * MIB)
    assert pid_of(serving, "chat") == pid
    again = serving.infertune("serve placed --model /opt/model.gguf --name chat", codes=(2,))
    assert "active already" in again.err
    serving.infertune("stop chat")
    assert serving.run(f"ls -d {GROUP}").code != 0, "the slice goes with the last server"
    left = serving.sh("ls /run/systemd/system /run/infertune/servers.d")
    assert "infertune" not in left.replace("/run/infertune/servers.d:", "")


@pytest.mark.quick_on
@pytest.mark.parametrize("kind", ["root", "isolated"])
def test_cpus_for_the_server_alone(serving: Guest, kind: str) -> None:
    profile(serving, "placed", PLACED.format(partition=kind))
    serving.infertune("serve placed --model /opt/model.gguf --name chat")
    assert serving.read(f"{GROUP}/cpuset.cpus.partition") == kind
    assert serving.read("/sys/fs/cgroup/cpuset.cpus.effective") == "0"
    pid = pid_of(serving, "chat")
    assert "Cpus_allowed_list:\t1\n" in serving.read(f"/proc/{pid}/status")
    if kind == "isolated":
        assert serving.read("/sys/fs/cgroup/cpuset.cpus.isolated") == "1"
    serving.infertune("stop chat")
    assert serving.read("/sys/fs/cgroup/cpuset.cpus.effective") == "0-1"


@pytest.mark.quick_on
def test_a_model_in_a_home_directory(serving: Guest) -> None:
    directory = "/home/user/my models: 100%"
    serving.sh(f"install -d '{directory}' && cp /opt/model.gguf '{directory}/a.gguf'")
    serving.sh("echo secret >/home/user/secret && chmod 700 /home/user")
    serving.infertune(f"serve quiet --model '{directory}/a.gguf' --name chat")
    root = f"/proc/{pid_of(serving, 'chat')}/root/home/user"
    assert serving.sh(f"ls -A {root}").strip() == "my models: 100%"
    serving.infertune("stop chat")
    serving.sh(f"chmod 700 '{directory}'")
    done = serving.infertune(f"serve quiet --model '{directory}/a.gguf'", codes=(2,))
    assert "chmod o+x" in done.err
    serving.sh(f"chmod 600 '{directory}/a.gguf'")
    done = serving.infertune(f"serve quiet --model '{directory}/a.gguf'", codes=(2,))
    assert "chmod o+r" in done.err
    serving.sh(f"rm -r '{directory}' /home/user/secret; chmod 755 /home/user")


def test_the_printed_command_gives_the_same_server(serving: Guest) -> None:
    profile(serving, "placed", PLACED.format(partition="member"))
    line = serving.infertune("serve placed --model /opt/model.gguf --name chat --print").out
    serving.sh(line)
    try:
        unit = "infertune-server-chat.service"
        wait_until(lambda: serving.run(f"ls {GROUP}/{unit}/cpu.weight").code == 0)
        assert serving.read(f"{GROUP}/{unit}/memory.min") == str(64 * MIB)
        assert serving.read(f"{GROUP}/{unit}/cpu.weight") == "250"
        assert serving.sh(f"systemctl show -P DynamicUser {unit}").strip() == "yes"
        wait_until(lambda: healthy(serving, 8080))
    finally:
        serving.sh("systemctl stop infertune-server-chat.service")


@pytest.mark.quick_on
def test_declared_servers_start_with_the_daemon(serving: Guest) -> None:
    serving.sh("mkdir -p /etc/infertune/servers.d")
    serving.write("/etc/infertune/infertuned.toml", 'profile = "quiet"\n')
    text = 'port = 8090\nmodel = "/opt/model.gguf"\n'
    serving.write("/etc/infertune/servers.d/chat.toml", text)
    serving.write("/etc/infertune/servers.d/broken.toml", "port = 80\n")
    serving.sh("systemctl restart infertune.service")
    wait_until(lambda: healthy(serving, 8090))
    servers = json.loads(serving.infertune("servers --json").out)["servers"]
    found = {each["name"]: (each["state"], each["profile"], each["error"]) for each in servers}
    assert found["chat"] == ("active", "quiet", None)
    assert "1024 to 65535" in found["broken"][2]
    assert status(serving)["applied"]["profile"] == "quiet"  # type: ignore[index]
    # A restart of the daemon is nothing to a server.
    pid = pid_of(serving, "chat")
    serving.sh("systemctl restart infertune.service")
    assert pid_of(serving, "chat") == pid
    # By hand: everybody whom polkit lets, so not this one.
    assert serving.run("infertune stop chat", user="user").code == 4
    serving.infertune("stop chat")
    serving.infertune("start chat")
    assert healthy(serving, 8090)
    serving.infertune("stop chat")


@pytest.mark.quick_on
def test_a_server_that_cannot_start_says_so(serving: Guest) -> None:
    fake(serving, "--die 3")
    done = serving.infertune("serve quiet --model /opt/model.gguf --name chat", codes=(3,))
    assert "infertune logs chat" in done.err
    assert "last words of the server" in serving.infertune("logs chat").out
    serving.infertune("stop chat")


# -- kill -9 -------------------------------------------------------------------------


@pytest.mark.quick_on  # test_daemon.py has one kill
def test_killed_at_random_moments_the_daemon_leaves_no_mix(serving: Guest) -> None:
    kills = 25
    serving.sh("modprobe mock_cpufreq epp=1")
    try:
        serving.infertune("serve quiet --model /opt/model.gguf --name chat")
        serving.sh("mkdir -p /etc/infertune/servers.d")
        text = 'profile = "quiet"\nport = 8090\nmodel = "/opt/model.gguf"\n'
        serving.write("/etc/infertune/servers.d/other.toml", text)
        serving.infertune("revert")
        pid = pid_of(serving, "chat")
        serving.put(HERE / "in_guest", "/root")
        seed = random.randrange(2**32)
        paths = [path for path, text in serving.settings().items() if text is not None]
        words = f"{kills} {seed} 8080 {' '.join(paths)}"
        script = "/root/in_guest/kill_daemon.py"
        report = json.loads(serving.sh(f"{PYTHON} {script} {words}", timeout=1000))
        print(f"seed {seed}: {report}")
        assert report["mixed"] == []
        assert report["silent"] == 0
        assert pid_of(serving, "chat") == pid, "the server died with the daemon"
        assert len(report["seen"]) > 1, "all kills came too early or too late"
        servers = json.loads(serving.infertune("servers --json").out)["servers"]
        assert {"chat": "active"}.items() <= {s["name"]: s["state"] for s in servers}.items()
    finally:
        serving.run("infertune revert")
        serving.sh("systemctl stop infertune.slice 'infertune-server@*'; rmmod mock_cpufreq")


# -- memory that is protected --------------------------------------------------------

HELD = """
description = "memory of the server that is protected, or not"
[launch]
memory_min = "{minimum}"
"""


PAUSE_S = 4
ENOUGH = 60_000
"""Pages to swap: 234 MiB."""


class Lost(NamedTuple):
    """What a server lost of its memory, and had to wait for."""

    faults: int
    """Major faults; some are for memory of others: a library belongs to who read it first."""
    own: int
    """Pages of its own group that were taken away and read again."""


def lost_under_pressure(guest: Guest, minimum: str, *, slice_too: bool = True) -> Lost:
    """Of a server that keeps using 250 MiB, while others want more than there is."""
    profile(guest, "held", HELD.format(minimum=minimum))
    guest.sh("infertune serve held --model /opt/model.gguf --name held", timeout=300)
    if not slice_too:
        guest.sh("systemctl set-property --runtime infertune.slice MemoryMin=0")
    pid = pid_of(guest, "held")

    group = guest.read(f"/proc/{pid}/cgroup").strip().partition("::")[2]

    def lost() -> Lost:
        faults = guest.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[9]
        rows = (
            row.split() for row in guest.read(f"/sys/fs/cgroup{group}/memory.stat").splitlines()
        )
        own = {name: int(pages) for name, pages in rows if name.startswith("workingset_refault_")}
        assert set(own) == {"workingset_refault_anon", "workingset_refault_file"}
        return Lost(int(faults), sum(own.values()))

    swapped = "awk '/^pswpout/ { print $2 }' /proc/vmstat"
    begin, out = lost(), int(guest.sh(swapped))
    guest.sh(f"python3 /root/in_guest/hog.py 800 {ENOUGH} 120", timeout=300)
    time.sleep(2 * PAUSE_S)  # the server uses its memory once more
    now = lost()
    assert int(guest.sh(swapped)) - out >= ENOUGH, "there was no pressure"
    guest.infertune("stop held")
    guest.sh("systemctl revert infertune.slice")
    return Lost(now.faults - begin.faults, now.own - begin.own)


@pytest.mark.quick_on
def test_memory_min_holds_where_the_slice_grants_it(serving: Guest) -> None:
    if serving.kernel != "7.x":
        pytest.skip("memory pressure: the guest with little memory shows it")
    guest = serving
    # Between two requests a model is colder than the memory of whoever works meanwhile.
    fake(guest, f"--hold-mib 250 --hold-pause-s {PAUSE_S}")
    guest.put(HERE / "in_guest", "/root")
    guest.sh("modprobe zram && echo 1G >/sys/block/zram0/disksize && mkswap -q /dev/zram0")
    guest.sh("swapon /dev/zram0")
    try:
        unprotected = lost_under_pressure(guest, "0")
        alone = lost_under_pressure(guest, "300MiB", slice_too=False)
        protected = lost_under_pressure(guest, "300MiB")
        print(f"{unprotected} without, {alone} unit only, {protected} slice and unit")
        assert min(unprotected) > 1000
        assert min(alone) > 1000, "a unit got more than its slice was promised"
        assert protected.own == 0
        assert protected.faults < unprotected.faults / 1000
    finally:
        guest.run("systemctl stop infertune.slice 'infertune-server@*'")
        guest.sh("swapoff /dev/zram0 && udevadm settle && echo 1 >/sys/block/zram0/reset")
        guest.sh("rmmod zram")
