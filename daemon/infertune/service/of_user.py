# SPDX-License-Identifier: Apache-2.0
"""Does in a user's manager what the daemon asks for (servers/of_users.py).

``of_user``, in a unit with the user's rights and no others (systemd/infertune-user@.service): it
can do nothing that the user could not.  It is started by the daemon, and with the user's manager.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Any

from infertune.base.errors import Exit, Failed, InfertuneError, UsageError
from infertune.base.notify import Notifier
from infertune.base.root import Root
from infertune.servers.adopted import Value, places_of
from infertune.servers.of_users import Answer, Request, answer_text, read_request
from infertune.service.adopting import Adopting, Manager
from infertune.service.client import Connection, Refused, peer

_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_TIMEOUT_S = 10.0
"""Of one call; the unit has two of them (TimeoutStartSec=), and one that nobody hears takes all."""


class UserManager:
    """A user's systemd, on the socket on which systemctl(1) asks it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def reload(self) -> None:
        self._call("Reload")

    async def run(self, unit: str) -> None:
        raise Failed(f"{unit} is the system's")

    async def unit(self, unit: str) -> dict[str, Any] | None:
        """Properties of a unit and of its kind; None where the manager does not know it."""
        [path] = self._call("LoadUnit", "s", unit)
        about = self._all(path, "Unit")
        if about.get("LoadState") != "loaded":
            return None
        kind = str(about["Id"]).rpartition(".")[2]
        return {**about, **self._all(path, kind.capitalize())}

    async def set_properties(self, unit: str, values: Mapping[str, Value]) -> None:
        """Change resources of a unit now, for as long as the manager runs."""
        typed = [
            (name, ("t", value) if isinstance(value, int) else ("ay", value))
            for name, value in values.items()
        ]
        self._call("SetUnitProperties", "sba(sv)", unit, True, typed)

    def _all(self, path: str, kind: str) -> dict[str, Any]:
        asked = "org.freedesktop.DBus.Properties"
        [found] = self._call("GetAll", "s", f"{_NAME}.{kind}", path=path, interface=asked)
        return dict(found)

    def _call(
        self,
        member: str,
        signature: str = "",
        *arguments: Any,
        path: str = _PATH,
        interface: str = f"{_NAME}.Manager",
    ) -> list[Any]:
        whom = (_NAME, path, interface, member)
        try:
            return self._connection.ask(whom, signature, arguments, timeout_s=_TIMEOUT_S)
        except Refused as refused:
            raise Failed(f"{member}: {refused}") from None
        except TimeoutError:
            raise Failed(f"{member}: no answer in {_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise Failed(f"{member}: no answer: {error.strerror}") from None


async def carry_out(root: Root, uid: int, manager: Manager) -> Answer:
    """Make the user's units what the daemon asks for, and say what became of it."""
    request = read_request(root, uid)
    adopting = Adopting(root, manager, places=places_of(uid))
    try:
        left = await _converge(adopting, request)
        if request.plan:
            document = await adopting.plan(request.about, request.plan.unit, request.plan.wanted)
        elif request.about in request.units:
            one = request.units[request.about]
            document = await adopting.adopt(request.about, one.unit, one.wanted)
        else:
            return Answer(request.serial, left=tuple(left))
    except InfertuneError as error:
        usage = isinstance(error, UsageError)
        return Answer(request.serial, error=error.message, usage=usage, hint=error.hint or "")
    rows = [
        (each["unit"], each["property"], each["before"], each["wanted"])
        for each in document["items"]
        if each["when"] == "now"
    ]
    return Answer(request.serial, document["active"], tuple(rows), (*document["notes"], *left))


async def _converge(adopting: Adopting, request: Request) -> list[str]:
    """Give back what is not asked for any more, and adopt what is not yet as it is asked for.

    That of one unit may fail without the others; returns sentences.
    """
    left = []
    for name in adopting.adopted().keys() - request.units.keys():
        left += await adopting.give_back(name)
    for name, one in request.units.items():
        known = adopting.adopted().get(name)
        if name == request.about or (known and known.wanted == one.wanted):
            continue
        try:
            left += (await adopting.adopt(name, one.unit, one.wanted))["notes"]
        except InfertuneError as error:
            left.append(f"{one.unit}: {error.message}")
    return left


def main() -> int:
    """``of_user``: as whom it runs says whose manager is meant."""
    uid = os.getuid()
    root = Root("/")
    try:
        connection = peer(f"unix:path=/run/user/{uid}/systemd/private")
    except (OSError, AttributeError) as error:
        print(f"<3>no manager of user {uid} answers: {error}", file=sys.stderr)
        return Exit.FAILED
    try:
        answer = asyncio.run(carry_out(root, uid, UserManager(connection)))
    except (InfertuneError, OSError) as error:
        print(f"<3>{error}", file=sys.stderr)
        return Exit.FAILED
    finally:
        connection.close()
    Notifier(os.environ).send(STATUS=answer_text(answer))
    if answer.error:
        print(f"<3>{answer.error}", file=sys.stderr)
        return Exit.FAILED
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
