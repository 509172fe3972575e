# SPDX-License-Identifier: Apache-2.0
"""Runs the system's own tools that rebuild what is read at boot.

A program is one of PROGRAMS, found in the system's directories; nothing of a profile, of the
environment or of a caller names one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from infertune.base.errors import Failed
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import printable_line

DIRECTORIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
PROGRAMS = (
    "bootc",
    "bootctl",
    "dracut",
    "efibootmgr",
    "grub-editenv",
    "grub-mkconfig",
    "grub2-editenv",
    "grub2-mkconfig",
    "grubby",  # only in records of 0.1.0
    "kernel-install",
    "limine-mkinitcpio",
    "limine-dracut",
    "limine-update",
    "lsinitcpio",
    "lsinitramfs",
    "lsinitrd",
    "mkinitcpio",
    "proxmox-boot-tool",
    "rpm-ostree",
    "sdbootutil",
    "systemctl",
    "update-grub",
    "update-initramfs",
)
TIMEOUT_S = 1800
"""An emulated machine with six kernels takes minutes; what takes longer hangs."""
SAY_EVERY_S = 5


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    said: str
    """The last lines it printed."""
    output: str = ""
    """Everything it printed."""


Say = Callable[[str], None]
"""Is told what is done, now and then while it lasts."""

Runner = Callable[[Sequence[str]], Ran]


def find(root: Root, name: str) -> str | None:
    """Absolute path of one of PROGRAMS on this machine, or None."""
    if name not in PROGRAMS:
        raise ValueError(f"{name} is not a program of the catalogue")
    for directory in DIRECTORIES:
        if root.exists(f"{directory}/{name}"):
            return f"{directory}/{name}"
    return None


def runner(root: Root, say: Say) -> Runner:
    """What runs commands on this machine; on a recorded one they are only named."""

    def run(argv: Sequence[str]) -> Ran:
        if not root.live:
            say(f"not run on a recorded machine: {' '.join(argv)}")
            return Ran(0, "")
        directory, _, name = argv[0].rpartition("/")
        if directory not in DIRECTORIES or name not in PROGRAMS:
            raise ValueError(f"{argv[0]} is not a program of the catalogue")
        return _run(argv, say)

    return run


def run_step(run: Runner, argv: Sequence[str]) -> str:
    """Everything a program printed.  Raises Failed unless it ends well."""
    try:
        ran = run(argv)
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from error
    if ran.code:
        raise Failed(f"{' '.join(argv)}: exit code {ran.code}: {ran.said}")
    return ran.output


def _run(argv: Sequence[str], say: Say) -> Ran:
    line = " ".join(argv)
    began = time.monotonic()
    say(line)
    # A group of its own: Ctrl-C reaches us first, and we decide.
    with subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": ":".join(DIRECTORIES), "LC_ALL": "C", "HOME": "/root"},
        start_new_session=True,
        close_fds=False,  # the lock is inherited; nothing else of ours can be (PEP 446)
    ) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=SAY_EVERY_S)
                break
            except subprocess.TimeoutExpired as waiting:
                if process.poll() is not None:
                    # It has ended, and something it started in the background keeps the pipe.
                    output = waiting.output or b""
                    break
                lasted = time.monotonic() - began
                if lasted > TIMEOUT_S:
                    _end(process)
                    return Ran(-1, f"no end after {TIMEOUT_S // 60} minutes")
                say(f"{line}: {lasted:.0f} s")
            except BaseException:
                _end(process)
                raise
    # On the disk before a record says so: grub-editenv, for one, writes in place and flushes
    # nothing (seen after a power cut: confirmed in the record, and not in GRUB's environment).
    os.sync()
    text = output.decode("utf-8", "replace")
    said = " / ".join(text.strip().splitlines()[-3:])
    return Ran(process.returncode, printable_line(said, 400), text)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
