# SPDX-License-Identifier: Apache-2.0
"""``infertune doctor``: is this combination known to be bad, and what would put it right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from infertune.base.errors import Exit, UsageError, did_you_mean
from infertune.base.records import asdict
from infertune.cli.base import JSON, Command, Context, argument, verb
from infertune.cli.lines import fold
from infertune.cli.render import counted
from infertune.doctor.base import SEVERITIES, Advice, Finding, Rule, Unknown
from infertune.doctor.diagnose import Outcome, Result, diagnose
from infertune.doctor.facts import Smoke, read_facts
from infertune.doctor.rules import RULES, SUBJECTS
from infertune.doctor.surroundings import look_around, recorded
from infertune.host.machine import read_machine


def _doctor(ctx: Context) -> int:
    rules = _chosen(ctx.args.rule)
    if ctx.args.list:
        return _list(ctx, rules)
    smoke = _smoke(ctx)
    results = ask(ctx, rules, smoke)
    if ctx.args.json:
        ctx.print_json("infertune.doctor/1", _document(results, smoke))
    else:
        _print(ctx, results, smoke)
    return Exit.DIFFERS if any(each.severity == "error" for each in results) else Exit.DONE


def _chosen(ids: Sequence[str] | None) -> list[Rule]:
    for each in ids or ():
        if each not in RULES:
            near = did_you_mean(each, RULES) or "; 'infertune doctor --list' lists them"
            raise UsageError(f"there is no rule '{each}'{near}")
    return [RULES[each] for each in ids] if ids else list(RULES.values())


def _smoke(ctx: Context) -> Smoke | None:
    model = ctx.args.smoke
    if model is None:
        return None
    if not ctx.root.live:
        raise UsageError("--smoke works on this machine only", hint="leave out --root")
    if not ctx.args.json:
        ctx.print("asking the server for one token; nothing is applied")
    from infertune.doctor.smoke import smoke_run  # an HTTP client, which nothing else here needs

    return smoke_run(os.environ, None if model is True else model)


# -- as text -----------------------------------------------------------------------

_REASON_LINES = 3
"""Lines that what is not known may take; --all shows the rest."""


def _print(ctx: Context, results: Sequence[Result], smoke: Smoke | None) -> None:
    for severity in SEVERITIES:
        for result in results:
            if result.severity == severity:
                _print_finding(ctx, result)
    _print_advice(ctx, [each for each in results if isinstance(each.answer, Advice)])
    unknown = _by_reason(results)
    if ctx.args.all:
        _print_unknown(ctx, unknown)
        for outcome in ("fine", "not applicable"):
            _print_quiet(ctx, outcome, [each for each in results if each.outcome == outcome])
    elif unknown:
        ctx.print(_reasons(unknown, ctx.width or 80), 2)
    if smoke:
        ctx.print(f"smoke run: {smoke.detail}", 2)
    ctx.print(_counts(results), 2)


def _print_finding(ctx: Context, result: Result) -> None:
    finding = result.answer
    if not isinstance(finding, Finding):
        return
    confidence = finding.confidence or result.rule.confidence
    doubt = "" if confidence == "sure" else " (likely)"
    source = result.rule.sources[0]
    also = f" (covers {', '.join(result.covers)})" if result.covers else ""
    ctx.print(f"{result.severity}: {finding.text}{doubt}", 2)
    ctx.print(f"  fix:  {finding.fix or result.rule.fix}", 8)
    ctx.print(f"  see:  {source.text}, {source.url}", 8)
    ctx.print(f"  rule: {result.rule.id}{also}", 8)


def _print_advice(ctx: Context, results: Sequence[Result]) -> None:
    if not results:
        return
    ctx.print("advice of a guide (strix-halo-optimizations, March 2026), and this machine:")
    for result in results:
        advice = result.answer
        if isinstance(advice, Advice):
            ctx.print(f"  {advice.status:<8}  {result.rule.title}: {advice.why}", 12)


def _by_reason(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Ids of the rules that cannot answer, by why; the reason that most share comes first."""
    found: dict[str, list[str]] = {}
    for each in results:
        if isinstance(each.answer, Unknown):
            found.setdefault(each.answer.why, []).append(each.rule.id)
    return sorted(found.items(), key=lambda entry: -len(entry[1]))


def _reasons(unknown: Sequence[tuple[str, Sequence[str]]], width: int) -> str:
    """``not known (7 rules): the kernel log is for root (5); ...`` in at most three lines."""
    head = f"not known ({counted(sum(len(ids) for _, ids in unknown), 'rule')}): "
    told = [f"{why} ({len(ids)})" for why, ids in unknown]
    for shown in range(len(told), 0, -1):
        left = sum(len(ids) for _, ids in unknown[shown:])
        more = [f"other reasons ({left}), see --all"] if left else []
        text = head + "; ".join((*told[:shown], *more))
        if len(fold(text, width, 2)) <= _REASON_LINES:
            return text
    return f"{head}see --all"


def _print_unknown(ctx: Context, unknown: Sequence[tuple[str, Sequence[str]]]) -> None:
    if unknown:
        ctx.print("not known:")
    for why, ids in unknown:
        ctx.print(f"  {why}: {', '.join(ids)}")


def _print_quiet(ctx: Context, label: str, results: Sequence[Result]) -> None:
    if results:
        ctx.print(f"{label}:")
        for result in results:
            where = f" ({result.rule.when.words})" if label != "fine" else ""
            ctx.print(f"  {result.rule.id}: {result.rule.title}{where}", 4)


def _count(results: Sequence[Result], outcome: Outcome) -> int:
    return sum(result.outcome == outcome for result in results)


def found(results: Sequence[Result]) -> str:
    """How much was found: ``no errors, 1 warning, 2 notes``."""
    nouns = zip(SEVERITIES, ("error", "warning", "note"), strict=True)
    return ", ".join(
        counted(sum(each.severity == severity for each in results), noun)
        for severity, noun in nouns
    )


def _counts(results: Sequence[Result]) -> str:
    rest = (
        f"{_count(results, 'fine')} fine, {_count(results, 'unknown')} not known, "
        f"{_count(results, 'not applicable')} not for this machine"
    )
    return f"{found(results)}; of {counted(len(results), 'rule')} {rest}"


def ask(ctx: Context, rules: Sequence[Rule], smoke: Smoke | None = None) -> tuple[Result, ...]:
    """What these rules find on the machine at hand."""
    machine = read_machine(ctx.root)
    around = look_around(ctx.root, os.environ, machine) if ctx.root.live else recorded(ctx.root)
    return diagnose(read_facts(ctx.root, around, smoke, machine), rules)


def _list(ctx: Context, rules: Sequence[Rule]) -> int:
    if ctx.args.json:
        documents = [
            {
                "id": rule.id,
                "subject": subject,
                "title": rule.title,
                "when": rule.when.words,
                "severity": rule.severity,
                "confidence": rule.confidence,
                "fix": rule.fix,
                "sources": [asdict(source) for source in rule.sources],
            }
            for subject, group in SUBJECTS.items()
            for rule in group
            if rule in rules
        ]
        ctx.print_json("infertune.rules/1", {"rules": documents})
    else:
        rows = [(rule.id, rule.severity, rule.confidence, rule.title) for rule in rules]
        ctx.table(("RULE", "SEVERITY", "", "LOOKS FOR"), rows)
    return Exit.DONE


# -- as a document -------------------------------------------------------------------


def _document(results: Sequence[Result], smoke: Smoke | None) -> dict[str, Any]:
    return {
        "findings": [
            {
                "id": each.rule.id,
                "title": each.rule.title,
                "severity": each.severity,
                "confidence": each.answer.confidence or each.rule.confidence,
                "text": each.answer.text,
                "fix": each.answer.fix or each.rule.fix,
                "sources": [asdict(source) for source in each.rule.sources],
                "covers": list(each.covers),
            }
            for severity in SEVERITIES
            for each in results
            if each.severity == severity and isinstance(each.answer, Finding)
        ],
        "survey": [
            {
                "id": each.rule.id,
                "title": each.rule.title,
                "status": each.answer.status,
                "why": each.answer.why,
                "fix": each.rule.fix,
                "sources": [asdict(source) for source in each.rule.sources],
            }
            for each in results
            if isinstance(each.answer, Advice)
        ],
        "unknown": [
            {"id": each.rule.id, "title": each.rule.title, "why": each.answer.why}
            for each in results
            if isinstance(each.answer, Unknown)
        ],
        "fine": [each.rule.id for each in results if each.outcome == "fine"],
        "not_applicable": [each.rule.id for each in results if each.outcome == "not applicable"],
        "smoke": asdict(smoke) if smoke else None,
    }


COMMANDS: tuple[Command, ...] = (
    verb(
        "doctor",
        _doctor,
        (
            argument(
                "--rule",
                action="append",
                metavar="ID",
                help="ask this rule only (may be repeated)",
            ),
            argument(
                "--all",
                action="store_true",
                help="show also which rules found nothing, and which cannot be answered",
            ),
            argument("--list", action="store_true", help="list the rules and ask none"),
            argument(
                "--smoke",
                nargs="?",
                const=True,
                metavar="GGUF",
                help="ask the server for one token (default: of a small model)",
            ),
            JSON,
        ),
        "Compares this machine with what is known: kernels, firmware, ROCm and llama.cpp builds "
        "with bugs, GPU memory set in the wrong place or not in force, limits, power caps, other "
        "tuners, what the kernel has logged, and the recommendations of a survey. Each finding "
        "says how sure it is, where it can be read, and what would put it right; what cannot be "
        "read is said to be not known, and why. Findings with one cause are reported as one. "
        "Writes nothing and needs no privileges, but as root it may read more (the kernel's log). "
        "With --root it works on a snapshot, so a report can be diagnosed elsewhere. With --smoke "
        "it starts the server, asks for one token, and stops it. The exit code is 1 where a "
        "finding is an error.",
    ),
)
