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
from dataclasses import dataclass
from fnmatch import fnmatchcase

from infertune.errors import describe
from infertune.knobs.boot import parameters
from infertune.root import Root
from infertune.units import printable_line

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
COMMAND_LINE = "/proc/cmdline"


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


@dataclass(frozen=True, slots=True)
class Sources:
    """Every assignment in the order in which they count, the last one strongest."""

    assignments: tuple[Assignment, ...]
    problems: tuple[str, ...]
    """What could not be read, one sentence each."""
    last: Mapping[tuple[str, str], Assignment]
    """The one that counts, by module and parameter."""

    def winner(self, module: str, name: str) -> Assignment | None:
        """Who has the last word on a parameter."""
        return self.last.get((module, name))


def read_sources(root: Root) -> Sources:
    """Never raises: what cannot be read is a problem in the answer."""
    problems: list[str] = []
    found: list[Assignment] = []
    for path in config_files(root):
        try:
            data, _ = root.read_file(path, MAX_FILE + 1)
        except OSError as error:
            if error.errno is not None and not root.exists(path):
                continue  # a dangling link is what kmod passes over, too
            linked = _linked(root, path) if os.path.islink(root.at(path)) else None
            if linked is None:
                problems.append(f"{path} is not read: {describe(error).partition(' at ')[0]}")
                continue
            data = linked
        if len(data) > MAX_FILE:
            problems.append(f"{path} is not read: it is larger than {MAX_FILE // 1024} KiB")
        elif b"\0" in data:
            problems.append(f"{path} is not read: it is no text")
        else:
            found += options_of(path, data, problems)
    try:
        raw = root.read_value(COMMAND_LINE, 64 * 1024)
    except OSError as error:
        problems.append(f"{COMMAND_LINE} is not read: {describe(error).partition(' at ')[0]}")
        raw = b""
    if not _is_text(raw):
        problems.append(f"{COMMAND_LINE} holds bytes that are not UTF-8; they match nothing")
    for name, value in parameters(raw.decode("utf-8", "replace").replace("\0", " ")):
        module, dot, parameter = name.partition(".")
        if dot:
            found.append(Assignment(_plain(module), _plain(parameter), value, COMMAND_LINE))
        else:
            found.append(Assignment("", name, value, COMMAND_LINE))
    last = {(each.module, each.name): each for each in found}
    return Sources(tuple(found), tuple(problems), last)


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


@dataclass(frozen=True, slots=True)
class Finding:
    """A parameter that does not do what somebody meant."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """One parameter that is known to be wrong."""

    module: str
    name: str
    value: str
    """A shell pattern."""
    what: str
    fix: str
    nameless: bool = False
    """Whether the kernel has no such parameter at all."""


_SIZE = "set ttm.pages_limit instead (pages of 4 KiB: GiB x 262144)"

MISTAKES: tuple[Mistake, ...] = (
    # The kernel itself warns since 6.14: "Configuring gttsize via module parameter is deprecated".
    Mistake("amdgpu", "gttsize", "*", "amdgpu.gttsize is deprecated", _SIZE),
    *(
        Mistake(module, name, "*", f"{module} has no parameter {name}: it is ignored", _SIZE, True)
        for module, name in (
            ("amdgpu", "gtt_size"),
            ("amdgpu", "ggtsize"),
            ("amdgpu", "gtt"),
            ("ttm", "page_limit"),
            ("ttm", "pages_max"),
        )
    ),
    Mistake(
        "",
        "amd_iommu",
        "pt",
        "amd_iommu=pt is no value of this parameter and is ignored",
        "remove it; 'iommu=pt' would be the spelling, and gives inference nothing",
    ),
    Mistake(
        "",
        "iommu",
        "pt",
        "iommu=pt gave inference nothing in published A/B runs",
        "leave it out, unless a device that is passed through needs it",
    ),
    Mistake("", "pages_limit", "*", "pages_limit without its module is ignored", _SIZE),
)


_KNOWN = {(mistake.module, mistake.name): mistake for mistake in MISTAKES}


def mistake_in(module: str, name: str, value: str) -> Mistake | None:
    """What is known to be wrong about one parameter."""
    mistake = _KNOWN.get((module, name))
    return mistake if mistake and fnmatchcase(value, mistake.value) else None


def findings(sources: Sources) -> tuple[Finding, ...]:
    """Deprecated and misspelt parameters, and places that disagree."""
    found = [
        Finding(f"{_shown(each)}: {mistake.what}", mistake.fix)
        for each in sources.assignments
        if (mistake := mistake_in(each.module, each.name, each.value))
    ]
    by_name: dict[tuple[str, str], list[Assignment]] = {}
    for each in sources.assignments:
        if each.module in ("ttm", "amdttm", "amd_ttm", "amdgpu") or each.name in _ONCE:
            by_name.setdefault((each.module, each.name), []).append(each)
    for same in by_name.values():
        last, others = same[-1], [a for a in same[:-1] if a.value != same[-1].value]
        if others:
            said = ", ".join(map(_shown, others[:3])) + (" and others" if others[3:] else "")
            found.append(Finding(f"{said} is overruled by {_shown(last)}", "keep one of them"))
    return tuple(found)


_ONCE = ("amd_iommu", "transparent_hugepage", "isolcpus")


def _shown(each: Assignment) -> str:
    name = f"{each.module}.{each.name}" if each.module else each.name
    text = f"{name}={each.value}" if each.value else name
    return f"{printable_line(text, 80)} ({each.source})"
