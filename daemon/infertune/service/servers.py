# SPDX-License-Identifier: Apache-2.0
"""Declared servers, and the systemd directives that hold one under its profile.  Pure.

A declaration is a small file that only root can write.  The unit is a template
(systemd/infertune-server@.service); what the profile asks for is a drop-in of
it, so ``systemctl cat`` shows all of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping

from infertune.backends import BACKENDS
from infertune.errors import ProfileError, UsageError
from infertune.machine import Machine
from infertune.pools.promised import LOCK
from infertune.profile import NAME
from infertune.records import dataclass
from infertune.resolve import Desired
from infertune.server_settings import (
    FilePath,
    check_together,
    files_of,
    parse_server_setting,
)
from infertune.units import format_cpulist, parse_cpulist

DECLARED = "/etc/infertune/servers.d"
"""Servers that start with the daemon."""
TRANSIENT = "/run/infertune/servers.d"
"""Servers of this boot: ``infertune serve``."""

SLICE = "infertune.slice"


@dataclass(frozen=True, slots=True)
class Declaration:
    """One server: what it serves, under which profile, where."""

    name: str
    profile: str
    model: str | None
    """Path of a GGUF file; None for the small model of the extra ``embedded``."""
    port: int
    backend: str = "auto"
    settings: Mapping[str, str | int | bool] | None = None
    """Server settings of its own, over the profile's: canonical names of server_settings.py."""
    force: bool = False
    """Start it even where it does not fit."""

    @property
    def unit(self) -> str:
        return f"infertune-server@{self.name}.service"


_KINDS: dict[str, type | tuple[type, ...]] = {
    "profile": str,
    "model": str,
    "port": int,
    "backend": str,
    "settings": dict,
    "force": bool,
}


def parse_declaration(
    name: str, text: str, file: str, default_profile: Callable[[], str | None] = lambda: None
) -> Declaration:
    """Read a declaration; without a profile it has the daemon's.  Raises ProfileError."""

    def wrong(what: str) -> ProfileError:
        return ProfileError(what, file=file)

    if not NAME.fullmatch(name):
        raise wrong(f"'{name}' is not a server name")
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, 5000 brackets
        raise wrong(f"not valid TOML: {error}") from None
    for key, value in found.items():
        if key not in _KINDS:
            raise wrong(f"unknown key '{key}'; known: {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and key != "force"):
            raise wrong(f"{key} is not a {_KINDS[key]}")
    if "profile" not in found and (default := default_profile()) is not None:
        found["profile"] = default
    if "profile" not in found:
        raise wrong("profile is missing, and infertuned.toml names none")
    if "port" not in found:
        raise wrong("port is missing")
    if not NAME.fullmatch(found["profile"]):
        raise wrong("profile is not a profile name")
    if not 1024 <= found["port"] <= 65535:
        raise wrong("port must be 1024 to 65535")
    model = found.get("model")
    if found.get("backend", "auto") not in ("auto", *BACKENDS):
        raise wrong(f"backend is one of auto, {', '.join(BACKENDS)}")
    settings = found.get("settings", {})
    try:
        if model is not None:
            FilePath().parse(model)
    except ValueError as error:
        raise wrong(f"model: {error}") from None
    try:
        for key, value in settings.items():
            parse_server_setting(key, value)
    except ValueError as error:
        raise wrong(str(error)) from None
    return Declaration(
        name,
        found["profile"],
        model,
        found["port"],
        found.get("backend", "auto"),
        settings,
        found.get("force", False),
    )


def own_settings(declaration: Declaration, machine: Machine | None = None) -> dict[str, str]:
    """Canonical settings of the declaration; without a machine its shares stay as they are.

    Raises UsageError where one is not possible on the machine.
    """
    given = (declaration.settings or {}).items()
    try:
        return {name: parse_server_setting(name, value, machine) for name, value in given}
    except ValueError as error:
        raise UsageError(f"server '{declaration.name}': {error}") from None


def server_settings(
    declaration: Declaration, desired: Desired, machine: Machine | None = None
) -> dict[str, str]:
    """Canonical settings of a server: the profile's, over them its own.

    Raises UsageError where one of them needs another that is not there.
    """
    found = {name: setting.canonical for name, setting in desired.server.items()}
    found |= own_settings(declaration, machine)
    try:
        check_together(found)
    except ValueError as error:
        raise UsageError(f"server '{declaration.name}': {error}") from None
    return found


def files(declaration: Declaration, desired: Desired) -> dict[str, str]:
    """The files that a server reads, by what names them."""
    model = {"model": declaration.model} if declaration.model is not None else {}
    return {**model, **files_of(server_settings(declaration, desired))}


def declaration_text(declaration: Declaration) -> str:
    """The file that ``parse_declaration`` reads back."""
    lines = [f"profile = {json.dumps(declaration.profile)}", f"port = {declaration.port}"]
    if declaration.model is not None:
        lines.append(f"model = {json.dumps(declaration.model, ensure_ascii=False)}")
    lines.append(f"backend = {json.dumps(declaration.backend)}")
    if declaration.force:
        lines.append("force = true")
    if declaration.settings:
        lines.append("[settings]")
        own = declaration.settings.items()
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in own]
    return "\n".join(lines) + "\n"


def directives(desired: Desired) -> dict[str, str]:
    """[Service] directives for the profile's launch settings (systemd.resource-control(5))."""
    wanted = {name: setting.canonical for name, setting in desired.launch.items()}
    found: dict[str, str] = {}
    for name, directive in _DIRECTIVES.items():
        if name in wanted:
            value = wanted[name]
            found[directive] = _WORDS.get((directive, value), value)
    if "OOMScoreAdjust" in found and int(found["OOMScoreAdjust"]) < 0:
        # systemd-oomd has its own idea of whom to end, and does not read oom_score_adj.
        found["ManagedOOMPreference"] = "avoid"
    if found.get("CPUSchedulingPolicy") in ("rr", "fifo"):
        found["CPUSchedulingPriority"] = "1"
    return found


_DIRECTIVES = {
    "memory_min": "MemoryMin",
    "memory_swap_max": "MemorySwapMax",
    "cpus": "AllowedCPUs",
    "cpu_weight": "CPUWeight",
    "memlock": "LimitMEMLOCK",
    "oom_score_adj": "OOMScoreAdjust",
    "nice": "Nice",
    "scheduling_policy": "CPUSchedulingPolicy",
}
NOT_DIRECTIVES = ("cpus_partition",)
"""Launch settings that systemd has no directive for; service/partition.py carries them out."""

_WORDS = {
    ("LimitMEMLOCK", "unlimited"): "infinity",
    ("MemorySwapMax", "max"): "infinity",
}

_HOMES = ("/home/", "/root/", "/run/user/", "/var/home/", "/var/roothome/")
"""What ProtectHome= hides (systemd.exec(5))."""


def access(declaration: Declaration, desired: Desired, groups: Iterable[str]) -> dict[str, str]:
    """[Service] directives that let the server reach its files and the GPU's render nodes.

    Raises UsageError where it would see all of a home.
    """
    found = {}
    for what, path in files(declaration, desired).items():
        refuse_a_home(f"server '{declaration.name}': {what}", path)
    if names := " ".join(groups):
        found["SupplementaryGroups"] = names
    hidden = filter(in_a_home, files(declaration, desired).values())
    # The directory, for the other files of a split model.
    if directories := dict.fromkeys(path.rpartition("/")[0] for path in hidden):
        found["BindReadOnlyPaths"] = " ".join(map(_escaped, directories))
    return found


def in_a_home(path: str) -> bool:
    """Whether ProtectHome= hides a path."""
    return path.startswith(_HOMES)


def refuse_a_home(what: str, path: str) -> None:
    """Raise UsageError for a file that lies in somebody's home itself: a unit sees directories."""
    directory = path.rpartition("/")[0]
    if is_a_home(directory):
        raise UsageError(
            f"{what} {path}: the server would be shown all of {directory}",
            hint="put the file in a directory of its own",
        )


def is_a_home(directory: str) -> bool:
    """Whether a directory is somebody's home, or the one of all homes."""
    parent = directory.rpartition("/")[0]
    return f"{directory}/" in _HOMES or f"{parent}/" in ("/home/", "/run/user/", "/var/home/")


def _escaped(path: str) -> str:
    for special in ("\\", '"', ":"):
        path = path.replace(special, f"\\{special}")
    return '"' + path.replace("%", "%%") + '"'


def program(path: str) -> str:
    """A program's path as the first word of ExecStart= (systemd.service(5)).

    Raises UsageError for one that systemd does not take: it ignores the line where the path has
    quotes, backslashes or control characters, and fills in variables.
    """
    if not path.isprintable() or set(path) & set("\"'\\$"):
        raise UsageError(f"{path!r} cannot be the program of a unit: install to a plainer path")
    path = path.replace("%", "%%")
    return f'"{path}"' if " " in path else path


def partition(desired: Desired) -> str | None:
    """``root`` or ``isolated`` where the profile wants the server's CPUs for it alone."""
    setting = desired.launch.get("cpus_partition")
    return setting.canonical if setting and setting.canonical != "member" else None


def drop_in(
    declaration: Declaration, desired: Desired, *, python: str, groups: Iterable[str] = ()
) -> str:
    """The drop-in of the server's unit.  ``groups``: those of the render nodes that exist here."""
    lines = [f"# Written by infertuned: profile {desired.profile}, backend {desired.backend}."]
    lines += ["[Unit]", f"Description=Model server {declaration.name} (infertune)", "[Service]"]
    every = {**directives(desired), **access(declaration, desired, groups)}
    # Opened by systemd as root: the launcher waits for its turn with it (admission.py).
    lines.append(f"StandardInput=file:{LOCK}")
    lines += [f"{name}={value}" for name, value in every.items()]
    if kind := partition(desired):
        lines.append(f"ExecStartPre=+{program(python)} -I -m infertune.service.partition {kind}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the slice must be granted: a group gets no more than those above it."""

    memory_min: int
    """Bytes."""
    cpus: frozenset[int]
    """CPUs of the servers that want theirs for them alone; empty where none does."""


def needs(servers: Iterable[Desired]) -> Needs:
    """What servers are promised together."""
    servers = list(servers)
    alone = [each for each in servers if partition(each) and "cpus" in each.launch]
    cpus = (parse_cpulist(each.launch["cpus"].canonical) for each in alone)
    return Needs(sum(map(memory_min, servers)), frozenset().union(*cpus))


def promised(text: str) -> Needs:
    """What a server's drop-in promises it, whatever its declaration says by now."""
    found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    cpus: frozenset[int] = frozenset()
    if "infertune.service.partition" in found.get("ExecStartPre", ""):
        with contextlib.suppress(ValueError):  # edited by hand
            cpus = parse_cpulist(found.get("AllowedCPUs", ""))
    return Needs(_bytes(found.get("MemoryMin", "0")), cpus)


def _bytes(text: str) -> int:
    """A size as we and people write it for systemd (``4G``); 0 for anything else."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.strip())
    return int(match[1]) * 1024 ** " KMGT".index(match[2] or " ") if match else 0


def together(needed: Iterable[Needs]) -> Needs:
    """The sum."""
    needed = list(needed)
    cpus = frozenset().union(*(each.cpus for each in needed))
    return Needs(sum(each.memory_min for each in needed), cpus)


def slice_drop_in(wanted: Needs) -> str:
    """The drop-in of the slice."""
    lines = ["# Written by infertuned: what its servers need together.", "[Slice]"]
    lines.append(f"MemoryMin={wanted.memory_min}")
    if wanted.cpus:
        lines.append(f"AllowedCPUs={format_cpulist(wanted.cpus)}")
    return "\n".join(lines) + "\n"


def memory_min(desired: Desired) -> int:
    """Bytes of protected memory the profile asks for."""
    setting = desired.launch.get("memory_min")
    return int(setting.canonical) if setting else 0


_NOT_TRANSIENT = ("ExecStart", "Restart", "RestartSec", "Type")


def systemd_run_line(
    declaration: Declaration,
    desired: Desired,
    argv: Iterable[str],
    env: Mapping[str, str],
    template: str,
    groups: Iterable[str] = (),
) -> str:
    """The same server as one ``systemd-run`` command, for people who want to see or keep it.

    ``template`` is the text of the template unit, whose directives are the sandbox.
    """
    words = ["systemd-run", f"--unit=infertune-server-{declaration.name}"]
    section = template.partition("[Service]\n")[2].partition("\n[")[0]
    for line in section.splitlines():
        name, _, value = line.partition("=")
        if line and not line.startswith("#") and name not in _NOT_TRANSIENT:
            # systemd-run hands directives over as they are: specifiers are ours to fill in.
            value = value.replace("%i", declaration.name).replace("%S", "/var/lib")
            words.append(f"--property={name}={value}")
    every = {**directives(desired), **access(declaration, desired, groups)}
    for name, value in every.items():
        words.append(f"--property={name}={value}")
    words += [f"--setenv={name}={value}" for name, value in sorted(env.items())]
    return shlex.join([*words, "--", *argv])
