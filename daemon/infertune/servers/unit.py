# SPDX-License-Identifier: Apache-2.0
"""The systemd directives that hold a server under its profile.  Pure.

The unit is a template (systemd/infertune-server@.service); what the profile asks for is a drop-in
of it, so ``systemctl cat`` shows all of it.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import TypeVar

from infertune.base.addresses import PRIVATE, is_every, is_loopback
from infertune.base.errors import UsageError
from infertune.base.records import dataclass, replace
from infertune.base.units import format_cpulist, parse_cpulist
from infertune.catalogue.launch_settings import (
    LAUNCH_SETTINGS,
    TUNABLES,
    join_tunables,
    with_tunables,
)
from infertune.host.models import shown_directory
from infertune.pools.promised import LOCK
from infertune.profiles.resolve import Desired, canonical
from infertune.servers.adopted import NO_LIMIT, Wanted
from infertune.servers.api_key import CREDENTIAL
from infertune.servers.declaration import Declaration, files

_T = TypeVar("_T")


def directives(desired: Desired) -> dict[str, str]:
    """[Service] directives for the profile's launch settings (systemd.resource-control(5))."""
    found: dict[str, str] = {}
    for name, setting in LAUNCH_SETTINGS.items():
        if setting.directive and name in desired.launch:
            value = desired.launch[name].canonical
            found[setting.directive] = _WORDS.get((setting.directive, value), value)
    if "OOMScoreAdjust" in found and int(found["OOMScoreAdjust"]) < 0:
        # systemd-oomd has its own idea of whom to end, and does not read oom_score_adj.
        found["ManagedOOMPreference"] = "avoid"
    if found.get("CPUSchedulingPolicy") in ("rr", "fifo"):
        found["CPUSchedulingPriority"] = "1"
    return found


def live_values(desired: Desired) -> dict[str, int | tuple[int, ...]]:
    """What systemd can change in a unit that runs, as its properties have it."""
    found: dict[str, int | tuple[int, ...]] = {}
    for name, setting in LAUNCH_SETTINGS.items():
        if not setting.live or not setting.directive or name not in desired.launch:
            continue
        value = desired.launch[name].canonical
        if setting.live == "ay":
            found[setting.directive] = cpu_mask(parse_cpulist(value))
        else:
            found[setting.directive] = NO_LIMIT if value == "max" else int(value)
    return found


def process_values(desired: Desired) -> dict[str, int]:
    """What processes that run can be given, by the name of the launch setting."""
    names = [name for name in PLACED if name in desired.launch]
    return {name: int(desired.launch[name].canonical) for name in names}


PLACED: Mapping[str, str] = {"oom_score_adj": "OOMScoreAdjust", "nice": "Nice"}
"""Launch settings that servers/placing.py gives to processes, and their directives."""


def cpu_mask(cpus: Iterable[int]) -> tuple[int, ...]:
    """CPUs as the bytes of a mask, the lowest first; none is an empty one."""
    mask = sum(1 << cpu for cpu in set(cpus))
    return tuple(mask.to_bytes((mask.bit_length() + 7) // 8, "little"))


def wanted(desired: Desired) -> Wanted:
    """What a profile gives a unit that infertune did not make."""
    return Wanted(
        desired.profile,
        desired.backend,
        live_values(desired),
        memory_min(desired),
        process_values(desired),
        directives(desired),
        with_tunables(canonical(desired.env), canonical(desired.launch)),
    )


def beside(wanted: Wanted, own: str) -> Wanted:
    """The same for a unit that has a GLIBC_TUNABLES of its own: nothing of that is lost."""
    if TUNABLES not in wanted.env:
        return wanted
    return replace(wanted, env={**wanted.env, TUNABLES: join_tunables(own, wanted.env[TUNABLES])})


_CONTROLLERS = {each.directive: each.controller for each in LAUNCH_SETTINGS.values()}
_NEED_RIGHTS = {"CPUSchedulingPolicy": ("rr", "fifo")}
_LOWERED = ("OOMScoreAdjust", "Nice")
_WITH_ANOTHER = {
    "CPUSchedulingPriority": "CPUSchedulingPolicy",
    "ManagedOOMPreference": "OOMScoreAdjust",
}


def of_a_user(
    wanted: Wanted, uid: int, delegated: Iterable[str] | None
) -> tuple[Wanted, dict[str, str]]:
    """What a user's manager can give of it, and why it cannot give the rest, by directive.

    ``delegated``: the controllers that it has been given; None where that is not known, as it does
    not run.  It may lower nothing that takes a privilege: systemd would not start the unit, or
    start it without.
    """
    why: dict[str, str] = {}
    for name, value in wanted.directives.items():
        controller = _CONTROLLERS.get(name)
        if delegated is not None and controller and controller not in delegated:
            why[name] = f"user@{uid}.service has no {controller}: Delegate= gives it"
        elif value in _NEED_RIGHTS.get(name, ()) or (name in _LOWERED and int(value) < 0):
            why[name] = (
                "only for what runs now: a user's manager may not lower it at the next start"
                if name in PLACED.values()
                else "a user's manager may not give it"
            )
    gone = {*why, *(name for name, other in _WITH_ANOTHER.items() if other in why)}

    def left(found: Mapping[str, _T]) -> dict[str, _T]:
        return {name: each for name, each in found.items() if name not in gone}

    return replace(
        wanted,
        values=left(wanted.values),
        directives=left(wanted.directives),
        memory_min=0 if "MemoryMin" in gone else wanted.memory_min,
    ), why


GATE = "ExecStartPre"
"""The directive of it; it comes after the unit's own steps, which may make room."""


def gate(name: str, admission: str, python: str) -> str:
    """The step before a start of an adopted unit: its user asks whether it fits (admit.py).

    Only ``refuse`` lets it fail.  Raises UsageError where the step could not run.
    """
    if in_a_home(python):
        raise UsageError(
            f"no unit can ask for admission: {python} lies in a home", hint="install it in /opt"
        )
    may_fail = "" if admission == "refuse" else "-"
    return f"{may_fail}{program(python)} -I -m infertune.admit {name}"


def foreign_drop_in(wanted: Wanted) -> str:
    """The drop-in of a unit that infertune did not make: how it runs, never what it runs."""
    lines = [f"# Written by infertuned: profile {wanted.profile}, backend {wanted.backend}."]
    lines += ["[Service]", *(f"{name}={value}" for name, value in wanted.directives.items())]
    for name, value in sorted(wanted.env.items()):
        lines.append(f"Environment={_quoted(f'{name}={value}')}")
    return "\n".join(lines) + "\n"


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
    if declaration.command and in_a_home(declaration.command[0]):
        raise UsageError(
            f"server '{declaration.name}': {declaration.command[0]}: a unit sees no homes",
            hint="install it in /opt",
        )
    for what, path in files(declaration, desired).items():
        refuse_a_home(f"server '{declaration.name}': {what}", path)
    if names := " ".join(groups):
        found["SupplementaryGroups"] = names
    hidden = filter(in_a_home, files(declaration, desired).values())
    # The directory, for the other files of a split model.
    if directories := dict.fromkeys(map(shown_directory, hidden)):
        found["BindReadOnlyPaths"] = " ".join(_quoted(each, '\\":') for each in directories)
    return {**found, **_door(declaration)}


def _door(declaration: Declaration) -> dict[str, str]:
    """Directives for what other machines reach: the template lets in nobody but this one."""
    found = {}
    if not is_loopback(declaration.host):
        # This machine's programs come to an address of its own from that address.
        itself = () if is_every(declaration.host) else (declaration.host,)
        found["IPAddressAllow"] = " ".join([*itself, *(declaration.clients or PRIVATE)])
    if declaration.api_key_file is not None:
        found["LoadCredential"] = f"{CREDENTIAL}:{declaration.api_key_file}"
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


def _quoted(text: str, special: str = '\\"') -> str:
    """One word of a directive, for systemd (systemd.syntax(7))."""
    for each in special:
        text = text.replace(each, f"\\{each}")
    return '"' + text.replace("%", "%%") + '"'


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
    # Opened by systemd as root: the launcher waits for its turn with it (budget/admission.py).
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
    program, *arguments = argv
    # In these systemd puts variables; a doubled sign is the sign (systemd.service(5)).
    arguments = [each.replace("$", "$$") for each in arguments]
    return shlex.join([*words, "--", program, *arguments])
