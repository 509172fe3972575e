# SPDX-License-Identifier: Apache-2.0
"""infertuned: recovers, takes its name on the bus, says READY, and then sleeps.

Nothing here wakes up by the clock: a deadline is a timer of the kernel, and
everything else is an event.  What servers do is looked at every two seconds, but
only while one is up and a profile is to follow it (load.py).  Only systemd's
watchdog, where it is on, is fed from the loop that also does the work, so that
a stuck engine is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping

from dbus_fast import BusType, DBusError, Message, MessageType, NameFlag, RequestNameReply
from dbus_fast.aio import MessageBus

from infertune import __version__
from infertune.base.errors import Exit, Failed, InfertuneError, UsageError
from infertune.base.locks import DAEMON_LOCK
from infertune.base.notify import Notifier
from infertune.base.root import Root
from infertune.profiles.config import read_config
from infertune.service.api import Manager, remember_caller
from infertune.service.authority import Authority
from infertune.service.callers import Callers
from infertune.service.demand import Demand
from infertune.service.facts import Facts
from infertune.service.guarded import GuardedBus, OwnBus
from infertune.service.keeper import Choice, Keeper, boottime
from infertune.service.load import Watch
from infertune.service.log import listen_to_libraries, log, log_debug
from infertune.service.names import BUS_NAME, OBJECT_PATH, ROOT_NAME
from infertune.service.peers import LOGIND, NAMES, TUNED, Peers
from infertune.service.power import PROVIDERS, Power
from infertune.service.serving import Serving
from infertune.service.systemd import Systemd
from infertune.service.timer import Deadline
from infertune.service.watch import (
    PowerSupplies,
    Source,
    open_udev,
    started_anew,
    worth_a_look,
)

RETRY_S = 5.0
"""Between two tries to put back what nobody confirmed."""
RETRY_DEMAND_S = 30.0
"""Between two tries to apply what servers that work want."""


class Daemon:
    """One run of infertuned."""

    def __init__(
        self,
        root: Root,
        environment: Mapping[str, str],
        devices: Callable[[Root], Source | None] = open_udev,
    ) -> None:
        self._open_devices = devices
        self._devices: Source | None = None
        self._supplies = PowerSupplies()
        self._tasks: set[asyncio.Task[None]] = set()
        self._load = Watch(root, self._servers_work)
        self._meeting: asyncio.Task[None] | None = None
        self._unmet: str | None = None
        """Why the demand could not be met the last time."""
        self._meet_from = 0.0
        """When it is tried again, on CLOCK_BOOTTIME."""
        self._retry_at = 0.0
        self._root = root
        self._environment = environment
        self._notify = Notifier(environment)
        # What is read in one step of the loop is true until its next one.
        self._facts = Facts(root, soon=lambda work: asyncio.get_running_loop().call_soon(work))
        self._keeper = Keeper(root, facts=self._facts)
        self._deadline = Deadline()
        self._over = asyncio.Event()
        self._life = contextlib.ExitStack()
        self._again = False
        """Asked to re-execute (SIGHUP): a new version takes over, and only holds end."""
        self._manager: Manager | None = None
        self._serving: Serving
        self._peers: Peers
        self._power: Power
        self._bus: MessageBus
        """Its own connection: what it asks others and hears of them, and root's calls."""
        self._public: MessageBus
        """Where everybody calls.  Whoever fills it keeps nobody but its callers waiting."""
        self._connections: dict[MessageBus, asyncio.Task[None]] = {}
        """Each with the end of it."""

    def stop(self) -> None:
        """End ``run`` with everything put back."""
        self._over.set()

    async def leave(self) -> None:
        """Let go of bus, lock and timer and put nothing back: all that a dead process does."""
        self._keeper.leave()
        self._load.close()
        for task in self._tasks:
            task.cancel()
        if self._devices:
            asyncio.get_running_loop().remove_reader(self._devices.fileno())
            self._devices = None
        for bus in self._connections:
            bus.disconnect()
        for end in self._connections.values():
            # A bus that went away says so here once more.
            with contextlib.suppress(EOFError, OSError):
                await end
        asyncio.get_running_loop().remove_reader(self._deadline.fd)
        self._deadline.close()
        self._life.close()

    async def run(self) -> bool:
        """Serve until told to stop; True to be executed again.  Raises Failed without a bus."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._execute_again)

        self._root.mkdir(DAEMON_LOCK.rpartition("/")[0])
        lock = self._life.enter_context(self._root.lock(DAEMON_LOCK, f"pid {os.getpid()}"))
        if lock is not None:
            raise UsageError(f"another infertuned is running ({lock})")
        self._notify.send(STATUS="putting right what an earlier run left")
        config = read_config(self._root)
        default = Choice(config.profile, config.backend) if config.profile else None
        self._keeper.ownership.enforce = config.enforce
        self._keeper.take_over()

        # A request at a power profiles service comes before the first write.
        await self._join_the_bus()
        applied = self._keeper.choice is not None
        at_once = default if not (applied or config.demand) else None
        async with self._power.turn(at_once):
            if at_once:
                self._keeper.become_default(at_once)
            elif default and not applied:
                self._keeper.demand_default(Demand(default, config.idle_seconds))
        self._say_problem()

        self._notify.send(STATUS="taking its name on the bus")
        await self._take_the_names()
        self._watch_devices()
        await self._look()
        loop.add_reader(self._deadline.fd, self._expired)
        watchdog = loop.create_task(self._feed_watchdog()) if self._notify.watchdog_s else None
        if self._serving.has_work():
            await self._adopt_judged()
        self._notify.send(READY=1)
        self._say_state()
        self._follow_demand()
        if self._serving.has_work():
            # Not waited for: a stop must not have to wait for a model that loads.
            starting = loop.create_task(self._start_declared())
            self._life.callback(starting.cancel)

        on_the_bus = await self._until_over()
        if watchdog:
            watchdog.cancel()
        self._load.close()
        if not on_the_bus:
            # As after a kill -9: what is applied stays, and the next one finds it in the journal.
            await self.leave()
            raise Failed("the system bus went away; what is applied stays")
        self._notify.send(**({"RELOADING": 1} if self._again else {"STOPPING": 1}))
        async with self._power.turn():
            # Whoever waits for a turn by now must not change what this one leaves behind.
            self._power.close()
            self._end()
        if not self._again:
            await self._release_all()
        await self.leave()
        return self._again

    async def _until_over(self) -> bool:
        """Wait until told to stop; False where the bus goes away first."""
        told = asyncio.get_running_loop().create_task(self._over.wait())
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({told, *self._connections.values()}, return_when=first)
            return told.done()
        finally:
            told.cancel()

    def _end(self) -> None:
        if not self._again:
            self._keeper.stop()
            return
        try:
            # The next one knows what the journal says, and would make a request for an apply.
            self._keeper.end_holds()
        except InfertuneError as error:
            log(3, error.message)

    async def _release_all(self) -> None:
        try:
            await self._serving.release_all()
        except (InfertuneError, OSError, EOFError) as error:
            log(3, f"adopted units: {error}")

    async def _adopt_judged(self) -> None:
        try:
            for problem in await self._serving.adopt_judged():
                log(3, problem)
        except (OSError, EOFError) as error:
            log(3, f"adopted units: {error}")

    async def _start_declared(self) -> None:
        for problem in await self._serving.start_declared():
            log(3, problem)
        self._load.look()

    async def _join_the_bus(self) -> None:
        self._bus = await self._connect(OwnBus)
        self._public = await self._connect(GuardedBus)
        self._peers = Peers(self._bus)
        self._power = Power(self._bus, self._peers, self._keeper)
        self._serving = Serving(self._root, Systemd(self._bus))
        self._manager = Manager(
            self._keeper,
            self._serving,
            Callers(self._bus),
            Authority(self._bus),
            self._power,
            self._peers,
            self._changed,
            self._load.look,
        )
        self._bus.add_message_handler(self._hear)
        await self._peers.start()

    async def _connect(self, kind: type[GuardedBus]) -> MessageBus:
        address = self._environment.get("DBUS_SYSTEM_BUS_ADDRESS")
        bus = await kind(bus_address=address, bus_type=BusType.SYSTEM).connect()
        end = bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        self._connections[bus] = asyncio.get_running_loop().create_task(end)
        return bus

    async def _take_the_names(self) -> None:
        assert self._manager is not None
        for bus in self._connections:
            bus.add_message_handler(remember_caller)
            bus.export(OBJECT_PATH, self._manager)
        if await self._public.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE) not in (
            RequestNameReply.PRIMARY_OWNER,
            RequestNameReply.ALREADY_OWNER,
        ):
            raise UsageError(f"{BUS_NAME} is taken: another infertuned is running")
        try:
            await self._bus.request_name(ROOT_NAME, NameFlag.DO_NOT_QUEUE)
        except DBusError:
            # Of an older version.  Root is answered all the same, in the queue with all others.
            log(
                4, f"the bus policy does not know {ROOT_NAME}: 'infertune setup' writes the new one"
            )

    # -- events ----------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        """Somebody came to the bus or left it, or one of our peers has news."""
        if message.message_type is not MessageType.SIGNAL:
            return
        moved = self._peers.moved(message)
        if moved:
            self._heard_of(*moved)
            return
        names = self._peers.names_of(message.sender)
        match message.member, message.signature:
            case "PrepareForSleep", "b" if LOGIND in names:
                going = message.body[0]
                self._later(self._keeper.sleeps if going else self._keeper.woke)
            case "profile_changed", "sbs" if TUNED in names and message.body[1]:
                profile = str(message.body[0])
                by = f"TuneD (profile {profile})" if profile.isprintable() else "TuneD"
                self._changed_by(by)
            case "ProfileReleased", "u" if message.interface in names:
                if self._power.released(str(message.interface), message.body[0]):
                    log(5, "another power profile was chosen; it is left alone")
                    self._changed_by(self._power.provider())

    def _heard_of(self, name: str, owner: str) -> None:
        if owner == "":
            self._power.provider_gone(name)
        if owner == "" and name in self._keeper.owners():
            self._later(lambda: self._keeper.owner_left(name))
        elif name in NAMES and name != LOGIND:
            self._facts.tuner_changed()
            # A power profiles service that comes is asked at the end of a turn.
            self._later(lambda: None)
            who = self._power.provider() if name in dict(PROVIDERS) else NAMES[name]
            self._changed_by(who if owner else None)

    def _changed_by(self, who: str | None) -> None:
        self._later(lambda: self._keeper.look(by=who, why="enforced"))

    def _watch_devices(self) -> None:
        try:
            self._devices = self._open_devices(self._root)
        except OSError as error:
            log(4, f"hot-plug is not watched: {error}")
        if self._devices:
            asyncio.get_running_loop().add_reader(self._devices.fileno(), self._devices_changed)
            self._facts.watch()

    def _devices_changed(self) -> None:
        assert self._devices is not None
        events = self._devices.events()
        self._facts.device_changed()
        if self._supplies.changed(events) or worth_a_look(events):
            anew = started_anew(self._root, events)
            self._later(lambda: self._keeper.look(was_reset=anew, why="hot-plug"))

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._deadline.fd, 8)
        # What cannot be put back now (somebody has the machine) is tried again, not at once.
        self._retry_at = boottime() + RETRY_S
        self._later(self._keeper.expire)

    async def _look(self) -> None:
        """What is different at start was changed while nobody watched."""
        self._later(lambda: self._keeper.look(why="enforced"))
        await asyncio.gather(*self._tasks)

    def _later(self, work: Callable[[], object]) -> None:
        """Work that no caller waits for, in its turn: what goes wrong is logged."""
        task = asyncio.get_running_loop().create_task(self._do(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, work: Callable[[], object]) -> None:
        try:
            async with self._power.turn():
                work()
        except InfertuneError as error:
            log(3, error.message)
        self._say_problem()
        assert self._manager is not None
        self._manager.tell()

    def _changed(self) -> None:
        self._say_state()
        self._follow_demand()

    def _follow_demand(self) -> None:
        if self._over.is_set():
            return
        try:
            self._load.follow(self._keeper.demand)
        except OSError as error:
            log(3, f"cannot watch whether servers work: {error.strerror}")

    def _servers_work(self, working: bool) -> None:
        """Told after each look: what is not as it should be is tried again at a later one."""
        if boottime() < self._meet_from or self._meeting is not None:
            return
        if working != self._keeper.is_met:
            self._meeting = asyncio.get_running_loop().create_task(self._meet(working))
            self._meeting.add_done_callback(self._met)
            self._tasks.add(self._meeting)

    def _met(self, task: asyncio.Task[None]) -> None:
        self._meeting = None
        self._tasks.discard(task)

    async def _meet(self, working: bool) -> None:
        demand = self._keeper.demand
        choice = demand.choice if demand else None
        why: str | None = None
        try:
            async with self._power.turn(choice if working else None):
                self._keeper.meet(working)
            about = f"{choice.profile} is " if choice else ""
            log(6, f"servers work: {about}in force" if working else f"idle: {about}taken back")
        except InfertuneError as error:
            why = error.message
        if why and why != self._unmet:
            log(3, why)
        self._unmet = why
        self._meet_from = boottime() + RETRY_DEMAND_S if why else 0.0
        self._say_problem()
        assert self._manager is not None
        self._manager.tell()

    def _say_problem(self) -> None:
        if self._power.problem:
            log(4, self._power.problem)
            self._power.problem = None

    def _say_state(self) -> None:
        """Status line of ``systemctl status``, and the timer for what waits to be confirmed."""
        choice = self._keeper.choice
        about = f": {choice.profile} ({choice.backend})" if choice else ""
        self._notify.send(STATUS=f"{self._keeper.state}{about}")
        at = self._keeper.deadline
        self._deadline.set(None if at is None else max(at, self._retry_at))

    async def _feed_watchdog(self) -> None:
        assert self._notify.watchdog_s is not None
        while True:
            self._notify.send(WATCHDOG=1)
            if self._keeper.owners():
                # Whose holder has left without a word ends at the beginning of a turn.
                self._later(lambda: None)
            await asyncio.sleep(self._notify.watchdog_s / 2)

    def _execute_again(self) -> None:
        self._again = True
        self.stop()


def main(root: Root | None = None) -> int:
    """Entry point of ``infertuned``; ``root`` is for tests."""
    if sys.argv[1:] == ["--version"]:
        print(f"infertuned {__version__}")
        return Exit.DONE
    if sys.argv[1:] not in ([], ["--debug"]):
        print("infertuned: takes --debug, --version or nothing", file=sys.stderr)
        return Exit.USAGE
    listen_to_libraries()
    if sys.argv[1:]:
        log_debug()
    try:
        again = asyncio.run(Daemon(root or Root("/"), os.environ).run())
    except InfertuneError as error:
        log(3, error.message)
        return error.exit_code
    except OSError as error:
        log(3, f"{error.strerror}: {error.filename or 'the system bus'}")
        return Exit.FAILED
    except EOFError:
        log(3, "the system bus went away")
        return Exit.FAILED
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
