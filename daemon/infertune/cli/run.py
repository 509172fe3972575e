# SPDX-License-Identifier: Apache-2.0
"""The verb ``run``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from infertune.base.errors import InfertuneError, UsageError
from infertune.base.records import asdict
from infertune.budget.admission import Admission, Asked, admit, release
from infertune.budget.gguf_file import ModelError, read_model
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS
from infertune.cli.base import JSON, Command, Context, argument, verb, whole
from infertune.cli.engine import BACKEND, PROFILE, WITHOUT
from infertune.cli.fit import FORCE
from infertune.cli.here import without
from infertune.cli.render import amount, counted, print_report
from infertune.engine.documents import report_document
from infertune.engine.state import Report
from infertune.host.machine import Machine
from infertune.launch.client import Completion
from infertune.launch.place import Placed
from infertune.run import Audience, Request, Result, run
from infertune.servers.models import model_path


class Printer(Audience):
    """Tells the user what happens, on stderr where a command has stdout."""

    def __init__(self, ctx: Context, answers: Context | None = None) -> None:
        self.ctx = ctx
        self.answers = answers or ctx
        self.begun = False
        """Whether a line of an answer is open."""

    def say(self, text: str) -> None:
        self._end()
        self.ctx.print(text)

    def recovered(self, report: Report) -> None:
        self.say("an earlier run was cut short; its values were put back first:")
        self.restored(report)

    def applied(self, report: Report) -> None:
        print_report(self.ctx, report_document(report), "past")

    def placed(self, outcomes: Sequence[Placed]) -> None:
        if outcomes:
            rows = [_row(each) for each in outcomes]
            self.ctx.table(("LAUNCH", "WANTED", "GOT", "OUTCOME", ""), rows)

    def heard(self, piece: str) -> None:
        piece = piece if self.begun else piece.lstrip()
        self.begun = self.begun or bool(piece)
        self.answers.piece(piece)

    def _end(self) -> None:
        if self.begun:
            self.answers.piece("\n")
        self.begun = False

    def answered(self, completion: Completion) -> None:
        # Of a chat that got no further than thinking there are but thoughts.
        if not self.begun:
            self.answers.verbatim(completion.text.strip())
        speed = completion.tokens_per_second
        then = "" if speed is None else f", then {speed:.1f} tokens/s"
        self.say(
            f"{counted(completion.tokens, 'token')} in {completion.latency_s:.1f} s: "
            f"the first after {completion.ttft_s:.1f} s{then}"
        )

    def restored(self, report: Report) -> None:
        for item in report.items:
            if item.outcome not in ("restored", "already"):
                self.say(f"{item.knob} ({item.path}): {item.outcome}: {item.reason}")
        good = report.count("restored", "already")
        self.say(f"restored: {good} of {len(report.items)}")


def _row(each: Placed) -> tuple[str, ...]:
    remark = "; ".join(filter(None, (each.how, each.why)))
    return (each.id, _show(each, each.wanted), _show(each, each.got), each.outcome, remark)


def _show(each: Placed, value: str | None) -> str:
    return amount(value, LAUNCH_SETTINGS[each.id].value.unit_bytes)


def _run(ctx: Context) -> int:
    args = ctx.args
    command = ctx.command
    if command and any((args.model, args.server, args.port, args.ask)):
        raise UsageError(
            "--model, --server, --port and --ask are for llama-server, not for a command after --"
        )
    promised: list[Admission] = []
    request = Request(
        profile=args.profile,
        caller=os.environ,
        backend=args.backend,
        model=model_path(args.model, os.environ) if args.model else None,
        server=args.server,
        port=args.port,
        ask=args.ask,
        tokens=args.tokens,
        command=command,
        without=tuple(without(ctx)),
        launch_only=args.launch_only,
        stdout=2 if args.json else 1,
        reported=args.json,
        check=partial(ask_admission, ctx, promised),
        chats=_chats,
    )
    result = Result(args.profile)
    if args.json:  # one document at the end, and nothing before it
        audience = Audience()
    else:
        # Standard output is the command's, or the answer's.
        aside = Context(ctx.root, args, sys.stderr) if command or args.ask else ctx
        audience = Printer(aside, ctx)
    failed = None
    try:
        return run(ctx.root, request, result, audience)
    except InfertuneError as error:
        failed = error.message
        raise
    finally:
        for each in promised:
            release(ctx.root, each)
        if args.json:
            ctx.print_json("infertune.run/1", _document(result, failed))


def ask_admission(
    ctx: Context,
    promised: list[Admission],
    machine: Machine,
    model: str,
    backend: str,
    settings: Mapping[str, str],
) -> str | None:
    """Ask whether the model fits now, and keep its room until the run ends.  Raises UsageError."""
    asked = Asked(
        name=f"run-{os.getpid()}",
        model=model,
        backend=backend,
        settings=settings,
        pid=os.getpid(),
        force=ctx.args.force,
        profile=ctx.args.profile,
    )
    promised.append(admit(ctx.root, machine, asked))
    return promised[-1].remark


def _chats(model: str) -> bool | None:
    """Whether a model file has a chat template; None where its head cannot be read."""
    try:
        return "tokenizer.chat_template" in read_model(model).metadata
    except ModelError:
        return None


def _document(result: Result, failed: str | None) -> dict[str, Any]:
    completion = None
    if result.completion:
        completion = {
            **asdict(result.completion),
            "tokens_per_second": result.completion.tokens_per_second,
        }
    return {
        "profile": result.profile,
        "backend": result.backend,
        "argv": list(result.argv),
        "version": result.version,
        "embedded": result.embedded,
        "model": result.model,
        "url": result.url,
        "server_settings_refused": [asdict(each) for each in result.refused],
        "recovered": _report(result.recovered),
        "applied": _report(result.applied),
        "launch": [asdict(each) for each in result.placed],
        "ready_s": result.ready_s,
        "completion": completion,
        "restored": _report(result.restored),
        "status": result.status,
        "failed": failed,
    }


def _report(report: Report | None) -> dict[str, Any] | None:
    return report_document(report) if report else None


COMMANDS: tuple[Command, ...] = (
    verb(
        "run",
        _run,
        (
            PROFILE,
            argument(
                "--model",
                metavar="MODEL",
                help="GGUF file or name of a model ('infertune models'; default: a small one)",
            ),
            argument("--server", metavar="PATH", help="llama-server to use (default: from PATH)"),
            BACKEND,
            argument(
                "--port",
                type=whole("a port", 1, 65535),
                metavar="N",
                help="port on 127.0.0.1 (default: 8080 or next)",
            ),
            argument(
                "--ask",
                metavar="TEXT",
                help="ask this, print the answer, and stop; a model without a chat template "
                "completes the text",
            ),
            argument(
                "--tokens",
                type=whole("a number of tokens", 1, 1_000_000),
                default=64,
                metavar="N",
                help="tokens for --ask (64)",
            ),
            WITHOUT,
            argument(
                "--launch-only",
                action="store_true",
                help="leave the kernel's settings alone (needs no root)",
            ),
            FORCE,
            JSON,
        ),
        "Applies the profile, starts llama-server with the profile's settings as flags of that "
        "very binary, shows the model getting into memory, and serves in the foreground. When "
        "it ends, for whatever reason, every value goes back; after 'kill -9' the next call of "
        "infertune does that. Without a llama-server on PATH the embedded one is used (extra "
        "'embedded'), without --model Gemma 3 270M, a base model that completes text and does not "
        "chat. A model that does not fit ('infertune fit') is "
        "refused unless --force is given. Any other command can stand after the options: "
        "'infertune run PROFILE -- COMMAND...'; it "
        "gets the profile's placement and environment. A command starts with an empty "
        "environment plus PATH, HOME, LANG, TERM, TMPDIR, HIP_VISIBLE_DEVICES, "
        "ROCR_VISIBLE_DEVICES, GGML_VK_VISIBLE_DEVICES and what the profile sets; more can be "
        "given as '-- env NAME=VALUE COMMAND'. Signals go to the command; ten seconds after "
        "SIGINT or SIGTERM, or at the second one, it is killed, and so is what it left running "
        "in its process group. The exit code is the command's, 128+N after signal N. With "
        "--launch-only infertune becomes the command, as env(1) does, unless it makes a control "
        "group for it or prints --json.",
        takes_command=True,
    ),
)
