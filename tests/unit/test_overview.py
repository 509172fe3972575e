# SPDX-License-Identifier: Apache-2.0
"""``infertune`` alone and ``infertune recommend``: what is said first is what matters most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infertune.base.records import replace
from infertune.base.root import Root
from infertune.cli.main import main
from infertune.cli.overview import next_step
from infertune.cli.recommend import choose
from infertune.host.gpu import screens
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_snapshot
from infertune.host.unknown import Unknown

FIXTURES = Path(__file__).parents[1] / "fixtures"
STRIX_HALO = FIXTURES / "strix-halo-128.snapshot"
IDLE: dict[str, Any] = {"state": "idle", "applied": None}
APPLIED: dict[str, Any] = {"state": "applied", "applied": {"profile": "quiet"}}
CRASHED: dict[str, Any] = {"state": "interrupted", "applied": None}


@pytest.mark.parametrize("fixture", sorted(FIXTURES.glob("*.snapshot")), ids=lambda path: path.stem)
def test_eight_lines(
    fixture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--root", str(fixture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = ["machine", "memory", "profile", "boot", "servers", "doctor", "next", "help"]
    assert [line.split()[0] for line in lines] == labels
    assert main(["--root", str(fixture), "overview"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_what_is_said_is_what_the_verbs_say(capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(STRIX_HALO)]
    main([*root, "--json"])
    document = json.loads(capsys.readouterr().out)
    main([*root, "doctor", "--json"])
    found = [each["severity"] for each in json.loads(capsys.readouterr().out)["findings"]]
    assert document["findings"] == {
        severity: found.count(severity) for severity in ("error", "warning", "info")
    }
    main([*root, "machine", "--json"])
    machine = json.loads(capsys.readouterr().out)
    assert document["memory_bytes"] == machine["memory"]["total_bytes"]
    pools = {each["when"]: each["bytes"] for each in machine["gpu_memory"]["pools"]}
    assert document["gpu_memory_bytes"] == pools["now"]
    assert document["next"]["command"] == "infertune recommend"


@pytest.mark.parametrize(
    ("status", "boot", "errors", "servers", "command"),
    [
        (IDLE, "none", 0, [], "recommend"),
        (APPLIED, "none", 0, [], "serve quiet"),
        (APPLIED, "active", 0, [("chat", "active")], "status"),
        (APPLIED, "none", 0, [("chat", "active"), ("code", "failed")], "logs code"),
        (APPLIED, "pending-reboot", 0, [("code", "failed")], "boot status"),
        (APPLIED, "pending-reboot", 1, [], "doctor"),
        (CRASHED, "pending-reboot", 1, [], "recover"),
    ],
)
def test_what_is_wrong_comes_first(
    status: dict[str, Any],
    boot: str,
    errors: int,
    servers: list[tuple[str, str]],
    command: str,
) -> None:
    findings = {"error": errors, "warning": 0, "info": 2}
    assert next_step(status, boot, findings, servers)[0] == f"infertune {command}"


def test_a_warning_waits_until_something_is_served() -> None:
    findings = {"error": 0, "warning": 1, "info": 0}
    assert next_step(APPLIED, "none", findings, [])[0] == "infertune serve quiet"
    told = next_step(APPLIED, "none", findings, [("chat", "active")])
    assert told == ("infertune doctor", "1 warning to look at")


@pytest.fixture(scope="module")
def strix_halo() -> Machine:
    with open_snapshot(str(STRIX_HALO)) as root:
        return read_machine(root)


@pytest.mark.parametrize(
    ("connected", "mains", "profile", "why"),
    [
        ((), None, "long-context", "no screen is connected"),
        (("DP-1",), None, "desktop-share", "a screen is connected (DP-1)"),
        ((), True, "desktop-share", "battery"),
        ((), False, "desktop-share", "battery"),
        (Unknown("nobody says"), None, "long-context", "not known"),
    ],
)
def test_what_is_recommended(
    connected: tuple[str, ...] | Unknown,
    mains: bool | None,
    profile: str,
    why: str,
    strix_halo: Machine,
) -> None:
    choice = choose(strix_halo, connected, mains)
    assert choice.profile == profile
    assert why in choice.because[0]
    without = choose(replace(strix_halo, gpus=()), connected, mains)
    assert (without.profile, "no AMD GPU" in without.because[0]) == ("long-context", True)


def test_a_screen_is_a_connector_with_something_on_it(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert isinstance(screens(root), Unknown)
    for name, status in (
        ("card1-DP-1", "connected"),
        ("card1-eDP-1", "disconnected"),
        ("card0-HDMI-A-2", "connected"),
        ("card1-Writeback-1", "unknown"),
    ):
        directory = tmp_path / "sys/class/drm" / name
        directory.mkdir(parents=True)
        (directory / "status").write_text(f"{status}\n")
    (tmp_path / "sys/class/drm/card1").mkdir()
    assert screens(root) == ("HDMI-A-2", "DP-1")


@pytest.mark.parametrize("fixture", ["rog-z13", "strix-halo-128"])
def test_what_would_change_is_what_plan_says(
    fixture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(FIXTURES / f"{fixture}.snapshot")]
    assert main([*root, "recommend", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main([*root, "plan", document["profile"], "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    for outcome, key in (("set", "changes_now"), ("pending-reboot", "changes_at_boot")):
        assert set(document[key]) == {i["knob"] for i in items if i["outcome"] == outcome}
    names = [each["profile"] for each in document["others"]]
    assert {document["profile"], "base"}.isdisjoint(names)
    assert "throughput" in names
