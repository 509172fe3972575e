# SPDX-License-Identifier: Apache-2.0
"""``infertune report``: what the other verbs say of this machine, in one file to show to others."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from infertune import __version__
from infertune.base.errors import Exit, Failed, InfertuneError, UsageError, describe
from infertune.base.root import write_user_file
from infertune.base.units import format_size
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.cli.main import said
from infertune.cli.measured import Told, measured_here
from infertune.doctor.facts import read_facts
from infertune.doctor.surroundings import LlamaServer, look_around, recorded
from infertune.host.machine import read_machine
from infertune.host.privacy import cleaned, cleaner
from infertune.host.system import hostname, release
from infertune.host.unknown import Unknown
from infertune.host.version import format_version
from infertune.measure.verdicts import amount, stale
from infertune.views import report
from infertune.views.html import html
from infertune.views.markdown import markdown

_FILE = "infertune-report.html"
_MODE = 0o600
"""Only its owner reads it before it is shown to others."""


def _report(ctx: Context) -> int:
    args = ctx.args
    if args.json and (args.output or args.markdown):
        raise UsageError("--json prints the document; it goes with neither -o nor --markdown")
    document = _document(ctx)
    if args.json:
        ctx.print_json("infertune.report/1", document)
        return Exit.DONE
    page = report.page(document)
    text = markdown(page) if args.markdown else html(page)
    file = args.output or ("-" if args.markdown else _FILE)
    if file == "-":
        ctx.piece(text)
        return Exit.FAILED if ctx.lost else Exit.DONE
    data = text.encode()
    try:
        write_user_file(file, data, force=args.force, mode=_MODE)
    except FileExistsError as error:
        raise UsageError(f"{file}: exists already", hint="use --force to replace it") from error
    except OSError as error:
        raise Failed(f"{file}: {error.strerror}") from error
    ctx.print(f"{file}: {format_size(len(data))}, readable by you alone")
    for each in page.about[1:]:
        ctx.sentence(each, 0)
    return Exit.DONE


# -- what is in it -------------------------------------------------------------------


def _document(ctx: Context) -> dict[str, Any]:
    """Everything, once; a part that cannot be had is null, and ``unknown`` says why."""
    unknown: dict[str, str] = {}

    def part(name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except InfertuneError as error:
            unknown[name] = error.message
        except OSError as error:
            unknown[name] = describe(error)
        except Exception as error:  # a report of a bug must not fall over it
            unknown[name] = f"a bug: {type(error).__name__}: {error}"
        return None

    found = {
        "machine": part("machine", lambda: said(ctx, "machine")),
        "status": part("status", lambda: said(ctx, "status")),
        "servers": part("servers", lambda: _server_list(ctx)),
        "doctor": part("doctor", lambda: said(ctx, "doctor")),
        "verdicts": part("verdicts", lambda: _verdicts(ctx)),
        "boot": part("boot", lambda: said(ctx, "boot", "status")),
        "probes": part("probes", lambda: said(ctx, "probes")["probes"]),
        "versions": part("versions", lambda: _versions(ctx)),
    }
    host = hostname(ctx.root)
    shown = ctx.args.host_name
    document = {
        "infertune": __version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **cleaned({**found, "unknown": unknown}, cleaner("" if shown else host)),
    }
    return {**document, "host_name": host or None if shown else None}


_OF_A_SERVER = ("name", "state", "profile", "port", "model", "engine", "error")
"""Neither the address it listens on nor the user whose unit it is."""


def _server_list(ctx: Context) -> list[dict[str, Any]]:
    found = said(ctx, "servers")["servers"]
    return [{field: each[field] for field in _OF_A_SERVER} for each in found]


def _verdicts(ctx: Context) -> list[dict[str, Any]]:
    """What 'infertune prove' has found here, the newest first."""
    kernel = release(ctx.root)
    return [
        {
            "setting": one.setting,
            "found": amount(one),
            **Told(one, tuple(stale(ctx.root, one, kernel))).document,
        }
        for one in measured_here(ctx, read_machine(ctx.root))
    ]


def _versions(ctx: Context) -> Mapping[str, str | None]:
    """What matters to a server, by name; null where it is not known, absent where it is not
    there."""
    around = look_around(ctx.root, os.environ) if ctx.live else recorded(ctx.root)
    facts = read_facts(ctx.root, around)
    found: dict[str, str | None] = {"infertune": __version__, "Linux": facts.machine.kernel}
    if ctx.live:
        found["Python"] = platform.python_version()
    if isinstance(facts.rocm, Unknown):
        found["ROCm"] = None
    elif facts.rocm:
        found["ROCm"] = format_version(facts.rocm)
    if isinstance(facts.server, LlamaServer):
        found["llama-server"] = facts.server.version
    elif facts.server:
        found["llama-server"] = None
    if not isinstance(facts.vulkan, Unknown) and facts.vulkan:
        found["Vulkan drivers"] = ", ".join(facts.vulkan)
    if not isinstance(facts.mes, Unknown):
        found["MES firmware"] = f"{facts.mes:#x}"
    return found | ({} if isinstance(facts.packages, Unknown) else dict(facts.packages))


COMMANDS: tuple[Command, ...] = (
    verb(
        "report",
        _report,
        (
            argument(
                "-o",
                "--output",
                metavar="FILE",
                help=f"file to write; '-' prints it (default: {_FILE})",
            ),
            argument("--force", action="store_true", help="replace an existing file"),
            argument(
                "--markdown",
                action="store_true",
                help="Markdown for an issue, printed unless -o says where to",
            ),
            argument("--host-name", action="store_true", help="do not leave out this host's name"),
            JSON,
        ),
        "Writes what 'machine', 'status', 'servers', 'doctor', 'boot status' and 'probes' say, and "
        "versions, to one HTML file that loads nothing and runs nothing. "
        f"{report.LEFT_OUT}, and the host's name. The names of servers, models, units and of "
        "programs that hold GPU memory are in it. Only its owner can read the file; needs no "
        "privileges, and as root it may hold more. With --root it is about a recorded machine.",
    ),
)
