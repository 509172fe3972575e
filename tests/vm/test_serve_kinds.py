# SPDX-License-Identifier: Apache-2.0
"""Servers of every kind under infertuned on stock kernels: for other machines, by the name of a
model, of another engine, a router; and a profile that is in force while one of them works."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from vm.guest import Done, Guest
from vm.test_daemon import PYTHON, show, wait_until
from vm.test_serve import FAKE, GROUP, MIB, UNIT, fake, healthy, pid_of, profile, serving

__all__ = ["serving"]
pytestmark = pytest.mark.quick_on("6.12")

HELD = """
description = "what each kind is to be given"
[launch]
memory_min = "64MiB"
cpu_weight = 250
"""
HERE, FRIEND, STRANGER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
KEY = "k" * 32

ASK = """
import http.client, json, sys
host, port, source, key = sys.argv[1:]
body = json.dumps({"prompt": "x", "n_predict": 2})
peer = http.client.HTTPConnection(host, int(port), timeout=20, source_address=(source, 0))
try:
    peer.request("POST", "/completion", body, {"Authorization": f"Bearer {key}"} if key else {})
    print(peer.getresponse().status)
except OSError as error:
    print(type(error).__name__)
"""
"""Asks for two tokens from an address of ours; prints the status, or what went wrong."""


@pytest.fixture
def neighbours(serving: Guest) -> Iterator[Guest]:
    """The guest with three addresses; the filter sees which of them a client comes from."""
    serving.write("/opt/ask.py", ASK)
    for each in (HERE, FRIEND, STRANGER):
        serving.sh(f"ip address add {each}/32 dev lo")
    yield serving
    for each in (HERE, FRIEND, STRANGER):
        serving.sh(f"ip address delete {each}/32 dev lo")
    serving.sh("rm -rf /etc/infertune/keys")


def ask(guest: Guest, source: str, key: str = "") -> str:
    """From an address of the guest's."""
    return guest.sh(f"python3 /opt/ask.py {HERE} 8090 {source} '{key}'").strip()


def test_a_server_for_other_machines(neighbours: Guest) -> None:
    guest = neighbours
    guest.sh("install -m 700 -d /etc/infertune/keys; mkdir -p /etc/infertune/servers.d")
    guest.write("/etc/infertune/keys/chat", f"{KEY}\n")
    declared = (
        f'profile = "quiet"\nmodel = "/opt/model.gguf"\nport = 8090\nhost = "{HERE}"\n'
        f'clients = ["{FRIEND}"]\n'
    )
    path = "/etc/infertune/servers.d/chat.toml"
    guest.write(path, declared)
    refused = guest.infertune("start chat", codes=(2,))
    assert "api_key_file" in refused.err, "another address than loopback, and no key"
    guest.write(path, f'{declared}api_key_file = "/etc/infertune/keys/chat"\n')
    guest.sh("chmod 644 /etc/infertune/keys/chat")
    refused = guest.infertune("start chat", codes=(2, 3))
    assert "others than root may read it" in refused.err
    guest.sh("chmod 600 /etc/infertune/keys/chat")
    guest.infertune("start chat")
    assert ask(guest, FRIEND, KEY) == "200"
    assert ask(guest, FRIEND) == "401"
    assert ask(guest, FRIEND, "x" * 32) == "401"
    assert ask(guest, STRANGER, KEY) == "TimeoutError", "the filter lets nobody else in"
    pid = pid_of(guest, "chat")
    facts = guest.sh(f"cat /proc/{pid}/cmdline /proc/{pid}/environ | tr '\\0' '\\n'")
    assert KEY not in facts
    assert guest.run("cat /run/credentials/*/api-key", user="user").code != 0
    guest.infertune("stop chat")


def test_a_model_by_its_name(serving: Guest) -> None:
    serving.sh("mkdir -p /srv/models/owner")
    try:
        for name in ("small-Q4_K_M", "other-Q8_0"):
            serving.write(f"/srv/models/owner/{name}.gguf", b"GGUF" + bytes(60))
        found = json.loads(serving.infertune("models --json").out)["models"]
        assert {"small-Q4_K_M", "other-Q8_0"} <= {each["name"] for each in found}
        serving.infertune("serve quiet --model small-Q4_K_M --name chat")
        words = serving.sh(f"tr '\\0' ' ' </proc/{pid_of(serving, 'chat')}/cmdline")
        assert "--model /srv/models/owner/small-Q4_K_M.gguf" in words
        none = serving.infertune("serve quiet --model smal-Q4_K_M --name second", codes=(2,))
        assert "smal-Q4_K_M" in none.err
    finally:
        serving.sh("rm -r /srv/models/owner")


def held(guest: Guest, name: str) -> dict[str, str]:
    """What the kernel says that the unit of a server was given."""
    group = f"{GROUP}/{UNIT.format(name)}"
    files = ("memory.min", "cpu.weight")
    return {each: guest.read(f"{group}/{each}") for each in files}


GIVEN = {"memory.min": str(64 * MIB), "cpu.weight": "250"}


def test_a_server_of_another_engine(serving: Guest) -> None:
    profile(serving, "held", HELD)
    engine = f"{FAKE.name} -- --host 127.0.0.1 --port 8095"
    serving.infertune(f"serve held --name other --port 8095 --engine llama-server -- /opt/{engine}")
    assert held(serving, "other") == GIVEN
    assert "CapEff:\t0000000000000000" in serving.read(f"/proc/{pid_of(serving, 'other')}/status")
    servers = json.loads(serving.infertune("servers --json").out)["servers"]
    assert {"other": "active"}.items() <= {s["name"]: s["state"] for s in servers}.items()
    serving.infertune("stop other")
    assert serving.run(f"ls -d {GROUP}").code != 0


def test_a_router(serving: Guest) -> None:
    """As it is declared, placed and shown; what a scrape does to a real one is in tests/real."""
    profile(serving, "held", HELD)
    serving.sh("mkdir -p /srv/models/router && cp /opt/model.gguf /srv/models/router/a.gguf")
    settings = "models_dir=/srv/models/router models_max=2 sleep_idle_seconds=60"
    try:
        serving.infertune(f"serve held --name models --port 8096 -- {settings}")
        words = serving.sh(f"tr '\\0' ' ' </proc/{pid_of(serving, 'models')}/cmdline")
        assert "--models-dir /srv/models/router" in words
        assert "--models-max 2" in words
        assert "--model " not in words
        assert held(serving, "models") == GIVEN
        serving.infertune("stop models")
    finally:
        serving.sh("rm -r /srv/models/router")


# -- while it works -------------------------------------------------------------------

DEMAND = """
description = "for as long as a server works"
[now]
vm.swappiness = 7
"""
WORK = """
import http.client, json, sys, threading, time
def value():
    return open("/proc/sys/vm/swappiness").read().strip()
def ask():
    peer = http.client.HTTPConnection("127.0.0.1", 8097, timeout=300)
    peer.request("POST", "/completion", json.dumps({"prompt": "x", "n_predict": 2}))
    peer.getresponse().read()
before, begin = value(), time.monotonic()
asking = threading.Thread(target=ask)
asking.start()
while value() == before and time.monotonic() - begin < 60:
    time.sleep(0.05)
applied = time.monotonic() - begin
asking.join()
end = time.monotonic()
while value() != before and time.monotonic() - end < 120:
    time.sleep(0.05)
print(json.dumps({"before": before, "applied_s": applied, "back_s": time.monotonic() - end}))
"""
"""One long answer: after how long the value was there, and after how long it was gone again."""
IDLE_S = 10
SLACK_S = 3.0
"""A look every two seconds, and what an emulated processor needs to apply."""


def switches(guest: Guest) -> int:
    text = guest.read(f"/proc/{show(guest, 'MainPID')}/status")
    return int(next(x for x in text.splitlines() if x.startswith("voluntary_ctxt")).split()[1])


def asleep(guest: Guest) -> Done:
    return guest.run("sleep 20")


def test_a_profile_is_in_force_while_a_server_works(serving: Guest) -> None:
    guest = serving
    fake(guest, "--work-s 8")
    profile(guest, "demand", DEMAND)
    profile(guest, "plain", 'description = "nothing now"\n[launch]\nnice = 0\n')
    guest.write("/opt/work.py", WORK)
    before = guest.settings()
    guest.infertune(f"apply demand --while-serving --idle {IDLE_S}s")
    assert guest.settings() == before
    asleep(guest)  # what `apply` left to do
    first = switches(guest)
    asleep(guest)
    assert switches(guest) - first <= 2, "it wakes up though no server is up"
    guest.infertune("serve plain --model /opt/model.gguf --name chat --port 8097")
    wait_until(lambda: healthy(guest, 8097))
    wait_until(lambda: guest.settings() == before, 60)
    seen = json.loads(guest.sh(f"{PYTHON} /opt/work.py", timeout=400))
    print(f"in force {seen['applied_s']:.1f} s after the request, "
          f"back {seen['back_s']:.1f} s after the answer")  # fmt: skip
    assert seen["applied_s"] <= SLACK_S
    assert IDLE_S - SLACK_S <= seen["back_s"] <= IDLE_S + 2 * SLACK_S
    assert guest.settings() == before
    guest.infertune("stop chat")
    guest.infertune("revert")
