# SPDX-License-Identifier: Apache-2.0
"""Machines with one boot loader each, as trees, and a stand-in for the tools that rebuild."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import boot_makers
from infertune.boot.commands import Ran

KERNEL = "7.1.3-test"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
FIRST = "11111111-2222-3333-4444-555555555555\n"

MACHINE = {
    BOOT_ID: FIRST,
    "/proc/sys/kernel/osrelease": f"{KERNEL}\n",
    "/proc/meminfo": "MemTotal:       131072000 kB\n",
    "/proc/cmdline": "root=UUID=1234 ro quiet\n",
    "/proc/cpuinfo": "processor: 0\n",
    "/sys/devices/system/cpu/online": "0-3\n",
    "/sys/module/amdgpu/parameters/lockup_timeout": "\n",
    "/sys/module/ttm/parameters/pages_limit": "16384000\n",
    "/sys/module/ttm/parameters/page_pool_size": "16384000\n",
    "/sys/module/ttm/holders/amdgpu/x": "",
    f"/lib/modules/{KERNEL}/modules.dep": "kernel/drivers/gpu/drm/ttm/ttm.ko.zst:\n",
    "/etc/modprobe.d/other.conf": "options snd_hda_intel power_save=1\n",
    "/etc/infertune/profiles/boot.toml": """\
[boot]
ttm.pages_limit = "96GiB"
ttm.page_pool_size = "25%"
amdgpu.lockup_timeout = 20000
amd_iommu = "off"
isolcpus = "2-3"
transparent_hugepage = "madvise"
""",
    "/etc/infertune/profiles/size.toml": '[boot]\nttm.pages_limit = "96GiB"\n',
    "/etc/infertune/profiles/kernel.toml": '[boot]\namd_iommu = "off"\n',
}


def grubenv(*lines: str) -> bytes:
    """GRUB's environment block: 1 KiB, filled up with #."""
    text = "".join(f"{line}\n" for line in ("# GRUB Environment Block", *lines))
    return text.encode().ljust(1024, b"#")


EFIVARS = "/sys/firmware/efi/efivars"
LOADER_GUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
GLOBAL_GUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
MACHINE_ID = "0123456789abcdef0123456789abcdef"
PARTITION = UUID("7fbcfcc1-319f-2c4b-9f31-9c84fbcd9af1")
"""Of load_option."""


def said(**texts: str) -> dict[str, bytes]:
    """EFI variables in which boot loader and stub say who they are."""
    return {
        f"{EFIVARS}/{name}-{LOADER_GUID}": b"\6\0\0\0" + f"{text}\0".encode("utf-16-le")
        for name, text in texts.items()
    }


def systemd_boot(version: str = "257.13-1~deb13u1", selected: str = "") -> dict[str, bytes]:
    """EFI variables of systemd-boot, and the entry it has started."""
    entry = said(LoaderEntrySelected=selected) if selected else {}
    features = f"{EFIVARS}/LoaderFeatures-{LOADER_GUID}"
    return {
        **said(LoaderInfo=f"systemd-boot {version}"),
        **entry,
        features: b"\6\0\0\0\xff\x3f\0\0\0\0\0\0",
        "/usr/bin/bootctl": b"",
    }


def secure_boot(*, on: bool) -> dict[str, bytes]:
    return {f"{EFIVARS}/SecureBoot-{GLOBAL_GUID}": b"\6\0\0\0" + bytes([on])}


def load_option(file: str, arguments: str = "", description: str = "Linux") -> bytes:
    """EFI_LOAD_OPTION of a file on the first partition of a GPT disk."""
    drive = b"\1\0\0\0" + bytes(16) + PARTITION.bytes_le + b"\2\2"
    path = f"{file}\0".encode("utf-16-le")
    nodes = b"\4\1\x2a\0" + drive + b"\4\4" + (len(path) + 4).to_bytes(2, "little") + path
    nodes += b"\x7f\xff\4\0"
    head = b"\1\0\0\0" + len(nodes).to_bytes(2, "little") + f"{description}\0".encode("utf-16-le")
    return head + nodes + arguments.encode("utf-16-le")


def started(file: str, arguments: str = "") -> dict[str, bytes]:
    """EFI variables that say what the firmware started."""
    return {
        f"{EFIVARS}/BootCurrent-{GLOBAL_GUID}": b"\6\0\0\0\3\0",
        f"{EFIVARS}/Boot0003-{GLOBAL_GUID}": b"\7\0\0\0" + load_option(file, arguments),
    }


LEFT_OF_GRUB = {
    "/etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
    "/boot/grub/grub.cfg": "# GRUB\n",
    "/usr/sbin/update-grub": "",
}
SNAPSHOT = "@/.snapshots/1/snapshot"


def opensuse(entry: str, volume: str) -> dict[str, str | bytes]:
    """An entry as sdbootutil writes it, and where it takes the command line from."""
    return {
        f"/boot/efi/loader/entries/{entry}": "# Boot Loader Specification type#1 entry\n"
        f"title      openSUSE Tumbleweed\nversion    1@{KERNEL}\nsort-key   opensuse-tumbleweed\n"
        f"options    quiet root=UUID=1234 rootflags=subvol={volume} "
        f"systemd.machine_id={MACHINE_ID}\nlinux      /opensuse-tumbleweed/{KERNEL}/linux-0a1b\n"
        f"initrd     /opensuse-tumbleweed/{KERNEL}/initrd-2c3d\n",
        "/etc/kernel/cmdline": f"quiet root=UUID=1234 rootflags=subvol={SNAPSHOT}\n",
        "/etc/kernel/entry-token": "opensuse-tumbleweed\n",
        "/etc/machine-id": f"{MACHINE_ID}\n",
        "/usr/bin/sdbootutil": "",
        "/usr/bin/dracut": "",
    }


# As kernel-install's 90-loaderentry writes them; hooks of the package systemd-boot run it.
DEBIAN_ENTRIES = {
    f"/boot/efi/loader/entries/{MACHINE_ID}-{version}.conf": "# Boot Loader Specification type#1 "
    f"entry\ntitle      Debian GNU/Linux 13 (trixie)\nversion    {version}\n"
    f"machine-id {MACHINE_ID}\nsort-key   debian\n"
    f"options    root=UUID=1234 ro quiet systemd.machine_id={MACHINE_ID}\n"
    f"linux      /{MACHINE_ID}/{version}/linux\n"
    f"initrd     /{MACHINE_ID}/{version}/initrd.img-{version}\n"
    for version in (KERNEL, "7.0.9-test")
} | {
    "/boot/efi/loader/loader.conf": "timeout 3\n",
    "/etc/machine-id": f"{MACHINE_ID}\n",
    "/usr/bin/kernel-install": "",
    "/usr/sbin/update-initramfs": "",
}
UKI = rf"\EFI\Linux\{MACHINE_ID}-{KERNEL}.efi"
SYSTEMD_BOOT = said(LoaderInfo="systemd-boot 257.13-1~deb13u1")

MOUNTS = "/dev/nvme0n1p2 / ext4 rw 0 0\n/dev/nvme0n1p1 /boot/efi vfat rw 0 0\n"
DEBIAN: dict[str, str | bytes] = {
    **said(LoaderInfo="GRUB 2.12-9"),
    **started(r"\EFI\debian\shimx64.efi"),
    "/etc/default/grub": 'GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
    "/boot/grub/grub.cfg": "# GRUB\n",
    "/proc/self/mounts": MOUNTS,
    "/usr/sbin/grub-mkconfig": 'for x in ${sysconfdir}/default/grub.d/*.cfg; do . "$x"; done\n',
    "/usr/sbin/update-grub": "",
    "/usr/bin/grub-editenv": "",
    "/usr/sbin/update-initramfs": "",
    "/etc/grub.d/00_header": "",
}

# Of BIOS there is no word but the one to the kernel.
DEBIAN_BIOS = {path: text for path, text in DEBIAN.items() if not path.startswith(EFIVARS)} | {
    "/proc/sys/kernel/bootloader_type": "114\n"
}

FEDORA_ENTRY = f"/boot/loader/entries/{MACHINE_ID}-{{}}.conf"


def _fedora_entry(kernel: str, options: str = "root=UUID=1234 ro rhgb quiet") -> str:
    """As mkbls of 20-grub.install writes it."""
    return (
        f"title Fedora Linux ({kernel}) 44 (Workstation Edition)\nversion {kernel}\n"
        f"linux /vmlinuz-{kernel}\ninitrd /initramfs-{kernel}.img\noptions {options}\n"
        "grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n"
    )


GRUB2_CONFIG = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ]; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
blscfg
"""
FEDORA: dict[str, str | bytes] = {
    **said(LoaderInfo="GRUB 2.12"),
    **started(r"\EFI\fedora\shimx64.efi"),
    "/etc/machine-id": f"{MACHINE_ID}\n",
    "/etc/default/grub": 'GRUB_CMDLINE_LINUX="rhgb quiet"\nGRUB_ENABLE_BLSCFG=true\n',
    "/etc/kernel/cmdline": "root=UUID=1234 ro rhgb quiet\n",
    "/usr/sbin/grubby": "",
    "/usr/bin/grub2-editenv": "",
    "/usr/bin/dracut": "",
    "/boot/grub2/grub.cfg": GRUB2_CONFIG,
    "/boot/grub2/grubenv": grubenv(f"saved_entry={MACHINE_ID}-{KERNEL}", "boot_success=1"),
    "/proc/self/mounts": "/dev/nvme0n1p3 / btrfs rw 0 0\n/dev/nvme0n1p2 /boot ext4 rw 0 0\n"
    "/dev/nvme0n1p1 /boot/efi vfat rw 0 0\n",
    FEDORA_ENTRY.format(KERNEL): _fedora_entry(KERNEL),
    FEDORA_ENTRY.format("7.0.9-200.fc44.x86_64"): _fedora_entry("7.0.9-200.fc44.x86_64"),
    FEDORA_ENTRY.format("0-rescue"): _fedora_entry("0-rescue"),
}
OSTREE: dict[str, str | bytes] = {
    **said(LoaderInfo="GRUB 2.12"),
    **started(r"\EFI\fedora\shimx64.efi"),
    "/run/ostree-booted": "",
    "/usr/bin/bootc": "",
    "/usr/bin/grub2-editenv": "",
    "/boot/grub2/grub.cfg": "# static, of bootupd\nload_env\nblscfg\n",
    "/boot/grub2/grubenv": grubenv("boot_success=1"),
    "/boot/loader/entries/ostree-2.conf": "title Bazzite\noptions root=UUID=1234 quiet\n",
    "/proc/self/mounts": "/dev/nvme0n1p3 / btrfs rw 0 0\n/dev/nvme0n1p2 /boot ext4 rw 0 0\n",
}
LIMINE: dict[str, str | bytes] = {
    "/etc/machine-id": f"{MACHINE_ID}\n",
    f"{EFIVARS}/SecureBoot-{GLOBAL_GUID}": b"\6\0\0\0\0",
    "/sys/devices/pci/nvme0n1/nvme0n1p1/partition": "1\n",
    "/proc/self/mounts": "/dev/nvme0n1p2 / btrfs rw 0 0\n/dev/nvme0n1p1 /boot vfat rw 0 0\n",
    "/usr/bin/efibootmgr": "",
    "/usr/bin/limine-mkinitcpio": "",
    "/usr/bin/limine-update": "",
    "/usr/bin/limine-snapper-sync": "",
    "/usr/bin/mkinitcpio": "",
    "/etc/mkinitcpio.d/linux.preset": "",
}
GRUB2_COUNTING = """\
if [ -n "${boot_counter}" -a "${boot_success}" = "0" ]; then
  if  [ "${boot_counter}" = "0" -o "${boot_counter}" = "-1" ]; then
    set default=1
"""

TREES: dict[str, dict[str, str | bytes]] = {
    "debian-grub": DEBIAN,
    "debian-grub-btrfs": {**DEBIAN_BIOS, "/proc/self/mounts": "/dev/nvme0n1p2 / btrfs rw 0 0\n"},
    # F5: on a partition shared with Pop!_OS.
    "grub-beside-pop": {
        **DEBIAN,
        "/boot/efi/loader/loader.conf": "default Pop_OS-current\n",
        "/boot/efi/loader/entries/Pop_OS-current.conf": "title Pop!_OS\noptions root=UUID=77 ro\n",
    },
    "grub-without-drop-ins": {
        "/etc/default/grub": 'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"',
        "/boot/grub2/grub.cfg": "# GRUB\n",
        "/usr/sbin/grub2-mkconfig": "# upstream\n",
        "/usr/bin/dracut": "",
    },
    "fedora-bls": FEDORA,
    # GRUB cannot write there.
    "fedora-bls-lvm": {
        **FEDORA,
        "/proc/self/mounts": "/dev/mapper/rhel-root / xfs rw 0 0\n"
        "/dev/mapper/rhel-boot /boot xfs rw 0 0\n/dev/nvme0n1p1 /boot/efi vfat rw 0 0\n",
    },
    # Installed as Fedora 30: what is on the command line is in GRUB's environment.
    "fedora-bls-kernelopts": {
        **{path: text for path, text in FEDORA.items() if path != "/etc/kernel/cmdline"},
        "/proc/cmdline": f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz-{KERNEL} root=UUID=1234 ro rhgb quiet\n",
        FEDORA_ENTRY.format(KERNEL): _fedora_entry(KERNEL, "$kernelopts $tuned_params"),
    },
    # Entries by hand, without sort-key, and others' beside them (F5).
    "arch-systemd-boot": {
        **systemd_boot("258.2-1-arch", "arch.conf"),
        **started(r"\EFI\systemd\systemd-bootx64.efi"),
        "/proc/cmdline": "initrd=\\initramfs-linux.img root=UUID=1 rw\n",
        "/boot/loader/loader.conf": "timeout 3\n",
        "/boot/loader/entries/arch.conf": "title Arch\nlinux /vmlinuz-linux\n"
        "initrd /initramfs-linux.img\noptions root=UUID=1 rw  \n",
        "/boot/loader/entries/arch-lts.conf": "title Arch LTS\nlinux /vmlinuz-linux-lts\n"
        "initrd /initramfs-linux-lts.img\noptions\troot=UUID=1 rw",
        "/boot/loader/entries/arch-fallback.conf": "title Arch\noptions root=UUID=1 rw\n",
        "/boot/loader/entries/fedora.conf": "title Fedora\noptions root=UUID=2 ro\n",
        "/boot/loader/entries/memtest.conf": "title Memtest86+\nefi /memtest86+/memtest.efi\n",
        "/usr/bin/kernel-install": "",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    # F1: kernel-install has no add-all there, or finds no kernel.
    "debian-systemd-boot": {
        **systemd_boot(selected=f"{MACHINE_ID}-{KERNEL}.conf"),
        **DEBIAN_ENTRIES,
        "/etc/kernel/cmdline": "root=UUID=1234 ro\n",
    },
    # F6: without that file kernel-install makes entries of /proc/cmdline.
    "debian-systemd-boot-plain": {
        **systemd_boot(selected=f"{MACHINE_ID}-{KERNEL}.conf"),
        **DEBIAN_ENTRIES,
        "/proc/cmdline": f"initrd=\\{MACHINE_ID}\\{KERNEL}\\initrd.img-{KERNEL} "
        f"root=UUID=1234 ro quiet systemd.machine_id={MACHINE_ID}\n",
    },
    "arch-uki": {
        **systemd_boot("258.2-1-arch", "arch-linux.efi"),
        **said(
            StubInfo="systemd-stub 258.2-1-arch",
            StubImageIdentifier=r"\EFI\Linux\arch-linux.efi",
        ),
        **secure_boot(on=False),
        "/proc/cmdline": "root=UUID=1 rw\n",
        "/boot/loader/loader.conf": "timeout 3\n",
        "/boot/EFI/Linux/arch-linux.efi": boot_makers.image("root=UUID=1 rw", KERNEL),
        "/boot/vmlinuz-linux": boot_makers.kernel(KERNEL),
        "/etc/cmdline.d/root.conf": "root=UUID=1 rw\n",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.conf": "HOOKS=(base udev)\n",
        "/etc/mkinitcpio.d/linux.preset": """\
ALL_config="/etc/mkinitcpio.conf"
ALL_kver="/boot/vmlinuz-linux"
PRESETS=('default')
default_uki="/boot/EFI/Linux/arch-linux.efi"
""",
    },
    "uki-kernel-install": {
        **systemd_boot(selected=f"{MACHINE_ID}-{KERNEL}.efi"),
        **said(StubInfo="systemd-stub 257.13", StubImageIdentifier=UKI),
        **secure_boot(on=False),
        f"/boot/efi{UKI.replace(chr(92), chr(47))}": boot_makers.image("root=UUID=1 ro", KERNEL),
        f"/boot/vmlinuz-{KERNEL}": boot_makers.kernel(KERNEL),
        "/etc/kernel/cmdline": "root=UUID=1 ro",
        "/etc/kernel/install.conf": "layout=uki\n",
        "/usr/bin/kernel-install": "",
        "/usr/bin/dracut": "",
    },
    "rpm-ostree": {**OSTREE, "/usr/bin/rpm-ostree": ""},
    # What grub-mkconfig wrote at installation, or greenboot brings.
    "rpm-ostree-counting": {
        **OSTREE,
        "/usr/bin/rpm-ostree": "",
        "/boot/grub2/grub.cfg": f"load_env\n{GRUB2_COUNTING}",
    },
    "bootc": OSTREE,
    "bootc-sources": {
        **OSTREE,
        "/usr/share/man/man8/bootc-loader-entries-set-options-for-source.8.gz": "",
    },
    "bootc-composefs": {
        **SYSTEMD_BOOT,
        "/proc/cmdline": "composefs=fedcba root=UUID=1234 rw\n",
        "/usr/bin/bootc": "",
        "/usr/bin/grubby": "",
        "/boot/loader/loader.conf": "",
    },
    # CachyOS.
    "limine": {
        **LIMINE,
        **said(LoaderInfo="Limine 9.3.1", LoaderDevicePartUUID=str(PARTITION)),
        "/etc/default/limine": "ESP_PATH=/boot\n"
        'KERNEL_CMDLINE[default]+="quiet rw root=UUID=1234"\nBOOT_ORDER="*, *fallback"\n',
        "/etc/limine-entry-tool.conf": '#KERNEL_CMDLINE[default]+="rw root=UUID=..."\n',
        "/etc/limine-entry-tool.d/10-limine-snapper-sync.conf": "MAX_SNAPSHOT_ENTRIES=5\n",
        f"/boot/{MACHINE_ID}/linux-cachyos/vmlinuz": "MZ",
        f"/boot/{MACHINE_ID}/linux-cachyos/initramfs": "",
        f"/usr/lib/modules/{KERNEL}/pkgbase": "linux-cachyos\n",
    },
    # F7: Omarchy's default, a unified kernel image that Limine's tools build and Limine starts.
    "limine-uki": {
        **LIMINE,
        **said(
            LoaderInfo="Limine 12.6.0",
            LoaderDevicePartUUID=str(PARTITION),
            StubInfo="systemd-stub 258.2-1-arch",
            StubImageIdentifier=r"\EFI\Linux\omarchy_linux.efi",
        ),
        "/etc/kernel/cmdline": "root=UUID=1234 rw\n",
        "/etc/default/limine": 'TARGET_OS_NAME="Omarchy"\nESP_PATH="/boot"\n'
        'KERNEL_CMDLINE[default]+="root=UUID=1234 rw"\nENABLE_UKI=yes\n',
        "/etc/limine-entry-tool.d/omarchy-defaults.conf": (
            'KERNEL_CMDLINE[default]+=" quiet splash"\nCUSTOM_UKI_NAME="omarchy"\n'
        ),
        "/boot/EFI/Linux/omarchy_linux.efi": "MZ",
    },
    # Without UEFI, or what writes boot options.
    "limine-bios": {
        "/boot/limine/limine.conf": "timeout: 5\n",
        "/etc/default/limine": 'KERNEL_CMDLINE[default]="quiet rw root=UUID=1234"\n',
        "/usr/bin/limine-mkinitcpio": "",
    },
    # F6: systemd-boot on partitions of proxmox-boot-tool, and GRUB's files unused.
    "proxmox-zfs": {
        **LEFT_OF_GRUB,
        **SYSTEMD_BOOT,
        "/proc/cmdline": "initrd=\\EFI\\proxmox\\7.0.14-8-pve\\initrd.img-7.0.14-8-pve "
        "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n",
        "/proc/self/mounts": "rpool/ROOT/pve-1 / zfs rw 0 0\n",
        "/etc/kernel/cmdline": "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n",
        "/etc/kernel/proxmox-boot-uuids": "8B4A-3C1D\n",
        "/usr/sbin/proxmox-boot-tool": "",
        "/usr/sbin/update-initramfs": "",
    },
    # F6: kernelstub makes Pop_OS-current.conf anew at every update of the initramfs.
    "pop-os": {
        **systemd_boot("255.4-1ubuntu8", "pop_os-current.conf"),
        "/boot/efi/loader/loader.conf": "default Pop_OS-current\n",
        "/boot/efi/loader/entries/Pop_OS-current.conf": "title Pop!_OS\n"
        "linux /EFI/Pop_OS-1234/vmlinuz.efi\ninitrd /EFI/Pop_OS-1234/initrd.img\n"
        "options root=UUID=1234 ro quiet\n",
        "/boot/efi/loader/entries/Pop_OS-oldkern.conf": "title Pop!_OS\n"
        "linux /EFI/Pop_OS-1234/vmlinuz-previous.efi\n"
        "initrd /EFI/Pop_OS-1234/initrd.img-previous\noptions root=UUID=1234 ro quiet\n",
        "/boot/efi/loader/entries/Recovery-9BE6-2B49.conf": "title Pop!_OS recovery\n"
        "linux /EFI/Recovery-9BE6-2B49/vmlinuz.efi\noptions boot=casper\n",
        "/etc/kernelstub/configuration": json.dumps(
            {name: {"kernel_options": ["quiet"], "config_rev": 4} for name in ("default", "user")},
            indent=2,
        ),
        "/usr/bin/kernelstub": "",
        "/usr/sbin/update-initramfs": "",
    },
    "opensuse-systemd-boot": {
        **systemd_boot("258.2+suse.15", f"opensuse-tumbleweed-{KERNEL}-1.conf"),
        **opensuse(f"opensuse-tumbleweed-{KERNEL}-1.conf", SNAPSHOT),
        **opensuse("opensuse-tumbleweed-7.0.9-test-0.conf", "@/.snapshots/0/snapshot"),
        "/proc/cmdline": f"root=UUID=1234 rootflags=subvol={SNAPSHOT}\n",
        "/etc/sysconfig/bootloader": 'LOADER_TYPE="systemd-boot"\n',
        "/etc/crypttab": "cr_root UUID=99 none tpm2-device=auto,tpm2-measure-pcr=yes\n",
        "/boot/efi/loader/loader.conf": "timeout 5\n",
        "/usr/bin/kernel-install": "",
    },
    "opensuse-grub2-bls": {
        **said(LoaderInfo="GRUB 2.14", LoaderEntrySelected=f"system-opensuse-{KERNEL}-1.conf"),
        **opensuse(f"system-opensuse-{KERNEL}-1.conf", SNAPSHOT),
        "/proc/cmdline": f"root=UUID=1234 rootflags=subvol={SNAPSHOT}\n",
        "/etc/sysconfig/bootloader": 'LOADER_TYPE="grub2-bls"\nSECURE_BOOT="yes"\n',
        "/etc/default/grub": "",
    },
    "cachyos-systemd-boot": {
        **systemd_boot("258.2-1-arch", "linux-cachyos.conf"),
        "/etc/sdboot-manage.conf": '# config file for sdboot-manage\nLINUX_OPTIONS="quiet"\n',
        "/boot/loader/loader.conf": "timeout 3\n",
        "/boot/loader/entries/linux-cachyos.conf": "title\tLinux Cachyos\n"
        "linux\t/vmlinuz-linux-cachyos\ninitrd\t/initramfs-linux-cachyos.img\n"
        "options\troot=UUID=1234 rw rootflags=subvol=/@ quiet\n",
        "/boot/loader/entries/linux-cachyos-fallback.conf": "title\tLinux Cachyos\n"
        "linux\t/vmlinuz-linux-cachyos\ninitrd\t/initramfs-linux-cachyos-fallback.img\n"
        "options\troot=UUID=1234 rw rootflags=subvol=/@ quiet\n",
        "/usr/bin/sdboot-manage": "",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux-cachyos.preset": "",
    },
    # Its stub and its kexec, and a GRUB from before.
    "zfsbootmenu": {
        **LEFT_OF_GRUB,
        **said(
            StubInfo="systemd-stub 255.4",
            StubImageIdentifier=r"\EFI\zbm\zfsbootmenu.EFI",
        ),
        **started(r"\EFI\zbm\zfsbootmenu.EFI"),
        "/proc/cmdline": "root=zfs:zroot/ROOT/debian quiet spl_hostid=00bab10c\n",
        "/proc/self/mounts": "zroot/ROOT/debian / zfs rw 0 0\n",
        "/proc/sys/kernel/bootloader_type": "208\n",
        "/usr/sbin/update-initramfs": "",
    },
    "refind": {
        **LEFT_OF_GRUB,
        **started(r"\EFI\refind\refind_x64.efi"),
        "/proc/sys/kernel/bootloader_type": "33\n",
        "/boot/refind_linux.conf": '"Boot" "root=UUID=1234 ro quiet"\n',
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    "efistub": {
        **LEFT_OF_GRUB,
        **said(LoaderInfo=f"Linux EFI stub {KERNEL}"),
        **started(r"\EFI\arch\image.efi", r"initrd=\initramfs-linux.img root=UUID=1234 ro quiet"),
        "/proc/cmdline": "initrd=\\initramfs-linux.img root=UUID=1234 ro quiet\n",
        "/sys/devices/pci/nvme0n1/nvme0n1p1/partition": "1\n",
        "/usr/bin/efibootmgr": "",
        "/proc/sys/kernel/bootloader_type": "33\n",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    "nixos": {**SYSTEMD_BOOT, "/etc/NIXOS": "", "/boot/loader/loader.conf": ""},
    "container": {"/run/.containerenv": ""},
    "unknown": {},
}
PARTITION_LINKS = {
    "/sys/class/block/nvme0n1p1": "../../devices/pci/nvme0n1/nvme0n1p1",
    f"/dev/disk/by-partuuid/{PARTITION}": "../../nvme0n1p1",
}
LINKS = dict.fromkeys(("efistub", "limine", "limine-uki"), PARTITION_LINKS)


def build(base: Path, tree: str) -> Path:
    """A fresh machine of one style in the directory ``base``."""
    for path, text in {**MACHINE, **TREES[tree]}.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for path, target in LINKS.get(tree, {}).items():
        link = base / path.lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    (base / "run").mkdir(exist_ok=True)
    (base / "var/lib").mkdir(parents=True, exist_ok=True)
    return base


def read(base: Path, path: str) -> str:
    """A text file of the machine."""
    return (base / path.lstrip("/")).read_text()


Facts = dict[str, tuple[bytes, int, int, int]]


def facts(base: Path) -> Facts:
    """Everything below /etc and /boot with content, mode and owner; directories, too."""
    found: Facts = {}
    for top in ("etc", "boot"):
        for path in sorted((base / top).rglob("*")):
            status = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b"(no file)"
            where = str(path.relative_to(base))
            found[where] = (data, status.st_mode, status.st_uid, status.st_gid)
    return found


class Tools:
    """Runs what a machine's tools do as far as a test can see it."""

    def __init__(self, base: Path, fail: Callable[[Sequence[str]], bool] | None = None) -> None:
        self.base = base
        self.ran: list[str] = []
        self._fail = fail or (lambda _: False)

    def __call__(self, argv: Sequence[str]) -> Ran:
        self.ran.append(" ".join(argv))
        if self._fail(argv):
            return Ran(1, "no space left on device")
        stand_in = self._STAND_INS.get(argv[0].rpartition("/")[2])
        code = stand_in(self, argv) if stand_in else None
        return Ran(code or 0, "")

    def _grub2_editenv(self, argv: Sequence[str]) -> None:
        """``- set NAME=VALUE..`` and ``- unset NAME..``; the block keeps its size."""
        file = self.base / "boot/grub2/grubenv"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        names = [word.partition("=")[0] for word in argv[3:]]
        if argv[2] == "set":
            kept = {line.partition("=")[0]: line for line in lines}
            lines = [*(kept | dict(zip(names, argv[3:], strict=True))).values()]
        else:
            lines = [line for line in lines if line.partition("=")[0] not in names]
        file.write_bytes(grubenv(*lines))

    def _efibootmgr(self, argv: Sequence[str]) -> int:
        """Makes and deletes boot options, and keeps BootOrder and BootNext."""
        given = dict(pairwise(argv))
        number = given["--bootnum"]
        option = self._variable(f"Boot{number}")
        order = self._variable("BootOrder")
        first = bytes.fromhex(number)[::-1]
        rest = order.read_bytes()[4:] if order.exists() else b""
        pairs = [rest[at : at + 2] for at in range(0, len(rest), 2)]
        if "--delete-bootnum" in argv:
            if not option.exists():
                return 15  # Could not delete variable
            option.unlink()
            pairs = [pair for pair in pairs if pair != first]
        else:
            assert not option.exists(), "Cannot create: already exists."
            line, label = given["--unicode"], given["--label"]
            option.write_bytes(b"\7\0\0\0" + load_option(given["--loader"], line, label))
            pairs = [first, *pairs] if "--create" in argv else pairs
        if pairs or order.exists():
            order.write_bytes(b"\7\0\0\0" + b"".join(pairs))
        if "--bootnext" in argv:
            following = bytes.fromhex(given["--bootnext"])[::-1]
            self._variable("BootNext").write_bytes(b"\7\0\0\0" + following)
        return 0

    def _variable(self, name: str) -> Path:
        return self.base / EFIVARS.lstrip("/") / f"{name}-{GLOBAL_GUID}"

    _STAND_INS: ClassVar[dict[str, Callable[[Tools, Sequence[str]], int | None]]] = {
        "grub2-editenv": _grub2_editenv,
        "efibootmgr": _efibootmgr,
        "bootctl": lambda self, argv: boot_makers.bootctl(self.base, argv),
        "proxmox-boot-tool": lambda self, _: boot_makers.proxmox_boot_tool(self.base),
        "mkinitcpio": lambda self, argv: boot_makers.build_image(self.base, argv, KERNEL),
        "kernel-install": lambda self, argv: boot_makers.build_image(self.base, argv, KERNEL),
    }
