# SPDX-License-Identifier: Apache-2.0
"""What the verbs that measure have in common: arguments, and servers started to be measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from infertune import __version__
from infertune.base.addresses import LOOPBACK
from infertune.base.errors import Failed, UsageError
from infertune.base.records import asdict, dataclass, field, replace
from infertune.budget.admission import Admission, release
from infertune.catalogue.server_settings import check_together
from infertune.cli.base import Context, argument, whole
from infertune.cli.render import summary
from infertune.cli.run import Printer, ask_admission
from infertune.engine.documents import report_document
from infertune.engine.state import Report
from infertune.host.machine import Machine
from infertune.launch.place import Placed
from infertune.launch.process import Child
from infertune.launch.ready import any_port
from infertune.launch.residency import model_files
from infertune.measure.client import Target
from infertune.measure.figures import Row
from infertune.measure.store import Store, directory_of, machine_key, model_key
from infertune.measure.trial import MOST_TOKENS, PROMPT, somebody_else_answers
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import assume_backend, resolve
from infertune.run import Audience, Job, Request, Result, run

# Arguments of the verbs that measure.
URL = argument("--url", metavar="U", help="measure the server that runs there")
TOKENS = argument(
    "--tokens",
    type=whole("a number of tokens", 2, 4096),
    metavar="N",
    help="tokens to generate (default: as many as take 2 s, 64 to 512)",
)
BUSY = argument("--busy", action="store_true", help="measure among programs that work")

FOREIGN_CORES = 0.5
"""CPUs that others may take before a measurement starts."""
START_S = 900.0
"""Patience with a server's start: 100 GB from a slow disk."""
GRACE_S = 2.0
"""Between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A server of ours, as it was asked for."""

    profile: str | None
    """None: the server's own defaults, on the machine as it is."""
    model: str | None
    """Path; None for the embedded one."""
    server: str | None
    backend: str
    settings: Mapping[str, str]
    """Canonical server settings over the profile's."""
    launch_only: bool

    def with_room(
        self, ctx: Context, machine: Machine, depth: int, slots: int, tokens: int | None
    ) -> Arm:
        """With the context and the slots that the measurement needs, where nothing says otherwise.

        Raises UsageError.
        """
        found, given = dict(self.settings), set(self.settings)
        if self.profile:
            backend = self.backend if self.backend != "auto" else assume_backend(machine)[0]
            given |= set(resolve(load_profile(ctx.root, self.profile), machine, backend).server)
        if "parallel" not in given:
            found["parallel"] = str(slots)
        if "ctx_size" not in given:
            one = depth + PROMPT + (tokens or MOST_TOKENS) + 64
            found["ctx_size"] = str(-(-one // 256) * 256 * slots)
        try:
            check_together(found)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return replace(self, settings=found)


@dataclass(slots=True)
class Measured:
    """What has been measured, filled in on the way: what is cut off keeps what it has."""

    about: dict[str, Any]
    """As run.json has it."""
    store: Store | None = None
    rows: list[Row] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)
    """What was not measured, or not to its end, and why."""
    undecided: bool = False


class Remarks(Printer):
    """Tells what is not as asked, and is brief about the rest."""

    def applied(self, report: Report) -> None:
        self.say(summary(report_document(report), "changed", "applied"))

    def placed(self, outcomes: Sequence[Placed]) -> None:
        for each in outcomes:
            if each.outcome != "applied":
                self.say(f"{each.id} = {each.wanted}: {each.outcome}: {each.why}")


def start(
    ctx: Context,
    arm: Arm,
    result: Result,
    audience: Audience,
    then: Callable[[Job, Child], None],
) -> int:
    """Start the server, do ``then`` with it, end it, and put everything back.

    The exit code: 128 + N after signal N.  Raises what ``run`` does.
    """

    port = any_port()  # clients of the usual one must not come into a measurement

    def measure(job: Job, child: Child) -> int:
        if somebody_else_answers(ctx.root, LOOPBACK, port, child.pid):
            raise Failed(f"another program took port {port}", hint="try again")
        then(job, child)
        return 0

    promised: list[Admission] = []
    request = Request(
        profile=arm.profile,
        caller=os.environ,
        backend=arm.backend,
        model=arm.model,
        server=arm.server,
        port=port,
        launch_only=arm.launch_only,
        settings=arm.settings,
        reported=ctx.args.json,
        then=measure,
        patience_s=START_S,
        grace_s=GRACE_S,
        check=partial(ask_admission, ctx, promised),
    )
    try:
        return run(ctx.root, request, result, audience)
    finally:
        for each in promised:
            release(ctx.root, each)


def begin(
    ctx: Context, measured: Measured, machine: Machine, target: Target, build: str | None
) -> Store:
    """Note what is measured, where measurements are kept.  Raises OSError."""
    now = datetime.now(UTC)
    measured.about |= {
        "began": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "api": target.api,
        "build": build or target.build,
        "kernel": machine.kernel,
        "infertune": __version__,
        "machine": machine_key(machine),
        "samples": ctx.args.samples,
    }
    root = os.geteuid() == 0
    home = directory_of(os.environ, os.path.expanduser("~"), root=root)
    where = f"{home}/{measured.about['machine']}/{measured.about['model']['key']}"
    measured.store = Store(ctx.root, f"{where}/{now:%Y%m%dT%H%M%SZ}-bench")
    measured.store.begin(measured.about)
    return measured.store


def about_ours(ctx: Context, arm: Arm, result: Result, job: Job) -> dict[str, Any]:
    """What run.json says of a server of ours."""
    assert job.model is not None
    files = model_files(job.model)
    name = os.path.basename(job.model)
    return {
        "url": None,
        "model": {"name": name, "key": model_key(ctx.root, files), "files": files},
        "profile": arm.profile,
        "backend": result.backend,
        "argv": list(job.argv),
        "asked": {**asdict(arm), "model": job.model},
    }


def say(ctx: Context, measured: Measured, text: str) -> None:
    measured.remarks.append(text)
    if not ctx.args.json:
        ctx.sentence(text)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
