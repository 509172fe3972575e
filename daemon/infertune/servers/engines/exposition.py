# SPDX-License-Identifier: Apache-2.0
"""The text format of Prometheus, as engines write it.  Pure.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from infertune.base.records import dataclass

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? +([-+.0-9A-Za-z]+)(?: +-?\d{1,19})?", re.ASCII)
_LABEL = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)', re.ASCII)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_SAMPLES = 20_000
"""Lines of one page that are looked at: vLLM has some 500 for a model."""


@dataclass(frozen=True, slots=True)
class Line:
    """One sample."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(text: str, prefix: str) -> Iterator[Line]:
    """The samples whose name begins with ``prefix``.

    Raises ValueError where the text is no page of metrics: every line of it is looked at.
    """
    for number, line in enumerate(text.split("\n")):  # a name may hold other ends of lines
        if number >= _SAMPLES:
            raise ValueError("more lines than an engine has")
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError("no page of metrics")
        if match[1].startswith(prefix):
            yield Line(match[1], _labels(match[2] or ""), float(match[3]))


def _labels(text: str) -> dict[str, str]:
    found, position = {}, 0
    while position < len(text):
        match = _LABEL.match(text, position)
        if match is None:
            raise ValueError("no labels")
        found[match[1]] = _ESCAPED.sub(lambda each: "\n" if each[1] == "n" else each[1], match[2])
        position = match.end()
    return found
