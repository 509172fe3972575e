# SPDX-License-Identifier: Apache-2.0
"""What no file of the machine tells, or none of a snapshot: the caller's variables, the words of
the server, what became of staged boot settings.

A snapshot takes it along as one file of JSON, so that a replay has it too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, get_args

from infertune.base.errors import Failed, InfertuneError
from infertune.base.records import asdict, dataclass
from infertune.base.root import Root
from infertune.boot.state import State, read_status
from infertune.catalogue.server_settings import parse_help
from infertune.host.gpu import kfd_client_count
from infertune.host.machine import Machine, read_machine
from infertune.host.nodes import Node, gpu_nodes
from infertune.host.redaction import SHOWN_ENVIRONMENT, program_label
from infertune.host.unknown import Unknown, known
from infertune.launch.binary import (
    BACKENDS,
    Backend,
    ask_help,
    ask_version,
    find_server,
    linked_backends,
    others_may_write,
)
from infertune.launch.system import kernel_journal

FILE = "/run/infertune/surroundings"
"""Where a snapshot keeps them; a live machine has no such file."""

_VERSION_S = 1.0
_JOURNAL_S = 0.5


_HELP_S = 2.0

NO_HELP = Unknown("which flags this llama-server takes is not known")
_GONE = "argument has been removed"
"""common/arg.cpp keeps an entry for a flag that it refuses."""


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """The llama-server the caller would start."""

    version: str
    """Its own words: ``0.7.0 (build 11669, commit Debian)``."""
    backends: tuple[Backend, ...]
    places: tuple[str, ...] = ()
    """Paths of the program, as ``program_label`` shows them; empty where they are not known."""
    flags: frozenset[str] | Unknown = NO_HELP
    """Flags its own --help offers; those it names only to say that they are gone are left out."""
    variables: frozenset[str] | Unknown = NO_HELP
    """Variables that stand for these flags."""

    @property
    def build(self) -> int | None:
        """Number of the build; None where the program was built without one (0 or 1)."""
        found = re.search(r"\bbuild (\d{1,9})\b|^b?(\d{1,9})\b(?!\.)", self.version)
        number = int(found[1] or found[2]) if found else 0
        return number if number > 1 else None


@dataclass(frozen=True, slots=True)
class Staged:
    """What has become of boot settings that infertune staged (``infertune boot status``)."""

    state: State
    said: tuple[str, ...]
    """Why it is so: one phrase each."""


_NOT_SAID = Unknown("the snapshot does not say")


@dataclass(frozen=True, slots=True)
class Surroundings:
    environment: Mapping[str, str] | Unknown
    """Variables of SHOWN_ENVIRONMENT the caller has."""
    server: LlamaServer | Unknown | None
    """None where there is no llama-server on the caller's search path."""
    devices: Mapping[str, Node] | Unknown
    """The GPU's device nodes by path: whether the caller may use them, and whose they are."""
    journal: tuple[str, ...] | None = None
    """The kernel's messages, where the journal gives them and /dev/kmsg does not."""
    staged: Staged | Unknown = _NOT_SAID
    """Not from a file of the snapshot: the record holds other files, and ids of boots."""
    compute_clients: int | Unknown = _NOT_SAID
    """Processes that have ROCm open.  Not from a file: it would hold their numbers."""

    def to_file(self) -> bytes:
        """For a snapshot; what is unknown here stays unknown there."""
        server: Any = self.server
        if isinstance(server, Unknown):
            server = {"unknown": server.why}
        elif server is not None:
            server = {
                "version": server.version,
                "backends": server.backends,
                "places": server.places,
                "flags": _sorted(server.flags),
                "variables": _sorted(server.variables),
            }
        document = {
            "environment": _plain(self.environment),
            "server": server,
            "devices": None if isinstance(self.devices, Unknown) else _nodes_to_file(self.devices),
            "staged": None if isinstance(self.staged, Unknown) else asdict(self.staged),
            "compute_clients": known(self.compute_clients),
        }
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _sorted(names: frozenset[str] | Unknown) -> list[str] | None:
    return None if isinstance(names, Unknown) else sorted(names)


def _plain(fact: Mapping[str, Any] | Unknown) -> dict[str, Any] | None:
    return None if isinstance(fact, Unknown) else dict(fact)


def _nodes_to_file(nodes: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
    def mode(node: Node) -> str | None:
        return None if node.mode is None else f"{node.mode:04o}"

    return {path: asdict(node) | {"mode": mode(node)} for path, node in nodes.items()}


def look_around(
    root: Root, caller: Mapping[str, str], machine: Machine | None = None
) -> Surroundings:
    """The surroundings of a caller on this machine.  Never raises."""
    return Surroundings(
        environment={name: caller[name] for name in SHOWN_ENVIRONMENT if name in caller},
        server=llama_server(caller),
        devices=gpu_nodes(root),
        journal=_journal(),
        staged=_staged(root, machine or read_machine(root)),
        compute_clients=kfd_client_count(root),
    )


def _staged(root: Root, machine: Machine) -> Staged | Unknown:
    try:
        status = read_status(root, machine)
    except InfertuneError as error:
        return Unknown(error.message)
    except OSError as error:
        return Unknown(f"boot settings cannot be read: {error.strerror}")
    if status.stage is None or status.stage.phase == "failed":
        return Staged(status.state, (status.stage.reason or "",) if status.stage else ())
    reasons = (each for each in status.options if each.reason)
    return Staged(status.state, tuple(f"{each.option.id}: {each.reason}" for each in reasons))


def _journal() -> tuple[str, ...] | None:
    try:
        # Its mode says nothing: the kernel decides when it is opened (kernel.dmesg_restrict).
        os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        lines = kernel_journal(_JOURNAL_S)
        return None if lines is None else tuple(lines)
    return None


def llama_server(caller: Mapping[str, str]) -> LlamaServer | Unknown | None:
    """The llama-server the caller would start; None where there is none on its search path."""
    path = find_server(None, caller.get("PATH"))
    if path is None:
        return None
    try:
        if os.geteuid() == 0 and others_may_write(path):
            return Unknown(f"root does not run {path}, which others may write")
        version = ask_version(path, caller, _VERSION_S)
        backends = linked_backends(path)
    except InfertuneError as error:
        return Unknown(error.message)
    except OSError as error:
        return Unknown(f"{path}: {error.strerror}")
    if version is None:
        return Unknown(f"{path} --version says nothing")
    flags, variables = _offered(path, caller)
    return LlamaServer(
        version,
        tuple(name for name in BACKENDS if name in backends),
        tuple(dict.fromkeys(program_label(each) for each in (path, os.path.realpath(path)))),
        flags,
        variables,
    )


def _offered(
    path: str, caller: Mapping[str, str]
) -> tuple[frozenset[str] | Unknown, frozenset[str] | Unknown]:
    """Flags and variables a llama-server takes, by its own words."""
    try:
        text = ask_help(path, caller, _HELP_S) or ""
    except Failed:
        text = ""
    options = {
        flag: option for flag, option in parse_help(text).items() if not _is_gone(option.text)
    }
    if "--port" not in options:
        return NO_HELP, NO_HELP
    texts = {option.text for option in options.values()}
    variables = {name for each in texts for name in re.findall(r"\(env: (LLAMA_\w{1,60})\)", each)}
    return frozenset(options), frozenset(variables)


def _is_gone(text: str) -> bool:
    return _GONE in " ".join(text.split())


def recorded(root: Root) -> Surroundings:
    """The surroundings a snapshot has; unknown where it has none.  Never raises."""
    try:
        found = json.loads(root.read_small(FILE, 64 * 1024))
        return Surroundings(
            environment=_texts(found["environment"]),
            server=_recorded_server(found["server"]),
            devices={str(path): _recorded_node(each) for path, each in found["devices"].items()},
            staged=_recorded_stage(found.get("staged")),
            compute_clients=_recorded_count(found.get("compute_clients")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Surroundings(_NOT_SAID, _NOT_SAID, _NOT_SAID)


def _texts(found: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in found.items()}


def _recorded_node(found: Any) -> Node:
    if not isinstance(found, dict):  # a snapshot of before owners were noted
        return Node(bool(found))
    mode = found.get("mode")
    bits = int(mode, 8) if isinstance(mode, str) else mode if isinstance(mode, int) else None
    return Node(
        usable=bool(found["usable"]),
        owner=_word(found.get("owner")),
        group=_word(found.get("group")),
        mode=None if bits is None else bits & 0o7777,
    )


def _word(found: Any) -> str | None:
    return None if found is None else str(found)[:60]


def _recorded_count(found: Any) -> int | Unknown:
    return found if isinstance(found, int) else _NOT_SAID


def _recorded_stage(found: Any) -> Staged | Unknown:
    if found is None or found["state"] not in get_args(State):
        return _NOT_SAID
    return Staged(found["state"], tuple(map(str, found["said"])))


def _recorded_server(found: Any) -> LlamaServer | Unknown | None:
    if found is None:
        return None
    if "unknown" in found:
        return Unknown(str(found["unknown"]))
    return LlamaServer(
        str(found["version"]),
        tuple(name for name in BACKENDS if name in found["backends"]),
        tuple(map(str, found.get("places", ()))),
        _names(found.get("flags")),
        _names(found.get("variables")),
    )


def _names(found: Any) -> frozenset[str] | Unknown:
    """Names a snapshot has; older ones have none."""
    return frozenset(map(str, found)) if isinstance(found, list) else NO_HELP
