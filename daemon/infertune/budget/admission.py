# SPDX-License-Identifier: Apache-2.0
"""Whether a server may start now: one at a time is judged, and promised what it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from infertune.base.errors import UsageError
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.boot.sizes import outlooks
from infertune.budget.budget import REFUSED, Budget, budget, budget_of, without
from infertune.budget.gguf_file import ModelError, read_model
from infertune.budget.settings import ServerMemory, read_memory
from infertune.budget.shape import Shape, read_shape
from infertune.host.machine import Machine
from infertune.pools.facts import PoolFacts, read_facts
from infertune.pools.promised import LOCK, OF_ROOT, reserve, with_reservations

_PATIENCE_S = 30.0
"""With another start, which is judged in well under a second."""


@contextlib.contextmanager
def turn(root: Root, *, descriptor: int | None = None) -> Iterator[bool]:
    """One start at a time is judged; yields whether it really is this one's turn alone.

    ``descriptor``: the open lock, for whoever may not open it.  Without a lock there is no turn,
    and a start goes on all the same.
    """
    with contextlib.ExitStack() as stack:
        try:
            if descriptor is None:
                root.mkdir("/run/infertune")
            alone = stack.enter_context(root.turn(LOCK, _PATIENCE_S, descriptor=descriptor))
        except OSError:  # not root's, or /run is full or may not be written
            alone = False
        yield alone


class DoesNotFit(UsageError):
    """A start was judged, and there is no room for it."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What came of asking."""

    remark: str | None
    """To be said beside the start: tight, unknown, or what is overridden by force."""
    reserved: str | None = None
    """The file of the reservation, to be removed once the server has answered or ended."""
    known: bool = True
    """Whether it could be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be started."""

    name: str
    model: str
    backend: str
    settings: Mapping[str, str]
    """Canonical server settings."""
    pid: int
    """The process that will be the engine, or its parent."""
    need: int | None = None
    """Bytes, where somebody says how much it takes; its model is not looked at then."""
    unit: str | None = None
    """What this unit holds now will have been given back by then."""
    force: bool = False
    forced_by: str = "--force"
    """How the user says so."""
    profile: str | None = None
    """Whose [boot] is looked at first for more room."""


def check(root: Root, machine: Machine, asked: Asked) -> Admission:
    """Refuse what does not fit now, without a promise.  Raises DoesNotFit."""
    if asked.need is not None:
        found = budget_of(asked.need, _facts(root, machine, asked), asked.backend)
        return Admission(_verdict(found, asked), known=found.verdict != "unknown")
    files = _files(asked)
    if isinstance(files, Admission):
        return files
    found = _judge(root, machine, *files, asked)
    return Admission(_verdict(found, asked), known=found.verdict != "unknown")


def admit(
    root: Root,
    machine: Machine,
    asked: Asked,
    directory: str = OF_ROOT,
    descriptor: int | None = None,
) -> Admission:
    """Refuse what does not fit now, and promise the rest what it needs.  Raises DoesNotFit."""
    files = _files(asked)
    if isinstance(files, Admission):
        return files
    with turn(root, descriptor=descriptor) as alone:
        found = _judge(root, machine, *files, asked)
        remark = _verdict(found, asked)
        reserved = reserve(
            root,
            directory,
            asked.name,
            asked.pid,
            gpu=found.on_gpu(),
            host=found.on_host(),
        )
    if not alone and remark:
        remark = f"{remark}; another start may take the room (it did not wait for its turn)"
    return Admission(remark, reserved)


def _files(asked: Asked) -> tuple[Shape, ServerMemory] | Admission:
    """A file that infertune cannot read is not refused: the server may know more."""
    try:
        return read_shape(read_model(asked.model)), read_memory(asked.settings)
    except ModelError as error:
        return Admission(f"whether the model fits is unknown: {error.message}", known=False)


def _judge(
    root: Root, machine: Machine, shape: Shape, memory: ServerMemory, asked: Asked
) -> Budget:
    """The budget with everything that is held and promised now."""
    facts = _facts(root, machine, asked)
    ways = outlooks(root, machine, facts, asked.profile)
    return budget(shape, memory, facts, asked.backend, ways)


def _facts(root: Root, machine: Machine, asked: Asked) -> PoolFacts:
    facts = read_facts(root, machine)
    facts = with_reservations(root, facts, asked.backend, without=asked.pid)
    own = [each for each in facts.holders if asked.unit and each.owner == asked.unit]
    return without(facts, own) if own else facts


def _verdict(found: Budget, asked: Asked) -> str | None:
    if found.verdict == "fits":
        return None
    why = "; ".join(found.reasons)
    if found.verdict in REFUSED:
        if not asked.force:
            helps = "".join(f"\n  {each.verdict} with {each.text}" for each in found.remedies)
            way = f"'infertune fit' shows the sums; {asked.forced_by} starts it all the same"
            raise DoesNotFit(f"{found.verdict}: {why}; nothing was started", hint=f"{way}{helps}")
        return f"{asked.forced_by} overrides: {found.verdict}: {why}"
    word = "whether the model fits is unknown" if found.verdict == "unknown" else found.verdict
    return f"{word}: {why}"


def release(root: Root, admission: Admission) -> None:
    """End a promise before its time: the server has answered, or was never started."""
    if admission.reserved:
        with contextlib.suppress(OSError):
            root.unlink(admission.reserved)
