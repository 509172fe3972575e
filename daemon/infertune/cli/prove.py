# SPDX-License-Identifier: Apache-2.0
"""The verb ``prove``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from infertune import __version__
from infertune.base.errors import Exit, Failed, InfertuneError, NotPermitted, UsageError
from infertune.base.records import dataclass, field, replace
from infertune.budget.admission import Admission
from infertune.cli.base import JSON, Command, Context, argument, verb, whole
from infertune.cli.benching import BUSY, FOREIGN_CORES, TOKENS, URL
from infertune.cli.engine import BACKEND, PROFILE
from infertune.cli.fit import FORCE
from infertune.cli.proving import Arm, NotHere, Ours, Stand, request_of
from infertune.cli.run import ask_admission
from infertune.engine.session import Session, session
from infertune.engine.state import make_plan
from infertune.host.machine import Machine, read_machine
from infertune.launch.process import Signals
from infertune.launch.ready import Progress
from infertune.launch.residency import model_files
from infertune.measure.arms import LeftOut, at_boot, bare, parts, risky, without
from infertune.measure.client import base_of, find_out
from infertune.measure.pairs import (
    Comparison,
    Found,
    Runner,
    Sample,
    gains,
    given_up,
    line_of,
    sample_of,
)
from infertune.measure.prompts import Prompts
from infertune.measure.statistics import (
    HARMS,
    HELPS,
    LOOKS,
    UNDECIDED,
    Verdict,
    judge,
    smallest_effect,
)
from infertune.measure.store import Store, directory_of, machine_key, model_key, named_key
from infertune.measure.trial import Bench, refuse_a_busy_machine, servers_at
from infertune.measure.verdicts import (
    QUIET,
    STRESS,
    WHOLE,
    Measured,
    Thing,
    amount,
    package,
    save,
    stamp,
)
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, assume_backend, resolve
from infertune.run import Audience, Request, Result, Run, apply_again, model_of, server_of
from infertune.servers.models import model_path

BASELINE = "bare against itself"
_STRESSES = ("cpu",)
"""Those of STRESS that can be made."""


@dataclass(frozen=True, slots=True)
class Step:
    """One comparison, and what is in force in its arms."""

    comparison: Comparison
    arms: tuple[Arm, ...]
    starts: bool
    setting: str
    value: str | None = None
    stress: str = QUIET


@dataclass(slots=True)
class Proof:
    """What has been found, filled in on the way: what is cut off keeps what it has."""

    about: dict[str, Any]
    """As run.json has it."""
    store: Store | None = None
    baseline: Found | None = None
    found: list[tuple[Step, Found]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    """All that are on disk."""


def _prove(ctx: Context) -> int:
    args = ctx.args
    if not ctx.live:
        raise UsageError("prove measures this machine only", hint="leave --root out")
    if args.url and any((args.model, args.server, args.launch_only, args.stress)):
        raise UsageError("--model, --server, --launch-only and --stress do not go with --url")
    proof = Proof({"verb": "prove", "profile": args.profile, "busy": args.busy})
    failed = None
    code: int | None = None
    try:
        with Signals() as signals:
            code = _measure(ctx, proof, signals)
    except InfertuneError as error:
        failed = error.message
        raise
    finally:
        if args.json:
            ctx.print_json("infertune.prove/1", _document(proof, failed))
        elif proof.store:
            ctx.print(f"kept in {proof.store.path}")
    return code if code is not None else _exit_code(proof)


def _exit_code(proof: Proof) -> int:
    words = [found.verdict.word for _, found in proof.found]
    if HARMS in words:
        return Exit.DIFFERS
    if UNDECIDED in words or (proof.baseline and _differs(proof.baseline)):
        return Exit.FAILED
    return Exit.DONE


def _measure(ctx: Context, proof: Proof, signals: Signals) -> int | None:
    """All of it; the exit code where a signal ended it."""
    machine = read_machine(ctx.root)
    ours = None if ctx.args.url else _ours(ctx, machine)
    desired = _desired(ctx, machine, ours, proof)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(_machine(ctx, machine, desired)) if desired.now else None
        desired = _measurable(ctx, machine, desired, proof)
        stand = Stand(
            root=ctx.root,
            machine=machine,
            caller=os.environ,
            signals=signals,
            session=held,
            ours=ours[1] if ours else None,
            running=None,
            seed=0,
            busy=ctx.args.busy,
            tokens=None,
        )
        _begin(ctx, proof, stand, desired, ours)
        try:
            _run(ctx, proof, stand, desired)
        except Failed:
            if not (number := signals.received()):
                raise
            _say(ctx, f"interrupted; 'infertune prove --resume {_path(proof)}' goes on")
            return 128 + number
    return None


# -- what is measured ------------------------------------------------------------------------


def _ours(ctx: Context, machine: Machine) -> tuple[Run, Ours]:
    """How servers of ours are started; nothing is started yet but to be asked what it can."""
    args = ctx.args
    path = model_path(args.model, os.environ) if args.model else None
    request = request_of(args.profile, os.environ, path, args.server, args.backend)
    one = Run(ctx.root, machine, request, Result(args.profile), Audience())
    model, server = model_of(one), server_of(one)

    def admit(promised: list[Admission]) -> Request:
        return replace(request, check=partial(ask_admission, ctx, promised))

    return one, Ours(request, server, model, admit)


def _desired(
    ctx: Context, machine: Machine, ours: tuple[Run, Ours] | None, proof: Proof
) -> Desired:
    """What of the profile may be measured.  Raises UsageError."""
    args = ctx.args
    backend = args.backend
    if backend == "auto":
        backend = ours[1].server.backends[0] if ours else assume_backend(machine)[0]
    desired = resolve(load_profile(ctx.root, args.profile), machine, backend)
    names = {part.id for part in parts(desired)} | {each.id for each in desired.boot}
    for name in args.knob:
        if name not in names:
            raise UsageError(
                f"profile '{args.profile}' has no '{name}' here",
                hint=f"'infertune profile explain {args.profile}' lists what it has",
            )
    proof.left_out += at_boot(desired)
    if not args.allow_risk:
        proof.left_out += risky(desired)
    if args.launch_only:
        proof.left_out += [LeftOut(each.id, "--launch-only") for each in desired.now]
    if args.url:
        proof.left_out += [
            LeftOut(part.id, "a server has it from its start; without --url it is measured")
            for part in parts(desired)
            if part.starts
        ]
    return without(desired, {each.id for each in proof.left_out})


@contextlib.contextmanager
def _machine(ctx: Context, machine: Machine, desired: Desired) -> Iterator[Session]:
    """Have the machine, bare; what was applied before is applied again."""
    if ctx.live and os.geteuid() != 0:
        raise NotPermitted(
            "the profile's kernel settings need root; nothing was touched",
            hint="use sudo, or --launch-only: the kernel's settings stay as they are",
        )
    with session(ctx.root, f"prove {desired.profile}", lambda: machine) as held:
        if held.recovered and not ctx.args.json:
            ctx.print("an earlier run was cut short; its values were put back first")
        before = held.applied
        try:
            held.revert()
            yield held
        finally:
            held.revert()
            if before:
                request = Request(profile=before.profile, caller=os.environ)
                one = Run(ctx.root, machine, request, Result(before.profile), _Saying(ctx))
                apply_again(one, held, before)


class _Saying(Audience):
    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def say(self, text: str) -> None:
        _say(self._ctx, text)


def _measurable(ctx: Context, machine: Machine, desired: Desired, proof: Proof) -> Desired:
    """Without what would change nothing here."""
    if not desired.now:
        return desired
    items = make_plan(ctx.root, machine, desired).items
    changed = {item.knob for item in items if item.pending}
    same = []
    for setting in desired.now:
        if setting.id not in changed:
            item = next(item for item in items if item.knob == setting.id)
            already = item.outcome == "already"
            why = "the machine has this value already" if already else item.reason or item.outcome
            same.append(LeftOut(setting.id, why))
    proof.left_out += same
    return without(desired, {each.id for each in same})


def steps_of(desired: Desired, wanted: Sequence[str], stresses: Sequence[str]) -> list[Step]:
    """What is compared, in order: all of a profile against none, each part, then under stress."""
    settings = [part for part in parts(desired) if not wanted or part.id in wanted]
    nothing, everything = Arm(bare(desired)), Arm(desired)
    starts = any(part.starts for part in parts(desired))
    steps = []
    if not wanted and settings:
        steps.append(
            Step(Comparison(WHOLE, ("bare", "profile")), (nothing, everything), starts, WHOLE)
        )
    if len(settings) > 1 or wanted:
        steps += [
            Step(
                Comparison(part.id, ("without", "with")),
                (Arm(without(desired, {part.id})), Arm(desired, needs=part.id)),
                part.starts,
                part.id,
                part.value,
            )
            for part in settings
        ]
    for stress in stresses:
        comparison = Comparison(
            f"{WHOLE}, {STRESS[stress]}",
            ("bare, quiet", "bare", "profile"),
            against=1,
            on_purpose=frozenset({stress}),
        )
        arms = (nothing, Arm(bare(desired), stress), Arm(desired, stress))
        steps.append(Step(comparison, arms, starts, WHOLE, stress=stress))
    return steps


# -- measuring -------------------------------------------------------------------------------


def _begin(
    ctx: Context, proof: Proof, stand: Stand, desired: Desired, ours: tuple[Run, Ours] | None
) -> None:
    """Note what will be measured, or find what was; the machine must be quiet enough."""
    args = ctx.args
    servers: frozenset[int] = frozenset()
    if ours is not None:
        files = model_files(ours[1].model)
        name, key = os.path.basename(ours[1].model), model_key(ctx.root, files)
        build = ours[1].server.version
    else:
        target = find_out(base_of(args.url))
        host, port = target.address
        servers = servers_at(ctx.root, "127.0.0.1" if host == "localhost" else host, port)
        name, build = target.model or "model", target.build
        key, files = named_key(name), []
    if not args.busy:
        refuse_a_busy_machine(ctx.root, servers, FOREIGN_CORES)
    proof.about |= {
        "settings": list(args.knob),
        "stress": list(args.stress),
        "backend": desired.backend,
        "machine": machine_key(stand.machine),
        "model": {"name": name, "key": key, "files": files},
        "build": build,
        "kernel": stand.machine.kernel,
        "infertune": __version__,
        "values": {part.id: part.value for part in parts(desired)},
    }
    proof.store = _store(ctx, proof, stand)
    if ours is None:
        stand.running = Bench(ctx.root, target, servers, Prompts(stand.seed), busy=args.busy)

    def learned(tokens: int) -> None:
        assert proof.store is not None
        proof.about["tokens"] = tokens
        proof.store.begin(proof.about)

    stand.learned = learned


def _store(ctx: Context, proof: Proof, stand: Stand) -> Store:
    """A new run's, or that of the run that is to be gone on with, which must be the same."""
    args, about = ctx.args, proof.about
    if args.resume is None:
        seed = secrets.randbits(48) if args.seed is None else args.seed
        now = datetime.now(UTC)
        home = directory_of(os.environ, os.path.expanduser("~"), root=os.geteuid() == 0)
        where = f"{home}/{about['machine']}/{about['model']['key']}"
        about |= {"seed": seed, "began": f"{now:%Y-%m-%dT%H:%M:%SZ}", "tokens": args.tokens}
        store = Store(ctx.root, f"{where}/{now:%Y%m%dT%H%M%SZ}-prove")
        store.begin(about)
    else:
        store = Store(ctx.root, os.path.abspath(args.resume))
        then = store.run()
        for name, value in about.items():
            if then.get(name) != value:
                raise UsageError(
                    f"--resume {args.resume}: its {name} is {then.get(name)!r}, now {value!r}",
                    hint="without --resume a new run is begun",
                )
        about |= {name: then.get(name) for name in ("seed", "began", "tokens")}
        if type(about["seed"]) is not int or type(about["tokens"]) not in (int, type(None)):
            raise UsageError(f"--resume {args.resume}: there is no seed in it")
        proof.samples = [one for line in store.samples() if (one := sample_of(line))]
    stand.seed, stand.tokens = about["seed"], about["tokens"]
    return store


def _run(ctx: Context, proof: Proof, stand: Stand, desired: Desired) -> None:
    """Take all comparisons, and print and keep what each comes to."""
    args = ctx.args
    for each in proof.left_out:
        if not args.knob or each.id in args.knob:
            _say(ctx, f"{each.id}: left out: {each.why}")
    steps = steps_of(desired, args.knob, args.stress)
    if not steps:
        raise UsageError("there is nothing to measure: see what was left out")
    clock = _Clock(ctx, proof, args.budget)
    nothing = Arm(bare(desired))
    baseline = Step(
        Comparison(BASELINE, ("bare", "bare"), most=LOOKS[0]),
        (nothing, nothing),
        any(step.starts for step in steps),
        BASELINE,
    )
    runner = Runner(
        seed=str(stand.seed),
        take=lambda *_: _no_taker(),
        keep=lambda sample: _keep(proof, clock, sample),
        earlier=list(proof.samples),
        busy=args.busy or (stand.running is not None and not stand.running.servers),
    )
    proof.baseline = _compare(stand, runner, proof, clock, baseline, 1 + len(steps))
    _tell_baseline(ctx, proof.baseline)
    if _differs(proof.baseline):
        _say(ctx, "the same differs from itself: this machine cannot be measured on now")
        return
    runner.learn(proof.baseline)
    for at, step in enumerate(steps):
        try:
            found = _compare(stand, runner, proof, clock, step, len(steps) - at)
        except NotHere as reason:
            clock.done()
            proof.left_out.append(LeftOut(step.setting, reason.message))
            _say(ctx, f"{step.setting}: left out: {reason.message}")
            continue
        proof.found.append((step, found))
        _keep_verdict(ctx, proof, stand, step, found)
        _tell(ctx, proof, stand, step, found)


def _no_taker() -> Any:
    raise AssertionError("a comparison says how its samples are taken")


def _compare(
    stand: Stand, runner: Runner, proof: Proof, clock: _Clock, step: Step, left: int
) -> Found:
    """One comparison, in its share of the time; what makes it impossible is its reason."""
    stand.interrupted()
    clock.starts(step, left)

    def run(take: Any) -> Found:
        runner.take = take
        return runner.run(step.comparison, clock.time_left)

    try:
        return stand.compare(run, step.arms, starts=step.starts)
    except NotHere:
        raise
    except Failed as error:
        stand.interrupted()
        if step.setting == BASELINE:
            raise  # what cannot be done bare need not be tried under a profile
        return given_up(step.comparison, proof.samples, error.message)
    finally:
        clock.done()


def _keep(proof: Proof, clock: _Clock, sample: Sample) -> None:
    assert proof.store is not None
    proof.store.add(line_of(sample))
    proof.samples.append(sample)
    clock.shows()


def _differs(baseline: Found) -> bool:
    return baseline.verdict.word in (HELPS, HARMS)


class _Clock:
    """How much time is left, and how far it is, which is shown on a terminal only."""

    def __init__(self, ctx: Context, proof: Proof, budget_s: int) -> None:
        self._progress = Progress(sys.stderr if sys.stderr.isatty() else None)
        self._proof = proof
        self._end = time.monotonic() + budget_s
        self._until = self._end
        self._step: Step | None = None

    def starts(self, step: Step, left: int) -> None:
        """``left``: comparisons still to come, this one among them; each has its share."""
        now = time.monotonic()
        self._step, self._until = step, now + (self._end - now) / left
        self.shows()

    def time_left(self) -> bool:
        return time.monotonic() < self._until

    def shows(self) -> None:
        assert self._step is not None
        comparison = self._step.comparison
        mine = [each for each in self._proof.samples if each.comparison == comparison.name]
        thrown = sum(bool(each.why_not) for each in mine)
        pairs = len(mine) // len(comparison.arms)
        left = max(self._until - time.monotonic(), 0)
        self._progress.show(
            f"{comparison.name}: {pairs} of {comparison.most} pairs at most, "
            f"{thrown} samples thrown away, {_minutes(left)} left"
        )

    def done(self) -> None:
        self._progress.done()


# -- output ----------------------------------------------------------------------------------


def _say(ctx: Context, text: str) -> None:
    if not ctx.args.json:
        ctx.sentence(text)


def _path(proof: Proof) -> str:
    return proof.store.path if proof.store else "RUN"


def _tell_baseline(ctx: Context, found: Found) -> None:
    effect = smallest_effect(gains(found.blocks))
    finds = ""
    if effect is not None:
        finds = f"; can find >= {effect:.0%} in {LOOKS[0]} pairs, {_minutes(found.seconds)}"
    _say(ctx, f"{BASELINE}: {_words(found.verdict)}{_counts(found)}{finds}")
    if found.reason:
        _say(ctx, f"  {found.reason}")


def _tell(ctx: Context, proof: Proof, stand: Stand, step: Step, found: Found) -> None:
    measured = _measured(ctx, proof, stand, step, found)
    words = amount(measured) if measured.keeps is not None else _words(found.verdict)
    _say(ctx, f"{step.comparison.name}: {words}{_counts(found)}")
    if found.reason:
        _say(ctx, f"  {found.reason}")
    others = [
        f"{_OTHERS[name]} {_percents(each)}"
        for name, each in found.others.items()
        if each.low is not None
    ]
    if others:
        _say(ctx, f"  without a verdict: {', '.join(others)}")


_OTHERS = {"ttft_s": "time to the first token", "start_s": "start"}


def _words(verdict: Verdict) -> str:
    if verdict.estimate is None:
        return verdict.word
    return f"{verdict.word}, {_percents(verdict)}"


def _percents(verdict: Verdict) -> str:
    """Of tokens per second; of times the other way round, so that positive is better."""
    if verdict.estimate is None:
        return "-"
    estimate = f"{verdict.estimate * 100:+.1f} %"
    if verdict.low is None or verdict.high is None:
        return estimate
    return f"{estimate} ({verdict.low * 100:.1f}..{verdict.high * 100:.1f})"


def _counts(found: Found) -> str:
    thrown = f", {found.discarded} thrown away" if found.discarded else ""
    return f", {found.verdict.pairs} pairs{thrown}, {_minutes(found.seconds)}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _kept_share(found: Found, arm: int) -> float | None:
    """Tokens per second of an arm as a share of the first's."""
    estimate = judge(gains(found.blocks, arm=arm)).estimate
    return None if estimate is None else 1 + estimate


def _measured(ctx: Context, proof: Proof, stand: Stand, step: Step, found: Found) -> Measured:
    about, verdict = proof.about, found.verdict
    stressed = step.stress != QUIET
    return Measured(
        profile=about["profile"],
        setting=step.setting,
        value=step.value,
        arm=step.stress,
        word=verdict.word,
        estimate=verdict.estimate,
        low=verdict.low,
        high=verdict.high,
        pairs=verdict.pairs,
        keeps=_kept_share(found, 2) if stressed else None,
        bare=_kept_share(found, 1) if stressed else None,
        day=f"{datetime.now(UTC):%Y-%m-%d}",
        kernel=about["kernel"] or "unknown",
        backend=about["backend"],
        model=_model_thing(ctx, about),
        server=_server_thing(ctx, stand, about),
        busy=about["busy"],
    )


def _model_thing(ctx: Context, about: Mapping[str, Any]) -> Thing:
    first = next(iter(about["model"]["files"]), None)
    return Thing(
        name=about["model"]["name"], path=first, stamp=stamp(ctx.root, first) if first else None
    )


def _server_thing(ctx: Context, stand: Stand, about: Mapping[str, Any]) -> Thing:
    if stand.ours is not None and stand.ours.server.embedded:
        return package("xllamacpp")
    path = stand.ours.server.program[0] if stand.ours else None
    return Thing(
        name=about["build"] or "unknown", path=path, stamp=stamp(ctx.root, path) if path else None
    )


def _keep_verdict(ctx: Context, proof: Proof, stand: Stand, step: Step, found: Found) -> None:
    home = directory_of(os.environ, os.path.expanduser("~"), root=os.geteuid() == 0)
    one = _measured(ctx, proof, stand, step, found)
    try:
        save(ctx.root, home, proof.about["machine"], [one])
    except OSError as error:
        raise Failed(f"the verdict cannot be kept: {error}") from None


def _document(proof: Proof, failed: str | None) -> dict[str, Any]:
    names = ("profile", "backend", "model", "build", "kernel", "machine", "seed", "busy", "tokens")
    baseline = proof.baseline
    effect = smallest_effect(gains(baseline.blocks)) if baseline else None
    return {
        **{name: proof.about.get(name) for name in names},
        "baseline": _row(BASELINE, None, QUIET, baseline) if baseline else None,
        "finds": effect,
        "verdicts": [
            _row(step.setting, step.value, step.stress, found) for step, found in proof.found
        ],
        "left_out": [{"id": each.id, "why": each.why} for each in proof.left_out],
        "path": proof.store.path if proof.store else None,
        "failed": failed,
    }


def _row(setting: str, value: str | None, stress: str, found: Found) -> dict[str, Any]:
    stressed = stress != QUIET
    verdict, ttft = found.verdict, found.others.get("ttft_s")
    return {
        "setting": setting,
        "value": value,
        "arm": stress,
        "verdict": verdict.word,
        "estimate": verdict.estimate,
        "low": verdict.low,
        "high": verdict.high,
        "pairs": verdict.pairs,
        "discarded": found.discarded,
        "seconds": round(found.seconds, 1),
        "ttft": ttft.estimate if ttft else None,
        "keeps": _kept_share(found, 2) if stressed else None,
        "bare": _kept_share(found, 1) if stressed else None,
        "reason": found.reason,
    }


# -- arguments -------------------------------------------------------------------------------


def _stresses(text: str) -> list[str]:
    words = list(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in _STRESSES:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(_STRESSES)}")
    return words


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})(s|m|min|h)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 90s, 20m or 2h")
    return int(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2]]


COMMANDS: tuple[Command, ...] = (
    verb(
        "prove",
        _prove,
        (
            PROFILE,
            argument(
                "knob",
                nargs="*",
                metavar="KNOB",
                help="measure these settings of it, each against the profile without it "
                "(default: all of it against none, then each)",
            ),
            argument(
                "--model",
                metavar="MODEL",
                help="GGUF file or name of a model ('infertune models'; default: a small one)",
            ),
            URL,
            argument("--server", metavar="PATH", help="llama-server to use (default: from PATH)"),
            BACKEND,
            argument(
                "--stress",
                type=_stresses,
                default=[],
                metavar="LIST",
                help="also beside neighbours that take this: cpu",
            ),
            argument(
                "--budget",
                type=_seconds,
                default=1200,
                metavar="TIME",
                help="time for all of it, as 90s, 20m or 2h (20m)",
            ),
            argument(
                "--seed",
                type=whole("a seed", 0, 2**48),
                metavar="N",
                help="have the same order and the same prompts again",
            ),
            TOKENS,
            argument("--resume", metavar="RUN", help="go on with a run that was cut off"),
            BUSY,
            argument(
                "--allow-risk",
                action="store_true",
                help="measure knobs that may change heat, noise or stability, too",
            ),
            argument(
                "--launch-only",
                action="store_true",
                help="leave the kernel's settings alone (needs no root)",
            ),
            FORCE,
            JSON,
        ),
        "Measures whether a profile helps on this machine, and which of its settings do. First the "
        "bare machine is measured against itself: that says which change can be found, and whether "
        "anything can be said at all. Then pairs are measured, one of each arm in an order that a "
        "coin decides; a pair during which others used the machine is thrown away before anybody "
        "has looked at its speed. After 8, 12, 16 and 24 pairs a verdict on tokens per second is "
        "asked for: helps, harms, no effect shown, cannot decide. Settings that a server has from "
        "its start take a new start for each sample; the others are changed while it runs. "
        "--stress cpu starts as many busy loops as there are CPUs, and says how much of the quiet "
        "machine's tokens per second is left with the profile and without it. Every value goes "
        "back at the end, after Ctrl-C, and after 'kill -9' at the next call of infertune. "
        "Verdicts are kept, and shown by 'knobs' and 'profile explain' until kernel, model, server "
        "or value change. Exit code 1: something harms; 3: something cannot be decided.",
    ),
)
