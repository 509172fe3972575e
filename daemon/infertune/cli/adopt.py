# SPDX-License-Identifier: Apache-2.0
"""Putting servers that people already run under a profile, and giving them back."""

from __future__ import annotations

import pwd
import re
from typing import Any

from infertune.base.errors import Exit, UsageError
from infertune.base.names import NAME, NAME_RULE, OF_CONTAINER, USER, is_foreign_unit
from infertune.base.tables import shown
from infertune.cli.base import JSON, Command, Context, argument, size, verb, whole
from infertune.cli.engine import BACKEND, daemon_runs, no_daemon
from infertune.cli.render import counted
from infertune.servers.declaration import ADMISSIONS
from infertune.servers.engines import ENGINES


def _call(member: str, signature: str, *arguments: Any) -> Any:
    from infertune.service.client import call

    return call(member, signature, arguments)


def _need_daemon(ctx: Context) -> None:
    if not daemon_runs(ctx):
        raise no_daemon(ctx, "infertuned is not running; it adopts units and gives them back")


def name_for(unit: str) -> str:
    """What a unit is called as a server, where nobody says.

    ``ollama.service`` is ``ollama``, ``llm-server@qwen.service`` is ``llm-server-qwen``, and a
    container has twelve digits of its id: ``libpod-0123456789ab``.
    """
    stem = re.sub(r"\.(service|scope)$", "", unit)
    stem = re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1", stem)
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-")[:64]


def _adopt(ctx: Context) -> int:
    args = ctx.args
    unit = args.unit if "." in args.unit else f"{args.unit}.service"
    name = args.name or name_for(args.unit if args.container else unit)
    if args.container:
        unit = OF_CONTAINER + args.unit
    elif not is_foreign_unit(unit):
        raise UsageError(
            f"{shown(args.unit)} cannot be adopted: a service or scope that runs a server can be",
            hint="'systemctl list-units --type=service,scope' shows what there is",
        )
    if not NAME.fullmatch(name):
        raise UsageError(f"{shown(name)} is not a server name: {NAME_RULE}", hint="give a --name")
    user = "" if args.user is None else _number(args.user)
    _need_daemon(ctx)
    asked = (unit, user, name, args.profile or "", args.backend)
    more = (args.port or 0, args.engine or "", args.admission or "", args.memory or 0)
    member = "PlanAdoption" if args.plan else "Adopt"
    if any(more):
        done = _call(f"{member}With", "sssssusst", *asked, *more)
    else:  # as a daemon of the version before has it, too
        done = _call(member, "sssss", *asked)
    if args.json:
        ctx.print_json("infertune.adopt/1", {**done, "planned": args.plan})
    else:
        _say(ctx, done)
    return Exit.DIFFERS if done["notes"] else Exit.DONE


def _number(user: str) -> str:
    """A user as the daemon is told: of whom it cannot know the name it is told the number."""
    if not USER.fullmatch(user):
        raise UsageError(f"{shown(user)} is not a user: a name, or a number that is not 0")
    if user.isdecimal():
        return user
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"there is no user '{user}'") from None
    if uid == 0:
        raise UsageError("root's units are the system's", hint="without --user")
    return str(uid)


def _say(ctx: Context, done: dict[str, Any]) -> None:
    ctx.print(f"{done['unit']}: profile {done['profile']}, backend {done['backend']}")
    rows = [
        (each["unit"], each["property"], each["before"] or "-", each["wanted"], each["when"])
        for each in done["items"]
    ]
    if rows:
        ctx.table(("UNIT", "PROPERTY", "NOW", "WANTED", "WHEN"), rows)
    changed = [each for each in done["items"] if each["when"] == "now"]
    changed = [each for each in changed if each["before"] != each["wanted"]]
    later = [each for each in done["items"] if each["when"] == "next start"]
    if ctx.args.plan:
        _notes(ctx, done)
        ctx.print(f"{counted(len(changed), 'property', 'properties')} to change; nothing written")
        return
    ctx.print(f"{counted(len(changed), 'property', 'properties')} changed")
    if later and done["active"]:
        whose = "systemctl" if done["user"] is None else "systemctl --user"
        ctx.print(f"the rest takes effect at its next start: {whose} restart {done['unit']}")
    _notes(ctx, done)
    ctx.print(f"infertune release {done['name']} puts everything back")


def _notes(ctx: Context, done: dict[str, Any]) -> None:
    for note in done["notes"]:
        ctx.print(f"note: {note}")


def _adopted_name(given: str) -> str:
    """The name of an adopted server, which may be given by its unit."""
    if NAME.fullmatch(given):
        return given
    unit = given if "." in given else f"{given}.service"
    servers = _call("Servers", "")
    return next((each["name"] for each in servers if each.get("unit") == unit), name_for(unit))


def _release(ctx: Context) -> int:
    _need_daemon(ctx)
    done = _call("GiveBack", "s", _adopted_name(ctx.args.name))
    if ctx.args.json:
        ctx.print_json("infertune.release/1", done)
    else:
        ctx.print(f"{done['unit']}: given back")
        _notes(ctx, done)
    return Exit.DIFFERS if done["notes"] else Exit.DONE


def _admit(ctx: Context) -> int:
    from infertune.admit import foreign, judge
    from infertune.budget.admission import DoesNotFit

    adopted = foreign(ctx.root, ctx.args.name)
    about = {"name": adopted.name, "unit": adopted.unit, "admission": adopted.admission}
    try:
        found = judge(ctx.root, adopted, {})
    except DoesNotFit as no:
        if not ctx.args.json:
            raise
        ctx.print_json("infertune.admit/1", {**about, "fits": False, "remark": no.message})
        return no.exit_code
    if ctx.args.json:
        fits = True if found.known else None
        ctx.print_json("infertune.admit/1", {**about, "fits": fits, "remark": found.remark})
    else:
        ctx.sentence(f"{adopted.unit}: {found.remark or 'fits'}")
    return Exit.DONE


COMMANDS: tuple[Command, ...] = (
    verb(
        "adopt",
        _adopt,
        (
            argument("unit", metavar="UNIT", help="its service or scope, such as ollama.service"),
            argument(
                "--profile", metavar="PROFILE", help="profile (default: the one that is applied)"
            ),
            argument(
                "--container",
                action="store_true",
                help="UNIT is the name of a container of root's (podman, docker)",
            ),
            argument(
                "--user",
                metavar="USER",
                help="whose manager has it (systemctl --user): name or number",
            ),
            argument("--name", metavar="NAME", help="name of the server (default: the unit's)"),
            argument(
                "--port",
                type=whole("a port", 1, 65535),
                metavar="PORT",
                help="where it answers: the exporter asks there",
            ),
            argument(
                "--engine",
                choices=tuple(ENGINES),
                metavar="ENGINE",
                help=f"what answers there (default: as ExecStart= shows): {', '.join(ENGINES)}",
            ),
            argument(
                "--admission",
                choices=("off", *ADMISSIONS),
                metavar="WORD",
                help="what becomes of a start that does not fit: warn (its log says so), refuse, "
                "off (nobody looks: the default)",
            ),
            argument(
                "--memory",
                type=size("a size"),
                metavar="SIZE",
                help="what it takes, for --admission: 64GiB (default: as its llama-server's flags "
                "show)",
            ),
            BACKEND,
            argument("--plan", action="store_true", help="show what would change; change nothing"),
            JSON,
        ),
        "Gives a unit that infertune did not make the memory protection (through every slice it is "
        "in), CPUs, weight and swap limit of the profile at once, and the rest (locked memory, "
        "priority, environment) from its next start on. What it runs is not touched. Lasts until "
        "'release' or the next boot; for good, declare it in /etc/infertune/servers.d: "
        'unit = "ollama.service".',
    ),
    verb(
        "admit",
        _admit,
        (argument("name", metavar="NAME", help="name of the adopted server"), JSON),
        "Judges what 'adopt --admission' and the key 'admission' have judged before each start: "
        "what its llama-server would allocate, or the 'memory' that is declared, against what the "
        "machine has, less what others hold and are promised. Exit code 2 if it does not fit, 0 "
        "if it does or if that cannot be known. What the unit itself holds now does not count.",
    ),
    verb(
        "release",
        _release,
        (argument("name", metavar="NAME", help="name or unit of the adopted server"), JSON),
        "Puts back every property of the unit and of its slices. One that another program has "
        "changed since is left and reported (exit code 1).",
    ),
)
