# SPDX-License-Identifier: Apache-2.0
"""Profiles: where they are found, what they may say, and how they inherit.

A profile is one TOML file::

    description = "one long conversation"
    extends = "base"                    # a name, or a list of names

    [now]                               # the running kernel, undone on revert
    vm.swappiness = 10                  # knob ids: dotted, as tables, or quoted
    platform_profile = { value = "balanced", required = true, because = "..." }

    [boot]                              # takes effect at the next boot
    ttm.pages_limit = "96GiB, at least 75%, at most 80%"

    [launch]                            # how the server process is placed
    cpus = "physical cores of the largest L3, minus one"
    env.OMP_NUM_THREADS = "8"           # also [launch.env]

    [server]                            # canonical settings of llama-server
    ctx_size = 131072

    [backend.vulkan.server]             # the same tables (but boot), for one backend
    ubatch_size = 512

A child wins over its parents, and within one file a backend's tables win over
the general ones.  Parents that disagree are an error until the child decides.
A setting counts as its winner wrote it, ``required`` and ``because`` included.

Names come from a catalogue of ids: a profile cannot say which file is written, run
a command or load code.  The only paths it may hold are those of files the server
reads (``model_draft``, ``mmproj``), and infertune only looks whether they are models.
Everything wrong is a :class:`ProfileError` with file and line, before anything is
touched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from infertune.base import toml_lines
from infertune.base.errors import ProfileError, UsageError, did_you_mean
from infertune.base.names import NAME, NAME_RULE
from infertune.base.records import dataclass, replace
from infertune.base.root import Root, changeable_by_others, read_plain_file
from infertune.base.tables import clipped, parse_toml, shown
from infertune.catalogue.backends import BACKENDS
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.launch_settings import (
    ENVIRONMENT_ALLOWED,
    LAUNCH_SETTINGS,
    check_environment,
)
from infertune.catalogue.server_settings import SERVER_SETTINGS
from infertune.catalogue.values import Value
from infertune.host.machine import Machine

SEARCH_PATH = (
    "/etc/infertune/profiles",
    "/run/infertune/profiles",
    "/usr/local/lib/infertune/profiles",
    "/usr/lib/infertune/profiles",
)
"""Directories of the machine, the first one wins; the package's own profiles come last."""

MAX_BYTES = 256 * 1024
MAX_DEPTH = 8
"""Levels of ``extends``, the profile itself included."""

Section = Literal["now", "boot", "launch", "env", "server"]

_MAX_MESSAGE = 400
_MAX_SUGGESTIONS = 100
"""Problems of one file that get a "did you mean": finding one takes time."""


@dataclass(frozen=True)
class _EnvironmentValue(Value):
    """What one variable may be; names are checked by ``check_environment``."""

    name: str

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        if isinstance(configured, bool) or not isinstance(configured, str | int):
            raise ValueError(f"{configured!r} is not {self.accepts()}")
        check_environment(self.name, str(configured))
        return str(configured)

    def decode(self, raw: bytes) -> str:
        return raw.decode("utf-8", "replace")

    def accepts(self) -> str:
        return "a text or a whole number"


CATALOGUE: Mapping[Section, Mapping[str, Value]] = {
    "now": {knob.id: knob.value for knob in KNOBS.values() if knob.time == "now"},
    "boot": {knob.id: knob.value for knob in KNOBS.values() if knob.time == "boot"},
    "launch": {setting.id: setting.value for setting in LAUNCH_SETTINGS.values()},
    "server": {setting.id: setting.value for setting in SERVER_SETTINGS.values()},
}
"""What each table may hold.  Variables of ``[launch.env]`` follow rules instead of a list."""

_TITLES: Mapping[Section, str] = {
    "now": "knob",
    "boot": "boot knob",
    "launch": "launch setting",
    "env": "environment variable",
    "server": "server setting",
}


def value_type(section: Section, name: str) -> Value:
    """The type of one setting.  Raises KeyError for a name that is not in the catalogue."""
    return _EnvironmentValue(name) if section == "env" else CATALOGUE[section][name]


@dataclass(frozen=True, slots=True)
class Source:
    """The line that says so."""

    file: str
    line: int
    profile: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as a profile gives it."""

    section: Section
    id: str
    configured: str | int | bool
    required: bool
    because: str | None
    source: Source
    overridden: tuple[tuple[Source, str | int | bool], ...] = ()
    """What it wins over, nearest first."""


Key = tuple[Section, str]
Layer = dict[Key, Given]


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile with everything it inherits."""

    name: str
    description: str
    file: str
    parents: tuple[Profile, ...]
    general: Mapping[Key, Given]
    """The settings without any backend's own."""
    by_backend: Mapping[str, Mapping[Key, Given]]
    """The settings for each of BACKENDS, general ones included."""


NOTHING = Profile("none", "nothing is set", "", (), {}, {backend: {} for backend in BACKENDS})
"""In place of a profile: the server's own defaults, on the machine as it is."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one profile lies."""

    name: str
    file: str
    """For people: as on the machine."""
    path: Path
    level: int
    """Position on the search path, the package last; -1 for a file that is not on it."""

    @property
    def on_machine(self) -> bool:
        """Whether it lies in a directory of SEARCH_PATH."""
        return 0 <= self.level < len(SEARCH_PATH)


# -- finding -----------------------------------------------------------------


def package_directory() -> Path:
    """The profiles that come with infertune: package data, or the checkout's ``profiles/``."""
    here = Path(__file__).resolve().parent
    installed = here / "shipped"
    return installed if os.path.isdir(installed) else here.parents[2] / "profiles"


def places(root: Root) -> dict[str, list[Place]]:
    """Every profile by name, with all its places; the first one is the one that counts."""
    found: dict[str, list[Place]] = {}
    directories = [(directory, root.at(directory)) for directory in SEARCH_PATH]
    package = package_directory()
    for level, (listed, directory) in enumerate([*directories, (str(package), package)]):
        try:
            entries = sorted(os.listdir(directory))
        except OSError:
            continue
        for entry in entries:
            name = entry.removesuffix(".toml")
            if entry.endswith(".toml") and NAME.fullmatch(name):
                place = Place(name, f"{listed}/{entry}", directory / entry, level)
                found.setdefault(name, []).append(place)
    return dict(sorted(found.items()))


def load_profile(root: Root, name: str) -> Profile:
    """The profile ``name`` of the search path, with its parents.

    Raises UsageError if there is none of that name, ProfileError with file and
    line if it, or one that it extends, is not valid.
    """
    return read_profile(root, name)[0]


def read_profile(root: Root, name: str) -> tuple[Profile, tuple[str, ...]]:
    """The same, and every file on this system that it was read from."""
    loader = _Loader(root)
    profile, problems = loader.named(name)
    if profile is None:
        first = problems[0]
        if len(problems) > 1:
            first.hint = f"{len(problems)} problems in all; see 'infertune profile check {name}'"
        raise first
    return profile, tuple(map(str, loader.loaded))


def check_profile(root: Root, name: str) -> tuple[Profile | None, list[ProfileError]]:
    """The profile, or everything that is wrong with it and its parents, in order of lines.

    Raises UsageError if there is none of that name.
    """
    return _Loader(root).named(name)


def check_name(name: str) -> None:
    """Raise UsageError for what no profile can be called."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{shown(name)} is not a profile name", hint=f"A name is {NAME_RULE}.")


def check_file(root: Root, path: str) -> tuple[Profile | None, list[ProfileError]]:
    """As ``check_profile``, for a file of the caller's, as if it stood first on the search path."""
    name = Path(path).name.removesuffix(".toml")
    return _Loader(root).check(Place(name, path, Path(path), -1))


# -- reading -----------------------------------------------------------------


def _read(root: Root, place: Place) -> str:
    """The text of a profile.  Opened once: what is checked is what is read."""

    def refuse(what: str, line: int | None = None, hint: str | None = None) -> ProfileError:
        return ProfileError(what, file=place.file, line=line, hint=hint)

    try:
        # What a package manager installed beside our own code is as trustworthy as that code,
        # and may be a link into its store.
        data, status = read_plain_file(place.path, MAX_BYTES + 1, follow=not place.on_machine)
        checked = place.on_machine and root.live and os.geteuid() == 0
        open_to = changeable_by_others(place.path, status, root.base) if checked else None
    except ValueError as error:  # a NUL in the path
        raise refuse(f"cannot be read: {error}") from error
    except OSError as error:
        if error.errno == errno.ELOOP and place.on_machine:
            raise refuse(
                "is a symbolic link; a profile is a plain file",
                hint="Copy it, or write a file that says: extends = ...",
            ) from error
        raise refuse(f"cannot be read: {error.strerror}") from error
    if open_to:
        raise refuse(
            f"others than root may change {open_to}",
            hint="chown root and chmod go-w it, after a look at what it says.",
        )
    if len(data) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES // 1024} KiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse("is not UTF-8 here; save it as UTF-8", line) from error


@dataclass(frozen=True, slots=True)
class _Contents:
    """One file, without its parents."""

    description: str
    extends: tuple[tuple[str, int], ...]
    """Names of parents and the lines that say so."""
    general: Layer
    by_backend: Mapping[str, Layer]


class _FileReader:
    """Turns one parsed file into its contents, and collects everything that is wrong with it."""

    def __init__(
        self, place: Place, document: dict[str, Any], lines: Mapping[toml_lines.Path, int]
    ) -> None:
        self.place = place
        self.document = document
        self.lines = lines
        self.problems: list[ProfileError] = []

    def problem(self, message: str, line: int) -> None:
        self.problems.append(
            ProfileError(clipped(message, _MAX_MESSAGE), file=self.place.file, line=line)
        )

    def suggest(self, name: str, known: Collection[str]) -> str:
        return did_you_mean(name, known) if len(self.problems) < _MAX_SUGGESTIONS else ""

    def contents(self) -> _Contents:
        general: Layer = {}
        by_backend: dict[str, Layer] = {backend: {} for backend in BACKENDS}
        sections: tuple[Section, ...] = ("now", "boot", "launch", "server")
        keys = ("description", "extends", *sections, "backend")
        for key, value in self.document.items():
            if key == "backend":
                self.backends(value, by_backend)
            elif key in sections:
                self.tables({key: value}, (), general, sections)
            elif key not in keys:
                self.unknown_top_key(key, keys)
        return _Contents(self.description(), self.extends(), general, by_backend)

    def unknown_top_key(self, key: str, keys: Collection[str]) -> None:
        line = self.lines[(key,)]
        ids = [name for table in CATALOGUE.values() for name in table]
        if any(name == key or name.startswith(f"{key}.") for name in ids):
            self.problem(f"{shown(key)} stands outside a table; put it under [now]", line)
        else:
            self.problem(f"unknown key {shown(key)}{self.suggest(key, keys)}", line)

    def description(self) -> str:
        value = self.document.get("description", "")
        if not isinstance(value, str) or not value.isprintable():
            self.problem("'description' is one line of text", self.lines[("description",)])
            return ""
        return value

    def extends(self) -> tuple[tuple[str, int], ...]:
        value = self.document.get("extends", [])
        line = self.lines.get(("extends",), 0)
        if isinstance(value, str):
            named = [(value, line)]
        elif isinstance(value, list):
            named = [(name, self.lines[("extends", i)]) for i, name in enumerate(value)]
        else:
            self.problem("'extends' is the name of a profile, or a list of names", line)
            return ()
        good: dict[str, int] = {}
        for name, at in named:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                self.problem(f"{shown(name)} is not a profile name; a name is {NAME_RULE}", at)
            elif name in good:
                self.problem(f"'{name}' is extended twice", at)
            else:
                good[name] = at
        return tuple(good.items())

    def backends(self, value: object, layers: Mapping[str, Layer]) -> None:
        path: toml_lines.Path = ("backend",)
        if not isinstance(value, dict):
            self.problem("'backend' holds tables such as [backend.vulkan.server]", self.lines[path])
            return
        for backend, tables in value.items():
            if backend not in BACKENDS:
                what = f"unknown backend {shown(backend)}; one of {', '.join(BACKENDS)}"
                self.problem(what + self.suggest(backend, BACKENDS), self.lines[*path, backend])
            elif not isinstance(tables, dict):
                what = f"[backend.{backend}] holds the tables now, launch and server"
                self.problem(what, self.lines[*path, backend])
            else:
                sections: tuple[Section, ...] = ("now", "launch", "server")
                self.tables(tables, (*path, backend), layers[backend], sections)

    def tables(
        self,
        tables: Mapping[str, object],
        path: toml_lines.Path,
        layer: Layer,
        sections: Sequence[Section],
    ) -> None:
        """Fill ``layer`` from tables such as now and server."""
        for section in sections:
            table = tables.get(section)
            if section not in tables:
                continue
            here = (*path, section)
            if not isinstance(table, dict):
                self.problem(f"'{section}' is a table: [{_dotted(here)}]", self.lines[here])
                continue
            if section == "launch" and "env" in table:
                self.environment(table["env"], (*here, "env"), layer)
                table = {key: value for key, value in table.items() if key != "env"}
            for name, value, at in _leaves(table, CATALOGUE[section], here):
                self.setting(section, name, value, at, layer)
        for key in tables.keys() - set(sections):
            line = self.lines[*path, key]
            if key == "boot":
                self.problem("[boot] is for the whole machine, not for one backend", line)
            else:
                what = f"unknown table {shown(key)}{self.suggest(key, sections)}"
                self.problem(what, line)

    def environment(self, table: object, path: toml_lines.Path, layer: Layer) -> None:
        if not isinstance(table, dict):
            self.problem(f"'env' is a table: [{_dotted(path)}]", self.lines[path])
            return
        for name, value in table.items():
            self.setting("env", name, value, (*path, name), layer)

    def setting(
        self, section: Section, name: str, value: object, path: toml_lines.Path, layer: Layer
    ) -> None:
        """Check one setting and put it into ``layer``."""
        line = self.lines[path]
        if section != "env" and name not in CATALOGUE[section]:
            self.problem(self.unknown(section, name), line)
            return
        if (section, name) in layer:
            first = layer[section, name].source.line
            self.problem(f"two values for '{name}'; the other is on line {first}", line)
            return
        required: object = False
        because: object = None
        if isinstance(value, dict):
            before = len(self.problems)
            fields = ("value", "required", "because")
            for key in value:
                if key not in fields:
                    what = f"'{name}': unknown key {shown(key)}{self.suggest(key, fields)}"
                    self.problem(what, self.lines[*path, key])
            if "value" not in value:
                self.problem(f"'{name}' has no value; write {{ value = ... }}", line)
            required = value.get("required", False)
            if not isinstance(required, bool):
                what = f"'{name}': 'required' is true or false"
                self.problem(what, self.lines[*path, "required"])
            because = value.get("because")
            if because is not None and not (isinstance(because, str) and because.isprintable()):
                what = f"'{name}': 'because' is one line of text"
                self.problem(what, self.lines[*path, "because"])
            if len(self.problems) > before:
                return
            line = self.lines[*path, "value"]
            value = value["value"]
        try:
            value_type(section, name).parse(value)
        except ValueError as error:
            known = [rule.pattern for rule in ENVIRONMENT_ALLOWED if "*" not in rule.pattern]
            hint = self.suggest(name, known) if section == "env" and name not in known else ""
            self.problem(f"{shown(name)}: {error}{hint}", line)
            return
        layer[section, name] = Given(
            section=section,
            id=name,
            configured=value,  # type: ignore[arg-type]  # parse() lets only these types through
            required=bool(required),
            because=because if isinstance(because, str) else None,
            source=Source(self.place.file, line, self.place.name),
        )

    def unknown(self, section: Section, name: str) -> str:
        for other, known in CATALOGUE.items():
            if name in known:
                why = {
                    "now": " (it acts at once)",
                    "boot": " (it takes effect at the next boot)",
                }.get(other, "")
                return f"'{name}' belongs in [{other}]{why}"
        what = f"unknown {_TITLES[section]} {shown(name)}"
        return what + self.suggest(name, CATALOGUE[section])


def _leaves(
    table: Mapping[str, object], known: Collection[str], path: toml_lines.Path, prefix: str = ""
) -> Iterator[tuple[str, object, toml_lines.Path]]:
    """Settings of nested tables: id, value and where it stands.

    A table is walked into until the keys make a known id, or it looks like one
    setting (it has a ``value``), or it is empty.
    """
    for key, value in table.items():
        name = f"{prefix}{key}"
        here = (*path, key)
        if isinstance(value, dict) and value and name not in known and "value" not in value:
            yield from _leaves(value, known, here, f"{name}.")
        else:
            yield name, value, here


# -- inheriting --------------------------------------------------------------


class _Loader:
    """Reads a profile and its parents; each file once."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.places = places(root)
        self.problems: list[ProfileError] = []
        self.loaded: dict[Path, Profile | None] = {}

    def named(self, name: str) -> tuple[Profile | None, list[ProfileError]]:
        """See ``check_profile``."""
        check_name(name)
        if name not in self.places:
            raise UsageError(
                f"there is no profile '{name}'{did_you_mean(name, self.places)}",
                hint="'infertune profiles' lists them.",
            )
        return self.check(self.places[name][0])

    def check(self, place: Place) -> tuple[Profile | None, list[ProfileError]]:
        profile = self.load(place, ())
        return (None, self.problems) if self.problems else (profile, [])

    def load(self, place: Place, chain: tuple[Place, ...]) -> Profile | None:
        """The profile, or None with its problems noted.  ``chain``: who extends it."""
        if place.path not in self.loaded:
            self.loaded[place.path] = self.load_anew(place, (*chain, place))
        return self.loaded[place.path]

    def load_anew(self, place: Place, chain: tuple[Place, ...]) -> Profile | None:
        try:
            document, lines = parse_toml(_read(self.root, place), place.file, ProfileError)
        except ProfileError as error:
            self.problems.append(error)
            return None
        reader = _FileReader(place, document, lines)
        contents = reader.contents()
        own, others = reader.problems, self.problems
        self.problems = []
        parents = [
            self.parent(name, line, chain, reader.problem) for name, line in contents.extends
        ]
        complete = [parent for parent in parents if parent is not None]
        conflicts: dict[str, str] = {}
        general = _merge((contents.general,), [p.general for p in complete], conflicts)
        by_backend = {
            backend: _merge(
                (contents.general, contents.by_backend[backend]),
                [parent.by_backend[backend] for parent in complete],
                conflicts,
            )
            for backend in BACKENDS
        }
        for message in conflicts.values():
            reader.problem(message, contents.extends[0][1])
        own.sort(key=lambda problem: problem.line or 0)
        self.problems = others + own + self.problems
        if own or len(complete) < len(parents):
            return None
        description = contents.description or (complete[0].description if complete else "")
        return Profile(place.name, description, place.file, tuple(complete), general, by_backend)

    def parent(
        self,
        name: str,
        line: int,
        chain: tuple[Place, ...],
        problem: Callable[[str, int], None],
    ) -> Profile | None:
        child = chain[-1]
        candidates = self.places.get(name, [])
        if name == child.name:
            # An admin's profile may build on the vendor's of the same name.
            candidates = [place for place in candidates if place.level > child.level]
            if not candidates:
                problem(f"'{name}' extends itself, and there is no other '{name}' below it", line)
                return None
        if not candidates:
            problem(f"there is no profile '{name}'{did_you_mean(name, self.places)}", line)
            return None
        place = candidates[0]
        names = " -> ".join(link.name for link in (*chain, place))
        if place.path in {link.path for link in chain}:
            problem(f"'extends' goes round in a circle: {names}", line)
            return None
        if len(chain) >= MAX_DEPTH:
            problem(f"'extends' goes more than {MAX_DEPTH} levels deep: {names}", line)
            return None
        return self.load(place, chain)


def _merge(
    own: Sequence[Mapping[Key, Given]],
    parents: Sequence[Mapping[Key, Given]],
    conflicts: dict[str, str],
) -> Layer:
    """One set of settings: ``own`` layers, the last one strongest, over those of the parents.

    Notes in ``conflicts``, by id, what two parents disagree on and no own layer decides.
    """
    merged: Layer = {}
    for settings in parents:
        for key, given in settings.items():
            if key not in merged:
                merged[key] = given
                continue
            agreed = _agree(merged[key], given)
            if agreed is not None:
                merged[key] = agreed
            elif not any(key in layer for layer in own):
                first = merged[key]
                conflicts[given.id] = (
                    f"the parents disagree on '{given.id}': {first.configured!r} "
                    f"({first.source}) and {given.configured!r} ({given.source}); "
                    "set it in this profile"
                )
    for layer in own:
        for key, given in layer.items():
            below = merged.get(key)
            over = ((below.source, below.configured), *below.overridden) if below else ()
            merged[key] = replace(given, overridden=over)
    return merged


def _agree(first: Given, second: Given) -> Given | None:
    """The one of two inherited settings that counts; None where they contradict each other."""
    if first.configured == second.configured:
        return replace(first, required=first.required or second.required)
    # A common ancestor's value that one of the parents has already overridden is no contradiction.
    if second.source in [source for source, _ in first.overridden]:
        return first
    if first.source in [source for source, _ in second.overridden]:
        return second
    return None


# -- words -------------------------------------------------------------------


def _dotted(path: toml_lines.Path) -> str:
    return ".".join(str(part) for part in path)
