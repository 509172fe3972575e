# SPDX-License-Identifier: Apache-2.0
"""What the daemon asks of users' managers, and what it is told.

The daemon does not go where users' things are.  A unit with the rights of the user and no others
(systemd/infertune-user@.service) carries out a request there.  The request is a file of root's; the
answer is the status text of that unit, which systemd keeps short, and which a user can make
whatever he likes: nothing of it is believed but by whom it concerns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from infertune.base.errors import Failed
from infertune.base.names import is_foreign_unit
from infertune.base.records import asdict, dataclass
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.servers.adopted import Wanted, parse_wanted

REQUESTS = "/run/infertune/users"
_MAX_BYTES = 1024 * 1024
MAX_ANSWER = 3800
"""Bytes of an answer: systemd takes 4096 with what else is said (PIPE_BUF)."""
_MAX_ROWS = 64
_LONGEST = 300
"""Characters of a sentence, or of a value."""

Row = tuple[str, str, str | None, str]
"""Unit, property, what it is now (None: not looked at) and what it is to be."""


@dataclass(frozen=True, slots=True)
class One:
    """A unit, and what it is to be given."""

    unit: str
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be so in one user's manager."""

    serial: str
    """Given back in the answer, so that an older one is not taken for it."""
    units: Mapping[str, One]
    """All that is adopted there, by name; what is not among them is given back."""
    about: str = ""
    """The one that is asked about: done again even where it is so already."""
    plan: One | None = None
    """Only looked at, under the name ``about``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it."""

    serial: str
    active: bool = False
    rows: tuple[Row, ...] = ()
    left: tuple[str, ...] = ()
    """What was left as it is, and why, in sentences."""
    error: str = ""
    usage: bool = False
    """Whether the error is that of whoever asked, and nothing was touched."""
    hint: str = ""


def _path(uid: int) -> str:
    return f"{REQUESTS}/{uid}.json"


def write_request(root: Root, uid: int, request: Request | None) -> None:
    """Ask for something; nothing is asked any more with None.  Raises Failed."""
    path = _path(uid)
    try:
        if request is None:
            root.unlink(path)
            return
        root.mkdir(REQUESTS)
        root.replace(path, json.dumps(asdict(request), indent=1).encode())
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def forget_requests(root: Root) -> None:
    """Ask nothing of any user any more.  Raises Failed."""
    try:
        for name in root.listed(REQUESTS):
            root.unlink(f"{REQUESTS}/{name}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Failed(f"{REQUESTS}: {error.strerror}") from error


def read_request(root: Root, uid: int) -> Request:
    """What is asked for; that nothing be adopted where there is no file.  Raises Failed."""
    path = _path(uid)
    try:
        data, _ = root.read_file(path, _MAX_BYTES)
        found = json.loads(data)
        units = {name: _one(each) for name, each in found["units"].items()}
        plan = None if found["plan"] is None else _one(found["plan"])
        return Request(str(found["serial"]), units, str(found["about"]), plan)
    except FileNotFoundError:
        return Request("", {})
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failed(f"{path} is damaged") from error


def _one(found: Mapping[str, object]) -> One:
    unit = found["unit"]
    if not isinstance(unit, str) or not is_foreign_unit(unit):
        raise ValueError
    return One(unit, parse_wanted(found["wanted"]))


def answer_text(answer: Answer) -> str:
    """An answer in one line, short enough; rows and sentences that are too many are left out."""
    rows, left = list(answer.rows), list(answer.left)
    while True:
        found = {**asdict(answer), "rows": rows, "left": left}
        text = json.dumps({name: each for name, each in found.items() if each}, ensure_ascii=True)
        if len(text) <= MAX_ANSWER or not (rows or left):
            return text
        (left or rows).pop()


def parse_answer(text: str | None, serial: str) -> Answer | None:
    """The answer to a request; None for anything else, whatever it is."""
    try:
        found = json.loads(text or "")
        if not isinstance(found, dict) or found.get("serial") != serial:
            return None
        return Answer(
            serial,
            found.get("active") is True,
            tuple(map(_row, _list(found.get("rows", [])))),
            tuple(map(_line, _list(found.get("left", [])))),
            _line(found.get("error", "")),
            found.get("usage") is True,
            _line(found.get("hint", "")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _list(found: object) -> list[object]:
    if not isinstance(found, list):
        raise TypeError
    return found[:_MAX_ROWS]


def _row(found: object) -> Row:
    unit, name, before, wanted = _list(found)
    return _line(unit), _line(name), None if before is None else _line(before), _line(wanted)


def _line(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError
    return printable_line(text, _LONGEST)
