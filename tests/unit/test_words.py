# SPDX-License-Identifier: Apache-2.0
"""What the verbs say is so: a word of its own for what will be, what is and what was done."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.boot import staging
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.knobs.guards import GUARDS
from infertune.cli.base import Command
from infertune.cli.main import commands, main
from infertune.cli.render import outcome_word

FIXTURE = str(Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot")
HELD = "cpu_dma_latency"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["--root", FIXTURE, *words])
    return code, capsys.readouterr().out


def outcomes(text: str) -> dict[str, str]:
    """The words of the table by knob, or by knob and number of files."""
    header = next(line for line in text.splitlines() if line.startswith("KNOB"))
    column = header.index("OUTCOME")
    rows = [line for line in text.splitlines() if line.split(" ")[0] in KNOBS]
    return {row.split(" ")[0]: re.split(r"  |$", row[column:])[0].strip() for row in rows}


@pytest.mark.parametrize(
    ("verb", "pending", "summary"),
    [
        ("plan", "change", "4 settings to change (35 files), 2 ok; nothing was written"),
        ("verify", "differs", "5 settings differ from the profile"),
        ("apply", "changed", "4 settings changed (35 files), 2 ok"),
    ],
)
def test_a_table_says_when(
    verb: str, pending: str, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(capsys, verb, "low-latency")
    words = outcomes(text)
    assert code == (1 if verb == "verify" else 0)
    assert words["vm.swappiness"] == words["cpufreq.scaling_governor"] == pending
    assert words["ksm.run"] == "ok"
    assert words["ttm.pages_limit"] == "at reboot"
    assert words[HELD] == "held by run"
    assert summary in text.splitlines()


def test_the_document_keeps_the_words_of_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = said(capsys, "verify", "low-latency", "--json")
    found = {item["knob"]: item["outcome"] for item in json.loads(text)["items"]}
    assert found["vm.swappiness"] == "set"
    assert found["ksm.run"] == "already"
    assert found["ttm.pages_limit"] == "pending-reboot"
    assert found[HELD] == "refused"


def test_one_setting_is_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    others = [knob for knob in KNOBS if knob not in ("vm.swappiness", "ksm.run")]
    words = [word for knob in others for word in ("--without", knob)]
    assert "1 setting differs" in said(capsys, "verify", "low-latency", *words)[1]
    assert "1 setting to change, 1 ok" in said(capsys, "plan", "low-latency", *words)[1]


@pytest.mark.parametrize(
    "words",
    [("apply", "low-latency"), ("revert",), ("recover",), ("boot", "stage", "long-context")],
    ids=" ".join,
)
def test_a_rehearsal_says_that_it_is_one(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "stage", lambda *_, **__: None)
    _, text = said(capsys, *words)
    assert text.splitlines()[-1].endswith("this machine was not touched")


def test_what_an_apply_that_failed_did_not_reach_was_not_changed() -> None:
    item = {"knob": "vm.swappiness", "path": "/x", "before": "60", "want": "10", "outcome": "set"}
    assert outcome_word(item, "past") == "not changed"
    assert outcome_word(item, "present") == "differs"


def test_only_a_missing_holder_refuses_a_held_knob() -> None:
    """The table says "held by run" for it: a guard's refusal would need a word of its own."""
    assert not [guard for guard in GUARDS if KNOBS[guard.knob].while_open]


def test_the_verbs_that_act() -> None:
    def acting(group: tuple[Command, ...]) -> set[str]:
        return {each.name for each in group if each.acts}.union(
            *(acting(each.subcommands) for each in group)
        )

    found = acting(commands())
    assert {"apply", "revert", "run", "serve", "stop", "stage", "undo", "snapshot"} <= found
    assert not {"plan", "verify", "status", "doctor", "machine", "fit", "servers"} & found


REPOSITORY = Path(__file__).parents[2]
STIFF = re.compile(
    r"\b(somebody|anew|for want of|of ours)\b"
    r"|(?<!there )\bis no (valid )?(name|number|file|size|list)\b"
)
"""What a native reader stumbled over, and what stands there now: CONTRIBUTING.md, Words."""


def texts_of_the_program() -> Iterator[tuple[str, str]]:
    """Each text in the code that may be printed: with a blank, and no docstring."""
    for path in sorted((REPOSITORY / "daemon/infertune").rglob("*.py")):
        tree = ast.parse(path.read_text())
        silent = {
            id(each.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            for each in node.body
            if isinstance(each, ast.Expr)
        }
        for node in ast.walk(tree):
            said = isinstance(node, ast.Constant) and id(node) not in silent and node.value
            if isinstance(said, str) and " " in said:
                yield f"{path.name}:{node.lineno}", said


def test_stiff_words_stay_out_of_what_a_user_reads() -> None:
    found = [where for where, text in texts_of_the_program() if STIFF.search(text)]
    internal = {"architecture.md", "CONTRIBUTING.md"}
    for page in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")):
        if page.name not in internal:
            found += [
                f"{page.name}:{number}"
                for number, line in enumerate(page.read_text().splitlines(), 1)
                if STIFF.search(re.sub(r"`[^`]*`", "", line))
            ]
    assert not found
