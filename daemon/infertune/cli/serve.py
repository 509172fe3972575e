# SPDX-License-Identifier: Apache-2.0
"""Model servers as units of the system: serve, servers, stop, logs."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from infertune.cli.base import JSON, Command, Context, argument
from infertune.cli.engine import BACKEND, PROFILE, daemon_runs
from infertune.cli.run import Silent
from infertune.errors import Exit, Failed, NotPermitted, Unreachable, UsageError
from infertune.launch.client import healthy
from infertune.launch.ready import choose_port
from infertune.launch.system import show_log
from infertune.machine import read_machine
from infertune.run import Request, Result, Run, prepare
from infertune.server_settings import SERVER_SETTINGS
from infertune.service.declared import write_declaration
from infertune.service.names import NAME
from infertune.service.servers import Declaration, systemd_run_line

_READY_S = 600.0
"""Patience with a model that loads: 120 GiB at 200 MB/s."""

NAMED = argument("name", metavar="NAME", help="name of the server ('infertune servers')")


def _call(member: str, signature: str = "", *arguments: Any) -> Any:
    from infertune.service.client import call

    return call(member, signature, arguments)


def _need_daemon(ctx: Context) -> None:
    if not daemon_runs(ctx):
        raise Unreachable(
            "infertuned is not running; servers are its units", hint="systemctl start infertune"
        )


def _serve(ctx: Context) -> Exit:
    args = ctx.args
    name = args.name or args.profile
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is not a server name", hint=f"a name matches {NAME.pattern}")
    declaration = Declaration(
        name=name,
        profile=args.profile,
        model=os.path.abspath(args.model) if args.model else None,
        port=choose_port(args.port),
        backend=args.backend,
        settings=dict(_setting(text) for text in args.set),
    )
    if args.print:
        ctx.print(_as_systemd_run(ctx, declaration))
        return Exit.DONE
    _need_daemon(ctx)
    if os.geteuid() != 0:
        raise NotPermitted(
            "declaring a server needs root; nothing was touched",
            hint="a server that is declared in /etc/infertune/servers.d starts with the daemon",
        )
    write_declaration(ctx.root, declaration)
    unit = _call("Serve", "s", name)
    url = f"http://127.0.0.1:{declaration.port}"
    ready_s = _wait(name, url)
    if args.json:
        ctx.print_json(
            "infertune.serve/1", {"name": name, "unit": unit, "url": url, "ready_s": ready_s}
        )
    else:
        ctx.print(f"{name}: ready after {ready_s:.1f} s at {url}; unit {unit}")
    return Exit.DONE


def _setting(text: str) -> tuple[str, str | int | bool]:
    """``ctx_size=4096`` as a profile would say it.  Raises UsageError."""
    name, _, value = text.partition("=")
    if name not in SERVER_SETTINGS:
        raise UsageError(f"--set {text}: there is no server setting '{name}'")
    try:
        configured = json.loads(value)
    except ValueError:
        configured = value
    try:
        SERVER_SETTINGS[name].value.parse(configured)
    except ValueError as error:
        raise UsageError(f"--set {name}: {error}") from None
    return name, configured


def _as_systemd_run(ctx: Context, declaration: Declaration) -> str:
    request = Request(
        profile=declaration.profile,
        caller=dict(os.environ),
        backend=declaration.backend,
        model=declaration.model,
        port=declaration.port,
    )
    result = Result(profile=declaration.profile)
    one = Run(ctx.root, read_machine(ctx.root), request, result, Silent(ctx))
    desired, job = prepare(one)
    env = {name: setting.canonical for name, setting in desired.env.items()}
    return systemd_run_line(declaration, desired, job.argv, env)


def _wait(name: str, url: str) -> float:
    """Seconds until the server answers.  Raises Failed where its unit ends first."""
    begin = time.monotonic()
    while time.monotonic() - begin < _READY_S:
        if healthy(url):
            return time.monotonic() - begin
        state = next((s["state"] for s in _call("Servers") if s["name"] == name), "gone")
        if state in ("failed", "inactive", "gone"):
            raise Failed(f"{name}: its unit is {state}", hint=f"infertune logs {name}")
        time.sleep(0.3)
    raise Failed(f"{name}: no answer in {_READY_S:.0f} s", hint=f"infertune logs {name}")


def _servers(ctx: Context) -> Exit:
    _need_daemon(ctx)
    found = _call("Servers")
    if ctx.args.json:
        fields = ("name", "state", "profile", "port", "model", "error")
        ctx.print_json(
            "infertune.servers/1",
            {"servers": [{field: each.get(field) for field in fields} for each in found]},
        )
    elif found:
        rows = [
            (
                each["name"],
                each["state"],
                each.get("profile", "-"),
                str(each.get("port", "-")),
                each.get("error") or each.get("model") or "the embedded model",
            )
            for each in found
        ]
        ctx.table(("SERVER", "STATE", "PROFILE", "PORT", "MODEL"), rows)
    else:
        ctx.print("no servers")
    return Exit.DONE


def _stop(ctx: Context) -> Exit:
    _need_daemon(ctx)
    _call("Stop", "s", ctx.args.name)
    if ctx.args.json:
        ctx.print_json("infertune.stop/1", {"name": ctx.args.name})
    else:
        ctx.print(f"{ctx.args.name}: stopped")
    return Exit.DONE


def _logs(ctx: Context) -> Exit:
    if not NAME.fullmatch(ctx.args.name):
        raise UsageError("not a server name", hint=f"a name matches {NAME.pattern}")
    code = show_log(f"infertune-server@{ctx.args.name}.service", as_json=ctx.args.json)
    return Exit.DONE if code == 0 else Exit.FAILED


COMMANDS: tuple[Command, ...] = (
    Command(
        "serve",
        "start a model server as a unit, under a profile",
        _serve,
        (
            PROFILE,
            argument("--model", metavar="GGUF", help="model to serve (default: the embedded one)"),
            argument("--name", metavar="NAME", help="name of the server (default: the profile's)"),
            argument("--port", type=int, metavar="PORT", help="default: the first free from 8080"),
            BACKEND,
            argument(
                "--set",
                action="append",
                default=[],
                metavar="SETTING=VALUE",
                help="a server setting over the profile's; may be given more than once",
            ),
            argument(
                "--print",
                action="store_true",
                help="print the equivalent systemd-run command instead",
            ),
            JSON,
        ),
        "Declares the server for this boot and asks infertuned to start it: an unprivileged unit "
        "in infertune.slice with the profile's memory protection, CPUs and limits. It outlives the "
        "daemon. With nothing applied, the profile is applied first.",
    ),
    Command("servers", "list model servers", _servers, (JSON,), "Declared and running servers."),
    Command("stop", "stop a model server", _stop, (NAMED, JSON), "Stops the unit and forgets it."),
    Command(
        "logs",
        "show what a model server printed",
        _logs,
        (NAMED, JSON),
        "The unit's lines of the system journal; as JSON one entry per line, as journalctl prints.",
    ),
)
