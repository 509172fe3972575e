# SPDX-License-Identifier: Apache-2.0
"""``infertune top``: this machine and its servers as they are now, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infertune.base.errors import Exit, InfertuneError, UsageError, describe
from infertune.cli.base import JSON, Command, Context, argument, verb, whole
from infertune.cli.main import said
from infertune.cli.probes import EXPORTER, fetch
from infertune.cli.render import counted, summary
from infertune.exporter.base import Collector, Histogram
from infertune.exporter.collectors.amdgpu import AMDGPU
from infertune.exporter.collectors.engines import ENGINES_COLLECTOR
from infertune.exporter.collectors.gpu_metrics import GPU_METRICS
from infertune.exporter.collectors.pools import POOLS
from infertune.exporter.collectors.pressure import PRESSURE
from infertune.exporter.runner import Result, Runner
from infertune.servers.engines.exposition import samples as lines_of
from infertune.views.board import board
from infertune.views.load import Labels, Reading, load

_COLLECTORS = (PRESSURE, AMDGPU, GPU_METRICS, POOLS, ENGINES_COLLECTOR)
"""That of time first, at the moment that is noted: a server may take a second to answer."""
_PROBES = ("infertune_run_queue_latency_seconds", "infertune_page_faults_total")
_PAGE = "/metrics?collect[]=probes"
_EVERY_S = 2
_DAEMON_EVERY_S = 10.0
"""The list of servers costs the daemon questions to systemd; who is new is seen in so long."""


class Eye:
    """Looks at one machine; remembers the last reading, and nothing before it."""

    def __init__(self, ctx: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._ctx = ctx
        self._clock = clock
        self._runner = Runner(ctx.root)
        self._results: dict[str, tuple[float, Result]] = {}
        self._before: Reading | None = None
        self._last: Mapping[str, Any] | None = None
        self._told: dict[str, tuple[float, Any, str]] = {}
        self.asks_doctor = True

    def look(self) -> Mapping[str, Any]:
        """The next document.  Raises nothing."""
        now = self._reading()
        # Between two looks at a recorded machine nothing has happened, which says nothing of it.
        self._last = load(self._before if self._ctx.live else None, now, self._last)
        self._before = now
        return self._last

    def _reading(self) -> Reading:
        unknown: dict[str, str] = {}
        if self.asks_doctor:
            self._told.pop("doctor", None)
            self.asks_doctor = False
        told = {
            "status": self._of_verb("status", 0.0, unknown),
            "servers": self._of_verb("servers", _DAEMON_EVERY_S, unknown),
        }
        if self._before or not self._ctx.live:  # it takes seconds: not before the first screen
            told["doctor"] = self._of_verb("doctor", float("inf"), unknown)
        at = self._clock()
        found = self._collected(at, unknown)
        found.update(self._probed(unknown))
        return Reading(
            at=at,
            samples=found,
            status=told["status"],
            servers=told["servers"]["servers"] if told["servers"] else None,
            doctor=told.get("doctor"),
            boottime=time.clock_gettime(time.CLOCK_BOOTTIME),
            unknown=unknown,
        )

    def _of_verb(self, name: str, lasts_s: float, unknown: dict[str, str]) -> Any:
        """What a verb says, asked again after ``lasts_s``."""
        now = self._clock()
        until, document, why = self._told.get(name, (now, None, ""))
        if now >= until:
            document, why = None, ""
            try:
                document = said(self._ctx, name)
            except InfertuneError as error:
                why = error.message
            except OSError as error:
                why = describe(error)
            except Exception as error:  # the screen stays, whatever one verb does
                why = f"a bug: {type(error).__name__}: {error}"
            self._told[name] = (now + lasts_s, document, why)
        if why:
            unknown[name] = why
        return document

    def _collected(self, now: float, unknown: dict[str, str]) -> dict[str, list[Any]]:
        old = [each for each in _COLLECTORS if self._is_old(each, now)]
        for name, result in self._runner.run(old).items():
            self._results[name] = now, result
        found: dict[str, list[tuple[Labels, float]]] = {}
        for collector in _COLLECTORS:
            _, result = self._results[collector.id]
            names = {each.name: each.labels for each in collector.metrics}
            for metric, labels, value in result.samples:
                if not isinstance(value, Histogram):
                    pair = (dict(zip(names[metric], labels, strict=True)), value)
                    found.setdefault(metric, []).append(pair)
            if result.state in ("timeout", "failed"):
                unknown[collector.id] = result.why
        return found

    def _is_old(self, collector: Collector, now: float) -> bool:
        at, _ = self._results.get(collector.id, (None, None))
        return at is None or now - at >= collector.max_age_s

    def _probed(self, unknown: dict[str, str]) -> dict[str, list[tuple[Labels, float]]]:
        """What the running exporter's probes have counted."""
        found: dict[str, list[tuple[Labels, float]]] = {}
        if not self._ctx.live:
            return found
        try:
            text = fetch(self._ctx.args.exporter, _PAGE).decode("utf-8", "replace")
            for prefix in _PROBES:
                for line in lines_of(text, prefix):
                    found.setdefault(line.name, []).append((line.labels, line.value))
        except InfertuneError as error:
            unknown["probes"] = error.message
        except ValueError:
            unknown["probes"] = f"what answers on {self._ctx.args.exporter} is no page of metrics"
        return found


def _top(ctx: Context) -> int:
    args = ctx.args
    eye = Eye(ctx)
    if args.once or args.json:
        document = eye.look()
        if ctx.live:
            time.sleep(args.every)  # a rate takes two looks
            document = eye.look()
        if args.json:
            ctx.print_json("infertune.top/1", dict(document))
        else:
            ctx.print("\n".join(board(document, args.columns)))
        return Exit.DONE
    if not (ctx.stdout and ctx.stdout.isatty()):
        raise UsageError("top needs a terminal", hint="infertune top --once prints it once")
    try:
        from infertune.views.app import Machine, Top
    except ImportError as error:
        raise UsageError(
            f"top needs the library textual: {error}",
            hint="install infertune with its extra 'tui' (docs/install); --once needs none",
        ) from error
    why_not = "" if ctx.live else "--root is a recorded machine: it is only looked at"

    def ask_doctor() -> None:
        eye.asks_doctor = True

    machine = Machine(
        look=eye.look,
        profiles=lambda: _profiles(ctx),
        act=lambda words: act(ctx, words),
        ask_doctor=ask_doctor,
        why_not=why_not,
    )
    Top(machine, args.every).run()
    return Exit.DONE


def _profiles(ctx: Context) -> list[str]:
    return [each["name"] for each in said(ctx, "profiles")["profiles"] if each["error"] is None]


def act(ctx: Context, words: Sequence[str]) -> str:
    """Carry out apply, revert or confirm as its verb does; one line on what came of it."""
    try:
        report = said(ctx, *words)
    except InfertuneError as error:
        return f"{error.message}; {error.hint}" if error.hint else error.message
    except OSError as error:
        return describe(error)
    except Exception as error:
        return f"a bug: {type(error).__name__}: {error}"
    match words[0]:
        case "confirm":
            return "confirmed" if report["confirmed"] else "nothing waits for a confirmation"
        case "apply":
            return summary(report, "changed", "applied", "clamped", "restored")
    return f"put back: {counted(len(report['items']), 'file')}"


COMMANDS: tuple[Command, ...] = (
    verb(
        "top",
        _top,
        (
            argument(
                "--every",
                type=whole("a number of seconds", _EVERY_S, 3600),
                default=_EVERY_S,
                metavar="SECONDS",
                help=f"time between two looks, {_EVERY_S} to 3600 (default: {_EVERY_S})",
            ),
            argument("--once", action="store_true", help="print it once, without a screen"),
            argument(
                "--columns",
                type=whole("a number of columns", 40, 1000),
                default=80,
                metavar="N",
                help="with --once: how wide (default: 80)",
            ),
            EXPORTER,
            JSON,
        ),
        "Shows the applied profile, drift, what the GPU does, who stalls, the memory models can "
        "have, and each server with its tokens a second and time to the first token; keys apply, "
        "confirm and revert, and ask first. Servers are asked what loads, wakes and keeps no "
        "model; run queue and page faults come from the probes of a running infertune-exporter. "
        "The screen needs the library textual (extra 'tui'), --once and --json do not.",
    ),
)
