# SPDX-License-Identifier: Apache-2.0
"""GRUB with entries of the Boot Loader Specification: Fedora, RHEL."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from boot_trees import (
    FEDORA_ENTRY,
    GRUB2_CONFIG,
    KERNEL,
    MACHINE_ID,
    Tools,
    build,
    facts,
    grubenv,
    read,
)
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.boot import staging
from infertune.boot.change import Change, Way
from infertune.boot.stacks.bls import bls
from infertune.host.machine import read_machine

WORDS = ("ttm.pages_limit=25165824", "amd_iommu=off")
AT_THE_TRY = "panic=30 rd.shell=0 rd.emergency=reboot"
RESCUE = FEDORA_ENTRY.format("0-rescue")
RUNNING = FEDORA_ENTRY.format(KERNEL)
TRIAL = FEDORA_ENTRY.format("0-infertune")


def way(base: Path) -> Way:
    root = Root(base)
    return bls(root, read_machine(root), WORDS)


# -- the trial -----------------------------------------------------------------------


def test_the_trial_is_a_copy_of_the_running_kernels_entry(tmp_path: Path) -> None:
    found = way(build(tmp_path, "fedora-bls"))
    [entry] = found.trial.files
    assert entry.path == TRIAL
    lines = entry.data.decode().splitlines()
    theirs = read(tmp_path, RUNNING).splitlines()
    changed = [
        (a.split(maxsplit=1)[0], b) for a, b in zip(theirs, lines, strict=True) if a != b
    ]  # fmt: skip
    assert changed == [
        ("title", f"{theirs[0]} (infertune, one try)"),
        ("options", f"{theirs[4]} {' '.join(WORDS)} {AT_THE_TRY}"),
    ]
    assert found.one_try == "loader"


def test_grub_boots_it_once_by_the_name_of_its_file(tmp_path: Path) -> None:
    [once] = way(build(tmp_path, "fedora-bls")).trial.commands
    name = Path(TRIAL).stem
    assert once.argv == ("/usr/bin/grub2-editenv", "-", "set", f"next_entry={name}")
    tools = Tools(tmp_path)
    tools(once.argv)
    block = tmp_path / "boot/grub2/grubenv"
    assert f"next_entry={name}\n" in block.read_text()
    assert "boot_success=1\n" in block.read_text()
    assert block.stat().st_size == 1024
    tools(once.undo)
    assert block.read_bytes() == grubenv(f"saved_entry={MACHINE_ID}-{KERNEL}", "boot_success=1")


@pytest.mark.parametrize(
    "kernel",
    ["7.1.3-200.fc44.x86_64", "7.1.3", "7.1.3-my-own-build", "7.2.0-0.rc1.fc45.x86_64", "6.9~rc1"],
)
def test_the_trial_is_never_the_first_entry(kernel: str, tmp_path: Path) -> None:
    """Entry 0 is the default where none is saved: it would be tried for ever."""
    build(tmp_path, "fedora-bls")
    (tmp_path / "proc/sys/kernel/osrelease").write_text(f"{kernel}\n")
    entry = read(tmp_path, RUNNING)
    for other in list((tmp_path / "boot/loader/entries").iterdir()):
        other.unlink()
    # Of another installation, whose name sorts before or after.
    for machine in (MACHINE_ID, "0" * 32, "f" * 32):
        name = f"boot/loader/entries/{machine}-{kernel}.conf"
        (tmp_path / name).write_text(entry)
    [trial] = way(tmp_path).trial.files
    ours, theirs = Path(trial.path).stem, f"{MACHINE_ID}-{kernel}"
    assert by_blscfg(ours, theirs) < 0
    assert by_filevercmp(ours) < by_filevercmp(theirs)


def by_blscfg(one: str, other: str) -> int:
    """Which of two names is newer, as GRUB's blscfg.c compares them since 2.04 (split_cmp)."""

    def parts(name: str) -> list[str]:
        found = name.rsplit("-", 2)
        return [*found, "", ""][:3]

    pairs = zip(parts(one), parts(other), strict=True)
    return next((order for a, b in pairs if (order := _rpmvercmp(a, b))), 0)


def _rpmvercmp(one: str, other: str) -> int:
    a, b = (re.findall(r"\d+|[a-zA-Z]+|~", text) for text in (one, other))
    for x, y in zip(a, b, strict=False):
        if "~" in (x, y) and x != y:
            return -1 if x == "~" else 1
        if x.isdigit() != y.isdigit():
            return 1 if x.isdigit() else -1
        first, second = (int(x), int(y)) if x.isdigit() else (x, y)
        if first != second:
            return 1 if first > second else -1  # type: ignore[operator]
    if len(a) == len(b):
        return 0
    longer, sign = (a[len(b) :], 1) if len(a) > len(b) else (b[len(a) :], -1)
    return -sign if longer[0] == "~" else sign


def by_filevercmp(name: str) -> list[tuple[str, int]]:
    """A key as GRUB 2.14 compares names (gnulib's filevercmp), for names that begin alike."""
    pairs = re.findall(r"(\D*)(\d*)", name)
    return [(text.replace("~", "\0"), int(number or 0)) for text, number in pairs]


def test_without_one_shot_the_guard_enforces_it(tmp_path: Path) -> None:
    lvm = way(build(tmp_path / "lvm", "fedora-bls-lvm"))
    assert not lvm.trial
    assert lvm.one_try == "guard"
    assert "choose the entry '0-rescue'" in lvm.rescue
    for name, path, text in (
        ("old grub.cfg", "boot/grub2/grub.cfg", "load_env\nblscfg\n"),
        ("other kernel", "proc/sys/kernel/osrelease", "7.3.0\n"),
        ("no tool", "usr/bin/grub2-editenv", None),
    ):
        base = build(tmp_path / name, "fedora-bls")
        (base / path).unlink()
        if text:
            (base / path).write_text(text)
        assert not way(base).trial, name
        assert way(base).lasting


def test_the_environment_may_lie_on_the_efi_system_partition(tmp_path: Path) -> None:
    """Fedora up to 33: /boot/grub2/grubenv is a link."""
    base = build(tmp_path, "fedora-bls-lvm")
    block = base / "boot/grub2/grubenv"
    moved = base / "boot/efi/EFI/fedora/grubenv"
    moved.parent.mkdir(parents=True)
    block.rename(moved)
    block.symlink_to("../efi/EFI/fedora/grubenv")
    assert way(base).one_try == "loader"
    block.unlink()
    block.symlink_to("grubenv")
    assert way(base).one_try == "guard"


def test_what_edits_every_entry_meanwhile_edits_the_trial(tmp_path: Path) -> None:
    """An owner's grubby, or tuned: it goes all the same, and what they added stays elsewhere."""
    build(tmp_path, "fedora-bls")
    root, tools = Root(tmp_path), Tools(tmp_path)
    machine = read_machine(root)
    found = bls(root, machine, WORDS)
    change = Change("bls", words=WORDS, trial=found.trial, lasting=found.lasting)
    with staging.lock(root, "test"):
        staging.stage(root, "mine", replace(change, one_try="loader"), tools)
    for entry in (tmp_path / "boot/loader/entries").iterdir():
        text = entry.read_text()
        entry.write_text(re.sub(r"(?m)^(options .*)$", r"\1 audit=0", text))
    changed = facts(tmp_path)
    with staging.lock(root, "test"):
        staging.undo(root, tools)
    del changed[TRIAL.lstrip("/")]
    block = "boot/grub2/grubenv"
    assert facts(tmp_path) == changed | {block: facts(tmp_path)[block]}
    assert "next_entry" not in read(tmp_path, block)


# -- what lasts ----------------------------------------------------------------------


def edited(base: Path) -> dict[str, tuple[str, str]]:
    return {edit.path: (edit.place, edit.base) for edit in way(base).lasting.edits}


def test_p3_the_rescue_entry_stays_as_it_is(tmp_path: Path) -> None:
    found = edited(build(tmp_path, "fedora-bls"))
    assert RUNNING in found
    assert RESCUE not in found


def test_f5_entries_of_other_systems_stay_as_they_are(tmp_path: Path) -> None:
    build(tmp_path, "fedora-bls")
    other = f"/boot/loader/entries/{'b' * 32}-7.1.0.conf"
    text = read(tmp_path, RUNNING).replace("UUID=1234", "UUID=99")
    (tmp_path / other.lstrip("/")).write_text(text)
    assert other not in edited(tmp_path)


def test_f11_what_new_kernels_get_is_made_and_goes_again(tmp_path: Path) -> None:
    build(tmp_path, "fedora-bls")
    assert edited(tmp_path)["/etc/kernel/cmdline"] == ("cmdline", "root=UUID=1234 ro rhgb quiet\n")
    # What only GRUB knows is taken from the running kernel, as kernel-install takes it.
    build(tmp_path / "old", "fedora-bls-kernelopts")
    base = edited(tmp_path / "old")["/etc/kernel/cmdline"][1]
    assert base == "root=UUID=1234 ro rhgb quiet\n"


def test_no_program_runs_for_what_lasts_and_no_image_is_built(tmp_path: Path) -> None:
    for tree in ("fedora-bls", "fedora-bls-lvm", "fedora-bls-kernelopts"):
        lasting = way(build(tmp_path / tree, tree)).lasting
        assert not lasting.commands
        assert not lasting.images


def test_grub_without_these_entries_is_the_other_stack(tmp_path: Path) -> None:
    """GRUB_ENABLE_BLSCFG=false, with grubby installed."""
    build(tmp_path, "fedora-bls")
    config = tmp_path / "boot/grub2/grub.cfg"
    config.write_text(GRUB2_CONFIG.replace("blscfg\n", "menuentry 'Fedora' {\n}\n"))
    (tmp_path / "usr/sbin/grub2-mkconfig").write_text("# upstream\n")
    assert [edit.path for edit in way(tmp_path).lasting.edits] == ["/etc/default/grub"]


def test_where_no_entry_can_be_read_grubby_is_asked_or_a_person(tmp_path: Path) -> None:
    build(tmp_path, "fedora-bls")
    for entry in (tmp_path / "boot/loader/entries").iterdir():
        entry.rename(entry.with_suffix(".old"))
    found = way(tmp_path)
    assert found.one_try == "guard"
    assert "as root each is edited" in found.notes[0]
    [command] = found.lasting.commands
    assert command.argv[1:] == (
        "--update-kernel=ALL",
        "--args=ttm.pages_limit=25165824 amd_iommu=off",
    )
    (tmp_path / "usr/sbin/grubby").unlink()
    found = way(tmp_path)
    assert found.one_try == "nobody"
    assert "ttm.pages_limit=25165824 amd_iommu=off" in found.manual[0]
