# SPDX-License-Identifier: Apache-2.0
"""The Debian package on stock machines: installed, upgraded under a running server, purged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune import __version__
from vm.guest import Guest
from vm.test_serve import changes, fake, pid_of

pytestmark = [pytest.mark.quick_on, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
OLD, NEW = "0.1.0", __version__

POLL = """
import json, sys, time, urllib.request
asked, failed = 0, []
while True:
    asked += 1
    try:
        urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1] + "/health", timeout=20).read()
    except OSError as error:
        failed.append(str(error))
    open("/root/polled.new", "w").write(json.dumps([asked, failed]))
    __import__("os").rename("/root/polled.new", "/root/polled")
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    for version in (OLD, NEW):
        script = HERE.parents[1] / "scripts" / "package"
        command = [sys.executable, "-B", script, "deb", "--output", directory]
        subprocess.run([*command, "--version", version], check=True, capture_output=True)
    return directory


@pytest.fixture(params=["6.12", "7.x"])
def bare(request: pytest.FixtureRequest, image: Path) -> Iterator[Guest]:
    """A machine without anything of ours."""
    guest = Guest(image, request.param)
    try:
        guest.start()
        yield guest
    finally:
        guest.stop()


def polled(guest: Guest) -> tuple[int, list[str]]:
    asked, failed = json.loads(guest.read("/root/polled"))
    return asked, failed


def test_installed_upgraded_and_purged(bare: Guest, packages: Path) -> None:
    guest = bare
    guest.put(HERE / "in_guest", "/root")
    guest.put(packages, "/root")
    guest.sh("rm -rf /root/in_guest/__pycache__")

    def tree() -> dict[str, str]:
        found: dict[str, str] = json.loads(guest.sh("python3 /root/in_guest/tree.py", timeout=300))
        return found

    def package(version: str) -> str:
        return f"/root/{packages.name}/infertune_{version}_amd64.deb"

    before, settings = tree(), guest.settings()

    # Installed: the daemon runs, and nothing is tuned yet.
    print(guest.sh(f"dpkg -i {package(OLD)} 2>&1", timeout=600))
    assert guest.sh("systemctl is-active infertune").strip() == "active"
    assert guest.sh("systemctl is-enabled infertune").strip() == "enabled"
    assert guest.sh("systemctl is-enabled infertune-boot-guard").strip() == "enabled"
    assert guest.settings() == settings
    assert "quiet" in guest.infertune("profiles").out
    refused = guest.infertune("setup", codes=(2,))
    assert "a package of the distribution has installed" in refused.err

    # In use, with a profile that the administrator has changed.
    fake(guest)
    guest.sh("echo '# ours' >>/etc/infertune/profiles/quiet.toml")
    guest.infertune("apply quiet")
    served = json.loads(
        guest.infertune("serve quiet --model /opt/model.gguf --name chat --json").out
    )
    applied, pid = guest.settings(), pid_of(guest, "chat")
    daemon = guest.sh("systemctl show -P MainPID infertune")
    guest.write("/root/poll.py", POLL)
    port = served["url"].rpartition(":")[2]
    guest.sh(f"systemd-run -q --unit=poll python3 -B /root/poll.py {port}; sleep 2")

    # Upgraded: the server answers all the time, and the profile stays applied.
    print(guest.sh(f"dpkg -i --force-confold {package(NEW)} 2>&1", timeout=600))
    guest.sh("sleep 2")
    asked, failed = polled(guest)
    print(f"asked {asked} times over the upgrade")
    assert asked > 5
    assert failed == []
    assert guest.sh("dpkg-query -W -f '${Version}' infertune") == NEW
    assert pid_of(guest, "chat") == pid
    assert guest.sh("systemctl show -P MainPID infertune") == daemon
    assert json.loads(guest.infertune("status --json").out)["applied"]["profile"] == "quiet"
    assert guest.settings() == applied
    guest.infertune("verify quiet")
    assert guest.read("/etc/infertune/profiles/quiet.toml").endswith("# ours")
    guest.sh("systemctl stop poll")

    # Removed: every value is back; what the administrator wrote is kept.
    print(guest.sh("dpkg -r infertune 2>&1", timeout=300))
    assert guest.settings() == settings
    assert guest.run(f"kill -0 {pid}").code != 0
    assert guest.read("/etc/infertune/profiles/quiet.toml").endswith("# ours")

    # Purged: nothing of ours is left.
    print(guest.sh("dpkg --purge infertune 2>&1", timeout=300))
    guest.sh("rm -rf /usr/local/bin/llama-server /opt/* /root/*; sync")
    assert guest.sh("find / -xdev -iname '*infertune*' -not -path '/proc/*'") == ""
    guest.put(HERE / "in_guest", "/root")
    guest.sh("rm -rf /root/in_guest/__pycache__")
    assert changes(before, tree()) == ({}, [])
