# SPDX-License-Identifier: Apache-2.0
"""``infertune top``: what is made of two readings, how it is laid out, and what its keys do."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import NotPermitted
from infertune.cli import top as verb
from infertune.cli.main import main
from infertune.views.board import board, number, seconds
from infertune.views.load import Reading, load
from support import GENEROUS_S, build, values
from top_readings import reading

pytest.importorskip("textual")

from infertune.views.app import Machine, Top

REPOSITORY = Path(__file__).resolve().parents[2]
SERVING = REPOSITORY / "tests" / "golden" / "strix-halo-128-serving.snapshot"
SIZES = ((80, 24), (120, 40), (200, 60))


def server(document: Any, name: str) -> Any:
    return next(each for each in document["servers"] if each["name"] == name)


# -- two readings ----------------------------------------------------------------------


def test_the_machine() -> None:
    found = load(reading(1), reading(2))
    assert found["interval_s"] == 2.0
    assert found["gpus"] == [
        {
            "gpu": "card1", "busy": 0.87, "watts": 78.042, "celsius": 64.0, "hertz": 2.85e9,
            "dram_bytes_per_s": 52.2e9, "throttled_by": ["spl"],
        }
    ]  # fmt: skip
    assert found["memory"] == {
        "pool": "GTT", "bytes": 96 << 30, "held_bytes": 72 << 30, "promised_bytes": 4 << 30,
        "limited_by": "ttm.pages_limit", "next_boot_bytes": 104 << 30,
    }  # fmt: skip
    assert found["pressure"] == pytest.approx({"cpu": 0.1, "io": 0.0, "memory": 0.02})
    assert found["run_queue"] == {"p50_s": 1e-6, "p99_s": 0.01}
    assert found["major_faults_per_s"] == 4.0
    assert found["profile"]["confirm_in_s"] == 296.0
    assert found["doctor"] == {
        "errors": 1, "warnings": 0, "notes": 1, "worst": "the GPU was reset",
    }  # fmt: skip


def test_a_share_is_no_more_than_the_whole() -> None:
    late = Reading(at=2.1, samples=reading(11).samples)  # noted before it was read
    assert load(reading(1), late)["pressure"]["cpu"] == 1.0


def test_speeds_of_an_engine_that_tells_sums() -> None:
    one = server(load(reading(1), reading(2)), "gpt")
    assert one["prompt_per_s"] == pytest.approx(1000 / 1.6)
    assert one["tokens_per_s"] == pytest.approx(60 / 1.2)
    assert one["ttft_s"] == pytest.approx(1.6)
    assert one["ttft_at_most"] is True
    assert one["requests"] == 2.0


def test_speeds_of_an_engine_that_counts_as_it_goes() -> None:
    one = server(load(reading(1), reading(2)), "vllm")
    assert one["prompt_per_s"] == 500.0
    assert one["tokens_per_s"] == 30.0
    assert one["ttft_s"] == pytest.approx(0.25)
    assert one["ttft_at_most"] is False


def test_a_speed_that_nothing_newer_is_known_of_stays_and_says_so() -> None:
    first = load(reading(1), reading(2))
    again = load(reading(2), Reading(at=6.0, samples=reading(2).samples), first)
    one = server(again, "gpt")
    assert one["tokens_per_s"] == pytest.approx(50.0)
    assert one["speeds_are_new"] is False
    assert any("(50.0)" in line and "(<= 1.6 s)" in line for line in board(again, 120))
    stopped = load(reading(2), Reading(at=8.0, samples={}, servers=reading(2).servers), again)
    assert server(stopped, "gpt")["tokens_per_s"] is None


def test_counters_that_began_anew_tell_nothing() -> None:
    found = load(reading(9), Reading(at=20.0, samples=reading(1).samples))
    assert server(found, "gpt")["tokens_per_s"] is None
    assert found["run_queue"] is None
    assert found["pressure"]["cpu"] is None


def test_one_reading_knows_no_rates() -> None:
    found = load(None, reading(1))
    assert found["interval_s"] is None
    assert found["pressure"] == {"cpu": None, "io": None, "memory": None}
    assert server(found, "gpt")["tokens_per_s"] is None
    assert found["memory"]["held_bytes"] == 72 << 30


def test_nothing_known_is_shown_as_unknown() -> None:
    found = load(None, Reading(at=0.0, samples={}, unknown={"servers": "no daemon"}))
    text = "\n".join(board(found, 80))
    assert "profile unknown" in text
    assert "of the GPU: unknown" in text
    assert "servers: no daemon" in text
    assert " 0 %" not in text


# -- lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0.0"), (9.87, "9.9"), (123.4, "123"), (12345.0, "12345")],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (1.4, "1.4 s"), (0.0042, "4.2 ms"), (131e-6, "131 us"), (1e-8, "10 ns")],
)
def test_seconds(value: float | None, shown: str) -> None:
    assert seconds(value) == shown


def test_what_matters_is_there_at_80_by_24() -> None:
    lines = board(load(reading(1), reading(2)), 79, 22)
    text = "\n".join(lines)
    for said in (
        "long-context (vulkan)", "goes back in 296 s unless it is confirmed", "drift 1",
        "doctor 1 error, no warnings, 1 note", "87 % busy", "78 W", "throttled by spl",
        "72.0 of 96.0 GiB GTT", "4 GiB promised", "limit ttm.pages_limit",
        "after the next boot 104.0 GiB", "memory 2 %", "run queue p50 <= 1.0 us, p99 <= 10.0 ms",
        "TOKENS/S", "50.0", "TTFT", "<= 1.6 s", "failed", "gpt-oss",
        "vm.swappiness is external by tuned: 100", "the GPU was reset",
    ):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("width", [1, 40, 60, 79, 80, 119, 199, 400])
@pytest.mark.parametrize("height", [1, 5, 24, 60, None])
@pytest.mark.parametrize("many", [0, 1, 200])
def test_it_fits_whatever_names_there_are(width: int, height: int | None, many: int) -> None:
    hostile = "\x1b[2J\u202e[red]" + "n" * 300
    servers = [
        {**reading(1).servers[0], "name": f"{number}{hostile}", "model": hostile}  # type: ignore[index]
        for number in range(many)
    ]
    found = load(reading(1), reading(2, servers=servers, unknown={"x": hostile}))
    lines = board(found, width, height)
    assert max(map(len, lines)) <= max(width, 40)
    assert height is None or len(lines) <= height
    assert all(line.isprintable() for line in lines)
    assert len(lines) < 100


# -- the screen -------------------------------------------------------------------------


class Stage:
    """A machine for the screen, and what was done to it."""

    def __init__(self, why_not: str = "") -> None:
        self.done: list[Sequence[str]] = []
        self.acted = threading.Event()
        self.doctor = 0
        self.ticks = 0
        self.before: Reading | None = None
        self.machine = Machine(
            look=self.look,
            profiles=lambda: ["big-moe", "long-context", "quiet"],
            act=self.act,
            ask_doctor=self.ask_doctor,
            why_not=why_not,
        )

    def look(self) -> Any:
        self.ticks += 1
        now = reading(self.ticks)
        found = load(self.before, now)
        self.before = now
        return found

    def act(self, words: Sequence[str]) -> str:
        self.done.append(tuple(words))
        self.acted.set()
        return f"did {' '.join(words)}"

    def ask_doctor(self) -> None:
        self.doctor += 1


def drive(
    app: Top,
    size: tuple[int, int],
    play: Callable[[Any], Awaitable[None]],
) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await play(pilot)

    asyncio.run(run())


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GENEROUS_S):
        while not condition():
            await pilot.pause(0.01)


def screen(app: Top) -> str:
    """All that is on the screen now, as a terminal would have it."""
    width, height = app.size
    lines = app.screen._compositor.render_strips()
    return "\n".join(strip.text[:width] for strip in lines[:height])


@pytest.mark.parametrize("size", SIZES)
def test_it_is_drawn_at_every_size(size: tuple[int, int]) -> None:
    stage = Stage()
    app = Top(stage.machine, 0.01)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: "50.0" in screen(app))
        text = screen(app)
        assert all(len(line) <= size[0] for line in text.splitlines())
        assert "long-context (vulkan)" in text
        assert text.splitlines()[-1].startswith(Top.KEYS)
        assert ("ENGINE" in text) == (size[0] >= 120)

    drive(app, size, play)
    assert not stage.done


def test_apply_asks_once() -> None:
    stage = Stage()
    app = Top(stage.machine, 60)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: "GTT" in screen(app))
        await pilot.press("a")
        await until(pilot, lambda: "apply which profile?" in screen(app))
        await pilot.press("escape")
        await until(pilot, lambda: "GTT" in screen(app))
        assert not stage.done
        await pilot.press("a", "down", "enter")
        await until(pilot, stage.acted.is_set)
        await until(pilot, lambda: "did apply long-context" in screen(app))
        await until(pilot, lambda: stage.ticks >= 2)  # what was done is looked at

    drive(app, (80, 24), play)
    assert stage.done == [("apply", "long-context")]


@pytest.mark.parametrize(("key", "word"), [("r", "revert"), ("c", "confirm")])
@pytest.mark.parametrize("answer", ["y", "n", "enter", "escape", "q"])
def test_what_changes_something_asks_once(key: str, word: str, answer: str) -> None:
    stage = Stage()
    app = Top(stage.machine, 60)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: "GTT" in screen(app))
        await pilot.press(key)
        await until(pilot, lambda: bool(stage.done) or "any other key  no" in screen(app))
        assert not stage.done
        await pilot.press(answer)
        await until(pilot, lambda: bool(stage.done) or "nothing was touched" in screen(app))
        if answer == "y":
            await until(pilot, lambda: f"did {word}" in screen(app))

    drive(app, (80, 24), play)
    assert stage.done == ([(word,)] if answer == "y" else [])


def test_a_recorded_machine_is_only_looked_at() -> None:
    stage = Stage(why_not="only looked at")
    app = Top(stage.machine, 60)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: "GTT" in screen(app))
        for key in "arc":
            await pilot.press(key, "y", "enter")
        await until(pilot, lambda: bool(stage.done) or "only looked at" in screen(app))

    drive(app, (80, 24), play)
    assert not stage.done


def test_help_doctor_and_quit() -> None:
    stage = Stage()
    app = Top(stage.machine, 60)

    async def play(pilot: Any) -> None:
        await until(pilot, lambda: "GTT" in screen(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: "any key closes this help" in screen(app))
        assert "closes this help" in screen(app)
        await pilot.press("x", "d")
        await until(pilot, lambda: stage.doctor == 1 and stage.ticks >= 2)
        await pilot.press("q")

    drive(app, (80, 24), play)
    assert app.return_code == 0


def test_a_look_that_hangs_keeps_no_key_from_working() -> None:
    stage, goes_on = Stage(), threading.Event()
    looking = threading.Event()

    def look() -> Any:
        looking.set()
        goes_on.wait(GENEROUS_S)
        return stage.look()

    hanging = Machine(look, list, stage.act, stage.ask_doctor)
    app = Top(hanging, 60)

    async def play(pilot: Any) -> None:
        await until(pilot, looking.is_set)
        await pilot.press("r", "y")
        await until(pilot, lambda: "did revert" in screen(app))

    try:
        drive(app, (80, 24), play)
    finally:
        goes_on.set()
    assert stage.done == [("revert",)]


def test_looking_on_and_on_keeps_nothing() -> None:
    """What is kept is the last document; one for each look would be some megabytes."""
    stage = Stage()
    app = Top(stage.machine, 0.0)
    kept: list[int] = []

    def settled() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async def play(pilot: Any) -> None:
        for ticks in (100, 600):
            await until(pilot, lambda ticks=ticks: stage.ticks >= ticks)
            kept.append(settled())

    tracemalloc.start()
    try:
        drive(app, (80, 24), play)
    finally:
        tracemalloc.stop()
    assert kept[-1] - kept[0] < 200 * 1024


# -- the verb ----------------------------------------------------------------------------


def test_once_needs_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(SERVING), "top", "--once"]) == 0
    text = capsys.readouterr().out
    assert "long-context (vulkan)" in text
    assert "40.0 of 62.5 GiB GTT" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_screen_needs_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(SERVING), "top"]) == 2
    assert "top needs a terminal" in capsys.readouterr().err


def test_without_its_library_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "infertune.views.app", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["--root", str(SERVING), "top"]) == 2
    told = capsys.readouterr().err
    assert "top needs the library textual" in told
    assert "extra 'tui'" in told


def test_no_other_verb_and_no_once_imports_the_library() -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY / "daemon"),
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    words = ["-m", "infertune", "--root", str(SERVING), "top", "--once"]
    done = subprocess.run(
        [sys.executable, "-B", *words], env=environ, capture_output=True, timeout=GENEROUS_S
    )
    assert done.returncode == 0
    assert b"infertune.views.board" in done.stderr
    assert b" textual" not in done.stderr


def test_keys_do_what_the_verbs_do(tmp_path: Path) -> None:
    build(tmp_path)
    profiles = tmp_path / "etc/infertune/profiles"
    profiles.mkdir(parents=True)
    (profiles / "mine.toml").write_text('description = "x"\n[now]\nvm.swappiness = 7\n')
    (profiles / "broken.toml").write_text("nonsense")
    ctx = context(tmp_path)
    names = verb._profiles(ctx)
    assert "mine" in names
    assert "broken" not in names
    assert verb.act(ctx, ("apply", "mine")).startswith("1 setting changed")
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "7\n"
    assert "nothing waits for a confirmation" in verb.act(ctx, ("confirm",))
    assert verb.act(ctx, ("revert",)) == "put back: 1 file"
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "60\n"
    assert verb.act(ctx, ("apply", "nobody-s")).startswith("there is no profile")


def context(root: Path) -> Any:
    from types import SimpleNamespace

    from infertune.base.root import Root
    from infertune.cli.base import Context

    args = SimpleNamespace(root=str(root), exporter="127.0.0.1:1", every=2)
    return Context(Root(root), args)


def test_a_verb_that_fails_is_told_and_the_rest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)

    def refuse(ctx: Any, name: str) -> Any:
        raise NotPermitted("not for you") if name == "servers" else ZeroDivisionError

    monkeypatch.setattr(verb, "said", refuse)
    found = verb.Eye(context(tmp_path)).look()
    assert found["unknown"]["servers"] == "not for you"
    assert found["unknown"]["status"].startswith("a bug: ZeroDivisionError")
    assert board(found, 80)


def test_the_doctor_is_asked_once_and_again_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    asked = []
    said = verb.said
    monkeypatch.setattr(
        verb, "said", lambda ctx, *words: (asked.append(words), said(ctx, *words))[1]
    )
    eye = verb.Eye(context(tmp_path))
    for _ in range(3):
        eye.look()
    assert asked.count(("doctor",)) == 1
    eye.asks_doctor = True
    assert eye.look()["doctor"] is not None
    assert asked.count(("doctor",)) == 2
