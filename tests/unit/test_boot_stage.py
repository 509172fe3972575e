# SPDX-License-Identifier: Apache-2.0
"""Staging and undoing: exact, and old or new wherever it is cut off."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from boot_trees import BOOT_ID, FEDORA_ENTRY, TREES, Facts, Tools, build, facts
from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.root import Root, Step
from infertune.boot import guard, record, staging
from infertune.boot.change import AT_THE_TRY, Change, Edit, Part
from infertune.boot.options import options
from infertune.boot.plan import plan
from infertune.boot.stacks.grub import SCRIPT as GRUB_SCRIPT
from infertune.boot.state import read_status
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.modprobe import read_sources
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from support import At, Counter, fail, in_child, kill, shorten

NOT_WRITABLE = ("bootc", "bootc-composefs", "nixos", "container")
WRITABLE = [tree for tree in TREES if tree not in NOT_WRITABLE]
KINDS = ["debian-grub", "fedora-bls", "opensuse-grub2-bls"]
"""Drop-ins alone, a trial beside the default, and a file edited in place."""


def change_for(root: Root, profile: str = "boot") -> Change:
    machine = read_machine(root)
    wanted = resolve(load_profile(root, profile), machine)
    return plan(root, machine, options(root, machine, wanted, read_sources(root))[0])


def stage(root: Root, tools: Tools, profile: str = "boot", *, by_hand: bool = False) -> None:
    with staging.lock(root, "test"):
        staging.stage(root, profile, change_for(root, profile), tools, by_hand=by_hand)


def undo(root: Root, tools: Tools) -> None:
    with staging.lock(root, "test"):
        staging.undo(root, tools)


def start(base: Path, number: int, **live: str) -> str:
    """Another boot, with what the kernel then says; what the early unit does at it."""
    (base / BOOT_ID.lstrip("/")).write_text(f"{number:08d}-0000-0000-0000-000000000000\n")
    for name, text in live.items():
        path = {"cmdline": "proc/cmdline", "pages": "sys/module/ttm/parameters/pages_limit"}[name]
        (base / path).write_text(text)
    root = Root(base)
    with staging.lock(root, "start"):
        return guard.at_start(root, Tools(base)).what


def works(base: Path, number: int) -> str:
    """A boot in which everything that was staged is in force."""
    stage = record.load(Root(base))
    assert stage is not None
    words = []
    for option in stage.options:
        for parameter in option.parameters:
            words += [f"{parameter.word}={option.value}"]
            if parameter.module:
                (base / parameter.path.lstrip("/")).write_text(f"{option.value}\n")
    return start(base, number, cmdline=f"ro {' '.join(words)}\n")


def confirm(base: Path, *, by_unit: bool = True) -> bool:
    root = Root(base)
    with staging.lock(root, "confirm"):
        return guard.confirm(root, Tools(base), by_unit=by_unit)


@pytest.fixture(params=WRITABLE)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build(tmp_path, request.param)


# -- exact ---------------------------------------------------------------------------


def test_undo_is_exact(tree: Path) -> None:
    odd = {path for path in (tree / "etc").rglob("*") if path.is_file()}
    for number, path in enumerate(sorted(odd)):
        os.chmod(path, 0o600 + number % 0o70)
        if os.geteuid() == 0:
            os.chown(path, 1000 + number, 2000)
    before = facts(tree)
    tools = Tools(tree)
    stage(Root(tree), tools)
    assert facts(tree) != before or tools.ran
    undo(Root(tree), tools)
    assert facts(tree) == before
    assert not list((tree / "var/lib/infertune").iterdir())


def test_tried_kept_and_undone(tree: Path) -> None:
    """What is there before is untouched while it is tried, where the loader can start a trial."""
    old, tools = facts(tree), Tools(tree)
    change = change_for(Root(tree))
    stage(Root(tree), tools)
    trial = {file.path.lstrip("/") for file in change.trial.files if not file.briefly}
    trial |= {image.trial.lstrip("/") for image in change.trial.images}
    staged = facts(tree)
    if change.trial:
        written = {path for path in staged if staged[path] != old.get(path)}
        written -= {path for path in written if (tree / path).is_dir()}
        # Where GRUB keeps what it boots once.
        assert written - {"boot/grub2/grubenv"} <= trial
    assert works(tree, 1) == "tried"
    assert guard.at_target(Root(tree), tools).what == "kept"
    kept = facts(tree)
    lasting = {each.path.lstrip("/") for each in change.lasting.texts}
    assert not (trial - lasting) & set(kept)
    for file in (*change.lasting.files, *change.lasting.edits):
        text = kept[file.path.lstrip("/")][0].decode()
        assert all(word not in text for word in AT_THE_TRY if file.path != GRUB_SCRIPT)
        assert any(option.value in text for option in change.options) or "infertune" in text
    start(tree, 2)
    undo(Root(tree), tools)
    assert facts(tree) == old


@pytest.mark.parametrize("name", ["fedora-bls", "arch-systemd-boot", "efistub"])
def test_what_of_the_trial_could_not_be_removed_goes_with_the_undo(
    name: str, tmp_path: Path
) -> None:
    build(tmp_path, name)
    old, tools = facts(tmp_path), Tools(tmp_path)
    change = change_for(Root(tmp_path))
    stage(Root(tmp_path), tools)
    assert works(tmp_path, 1) == "tried"
    [once] = change.trial.commands
    broken = Tools(tmp_path, lambda argv: tuple(argv) == once.undo)
    assert guard.at_target(Root(tmp_path), broken).what == "kept"
    tools.ran.clear()
    undo(Root(tmp_path), tools)
    assert " ".join(once.undo) in tools.ran
    assert facts(tmp_path) == old


def test_an_existing_drop_in_of_that_name_comes_back(tmp_path: Path) -> None:
    build(tmp_path, "unknown")
    drop_in = tmp_path / "etc/modprobe.d/zz-infertune.conf"
    drop_in.write_bytes(b"# mine\r\n\xff\n")
    drop_in.chmod(0o640)
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path))
    assert b"pages_limit" in drop_in.read_bytes()
    assert drop_in.stat().st_mode & 0o777 == 0o640
    # What others may not read there they may not read in the record either.
    assert (tmp_path / "var/lib/infertune/boot").stat().st_mode & 0o777 == 0o600
    undo(Root(tmp_path), Tools(tmp_path))
    assert facts(tmp_path) == before


def test_undo_rebuilds_what_stage_has_built(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    tools = Tools(tmp_path)
    stage(Root(tmp_path), tools)
    assert tools.ran == [
        "/usr/bin/grub-editenv - set infertune_boot=staged",
        "/usr/sbin/update-grub",
    ]
    tools.ran.clear()
    undo(Root(tmp_path), tools)
    assert tools.ran == ["/usr/bin/grub-editenv - unset infertune_boot", "/usr/sbin/update-grub"]


def test_a_kernel_installed_meanwhile_keeps_its_entry_without_our_options(tmp_path: Path) -> None:
    build(tmp_path, "fedora-bls-lvm")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path))
    entry = tmp_path / FEDORA_ENTRY.format("7.2").lstrip("/")
    cmdline = (tmp_path / "etc/kernel/cmdline").read_text()
    assert "amd_iommu=off" in cmdline
    entry.write_text(f"title new\noptions {cmdline}")
    undo(Root(tmp_path), Tools(tmp_path))
    assert "amd_iommu" not in entry.read_text()
    entry.unlink()
    assert facts(tmp_path) == before


def test_what_another_program_made_of_our_file_is_not_overwritten(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))
    (tmp_path / "etc/default/grub.d/zz-infertune.cfg").write_text("theirs\n")
    before = facts(tmp_path)
    with pytest.raises(Failed, match=r"zz-infertune.cfg was changed by another program since"):
        undo(Root(tmp_path), Tools(tmp_path))
    assert facts(tmp_path) == before


def test_a_command_line_that_another_program_wrote_anew_is_its_own(tmp_path: Path) -> None:
    """Our words are not in it: there is nothing to take back, and nothing that needs a person."""
    build(tmp_path, "opensuse-grub2-bls")
    stage(Root(tmp_path), Tools(tmp_path))
    (tmp_path / "etc/kernel/cmdline").write_text("root=UUID=2 theirs\n")
    undo(Root(tmp_path), Tools(tmp_path))
    assert (tmp_path / "etc/kernel/cmdline").read_text() == "root=UUID=2 theirs\n"
    assert record.load(Root(tmp_path)) is None


@pytest.mark.parametrize("by", ["undo", "guard"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("opensuse-grub2-bls", "etc/kernel/cmdline"),
        ("grub-without-drop-ins", "etc/default/grub"),
        ("debian-grub-btrfs", "etc/default/grub.d/zz-infertune.cfg"),
    ],
)
def test_what_somebody_added_since_stays_and_ours_goes(
    name: str, file: str, by: str, tmp_path: Path
) -> None:
    build(tmp_path, name)
    path = tmp_path / file
    before = path.read_text() if path.exists() else ""
    stage(Root(tmp_path), Tools(tmp_path))
    theirs = "theirs=1\n"
    path.write_text(path.read_text() + theirs)
    if by == "undo":
        undo(Root(tmp_path), Tools(tmp_path))
    else:
        start(tmp_path, 1)
        start(tmp_path, 2)
    assert path.read_text().split("\n") == [*before.splitlines(), *theirs.split("\n")]
    assert not (tmp_path / "etc/modprobe.d/zz-infertune.conf").exists()


def test_the_guard_puts_back_what_it_can_beside_what_somebody_changed(tmp_path: Path) -> None:
    """Or one file that somebody edited would keep a machine in a boot setting that is bad."""
    build(tmp_path, "debian-grub-btrfs")
    drop_in = tmp_path / "etc/default/grub.d/zz-infertune.cfg"
    stage(Root(tmp_path), Tools(tmp_path))
    drop_in.write_text("theirs\n")
    start(tmp_path, 1, pages=PAGES)
    assert start(tmp_path, 2) == "reboot"
    assert drop_in.read_text() == "theirs\n"
    [note] = read_status(Root(tmp_path), read_machine(Root(tmp_path))).notes
    assert "zz-infertune.cfg was changed by another program since, and is left" in note
    assert start(tmp_path, 3) == "nothing"


def test_what_is_back_is_its_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An undo whose rebuild failed, a file edited since, and the undo again."""
    build(tmp_path, "grub-without-drop-ins")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    with pytest.raises(Failed):
        undo(Root(tmp_path), Tools(tmp_path, lambda _: True))
    (tmp_path / "etc/default/grub").write_text("theirs\n")
    assert main(["--root", str(tmp_path), "boot", "undo"]) == 0
    assert (tmp_path / "etc/default/grub").read_text() == "theirs\n"
    assert not (tmp_path / "var/lib/infertune/boot").exists()


def test_one_tool_that_fails_does_not_keep_the_others_from_undoing(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path))
    tools = Tools(tmp_path, lambda argv: "editenv" in argv[0])
    with pytest.raises(Failed, match=r"grub-editenv.*no space left"):
        undo(Root(tmp_path), tools)
    assert tools.ran[1:] == ["/usr/sbin/update-grub"]
    assert facts(tmp_path) == before
    # What is done is remembered: only what failed is tried again.
    tools = Tools(tmp_path)
    undo(Root(tmp_path), tools)
    assert tools.ran == ["/usr/bin/grub-editenv - unset infertune_boot"]
    assert not (tmp_path / "var/lib/infertune/boot").exists()


def test_a_tool_that_always_fails_is_not_run_at_every_boot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F1: two tries, then *failed* with what to do; a person can try again, or end it."""
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    start(tmp_path, 1, pages=PAGES)
    broken = Tools(tmp_path, lambda _: True)
    (tmp_path / BOOT_ID.lstrip("/")).write_text("second\n")
    with pytest.raises(Failed, match="the next boot tries again, once"):
        guard.at_start(Root(tmp_path), broken)
    assert guard.at_target(Root(tmp_path), broken).what == "put-back"
    for boot in range(3, 6):
        (tmp_path / BOOT_ID.lstrip("/")).write_text(f"{boot}\n")
        assert guard.at_start(Root(tmp_path), broken).what == "nothing"
        assert guard.at_target(Root(tmp_path), broken).what == "nothing"
    assert len(broken.ran) == 2
    status = read_status(Root(tmp_path), read_machine(Root(tmp_path)))
    assert status.state == "failed"
    assert "update-grub: exit code 1: no space left on device" in status.notes[0]
    assert "'infertune boot undo --force' forgets it" in status.notes[1]
    with pytest.raises(Failed, match="'infertune boot undo' tries again"):
        stage(Root(tmp_path), broken, "size")
    (tmp_path / "usr/sbin/update-grub").chmod(0o755)
    (tmp_path / "usr/sbin/update-grub").write_text("#!/bin/false\n")
    with staging.lock(Root(tmp_path), "undo"):
        done = staging.undo(Root(tmp_path), broken, force=True)
    assert done is not None
    assert "update-grub: exit code 1" in done.left[0]
    stage(Root(tmp_path), Tools(tmp_path), "size")


def test_an_undo_that_always_fails_is_not_run_at_every_boot(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    broken = Tools(tmp_path, lambda _: True)
    with pytest.raises(Failed):
        undo(Root(tmp_path), broken)
    for boot in range(1, 5):
        (tmp_path / BOOT_ID.lstrip("/")).write_text(f"{boot}\n")
        with contextlib.suppress(Failed):
            guard.at_start(Root(tmp_path), broken)
    assert len(broken.ran) == staging.TRIES
    undo(Root(tmp_path), Tools(tmp_path))  # a person's try is always one


def test_one_file_that_cannot_be_put_back_does_not_keep_the_others(tmp_path: Path) -> None:
    """Somebody's ``chattr +i``, or a bad block."""
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))

    def immutable(step: Step) -> None:
        if step.path.endswith("zz-infertune.cfg"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), step.path)

    tools = Tools(tmp_path)
    with pytest.raises(Failed, match=r"EPERM.*zz-infertune.cfg"):
        undo(Root(tmp_path, hook=immutable), tools)
    assert not (tmp_path / "etc/grub.d/01_infertune").exists()
    assert tools.ran == ["/usr/bin/grub-editenv - unset infertune_boot", "/usr/sbin/update-grub"]
    undo(Root(tmp_path), Tools(tmp_path))
    assert not (tmp_path / "etc/default/grub.d").exists()
    assert not (tmp_path / "var/lib/infertune/boot").exists()


def test_a_boot_loader_that_was_removed_does_not_keep_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path))
    for gone in ("usr/sbin/update-grub", "usr/bin/grub-editenv"):
        (tmp_path / gone).unlink()
    assert main(["--root", str(tmp_path), "boot", "undo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["left"] == [
        "/usr/bin/grub-editenv is gone: what it built is not rebuilt",
        "/usr/sbin/update-grub is gone: what it built is not rebuilt",
    ]
    assert facts(tmp_path) == before
    assert main(["--root", str(tmp_path), "boot", "undo"]) == 0


def test_a_driver_that_is_not_there_keeps_only_the_firmware_waiting(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    card = tmp_path / "sys/class/drm/card1/device"
    (card / "uma").mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "device").write_text("0x1586\n")
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    (card / "mem_info_vram_total").write_text(f"{16 << 30}\n")
    (card / "uma/carveout").write_text("7\n")
    (card / "uma/carveout_options").write_text("0: Minimum (512 MB)\n7: M (16 GB)\n")
    text = '[boot]\namdgpu.uma_carveout = "512MiB"\nttm.pages_limit = "96GiB"\n'
    (tmp_path / "etc/infertune/profiles/both.toml").write_text(text)
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "both")
    start(tmp_path, 1, pages=PAGES)
    # The second start, early: amdgpu is not loaded yet.
    (card / "uma").rename(tmp_path / "away")
    (tmp_path / BOOT_ID.lstrip("/")).write_text("second\n")
    tools = Tools(tmp_path)
    with pytest.raises(Failed, match="uma/carveout"):
        guard.at_start(Root(tmp_path), tools)
    assert tools.ran == ["/usr/sbin/update-grub"]
    assert facts(tmp_path) == before
    # The same start, late.
    (tmp_path / "away").rename(card / "uma")
    tools = Tools(tmp_path)
    assert guard.at_target(Root(tmp_path), tools).what == "reboot"
    assert tools.ran == []
    assert (card / "uma/carveout").read_text() == "7\n"


def test_stage_twice_is_refused(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))
    before = facts(tmp_path)
    with pytest.raises(UsageError, match="nothing was touched"):
        stage(Root(tmp_path), Tools(tmp_path))
    assert facts(tmp_path) == before


@pytest.mark.parametrize("name", KINDS)
def test_a_tool_that_fails_puts_everything_back(name: str, tmp_path: Path) -> None:
    build(tmp_path, name)
    before = facts(tmp_path)
    count = len(change_for(Root(tmp_path)).now.commands)
    for number in range(count):
        calls: list[Sequence[str]] = []

        def nth(argv: Sequence[str], n: int = number, seen: list[Sequence[str]] = calls) -> bool:
            seen.append(argv)
            return len(seen) == n + 1

        with pytest.raises(Failed, match=r"no space left.*everything is as it was"):
            stage(Root(tmp_path), Tools(tmp_path, nth))
        assert facts(tmp_path) == before
        assert not (tmp_path / "var/lib/infertune/boot").exists()


def test_a_tool_that_always_fails_is_said_and_tried_again(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    with pytest.raises(Failed, match="not everything could be put back"):
        stage(Root(tmp_path), Tools(tmp_path, lambda _: True))
    assert facts(tmp_path) == before
    status = read_status(Root(tmp_path), read_machine(Root(tmp_path)))
    assert status.state == "staged"
    assert "cut short" in status.notes[0]
    undo(Root(tmp_path), Tools(tmp_path))
    assert not (tmp_path / "var/lib/infertune/boot").exists()


@pytest.mark.parametrize(
    ("mounts", "staged"),
    [
        ("tmpfs /var tmpfs rw 0 0\n", False),
        ("/dev/sda3 /var ext4 rw 0 0\n", True),
        ("tmpfs /var tmpfs rw 0 0\n/dev/sda3 /var/lib/infertune ext4 rw 0 0\n", True),
        ("tmpfs /var/lib/infer tmpfs rw 0 0\n", True),
    ],
)
def test_a_record_that_would_not_outlive_the_boot_is_no_record(
    mounts: str, staged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    file = tmp_path / "proc/self/mounts"
    file.write_text(file.read_text() + mounts)
    before = facts(tmp_path)
    assert main(["--root", str(tmp_path), "boot", "stage", "size"]) == (0 if staged else 3)
    if not staged:
        assert "would not outlive this boot" in capsys.readouterr().err
        assert facts(tmp_path) == before


# -- cut off -------------------------------------------------------------------------


def steps(base: Path, work: Callable[[Root], None]) -> int:
    counter = Counter()
    work(Root(base, hook=counter))
    return len(counter.steps)


def whole(base: Path, old: Facts, new: Facts) -> None:
    """Every file is old or new; none is half, and none is of a third kind."""
    for path, found in facts(base).items():
        if path.endswith(".infertune"):
            continue  # a successor that was not renamed: hidden, so that nobody reads it
        words = [_words(each) for each in (old.get(path), new.get(path)) if each]
        assert _words(found) in words, path


def _words(fact: tuple[bytes, int, int, int]) -> tuple[object, ...]:
    """Content but for the spaces that a tool leaves between options, mode and owner."""
    return (fact[0].replace(b'"', b" ").split(), *fact[1:])


@pytest.mark.parametrize(
    ("name", "recovery"), [*((name, "undo") for name in KINDS), (KINDS[0], "start")]
)
def test_killed_at_every_step(
    name: str, recovery: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(tmp_path / "model", name)
    old = facts(model)
    stage(Root(model), Tools(model))
    new = facts(model)
    undo(Root(model), Tools(model))
    points = 0
    for before in (None, stage):
        work = undo if before else stage
        number = 0
        while True:
            number += 1
            base = build(tmp_path / f"{work.__name__}-{number}", name)
            if before:
                before(Root(base), Tools(base))
            root = Root(base, hook=At(number, kill))
            status = in_child(lambda r=root, w=work: w(r, Tools(r.base)))  # type: ignore[misc]
            if status == 0:
                break
            assert status == 9
            points += 1
            whole(base, old, new)
            if recovery == "start":
                start(base, number)
            state = record.load(Root(base))
            if state and state.in_force:
                assert {k: v for k, v in facts(base).items() if not k.endswith(".infertune")} == new
            undo(Root(base), Tools(base))
            undo(Root(base), Tools(base))
            assert facts(base) == old, f"killed at step {number} of {work.__name__}"
            assert not list((base / "var/lib").glob("infertune/*"))
    assert points > 15
    with capsys.disabled():
        print(f"\n  kill -9 in stage and undo ({name}, then {recovery}): {points} of {points}")


@pytest.mark.parametrize("name", KINDS)
def test_killed_in_every_command(name: str, tmp_path: Path) -> None:
    """The loaders' tools take minutes: that is where a power cut or a kill comes in."""
    model = build(tmp_path / "model", name)
    old = facts(model)
    commands = len(change_for(Root(model)).now.commands)
    for number in range(2 * commands):
        base = build(tmp_path / str(number), name)
        left = [number]

        def now(argv: Sequence[str], left: list[int] = left) -> bool:
            left[0] -= 1
            if left[0] < 0:
                kill(Step("command", argv[0]))
            return False

        def both(base: Path = base) -> None:
            tools = Tools(base, now)
            stage(Root(base), tools)
            undo(Root(base), tools)

        assert in_child(both) == 9
        if number % 2:
            start(base, number)
        undo(Root(base), Tools(base))
        undo(Root(base), Tools(base))
        assert facts(base) == old, f"killed in command {number}"
        assert not (base / "var/lib/infertune/boot").exists()


@pytest.mark.parametrize("name", [*KINDS, "arch-uki"])
@pytest.mark.parametrize("at", ["put-back", "confirm"])
def test_the_guard_killed_at_every_step(name: str, at: str, tmp_path: Path) -> None:
    """Killed wherever: the next start ends it, and the machine is started again once at most."""
    model = build(tmp_path / "model", name)
    old = facts(model)
    stage(Root(model), Tools(model))
    works(model, 1)
    guard.at_target(Root(model), Tools(model))
    kept = facts(model)
    work = guard.at_start if at == "put-back" else guard.at_target
    number, points = 0, 0
    while True:
        number += 1
        base = build(tmp_path / str(number), name)
        stage(Root(base), Tools(base))
        new = facts(base)
        assert works(base, 1) == "tried"
        if at == "put-back":
            (base / BOOT_ID.lstrip("/")).write_text("second\n")

        def killed(base: Path = base, number: int = number) -> None:
            work(Root(base, hook=At(number, kill)), Tools(base))

        if in_child(killed) == 0:
            break
        points += 1
        # The same start goes on; then two more.  A new kernel has what the files say.
        verdicts = [guard.at_target(Root(base), Tools(base)).what]
        for boot in (3, 4):
            changed = facts(base) in (new, kept)
            pages = PAGES if changed else "16384000\n"
            line = f"ro {OPTIONS}\n" if changed else "ro\n"
            verdicts.append(start(base, boot, pages=pages, cmdline=line))
        assert verdicts.count("reboot") <= 1, verdicts
        assert verdicts[-1] == "nothing"
        phase = record.load(Root(base))
        assert phase is not None
        assert (phase.phase, facts(base)) == (
            ("failed", old) if at == "put-back" else ("confirmed", kept)
        ), f"killed at step {number}"
    assert points > 3


FAULTS: dict[str, Callable[[Step], int | None]] = {
    **{each: fail(getattr(errno, each)) for each in ("ENOSPC", "EROFS", "EIO", "EACCES", "EINTR")},
    "short write": shorten,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", KINDS)
def test_every_step_fails(name: str, fault: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", name)
    old = facts(model)
    total = steps(model, lambda root: stage(root, Tools(model)))
    for number in range(1, total + 1):
        base = build(tmp_path / str(number), name)
        hook = At(number, FAULTS[fault])
        error = None
        try:
            stage(Root(base, hook=hook), Tools(base))
        except InfertuneError as caught:
            error = caught
        if fault == "short write" and not (hook.hit and hook.hit.size):
            continue
        assert error is not None, f"{fault} at {hook.hit}"
        assert "\n" not in error.message
        undo(Root(base), Tools(base))
        assert facts(base) == old, f"{fault} at {hook.hit}"


def test_a_second_at_the_same_time_is_refused(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    root = Root(tmp_path)
    with staging.lock(root, "first"), pytest.raises(InfertuneError, match="busy: first"):
        stage(root, Tools(tmp_path))


# -- the record ----------------------------------------------------------------------


def test_what_a_record_cannot_hold_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    """A record that cannot be read again could never be undone."""
    build(tmp_path, "fedora-bls")
    paths = [f"/boot/loader/entries/{number}.conf" for number in range(4)]
    for path in paths:
        (tmp_path / path.lstrip("/")).write_bytes(b"options root=1\n".ljust(1 << 20, b"#"))
    before = facts(tmp_path)
    large = Part(edits=tuple(Edit(path, "options", ("quiet",)) for path in paths))
    with pytest.raises(Failed, match=r"EFBIG.*nothing was touched"):
        staging.stage(Root(tmp_path), "large", Change("bls", lasting=large), Tools(tmp_path))
    assert facts(tmp_path) == before
    assert record.load(Root(tmp_path)) is None


def test_a_file_that_is_too_large_to_keep_is_not_kept_in_part(tmp_path: Path) -> None:
    """Its first MiB, put back, would be what is left of it."""
    file = tmp_path / "entry.conf"
    file.write_bytes(b"x" * record.MAX_FILE)
    kept = record.read_content(Root(tmp_path), "/entry.conf")
    assert kept is not None
    assert kept.data == file.read_bytes()
    file.write_bytes(b"x" * (record.MAX_FILE + 1))
    with pytest.raises(OSError, match="File too large"):
        record.read_content(Root(tmp_path), "/entry.conf")


def _format_1(phase: str, text: str) -> bytes:
    """What 0.1.0 has written for an entry with ``amd_iommu=off``."""

    def content(line: str) -> dict[str, object]:
        data = base64.b64encode(line.encode()).decode()
        return {"data": data, "mode": 0o644, "uid": os.geteuid(), "gid": os.getegid()}

    parameter = {"module": "", "name": "amd_iommu"}
    option = {
        "id": "amd_iommu",
        "value": "off",
        "parameters": [parameter],
        "file": None,
        "on_command_line": True,
        "source": "/etc/infertune/profiles/kernel.toml:2",
        "note": None,
    }
    new = text.replace("root=", "amd_iommu=off root=")
    edited = {"before": content(text), "after": content(new), "edited": False}
    found = {
        "format": 1,
        "phase": phase,
        "profile": "kernel",
        "since": "2026-11-28T19:42:03+00:00",
        "boot_id": "11111111-2222-3333-4444-555555555555",
        "tried": None if phase == "staging" else "00000001-0000-0000-0000-000000000000",
        "by_hand": False,
        "counted": phase == "trying",
        "options": [option],
        "files": [{"path": "/boot/loader/entries/arch.conf", **edited}],
        "directories": ["/etc/kernel"],
        "settings": [],
        "steps": [{"argv": ["/bin/a"], "undo": ["/usr/bin/bootctl", "b", ""], "confirm": []}],
        "reason": None,
        "rebooted": False,
    }
    line = json.dumps(found).encode()
    return b"%08x %s\n" % (zlib.crc32(line), line)


@pytest.mark.parametrize("by", ["undo", "guard"])
@pytest.mark.parametrize("phase", ["staging", "trying", "confirmed"])
def test_what_0_1_0_has_staged_is_put_back(phase: str, by: str, tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    before = facts(tmp_path)
    entry = tmp_path / "boot/loader/entries/arch.conf"
    text = entry.read_text()
    entry.write_text(text.replace("root=", "amd_iommu=off root="))
    (tmp_path / "etc/kernel").mkdir()
    file = tmp_path / "var/lib/infertune/boot"
    file.parent.mkdir()
    file.write_bytes(_format_1(phase, text))
    assert read_status(Root(tmp_path), read_machine(Root(tmp_path))).stage is not None
    if by == "guard":
        assert start(tmp_path, 2) == ("nothing" if phase == "confirmed" else "put-back")
    undo(Root(tmp_path), Tools(tmp_path))
    assert facts(tmp_path) == before
    start(tmp_path, 3)
    assert record.load(Root(tmp_path)) is None


def test_every_flipped_byte_and_every_cut_is_seen(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    file = tmp_path / "var/lib/infertune/boot"
    data = file.read_bytes()
    assert record.dump(record.parse(data)) == data
    for number in range(len(data)):
        for bad in (data[:number], data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]):
            with pytest.raises(ValueError, match=r"checksum"):
                record.parse(bad)


@pytest.mark.parametrize("what", [b"", b"\x00" * 99, b"x" * 4096, b"00000000 {}\n", os.mkfifo])
def test_a_damaged_record_is_one_clear_line(
    what: bytes | Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    file = tmp_path / "var/lib/infertune/boot"
    file.parent.mkdir(parents=True)
    file.write_bytes(what) if isinstance(what, bytes) else what(file)
    for words in (["status"], ["plan", "boot"], ["stage", "boot"], ["undo"], ["confirm"]):
        assert main(["--root", str(tmp_path), "boot", *words]) == 3
        err = capsys.readouterr().err
        assert "/var/lib/infertune/boot is damaged" in err
        assert "a bug" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"format":3}', "is of another version of infertune (format 3, this one has 2)"),
        (b'{"format":2,"phase":"gone"}', "is damaged: 'gone' is none of staging, staged"),
        (b"[" * 200_000, "is damaged"),
        (b"[1]", "is damaged"),
    ],
)
def test_a_whole_record_that_is_none_of_ours(
    text: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    file = tmp_path / "var/lib/infertune/boot"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    for words in (["status"], ["plan", "boot"], ["stage", "boot"], ["undo"], ["confirm"]):
        assert main(["--root", str(tmp_path), "boot", *words]) == 3
        err = capsys.readouterr().err
        assert said in err
        assert "a bug" not in err


def test_a_record_is_not_trusted_with_paths(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    stored = record.load(Root(tmp_path))
    assert stored is not None
    bad = record.dump(stored).replace(b"/etc/grub.d/01_infertune", b"/etc/../etc/01_infertune")
    text = bad.partition(b" ")[2].rstrip(b"\n")
    with pytest.raises(ValueError, match="not a path of a record"):
        record.parse(b"%08x %s\n" % (zlib.crc32(text), text))


# -- the guard -----------------------------------------------------------------------

PAGES = "25165824\n"
OPTIONS = (
    "ttm.pages_limit=25165824 ttm.page_pool_size=8192000 "
    "amdgpu.lockup_timeout=20000,20000,20000,20000 "
    "amd_iommu=off isolcpus=2-3 transparent_hugepage=madvise"
)


def state(base: Path) -> str:
    return read_status(Root(base), read_machine(Root(base))).state


def test_tried_once_and_kept(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    new = facts(tmp_path)
    assert state(tmp_path) == "pending-reboot"
    assert start(tmp_path, 1, pages=PAGES) == "tried"
    assert start(tmp_path, 1) == "nothing"  # a second call in the same boot
    assert confirm(tmp_path)
    assert not confirm(tmp_path)
    assert state(tmp_path) == "active"
    for number in range(2, 5):
        assert start(tmp_path, number) == "nothing"
    assert facts(tmp_path) == new
    undo(Root(tmp_path), Tools(tmp_path))
    assert facts(tmp_path) == before


def test_unconfirmed_it_comes_back_at_the_second_start_and_reboots_once(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    assert start(tmp_path, 1, pages=PAGES) == "tried"
    assert start(tmp_path, 2) == "reboot"  # the running kernel has it still
    assert facts(tmp_path) == before
    assert start(tmp_path, 2) == "nothing"
    assert start(tmp_path, 3, pages="16384000\n") == "nothing"
    status = read_status(Root(tmp_path), read_machine(Root(tmp_path)))
    assert status.state == "failed"
    assert status.notes == (
        "'size' was put back: the boot before this one was not confirmed",
    )  # fmt: skip
    stage(Root(tmp_path), Tools(tmp_path), "size")  # another try is a person's to make
    assert state(tmp_path) == "pending-reboot"


def test_no_reboot_where_the_running_kernel_has_none_of_it(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    assert start(tmp_path, 1) == "tried"
    assert start(tmp_path, 2) == "put-back"


def test_what_grub_has_dropped_is_put_back_at_the_start_that_finds_out(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path))
    # The first start hung before the guard ran; GRUB started the second without the options.
    assert start(tmp_path, 2) == "put-back"
    assert facts(tmp_path) == before


def test_a_driver_that_hangs_before_the_guard_has_counted_comes_back_too(tmp_path: Path) -> None:
    """Where GRUB counts it also has what drivers get, and no file of /etc brings it back."""
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    assert not (tmp_path / "etc/modprobe.d/zz-infertune.conf").exists()
    assert "ttm.pages_limit=25165824" in (tmp_path / "etc/grub.d/01_infertune").read_text()
    assert start(tmp_path, 2, cmdline="ro\n") == "put-back"
    assert facts(tmp_path) == before


def test_an_early_start_does_not_miss_what_is_asked_for_before_its_module(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    parameter = tmp_path / "sys/module/ttm/parameters/pages_limit"
    parameter.unlink()  # not loaded that early
    assert start(tmp_path, 1, cmdline="ro ttm.pages_limit=25165824\n") == "tried"
    parameter.write_text(PAGES)
    assert confirm(tmp_path)


def test_a_start_with_a_part_of_the_options_is_none(tmp_path: Path) -> None:
    """Another may have given one of them; what has not been tried must not be confirmed."""
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))
    assert start(tmp_path, 1, cmdline="ro amd_iommu=off\n") == "reboot"  # it has that one


def test_a_start_with_the_options_is_tried(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))
    assert works(tmp_path, 1) == "tried"
    tools = Tools(tmp_path)
    with staging.lock(Root(tmp_path), "confirm"):
        assert guard.confirm(Root(tmp_path), tools, by_unit=True)
    assert tools.ran == ["/usr/bin/grub-editenv - set infertune_boot=confirmed"]


def test_an_undo_that_was_cut_short_is_finished_and_no_failure(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    with pytest.raises(Failed):
        undo(Root(tmp_path), Tools(tmp_path, lambda _: True))
    assert start(tmp_path, 1, pages=PAGES) == "put-back"
    assert facts(tmp_path) == before
    assert state(tmp_path) == "none"


def test_a_guard_that_was_cut_short_goes_on_and_still_says_why(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    start(tmp_path, 1, pages=PAGES)
    (tmp_path / BOOT_ID.lstrip("/")).write_text("another\n")
    with pytest.raises(Failed):
        guard.at_start(Root(tmp_path), Tools(tmp_path, lambda _: True))
    assert start(tmp_path, 3) == "reboot"
    assert facts(tmp_path) == before
    assert "was not confirmed" in read_status(Root(tmp_path), read_machine(Root(tmp_path))).notes[0]


def full_disk(step: Step) -> None:
    if step.action == "write":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), step.path)


def read_only_var(step: Step) -> None:
    if step.path.startswith("/var") and step.action in ("mkdir", "create", "unlink"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), step.path)


@pytest.mark.parametrize("trouble", [full_disk, read_only_var])
@pytest.mark.parametrize("by", ["undo", "guard"])
def test_what_takes_no_room_goes_back_on_a_full_disk(
    by: str, trouble: Callable[[Step], None], tmp_path: Path
) -> None:
    build(tmp_path, "debian-grub-btrfs")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    start(tmp_path, 1, pages=PAGES)
    (tmp_path / BOOT_ID.lstrip("/")).write_text("second\n")
    root = Root(tmp_path, hook=trouble)
    tools = Tools(tmp_path)
    with pytest.raises(Failed, match="everything is back, but that could not be noted"):
        undo(root, tools) if by == "undo" else guard.at_start(root, tools)
    assert facts(tmp_path) == before
    assert tools.ran == ["/usr/sbin/update-grub"]


def test_by_hand_is_not_confirmed_by_the_unit(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size", by_hand=True)
    start(tmp_path, 1, pages=PAGES)
    assert not confirm(tmp_path)
    assert confirm(tmp_path, by_unit=False)
    assert start(tmp_path, 2) == "nothing"


def test_nothing_to_confirm_in_the_boot_that_staged_it(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    assert not confirm(tmp_path)
    with pytest.raises(UsageError, match="at the next boot"):
        confirm(tmp_path, by_unit=False)


def test_a_confirmation_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path))
    works(tmp_path, 1)
    root = Root(tmp_path)
    with pytest.raises(Failed, match="it is not confirmed"):
        guard.confirm(root, Tools(tmp_path, lambda _: True), by_unit=True)
    assert start(tmp_path, 2) == "reboot"


def test_what_grub_has_dropped_is_not_confirmed_though_the_guard_could_not_run(
    tmp_path: Path,
) -> None:
    """Confirmed, GRUB would use options for good with which no start has got this far."""
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    (tmp_path / BOOT_ID.lstrip("/")).write_text("the second start, without the options\n")
    tools = Tools(tmp_path)
    full = Root(tmp_path, hook=full_disk)
    for at in (guard.at_start, guard.at_target):
        with contextlib.suppress(Failed):
            at(full, tools)
    assert not guard.confirm(Root(tmp_path), tools, by_unit=True)
    assert "/usr/bin/grub-editenv - set infertune_boot=confirmed" not in tools.ran


def test_a_person_cannot_confirm_what_grub_has_dropped(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    (tmp_path / BOOT_ID.lstrip("/")).write_text("the guard is not installed\n")
    tools = Tools(tmp_path)
    with pytest.raises(UsageError, match="is without the options"):
        guard.confirm(Root(tmp_path), tools)
    assert tools.ran == []
    (tmp_path / "proc/cmdline").write_text("ro amd_iommu=off\n")
    assert guard.confirm(Root(tmp_path), tools)


def test_the_confirm_point_first_does_what_the_guard_could_not(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    before = facts(tmp_path)
    stage(Root(tmp_path), Tools(tmp_path), "size")
    (tmp_path / BOOT_ID.lstrip("/")).write_text("first\n")
    assert guard.at_start(Root(tmp_path), Tools(tmp_path)).what == "tried"
    # The second start: the guard does not get to run early, the confirm point is reached.
    (tmp_path / BOOT_ID.lstrip("/")).write_text("second\n")
    assert guard.at_target(Root(tmp_path), Tools(tmp_path)).what == "put-back"
    assert facts(tmp_path) == before
    stage(Root(tmp_path), Tools(tmp_path), "size")
    (tmp_path / BOOT_ID.lstrip("/")).write_text("third\n")
    (tmp_path / "sys/module/ttm/parameters/pages_limit").write_text(PAGES)
    assert guard.at_target(Root(tmp_path), Tools(tmp_path)).what == "kept"


# -- what is said about it --------------------------------------------------------------


def test_a_live_write_is_never_called_applied(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    (tmp_path / "sys/module/ttm/parameters/pages_limit").write_text(PAGES)
    assert state(tmp_path) == "pending-reboot"
    # After the boot amdgpu says what it took.
    card = tmp_path / "sys/class/drm/card1/device"
    card.mkdir(parents=True)
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    (card / "mem_info_gtt_total").write_text(f"{62 << 30}\n")
    start(tmp_path, 1)
    status = read_status(Root(tmp_path), read_machine(Root(tmp_path)))
    assert status.state == "failed"
    assert "took a GTT of 62 GiB" in str(status.options[0].reason)
    (card / "mem_info_gtt_total").write_text(f"{96 << 30}\n")
    assert state(tmp_path) == "active"


def test_plan_does_not_call_a_live_write_applied_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    card = tmp_path / "sys/class/drm/card1/device"
    card.mkdir(parents=True)
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    (card / "mem_info_gtt_total").write_text(f"{62 << 30}\n")
    (tmp_path / "sys/module/ttm/parameters/pages_limit").write_text(PAGES)
    assert main(["--root", str(tmp_path), "plan", "size", "--json"]) == 0
    [item] = json.loads(capsys.readouterr().out)["items"]
    assert item["outcome"] == "pending-reboot"
    assert "took a GTT of 62 GiB" in item["reason"]


@pytest.mark.parametrize(
    ("file", "text", "who"),
    [
        ("etc/modprobe.d/zzz.conf", "options ttm pages_limit=5\n", "/etc/modprobe.d/zzz.conf:1"),
        ("proc/cmdline", "ro ttm.pages_limit=5\n", "/proc/cmdline"),
    ],
)
def test_overridden_names_who(file: str, text: str, who: str, tmp_path: Path) -> None:
    build(tmp_path, "debian-grub-btrfs")
    stage(Root(tmp_path), Tools(tmp_path), "size")
    (tmp_path / file).write_text(text)
    start(tmp_path, 1, pages="5\n")
    [option] = read_status(Root(tmp_path), read_machine(Root(tmp_path))).options
    assert option.state == "overridden"
    assert option.reason == f"{who} says 5 and wins"


def test_after_an_undo_in_a_boot_that_has_it_the_same_can_be_staged(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(Root(tmp_path), Tools(tmp_path), "kernel")
    start(tmp_path, 1, cmdline="ro amd_iommu=off\n")
    confirm(tmp_path)
    undo(Root(tmp_path), Tools(tmp_path))
    assert main(["--root", str(tmp_path), "boot", "stage", "kernel"]) == 0
    assert (tmp_path / "etc/default/grub.d/zz-infertune.cfg").exists()
