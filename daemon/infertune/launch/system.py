# SPDX-License-Identifier: Apache-2.0
"""Tools of the system that a verb hands over to."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from infertune.base.errors import Failed


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


def has_log(unit: str) -> bool:
    """Whether the journal has a line of a unit, as far as the caller may read it.

    True where it cannot be asked: ``show_log`` says why.
    """
    command = ("journalctl", "--quiet", "--no-pager", "--output=cat", "--lines=1", f"--unit={unit}")
    try:
        answer = subprocess.run(
            ["/usr/bin/env", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        return True
    return answer.returncode != 0 or bool(answer.stdout)


def kernel_journal(patience_s: float) -> Sequence[str] | None:
    """The kernel's messages of this boot as the journal has them; None where it gives none.

    For those who may read the journal and not /dev/kmsg (group adm or systemd-journal).
    """
    command = ("journalctl", "--dmesg", "--boot", "--quiet", "--no-pager", "--output=cat")
    try:
        answer = subprocess.run(
            ["/usr/bin/env", *command, "--lines=20000"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=patience_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Without the right to read it journalctl ends well and prints nothing.
    lines = answer.stdout.decode("utf-8", "replace").splitlines()
    return lines if answer.returncode == 0 and lines else None
