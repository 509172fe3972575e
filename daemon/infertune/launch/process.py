# SPDX-License-Identifier: Apache-2.0
"""One child process: started from nothing, never left behind.

The child gets an empty environment plus what it is given, the default signal
mask, a process group of its own, and SIGKILL when infertune dies, however it
dies.  It waits before its exec until the caller has placed it (cgroup, CPUs,
limits), so that its first page is already charged to the right group.

While it runs, infertune adopts what it leaves without a parent (PR_SET_CHILD_SUBREAPER), so
that a process that put itself into another session ends with it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from infertune.base.errors import Failed, UsageError
from infertune.base.root import Root
from infertune.host.processes import children

PASSED_THROUGH = (
    "PATH",
    "HOME",
    "LANG",
    "TERM",
    "TMPDIR",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
)
"""Variables of the caller that reach the child: where things are, which GPU to use, and what the C
library is told.

Anything else is given by the profile, or in the command: ``-- env HF_HOME=/models vllm ...``.
"""

GRACE_S = 10.0
"""Time to stop after SIGINT or SIGTERM before SIGKILL."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_TAIL_LINES = 40
_KEPT_LINES = 4
_LONGEST = 64 * 1024
"""Characters of a line that are kept; what a server prints has no bound of its own."""

_libc = ctypes.CDLL(None, use_errno=True)


def environment(given: Mapping[str, str], caller: Mapping[str, str]) -> dict[str, str]:
    """What a child is started with: ``given`` by the profile, before what passes through."""
    passed = {name: caller[name] for name in PASSED_THROUGH if name in caller}
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", **passed, **given}


def find_program(name: str, path: str | None) -> str:
    """Where ``name`` is on the search path ``path``.  Raises UsageError."""
    found = shutil.which(name, path=path)
    if found is None and "/" in name and os.path.exists(name):
        raise UsageError(f"'{name}' may not be executed, or is not a file", hint="see 'ls -ld'")
    if found is None:
        raise UsageError(f"no program '{name}'", hint="give its path, or add its directory to PATH")
    return os.path.abspath(found)


class Tail(threading.Thread):
    """Reads what a child prints: keeps the last lines, and can pass them on."""

    def __init__(self, fd: int, keep: str | None = None) -> None:
        """``keep``: what lines begin with that are not to be lost among many."""
        super().__init__(daemon=True)
        self._file = os.fdopen(fd, encoding="utf-8", errors="replace")
        self.lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self.kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._keep = keep
        self.echo: TextIO | None = None
        self.start()

    def run(self) -> None:
        with self._file:
            begins = True
            while part := self._file.readline(_LONGEST):
                if begins:
                    self.lines.append(part.rstrip("\n"))
                    if self._keep and part.startswith(self._keep):
                        self.kept.append(self.lines[-1])
                begins = part.endswith("\n")
                if self.echo:
                    with contextlib.suppress(OSError):
                        self.echo.write(part)
                        self.echo.flush()


class Child:
    """A started process.  Signals go to its whole process group."""

    def __init__(
        self, pid: int, tail: Tail | None, owns_terminal: bool, others: Iterable[int] = ()
    ) -> None:
        """``others``: children that we had before."""
        self.pid = pid
        self._others = frozenset(others)
        self.tail = tail
        self.status: int | None = None
        """None while it runs, then its exit code, or minus the signal that ended it."""
        self._owns_terminal = owns_terminal

    def poll(self) -> int | None:
        """The status, without waiting."""
        if self.status is None:
            self._look(os.WNOHANG)
        return self.status

    def wait(self) -> int:
        """Wait for the end and give the status.  Signal handlers run meanwhile."""
        while self.status is None:
            self._look(0)
        return self.status

    def wait_for(self, seconds: float) -> int | None:
        """The status if it ends within ``seconds``, else None."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.status

    def signal(self, number: int) -> None:
        """Send a signal to the process group; one that is gone is fine."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def stop(self, grace_s: float = GRACE_S) -> int:
        """SIGTERM, so many seconds of patience, then SIGKILL.  Gives the status."""
        self.signal(signal.SIGTERM)
        if self.wait_for(grace_s) is None:
            self.signal(signal.SIGKILL)
        status = self.wait()
        if self.tail:
            self.tail.join(1)
        return status

    def last_lines(self) -> list[str]:
        """The end of what it printed, once it has ended."""
        if self.tail is None:
            return []
        self.tail.join(1)
        return list(self.tail.lines)

    def _look(self, options: int) -> None:
        state = os.WEXITED | os.WSTOPPED | os.WNOWAIT | options
        found = os.waitid(os.P_PID, self.pid, state)
        if found is None:
            return
        if found.si_code == os.CLD_STOPPED:
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG)
            self._suspend()
            return
        # A server's own children must not live on with the memory they hold.  Before the
        # process is reaped, as long as the number of its group cannot be anybody else's.
        self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        while adopted := frozenset(_children()) - self._others:
            for each in adopted:
                os.kill(each, signal.SIGKILL)  # not reaped yet, so the number is still its own
                os.waitpid(each, 0)
        _adopt(False)
        if self._owns_terminal:
            _give_terminal(os.getpgrp())

    def _suspend(self) -> None:
        """Ctrl-Z in a command that has the terminal: stop with it, continue with it."""
        if not self._owns_terminal:
            return
        _give_terminal(os.getpgrp())
        os.kill(os.getpid(), signal.SIGSTOP)
        _give_terminal(self.pid)
        self.signal(signal.SIGCONT)


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    place: Callable[[int], None],
    *,
    capture: bool,
    program: str | None = None,
    stdout: int = 1,
    before: Callable[[], None] | None = None,
    keep: str | None = None,
) -> Child:
    """Start ``program`` (``argv[0]`` if not given); ``place(pid)`` runs before its exec, and then
    ``before()`` in the child itself.  ``keep``: as a Tail has it.

    With ``capture`` it reads nothing and its output goes to a Tail; without, it
    has our terminal like a shell's command, and ``stdout`` is its standard output.
    Raises Failed where it cannot be executed.
    """
    parent = os.getpid()
    others = _children()
    _adopt(True)
    gate_read, gate = os.pipe()
    error_read, error = os.pipe()
    output_read, output = os.pipe() if capture else (-1, -1)
    pid = os.fork()
    if pid == 0:
        os.close(gate)
        stdio = (None, output, output) if capture else (0, stdout, 2)
        _become(program or argv[0], argv, env, parent, gate_read, error, stdio, before)
    os.close(gate_read)
    os.close(error)
    tail = None
    if capture:
        os.close(output)
        tail = Tail(output_read, keep)
    with contextlib.suppress(OSError):  # the child does the same; either may be first
        os.setpgid(pid, pid)
    owns_terminal = not capture and _has_terminal()
    try:
        place(pid)
        if owns_terminal:
            _give_terminal(pid)
        os.write(gate, b"x")
        failure = os.read(error_read, 16)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _adopt(False)
        raise
    finally:
        os.close(gate)
        os.close(error_read)
    child = Child(pid, tail, owns_terminal, others)
    if failure:
        child.wait()
        raise _not_started(program or argv[0], int(failure))
    return child


def become(program: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Go on as ``program`` in this very process.  Raises Failed where it cannot be executed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _reset_signals()
    try:
        os.execve(program, list(argv), dict(env))
    except OSError as error:
        raise _not_started(program, error.errno or errno.ENOEXEC) from error


def _not_started(program: str, number: int) -> Failed:
    """Why execve(2) refused a program, whose path was found before."""
    why = os.strerror(number)
    if number == errno.ENOENT and os.path.exists(program):
        why = "the interpreter or loader that it names is not there"
    elif number == errno.ENOEXEC:
        why += " (a script needs a first line such as #!/bin/sh)"
    return Failed(f"cannot start {program}: {why}")


def _reset_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and inherited
        signal.signal(number, signal.SIG_DFL)


def _become(
    program: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    parent: int,
    gate: int,
    error: int,
    stdio: tuple[int | None, int, int],
    before: Callable[[], None] | None,
) -> NoReturn:
    """In the child, up to its exec: wait at ``gate``, or tell ``error`` the errno."""
    try:
        os.setpgid(0, 0)
        _reset_signals()
        # SIGKILL: nobody is left who could be patient with a server that ignores anything less.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent or not os.read(gate, 1):
            os._exit(1)  # infertune is gone
        stdin, stdout, stderr = stdio
        if stdin is None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        if stdin is None:
            # A server has no use for what our caller left open; a command may be meant to have it.
            os.closerange(3, error)
            os.closerange(error + 1, os.sysconf("SC_OPEN_MAX"))
        if before:
            before()
        os.execve(program, list(argv), dict(env))
    except OSError as failure:
        os.write(error, str(failure.errno).encode())
    finally:
        os._exit(127)


def _adopt(on: bool) -> None:
    """Whether we become the parent of what our children leave behind, instead of init."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _children() -> tuple[int, ...]:
    return children(Root("/"), os.getpid())


def _has_terminal() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _give_terminal(group: int) -> None:
    """Make ``group`` the terminal's foreground group; we may be in the background ourselves."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, group)
    signal.signal(signal.SIGTTOU, before)


class Signals:
    """While in force, signals to infertune go to its child; a second one ends it.

    Before there is a child a signal is only remembered, so that a change of the
    machine is never cut in the middle.
    """

    _INSISTING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
    _ENDING = (*_INSISTING, signal.SIGHUP)
    _PASSED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._received: int | None = None
        self.child: Child | None = None
        self._before: dict[int, Any] = {}

    def received(self) -> int | None:
        """The first signal that asked for the end, if there was one."""
        return self._received

    def __enter__(self) -> Signals:
        for number in self._PASSED:
            # A SIGHUP that nohup has us ignore stays ignored, for the child too.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._pass_on)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._out_of_patience)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        again = self._received is not None and number in self._INSISTING
        if number in self._ENDING:
            self._received = self._received or number
        if self.child is None:
            return
        self.child.signal(signal.SIGKILL if again else number)
        if number in self._ENDING and not again:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def _out_of_patience(self, _number: int, _frame: FrameType | None) -> None:
        if self.child:
            self.child.signal(signal.SIGKILL)


def exit_code(status: int) -> int:
    """A child's status as a shell would report it: 128+N after signal N."""
    return 128 - status if status < 0 else status


def cause(status: int, lines: Sequence[str] = (), *, out_of_memory: bool = False) -> str:
    """Why a process ended, in words."""
    if status >= 0:
        if any("error while loading shared libraries" in line for line in lines):
            return (
                "its libraries were not found (it starts with an empty environment; "
                "install them where the loader looks, or use '-- env LD_LIBRARY_PATH=... ')"
            )
        return f"it ended with exit code {status}"
    if -status == signal.SIGILL:
        return "illegal instruction: its CPU backend was built for another CPU"
    if -status == signal.SIGKILL and out_of_memory:
        return "killed by the kernel: out of memory"
    return f"ended by {signal.Signals(-status).name}"
