# SPDX-License-Identifier: Apache-2.0
"""Model servers as units of the system: serve, servers, stop, logs."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infertune.base.addresses import LOOPBACK, is_loopback, listen_address, reached_at
from infertune.base.addresses import url as url_of
from infertune.base.errors import Busy, Exit, Failed, NotPermitted, UsageError, did_you_mean
from infertune.base.names import DECLARED, NAME, server_unit
from infertune.base.records import dataclass, replace
from infertune.base.root import Root, full_path, read_plain_file
from infertune.budget.admission import Asked, check
from infertune.catalogue.launch_settings import with_tunables
from infertune.cli.base import JSON, Command, Context, argument, printable, verb, whole
from infertune.cli.engine import BACKEND, PROFILE, daemon_runs, no_daemon
from infertune.cli.fit import FORCE, parse_setting
from infertune.doctor.at_launch import warnings
from infertune.doctor.surroundings import LlamaServer, llama_server
from infertune.host.machine import Machine, read_machine
from infertune.host.models import real_path, shown_directory
from infertune.host.sockets import listeners
from infertune.launch.client import healthy, how_to_talk
from infertune.launch.ready import Progress, choose_port
from infertune.launch.system import has_log, show_log
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, canonical, resolve
from infertune.run import Audience, Request, Result, Run, prepare
from infertune.servers.api_key import credential_of, refuse_open_file
from infertune.servers.declaration import (
    TRANSIENT,
    Declaration,
    declaration_text,
    engine_of,
    files,
    own_settings,
    parse_declaration,
    server_settings,
)
from infertune.servers.engines import ENGINES
from infertune.servers.models import model_path
from infertune.servers.store import declared_ports, gpu_groups, write_declaration
from infertune.servers.unit import in_a_home, refuse_a_home, systemd_run_line
from infertune.service.setup import template

_ASK_S = 3.0
_READY_S = 600.0
"""Patience with a model that loads: 120 GiB at 200 MB/s."""

_UID_S = 10.0
"""Patience with systemd, which knows the user of a unit as soon as it runs."""
_TURN_S = 60.0
"""Patience with another 'serve': systemd starts its unit."""

_LOCK = "/run/infertune/serve"

NAMED = argument("name", metavar="NAME", help="name of the server ('infertune servers')")


def _call(member: str, signature: str = "", *arguments: Any) -> Any:
    from infertune.service.client import call

    return call(member, signature, arguments)


def _need_daemon(ctx: Context) -> None:
    if not daemon_runs(ctx):
        raise no_daemon(ctx, "infertuned is not running; servers are its units")


def _serve(ctx: Context) -> int:
    args = ctx.args
    name = args.name or args.profile
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is not a server name", hint=f"a name matches {NAME.pattern}")
    # What the daemon will refuse is refused before it is written.
    text = declaration_text(_asked_for(ctx, name))
    declaration = parse_declaration(name, text, f"{TRANSIENT}/{name}.toml")
    assert isinstance(declaration, Declaration)
    if declaration.api_key_file and not args.print:
        refuse_open_file(ctx.root, declaration.api_key_file)
    machine = read_machine(ctx.root)
    desired = resolve(load_profile(ctx.root, declaration.profile), machine, declaration.backend)
    declaration = _with_files_checked(declaration, desired)
    if args.print:
        ctx.verbatim(_as_systemd_run(ctx, machine, declaration))
        return Exit.DONE
    if declaration.model:
        _refuse_misfit(ctx, machine, declaration, declaration.model, desired)
    if not declaration.command:
        _warn(ctx, desired)
    _need_daemon(ctx)
    if os.geteuid() != 0:
        raise NotPermitted(
            "declaring a server needs root; nothing was touched",
            hint="a server that is declared in /etc/infertune/servers.d starts with the daemon",
        )
    if ctx.root.exists(f"{DECLARED}/{name}.toml"):
        raise UsageError(
            f"'{name}' is declared in {DECLARED}, which counts; nothing was touched",
            hint=f"infertune start {name}, or another --name",
        )
    with _declaring(ctx.root):
        state = _about(name).get("state", "inactive")
        if state not in ("inactive", "failed"):
            raise UsageError(
                f"server '{name}' is {state} already; nothing was touched",
                hint=f"infertune stop {name}, or another --name",
            )
        # Once more: another 'serve' may have declared the port meanwhile.
        declaration = replace(declaration, port=_free_port(ctx, name))
        write_declaration(ctx.root, declaration)
        unit = _call("Serve", "s", name)
    keyed = declaration.api_key_file is not None
    return _wait_and_say(ctx, name, unit, _door_of(declaration), keyed=keyed)


def _asked_for(ctx: Context, name: str) -> Declaration:
    """The server as the command line has it: llama-server, or the program after ``--``."""
    args = ctx.args
    program_is_given = bool(ctx.command) and "=" not in ctx.command[0]
    if not (program_is_given or is_loopback(args.host) or args.api_key_file):
        raise UsageError(
            f"--host {args.host} is reached by other machines, so it needs --api-key-file",
            hint="a file of root's with a key for each line: openssl rand -hex 32",
        )
    if not program_is_given:
        if args.engine:
            raise UsageError("--engine is for a program after --; without one it is llama-server")
        return Declaration(
            name=name,
            profile=args.profile,
            model=real_path(model_path(args.model, os.environ)) if args.model else None,
            port=_free_port(ctx, name),
            backend=args.backend,
            settings=dict(parse_setting(text) for text in ctx.command),
            force=args.force,
            host=args.host,
            api_key_file=full_path(args.api_key_file) if args.api_key_file else None,
        )
    program, *words = ctx.command
    host = None if args.host == LOOPBACK else args.host
    given = {"--model": args.model, "--host": host, "--api-key-file": args.api_key_file}
    for option in (option for option, value in given.items() if value):
        raise UsageError(
            f"{option} is for llama-server: another program takes it in its own words",
            hint="a unit of infertune's lets in this machine alone" if option == "--host" else None,
        )
    path = shutil.which(program)
    if path is None:
        raise UsageError(f"there is no program and no server setting '{printable(program)}'")
    if not args.port:
        raise UsageError("--port is missing: where that program will listen")
    return Declaration(
        name=name,
        profile=args.profile,
        model=None,
        port=_free_port(ctx, name),
        backend=args.backend,
        engine=_engine((os.path.abspath(path), *words), args.engine),
        command=(os.path.abspath(path), *words),
    )


def _engine(command: Sequence[str], named: str | None) -> str:
    """The engine that a command is, where nobody says so by what it starts."""
    found = engine_of(command)
    if named is None and found is None:
        raise UsageError(
            f"infertune does not know which engine '{printable(command[0])}' is",
            hint=f"--engine, one of {', '.join(ENGINES)}",
        )
    return named or found or ""


def _warn(ctx: Context, desired: Desired) -> None:
    """Say what is known to be wrong with the server that the unit will start."""
    found = llama_server(os.environ) if ctx.root.live else None
    if isinstance(found, LlamaServer):
        chosen = [name for name in found.backends if name == desired.backend]
        for text in warnings(ctx.root, found.version, chosen):
            print(f"infertune: {text}", file=sys.stderr)


def _refuse_misfit(
    ctx: Context, machine: Machine, declaration: Declaration, model: str, desired: Desired
) -> None:
    """A first check, so that what does not fit is not even declared: the daemon reads no models.

    Who really gets the room is decided by the unit's launcher, one start at a time.
    """
    asked = Asked(
        name=declaration.name,
        model=model,
        backend=desired.backend,
        settings=server_settings(declaration, desired, machine),
        pid=os.getpid(),
        force=ctx.args.force,
        profile=declaration.profile,
    )
    if remark := check(ctx.root, machine, asked).remark:
        print(f"infertune: {printable(remark)}", file=sys.stderr)


def _start(ctx: Context) -> int:
    _need_daemon(ctx)
    name = ctx.args.name
    about = _about(name)
    if "port" not in about:
        near = did_you_mean(name, [each["name"] for each in _call("Servers")])
        why = about.get("error") or f"no server '{name}' is declared{near}"
        raise UsageError(why, hint=None if near else DECLARED)
    door = Door(about.get("host", LOOPBACK), about["port"], ENGINES[about["engine"]].ready)
    unit = _call("Serve", "s", name)
    return _wait_and_say(ctx, name, unit, door, keyed=about.get("key", False))


@dataclass(frozen=True, slots=True)
class Door:
    """Where a server answers, and what it is asked to say that it is ready."""

    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return url_of(self.host, self.port)


def _door_of(declaration: Declaration) -> Door:
    return Door(declaration.host, declaration.port, ENGINES[declaration.engine].ready)


def _wait_and_say(ctx: Context, name: str, unit: str, door: Door, *, keyed: bool) -> int:
    url, ready_s = door.url, _wait(ctx.root, name, door)
    if ctx.args.json:
        document = {"name": name, "unit": unit, "url": url, "ready_s": ready_s}
        ctx.print_json("infertune.serve/1", document)
    else:
        ctx.print(f"{name}: ready after {ready_s:.1f} s at {url}; unit {unit}")
        for line in how_to_talk(url, keyed=keyed):
            ctx.print(line)
    return Exit.DONE


def _with_files_checked(declaration: Declaration, desired: Desired) -> Declaration:
    """The declaration with its files where they really are: what is checked is what is used."""
    named = files(declaration, desired)
    real = {what: real_path(path) for what, path in named.items()}
    for what, path in real.items():
        if what == "models_dir":
            _refuse_closed(what, path)
        else:
            kind = b"GGUF" if what != "models_preset" else b""
            _refuse_unreadable("--model" if what == "model" else what, path, kind)
    model = real.pop("model", None)
    moved = {what: path for what, path in real.items() if path != named[what].rstrip("/")}
    return replace(declaration, model=model, settings={**(declaration.settings or {}), **moved})


def _refuse_closed(what: str, path: str) -> None:
    """Raise UsageError for a directory that a unit's user cannot list."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{what} {path}: not a directory")
    if not status.st_mode & stat.S_IROTH:
        raise UsageError(
            f"{what} {path}: the server runs as a user of its own, who may not list it",
            hint=f"chmod o+r {shlex.quote(path)}",
        )
    _refuse_a_closed_way(what, f"{path}/")


def _refuse_unreadable(what: str, path: str, kind: bytes) -> None:
    """Raise UsageError for a file that does not begin with ``kind``, or that a unit's user cannot
    read."""
    try:
        data, status = read_plain_file(Path(path), len(kind), follow=False)
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from None
    if data != kind:
        raise UsageError(f"{what} {path}: not a GGUF file", hint="llama-server loads GGUF models")
    if not status.st_mode & stat.S_IROTH:
        raise UsageError(
            f"{what} {path}: the server runs as a user of its own, who may not read it",
            hint=f"chmod o+r {shlex.quote(path)}",
        )
    _refuse_a_closed_way(what, path)


def _refuse_a_closed_way(what: str, path: str) -> None:
    """Raise UsageError where a unit's user cannot come to a file, or into a directory."""
    refuse_a_home(what, path)
    # Of a home only what is shown of it is on the server's way (servers/unit.py).
    shown = f"{shown_directory(path)}/" if in_a_home(path) else "/"
    ways = (path, os.path.realpath(path))
    parents = {f"{each}/" for one in ways for each in map(str, Path(one).parents)}
    for directory in sorted(each.rstrip("/") or "/" for each in parents if each.startswith(shown)):
        if not os.stat(directory).st_mode & stat.S_IXOTH:
            raise UsageError(
                f"{what} {path.rstrip('/')}: the server runs as a user of its own, "
                f"who may not enter {directory}",
                hint=f"chmod o+x {shlex.quote(directory)}",
            )


def _host(text: str) -> str:
    try:
        return listen_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def _as_systemd_run(ctx: Context, machine: Machine, declaration: Declaration) -> str:
    if declaration.model is None and not (declaration.router or declaration.command):
        raise UsageError("--print needs --model: the embedded one is unpacked at the first start")
    request = Request(
        profile=declaration.profile,
        caller=dict(os.environ),
        backend=declaration.backend,
        model=declaration.model,
        port=declaration.port,
        settings=own_settings(declaration, machine),
        host=declaration.host,
        api_key_file=credential_of(f"infertune-server-{declaration.name}.service")
        if declaration.api_key_file
        else None,
        command=declaration.command,
    )
    result = Result(profile=declaration.profile)
    one = Run(ctx.root, machine, request, result, Audience())
    desired, job = prepare(one)
    env = with_tunables(canonical(desired.env), canonical(desired.launch))
    groups = gpu_groups(ctx.root)
    return systemd_run_line(declaration, desired, job.argv, env, template(), groups)


@contextlib.contextmanager
def _declaring(root: Root) -> Iterator[None]:
    """One 'serve' at a time: two would choose the same port.  Raises Busy."""
    give_up = time.monotonic() + _TURN_S
    while True:
        with root.lock(_LOCK, f"serve (pid {os.getpid()})") as other:
            if other is None:
                yield
                return
        if time.monotonic() >= give_up:
            raise Busy(f"busy: {other} starts a server; nothing was touched")
        time.sleep(0.1)


def _free_port(ctx: Context, name: str) -> int:
    """The wanted or the first free port that no other server is declared for."""
    others = declared_ports(ctx.root)
    others.pop(name, None)
    owner = next((other for other, port in others.items() if port == ctx.args.port), None)
    if owner:
        raise UsageError(
            f"port {ctx.args.port} is declared for server '{owner}'", hint="leave --port out"
        )
    return choose_port(ctx.args.port, others.values(), ctx.args.host)


def _about(name: str) -> dict[str, Any]:
    """What the daemon says of a server; empty for one that nobody knows."""
    return next((each for each in _call("Servers") if each["name"] == name), {})


def _answers(root: Root, name: str, door: Door, uid: int) -> bool:
    """Whether the server says it is ready, and not somebody else on its port.  Raises Failed.

    The very socket that answers is its user's, and no other user has one there.
    """
    at = reached_at(door.host)
    before = listeners(root, door.port, at)
    if others := {each.uid for each in before} - {uid}:
        raise Failed(
            f"{name}: port {door.port} is another program's, of uid {min(others)}",
            hint=f"infertune stop {name}, and end that program or take another port",
        )
    answers = bool(before) and healthy(door.url, path=door.path)
    return answers and listeners(root, door.port, at) == before


def _wait(root: Root, name: str, door: Door) -> float:
    """Seconds until the server answers.  Raises Failed where its unit ends first."""
    begin = time.monotonic()
    ask_again = begin
    uid = None
    progress = Progress(sys.stderr)
    try:
        while (waited := time.monotonic() - begin) < _READY_S:
            # A call over the bus costs more than the question whether the server answers.
            if uid is None or time.monotonic() >= ask_again:
                about = _about(name)
                state, uid = about.get("state", "inactive"), about.get("uid")
                if state not in ("active", "activating"):
                    why = f": {about['error']}" if about.get("error") else ""
                    raise Failed(f"{name}: its unit is {state}{why}", hint=f"infertune logs {name}")
                ask_again = time.monotonic() + _ASK_S
            if uid is not None and _answers(root, name, door, uid):
                return waited
            if uid is None and waited > _UID_S:
                raise Failed(f"{name}: systemd does not say which user its unit runs as")
            if progress.due():
                progress.show(f"{name}: loading, {waited:.0f} s")
            time.sleep(0.3)
    finally:
        progress.done()
    raise Failed(f"{name}: no answer in {_READY_S:.0f} s", hint=f"infertune logs {name}")


def _servers(ctx: Context) -> int:
    _need_daemon(ctx)
    found = _call("Servers")
    if ctx.args.json:
        fields = (
            *("name", "state", "profile", "host", "port", "model", "engine"),
            *("unit", "user", "error"),
        )
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
                _door(each),
                _what(each),
            )
            for each in found
        ]
        ctx.table(("SERVER", "STATE", "PROFILE", "PORT", "MODEL OR UNIT"), rows)
    else:
        ctx.print("no servers")
    return Exit.DONE


def _unit(about: dict[str, Any]) -> str | None:
    unit, user = about.get("unit"), about.get("user")
    return f"{unit} of user {user}" if unit and user else unit


def _door(server: dict[str, Any]) -> str:
    """Port of a server, with its address where that is not loopback."""
    port, host = server.get("port"), server.get("host")
    if port is None:
        return "-"
    return str(port) if host in (None, LOOPBACK) else f"{host}:{port}"


def _what(about: dict[str, Any]) -> str:
    """What a server serves, or why it does not."""
    if found := about.get("error") or about.get("model") or _unit(about):
        return str(found)
    engine = about.get("engine", "llama-server")
    return "the embedded model" if engine == "llama-server" else engine


def _stop(ctx: Context) -> int:
    _need_daemon(ctx)
    _call("Stop", "s", ctx.args.name)
    if ctx.args.json:
        ctx.print_json("infertune.stop/1", {"name": ctx.args.name})
    else:
        ctx.print(f"{ctx.args.name}: stopped")
    return Exit.DONE


def _logs(ctx: Context) -> int:
    if not NAME.fullmatch(ctx.args.name):
        raise UsageError("not a server name", hint=f"a name matches {NAME.pattern}")
    unit = server_unit(ctx.args.name)
    declared = declared_ports(ctx.root)
    if ctx.args.name not in declared and not has_log(unit):
        near = did_you_mean(ctx.args.name, declared)
        raise UsageError(
            f"there is no server '{ctx.args.name}', and no log of one{near}",
            hint=None if near else "infertune servers",
        )
    code = show_log(unit, as_json=ctx.args.json, follow=ctx.args.follow)
    return Exit.DONE if code == 0 else Exit.FAILED


COMMANDS: tuple[Command, ...] = (
    verb(
        "serve",
        _serve,
        (
            PROFILE,
            argument(
                "--model",
                metavar="MODEL",
                help="GGUF file or name of a model ('infertune models'; default: the embedded one)",
            ),
            argument("--name", metavar="NAME", help="name of the server (default: the profile's)"),
            argument(
                "--port",
                type=whole("a port", 1024, 65535),
                metavar="PORT",
                help="default: the first free from 8080",
            ),
            argument(
                "--host",
                type=_host,
                default=LOOPBACK,
                metavar="ADDRESS",
                help="address to listen on (default: loopback); another needs --api-key-file",
            ),
            argument(
                "--api-key-file",
                metavar="FILE",
                help="file of root's with the keys of clients, one a line",
            ),
            BACKEND,
            argument(
                "--print",
                action="store_true",
                help="print the equivalent systemd-run command instead",
            ),
            argument(
                "--engine",
                choices=tuple(ENGINES),
                metavar="ENGINE",
                help=f"what the program after -- is: {', '.join(ENGINES)}",
            ),
            FORCE,
            JSON,
        ),
        "Declares the server for this boot and asks infertuned to start it: an unprivileged unit "
        "in infertune.slice with the profile's memory protection, CPUs and limits. It outlives the "
        "daemon. With nothing applied, the profile is applied first. A model that does not fit "
        "('infertune fit') is refused unless --force is given. Server settings over the "
        "profile's may follow after --, as SETTING=VALUE (ctx_size=8192); or a program that is the "
        "server, with its words (-- vllm serve ...), which listens on --port.",
        takes_command=True,
    ),
    verb(
        "start",
        _start,
        (NAMED, JSON),
        "Starts a server of /etc/infertune/servers.d by hand; they start with the daemon.",
    ),
    verb("servers", _servers, (JSON,), "Declared and running servers."),
    verb("stop", _stop, (NAMED, JSON), "Stops the unit and forgets it."),
    verb(
        "logs",
        _logs,
        (NAMED, argument("--follow", action="store_true", help="go on until Ctrl-C"), JSON),
        "The unit's lines of the system journal; as JSON one entry per line, as journalctl prints.",
    ),
)
