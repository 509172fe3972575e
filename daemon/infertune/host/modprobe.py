# SPDX-License-Identifier: Apache-2.0
"""Who sets what at boot: modprobe.d and the kernel command line, as kmod reads them.

modprobe(8) takes every ``*.conf`` of its directories in the order of their names, one of /etc
hiding its namesake elsewhere, and then the command line (``module.parameter=value``); the
kernel takes the last value of a parameter.  So a file that sorts later wins over an earlier one,
and the command line over all of them (libkmod-config.c, kmod_config_new).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from infertune.base.errors import describe
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.system import COMMAND_LINE, command_line_bytes, parameters

DIRECTORIES = (
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
)
"""Of equal names the first one counts (modprobe.d(5))."""
MAX_FILE = 1024 * 1024
"""Bytes of one file; the largest of a distribution has about 10 KiB."""
MAX_FILES = 1000


@dataclass(frozen=True, slots=True)
class Assignment:
    """One value of a module parameter or, with an empty module, of the kernel itself."""

    module: str
    name: str
    value: str
    source: str
    """``file:line``, or /proc/cmdline."""

    @property
    def file(self) -> str:
        return self.source.rpartition(":")[0] or self.source

    @property
    def origin(self) -> str:
        """Where it stands, in words."""
        return "the kernel command line" if self.file == COMMAND_LINE else self.file

    def __str__(self) -> str:
        name = f"{self.module}.{self.name}" if self.module else self.name
        return f"{name}={self.value}" if self.value else name


@dataclass(frozen=True, slots=True)
class Sources:
    """Every assignment in the order in which they count, the last one strongest."""

    assignments: tuple[Assignment, ...]
    problems: tuple[str, ...]
    """What could not be read, one sentence each."""
    last: Mapping[tuple[str, str], Assignment]
    """The one that counts, by module and parameter."""
    files: tuple[str, ...] = ()
    """The files that were read."""

    def winner(self, module: str, name: str) -> Assignment | None:
        """Who has the last word on a parameter."""
        return self.last.get((module, name))


def read_sources(root: Root) -> Sources:
    """Never raises: what cannot be read is a problem in the answer."""
    problems: list[str] = []
    found: list[Assignment] = []
    files: list[str] = []
    for path in config_files(root)[:MAX_FILES]:
        data = _config(root, path, problems)
        if data is not None:
            files.append(path)
            found += options_of(path, data, problems)
    found += _on_command_line(root, problems)
    last = {(each.module, each.name): each for each in found}
    return Sources(tuple(found), tuple(problems), last, tuple(files))


def _config(root: Root, path: str, problems: list[str]) -> bytes | None:
    try:
        data, _ = root.read_file(path, MAX_FILE + 1)
    except OSError as error:
        if error.errno is not None and not root.exists(path):
            return None  # a dangling link is what kmod passes over, too
        linked = _linked(root, path) if os.path.islink(root.at(path)) else None
        if linked is None:
            problems.append(f"{path} is not read: {describe(error).partition(' at ')[0]}")
            return None
        data = linked
    if len(data) > MAX_FILE:
        problems.append(f"{path} is not read: it is larger than {MAX_FILE // 1024} KiB")
        return None
    if b"\0" in data:
        problems.append(f"{path} is not read: it is not a text file")
        return None
    return data


def _on_command_line(root: Root, problems: list[str]) -> Iterable[Assignment]:
    try:
        raw = command_line_bytes(root)
    except OSError as error:
        problems.append(f"{COMMAND_LINE} is not read: {describe(error).partition(' at ')[0]}")
        return
    if not _is_text(raw):
        problems.append(f"{COMMAND_LINE} holds bytes that are not UTF-8; they match nothing")
    for name, value in parameters(raw.decode("utf-8", "replace").replace("\0", " ")):
        module, dot, parameter = name.partition(".")
        if dot:
            yield Assignment(_plain(module), _plain(parameter), value, COMMAND_LINE)
        else:
            yield Assignment("", name, value, COMMAND_LINE)


def _linked(root: Root, path: str) -> bytes | None:
    """A link of a distribution to a plain file of the same machine."""
    try:
        return root.read_file(root.real(path), MAX_FILE + 1)[0]
    except (OSError, ValueError):
        return None


def config_files(root: Root) -> list[str]:
    """Files of modprobe.d that count, in the order of their names."""
    first: dict[str, str] = {}
    for directory in DIRECTORIES:
        for name in root.names(directory):
            if name.endswith(".conf"):
                first.setdefault(name, f"{directory}/{name}")
    return [first[name] for name in sorted(first)]


def options_of(path: str, data: bytes, problems: list[str]) -> Iterable[Assignment]:
    """The ``options`` lines of one file; what is odd about it is added to ``problems``."""
    if not _is_text(data):
        problems.append(f"{path} is not UTF-8 everywhere; lines that are not match nothing")
    if b"\r" in data:
        # kmod splits at spaces and newlines only: the carriage return becomes part of the value.
        problems.append(f"{path} has Windows line ends, which the kernel takes for part of a value")
    lines = data.decode("utf-8", "replace").split("\n")
    number = 0
    while number < len(lines):
        at, text = number + 1, lines[number]
        while text.endswith("\\") and number + 1 < len(lines):
            number += 1
            text = text[:-1] + lines[number]
        number += 1
        command, *words = re.split("[\t ]+", text.rstrip("\t "))
        if command != "options" or not words:
            continue
        for word in words[1:]:
            name, _, value = word.partition("=")
            source = f"{path}:{at}"
            yield Assignment(_plain(words[0]), _plain(name), value.strip('"'), source)


def _plain(name: str) -> str:
    """Modules and parameters are the same with a hyphen and with an underscore."""
    return name.replace("-", "_")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
