# SPDX-License-Identifier: Apache-2.0
"""``infertune bench`` on this kernel, with servers whose speed is known.

How many samples count is this machine's affair: nothing here depends on it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infertune.cli.main import main
from infertune.launch.binary import ask_server
from infertune.launch.client import healthy
from infertune.measure.conditions import Between
from infertune.measure.trial import MOST_TOKENS
from run_support import FAKE, Runner, alive, wait_until

ENDLESS = ("--tokens", "99999", "--token-s", "0.002")
"""The server ends no answer by itself."""
QUICK = ("--busy", "--force", "--depths", "0", "--samples", "3", "--tokens", "8")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one = Runner(tmp_path)
    yield one
    one.close()


def bench(runner: Runner, *words: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = runner.infertune("bench", "--json", *words)
    return code, json.loads(out) if out else {}, err


def samples(runner: Runner) -> list[dict[str, Any]]:
    found = sorted(runner.directory.glob("state/infertune/measurements/*/*/*/samples.jsonl"))
    return [json.loads(line) for path in found for line in path.read_text().splitlines()]


@contextlib.contextmanager
def running(*behaviour: str) -> Iterator[tuple[str, int]]:
    """A server that somebody else runs: where it is, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    words = [sys.executable, "-I", str(FAKE), *behaviour, "--", "--host", "127.0.0.1"]
    with subprocess.Popen([*words, "--port", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: healthy(f"http://127.0.0.1:{port}"))
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.kill()


def test_a_server_of_ours_is_measured_and_ended(runner: Runner) -> None:
    server = runner.server(*ENDLESS, "--prompt-token-s", "0.00005", "--ignore-sigterm")
    words = ("--server", server, "--parallel", "1,2")
    code, found, err = bench(runner, str(runner.model), *QUICK, *words)
    assert code in (0, 3), err
    assert [(each["depth"], each["slots"]) for each in found["rows"]] == [(0, 1), (0, 2)]
    assert found["model"]["name"] == "model.gguf"
    assert found["profile"] is None
    kept = samples(runner)
    assert len(kept) == sum(each["kept"] + each["discarded"] for each in found["rows"])
    numbers = [number for each in kept for number in each["prompts"]]
    assert len(set(numbers)) == len(numbers)
    assert not [each for each in kept if "cache" in str(each["reasons"])]
    for answer in (answer for each in kept for answer in each["answers"]):
        assert len(answer["times_s"]) == 8
        assert answer["prompt_tokens"] == 512
        assert answer["times_s"][0] >= 512 * 0.00005
    seen = runner.seen()
    assert not alive(seen["pid"]), "SIGTERM is ignored, so it was killed"
    argv = seen["argv"]
    assert argv[argv.index("--parallel") + 1] == "2"


def test_a_table_of_80_columns(runner: Runner) -> None:
    server = runner.server(*ENDLESS)
    code, out, err = runner.infertune("bench", str(runner.model), *QUICK, "--server", server)
    assert code in (0, 3), err
    table = [line for line in out.splitlines() if re.match(r"DEPTH |\d", line)]
    assert len(table) == 2
    assert max(map(len, table)) <= 80
    assert f"kept in {runner.directory}/state/infertune/measurements/" in out


def test_a_server_that_runs_goes_on_running(runner: Runner) -> None:
    with running(*ENDLESS) as (url, pid):
        code, found, err = bench(runner, "--url", url, *QUICK)
        assert code in (0, 3), err
        assert alive(pid)
        assert healthy(url)
    assert (found["api"], found["build"], found["url"]) == ("llama-server", "b11669-Debian", url)
    assert found["rows"][0]["slots"] == 1
    assert found["remarks"] == [] or found["rows"][0]["discarded"], "its process was seen"


def test_interrupted_it_keeps_what_it_has(runner: Runner) -> None:
    server = runner.server(*ENDLESS)
    words = ("--busy", "--force", "--depths", "0", "--samples", "1000", "--tokens", "8")
    process = runner.infertune_process("bench", str(runner.model), "--server", server, *words)
    wait_until(lambda: len(samples(runner)) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert len(samples(runner)) >= 3
    assert re.search(r"^0 +1 ", out, re.MULTILINE)
    assert "kept in " in out
    assert not alive(runner.seen()["pid"])


def test_what_has_no_room_is_left_out(runner: Runner) -> None:
    server = runner.server(*ENDLESS)
    words = ("--busy", "--force", "--depths", "4k,0", "--samples", "1", "--tokens", "8")
    code, found, err = bench(
        runner, str(runner.model), "--server", server, *words, "--", "ctx_size=1024"
    )
    assert code in (0, 3), err
    assert [each["depth"] for each in found["rows"]] == [0]
    assert "a slot has 1024" in found["remarks"][0]


def test_the_context_is_that_of_what_is_measured(runner: Runner) -> None:
    server = runner.server(*ENDLESS)
    words = ("--busy", "--force", "--depths", "1k", "--parallel", "1,2", "--samples", "1")
    code, _, err = bench(runner, str(runner.model), "--server", server, *words)
    assert code in (0, 3), err
    argv = runner.seen()["argv"]
    assert int(argv[argv.index("--ctx-size") + 1]) >= 2 * (1024 + 512 + MOST_TOKENS)
    [tokens] = {each["load"]["tokens"] for each in samples(runner)}
    assert 64 <= tokens <= MOST_TOKENS  # the most where a token takes its 2 ms and no more


def test_a_server_that_fails_says_why(runner: Runner) -> None:
    server = runner.server("--break-off")
    code, found, err = bench(runner, str(runner.model), *QUICK, "--server", server)
    assert code == 3
    assert "broke off" in err
    assert "broke off" in found["failed"]
    assert found["rows"] == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--root", "/nowhere"), "nowhere"),
        (("--depths", "4x"), "'4x' is not a depth"),
        (("--parallel", "0"), "'0' is not a number of slots"),
        (("--key-file", "/etc/hostname"), "--key-file is for --url"),
        (("--url", "ftp://x"), "not the address of a server"),
        (("--url", "http://127.0.0.1:1", "--profile", "base"), "do not go with --url"),
        (("--depths", "0,1,2,3,4", "--parallel", "1,2,3,4"), "more than 16"),
        (("--url", "http://127.0.0.1:1", "--key-file", "/nowhere"), "--key-file /nowhere"),
    ],
)
def test_what_cannot_be_meant(words: tuple[str, ...], why: str, runner: Runner) -> None:
    code, _, err = runner.infertune("bench", *words)
    assert code == 2
    assert why in err


def test_nobody_there(runner: Runner) -> None:
    code, _, err = runner.infertune("bench", "--url", "http://127.0.0.1:1")
    assert code == 3
    assert "refused" in err
    assert "Traceback" not in err


@pytest.mark.root_only
def test_a_profile_is_in_force_meanwhile(runner: Runner) -> None:
    before = Path("/proc/sys/vm/swappiness").read_text()
    server = runner.server(*ENDLESS)
    code, found, err = bench(
        runner, str(runner.model), *QUICK, "--server", server, "--profile", "base"
    )
    assert code in (0, 3), err
    assert found["profile"] == "base"
    assert Path("/proc/sys/vm/swappiness").read_text() == before
    assert os.path.exists(found["path"])


# -- against another ---------------------------------------------------------------------

CALM = Between(
    foreign_cpu=0.0, stolen=0.0, stalled={}, major_faults=0, cpu_khz=None, gpu_hz=None,
    throttled=None, others_on_gpu=0, others_in_server=None, busiest=(),
)  # fmt: skip


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine does meanwhile is no reason to throw a pair away."""
    monkeypatch.setattr("infertune.measure.trial.between", lambda *_: CALM)


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program says of itself, which takes three more starts for each of the server."""
    once = functools.cache(lambda program: ask_server(program, {}, os.environ, embedded=False))
    monkeypatch.setattr("infertune.run.ask_server", lambda program, *_, **__: once(program))


def compared(
    runner: Runner, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, Any]]:
    server = runner.server(*ENDLESS, "--slow-flag=--poll")
    asked = ("bench", "--json", str(runner.model), "--busy", "--force", "--server", server)
    code = main([*asked, "--tokens", "8", *words])
    out, err = capsys.readouterr()
    assert out, err
    return code, json.loads(out)


def test_a_server_that_is_slower_harms(
    runner: Runner, calm: None, asked_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = compared(runner, capsys, "--depths", "0", "--samples", "1")
    assert code == 0, found["failed"]
    [run] = runner.directory.glob("state/infertune/measurements/*/*/*-bench")
    for _ in range(2):  # one in eighty differs from itself, by the level of a look
        code, found = compared(runner, capsys, "--against", run.name, "--", "poll=50")
        if found["comparison"]["other"]:
            break
    assert code == 1, (found["failed"], found["comparison"])
    assert found["comparison"]["itself"]["pairs"] == 8
    assert found["comparison"]["itself"]["word"] in ("no effect shown", "cannot decide")
    other = found["comparison"]["other"]
    assert (other["word"], other["pairs"]) == ("harms", 8)
    assert other["estimate"] < -0.5
    lines = (Path(found["path"]) / "samples.jsonl").read_text().splitlines()
    halves = [json.loads(line) for line in lines]
    assert len(halves) >= 32  # more where one was thrown away
    order = [each["arm"] for each in halves if each.get("comparison") == "other"]
    assert {tuple(order[at : at + 2]) for at in range(0, len(order) - 1, 2)} >= {(0, 1), (1, 0)}


def test_interrupted_in_a_pair_it_keeps_the_halves(runner: Runner) -> None:
    server = runner.server(*ENDLESS)
    words = ("--server", server, "--busy", "--force", "--tokens", "8", "--against", "base")
    process = runner.infertune_process("bench", str(runner.model), "--launch-only", *words)
    wait_until(lambda: len(samples(runner)) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert len(samples(runner)) >= 2
    assert "kept in " in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--against", "no-such"), "no-such"),
        (("--against", "none"), "both are the same"),
        (("--against", "20200101T000000Z-bench"), "there is no such run"),
        (("--against", "/nowhere"), "not a run"),
        (("--against", "base", "--depths", "0,1k"), "at one depth"),
        (("--against", "base", "--parallel", "1,2"), "at one depth"),
        (("--against", "base", "--url", "http://127.0.0.1:1"), "the unit is a start"),
    ],
)
def test_what_cannot_be_compared(words: tuple[str, ...], why: str, runner: Runner) -> None:
    code, _, err = runner.infertune("bench", "--busy", *words)
    assert code == 2, err
    assert why in err


def test_a_run_of_somebody_elses_server_is_not_repeated(runner: Runner) -> None:
    with running(*ENDLESS) as (url, _):
        _, found, err = bench(runner, "--url", url, *QUICK)
    assert found["path"], err
    code, _, err = runner.infertune("bench", "--busy", "--against", found["path"])
    assert code == 2
    assert "cannot be measured again" in err
