# SPDX-License-Identifier: Apache-2.0
"""No line is wider than the terminal, whatever a verb says of whatever machine; and what is cut,
joined or coloured on the way."""

from __future__ import annotations

import io
import os
import pty
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import gguf_files
from infertune.base.errors import InfertuneError
from infertune.base.root import Root
from infertune.cli import lines
from infertune.cli.base import Command, Context
from infertune.cli.main import commands, main
from infertune.cli.parser import build_parser
from infertune.cli.verbs import VERBS
from infertune.host.snapshot import open_snapshot
from known_models import KNOWN

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("*.snapshot"))
WIDTHS = (60, 80, 120)

WORDS = {"PROFILE": "low-latency", "PROFILE|FILE": "low-latency", "NAME": "chat"}
"""What is given for an argument that a verb must have."""
MORE = (
    ("doctor", "--all"),
    ("doctor", "--list"),
    ("knobs", "ttm.pages_limit"),
    ("plan", "long-context"),
    ("boot", "plan", "long-context"),
    ("top", "--once"),
)


class EveryWidth(Context):
    """Says everything once at each width, and keeps what is too wide."""

    def __init__(self, root: Root, args: SimpleNamespace) -> None:
        super().__init__(root, args, io.StringIO())
        self.lines = 0
        self.too_wide: list[str] = []

    def _say(self, laid_out: list[str]) -> None:
        self.lines += len(laid_out)
        for line in laid_out:
            assert self.width
            # A name or an address alone is not cut, however narrow the terminal.
            if len(line) > self.width and " " in line.strip():
                self.too_wide.append(line)

    def print(self, text: str = "", hang: int | None = None) -> None:
        for self.width in WIDTHS:
            super().print(text, hang)

    def labelled(self, pairs: Sequence[tuple[str, str]], indent: int = 0, column: int = 0) -> None:
        for self.width in WIDTHS:
            super().labelled(pairs, indent, column)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        for self.width in WIDTHS:
            super().table(header, rows)


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda path: path.stem)
def machine(request: pytest.FixtureRequest) -> Iterator[Root]:
    with open_snapshot(str(request.param)) as root:
        yield root


def readers(all_of: Sequence[Command], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """A command line for each verb that does nothing but print."""
    for command in all_of:
        words = (*before, command.name)
        if command.subcommands:
            yield from readers(command.subcommands, words)
        elif not command.acts and command.name not in LIVE:
            needed = [each for each in command.arguments if not each.names[0].startswith("-")]
            given = [each for each in needed if each.options.get("nargs") != "?"]
            yield words + tuple(WORDS.get(str(each.options["metavar"]), "x") for each in given)


LIVE = {
    "admit": "judges a unit of this machine: tests/unit/test_admit.py",
    "gate": "starts servers: tests/host/test_gate_command.py",
    "logs": "journalctl prints",
    "fit": "needs a model: see below",
    "expect": "needs a model: see below",
    "models": "the caller's own: tests/unit/test_models.py",
}


def said(root: Root, words: Sequence[str]) -> EveryWidth:
    args = build_parser(commands(words[0])).parse_args(list(words), SimpleNamespace())
    ctx = EveryWidth(root, args)
    try:
        args.command.run(ctx)
    except InfertuneError as error:
        ctx.print(f"infertune: {error.message}", 2)
    return ctx


@pytest.mark.parametrize("words", [*readers(commands()), *MORE], ids=" ".join)
def test_no_line_is_wider_than_the_terminal(
    words: tuple[str, ...], machine: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file as it will be, or a command to be copied, is not ours to break.
    monkeypatch.setattr(EveryWidth, "verbatim", lambda self, text: None)
    found = said(machine, words)
    assert not found.too_wide
    assert found.lines or words[:2] == ("profile", "show")


@pytest.mark.parametrize("verb", ["fit", "expect"])
def test_a_model_of_any_name(verb: str, machine: Root, tmp_path: Path) -> None:
    model = next(each for each in KNOWN if each.architecture == "gpt-oss")
    path = tmp_path / "Some-Model-With-A-Name-Of-Nearly-Any-Length-Q4_K_M.gguf"
    gguf_files.write(path, model.metadata(), model.tensors())
    found = said(machine, (verb, str(path)))
    assert found.lines
    assert not found.too_wide


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_what_was_done_fits_as_well(fixture: Path) -> None:
    with open_snapshot(str(fixture)) as root:
        for words in (("apply", "throughput"), ("status",), ("revert",), ("recover",)):
            assert not said(root, words).too_wide


@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["--help"]) == 0
    texts = [capsys.readouterr().out]
    for verb in VERBS:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        texts.append(capsys.readouterr().out)
    for line in "\n".join(texts).splitlines():
        assert len(line) <= width or " " not in line.strip()


# -- the layout itself ---------------------------------------------------------


def test_a_sentence_is_broken_between_words_only() -> None:
    path = "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none"
    assert lines.fold(f"note: see {path} for more", 40, 6) == [
        "note: see",
        f"      {path}",
        "      for more",
    ]
    assert lines.fold("  two  spaces", None) == ["  two  spaces"]
    assert lines.fold("    deep " + "word " * 9, 40)[1].startswith("    word")
    assert lines.fold("nice=-10  " * 5, 40)[1] == "    nice=-10"
    assert (
        " ".join(each.strip() for each in lines.fold("a b c " * 30, 40)) == ("a b c " * 30).strip()
    )


HEADER = ("KNOB", "NOW", "OUTCOME", "")
REMARK = "no effect here: this machine has one NUMA node"


def test_a_remark_goes_beside_below_or_as_far_as_it_likes() -> None:
    rows = [("vm.swappiness", "60", "change", ""), ("kernel.numa_balancing", "0", "ok", REMARK)]
    piped = lines.table(HEADER, rows, None)
    assert piped == [
        "KNOB                   NOW  OUTCOME",
        "vm.swappiness          60   change",
        f"kernel.numa_balancing  0    ok       {REMARK}",
    ]
    assert lines.table(HEADER, rows, 120) == piped
    assert lines.table(HEADER, rows, 80)[2:] == [
        "kernel.numa_balancing  0    ok       no effect here: this machine has one NUMA",
        " " * 37 + "node",
    ]
    assert lines.table(HEADER, rows, 60)[2:] == [
        "kernel.numa_balancing  0    ok",
        f"    {REMARK}",
    ]


def test_a_row_that_is_too_wide_in_itself_is_told_on_several_lines() -> None:
    rows = [("transparent_hugepage.khugepaged.defrag", "defer+madvise", "held by run", REMARK)]
    assert lines.table(HEADER, rows, 48) == [
        "KNOB",
        "    NOW            OUTCOME",
        "transparent_hugepage.khugepaged.defrag",
        "    defer+madvise  held by run",
        "        no effect here: this machine has one",
        "        NUMA node",
    ]


def test_a_long_name_has_a_line_of_its_own_and_a_short_one_does_not() -> None:
    rows = [
        ("transparent_hugepage.khugepaged.scan_sleep_millisecs", "10000", "safe", "measured"),
        ("vm.swappiness", "60", "safe", "protective, unmeasured"),
    ]
    assert lines.table(("KNOB", "NOW", "RISK", "EVIDENCE"), rows, 60) == [
        "KNOB                     NOW    RISK  EVIDENCE",
        "transparent_hugepage.khugepaged.scan_sleep_millisecs",
        "                         10000  safe  measured",
        "vm.swappiness            60     safe  protective, unmeasured",
    ]


def test_labels_stand_in_one_column() -> None:
    pairs = [("GPU", "Radeon 8060S"), ("", "driver amdgpu"), ("/sys/a/path/that/is/long", "3")]
    assert lines.labelled([*pairs, ("firmware", "word " * 20)], 60) == [
        "GPU       Radeon 8060S",
        "          driver amdgpu",
        "/sys/a/path/that/is/long  3",
        "firmware  " + ("word " * 10).rstrip(),
        "          " + ("word " * 10).rstrip(),
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm-256color"}, False),
    ],
)
def test_colour_is_for_verdicts_on_a_terminal(
    stream: io.StringIO, environment: dict[str, str], coloured: bool
) -> None:
    paint = lines.paint_for(stream, environment)
    row = lines.table(HEADER, [("ok", "differs", "differs", "differs")], 80, paint)[1]
    sentences = [
        lines.sentence(text, 80, None, paint)[0]
        for text in ("error: it is broken", "note: an error", "error", "it: error")
    ]
    if coloured:
        assert row == "ok    differs  \x1b[33mdiffers\x1b[0m  differs"
        assert sentences[0] == "\x1b[31merror\x1b[0m: it is broken"
        assert sentences[1:] == ["note: an error", "error", "it: error"]
    else:
        assert "\x1b" not in row + "".join(sentences)


@pytest.mark.parametrize(
    ("environment", "of_terminal", "of_pipe"),
    [
        ({}, 97, None),
        ({"COLUMNS": "64"}, 64, 64),
        ({"COLUMNS": "9"}, 40, 40),
        ({"COLUMNS": "0"}, 97, None),
        ({"COLUMNS": "\u0663\u0663"}, 97, None),
        ({"COLUMNS": "wide"}, 97, None),
    ],
)
def test_how_wide_a_terminal_is(
    environment: dict[str, str], of_terminal: int, of_pipe: int | None
) -> None:
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 97, 0, 0))
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        assert lines.width_of(terminal, environment) == of_terminal
    assert lines.width_of(io.StringIO(), environment) == of_pipe
    assert lines.width_of(Terminal(), {}) == 80  # one that does not say
    assert lines.width_of(None, {}) is None
