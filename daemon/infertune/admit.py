# SPDX-License-Identifier: Apache-2.0
"""Whether a server in a unit of somebody else's fits now.

``infertune admit NAME`` asks it, and so does every start of an adopted unit whose owner wants it
judged: as a step before ``ExecStart=``, as the unit's user, in its walls.  There only one thing
keeps a server down: that it was judged, does not fit, and is to be refused then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from infertune.base.errors import Exit, InfertuneError, UsageError
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.budget.admission import Asked, DoesNotFit, check
from infertune.budget.of_flags import Started, started
from infertune.host.machine import read_machine
from infertune.host.servers import unit_server
from infertune.profiles.resolve import assume_backend
from infertune.servers.declaration import Foreign
from infertune.servers.store import find_declaration

_PATIENCE_S = 20
"""A start does not wait longer for us: a disk that hangs is the server's to meet."""
_LINE = 8192
"""Characters; journald cuts lines at 48 KiB (LineMax= of journald.conf)."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of asking; a start that does not fit is an error instead, unless it is forced."""

    unit: str
    remark: str | None
    """What is to be said of it: tight, not known, or overridden; None where it fits."""
    known: bool
    """Whether it could be judged at all."""


def foreign(root: Root, name: str) -> Foreign:
    """The adopted unit of this name.  Raises UsageError, also for a server of ours."""
    found = find_declaration(root, name)
    if found is None:
        raise UsageError(f"no unit is adopted as '{name}'", hint="infertune servers")
    if not isinstance(found, Foreign):
        raise UsageError(
            f"infertune starts '{name}' itself, and asks whether it fits each time",
            hint=f"infertune serve, or 'infertune fit' for a model; logs: infertune logs {name}",
        )
    return found


def judge(
    root: Root, adopted: Foreign, environment: Mapping[str, str], *, force: bool = False
) -> Judged:
    """Whether a start of the unit would fit now.  Raises DoesNotFit.

    ``environment``: what the unit is known to have beside what its files say; ``force``: a misfit
    is a remark.
    """
    machine = read_machine(root)
    backend = adopted.backend if adopted.backend != "auto" else assume_backend(machine)[0]
    found = Started()
    if adopted.memory is None:
        found = started(unit_server(root, adopted.unit, environment), adopted.unit)
        if found.unknown:
            return Judged(adopted.unit, f"not judged: {found.unknown}", known=False)
    asked = Asked(
        name=adopted.name,
        model=found.model or "",
        backend="cpu" if found.on_cpu else backend,
        settings=found.settings,
        pid=os.getpid(),
        need=adopted.memory,
        unit=adopted.unit,
        force=force,
        forced_by='admission = "warn"',
        profile=adopted.profile,
    )
    admission = check(root, machine, asked)
    return Judged(adopted.unit, admission.remark, known=admission.known)


def _say(priority: int, text: str) -> None:
    """To the unit's log, where a line of its own would be an entry of any priority."""
    line = printable_line("; ".join(each.strip() for each in text.split("\n")), _LINE)
    print(f"<{priority}>infertune: {line}", file=sys.stderr, flush=True)


def _give_up(*_: object) -> None:
    _say(4, f"not judged: it was not known after {_PATIENCE_S} s")
    os._exit(Exit.DONE)


def main() -> int:
    """``admit NAME``: the step before a start of the unit that is adopted by this name."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_PATIENCE_S)
    try:
        root = Root("/")
        adopted = foreign(root, *sys.argv[1:])
        if adopted.admission is not None:
            found = judge(root, adopted, os.environ, force=adopted.admission != "refuse")
            if found.remark:
                _say(4, found.remark)
    except DoesNotFit as no:
        _say(3, f"{no.message}; {no.hint}")
        return Exit.USAGE
    except InfertuneError as error:
        _say(4, f"not judged: {error.message}")
    except Exception as bug:
        # Whatever is wrong with us, the server is its owner's.
        _say(4, f"not judged: a bug: {type(bug).__name__}")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
