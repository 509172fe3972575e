# SPDX-License-Identifier: Apache-2.0
"""The foreground session: apply a profile, serve under it, put everything back.

Whatever ends it (the command, its crash, Ctrl-C, SIGTERM), the original values
return; after ``kill -9`` the child is gone with us, and the next call of
infertune recovers.  Where nothing has to return, and nobody waits for an answer,
infertune becomes the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from infertune.base.addresses import LOOPBACK, url
from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.records import dataclass, field
from infertune.base.root import Root, read_plain_file
from infertune.base.units import parse_cpulist
from infertune.catalogue.launch_settings import with_tunables
from infertune.catalogue.server_settings import (
    Refused,
    check_together,
    files_of,
    models_of,
    parse_help,
    server_arguments,
    unknown_flag,
)
from infertune.doctor.at_launch import warnings
from infertune.engine.journal import Journal
from infertune.engine.session import ApplyFailed, Session, session
from infertune.engine.state import Report
from infertune.host.cgroup import group_of
from infertune.host.machine import Machine, read_machine
from infertune.launch import heap
from infertune.launch.binary import (
    BACKENDS,
    INSTALL_HINT,
    Backend,
    Server,
    ask_server,
    embedded_is_installed,
    embedded_program,
    find_server,
)
from infertune.launch.client import COMPLETES_ONLY, Completion, chat, complete, how_to_talk
from infertune.launch.embedded import default_model
from infertune.launch.place import Group, Placed, place, why_no_group
from infertune.launch.prewarm import LINE, for_server
from infertune.launch.process import (
    GRACE_S,
    Child,
    Signals,
    become,
    cause,
    environment,
    exit_code,
    find_program,
    start,
)
from infertune.launch.ready import DEFAULT_PORT, choose_port, wait_ready
from infertune.profiles.profile import NOTHING, load_profile
from infertune.profiles.resolve import Desired, Setting, assume_backend, canonical, resolve
from infertune.servers.foreground import Foreground, forget, note


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for."""

    profile: str | None
    """None: nothing is set, neither of the kernel nor of the server."""
    caller: Mapping[str, str]
    """The caller's environment: PATH, HOME, and what passes through to the child."""
    backend: str = "auto"
    model: str | None = None
    server: str | None = None
    port: int | None = None
    ask: str | None = None
    tokens: int = 64
    command: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    launch_only: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    """Server settings (canonical) over the profile's."""
    host: str = LOOPBACK
    """Address to listen on."""
    api_key_file: str | None = None
    """File with the keys of clients, as the server's own user sees it."""
    flags: tuple[str, ...] = ()
    """More words for llama-server, as an administrator declared them."""
    stdout: int = 1
    """Where a command's standard output goes."""
    reported: bool = False
    """Whether somebody waits for what came of it."""
    shown: bool = True
    """Whether the start is shown while it lasts."""
    chats: Callable[[str], bool | None] = lambda _: None
    """Whether the file of a model has a chat template; None where that is not known."""
    then: Callable[[Job, Child], int] | None = None
    """Done with the server once it is ready, instead of serving; gives the exit code."""
    patience_s: float | None = None
    """How long it may take to be ready; None for as long as it lives."""
    grace_s: float = GRACE_S
    """Between SIGTERM and SIGKILL, where we end it."""
    check: Callable[[Machine, str, str, Mapping[str, str]], str | None] | None = None
    """Asked before anything is touched, with model, backend and server settings: may refuse
    (UsageError), or give a remark."""


@dataclass(slots=True)
class Result:
    """What happened, filled in on the way: a run that fails half-way still has its first half."""

    profile: str
    backend: str | None = None
    argv: tuple[str, ...] = ()
    version: str | None = None
    embedded: bool = False
    model: str | None = None
    url: str | None = None
    refused: tuple[Refused, ...] = ()
    recovered: Report | None = None
    applied: Report | None = None
    placed: tuple[Placed, ...] = ()
    ready_s: float | None = None
    completion: Completion | None = None
    restored: Report | None = None
    status: int | None = None
    """Exit code of the command, 128+N after signal N; None if it never ran."""


class Audience:
    """Who is told what happens while it happens; this one does not listen."""

    def say(self, text: str) -> None: ...
    def recovered(self, report: Report) -> None: ...
    def applied(self, report: Report) -> None: ...
    def placed(self, outcomes: Sequence[Placed]) -> None: ...
    def heard(self, piece: str) -> None: ...
    def answered(self, completion: Completion) -> None: ...
    def restored(self, report: Report) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What to start."""

    program: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    model: str | None = None
    """Model to be loaded; None for a command, which is only started."""
    url: str = ""
    prewarm: Callable[[], None] | None = None
    """Has the model read, beside the server; for the process that becomes it."""


@dataclass(slots=True)
class Run:
    root: Root
    machine: Machine
    request: Request
    result: Result
    audience: Audience
    group: Group | None = field(default=None)


def run(root: Root, request: Request, result: Result, audience: Audience) -> int:
    """Do all of it and give the exit code of the command.

    Raises the errors of engine.py, Failed where the server does not get ready,
    and UsageError or ProfileError before anything is touched.
    """
    if not root.live:
        raise UsageError(
            "run works on this machine only", hint="'infertune plan' works on a recorded one"
        )
    one = Run(root, read_machine(root), request, result, audience)
    desired, job = prepare(one)
    bare = request.launch_only or request.profile is None
    if request.launch_only:
        audience.say("kernel settings are left alone (--launch-only)")
        if request.command and not request.reported:
            _become_where_nothing_is_left_to_do(one, job, desired)
    with Signals() as signals:
        if bare:
            result.status = serve(one, job, desired, signals)
        else:
            _under_profile(one, job, desired, signals)
    return result.status or 0


def prepare(one: Run) -> tuple[Desired, Job]:
    """What the profile comes to for this server, and how to start it.  Changes nothing."""
    request, machine = one.request, one.machine
    profile = NOTHING if request.profile is None else load_profile(one.root, request.profile)
    if request.command:
        backend = request.backend if request.backend != "auto" else assume_backend(machine)[0]
        desired = resolve(profile, machine, backend)
        job = _command(request, desired)
    else:
        model = None if models_of(request.settings) else model_of(one)
        server = server_of(one)
        backend = request.backend if request.backend != "auto" else server.backends[0]
        desired = resolve(profile, machine, backend)
        chosen = [name for name in BACKENDS if name == desired.backend]
        for text in warnings(one.root, server.version, chosen):
            one.audience.say(text)
        job = job_of(one, server, model, desired)
    one.result.backend = desired.backend
    one.result.argv = job.argv
    for setting in desired.unresolved:
        one.audience.say(f"{setting.id} = {setting.configured!r} left out: {setting.reason}")
    return desired, job


def _under_profile(one: Run, job: Job, desired: Desired, signals: Signals) -> None:
    with session(one.root, f"run {desired.profile}", lambda: one.machine) as ours:
        if ours.recovered:
            one.result.recovered = ours.recovered
            one.audience.recovered(ours.recovered)
        before = ours.applied
        try:
            report = ours.apply(desired, hold=True, without=one.request.without)
        except ApplyFailed as failed:
            one.result.applied = failed.report
            one.audience.applied(failed.report)
            raise
        try:
            one.result.applied = report
            one.audience.applied(report)
            one.result.status = serve(one, job, desired, signals)
        finally:
            one.result.restored = ours.revert()
            one.audience.restored(one.result.restored)
            if before:
                apply_again(one, ours, before)


def apply_again(one: Run, ours: Session, before: Journal) -> None:
    """What was applied before the run is applied after it."""
    try:
        profile = load_profile(one.root, before.profile)
        ours.apply(resolve(profile, one.machine, before.backend), without=before.without)
    except InfertuneError as error:
        one.audience.say(f"not applied again: {before.profile}: {error.message}")
    else:
        one.audience.say(f"applied again: {before.profile}, as before the run")


def _command(request: Request, desired: Desired) -> Job:
    env = _environment(desired, request.caller)
    program = find_program(request.command[0], env["PATH"])
    return Job(program, request.command, env)


def model_of(one: Run) -> str:
    """The model to serve, checked to be one."""
    path = one.request.model
    if path is None:
        cache = one.request.caller.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = default_model(os.path.join(cache, "infertune"))
        one.audience.say("no --model: Gemma 3 270M (extra 'embedded'), a base model")
    path = os.path.abspath(path)
    refuse_other_files("--model", path)
    one.result.model = path
    return path


def refuse_other_files(what: str, path: str) -> None:
    """Raise UsageError for a file that llama-server could not load."""
    try:
        magic = read_plain_file(Path(path), 4, follow=True)[0]
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise UsageError(f"{what} {path}: not a GGUF file", hint="llama-server loads GGUF models")


def server_of(one: Run) -> Server:
    """The server program: --server, llama-server on PATH, or the embedded one."""
    caller = one.request.caller
    path = find_server(one.request.server, caller.get("PATH"))
    if path:
        server = ask_server((path,), {}, caller, embedded=False)
    elif embedded_is_installed():
        program, env = embedded_program()
        server = ask_server(program, env, caller, embedded=True)
    else:
        raise UsageError("there is no llama-server here", hint=INSTALL_HINT)
    name = "no llama-server on PATH: embedded llama.cpp" if server.embedded else path
    devices = ", ".join(server.devices) or "CPU only"
    one.audience.say(f"{name}, {server.version or 'version unknown'}, {devices}")
    one.result.version = server.version
    one.result.embedded = server.embedded
    return server


def job_of(one: Run, server: Server, model: str | None, desired: Desired) -> Job:
    settings = {**canonical(desired.server), **one.request.settings}
    if model is not None and (router := models_of(settings)):
        raise UsageError(
            f"profile '{desired.profile}' has {', '.join(router)}, which is for a router",
            hint="a router is declared: 'infertune serve', or /etc/infertune/servers.d",
        )
    try:
        check_together(settings)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name, path in files_of(settings).items():
        refuse_other_files(name, path)
    cpus = desired.launch.get("cpus")
    if cpus and "threads" not in settings:
        # The server counts the machine's cores, not those it may use: more threads than CPUs
        # wait for each other.
        settings["threads"] = str(len(_cores(one.machine, cpus)))
    port = choose_port(one.request.port, address=one.request.host)
    if one.request.port is None and port != DEFAULT_PORT:
        one.audience.say(f"port {DEFAULT_PORT} is taken: using {port}")
    try:
        arguments, refused = server_arguments(
            settings,
            server.help,
            model=model,
            port=port,
            host=one.request.host,
            api_key_file=one.request.api_key_file,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    for each in refused:
        wanted = desired.server.get(each.setting)
        if wanted and wanted.required:
            raise UsageError(
                f"{each.setting} = {each.value}: {each.reason}, but {wanted.source} requires it"
            )
        if each.setting in models_of(settings):
            raise UsageError(f"{each.setting}: this llama-server cannot be a router: {each.reason}")
        one.audience.say(f"{each.setting} = {each.value} left out: {each.reason}")
    one.result.refused = tuple(refused)
    if unknown := unknown_flag(one.request.flags, server.help):
        raise UsageError(
            f"this llama-server has no {unknown}", hint="see 'flags' of its declaration"
        )
    if one.request.check and model is None:
        one.audience.say("whether the models of a router fit is not judged: it loads them later")
    elif one.request.check and model is not None:
        left_out = {each.setting for each in refused}
        given = {name: value for name, value in settings.items() if name not in left_out}
        if remark := one.request.check(one.machine, model, desired.backend, given):
            one.audience.say(remark)
    one.result.url = url(one.request.host, port)
    arguments += [*_device_arguments(one.request, server, desired.backend), *one.request.flags]
    env = _environment(desired, one.request.caller, server.env)
    argv = (*server.program, *arguments)
    ahead = for_server(one.root, model, settings, desired.backend, one.audience.say)
    return Job(server.program[0], argv, env, model, one.result.url, ahead)


def _environment(
    desired: Desired, caller: Mapping[str, str], own: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a child of ours is started with; ``own``: what its program needs."""
    env = environment({**canonical(desired.env), **(own or {})}, caller)
    return with_tunables(env, canonical(desired.launch))


def _device_arguments(request: Request, server: Server, backend: str) -> list[str]:
    """Hold the server to the backend of the profile, where it would use another one too."""
    chosen: Backend = next(name for name in BACKENDS if name == backend)
    gpus = len(server.backends) - 1
    if gpus < 2 and (request.backend == "auto" or not gpus):
        return []
    if "--device" not in parse_help(server.help):
        return []
    return ["--device", ",".join(server.devices_of(chosen)) or "none"]


def _cores(machine: Machine, cpus: Setting) -> set[int]:
    allowed = parse_cpulist(cpus.canonical)
    lead = {cpu: core.cpus[0] for core in machine.cpu.cores for cpu in core.cpus}
    return {lead.get(cpu, cpu) for cpu in allowed}


def serve(one: Run, job: Job, desired: Desired, signals: Signals) -> int:
    """Start the job, stay with it, and give its exit code.  Nothing of it is left afterwards."""
    if early := signals.received():
        return 128 + early
    child = None
    try:
        child = start(
            job.argv,
            job.env,
            lambda pid: _place(one, pid, desired, job),
            capture=job.model is not None,
            program=job.program,
            stdout=one.request.stdout,
            before=job.prewarm,
            keep=LINE,
        )
        signals.child = child
        if late := signals.received():
            child.signal(late)
        return _attend(one, job, child, signals)
    finally:
        if child:
            child.stop(one.request.grace_s)
            forget(one.root, child.pid)
        if one.group:
            one.group.remove()


def _become_where_nothing_is_left_to_do(one: Run, job: Job, desired: Desired) -> None:
    """Become the command, placed as its child would be; only return where a group may be made.

    A group has to be removed when the command has ended.  Without one there is nothing to do
    then, and a process that sleeps until then takes memory for as long as the command serves,
    and stands between it and whoever started us: signals, the terminal.
    """
    why = why_no_group(one.root, one.machine.cgroup, canonical(desired.launch))
    if why is None:
        return
    # What it leaves word of needs nobody to take it back: whether it lasts is looked at.
    _place(one, os.getpid(), desired, job, no_group=why)
    become(job.program, job.argv, job.env)


def _place(one: Run, pid: int, desired: Desired, job: Job, *, no_group: str = "") -> None:
    outcomes, one.group = place(
        one.root, one.machine.cgroup, pid, canonical(desired.launch), no_group=no_group
    )
    outcomes += heap.placed(one.root, canonical(desired.launch), job.env, job.program)
    one.result.placed = outcomes
    one.audience.placed(outcomes)
    for each in outcomes:
        setting = desired.launch[each.id]
        if setting.required and each.outcome in ("absent", "rejected"):
            raise Failed(f"{each.id}: {each.why}, but {setting.source} requires it")
    mount = one.machine.cgroup.mount
    if mount and (group := group_of(one.root, pid)):
        there, path = urlsplit(job.url), mount + group.rstrip("/")
        # Whoever reads it asks at loopback.
        port = there.port if there.hostname == LOOPBACK else None
        note(one.root, Foreground(desired.profile, pid, path, one.group is not None, port))


def _attend(one: Run, job: Job, child: Child, signals: Signals) -> int:
    if job.model is None:
        return exit_code(child.wait())
    out = sys.stderr if one.request.shown else None
    one.result.ready_s = wait_ready(
        one.root, signals, child, job.url, job.model, out, one.request.patience_s
    )
    if one.result.ready_s is None:
        status = child.wait()
        return 128 + number if (number := signals.received()) else exit_code(status)
    one.audience.say(f"ready after {one.result.ready_s:.1f} s: {job.url}")
    for line in tuple(child.tail.kept) if child.tail else ():
        one.audience.say(line)
    chats = one.request.chats(job.model)
    try:
        if one.request.then is not None:
            return one.request.then(job, child)
        if one.request.ask is not None:
            return _ask(one, one.request.ask, job, chats=chats)
    except Failed:
        if number := signals.received():
            return 128 + number
        raise
    if child.tail:
        child.tail.echo = sys.stderr
    for line in how_to_talk(job.url, chats=chats):
        one.audience.say(line)
    one.audience.say("serving; Ctrl-C ends it and puts everything back")
    status = child.wait()
    if status and not signals.received():
        one.audience.say(f"the server stopped: {cause(status, child.last_lines())}")
    return exit_code(status)


def _ask(one: Run, question: str, job: Job, *, chats: bool | None) -> int:
    if chats is False:
        one.audience.say(COMPLETES_ONLY)
    answer = chat if chats else complete
    one.result.completion = answer(job.url, question, one.request.tokens, hear=one.audience.heard)
    one.audience.answered(one.result.completion)
    return 0
