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

from infertune.service.names import BUS_NAME, INTERFACE, ROOT_NAME

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
    <allow send_destination="org.example.Answers"/>
  </policy>
  <policy user="nobody"><allow own="org.example.Answers"/></policy>
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


def test_the_policy_gives_the_names_to_root_alone() -> None:
    root = ElementTree.parse(BUS_POLICY).getroot()
    policies = {tuple(sorted(each.attrib.items())): list(each) for each in root}
    # In this order: what is said of a user is true for that user, whatever stands above it.
    assert list(policies) == [(("context", "default"),), (("user", "root"),)]
    rules = {key: [(each.tag, each.attrib) for each in found] for key, found in policies.items()}
    names = (BUS_NAME, ROOT_NAME)
    assert rules[("user", "root"),] == [
        *[("allow", {"own": name}) for name in names],
        ("allow", {"send_destination": ROOT_NAME}),
    ]
    everybody = rules[("context", "default"),]
    assert everybody[:4] == [
        *[("deny", {"own": name}) for name in names],
        *[("deny", {"send_destination": name, "send_broadcast": "false"}) for name in names],
    ]
    introspection = ElementTree.parse(SYSTEMD / f"{INTERFACE}.xml")
    methods = introspection.iterfind(f"interface[@name='{INTERFACE}']/method")
    bus = "org.freedesktop.DBus"
    assert everybody[4:] == [
        (
            "allow",
            {"send_destination": BUS_NAME, "send_interface": interface, "send_member": member},
        )
        for interface, member in [
            *[(INTERFACE, method.attrib["name"]) for method in methods],
            (f"{bus}.Properties", "Get"),
            (f"{bus}.Properties", "GetAll"),
            (f"{bus}.Introspectable", "Introspect"),
            (f"{bus}.Peer", "Ping"),
            (f"{bus}.Peer", "GetMachineId"),
        ]
    ]


NOBODY = """
import asyncio, os, sys
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

async def scene():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    bus.add_message_handler(lambda message: Message.new_method_return(message)
                            if message.member == "AreYouThere" else None)
    async def ask(destination, path, interface, member, signature="", *body):
        reply = await bus.call(Message(destination=destination, path=path, interface=interface,
                                       member=member, signature=signature, body=list(body)))
        error = (reply.error_name or "ok").rpartition(".")[2]
        print(destination, interface, member, error, flush=True)
        return reply
    async def signal(destination, member):
        await bus.send(Message(message_type=MessageType.SIGNAL, destination=destination,
                               path="/x", interface="x.y", member=member))
    names, bus_name = sys.argv[2:], "org.freedesktop.DBus"
    the_bus = bus_name, "/org/freedesktop/DBus", bus_name
    for name in names:
        await ask(*the_bus, "RequestName", "su", name, 4)
        owner = (await ask(*the_bus, "GetNameOwner", "s", name)).body[0]
        for to in name, owner:
            for interface, members in (
                (names[0], ("Status", "Nonsense")),
                (f"{bus_name}.Properties", ("Get", "GetAll", "Set")),
                (f"{bus_name}.Introspectable", ("Introspect",)),
                (f"{bus_name}.Peer", ("Ping", "Pong")),
                ("org.example.Other", ("Own",)),
            ):
                for member in members:
                    await ask(to, "/x", interface, member)
            await signal(to, "Alone")
        await signal(None, "ToEverybody")
    await bus.request_name("org.example.Answers")
    print("ready", flush=True)
    await bus.wait_for_disconnect()

os.setgroups([]); os.setgid(65534); os.setuid(65534)
asyncio.run(scene())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_nobody_else_can_be_the_daemon(system_bus: str) -> None:
    """On a bus with our policy: who has the names, and what may be sent to them."""
    pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")
    from dbus_fast import Message, MessageType
    from dbus_fast.aio import MessageBus

    from infertune.service.calls import BUS, Remote, call

    heard: list[str] = []

    def answer(message: Message) -> Message | None:
        if message.message_type is MessageType.SIGNAL and message.interface == "x.y":
            heard.append(str(message.member))
        called = message.message_type is MessageType.METHOD_CALL
        return Message.new_method_return(message, "s", ["x"]) if called else None

    async def owner_of(name: str) -> MessageBus:
        bus = await MessageBus(bus_address=system_bus).connect()
        bus.add_message_handler(answer)
        await bus.request_name(name)
        await call(bus, BUS, "AddMatch", "s", "type='signal',interface='x.y'", timeout_s=None)
        return bus

    async def scene() -> list[str]:
        names = (BUS_NAME, ROOT_NAME)
        owners = [await owner_of(name) for name in names]
        command = [sys.executable, "-c", NOBODY, system_bus, *names]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe)
        assert process.stdout is not None
        said = []
        while (line := (await process.stdout.readline()).decode()) not in ("ready\n", ""):
            said.append(line)
        # What root asks of a service that is not root's (polkit) is answered all the same.
        theirs = Remote("org.example.Answers", "/x", "x.y")
        for owner in owners:
            await call(owner, theirs, "AreYouThere", timeout_s=30)
        process.kill()
        await process.wait()
        # And root may call by either name.
        for name in names:
            await call(owners[0], Remote(name, "/x", INTERFACE), "Status", timeout_s=30)
        for owner in owners:
            owner.disconnect()
            await owner.wait_for_disconnect()
        return said

    said = asyncio.run(asyncio.wait_for(scene(), 60))
    found = {tuple(line.split()) for line in said}
    bus = "org.freedesktop.DBus"
    got_through = {
        (to, interface, member)
        for to, interface, member, error in found
        if error != "AccessDenied" and to != bus
    }
    assert {error for *_, member, error in found if member == "RequestName"} == {"AccessDenied"}
    assert len(said) == 2 + 2 + 4 * 9
    unique = {to for to, *_ in got_through} - {BUS_NAME}
    assert len(unique) == 1, "the bus asks the same of who it is sent to by its number"
    assert got_through == {
        (to, interface, member)
        for to in (BUS_NAME, *unique)
        for interface, member in (
            (INTERFACE, "Status"),
            (f"{bus}.Properties", "Get"),
            (f"{bus}.Properties", "GetAll"),
            (f"{bus}.Introspectable", "Introspect"),
            (f"{bus}.Peer", "Ping"),
        )
    }
    assert heard == ["ToEverybody"] * 4
