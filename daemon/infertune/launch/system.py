# SPDX-License-Identifier: Apache-2.0
"""Tools of the system that a verb hands over to."""

from __future__ import annotations

import subprocess

from infertune.errors import Failed


def show_log(unit: str, *, as_json: bool, follow: bool) -> int:
    """Let journalctl show a unit's log on our terminal; returns its exit code.  Raises Failed."""
    form = ["--output=json"] if as_json else []
    form += ["--follow"] if follow else []
    try:
        return subprocess.call(
            ["/usr/bin/env", "journalctl", "--no-pager", f"--unit={unit}", *form]
        )
    except OSError as error:
        raise Failed(f"journalctl: {error.strerror}") from error
