# SPDX-License-Identifier: Apache-2.0
"""Starts of the owner's own units that are judged: what is refused, and what never is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import gguf_files
from infertune.base.records import replace
from known_models import KNOWN
from vm.guest import Guest
from vm.test_daemon import wait_until

pytestmark = pytest.mark.quick_on("6.12")

QUIET = 'description = "x"\n[launch]\noom_score_adj = -100\n'
TYPE = "[Service]\nUser=nobody\nType=exec\n"
UNITS = {
    # Any engine: what it takes is declared.
    "engine.service": TYPE + "ExecStart=/usr/bin/sleep infinity\n",
    # What it takes is seen in its flags: 64 KiB a token.
    "llama@.service": TYPE + "EnvironmentFile=/etc/default/llama-%i\n"
    "ExecStart=/opt/bin/llama-server -m /opt/m/${MODEL}.gguf -c $CTX -cram 0 -np 1\n",
    # As closed as a unit of somebody careful.
    "walled.service": "[Service]\nType=exec\nDynamicUser=yes\nExecStart=/usr/bin/sleep infinity\n"
    "ProtectSystem=strict\nProtectHome=yes\nPrivateDevices=yes\nPrivateNetwork=yes\n"
    "ProtectProc=invisible\nProtectKernelTunables=yes\nProtectControlGroups=yes\n"
    "RestrictAddressFamilies=AF_INET\nMemoryDenyWriteExecute=yes\nRestrictNamespaces=yes\n"
    "SystemCallFilter=@system-service\nSystemCallErrorNumber=EPERM\n",
}
BLIND = "[Service]\nProcSubset=pid\nInaccessiblePaths=/sys\n"
NAMES = "engine llama@one llama@two walled"
TOKEN = 64 * 1024


@pytest.fixture
def owners(service: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """The service, and units of the machine's owner, none of which runs yet."""
    [llama] = (each for each in KNOWN if each.name == "Llama 3.1 8B")
    sizes = {"block_count": 16, "embedding_length": 32, "feed_forward_length": 32}
    heads = {"head_count": 1, "head_count_kv": 1, "key_length": 1024, "value_length": 1024}
    keys = {**llama.keys, **sizes, **{f"attention.{name}": size for name, size in heads.items()}}
    small = replace(llama, keys=keys, vocab=32, tied=True)
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    model = gguf_files.write(path, small.metadata(), small.tensors()).read_bytes()

    service.sh("mkdir -p /opt/bin /opt/m /etc/infertune/profiles /etc/infertune/servers.d")
    service.write("/opt/m/small.gguf", model)
    service.write("/opt/bin/llama-server", "#!/bin/sh\nexec sleep infinity\n")
    service.sh("chmod -R a+rX /opt && chmod 755 /opt/bin/llama-server")
    service.write("/etc/default/llama-one", "MODEL=small\nCTX=256\n")
    service.write("/etc/default/llama-two", f"MODEL=small\nCTX={64 * 2**30 // TOKEN}\n")
    service.write("/etc/infertune/profiles/quiet-one.toml", QUIET)
    for unit, text in UNITS.items():
        service.write(f"/etc/systemd/system/{unit}", text)
    service.sh("systemctl daemon-reload")
    yield service
    service.run(f"systemctl stop {NAMES}; systemctl reset-failed {NAMES}")
    service.sh("rm -rf /etc/systemd/system/{engine,llama@,walled}.service /etc/default/llama-* "
               "/opt/bin /opt/m /etc/infertune/profiles /etc/infertune/servers.d "
               "/run/infertune/servers.d; systemctl daemon-reload")  # fmt: skip


def start(guest: Guest, unit: str) -> bool:
    return guest.run(f"systemctl restart {unit}").code == 0


def status(guest: Guest, unit: str) -> str:
    return guest.run(f"systemctl status --no-pager --full --lines 20 {unit}").out


def adopt(guest: Guest, unit: str, words: str) -> None:
    guest.infertune(f"adopt {unit} --profile quiet-one --backend cpu {words}")


def files(guest: Guest) -> str:
    return guest.sh("find /run/systemd/system /run/systemd/system.control /etc/systemd -type f "
                    "-exec sha256sum {} + 2>/dev/null | sort; "
                    f"systemctl show -p ExecStartPre,DropInPaths {NAMES}")  # fmt: skip


def test_a_start_that_does_not_fit_is_refused_with_its_reason(owners: Guest) -> None:
    guest = owners
    before = files(guest)
    assert start(guest, "engine")
    adopt(guest, "engine", "--admission refuse --memory 64GiB")
    assert guest.run("systemctl is-active engine").code == 0, "what runs goes on"
    assert not start(guest, "engine")
    said = status(guest, "engine")
    print(said)
    assert "infertune: does not fit: RAM: 64 GiB of " in said
    assert "(code=exited, status=2)" in said
    asked = guest.infertune("admit engine --json", codes=(2,))
    assert json.loads(asked.out)["fits"] is False

    # It is the unit's own user who looked.
    adopt(guest, "engine", "--memory 64MiB")
    assert start(guest, "engine")
    assert "+" not in guest.sh("systemctl cat engine | grep '^ExecStartPre='")
    assert guest.infertune("admit engine").out == "engine.service: fits\n"

    adopt(guest, "engine", "--admission warn --memory 64GiB")
    assert start(guest, "engine")
    said = status(guest, "engine")
    assert 'admission = "warn" overrides: does not fit: RAM: ' in said

    adopt(guest, "engine", "--admission off")
    assert "infertune.admit" not in guest.sh("systemctl cat engine")
    guest.infertune("release engine")
    guest.sh("systemctl stop engine; systemctl reset-failed engine || :")
    assert files(guest) == before


def test_a_llama_server_is_judged_by_its_flags_and_variables(owners: Guest) -> None:
    guest = owners
    for instance in ("one", "two"):
        adopt(guest, f"llama@{instance}", "--admission refuse")
    assert start(guest, "llama@one")
    assert not start(guest, "llama@two")
    assert "infertune: does not fit: RAM: " in status(guest, "llama@two")
    # The owner gives it less: the next start is judged by what it says by then.
    guest.write("/etc/default/llama-two", "MODEL=small\nCTX=512\n")
    assert start(guest, "llama@two")
    # What cannot be read is not refused.
    guest.write("/etc/default/llama-two", "MODEL=nothing\nCTX=512\n")
    assert start(guest, "llama@two")
    assert "whether the model fits is unknown" in status(guest, "llama@two")


def test_behind_walls_it_is_judged_too(owners: Guest) -> None:
    guest = owners
    adopt(guest, "walled", "--admission refuse --memory 64GiB")
    assert not start(guest, "walled")
    assert "infertune: does not fit: RAM: 64 GiB of " in status(guest, "walled")
    adopt(guest, "walled", "--memory 64MiB")
    assert start(guest, "walled")
    # Where it may not look, it does not refuse.
    guest.sh("mkdir -p /etc/systemd/system/walled.service.d")
    guest.write("/etc/systemd/system/walled.service.d/blind.conf", BLIND)
    guest.sh("systemctl daemon-reload")
    adopt(guest, "walled", "--memory 64GiB")
    assert start(guest, "walled")
    guest.sh("rm -r /etc/systemd/system/walled.service.d && systemctl daemon-reload")


def test_declared_it_is_judged_at_every_start(owners: Guest) -> None:
    guest = owners
    declared = 'unit = "engine.service"\nprofile = "quiet-one"\nbackend = "cpu"\n'
    guest.write("/etc/infertune/servers.d/engine.toml",
                declared + 'admission = "refuse"\nmemory = "64GiB"\n')  # fmt: skip
    guest.sh("systemctl restart infertune")
    assert "infertune.admit" in guest.sh("systemctl cat engine"), "before it says READY"
    assert not start(guest, "engine")
    # Also at boot, of a unit that waits for it.
    guest.write("/etc/systemd/system/engine.service",
                "[Unit]\nAfter=infertune.service\n" + UNITS["engine.service"]
                + "[Install]\nWantedBy=multi-user.target\n")  # fmt: skip
    guest.sh("systemctl enable engine")
    with pytest.raises(AssertionError, match=r"degraded: \S+ engine\.service .*failed"):
        guest.reboot()  # which expects every unit to start
    wait_until(lambda: guest.run("systemctl is-failed engine").code == 0)
    assert "infertune: does not fit: RAM: 64 GiB of " in status(guest, "engine")
    guest.sh("systemctl disable engine")
    # A daemon that is killed takes nothing back, and is not needed for it.
    guest.sh("systemctl kill --signal KILL infertune")
    assert not start(guest, "engine")
    guest.sh("rm /etc/infertune/servers.d/engine.toml")
    wait_until(lambda: guest.run("systemctl is-active infertune").code == 0)
    assert start(guest, "engine"), "nobody declares it any more"
    guest.sh("systemctl restart infertune")
    wait_until(lambda: "infertune.admit" not in guest.sh("systemctl cat engine"))
