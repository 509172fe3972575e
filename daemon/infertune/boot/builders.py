# SPDX-License-Identifier: Apache-2.0
"""Which tool builds the image that the running kernel was booted with, and how it is run for it.

Only that image is built: those of other kernels, and fallbacks, stay as they are and are the way
back.  Sources: update-initramfs(8) of initramfs-tools 0.148 and of Debian's dracut 106, dracut(8)
106, mkinitcpio 31ede1d3 (process_preset), kernel-install(8) of systemd 257.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
from collections.abc import Sequence

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.boot.change import Image, Words
from infertune.boot.commands import find
from infertune.host import pe
from infertune.host.system import release

HELD = "etc/modprobe.d/zz-infertune.conf"
"""What has to be in an initramfs."""


@dataclass(frozen=True, slots=True)
class ByHand:
    """There is no image that we could build, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Builder:
    """A tool for an initramfs, as it is run for one kernel."""

    program: str
    arguments: tuple[str, ...]
    path: str
    looks: tuple[str, ...]
    """What lists an image; the first that is installed."""


BUILDERS: tuple[Builder, ...] = (
    Builder(
        "update-initramfs",
        ("-u", "-k", "{kernel}"),
        "/boot/initrd.img-{kernel}",
        ("lsinitramfs", "lsinitrd"),
    ),
    *(
        Builder("dracut", ("--force", "{path}", "{kernel}"), path, ("lsinitrd",))
        for path in (
            "/boot/initramfs-{kernel}.img",
            "/boot/initrd.img-{kernel}",
            "/boot/initramfs-{package}.img",  # hooks of pacman name it after the package
        )
    ),
)
"""First match wins: Debian's dracut 112 has an update-initramfs, too; its 106 has none."""


def initramfs_image(root: Root, kernel: str) -> Image | ByHand:
    """The initramfs of a kernel; mkinitcpio, where it has presets, has its own way."""
    mkinitcpio = find(root, "mkinitcpio")
    if mkinitcpio and root.glob("/etc/mkinitcpio.d/*.preset"):
        preset = _preset_of(root, kernel)
        if isinstance(preset, ByHand):
            return preset
        if not preset.image:
            return ByHand(f"{preset.file} builds no initramfs by itself: rebuild your image")
        path = root.real(preset.image)
        build = (mkinitcpio, *preset.arguments, "-g", path)
        return Image(path, "initramfs", build, (HELD,), _look(root, ("lsinitcpio",)))
    package = root.get(f"/usr/lib/modules/{kernel}/pkgbase") or ""
    for builder in BUILDERS:
        program = find(root, builder.program)
        path = root.real(builder.path.format(kernel=kernel, package=package))
        if program is None or not root.exists(path):
            continue
        if builder.program == "update-initramfs" and (why := _copied_on(root)):
            return why
        arguments = [each.format(kernel=kernel, path=path) for each in builder.arguments]
        look = _look(root, builder.looks)
        return Image(path, "initramfs", (program, *arguments), (HELD,), look)
    if root.exists("/usr/bin/booster"):
        return ByHand("booster builds the initramfs: run 'booster build' for the running kernel")
    return ByHand(f"no known tool builds the initramfs of {kernel} here: rebuild it")


def uki_image(root: Root, words: Words, path: str) -> Image | ByHand:
    """The unified kernel image at ``path``, which the running kernel was booted from."""
    path = root.real(path)
    kernel = release(root) or ""
    inside = _kernel_in(root, path)
    if inside and inside != kernel:
        return ByHand(f"{path} is of kernel {inside} by now: reboot first")
    mkinitcpio = find(root, "mkinitcpio")
    if mkinitcpio and root.glob("/etc/mkinitcpio.d/*.preset"):
        return _of_preset(root, mkinitcpio, kernel, words, path)
    install = find(root, "kernel-install")
    if install and _layout(root) == "uki":
        return _of_kernel_install(root, install, kernel, words, path)
    dracut = find(root, "dracut")
    if dracut and _dracut_builds_ukis(root):
        build = (dracut, "--uefi", "--force", "--kver", kernel, path)
        return Image(path, "uki", build, words)
    return ByHand(f"no known tool builds {path} here: rebuild it with the words")


# -- Debian ------------------------------------------------------------------------


def _copied_on(root: Root) -> ByHand | None:
    """Programs that copy a new initramfs elsewhere: an old one put back would not get there."""
    directory = "/etc/initramfs/post-update.d"
    names = root.names(directory)
    if not names:
        return None
    return ByHand(
        f"{directory}/{names[0]} copies each new initramfs elsewhere: run 'update-initramfs -u' "
        "with the file in place, and again without it to undo"
    )


# -- mkinitcpio --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preset:
    """The first image of a file of presets; others in it are fallbacks."""

    file: str
    name: str
    arguments: tuple[str, ...]
    """Of mkinitcpio, without the image."""
    image: str
    uki: str
    own_line: bool
    """Whether it has a command line of its own."""


def read_preset(text: str, file: str) -> Preset | None:
    """A file of presets, as far as it assigns plain values; None where it builds nothing."""
    variables = _assignments(text)
    names = variables.get("PRESETS", ())
    if not names:
        return None
    name = names[0]

    def value(suffix: str) -> tuple[str, ...]:
        return variables.get(f"{name}_{suffix}") or variables.get(f"ALL_{suffix}") or ()

    # Of all values these alone have no ALL_ (process_preset).
    given = variables.get(f"{name}_options", ())
    options = tuple(word for each in given for word in each.split())
    arguments = [word for each in value("kver")[:1] for word in ("-k", each)]
    arguments += [word for each in value("config")[:1] for word in ("-c", each)]
    arguments += [word for each in value("microcode") for word in ("--microcode", each)]
    return Preset(
        file,
        name,
        (*arguments, *options),
        "".join(value("image")[:1]),
        "".join((value("uki") or value("efi_image"))[:1]),
        bool(value("cmdline")) or any(re.match(r"--cmdline\b|--no-cmdline\b", o) for o in options),
    )


def _assignments(text: str) -> dict[str, tuple[str, ...]]:
    """``NAME=value`` and ``NAME=(several values)`` of a shell script."""
    found = {}
    for match in re.finditer(r"^[ \t]*(\w+)=(\([^)]*\)|[^\n]*)", text, re.M):
        given = match[2].removeprefix("(").removesuffix(")")
        try:
            found[match[1]] = tuple(shlex.split(given, comments=True))
        except ValueError:
            continue
    return found


def _preset_of(root: Root, kernel: str) -> Preset | ByHand:
    for file in root.glob("/etc/mkinitcpio.d/*.preset"):
        preset = read_preset(root.get(file) or "", file)
        if preset and len(preset.arguments) > 1 and preset.arguments[0] == "-k":
            named = preset.arguments[1]
            if named == kernel or (named.startswith("/") and _kernel_at(root, named) == kernel):
                return preset
    return ByHand(
        f"no preset in /etc/mkinitcpio.d is for the running kernel {kernel}: if it was updated "
        "since the boot, reboot first"
    )


def _kernel_at(root: Root, path: str) -> str | None:
    """Release of the kernel in a bzImage (Documentation/arch/x86/boot.rst: kernel_version)."""
    real = root.real(path)
    try:
        (offset,) = struct.unpack("<H", root.read_part(real, 0x20E, 2))
        text = root.read_part(real, offset + 0x200, 128)
    except (OSError, struct.error):
        return None
    words = text.split(b"\0")[0].decode("ascii", "replace").split()
    return words[0] if words else None


def _of_preset(root: Root, mkinitcpio: str, kernel: str, words: Words, path: str) -> Image | ByHand:
    preset = _preset_of(root, kernel)
    if isinstance(preset, ByHand):
        return preset
    if not preset.uki or root.real(preset.uki) != path:
        return ByHand(f"{preset.file} does not build {path}: rebuild it with the words")
    if preset.own_line:
        return ByHand(f"{preset.file} has a command line of its own: add the words there")
    return Image(path, "uki", (mkinitcpio, *preset.arguments, "-U", path), words)


# -- other images ------------------------------------------------------------------


def _of_kernel_install(
    root: Root, install: str, kernel: str, words: Words, path: str
) -> Image | ByHand:
    if root.exists("/etc/kernel/tries"):
        return ByHand(f"kernel-install counts boots here: it would not write to {path}")
    if not os.path.basename(path).endswith(f"-{kernel}.efi"):
        return ByHand(f"kernel-install does not write to {path}: rebuild it with the words")
    if re.search(r"^\s*Cmdline\s*=", root.get("/etc/kernel/uki.conf") or "", re.M):
        return ByHand("/etc/kernel/uki.conf has a command line of its own: add the words there")
    for kernel_at in (f"/usr/lib/modules/{kernel}/vmlinuz", f"/boot/vmlinuz-{kernel}"):
        if root.exists(kernel_at):
            return Image(path, "uki", (install, "add", kernel, kernel_at), words)
    return ByHand(f"the kernel of {kernel} is not where kernel-install takes it from")


def _layout(root: Root) -> str:
    """Of kernel-install; empty where it chooses itself (kernel-install(8), install.conf)."""
    for directory in ("/etc/kernel", "/run/kernel", "/usr/local/lib/kernel", "/usr/lib/kernel"):
        text = root.get(f"{directory}/install.conf")
        if text is not None:
            return "".join(_assignments(text).get("layout", ())[:1])
    return ""


def _dracut_builds_ukis(root: Root) -> bool:
    files = ["/etc/dracut.conf"]
    for directory in ("/usr/lib/dracut/dracut.conf.d", "/etc/dracut.conf.d"):
        files += root.glob(f"{directory}/*.conf")
    return any(_assignments(root.get(file) or "").get("uefi") == ("yes",) for file in files)


def _kernel_in(root: Root, path: str) -> str | None:
    try:
        found = pe.section(lambda offset, size: root.read_part(path, offset, size), ".uname")
    except (OSError, ValueError):
        return None
    return found.decode("utf-8", "replace").strip() if found else None


def _look(root: Root, programs: Sequence[str]) -> tuple[str, ...]:
    return next(((found,) for name in programs if (found := find(root, name))), ())
