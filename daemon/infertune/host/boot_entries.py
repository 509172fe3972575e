# SPDX-License-Identifier: Apache-2.0
"""Boot entries of the Boot Loader Specification, type 1: which there are, and which are ours.

https://uapi-group.org/specifications/specs/boot_loader_specification: one file for each entry in
loader/entries/ of the EFI system partition and of the extended boot loader partition.  Several
systems may share these, and memory testers and rescue systems are among them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import KIB
from infertune.host import efi
from infertune.host.mounts import mounts
from infertune.host.system import command_line, machine_id, parameters

PLACES = ("/boot", "/efi", "/boot/efi")
"""Where the two partitions are mounted (systemd-gpt-auto-generator(8), bootctl(1))."""
MAX_ENTRIES = 200
MAX_ENTRY = 64 * KIB
"""Bytes of one entry; one of kernel-install has less than 1 KiB."""

_COUNTER = re.compile(r"\+\d+(?:-\d+)?(?=\.conf$)", re.ASCII)
"""Of boot counting: tries left and tries done (automatic boot assessment)."""
_NOT_A_SYSTEM = re.compile(r"memtest|fallback|rescue|^recovery-", re.IGNORECASE)
"""Names of what is there for when the system does not start: Pop!_OS' Recovery-*, Fedora's
0-rescue, mkinitcpio's fallback."""


@dataclass(frozen=True, slots=True)
class BootEntry:
    """One entry of a boot menu."""

    path: str
    id: str
    """The file's name without boot counting: ``arch.conf`` of ``arch+2-1.conf``."""
    title: str | None
    options: str
    """All lines ``options``, joined; empty for none."""
    linux: str | None
    """The kernel, from the root of the entry's partition."""
    efi: str | None
    """The EFI program, where it is not a kernel with an initrd."""
    initrd: tuple[str, ...]
    machine_id: str | None
    sort_key: str | None
    version: str | None
    of_this_system: bool
    """Whether it starts what runs now, and not something beside it or a way out."""


def boot_entries(root: Root) -> tuple[BootEntry, ...]:
    """Every entry, those on the loader's own partition first."""
    ours = _Ours.read(root)
    return tuple(_entries(root, ours))[:MAX_ENTRIES]


def selected_entry(root: Root, entries: Sequence[BootEntry]) -> BootEntry | None:
    """The one that was started, where the loader says so and it is among them."""
    selected = (efi.entry_selected(root) or "").lower().removesuffix(".conf")
    named = (each for each in entries if each.id.lower().removesuffix(".conf") == selected)
    return next(named, None)


def boot_partitions(root: Root) -> tuple[str, ...]:
    """Where boot partitions are mounted, that which the loader was started from first."""
    used = loader_place(root)
    return tuple(dict.fromkeys((*((used,) if used else ()), *PLACES)))


def loader_place(root: Root) -> str | None:
    """Where the partition is mounted that the loader was started from.

    As the loader names it; where it does not, the first of bootctl(1)'s places that is FAT.  None
    where that is not known.
    """
    partition = efi.loader_partition(root)
    device = _linked(root, f"/dev/disk/by-partuuid/{partition}") if partition else None
    seen = [each for each in mounts(root) if each.path in PLACES]
    if device:
        return next((each.path for each in seen if each.device == device), None)
    fat = {each.path for each in seen if each.kind == "vfat"}
    return next((place for place in ("/efi", "/boot", "/boot/efi") if place in fat), None)


def grub_environment(root: Root) -> Mapping[str, str] | None:
    """Variables of GRUB's environment block (grub-editenv(1)); None where there is none."""
    for path in ("/boot/grub/grubenv", "/boot/grub2/grubenv"):
        try:
            text = root.read_small(path, MAX_ENTRY)
        except OSError:
            continue
        rows = [line.split("=", 1) for line in text.splitlines() if not line.startswith("#")]
        return {row[0]: row[1] for row in rows if len(row) == 2}
    return None


def _entries(root: Root, ours: _Ours) -> Iterator[BootEntry]:
    seen = set()
    for place in boot_partitions(root):
        for path in root.glob(f"{place}/loader/entries/*.conf")[:MAX_ENTRIES]:
            try:
                text = root.read_small(path, MAX_ENTRY)
                # One partition may be mounted twice, or linked.
                where = root.real(path)
            except (OSError, ValueError, RuntimeError):
                continue
            if where not in seen:
                seen.add(where)
                yield _entry(root, ours, path, text)


def _entry(root: Root, ours: _Ours, path: str, text: str) -> BootEntry:
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        if value.strip() and not key.startswith("#"):
            fields.setdefault(key.lower(), []).append(value.strip())

    def field(key: str) -> str | None:
        return fields[key][0] if key in fields else None

    name = _COUNTER.sub("", os.path.basename(path))
    options = " ".join(fields.get("options", ()))
    owner = field("machine-id")
    return BootEntry(
        path=path,
        id=name,
        title=field("title"),
        options=options,
        linux=field("linux"),
        efi=field("efi"),
        initrd=tuple(fields.get("initrd", ())),
        machine_id=owner,
        sort_key=field("sort-key"),
        version=field("version"),
        of_this_system=ours.has(root, name, field("title"), owner, options),
    )


@dataclass(frozen=True, slots=True)
class _Ours:
    """What tells this system's entries from others."""

    id: str | None
    roots: tuple[str, ...]
    """Values of root= that mean this system's: of the command line, its file, and fstab(5)."""
    volume: str | None
    """Subvolume of the root file system, where the command line names one."""
    vaults: frozenset[str]
    """Encrypted disks that the command line names."""

    @classmethod
    def read(cls, root: Root) -> _Ours:
        line = command_line(root) or ""
        kept = root.get("/etc/kernel/cmdline") or ""
        found = [
            value for text in (line, kept) for name, value in parameters(text) if name == "root"
        ]
        rows = (row.split() for row in (root.get("/etc/fstab") or "").splitlines())
        found += [row[0] for row in rows if len(row) > 1 and row[1] == "/" and row[0][0] != "#"]
        roots = tuple(each for each in dict.fromkeys(found) if each != "redacted")
        return cls(machine_id(root), roots, _subvolume(line), _vaults(line))

    def has(
        self, root: Root, name: str, title: str | None, owner: str | None, options: str
    ) -> bool:
        if _NOT_A_SYSTEM.search(name) or _NOT_A_SYSTEM.search(title or ""):
            return False
        if owner and self.id:
            return owner.lower() == self.id
        if self.id and name.lower().startswith(self.id):
            return True
        wanted = next((value for key, value in parameters(options) if key == "root"), None)
        if wanted is None or not any(_same(root, wanted, each) for each in self.roots):
            return False
        # Of two systems on one btrfs, and of a system and its snapshots, the volume differs; what
        # lies on an encrypted disk has one name whichever the disk is (/dev/mapper/root).
        volume, vaults = _subvolume(options), _vaults(options)
        if volume and self.volume and volume != self.volume:
            return False
        return not (vaults and self.vaults and vaults.isdisjoint(self.vaults))


def _same(root: Root, one: str, other: str) -> bool:
    """Whether two values of root= mean one file system."""
    if one.lower() == other.lower():
        return True
    device = _device(root, one)
    return device is not None and device == _device(root, other)


_BY = {
    "UUID": "by-uuid",
    "PARTUUID": "by-partuuid",
    "LABEL": "by-label",
    "PARTLABEL": "by-partlabel",
}


def _device(root: Root, spec: str) -> str | None:
    """The device a value of root= leads to, as udev links it; None where that is not known."""
    kind, _, value = spec.partition("=")
    if kind in _BY:
        return _linked(root, f"/dev/disk/{_BY[kind]}/{value}")
    return (_linked(root, spec) or spec) if re.match(r"/dev/(?!.*\.\.)", spec) else None


def _linked(root: Root, link: str) -> str | None:
    """Where a link of udev leads: all of them go to a name in /dev itself."""
    try:
        target = root.readlink(link)
    except ValueError:
        return None  # no path: somebody's text
    return f"/dev/{os.path.basename(target)}" if target else None


def _vaults(line: str) -> frozenset[str]:
    """Encrypted disks, as systemd-cryptsetup-generator(8) and mkinitcpio's encrypt are told."""
    values = [
        value.removeprefix("luks-").lower()
        for name, value in parameters(line)
        if name in ("rd.luks.uuid", "luks.uuid", "rd.luks.name", "luks.name", "cryptdevice")
    ]
    return frozenset(re.split(r"[:=](?!.*[:=])", value)[0] for value in values)


def _subvolume(line: str) -> str | None:
    for name, value in parameters(line):
        if name == "rootflags":
            for word in value.split(","):
                if word.startswith("subvol="):
                    return word.removeprefix("subvol=").strip("/")
    return None
