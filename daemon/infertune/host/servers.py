# SPDX-License-Identifier: Apache-2.0
"""Model servers as files of this machine start them, wherever owners keep such files.

Units of systemd's with their drop-ins (the system's and the users'), quadlets, compose files, the
files that a unit's flags name (a preset of llama-server's, the configuration of llama-swap), what
Lemonade keeps, and /etc/infertune/servers.d.  Every file is reduced to what a snapshot would have
of it before it is parsed, so a recorded machine has the same servers.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from infertune.base.names import DECLARED, declared_server
from infertune.base.records import dataclass, field, replace
from infertune.base.root import Root
from infertune.base.units import KIB
from infertune.host.redaction import PRESET_VARIABLE, is_reduced, reduce_file
from infertune.server_files import formats, script
from infertune.server_files.block_yaml import NotUnderstood
from infertune.server_files.command_line import (
    INHERITED,
    LLAMA,
    SCRIPT,
    Command,
    may_start_a_server,
    parse_flags,
)
from infertune.server_files.formats import Entry

SERVERS_LIMIT = 200
"""Servers of one machine; files are not looked into any further then."""
_UNITS_LIMIT = 2000
"""Unit files of one kind; a desktop has some 500."""
_UNIT_SIZE = 64 * KIB
_CONFIGURATION_SIZE = 256 * KIB
_DIRECTORIES_LIMIT = 2000
"""Directories looked into for compose files."""
_HOMES_LIMIT = 50
_DROP_INS_LIMIT = 50
"""Drop-ins of one unit."""
_ENVIRONMENT_FILES_LIMIT = 20
"""Files of one EnvironmentFile= with a wildcard."""

Kind = Literal[
    "unit", "script", "quadlet", "compose", "preset", "llama-swap", "Lemonade", "infertune"
]

_SYSTEM_UNITS = (
    *("/etc/systemd/system", "/run/systemd/system"),
    *("/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"),
)
"""Where systemd looks (systemd.unit(5)); a name counts where it comes first."""
_USER_UNITS = ("/etc/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user")
_QUADLETS = (
    *("/etc/containers/systemd", "/run/containers/systemd", "/usr/share/containers/systemd"),
)
_USER_QUADLETS = ("/etc/containers/systemd/users",)
_COMPOSE = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
_LEMONADE = ("config.json", "recipe_options.json")
_SWAP_DEFAULT = "/etc/llama-swap/config.yaml"


@dataclass(frozen=True, slots=True)
class Declared:
    """A model server that a file starts."""

    path: str
    model: str | None
    """Label of its model, quantisation only; None where the file names none."""
    flags: Mapping[str, str]
    """Flags and the values that matter, empty for a switch; of llama-server's only."""
    environment: Mapping[str, str]
    settings: Mapping[str, str]
    """What it may use: LimitMEMLOCK, MemoryMin, AllowedCPUs and the like."""
    kind: Kind = "unit"
    engine: str = LLAMA
    program: str = "llama-server"
    """Where everybody has it, else below /elsewhere; "" for an image's own."""
    image: str | None = None
    """What it runs in: a label of the image; None on the host."""
    user: bool = False
    """A user's manager starts it, not the system's."""
    number: int = 0
    """Which of several in one file it is, from 1; 0 where it is the only one."""
    unread: str | None = field(default=None, compare=False)
    """Why it is not known what it serves; None where it is."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Files that set its variables, by name, where that is not ``path``."""

    @property
    def where(self) -> str:
        """The file, and which server of it."""
        return f"{self.path} (server {self.number})" if self.number else self.path

    @property
    def settings_are_all(self) -> bool:
        """Whether ``settings`` are all that limits it; a container has limits of its own."""
        return self.image is None and self.kind in ("unit", "script", "preset", "llama-swap")

    @property
    def preset(self) -> str | None:
        """The file that says what a router serves; None for a server of one model."""
        return self.flags.get("--models-preset") or self.environment.get(PRESET_VARIABLE)

    def has(self, *flags: str) -> bool:
        """Whether one of these is given, and not switched off as a preset can."""
        return any(
            flag in self.flags and self.flags[flag].lower() not in ("0", "off", "false")
            for flag in flags
        )

    def option(self, name: str) -> str | None:
        """The value of a setting of llama-server, by any of its flags or its variable."""
        flags, variable = OPTIONS[name]
        given = [self.flags[flag] for flag in flags if flag in self.flags]
        return given[-1] if given else self.environment.get(variable)


OPTIONS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ctx_size": (("--ctx-size", "-c"), "LLAMA_ARG_CTX_SIZE"),
    "batch_size": (("--batch-size", "-b"), "LLAMA_ARG_BATCH"),
    "ubatch_size": (("--ubatch-size", "-ub"), "LLAMA_ARG_UBATCH"),
    "parallel": (("--parallel", "-np"), "LLAMA_ARG_N_PARALLEL"),
    "kv_unified": (("--kv-unified", "-kvu"), "LLAMA_ARG_KV_UNIFIED"),
    "flash_attn": (("--flash-attn", "-fa"), "LLAMA_ARG_FLASH_ATTN"),
    "cache_type_v": (("--cache-type-v", "-ctv"), "LLAMA_ARG_CACHE_TYPE_V"),
    "cache_ram": (("--cache-ram", "-cram"), "LLAMA_ARG_CACHE_RAM"),
    "load_mode": (("--load-mode", "-lm"), "LLAMA_ARG_LOAD_MODE"),
    "gpu_layers": (("--n-gpu-layers", "--gpu-layers", "-ngl"), "LLAMA_ARG_N_GPU_LAYERS"),
    "device": (("--device", "-dev"), "LLAMA_ARG_DEVICE"),
    "cache_type_k": (("--cache-type-k", "-ctk"), "LLAMA_ARG_CACHE_TYPE_K"),
    "ctx_checkpoints": (
        ("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"),
        "LLAMA_ARG_CTX_CHECKPOINTS",
    ),
    "fit": (("--fit", "-fit"), "LLAMA_ARG_FIT"),
    "n_cpu_moe": (("--n-cpu-moe", "-ncmoe"), "LLAMA_ARG_N_CPU_MOE"),
    "mmproj": (("--mmproj", "-mm"), "LLAMA_ARG_MMPROJ"),
    "model_draft": (
        ("--spec-draft-model", "--model-draft", "-md"),
        "LLAMA_ARG_SPEC_DRAFT_MODEL",
    ),
    "spec_type": (("--spec-type",), "LLAMA_ARG_SPEC_TYPE"),
}
"""Flags and variable of a setting (llama.cpp: common/arg.cpp), by the names of a profile."""


def read_servers(root: Root) -> tuple[Declared, ...]:
    """Every server that a file declares.  A file that cannot be read declares none."""
    found: list[Declared] = []
    for server in _all(root):
        if server not in found:
            found.append(server)
        if len(found) >= SERVERS_LIMIT:
            break
    return tuple(found)


def _all(root: Root) -> Iterator[Declared]:
    homes = _homes(root)
    yield from _units(root, _SYSTEM_UNITS, "unit", user=False)
    yield from _units(root, _USER_UNITS, "unit", user=True)
    yield from _units(root, _QUADLETS, "quadlet", user=False)
    yield from _units(root, _USER_QUADLETS, "quadlet", user=True)
    for home in homes:
        yield from _units(root, (f"{home}/.config/systemd/user",), "unit", user=True)
        yield from _units(root, (f"{home}/.config/containers/systemd",), "quadlet", user=True)
    yield from _compose(root, homes)
    for directory in ("/var/lib/lemonade", *homes):
        yield from _lemonade(root, f"{directory}/.cache/lemonade")
    yield from _declarations(root)


def _homes(root: Root) -> list[str]:
    return [f"/home/{name}" for name in _listed(root, "/home")[:_HOMES_LIMIT]] + ["/root"]


def _listed(root: Root, directory: str) -> list[str]:
    """Names in a directory that may stand in a snapshot; none where it cannot be listed."""
    try:
        names = root.listed(directory)
    except OSError:
        return []
    return [name for name in names if name.isprintable() and len(name) <= 200]


_Part = Callable[[str, bytes], bytes | None]
"""Which part of a file is looked at, by its path."""


def _all_of_it(_: str, data: bytes) -> bytes:
    """Nothing is left out: for who judges a start and keeps nothing of what is read."""
    return data


def _reduced(
    root: Root, path: str, limit: int = _UNIT_SIZE, part_of: _Part = reduce_file
) -> str | None:
    """What a snapshot would have of a file; None for nothing.  Raises OSError."""
    part = part_of(path, root.read_small(path, limit).encode())
    return None if part is None else part.decode()


# -- systemd ------------------------------------------------------------------------------


def _units(root: Root, places: tuple[str, ...], kind: Kind, *, user: bool) -> Iterator[Declared]:
    """Servers of units, or of quadlets, of one manager."""
    suffix = ".service" if kind == "unit" else ".container"
    named, drop_ins = _unit_files(root, places, suffix)
    for name, (path, *hidden) in list(named.items())[:_UNITS_LIMIT]:
        base = _unit_entry(root, path)
        if base is None and any(_unit_entry(root, each) for each in hidden):
            root.exists(path)  # masked, or another unit by that name: a snapshot must have it too
        if base is None or base.command is None:
            continue
        prefix = name.partition("@")[0] + "@"
        template = drop_ins.get(f"{prefix}{suffix}", {}) if "@" in name else {}
        instances = [name]
        if name == f"{prefix}{suffix}":
            # Which of them run is not known; those with a drop-in differ.
            instances = [each for each in drop_ins if each.startswith(prefix)] or instances
        for instance in instances:
            parts = {**template, **drop_ins.get(instance, {})}
            yield from _started(root, _merged(root, path, base, parts), kind, user)


def unit_engine(root: Root, name: str) -> str | None:
    """Engine of one of the system's units, as command_line.py names it; None: not known."""
    whole = _system_unit(root, name)
    return whole.entry.command.engine if whole and whole.entry.command else None


def unit_server(root: Root, name: str, environment: Mapping[str, str] = {}) -> Declared | None:
    """The server that one of the system's units starts itself, with all of its flags.

    ``environment``: what is known to be set beside what the files say.  None where no server is
    known that it starts.
    """
    whole = _system_unit(root, name, _all_of_it)
    command = whole.entry.command if whole else None
    if whole is None or command is None or command.image == INHERITED:
        return None
    entry = whole.entry
    variables = {key: _filled(each, name) for key, each in entry.environment.items()}
    server = _server(
        replace(whole, entry=replace(entry, environment={**variables, **environment})), command
    )
    flags = {key: _filled(each, name, server.environment) for key, each in server.flags.items()}
    return replace(server, flags=flags, model=_model(flags, server.environment))


def _filled(text: str, unit: str, variables: Mapping[str, str] | None = None) -> str:
    """A word with what systemd puts in: specifiers (systemd.unit(5)), then variables
    (systemd.service(5))."""
    stem = unit.rpartition(".")[0]
    prefix, _, instance = stem.partition("@")
    given = {"%": "%", "n": unit, "N": stem, "p": prefix, "i": instance, "h": "/root"}
    given |= {"S": "/var/lib", "C": "/var/cache", "E": "/etc", "t": "/run"}
    text = re.sub(r"%(.)", lambda found: given.get(found[1], found[0]), text)
    if variables is None:
        return text
    found = re.fullmatch(r"\$(\w+)", text)
    if found:
        return variables.get(found[1], text)  # not known: not empty
    return re.sub(r"\$\{(\w+)\}", lambda found: variables.get(found[1], found[0]), text)


def _system_unit(root: Root, name: str, part_of: _Part = reduce_file) -> _Whole | None:
    """One of the system's units with its drop-ins; None where nothing starts a server there."""
    template = f"{name.partition('@')[0]}@.{name.rpartition('.')[2]}" if "@" in name else name
    places = _distinct(root, _SYSTEM_UNITS)
    paths = [f"{place}/{each}" for each in (name, template) for place in places]
    path = next((each for each in paths if root.exists(each)), None)
    base = _unit_entry(root, path, part_of) if path else None
    if path is None or base is None:
        return None
    directories = [f"{place}/{each}.d" for each in (name, template) for place in places]
    drop_ins: dict[str, str] = {}
    for directory in directories:
        for each in _listed(root, directory)[:_DROP_INS_LIMIT]:
            if each.endswith(".conf"):
                drop_ins.setdefault(each, f"{directory}/{each}")
    return _merged(root, path, base, drop_ins, part_of)


def _unit_files(
    root: Root, places: tuple[str, ...], suffix: str
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """Paths of each unit, the one that counts first; and of its drop-ins, by their own names."""
    named: dict[str, list[str]] = {}
    drop_ins: dict[str, dict[str, str]] = {}
    for place in _distinct(root, places):
        for path in _tree(root, place, deep=suffix == ".container"):
            name = path.rpartition("/")[2]
            if name.endswith(suffix):
                named.setdefault(name, []).append(path)
            elif name.endswith(f"{suffix}.d"):
                own = drop_ins.setdefault(name[:-2], {})
                for each in _listed(root, path)[:_DROP_INS_LIMIT]:
                    if each.endswith(".conf"):
                        own.setdefault(each, f"{path}/{each}")
    return named, drop_ins


def _distinct(root: Root, places: tuple[str, ...]) -> list[str]:
    """Without /lib where that is /usr/lib by another name."""
    return [
        place
        for place in places
        if not (place.startswith("/lib/") and root.at("/lib").is_symlink())
    ]


def _tree(root: Root, place: str, *, deep: bool) -> Iterator[str]:
    """What lies in a directory; for quadlets one level deeper too."""
    for name in _listed(root, place)[: 2 * _UNITS_LIMIT]:
        path = f"{place}/{name}"
        yield path
        if deep and name != "users" and not name.endswith((".d", ".container")):
            yield from (f"{path}/{each}" for each in _listed(root, path)[:_UNITS_LIMIT])


def _unit_entry(root: Root, path: str, part_of: _Part = reduce_file) -> Entry | None:
    try:
        text = root.read_small(path, _UNIT_SIZE)
    except OSError:
        return None
    if not may_start_a_server(text):
        return None
    part = part_of(path, text.encode())
    return formats.unit(part.decode())[0] if part else None


@dataclass(frozen=True, slots=True)
class _Whole:
    """A unit with everything that other files add to it."""

    path: str
    """The file whose ExecStart= counts."""
    entry: Entry
    origins: Mapping[str, str]


def _merged(
    root: Root, path: str, base: Entry, drop_ins: Mapping[str, str], part_of: _Part = reduce_file
) -> _Whole:
    """A unit with its drop-ins, in the order of their names, and its files of variables."""
    whole, origins = base, dict.fromkeys(base.environment, path)
    for name in sorted(drop_ins):
        try:
            text = _reduced(root, drop_ins[name], part_of=part_of)
        except OSError:
            continue
        if text:
            upper = formats.unit(text)[0]
            whole = _over(whole, upper)
            origins |= dict.fromkeys(upper.environment, drop_ins[name])
            path = drop_ins[name] if upper.command else path
    environment = dict(whole.environment)
    for pattern in whole.files:
        # EnvironmentFile= wins over Environment= (systemd.exec(5)).
        for file, found in _variables(root, pattern, part_of):
            environment |= found
            origins |= dict.fromkeys(found, file)
    return _Whole(path, replace(whole, environment=environment), origins)


def _over(lower: Entry, upper: Entry) -> Entry:
    command = None if "ExecStart" in upper.resets else lower.command
    environment = {} if "Environment" in upper.resets else lower.environment
    files = () if "EnvironmentFile" in upper.resets else lower.files
    return Entry(
        _over_command(command, upper.command),
        {**environment, **upper.environment},
        {**lower.settings, **upper.settings},
        (*files, *upper.files),
    )


def _over_command(lower: Command | None, upper: Command | None) -> Command | None:
    """A quadlet's drop-in may change its Exec= and leave its Image=, or the other way round."""
    if lower is None or upper is None:
        return upper or lower
    if upper.image == INHERITED:
        program = upper.program or lower.program
        return replace(lower, program=program, flags=upper.flags, references=upper.references)
    if upper.image is not None and not (upper.program or upper.flags or upper.references):
        return replace(lower, image=upper.image)
    return upper


def _variables(root: Root, pattern: str, part_of: _Part) -> Iterator[tuple[str, dict[str, str]]]:
    """Files that an EnvironmentFile= names, and their variables."""
    if not pattern.startswith("/") or ".." in pattern.split("/") or "%" in pattern:
        return
    for path in _matching(root, pattern)[:_ENVIRONMENT_FILES_LIMIT]:
        if part_of is reduce_file and not is_reduced(path):
            continue  # a snapshot would take all of it along
        try:
            text = _reduced(root, path, part_of=part_of)
            found = formats.entries(text or "", formats.variables)
        except (OSError, NotUnderstood):
            continue
        for entry in found:
            yield path, dict(entry.environment)


def _matching(root: Root, pattern: str) -> list[str]:
    """Files that a pattern stands for, which has wildcards in the last of its names only.

    It may be of a user's unit: "/**/*.env" would have whoever asks walk all file systems.
    """
    directory, _, name = pattern.rpartition("/")
    if "*" not in pattern:
        return [pattern]
    if "*" in directory:
        return []
    return [f"{directory}/{each}" for each in _listed(root, directory) if fnmatchcase(each, name)]


def _started(root: Root, whole: _Whole, kind: Kind, user: bool) -> Iterator[Declared]:
    """The servers that a unit starts: itself, or those of a file that its flags name."""
    entry = whole.entry
    if entry.command is None or entry.command.image == INHERITED:
        return
    if entry.command.engine == SCRIPT:
        yield from _scripted(root, whole, entry.command.program, user)
        return
    server = _server(whole, entry.command, kind, user)
    flags = server.flags
    if server.engine == "llama-swap":
        file = flags.get("--config") or flags.get("-config") or _SWAP_DEFAULT
        yield from _named(root, replace(server, flags={}), file, "llama-swap")
    elif server.preset is not None:
        yield server
        yield from _named(root, server, server.preset, "preset")
    else:
        yield server


def _server(whole: _Whole, command: Command, kind: Kind = "unit", user: bool = False) -> Declared:
    """The server of a unit's own command."""
    entry = whole.entry
    flags = {**command.flags, **_referenced(command, entry.environment)}
    if command.engine == "Lemonade" and "LEMONADE_LLAMACPP_ARGS" in entry.environment:
        flags = parse_flags(entry.environment["LEMONADE_LLAMACPP_ARGS"])
        # It starts a llama-server of its own, of a build it chose itself.
        command = Command(LLAMA, "/elsewhere/llama-server", command.image)
    return Declared(
        whole.path,
        _model(flags, entry.environment),
        flags,
        entry.environment,
        entry.settings,
        kind,
        command.engine,
        command.program,
        command.image,
        user,
        unread=_missing_flags(whole.path, command, entry.environment),
        origins=whole.origins,
    )


def _scripted(root: Root, whole: _Whole, program: str, user: bool) -> Iterator[Declared]:
    """The servers of a shell script that a unit starts; a script it starts is not looked into."""
    path = _at_home(program, whole.path)
    owner = Declared(path, None, {}, whole.entry.environment, whole.entry.settings, user=user)
    try:
        text = _reduced(root, path)
        found = formats.entries(text or "", script.script)
    except OSError as error:
        if path.endswith(".sh"):  # any other name may be that of a program
            words = (error.strerror or "unknown error").lower()
            unread = f"{whole.path} starts {path}, which cannot be read ({words})"
            yield replace(owner, path=whole.path, unread=unread)
        return
    for server in _each(owner, path, "script", found):
        if server.preset is None:
            yield server
        else:
            yield from (server, *_named(root, server, server.preset, "preset"))


def _at_home(path: str, owner: str) -> str:
    """``%h`` as the user's manager has it whose unit lies at ``owner``."""
    home = re.match(r"/home/[^/]+|/root", owner)
    return path.replace("%h", home[0]) if home else path


def _referenced(command: Command, environment: Mapping[str, str]) -> dict[str, str]:
    """Flags that stand in variables."""
    texts = (environment.get(name, "") for name in command.references)
    return parse_flags(" ".join(texts))


def _missing_flags(path: str, command: Command, environment: Mapping[str, str]) -> str | None:
    for name in command.references:
        if name not in environment:
            return f"{path} takes flags from ${name}, which is not in a file that is read"
    return None


def _model(flags: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    given = [
        flags[flag] for flag in ("--model", "-m", "--hf-repo", "-hf", "-hfr") if flags.get(flag)
    ]
    return next(iter(given), None) or (
        environment.get("LLAMA_ARG_MODEL") or environment.get("LLAMA_ARG_HF_REPO")
    )


def _named(root: Root, server: Declared, file: str, kind: Kind) -> Iterator[Declared]:
    """The servers of a file that ``server`` reads; itself, with the reason, where that fails."""
    what = "llama-swap" if kind == "llama-swap" else "a preset of llama-server"
    parser = formats.yaml if kind == "llama-swap" else formats.preset
    path = _at_home(file, server.path)
    said = f"{what} is declared; its models are in {path}, which"
    try:
        if server.image is not None:
            raise NotUnderstood("lies in a container")
        if not path.startswith("/") or ".." in path.split("/") or "%" in path:
            raise NotUnderstood("is not an absolute path")
        if not path.endswith((".yaml", ".yml") if kind == "llama-swap" else ".ini"):
            raise NotUnderstood("is not read by that name")
        text = _reduced(root, path, _CONFIGURATION_SIZE)
        found = formats.entries(text or "", parser)
    except OSError as error:
        words = (error.strerror or "unknown error").lower()
        yield replace(server, unread=f"{said} cannot be read ({words})")
    except NotUnderstood as error:
        line = str(error).startswith("line ")
        yield replace(server, unread=f"{said} {f'is not understood ({error})' if line else error}")
    else:
        yield from _each(server, path, kind, found)


def _each(owner: Declared, path: str, kind: Kind, found: Iterable[Entry]) -> Iterator[Declared]:
    """The servers of one file, under what their owner gives to all of them."""
    entries = [entry for entry in found if entry.command is not None]
    for number, entry in enumerate(entries, 1):
        command = entry.command or Command(LLAMA, "")
        environment = {**owner.environment, **entry.environment}
        own = {**command.flags, **_referenced(command, environment)}
        flags = {**_without_files(owner.flags), **own}
        router = kind == "preset"
        if router:
            environment.pop(PRESET_VARIABLE, None)
        yield Declared(
            path,
            _model(own, entry.environment) or _model(flags, environment),
            flags if router else own,
            environment,
            owner.settings,
            kind,
            command.engine,
            owner.program if router else command.program,
            owner.image if router else command.image,
            owner.user,
            number if len(entries) > 1 else 0,
            unread=_missing_flags(path, command, environment),
            origins={**owner.origins, **dict.fromkeys(entry.environment, path)},
        )


def _without_files(flags: Mapping[str, str]) -> dict[str, str]:
    """A router's flags that its servers get too."""
    return {name: value for name, value in flags.items() if not name.startswith("--models-")}


# -- other files ------------------------------------------------------------------------------


def _compose(root: Root, homes: list[str]) -> Iterator[Declared]:
    """Servers of compose files in /opt, /srv, /etc and homes, one or two levels down."""
    budget = [_DIRECTORIES_LIMIT]
    starts = [("/opt", 1), ("/srv", 1), ("/etc", 1), *((home, 2) for home in homes)]
    for start, levels in starts:
        user = start.startswith(("/home", "/root"))
        for path in _compose_files(root, start, levels, budget):
            try:
                text = _reduced(root, path, _CONFIGURATION_SIZE)
                found = formats.entries(text or "", formats.yaml)
            except (OSError, NotUnderstood):
                continue
            yield from _each(Declared(path, None, {}, {}, {}, user=user), path, "compose", found)


def _compose_files(root: Root, directory: str, levels: int, budget: list[int]) -> Iterator[str]:
    if budget[0] <= 0:
        return
    budget[0] -= 1
    names = _listed(root, directory)
    yield from (f"{directory}/{name}" for name in names if name in _COMPOSE)
    if levels > 0:
        for name in names:
            if not name.startswith(".") and "." not in name and "\0" not in name:
                yield from _compose_files(root, f"{directory}/{name}", levels - 1, budget)


def _lemonade(root: Root, directory: str) -> Iterator[Declared]:
    for name in _LEMONADE:
        path = f"{directory}/{name}"
        try:
            text = _reduced(root, path, _CONFIGURATION_SIZE)
            found = formats.entries(text or "", formats.lemonade)
        except (OSError, NotUnderstood):
            continue
        owner = Declared(path, None, {}, {}, {}, user=not directory.startswith("/var"))
        yield from _each(owner, path, "Lemonade", found)


def _declarations(root: Root) -> Iterator[Declared]:
    files = [file for file in _listed(root, DECLARED) if declared_server(file)]
    for path in (f"{DECLARED}/{file}" for file in files[:_UNITS_LIMIT]):
        try:
            text = _reduced(root, path)
        except OSError:
            continue
        if text:
            model = tomllib.loads(text).get("model")
            label = model if isinstance(model, str) else None
            yield Declared(path, label, {}, {}, {}, kind="infertune")
