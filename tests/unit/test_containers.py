# SPDX-License-Identifier: Apache-2.0
"""Containers of podman and docker: in which unit they are, found by name.

The trees are as podman 5 (rootful, systemd as its manager) and docker 28 make them.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from infertune.base.errors import UsageError
from infertune.base.names import is_foreign_unit
from infertune.base.root import Root
from infertune.host.containers import containers, elsewhere, named
from infertune.servers import running
from infertune.servers.adopted import Adopted, Book, Changed, Wanted, write_book

POD, DOCK, OLD = "ab" * 32, "cd" * 32, "ef" * 32
STORAGE = "/var/lib/containers/storage/overlay-containers"


def write(base: Path, path: str, text: str) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    podman = [{"id": POD, "names": ["llama"], "image": "x", "layer": "y"}]
    volatile = [{"id": OLD, "names": ["both"], "flags": {"Volatile": True}}]
    write(tmp_path, f"{STORAGE}/containers.json", json.dumps(podman))
    write(tmp_path, f"{STORAGE}/volatile-containers.json", json.dumps(volatile))
    for id_, name in ((DOCK, "/vllm"), ("01" * 32, "/both")):
        path = f"/var/lib/docker/containers/{id_}/config.v2.json"
        write(tmp_path, path, json.dumps({"ID": id_, "Name": name}))
    return Root(tmp_path)


@pytest.mark.parametrize(
    ("name", "scopes"),
    [
        ("llama", [f"libpod-{POD}.scope"]),
        ("vllm", [f"docker-{DOCK}.scope"]),
        (POD[:12], [f"libpod-{POD}.scope"]),
        (DOCK, [f"docker-{DOCK}.scope"]),
        ("both", [f"libpod-{OLD}.scope", f"docker-{'01' * 32}.scope"]),
        ("none", []),
        (POD[:11], []),
    ],
)
def test_a_container_by_its_name(name: str, scopes: list[str], root: Root) -> None:
    found = [each.scope for each in named(root, name)]
    assert found == scopes
    assert all(map(is_foreign_unit, found))


def test_files_of_engines_that_are_none(root: Root, tmp_path: Path) -> None:
    for text in ("", "{", "5", "null", '[5, {"id": 7}, {"id": "../x"}]', "[" * 9999,
                 json.dumps([{"id": POD, "names": 5}])):  # fmt: skip
        write(tmp_path, f"{STORAGE}/containers.json", text)
        write(tmp_path, f"/var/lib/docker/containers/{DOCK}/config.v2.json", text)
        assert named(root, "llama") == ()
        assert named(root, "vllm") == ()
    write(tmp_path, "/var/lib/docker/containers/../x/config.v2.json", "{}")
    assert {each.id for each in containers(root)} == {POD, OLD, DOCK, "01" * 32}


@pytest.mark.parametrize(
    ("line", "engine"),
    [
        ("/usr/bin/llama-server --port 80", None),
        ("/usr/bin/docker run --rm --name llm image", "docker"),
        ("docker compose up", "docker"),
        ("/usr/bin/podman run --cgroups=no-conmon --rm -d image", "podman"),
        # What a quadlet becomes (podman-systemd.unit(5)).
        ("/usr/bin/podman run --name systemd-x --replace --rm --cgroups=split -d image", None),
        ("/usr/bin/podman run --cgroups split image", None),
        ("/usr/bin/podman start -a llm", "podman"),
        ("/usr/bin/podman system service", None),
        ("podman-compose up", "podman-compose"),
        ("", None),
    ],
)
def test_a_command_whose_container_is_elsewhere(line: str, engine: str | None) -> None:
    assert elsewhere(shlex.split(line)) == engine


@pytest.mark.parametrize(
    ("unit", "group", "below"),
    [
        (f"libpod-{POD}.scope", f"/machine.slice/libpod-{POD}.scope", "container"),
        (f"docker-{DOCK}.scope", f"/system.slice/docker-{DOCK}.scope", ""),
        ("llama.service", "/system.slice/llama.service", f"libpod-payload-{POD}"),
    ],
)
def test_what_is_below_a_unit_is_its(unit: str, group: str, below: str, root: Root) -> None:
    write(root.base, "/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    path = f"/sys/fs/cgroup{group}"
    write(root.base, f"{path}/cgroup.procs", "")
    write(root.base, f"{path}/{below}/cgroup.procs", "7\n8\n")
    one = Adopted("x", group, (), Changed(unit, {}, {}), Wanted("kept", "cpu"))
    write_book(root, Book({"x": one}))
    found = running.units(root)
    assert [(each.name, each.cgroup) for each in found] == [(unit, path)]
    assert running.processes(root, found) == {7: "x", 8: "x"}


def test_many_groups_below_one_are_not_all_looked_into(root: Root) -> None:
    for number in range(600):
        write(root.base, f"/g/{number:03}/cgroup.procs", f"{number}\n")
    found = running.processes(root, [running.Unit("x.service", "x", "/g")])
    assert 0 < len(found) < 300


@pytest.mark.parametrize(
    ("unit", "user", "says"),
    [
        ("container/none", None, "root has no container called 'none'"),
        ("container/both", None, "root has more than one container called 'both'"),
        ("container/../x", None, "root has no container"),
        ("container/", None, "root has no container"),
        ("container/llama", "1000", "a user's container is in a unit of that user's"),
    ],
)
def test_containers_that_are_refused(unit: str, user: str | None, says: str, root: Root) -> None:
    pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")
    from infertune.service.serving import Serving

    serving = Serving(root, None)  # type: ignore[arg-type]
    assert serving._unit("container/llama", None) == f"libpod-{POD}.scope"
    assert serving._unit("ollama.service", None) == "ollama.service"
    with pytest.raises(UsageError, match=says):
        serving._unit(unit, user)
