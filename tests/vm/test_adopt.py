# SPDX-License-Identifier: Apache-2.0
"""Servers that were there before infertune: what they get, and that all of it goes back."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

import pytest

from vm.guest import Guest
from vm.test_daemon import wait_until

pytestmark = pytest.mark.quick_on("6.12")

CGROUP = "/sys/fs/cgroup"
MIB = 2**20

KEPT = """
description = "what a server of others can be given"
[launch]
cpus = "1"
memory_min = "192MiB"
memory_swap_max = "0"
cpu_weight = 250
memlock = "unlimited"
oom_score_adj = -300
nice = -5
[launch.env]
GGML_TEST = "1"
"""

READER = """
import mmap, sys, time
size = 128 << 20
path = sys.argv[1]
with open(path, "wb") as file:
    for _ in range(size >> 20):
        file.write(b"x" * (1 << 20))
with open(path, "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
data.madvise(mmap.MADV_RANDOM)  # each page that is not there is a fault of its own
while True:
    sum(data[at] for at in range(0, size, 4096))
    time.sleep(0.5)
"""
"""A server whose model is mapped, and which reads all of it again and again."""

UNITS = {
    "plain.service": "[Service]\nExecStart=/usr/bin/sleep infinity\nMemoryMin=8M\n"
    "[Install]\nWantedBy=multi-user.target\n",
    "many@.service": "[Service]\nExecStart=/usr/bin/sleep infinity\nSlice=models-llm.slice\n",
    "reader.service": "[Service]\nExecStart=/usr/bin/python3 /opt/reader.py /var/tmp/model\n"
    "ExecStopPost=/usr/bin/rm -f /var/tmp/model\n",
}
OWN = "[Service]\nEnvironment=MINE=1 GGML_TEST=0\nMemoryMin=16M\nCPUWeight=77\n"


@pytest.fixture
def owners(service: Guest) -> Iterator[Guest]:
    """The service, and servers of the machine's owner that run beside it."""
    for unit, text in UNITS.items():
        service.write(f"/etc/systemd/system/{unit}", text)
    service.sh("mkdir -p /etc/systemd/system/plain.service.d /etc/infertune/profiles /opt")
    service.write("/etc/systemd/system/plain.service.d/override.conf", OWN)
    service.write("/opt/reader.py", READER)
    service.write("/etc/infertune/profiles/kept.toml", KEPT)
    service.sh("systemctl daemon-reload")
    start_owners(service)
    yield service
    service.run("systemctl stop plain many@one many@two reader")
    service.sh("rm -rf /etc/systemd/system/{plain,many@,reader}.service* /opt/reader.py "
               "/etc/infertune/profiles /etc/infertune/servers.d /run/systemd/system.control "
               "/run/infertune/servers.d; systemctl daemon-reload")  # fmt: skip


def start_owners(guest: Guest) -> None:
    """What ends with the boot."""
    guest.sh("systemctl start plain many@one many@two")
    guest.sh("systemctl set-property --runtime many@two.service MemoryMin=4M CPUWeight=33")


SHOWN = "MemoryMin,MemorySwapMax,AllowedCPUs,CPUWeight,OOMScoreAdjust,Nice,LimitMEMLOCK,Environment"
FILES = ("memory.min", "memory.swap.max", "cpuset.cpus", "cpu.weight")
GROUPS = (
    "system.slice", "system.slice/plain.service", "models.slice", "models.slice/models-llm.slice",
    "models.slice/models-llm.slice/many@one.service",
    "models.slice/models-llm.slice/many@two.service",
)  # fmt: skip


def state(guest: Guest) -> tuple[str, ...]:
    """Everything that an adoption may touch: systemd's view, the kernel's, and the files."""
    units = "plain many@one many@two system.slice models.slice models-llm.slice"
    kernel = " ".join(f"{CGROUP}/{group}/{name}" for group in GROUPS for name in FILES)
    return (
        guest.sh(f"systemctl show -p {SHOWN},NeedDaemonReload,DropInPaths {units}"),
        guest.sh(f"grep -H . {kernel} 2>/dev/null || :"),
        guest.sh("find /run/systemd/system /run/systemd/system.control /etc/systemd "
                 "/run/infertune-adopted -type f "
                 "-exec sha256sum {} + 2>/dev/null | sort"),
    )  # fmt: skip


def same(guest: Guest, before: tuple[str, ...]) -> None:
    """Raise AssertionError with what differs."""
    for old, new in zip(before, state(guest), strict=True):
        gone, came = set(old.splitlines()), set(new.splitlines())
        assert old == new, f"gone: {sorted(gone - came)}\ncame: {sorted(came - gone)}"


def group(guest: Guest, path: str, name: str) -> str:
    return guest.read(f"{CGROUP}/{path}/{name}")


def processes(guest: Guest, pid: str) -> tuple[str, str]:
    """OOM score and nice value."""
    priority = guest.sh(f"ps -o ni= -p {pid}").strip()
    return guest.read(f"/proc/{pid}/oom_score_adj"), priority


def test_adopted_at_once_and_at_the_next_start_and_given_back(owners: Guest) -> None:
    guest = owners
    before = state(guest)
    pid = guest.sh("systemctl show -P MainPID plain").strip()

    planned = json.loads(guest.infertune("adopt plain --profile kept --plan --json").out)
    assert {"MemoryMin", "AllowedCPUs"} <= {each["property"] for each in planned["items"]}
    same(guest, before)

    print(guest.infertune("adopt plain --profile kept").out)
    path = "system.slice/plain.service"
    assert group(guest, path, "memory.min") == str(192 * MIB)
    assert group(guest, "system.slice", "memory.min") == str(192 * MIB)
    assert group(guest, path, "memory.swap.max") == "0"
    assert group(guest, path, "cpuset.cpus") == "1"
    assert group(guest, path, "cpu.weight") == "250"
    assert guest.sh("systemctl show -P MainPID plain").strip() == pid, "it was not restarted"
    assert processes(guest, pid) == ("-300", "-5")
    guest.infertune("release plain")
    same(guest, before)
    assert processes(guest, pid) == ("0", "0")
    guest.infertune("adopt plain --profile kept")

    # Whoever reloads systemd, and whoever restarts the unit, finds it so.
    guest.sh("systemctl daemon-reload && systemctl restart plain")
    pid = guest.sh("systemctl show -P MainPID plain").strip()
    assert group(guest, path, "memory.min") == str(192 * MIB)
    assert group(guest, path, "cpuset.cpus") == "1"
    assert processes(guest, pid) == ("-300", "-5")
    assert "Max locked memory         unlimited" in guest.read(f"/proc/{pid}/limits")
    environment = guest.sh(f"tr '\\0' '\\n' </proc/{pid}/environ").split()
    assert {"MINE=1", "GGML_TEST=1"} <= set(environment)

    servers = json.loads(guest.infertune("servers --json").out)["servers"]
    assert [each["name"] for each in servers] == ["plain"]
    assert guest.infertune("release plain").out.strip() == "plain.service: given back"
    same(guest, before)
    # It was started with ours, and goes back to what its unit says.
    assert processes(guest, pid) == ("0", "0")


def test_instances_in_slices_of_their_own(owners: Guest) -> None:
    guest = owners
    before = state(guest)
    for name in ("one", "two"):
        guest.infertune(f"adopt many@{name} --profile kept")
    guest.infertune("adopt plain --profile kept")
    for path, times in (("models.slice", 2), ("models.slice/models-llm.slice", 2),
                        ("system.slice", 1)):  # fmt: skip
        assert group(guest, path, "memory.min") == str(times * 192 * MIB)
    guest.infertune("release many-one")
    assert group(guest, "models.slice", "memory.min") == str(192 * MIB)
    # The daemon that ends gives everything back; the next one adopts it again.
    guest.sh("systemctl stop infertune")
    same(guest, before)
    guest.sh("systemctl start infertune")
    wait_until(lambda: group(guest, "models.slice", "memory.min") == str(192 * MIB))
    wait_until(lambda: group(guest, "system.slice", "memory.min") == str(192 * MIB))
    guest.infertune("release many@two.service")
    guest.infertune("release plain")
    same(guest, before)


def test_a_scope_is_adopted_for_as_long_as_it_lives(owners: Guest) -> None:
    guest = owners
    before = state(guest)
    guest.sh("systemd-run -q --scope --unit=box sleep infinity >/dev/null 2>&1 </dev/null &")
    wait_until(lambda: guest.run("systemctl is-active -q box.scope").code == 0)
    guest.infertune("adopt box.scope --profile kept")
    assert group(guest, "system.slice/box.scope", "memory.min") == str(192 * MIB)
    assert group(guest, "system.slice/box.scope", "cpuset.cpus") == "1"
    guest.infertune("release box")
    assert group(guest, "system.slice/box.scope", "memory.min") == "0"
    guest.infertune("adopt box.scope --profile kept")
    guest.sh("systemctl stop box.scope")
    guest.infertune("release box")
    same(guest, before)


def test_a_server_in_the_foreground_is_known(owners: Guest) -> None:
    guest = owners
    guest.sh("systemd-run -q --scope -p Delegate=yes --unit=fg infertune run kept --launch-only "
             "-- sleep infinity >/dev/null 2>&1 </dev/null &")  # fmt: skip

    def names() -> list[str]:
        servers = json.loads(guest.infertune("servers --json").out)["servers"]
        return [each["name"] for each in servers]

    wait_until(lambda: names() == ["run:kept"])
    page = guest.sh("/usr/lib/infertune/bin/python -c 'from infertune.base.root import Root; "
                    "from infertune.exporter.servers import units, cgroup_ids; "
                    "print(units(Root(\"/\")), cgroup_ids(Root(\"/\")))'")  # fmt: skip
    print(page)
    assert "server='run:kept'" in page
    assert page.count("'run:kept'") == 2
    guest.sh("systemctl kill -s KILL fg.scope")
    wait_until(lambda: names() == [])


def faults(guest: Guest) -> int:
    text = group(guest, "system.slice/reader.service", "memory.stat")
    return int(dict(line.split() for line in text.splitlines())["pgmajfault"])


HOG = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("1000")
held = [bytearray(b"x" * (1 << 20)) for _ in range(int(sys.argv[1]))]
time.sleep(8)
"""
"""Wants more than there is: the kernel reclaims what it may, and ends this one in the end."""


def at_rest(guest: Guest) -> int:
    """Major faults of the reader, once it has all of its model in memory again."""
    before, now = -1, faults(guest)
    while now != before:
        time.sleep(2)
        before, now = now, faults(guest)
    return now


def squeeze(guest: Guest) -> int:
    """Major faults of the reader while others want all memory there is."""
    before = at_rest(guest)
    available = int(guest.sh("awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo"))
    guest.write("/opt/hog.py", HOG)
    guest.run(f"timeout 60 python3 /opt/hog.py {available + 40}", timeout=300)
    time.sleep(2)
    return faults(guest) - before


def test_protection_holds_under_pressure(owners: Guest) -> None:
    guest = owners
    guest.sh("systemctl start reader")
    wait_until(lambda: guest.run("test $(stat -c %s /var/tmp/model) -ge 134217728").code == 0, 120)
    unprotected = squeeze(guest)
    guest.infertune("adopt reader --profile kept")
    protected = squeeze(guest)
    guest.infertune("release reader")
    print(f"major faults: {unprotected} without protection, {protected} with it")
    assert unprotected > 1000
    # Libraries that it shares with others are charged to whoever used them first.
    assert protected < unprotected / 100


@pytest.mark.timeout(3600)
def test_adopted_and_killed_at_any_moment(owners: Guest, thorough: bool) -> None:
    guest = owners
    before = state(guest)
    rounds = 50 if thorough else 8
    for number in range(rounds):
        verb = ("adopt plain --profile kept", "release plain")[number % 2]
        pid = guest.sh("systemctl show -P MainPID infertune").strip()
        wait = random.uniform(0.0, 0.6)
        guest.run(f"(sleep {wait:.2f}; kill -9 {pid}) & infertune {verb} >/dev/null 2>&1; wait")
        wait_until(lambda: guest.run("infertune servers").code == 0)
        wait_until(lambda: guest.run("systemctl is-active -q infertune").code == 0)
    guest.sh("systemctl reset-failed infertune || :")
    guest.run("infertune release plain")
    wait_until(lambda: state(guest) == before)


def test_a_declaration_adopts_at_every_boot(owners: Guest) -> None:
    guest = owners
    guest.sh("mkdir -p /etc/infertune/servers.d && systemctl enable -q plain")
    guest.write("/etc/infertune/servers.d/mine.toml", 'unit = "plain.service"\nprofile = "kept"\n')
    guest.infertune("adopt many@one --profile kept")
    guest.sh("sync")
    guest.power_cut()
    wait_until(lambda: group(guest, "system.slice/plain.service", "memory.min") == str(192 * MIB))
    servers = json.loads(guest.infertune("servers --json").out)["servers"]
    assert [each["name"] for each in servers] == ["mine"], "what was for one boot ended with it"
    left = guest.infertune("release mine", codes=(1,))
    assert "adopts it again when infertuned starts" in left.out
    assert group(guest, "system.slice/plain.service", "memory.min") == str(16 * MIB)
    assert group(guest, "system.slice", "memory.min") == "0"
    guest.sh("systemctl disable -q plain")


# -- a unit of a user's manager ----------------------------------------------------------------

UID = 1000
"""Of ``user``, who has no privilege."""
MANAGER = f"user.slice/user-{UID}.slice/user@{UID}.service"
SHELL = f"XDG_RUNTIME_DIR=/run/user/{UID} systemctl --user"
OF_USER = {
    "mine.service": "[Service]\nExecStart=/usr/bin/sleep infinity\nSlice=app-models.slice\n"
    "MemoryMin=8M\n[Install]\nWantedBy=default.target\n",
    "again.service": "[Service]\nExecStart=/usr/bin/sleep infinity\nCPUWeight=50\n",
}
ABOVE = ("user.slice", f"user.slice/user-{UID}.slice", MANAGER)
INSIDE = ("app.slice", "app.slice/app-models.slice", "app.slice/app-models.slice/mine.service")


@pytest.fixture
def lingering(owners: Guest) -> Iterator[Guest]:
    """A user whose manager runs without a session, with units of his own."""
    guest = owners
    # Without libpam-systemd nobody else says where it is.
    guest.sh("mkdir -p /etc/systemd/system/user@.service.d")
    where = "[Service]\nEnvironment=XDG_RUNTIME_DIR=/run/user/%i\n"
    guest.write("/etc/systemd/system/user@.service.d/where.conf", where)
    units = "/home/user/.config/systemd/user"
    guest.sh(f"mkdir -p {units} && systemctl daemon-reload")
    for unit, text in OF_USER.items():
        guest.write(f"{units}/{unit}", text)
    guest.sh("chown -R user: /home/user/.config && loginctl enable-linger user")
    wait_until(lambda: guest.run(f"systemctl is-active -q user@{UID}").code == 0)
    of_user(guest, "enable -q --now mine.service")
    of_user(guest, "start again.service")
    of_user(guest, "set-property --runtime again.service MemoryMin=4M")
    yield guest
    guest.run("loginctl disable-linger user")
    guest.run(f"systemctl stop user@{UID} user-runtime-dir@{UID}")
    guest.sh("rm -rf /home/user/.config/systemd /etc/systemd/system/user@.service.d; "
             "systemctl daemon-reload")  # fmt: skip


def of_user(guest: Guest, words: str) -> str:
    """What ``systemctl --user`` says to the user."""
    done = guest.run(f"{SHELL} {words}", user="user")
    assert done.code == 0, done
    return done.out


def state_of_user(guest: Guest) -> tuple[str, ...]:
    """Everything that may be touched, of both managers."""
    units = "mine again app.slice app-models.slice"
    system = f"user.slice user-{UID}.slice user@{UID}.service"
    groups = [*ABOVE, *(f"{MANAGER}/{each}" for each in INSIDE)]
    kernel = " ".join(f"{CGROUP}/{group}/{name}" for group in groups for name in FILES)
    return (
        *state(guest),
        guest.sh(f"systemctl show -p {SHOWN},NeedDaemonReload,DropInPaths,Wants {system}"),
        of_user(guest, f"show -p {SHOWN},NeedDaemonReload,DropInPaths {units}"),
        guest.sh(f"grep -H . {kernel} 2>/dev/null || :"),
        guest.sh(f"find /run/user/{UID} /home/user/.config -type f "
                 "-exec sha256sum {} + 2>/dev/null | sort"),
        guest.sh("find /run/infertune -name '*.json' | sort"),
    )  # fmt: skip


def same_of_user(guest: Guest, before: tuple[str, ...]) -> None:
    """Raise AssertionError with what differs."""
    for old, new in zip(before, state_of_user(guest), strict=True):
        gone, came = set(old.splitlines()), set(new.splitlines())
        assert old == new, f"gone: {sorted(gone - came)}\ncame: {sorted(came - gone)}"


def is_protected(guest: Guest) -> bool:
    """Whether every group down to the unit's has the minimum."""
    groups = [*ABOVE, *(f"{MANAGER}/{each}" for each in INSIDE)]
    found = guest.run(" ".join(["cat", *(f"{CGROUP}/{each}/memory.min" for each in groups)]))
    return found.code == 0 and {int(each) for each in found.out.split()} == {192 * MIB}


def test_a_unit_of_a_user_with_linger(lingering: Guest) -> None:
    guest = lingering
    before = state_of_user(guest)
    pid = of_user(guest, "show -P MainPID mine").strip()

    words = "adopt mine --user user --profile kept --json --plan"
    planned = json.loads(guest.infertune(words, codes=(1,)).out)
    minimum = [each["unit"] for each in planned["items"] if each["property"] == "MemoryMin"]
    assert minimum == ["user.slice", f"user-{UID}.slice", f"user@{UID}.service", "app.slice",
                       "app-models.slice", "mine.service"]  # fmt: skip
    nothing = guest.infertune("adopt nothing --user user --profile kept", codes=(2,))
    assert "there is no unit 'nothing.service'" in nothing.err
    nobody = guest.infertune("adopt mine --user 4242 --profile kept", codes=(2,))
    assert "no manager of user 4242 runs" in nobody.err
    same_of_user(guest, before)

    done = guest.infertune("adopt mine --user user --profile kept", codes=(1,))
    print(done.out)
    assert "cpuset" in done.out
    assert is_protected(guest)
    path = f"{MANAGER}/{INSIDE[-1]}"
    assert group(guest, path, "cpu.weight") == "250"
    assert group(guest, path, "memory.swap.max") == "0"
    assert of_user(guest, "show -P MainPID mine").strip() == pid, "it was not restarted"
    assert processes(guest, pid) == ("-300", "-5")
    servers = json.loads(guest.infertune("servers --json").out)["servers"]
    assert [(each["name"], each["state"], each["user"]) for each in servers] == [
        ("mine", "active", str(UID))
    ]
    # Whoever reloads the user's manager, and whoever restarts the unit, finds it so.
    of_user(guest, "daemon-reload")
    of_user(guest, "restart mine")
    assert is_protected(guest)
    pid = of_user(guest, "show -P MainPID mine").strip()
    environment = guest.sh(f"tr '\\0' '\\n' </proc/{pid}/environ").split()
    assert "GGML_TEST=1" in environment

    # Two units in the same chain, and one that had something of its own.
    guest.infertune("adopt again --user 1000 --profile kept", codes=(1,))
    assert group(guest, "user.slice", "memory.min") == str(2 * 192 * MIB)
    guest.infertune("release again")
    assert is_protected(guest)
    guest.infertune("release mine")
    same_of_user(guest, before)

    # The user himself may not, nor may he ask what is not his.
    for words in ("adopt mine --user user --profile kept", "release mine"):
        assert guest.run(f"infertune {words}", user="user").code == 4


DEAF = """
import os, socket, time
os.chdir("/run/user/1000/systemd")
os.rename("private", "real")
listener = socket.socket(socket.AF_UNIX)
listener.bind("private")
listener.listen()
time.sleep(600)
"""
"""The user takes the place of his manager, and says nothing to anybody."""


def test_a_user_s_manager_that_hangs(lingering: Guest) -> None:
    guest = lingering
    before = state_of_user(guest)
    guest.write("/opt/deaf.py", DEAF)
    guest.sh("chmod 644 /opt/deaf.py; systemd-run -q --unit=deaf --uid=1000 "
             "python3 /opt/deaf.py")  # fmt: skip
    wait_until(lambda: guest.run(f"test -S /run/user/{UID}/systemd/real").code == 0)
    failed = guest.infertune("adopt mine --user user --profile kept", codes=(3,))
    print(failed.err)
    assert f"the manager of user {UID} did not do it" in failed.err
    # Others are adopted all the same.
    guest.infertune("adopt plain --profile kept")
    guest.infertune("release plain")
    guest.sh(f"systemctl stop deaf; cd /run/user/{UID}/systemd && mv real private; "
             "rm /opt/deaf.py")  # fmt: skip
    same_of_user(guest, before)


def test_a_user_s_manager_that_comes_back(lingering: Guest) -> None:
    guest = lingering
    before = state_of_user(guest)
    guest.sh("mkdir -p /etc/infertune/servers.d")
    declared = 'unit = "mine.service"\nuser = "user"\nprofile = "kept"\n'
    guest.write("/etc/infertune/servers.d/mine.toml", declared)
    guest.sh("systemctl restart infertune")
    wait_until(lambda: is_protected(guest))
    # Also after a power cut, where nobody logs in: his manager and the daemon start together.
    guest.sh("sync")
    guest.power_cut()
    wait_until(lambda: is_protected(guest))
    # All sessions end, and with them what was written; the next one finds it again.
    guest.sh(f"systemctl stop user@{UID} user-runtime-dir@{UID}")
    assert guest.run(f"test -e /run/user/{UID}").code == 1
    guest.sh(f"systemctl start user@{UID}")
    wait_until(lambda: is_protected(guest))
    # Killed, the daemon leaves it, and the next one can take it back.
    guest.sh("systemctl kill -s KILL infertune")
    wait_until(lambda: guest.run("infertune servers").code == 0)
    assert is_protected(guest)
    guest.sh("rm /etc/infertune/servers.d/mine.toml; systemctl stop infertune")
    start_owners(guest)
    of_user(guest, "start again.service")
    of_user(guest, "set-property --runtime again.service MemoryMin=4M")
    same_of_user(guest, before)
    guest.sh("systemctl start infertune")
