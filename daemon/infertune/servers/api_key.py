# SPDX-License-Identifier: Apache-2.0
"""The file with the keys of a server's clients.

It stays as closed as it is: systemd reads it as root and shows the server's unit a copy, in memory
(LoadCredential=, systemd.exec(5)).  Neither the daemon nor the exporter ever reads it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from infertune.base.errors import UsageError
from infertune.base.root import Root, changeable_by_others, read_plain_file

CREDENTIAL = "api-key"
"""Its name among the credentials of the unit."""

_PATH = re.compile(r"(?:/[\w@+-][\w.@+-]*)+", re.ASCII)
"""Without blanks, percent signs and quotes: what stands in a unit stands for itself."""
_MAX_BYTES = 64 * 1024
_KEY = re.compile(r"[!-~]{16,512}")
_RULE = "a key for each line, of 16 to 512 characters without blanks"
_HINT = "openssl rand -hex 32"


def key_path(configured: object) -> str:
    """The path of such a file.  Raises ValueError."""
    if not isinstance(configured, str) or not _PATH.fullmatch(configured):
        raise ValueError("is not an absolute path of letters, digits and . @ + - _")
    return configured


def refuse_open_file(root: Root, path: str) -> None:
    """Raise UsageError for a file that others than root may read or change."""
    try:
        status = root.at(path).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"api_key_file {path}: not a regular file")
        open_to = changeable_by_others(root.at(path), status, root.base) if root.live else None
    except OSError as error:
        raise UsageError(f"api_key_file {path}: {error.strerror}") from None
    if open_to:
        raise UsageError(f"api_key_file {path}: others than root may change {open_to}")
    others = stat.S_IRWXO if status.st_gid == 0 else stat.S_IRWXO | stat.S_IRWXG
    if status.st_mode & others:
        raise UsageError(
            f"api_key_file {path}: others than root may read it", hint=f"chmod 600 {path}"
        )


def credential(environment: Mapping[str, str]) -> str:
    """Where the unit sees its copy, looked at.  Raises UsageError, which shows nothing of it.

    llama-server asks for no key at all where the file holds none.
    """
    directory = environment.get("CREDENTIALS_DIRECTORY")
    if directory is None:
        raise UsageError(
            "this unit was not given its api_key_file", hint="infertune stop, then start"
        )
    path = os.path.join(directory, CREDENTIAL)
    try:
        data, _ = read_plain_file(Path(path), _MAX_BYTES + 1, follow=False)
    except OSError as error:
        raise UsageError(f"api_key_file: {error.strerror}") from None
    lines = data.decode("latin-1").removesuffix("\n").split("\n")
    if len(data) > _MAX_BYTES or not all(_KEY.fullmatch(line) for line in lines):
        raise UsageError(f"api_key_file: not {_RULE}", hint=_HINT)
    return path


def credential_of(unit: str) -> str:
    """Where a unit sees its copy, told before it runs (systemd, docs/CREDENTIALS.md)."""
    return f"/run/credentials/{unit}/{CREDENTIAL}"
