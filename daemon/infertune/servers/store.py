# SPDX-License-Identifier: Apache-2.0
"""Finding, writing and removing declarations of servers, and what they need of the system."""

from __future__ import annotations

import contextlib
import errno
from functools import partial

from infertune.base.errors import DeclarationError, Failed, InfertuneError, UsageError
from infertune.base.names import DECLARED, NAME, USER, declared_server
from infertune.base.root import Root, changeable_by_others
from infertune.base.tables import shown
from infertune.profiles.config import read_config
from infertune.servers.declaration import (
    TRANSIENT,
    Declaration,
    Foreign,
    declaration_text,
    parse_declaration,
)

_MAX_BYTES = 64 * 1024
_NO_UID, _NO_UID_16 = 2**32 - 1, 2**16 - 1
"""Numbers that stand for nobody at all (UID_INVALID of systemd)."""


def find_declaration(root: Root, name: str) -> Declaration | Foreign | None:
    """The declaration of a server; /etc is what the admin says, and counts first.

    Raises DeclarationError where there is one that is not valid.
    """
    if not NAME.fullmatch(name):
        return None
    for directory in (DECLARED, TRANSIENT):
        path = f"{directory}/{name}.toml"
        if (text := _read(root, path)) is not None:
            return parse_declaration(name, text, path, partial(_default_profile, root))
    return None


def _read(root: Root, path: str) -> str | None:
    """All of a declaration, or None where there is none.  Raises DeclarationError."""
    try:
        data, status = root.read_file(path, _MAX_BYTES + 1)
        open_to = changeable_by_others(root.at(path), status, root.base) if root.live else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        link = error.errno == errno.ELOOP  # none is followed
        what = "is a symbolic link; a declaration is a plain file"
        what = what if link else f"cannot be read: {error.strerror}"
        raise DeclarationError(what, file=path) from error
    if open_to:
        raise DeclarationError(f"others than root may change {open_to}", file=path)
    if len(data) > _MAX_BYTES:
        raise DeclarationError(f"is larger than {_MAX_BYTES // 1024} KiB", file=path)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DeclarationError("is not UTF-8; save it as UTF-8", file=path) from None


def _default_profile(root: Root) -> str | None:
    return read_config(root).profile


def declared_names(root: Root, directory: str) -> list[str]:
    """Names of the servers that a directory declares."""
    return [name for file in root.names(directory) if (name := declared_server(file))]


def declarations(root: Root) -> dict[str, Declaration | Foreign]:
    """Every server that is declared, by name; a declaration that is not valid is left out."""
    found = {}
    for name in sorted({*declared_names(root, DECLARED), *declared_names(root, TRANSIENT)}):
        with contextlib.suppress(InfertuneError):
            if declaration := find_declaration(root, name):
                found[name] = declaration
    return found


def declared_ports(root: Root) -> dict[str, int]:
    """Port by name of every declared server; a declaration that is not valid has none."""
    declared = declarations(root).items()
    return {name: each.port for name, each in declared if each.port is not None}


def write_declaration(root: Root, declaration: Declaration | Foreign) -> None:
    """Declare a server for this boot.  Raises Failed."""
    path = f"{TRANSIENT}/{declaration.name}.toml"
    try:
        root.mkdir(TRANSIENT)
        root.replace(path, declaration_text(declaration).encode())
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def remove_declaration(root: Root, name: str) -> None:
    """Forget a server of this boot; one that is declared in /etc stays.  Raises Failed."""
    path = f"{TRANSIENT}/{name}.toml"
    try:
        root.unlink(path)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def user_id(root: Root, user: str) -> int:
    """Number of a user, given by it or by a name of /etc/passwd.  Raises UsageError."""
    if not USER.fullmatch(user):
        raise UsageError(f"{shown(user)} is not a user: a name, or a number")
    found = user
    if not user.isdecimal():
        lines = (root.get("/etc/passwd") or "").splitlines()
        rows = (line.split(":") for line in lines)
        found = next((row[2] for row in rows if row[0] == user and len(row) > 2), "")
    if not found.isdecimal() or not 0 < int(found) < _NO_UID or int(found) == _NO_UID_16:
        raise UsageError(
            f"there is no user '{user}' in /etc/passwd whose units could be adopted",
            hint="give the number, which 'id -u' prints",
        )
    return int(found)


def gpu_groups(root: Root) -> list[str]:
    """Groups of the render nodes that exist here: systemd starts no unit with one that does not."""
    lines = (root.get("/etc/group") or "").splitlines()
    present = {line.partition(":")[0] for line in lines}
    return [name for name in ("render", "video") if name in present]
