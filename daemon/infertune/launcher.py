# SPDX-License-Identifier: Apache-2.0
"""Becomes the server of one declaration.  Runs in its unit, as its user, under its limits.

The daemon never runs a server program, not even to ask for its help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial

from infertune.base.errors import Exit, InfertuneError, UsageError
from infertune.base.notify import Notifier
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.budget.admission import Asked, admit
from infertune.host.machine import Machine, read_machine
from infertune.launch import heap
from infertune.launch.apart import keep_apart
from infertune.pools.promised import LOCK, OF_UNITS
from infertune.profiles.resolve import canonical
from infertune.run import Audience, Request, Result, Run, prepare
from infertune.servers.api_key import credential
from infertune.servers.declaration import Declaration, own_settings
from infertune.servers.models import with_its_model
from infertune.servers.store import find_declaration

_LINE = 8192
"""Characters; journald cuts lines at 48 KiB (LineMax= of journald.conf)."""


class _Log(Audience):
    """Tells the journal; a unit has no other audience."""

    def say(self, text: str) -> None:
        print(_line(text), flush=True)


def _line(text: str) -> str:
    """For the journal, where a line of its own would be an entry of its own, with any priority."""
    return printable_line("; ".join(text.split("\n")), _LINE)


def _admit(
    root: Root,
    declared: Declaration,
    machine: Machine,
    model: str,
    backend: str,
    settings: Mapping[str, str],
) -> str | None:
    """Ask whether the model fits now; this process, which becomes the server, keeps the room."""
    asked = Asked(
        name=declared.name,
        model=model,
        backend=backend,
        settings=settings,
        pid=os.getpid(),
        force=declared.force,
        forced_by="'force = true'",
        profile=declared.profile,
    )
    turn = sys.stdin.fileno() if _has_turn(root) else None
    return admit(root, machine, asked, OF_UNITS, turn).remark


def _has_turn(root: Root) -> bool:
    """Whether systemd has opened the lock for us, as our standard input."""
    try:
        return os.path.samestat(os.fstat(0), root.at(LOCK).stat())
    except OSError:
        return False


def _close_turn() -> None:
    """The server is not to keep the lock."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)


def _tell(error: InfertuneError) -> None:
    """The journal everything, and systemd why: ``systemctl status`` and the daemon show it."""
    hint = f"; {error.hint}" if error.hint else ""
    print(f"<3>{_line(error.message + hint)}", file=sys.stderr)
    Notifier(os.environ).send(STATUS=_line(error.message))


def main() -> int:
    """``launcher NAME``: exec the server that is declared under this name."""
    if len(sys.argv) != 2:
        print("launcher: takes the name of a declared server", file=sys.stderr)
        return Exit.USAGE
    root = Root("/")
    try:
        declared = find_declaration(root, sys.argv[1])
        if not isinstance(declared, Declaration):
            raise UsageError(f"no server '{sys.argv[1]}' is declared")
        declared = with_its_model(root, declared)
        machine = read_machine(root)
        request = Request(
            profile=declared.profile,
            caller=dict(os.environ),
            backend=declared.backend,
            model=declared.model,
            port=declared.port,
            command=declared.command,
            settings=own_settings(declared, machine),
            flags=declared.flags,
            host=declared.host,
            api_key_file=credential(os.environ) if declared.api_key_file else None,
            check=partial(_admit, root, declared),
        )
        result = Result(profile=declared.profile)
        desired, job = prepare(Run(root, machine, request, result, _Log()))
    except InfertuneError as error:
        _tell(error)
        return error.exit_code
    if declared.command:
        print(
            "not checked whether it fits: infertune does not know how much memory it takes",
            flush=True,
        )
    for each in heap.placed(root, canonical(desired.launch), job.env, job.program):
        if each.outcome != "applied":
            print(_line(f"{each.id} = {each.wanted} left out: {each.why}"), flush=True)
    _close_turn()
    # Not before it was admitted: that looks at what other servers hold.
    if why := keep_apart():
        print(_line(f"not kept apart from other servers: {why}"), flush=True)
    # The words of somebody else's program may hold a key.
    words = job.argv[:1] if declared.command else job.argv
    print(_line(f"starting {' '.join(words)}"), flush=True)
    try:
        if job.prewarm:
            job.prewarm()
        return os.execve(job.program, list(job.argv), dict(job.env))  # noqa: S606
    except OSError as error:
        _tell(UsageError(f"{printable_line(job.program, 200)}: {error.strerror}"))
        return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
