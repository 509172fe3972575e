# SPDX-License-Identifier: Apache-2.0
"""A child: from an empty environment, in a group of its own, with nothing left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infertune.base.errors import Failed, UsageError
from infertune.launch.binary import ask_help
from infertune.launch.process import (
    Child,
    Signals,
    cause,
    environment,
    exit_code,
    find_program,
    start,
)

LOOK = """
import json, os, signal
print(json.dumps({
    "env": dict(os.environ), "group": os.getpgrp(), "pid": os.getpid(),
    "blocked": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    "fds": os.listdir("/proc/self/fd"),
    "nice": os.nice(0),
}))
"""


def begin(*argv: str, env: dict[str, str] | None = None) -> Child:
    return start(argv, env or {}, lambda _: None, capture=True)


def shell(script: str) -> Child:
    return begin("/bin/sh", "-c", script, env={"PATH": os.environ["PATH"]})


def test_what_a_child_is_started_with() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        child = start(
            (sys.executable, "-I", "-c", LOOK),
            {"GGML_X": "1"},
            lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 7),
            capture=True,
        )
        assert child.wait() == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    [line] = child.last_lines()
    seen = json.loads(line)
    seen["env"].pop("LC_CTYPE", None)  # Python sets it itself where the locale is C
    assert seen["env"] == {"GGML_X": "1"}
    assert seen["group"] == seen["pid"] == child.pid
    assert seen["blocked"] == []
    assert len(seen["fds"]) == 4  # 0, 1, 2 and the listing
    assert seen["nice"] == 7  # placed before its first instruction


def test_what_is_done_in_the_child_before_its_exec() -> None:
    """By the process that becomes the server, where it was placed; its word is not lost."""
    child = start(
        ("/bin/sh", "-c", "echo $$; seq 100"),
        {"PATH": os.environ["PATH"]},
        lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 7),
        capture=True,
        before=lambda: say(f"note: {os.getpid()}, nice {os.nice(0)}\n"),
        keep="note: ",
    )
    assert child.wait() == 0
    assert child.last_lines()[-1] == "100"
    assert child.tail
    assert [*child.tail.kept] == [f"note: {child.pid}, nice 7"]


def say(text: str) -> None:
    os.write(1, text.encode())


def test_a_server_inherits_no_file_of_our_caller() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    try:
        child = shell("ls /proc/$$/fd")
        child.wait()
        names = set(child.last_lines())
    finally:
        os.close(reading)
        os.close(writing)
    assert {"0", "1", "2"} <= names
    assert str(reading) not in names


def test_what_python_ignores_is_not_ignored_in_the_child() -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    child = begin("/bin/cat", "/proc/self/status")
    assert child.wait() == 0
    [ignored] = [line for line in child.last_lines() if line.startswith("SigIgn")]
    bits = int(ignored.split()[1], 16)
    assert not bits & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))


def test_the_profile_wins_over_what_passes_through() -> None:
    caller = {"PATH": "/bin", "HOME": "/h", "LD_PRELOAD": "x.so", "HIP_VISIBLE_DEVICES": "1"}
    assert environment({"HIP_VISIBLE_DEVICES": "0"}, caller) == {
        "PATH": "/bin",
        "HOME": "/h",
        "HIP_VISIBLE_DEVICES": "0",
    }
    assert environment({}, {})["PATH"]


def test_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(Failed, match=r"cannot start .*: the interpreter .* is not there"):
        begin(str(broken))
    broken.write_text("exit 0\n")
    with pytest.raises(Failed, match=r"cannot start .*: Exec format error .*#!/bin/sh"):
        begin(str(broken))
    broken.unlink()
    with pytest.raises(Failed, match=r"cannot start .*: No such file"):
        begin(str(broken))


def test_a_program_that_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program 'not-there'"):
        find_program("not-there", "/usr/bin")
    with pytest.raises(UsageError, match=r"no program '\./not-there'"):
        find_program("./not-there", "/usr/bin")
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    for path in (plain, tmp_path):
        with pytest.raises(UsageError, match=f"'{path}' may not be executed"):
            find_program(str(path), "/usr/bin")


def test_a_placement_that_fails_leaves_no_process() -> None:
    def fail(_: int) -> None:
        raise Failed("no")

    with pytest.raises(Failed, match="no"):
        start(("/bin/true",), {}, fail, capture=True)


def test_last_lines_and_status() -> None:
    child = shell("i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; done; exit 9")
    assert child.wait() == 9
    assert child.last_lines()[-1] == "line 100"
    assert len(child.last_lines()) == 40


def test_a_line_without_an_end_is_not_kept() -> None:
    """In a process of its own, whose memory is then known."""
    script = """
import resource
from infertune.launch.process import start
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
command = ("/bin/sh", "-c", "head -c 268435456 /dev/zero; echo; echo last")
child = start(command, {"PATH": "/usr/bin:/bin"}, lambda _: None, capture=True)
assert child.wait() == 0
child.tail.join()
first, last = child.tail.lines
assert (len(first), last) == (65536, "last")
print((peak() - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(found.stdout) < 32, "MiB"


def stand_in(directory: Path, script: str) -> str:
    server = directory / "llama-server"
    server.write_text(f"#!/bin/sh\n{script}\n")
    server.chmod(0o755)
    return str(server)


@pytest.mark.parametrize("script", ["yes -- --port", "head -c 268435456 /dev/zero"])
def test_an_answer_without_an_end_is_none(script: str, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="llama-server --help prints more than 1024 KiB"):
        ask_help(stand_in(tmp_path, script), os.environ, 60)


@pytest.mark.parametrize(
    "script",
    [
        "while sleep 0.05; do echo --port; done",
        "exec >&- 2>&-; exec sleep 300",
        "sleep 300 & exit 0",
    ],
)
def test_an_answer_that_does_not_end_in_time(script: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(Failed, match=r"--help gave no answer in 0\.5 s"):
        ask_help(stand_in(tmp_path, script), os.environ, 0.5)
    assert time.monotonic() - begin < 60, "it waited for what the program left behind"


def test_an_answer_is_had_whole(tmp_path: Path) -> None:
    answer = ask_help(stand_in(tmp_path, "head -c 1048570 /dev/zero"), os.environ, 60)
    assert answer == "\0" * 1048570
    assert ask_help(stand_in(tmp_path, "echo no; exit 1"), os.environ, 60) is None


def test_what_a_server_started_itself_goes_with_it(tmp_path: Path) -> None:
    child = shell(f"sleep 300 & echo $! > {tmp_path}/pid; exit 3")
    assert child.wait() == 3
    grandchild = int((tmp_path / "pid").read_text())
    assert gone(grandchild)


def test_what_left_its_session_goes_too(tmp_path: Path) -> None:
    """As a daemon does it: its parent is gone, and it is in no group of ours."""
    mine = subprocess.Popen(["/bin/sleep", "300"])
    try:
        daemon = (
            f"setsid sh -c 'echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 300'"
        )
        child = shell(f"({daemon} &) ; while [ ! -e {tmp_path}/pid ]; do sleep 0.02; done")
        assert child.wait() == 0
        assert gone(int((tmp_path / "pid").read_text()))
        assert mine.poll() is None, "what was there before is nobody's to end"
    finally:
        mine.kill()
        mine.wait()


def gone(pid: int, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # dead, and whoever adopted it has not looked yet
            return True
        time.sleep(0.02)
    return False


def test_stop_is_patient_then_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("exec sleep 300").stop() == -signal.SIGTERM
    monkeypatch.setattr("infertune.launch.process.GRACE_S", 0.2)
    child = shell("trap '' TERM; echo ready; while :; do sleep 1; done")
    assert child.tail
    while not child.tail.lines:
        time.sleep(0.01)
    assert child.stop() == -signal.SIGKILL


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_signals_go_to_the_child(number: signal.Signals) -> None:
    with Signals() as signals:
        child = signals.child = shell(
            f"trap 'exit 42' {number.name[3:]}; echo; while :; do sleep 0.05; done"
        )
        assert child.tail
        while not child.tail.lines:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        assert child.wait() == 42
    ends = number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert signals.received() == (number if ends else None)


def test_the_second_ctrl_c_kills() -> None:
    with Signals() as signals:
        child = signals.child = shell("trap '' INT; echo; while :; do sleep 0.05; done")
        assert child.tail
        while not child.tail.lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        assert child.wait_for(0.3) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert child.wait() == -signal.SIGKILL


def test_a_command_that_ignores_the_signal_is_killed_when_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infertune.launch.process.GRACE_S", 0.3)
    child = shell("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    while not (child.tail and child.tail.lines):
        time.sleep(0.02)
    with Signals() as signals:
        signals.child = child
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait() == -signal.SIGKILL
    assert signals.received() == signal.SIGTERM


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)  # no child yet: remembered, and nothing else
        assert signals.received() == signal.SIGTERM
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    assert before == after


def test_statuses_in_words() -> None:
    assert exit_code(3) == 3
    assert exit_code(-signal.SIGKILL) == 137
    assert "built for another CPU" in cause(-signal.SIGILL)
    assert "out of memory" in cause(-signal.SIGKILL, out_of_memory=True)
    assert cause(-signal.SIGKILL) == "ended by SIGKILL"
    assert "libraries" in cause(127, ["x: error while loading shared libraries: libggml.so"])
    assert cause(1) == "it ended with exit code 1"
