# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, each with the exit code a script can rely on.

A user sees one line (``message``) and, where there is one, a second that says
what would be right (``hint``).  Tracebacks are for ``--debug``.

Every verb has this module, so it imports next to nothing.
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Exit:
    """Exit codes of the ``infertune`` command (documented in CONTRIBUTING.md)."""

    DONE = 0
    DIFFERS = 1
    USAGE = 2
    FAILED = 3
    NOT_PERMITTED = 4
    UNREACHABLE = 5


class InfertuneError(Exception):
    """Base of every error a user may see."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(InfertuneError):
    """The command line asks for something that does not exist or makes no sense."""

    exit_code = Exit.USAGE


class FileError(InfertuneError):
    """A file that people write is not valid.  The message starts with ``file:line:``, or ``file:``
    where no line is known."""

    exit_code = Exit.USAGE

    def __init__(
        self, message: str, *, file: str, line: int | None = None, hint: str | None = None
    ) -> None:
        where = f"{file}:{line}" if line is not None else file
        super().__init__(f"{where}: {message}", hint=hint)
        self.file = file
        self.line = line


class ProfileError(FileError):
    """A profile is not valid."""


class DeclarationError(FileError):
    """The declaration of a server or a probe, or the daemon's settings, are not valid."""


class SnapshotError(InfertuneError):
    """A snapshot file is damaged or not a snapshot.  The message names file and line."""

    exit_code = Exit.USAGE


class Failed(InfertuneError):
    """Something was tried, did not work, and was rolled back."""

    exit_code = Exit.FAILED


class Busy(InfertuneError):
    """Another infertune has the machine, or too many wait already; nothing was touched."""

    exit_code = Exit.FAILED


class NotPermitted(InfertuneError):
    """The caller may not do this; nothing was touched."""

    exit_code = Exit.NOT_PERMITTED


class Unreachable(InfertuneError):
    """infertuned is not running, or not on this bus."""

    exit_code = Exit.UNREACHABLE


class BpfError(InfertuneError):
    """A BPF program cannot be had on this machine, and why."""


class LibbpfMissing(BpfError):
    """libbpf.so.1 of the distribution is not installed, or too old."""


class ObjectMissing(BpfError):
    """The compiled programs are not there, or not what they should be."""


class BtfMissing(BpfError):
    """The kernel, or a module, does not tell its types."""


class LockedDown(BpfError):
    """Kernel lockdown forbids what the program does."""


class CapabilityMissing(BpfError):
    """The process may not load BPF programs."""

    exit_code = Exit.NOT_PERMITTED


class TracepointMissing(BpfError):
    """This kernel, or what is loaded of it now, has no such tracepoint."""


class FieldMissing(BpfError):
    """This kernel's structures lack a field that a program reads."""


class LoadRejected(BpfError):
    """The kernel refused a program.  The message ends with the last lines of its log."""


def errno_name(error: OSError) -> str:
    """``EBUSY`` for an OSError, or its text where the number has no name."""
    return errno.errorcode.get(error.errno or 0, str(error))


def describe(error: OSError) -> str:
    """``EBUSY (Device or resource busy) at /sys/…``."""
    text = error.strerror or "unknown error"
    where = f" at {error.filename}" if error.filename else ""
    return f"{errno_name(error)} ({text}){where}"


def cause(error: BaseException) -> str:
    """What to say of an error that ended some work, in one phrase."""
    if isinstance(error, Failed):
        return error.message
    return describe(error) if isinstance(error, OSError) else "interrupted"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one that is nearest, if any is."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
