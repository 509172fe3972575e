# SPDX-License-Identifier: Apache-2.0
"""The verbs about profiles: which there are, what one says, whether it is valid, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infertune.base.errors import Exit, ProfileError
from infertune.catalogue.backends import BACKENDS
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.cli.engine import BACKEND, PROFILE
from infertune.cli.measured import Told, lines, measured_here, told
from infertune.cli.render import amount, counted
from infertune.host.machine import Machine, read_machine
from infertune.measure.verdicts import WHOLE
from infertune.profiles.profile import (
    SEARCH_PATH,
    Given,
    Profile,
    Section,
    Source,
    check_file,
    check_profile,
    load_profile,
    places,
    value_type,
)
from infertune.profiles.resolve import Desired, Setting, assume_backend, resolve

_TABLES: dict[Section, str] = {
    "now": "now",
    "boot": "boot",
    "launch": "launch",
    "env": "launch.env",
    "server": "server",
}


# -- profiles ------------------------------------------------------------------


def _list(ctx: Context) -> int:
    rows: list[dict[str, Any]] = []
    for name, found in places(ctx.root).items():
        profile, problems = check_profile(ctx.root, name)
        rows.append(
            {
                "name": name,
                "description": profile.description if profile else None,
                "from": SEARCH_PATH[found[0].level] if found[0].on_machine else "infertune",
                "file": found[0].file,
                "overrides": [place.file for place in found[1:]],
                "error": problems[0].message if problems else None,
            }
        )
    if ctx.args.json:
        ctx.print_json("infertune.profiles/1", {"profiles": rows})
        return Exit.DONE
    ctx.table(
        ("PROFILE", "FROM", "WHAT IT IS FOR"),
        [
            (
                row["name"],
                row["from"],
                f"not valid: {row['error']}" if row["error"] else row["description"],
            )
            for row in rows
        ],
    )
    for row in rows:
        if row["overrides"]:
            ctx.print(f"\n{row['name']}: {row['file']} overrides {', '.join(row['overrides'])}")
    return Exit.DONE


# -- profile show --------------------------------------------------------------


def _show(ctx: Context) -> int:
    profile = load_profile(ctx.root, ctx.args.profile)
    if ctx.args.json:
        ctx.print_json("infertune.profile/1", _document(profile))
    else:
        ctx.verbatim("\n".join(as_toml(profile)))
    return Exit.DONE


def as_toml(profile: Profile) -> Iterator[str]:
    """The profile with everything it inherits, as lines of one file without parents."""
    yield f"description = {_literal(profile.description)}"
    yield from _tables("", profile.general.values())
    for backend in BACKENDS:
        yield from _tables(f"backend.{backend}.", _differing(profile, backend))


def _tables(prefix: str, settings: Iterable[Given]) -> Iterator[str]:
    by_section: dict[Section, list[Given]] = {}
    for given in settings:
        by_section.setdefault(given.section, []).append(given)
    for section, table in _TABLES.items():
        if section in by_section:
            yield f"\n[{prefix}{table}]"
            yield from map(_statement, sorted(by_section[section], key=lambda given: given.id))


def _differing(profile: Profile, backend: str) -> list[Given]:
    """The settings that are not the same with this backend as in general."""
    settings = profile.by_backend[backend]
    return [given for key, given in settings.items() if profile.general.get(key) != given]


def _statement(given: Given) -> str:
    value = _literal(given.configured)
    if given.required or given.because:
        fields = [f"value = {value}"]
        fields += ["required = true"] if given.required else []
        fields += [f"because = {_literal(given.because)}"] if given.because else []
        value = f"{{ {', '.join(fields)} }}"
    # Such keys need no quotes between their dots.
    bare = re.fullmatch(r"[\w-]+(?:\.[\w-]+)*", given.id, re.ASCII)
    return f"{given.id if bare else _literal(given.id)} = {value}"


def _literal(value: object) -> str:
    """A text, number or truth value as TOML; JSON says the same but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _document(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "description": profile.description,
        "file": profile.file,
        "extends": [parent.name for parent in profile.parents],
        "settings": [_given(given) for given in profile.general.values()],
        "backends": {
            backend: [_given(given) for given in _differing(profile, backend)]
            for backend in BACKENDS
        },
    }


def _given(given: Given) -> dict[str, Any]:
    return {
        "table": _TABLES[given.section],
        "id": given.id,
        "value": given.configured,
        "required": given.required,
        "because": given.because,
        "source": str(given.source),
    }


# -- profile check -------------------------------------------------------------


def _check(ctx: Context) -> int:
    name: str = ctx.args.profile
    check = check_file if "/" in name or name.endswith(".toml") else check_profile
    profile, problems = check(ctx.root, name)
    if ctx.args.json:
        errors = [
            {"file": problem.file, "line": problem.line, "message": problem.message}
            for problem in problems
        ]
        ctx.print_json("infertune.profile-check/1", {"valid": not problems, "errors": errors})
    else:
        for problem in problems:
            ctx.print(problem.message)
            if problem.hint:
                ctx.print(f"  {problem.hint}")
        if profile:
            ctx.print(f"{profile.file}: valid, {counted(len(profile.general), 'setting')}")
        else:
            ctx.print(counted(len(problems), "problem"))
    return ProfileError.exit_code if problems else Exit.DONE


# -- profile explain -----------------------------------------------------------


def _explain(ctx: Context) -> int:
    profile = load_profile(ctx.root, ctx.args.profile)
    machine = read_machine(ctx.root)
    backend, why = ctx.args.backend, "as asked"
    if backend == "auto":
        backend, why = assume_backend(machine)
    desired = resolve(profile, machine, backend)
    measured = _measured(ctx, machine, desired)
    if ctx.args.json:
        document = _explanation(desired, machine, why, measured)
        ctx.print_json("infertune.profile-explain/1", document)
        return Exit.DONE
    ctx.print(f"{profile.name}: {profile.description}")
    ctx.print(f"backend {backend}: {why}")
    for line in lines(measured[WHOLE]):
        ctx.print(line)
    for section, settings in _sections(desired):
        if settings:
            ctx.print(f"\n[{_TABLES[section]}]")
        for setting in settings:
            for line in _reasons(section, setting, machine):
                ctx.print(line)
            for line in lines(measured[setting.id]):
                ctx.print(f"    {line}")
    if desired.unresolved:
        ctx.print("\nleft out on this machine:")
        for left in desired.unresolved:
            ctx.print(f"{left.id} = {_literal(left.configured)}")
            ctx.print(f"    {left.reason} ({left.source})")
    return Exit.DONE


def _measured(ctx: Context, machine: Machine, desired: Desired) -> dict[str, list[Told]]:
    """What was found here of this profile, by setting."""
    verdicts = measured_here(ctx, machine)
    values = {setting.id: setting.canonical for _, group in _sections(desired) for setting in group}
    return {
        name: told(ctx, machine, verdicts, name, profile=desired.profile, value=value)
        for name, value in [(WHOLE, None), *values.items()]
    }


def _sections(desired: Desired) -> list[tuple[Section, list[Setting]]]:
    return [
        ("now", list(desired.now)),
        ("boot", list(desired.boot)),
        ("launch", list(desired.launch.values())),
        ("env", list(desired.env.values())),
        ("server", list(desired.server.values())),
    ]


def _reasons(section: Section, setting: Setting, machine: Machine) -> Iterator[str]:
    configured = _literal(setting.configured)
    here = f", here {_amount(section, setting)}" if _says_more(setting) else ""
    required = ", required" if setting.required else ""
    yield f"{setting.id} = {configured}{here}{required}"
    yield f"    set by {_by(setting.source)}"
    if setting.because:
        yield f"    because {setting.because}"
    for source, value in setting.overridden:
        yield f"    instead of {_literal(value)} by {_by(source)}"
    if evidence := _evidence(section, setting.id):
        yield f"    evidence: {evidence}"
    if note := _note(section, setting.id, machine):
        yield f"    {note}"


def _says_more(setting: Setting) -> bool:
    """Whether the value on this machine is not simply what the profile says."""
    return isinstance(setting.configured, str) and setting.configured != setting.canonical


def _amount(section: Section, setting: Setting) -> str:
    """The value on this machine."""
    return amount(setting.canonical, value_type(section, setting.id).unit_bytes)


def _by(source: Source) -> str:
    return f"{source.profile} ({source})"


def _evidence(section: Section, name: str) -> str | None:
    if section in ("now", "boot"):
        return KNOBS[name].evidence.label
    return LAUNCH_SETTINGS[name].evidence.label if section == "launch" else None


def _note(section: Section, name: str, machine: Machine) -> str | None:
    return KNOBS[name].note(machine) if section in ("now", "boot") else None


def _explanation(
    desired: Desired, machine: Machine, why: str, measured: Mapping[str, list[Told]]
) -> dict[str, Any]:
    return {
        "profile": desired.profile,
        "backend": desired.backend,
        "backend_why": why,
        "measured_here": [each.document for each in measured[WHOLE]],
        "settings": [
            {
                "table": _TABLES[section],
                "id": setting.id,
                "configured": setting.configured,
                "value": setting.canonical,
                "required": setting.required,
                "because": setting.because,
                "source": str(setting.source),
                "profile": setting.source.profile,
                "overridden": [
                    {"source": str(source), "profile": source.profile, "configured": value}
                    for source, value in setting.overridden
                ],
                "evidence": _evidence(section, setting.id),
                "measured_here": [each.document for each in measured[setting.id]],
                "note": _note(section, setting.id, machine),
            }
            for section, settings in _sections(desired)
            for setting in settings
        ],
        "unresolved": [
            {
                "id": left.id,
                "configured": left.configured,
                "reason": left.reason,
                "source": str(left.source),
            }
            for left in desired.unresolved
        ],
    }


# -- the verbs -----------------------------------------------------------------

COMMANDS: tuple[Command, ...] = (
    verb(
        "profiles",
        _list,
        arguments=(JSON,),
        description=(
            "Lists every profile of the search path: /etc/infertune/profiles, "
            "/run/infertune/profiles, /usr/local/lib/infertune/profiles, "
            "/usr/lib/infertune/profiles, and those that come with infertune. The first "
            "directory that has a profile wins; a profile may extend the one of its own name "
            "in a later directory."
        ),
    ),
    verb(
        "profile",
        subcommands=(
            Command(
                "show",
                "print a profile with everything it inherits",
                _show,
                arguments=(PROFILE, JSON),
                description="Prints the profile as one TOML file in which nothing is inherited.",
            ),
            Command(
                "check",
                "check that a profile is valid",
                _check,
                arguments=(
                    argument(
                        "profile",
                        metavar="PROFILE|FILE",
                        help="name of a profile, or a .toml file",
                    ),
                    JSON,
                ),
                description=(
                    "Prints everything that is wrong with a profile and its parents, with file "
                    "and line. Exit code 0 if it is valid, 2 if not. Reads nothing but profiles "
                    "and changes nothing."
                ),
            ),
            Command(
                "explain",
                "say who sets each value of a profile, and why",
                _explain,
                arguments=(PROFILE, BACKEND, JSON),
                description=(
                    "Prints for each setting its value on this machine, the file and line that "
                    "set it, the reason given there, what it overrides, how well its effect is "
                    "known, and what 'infertune prove' found on this machine."
                ),
            ),
        ),
    ),
)
