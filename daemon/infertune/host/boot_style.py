# SPDX-License-Identifier: Apache-2.0
"""How a kernel parameter gets to the command line on this system."""

from __future__ import annotations

from dataclasses import dataclass

from infertune.root import Root


@dataclass(frozen=True, slots=True)
class BootStyle:
    """How a kernel parameter gets to the command line on one family of systems."""

    id: str
    how: str
    signs: tuple[tuple[str, ...], ...]
    """Every group needs one path that exists."""


BOOT_STYLES: tuple[BootStyle, ...] = (
    BootStyle(
        "none",
        "a container: the command line is the host's",
        (("/run/.containerenv", "/.dockerenv", "/run/systemd/container"),),
    ),
    BootStyle("nixos", "boot.kernelParams in configuration.nix", (("/etc/NIXOS",),)),
    # rpm-ostree images ship bootc too, and kargs of rpm-ostree are the easier ones to undo.
    BootStyle(
        "rpm-ostree", "rpm-ostree kargs", (("/run/ostree-booted",), ("/usr/bin/rpm-ostree",))
    ),
    BootStyle("bootc", "/usr/lib/bootc/kargs.d", (("/run/ostree-booted",), ("/usr/bin/bootc",))),
    BootStyle(
        "uki",
        "/etc/kernel/cmdline, built into the unified kernel image",
        # Set by systemd-stub (systemd.io, Boot Loader Interface); the GUID is systemd's vendor ID.
        (("/sys/firmware/efi/efivars/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f",),),
    ),
    BootStyle(
        "limine",
        "/etc/default/limine",
        (("/etc/default/limine", "/boot/limine.conf", "/boot/limine/limine.conf"),),
    ),
    BootStyle(
        "systemd-boot",
        "/etc/kernel/cmdline and kernel-install",
        (("/boot/loader/loader.conf", "/efi/loader/loader.conf", "/boot/efi/loader/loader.conf"),),
    ),
    BootStyle("bls", "grubby", (("/etc/default/grub",), ("/usr/sbin/grubby", "/usr/bin/grubby"))),
    BootStyle("grub", "/etc/default/grub.d and update-grub", (("/etc/default/grub",),)),
    # Fedora keeps this file beside GRUB as well, so it is the weakest sign.
    BootStyle(
        "systemd-boot", "/etc/kernel/cmdline and kernel-install", (("/etc/kernel/cmdline",),)
    ),
)
"""First match wins."""


def boot_style(root: Root) -> str | None:
    """Id of the first entry of BOOT_STYLES whose signs are all there; None where none is."""
    for style in BOOT_STYLES:
        if all(any(map(root.exists, group)) for group in style.signs):
            return style.id
    return None
