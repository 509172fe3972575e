# SPDX-License-Identifier: Apache-2.0
"""What tools of distributions make of a machine's files, as their sources have it.

Each takes the directory that stands for the machine; versions are those named in boot/stacks.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

ONE_SHOT = (
    "sys/firmware/efi/efivars/LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f",
    "sys/firmware/efi/efivars/LoaderEntryDefault-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f",
)
PE_AT = 0x80


def image(line: str, kernel: str, filler: str = "") -> bytes:
    """A unified kernel image, as far as anybody looks into it."""
    sections = {
        ".linux": b"kernel" + filler.encode(),
        ".cmdline": line.encode() + b"\0",
        ".uname": kernel.encode(),
    }
    table, data = b"", b""
    for name, content in sections.items():
        at = PE_AT + 24 + 40 * len(sections) + len(data)
        stored = content.ljust(-(-len(content) // 512) * 512, b"\0")
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0, len(stored), at)
        data += stored
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", PE_AT)
    coff = struct.pack("<4sHH12xHH", b"PE\0\0", 0x8664, len(sections), 0, 0)
    return head.ljust(PE_AT, b"\0") + coff + table + data


def line_in(path: Path) -> str:
    found = re.search(rb"(root=[^\0]*)\0", path.read_bytes())
    assert found, path
    return found[1].decode()


def kernel(release: str) -> bytes:
    """A bzImage, as far as anybody looks into it."""
    head = b"\0" * 0x20E + struct.pack("<H", 0x400)
    return head.ljust(0x600, b"\0") + f"{release} (builder@host) #1 SMP\0".encode()


def cmdline(base: Path) -> str:
    """What kernel-install, sdbootutil and ukify take, in this order."""
    for path in ("etc/kernel/cmdline", "usr/lib/kernel/cmdline"):
        if (base / path).exists():
            return " ".join((base / path).read_text().split())
    words = (base / "proc/cmdline").read_text().split()
    return " ".join(word for word in words if not word.startswith(("BOOT_IMAGE=", "initrd=")))


def bootctl(base: Path, argv: Sequence[str]) -> None:
    """set-oneshot and set-default: an empty id removes the variable."""
    path = base / ONE_SHOT[argv[1] == "set-default"]
    if argv[2]:
        path.write_bytes(b"\7\0\0\0" + f"{argv[2]}\0".encode("utf-16-le"))
    else:
        path.unlink(missing_ok=True)


def variable(base: Path, *, default: bool = False) -> str | None:
    path = base / ONE_SHOT[default]
    return path.read_bytes()[4:].decode("utf-16-le").rstrip("\0") if path.exists() else None


def kernel_install(base: Path, token: str, release: str, directory: str) -> None:
    """90-loaderentry, which a kernel's package, and on Debian every new initramfs, runs."""
    line = cmdline(base)
    if "systemd.machine_id=" not in line:
        line += f" systemd.machine_id={token}"
    (base / directory / f"{token}-{release}.conf").write_text(
        f"# Boot Loader Specification type#1 entry\ntitle      Debian\nversion    {release}\n"
        f"machine-id {token}\nsort-key   debian\noptions    {line}\n"
        f"linux      /{token}/{release}/linux\n"
    )


def kernelstub(base: Path) -> None:
    """What zz-kernelstub runs after every new initramfs."""
    config = base / "etc/kernelstub/configuration"
    found = json.loads(config.read_text())
    line = f"root=UUID=1234 ro {' '.join(found['user']['kernel_options'])}"
    for which, ending in (("current", ""), ("oldkern", "-previous")):
        entry = base / f"boot/efi/loader/entries/Pop_OS-{which}.conf"
        kernel = f"vmlinuz{ending}.efi"
        entry.write_text(
            f"title Pop!_OS\nlinux /EFI/Pop_OS-1234/{kernel}\n"
            f"initrd /EFI/Pop_OS-1234/initrd.img{ending}\noptions {line}\n"
        )
    with config.open("w") as file:
        json.dump(found, file, indent=2)


def sdboot_manage(base: Path) -> None:
    """``sdboot-manage gen``: every entry goes, and those of installed kernels come."""
    script = '. ./etc/sdboot-manage.conf; printf %s "$LINUX_OPTIONS"'
    options = subprocess.run(
        ["/bin/sh", "-c", script], cwd=base, capture_output=True, check=True
    ).stdout.decode()
    entries = base / "boot/loader/entries"
    for entry in entries.glob("*.conf"):
        entry.unlink()
    for ending, given in (("", options), ("-fallback", "")):
        (entries / f"linux-cachyos{ending}.conf").write_text(
            "title\tLinux Cachyos\nlinux\t/vmlinuz-linux-cachyos\n"
            f"initrd\t/initramfs-linux-cachyos{ending}.img\n"
            f"options\troot=UUID=1234 rw rootflags=subvol=/@ {given}\n"
        )


def proxmox_boot_tool(base: Path) -> None:
    """``refresh``: entries on partitions that are mounted only for that."""
    first = (base / "etc/kernel/cmdline").read_text().split("\n")[0]
    assert "root=" in first
    esp = base / "var/tmp/espmounts/8B4A-3C1D/loader/entries"
    esp.mkdir(parents=True, exist_ok=True)
    (esp / "proxmox-7.0.14-8-pve.conf").write_text(f"title Proxmox\noptions  {first}\n")


def build_image(base: Path, argv: Sequence[str], release: str) -> None:
    """mkinitcpio -U PATH, and kernel-install add where it builds these."""
    parts = sorted((base / "etc/cmdline.d").glob("*.conf"))
    line = " ".join(part.read_text().strip() for part in parts) or cmdline(base)
    if "-U" in argv:
        path = argv[argv.index("-U") + 1]
    else:
        [there] = base.glob(f"boot/**/EFI/Linux/*-{release}.efi")
        path = f"/{there.relative_to(base)}"
    (base / path.lstrip("/")).write_bytes(image(line, release))
