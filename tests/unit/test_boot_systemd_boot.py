# SPDX-License-Identifier: Apache-2.0
"""Entries of type 1: tried once by systemd-boot, then lasting, then exactly as before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import boot_makers
from boot_trees import (
    BOOT_ID,
    EFIVARS,
    KERNEL,
    LOADER_GUID,
    MACHINE_ID,
    Facts,
    Tools,
    build,
    facts,
    said,
)
from infertune.base.errors import NotPermitted
from infertune.base.root import Root
from infertune.boot import guard, record, staging, words
from infertune.boot.change import AT_THE_TRY, Change, Way
from infertune.boot.options import options
from infertune.boot.plan import STACKS, plan
from infertune.boot.stacks.one_shot import ID
from infertune.boot.stacks.systemd_boot import KERNELSTUB_PLACE
from infertune.host.machine import read_machine
from infertune.host.modprobe import read_sources
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from support import At, in_child, kill

WORDS = ("amd_iommu=off", "ttm.pages_limit=25165824")
GIVEN = " ".join(WORDS)
FEATURES = f"{EFIVARS}/LoaderFeatures-{LOADER_GUID}"

DIRECTORY = {
    "arch-systemd-boot": "boot/loader/entries",
    "debian-systemd-boot": "boot/efi/loader/entries",
    "debian-systemd-boot-plain": "boot/efi/loader/entries",
    "pop-os": "boot/efi/loader/entries",
    "opensuse-systemd-boot": "boot/efi/loader/entries",
    "cachyos-systemd-boot": "boot/loader/entries",
}
"""Machines on which systemd-boot starts a trial, and where their entries are."""


def way(base: Path) -> Way:
    root = Root(base)
    machine = read_machine(root)
    return STACKS[machine.boot_style].way(root, machine, WORDS)


def lay(base: Path, path: str, data: str | bytes) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def entry(base: Path, tree: str, name: str) -> str:
    return (base / DIRECTORY[tree] / name).read_text()


# -- the trial -----------------------------------------------------------------------


@pytest.mark.parametrize("tree", DIRECTORY)
def test_the_entry_that_booted_is_copied_and_started_once(tree: str, tmp_path: Path) -> None:
    found = way(build(tmp_path, tree))
    assert found.one_try == "loader"
    [file] = found.trial.files
    assert file.path == f"/{DIRECTORY[tree]}/{ID}"
    [options] = re.findall(r"^options\s+(.*)$", file.data.decode(), re.M)
    assert options.startswith(("root=", "quiet root="))
    assert options.endswith(" ".join((*WORDS, *AT_THE_TRY)))
    assert f"{KERNEL}" in file.data.decode() or "/vmlinuz" in file.data.decode()
    set_oneshot = found.trial.commands[0]
    assert set_oneshot.argv == ("/usr/bin/bootctl", "set-oneshot", ID)
    assert set_oneshot.undo == ("/usr/bin/bootctl", "set-oneshot", "")
    assert not found.trial.edits
    assert "systemd-boot boots what it booted before" in found.rescue


@pytest.mark.parametrize("tree", DIRECTORY)
def test_the_trial_is_last_in_systemd_boots_order(tree: str, tmp_path: Path) -> None:
    """Not by a counter, which systemd-bless-boot takes away from what has booted."""
    found = way(build(tmp_path, tree))
    [file] = found.trial.files
    assert "+" not in file.path
    assert not re.search(r"^sort-key", file.data.decode(), re.M)
    assert ID.lstrip("_").startswith("-")  # '_' is passed over, and '-' is less than the others
    for other in (tmp_path / DIRECTORY[tree]).glob("*.conf"):
        has_key = re.search(r"^sort-key", other.read_text(), re.M)
        assert has_key or re.match(r"[A-Za-z0-9]", other.name)


OTHERWISE: dict[str, Callable[[Path], object]] = {
    "no one-shot": lambda base: lay(base, FEATURES, b"\6\0\0\0\x07\0\0\0\0\0\0\0"),
    "no features": lambda base: (base / FEATURES.lstrip("/")).unlink(),
    "no bootctl": lambda base: (base / "usr/bin/bootctl").unlink(),
    "names are sorted otherwise": lambda base: [
        lay(base, *each) for each in said(LoaderInfo="systemd-boot 249.11").items()
    ],
    "no entry was told": lambda base: (
        base / EFIVARS.lstrip("/") / f"LoaderEntrySelected-{LOADER_GUID}"
    ).unlink(),
    "another system's": lambda base: [
        lay(base, *each) for each in said(LoaderEntrySelected="fedora.conf").items()
    ],
    "read-only": lambda base: lay(
        base, "/proc/self/mounts", "/dev/a / ext4 rw 0 0\n/dev/b /boot vfat ro,relatime 0 0\n"
    ),
}


@pytest.mark.parametrize("why", OTHERWISE)
def test_without_a_loader_that_starts_it_once_the_guard_has_it(why: str, tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    OTHERWISE[why](tmp_path)
    found = way(tmp_path)
    assert (found.one_try, bool(found.trial)) == ("guard", False)
    assert "press 'e' in systemd-boot's menu and delete the options" in found.rescue
    assert [each.path for each in found.lasting.edits] == [
        "/boot/loader/entries/arch-lts.conf",
        "/boot/loader/entries/arch.conf",
    ]


def test_a_menu_without_an_editor_is_no_rescue(tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    lay(tmp_path, FEATURES, b"\6\0\0\0" + bytes(8))
    lay(tmp_path, "/boot/loader/loader.conf", "timeout 3\neditor no\n")
    assert "choose 'Arch', which has no such options" in way(tmp_path).rescue
    (tmp_path / "boot/loader/entries/arch-fallback.conf").unlink()
    assert "allow its editor first" in way(tmp_path).rescue


def test_in_the_boot_that_tries_it_the_entry_is_still_known(tmp_path: Path) -> None:
    """The loader says that the trial was started; that is no entry of the system's."""
    build(tmp_path, "debian-systemd-boot")
    before = way(tmp_path)
    [file] = before.trial.files
    lay(tmp_path, file.path, file.data)
    for path, data in said(LoaderEntrySelected=ID).items():
        lay(tmp_path, path, data)
    assert way(tmp_path) == before


# -- what lasts ----------------------------------------------------------------------


def test_f1_nothing_is_built_for_an_entry(tmp_path: Path) -> None:
    """kernel-install add-all is not there before 255, and finds no kernel on Debian."""
    for tree in ("debian-systemd-boot", "debian-systemd-boot-plain"):
        found = way(build(tmp_path / tree, tree))
        assert [each.argv[0] for each in found.trial.commands] == ["/usr/bin/bootctl"]
        assert not found.lasting.commands
        assert [each.path for each in found.lasting.edits][-1] == "/etc/kernel/cmdline"


def test_f5_entries_of_others_are_not_edited(tmp_path: Path) -> None:
    found = way(build(tmp_path / "arch", "arch-systemd-boot"))
    edited = [Path(each.path).name for each in found.lasting.edits]
    assert edited == ["arch-lts.conf", "arch.conf"]
    assert "arch-fallback.conf, fedora.conf, memtest.conf" in found.notes[0]
    found = way(build(tmp_path / "pop", "pop-os"))
    assert not any("Recovery" in each.path for each in found.lasting.edits)
    found = way(build(tmp_path / "suse", "opensuse-systemd-boot"))
    assert not any("-0.conf" in each.path for each in found.lasting.edits)  # another snapshot


@pytest.mark.parametrize(
    ("there", "begins"),
    [
        ({}, "root=UUID=1234 ro quiet\n"),
        ({"/usr/lib/kernel/cmdline": "root=LABEL=vendor\nquiet\n"}, "root=LABEL=vendor quiet\n"),
    ],
)
def test_f6_kernels_to_come_take_the_command_line_from_a_file(
    there: dict[str, str], begins: str, tmp_path: Path
) -> None:
    """Without it kernel-install takes /proc/cmdline, which is the trial's."""
    build(tmp_path, "debian-systemd-boot-plain")
    for path, text in there.items():
        lay(tmp_path, path, text)
    edit = way(tmp_path).lasting.edits[-1]
    assert (edit.path, edit.base) == ("/etc/kernel/cmdline", begins)


def test_f6_a_file_that_nobody_reads_here_is_not_made(tmp_path: Path) -> None:
    found = way(build(tmp_path, "arch-systemd-boot"))
    assert not any(each.path.startswith("/etc") for each in found.lasting.edits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"user": {"kernel_options": "quiet splash", "config_rev": 2}}',
        '{"user": {"kernel_options": ["quiet"]}, "default": {"kernel_options": ["a"]}}',
        '{"user": {"kernel_options": ["dyndbg=[x]"]}}',
        "[" * 5000,
    ],
)
def test_kernelstubs_file_is_edited_only_where_it_is_understood(text: str, tmp_path: Path) -> None:
    build(tmp_path, "pop-os")
    lay(tmp_path, "/etc/kernelstub/configuration", text)
    assert way(tmp_path).manual == (f'kernelstub --add-options "{GIVEN}"',)


@pytest.mark.parametrize("items", [[], ["quiet"], ["quiet", "splash"]])
@pytest.mark.parametrize("indent", [None, 2])
def test_words_in_a_list_of_json(items: list[str], indent: int | None) -> None:
    def text(options: list[str]) -> str:
        names = ("default", "user")
        return json.dumps(
            {name: {"kernel_options": options, "b": [1]} for name in names}, indent=indent
        )

    added = words.add(KERNELSTUB_PLACE, text(items), WORDS)
    assert json.loads(added)["user"]["kernel_options"] == [*items, *WORDS]
    assert json.loads(added)["default"]["kernel_options"] == items
    assert words.add(KERNELSTUB_PLACE, added, WORDS) == added
    assert words.remove(KERNELSTUB_PLACE, added, WORDS) == text(items)
    # kernelstub has written it since, and other words were added after ours.
    since = json.loads(added)
    since["user"]["kernel_options"] += ["theirs"]
    gone = words.remove(KERNELSTUB_PLACE, json.dumps(since, indent=2), WORDS)
    assert json.loads(gone)["user"]["kernel_options"] == [*items, "theirs"]


def test_measured_command_lines_are_predicted_where_that_is_possible(tmp_path: Path) -> None:
    build(tmp_path, "opensuse-systemd-boot")
    predict = ("/usr/bin/sdbootutil", "update-predictions")
    found = way(tmp_path)
    for part in (found.trial, found.lasting):
        assert (part.commands[-1].argv, part.commands[-1].undo) == (predict, predict)
    (tmp_path / "etc/crypttab").unlink()
    found = way(tmp_path)
    assert not found.lasting.commands
    assert len(found.trial.commands) == 1


def test_opensuses_grub_starts_no_trial(tmp_path: Path) -> None:
    """It sorts entries by their names in another way, and starts what grubenv says."""
    found = way(build(tmp_path, "opensuse-grub2-bls"))
    assert (found.one_try, bool(found.trial)) == ("guard", False)
    assert "press 'e' in GRUB's menu" in found.rescue


def test_proxmox_reads_the_first_line_alone(tmp_path: Path) -> None:
    build(tmp_path, "proxmox-zfs")
    lay(tmp_path, "/etc/kernel/cmdline", "root=ZFS=a boot=zfs\n# an older one\nroot=b\n")
    found = way(tmp_path)
    [edit] = found.lasting.edits
    text = (tmp_path / "etc/kernel/cmdline").read_text()
    added = words.add(edit.place, text, WORDS)
    assert added == f"root=ZFS=a boot=zfs {GIVEN}\n# an older one\nroot=b\n"
    assert words.remove(edit.place, added, WORDS) == text
    [command] = found.lasting.commands
    assert command.argv == command.undo == ("/usr/sbin/proxmox-boot-tool", "refresh")
    assert "systemd-boot's menu" in found.rescue
    (tmp_path / "etc/kernel/cmdline").unlink()
    [edit] = way(tmp_path).lasting.edits
    assert edit.base == "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n"
    (tmp_path / "usr/sbin/proxmox-boot-tool").unlink()
    assert "'proxmox-boot-tool refresh'" in way(tmp_path).manual[0]


@pytest.mark.parametrize("tree", ["debian-systemd-boot", "pop-os", "arch-uki"])
def test_a_boot_partition_that_only_root_may_look_into(
    tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a plan as a user would say that there is no entry, and no image."""
    build(tmp_path, tree)

    def listed(self: Root, path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Root, "listed", listed)
    with pytest.raises(NotPermitted, match="EACCES"):
        way(tmp_path)


# -- staged, kept, put back ------------------------------------------------------------


def change(base: Path) -> Change:
    root = Root(base)
    machine = read_machine(root)
    wanted = resolve(load_profile(root, "boot"), machine)
    return plan(root, machine, options(root, machine, wanted, read_sources(root))[0])


def stage(root: Root) -> None:
    base = root.base
    with staging.lock(root, "test"):
        staging.stage(root, "boot", change(base), Tools(base))


def undo(root: Root) -> None:
    with staging.lock(root, "test"):
        staging.undo(root, Tools(root.base))


def boot(base: Path, number: int, *, tried: bool) -> str:
    """Another boot, of the trial or of the default; what the guard does at it."""
    (base / BOOT_ID.lstrip("/")).write_text(f"{number:08d}-0000-0000-0000-000000000000\n")
    boot_makers.bootctl(base, ("bootctl", "set-oneshot", ""))
    state = record.load(Root(base))
    assert state is not None
    line = (base / "proc/cmdline").read_text().split()
    if tried:
        line += [*state.words, *AT_THE_TRY]
        for option in state.options:
            for parameter in (each for each in option.parameters if each.module):
                lay(base, parameter.path, f"{option.value}\n")
    lay(base, "/proc/cmdline", " ".join(line))
    with staging.lock(Root(base), "boot"):
        return guard.at_start(Root(base), Tools(base)).what


def confirm(root: Root) -> str:
    with staging.lock(root, "confirm"):
        return guard.at_target(root, Tools(root.base)).what


def given(base: Path) -> str:
    state = record.load(Root(base))
    assert state is not None
    return " ".join(state.words)


def without_trial(base: Path) -> Facts:
    return {path: fact for path, fact in facts(base).items() if not path.endswith(ID)}


@pytest.mark.parametrize("tree", DIRECTORY)
def test_until_it_is_confirmed_the_default_is_what_it_was(tree: str, tmp_path: Path) -> None:
    before = facts(build(tmp_path, tree))
    stage(Root(tmp_path))
    assert without_trial(tmp_path) == before
    assert boot_makers.variable(tmp_path) == ID
    assert boot(tmp_path, 1, tried=True) == "tried"
    assert without_trial(tmp_path) == before
    # It hung: the next boot is of the default, and nothing of it stays.
    lay(tmp_path, "/proc/cmdline", "root=UUID=1234")
    assert boot(tmp_path, 2, tried=False) in ("put-back", "reboot")
    assert facts(tmp_path) == before


@pytest.mark.parametrize("tree", DIRECTORY)
def test_confirmed_and_taken_back_exactly(tree: str, tmp_path: Path) -> None:
    before = facts(build(tmp_path, tree))
    stage(Root(tmp_path))
    boot(tmp_path, 1, tried=True)
    assert confirm(Root(tmp_path)) == "kept"
    assert not (tmp_path / DIRECTORY[tree] / ID).exists()
    assert boot_makers.variable(tmp_path) is None
    edited = {path for path, fact in facts(tmp_path).items() if fact != before.get(path)}
    for path in edited - {"etc/kernel"}:
        assert given(tmp_path).split()[0] in (tmp_path / path).read_text()
        assert "panic=30" not in (tmp_path / path).read_text()
    planned = way(build(tmp_path / "again", tree)).lasting.edits
    assert {each.path.lstrip("/") for each in planned} == edited - {"etc/kernel"}
    undo(Root(tmp_path))
    assert facts(tmp_path) == before


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "debian-systemd-boot": (
        lambda base: boot_makers.kernel_install(
            base, MACHINE_ID, KERNEL, "boot/efi/loader/entries"
        ),
        f"{MACHINE_ID}-{KERNEL}.conf",
    ),
    "debian-systemd-boot-plain": (
        lambda base: boot_makers.kernel_install(
            base, MACHINE_ID, "7.2.0", "boot/efi/loader/entries"
        ),
        f"{MACHINE_ID}-7.2.0.conf",
    ),
    "pop-os": (boot_makers.kernelstub, "Pop_OS-current.conf"),
    "cachyos-systemd-boot": (boot_makers.sdboot_manage, "linux-cachyos.conf"),
}


@pytest.mark.parametrize("tree", MAKERS)
def test_f6_what_the_distribution_makes_anew_has_the_words(tree: str, tmp_path: Path) -> None:
    build(tmp_path, tree)
    maker, name = MAKERS[tree]
    stage(Root(tmp_path))
    boot(tmp_path, 1, tried=True)
    confirm(Root(tmp_path))
    words = given(tmp_path)
    # The running kernel still has what the trial needed besides.
    maker(tmp_path)
    assert words in entry(tmp_path, tree, name)
    assert "panic=30" not in entry(tmp_path, tree, name)
    undo(Root(tmp_path))
    lay(tmp_path, "/proc/cmdline", "root=UUID=1234 ro quiet")
    maker(tmp_path)
    left = [path for path, fact in facts(tmp_path).items() if b"isolcpus=2-3" in fact[0]]
    assert left == []


@pytest.mark.parametrize("end", ["confirm", "undo", "hang"])
def test_f6_a_kernel_that_is_installed_during_the_trial(end: str, tmp_path: Path) -> None:
    """Its entry is made of /proc/cmdline."""
    tree = "debian-systemd-boot-plain"
    build(tmp_path, tree)
    maker, name = MAKERS[tree]
    stage(Root(tmp_path))
    boot(tmp_path, 1, tried=True)
    words = given(tmp_path)
    maker(tmp_path)
    assert f"{words} panic=30" in entry(tmp_path, tree, name)
    if end == "confirm":
        confirm(Root(tmp_path))
        assert entry(tmp_path, tree, name).count(words) == 1
    elif end == "undo":
        undo(Root(tmp_path))
    else:
        lay(tmp_path, "/proc/cmdline", "root=UUID=1234 ro quiet")
        boot(tmp_path, 2, tried=False)
    assert "panic=30" not in entry(tmp_path, tree, name)
    assert (words in entry(tmp_path, tree, name)) == (end == "confirm")


def test_sdboot_manage_may_remove_the_trial(tmp_path: Path) -> None:
    """systemd-boot then starts the default, which is as it was."""
    build(tmp_path, "cachyos-systemd-boot")
    stage(Root(tmp_path))
    boot_makers.sdboot_manage(tmp_path)
    now = facts(tmp_path)
    assert boot(tmp_path, 1, tried=False) != "tried"
    undo(Root(tmp_path))
    assert facts(tmp_path) == now


@pytest.mark.parametrize("what", ["stage", "confirm", "undo"])
def test_killed_at_every_step(what: str, tmp_path: Path) -> None:
    """The default entry is the old one or the new one, and undo ends it all."""
    tree = "debian-systemd-boot-plain"
    work = {"stage": stage, "confirm": confirm, "undo": undo}[what]
    number = 0
    while True:
        number += 1
        base = build(tmp_path / str(number), tree)
        before = facts(base)
        allowed = {path: {fact[0]} for path, fact in before.items()}
        if what != "stage":
            stage(Root(base))
            boot(base, 1, tried=True)
        if what == "undo":
            confirm(Root(base))
            for path, fact in facts(base).items():
                allowed.setdefault(path, set()).add(fact[0])
        if what == "confirm":
            other = build(tmp_path / f"{number}-kept", tree)
            stage(Root(other))
            boot(other, 1, tried=True)
            confirm(Root(other))
            for path, fact in facts(other).items():
                allowed.setdefault(path, set()).add(fact[0])

        def killed(base: Path = base, number: int = number) -> None:
            work(Root(base, hook=At(number, kill)))

        if in_child(killed) == 0:
            break
        for path, fact in facts(base).items():
            if path.endswith(".conf") and not path.endswith(ID):
                assert fact[0] in allowed[path], f"killed at step {number} of {what}: {path}"
        undo(Root(base))
        undo(Root(base))
        assert facts(base) == before, f"killed at step {number} of {what}"
    assert number > 5
