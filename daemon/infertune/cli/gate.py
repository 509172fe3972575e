# SPDX-License-Identifier: Apache-2.0
"""The verb ``gate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from infertune.base.errors import Exit, UsageError
from infertune.base.records import asdict
from infertune.catalogue.server_settings import change_numbers
from infertune.cli.base import JSON, Command, Context, argument, printable, verb
from infertune.cli.fit import MODEL, canonical, parse_setting
from infertune.host.machine import Machine, read_machine
from infertune.launch.binary import (
    INSTALL_HINT,
    Server,
    ask_server,
    embedded_is_installed,
    embedded_program,
    find_server,
)
from infertune.launch.embedded import default_model
from infertune.launch.process import Signals
from infertune.measure import gate
from infertune.measure.arm import Arm, Starter
from infertune.measure.compare import Outcome, judge, lay
from infertune.run import refuse_other_files
from infertune.servers.models import model_path

DEFAULTS = {"ctx_size": "4096", "parallel": "1"}
"""Of both servers, where nothing else is said: enough for what is asked."""

BOTH = argument(
    "--both",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="a server setting of both servers; may be given more than once",
)
SERVER = argument(
    "--server", metavar="PATH", help="llama-server to use (default: from PATH, or the embedded one)"
)


def server_at_hand(path: str | None) -> Server:
    """The llama-server to start.  Raises UsageError and Failed."""
    found = find_server(path, os.environ.get("PATH"))
    if found:
        return ask_server((found,), {}, os.environ, embedded=False)
    if not embedded_is_installed():
        raise UsageError("there is no llama-server here", hint=INSTALL_HINT)
    program, env = embedded_program()
    return ask_server(program, env, os.environ, embedded=True)


def model_at_hand(name: str | None) -> str:
    """The path of a model, by its name or path; of the embedded one without.  Raises UsageError."""
    if name is not None:
        path = model_path(name, os.environ)
        refuse_other_files("model", path)
        return path
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return default_model(os.path.join(cache, "infertune"))


def settings_of(words: Sequence[str], machine: Machine) -> dict[str, str]:
    """``NAME=VALUE...`` as canonical settings.  Raises UsageError."""
    return canonical(dict(map(parse_setting, words)), machine)


def _gate(ctx: Context) -> int:
    args = ctx.args
    if not ctx.live:
        raise UsageError("gate starts servers: it works on this machine only")
    if not ctx.command and args.other is None:
        raise UsageError(
            "nothing to judge: both servers would be the same",
            hint="give settings after '--', such as '-- cache_type_k=q8_0', or --other MODEL",
        )
    machine = read_machine(ctx.root)
    changed = settings_of(ctx.command, machine)
    base = {**DEFAULTS, **settings_of(args.both, machine)}
    model = model_at_hand(args.model)
    other = model if args.other is None else model_at_hand(args.other)
    server = server_at_hand(args.server)
    before, after = Arm(model, base), Arm(other, {**base, **changed})
    say = _silent if args.json else _aside
    with Signals() as signals:
        serve = Starter(ctx.root, server, os.environ, signals).serve
        ground = lay(serve, before, say)
        numbers = other != model or change_numbers(changed)
        outcome = judge(serve, ground, after, numbers=numbers, say=say)
    if args.json:
        ctx.print_json("infertune.gate/1", document(server, before, after, outcome))
    else:
        _print(ctx, changed, outcome)
    return Exit.DONE if outcome.accepted else Exit.DIFFERS if outcome.decided else Exit.FAILED


def _aside(text: str) -> None:
    """What is being done, for who waits; the verdicts have standard output."""
    print(printable(text), file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    pass


def _print(ctx: Context, changed: dict[str, str], outcome: Outcome) -> None:
    rows = [(each.gate, each.word, each.why) for each in outcome.verdicts]
    ctx.table(("GATE", "VERDICT", "WHY"), rows)
    what = " ".join(f"{name}={value}" for name, value in changed.items()) or "the other model"
    words = "accepted" if outcome.accepted else "refused" if outcome.decided else "not judged"
    ctx.print(f"{words}: {what}")


def document(server: Server, before: Arm, after: Arm, outcome: Outcome) -> dict[str, Any]:
    reference, harmless = outcome.ground.reference, outcome.ground.harmless
    found = [gate.differences(reference, each) for each in outcome.followed]
    changed = gate.drift(reference, outcome.followed)
    return {
        "server": server.version,
        "embedded": server.embedded,
        "reference": asdict(before),
        "other": asdict(after),
        "accepted": outcome.accepted if outcome.decided else None,
        "gates": [asdict(each) for each in outcome.verdicts],
        "differences": [{**asdict(each), "close": each.close} for one in found for each in one],
        "drift": asdict(changed) if changed else None,
        "harmless": asdict(harmless) if harmless else None,
    }


COMMANDS: tuple[Command, ...] = (
    verb(
        "gate",
        _gate,
        (
            MODEL,
            argument(
                "--other",
                metavar="MODEL",
                help="the other server has this model, such as a requant",
            ),
            BOTH,
            SERVER,
            JSON,
        ),
        "Starts a server as the reference and another one with the settings after '--' ('infertune "
        "gate MODEL -- cache_type_k=q8_0'), asks both the same 24 prompts without chance, and says "
        "whether the answers are still those of the reference: the same token by token, or "
        "different at near ties only. What changes numbers on purpose (another type of KV cache, a "
        "drafter, another file) must also move log-probabilities no more than twice what harmless "
        "changes move them here, and solve as many closed items. One server runs at a time; "
        "nothing else of the machine is changed. Exit code 1 where it is refused, 3 where it "
        "cannot be judged.",
        takes_command=True,
    ),
)
