# SPDX-License-Identifier: Apache-2.0
"""What a rule is, and what it may answer.

A rule never claims more than its source.  ``sure`` is for what a commit, a kernel document or
several confirmed reports in one issue say of exactly this case; everything else is ``likely``.
What cannot be read is Unknown, which is neither a finding nor its absence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from infertune.base.records import dataclass
from infertune.doctor.facts import Facts
from infertune.host.unknown import Missing, Unknown, need
from infertune.host.version import Version, format_version

__all__ = [
    "SEVERITIES",
    "Advice",
    "Answer",
    "Confidence",
    "Finding",
    "Missing",
    "Rule",
    "Severity",
    "Source",
    "Unknown",
    "Version",
    "When",
    "Window",
    "format_version",
    "github",
    "kernel_doc",
    "linux",
    "llama",
    "need",
    "rocm",
]  # fmt: skip

Severity = Literal["error", "warning", "info"]
"""``error``: must be fixed before results or the machine can be trusted.  ``warning``: costs speed,
memory or stability.  ``info``: worth knowing, nothing is broken."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

Confidence = Literal["sure", "likely"]
Status = Literal["done", "not done", "outdated"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is wrong here.  What is None is as the rule has it."""

    text: str
    """One sentence with the values of this machine."""
    severity: Severity | None = None
    confidence: Confidence | None = None
    fix: str | None = None
    about: str | None = None
    """What it is on (``ttm.pages_limit``, a flag of a server), where a rule may mean several."""


@dataclass(frozen=True, slots=True)
class Advice:
    """How this machine stands to a recommendation, and why it should or need not follow it."""

    status: Status
    why: str


Answer = Finding | Advice | Unknown | None
"""None: the rule looked, and all is well."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a rule's claim can be read."""

    text: str
    url: str


def github(repository: str, number: int) -> Source:
    """An issue or pull request (the address of one leads to the other)."""
    short = repository.partition("/")[2]
    name = {"legacy-rocm-build": "ROCm"}.get(short, short)
    return Source(f"{name} #{number}", f"https://github.com/{repository}/issues/{number}")


def llama(number: int) -> Source:
    return github("ggml-org/llama.cpp", number)


def rocm(number: int) -> Source:
    return github("ROCm/legacy-rocm-build", number)


def linux(commit: str, release: str) -> Source:
    """A commit of Linux and the release that has it."""
    text = f"Linux commit {commit[:12]} ({release})"
    return Source(text, f"https://git.kernel.org/torvalds/c/{commit}")


def kernel_doc(page: str) -> Source:
    return Source(f"kernel document {page}", f"https://docs.kernel.org/{page}.html")


@dataclass(frozen=True, slots=True)
class Window:
    """Versions with a bug, as far as they are known.

    Between ``last`` and ``good`` nobody has said, so there a version only *may* have the bug.
    """

    first: Version
    """First version reported bad."""
    last: Version
    """Last version reported bad."""
    good: Version | None
    """First version known to be good; None where there is none yet."""
    estimated: bool = False
    """Nobody has named ``good``: it is a build of after the fix by its date, not the first one."""

    def says(self, version: Version) -> Literal["bad", "maybe", "good"]:
        if version < self.first or (self.good is not None and version >= self.good):
            return "good"
        if self.good is not None and version == self.good[: len(version)]:
            return "maybe"  # 7.2, and the fix is in 7.2.1: the last number is not known
        return "bad" if version[: len(self.last)] <= self.last else "maybe"

    def __str__(self) -> str:
        first, last = format_version(self.first), format_version(self.last)
        bad = first if first == last else f"{first} to {last}" if any(self.first) else f"to {last}"
        about = "about " if self.estimated else ""
        good = f"good from {about}{format_version(self.good)}" if self.good else "no fix known"
        return f"bad {bad}, {good}"


@dataclass(frozen=True, slots=True)
class When:
    """On which machines a rule says anything."""

    words: str
    test: Callable[[Facts], bool]
    """May raise Missing."""

    def __and__(self, other: When) -> When:
        return When(
            f"{self.words}, {other.words}", lambda facts: self.test(facts) and other.test(facts)
        )


ALWAYS = When("everywhere", lambda facts: True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry: what it looks for, where, how bad it is, how it is put right, who says so."""

    id: str
    title: str
    """What the rule looks for: a short sentence without a full stop."""
    check: Callable[[Facts], Answer]
    """Pure: facts in, answer out.  May raise Missing."""
    fix: str
    sources: tuple[Source, ...]
    confidence: Confidence = "likely"
    severity: Severity = "warning"
    when: When = ALWAYS
    window: Window | None = None
    """The versions the check compares with, for the document."""
    covers: tuple[str, ...] = ()
    """Rules whose findings have the same cause as this one's, and need not be told beside it."""
    at_launch: bool = False
    """Whether ``run`` and ``serve`` say it as well, of the very server they start."""
