# SPDX-License-Identifier: Apache-2.0
"""``infertune setup``: the files of the service."""

from __future__ import annotations

from infertune.base.errors import Exit, UsageError
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.service.setup import check, install, remove


def _setup(ctx: Context) -> int:
    if ctx.args.remove and ctx.args.check:
        raise UsageError("'--check' says what setup would install; it goes without '--remove'")
    work = remove if ctx.args.remove else check if ctx.args.check else install
    placed = work(ctx.root)
    code = Exit.DIFFERS if {"missing", "differs"} & {e.outcome for e in placed} else Exit.DONE
    if ctx.args.json:
        files = [{"path": each.path, "outcome": each.outcome} for each in placed]
        ctx.print_json("infertune.setup/1", {"files": files})
        return code
    for each in placed:
        ctx.print(f"{each.outcome:8} {each.path}")
    if not (ctx.args.remove or ctx.args.check):
        ctx.print("next: systemctl enable --now infertune")
    return code


COMMANDS: tuple[Command, ...] = (
    verb(
        "setup",
        _setup,
        (
            argument("--remove", action="store_true", help="remove what setup installs"),
            argument("--check", action="store_true", help="change nothing; exit 1 if setup would"),
            JSON,
        ),
        "Writes the units, the bus policy and the polkit actions; a second run changes nothing. "
        "'--remove' stops servers and exporter and takes away exactly these files.",
    ),
)
