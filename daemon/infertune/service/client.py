# SPDX-License-Identifier: Apache-2.0
"""The daemon as seen from the command line: one call over sd-bus(3) of the system's libsystemd.

By ctypes, which costs a verb a twentieth of what asyncio and dbus-fast do; of sd-bus, those
functions that take a fixed number of arguments.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_uint8, c_uint32, c_uint64, c_void_p

from infertune.base.errors import InfertuneError, Unreachable
from infertune.service.names import BUS_NAME, ERROR, ERRORS, INTERFACE, OBJECT_PATH, ROOT_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_NAME = "libsystemd.so.0"
_TIMEOUT_S = 150.0
"""A person may have to type a password for polkit first."""


class _Error(ctypes.Structure):
    """``sd_bus_error``."""

    _fields_ = (("name", c_char_p), ("message", c_char_p), ("need_free", c_int))


_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "sd_bus_open_system": (POINTER(c_void_p),),
    "sd_bus_new": (POINTER(c_void_p),),
    "sd_bus_set_address": (c_void_p, c_char_p),
    "sd_bus_start": (c_void_p,),
    "sd_bus_message_new_method_call": (c_void_p, POINTER(c_void_p), *[c_char_p] * 4),
    "sd_bus_message_set_auto_start": (c_void_p, c_int),
    "sd_bus_message_set_allow_interactive_authorization": (c_void_p, c_int),
    "sd_bus_message_append_basic": (c_void_p, c_char, c_void_p),
    "sd_bus_message_open_container": (c_void_p, c_char, c_char_p),
    "sd_bus_message_close_container": (c_void_p,),
    "sd_bus_send": (c_void_p, c_void_p, POINTER(c_uint64)),
    "sd_bus_process": (c_void_p, POINTER(c_void_p)),
    "sd_bus_wait": (c_void_p, c_uint64),
    "sd_bus_message_get_reply_cookie": (c_void_p, POINTER(c_uint64)),
    "sd_bus_message_peek_type": (c_void_p, POINTER(c_char), POINTER(c_char_p)),
    "sd_bus_message_read_basic": (c_void_p, c_char, c_void_p),
    "sd_bus_message_enter_container": (c_void_p, c_char, c_char_p),
    "sd_bus_message_exit_container": (c_void_p,),
}
"""Those that give a negative errno where they fail, and what they take."""

_NUMBERS: dict[bytes, Any] = {
    b"y": c_uint8,
    b"b": c_int,
    b"n": ctypes.c_int16,
    b"q": ctypes.c_uint16,
    b"i": ctypes.c_int32,
    b"u": c_uint32,
    b"x": ctypes.c_int64,
    b"t": c_uint64,
    b"d": ctypes.c_double,
}
_TEXTS = (b"s", b"o", b"g")
_NONE = b"av"
"""How None travels (wire.py)."""
_OF_THE_BUS = "org.freedesktop.DBus.Error."
_NOT_THERE = ("ServiceUnknown", "NameHasNoOwner", "AccessDenied")
"""Errors of the bus for a name: the daemon did not see the call."""
_NOT_KNOWN = "UnknownMethod"
"""The daemon's own, for a method or a signature that it does not have."""


class _NotThere(Unreachable):
    """Nobody has the name, or the bus lets nobody of this user through to it."""


def call(member: str, signature: str = "", arguments: Sequence[Any] = ()) -> Any:
    """One call to the daemon; raises its error, or Unreachable where there is none."""
    try:
        library = _library()
    except (OSError, AttributeError) as error:
        raise Unreachable(
            f"{_NAME} of systemd cannot be used, and infertuned is asked through it: {error}"
        ) from None
    bus = c_void_p()
    try:
        library.sd_bus_open_system(byref(bus))
    except OSError as error:
        raise Unreachable("there is no system bus") from error
    connection = Connection(library, bus)
    try:
        if os.geteuid() == 0:
            try:
                return _answer(connection, ROOT_NAME, member, signature, arguments)
            except _NotThere:
                pass  # an older daemon, or the root of a container
        return _answer(connection, BUS_NAME, member, signature, arguments)
    except OSError as error:
        raise Unreachable("the daemon does not answer") from error
    finally:
        connection.close()


def _answer(
    connection: Connection, name: str, member: str, signature: str, arguments: Sequence[Any]
) -> Any:
    daemon = (name, OBJECT_PATH, INTERFACE, member)
    try:
        values = connection.ask(daemon, signature, arguments, interactive=True)
    except Refused as refused:
        if refused.name == f"{_OF_THE_BUS}{_NOT_KNOWN}":
            raise Unreachable(
                f"the infertuned that runs is not of this version: it does not know {member}",
                hint="systemctl reload infertune replaces it, and keeps what is applied",
            ) from None
        raise _error(refused.name, refused.text) from None
    return values[0] if values else None


class Refused(Exception):
    """The answer is an error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name
        self.text = text


class Connection:
    """To a bus, or to one program that answers there itself."""

    def __init__(self, library: Any, bus: c_void_p) -> None:
        self._library = library
        self._bus = bus

    def ask(
        self,
        whom: tuple[str, str, str, str],
        signature: str,
        arguments: Sequence[Any],
        *,
        interactive: bool = False,
        timeout_s: float = _TIMEOUT_S,
    ) -> list[Any]:
        """The answer to a call of (name, path, interface, member).  Raises Refused or OSError."""
        library, question, answer = self._library, c_void_p(), c_void_p()
        try:
            library.sd_bus_message_new_method_call(
                self._bus, byref(question), *map(str.encode, whom)
            )
            library.sd_bus_message_set_auto_start(question, 0)
            library.sd_bus_message_set_allow_interactive_authorization(question, interactive)
            for kind, value in zip(_types(signature), arguments, strict=True):
                _write(library, question, kind, value)
            _ask(library, self._bus, question, answer, timeout_s)
            refused = library.sd_bus_message_get_error(answer)
            if refused:
                raise Refused(*map(_text, (refused.contents.name, refused.contents.message)))
            return _Reader(library, answer).values()
        finally:
            library.sd_bus_message_unref(answer)
            library.sd_bus_message_unref(question)

    def close(self) -> None:
        self._library.sd_bus_flush_close_unref(self._bus)


def peer(address: str) -> Connection:
    """A connection to one program, with no bus between.  Raises OSError or AttributeError."""
    library, bus = _library(), c_void_p()
    library.sd_bus_new(byref(bus))
    connection = Connection(library, bus)
    try:
        library.sd_bus_set_address(bus, address.encode())
        library.sd_bus_start(bus)
    except OSError:
        connection.close()
        raise
    return connection


def _library() -> Any:
    """libsystemd, ready to use.  Raises OSError or AttributeError where it is not as it must be."""
    library = ctypes.CDLL(_NAME)
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _result
    library.sd_bus_message_get_error.argtypes = (c_void_p,)
    library.sd_bus_message_get_error.restype = POINTER(_Error)
    for name in ("sd_bus_message_unref", "sd_bus_flush_close_unref"):
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p,), c_void_p
    return library


def _result(code: int) -> int:
    """What a function returned.  Raises OSError where that says it failed."""
    if code < 0:
        raise OSError(-code, "sd-bus")
    return code


def _ask(
    library: Any, bus: c_void_p, question: c_void_p, answer: c_void_p, timeout_s: float
) -> None:
    """Send a call and wait for its answer.  Raises OSError.

    Not sd_bus_call, which goes on waiting when somebody presses Ctrl-C.
    """
    cookie, replied = c_uint64(), c_uint64()
    library.sd_bus_send(bus, question, byref(cookie))
    give_up = time.monotonic() + timeout_s
    while True:
        if library.sd_bus_process(bus, byref(answer)) == 0:
            left = give_up - time.monotonic()
            if left <= 0:
                raise TimeoutError
            library.sd_bus_wait(bus, int(left * 1e6))
        elif answer:
            try:
                library.sd_bus_message_get_reply_cookie(answer, byref(replied))
            except OSError as error:  # a signal is the answer to nothing
                if error.errno != errno.ENODATA:
                    raise
            if replied.value == cookie.value:
                return
            library.sd_bus_message_unref(answer)
            answer.value = None


def _types(signature: str) -> list[str]:
    """The complete types that a signature is made of."""
    found = []
    while signature:
        length = len(signature) - len(signature.lstrip("a")) + 1
        if signature[length - 1] == "(":
            length = signature.index(")") + 1
        found.append(signature[:length])
        signature = signature[length:]
    return found


def _write(library: Any, message: c_void_p, kind: str, value: Any) -> None:
    """Append a value; one of type ``v`` is its own type and what is in it."""
    if kind == "s":
        library.sd_bus_message_append_basic(message, b"s", value.encode("utf-8", "replace"))
    elif number := _NUMBERS.get(kind.encode()):
        library.sd_bus_message_append_basic(message, kind.encode(), byref(number(value)))
    else:
        match kind[0]:
            case "a":
                own, inside = b"a", kind[1:]
                parts = [(inside, each) for each in value]
            case "v":
                own, inside = b"v", value[0]
                parts = [value]
            case "(":
                own, inside = b"r", kind[1:-1]
                parts = list(zip(_types(inside), value, strict=True))
            case _:
                raise ValueError(f"no call takes a {kind!r}")
        library.sd_bus_message_open_container(message, own, inside.encode())
        for each, part in parts:
            _write(library, message, each, part)
        library.sd_bus_message_close_container(message)


class _Reader:
    """Reads what is in a message: variants as what is in them, dictionaries as such."""

    def __init__(self, library: Any, message: c_void_p) -> None:
        self._library = library
        self._message = message
        # Made once: most of an answer's way was making these for each of its values.
        self._kind, self._inside, self._text = c_char(), c_char_p(), c_char_p()
        self._peek = (message, byref(self._kind), byref(self._inside))
        self._numbers = {kind: number() for kind, number in _NUMBERS.items()}

    def values(self) -> list[Any]:
        """Those that are left of what is open now."""
        found = []
        while self._library.sd_bus_message_peek_type(*self._peek):
            found.append(self._value(self._kind.value, self._inside.value))
        return found

    def _value(self, kind: bytes, inside: bytes | None) -> Any:
        library, message = self._library, self._message
        if kind in _TEXTS:
            library.sd_bus_message_read_basic(message, kind, byref(self._text))
            return _text(self._text.value)
        if kind in self._numbers:
            number = self._numbers[kind]
            library.sd_bus_message_read_basic(message, kind, byref(number))
            return bool(number.value) if kind == b"b" else number.value
        library.sd_bus_message_enter_container(message, kind, inside)
        values = self.values()
        library.sd_bus_message_exit_container(message)
        if kind == b"v":
            return None if inside == _NONE else values[0]
        return dict(values) if (inside or b"").startswith(b"{") and kind == b"a" else values


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


def _error(name: str, text: str) -> InfertuneError:
    if not name.startswith(f"{ERROR}."):
        kind = _NotThere if name.removeprefix(_OF_THE_BUS) in _NOT_THERE else Unreachable
        return kind(f"the daemon does not answer: {text or name}")
    message, _, hint = text.partition("\n")
    error = InfertuneError(message, hint=hint or None)
    error.exit_code = ERRORS.get(name.removeprefix(f"{ERROR}."), InfertuneError).exit_code
    return error
