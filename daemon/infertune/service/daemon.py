# SPDX-License-Identifier: Apache-2.0
"""infertuned: recovers, takes its name on the bus, says READY, and then sleeps.

Nothing here wakes up by the clock: a deadline is a timer of the kernel, and
everything else is an event.  Only systemd's watchdog, where it is on, is fed
from the loop that also does the work, so that a stuck engine is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbus_fast import BusType, Message, MessageType, NameFlag, RequestNameReply
from dbus_fast.aio import MessageBus

from infertune import __version__
from infertune.engine import DAEMON_LOCK
from infertune.errors import Exit, InfertuneError, UsageError
from infertune.notify import Notifier
from infertune.root import Root
from infertune.service.api import Manager, remember_caller
from infertune.service.authority import Authority
from infertune.service.declared import declared_names
from infertune.service.keeper import Choice, Keeper
from infertune.service.names import BUS_NAME, NAME, OBJECT_PATH
from infertune.service.servers import DECLARED
from infertune.service.serving import Serving
from infertune.service.systemd import Systemd
from infertune.service.timer import Deadline

CONFIG = "/etc/infertune/infertuned.toml"


@dataclass(frozen=True, slots=True)
class Config:
    """/etc/infertune/infertuned.toml."""

    profile: str | None = None
    """Applied at start; None to start idle."""
    backend: str = "auto"
    enforce: bool = False
    """Whether a value that somebody else changed is set again after resume or hot-plug."""


def read_config(root: Root) -> Config:
    """The daemon's settings; a missing file is all defaults.  Raises UsageError."""
    text = root.get(CONFIG)
    if text is None:
        return Config()
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{CONFIG}: {error}") from None
    kinds: dict[str, type] = {"profile": str, "backend": str, "enforce": bool}
    for key, value in found.items():
        if key not in kinds:
            raise UsageError(f"{CONFIG}: unknown key '{key}'; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise UsageError(f"{CONFIG}: {key} must be a {kinds[key].__name__}")
    config = Config(**found)
    if config.profile is not None and not NAME.fullmatch(config.profile):
        raise UsageError(f"{CONFIG}: profile is not a profile name")
    return config


class Daemon:
    """One run of infertuned."""

    def __init__(self, root: Root, environment: Mapping[str, str]) -> None:
        self._root = root
        self._environment = environment
        self._notify = Notifier(environment)
        self._keeper = Keeper(root)
        self._deadline = Deadline()
        self._over = asyncio.Event()
        self._life = contextlib.ExitStack()
        self._again = False
        """Asked to re-execute (SIGHUP): a new version takes over, nothing is touched."""
        self._manager: Manager | None = None
        self._serving: Serving
        self._bus: MessageBus | None = None

    def stop(self) -> None:
        """End ``run`` with everything put back."""
        self._over.set()

    async def leave(self) -> None:
        """Let go of bus, lock and timer and put nothing back: all that a dead process does."""
        self._keeper.leave()
        if self._bus:
            self._bus.disconnect()
            await self._bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        asyncio.get_running_loop().remove_reader(self._deadline.fd)
        self._deadline.close()
        self._life.close()

    async def run(self) -> bool:
        """Serve until told to stop; True to be executed again."""
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
        self._keeper.start(default)

        self._notify.send(STATUS="taking its name on the bus")
        await self._take_the_bus()
        loop.add_reader(self._deadline.fd, self._expired)
        watchdog = loop.create_task(self._feed_watchdog()) if self._notify.watchdog_s else None
        self._notify.send(READY=1)
        self._say_state()
        if declared_names(self._root, DECLARED):
            for problem in await self._serving.start_declared():
                log(3, problem)

        await self._over.wait()
        if watchdog:
            watchdog.cancel()
        self._notify.send(**({"RELOADING": 1} if self._again else {"STOPPING": 1}))
        if not self._again:
            self._keeper.stop()
        await self.leave()
        return self._again

    async def _take_the_bus(self) -> None:
        address = self._environment.get("DBUS_SYSTEM_BUS_ADDRESS")
        self._bus = await MessageBus(bus_address=address, bus_type=BusType.SYSTEM).connect()
        self._serving = Serving(self._root, Systemd(self._bus))
        self._manager = Manager(self._keeper, self._serving, Authority(self._bus), self._say_state)
        self._bus.add_message_handler(remember_caller)
        self._bus.add_message_handler(self._hear)
        self._bus.export(OBJECT_PATH, self._manager)
        await self._bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="AddMatch",
                signature="s",
                body=["type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged'"],
            )
        )
        if await self._bus.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE) not in (
            RequestNameReply.PRIMARY_OWNER,
            RequestNameReply.ALREADY_OWNER,
        ):
            raise UsageError(f"{BUS_NAME} is taken: another infertuned is running")

    def _hear(self, message: Message) -> None:
        """Somebody left the bus: their holds end."""
        if message.message_type is not MessageType.SIGNAL or message.member != "NameOwnerChanged":
            return
        if message.sender != "org.freedesktop.DBus" or len(message.body) != 3:
            return
        name, _, new_owner = message.body
        if new_owner == "" and name in self._keeper.owners():
            self._do(lambda: self._keeper.owner_left(name))

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._deadline.fd, 8)
        self._do(self._keeper.expire)

    def _do(self, work: Any) -> None:
        """Work that no caller waits for: what goes wrong is logged."""
        try:
            work()
        except InfertuneError as error:
            log(3, error.message)
        assert self._manager is not None
        self._manager.tell()

    def _say_state(self) -> None:
        """Status line of ``systemctl status``, and the timer for what waits to be confirmed."""
        choice = self._keeper.choice
        about = f": {choice.profile} ({choice.backend})" if choice else ""
        self._notify.send(STATUS=f"{self._keeper.state}{about}")
        self._deadline.set(self._keeper.deadline)

    async def _feed_watchdog(self) -> None:
        assert self._notify.watchdog_s is not None
        while True:
            self._notify.send(WATCHDOG=1)
            await asyncio.sleep(self._notify.watchdog_s / 2)

    def _execute_again(self) -> None:
        self._again = True
        self.stop()


def log(priority: int, text: str) -> None:
    """One line for the journal, with its priority (sd-daemon(3))."""
    print(f"<{priority}>{text}", file=sys.stderr, flush=True)


def main() -> int:
    """Entry point of ``infertuned``."""
    if sys.argv[1:] == ["--version"]:
        print(f"infertuned {__version__}")
        return int(Exit.DONE)
    if sys.argv[1:]:
        print("infertuned: takes no arguments; see infertuned.service", file=sys.stderr)
        return int(Exit.USAGE)
    try:
        again = asyncio.run(Daemon(Root("/"), os.environ).run())
    except InfertuneError as error:
        log(3, error.message)
        return int(error.exit_code)
    except OSError as error:
        log(3, f"{error.strerror}: {error.filename or 'the system bus'}")
        return int(Exit.FAILED)
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
