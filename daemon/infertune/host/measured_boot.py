# SPDX-License-Identifier: Apache-2.0
"""Whether a disk is unlocked by what was measured at boot (TPM2).

The command line and the initramfs are measured into PCRs 8, 9, 11 or 12, by whichever loader
(https://uapi-group.org/specifications/specs/linux_tpm_pcr_registry).  A key that is bound to them
is not given out after they changed: the next start asks for a passphrase, and a machine that
nobody sits at stays there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from infertune.base.root import Root
from infertune.base.units import KIB, printable_line
from infertune.host.boot_entries import PLACES
from infertune.host.ini import FILES_LIMIT
from infertune.host.system import command_line, parameters

_MAX_FILE = 256 * KIB
_MAX_SHOWN = 60

_CRYPTTABS = ("/etc/crypttab", "/etc/crypttab.initramfs")
"""crypttab(5); the other is what mkinitcpio's sd-encrypt puts into the image."""
_BY_TPM = re.compile(r"(?:^|,)(tpm2-device=[^,]*|keyscript=[^,]*tpm[^,]*)")
"""Options of crypttab(5); tpm2-initramfs-tool and its like are key scripts of Debian's."""

_HOOKS = (
    ("/etc/mkinitcpio.conf", r"^\s*HOOKS\+?=.*\b(?:sd-)?clevis\b"),
    ("/etc/mkinitcpio.conf.d/*.conf", r"^\s*HOOKS\+?=.*\b(?:sd-)?clevis\b"),
    ("/etc/dracut.conf", r"^\s*(?:add_|force_add_)?dracutmodules\+?=.*\b(?:clevis|tpm2-tss)\b"),
    ("/etc/dracut.conf.d/*.conf", r"^\s*(?:\w+_)?dracutmodules\+?=.*\b(?:clevis|tpm2-tss)\b"),
)
"""Where a person puts it into the initramfs (mkinitcpio.conf(5), dracut.conf(5))."""

_CLEVIS = (
    # Packages clevis-initramfs of Debian and Ubuntu, clevis-dracut of Debian and Fedora.
    ("/usr/share/initramfs-tools/hooks/clevis", "/usr/sbin/update-initramfs"),
    ("/usr/lib/dracut/modules.d/*clevis-pin-tpm2/module-setup.sh", "/usr/bin/dracut"),
)
"""What unlocks in an initramfs, and the tool that takes it there.  A package alone says little:
Arch's has dracut's module whether there is a dracut or not."""

_POLICIES = (
    # systemd-pcrlock(8), systemd-cryptenroll(1): where both are looked for.
    ("/var/lib/systemd/pcrlock.json", "a policy of systemd-pcrlock"),
    ("/run/systemd/pcrlock.json", "a policy of systemd-pcrlock"),
    ("/etc/systemd/tpm2-pcr-public-key.pem", "a key that signs what is measured"),
    # sdbootutil, module-setup.sh: what its initramfs takes from there to /run/systemd.
    *((f"{place}/EFI/*/pcrlock.json", "a policy of systemd-pcrlock") for place in PLACES),
    *((f"{place}/EFI/*/tpm2-pcr-signature.json", "signed measurements") for place in PLACES),
    # fde-tools and pcr-oracle of openSUSE: GRUB's key.
    *((f"{place}/EFI/*/sealed.tpm", "a key sealed by the TPM") for place in PLACES),
    # snapd, boot/seal.go: Ubuntu with encryption backed by the TPM.
    ("/run/mnt/ubuntu-boot/device/fde/*.sealed-key", "a key sealed by the TPM"),
)


def measured(root: Root) -> tuple[str, ...]:
    """What says that a disk is unlocked by the TPM, one phrase each; empty where nothing does.

    Empty is no proof: what is bound stands in the header of a LUKS2 disk, which is not read, and
    systemd-cryptsetup finds it there without being told.  Clevis may also ask a server (Tang),
    which measures nothing; its files do not say which.
    """
    return tuple(dict.fromkeys((*_told(root), *_clevis(root), *_policies(root))))


def _told(root: Root) -> Iterator[str]:
    """Who was told to: crypttab, and the command line (systemd-cryptsetup-generator(8))."""
    for path in _CRYPTTABS:
        for number, row in _crypttab(root, path):
            found = _BY_TPM.search(row[3]) if len(row) > 3 else None
            if found:
                yield f"{path}:{number} has {printable_line(found[1], _MAX_SHOWN)}"
    for name, value in parameters(command_line(root) or ""):
        # rd.luks.options=UUID=tpm2-device=auto, or without the UUID.
        found = re.search(r"(?:^|[,=])(tpm2-device=[^,]*)", value)
        if name in ("rd.luks.options", "luks.options") and found:
            yield f"the command line has {name}=..{printable_line(found[1], _MAX_SHOWN)}"


def _clevis(root: Root) -> Iterator[str]:
    for pattern, wanted in _HOOKS:
        for path in root.glob(pattern)[:FILES_LIMIT]:
            for number, line in enumerate(_lines(root, path), 1):
                if re.search(wanted, line):
                    yield f"{path}:{number} has {printable_line(line.strip(), _MAX_SHOWN)}"
    if not _encrypted(root):
        return
    for pattern, tool in _CLEVIS:
        for path in root.glob(pattern)[:1]:
            if root.exists(tool):
                yield f"{path}, which unlocks disks in the initramfs"


def _policies(root: Root) -> Iterator[str]:
    for pattern, what in _POLICIES:
        for path in root.glob(pattern)[:1]:
            yield f"{path}: {what}"


def _encrypted(root: Root) -> bool:
    """Whether anything is told to be an encrypted disk."""
    named = ("rd.luks.uuid", "rd.luks.name", "luks.uuid", "luks.name", "cryptdevice")
    words = parameters(command_line(root) or "")
    return any(name in named for name, _ in words) or any(
        row for path in _CRYPTTABS for row in _crypttab(root, path)
    )


def _crypttab(root: Root, path: str) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line: name, device, key, options (crypttab(5))."""
    for number, line in enumerate(_lines(root, path), 1):
        row = line.split()
        if len(row) > 1 and not row[0].startswith("#"):
            yield number, row


def _lines(root: Root, path: str) -> list[str]:
    try:
        return root.read_small(path, _MAX_FILE).splitlines()
    except OSError:
        return []
