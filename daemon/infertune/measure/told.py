# SPDX-License-Identifier: Apache-2.0
"""What a search (tune.py) leaves for people: a profile with its evidence, and a report.  Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infertune.base.units import printable_line
from infertune.measure.space import Candidate, Configured
from infertune.measure.tune import Job, Row


def profile(job: Job, candidate: Candidate, gates: Sequence[Mapping[str, Any]], path: str) -> str:
    """A profile that says what was found, as text: its settings, and why in comments."""
    settings: Configured = {**job.baseline, **candidate.settings}
    lines = [
        f"# Proposed by 'infertune tune', goal {job.goal}. Model: {_plain(job.model)}",
        f"# Evidence: {_plain(path)}",
        *(
            f"# {_plain(each['gate'])}: {_plain(each['word'])}: {_plain(each['why'])}"
            for each in gates
        ),
        'description = "found on this machine by infertune tune"',
        "",
        "[server]",
    ]
    for name, value in settings.items():
        because = "found" if name in candidate.settings else "baseline"
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}  # {because}")
    return "\n".join(lines) + "\n"


def report(job: Job, rows: Sequence[Row], end: str, server: str | None) -> str:
    """The way to what was found, as Markdown."""
    baseline = " ".join(f"{name}={value}" for name, value in job.baseline.items())
    lines = [
        "# infertune tune",
        "",
        f"- model: `{_plain(job.model)}`",
        f"- server: {_plain(server or 'version unknown')}",
        f"- goal: {job.goal}, {job.slots} at once; seed {job.seed}",
        f"- prompts of {job.prompt} tokens, answers of {job.tokens}",
        f"- baseline: `{_plain(baseline)}`",
        "",
        "| candidate | change | outcome | why |",
        "|---|---|---|---|",
        *(
            f"| `{_cell(each.name)}` | {percent(each.change)} | {each.word} | {_cell(each.why)} |"
            for each in rows
        ),
        "",
        "Changes in this table are those of a quick look at four pairs, and no verdicts.",
        "",
        end,
    ]
    return "\n".join(lines) + "\n"


def percent(change: float | None) -> str:
    """A relative change for people; a dash where there is none."""
    return "-" if change is None else f"{change:+.0%}"


def _plain(text: str) -> str:
    return printable_line(text, 300)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
