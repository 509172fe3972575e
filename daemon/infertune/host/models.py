# SPDX-License-Identifier: Apache-2.0
"""Models where people keep them: caches of Hugging Face and llama.cpp, LM Studio, /srv/models.

Only names, sizes and links are looked at.  What is found lies in its place after all links too,
and no directory into which everybody may write is entered: nobody else decides what is found.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from infertune.base.records import dataclass
from infertune.base.root import Root, read_plain_file

SYSTEM = ("/srv/models",)
"""Those of the machine; all others are somebody's."""

_OF_A_HOME = (
    ".cache/huggingface/hub",  # huggingface_hub, and llama.cpp since 2026
    ".cache/llama.cpp",
    ".lmstudio/models",
    ".cache/lm-studio/models",
    "models",
)
_LEVELS = 6
"""Below a place: models--ORG--NAME/snapshots/REVISION/DIRECTORY/FILE is the deepest."""
_ENTRIES = 20_000
MOST_MODELS = 1000

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_HUB = re.compile(r"(?P<repository>(?:.*/)?models--(?P<name>[^/]+))/snapshots/(?P<rest>[^/]+)/.+")
_CACHED = re.compile(r"(?P<owner>[^_]+)_(?P<name>.+-GGUF)_(?P<file>.+)", re.IGNORECASE)
"""A file of llama.cpp's own cache (common/download.cpp)."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model, of one file or of several parts."""

    name: str
    """Of its file, without what says which part it is."""
    path: str
    """Of its first part."""
    repository: str | None
    """``OWNER/NAME`` where that is known."""
    bytes: int
    """All parts that are there."""
    missing: int
    """Parts that are not."""


def places(environment: Mapping[str, str], homes: Iterable[str]) -> tuple[str, ...]:
    """Where models are kept: by these homes' owners, and on this machine."""
    given = [
        environment.get("HF_HUB_CACHE"),
        f"{environment['HF_HOME']}/hub" if environment.get("HF_HOME") else None,
        environment.get("LLAMA_CACHE"),
    ]
    of_homes = [f"{home.rstrip('/')}/{each}" for home in homes for each in _OF_A_HOME]
    found = [each for each in (*given, *of_homes, *SYSTEM) if each and each.startswith("/")]
    return tuple(dict.fromkeys(found))


def find_models(root: Root, places: Iterable[str]) -> tuple[Model, ...]:
    """The models in these places, each once; at most ``MOST_MODELS``."""
    found: dict[str, Model] = {}
    left = itertools.count(_ENTRIES, -1)
    for place in places:
        for real, model in _of_place(root, place, left):
            if len(found) < MOST_MODELS:
                found.setdefault(real, model)
    return tuple(found.values())


def _of_place(root: Root, place: str, left: Iterator[int]) -> Iterator[tuple[str, Model]]:
    """Models of one place, with where their first part really is."""
    base = os.path.realpath(root.at(place))
    for directory, names in _directories(base, _LEVELS, left):
        if _is_old(base, directory):
            continue
        files = {each: f"{directory}/{each}" for each in names}
        real = {name: os.path.realpath(path) for name, path in files.items()}
        sizes = {name: _size(path) for name, path in real.items() if path.startswith(f"{base}/")}
        inside = {name: size for name, size in sizes.items() if size is not None}
        for name in inside:
            if (parts := _parts(name)) and not name.lower().startswith("mmproj"):
                there = [inside[each] for each in parts if each in inside]
                below = directory[len(base) :]
                path = f"{place}{below}/{name}"
                called, repository = _called(below.lstrip("/"), name)
                missing = _number_of_parts(name) - len(there)
                yield real[name], Model(called, path, repository, sum(there), missing)


def _directories(
    directory: str, levels: int, left: Iterator[int]
) -> Iterator[tuple[str, list[str]]]:
    """A directory and those below it, with the names of their model files."""
    try:
        if os.stat(directory).st_mode & stat.S_IWOTH:
            return
        with os.scandir(directory) as entries:
            few = itertools.islice(entries, _ENTRIES)
            seen = [each for each in few if next(left) > 0 and not each.name.startswith(".")]
    except OSError:
        return
    seen.sort(key=lambda each: each.name)
    files = [each.name for each in seen if each.name.endswith(".gguf") and each.name.isprintable()]
    yield directory, files
    for each in seen if levels else ():
        with contextlib.suppress(OSError):
            if each.is_dir(follow_symlinks=False):
                yield from _directories(each.path, levels - 1, left)


def _size(path: str) -> int | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _parts(name: str) -> Sequence[str]:
    """The files of the model whose first is ``name``; empty where it is a later part."""
    match = _PART.fullmatch(name)
    if match is None:
        return (name,)
    if int(match["number"]) != 1:
        return ()
    numbers = range(1, min(int(match["count"]), MOST_MODELS) + 1)
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in numbers]


def _number_of_parts(name: str) -> int:
    """Of the model whose first part has this name; more than are looked for is never whole."""
    match = _PART.fullmatch(name)
    return int(match["count"]) if match else 1


def _called(below: str, name: str) -> tuple[str, str | None]:
    """Name and repository of a file in a directory below its place."""
    part = _PART.fullmatch(name)
    stem = part["stem"] if part else name.removesuffix(".gguf")
    if hub := _HUB.fullmatch(f"{below}/{name}"):
        return stem, hub["name"].replace("--", "/", 1)
    if cached := _CACHED.fullmatch(stem):
        return cached["file"], f"{cached['owner']}/{cached['name']}"
    return stem, below if below.count("/") == 1 else None


def _is_old(base: str, directory: str) -> bool:
    """Whether this is a revision in a cache of Hugging Face that is not its repository's main."""
    hub = _HUB.fullmatch(f"{directory[len(base) + 1 :]}/x")
    if hub is None:
        return False
    try:
        main = Path(f"{base}/{hub['repository']}/refs/main")
        data, _ = read_plain_file(main, 100, follow=False)  # never a pipe, which nobody may feed
    except OSError:
        return False
    return data.strip() != hub["rest"].encode()


def real_path(path: str) -> str:
    """Where a file really is.

    One in a cache of Hugging Face is a link to a file whose name is a hash: it keeps the name it
    has there, which tells the other parts, if it does not lead out of its repository.
    """
    directory, name = os.path.split(os.path.abspath(path))
    kept = os.path.join(os.path.realpath(directory), name)
    real = os.path.realpath(path)
    hub = _HUB.fullmatch(kept)
    return kept if hub and real.startswith(f"{hub['repository']}/blobs/") else real


def shown_directory(path: str) -> str:
    """The directory that a unit has to see to read a model, with its other parts."""
    hub = _HUB.fullmatch(path)
    return hub["repository"] if hub else path.rpartition("/")[0]
