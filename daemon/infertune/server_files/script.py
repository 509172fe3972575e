# SPDX-License-Identifier: Apache-2.0
"""A shell script that starts model servers: its own text, and no script that it calls.

Read as far as such scripts are plain: assignments, lists of words (``ARGS=(...)``), exported
variables, and commands that use them.  What a condition or a function decides is not followed,
so a script with several servers gives all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from infertune.server_files import command_line
from infertune.server_files.formats import Entry

_LINES_LIMIT = 1000
_ASSIGNMENT = re.compile(
    r"(?P<how>(?:export|local|readonly|declare(?:\s+-[a-zA-Z]+)*)\s+)?"
    r"(?P<name>[A-Za-z_]\w{0,80})(?P<more>\+)?=(?P<value>.*)",
    re.ASCII | re.DOTALL,
)
_REFERENCE = re.compile(r"\$\{(\w{1,80})(?:\[[@*]\])?(?::?[-=]([^{}]*))?\}|\$(\w{1,80})", re.ASCII)
"""``$NAME``, ``${NAME}``, ``${NAME[@]}``, ``${NAME:-DEFAULT}``."""


def script(text: str) -> list[Entry]:
    """The servers that a shell script starts."""
    if "\0" in text:
        return []  # a program
    variables: dict[str, list[str]] = {}
    exported: dict[str, str] = {}
    found: list[Entry] = []
    for line in _lines(text):
        assignment = _ASSIGNMENT.fullmatch(line)
        if assignment and (words := _assigned(assignment["value"], variables)) is not None:
            name = assignment["name"]
            words = [*variables.get(name, []), *words] if assignment["more"] else words
            variables[name] = _bounded(words)
            if (assignment["how"] or "").startswith("export"):
                exported[name] = " ".join(words)
            continue
        for command in command_line.shell_commands(_expanded(line, variables)):
            environment = {**exported, **command.environment}
            found.append(Entry(command_line.without_environment(command), environment))
    return found


def _lines(text: str) -> Iterator[str]:
    """Lines with what goes on in the next one: after a backslash, in a list of words."""
    rest = iter(text.replace("\\\n", " ").splitlines()[:_LINES_LIMIT])
    for line in rest:
        line = line.strip()
        if re.match(r"(?:\w+\s+)?[A-Za-z_]\w*\+?=\(", line):
            while ")" not in line and (more := next(rest, None)) is not None:
                line += " " + re.sub(r"(?:^|\s)#.*", "", more.strip())
        if line and not line.startswith("#"):
            yield line


def _assigned(value: str, variables: dict[str, list[str]]) -> list[str] | None:
    """The words of what is assigned; None where a command follows: ``A=B llama-server``."""
    if value.startswith("("):
        return _expanded(value[1:].rpartition(")")[0], variables)
    words = command_line.shell_words(value)
    if len(words) > 1:
        return None
    # One word, perhaps of several: flags in quotes.
    return command_line.words(_replaced(words[0], variables)) if words else []


def _expanded(line: str, variables: dict[str, list[str]]) -> list[str]:
    """Words of a line, variables that are known in their place."""

    def words() -> Iterator[str]:
        for word in command_line.shell_words(line):
            whole = _REFERENCE.fullmatch(word)
            name = (whole[1] or whole[3]) if whole else None
            yield from variables[name] if name in variables else [_replaced(word, variables)]

    return _bounded(words())


def _bounded(words: Iterable[str]) -> list[str]:
    """As many words as one command line may have: a script can double a list at every line."""
    kept: list[str] = []
    left = command_line.COMMAND_LIMIT
    for word in words:
        left -= len(word) + 1
        if left < 0:
            break
        kept.append(word)
    return kept


def _replaced(word: str, variables: dict[str, list[str]]) -> str:
    """A word with the values of variables in it, cut where it gets longer than a command line."""
    parts, at, length = [], 0, 0
    for found in _REFERENCE.finditer(word):
        name = found[1] or found[3]
        unknown = found[2] if found[2] is not None else found[0]
        value = " ".join(variables[name]) if name in variables else unknown
        parts += [word[at : found.start()], value]
        at = found.end()
        length += len(value)
        if length > command_line.COMMAND_LIMIT:
            break
    return "".join([*parts, word[at:]])[: command_line.COMMAND_LIMIT]
