# SPDX-License-Identifier: Apache-2.0
"""How the files of a recorded machine answer a write: as the kernel's would."""

from __future__ import annotations

import errno
import os
import re

_ENTRY = re.compile(rb"(?<![\w(])(\d+)(\s+[A-Z0-9_]*[A-Z][A-Z0-9_]*)(\*| |(?=:|\s|$))")
"""``5 COMPUTE*``: a numbered entry of a table, in rows or in columns."""


def as_the_kernel_would(old: bytes, new: bytes) -> bytes:
    """What a file that held ``old`` holds after ``new`` was written to it.

    A list of words keeps its brackets around the chosen one, a numbered table
    its star, and everything else becomes the new value.  Raises OSError(EINVAL)
    for a word or a row that is not on offer.
    """
    wanted = new.strip()
    words = old.split()
    if any(word.startswith(b"[") and word.endswith(b"]") for word in words):
        plain = [word.strip(b"[]") for word in words]
        if wanted not in plain:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return b" ".join(b"[%s]" % word if word == wanted else word for word in plain) + b"\n"
    entries = [match[1] for match in _ENTRY.finditer(old)]
    if len(entries) > 1 and b"*" in old:
        if wanted not in entries:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return _ENTRY.sub(
            lambda entry: entry[1] + entry[2] + (b"*" if entry[1] == wanted else entry[3] and b" "),
            old,
        )
    return new + b"\n" if old.endswith(b"\n") else new
