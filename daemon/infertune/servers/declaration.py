# SPDX-License-Identifier: Apache-2.0
"""What an admin, or ``infertune serve``, says of a server.  Pure.

A declaration is a small TOML file that only root can write.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from infertune.base.addresses import LOOPBACK, client, is_loopback, listen_address
from infertune.base.errors import DeclarationError, UsageError
from infertune.base.names import NAME, NAME_RULE, USER, is_foreign_unit, server_unit
from infertune.base.records import dataclass
from infertune.base.tables import Key, Table, read_table, shown
from infertune.base.units import parse_size
from infertune.catalogue.backends import BACKENDS
from infertune.catalogue.server_settings import (
    FilePath,
    check_together,
    files_of,
    models_of,
    own_flags,
    parse_server_setting,
)
from infertune.host.machine import Machine
from infertune.profiles.resolve import Desired
from infertune.server_files.command_line import parse
from infertune.servers.api_key import key_path
from infertune.servers.engines import ENGINES, engine_titled

TRANSIENT = "/run/infertune/servers.d"
"""Servers of this boot: ``infertune serve``."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One server: what it serves, under which profile, where."""

    name: str
    profile: str
    model: str | None
    """Path of a GGUF file, or the name of a model of the machine's (models.py); None for a
    router, or for the small model of the extra ``embedded``."""
    port: int
    backend: str = "auto"
    settings: Mapping[str, str | int | bool] | None = None
    """Server settings of its own, over the profile's: canonical names of server_settings.py."""
    force: bool = False
    """Start it even where it does not fit."""
    flags: tuple[str, ...] = ()
    """More words for llama-server's command line, which only an administrator can write."""
    host: str = LOOPBACK
    """Address it listens on; another than loopback only with a key."""
    api_key_file: str | None = None
    """File of root's with the keys of its clients (api_key.py)."""
    clients: tuple[str, ...] = ()
    """Who may come to another address than loopback; none: whoever has a private address."""
    engine: str = "llama-server"
    """Its name in engines/."""
    command: tuple[str, ...] = ()
    """The program that is the server, with its words, which only root can write; none: infertune's
    own way with llama-server."""

    @property
    def unit(self) -> str:
        return server_unit(self.name)

    @property
    def router(self) -> Mapping[str, str]:
        """Where it finds its models, by setting; empty for a server of one model."""
        return models_of(self.settings or {})


@dataclass(frozen=True, slots=True)
class Foreign:
    """A server in a unit that infertune did not make: put under a profile, never started by us."""

    name: str
    profile: str
    unit: str
    backend: str = "auto"
    port: int | None = None
    """Where it answers; None: not said."""
    engine: str | None = None
    """What answers there, by its name in engines/; None: as its unit's ExecStart= shows."""
    user: str | None = None
    """Name or number of whose manager has the unit; None for the system's."""
    admission: str | None = None
    """What becomes of a start that does not fit: one of ADMISSIONS; None: nobody looks."""
    memory: int | None = None
    """Bytes that it will take, where its command does not show it."""


ADMISSIONS = ("warn", "refuse")
"""Its log says so, or it is not started."""


KEYS = (
    Key(
        "port",
        "1024 to 65535; with `unit` from 1",
        "port on which the server answers",
        "an error; with `unit`: as its `ExecStart=` shows",
        ("model", "exec", "unit"),
    ),
    Key(
        "profile",
        "a profile's name",
        "profile under which the server runs",
        "the one in infertuned.toml",
        ("model", "exec", "unit"),
    ),
    Key(
        "backend",
        ", ".join(("auto", *BACKENDS)),
        "backend whose part of the profile holds; auto: as the machine has it",
        "auto",
        ("model", "exec", "unit"),
    ),
    Key(
        "model",
        "an absolute path, or a name that `infertune models` shows",
        "GGUF file to serve",
        "a router's models, else the small model of the extra `embedded`",
        ("model",),
    ),
    Key(
        "settings",
        "a table of [server] settings",
        "llama-server's settings of this server alone, over the profile's",
        "none",
        ("model",),
    ),
    Key(
        "flags",
        "a list of words",
        "more words for llama-server; those with which clients could read files or run programs "
        "are refused",
        "none",
        ("model",),
    ),
    Key(
        "host",
        "an address",
        "address on which the server listens; one that other machines reach needs `api_key_file`",
        LOOPBACK,
        ("model",),
    ),
    Key(
        "api_key_file",
        "an absolute path",
        "file with the keys of clients, one on a line; only root can read it",
        "no key is asked for",
        ("model",),
    ),
    Key(
        "clients",
        "a list of addresses and networks",
        "who may come to a `host` that other machines reach",
        "private addresses",
        ("model",),
    ),
    Key(
        "force",
        "true, false",
        "start it even where it does not fit",
        "false",
        ("model",),
    ),
    Key(
        "exec",
        "a list of words, the first a whole path",
        "command that is the server, of any engine",
        "the server is llama-server",
        ("exec",),
    ),
    Key(
        "unit",
        "a service, such as `ollama.service`",
        "unit of your own to put under the profile whenever it runs",
        "the server gets a unit of infertune's",
        ("unit",),
    ),
    Key(
        "user",
        "a user's name or number",
        "whose systemd manager has the unit",
        "the system's manager",
        ("unit",),
    ),
    Key(
        "admission",
        ", ".join(ADMISSIONS),
        "what becomes of a start of the unit that does not fit: its log says so, or it fails",
        "nobody looks",
        ("unit",),
    ),
    Key(
        "memory",
        "a size, such as `64GiB`",
        "what the unit's server takes of the memory, for `admission`",
        "as its `ExecStart=` shows, for a llama-server",
        ("unit",),
    ),
    Key(
        "engine",
        ", ".join(ENGINES),
        "what answers at the port",
        "as the command line shows",
        ("exec", "unit"),
    ),
)
"""Keys of a file in servers.d.  Its kind is the one of exec and unit that it has, else model."""


def parse_declaration(
    name: str, text: str, file: str, default_profile: Callable[[], str | None] = lambda: None
) -> Declaration | Foreign:
    """Read a declaration; without a profile it has the daemon's.  Raises DeclarationError."""
    if not NAME.fullmatch(name):
        raise DeclarationError(f"'{name}' is not a valid server name: {NAME_RULE}", file=file)
    table = read_table(text, file, DeclarationError)
    if "unit" in table:
        return _foreign(name, table, default_profile)
    if "exec" in table:
        return _of_a_command(name, table, default_profile)
    for key, kinds in (("engine", "'unit' or 'exec'"), ("user", "'unit'")):
        if key in table:
            raise table.wrong(key, f"'{key}' goes with {kinds}: infertune starts llama-server here")
    _only(table, "model", ("port",))
    settings = _settings(table.table("settings")) if "settings" in table else {}
    if "model" in table and (router := models_of(settings)):
        raise table.wrong("model", f"'model' and {', '.join(router)}: a router has no model")
    return Declaration(
        name,
        _profile(table, default_profile),
        _model(table) if "model" in table else None,
        table.whole("port", 1024, 65535),
        table.one_of("backend", ("auto", *BACKENDS), "auto"),
        settings,
        table.flag("force", False),
        _flags(table) if "flags" in table else (),
        *_door(table),
    )


def _only(table: Table, kind: str, required: Sequence[str]) -> None:
    """Nothing but the keys of this kind; one of another kind of server is said to be so."""
    for key in KEYS:
        if key.name in table and kind not in key.kinds:
            raise table.wrong(key.name, f"'{key.name}' does not go with '{kind}'")
    table.only(required, [key.name for key in KEYS if kind in key.kinds])


def _door(table: Table) -> tuple[str, str | None, tuple[str, ...]]:
    """Where the server listens, its key, and who may come."""
    host = _checked(table, "host", listen_address) if "host" in table else LOOPBACK
    key = _checked(table, "api_key_file", key_path) if "api_key_file" in table else None
    if "clients" in table:
        if is_loopback(host):
            raise table.wrong("clients", "'clients' is for a 'host' that other machines reach")
        given = table.values["clients"]
        if not isinstance(given, list) or not 0 < len(given) <= _MOST_CLIENTS:
            raise table.wrong("clients", 'clients is a list: ["192.168.1.0/24"]')
    if not is_loopback(host) and key is None:
        raise table.wrong(
            "host",
            f"'host': {host} is reached by other machines, so it needs a key: "
            'api_key_file = "/etc/infertune/keys/NAME"',
        )
    names = table.values.get("clients", ())
    return host, key, tuple(_checked(table, "clients", client, each) for each in names)


_MOST_CLIENTS = 64


def _checked(
    table: Table, key: str, parse: Callable[[object], str], value: object | None = None
) -> str:
    value = table.values[key] if value is None else value
    try:
        return parse(value)
    except ValueError as error:
        raise table.wrong(key, f"'{key}': {shown(value)} {error}") from None


def _foreign(name: str, table: Table, default_profile: Callable[[], str | None]) -> Foreign:
    """What the unit runs is its own business: no model, no settings."""
    _only(table, "unit", ("unit",))
    unit = table.text("unit")
    user = table.text("user") if "user" in table else None
    if user in ("root", "0"):
        raise table.wrong("user", "'user': root's units are the system's: leave it out")
    if user is not None and not USER.fullmatch(user):
        raise table.wrong("user", f"'user': {shown(user)} is not a user: a name, or a number")
    if not is_foreign_unit(unit):
        raise table.wrong(
            "unit",
            f"'unit': {shown(unit)} cannot be adopted: a service can, such as 'ollama.service'",
        )
    return Foreign(
        name,
        _profile(table, default_profile),
        unit,
        table.one_of("backend", ("auto", *BACKENDS), "auto"),
        table.whole("port", 1, 65535) if "port" in table else None,
        table.one_of("engine", tuple(ENGINES)) if "engine" in table else None,
        user,
        *_gate(table, unit, user),
    )


def _gate(table: Table, unit: str, user: str | None) -> tuple[str | None, int | None]:
    """Whether starts are judged, and what is said of the server's memory."""
    admission = table.one_of("admission", ADMISSIONS) if "admission" in table else None
    if admission and (why := why_no_gate(unit, user)):
        raise table.wrong("admission", f"'admission': {why}")
    if "memory" not in table:
        return admission, None
    if admission is None:
        raise table.wrong("memory", "'memory' goes with 'admission'")
    try:
        size = parse_size(table.text("memory"))
    except ValueError as error:
        raise table.wrong("memory", f"'memory': {error}") from None
    if not size:
        raise table.wrong("memory", "'memory' is what the server takes, such as '64GiB'")
    return admission, size


def why_no_gate(unit: str, user: str | None) -> str | None:
    """Why starts of a unit cannot be judged; None where they can."""
    if user is not None:
        return "only starts of the system's units are judged"
    if unit.endswith(".scope"):
        return f"{unit} is not started by systemd"
    return None


def _of_a_command(
    name: str, table: Table, default_profile: Callable[[], str | None]
) -> Declaration:
    """What it serves, and how, is in its words: no model, no settings."""
    _only(table, "exec", ("exec", "port"))
    command = _words(table, "exec", '["/opt/vllm/bin/vllm", "serve", "/srv/models/qwen"]')
    if not re.fullmatch(r"/[^/].*", command[0]) or os.path.normpath(command[0]) != command[0]:
        raise table.wrong("exec", f"'exec': {shown(command[0])} is not the whole path of a program")
    known = engine_of(command)
    if known is None and "engine" not in table:
        names = ", ".join(ENGINES)
        raise table.wrong(
            "exec",
            f"'exec': infertune does not know which engine {shown(command[0])} is: "
            f"add engine = one of {names}",
        )
    return Declaration(
        name,
        _profile(table, default_profile),
        None,
        table.whole("port", 1024, 65535),
        table.one_of("backend", ("auto", *BACKENDS), "auto"),
        {},
        engine=table.one_of("engine", tuple(ENGINES), known),
        command=command,
    )


def engine_of(command: Sequence[str]) -> str | None:
    """The engine that a command line starts, by its name in engines/; None: not known."""
    known = parse(shlex.join(command))
    engine = engine_titled(known.engine) if known else None
    return engine.id if engine else None


def _profile(table: Table, default_profile: Callable[[], str | None]) -> str:
    if "profile" in table:
        return table.name("profile", "profile")
    profile = default_profile()
    if profile is None:
        raise table.wrong(None, "'profile' is missing, and infertuned.toml names none")
    return profile


_MODEL_NAME = re.compile(r"[\w][\w.:+@-]*(?:/[\w][\w.:+@-]*)?")


def _model(table: Table) -> str:
    value = table.values["model"]
    if isinstance(value, str) and len(value) <= 255 and _MODEL_NAME.fullmatch(value):
        return value
    try:
        return FilePath().parse(value)
    except ValueError as error:
        raise table.wrong("model", f"'model': {error}, and no name of a model") from None


def _flags(table: Table) -> tuple[str, ...]:
    words = _words(table, "flags", '["--reasoning-format", "none"]', least=0)
    if problem := own_flags(words):
        raise table.wrong("flags", f"'flags': {problem}")
    return words


def _words(table: Table, key: str, example: str, least: int = 1) -> tuple[str, ...]:
    words = table.values[key]
    if (
        not isinstance(words, list)
        or len(words) < least
        or not all(isinstance(each, str) for each in words)
    ):
        raise table.wrong(key, f"{key} is a list of words: {example}")
    if not all(each.isprintable() for each in words):
        raise table.wrong(key, f"'{key}': a word has control characters")
    return tuple(words)


def _settings(table: Table) -> Mapping[str, str | int | bool]:
    for name, value in table.values.items():
        try:
            parse_server_setting(name, value)
        except ValueError as error:
            raise table.wrong(name, str(error)) from None
    return table.values


def own_settings(declaration: Declaration, machine: Machine | None = None) -> dict[str, str]:
    """Canonical settings of the declaration; without a machine its shares stay as they are.

    Raises UsageError where one is not possible on the machine.
    """
    given = (declaration.settings or {}).items()
    try:
        return {name: parse_server_setting(name, value, machine) for name, value in given}
    except ValueError as error:
        raise UsageError(f"server '{declaration.name}': {error}") from None


def server_settings(
    declaration: Declaration, desired: Desired, machine: Machine | None = None
) -> dict[str, str]:
    """Canonical settings of a server: the profile's, over them its own.

    Raises UsageError where one of them needs another that is not there.
    """
    found = {name: setting.canonical for name, setting in desired.server.items()}
    found |= own_settings(declaration, machine)
    try:
        check_together(found)
    except ValueError as error:
        raise UsageError(f"server '{declaration.name}': {error}") from None
    return found


def files(declaration: Declaration, desired: Desired) -> dict[str, str]:
    """The files that a server reads, by what names them; a directory ends with a slash.

    Those of a command are its own business: it sees what any unit of ours sees.
    """
    if declaration.command:
        return {}
    model = {"model": declaration.model} if declaration.model is not None else {}
    settings = server_settings(declaration, desired)
    router = models_of(settings)
    if "models_dir" in router:
        router["models_dir"] += "/"
    return {**model, **files_of(settings), **router}


def declaration_text(declaration: Declaration | Foreign) -> str:
    """The file that ``parse_declaration`` reads back."""
    lines = [f"profile = {json.dumps(declaration.profile)}"]
    if declaration.port is not None:
        lines.append(f"port = {declaration.port}")
    if isinstance(declaration, Foreign):
        lines.append(f"unit = {json.dumps(declaration.unit)}")
        if declaration.user is not None:
            lines.append(f"user = {json.dumps(declaration.user)}")
        if declaration.engine is not None:
            lines.append(f"engine = {json.dumps(declaration.engine)}")
        if declaration.admission is not None:
            lines.append(f"admission = {json.dumps(declaration.admission)}")
        if declaration.memory is not None:
            lines.append(f'memory = "{declaration.memory}B"')
        return "\n".join([*lines, f"backend = {json.dumps(declaration.backend)}"]) + "\n"
    if declaration.model is not None:
        lines.append(f"model = {json.dumps(declaration.model, ensure_ascii=False)}")
    lines.append(f"backend = {json.dumps(declaration.backend)}")
    if declaration.command:
        lines.append(f"engine = {json.dumps(declaration.engine)}")
        lines.append(f"exec = {_listed(declaration.command)}")
    if declaration.force:
        lines.append("force = true")
    if declaration.flags:
        lines.append(f"flags = {_listed(declaration.flags)}")
    if declaration.host != LOOPBACK:
        lines.append(f"host = {json.dumps(declaration.host)}")
    if declaration.api_key_file is not None:
        lines.append(f"api_key_file = {json.dumps(declaration.api_key_file)}")
    if declaration.clients:
        lines.append(f"clients = {_listed(declaration.clients)}")
    if declaration.settings:
        lines.append("[settings]")
        own = declaration.settings.items()
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in own]
    return "\n".join(lines) + "\n"


def _listed(words: Sequence[str]) -> str:
    """A word for each line: together they may be longer than a line can be."""
    return json.dumps(words, ensure_ascii=False, indent=1)
