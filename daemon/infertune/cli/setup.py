# SPDX-License-Identifier: Apache-2.0
"""``infertune setup``: the files of the service."""

from __future__ import annotations

from infertune.cli.base import JSON, Command, Context, argument
from infertune.errors import Exit
from infertune.service.setup import install, remove


def _setup(ctx: Context) -> Exit:
    placed = remove(ctx.root) if ctx.args.remove else install(ctx.root)
    if ctx.args.json:
        files = [{"path": each.path, "outcome": each.outcome} for each in placed]
        ctx.print_json("infertune.setup/1", {"files": files})
        return Exit.DONE
    for each in placed:
        ctx.print(f"{each.outcome:8} {each.path}")
    if not ctx.args.remove:
        ctx.print("next: systemctl enable --now infertune")
    return Exit.DONE


COMMANDS: tuple[Command, ...] = (
    Command(
        "setup",
        "install the files of the service, or remove them",
        _setup,
        (argument("--remove", action="store_true", help="remove what setup installs"), JSON),
        "Writes the units, the bus policy and the polkit actions; a second run changes nothing. "
        "'--remove' stops servers and exporter and takes away exactly these files.",
    ),
)
