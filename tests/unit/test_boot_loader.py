# SPDX-License-Identifier: Apache-2.0
"""Who booted this machine, which boot entries are its own, and what was measured on the way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from boot_trees import (
    EFIVARS,
    GLOBAL_GUID,
    LEFT_OF_GRUB,
    LOADER_GUID,
    MACHINE_ID,
    PARTITION,
    SYSTEMD_BOOT,
    TREES,
    build,
    load_option,
    said,
    started,
)
from infertune.base.root import Root
from infertune.host import efi
from infertune.host.boot_entries import (
    BootEntry,
    boot_entries,
    boot_partitions,
    grub_environment,
    loader_place,
    selected_entry,
)
from infertune.host.boot_loader import STACKS, BootLoader, boot_loader
from infertune.host.gpu import carveout_shown_is_real
from infertune.host.load_option import load_option as parse
from infertune.host.load_option import plain
from infertune.host.machine import read_machine
from infertune.host.measured_boot import measured
from infertune.host.snapshot import open_snapshot, record
from infertune.host.system import loader_number
from infertune.host.unknown import Unknown

Files = dict[str, str | bytes]
GUESSED = "no boot loader reported its name: guessed from the files here"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def lay(root: Root, *sets: Files) -> Root:
    for files in sets:
        for path, data in files.items():
            file = root.at(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


# -- which stack ---------------------------------------------------------------------

EXPECTED = {
    "debian-grub": ("grub", "LoaderInfo says 'GRUB 2.12-9'"),
    "debian-grub-btrfs": (
        "grub",
        "the kernel says that GRUB loaded it (/proc/sys/kernel/bootloader_type)",
    ),
    "grub-beside-pop": ("grub", "LoaderInfo says 'GRUB 2.12-9'"),
    "grub-without-drop-ins": ("grub", GUESSED),
    "fedora-bls": ("bls", "LoaderInfo says 'GRUB 2.12'"),
    "fedora-bls-lvm": ("bls", "/usr/sbin/grubby"),
    "fedora-bls-kernelopts": ("bls", "/usr/sbin/grubby"),
    "arch-systemd-boot": ("systemd-boot", "LoaderInfo says 'systemd-boot 258.2-1-arch'"),
    "debian-systemd-boot": ("systemd-boot", "LoaderInfo says 'systemd-boot 257.13-1~deb13u1'"),
    "debian-systemd-boot-plain": (
        "systemd-boot",
        "LoaderInfo says 'systemd-boot 257.13-1~deb13u1'",
    ),
    "arch-uki": ("uki", "StubInfo says 'systemd-stub 258.2-1-arch'"),
    "uki-kernel-install": ("uki", "StubInfo says 'systemd-stub 257.13'"),
    "rpm-ostree": ("rpm-ostree", "/run/ostree-booted"),
    "rpm-ostree-counting": ("rpm-ostree", "/usr/bin/rpm-ostree"),
    "bootc": ("bootc", "/usr/bin/bootc"),
    "bootc-sources": ("bootc", "/usr/bin/bootc"),
    "bootc-composefs": ("composefs", "the command line has composefs="),
    "limine": ("limine", "LoaderInfo says 'Limine 9.3.1'"),
    "limine-uki": ("limine", "LoaderInfo says 'Limine 12.6.0'"),
    "limine-bios": ("limine", "/etc/default/limine"),
    "proxmox-zfs": ("proxmox-boot-tool", "the command line has initrd=\\EFI\\proxmox\\.."),
    "pop-os": ("kernelstub", "/usr/bin/kernelstub"),
    "opensuse-systemd-boot": ("sdbootutil", "/usr/bin/sdbootutil"),
    "opensuse-grub2-bls": ("sdbootutil", "/etc/sysconfig/bootloader has LOADER_TYPE=grub2-bls"),
    "cachyos-systemd-boot": ("sdboot-manage", "/etc/sdboot-manage.conf"),
    "zfsbootmenu": ("zfsbootmenu", "\\EFI\\zbm\\zfsbootmenu.EFI was started"),
    "refind": ("refind", "the firmware started \\EFI\\refind\\refind_x64.efi"),
    "efistub": ("efistub", "the firmware started \\EFI\\arch\\image.efi itself"),
    "nixos": ("nixos", "/etc/NIXOS"),
    "container": ("none", "/run/.containerenv"),
}


@pytest.mark.parametrize("tree", EXPECTED)
def test_each_stack_is_told_by_its_evidence(tree: str, tmp_path: Path) -> None:
    loader = boot_loader(Root(build(tmp_path, tree)))
    wanted, evidence = EXPECTED[tree]
    assert loader.id == wanted
    assert evidence in loader.evidence
    assert loader.how == next(stack.how for stack in STACKS if stack.id == wanted)


def test_every_tree_is_expected_and_every_stack_has_one() -> None:
    assert set(EXPECTED) == set(TREES) - {"unknown"}
    assert {wanted for wanted, _ in EXPECTED.values()} == {stack.id for stack in STACKS}


def test_a_machine_that_shows_nothing_is_none_of_them(tmp_path: Path) -> None:
    assert boot_loader(Root(build(tmp_path, "unknown"))) == BootLoader(None, None, ())


def test_f5_files_of_another_loader_do_not_win(tmp_path: Path) -> None:
    """Ubuntu with GRUB, whose EFI system partition is Pop!_OS', too."""
    root = Root(build(tmp_path, "grub-beside-pop"))
    assert boot_loader(root).id == "grub"
    # GRUB 2.06 does not say its name, and tells the kernel.
    root.at(f"{EFIVARS}/LoaderInfo-{LOADER_GUID}").unlink()
    lay(root, {"/proc/sys/kernel/bootloader_type": "114\n"})
    assert boot_loader(root).id == "grub"
    # Nor does one that goes through the kernel's EFI stub, and its word is on the command line.
    lay(root, {"/proc/sys/kernel/bootloader_type": "33\n", "/proc/cmdline": "BOOT_IMAGE=/vmlinuz"})
    assert boot_loader(root).id == "grub"
    # Nobody says anything: the entry on that partition is not this system's.
    lay(root, {"/proc/cmdline": "root=UUID=1234"})
    assert boot_loader(root).id == "grub"
    lay(root, {"/proc/cmdline": "root=UUID=77"})
    assert boot_loader(root).id == "systemd-boot"


def test_f6_proxmox_is_told_by_what_it_booted(root: Root) -> None:
    line = "initrd=\\EFI\\proxmox\\7.0.14-8-pve\\initrd.img-7.0.14-8-pve root=redacted boot=zfs\n"
    uuids = {"/etc/kernel/proxmox-boot-uuids": "8B4A-3C1D\n", "/etc/kernel/cmdline": "boot=zfs\n"}
    lay(root, LEFT_OF_GRUB, uuids, {"/proc/cmdline": line})
    assert boot_loader(root).id == "proxmox-boot-tool"
    # systemd-boot hands the initrd over itself: then its name and the tool's list say it.
    lay(root, SYSTEMD_BOOT, {"/proc/cmdline": "root=ZFS=rpool/ROOT/pve-1\n"})
    assert boot_loader(root).evidence[1:] == ("/etc/kernel/proxmox-boot-uuids",)
    # Where the tool keeps GRUB there, GRUB's files count.
    lay(root, said(LoaderInfo="GRUB 2.12"))
    assert boot_loader(root).id == "grub"


def test_f7_limine_comes_before_the_image_that_it_starts(tmp_path: Path) -> None:
    root = Root(build(tmp_path, "limine-uki"))
    assert efi.stub_info(root)
    assert boot_loader(root).id == "limine"
    # The firmware started the image itself: Limine's files are left over.
    root.at(f"{EFIVARS}/LoaderInfo-{LOADER_GUID}").unlink()
    lay(root, started(r"\EFI\Linux\omarchy_linux.efi"))
    assert boot_loader(root).id == "uki"
    # An older Limine does not say its name, but the firmware names it.
    lay(root, started(r"\EFI\limine\BOOTX64.EFI"))
    assert boot_loader(root).id == "limine"


def test_a_leftover_grub_under_refind_is_not_the_loader(tmp_path: Path) -> None:
    root = Root(build(tmp_path, "refind"))
    assert boot_loader(root).id == "refind"
    # What rEFInd starts may be GRUB, after all, or an image with its own command line.
    lay(root, {"/proc/sys/kernel/bootloader_type": "114\n"})
    assert boot_loader(root).id == "grub"
    lay(root, {"/proc/sys/kernel/bootloader_type": "33\n"}, said(StubInfo="systemd-stub 258"))
    assert boot_loader(root).id == "uki"


def test_a_loader_that_no_stack_knows_is_not_mistaken_for_one(root: Root) -> None:
    conf = {"/boot/loader/loader.conf": "", "/etc/default/limine": "", "/etc/kernel/cmdline": ""}
    lay(root, LEFT_OF_GRUB, conf, said(LoaderInfo="barebox-2026.10.0"))
    assert boot_loader(root) == BootLoader(None, None, ("LoaderInfo says 'barebox-2026.10.0'",))


def test_a_loader_may_have_started_another(root: Root) -> None:
    lay(root, LEFT_OF_GRUB, SYSTEMD_BOOT, {"/proc/sys/kernel/bootloader_type": "114\n"})
    assert boot_loader(root).id == "grub"
    lay(root, {"/proc/sys/kernel/bootloader_type": "33\n"})
    assert boot_loader(root).id == "systemd-boot"
    lay(root, said(LoaderInfo="1234"))
    assert boot_loader(root).evidence == ("/etc/default/grub", GUESSED)


def test_opensuse_s_other_grub_is_grub(tmp_path: Path) -> None:
    root = Root(build(tmp_path, "opensuse-grub2-bls"))
    lay(root, {"/etc/sysconfig/bootloader": 'LOADER_TYPE="grub2-efi"\n'})
    assert boot_loader(root).id == "grub"


def test_ostree_with_composefs_is_ostree(tmp_path: Path) -> None:
    root = Root(build(tmp_path, "bootc-composefs"))
    lay(root, {"/run/ostree-booted": ""})
    assert boot_loader(root).id == "bootc"


def test_the_kernel_s_own_stub_is_no_loader(root: Root) -> None:
    """libstub/bli.c says so where nobody else did: also after a GRUB without its module."""
    lay(root, LEFT_OF_GRUB, said(LoaderInfo="Linux EFI stub 7.1.3"))
    lay(root, started(r"\EFI\debian\grubx64.efi"), {"/proc/sys/kernel/bootloader_type": "33\n"})
    assert efi.loader_info(root) is None
    assert boot_loader(root).id == "grub"
    lay(root, started(r"\EFI\debian\vmlinuz-7.1.3"))
    assert boot_loader(root).id == "efistub"


def test_a_firmware_s_entry_with_another_command_line_is_no_kernel(root: Root) -> None:
    lay(root, started(r"\EFI\BOOT\BOOTX64.EFI", "root=UUID=9"), {"/proc/cmdline": "root=UUID=1\n"})
    assert boot_loader(root) == BootLoader(None, None, ())


def test_evidence_is_one_short_line_without_ids(root: Root) -> None:
    lay(root, said(LoaderInfo="x\x1b[2J\n" + "y" * 3000, StubInfo="stub"))
    lay(root, started(rf"\EFI\Linux\{MACHINE_ID}-7.efi"))
    machine = read_machine(root)
    assert machine.boot_style == "uki"
    assert all(each.isprintable() and len(each) <= 100 for each in machine.boot_evidence)
    root.at(f"{EFIVARS}/LoaderInfo-{LOADER_GUID}").unlink()
    root.at(f"{EFIVARS}/StubInfo-{LOADER_GUID}").unlink()
    (evidence,) = boot_loader(root).evidence
    assert evidence == rf"the firmware started \EFI\Linux\{'0' * 32}-7.efi itself"


@pytest.mark.parametrize("tree", ["debian-grub", "uki-kernel-install", "refind", "limine-uki"])
def test_a_recorded_machine_was_booted_by_the_same(tree: str, tmp_path: Path) -> None:
    root = Root(build(tmp_path / tree, tree))
    lay(root, {"/etc/machine-id": f"{MACHINE_ID}\n"})
    snapshot = tmp_path / "machine.snapshot"
    snapshot.write_text(record(root, read_machine))
    with open_snapshot(str(snapshot)) as replay:
        assert boot_loader(replay) == boot_loader(root)
    data = snapshot.read_bytes()
    for private in (MACHINE_ID, "UUID=1234"):
        assert private.encode() not in data
        assert "\\x00".join(private).encode() not in data


# -- EFI variables -------------------------------------------------------------------


def test_what_the_loader_says(root: Root) -> None:
    lay(root, said(LoaderEntrySelected="arch.conf", StubImageIdentifier=r"\EFI\Linux\a.efi"))
    lay(root, said(LoaderDevicePartUUID="7FBCFCC1-319F-2C4B-9F31-9C84FBCD9AF1"))
    features = f"{EFIVARS}/LoaderFeatures-{LOADER_GUID}"
    secure = f"{EFIVARS}/SecureBoot-{GLOBAL_GUID}"
    assert isinstance(efi.honours_one_shot(root), Unknown)
    assert isinstance(efi.secure_boot(root), Unknown)
    lay(root, {features: b"\6\0\0\0" + (0b1111).to_bytes(8, "little"), secure: b"\6\0\0\0\1"})
    assert efi.entry_selected(root) == "arch.conf"
    assert efi.stub_image(root) == r"\EFI\Linux\a.efi"
    assert efi.loader_partition(root) == "7fbcfcc1-319f-2c4b-9f31-9c84fbcd9af1"
    assert efi.honours_one_shot(root) is True
    assert efi.secure_boot(root) is True
    lay(root, {features: b"\6\0\0\0" + (0b0111).to_bytes(8, "little"), secure: b"\6\0\0\0\0"})
    assert efi.honours_one_shot(root) is False
    assert efi.secure_boot(root) is False


def test_a_boot_option_of_the_firmware(root: Root) -> None:
    lay(root, started(r"\EFI\arch\vmlinuz-linux", r"root=UUID=1 initrd=\initramfs.img"))
    option = efi.boot_current(root)
    assert option is not None
    assert (option.description, option.file) == ("Linux", r"\EFI\arch\vmlinuz-linux")
    assert option.partition == str(PARTITION)
    assert option.arguments == r"root=UUID=1 initrd=\initramfs.img"


def test_arguments_of_a_boot_option_without_unicode() -> None:
    option = parse(load_option(r"\vmlinuz") + b"root=/dev/sda2 quiet\0")
    assert option is not None
    assert option.arguments == "root=/dev/sda2 quiet"


def test_a_boot_option_that_may_be_shown_has_its_file_and_no_more() -> None:
    data = load_option(r"\EFI\a.efi", "root=UUID=1", "Samsung SSD S7HENJ0Y")
    shown = parse(plain(data))
    assert shown is not None
    assert (shown.description, shown.file) == ("", r"\EFI\a.efi")
    assert (shown.partition, shown.data) == (None, b"")
    assert plain(plain(data)) == plain(data)


def test_no_bytes_of_the_firmware_raise(root: Root) -> None:
    chance = random.Random(15)
    good = load_option(r"\EFI\debian\shimx64.efi", "root=UUID=1")
    names = ("LoaderInfo", "StubInfo", "StubImageIdentifier", "LoaderEntrySelected")
    names += ("LoaderDevicePartUUID", "LoaderFeatures")
    lay(root, {f"{EFIVARS}/BootCurrent-{GLOBAL_GUID}": b"\6\0\0\0\3\0"})
    for _ in range(300):
        data = bytearray(good if chance.random() < 0.7 else chance.randbytes(chance.randrange(90)))
        for _ in range(chance.randrange(6)):
            if data:
                data[chance.randrange(len(data))] = chance.choice((0, 1, 4, 0x7F, 0xD8, 0xFF))
        data = data[: chance.randrange(len(data) + 1)]
        parse(plain(bytes(data)))
        assert plain(plain(bytes(data))) == plain(bytes(data))
        lay(root, {f"{EFIVARS}/{name}-{LOADER_GUID}": bytes(data) for name in names})
        lay(root, {f"{EFIVARS}/Boot0003-{GLOBAL_GUID}": b"\7\0\0\0" + bytes(data)})
        lay(root, {f"{EFIVARS}/SecureBoot-{GLOBAL_GUID}": bytes(data)})
        efi.boot_current(root), efi.loader_features(root), efi.loader_partition(root)
        efi.secure_boot(root), efi.entry_selected(root), efi.stub_image(root)
        assert all(each.isprintable() for each in boot_loader(root).evidence)


def test_the_firmware_is_asked_once(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Counting(Root):
        def read_value(self, path: str, size: int) -> bytes:
            asked.append(path)
            return super().read_value(path, size)

    live = Counting(root.base)
    monkeypatch.setattr(live, "live", True)
    assert efi.loader_info(live) is None  # efivarfs is not mounted yet
    lay(root, SYSTEMD_BOOT, started(r"\EFI\systemd\systemd-bootx64.efi"))
    asked.clear()
    assert [boot_loader(live).id for _ in range(3)] == ["systemd-boot"] * 3
    there = [path for path in asked if root.exists(path)]
    assert sorted(there) == sorted(set(there))
    assert len(there) == 3


def test_a_variable_that_is_no_file_is_not_there(root: Root) -> None:
    root.at(f"{EFIVARS}/LoaderInfo-{LOADER_GUID}").mkdir(parents=True)
    assert efi.loader_info(root) is None
    assert efi.boot_current(root) is None
    lay(root, {f"{EFIVARS}/StubInfo-{LOADER_GUID}": b""})
    assert efi.stub_info(root) is None


@pytest.mark.parametrize(("text", "number"), [("114", 7), ("208", 13), ("0", None), ("x", None)])
def test_what_the_kernel_was_told(root: Root, text: str, number: int | None) -> None:
    lay(root, {"/proc/sys/kernel/bootloader_type": f"{text}\n"})
    assert loader_number(root) == number


# -- boot entries ----------------------------------------------------------------------


def ours(root: Root) -> dict[str, bool]:
    return {entry.id: entry.of_this_system for entry in boot_entries(root)}


def entries(**options: str) -> Files:
    return {
        f"/boot/loader/entries/{name.replace('_', '-')}.conf": f"title {name}\nlinux /v\n{text}\n"
        for name, text in options.items()
    }


def test_the_fields_of_an_entry(root: Root) -> None:
    text = (
        "# made by hand\ntitle\tArch Linux\nversion 7.1.3\nsort-key arch\n"
        "linux /vmlinuz-linux\ninitrd /ucode.img\ninitrd /initramfs.img\n"
        "options root=UUID=1 rw\noptions quiet\narchitecture x64\n"
    )
    lay(root, {"/efi/loader/entries/arch+2-1.conf": text, "/proc/cmdline": "root=UUID=1 rw\n"})
    assert boot_entries(root) == (
        BootEntry(
            path="/efi/loader/entries/arch+2-1.conf",
            id="arch.conf",
            title="Arch Linux",
            options="root=UUID=1 rw quiet",
            linux="/vmlinuz-linux",
            efi=None,
            initrd=("/ucode.img", "/initramfs.img"),
            machine_id=None,
            sort_key="arch",
            version="7.1.3",
            of_this_system=True,
        ),
    )


def test_f5_only_entries_of_this_system(root: Root) -> None:
    lay(root, {"/proc/cmdline": "root=UUID=1 rw\n", "/etc/machine-id": f"{MACHINE_ID}\n"})
    other = "f" * 32
    lay(
        root,
        entries(
            arch="options root=UUID=1 rw",
            arch_fallback="options root=UUID=1 rw",
            fedora="options root=UUID=2 ro",
            memtest="options root=UUID=1",
            Recovery_9BE6="options root=UUID=1 boot=casper",
            by_field=f"machine-id {MACHINE_ID}\noptions quiet",
            of_another=f"machine-id {other}\noptions root=UUID=1",
            no_root="options quiet",
        ),
    )
    named = {
        f"/boot/loader/entries/{MACHINE_ID}-7.1.3.conf": "options quiet\n",
        f"/boot/loader/entries/{MACHINE_ID}-0-rescue.conf": "options root=UUID=1\n",
        f"/boot/loader/entries/{other}-7.1.3.conf": "options root=UUID=3\n",
    }
    lay(root, named)
    assert {name for name, is_ours in ours(root).items() if is_ours} == {
        *("arch.conf", "by-field.conf", f"{MACHINE_ID}-7.1.3.conf")
    }


@pytest.mark.parametrize(
    ("line", "options", "is_ours"),
    [
        ("root=UUID=1 rw", "root=uuid=1 ro quiet", True),
        ("root=PARTUUID=aa", "root=UUID=1", True),
        ("root=/dev/nvme0n1p2", "root=UUID=1", True),
        ("root=UUID=2", "root=UUID=1", False),
        ("root=/dev/nvme0n1p3", "root=UUID=1", False),
        ("root=UUID=1 rootflags=subvol=@", "root=UUID=1 rootflags=subvol=/@", True),
        ("root=UUID=1 rootflags=subvol=@", "root=UUID=1 rootflags=rw,subvol=@fedora", False),
        ("root=UUID=1 rootflags=subvol=@", "root=UUID=1", True),
        ("root=ZFS=a/one", "root=ZFS=a/two", False),
        ("root=/dev/mapper/root cryptdevice=UUID=5:root", "root=/dev/mapper/root", True),
        (
            "root=/dev/mapper/root cryptdevice=UUID=5:root",
            "root=/dev/mapper/root cryptdevice=UUID=6:root",
            False,
        ),
        (
            "root=/dev/mapper/root rd.luks.name=5=root",
            "root=/dev/mapper/root rd.luks.uuid=luks-5",
            True,
        ),
        ("root=UUID=../../../etc", "root=UUID=../../../etc/x", False),
        ("root=/dev/../x", "root=/dev/a\0b", False),
    ],
)
def test_whose_root_an_entry_starts(root: Root, line: str, options: str, is_ours: bool) -> None:
    for link in ("by-uuid/1", "by-partuuid/aa"):
        path = root.at(f"/dev/disk/{link}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("../../nvme0n1p2")
    lay(root, {"/proc/cmdline": f"{line}\n"}, entries(one=f"options {options}"))
    assert ours(root) in ({"one.conf": is_ours}, {} if "\0" in options else None)


def test_root_as_it_is_kept_elsewhere(root: Root) -> None:
    lay(root, entries(one="options root=UUID=1", two="options root=LABEL=x"))
    lay(root, {"/etc/fstab": "# /\n\nUUID=1 / ext4 defaults 0 1\n"})
    lay(root, {"/etc/kernel/cmdline": "root=LABEL=x ro"})
    assert ours(root) == {"one.conf": True, "two.conf": True}


def test_the_loader_s_own_partition_comes_first(root: Root) -> None:
    mounts = (
        "/dev/sda2 /boot vfat rw 0 0\n/dev/sda1 /efi vfat rw 0 0\n/dev/sdb1 /boot/efi vfat rw\n"
    )
    lay(root, {"/proc/self/mounts": mounts})
    assert loader_place(root) == "/efi"
    assert boot_partitions(root) == ("/efi", "/boot", "/boot/efi")
    uuid = "7fbcfcc1-319f-2c4b-9f31-9c84fbcd9af1"
    lay(root, said(LoaderDevicePartUUID=uuid.upper()))
    link = root.at(f"/dev/disk/by-partuuid/{uuid}")
    link.parent.mkdir(parents=True)
    link.symlink_to("../../sdb1")
    assert loader_place(root) == "/boot/efi"
    assert boot_partitions(root) == ("/boot/efi", "/boot", "/efi")
    link.unlink()
    link.symlink_to("../../sdc1")  # not mounted here
    assert loader_place(root) is None


def test_one_partition_under_two_names_is_listed_once(root: Root) -> None:
    lay(root, entries(one="options root=UUID=1"))
    root.at("/efi").symlink_to("boot")
    assert [entry.path for entry in boot_entries(root)] == ["/boot/loader/entries/one.conf"]


def test_the_selected_entry(root: Root) -> None:
    lay(root, entries(Arch="options root=UUID=1", Other="options root=UUID=2"))
    found = boot_entries(root)
    assert selected_entry(root, found) is None
    for name in ("arch.conf", "arch"):
        lay(root, said(LoaderEntrySelected=name))
        selected = selected_entry(root, found)
        assert selected is not None
        assert selected.id == "Arch.conf"
    lay(root, said(LoaderEntrySelected="auto-windows"))
    assert selected_entry(root, found) is None


def test_what_is_no_entry_is_passed_over(root: Root) -> None:
    lay(root, entries(good="options root=UUID=1"))
    where = "/boot/loader/entries"
    lay(root, {f"{where}/binary.conf": b"\0\1\2", f"{where}/large.conf": "x" * 70_000})
    lay(root, {f"{where}/empty.conf": "", f"{where}/latin.conf": b"title \xe9\n"})
    root.at(f"{where}/directory.conf").mkdir()
    root.at(f"{where}/dangling.conf").symlink_to("nowhere")
    root.at(f"{where}/loop.conf").symlink_to("loop.conf")
    assert [entry.id for entry in boot_entries(root)] == ["empty.conf", "good.conf", "latin.conf"]
    lay(root, {f"{where}/many-{n}.conf": "" for n in range(300)})
    assert 150 < len(boot_entries(root)) <= 200


def test_grub_s_environment(root: Root) -> None:
    assert grub_environment(root) is None
    text = "# GRUB Environment Block\nsaved_entry=0\nkernelopts=root=UUID=1 ro \n"
    lay(root, {"/boot/grub2/grubenv": text.ljust(1024, "#")})
    assert grub_environment(root) == {"saved_entry": "0", "kernelopts": "root=UUID=1 ro "}


# -- what is measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "evidence"),
    [
        (
            {"/etc/crypttab": "# x\nroot UUID=1 none luks,tpm2-device=auto,tpm2-pcrs=7\n"},
            "/etc/crypttab:2 has tpm2-device=auto",
        ),
        (
            {"/etc/crypttab.initramfs": "root UUID=1 - tpm2-device=/dev/tpmrm0\n"},
            "/etc/crypttab.initramfs:1 has tpm2-device=/dev/tpmrm0",
        ),
        (
            {"/etc/crypttab": "root UUID=1 none luks,keyscript=/sbin/tpm2-initramfs-tool\n"},
            "/etc/crypttab:1 has keyscript=/sbin/tpm2-initramfs-tool",
        ),
        (
            {"/proc/cmdline": "rd.luks.options=12-34=discard,tpm2-device=auto root=/dev/m\n"},
            "the command line has rd.luks.options=..tpm2-device=auto",
        ),
        (
            {"/proc/cmdline": "rd.luks.options=12-34=tpm2-device=auto root=/dev/m\n"},
            "the command line has rd.luks.options=..tpm2-device=auto",
        ),
        (
            {"/etc/mkinitcpio.conf": "MODULES=()\nHOOKS=(base udev clevis encrypt)\n"},
            "/etc/mkinitcpio.conf:2 has HOOKS=(base udev clevis encrypt)",
        ),
        (
            {"/etc/dracut.conf.d/tpm.conf": 'add_dracutmodules+=" tpm2-tss "\n'},
            '/etc/dracut.conf.d/tpm.conf:1 has add_dracutmodules+=" tpm2-tss "',
        ),
        (
            {
                "/usr/share/initramfs-tools/hooks/clevis": "",
                "/usr/sbin/update-initramfs": "",
                "/etc/crypttab": "root UUID=1 none luks\n",
            },
            "/usr/share/initramfs-tools/hooks/clevis, which unlocks disks in the initramfs",
        ),
        (
            {"/var/lib/systemd/pcrlock.json": "{}"},
            "/var/lib/systemd/pcrlock.json: a policy of systemd-pcrlock",
        ),
        (
            {"/boot/efi/EFI/systemd/tpm2-pcr-signature.json": "{}"},
            "/boot/efi/EFI/systemd/tpm2-pcr-signature.json: signed measurements",
        ),
        (
            {"/boot/efi/EFI/opensuse/sealed.tpm": "x"},
            "/boot/efi/EFI/opensuse/sealed.tpm: a key sealed by the TPM",
        ),
        (
            {"/run/mnt/ubuntu-boot/device/fde/ubuntu-data.sealed-key": "x"},
            "/run/mnt/ubuntu-boot/device/fde/ubuntu-data.sealed-key: a key sealed by the TPM",
        ),
    ],
)
def test_f9_a_disk_that_the_tpm_unlocks(root: Root, files: Files, evidence: str) -> None:
    assert measured(lay(root, files)) == (evidence,)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"/etc/crypttab": "root UUID=1 none luks,discard\n#root UUID=1 - tpm2-device=auto\n"},
        {"/etc/crypttab": "tpm2-device=auto\n", "/proc/cmdline": "tpm2-device=auto quiet\n"},
        {"/etc/crypttab": b"\0binary tpm2-device=auto"},
        {"/etc/mkinitcpio.conf": "# HOOKS=(clevis)\nHOOKS=(base sd-encrypt)\n"},
        # Packages alone: no encrypted disk, or no tool that would take it into an initramfs.
        {"/usr/share/initramfs-tools/hooks/clevis": "", "/usr/sbin/update-initramfs": ""},
        {
            "/usr/lib/dracut/modules.d/60clevis-pin-tpm2/module-setup.sh": "",
            "/etc/crypttab": "root UUID=1 none luks\n",
        },
    ],
)
def test_f9_what_shows_no_tpm_is_no_evidence(root: Root, files: Files) -> None:
    assert measured(lay(root, files)) == ()


# -- the carve-out -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vram_gib", "shown", "real"), [(64, "0", False), (32, "1", True), (64, "9", None)]
)
def test_f13_the_carve_out_shown_may_not_be_the_real_one(
    root: Root, vram_gib: int, shown: str, real: bool | None
) -> None:
    """64 GiB were chosen in the firmware's setup, and its list goes up to 32."""
    card = "/sys/class/drm/card1/device"
    lay(
        root,
        {
            f"{card}/vendor": "0x1002\n",
            f"{card}/device": "0x1586\n",
            f"{card}/mem_info_vram_total": f"{vram_gib << 30}\n",
            f"{card}/uma/carveout": f"{shown}\n",
            f"{card}/uma/carveout_options": "0: Minimum (512 MB)\n1: High (32 GB)\n",
        },
    )
    root.at(f"{card}/driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    gpu = read_machine(root).inference_gpu
    assert gpu is not None
    assert carveout_shown_is_real(gpu.carveout_bytes, gpu.vram_bytes) is real
    assert carveout_shown_is_real(gpu.carveout_bytes, None) is None
