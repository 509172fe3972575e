# SPDX-License-Identifier: Apache-2.0
"""What ``--json`` prints is what docs/json.md says, field by field and type by type."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import boot_trees
import gguf_files
import support
from infertune.cli.gate import document
from infertune.cli.main import main
from infertune.cli.tune import document as tuned
from infertune.launch.binary import Server
from infertune.measure.answers import Answer, Reference, Step, Stretch
from infertune.measure.arm import Arm
from infertune.measure.check import Checked
from infertune.measure.compare import Ground, Outcome
from infertune.measure.gate import Drift, identical
from infertune.measure.pairs import Comparison, Found
from infertune.measure.space import Candidate
from infertune.measure.statistics import Verdict
from infertune.measure.tune import Job, Row
from infertune.views.load import load
from known_models import KNOWN
from top_readings import reading

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
STRIX_HALO = str(FIXTURES / "strix-halo-128.snapshot")

KINDS = {
    str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "list",
    type(None): "null",
}  # fmt: skip


@dataclass
class Node:
    """One field of a table, and the fields below it."""

    types: set[str] = field(default_factory=set)
    below: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str, types: set[str]) -> Node:
        node = self
        for key in re.findall(r"\[\]|[^.\[\]]+", name):
            node.types.add("list" if key == "[]" else "object")
            node = node.below.setdefault(key, Node())
        node.types |= types
        return node


def tables() -> dict[str, Node]:
    """One tree per section of docs/json.md, reports spelled out."""
    text = (REPOSITORY / "docs" / "json.md").read_text()
    rows = {
        title: [
            (name, set(re.findall(r"[\w./-]+", types)) - {"or"})
            for name, types in re.findall(r"^\| (?:`(\S+)` )?\| (\w[^|]*) \|", body, re.MULTILINE)
            if types != "type"
        ]
        for title, body in re.findall(
            r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
        )
    }
    report = rows.pop("report")
    trees, inside = {}, []
    for title, fields in rows.items():
        tree = trees[title] = Node()
        tree.add("schema", {"string"})
        for name, types in fields:
            others = {each for each in types if "/" in each}
            node = tree.add(name, types - {"report"} - others)
            inside += [(node, each) for each in others]
            for below, kinds in report if "report" in types else ():
                tree.add(f"{name}.{below}", kinds)
    for name, types in report:
        if name.startswith("items[]"):
            trees["infertune.status/1"].add(name, types)
    for node, title in inside:  # a document within another, without its schema
        node.types.add("object")
        node.below |= {key: each for key, each in trees[title].below.items() if key != "schema"}
    return trees


def problems(value: Any, node: Node, where: str = "") -> Iterator[str]:
    """What a document says that its table does not, and the other way round."""
    kind = KINDS[type(value)]
    if kind not in node.types:
        yield f"{where} is {kind}, not {' or '.join(sorted(node.types)) or 'documented'}"
    elif kind == "list":
        for each in value:
            yield from problems(each, node.below["[]"], f"{where}[]")
    elif kind == "object":
        for key, each in value.items():
            below = node.below.get(key) or node.below.get("*") or Node()
            yield from problems(each, below, f"{where}.{key}")
        for key in node.below.keys() - value.keys() - {"*"}:
            yield f"{where}.{key} is missing"


TABLES = tables()
READING = [
    [],
    ["recommend"],
    ["machine"],
    ["knobs"],
    ["knobs", "vm.swappiness"],
    ["profiles"],
    ["profile", "show", "long-context"],
    ["profile", "check", "long-context"],
    ["profile", "explain", "long-context"],
    ["profile", "explain", "desktop-share"],  # leaves out its CPUs on a small machine
    ["plan", "long-context"],
    ["plan", "low-latency", "--backend", "rocm"],
    ["verify", "big-moe"],
    ["status"],
    ["doctor"],
    ["doctor", "--list"],
    ["report"],
    ["top"],
    ["boot", "plan", "long-context"],
    ["boot", "status"],
]


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb with --json, check what it prints, and return its schema."""
    main([*argv, "--json"])
    document = json.loads(capsys.readouterr().out)
    schema = str(document["schema"])
    assert not list(problems(document, TABLES[schema]))
    return schema


@pytest.mark.parametrize("machine", ["strix-halo-128", "recorded-vm"])
@pytest.mark.parametrize("argv", READING, ids=" ".join)
def test_reading_verbs(machine: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys, "--root", str(FIXTURES / f"{machine}.snapshot"), *argv)


def test_top_of_a_machine_that_serves() -> None:
    document = {"schema": "infertune.top/1", **load(reading(1), reading(2))}
    assert document["servers"]
    assert not list(problems(document, TABLES["infertune.top/1"]))


def test_changing_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    support.build(tmp_path)
    root = ["--root", str(tmp_path)]
    seen = [ask(capsys, *root, *argv) for argv in (
        ["apply", "long-context"], ["status"], ["apply", "quiet"], ["revert"], ["recover"],
    )]  # fmt: skip
    assert [schema.partition(".")[2] for schema in seen] == [
        "apply/1", "status/1", "apply/1", "revert/1", "recover/1",
    ]  # fmt: skip


def test_gate() -> None:
    step = Step(2, "b", ((2, -0.1), (3, -2.5)))
    reference = Reference((Answer((1,), "a", (step,)),), ())
    said = ((Stretch(0, (Step(3, "c", ((3, -0.7), (2, -0.8))),)),),)
    arm = Arm("m", {"parallel": "1"})
    server = Server(("s",), {}, None, "", (), embedded=True)
    ground = Ground(arm, reference, (said,), Drift(1, 0.7, 0.7, 0.0))
    outcome = Outcome((identical(reference, [said]),), ground, (said,))
    told = json.loads(json.dumps({"schema": "", **document(server, arm, arm, outcome)}))
    assert not list(problems(told, TABLES["infertune.gate/1"]))


@pytest.mark.parametrize("candidate", [None, Candidate({"threads": 2})])
def test_tune(candidate: Candidate | None) -> None:
    job = Job("/m.gguf", {"threads": 1}, "latency", 1, 2, 64, False)
    found = Found(
        Comparison("check", ("a", "b")), Verdict("helps", 8, 0.1, 0.05, 0.2), {}, [], 0, 1.0
    )
    checked = Checked(True, "helps", "", found) if candidate else None
    rows = [Row("threads=2", "applied", "faster", 0.1), Row("x=1", "skipped", "no", None)]
    for each in (checked, Checked(False, "refused", "G2") if candidate else None):
        told = {"schema": "", **tuned("/run", job, rows, candidate, each)}
        assert not list(problems(json.loads(json.dumps(told)), TABLES["infertune.tune/1"]))


@pytest.mark.parametrize("name", ["DeepSeek V3", "gpt-oss 120B", "Llama 3.1 8B"])
@pytest.mark.parametrize("machine", ["strix-halo-128", "recorded-vm"])
def test_models(
    machine: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = next(each for each in KNOWN if each.name == name)
    path = str(gguf_files.write(tmp_path / "m.gguf", model.metadata(), model.tensors()))
    root = ["--root", str(FIXTURES / f"{machine}.snapshot")]
    assert ask(capsys, *root, "fit", path, "--profile", "long-context") == "infertune.fit/1"
    assert ask(capsys, *root, "expect", path) == "infertune.expect/1"


def test_list_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "SUDO_UID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    model = KNOWN[0]
    gguf_files.write(tmp_path / "models/m.gguf", model.metadata(), model.tensors())
    (tmp_path / "models/bad.gguf").write_bytes(b"no model")
    assert ask(capsys, "--root", STRIX_HALO, "models") == "infertune.models/1"


def test_boot_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tree in ("debian-grub", "bootc", "fedora-bls"):
        root = ["--root", str(boot_trees.build(tmp_path / tree, tree))]
        verbs = (["confirm"], ["plan", "boot"], ["stage", "boot"], ["status"], ["undo"])
        seen = [ask(capsys, *root, "boot", *argv) for argv in verbs]
        assert seen == [f"infertune.boot-{argv[0]}/1" for argv in verbs]


def test_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(capsys, "--root", STRIX_HALO, "snapshot", str(tmp_path / "file"))


def test_refused_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[now]\nvm.swapiness = 10\n")
    assert ask(capsys, "profile", "check", str(bad)) == "infertune.profile-check/1"


def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--launch-only", "--json", "base", "--", "true"]
    main(argv)
    document = json.loads(capsys.readouterr().out)
    assert not list(problems(document, TABLES["infertune.run/1"]))
    assert document["status"] == 0


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--json", "--url", "http://127.0.0.1:1"])
    document = json.loads(capsys.readouterr().out)
    assert not list(problems(document, TABLES["infertune.bench/1"]))
    assert "refused" in document["failed"]


def test_a_field_that_is_not_documented_is_seen() -> None:
    tree = TABLES["infertune.snapshot/1"]
    good = {"schema": "infertune.snapshot/1", "file": "f", "entries": 1, "bytes": 2}
    assert not list(problems(good, tree))
    assert list(problems({**good, "more": 1}, tree))
    assert list(problems({**good, "bytes": None}, tree))
    assert list(problems({key: good[key] for key in ("schema", "file")}, tree))
