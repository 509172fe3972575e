# SPDX-License-Identifier: Apache-2.0
"""Images are built beside a copy of the old one: wherever it is cut off, something boots."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

import boot_makers
from boot_built import (
    IN_PLACE,
    INITRAMFS,
    KERNEL,
    KINDS,
    OPTIONS,
    SHELTER,
    TRIAL,
    UKI,
    WORDS,
    Machine,
    anew,
    build,
    confirm,
    confirm_without_copy,
    content,
    restore,
    steps_of,
    uki,
)
from infertune.base.errors import Failed
from infertune.base.records import replace
from infertune.base.root import Root, Space, Step
from infertune.boot import images
from infertune.boot.builders import ByHand, initramfs_image, read_preset, uki_image
from infertune.boot.change import Image
from infertune.boot.commands import Ran
from infertune.boot.images import Built
from infertune.host import pe
from support import At, Counter, fail, in_child, kill, shorten


@pytest.fixture(params=KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine", KINDS[request.param])


# -- what is built, kept and put back --------------------------------------------------


def test_a_new_image_lies_where_it_should(machine: Machine) -> None:
    built = build(machine)
    image = machine.image
    new = machine.at(image.trial or image.path)
    assert new.read_bytes() == content(image, ours=True)
    kept = machine.at(image.path if image.trial else images.kept(image))
    assert kept.read_bytes() == machine.old
    assert kept.stat().st_mode & 0o777 == 0o600
    assert machine.default.read_text() == "arch.efi"
    assert built.digest == machine.root.digest(image.trial or image.path)
    assert len([line for line in machine.ran if line == " ".join(image.build)]) == 1


def test_put_back_without_the_tool(machine: Machine) -> None:
    built = build(machine)
    machine.ran.clear()
    restore(machine, built)
    assert machine.is_as_it_was()
    assert " ".join(machine.image.build) not in machine.ran
    restore(machine, built)
    assert machine.is_as_it_was()


def test_a_default_that_was_chosen_since_stays(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine", TRIAL)
    built = build(machine)
    machine.default.write_text("windows.efi")
    restore(machine, built)
    assert machine.default.read_text() == "windows.efi"
    assert machine.names() == {"arch.efi"}


def test_confirmed(machine: Machine) -> None:
    built = build(machine)
    machine.ran.clear()
    for _ in range(2):
        confirm(machine, built)
        assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=True)
        assert machine.names() == {machine.at(machine.image.path).name}
    assert not machine.ran


def test_built_anew_where_no_original_is_kept(machine: Machine) -> None:
    built = build(machine)
    confirm_without_copy(machine, built)
    machine.staged = False
    said = restore(machine, built)
    assert said.endswith("rebuilt, with other bytes than before: its original is not kept")
    assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=False)
    assert machine.names() == {machine.at(machine.image.path).name}
    assert machine.default.read_text() == "arch.efi"


@pytest.mark.parametrize("machine", IN_PLACE, indirect=True)
def test_built_by_another_program_since(machine: Machine) -> None:
    built = build(machine)
    machine.at(machine.image.path).write_bytes(content(machine.image, ours=True, by="another"))
    machine.staged = False
    assert restore(machine, built).endswith("another program has built it since")
    # The kept one would be older than what the other program has built for.
    assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=False)
    assert machine.names() == {machine.at(machine.image.path).name}


def test_a_default_built_by_another_program_is_not_replaced(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine", TRIAL)
    built = build(machine)
    newer = content(TRIAL, ours=False, by="newer kernel")
    machine.at(TRIAL.path).write_bytes(newer)
    with pytest.raises(Failed, match="built by another program since, and is not replaced"):
        images.confirm(machine.root, built)
    restore(machine, built)
    assert machine.at(TRIAL.path).read_bytes() == newer
    assert machine.names() == {"arch.efi"}


def test_an_image_that_went_with_its_kernel(machine: Machine) -> None:
    built = build(machine)
    images.confirm(machine.root, built)
    machine.at(machine.image.path).unlink()
    restore(machine, built)
    assert not machine.names()


# -- what tools do -----------------------------------------------------------------------

WRONG = {
    "fails": "exit code 1: No space left on device",
    "deletes": "exit code 1: No space left on device",
    "nothing": "built nothing",
    "without": "was built without|built nothing",
    "tears": "premature end|no whole image|it ends",
}


@pytest.mark.parametrize(
    ("machine", "does"),
    [
        (kind, does)
        for kind in KINDS
        for does in WRONG
        if kind != "blind" or does not in ("without", "tears")  # no tool looks into it
    ],
    indirect=["machine"],
)
def test_a_tool_that_fails_or_lies(machine: Machine, does: str) -> None:
    machine.does = does
    with pytest.raises(Failed, match=WRONG[does]) as error:
        build(machine)
    assert error.value.message.endswith("is as it was")
    assert machine.is_as_it_was()


def test_advice_where_the_options_are_left_out(tmp_path: Path) -> None:
    for name, image, hint in [("a", INITRAMFS, "hostonly=yes"), ("b", UKI, "of its own")]:
        machine = Machine(tmp_path / name, image)
        machine.does = "without"
        with pytest.raises(Failed) as error:
            build(machine)
        assert hint in (error.value.hint or "")


@pytest.mark.parametrize("does", ["fails", "deletes", "nothing"])
def test_building_anew_fails(machine: Machine, does: str) -> None:
    built = build(machine)
    confirm_without_copy(machine, built)
    confirmed = machine.at(machine.image.path).read_bytes()
    machine.staged, machine.does = False, does
    for _ in range(2):
        with pytest.raises(Failed, match=r"(exit code 1|still holds what was staged).*; .* as it"):
            restore(machine, built)
        assert machine.at(machine.image.path).read_bytes() == confirmed
        assert machine.names() == {machine.at(machine.image.path).name}
    machine.does = "builds"
    restore(machine, built)
    assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=False)


def test_a_tool_that_is_not_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine", INITRAMFS)

    def run(argv: Sequence[str]) -> Ran:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with pytest.raises(Failed, match="update-initramfs: No such file or directory"):
        images.build(machine.root, INITRAMFS, run)
    assert machine.is_as_it_was()


# -- cut off at each step ----------------------------------------------------------------


def test_power_cut_while_it_is_built(machine: Machine) -> None:
    for number in range(1, len(steps_of(machine, build)) + 1):
        machine = anew(machine)
        machine.hook = At(number, kill)
        assert in_child(lambda: build(machine)) & 127 == 9  # noqa: B023
        machine.hook = lambda _: None
        assert machine.boots(), number
        restore(machine, images.planned(machine.image))
        assert machine.is_as_it_was(), number
        assert " ".join(machine.image.build) not in machine.ran, "no rebuild"
        # What is staged again builds it again.
        build(machine)


def test_power_cut_while_it_is_put_back(machine: Machine) -> None:
    def put_back(machine: Machine) -> None:
        restore(machine, built)

    built = build(machine)
    for number in range(1, len(steps_of(machine, put_back)) + 1):
        machine = anew(machine)
        built = build(machine)
        machine.hook = At(number, kill)
        assert in_child(lambda: put_back(machine)) & 127 == 9  # noqa: B023
        machine.hook = lambda _: None
        assert machine.boots(), number
        machine.staged = False
        restore(machine, built)
        assert machine.is_as_it_was(), number


def test_power_cut_while_a_cut_build_is_put_back(machine: Machine) -> None:
    """The second cut follows the first one: at each pair of steps the old image comes back."""
    total = len(steps_of(machine, build))
    for first in range(1, total + 1):
        for second in range(1, 12):
            machine = anew(machine)
            machine.hook = At(first, kill)
            in_child(lambda: build(machine))  # noqa: B023
            machine.hook = At(second, kill)
            planned = images.planned(machine.image)
            status = in_child(lambda: restore(machine, planned))  # noqa: B023
            machine.hook = lambda _: None
            assert machine.boots(), (first, second)
            restore(machine, planned)
            assert machine.is_as_it_was(), (first, second)
            if status == 0:
                break


def test_power_cut_while_it_is_confirmed(machine: Machine) -> None:
    built = build(machine)
    steps = steps_of(machine, lambda machine: confirm(machine, built))
    for number in range(1, len(steps) + 1):
        for back in (False, True):
            machine = anew(machine)
            built = build(machine)
            machine.hook = At(number, kill)
            assert in_child(lambda: confirm(machine, built)) & 127 == 9  # noqa: B023
            machine.hook = lambda _: None
            assert machine.boots(), number
            assert machine.is_whole(machine.image.path), number
            machine.staged = not back
            if back:
                assert restore(machine, built) == ""
                assert machine.is_as_it_was(), number
            else:
                confirm(machine, built)
                now = machine.at(machine.image.path).read_bytes()
                assert now == content(machine.image, ours=True)
                # Undo still has the original.
                restore(machine, built)
                assert machine.is_as_it_was(), number
            assert machine.names() == {machine.at(machine.image.path).name}


@pytest.mark.parametrize(
    ("machine", "since"),
    [(kind, since) for kind in KINDS for since in (False, True) if kind in IN_PLACE or not since],
    indirect=["machine"],
)
def test_power_cut_while_it_is_built_anew(machine: Machine, since: bool) -> None:
    """After it was confirmed, and where another program has built it since."""

    def ready(machine: Machine) -> Built:
        built = build(machine)
        if since:
            another = content(machine.image, ours=True, by="another")
            machine.at(machine.image.path).write_bytes(another)
        else:
            confirm_without_copy(machine, built)
        machine.staged = False
        return built

    built = ready(machine)
    counter = Counter()
    machine.hook = counter
    restore(machine, built)
    for number in range(1, len(counter.steps) + 1):
        machine = anew(machine)
        built = ready(machine)
        machine.hook = At(number, kill)
        assert in_child(lambda: restore(machine, built)) & 127 == 9  # noqa: B023
        machine.hook = lambda _: None
        assert machine.boots(), number
        restore(machine, built)
        now = machine.at(machine.image.path).read_bytes()
        assert now == content(machine.image, ours=False), number
        assert machine.names() == {machine.at(machine.image.path).name}, number
        assert machine.default.read_text() == "arch.efi"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_each_step_that_fails_while_it_is_built(machine: Machine, number: int) -> None:
    steps = steps_of(machine, build)
    for at, step in enumerate(steps, 1):
        machine = anew(machine)
        machine.hook = At(at, fail(number))
        with pytest.raises(Failed, match="is as it was"):
            build(machine)
        assert machine.is_as_it_was(), (at, step)


def test_a_copy_that_is_cut_short(machine: Machine) -> None:
    steps = steps_of(machine, build)
    at = next(n for n, step in enumerate(steps, 1) if step.action == "write")
    machine = anew(machine)
    machine.hook = At(at, shorten)
    with pytest.raises(Failed, match="short write"):
        build(machine)
    assert machine.is_as_it_was()
    assert not machine.ran or machine.ran == [" ".join(SHELTER.off)]


def test_it_says_where_the_old_image_is_if_it_cannot_go_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine", INITRAMFS)

    def hook(step: Step) -> None:
        if step.action == "rename" and (machine.ran or "infertune-old" not in step.path):
            raise OSError(errno.EROFS, "Read-only file system", step.path)

    machine.hook, machine.does = hook, "fails"
    with pytest.raises(Failed, match="could not be put back: EROFS") as error:
        build(machine)
    kept = images.kept(INITRAMFS)
    assert error.value.hint == f"the old image is whole: mv {kept} {INITRAMFS.path}"
    assert machine.at(kept).read_bytes() == machine.old


# -- room --------------------------------------------------------------------------------


class Full(Root):
    """A machine with so much room on the file system of its images."""

    space_of = Space(1, 0, False)

    def space(self, path: str) -> Space:
        return self.space_of


def test_room_is_asked_for_before_anything_is_written(machine: Machine) -> None:
    counter = Counter()
    root = Full(machine.base, hook=counter)
    size = len(machine.old)
    needed = images.MARGIN + size + size * 5 // 4
    root.space_of = Space(1, needed - 1, False)
    with pytest.raises(Failed, match=r"boot.* has \d+ MiB free, and \d+ MiB are needed") as error:
        images.ask_room(root, [machine.image])
    assert "make room on /boot" in (error.value.hint or "")
    root.space_of = Space(1, needed, False)
    images.ask_room(root, [machine.image])
    with pytest.raises(Failed, match="nothing was touched"):
        images.ask_room(root, [machine.image, machine.image])
    assert not counter.steps
    assert machine.is_as_it_was()


def test_a_full_disk_is_said_before_an_image_is_built_anew(machine: Machine) -> None:
    built = build(machine)
    confirm_without_copy(machine, built)
    machine.staged = False
    machine.ran.clear()
    with pytest.raises(Failed, match="nothing was touched"):
        images.restore(Full(machine.base), built, machine)
    assert " ".join(machine.image.build) not in machine.ran
    assert machine.is_whole(machine.image.path)


def test_a_read_only_file_system(machine: Machine) -> None:
    root = Full(machine.base)
    root.space_of = Space(1, 1 << 40, True)
    with pytest.raises(Failed, match=r"is read-only: .* cannot be built; nothing was touched"):
        images.ask_room(root, [machine.image])


@pytest.mark.parametrize("text", ["update_initramfs=no\n", '# x\n update_initramfs="no" # y\n'])
def test_update_initramfs_that_builds_nothing(tmp_path: Path, text: str) -> None:
    machine = Machine(tmp_path / "machine", INITRAMFS)
    conf = machine.at(images.UPDATE_INITRAMFS)
    conf.parent.mkdir(parents=True)
    conf.write_text(text)
    with pytest.raises(Failed, match=r"has update_initramfs=no: .* nothing was touched"):
        images.ask_room(machine.root, [INITRAMFS])
    images.ask_room(machine.root, [replace(INITRAMFS, build=("/usr/bin/dracut", "--force"))])
    conf.write_text("update_initramfs=yes\nbackup_initramfs=no\n")
    images.ask_room(machine.root, [INITRAMFS])


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"ENOENT .*; nothing was touched"):
        images.ask_room(Root(tmp_path), [INITRAMFS])


def test_space_is_that_of_the_file_system(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    space = Root(tmp_path).space("/")
    assert space.device == tmp_path.stat().st_dev
    assert 0 < space.free <= found.f_blocks * found.f_frsize
    assert not space.read_only


# -- command lines in images ---------------------------------------------------------------


def test_the_command_line_in_an_image(tmp_path: Path) -> None:
    (tmp_path / "x.efi").write_bytes(uki("root=UUID=1 quiet\n"))
    assert pe.command_line(Root(tmp_path), "/x.efi") == "root=UUID=1 quiet"


def test_an_image_that_is_cut_off_anywhere() -> None:
    whole = uki("root=UUID=1")
    seen = set()
    for size in range(len(whole)):
        data = whole[:size]
        try:
            seen.add(pe.section(lambda at, size, data=data: data[at : at + size], ".cmdline"))
        except ValueError:
            seen.add("torn")
    assert seen == {"torn"}


def test_no_image_is_read_without_bound() -> None:
    for count, size, what in [(200, 16, "no PE file"), (1, 70000, "has 70000 bytes")]:
        head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", boot_makers.PE_AT)
        coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0, count, 0, 0, 0, 0, 0)
        table = struct.pack("<8sIIIIIIHHI", b".cmdline", size, 0, size, 0, 0, 0, 0, 0, 0)
        data = (head.ljust(boot_makers.PE_AT, b"\0") + coff + table).ljust(80000, b"\0")
        with pytest.raises(ValueError, match=what):
            pe.section(lambda at, size, data=data: data[at : at + size], ".cmdline")


# -- which tool, and how -------------------------------------------------------------------


def tree(base: Path, files: dict[str, str | bytes]) -> Root:
    for path, data in files.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return Root(base)


PRESET = """\
# mkinitcpio preset file for the 'linux' package
#ALL_config="/etc/mkinitcpio.conf"
ALL_kver="/boot/vmlinuz-linux"

PRESETS=('default' 'fallback')

default_image="/boot/initramfs-linux.img"
#default_options="--splash /usr/share/systemd/bootctl/splash-arch.bmp"
fallback_image="/boot/initramfs-linux-fallback.img"
fallback_options="-S autodetect"
"""
PRESET_UKI = PRESET.replace("default_image", "default_uki").replace(
    "/boot/initramfs-linux.img", "/efi/EFI/Linux/arch-linux.efi"
)
ARCH = {
    "/usr/bin/mkinitcpio": "",
    "/usr/bin/lsinitcpio": "",
    "/etc/mkinitcpio.d/linux.preset": PRESET,
    "/boot/vmlinuz-linux": boot_makers.kernel(KERNEL),
    "/proc/sys/kernel/osrelease": f"{KERNEL}\n",
}
EFI = "/efi/EFI/Linux/arch-linux.efi"

FOUND: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "initramfs-tools": (
        {
            "/usr/sbin/update-initramfs": "",
            "/usr/bin/lsinitramfs": "",
            f"/boot/initrd.img-{KERNEL}": "",
        },
        f"/usr/sbin/update-initramfs -u -k {KERNEL}",
        "/usr/bin/lsinitramfs",
    ),
    "Debian's dracut 106": (
        {"/usr/bin/dracut": "", "/usr/bin/lsinitrd": "", f"/boot/initrd.img-{KERNEL}": ""},
        f"/usr/bin/dracut --force /boot/initrd.img-{KERNEL} {KERNEL}",
        "/usr/bin/lsinitrd",
    ),
    "Debian's dracut 112": (
        {
            "/usr/bin/dracut": "",
            "/usr/sbin/update-initramfs": "",
            "/usr/bin/lsinitrd": "",
            f"/boot/initrd.img-{KERNEL}": "",
        },
        f"/usr/sbin/update-initramfs -u -k {KERNEL}",
        "/usr/bin/lsinitrd",
    ),
    "Fedora": (
        {"/usr/bin/dracut": "", "/usr/bin/lsinitrd": "", f"/boot/initramfs-{KERNEL}.img": ""},
        f"/usr/bin/dracut --force /boot/initramfs-{KERNEL}.img {KERNEL}",
        "/usr/bin/lsinitrd",
    ),
    "Arch with dracut": (
        {
            "/usr/bin/dracut": "",
            "/usr/bin/lsinitrd": "",
            f"/usr/lib/modules/{KERNEL}/pkgbase": "linux-zen\n",
            "/boot/initramfs-linux-zen.img": "",
            "/boot/initramfs-linux.img": "",
        },
        f"/usr/bin/dracut --force /boot/initramfs-linux-zen.img {KERNEL}",
        "/usr/bin/lsinitrd",
    ),
    "mkinitcpio": (
        ARCH,
        "/usr/bin/mkinitcpio -k /boot/vmlinuz-linux -g /boot/initramfs-linux.img",
        "/usr/bin/lsinitcpio",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_tool_that_has_built_the_initramfs(tmp_path: Path, name: str) -> None:
    files, build, look = FOUND[name]
    image = initramfs_image(tree(tmp_path, files), KERNEL)
    assert isinstance(image, Image)
    assert (" ".join(image.build), image.look) == (build, (look,))
    assert image.path in files or image.path == "/boot/initramfs-linux.img"
    assert image.holds == (OPTIONS,)


BY_HAND: dict[str, tuple[dict[str, str | bytes], str]] = {
    "nothing": ({}, "no known tool"),
    "booster": ({"/usr/bin/booster": ""}, "booster build"),
    "another kernel": ({"/usr/bin/dracut": "", "/boot/initramfs-7.0.img": ""}, "no known tool"),
    "updated since": ({**ARCH, "/boot/vmlinuz-linux": boot_makers.kernel("7.2")}, "reboot first"),
    "a UKI only": ({**ARCH, "/etc/mkinitcpio.d/linux.preset": PRESET_UKI}, "no initramfs"),
    "copied on": (
        {
            "/usr/sbin/update-initramfs": "",
            f"/boot/initrd.img-{KERNEL}": "",
            "/etc/initramfs/post-update.d/zz-kernelstub": "",
        },
        "zz-kernelstub copies each new initramfs",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_initramfs_that_a_person_has_to_build(tmp_path: Path, name: str) -> None:
    files, why = BY_HAND[name]
    found = initramfs_image(tree(tmp_path, files), KERNEL)
    assert isinstance(found, ByHand)
    assert why in found.why


INSTALL: dict[str, str | bytes] = {
    "/usr/bin/kernel-install": "",
    "/etc/kernel/install.conf": "layout=uki\n",
    f"/boot/vmlinuz-{KERNEL}": "",
    "/proc/sys/kernel/osrelease": f"{KERNEL}\n",
}
INSTALLED = f"/boot/efi/EFI/Linux/debian-{KERNEL}.efi"

UKIS: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "mkinitcpio": (
        {**ARCH, "/etc/mkinitcpio.d/linux.preset": PRESET_UKI, EFI: uki("root=UUID=1")},
        EFI,
        f"/usr/bin/mkinitcpio -k /boot/vmlinuz-linux -U {EFI}",
    ),
    "kernel-install on Debian": (
        INSTALL,
        INSTALLED,
        f"/usr/bin/kernel-install add {KERNEL} /boot/vmlinuz-{KERNEL}",
    ),
    "kernel-install": (
        {**INSTALL, f"/usr/lib/modules/{KERNEL}/vmlinuz": ""},
        INSTALLED,
        f"/usr/bin/kernel-install add {KERNEL} /usr/lib/modules/{KERNEL}/vmlinuz",
    ),
    "dracut": (
        {
            "/usr/bin/dracut": "",
            "/etc/dracut.conf.d/uki.conf": 'uefi="yes"\n',
            "/proc/sys/kernel/osrelease": f"{KERNEL}\n",
        },
        "/efi/EFI/Linux/linux.efi",
        f"/usr/bin/dracut --uefi --force --kver {KERNEL} /efi/EFI/Linux/linux.efi",
    ),
}


@pytest.mark.parametrize("name", UKIS)
def test_the_tool_that_has_built_the_uki(tmp_path: Path, name: str) -> None:
    files, path, build = UKIS[name]
    image = uki_image(tree(tmp_path, files), WORDS, path)
    assert isinstance(image, Image)
    assert (image.path, " ".join(image.build), image.holds) == (path, build, WORDS)


OWN_LINE = f'{PRESET_UKI}default_options="--cmdline /etc/kernel/mine"\n'
UKI_BY_HAND: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "own line": ({**ARCH, "/etc/mkinitcpio.d/linux.preset": OWN_LINE}, EFI, "of its own"),
    "no uki": (ARCH, EFI, "does not build"),
    "newer": ({**ARCH, EFI: uki("", "7.2")}, EFI, "is of kernel 7.2 by now: reboot first"),
    "counting": ({**INSTALL, "/etc/kernel/tries": "3\n"}, INSTALLED, "counts boots"),
    "other name": (INSTALL, "/efi/EFI/Linux/x.efi", "does not write to"),
    "uki.conf": ({**INSTALL, "/etc/kernel/uki.conf": "[UKI]\nCmdline=x\n"}, INSTALLED, "its own"),
    "nothing": ({}, EFI, "no known tool"),
}


@pytest.mark.parametrize("name", UKI_BY_HAND)
def test_a_uki_that_a_person_has_to_build(tmp_path: Path, name: str) -> None:
    files, path, why = UKI_BY_HAND[name]
    found = uki_image(tree(tmp_path, files), WORDS, path)
    assert isinstance(found, ByHand)
    assert why in found.why


def test_a_preset() -> None:
    preset = read_preset(
        "ALL_kver='/boot/vmlinuz-linux'\nALL_options='-S x'\nALL_config=/etc/mkinitcpio.conf\n"
        "ALL_microcode=(/boot/amd-ucode.img)\nPRESETS=(\n  'default'\n  'x'\n)\n"
        'default_uki="/efi/a b.efi" # here\ndefault_options="-S autodetect"\nbroken="\n',
        "/etc/mkinitcpio.d/linux.preset",
    )
    assert preset
    assert " ".join(preset.arguments) == (
        "-k /boot/vmlinuz-linux -c /etc/mkinitcpio.conf --microcode /boot/amd-ucode.img "
        "-S autodetect"
    )
    assert (preset.image, preset.uki, preset.own_line) == ("", "/efi/a b.efi", False)
    assert read_preset("PRESETS=()\n", "x") is None
