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

import pytest

from vm import lab
from vm.guest import Guest
from vm.test_serve import changes, healthy

pytestmark = [pytest.mark.quick_on, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
ANSIBLE = HERE.parents[1] / "ansible"

EXTRAS = "daemon,exporter,embedded"
SERVERS = {"chat": 'profile = "quiet"\nport = 8101\n[settings]\nctx_size = 512\n'}
"""The model is the embedded one."""
BETTER = (
    'description = "the same, with less swapping"\nextends = "quiet"\n[now]\nvm.swappiness = 5\n'
)


class Fleet(NamedTuple):
    guests: dict[str, Guest]
    directory: Path

    def play(self, name: str, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a playbook; what it printed."""
        began = time.monotonic()
        done = subprocess.run(
            [playbook(), "-i", self.directory / "inventory.json", f"playbooks/{name}.yml", *words],
            cwd=ANSIBLE,
            env={
                **os.environ,
                "ANSIBLE_HOME": str(self.directory / "home"),
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

    def inventory(self, **variables: object) -> None:
        """Write the inventory; ``variables`` are those of both hosts."""
        hosts = {name: self._host(guest) for name, guest in self.guests.items()}
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


def recap(text: str) -> dict[str, dict[str, int]]:
    """Counts by host of the end of a play."""
    lines = re.findall(r"^(\S+) +: (ok=.*)$", text, re.MULTILINE)
    return {
        host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", counts)}
        for host, counts in lines
    }


def tree(guest: Guest) -> dict[str, str]:
    found: dict[str, str] = json.loads(guest.sh("python3 -B /opt/in_guest/tree.py", timeout=600))
    return found


@pytest.fixture(scope="module")
def fleet(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    playbook()
    directory = tmp_path_factory.mktemp("fleet")
    package = ANSIBLE.parent / "scripts" / "package"
    words = ["wheelhouse", "--extras", EXTRAS, "--python", lab.PYTHON, "--output", directory]
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


def test_from_bare_to_serving_and_back_to_bare(fleet: Fleet) -> None:
    before = {name: tree(guest) for name, guest in fleet.guests.items()}
    wanted: dict[str, object] = {
        "infertune_wheelhouse": str(fleet.directory / "wheelhouse"),
        "infertune_extras": EXTRAS,
        "infertune_profile": "quiet",
        "infertune_servers": SERVERS,
    }
    fleet.inventory(**wanted)

    # Check mode says that there is something to do, and does nothing.
    counts = recap(fleet.play("site", "--check"))
    assert all(each["changed"] > 0 and each["failed"] == 0 for each in counts.values()), counts
    for name, guest in fleet.guests.items():
        assert changes(before[name], tree(guest)) == ({}, []), name

    # From bare to serving, and again.
    fleet.play("site")
    for guest in fleet.guests.values():
        assert healthy(guest, 8101)
        guest.infertune("verify quiet")
        assert guest.sh("systemctl is-active infertune-exporter.socket").strip() == "active"
    again = recap(fleet.play("site"))
    assert {each["changed"] for each in again.values()} == {0}, again
    checked = recap(fleet.play("site", "--check"))
    assert {each["changed"] for each in checked.values()} == {0}, checked
    fleet.play("drift")

    # A profile whose canary is not well: it goes back there, and the other never saw it.
    settings = {name: guest.settings() for name, guest in fleet.guests.items()}
    fleet.inventory(
        **{**wanted, "infertune_profile": "better", "infertune_profiles": {"better": BETTER}},
        infertune_health="false",
    )
    failed = fleet.play("rollout", codes=(2,))
    counts = recap(failed)
    assert "new" not in counts, counts
    assert "no other machine was touched after it" in failed
    for name, guest in fleet.guests.items():
        assert guest.settings() == settings[name]
        assert json.loads(guest.infertune("status --json").out)["applied"]["profile"] == "quiet"
        assert guest.run("ls /etc/infertune/profiles/better.toml").code != 0
        assert healthy(guest, 8101)

    # The same with machines that are well, then somebody changes a value.
    fleet.inventory(
        **{**wanted, "infertune_profile": "better", "infertune_profiles": {"better": BETTER}}
    )
    fleet.play("rollout")
    for guest in fleet.guests.values():
        assert guest.read("/proc/sys/vm/swappiness") == "5"
        applied = json.loads(guest.infertune("status --json").out)["applied"]
        assert (applied["profile"], applied["confirm_by_s"]) == ("better", None)
    fleet.guests["old"].sh("sysctl -q vm.swappiness=77")
    drift = fleet.play("drift", codes=(2,))
    assert recap(drift)["old"]["failed"] == 1
    assert recap(drift)["new"]["failed"] == 0
    assert "/proc/sys/vm/swappiness" in drift

    # Nothing is left.
    fleet.guests["old"].sh("sysctl -q vm.swappiness=5")
    fleet.play("uninstall")
    for name, guest in fleet.guests.items():
        assert changes(before[name], tree(guest)) == ({}, []), name
        left = guest.sh("find / -xdev -iname '*infertune*' -not -path '/proc/*'")
        assert left == "", left
    again = recap(fleet.play("uninstall"))
    assert {each["changed"] for each in again.values()} == {0}, again
