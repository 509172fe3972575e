# SPDX-License-Identifier: Apache-2.0
"""Rules for every test: what needs root is skipped and said, what leaks fails."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def pytest_configure() -> None:
    """What the shell of whoever starts the tests has no say in."""
    os.environ.pop("COLUMNS", None)  # output is as wide as it says
    # A shell has its background jobs ignore these two, and every process of a test with them.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


# How long an example takes is the machine's affair, and what it finds is not.
settings.register_profile(
    "infertune", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("infertune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/ as it is now"
    )
    parser.addoption(
        "--draw",
        metavar="DIRECTORY",
        help="tests/host/test_dashboards.py: draw the dashboards (needs Chromium)",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="guests: every test on both kernels, thousands of calls, dozens of kills; hours. "
        "tests/host/test_hostile_bus.py: 100,000 messages and what was measured; minutes",
    )
    parser.addoption(
        "--real-root",
        metavar="DIRECTORY",
        help="tests/real: a root with a llama-server (scripts/real-root makes it)",
    )


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether there is time for as many rounds as tell something of rare moments."""
    found: bool = request.config.getoption("--thorough")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("root_only") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: it writes to this kernel"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one kernel go to one worker, one after the other; all others to any.

    Not by the mark ``xdist_group``: it has no effect in xdist 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByKernel(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if "/host/" in nodeid:
                return "host"
            guest = re.search(r"/vm/.*\[([67]\.\w+)", nodeid)
            if guest:
                return guest[1]
            # A file there without a kernel's name starts guests of its own.
            return nodeid.partition("::")[0] if "/vm/" in nodeid else nodeid

    return ByKernel(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _say_what_waited(terminalreporter)
    _say_what_was_skipped(terminalreporter)


def _say_what_waited(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if "real_time" in report.keywords and report.when == "call"
    ]
    if reports:
        names = sorted({report.nodeid.rpartition("::")[2].partition("[")[0] for report in reports})
        terminalreporter.line("")
        text = f"{len(reports)} tests wait for real time: {', '.join(names)}"
        for line in textwrap.wrap(text, 78, subsequent_indent="  "):
            terminalreporter.line(line)


def _say_what_was_skipped(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if not skipped:
        return
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "?"
        reason = reason.removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.section("skipped, by reason")
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        terminalreporter.line(f"{count:4}  {reason}")


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync(2) that does nothing, though it is a step as ever.

    It takes tens of milliseconds of a busy disk, and shows nothing where no power is cut.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def open_files() -> dict[int, str]:
    """Descriptors of this process and what they lead to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of this very listing is gone again.
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> set[int]:
    """Child processes of any thread (needs CONFIG_PROC_CHILDREN; else empty)."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in path.read_text().split())
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test that leaves a file open or a process behind fails."""
    files, processes = open_files(), children()
    yield
    if leaked_files(files):
        gc.collect()  # a cycle may hold the file; what is still open then is a leak
    assert not leaked_files(files), "files left open"
    assert not children() - processes, "processes left behind"


def leaked_files(before: dict[int, str]) -> dict[int, str]:
    return {
        fd: to
        for fd, to in open_files().items()
        # multiprocessing keeps its arena of shared memory for the next Value or Array.
        if before.get(fd) != to and not to.startswith("/dev/shm/pym-")
    }
