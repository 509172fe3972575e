# SPDX-License-Identifier: Apache-2.0
"""``infertune`` alone: how this machine stands, on one small screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infertune.base.errors import Exit
from infertune.base.units import format_size
from infertune.boot.sizes import look
from infertune.boot.state import read_status
from infertune.cli import doctor
from infertune.cli.base import JSON, Command, Context, verb
from infertune.cli.engine import applied_now, daemon_runs
from infertune.cli.render import counted
from infertune.doctor.base import SEVERITIES
from infertune.doctor.rules import RULES
from infertune.host.machine import Machine, read_machine
from infertune.host.unknown import Unknown
from infertune.pools.judge import Picture
from infertune.servers.foreground import foreground

_UNKNOWN = "unknown"
_BOOT = {
    "none": "nothing staged",
    "staged": "staging was cut short",
    "pending-reboot": "staged settings wait for a reboot",
    "active": "staged settings are in force",
    "overridden": "something overrides staged settings",
    "failed": "staged settings were put back",
}
"""What each state of the boot settings comes to."""


def _overview(ctx: Context) -> int:
    machine = read_machine(ctx.root)
    memory = look(ctx.root, machine)
    applied, servers = applied_now(ctx), _servers(ctx)
    boot = read_status(ctx.root, machine).state
    results = doctor.ask(ctx, list(RULES.values()))
    counts: dict[str, int] = {
        each: sum(one.severity == each for one in results) for each in SEVERITIES
    }
    command, why = next_step(applied, boot, counts, servers)
    if ctx.args.json:
        now = memory.now
        document = {
            "machine": machine.dmi.product,
            "kernel": machine.kernel,
            "memory_bytes": machine.memory.total_bytes,
            "gpu_memory_bytes": None if isinstance(now, Unknown) else now.bytes,
            "state": applied["state"],
            "profile": applied["applied"]["profile"] if applied["applied"] else None,
            "boot": boot,
            "servers": [{"name": name, "state": state} for name, state in servers],
            "findings": counts,
            "next": {"command": command, "why": why},
        }
        ctx.print_json("infertune.overview/1", document)
        return Exit.DONE
    ctx.labelled(
        [
            ("machine", f"{_known(machine.dmi.product)}, Linux {_version(machine)}"),
            ("memory", _memory(machine, memory)),
            ("profile", _applied(applied)),
            ("boot", _BOOT[boot]),
            ("servers", ", ".join(f"{name} {state}" for name, state in servers) or "none"),
            ("doctor", doctor.found(results)),
            ("next", f"{command}: {why}"),
            ("help", "infertune --help"),
        ]
    )
    return Exit.DONE


def _known(text: str | None) -> str:
    return text or _UNKNOWN


def _version(machine: Machine) -> str:
    """The kernel's, without what a distribution appends to it."""
    return _known(machine.kernel).partition("-")[0]


def _memory(machine: Machine, found: Picture) -> str:
    total, now = machine.memory.total_bytes, found.now
    ram = _UNKNOWN if total is None else format_size(total)
    gpu = (
        f"GPU memory {_UNKNOWN}"
        if isinstance(now, Unknown)
        else (f"{format_size(now.bytes)} for the GPU ({now.name})")
    )
    return f"{ram}, {gpu}" if machine.inference_gpu else f"{ram}, no AMD GPU"


def _applied(status: Mapping[str, Any]) -> str:
    about = status["applied"]
    if about is None:
        return "none applied" if status["state"] == "idle" else status["state"]
    more = counted(sum(each["outcome"] != "already" for each in status["items"]), "setting")
    left = "" if more.startswith("no ") else f", {more} changed by others since"
    return f"{about['profile']} ({about['backend']}), {status['state']}{left}"


def _servers(ctx: Context) -> list[tuple[str, str]]:
    """Name and state of each model server that infertune knows."""
    if daemon_runs(ctx):
        from infertune.service.client import call

        return [(each["name"], each["state"]) for each in call("Servers", "", ())]
    return [(each.name, "active") for each in foreground(ctx.root)]


def next_step(
    status: Mapping[str, Any],
    boot: str,
    findings: Mapping[str, int],
    servers: Sequence[tuple[str, str]],
) -> tuple[str, str]:
    """A command to type, and what it is for: what is wrong first, then the way to a server.

    ``findings``: how many the doctor has, by severity.
    """
    state = status["state"]
    if state not in ("idle", "applied", "running"):
        return "infertune recover", f"what was applied is {state}"
    if findings["error"]:
        return "infertune doctor", f"{counted(findings['error'], 'error')} to put right"
    if boot not in ("none", "active"):
        return "infertune boot status", _BOOT[boot]
    if failed := next((name for name, how in servers if how == "failed"), None):
        return f"infertune logs {failed}", "it has failed"
    if servers and findings["warning"]:
        return "infertune doctor", f"{counted(findings['warning'], 'warning')} to look at"
    if servers:
        return "infertune status", "all is as it should be"
    if status["applied"]:
        return f"infertune serve {status['applied']['profile']}", "nothing is served yet"
    return "infertune recommend", "which profile suits this machine"


COMMANDS: tuple[Command, ...] = (
    verb(
        "overview",
        _overview,
        (JSON,),
        "Says on one small screen what this machine is, how much memory its GPU may use, which "
        "profile is applied, what is staged for the next boot, which model servers there are, what "
        "the doctor has found, and what to do next. 'infertune' alone does the same.",
    ),
)
