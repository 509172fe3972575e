# SPDX-License-Identifier: Apache-2.0
"""The verb ``bench``."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any

from infertune.base.errors import Exit, InfertuneError, UsageError
from infertune.base.records import asdict
from infertune.base.root import read_user_file
from infertune.cli.against import compare
from infertune.cli.base import JSON, Command, Context, argument, verb, whole
from infertune.cli.benching import (
    BUSY,
    FOREIGN_CORES,
    TOKENS,
    URL,
    Arm,
    Measured,
    Remarks,
    about_ours,
    begin,
    minutes,
    say,
    start,
)
from infertune.cli.engine import BACKEND
from infertune.cli.fit import FORCE, canonical, parse_setting
from infertune.host.machine import Machine, read_machine
from infertune.launch.process import Child
from infertune.launch.ready import Progress
from infertune.measure.client import Target, base_of, find_out
from infertune.measure.figures import Row, row
from infertune.measure.prompts import Prompts
from infertune.measure.store import named_key
from infertune.measure.trial import (
    FEWEST_TOKENS,
    MOST_TOKENS,
    PROMPT,
    Bench,
    Load,
    Sample,
    collect,
    enough_tokens,
    refuse_a_busy_machine,
    servers_at,
)
from infertune.run import Audience, Job, Result
from infertune.servers.models import model_path

_MAX_KEY = 64 * 1024
_MAX_ROWS = 16
_WIDTHS = (5, 5, 11, 9, 7, 16, 5, 5)
_HEADER = ("DEPTH", "SLOTS", "TTFT ms", "TPOT ms", "PREFILL", "DECODE", "KEPT", "FINDS")


def _bench(ctx: Context) -> int:
    args = ctx.args
    if not ctx.live:
        raise UsageError("bench measures this machine only", hint="leave --root out")
    args.depths = args.depths or ([0] if args.against else [0, 4096])
    if len(args.depths) * len(args.parallel) > _MAX_ROWS:
        raise UsageError(f"more than {_MAX_ROWS} pairs of depth and slots")
    if args.url and any((args.profile, args.server, args.backend != "auto", ctx.command)):
        raise UsageError("--profile, --server, --backend and settings do not go with --url")
    if args.against:
        _refuse_what_is_not_one(args)
    if args.key_file and not args.url:
        raise UsageError("--key-file is for --url", hint="a server that it starts asks for none")
    seed = secrets.randbits(48) if args.seed is None else args.seed
    measured = Measured({"verb": "bench", "seed": seed, "busy": args.busy})
    failed = None
    try:
        code = _of_others(ctx, measured) if args.url else _of_ours(ctx, measured)
    except InfertuneError as error:
        failed = error.message
        raise
    except KeyboardInterrupt:
        code, failed = 130, "interrupted"
    finally:
        if args.json:
            ctx.print_json("infertune.bench/1", _document(measured, failed))
        elif measured.store:
            _print_end(ctx, measured)
    if code or not measured.undecided:
        return code
    return Exit.FAILED


def _refuse_what_is_not_one(args: Any) -> None:
    """A comparison is of one load, and of servers that are started for it."""
    if args.url:
        raise UsageError(
            "--against needs servers that are started for it: the unit is a start",
            hint="leave --url out",
        )
    if len(args.depths) + len(args.parallel) > 2:
        raise UsageError("--against compares at one depth and one number of slots")


# -- which server -------------------------------------------------------------------------


def _of_others(ctx: Context, measured: Measured) -> int:
    """A server that runs already."""
    base = base_of(ctx.args.url)
    target = find_out(base, ctx.args.model, _key(ctx.args.key_file))
    host, port = target.address
    servers = servers_at(ctx.root, "127.0.0.1" if host == "localhost" else host, port)
    if not servers:
        say(ctx, measured, "the server's processes are not seen: nobody can say what others took")
    elif not ctx.args.busy:
        refuse_a_busy_machine(ctx.root, servers, FOREIGN_CORES)
    name = target.model or "model"
    machine = read_machine(ctx.root)
    model = {"name": name, "key": named_key(name), "files": []}
    measured.about |= {"url": base, "model": model, "profile": None, "backend": None, "argv": []}
    _measure(ctx, measured, machine, target, servers)
    return Exit.DONE


def _key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        words = read_user_file(path, _MAX_KEY).decode("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--key-file {path}: {error}") from None
    if not words:
        raise UsageError(f"--key-file {path}: there is no key in it")
    return words[0]


def _arm(ctx: Context, machine: Machine) -> Arm:
    args = ctx.args
    return Arm(
        profile=args.profile,
        model=model_path(args.model, os.environ) if args.model else None,
        server=args.server,
        backend=args.backend,
        settings=canonical(dict(map(parse_setting, ctx.command)), machine),
        launch_only=args.launch_only,
    )


def _of_ours(ctx: Context, measured: Measured) -> int:
    """A server that is started for this, and ended."""
    args = ctx.args
    machine = read_machine(ctx.root)
    asked = _arm(ctx, machine)
    if args.against:
        return compare(ctx, measured, machine, asked)
    arm = asked.with_room(ctx, machine, max(args.depths), max(args.parallel), args.tokens)
    if not args.busy:
        refuse_a_busy_machine(ctx.root, (), FOREIGN_CORES)
    result = Result(args.profile or "none")

    def then(job: Job, child: Child) -> None:
        measured.about |= about_ours(ctx, asked, result, job)
        _measure(ctx, measured, machine, find_out(job.url), (child.pid,), result.version)

    return start(ctx, arm, result, Audience() if args.json else Remarks(ctx), then)


# -- measuring -----------------------------------------------------------------------------


def _measure(
    ctx: Context,
    measured: Measured,
    machine: Machine,
    target: Target,
    servers: Sequence[int] | frozenset[int],
    build: str | None = None,
) -> None:
    """All rows.  Raises Failed."""
    args = ctx.args
    begin(ctx, measured, machine, target, build)
    bench = Bench(ctx.root, target, servers, Prompts(measured.about["seed"]), args.busy)
    loads = [
        Load(depth, slots, args.tokens or MOST_TOKENS)
        for depth in args.depths
        for slots in args.parallel
    ]
    tokens = args.tokens
    clock = _Clock(ctx, loads)
    for at, asked in enumerate(loads):
        if why := _impossible(asked, target, tokens):
            say(ctx, measured, f"depth {asked.depth}, {_slots(asked)}: left out: {why}")
            continue
        clock.starts(at)
        first = bench.warm_up(asked)
        tokens = tokens or enough_tokens(first.tpot_s)
        load = Load(asked.depth, asked.slots, tokens)
        _measure_row(ctx, measured, bench, load, clock)


def _measure_row(ctx: Context, measured: Measured, bench: Bench, load: Load, clock: _Clock) -> None:
    assert measured.store is not None
    store = measured.store

    def told(samples: Sequence[Sample]) -> None:
        store.add(samples[-1].document())
        seen[:] = samples
        clock.shows(samples)

    seen: list[Sample] = []
    try:
        _, stopped = collect(bench, load, ctx.args.samples, told)
    finally:
        clock.done()
        if seen:
            found = row(load, seen)
            measured.rows.append(found)
            if not ctx.args.json:
                if len(measured.rows) == 1:
                    _print_cells(ctx, _HEADER)
                _print_cells(ctx, _cells(found))
    if stopped:
        measured.undecided = True
        say(ctx, measured, f"depth {load.depth}, {_slots(load)}: {stopped}")


def _impossible(load: Load, target: Target, tokens: int | None) -> str | None:
    """Why a server cannot be asked for this."""
    # Before the first answer nobody knows how many tokens are enough.
    need = Load(load.depth, load.slots, tokens or FEWEST_TOKENS).context
    if target.context is not None and need > target.context:
        return f"it needs {need} tokens of context, and a slot has {target.context}"
    if target.slots is not None and load.slots > target.slots:
        return f"the server has {target.slots} slots"
    return None


class _Clock:
    """How far it is, and how long it will take; on a terminal only."""

    def __init__(self, ctx: Context, loads: Sequence[Load]) -> None:
        self._progress = Progress(sys.stderr if sys.stderr.isatty() else None)
        self._loads, self._at = loads, 0
        self._wanted: int = ctx.args.samples

    def starts(self, at: int) -> None:
        self._at = at
        self._progress.show(f"{self._where()}: the first answer, which does not count")

    def shows(self, samples: Sequence[Sample]) -> None:
        good = sum(each.kept for each in samples)
        left = self.left_s(samples, good)
        thrown = f", {len(samples) - good} thrown away" if len(samples) > good else ""
        self._progress.show(
            f"{self._where()}: {good} of {self._wanted} samples{thrown}, about {minutes(left)} left"
        )

    def left_s(self, samples: Sequence[Sample], good: int) -> float:
        """From what a sample took: each takes as long as its prompt, roughly."""
        each = sum(one.took_s for one in samples) / (good or len(samples))
        now = self._loads[self._at]
        later: float = sum(_size(load) / _size(now) for load in self._loads[self._at + 1 :])
        return each * (self._wanted - good + later * self._wanted)

    def done(self) -> None:
        self._progress.done()

    def _where(self) -> str:
        load = self._loads[self._at]
        return f"depth {load.depth}, {_slots(load)}"


def _size(load: Load) -> int:
    return (load.depth + 2 * PROMPT) * load.slots


# -- output ---------------------------------------------------------------------------------


def _slots(load: Load) -> str:
    return "1 slot" if load.slots == 1 else f"{load.slots} slots"


def _print_cells(ctx: Context, cells: Sequence[str]) -> None:
    ctx.print(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()
    )


def _cells(found: Row) -> tuple[str, ...]:
    speed = _speed(found.decode_per_s)
    if found.decode_low is not None:
        speed += f" ({_speed(found.decode_low)}-{_speed(found.decode_high)})"
    return (
        str(found.depth),
        str(found.slots),
        _times(found.ttft_p50_s, found.ttft_p99_s),
        _times(found.tpot_p50_s, found.tpot_p99_s),
        _speed(found.prefill_per_s),
        speed,
        f"{found.kept}/{found.kept + found.discarded}",
        "-" if found.finds is None else f"{found.finds:.0%}",
    )


def _speed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(middle: float | None, slow: float | None) -> str:
    """Median and p99 in milliseconds."""
    if middle is None or slow is None:
        return "-"
    return "/".join(
        f"{one:.0f}" if one >= 100 else f"{one:.1f}" for one in (1e3 * middle, 1e3 * slow)
    )


def _print_end(ctx: Context, measured: Measured) -> None:
    assert measured.store is not None
    if measured.rows:
        ctx.sentence(
            "TTFT and TPOT: p50/p99. PREFILL and DECODE: tokens/s, all slots together; in "
            "parentheses the 95 % interval of this start."
        )
    pairs = [each.pair_s for each in measured.rows if each.pair_s and each.finds is not None]
    if pairs:
        took = minutes(8 * max(pairs))
        ctx.sentence(f"FINDS: the change of DECODE that 8 pairs of such samples find, in {took}.")
    ctx.print(f"kept in {measured.store.path}")


def _document(measured: Measured, failed: str | None) -> dict[str, Any]:
    about = measured.about
    names = (
        "began", "seed", "busy", "samples", "url", "api", "model", "profile", "backend", "build",
        "kernel", "machine", "argv",
    )  # fmt: skip
    return {
        **{name: about.get(name) for name in names},
        "rows": [asdict(each) for each in measured.rows],
        "comparison": measured.comparison,
        "remarks": measured.remarks,
        "path": measured.store.path if measured.store else None,
        "failed": failed,
    }


# -- arguments -------------------------------------------------------------------------------


def _depths(text: str) -> list[int]:
    return _numbers(text, "a depth", 0, 2**22, kilo=True)


def _slot_counts(text: str) -> list[int]:
    return _numbers(text, "a number of slots", 1, 64)


def _numbers(text: str, what: str, low: int, high: int, *, kilo: bool = False) -> list[int]:
    found = []
    for word in text.split(","):
        plain = word.removesuffix("k") if kilo else word
        factor = 1024 if plain != word else 1
        if not (plain.isascii() and plain.isdecimal() and len(plain) < 9):
            raise argparse.ArgumentTypeError(f"{word!r} is not {what}; write {low} to {high}")
        if not low <= int(plain) * factor <= high:
            raise argparse.ArgumentTypeError(f"{word!r} is not {what}; write {low} to {high}")
        found.append(int(plain) * factor)
    return list(dict.fromkeys(found))


COMMANDS: tuple[Command, ...] = (
    verb(
        "bench",
        _bench,
        (
            argument(
                "model",
                metavar="MODEL",
                nargs="?",
                help="GGUF file or name of a model (default: the embedded one); with --url the "
                "name that the server has for it",
            ),
            URL,
            argument("--key-file", metavar="FILE", help="file with the key for --url"),
            argument("--profile", metavar="P", help="under this profile (default: as it is now)"),
            argument(
                "--against",
                metavar="P|RUN",
                help="compare with this profile, or with what was measured in a run, in pairs",
            ),
            argument("--server", metavar="PATH", help="llama-server to use (default: from PATH)"),
            BACKEND,
            argument(
                "--depths",
                type=_depths,
                default=None,
                metavar="LIST",
                help="tokens in the context before a prompt of 512, as 0,4k,16k (0,4k)",
            ),
            argument(
                "--parallel",
                type=_slot_counts,
                default=[1],
                metavar="LIST",
                help="requests at once, as 1,4 (1)",
            ),
            argument(
                "--samples",
                type=whole("a number of samples", 1, 1000),
                default=16,
                metavar="N",
                help="samples that count, of each depth and number of slots (16)",
            ),
            TOKENS,
            argument(
                "--seed",
                type=whole("a seed", 0, 2**48),
                metavar="N",
                help="make the same prompts again; a server must not have seen them",
            ),
            BUSY,
            argument(
                "--launch-only",
                action="store_true",
                help="leave the kernel's settings alone (needs no root)",
            ),
            FORCE,
            JSON,
        ),
        "Starts a llama-server, or takes one that runs, and measures what a client sees: time to "
        "the first token (TTFT), time for each token after it (TPOT), and the speeds of prefill "
        "and decode. Every prompt is new to the server. The machine is looked at before and after "
        "each sample: one during which others took CPU time, a clock fell, or memory was short is "
        "thrown away, whatever its speed. Refuses to start while others take more than half a "
        "CPU. Every sample is kept on disk as soon as it is there, also of what is interrupted; "
        "'infertune expect' shows the last figures beside what memory allows. Server settings may "
        "follow after --, as SETTING=VALUE; without a profile they get the context and slots that "
        "are measured. With --url any engine with an OpenAI interface will do, in a container or "
        "a unit; its settings are left as they are. --against compares in pairs, in random order, "
        "each half with a start of its own: first the baseline (a profile, none, or what was "
        "asked for in an earlier run) with itself, then with what is asked for now. Says helps, "
        "harms (exit code 1), no effect shown or cannot decide. Exit code 3: too many samples had "
        "to be thrown away, or it cannot decide.",
        takes_command=True,
    ),
)
