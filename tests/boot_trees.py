# SPDX-License-Identifier: Apache-2.0
"""Machines with one boot loader each, as trees, and a stand-in for the tools that rebuild."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path

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

MOUNTS = "/dev/nvme0n1p2 / ext4 rw 0 0\n/dev/nvme0n1p1 /boot/efi vfat rw 0 0\n"
DEBIAN = {
    "/etc/default/grub": 'GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
    "/boot/grub/grub.cfg": "# GRUB\n",
    "/proc/self/mounts": MOUNTS,
    "/usr/sbin/grub-mkconfig": 'for x in ${sysconfdir}/default/grub.d/*.cfg; do . "$x"; done\n',
    "/usr/sbin/update-grub": "",
    "/usr/bin/grub-editenv": "",
    "/usr/sbin/update-initramfs": "",
    "/etc/grub.d/00_header": "",
}

TREES: dict[str, dict[str, str]] = {
    "debian-grub": DEBIAN,
    "debian-grub-btrfs": {**DEBIAN, "/proc/self/mounts": "/dev/nvme0n1p2 / btrfs rw 0 0\n"},
    "grub-without-drop-ins": {
        "/etc/default/grub": 'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"',
        "/boot/grub2/grub.cfg": "# GRUB\n",
        "/usr/sbin/grub2-mkconfig": "# upstream\n",
        "/usr/bin/dracut": "",
    },
    "fedora-bls": {
        "/etc/default/grub": 'GRUB_CMDLINE_LINUX="rhgb quiet"\n',
        "/etc/kernel/cmdline": "root=UUID=1234 ro rhgb quiet\n",
        "/usr/sbin/grubby": "",
        "/usr/bin/dracut": "",
        "/boot/loader/entries/abc-7.1.3.conf": "title Fedora\noptions root=UUID=1234 ro quiet\n",
        "/boot/loader/entries/abc-7.0.9.conf": "title Fedora\noptions root=UUID=1234 ro quiet\n",
    },
    "arch-systemd-boot": {
        "/boot/loader/loader.conf": "timeout 3\n",
        "/boot/loader/entries/arch.conf": "title Arch\nlinux /vmlinuz\noptions root=UUID=1 rw  \n",
        "/boot/loader/entries/arch-fallback.conf": "title Arch\noptions root=UUID=1 rw\n",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    "debian-systemd-boot": {
        "/boot/efi/loader/loader.conf": "timeout 3\n",
        "/etc/kernel/cmdline": "root=UUID=1 ro\n",
        "/usr/bin/kernel-install": "",
        "/usr/sbin/update-initramfs": "",
    },
    "arch-uki": {
        "/sys/firmware/efi/efivars/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f": "",
        "/etc/cmdline.d/root.conf": "root=UUID=1 rw\n",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    "uki-kernel-install": {
        "/sys/firmware/efi/efivars/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f": "",
        "/etc/kernel/cmdline": "root=UUID=1 ro",
        "/usr/bin/kernel-install": "",
        "/usr/bin/dracut": "",
    },
    "rpm-ostree": {"/run/ostree-booted": "", "/usr/bin/rpm-ostree": ""},
    "bootc": {"/run/ostree-booted": "", "/usr/bin/bootc": ""},
    "limine": {
        "/etc/default/limine": "ESP_PATH=/boot\n",
        "/etc/limine-entry-tool.d/base.conf": 'KERNEL_CMDLINE[default]="root=UUID=1 rw"\n',
        "/usr/bin/limine-mkinitcpio": "",
        "/usr/bin/mkinitcpio": "",
        "/etc/mkinitcpio.d/linux.preset": "",
    },
    "nixos": {"/etc/NIXOS": "", "/boot/loader/loader.conf": ""},
    "container": {"/run/.containerenv": ""},
    "unknown": {},
}


def build(base: Path, tree: str) -> Path:
    """A fresh machine of one style in the directory ``base``."""
    for path, text in {**MACHINE, **TREES[tree]}.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (base / "run").mkdir(exist_ok=True)
    (base / "var/lib").mkdir(parents=True, exist_ok=True)
    return base


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
        if argv[0].endswith("/grubby"):
            self._grubby(argv)
        return Ran(0, "")

    def _grubby(self, argv: Sequence[str]) -> None:
        """As grubby-bls: entries, /etc/kernel/cmdline and /etc/default/grub."""
        files = [*(self.base / "boot/loader/entries").glob("*.conf")]
        files += [self.base / "etc/kernel/cmdline", self.base / "etc/default/grub"]
        what, _, words = argv[2].partition("=")
        for file in files:
            text = file.read_text()
            ending = '"\n' if file.name == "grub" else "\n"
            if what == "--args":
                text = f"{text.removesuffix(ending)} {words}{ending}"
            else:
                # The real one leaves a double space here and there, too.
                text = text.replace(words, "")
            file.write_text(text)
