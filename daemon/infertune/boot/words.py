# SPDX-License-Identifier: Apache-2.0
"""Words of a command line, put into files of boot loaders and taken out again.

A place says where in a file they go; it is plain text, for the record on disk:

- ``options``: the last ``options`` line of a boot entry (Boot Loader Specification, type 1)
- ``cmdline``: a file that holds nothing but a command line, such as /etc/kernel/cmdline
- ``line``: the same, where only the first line is read (proxmox-boot-tool)
- ``list NAME``: the last list of that name in JSON, one string for each word (kernelstub)
- ``shell NAME``: a file that a shell reads; a line at its end adds to the variable NAME
- ``limine KEY..``: a file of limine-entry-tool; lines at its end add to what these kernels get

Text is as ``surrogateescape`` decodes it: what is not UTF-8 stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from infertune.boot.change import AT_THE_TRY, Words

HEADER = "# Written by infertune; 'infertune boot undo' puts back what was here before.\n"


def add(place: str, text: str, words: Words) -> str:
    """The text with the words at the end of the command line it holds; they last count once."""
    text = remove(place, text, words)
    kind, _, name = place.partition(" ")
    if kind in _ASSIGNED:
        return _whole(text) + HEADER + _ASSIGNED[kind](name, words)
    if kind == "list":
        return _in_list(name, text, lambda items: _listed(items, words))
    lines = text.split("\n")
    numbers = _lines(kind, lines)
    if not numbers:
        before = _whole(text) if text.strip() else ""
        return before + ("options " if kind == "options" else "") + " ".join(words) + "\n"
    last = numbers[-1]
    lines[last] = " ".join((lines[last].rstrip(), *words)).lstrip()
    return "\n".join(lines)


def remove(place: str, text: str, words: Words, *, singly: bool = True) -> str:
    """The text without the words, as they were put in together or (``singly``) one by one since."""
    kind, _, name = place.partition(" ")
    if kind in _ASSIGNED:
        return text.replace(HEADER + _ASSIGNED[kind](name, words), "")
    if kind == "list":
        return _in_list(name, text, lambda items: _unlisted(items, words))
    lines = text.split("\n")
    for number in reversed(_lines(kind, lines)):
        lines[number] = _without(lines[number], words, singly)
        if kind == "cmdline" and not lines[number].strip():
            del lines[number]  # it was ours alone
    return "\n".join(lines)


def limine(keys: str, words: Words) -> str:
    """Lines for a file of limine-entry-tool, which joins what is added without a space."""
    given = " ".join(words)
    return "".join(f'KERNEL_CMDLINE[{key}]+=" {given}"\n' for key in keys.split())


_ASSIGNED: Mapping[str, Callable[[str, Words], str]] = {
    "shell": lambda name, words: f'{name}="${name} {" ".join(words)}"\n',
    "limine": limine,
}
"""Places where the words get lines of their own, and these lines."""


def _whole(text: str) -> str:
    """Text that ends with a newline, or is empty."""
    return text if text.endswith("\n") or not text else f"{text}\n"


def _lines(kind: str, lines: list[str]) -> list[int]:
    """Which lines hold the command line."""
    if kind == "options":
        return [at for at, line in enumerate(lines) if re.match(r"options(?=\s|$)", line)]
    if kind == "line":
        return [0] if any(line.strip() for line in lines) else []
    # Lines are joined with spaces; a comment (mkinitcpio allows them) must not swallow the words.
    return [at for at, line in enumerate(lines) if line.strip() and not line.startswith("#")]


def _in_list(name: str, text: str, change: Callable[[str], str]) -> str:
    """The text with what stands between the brackets of its last list of that name changed."""
    found = list(re.finditer(rf'"{re.escape(name)}"\s*:\s*\[([^\]]*)\]', text))
    if not found:
        return text
    start, end = found[-1].span(1)
    return text[:start] + change(text[start:end]) + text[end:]


def _listed(items: str, words: Words) -> str:
    """More strings in a list, set apart as the last one that is there."""
    last = re.search(r'(\s*)"[^"]*"(?=\s*$)', items)
    if last is None:
        return ", ".join(f'"{word}"' for word in words) + items
    ours = "".join(f',{last[1]}"{word}"' for word in words)
    return items[: last.end()] + ours + items[last.end() :]


def _unlisted(items: str, words: Words) -> str:
    for word in words:
        for found in list(re.finditer(rf',?\s*"{re.escape(word)}"(?=\s*(?:,|$))', items))[-1:]:
            items = items[: found.start()] + items[found.end() :]
    return re.sub(r"^\s*,", "", items)


def _without(line: str, words: Words, singly: bool) -> str:
    """One line without the words.  What else is in it keeps its spaces."""
    together = ((*words, *AT_THE_TRY), words)
    for sequence in (*together, *((word,) for word in words if singly)):
        pattern = r"\s+".join(map(re.escape, sequence))
        # Ours come last; a word that stands there twice was there before us, too.
        found = list(re.finditer(rf"(?:^|(?<=\s)){pattern}(?=\s|$)", line))
        if found:
            start, end = found[-1].span()
            line = line[:start].rstrip(" \t") + line[end:]
            if sequence in together:
                break
    return line
