# SPDX-License-Identifier: Apache-2.0
"""EFI variables: who started this machine, and what the firmware was told to start.

efivarfs (Documentation/filesystems/efivarfs.rst) gives each variable as a file, with four bytes of
attributes before the value.  Boot loaders and the stub of a unified kernel image say in variables
of systemd's vendor GUID who they are (https://systemd.io/BOOT_LOADER_INTERFACE); those are
volatile, so what is there is of this start.  Who says so in LoaderInfo, by their sources:

- systemd-boot: ``systemd-boot 257.13`` (src/boot/boot.c)
- GRUB since 2.12: ``GRUB 2.12``, where grub-mkconfig loads its module bli
  (grub-core/commands/bli.c, util/grub.d/25_bli.in)
- Limine: ``Limine 9.3.1`` (common/lib/bli.c)
- the kernel itself, since drivers/firmware/efi/libstub/bli.c: ``Linux EFI stub 7.1.3`` where
  nobody else had: a loader that does not say its name, or none

rEFInd says nothing: with ``write_systemd_vars`` it sets LoaderDevicePartUUID and no more.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

from infertune.base.root import Root
from infertune.host.load_option import LoadOption, load_option, wide_text
from infertune.host.unknown import Unknown

_VARIABLES = "/sys/firmware/efi/efivars"
_LOADER = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""systemd's vendor GUID."""
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""EFI_GLOBAL_VARIABLE."""
_ATTRIBUTES = 4
MAX_VARIABLE = 16 * 1024
"""Bound of one variable; a boot option with a long command line has about 5 KiB."""
_MAX_TEXT = 1024

_HONOURS_ONE_SHOT = 1 << 3
"""EFI_LOADER_FEATURE_ENTRY_ONESHOT (systemd, src/fundamental/efivars-fundamental.h)."""
_KERNEL = "Linux EFI stub "


def _variable(root: Root, name: str, vendor: str) -> bytes | None:
    """The value of a variable; None where it is not there or cannot be read."""
    path = f"{_VARIABLES}/{name}-{vendor}"
    try:
        data = _once(root, path) if root.live else root.read_value(path, MAX_VARIABLE)
    except OSError:
        return None
    return data[_ATTRIBUTES:] if len(data) > _ATTRIBUTES else None


@lru_cache(maxsize=32)
def _once(root: Root, path: str) -> bytes:
    """A file of efivarfs, asked for once in a program's life.

    Each read calls into the firmware, and the exporter would do so at every scrape; what is read
    here tells of this start, which is not another one later.  Raises OSError, each time anew.
    """
    return root.read_value(path, MAX_VARIABLE)


def _text(root: Root, name: str) -> str | None:
    data = _variable(root, name, _LOADER)
    return (wide_text(data)[:_MAX_TEXT].strip() or None) if data else None


def loader_info(root: Root) -> str | None:
    """Name and version of the boot loader, in its own words; None where none said its name."""
    info = _text(root, "LoaderInfo")
    return None if info is None or info.startswith(_KERNEL) else info


def stub_info(root: Root) -> str | None:
    """The stub of the unified kernel image that was started; None where none was."""
    return _text(root, "StubInfo")


def stub_image(root: Root) -> str | None:
    r"""The unified kernel image (``\EFI\Linux\arch.efi``); stubs older than systemd 257 hide it."""
    return _text(root, "StubImageIdentifier")


def entry_selected(root: Root) -> str | None:
    """Id of the boot entry that was started: ``arch.conf``, or without the suffix."""
    return _text(root, "LoaderEntrySelected")


def entry_default(root: Root) -> str | None:
    """Id of the entry that ``bootctl set-default`` has named; None for none."""
    return _text(root, "LoaderEntryDefault")


def loader_features(root: Root) -> int | Unknown:
    """What the boot loader can do, as bits (EFI_LOADER_FEATURE_*)."""
    data = _variable(root, "LoaderFeatures", _LOADER)
    if data is None or len(data) != 8:
        return Unknown("the boot loader does not say what it can do")
    return int.from_bytes(data, "little")


def honours_one_shot(root: Root) -> bool | Unknown:
    """Whether the loader starts what LoaderEntryOneShot names, once."""
    features = loader_features(root)
    return features if isinstance(features, Unknown) else bool(features & _HONOURS_ONE_SHOT)


def loader_partition(root: Root) -> str | None:
    """GPT id of the partition the loader was started from, in lower case."""
    text = _text(root, "LoaderDevicePartUUID")
    if not text:
        return None
    import uuid  # it asks the system for half a dozen things when it is imported

    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


def secure_boot(root: Root) -> bool | Unknown:
    """Whether the firmware starts only what is signed."""
    data = _variable(root, "SecureBoot", _GLOBAL)
    if data is None or len(data) != 1 or data[0] > 1:
        return Unknown("the firmware does not say whether Secure Boot is on")
    return data[0] == 1


def boot_current(root: Root) -> LoadOption | None:
    """What the firmware started; None where it does not say."""
    data = _variable(root, "BootCurrent", _GLOBAL)
    if data is None or len(data) != 2:
        return None
    number = int.from_bytes(data, "little")
    return load_option(_variable(root, f"Boot{number:04X}", _GLOBAL) or b"")


def option_file(number: str) -> str:
    """Where a boot option of the firmware is seen."""
    return f"{_VARIABLES}/Boot{number}-{_GLOBAL}"


def boot_numbers(root: Root) -> frozenset[str]:
    """Numbers of the firmware's boot options, four hexadecimal digits each."""
    names = " ".join(root.names(_VARIABLES))
    return frozenset(map(str.upper, re.findall(rf"\bBoot([0-9A-Fa-f]{{4}})-{_GLOBAL}", names)))


def partition_place(root: Root, partition: str) -> tuple[str, int] | None:
    """Disk and number of a partition, by its GPT id; None where that is not known.

    Documentation/ABI/testing/sysfs-class-block.
    """
    name = os.path.basename(root.readlink(f"/dev/disk/by-partuuid/{partition}") or "")
    device = root.readlink(f"/sys/class/block/{name}") if name else None
    number = root.get_int(f"/sys/class/block/{name}/partition") if name else None
    if device is None or number is None:
        return None
    return f"/dev/{os.path.basename(os.path.dirname(device))}", number
