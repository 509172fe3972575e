# SPDX-License-Identifier: Apache-2.0
"""Puts the daemon's files where systemd, the bus and polkit look for them, and takes them away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from infertune.base.errors import Failed, NotPermitted, UsageError
from infertune.base.names import SLICE
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.boot import record
from infertune.servers.adopted import ADOPTED
from infertune.servers.declaration import TRANSIENT
from infertune.servers.dropins import remove_drop_in, remove_notes, units_with_drop_in
from infertune.servers.store import declared_names, remove_declaration
from infertune.servers.unit import program

FILES: tuple[tuple[str, str], ...] = (
    ("infertune.service", "/etc/systemd/system/infertune.service"),
    ("infertune.slice", "/etc/systemd/system/infertune.slice"),
    ("infertune-server@.service", "/etc/systemd/system/infertune-server@.service"),
    ("infertune-adopted@.service", "/etc/systemd/system/infertune-adopted@.service"),
    ("infertune-user@.service", "/etc/systemd/system/infertune-user@.service"),
    ("infertune-exporter.service", "/etc/systemd/system/infertune-exporter.service"),
    ("infertune-exporter.socket", "/etc/systemd/system/infertune-exporter.socket"),
    ("infertune-boot-guard.service", "/etc/systemd/system/infertune-boot-guard.service"),
    ("infertune-boot-confirm.service", "/etc/systemd/system/infertune-boot-confirm.service"),
    (
        "org.infertune.Infertune1.conf",
        "/etc/dbus-1/system.d/org.infertune.Infertune1.conf",
    ),
    # polkit reads actions below /usr/share only.
    ("org.infertune.policy", "/usr/share/polkit-1/actions/org.infertune.policy"),
)
"""Every file of ours outside the package: where it comes from, and where it goes."""

PACKAGED: dict[str, str] = {
    target: target.replace("/etc/systemd/", "/usr/lib/systemd/").replace(
        "/etc/dbus-1/", "/usr/share/dbus-1/"
    )
    for _, target in FILES
}
"""Where a distribution's package has them instead."""

BOOT_UNITS = ("infertune-boot-guard.service", "infertune-boot-confirm.service")
"""Enabled as they are installed: without a staged change they do nothing."""

RUNNING = "/run/systemd/system"
"""There where systemd is PID 1 (sd_booted(3))."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of one file."""

    path: str
    outcome: str
    """written, same, removed or absent; from ``check`` missing, differs or same."""


def install(root: Root) -> tuple[Placed, ...]:
    """Write what is missing or differs.  Raises NotPermitted, UsageError or Failed."""
    if root.live:
        _need_root()
        _refuse_what_a_package_owns(root)
        _refuse_a_writable_program()
    # All of it before the first write: a path that no unit takes is found by then.
    contents = [(target, _content(source)) for source, target in FILES]
    placed = tuple(_write(root, target, content) for target, content in contents)
    if root.live and root.exists(RUNNING):
        _tell_the_system()
        _run("systemctl", "enable", *BOOT_UNITS)
    return placed


def check(root: Root) -> tuple[Placed, ...]:
    """What ``install`` would write.  Changes nothing and needs no privilege."""
    packaged = root.exists(next(iter(PACKAGED.values())))
    placed = []
    for source, target in FILES:
        path = PACKAGED[target] if packaged else target
        try:
            there = root.exists(path)
            same = there and (packaged or root.read_bytes(path) == _content(source))
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error
        placed.append(Placed(path, "same" if same else "differs" if there else "missing"))
    return tuple(placed)


def remove(root: Root) -> tuple[Placed, ...]:
    """Take away exactly what ``install`` writes.  Raises NotPermitted, UsageError or Failed."""
    if root.live:
        _need_root()
        _refuse_what_a_package_owns(root)
        stage = record.load(root)
        if stage is not None and not stage.over:
            raise UsageError(
                "boot settings are staged, and the guard would go; nothing was removed",
                hint="infertune boot undo",
            )
        if root.exists(RUNNING) and _run("systemctl", "is-active", "-q", "infertune.service"):
            raise UsageError(
                "infertune.service is running; nothing was removed",
                hint="systemctl disable --now infertune",
            )
        if root.exists(RUNNING) and root.exists(ADOPTED):
            raise UsageError(
                "units are adopted, and nobody would give them back; nothing was removed",
                hint="systemctl start infertune, and stop it: that gives them back",
            )
        if root.exists(RUNNING):
            # The servers' unit goes away: they would run on under no rule.
            _run("systemctl", "stop", "infertune.slice", "infertune-server@*.service")
            exporter = ("infertune-exporter.socket", "infertune-exporter.service")
            _run("systemctl", "disable", "--now", *exporter)
            # /run/infertune-server: by systemd, because servers may have put links there.
            _run("systemctl", "clean", "--what=runtime", "infertune-server@any.service")
            _run("systemctl", "clean", "--what=runtime", "infertune-adopted@any.service")
            _run("systemctl", "disable", "infertune.service", *BOOT_UNITS)
        _remove_servers(root)
    placed = []
    for _, target in FILES:
        there = root.exists(target)
        try:
            root.unlink(target)
        except OSError as error:
            raise Failed(f"{target}: {error.strerror}") from error
        placed.append(Placed(target, "removed" if there else "absent"))
    if root.live and root.exists(RUNNING):
        _tell_the_system()
    return tuple(placed)


def _remove_servers(root: Root) -> None:
    """What ``serve`` wrote for this boot."""
    for unit in (*units_with_drop_in(root), SLICE):
        remove_drop_in(root, unit)
    for name in declared_names(root, TRANSIENT):
        remove_declaration(root, name)
    remove_notes(root, SLICE)


def _write(root: Root, target: str, content: bytes) -> Placed:
    try:
        if root.exists(target) and root.read_bytes(target) == content:
            return Placed(target, "same")
        root.mkdir(os.path.dirname(target))
        root.replace(target, content)
    except OSError as error:
        raise Failed(f"{target}: {error.strerror}") from error
    return Placed(target, "written")


def rendered(python: str) -> dict[str, bytes]:
    """Every file as a distribution's package has it, whose interpreter is ``python``."""
    return {PACKAGED[target]: _content(source, python) for source, target in FILES}


def _content(name: str, python: str | None = None) -> bytes:
    text = (_directory() / name).read_text(encoding="utf-8")
    return text.replace("@PYTHON@", program(python or sys.executable)).encode()


def template() -> str:
    """Text of the server's template unit."""
    return _content("infertune-server@.service").decode()


def _directory() -> Path:
    """Our files: package data, or the checkout's ``systemd/``."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "systemd"
    return installed if os.path.isdir(installed) else package.parents[1] / "systemd"


def _need_root() -> None:
    if os.geteuid() != 0:
        raise NotPermitted("setup writes to /etc and needs root; nothing was touched")


def _refuse_what_a_package_owns(root: Root) -> None:
    unit = next(iter(PACKAGED.values()))
    if root.exists(unit):
        raise UsageError(
            f"a package of the distribution has installed {unit}; nothing was touched",
            hint="the package manager sets it up and removes it",
        )


def _refuse_a_writable_program() -> None:
    """The service runs this very program as root: nobody else may be able to change it."""
    for place in _up_to_the_top(Path(sys.executable), Path(__file__)):
        state = place.stat()
        if state.st_uid != 0 or (state.st_mode & 0o022 and not state.st_mode & 0o1000):
            raise UsageError(
                f"{place} can be changed by others than root, and the service would run it",
                hint="install for the system, from a checkout: python3 -m venv /opt/infertune && "
                "/opt/infertune/bin/pip install './infertune[daemon]'",
            )


def _up_to_the_top(*paths: Path) -> Iterable[Path]:
    for path in paths:
        resolved = path.resolve()
        yield resolved
        yield from resolved.parents
        yield from path.absolute().parents


def _tell_the_system() -> None:
    _run("systemctl", "daemon-reload")
    _run("systemctl", "reload", "dbus.service")


def _run(*command: str) -> bool:
    """Whether a command of the system succeeds; one that is missing does not."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
