# SPDX-License-Identifier: Apache-2.0
"""Kinds of files that start model servers: one parser for each, and one short text for all.

The short text is what is left of a file in a snapshot: blocks as in a unit of systemd's, one for
each server, below a line that says so.  Every parser takes it as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from infertune.base.records import dataclass, field
from infertune.server_files import command_line
from infertune.server_files.block_yaml import Node, NotUnderstood, load
from infertune.server_files.command_line import INHERITED, LLAMA, Command

SERVERS_LIMIT = 200
"""Servers of one file."""
_MACRO_ROUNDS = 5
_LINES_LIMIT = 5000
_WORDS_LIMIT = 2000
"""Words of one command, and variables of one server: an alias gives them to many."""

SHORT = "# model servers of this file, in short"
_BAD = "# not understood: "


@dataclass(frozen=True, slots=True)
class Entry:
    """What one file, or one block of it, says of one server."""

    command: Command | None = None
    """None where it starts none: a drop-in, a file of variables."""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of systemd, by name: MemoryMin, LimitMEMLOCK and what else it has in [Service]."""
    files: tuple[str, ...] = ()
    """Values of EnvironmentFile=."""
    resets: frozenset[str] = frozenset()
    """Names that an empty assignment clears: ``ExecStart=`` of a drop-in."""


Parser = Callable[[str], list[Entry]]


def entries(text: str, parser: Parser) -> list[Entry]:
    """The servers of a file of one kind, or of its short text.  Raises NotUnderstood."""
    if text.startswith(_BAD):
        raise NotUnderstood(text[len(_BAD) :].partition("\n")[0][:200])
    if text.startswith(SHORT):
        blocks = text.split("[Service]\n")[1:]
        return [each for block in blocks for each in unit(f"[Service]\n{block}")]
    try:
        return parser(text)[:SERVERS_LIMIT]
    except RecursionError:  # a thousand times "podman exec x" before the server
        raise NotUnderstood("it is nested too deeply") from None


def bad(reason: str) -> str:
    """The short text of a file that is not understood."""
    return f"{_BAD}{reason}\n"


def short(found: Iterable[Entry], *, titled: bool) -> str:
    """The short text; without a title it is a unit of systemd's like any other."""
    lines = [SHORT] if titled else []
    for entry in found:
        lines.append("[Service]")
        lines += [f"{name}=" for name in sorted(entry.resets)]
        if entry.command is not None:
            lines.append(f"ExecStart={command_line.render(entry.command)}")
        for name, value in entry.environment.items():
            assignment = f"{name}={value}"
            lines.append(
                f'Environment="{assignment}"' if " " in value else f"Environment={assignment}"
            )
        lines += [f"EnvironmentFile={file}" for file in entry.files]
        lines += [f"{name}={value}" for name, value in entry.settings.items()]
    return "".join(f"{line}\n" for line in lines)


# -- systemd: units, drop-ins, quadlets -----------------------------------------------


def unit(text: str) -> list[Entry]:
    """A unit, a drop-in or a quadlet: one entry (systemd.service(5), podman-systemd.unit(5))."""
    settings: dict[str, str] = {}
    environment: dict[str, str] = {}
    files: list[str] = []
    resets: set[str] = set()
    for name, value in _assignments(text):
        if not value:
            resets.add(name)
            settings.pop(name, None)
        elif name == "Environment":
            environment |= _variables(command_line.words(value))
        elif name == "EnvironmentFile":
            files.append(value.removeprefix("-"))
        else:
            settings[name] = value
    if "Image" in settings or "Exec" in settings:
        inside = command_line.words(
            " ".join((settings.get("Entrypoint", ""), settings.get("Exec", "")))
        )
        command = command_line.in_image(settings.get("Image", INHERITED), inside, {})
    else:
        command = command_line.parse(settings.get("ExecStart", ""))
    for name in ("ExecStart", "Image", "Exec", "Entrypoint"):
        settings.pop(name, None)
    kept = resets & {"ExecStart", "Environment", "EnvironmentFile"}
    if command is not None:
        environment = {**environment, **command.environment}
        command = command_line.without_environment(command)
    return [Entry(command, environment, settings, tuple(files), frozenset(kept))]


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """``Name=value`` of [Service] and [Container], in order."""
    section = "Service"
    for line in re.sub(r"\\\r?\n(?:[ \t]*[#;].*\n)*", " ", text).splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and line[0] not in "#;" and section in ("Service", "Container"):
            name, equals, value = line.partition("=")
            if equals:
                yield name.strip(), value.strip()


def _variables(assignments: Iterable[object]) -> dict[str, str]:
    pairs = (str(each).partition("=") for each in assignments)
    return {name.strip(): value for name, equals, value in pairs if equals}


def variables(text: str) -> list[Entry]:
    """A file of ``NAME=value`` lines, as EnvironmentFile= takes it."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip().removeprefix("export ")
        if line and line[0] not in "#;":
            name, equals, value = line.partition("=")
            if equals:
                found[name.strip()] = value.strip().strip("\"'")
    return [Entry(environment=found)]


# -- YAML: llama-swap, compose -----------------------------------------------------------


def yaml(text: str) -> list[Entry]:
    """The configuration of llama-swap (``models:``) or a compose file (``services:``)."""
    document = _mapping(load(text))
    found = []
    macros = _mapping(document.get("macros"))
    for model in islice(_mapping(document.get("models")).values(), SERVERS_LIMIT):
        found.append(_swapped(_mapping(model), macros))
    for service in islice(_mapping(document.get("services")).values(), SERVERS_LIMIT):
        found.append(_composed(_mapping(service)))
    return [each for each in found if each is not None]


def _mapping(node: Node) -> dict[str, Node]:
    return node if isinstance(node, dict) else {}


def _swapped(model: dict[str, Node], macros: dict[str, Node]) -> Entry | None:
    own = {**macros, **_mapping(model.get("macros"))}
    lines = _text(model.get("cmd")).replace("\\\n", " ").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    for _ in range(_MACRO_ROUNDS):  # a macro may be made of others
        text = _expanded(text[: command_line.COMMAND_LIMIT], own)
    # A macro may have had lines of its own.
    command = command_line.parse(re.sub(r"\\?\n", " ", text))
    return _entry(command, _environment(model.get("env"))) if command else None


def _expanded(text: str, macros: Mapping[str, Node]) -> str:
    """With macros for their names, as long as there is room for them."""
    room = command_line.COMMAND_LIMIT

    def value(found: re.Match[str]) -> str:
        nonlocal room
        if found[1] not in macros:
            return found[0]
        shown = _text(macros[found[1]])[:room].strip()
        room -= len(shown)
        return shown

    return re.sub(r"\$\{([\w-]{1,64})\}", value, text)


def _composed(service: dict[str, Node]) -> Entry | None:
    words = [word for key in ("entrypoint", "command") for word in _list(service.get(key))]
    command = command_line.in_image(_text(service.get("image")), words, {})
    return _entry(command, _environment(service.get("environment"))) if command else None


def _entry(command: Command, environment: Mapping[str, str]) -> Entry:
    """With the variables that the command line itself sets."""
    own = {**environment, **command.environment}
    return Entry(command_line.without_environment(command), own)


def _text(node: Node) -> str:
    return node if isinstance(node, str) else ""


def _list(node: Node) -> list[str]:
    if isinstance(node, str):
        return command_line.words(node)
    items = node[:_WORDS_LIMIT] if isinstance(node, list) else []
    return [each for each in items if isinstance(each, str)]


def _environment(node: Node) -> dict[str, str]:
    if isinstance(node, dict):
        return {name: _text(value) for name, value in islice(node.items(), _WORDS_LIMIT)}
    return _variables(node[:_WORDS_LIMIT]) if isinstance(node, list) else {}


# -- presets of llama-server ---------------------------------------------------------------

_SHORT_KEYS = frozenset(
    (
        *("m", "c", "b", "ub", "np", "fa", "ngl", "ctk", "ctv", "kvu", "cram", "dev", "lm", "md"),
        *("dio", "ndio", "t", "tb", "n", "s", "a", "hf", "sm", "ts", "mg", "cd", "cpent", "mm"),
        *("ncmoe", "cmoe", "ctxcp", "cms", "nkvo", "kvo", "nocb", "cb", "fitt", "ngld"),
    )
)
"""Keys of a preset that are short flags; every other key is a long one."""


def preset(text: str) -> list[Entry]:
    """An INI file of ``--models-preset``: a section for each model, ``[*]`` for all of them.

    Keys are flags without their dashes, or variables (llama.cpp: common/preset.cpp).
    """
    common: list[tuple[str, str]] = []
    models: list[list[tuple[str, str]]] = []
    current: list[tuple[str, str]] = []  # above the first section: the version of the file
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if number > _LINES_LIMIT:
            raise NotUnderstood(f"more than {_LINES_LIMIT} lines")
        key, equals, value = line.partition("=")
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and line.endswith("]"):
            current = common if line == "[*]" else []
            if line != "[*]":
                models.append(current)
        elif equals:
            current.append((key.strip().lstrip("-"), value.strip()))
        else:
            raise NotUnderstood(f"line {number}: neither '[model]' nor 'key = value'")
    return [_preset_entry([*common, *own]) for own in models[:SERVERS_LIMIT] or [[]]]


def _preset_entry(items: Iterable[tuple[str, str]]) -> Entry:
    flags: dict[str, str] = {}
    environment: dict[str, str] = {}
    for key, value in items:
        if re.fullmatch(r"LLAMA_\w{1,60}", key, re.ASCII):
            environment[key] = value
        elif re.fullmatch(r"[A-Za-z][\w-]{0,60}", key, re.ASCII):
            flag = f"-{key}" if key in _SHORT_KEYS else f"--{key.replace('_', '-')}"
            flags[flag] = value
    return Entry(Command(LLAMA, "llama-server", None, flags), environment)


# -- Lemonade ---------------------------------------------------------------------------------


def lemonade(text: str) -> list[Entry]:
    """config.json and recipe_options.json: arguments it gives to its llama-server."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise NotUnderstood("it is not JSON") from None
    if not isinstance(document, dict):
        return []
    found = []
    own = document.get("llamacpp")
    if isinstance(own, dict):
        found.append(_recipe(own.get("args"), document.get("ctx_size")))
    for options in document.values():
        if isinstance(options, dict) and "llamacpp_args" in options:
            found.append(_recipe(options["llamacpp_args"], options.get("ctx_size")))
    return found


def _recipe(arguments: object, context: object) -> Entry:
    flags = command_line.parse_flags(arguments) if isinstance(arguments, str) else {}
    if isinstance(context, int) and not isinstance(context, bool):
        flags = {"--ctx-size": str(context), **flags}
    # It starts a llama-server of its own, of a build it chose itself.
    return Entry(Command(LLAMA, "/elsewhere/llama-server", None, flags))
