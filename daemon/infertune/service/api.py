# SPDX-License-Identifier: Apache-2.0
"""The object on the bus.  Its introspection is checked in as systemd/org.infertune.Infertune1.xml.

Callers hand in names, knob ids and numbers; never a path, a command or an
environment.  Each method first asks who is calling, then what they ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any

from dbus_fast import DBusError, Message, MessageFlag, MessageType, PropertyAccess
from dbus_fast.annotations import DBusSignature
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property

from infertune import __version__
from infertune.base.errors import Failed, InfertuneError, NotPermitted, UsageError, did_you_mean
from infertune.base.names import NAME
from infertune.base.tables import shown
from infertune.catalogue.backends import BACKENDS
from infertune.catalogue.knobs import KNOBS
from infertune.engine.documents import report_document
from infertune.engine.session import ApplyFailed
from infertune.profiles.config import LONGEST_IDLE_S, SHORTEST_IDLE_S, read_config
from infertune.profiles.profile import check_name
from infertune.servers.declaration import ADMISSIONS
from infertune.servers.engines import ENGINES
from infertune.service.authority import Authority
from infertune.service.callers import Callers
from infertune.service.demand import Demand
from infertune.service.keeper import Choice, Keeper
from infertune.service.log import debug
from infertune.service.names import (
    ACTION_APPLY,
    ACTION_READ,
    ACTION_SERVE,
    ERROR,
    ERRORS,
    INTERFACE,
)
from infertune.service.peers import Peers
from infertune.service.power import Power
from infertune.service.serving import OFF, UNSAID, Asked, Serving
from infertune.service.wire import to_bus

MAX_CONFIRM_S = 24 * 3600
MAX_REASON = 200
MAX_MEMORY = 1 << 50

_caller: ContextVar[Message] = ContextVar("caller")

S = Annotated[str, DBusSignature("s")]
AS = Annotated[list[str], DBusSignature("as")]
U = Annotated[int, DBusSignature("u")]
T = Annotated[int, DBusSignature("t")]
B = Annotated[bool, DBusSignature("b")]
Document = Annotated[dict[str, Any], DBusSignature("a{sv}")]
Documents = Annotated[list[dict[str, Any]], DBusSignature("aa{sv}")]
Nothing = Annotated[None, DBusSignature("")]
Numbers = Annotated[list[float], DBusSignature("ad")]


def remember_caller(message: Message) -> None:
    """A message handler of the bus: dbus-fast does not tell a method who calls it."""
    if message.message_type is MessageType.METHOD_CALL:
        _caller.set(message)
        if message.interface != INTERFACE:
            debug(lambda: f"{message.interface}.{message.member} of {message.sender}")


def sender() -> str:
    """Unique bus name of whoever made the call that is being answered."""
    name = _caller.get().sender
    if not name:
        raise NotPermitted("the caller has no name on the bus")
    return name


class Manager(ServiceInterface):
    """org.infertune.Infertune1"""

    def __init__(
        self,
        keeper: Keeper,
        serving: Serving,
        callers: Callers,
        authority: Authority,
        power: Power,
        peers: Peers,
        changed: Callable[[], None],
        adopted: Callable[[], None],
    ) -> None:
        super().__init__(INTERFACE)
        self._keeper = keeper
        self._serving = serving
        self._callers = callers
        self._authority = authority
        self._power = power
        self._peers = peers
        self._changed = changed
        self._adopted = adopted

    @dbus_method()
    async def Plan(self, profile: S, backend: S, without: AS) -> Document:
        """What applying a profile would change."""
        with _errors():
            await self._may(ACTION_READ)
            return to_bus(self._keeper.plan(_choice(profile, backend, without)))

    @dbus_method()
    async def Verify(self, profile: S, backend: S, without: AS) -> Document:
        """Whether the machine is what a profile says."""
        with _errors():
            await self._may(ACTION_READ)
            choice = _choice(profile, backend, without)
            return to_bus(self._asking(lambda: self._keeper.verify(choice)))

    @dbus_method()
    async def Status(self) -> Document:
        """What is applied, by whom, and whether the files still hold it."""
        with _errors():
            await self._may(ACTION_READ)
            return to_bus(self._asking(self._keeper.status))

    @dbus_method()
    async def Apply(self, profile: S, backend: S, without: AS, confirm_within_s: U) -> Document:
        """Make the machine what a profile says; reverted after so many seconds if not 0.

        A failed apply answers too, with ``failed`` in its document: everything was rolled back.
        """
        with _errors():
            await self._may(ACTION_APPLY)
            if confirm_within_s > MAX_CONFIRM_S:
                raise UsageError(f"a confirmation may take {MAX_CONFIRM_S} s at the most")
            choice = _choice(profile, backend, without)
            async with self._power.turn(choice):
                return self._changing(
                    lambda: self._keeper.apply(choice, confirm_within_s=confirm_within_s or None)
                )

    @dbus_method()
    async def ApplyWhileServing(
        self, profile: S, backend: S, without: AS, idle_seconds: U
    ) -> Document:
        """Make the machine what a profile says while servers work; what that will change."""
        with _errors():
            await self._may(ACTION_APPLY)
            if not SHORTEST_IDLE_S <= idle_seconds <= LONGEST_IDLE_S:
                raise UsageError(f"idle seconds: {SHORTEST_IDLE_S} to {LONGEST_IDLE_S}")
            choice = _choice(profile, backend, without)
            demand = Demand(choice, idle_seconds)
            async with self._power.turn():
                return self._changing(lambda: self._keeper.while_serving(demand))

    @dbus_method()
    async def Revert(self) -> Document:
        """Put every original value back."""
        with _errors():
            await self._may(ACTION_APPLY)
            async with self._power.turn():
                return self._changing(self._keeper.revert)

    @dbus_method()
    async def Confirm(self) -> B:
        """Keep what was applied with a time limit; false where nothing waits for it."""
        with _errors():
            await self._may(ACTION_APPLY)
            confirmed = self._keeper.confirm()
            self.tell()
            return confirmed

    @dbus_method()
    async def Hold(self, profile: S, backend: S, reason: S) -> S:
        """Apply a profile for as long as the caller stays on the bus; returns a cookie."""
        with _errors():
            await self._may(ACTION_APPLY)
            if len(reason) > MAX_REASON or not reason.isprintable():
                raise UsageError(f"a reason is at most {MAX_REASON} printable characters")
            owner, choice = sender(), _choice(profile, backend, [])
            async with self._power.turn(choice):
                try:
                    cookie = self._keeper.hold(owner, choice, reason)
                    # Whoever left while polkit or a power profiles service was asked was told of
                    # before there was a hold to end.
                    if not await self._peers.is_there(owner):
                        self._keeper.owner_left(owner)
                    return cookie
                finally:
                    self.tell()

    @dbus_method()
    async def Release(self, cookie: S) -> Nothing:
        """End a hold of the caller."""
        with _errors():
            await self._may(ACTION_APPLY)
            owner = sender()
            async with self._power.turn():
                try:
                    self._keeper.release(owner, cookie)
                finally:
                    self.tell()

    @dbus_method()
    async def Serve(self, name: S) -> S:
        """Start a declared server under its profile; returns its unit."""
        with _errors():
            await self._may(ACTION_SERVE)
            _server_name(name)
            declared = self._serving.declared(name)
            if self._keeper.choice is None and self._keeper.demand is None:
                choice = Choice(declared.profile, declared.backend)
                async with self._power.turn(choice):
                    failed = self._changing(lambda: self._keeper.apply(choice)).get("failed")
                if failed:
                    raise Failed(failed.value)
            return await self._serving.serve(name)

    @dbus_method()
    async def Stop(self, name: S) -> Nothing:
        """Stop a server and forget what was written for it."""
        with _errors():
            await self._may(ACTION_SERVE)
            _server_name(name)
            await self._serving.stop(name)

    @dbus_method()
    async def PlanAdoption(self, unit: S, user: S, name: S, profile: S, backend: S) -> Document:
        """What adopting a unit would change."""
        with _errors():
            # It is looked at by a unit that runs as the user: nothing for everybody.
            await self._may(ACTION_SERVE if user else ACTION_READ)
            choice = self._adoption(name, profile, backend)
            return to_bus(await self._serving.plan_adoption(name, unit, choice, user or None))

    @dbus_method()
    async def Adopt(self, unit: S, user: S, name: S, profile: S, backend: S) -> Document:
        """Put a unit that infertune did not make under a profile.

        ``user`` is the name or number of whose manager has it, or empty for the system's.  An
        empty profile is the one that is applied, or else the daemon's default.
        """
        with _errors():
            await self._may(ACTION_SERVE)
            choice = self._adoption(name, profile, backend)
            return await self._adopt(unit, user, name, choice, UNSAID)

    @dbus_method()
    async def AdoptWith(
        self,
        unit: S,
        user: S,
        name: S,
        profile: S,
        backend: S,
        port: U,
        engine: S,
        admission: S,
        memory: T,
    ) -> Document:
        """Adopt, and say more of it; 0 and empty are not said.

        ``port`` and ``engine``: what answers where.  ``admission``: what becomes of a start that
        does not fit, which takes ``memory`` bytes if the unit does not show it.  A method of its
        own: clients of the version before call Adopt as it was.
        """
        with _errors():
            await self._may(ACTION_SERVE)
            choice = self._adoption(name, profile, backend)
            asked = _asked(port, engine, admission, memory)
            return await self._adopt(unit, user, name, choice, asked)

    @dbus_method()
    async def PlanAdoptionWith(
        self,
        unit: S,
        user: S,
        name: S,
        profile: S,
        backend: S,
        port: U,
        engine: S,
        admission: S,
        memory: T,
    ) -> Document:
        """What adopting a unit so would change."""
        with _errors():
            await self._may(ACTION_SERVE if user else ACTION_READ)
            choice = self._adoption(name, profile, backend)
            asked = _asked(port, engine, admission, memory)
            found = self._serving.plan_adoption(name, unit, choice, user or None, asked=asked)
            return to_bus(await found)

    @dbus_method()
    async def GiveBack(self, name: S) -> Document:
        """Make an adopted unit what it was."""
        with _errors():
            await self._may(ACTION_SERVE)
            _server_name(name)
            try:
                return to_bus(await self._serving.release(name))
            finally:
                self._adopted()

    @dbus_method()
    async def Servers(self) -> Documents:
        """Every declared or running server."""
        with _errors():
            await self._may(ACTION_READ)
            return [to_bus(each) for each in await self._serving.servers()]

    @dbus_property(access=PropertyAccess.READ)
    def Version(self) -> S:
        return __version__

    @dbus_property(access=PropertyAccess.READ)
    def State(self) -> S:
        return str(self._keeper.state)

    @dbus_property(access=PropertyAccess.READ)
    def Profile(self) -> S:
        choice = self._keeper.choice
        return choice.profile if choice else ""

    @dbus_property(access=PropertyAccess.READ)
    def Backend(self) -> S:
        choice = self._keeper.choice
        return choice.backend if choice else ""

    @dbus_property(access=PropertyAccess.READ)
    def ConfirmBy(self) -> Numbers:
        """CLOCK_BOOTTIME in seconds; empty where nothing waits for a confirmation."""
        deadline = self._keeper.deadline
        return [] if deadline is None else [deadline]

    @dbus_property(access=PropertyAccess.READ)
    def Drift(self) -> AS:
        """Knobs that another program changed, or whose files are gone, as of the last look."""
        return self._keeper.ownership.knobs

    def tell(self) -> None:
        """Let everybody know the properties as they are now, and the daemon that they changed."""
        self._changed()
        self.emit_properties_changed(
            {
                "State": self._keeper.state,
                "Profile": self._keeper.choice.profile if self._keeper.choice else "",
                "Backend": self._keeper.choice.backend if self._keeper.choice else "",
                "ConfirmBy": [] if self._keeper.deadline is None else [self._keeper.deadline],
                "Drift": self._keeper.ownership.knobs,
            }
        )

    async def _adopt(
        self, unit: str, user: str, name: str, choice: Choice, asked: Asked
    ) -> dict[str, Any]:
        try:
            found = await self._serving.adopt(name, unit, choice, user or None, asked=asked)
            return to_bus(found)
        finally:
            self._adopted()

    def _adoption(self, name: str, profile: str, backend: str) -> Choice:
        """What a unit is put under.  Raises UsageError, also where no profile is known."""
        _server_name(name)
        if profile:
            return _choice(profile, backend, [])
        applied = self._keeper.choice
        default = applied.profile if applied else read_config(self._keeper.root).profile
        if default is None:
            raise UsageError("no profile is applied", hint="--profile says which one to use")
        return _choice(default, backend, [])

    async def _may(self, action: str) -> None:
        """Return when it is this call's turn and its caller may; Busy and NotPermitted if not."""
        flags = _caller.get().flags
        uid: int | None = None
        task = asyncio.current_task()
        assert task is not None
        call = f"{_caller.get().member} of {sender()}"
        task.add_done_callback(
            lambda task: debug(lambda: f"{call}, uid {'?' if uid is None else uid}: {_end(task)}")
        )
        uid = await self._callers.begin(sender())
        interactive = bool(flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
        await self._authority.check(sender(), uid, action, interactive=interactive)
        if action == ACTION_READ and uid != 0:
            await self._callers.read()

    def _asking(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What somebody asked for; drift that was found by it is told to everybody."""
        before = self._keeper.ownership.knobs
        document = work()
        if self._keeper.ownership.knobs != before:
            self.tell()
        return document

    def _changing(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return to_bus(work())
        except ApplyFailed as failed:
            return to_bus(
                {**report_document(failed.report), "failed": failed.message, "hint": failed.hint}
            )
        finally:
            self.tell()


def _end(task: asyncio.Task[object]) -> str:
    """How a call ended, in a few words."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, DBusError):
        return f"{error.type}: {error.text}"
    return "cancelled" if task.cancelled() else str(error or "done")


def _server_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError("not a server name", hint=f"a name matches {NAME.pattern}")


def _asked(port: int, engine: str, admission: str = "", memory: int = 0) -> Asked:
    """What the caller says of an adopted server.  Raises UsageError for what cannot be."""
    if port > 65535:
        raise UsageError("not a port: 1 to 65535")
    if engine and engine not in ENGINES:
        raise UsageError("not an engine", hint=f"one of {', '.join(ENGINES)}")
    if admission and admission not in (OFF, *ADMISSIONS):
        raise UsageError("not an admission", hint=f"one of {OFF}, {', '.join(ADMISSIONS)}")
    if memory > MAX_MEMORY:
        raise UsageError("no machine has so much memory")
    return Asked(port or None, engine or None, admission or None, memory or None)


def _choice(profile: str, backend: str, without: list[str]) -> Choice:
    """What the caller asks for, if it is made of names that exist."""
    check_name(profile)
    if backend not in ("auto", *BACKENDS):
        raise UsageError("not a backend", hint=f"one of auto, {', '.join(BACKENDS)}")
    if len(without) > len(KNOBS) or any(knob not in KNOBS for knob in without):
        unknown = [knob for knob in without if knob not in KNOBS] or without
        near = did_you_mean(unknown[0][:80], KNOBS) or "; see 'infertune knobs'"
        raise UsageError(f"there is no such knob to leave out: {shown(unknown[0])}{near}")
    return Choice(profile, backend, tuple(without))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors as the bus names them, in one line; never a traceback."""
    try:
        yield
    except InfertuneError as error:
        name = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
        text = f"{error.message}\n{error.hint}" if error.hint else error.message
        raise DBusError(f"{ERROR}.{name}", text) from None
    except OSError as error:
        raise DBusError(f"{ERROR}.Failed", f"{error.strerror}") from None
    except DBusError:
        raise
    except Exception as bug:
        raise DBusError(f"{ERROR}.Failed", f"a bug: {type(bug).__name__}") from bug
