# SPDX-License-Identifier: Apache-2.0
"""What a hostile user sends to infertuned, by a process of its own: floods, noise, odd shapes.

    python hostile_senders.py ADDRESS UID flood WHAT SECONDS
    python hostile_senders.py ADDRESS UID noise COUNT SEED
    python hostile_senders.py ADDRESS UID shape WHAT...

prints what it sent and what came back, as JSON.  It writes bytes to the socket: a library would
not send most of this.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable

NAME = "org.infertune.Infertune1"
PATH = "/org/infertune/Infertune1"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"
NOBODY = 65534

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY, NO_AUTOSTART, INTERACTIVE = 1, 2, 4

FORGED = "Version\n<1>kernel: Out of memory: root login by a user\n\x1b[2J\x1b]0;pwned\x07\r\u2028"
MIB = 2**20


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<I", len(encoded)) + encoded + b"\0"


def texts(*values: str) -> bytes:
    body = b""
    for value in values:
        body += b"\0" * (-len(body) % 4) + text(value)
    return body


def variants(size: int) -> bytes:
    """An array of variants of one byte: each is an object when it is unpacked."""
    return struct.pack("<I", size // 4 * 4) + b"\x01y\0\x07" * (size // 4)


def _field(code: int, kind: str, value: str) -> bytes:
    if kind == "g":
        return bytes([code, 1]) + b"g\0" + bytes([len(value)]) + value.encode() + b"\0"
    return bytes([code, 1]) + kind.encode() + b"\0" + text(value)


def message(
    member: str,
    signature: str = "",
    body: bytes = b"",
    *,
    interface: str = NAME,
    path: str = PATH,
    to: str = NAME,
    flags: int = 0,
    kind: int = CALL,
    serial: int = 2,
) -> bytes:
    fields = [_field(1, "o", path), _field(3, "s", member), _field(6, "s", to)]
    if interface:
        fields.append(_field(2, "s", interface))
    if signature:
        fields.append(_field(8, "g", signature))
    if kind in (RETURN, ERROR):
        fields.append(bytes([5, 1]) + b"u\0" + struct.pack("<I", serial))
    if kind == ERROR:
        fields.append(_field(4, "s", "org.example.Error"))
    packed = b""
    for each in fields:
        packed += b"\0" * (-len(packed) % 8) + each
    head = struct.pack("<cBBBIII", b"l", kind, flags, 1, len(body), serial, len(packed)) + packed
    return head + b"\0" * (-len(head) % 8) + body


def connect(address: str, uid: int = NOBODY) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.connect(address.removeprefix("unix:path=").partition(",")[0])
    one.sendall(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n")
    if not one.recv(200).startswith(b"OK"):
        raise ConnectionError("the bus does not take us")
    one.sendall(b"BEGIN\r\n")
    bus = "org.freedesktop.DBus"
    one.sendall(message("Hello", interface=bus, path="/org/freedesktop/DBus", to=bus, serial=1))
    one.recv(4096)
    return one


def owner(one: socket.socket) -> str:
    """The daemon's unique name."""
    bus = "org.freedesktop.DBus"
    one.sendall(
        message(
            "GetNameOwner", "s", text(NAME), interface=bus, path="/org/freedesktop/DBus", to=bus
        )
    )
    answer = one.recv(4096)
    return ":" + answer.rpartition(b":")[2].rstrip(b"\0").decode()


# -- floods: as much as the bus takes, for some seconds --------------------------------


SMALL = (
    message("Status"),
    message("Plan", "ssas", texts("low", "cpu") + bytes(4)),
    message("Get", "ss", texts(NAME, "State"), interface=PROPERTIES),
    message("GetAll", "s", texts(NAME), interface=PROPERTIES),
    message("Introspect", interface=INTROSPECTABLE),
    message("GetMachineId", interface=PEER),
    message("NoSuchMember"),
    message("Verify", "s", texts("x")),
)
FLOODS: dict[str, tuple[bytes, ...]] = {
    "large": (message("Status", "av", variants(31 * MIB)),),
    "medium": (message("Status", "av", variants(60_000)),),
    "small": SMALL,
    "status": (message("Status"),),
    "introspect": (message("Introspect", interface=INTROSPECTABLE),),
    "properties": (message("GetAll", "s", texts(NAME), interface=PROPERTIES),),
    "unknown": (message("NoSuchMember"),),
    "unheard": (message("Status", flags=NO_REPLY),),
    "log": (message("Get", "ss", texts(NAME, FORGED), interface=PROPERTIES, flags=NO_REPLY),),
    "long log": (
        message("GetAll", "s", texts(FORGED + "x" * 60_000), interface=PROPERTIES, flags=NO_REPLY),
    ),
    "prompts": (
        message("Apply", "ssasu", texts("low", "cpu") + bytes(8), flags=INTERACTIVE),
        message("Revert", flags=INTERACTIVE),
    ),
}
SIGNALS: dict[str, Callable[[str], bytes]] = {
    # To the daemon alone, by the number of its public connection; the bus policy refuses them.
    "signals": lambda to: message("Nothing", "s", texts("x"), kind=SIGNAL, to=to),
    "sleep": lambda to: message(
        "PrepareForSleep",
        "b",
        struct.pack("<I", 1),
        kind=SIGNAL,
        interface="org.freedesktop.login1.Manager",
        to=to,
    ),
    "owners": lambda to: message(
        "NameOwnerChanged",
        "sss",
        texts("org.freedesktop.login1", "", ":1.1"),
        kind=SIGNAL,
        interface="org.freedesktop.DBus",
        path="/org/freedesktop/DBus",
        to=to,
    ),
}


BAD = ("a bug", "Traceback", 'File "')
"""What must be in no answer."""
_ERROR = re.compile(rb"\.(Error\.[A-Za-z]+)\0")


def drain(one: socket.socket, seen: Counter[str], wait_s: float = 0) -> None:
    """Read what waits, or comes within a moment; ConnectionError where the bus hung up."""
    while select.select([one], [], [], wait_s)[0]:
        data = one.recv(MIB)
        if not data:
            raise ConnectionError
        for name in _ERROR.findall(data):
            seen[name.decode()] += 1
        seen["bytes back"] += len(data)
        for word in BAD:
            seen["bad"] += data.count(word.encode())


def flood(address: str, what: str, seconds: float, uid: int = NOBODY) -> Counter[str]:
    """Send as much of ``what`` as the bus takes, and read what it says."""
    seen: Counter[str] = Counter()
    one = connect(address, uid)
    pile = FLOODS[what] if what in FLOODS else (SIGNALS[what](owner(one)),)
    # Many small ones at a time: one system call each would be the sender's limit.
    pile *= max(1, 32_768 // sum(map(len, pile)))
    starts = [0, *itertools.accumulate(map(len, pile))]
    data = bytearray(b"".join(pile))
    one.setblocking(False)
    serial, at = 10, len(data)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reading, writing, _ = select.select([one], [one], [], 0.2)
        if reading:
            drain(one, seen)
        if writing and at == len(data):
            # The bus takes no second call with the number of one that is not answered yet.
            for start in starts[:-1]:
                struct.pack_into("<I", data, start + 8, serial)
                serial += 1
            at = 0
        if writing:
            with contextlib.suppress(BlockingIOError):
                at += one.send(memoryview(data)[at:])
    seen["sent"] = serial - 10
    return seen


# -- noise: valid messages of all kinds, and some that are not -------------------------

MEMBERS = (
    *("Plan", "Verify", "Status", "Apply", "Revert", "Confirm", "Hold", "Release", "Serve", "Stop"),
    *("Servers", "Get", "GetAll", "Set", "Introspect", "Ping", "GetMachineId", "Nope", "x" * 255),
)
RIGHT = (
    *((NAME, member, "ssas") for member in ("Plan", "Verify")),
    *((NAME, member, "") for member in ("Status", "Revert", "Confirm", "Servers")),
    *((NAME, member, "s") for member in ("Release", "Serve", "Stop")),
    *((NAME, "Apply", "ssasu"), (NAME, "Hold", "sss")),
    *((PROPERTIES, "Get", "ss"), (PROPERTIES, "GetAll", "s"), (INTROSPECTABLE, "Introspect", "")),
)
INTERFACES = (NAME, NAME, NAME, PROPERTIES, INTROSPECTABLE, PEER, "", "org.example.x")
PATHS = (PATH, PATH, PATH, "/", "/org", PATH + "/x", "/" + "/".join("x" * 200))
STRINGS = (
    *("", "low", "cpu", "auto", "../x", "a" * 255, "\u2028", "\x1b[2J", "low\n", "LOW", NAME),
    *("Drift", "Version", "." * 64, "-", "chat", "0", "\ufffd", FORGED, "x" * 70_000),
)
TYPES = ("", "s", "ss", "sss", "ssas", "ssasu", "sbs", "u", "v", "ssv", "as", "d", "b", "ssasus")


def body_of(signature: str, pick: random.Random) -> bytes:
    """A valid body of these types: s, u, d, b, v and as."""
    body = b""

    def put(align: int, data: bytes) -> None:
        nonlocal body
        body += b"\0" * (-len(body) % align) + data

    for each in signature.replace("as", "A"):
        if each == "s":
            put(4, text(pick.choice(STRINGS)))
        elif each == "u":
            put(4, struct.pack("<I", pick.choice((0, 1, 300, 86_401, 2**32 - 1))))
        elif each == "b":
            put(4, struct.pack("<I", pick.choice((0, 1))))
        elif each == "d":
            put(8, struct.pack("<d", pick.choice((0.0, float("nan"), 1e308))))
        elif each == "v":
            body += b"\x01u\0"
            put(4, struct.pack("<I", 7))
        elif each == "A":
            inside = texts(*pick.choices(STRINGS[:-1], k=pick.choice((0, 1, 3, 100))))
            put(4, struct.pack("<I", len(inside)) + inside)
    return body


def any_message(pick: random.Random, serial: int) -> bytes:
    interface, member, signature = pick.choice(RIGHT)
    if pick.random() < 0.5:
        interface, member = pick.choice(INTERFACES), pick.choice(MEMBERS)
        signature = pick.choice(TYPES)
    made = message(
        member,
        signature,
        body_of(signature, pick),
        interface=interface,
        path=pick.choice(PATHS),
        flags=pick.choice((0, 0, 0, 0, 1, 2, 4, 0xFF)),
        kind=pick.choice((CALL,) * 40 + (RETURN, ERROR, SIGNAL, 5)),
        serial=serial,
    )
    if pick.random() < 0.01:  # the bus hangs up on most of those
        changed = bytearray(made)
        for _ in range(pick.randrange(1, 4)):
            changed[pick.randrange(len(changed))] = pick.randrange(256)
        return bytes(changed)
    return made


def noise(address: str, count: int, seed: int, uid: int = NOBODY) -> Counter[str]:
    """So many random messages; a connection that the bus ends is made anew."""
    pick = random.Random(seed)
    seen: Counter[str] = Counter()
    one = connect(address, uid)
    for serial in range(10, count + 10):
        seen["sent"] += 1
        try:
            one.sendall(any_message(pick, serial))
            if serial % 20 == 0:
                drain(one, seen, 0.02)  # what the bus has no room for, the daemon does not see
            if pick.random() < 0.002:
                raise ConnectionError  # leaves with calls that are not answered
        except OSError:
            seen["new connections"] += 1
            one.close()
            one = connect(address, uid)
    time.sleep(0.2)
    with contextlib.suppress(OSError):
        drain(one, seen)
    return seen


# -- shapes: one odd thing each ----------------------------------------------------------


def _nested(depth: int) -> bytes:
    """A variant in a variant in a variant."""
    return b"\x01v\0" * depth + b"\x01y\0\7"


def _padded(*parts: bytes) -> bytes:
    return b"".join(part + b"\0" * (-len(part) % 8) for part in parts)


def _with_field(field: bytes) -> bytes:
    """A call of Status with one more field in its header."""
    plain = message("Status")
    length = struct.unpack_from("<I", plain, 12)[0]
    fields = _padded(plain[16 : 16 + length]) + field
    head = plain[:12] + struct.pack("<I", len(fields)) + fields
    return head + b"\0" * (-len(head) % 8)


def _big_endian() -> bytes:
    """A call of Status in the other byte order."""
    fields = b""
    for code, kind, value in ((1, "o", PATH), (2, "s", NAME), (3, "s", "Status"), (6, "s", NAME)):
        fields += b"\0" * (-len(fields) % 8) + bytes([code, 1]) + kind.encode() + b"\0"
        fields += struct.pack(">I", len(value)) + value.encode() + b"\0"
    head = struct.pack(">cBBBIII", b"B", CALL, 0, 1, 0, 9, len(fields)) + fields
    return head + b"\0" * (-len(head) % 8)


SHAPES: dict[str, tuple[bytes, ...]] = {
    "half a header": (message("Status")[:9],),
    "most of a long call": (message("Status", "av", variants(31 * MIB))[: 8 * MIB],),
    "leaves before the answer": (message("Status"),),
    "128 calls, and leaves": tuple(message("Status", serial=n) for n in range(10, 138)),
    "a prompt, and leaves": (message("Revert", flags=INTERACTIVE),),
    "20 prompts, and leaves": tuple(
        message("Revert", flags=INTERACTIVE, serial=n) for n in range(10, 30)
    ),
    "31 MiB of variants": (message("Status", "av", variants(31 * MIB)),),
    "16 MiB of one string": (message("Release", "s", text("x" * 16 * MIB)),),
    "a long path": (message("Status", path="/" + "x" * 60_000),),
    "255 bytes": (message("Status", "y" * 255, bytes(255)),),
    **{
        f"{depth} variants in each other": (message("Status", "v", _nested(depth)),)
        for depth in (30, 61, 62, 63, 64, 65)
    },
    "32 structs in each other": (message("Status", "(" * 32 + "y" + ")" * 32, b"\1"),),
    "32 arrays of 31 structs": (
        message("Status", "a" * 32 + "(" * 31 + "y" + ")" * 31, bytes(4)),
    ),
    "the other byte order": (_big_endian(),),
    "a type that is none": (message("Status", kind=5), message("Status", kind=255, serial=3)),
    "type 0": (message("Status", kind=0),),
    "number 0": (message("Status", serial=0),),
    "one number twice": (message("Status"), message("Status")),
    "all flags": (message("Status", flags=0xFF),),
    "an answer that nobody wants": tuple(
        message("x", kind=RETURN, serial=n) for n in range(2, 60)
    ),
    "an error that nobody wants": tuple(
        message("x", kind=ERROR, serial=n) for n in range(2, 60)
    ),
    "a field that is none": (_with_field(bytes([0x55, 1]) + b"s\0" + text("x")),),
    "a sender of one's own": (_with_field(_field(7, "s", "org.freedesktop.DBus")),),
    "descriptors that are not there": (_with_field(bytes([9, 1]) + b"u\0\x10\0\0\0"),),
    "an index of a descriptor": (message("Release", "h", bytes(4)),),
    "text that is none": (message("Release", "s", b"\2\0\0\0\xff\xfe\0"),),
    "no interface": (message("Status", interface=""),),
    "an object that is none": (message("Status", path="/"), message("Status", path=PATH + "/x")),
    "writing a property": (
        message("Set", "ssv", texts(NAME, "Version") + b"\x01s\0" + bytes(1) + text("x"),
                interface=PROPERTIES),
    ),
    "managed objects": (
        message("GetManagedObjects", path="/", interface="org.freedesktop.DBus.ObjectManager"),
    ),
    "lines of root's": (
        message("Get", "ss", texts(NAME, FORGED), interface=PROPERTIES),
        message("Get", "ss", texts(FORGED, "Version"), interface=PROPERTIES, serial=3),
        message("GetAll", "s", texts(FORGED), interface=PROPERTIES, flags=NO_REPLY, serial=4),
    ),
    "a hold, and leaves": (message("Hold", "sss", texts("low", "cpu", "x")),),
}  # fmt: skip


def shape(address: str, what: str, uid: int = NOBODY) -> Counter[str]:
    """One odd thing; the sender leaves a moment later, whatever is under way."""
    seen: Counter[str] = Counter()
    with connect(address, uid) as one, contextlib.suppress(OSError):
        messages = SHAPES[what] if what in SHAPES else (SIGNALS[what](owner(one)),) * 100
        for each in messages:
            seen["sent"] += 1
            one.sendall(each)
        time.sleep(0.1)
        drain(one, seen)
    return seen


def main(address: str, uid: str, scene: str, *about: str) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    if scene == "flood":
        seen = flood(address, about[0], float(about[1]), int(uid))
    elif scene == "noise":
        seen = noise(address, int(about[0]), int(about[1]), int(uid))
    else:
        seen = sum((shape(address, each, int(uid)) for each in about), Counter())
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
