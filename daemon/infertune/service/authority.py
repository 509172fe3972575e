# SPDX-License-Identifier: Apache-2.0
"""Who may do what: polkit decides, about the sender's bus name, and any doubt is a no.

Never about a process id: between the look-up and the check it can be somebody
else's (CVE-2025-67859 in TLP, CVE-2013-4288 in polkit's own API).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator

from dbus_fast import Variant
from dbus_fast.aio import MessageBus

from infertune.base.errors import Busy, NotPermitted
from infertune.service.calls import Questions, Remote

_ALLOW_INTERACTION = 1
_TIMEOUT_S = 5.0
_INTERACTION_TIMEOUT_S = 120.0
"""A person may have to type a password."""

MAX_PROMPTS_OF_ONE = 4
MAX_PROMPTS = 16
"""Prompts that wait for a person, of one user and of all."""
MAX_QUESTIONS = 64
"""Questions that polkit has not answered: twice as many as there are calls at a time
(callers.py), half as many as the bus lets a connection have."""

_POLKIT = Remote(
    "org.freedesktop.PolicyKit1",
    "/org/freedesktop/PolicyKit1/Authority",
    "org.freedesktop.PolicyKit1.Authority",
)


class Authority:
    """Asks polkit on behalf of the callers of one bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._polkit = Questions(bus, _POLKIT, MAX_QUESTIONS)
        self._prompts: Counter[int] = Counter()
        """By user, not by connection: anybody can have many of those."""
        self._numbers = itertools.count(1)

    async def check(self, sender: str, uid: int, action: str, *, interactive: bool = False) -> None:
        """Return if ``sender`` may do ``action``; raises NotPermitted, Busy for too many prompts.

        Root is allowed by its uid, as the bus vouches for it, so that a machine
        without polkit stays usable; everybody else needs polkit's yes.
        """
        if uid == 0:
            return
        try:
            # Most answers need no person, and must not wait for a free prompt.
            allowed, challenge = await self._ask_polkit(sender, action)
            if interactive and challenge and not allowed:
                with self._prompt(uid):
                    allowed = await self._ask_a_person(sender, action)
        except Busy:
            raise
        except Exception as doubt:
            raise NotPermitted(f"{action}: not authorized (polkit gave no answer)") from doubt
        if not allowed:
            raise NotPermitted(f"{action}: not authorized")

    @contextlib.contextmanager
    def _prompt(self, uid: int) -> Iterator[None]:
        if self._prompts[uid] >= MAX_PROMPTS_OF_ONE or self._prompts.total() >= MAX_PROMPTS:
            raise Busy("too many questions wait for a password already; answer those first")
        self._prompts[uid] += 1
        try:
            yield
        finally:
            self._prompts[uid] -= 1
            self._prompts += Counter()  # forgets whoever has none left

    async def _ask_a_person(self, sender: str, action: str) -> bool:
        name = f"infertune-{next(self._numbers)}"
        try:
            return (await self._ask_polkit(sender, action, name))[0]
        except TimeoutError:
            # polkit would go on waiting, and the bus for its answer.
            with contextlib.suppress(Exception):
                cancel = "CancelCheckAuthorization"
                await self._polkit.call(cancel, "s", name, timeout_s=_TIMEOUT_S)
            raise

    async def _ask_polkit(self, sender: str, action: str, prompt: str = "") -> tuple[bool, bool]:
        """Whether ``sender`` may, and whether a person could change a no.

        ``prompt`` is a name for a question that a person may be asked.
        """
        reply = await self._polkit.call(
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            ("system-bus-name", {"name": Variant("s", sender)}),
            action,
            {},
            _ALLOW_INTERACTION if prompt else 0,
            prompt,
            timeout_s=_INTERACTION_TIMEOUT_S if prompt else _TIMEOUT_S,
        )
        if reply.signature != "(bba{ss})":
            raise ValueError("polkit gave an answer of another shape")
        allowed, challenge, _ = reply.body[0]
        # Exactly True: nothing that is merely true-like opens the door.
        return allowed is True, challenge is True
