# SPDX-License-Identifier: Apache-2.0
"""Two bare machines with different kernels, and what the playbooks make of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bcrypt
import pytest

from vm import lab
from vm.guest import Guest
from vm.test_serve import changes, healthy

pytestmark = [pytest.mark.quick_on, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
ANSIBLE = HERE.parents[1] / "ansible"

SERVERS = {"chat": {"profile": "quiet", "port": 8101, "settings": {"ctx_size": 512}}}
"""The model is the embedded one."""
SIZE = {"description": "memory for the GPU", "boot": {"ttm.pages_limit": "307MiB"}}
"""What test_boot.py takes, which needs no boot loader; only the one machine has the module."""
COUNTED = "/proc/sys/vm/user_reserve_kbytes"
"""The kernel makes it of the memory that is free when it starts, and the machines start again."""
LIMIT, PAGES = "/sys/module/ttm/parameters/pages_limit", str(307 * 256)
ADDRESS = "10.0.2.15"
"""Of each guest in its own network."""
SCRAPE = f"""
import ssl, urllib.request
request = urllib.request.Request("https://{ADDRESS}:9877/metrics")
request.add_header("Authorization", "Basic " + __import__("base64").b64encode(b"p:secret").decode())
context = ssl.create_default_context(cafile="/root/cert.pem")
print(urllib.request.urlopen(request, timeout=60, context=context).read().decode())
"""
STRANGER = f"""
import socket
try:
    socket.create_connection(("{ADDRESS}", 9877), 5, ("192.0.2.9", 0)).close()
    print("let in")
except TimeoutError:
    print("kept out")
"""
"""Comes from an address that is not among those that may reach the port."""
BETTER = {
    "description": "the same, with less swapping",
    "extends": "quiet",
    "now": {"vm.swappiness": 5},
}


class Fleet(NamedTuple):
    guests: dict[str, Guest]
    directory: Path

    def play(self, name: str, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a playbook of the installed collection; what it printed."""
        began = time.monotonic()
        inventory = str(self.directory / "inventory.json")
        done = subprocess.run(
            [playbook(), "-i", inventory, f"infertune.infertune.{name}", *words],
            cwd=self.directory,
            env={
                **os.environ,
                "ANSIBLE_HOME": str(self.directory / "home"),
                "ANSIBLE_COLLECTIONS_PATH": str(self.directory / "collections"),
                "ANSIBLE_PIPELINING": "True",
                "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=10m",
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_TIMEOUT": "60",
            },
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        took = (time.monotonic() - began) / len(self.guests)
        print(f"{name} {' '.join(words)}: exit code {done.returncode}, {took:.0f} s per host")
        assert done.returncode in codes, done.stdout[-6000:] + done.stderr
        return done.stdout

    def inventory(self, sick: str = "", **variables: object) -> None:
        """Write the inventory; ``variables`` are those of both hosts, of which one may be sick."""
        hosts = {name: self._host(guest) for name, guest in self.guests.items()}
        if sick:
            hosts[sick]["infertune_health"] = "false"
        group = {"hosts": hosts, "vars": {"infertune_refuse_findings": False, **variables}}
        text = json.dumps({"infertune": group})
        (self.directory / "inventory.json").write_text(text)

    def _host(self, guest: Guest) -> dict[str, object]:
        # The words that the guest itself is talked to with, so that one connection serves both.
        words = guest._ssh_to("root")
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": guest._port,
            "ansible_user": "root",
            "ansible_ssh_common_args": " ".join(words[words.index("-F") : words.index("-p")]),
            "ansible_python_interpreter": "/usr/bin/python3",
        }


def playbook() -> str:
    found = shutil.which("ansible-playbook")
    if found is None:
        pytest.skip("ansible-playbook is not installed (pip install ansible-core)")
    return found


def install_collection(directory: Path) -> None:
    """Build the collection and install it below ``directory``, as docs/fleet.md says."""
    galaxy = [Path(playbook()).with_name("ansible-galaxy"), "collection"]
    environment = {**os.environ, "ANSIBLE_HOME": str(directory / "home")}

    def run(*words: str | Path) -> None:
        subprocess.run([*galaxy, *words], env=environment, check=True, capture_output=True)

    run("build", ANSIBLE, "--output-path", directory)
    [made] = directory.glob("infertune-infertune-*.tar.gz")
    run("install", made, "--offline", "-p", directory / "collections")


def recap(text: str) -> dict[str, dict[str, int]]:
    """Counts by host of the end of a play."""
    lines = re.findall(r"^(\S+) +: (ok=.*)$", text, re.MULTILINE)
    return {
        host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", counts)}
        for host, counts in lines
    }


def tree(guest: Guest) -> dict[str, str]:
    found: dict[str, str] = json.loads(guest.sh("python3 -B /opt/in_guest/tree.py", timeout=600))
    del found[COUNTED]
    return found


def servers(guest: Guest) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(guest.infertune("servers --json").out)["servers"]
    return found


@pytest.fixture(scope="module")
def fleet(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    playbook()
    directory = tmp_path_factory.mktemp("fleet")
    install_collection(directory)
    package = ANSIBLE.parent / "scripts" / "package"
    words = ["wheelhouse", *lab.OPTIONS, "--output", directory]
    subprocess.run([sys.executable, "-B", package, *words], check=True, capture_output=True)
    guests = {"old": Guest(image, "6.12"), "new": Guest(image, "7.x")}
    try:
        for guest in guests.values():
            guest.start()  # not in threads: a guest ends with the thread that started it
            guest.put(HERE / "in_guest", "/opt")
        yield Fleet(guests, directory)
    finally:
        for guest in guests.values():
            guest.stop()


@pytest.fixture(scope="module")
def door(fleet: Fleet) -> dict[str, object]:
    """What opens the exporter's port: a certificate and a password."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=fleet"
    words += f" -addext subjectAltName=IP:{ADDRESS} -keyout key.pem -out cert.pem"
    command = ["openssl", *words.split()]
    subprocess.run(command, cwd=fleet.directory, check=True, capture_output=True)
    secret = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    web = "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n"
    files = {name: (fleet.directory / name).read_text() for name in ("cert.pem", "key.pem")}
    for guest in fleet.guests.values():
        assert guest.write("/root/cert.pem", files["cert.pem"]).code == 0
    return {
        "infertune_exporter_listen": f"{ADDRESS}:9877",
        "infertune_exporter_allow": ["10.0.2.0/24"],
        "infertune_exporter_files": {
            **files,
            "web-config.yml": f"{web}basic_auth_users: {{p: {secret}}}\n",
        },
    }


class Bare(NamedTuple):
    """The machines before anything was done."""

    trees: dict[str, dict[str, str]]
    limit: str


@pytest.fixture(scope="module")
def bare(fleet: Fleet) -> Bare:
    new = fleet.guests["new"]
    new.sh("echo ttm >/etc/modules-load.d/ttm.conf && modprobe ttm")
    return Bare({name: tree(guest) for name, guest in fleet.guests.items()}, new.read(LIMIT))


@pytest.fixture(scope="module")
def wanted(fleet: Fleet, door: dict[str, object]) -> dict[str, object]:
    """Variables of a fleet that serves."""
    return {
        "infertune_wheelhouse": str(fleet.directory / "wheelhouse"),
        "infertune_extras": lab.EXTRAS,
        "infertune_profile": "quiet",
        "infertune_servers": SERVERS,
        "infertune_profiles": {"size": SIZE},
        "infertune_boot_profile": "size",
        "infertune_reboot": True,
        **door,
    }


@pytest.fixture(scope="module")
def changed(wanted: dict[str, object]) -> dict[str, object]:
    """The same with another profile."""
    return {**wanted, "infertune_profile": "better", "infertune_profiles": {"better": BETTER}}


# One story in this order: each test goes on where the one before it ended.


def test_check_mode_says_what_there_is_to_do_and_does_nothing(
    fleet: Fleet, bare: Bare, wanted: dict[str, object]
) -> None:
    fleet.inventory(**wanted)
    counts = recap(fleet.play("site", "--check"))
    assert all(each["changed"] > 0 and each["failed"] == 0 for each in counts.values()), counts
    for name, guest in fleet.guests.items():
        assert changes(bare.trees[name], tree(guest)) == ({}, []), name


def test_from_bare_to_serving(fleet: Fleet, bare: Bare, wanted: dict[str, object]) -> None:
    fleet.inventory(**wanted)
    fleet.play("site")
    for guest in fleet.guests.values():
        assert healthy(guest, 8101)
        guest.infertune("verify quiet")
        assert guest.write("/root/scrape.py", SCRAPE).code == 0
        assert "infertune_collector_success" in guest.sh("python3 /root/scrape.py")
        assert guest.write("/root/stranger.py", STRANGER).code == 0
        guest.sh("ip address add 192.0.2.9/32 dev lo")
        assert guest.sh("python3 /root/stranger.py").strip() == "kept out"
        guest.sh("ip address del 192.0.2.9/32 dev lo; rm /root/scrape.py /root/stranger.py")
        boot = json.loads(guest.infertune("boot status --json", codes=(0, 1)).out)
        assert boot["phase"] == "confirmed"
    assert fleet.guests["new"].read(LIMIT) == PAGES  # that took a start


def test_again_changes_nothing(fleet: Fleet) -> None:
    again = recap(fleet.play("site"))
    assert {each["changed"] for each in again.values()} == {0}, again
    checked = recap(fleet.play("site", "--check"))
    assert {each["changed"] for each in checked.values()} == {0}, checked
    fleet.play("drift")


def test_a_canary_that_is_not_well_goes_back_and_stops_it(
    fleet: Fleet, changed: dict[str, object]
) -> None:
    """The other machine never sees the profile; in a batch of two it goes back as well."""
    settings = {name: guest.settings() for name, guest in fleet.guests.items()}
    fleet.inventory(sick="old", **changed)
    foreseen = recap(fleet.play("rollout", "--check"))
    assert all(each["changed"] > 0 for each in foreseen.values()), foreseen
    foreseen = recap(fleet.play("site", "--check", "--limit", "new"))
    assert foreseen["new"]["changed"] > 0, foreseen
    for batch in (1, 2):
        failed = fleet.play("rollout", "-e", f"infertune_serial={batch}", codes=(2,))
        assert ("new" in recap(failed)) == (batch == 2), failed
        assert "no other machine was touched after it" in failed
        assert ("old is not well with it" in failed) == (batch == 2)
        for name, guest in fleet.guests.items():
            assert guest.settings() == settings[name]
            applied = json.loads(guest.infertune("status --json").out)["applied"]
            assert (applied["profile"], applied["confirm_by_s"]) == ("quiet", None)
            assert guest.run("ls /etc/infertune/profiles/better.toml").code != 0
            assert 'profile = "quiet"' in guest.read("/etc/infertune/infertuned.toml")
            assert healthy(guest, 8101)


def test_a_profile_that_is_none_does_not_get_there(
    fleet: Fleet, changed: dict[str, object]
) -> None:
    new = fleet.guests["new"]
    settings = new.settings()
    fleet.inventory(
        **{**changed, "infertune_profiles": {"better": {**BETTER, "now": {"vm.swapp": 5}}}}
    )
    failed = fleet.play("rollout", "--limit", "new", codes=(2,))
    assert "vm.swappiness" in failed, failed  # did you mean
    assert new.run("ls /etc/infertune/profiles/better.toml").code != 0
    assert new.settings() == settings


def test_rolled_out_and_watched_for_drift(fleet: Fleet, changed: dict[str, object]) -> None:
    fleet.inventory(**changed)
    fleet.play("rollout")
    for guest in fleet.guests.values():
        assert guest.read("/proc/sys/vm/swappiness") == "5"
        applied = json.loads(guest.infertune("status --json").out)["applied"]
        assert (applied["profile"], applied["confirm_by_s"]) == ("better", None)
        assert 'profile = "better"' in guest.read("/etc/infertune/infertuned.toml")
        assert healthy(guest, 8101)
    again = recap(fleet.play("rollout"))
    assert {each["changed"] for each in again.values()} == {0}, again
    fleet.guests["old"].sh("sysctl -q vm.swappiness=77")
    drift = fleet.play("drift", codes=(2,))
    assert recap(drift)["old"]["failed"] == 1
    assert recap(drift)["new"]["failed"] == 0
    assert "/proc/sys/vm/swappiness" in drift
    fleet.guests["old"].sh("sysctl -q vm.swappiness=5")


def test_a_server_that_is_named_no_more(fleet: Fleet, changed: dict[str, object]) -> None:
    new = fleet.guests["new"]
    fleet.inventory(**{**changed, "infertune_servers": {"talk": SERVERS["chat"]}})
    drift = fleet.play("drift", "--limit", "new", codes=(2,))
    assert "servers that do not run: talk" in drift
    fleet.play("site", "--limit", "new")
    assert [each["name"] for each in servers(new)] == ["talk"]
    assert healthy(new, 8101)
    fleet.play("drift", "--limit", "new")


def test_nothing_is_left(fleet: Fleet, bare: Bare) -> None:
    new = fleet.guests["new"]
    fleet.play("uninstall")
    new.reboot()  # the module has its own limit again at the next start
    assert new.read(LIMIT) == bare.limit
    for name, guest in fleet.guests.items():
        assert changes(bare.trees[name], tree(guest)) == ({}, []), name
        left = guest.sh("find / -xdev -iname '*infertune*' -not -path '/proc/*'")
        assert left == "", left
    again = recap(fleet.play("uninstall"))
    assert {each["changed"] for each in again.values()} == {0}, again
