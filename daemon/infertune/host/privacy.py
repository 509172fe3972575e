# SPDX-License-Identifier: Apache-2.0
"""Text that says nothing of whose machine it is about: names, numbers and secrets left out.

For what is made to be shown to others.  It goes by what such things look like, so whoever shares
the text still reads it first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

UUID = r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"
MAC = r"\b[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}\b"
"""Both in any case."""

_GONE = "(left out)"
_NAMED = r"(?:key|token|secret|password|passwd)"
_VALUE = r"(?:\(left out\)|\"[^\"]*\"|'[^']*'|[^\s,;]+)"
_SECRETS = (
    (rf"(--?[\w-]*{_NAMED}(?:-file)?)(?:=|\s+){_VALUE}", rf"\1 {_GONE}"),
    (rf"\b([\w.-]*{_NAMED})\b[\"']?\s*[=:]\s*{_VALUE}", rf"\1={_GONE}"),
    (r"\b(bearer|basic) +[\w.~+/=-]{8,}", rf"\1 {_GONE}"),
    (r"\b(?:sk|hf|pk|rk|gh[opsu]|glpat|xox[abp])[-_][\w-]{12,}", _GONE),
    (r"\b([a-z][a-z0-9+.-]*://)[^\s/@]+@", rf"\1{_GONE}@"),
    (rf"{UUID}|{MAC}", _GONE),
    (r"(?:/var)?/home/[^/\s\"'<>]+", "~"),
)
"""What it looks like, in any case, and what stands there instead."""


def names_of(host: str) -> str:
    """A pattern of a host's name with and without its domain, for any case.

    It matches nothing where the name is not more than two letters: that names nobody, and would
    take the ``vm`` from ``vm.swappiness``.
    """
    short = host.partition(".")[0]
    names = "|".join(re.escape(name) for name in (host, short) if len(name) > 2)
    return rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])" if names else r"(?!)"


def cleaner(host: str) -> Callable[[str], str]:
    """What leaves private things out of a text: secrets, UUIDs, MAC addresses, the host's name.

    Homes of people become ``~``.
    """
    found = [(re.compile(each, re.IGNORECASE), instead) for each, instead in _SECRETS]
    named = re.compile(names_of(host), re.IGNORECASE)

    def clean(text: str) -> str:
        for pattern, instead in found:
            text = pattern.sub(instead, text)
        return named.sub(_GONE, text)

    return clean


def cleaned(document: Any, clean: Callable[[str], str]) -> Any:
    """A document with every text in it cleaned; keys are ours."""
    if isinstance(document, str):
        return clean(document)
    if isinstance(document, dict):
        return {key: cleaned(each, clean) for key, each in document.items()}
    if isinstance(document, list | tuple):
        return [cleaned(each, clean) for each in document]
    return document
