# SPDX-License-Identifier: Apache-2.0
"""The verb ``tune``."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from infertune import __version__
from infertune.base.errors import Exit, UsageError
from infertune.base.records import asdict
from infertune.base.root import full_path
from infertune.base.units import printable_line
from infertune.cli.base import JSON, Command, Context, argument, verb, whole
from infertune.cli.benching import BUSY, FOREIGN_CORES
from infertune.cli.fit import MODEL, parse_setting
from infertune.cli.gate import SERVER, model_at_hand, server_at_hand
from infertune.host.machine import read_machine
from infertune.launch.process import Signals, become
from infertune.launch.residency import model_files
from infertune.measure.arm import Starter
from infertune.measure.check import (
    EVIDENCE,
    PROFILE,
    Checked,
    Checker,
    evidence_of,
    open_log,
    read_profile,
    read_proposal,
)
from infertune.measure.kept import made_of
from infertune.measure.space import Candidate, Configured, canonical, said
from infertune.measure.statistics import UNDECIDED
from infertune.measure.store import directory_of, machine_key, model_key
from infertune.measure.told import percent, profile, report
from infertune.measure.trial import PROMPT, refuse_a_busy_machine
from infertune.measure.tune import GOALS, Job, Log, Row, Timer, Tuning, job_of, read_document

DEFAULTS: Configured = {"ctx_size": 2048, "parallel": 1}
"""Of the baseline, where nothing else is said: room for what is asked, in each slot."""
TUNED = "tuned.toml"


def _tune(ctx: Context) -> int:
    args = ctx.args
    if not ctx.live:
        raise UsageError("tune starts servers: it works on this machine only")
    if args.check:
        return _check(ctx, full_path(args.check))
    log, job = _resumed(ctx, full_path(args.resume)) if args.resume else _begun(ctx)
    if not job.busy:
        refuse_a_busy_machine(ctx.root, (), FOREIGN_CORES)
    say = _say(ctx)
    say(f"kept in {log.store.path}")
    server = server_at_hand(args.server)
    with Signals() as signals:
        starter = Starter(ctx.root, server, os.environ, signals)
        tuning = Tuning(
            root=ctx.root,
            starter=starter,
            timer=Timer(ctx.root, starter, job),
            job=job,
            log=log,
            say=say,
            time_left=_clock(args.budget * 60),
        )
        candidate = tuning.run()
    # Not a step: a run that goes on with more time has other rows.
    log.steps["rows"] = {"step": "rows", "rows": [asdict(each) for each in tuning.rows]}
    log.store.add(log.steps["rows"])
    if candidate is not None:
        _propose(ctx, log, job, candidate)
        _hand_over(ctx, log)
    return _end(ctx, log, job, server.version, None, None)


def _hand_over(ctx: Context, log: Log) -> NoReturn:
    """Go on as another process, which has nothing of the search but its files."""
    args = ctx.args
    words = ["--check", log.store.path, "--budget", str(args.budget)]
    words += ["--server", args.server] if args.server else []
    words += ["--json"] if args.json else []
    become(
        sys.executable,
        (sys.executable, "-P", "-m", "infertune", "tune", *words),
        {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _begun(ctx: Context) -> tuple[Log, Job]:
    """A new run.  Raises UsageError."""
    args = ctx.args
    given: Configured = dict(map(parse_setting, ctx.command))
    machine = read_machine(ctx.root)
    model = full_path(model_at_hand(args.model))
    slots = given.get("parallel", DEFAULTS["parallel"])
    one = max(int(DEFAULTS["ctx_size"]), -(-(args.prompt + args.tokens + 64) // 256) * 256)
    room = {"ctx_size": one * int(slots)}
    job = Job(
        model=model,
        baseline={**DEFAULTS, **room, **given},
        goal=args.goal,
        seed=secrets.randbits(48) if args.seed is None else args.seed,
        cores=len(machine.cpu.cores) or os.cpu_count() or 1,
        tokens=args.tokens,
        prompt=args.prompt,
        busy=args.busy,
        tries=[dict(map(parse_setting, words.split())) for words in args.candidate],
    )
    try:
        canonical(job.baseline)
        for each in job.tries:
            canonical(each)
    except ValueError as error:
        raise UsageError(str(error)) from None
    now = datetime.now(UTC)
    home = directory_of(os.environ, os.path.expanduser("~"), root=os.geteuid() == 0)
    key = model_key(ctx.root, model_files(model))
    log = open_log(ctx.root, f"{home}/{machine_key(machine)}/{key}/{now:%Y%m%dT%H%M%SZ}-tune")
    log.store.begin(
        {
            "verb": "tune",
            "began": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "kernel": machine.kernel,
            "infertune": __version__,
            "job": asdict(job),
        }
    )
    return log, job


def _resumed(ctx: Context, directory: str) -> tuple[Log, Job]:
    """A run that was cut short.  Raises UsageError and Failed."""
    if ctx.command or ctx.args.model:
        raise UsageError("--resume goes on with the model and settings of that run")
    log = open_log(ctx.root, directory)
    found = log.store.run()
    try:
        job = job_of(found["job"])
    except (KeyError, ValueError):
        raise UsageError(f"{directory} is no run of 'infertune tune'") from None
    return log, job


def _propose(ctx: Context, log: Log, job: Job, candidate: Candidate) -> None:
    """Put a proposal and its evidence on disk."""
    gates = log.steps[f"2 answers {candidate.name}"]["gates"]
    text = profile(job, candidate, gates, log.store.path)
    reference = read_document(ctx.root, f"{log.store.path}/reference.json")["sha256"]
    evidence = evidence_of(job, candidate, text, reference, log.steps)
    log.store.write(PROFILE, text)
    log.store.write_json(EVIDENCE, evidence)


# -- the last phase --------------------------------------------------------------------------


def _check(ctx: Context, directory: str) -> int:
    proposal = read_proposal(ctx.root, directory)
    log = open_log(ctx.root, directory)
    server = server_at_hand(ctx.args.server)
    with Signals() as signals:
        starter = Starter(ctx.root, server, os.environ, signals)
        checked = Checker(
            starter=starter,
            timer=Timer(ctx.root, starter, proposal.job),
            proposal=proposal,
            log=log,
            say=_say(ctx),
            time_left=_clock(ctx.args.budget * 60),
        ).run()
    if checked.accepted:
        log.store.write(TUNED, read_profile(ctx.root, directory))
    return _end(ctx, log, proposal.job, server.version, proposal.candidate, checked)


def _end(
    ctx: Context,
    log: Log,
    job: Job,
    server: str | None,
    candidate: Candidate | None,
    checked: Checked | None,
) -> int:
    """Say what came of it, and keep that."""
    rows = [made_of(Row, each) for each in log.steps.get("rows", {}).get("rows", ())]
    end = _sentence(candidate, checked)
    log.store.write("report.md", report(job, rows, end, server))
    if ctx.args.json:
        ctx.print_json("infertune.tune/1", document(log.store.path, job, rows, candidate, checked))
    else:
        ctx.print()
        ctx.table(
            ("CANDIDATE", "CHANGE", "OUTCOME"),
            [(each.name, percent(each.change), each.word) for each in rows],
        )
        ctx.sentence(end)
        if checked and checked.accepted:
            ctx.print(f"profile: {log.store.path}/{TUNED}")
            ctx.print("as /etc/infertune/profiles/NAME.toml it is one for 'infertune run NAME'")
        ctx.print(f"report: {log.store.path}/report.md")
    if checked and checked.word == UNDECIDED:
        return Exit.FAILED
    return Exit.DONE if checked and checked.accepted else Exit.DIFFERS


def document(
    path: str, job: Job, rows: Sequence[Row], candidate: Candidate | None, checked: Checked | None
) -> dict[str, Any]:
    """What came of a run (docs/json.md)."""
    verdict = checked.found.verdict if checked and checked.found else None
    return {
        "path": path,
        "model": job.model,
        "goal": job.goal,
        "baseline": _texts(job.baseline),
        "candidates": [asdict(each) for each in rows],
        "proposed": _texts(candidate.settings) if candidate else None,
        "accepted": bool(checked and checked.accepted),
        "word": checked.word if checked else None,
        "why": checked.why if checked else None,
        "estimate": verdict.estimate if verdict else None,
        "low": verdict.low if verdict else None,
        "high": verdict.high if verdict else None,
        "pairs": verdict.pairs if verdict else None,
    }


def _sentence(candidate: Candidate | None, checked: Checked | None) -> str:
    if candidate is None or checked is None:
        return "Nothing is proposed: the baseline is kept."
    name = printable_line(candidate.name, 200)
    if checked.found is None:
        return f"Refused at the last check, the baseline is kept: {name}: {checked.why}"
    found = checked.found.verdict
    interval = "" if found.low is None else f" ({found.low:+.0%} to {found.high:+.0%})"
    told = f"{percent(found.estimate)}{interval} in {found.pairs} fresh pairs"
    if checked.accepted:
        return f"Proposed: {name}: {told}; answers as before."
    more = f" ({checked.why})" if checked.why else ""
    return f"Nothing is proposed, the baseline is kept: {name}: {found.word}, {told}{more}"


def _texts(settings: Configured) -> dict[str, str]:
    return {name: said(value) for name, value in settings.items()}


def _say(ctx: Context) -> Callable[[str], None]:
    return (lambda _: None) if ctx.args.json else ctx.sentence


def _clock(seconds: float) -> Callable[[float], bool]:
    """Whether less than a share of so many seconds is over."""
    began = time.monotonic()
    return lambda share: time.monotonic() < began + share * seconds


COMMANDS: tuple[Command, ...] = (
    verb(
        "tune",
        _tune,
        (
            MODEL,
            argument(
                "--goal",
                choices=GOALS,
                default=GOALS[0],
                help="what is to be faster: one answer (latency), or as many at once as there "
                "are slots (throughput)",
            ),
            SERVER,
            argument(
                "--budget",
                type=whole("a number of minutes", 1, 1440),
                default=30,
                metavar="MIN",
                help="minutes after which no further candidate or pair is begun (30)",
            ),
            argument(
                "--tokens",
                type=whole("a number of tokens", 2, 512),
                default=64,
                metavar="N",
                help="tokens of each timed answer (64)",
            ),
            argument(
                "--prompt",
                type=whole("a number of tokens", 16, 2**20),
                default=PROMPT,
                metavar="N",
                help=f"tokens of the prompt before it ({PROMPT})",
            ),
            argument(
                "--seed",
                type=whole("a seed", 0, 2**48),
                metavar="N",
                help="take the samples in this order (default: another each time)",
            ),
            argument(
                "--candidate",
                action="append",
                default=[],
                metavar="SETTINGS",
                help="try this, as 'ubatch_size=512' or 'batch_size=4096 ubatch_size=2048', "
                "instead of the usual candidates; may be given more than once",
            ),
            BUSY,
            argument("--resume", metavar="DIR", help="go on with a run that was cut short"),
            argument("--check", metavar="DIR", help="only the last phase, of a run that proposes"),
            JSON,
        ),
        "Looks for server settings that answer faster than the baseline, which stands after '--' "
        "('infertune tune MODEL -- threads=8'), and give the same answers. Up to 8 candidates go "
        "through phases: does the server start with it; are its answers still those of the "
        "baseline ('infertune gate'); is it faster, in pairs of fresh starts in random order. "
        "What is left is proposed, and another process checks the proposal: the gate must refuse "
        "a planted error, the proposal must pass it with prompts it has not seen, and be faster "
        "in fresh pairs. Only then a profile is written; a tie keeps the baseline. Nothing else "
        "of the machine is changed. A run that was killed goes on with --resume. Exit code 1: "
        "nothing is proposed; 3: it cannot be decided.",
        takes_command=True,
    ),
)
