# SPDX-License-Identifier: Apache-2.0
"""The whole command line on this kernel's real files, killed for real, with the values back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS, read_live, targets
from infertune.catalogue.server_settings import SERVER_SETTINGS, parse_help, server_arguments
from infertune.cli.main import main
from infertune.engine.session import session
from infertune.host.machine import read_machine
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from support import At, Counter, in_child, kill

REPOSITORY = Path(__file__).parents[2]
PROFILES = sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.toml"))

pytestmark = pytest.mark.root_only


def values() -> dict[str, str | None]:
    """What every knob of this kernel says, but for the latency requests of other programs."""
    root = Root("/")
    machine = read_machine(root)
    found = [
        t for knob in KNOBS.values() if not knob.while_open for t in targets(root, machine, knob)
    ]
    return {path: reading.value for path, reading in read_live(root, found).items()}


@pytest.fixture(autouse=True)
def original() -> Iterator[dict[str, str | None]]:
    """The values before; whatever a test does to them, they are back after it."""
    root = Root("/")
    before = values()
    kept = {path: Path(path).read_text() for path in before}
    yield before
    with session(root, "revert") as ours:
        ours.revert()
    for path, value in values().items():
        if value != before[path]:
            words = kept[path].split()
            chosen = next((word.strip("[]") for word in words if "[" in word), words[0])
            Path(path).write_text(chosen)
    assert values() == before


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_applies_verifies_and_reverts(
    profile: str, original: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply", profile, "--json"]) == 0
    applied = json.loads(capsys.readouterr().out)
    assert applied["failed"] is None
    for item in applied["items"]:
        if item["outcome"] == "applied":
            assert values()[item["path"]] == item["want"]
    assert main(["verify", profile]) == 0, capsys.readouterr().out
    assert main(["status"]) == 0
    assert main(["revert"]) == 0
    assert values() == original


def test_from_profile_to_profile(original: dict[str, str | None]) -> None:
    for profile in [*PROFILES, *reversed(PROFILES)]:
        assert main(["apply", profile]) == 0
        assert main(["verify", profile]) == 0
    assert main(["revert"]) == 0
    assert values() == original


def test_a_change_of_somebody_else_is_left(
    original: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("/proc/sys/vm/swappiness")
    assert main(["apply", "long-context"]) == 0
    path.write_text("33")
    assert main(["status"]) == 1
    assert main(["verify", "long-context"]) == 1
    assert main(["revert"]) == 1
    assert "left as it is" in capsys.readouterr().out
    assert path.read_text() == "33\n"
    path.write_text(str(original[str(path)]))


def test_killed_at_every_step_on_this_kernel(
    original: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    def apply(root: Root) -> None:
        with session(root, "apply long-context") as ours:
            ours.apply(resolve(load_profile(root, "long-context"), read_machine(root), "cpu"))

    counter = Counter()
    apply(Root("/", hook=counter))
    assert main(["revert"]) == 0
    total = len(counter.steps)
    for number in range(1, total + 1):
        hook = At(number, kill)
        status = in_child(lambda hook=hook: apply(Root("/", hook=hook)))  # type: ignore[misc]
        assert status == 9, f"step {number} did not kill"
        assert main(["recover"]) == 0
        assert values() == original, f"killed at step {number}"
    with capsys.disabled():
        print(f"\n  kill -9 on this kernel: originals back at {total} of {total} points")


STRACE = shutil.which("strace")


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("syscall", ["write", "fsync", "rename", "openat"])
def test_killed_by_strace(
    syscall: str, original: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same without any help of our own code: the kernel kills at the n-th system call.

    strace kills at the entry, so the call itself does not happen.
    """
    watched = [
        "/run/infertune/journal",
        "/run/infertune/.journal.infertune",
        "/var/lib/infertune/journal",
        "/var/lib/infertune/.journal.infertune",
        "/run/infertune/lock",
        *(path for path in original if "transparent_hugepage" in path or "swappiness" in path),
    ]
    points = 0
    for number in range(1, 100):
        command = [
            str(STRACE),
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            *(word for path in watched for word in ("-P", path)),
            "-e",
            f"inject={syscall}:signal=KILL:when={number}",
            sys.executable,
            "-B",
            "-m",
            "infertune",
            "apply",
            "long-context",
        ]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY / "daemon")}
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=60, check=False
        )
        if b"ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        if done.returncode == 0:
            break
        assert done.returncode in (-9, 137), done.stderr
        points += 1
        assert main(["recover"]) in (0, 1)
        assert values() == original, f"{syscall} number {number}"
    assert main(["recover"]) == 0
    assert points >= 1
    with capsys.disabled():
        print(f"\n  strace killed at {syscall}: originals back at {points} of {points} points")


def test_latency_is_held_while_a_command_runs_and_let_go_after(
    capfd: pytest.CaptureFixture[str],
) -> None:
    device = Path("/dev/cpu_dma_latency")
    if not device.exists():
        pytest.skip("no PM-QoS device")

    def limit() -> int:
        with device.open("rb") as file:
            return int.from_bytes(file.read(4), "little", signed=True)

    before = limit()
    read = "import sys; print(int.from_bytes(open('/dev/cpu_dma_latency','rb').read(4),'little'))"
    assert main(["run", "low-latency", "--", sys.executable, "-c", read]) == 0
    assert "99\n" in capfd.readouterr().out
    assert limit() == before


@pytest.mark.skipif(shutil.which("llama-server") is None, reason="no llama-server on PATH")
def test_a_real_llama_server_knows_our_settings() -> None:
    text = subprocess.run(
        ["llama-server", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "--ctx-size" in parse_help(text)
    wanted = {"ctx_size": "4096", "flash_attn": "on", "load_mode": "auto", "metrics": "1"}
    assert wanted.keys() <= SERVER_SETTINGS.keys()
    _, refused = server_arguments(wanted, text, model="m.gguf", port=8080)
    assert not refused
