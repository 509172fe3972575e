# SPDX-License-Identifier: Apache-2.0
"""Containers that podman and docker run for root: by which name, and in which unit of systemd.

Both keep names in files of root's; whoever else asks is told of none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from infertune.base.records import dataclass
from infertune.base.root import Root

_PODMAN = (
    "/var/lib/containers/storage/*-containers/*containers.json",
    "/run/containers/storage/*-containers/*containers.json",
)
"""By the driver of its layers, overlay mostly; those of ``--rm`` are in a file of their own."""
_DOCKER = "/var/lib/docker/containers"
_MAX_BYTES = 4 * 1024 * 1024
_MOST = 1000
_ID = re.compile(r"[0-9a-f]{64}")
CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What a container can be called; the first digits of an id are such a name, too."""


@dataclass(frozen=True, slots=True)
class Container:
    """One of root's containers, which may run or not."""

    engine: str
    id: str
    names: tuple[str, ...]

    @property
    def scope(self) -> str:
        """Its unit, where the engine leaves control groups to systemd (the default of both)."""
        return f"{'libpod' if self.engine == 'podman' else self.engine}-{self.id}.scope"


def containers(root: Root) -> tuple[Container, ...]:
    """All that there are, podman's first.  Never raises: what cannot be read names none."""
    return (*_podman(root), *_docker(root))


def named(root: Root, name: str) -> tuple[Container, ...]:
    """Those of a name, or of an id that begins so (12 digits at least, as they are shown)."""
    is_id = re.fullmatch(r"[0-9a-f]{12,64}", name) is not None
    return tuple(
        each
        for each in containers(root)
        if name in each.names or (is_id and each.id.startswith(name))
    )


def _podman(root: Root) -> Iterator[Container]:
    for path in (path for pattern in _PODMAN for path in root.glob(pattern)):
        found = _json(root, path)
        for each in found[:_MOST] if isinstance(found, list) else ():
            if isinstance(each, dict) and (one := _id(each.get("id"))):
                names = each.get("names")
                known = names if isinstance(names, list) else []
                yield Container("podman", one, tuple(n for n in known if isinstance(n, str)))


def _docker(root: Root) -> Iterator[Container]:
    for directory in root.names(_DOCKER)[:_MOST]:
        if one := _id(directory):
            found = _json(root, f"{_DOCKER}/{one}/config.v2.json")
            name = found.get("Name") if isinstance(found, dict) else None
            yield Container("docker", one, (name.lstrip("/"),) if isinstance(name, str) else ())


def _id(found: object) -> str | None:
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def _json(root: Root, path: str) -> object:
    try:
        return json.loads(root.read_file(path, _MAX_BYTES)[0])
    except (OSError, ValueError, RecursionError):
        return None


_STARTS = ("run", "start", "create", "kube", "play", "pod", "compose")


def elsewhere(argv: Sequence[str]) -> str | None:
    """The engine of a command whose container is in a unit of its own, not where the command is.

    podman puts it beside, in machine.slice, but with ``--cgroups=split`` (which quadlets have) or
    ``disabled``; docker's is always started by its daemon.  None for any other command.
    """
    words = [word for word in argv if word]
    engine = words[0].rpartition("/")[2] if words else ""
    if engine in ("docker", "docker-compose", "nerdctl"):
        return engine
    if engine not in ("podman", "podman-compose"):
        return None
    inside = any(
        word in ("--cgroups=split", "--cgroups=disabled")
        or (word == "--cgroups" and following in ("split", "disabled"))
        for word, following in zip(words, [*words[1:], ""], strict=True)
    )
    starts = engine != "podman" or any(word in _STARTS for word in words[1:])
    return engine if starts and not inside else None
