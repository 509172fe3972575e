# SPDX-License-Identifier: Apache-2.0
"""What the units and the bus policy promise: a line that goes is seen, not only its score."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from infertune.service.names import BUS_NAME, INTERFACE

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
BUS_POLICY = SYSTEMD / f"{INTERFACE}.conf"

EVERY = {
    "NoNewPrivileges": ["yes"],
    "ProtectSystem": ["strict"],
    "PrivateTmp": ["yes"],
    "ProtectKernelModules": ["yes"],
    "ProtectKernelLogs": ["yes"],
    "ProtectControlGroups": ["yes"],
    "ProtectClock": ["yes"],
    "ProtectHostname": ["yes"],
    "ProtectProc": ["invisible"],
    "DevicePolicy": ["closed"],
    "RestrictNamespaces": ["yes"],
    "RestrictRealtime": ["yes"],
    "RestrictSUIDSGID": ["yes"],
    "LockPersonality": ["yes"],
    "SystemCallArchitectures": ["native"],
    "RemoveIPC": ["yes"],
    "KeyringMode": ["private"],
    "UMask": ["0077"],
}
"""Directives of every service that stays, with all their values."""

OF_SERVERS = {
    "DynamicUser": ["yes"],
    "User": ["infertune"],
    "ProtectKernelTunables": ["yes"],
    "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6"],
    "IPAddressDeny": ["any"],
    "IPAddressAllow": ["localhost"],
    "RuntimeDirectory": ["infertune-server"],
    "RuntimeDirectoryMode": ["0700"],
}

PROMISED: dict[str, dict[str, list[str]]] = {
    "infertune.service": {
        **EVERY,
        "CapabilityBoundingSet": ["CAP_SYS_ADMIN"],
        "AmbientCapabilities": [""],
        "ReadWritePaths": ["/run/systemd"],
        "ProtectHome": ["yes"],
        "PrivateMounts": ["yes"],
        "DeviceAllow": ["/dev/cpu_dma_latency rw"],
        "RestrictAddressFamilies": ["AF_UNIX AF_NETLINK"],
        "IPAddressDeny": ["any"],
        "IPAddressAllow": [],
        "MemoryDenyWriteExecute": ["yes"],
        "SystemCallFilter": ["@system-service", "~@privileged @resources"],
        "RuntimeDirectory": ["infertune"],
        "RuntimeDirectoryMode": ["0755"],
        "RuntimeDirectoryPreserve": ["yes"],
        "StateDirectory": ["infertune"],
        "StateDirectoryMode": ["0755"],
        "LogsDirectory": [],
        "MemoryMax": ["256M"],
        "TasksMax": ["16"],
    },
    "infertune-server@.service": {
        **EVERY,
        **OF_SERVERS,
        "CapabilityBoundingSet": [""],
        "AmbientCapabilities": [""],
        "ProtectHome": ["tmpfs"],
        "DeviceAllow": ["/dev/kfd rw", "char-drm rw"],
        "ReadWritePaths": [],
        "StateDirectoryMode": ["0700"],
    },
    "infertune-exporter.service": {
        **EVERY,
        **OF_SERVERS,
        "CapabilityBoundingSet": ["CAP_BPF CAP_PERFMON"],
        "AmbientCapabilities": ["CAP_BPF CAP_PERFMON"],
        "ProtectHome": ["yes"],
        "PrivateDevices": ["yes"],
        "DeviceAllow": [],
        "ReadWritePaths": [],
        "MemoryDenyWriteExecute": ["yes"],
        "MemoryMax": ["512M"],
        "TasksMax": ["128"],
    },
}
"""Directive by unit: its values, in order; none where it must not be there."""


def directives(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in (SYSTEMD / unit).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


@pytest.mark.parametrize("unit", PROMISED)
def test_units_keep_their_walls(unit: str) -> None:
    found = directives(unit)
    assert {name: found[name] for name in PROMISED[unit]} == PROMISED[unit]


def test_nothing_starts_before_its_files_are_rendered() -> None:
    """An interpreter without -I takes modules from the directory it is in, and PYTHONPATH."""
    for unit in SYSTEMD.glob("*.service"):
        for line in directives(unit.name)["ExecStart"]:
            assert line.startswith("@PYTHON@ -I -m infertune."), unit.name


# -- the bus -------------------------------------------------------------------------


@pytest.fixture
def system_bus(tmp_path: Path) -> Iterator[str]:
    """The address of a bus with our policy, and otherwise the rules of a system bus."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        parent.chmod(0o755)  # another user must reach the socket
    (tmp_path / "config").write_text(f"""
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "">
<busconfig>
  <type>system</type>
  <listen>unix:path={tmp_path}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><deny own="*"/><deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="method_return"/>
    <allow receive_type="error"/><allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>{BUS_POLICY}</include>
</busconfig>
""")
    process = subprocess.Popen(
        ["dbus-daemon", f"--config-file={tmp_path}/config", "--print-address", "--nofork"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        yield process.stdout.readline().strip()
        process.terminate()
        process.wait(60)


def test_the_policy_gives_the_name_to_root_alone() -> None:
    root = ElementTree.parse(BUS_POLICY).getroot()
    policies = {tuple(sorted(each.attrib.items())): list(each) for each in root}
    assert policies.keys() == {(("user", "root"),), (("context", "default"),)}
    rules = {key: [(each.tag, each.attrib) for each in found] for key, found in policies.items()}
    assert rules[("user", "root"),] == [("allow", {"own": BUS_NAME})]
    first, second, *allowed = rules[("context", "default"),]
    assert first == ("deny", {"own": BUS_NAME})
    assert second == ("deny", {"send_destination": BUS_NAME, "send_type": "method_call"})
    properties = "org.freedesktop.DBus.Properties"
    assert [
        (tag, rule.get("send_interface"), rule.get("send_member")) for tag, rule in allowed
    ] == [
        ("allow", INTERFACE, None),
        ("allow", properties, "Get"),
        ("allow", properties, "GetAll"),
        ("allow", "org.freedesktop.DBus.Introspectable", None),
        ("allow", "org.freedesktop.DBus.Peer", None),
    ]
    assert all(
        rule.keys() <= {"send_destination", "send_interface", "send_member"} for _, rule in allowed
    )


NOBODY = """
import asyncio, os, sys
from dbus_fast import Message
from dbus_fast.aio import MessageBus

async def scene():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    async def ask(destination, path, interface, member, signature="", *body):
        reply = await bus.call(Message(destination=destination, path=path, interface=interface,
                                       member=member, signature=signature, body=list(body)))
        print(member, (reply.error_name or "ok").rpartition(".")[2])
    name, bus_name = sys.argv[2], "org.freedesktop.DBus"
    await ask(bus_name, "/org/freedesktop/DBus", bus_name, "RequestName", "su", name, 4)
    there = name, "/" + name.replace(".", "/")
    for interface, member in ((name, "Status"), (f"{bus_name}.Properties", "GetAll"),
                              (f"{bus_name}.Properties", "Set"), ("org.example.Other", "Own")):
        await ask(*there, interface, member)

os.setgroups([]); os.setgid(65534); os.setuid(65534)
asyncio.run(scene())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_nobody_else_can_be_the_daemon(system_bus: str) -> None:
    """On a bus with our policy: who has the name, and what may be sent to it."""
    pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")
    from dbus_fast import Message, MessageType
    from dbus_fast.aio import MessageBus

    def answer(message: Message) -> Message | None:
        called = message.message_type is MessageType.METHOD_CALL
        return Message.new_method_return(message) if called else None

    async def scene() -> dict[str, str]:
        owner = await MessageBus(bus_address=system_bus).connect()
        owner.add_message_handler(answer)
        await owner.request_name(BUS_NAME)
        command = [sys.executable, "-c", NOBODY, system_bus, BUS_NAME]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe)
        said = (await process.communicate())[0].decode()
        owner.disconnect()
        await owner.wait_for_disconnect()
        return dict(line.split(" ") for line in said.splitlines())

    found = asyncio.run(asyncio.wait_for(scene(), 60))
    assert found == {
        "RequestName": "AccessDenied",
        "Status": "ok",
        "GetAll": "ok",
        "Set": "AccessDenied",
        "Own": "AccessDenied",
    }
