# SPDX-License-Identifier: Apache-2.0
"""How a kernel parameter gets to the command line of this system, and how that is known.

What lies about on a disk may be left over from another loader, or belong to another system.  So
the first question is who started this kernel: the loader's own word (:mod:`infertune.host.efi`),
what the kernel was told, what the firmware started.  Files decide between stacks of that loader
(who writes its entries); they decide between loaders only where nobody says who it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.host import efi
from infertune.host.boot_entries import PLACES, boot_entries
from infertune.host.ini import part_of, sections
from infertune.host.load_option import LoadOption, without_ids
from infertune.host.mounts import mounted
from infertune.host.system import command_line, loader_number, parameters

_GRUB, _KEXEC = 0x7, 0xD
"""Numbers of boot loaders (Documentation/arch/x86/boot.rst)."""
_MAX_EVIDENCE = 100


@dataclass(frozen=True, slots=True)
class BootLoader:
    """How a kernel parameter gets to the command line here."""

    id: str | None
    """Of STACKS; None where it is none of them."""
    how: str | None
    evidence: tuple[str, ...]
    """Short phrases: what was seen that says so, or who booted where no stack is of that one."""


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of this start."""

    root: Root
    words: tuple[tuple[str, str], ...]
    """The kernel's command line."""
    loader: str | None
    """Who started the kernel: a name of Stack.loaders, or one that no stack knows."""
    told: str | None
    """How that is known."""
    stub: str | None
    images: tuple[str, ...]
    """Files that the firmware and the stub say were started."""


FIRMWARE = "firmware"
"""Started the kernel, or the unified kernel image, itself."""
_FILES = (
    (r"refind", "refind"),
    (r"limine", "limine"),
    (r"\\grub[^\\]*\.efi$", "grub"),
)
"""What a loader's file is called, of loaders that do not say their name or learned it late."""
_KERNEL_FILE = re.compile(
    r"\\(vmlinu[xz]|bzimage|linux)[^\\]*$|\\EFI\\Linux\\[^\\]+$", re.IGNORECASE
)
"""A kernel with its EFI stub, or a unified kernel image where the specification has them."""


def _start(root: Root) -> Start:
    words = tuple(parameters(command_line(root) or ""))
    option, image = efi.boot_current(root), efi.stub_image(root)
    loader, told = _who(root, option, image, words)
    images = tuple(each for each in (image, option.file if option else None) if each)
    return Start(root, words, loader, told, efi.stub_info(root), images)


def _who(
    root: Root, option: LoadOption | None, image: str | None, words: tuple[tuple[str, str], ...]
) -> tuple[str | None, str | None]:
    """Who started the kernel, and how that is known; the strongest evidence first."""
    info = efi.loader_info(root) or ""
    # "GRUB 2.12": its first word; somebody's "GRUB2" is GRUB, too.
    name = next(iter(info.lower().split()), "").rstrip("0123456789")
    # Before another's LoaderInfo: that one may have started an older GRUB.
    if loader_number(root) == _GRUB and name != "grub":
        return "grub", "the kernel says that GRUB loaded it (/proc/sys/kernel/bootloader_type)"
    if name:
        return name, f"LoaderInfo says '{info}'"
    if option is not None and option.file:
        told = f"the firmware started {without_ids(option.file)}"
        for pattern, name in _FILES:
            if re.search(pattern, option.file, re.IGNORECASE):
                return name, told
        itself = image is not None and image.lower() == option.file.lower()
        given = parameters(option.arguments)
        handed_over = bool(given) and set(given) <= set(words)
        if itself or handed_over or _KERNEL_FILE.search(option.file):
            return FIRMWARE, f"{told} itself"
    # Last: a command line that somebody copied has it, too.
    if any(name == "BOOT_IMAGE" for name, _ in words):
        return "grub", "the command line has BOOT_IMAGE=, which GRUB puts there"
    return None, None


# -- signs ---------------------------------------------------------------------------

Sign = Callable[[Start], str | None]
"""What it sees, in words; empty where that goes without saying, None where it sees nothing."""


def _file(path: str) -> Sign:
    """Something at this path, which is all there is to say of it."""
    return lambda start: path if start.root.exists(path) else None


def _no_file(path: str) -> Sign:
    return lambda start: None if start.root.exists(path) else f"no {path}"


def _word(name: str, beginning: str = "") -> Sign:
    """A word on the command line; of its value no more than ``beginning`` is shown."""

    def look(start: Start) -> str | None:
        found = any(key == name and value.startswith(beginning) for key, value in start.words)
        more = ".." if beginning else ""
        return f"the command line has {name}={beginning}{more}" if found else None

    return look


def _setting(path: str, name: str, *values: str) -> Sign:
    """One of these values in a file of assignments."""

    def look(start: Start) -> str | None:
        value = sections(part_of(start.root, path)).get("", {}).get(name)
        return f"{path} has {name}={value}" if value in values else None

    return look


def _started(loader: str) -> Sign:
    return lambda start: start.told if start.loader == loader else None


def _image(pattern: str) -> Sign:
    """A file that was started, by its name."""

    def look(start: Start) -> str | None:
        found = (each for each in start.images if re.search(pattern, each, re.IGNORECASE))
        return next((f"{without_ids(each)} was started" for each in found), None)

    return look


def _stub(start: Start) -> str | None:
    return f"StubInfo says '{start.stub}'" if start.stub else None


def _no_stub(start: Start) -> str | None:
    return None if start.stub else ""


def _kexec(start: Start) -> str | None:
    started = loader_number(start.root) == _KEXEC
    return "kexec started the kernel (/proc/sys/kernel/bootloader_type)" if started else None


def _on_zfs(start: Start) -> str | None:
    mount = mounted(start.root, "/")
    return "/ is ZFS" if mount and mount.kind == "zfs" else None


def _own_entry(start: Start) -> str | None:
    ours = (each.path for each in boot_entries(start.root) if each.of_this_system)
    return next((f"{without_ids(path)} starts this system" for path in ours), None)


Group = tuple[Sign, ...]
"""Signs of which one must be seen."""

_LOADER_CONF: Group = tuple(_file(f"{place}/loader/loader.conf") for place in PLACES)


@dataclass(frozen=True, slots=True)
class Stack:
    """One way in which parameters get to the command line."""

    id: str
    how: str
    loaders: tuple[str, ...] = ()
    """Who may have started the kernel; empty for whoever it was."""
    signs: tuple[Group, ...] = ()
    """What must be seen besides: something of each group."""
    guess: tuple[Group, ...] | None = None
    """The same where nobody says who started the kernel; None: then it is not this one."""

    def seen(self, start: Start) -> tuple[str, ...] | None:
        """What says that it is this one; None where it is not."""
        groups = self.signs
        found: list[str | None] = []
        if self.loaders:
            if start.loader is None and self.guess is not None:
                groups += self.guess
            elif start.loader not in self.loaders:
                return None
            found.append(start.told)
        for group in groups:
            said = (sign(start) for sign in group)
            found.append(next((each for each in said if each is not None), None))
            if found[-1] is None:
                return None
        if self.loaders and start.loader is None:
            found.append("no boot loader reported its name: guessed from the files here")
        return tuple(dict.fromkeys(each for each in found if each))


STACKS: tuple[Stack, ...] = (
    Stack(
        "none",
        "a container: the command line is the host's",
        signs=(
            (
                _file("/run/.containerenv"),
                _file("/.dockerenv"),
                _file("/run/systemd/container"),
            ),
        ),
    ),
    Stack("nixos", "boot.kernelParams in configuration.nix", signs=((_file("/etc/NIXOS"),),)),
    # rpm-ostree images ship bootc too, and kargs of rpm-ostree are the easier ones to undo.
    Stack(
        "rpm-ostree",
        "rpm-ostree kargs",
        signs=((_file("/run/ostree-booted"),), (_file("/usr/bin/rpm-ostree"),)),
    ),
    Stack(
        "bootc",
        "/usr/lib/bootc/kargs.d",
        signs=((_file("/run/ostree-booted"),), (_file("/usr/bin/bootc"),)),
    ),
    # bootc without ostree: its initramfs mounts the image that composefs= names, and nobody
    # writes /run/ostree-booted (bootc, crates/lib/src/generator.rs).
    Stack(
        "composefs",
        "/usr/lib/bootc/kargs.d of the image",
        signs=((_word("composefs"),), (_no_file("/run/ostree-booted"),)),
    ),
    # With GRUB on its partitions (legacy BIOS, Secure Boot) update-grub is the way there, too
    # (pve-docs, system-booting.adoc).
    Stack(
        "proxmox-boot-tool",
        "/etc/kernel/cmdline and proxmox-boot-tool refresh",
        loaders=("systemd-boot",),
        signs=((_word("initrd", "\\EFI\\proxmox\\"), _file("/etc/kernel/proxmox-boot-uuids")),),
        guess=((_word("initrd", "\\EFI\\proxmox\\"),),),
    ),
    Stack(
        "kernelstub",
        "kernelstub --add-options",
        loaders=("systemd-boot",),
        signs=((_no_stub,), (_file("/usr/bin/kernelstub"),)),
        guess=(_LOADER_CONF,),
    ),
    Stack(
        "sdbootutil",
        "/etc/kernel/cmdline and sdbootutil update-all-entries",
        loaders=("systemd-boot", "grub"),
        signs=(
            (_no_stub,),
            (_file("/usr/bin/sdbootutil"),),
            # It is there beside openSUSE's other GRUB, too, which has no such entries.
            (
                _started("systemd-boot"),
                _setting("/etc/sysconfig/bootloader", "LOADER_TYPE", "grub2-bls", "systemd-boot"),
            ),
        ),
        guess=(),
    ),
    Stack(
        "sdboot-manage",
        "LINUX_OPTIONS in /etc/sdboot-manage.conf and sdboot-manage gen",
        loaders=("systemd-boot",),
        signs=(
            (_no_stub,),
            (_file("/usr/bin/sdboot-manage"),),
            (_file("/etc/sdboot-manage.conf"),),
        ),
        guess=(_LOADER_CONF,),
    ),
    # Before unified kernel images: Limine's tools build those it starts (ENABLE_UKI=yes).
    Stack(
        "limine",
        "/etc/default/limine",
        loaders=("limine",),
        guess=(
            (
                _file("/etc/default/limine"),
                _file("/boot/limine.conf"),
                _file("/boot/limine/limine.conf"),
            ),
        ),
    ),
    # It is a unified kernel image itself, which starts the real kernel with kexec: what the stub
    # says is of the former.
    Stack(
        "zfsbootmenu",
        "the property org.zfsbootmenu:commandline of the root dataset",
        signs=(
            (_on_zfs,),
            (_image(r"\\zbm|zfsbootmenu"), _kexec),
            (
                _image(r"\\zbm|zfsbootmenu"),
                _file("/etc/zfsbootmenu/config.yaml"),
                _file("/usr/bin/generate-zbm"),
                _stub,
            ),
        ),
    ),
    Stack(
        "refind",
        "/boot/refind_linux.conf",
        loaders=("refind",),
        signs=((_no_stub,),),
        guess=(
            (
                _file("/boot/refind_linux.conf"),
                *(_file(f"{place}/EFI/refind/refind.conf") for place in PLACES),
            ),
        ),
    ),
    Stack("uki", "/etc/kernel/cmdline, built into the unified kernel image", signs=((_stub,),)),
    Stack(
        "systemd-boot",
        "/etc/kernel/cmdline and kernel-install",
        loaders=("systemd-boot",),
        # On a partition that systems share, the file may be another system's.
        guess=(_LOADER_CONF, (_no_file("/etc/default/grub"), _own_entry)),
    ),
    Stack(
        "bls",
        "grubby",
        loaders=("grub",),
        signs=((_file("/usr/sbin/grubby"), _file("/usr/bin/grubby")),),
        guess=((_file("/etc/default/grub"),),),
    ),
    Stack(
        "grub",
        "/etc/default/grub.d and update-grub",
        loaders=("grub",),
        guess=((_file("/etc/default/grub"),),),
    ),
    # Fedora keeps this file beside GRUB as well, so it is the weakest sign.
    Stack(
        "systemd-boot",
        "/etc/kernel/cmdline and kernel-install",
        loaders=("systemd-boot",),
        guess=((_file("/etc/kernel/cmdline"),),),
    ),
    Stack(
        "efistub",
        "the firmware's boot option (efibootmgr)",
        loaders=(FIRMWARE,),
        signs=((_no_stub,),),
    ),
)
"""First match wins."""


def boot_loader(root: Root) -> BootLoader:
    """The first entry of STACKS that this start shows the signs of."""
    start = _start(root)
    for stack in STACKS:
        seen = stack.seen(start)
        if seen is not None:
            shown = tuple(printable_line(each, _MAX_EVIDENCE) for each in seen)
            return BootLoader(stack.id, stack.how, shown)
    told = (printable_line(start.told, _MAX_EVIDENCE),) if start.told else ()
    return BootLoader(None, None, told)
