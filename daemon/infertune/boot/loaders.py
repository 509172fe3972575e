# SPDX-License-Identifier: Apache-2.0
"""How settings get into the next boot: one entry per boot loader and per initramfs tool.

``plan`` reads what is there and says which files to write and which commands to run.  It
changes nothing.  Where a loader has a directory for drop-ins one file of ours goes there; where
a file must be edited, that is said; where neither can be done safely, there is an instruction
for a person instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from infertune.boot.commands import find
from infertune.boot.options import Option
from infertune.errors import Failed, UsageError, describe
from infertune.host.mounts import mounted
from infertune.host.system import command_line
from infertune.machine import Machine
from infertune.root import Root

# Names that sort last: of two values of one parameter the later one counts.
MODPROBE = "/etc/modprobe.d/zz-infertune.conf"
GRUB_DROP_IN = "/etc/default/grub.d/zz-infertune.cfg"
GRUB_SCRIPT = "/etc/grub.d/01_infertune"
CMDLINE_DROP_IN = "/etc/cmdline.d/zz-infertune.conf"
LIMINE_DROP_IN = "/etc/limine-entry-tool.d/zz-infertune.conf"
OURS = (MODPROBE, GRUB_DROP_IN, GRUB_SCRIPT, CMDLINE_DROP_IN, LIMINE_DROP_IN)

HEADER = "# Written by infertune; 'infertune boot undo' puts back what was here before.\n"
MAX_FILE = 1024 * 1024
COMMAND_LINE_SIZE = 2048
"""Bytes with the NUL at the end, of x86 and arm64 (asm/setup.h); what is beyond it is cut off."""


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to write."""

    path: str
    data: bytes
    mode: int = 0o644
    """For a file that is not there yet; an existing one keeps its own."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program of the system to run after the files are written."""

    argv: tuple[str, ...]
    why: str
    undo: tuple[str, ...] = ()
    """What takes it back, after the files are; empty for nothing."""
    confirm: tuple[str, ...] = ()
    """What makes it last, once the machine has started with it."""
    touches: tuple[str, ...] = ()
    """Files it edits, as patterns: their content is kept, too."""


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that staging does on one machine.  A value; nothing has happened yet."""

    style: str | None
    options: tuple[Option, ...] = ()
    files: tuple[NewFile, ...] = ()
    commands: tuple[Command, ...] = ()
    counted: bool = False
    """Whether the boot loader itself drops the kernel's options after one start that failed."""
    rescue: str = ""
    """What brings back a machine that does not start with the new options."""
    manual: tuple[str, ...] = ()
    """What a person has to do instead."""
    by_hand: tuple[Option, ...] = ()
    """Options that only a person can set here."""
    notes: tuple[str, ...] = ()


Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """How one machine takes options on its command line."""

    files: tuple[NewFile, ...] = ()
    commands: tuple[Command, ...] = ()
    rescue: str = ""
    counted: bool = False
    manual: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Style:
    """One boot loader style; ids are those of machine.BOOT_STYLES."""

    command_line: Callable[[Root, Words], Way]
    modprobe: bool = True
    """Whether /etc/modprobe.d reaches drivers; an image's initramfs does not have our file."""
    counts: Callable[[Root], bool] = lambda _: False
    """Whether the loader drops what it started once in vain.  Then drivers get theirs from it, too:
    one that takes the machine down before the guard has counted would do so at every start."""


def _by_hand(instruction: str) -> Way:
    return Way(manual=(instruction,))


MENU = "nothing comes back by itself: {what}, and run 'infertune boot undo'"

# -- GRUB ------------------------------------------------------------------------

_COUNTING_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "vfat", "xfs")
"""Where GRUB can write its environment block: not on btrfs or zfs, nor on LVM or RAID."""


def _grub(root: Root, words: Words) -> Way:
    config = find(root, "update-grub")
    script = find(root, "grub-mkconfig") or find(root, "grub2-mkconfig")
    rebuild = (config,) if config else _mkconfig(root, script)
    if not rebuild or not script:
        return _by_hand(f"add to the kernel's line in grub.cfg: {' '.join(words)}")
    build = Command(rebuild, "writes GRUB's menu", undo=rebuild)
    if not _has_drop_ins(root, script):
        return _grub_in_place(root, words, build)
    editor = find(root, "grub-editenv")
    if editor is None or not _grub_counts(root):
        line = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {}"\n'
        drop_in = NewFile(GRUB_DROP_IN, (HEADER + line.format(" ".join(words))).encode())
        rescue = MENU.format(
            what="choose 'recovery mode' in GRUB's menu, which has no such options"
        )
        return Way((drop_in,), (build,), rescue)
    line = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT \\$infertune_options"\n'
    count = Command(
        (editor, "-", "set", "infertune_boot=staged"),
        "lets GRUB count: one start without confirmation, and it drops the options",
        undo=(editor, "-", "unset", "infertune_boot"),
        confirm=(editor, "-", "set", "infertune_boot=confirmed"),
    )
    files = (
        NewFile(GRUB_DROP_IN, (HEADER + line).encode()),
        NewFile(GRUB_SCRIPT, grub_script(words).encode(), 0o755),
    )
    return Way(files, (count, build), GRUB_COUNTS, True)


GRUB_COUNTS = (
    "a panic, or an initramfs that gives up, starts the machine again, and GRUB drops the options "
    "at the second start"
)
AT_THE_TRY: Words = ("panic=30", "rd.shell=0", "rd.emergency=reboot")
"""Beside the options at the one start that tries them: what stops there starts again by itself.

A kernel that panics waits for ever by default; ``panic`` is seconds until it starts again, and
initramfs-tools takes it for its own shell, too (kernel-parameters.txt, initramfs-tools(7)).  The
others are dracut's (dracut.cmdline(7)).
"""


def grub_script(words: Words) -> str:
    """A script for /etc/grub.d: what it prints is run by GRUB at each start."""
    return f"""#!/bin/sh
{HEADER}cat <<'END'
set infertune_options=""
if [ "${{infertune_boot}}" = "confirmed" ]; then
  set infertune_options="{" ".join(words)}"
elif [ "${{infertune_boot}}" = "staged" ]; then
  set infertune_boot="tried"
  if save_env infertune_boot; then
    set infertune_options="{" ".join((*words, *AT_THE_TRY))}"
  fi
fi
export infertune_options
END
"""


def _grub_counts(root: Root) -> bool:
    """Whether GRUB can be told what to try, and can itself write /boot/grub/grubenv."""
    script = find(root, "grub-mkconfig") or find(root, "grub2-mkconfig")
    rebuilt = script and (find(root, "update-grub") or _mkconfig(root, script))
    if not (script and rebuilt and find(root, "grub-editenv") and _has_drop_ins(root, script)):
        return False
    place = mounted(root, "/boot/grub")
    if place is None or place.device.startswith(("/dev/mapper/", "/dev/md", "/dev/dm-")):
        return False
    return place.kind in _COUNTING_FILE_SYSTEMS


def _has_drop_ins(root: Root, script: str) -> bool:
    """Debian, Ubuntu and Arch patch grub-mkconfig to read them; upstream does not."""
    return "default/grub.d" in (root.get(script) or "")


def _grub_in_place(root: Root, words: Words, build: Command) -> Way:
    path = "/etc/default/grub"
    text = _read(root, path)
    text += "" if text.endswith("\n") or not text else "\n"
    text += HEADER
    text += f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {" ".join(words)}"\n'
    return Way(
        (NewFile(path, text.encode("utf-8", "surrogateescape")),),
        (build,),
        MENU.format(what="press 'e' in GRUB's menu and delete the options"),
        notes=(f"{path} is edited: this GRUB reads no /etc/default/grub.d",),
    )


def _mkconfig(root: Root, script: str | None) -> tuple[str, ...]:
    for config in ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"):
        if script and root.exists(config):
            return (script, "-o", config)
    return ()


def _grubby(root: Root, words: Words) -> Way:
    grubby = find(root, "grubby")
    if grubby is None:
        return _grub(root, words)
    given = " ".join(words)
    command = Command(
        (grubby, "--update-kernel=ALL", f"--args={given}"),
        "adds the options to every entry and to what new kernels get",
        undo=(grubby, "--update-kernel=ALL", f"--remove-args={given}"),
        touches=(
            "/boot/loader/entries/*.conf",
            "/etc/kernel/cmdline",
            "/etc/default/grub",
        ),
    )
    rescue = MENU.format(what="press 'e' in GRUB's menu and delete the options")
    return Way((), (command,), rescue)


# -- systemd-boot and unified kernel images ------------------------------------------


def _systemd_boot(root: Root, words: Words) -> Way:
    install = find(root, "kernel-install")
    rescue = MENU.format(what="press 'e' in the menu of systemd-boot and delete the options")
    if install and root.exists("/etc/kernel/cmdline"):
        build = (install, "add-all")
        command = Command(
            build,
            "writes the entries of every kernel",
            undo=build,
            touches=tuple(f"{each}/loader/entries/*.conf" for each in ("/boot", "/efi")),
        )
        return _append(root, "/etc/kernel/cmdline", words, (command,), rescue)
    entries = [
        path
        for directory in ("/boot", "/efi", "/boot/efi")
        for path in root.glob(f"{directory}/loader/entries/*.conf")
        if "fallback" not in path
    ]
    edited = []
    for path in entries:
        text = _read(root, path)
        changed = re.sub(
            r"^(options[ \t].*?)[ \t]*$", rf"\1 {' '.join(words)}", text, count=1, flags=re.M
        )
        if changed != text:
            edited.append(NewFile(path, changed.encode("utf-8", "surrogateescape")))
    if not edited:
        return _by_hand(f"add to the line 'options' of your boot entry: {' '.join(words)}")
    return Way(
        tuple(edited),
        (),
        rescue,
        notes=("boot entries are edited; one with 'fallback' in its name stays as it is",),
    )


def _uki(root: Root, words: Words) -> Way:
    rescue = MENU.format(
        what="an image that is signed cannot be edited in a menu: start another kernel's image"
    )
    install, mkinitcpio = find(root, "kernel-install"), find(root, "mkinitcpio")
    single, parts = root.exists("/etc/kernel/cmdline"), root.glob("/etc/cmdline.d/*.conf")
    if mkinitcpio and root.glob("/etc/mkinitcpio.d/*.preset"):
        build = Command((mkinitcpio, "-P"), "builds the images", undo=(mkinitcpio, "-P"))
        if parts and not single:
            drop_in = NewFile(CMDLINE_DROP_IN, f"{' '.join(words)}\n".encode())
            return Way((drop_in,), (build,), rescue)
        if parts and single:
            return _by_hand(
                "/etc/kernel/cmdline and /etc/cmdline.d both exist, and which of them counts "
                f"depends on mkinitcpio's version: add there {' '.join(words)}"
            )
        if single:
            return _append(root, "/etc/kernel/cmdline", words, (build,), rescue)
    elif install and single:
        build = Command((install, "add-all"), "builds the images", undo=(install, "add-all"))
        return _append(root, "/etc/kernel/cmdline", words, (build,), rescue)
    return _by_hand(f"build an image whose command line has also: {' '.join(words)}")


def _append(root: Root, path: str, words: Words, commands: tuple[Command, ...], rescue: str) -> Way:
    """Words at the end of a file that holds a command line."""
    text = _read(root, path)
    lines = text.rstrip("\n").split("\n")
    # Lines are joined with spaces; a comment (mkinitcpio allows them) must not swallow the words.
    plain = [number for number, line in enumerate(lines) if not line.startswith("#")]
    last = plain[-1] if plain else len(lines)
    lines += [] if plain else [""]
    lines[last] = f"{lines[last].rstrip()} {' '.join(words)}".lstrip()
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
    return Way(
        (NewFile(path, data),), commands, rescue, notes=(f"{path} is edited: it has no drop-ins",)
    )


# -- Limine ------------------------------------------------------------------------


def _limine(root: Root, words: Words) -> Way:
    given = " ".join(words)
    tools = ("limine-mkinitcpio", "limine-dracut", "limine-update")
    tool = next((found for name in tools if (found := find(root, name))), None)
    rescue = MENU.format(
        what="press 'e' in Limine's menu and delete the options, or pick a snapshot"
    )
    if tool is None:
        return _by_hand(f"add to the line 'cmdline:' of your entry in limine.conf: {given}")
    # Read after every drop-in: a plain '=' there would throw ours away (limine-entry-tool).
    default = root.get("/etc/default/limine") or ""
    if re.search(r"^\s*KERNEL_CMDLINE\[default\]\s*=", default, re.M):
        return _by_hand(
            "/etc/default/limine sets KERNEL_CMDLINE[default] and wins over drop-ins: add "
            f"there {given}, and run {tool}"
        )
    if not root.exists("/etc/limine-entry-tool.d"):
        return _by_hand(f'add to /etc/default/limine: KERNEL_CMDLINE[default]+=" {given}"')
    line = f'KERNEL_CMDLINE[default]+=" {given}"\n'
    drop_in = NewFile(LIMINE_DROP_IN, (HEADER + line).encode())
    return Way((drop_in,), (Command((tool,), "writes Limine's entries", undo=(tool,)),), rescue)


# -- images ------------------------------------------------------------------------


def _rpm_ostree(root: Root, words: Words) -> Way:
    tool = find(root, "rpm-ostree")
    if tool is None:
        return _by_hand(f"add kernel arguments: {' '.join(words)}")
    command = Command(
        (tool, "kargs", *(f"--append-if-missing={word}" for word in words)),
        "makes a deployment with the options beside the present one",
        undo=(tool, "kargs", *(f"--delete-if-present={word}" for word in words)),
    )
    rescue = MENU.format(what="choose the deployment before it in the boot menu")
    return Way((), (command,), rescue)


def _bootc(root: Root, words: Words) -> Way:
    del root
    kargs = ", ".join(f'"{word}"' for word in words)
    return _by_hand(
        "this system is an image: add a file usr/lib/bootc/kargs.d/50-infertune.toml with "
        f"'kargs = [{kargs}]' to the image, build it, and 'bootc upgrade'"
    )


def _nixos(root: Root, words: Words) -> Way:
    del root
    listed = " ".join(f'"{word}"' for word in words)
    return _by_hand(
        f"add to configuration.nix: boot.kernelParams = [ {listed} ]; then 'nixos-rebuild "
        "boot'; in the boot menu every earlier generation is still there"
    )


def _nowhere(root: Root, words: Words) -> Way:
    del root
    return _by_hand(f"a container has its host's command line; there: {' '.join(words)}")


def _unknown(root: Root, words: Words) -> Way:
    del root
    return _by_hand(f"no boot loader is known here: add to the command line {' '.join(words)}")


STYLES: dict[str | None, Style] = {
    "grub": Style(_grub, counts=_grub_counts),
    "bls": Style(_grubby),
    "systemd-boot": Style(_systemd_boot),
    "uki": Style(_uki),
    "limine": Style(_limine),
    "rpm-ostree": Style(_rpm_ostree, modprobe=False),
    "bootc": Style(_bootc, modprobe=False),
    "nixos": Style(_nixos, modprobe=False),
    "none": Style(_nowhere, modprobe=False),
    None: Style(_unknown),
}


@dataclass(frozen=True, slots=True)
class InitramfsTool:
    """What builds the initramfs, in which the driver may lie with a copy of its options."""

    program: str
    arguments: tuple[str, ...]
    signs: tuple[str, ...] = ()
    """One of these patterns must exist; none: the program is sign enough."""
    styles: tuple[str, ...] = ()
    """Only for these boot loaders; none: for all."""


INITRAMFS_TOOLS: tuple[InitramfsTool, ...] = (
    InitramfsTool("limine-mkinitcpio", (), styles=("limine",)),
    InitramfsTool("limine-dracut", (), styles=("limine",)),
    InitramfsTool("mkinitcpio", ("-P",), ("/etc/mkinitcpio.d/*.preset",)),
    InitramfsTool("kernel-install", ("add-all",), styles=("uki",)),
    InitramfsTool("update-initramfs", ("-u", "-k", "all")),
    InitramfsTool("dracut", ("--force", "--regenerate-all")),
)
"""First match wins: Debian's dracut has an update-initramfs, too."""


def plan(root: Root, machine: Machine, options: Sequence[Option]) -> Change:
    """What staging ``options`` takes on this machine.

    Raises Failed for a file it cannot read, UsageError for options that have no room.
    """
    style = STYLES[machine.boot_style if machine.boot_style in STYLES else None]
    if not style.modprobe or style.counts(root):
        options = [replace(o, on_command_line=bool(o.parameters)) for o in options]
    firmware = tuple(option for option in options if not option.parameters)
    on_line = [o for o in options if o.on_command_line]
    in_file = [o for o in options if o.parameters and o not in on_line]
    change = Change(machine.boot_style)
    done = [*firmware]
    if in_file:
        change = replace(change, files=(NewFile(MODPROBE, _modprobe(in_file)),))
        change = _with_initramfs(root, change)
        done += in_file
    if on_line:
        words = tuple(f"{p.word}={o.value}" for o in on_line for p in o.parameters)
        _check_room(root, (*words, *AT_THE_TRY))
        way = style.command_line(root, words)
        change = replace(
            change,
            files=(*change.files, *way.files),
            commands=_once((*change.commands, *way.commands)),
            counted=way.counted,
            rescue=way.rescue,
            manual=way.manual,
            notes=(*change.notes, *way.notes),
            by_hand=tuple(on_line) if way.manual else (),
        )
        if not way.manual:
            done += on_line
    elif in_file:
        rescue = MENU.format(what="add modprobe.blacklist=amdgpu in the boot menu")
        change = replace(change, rescue=rescue)
    return replace(change, options=tuple(o for o in options if o in done))


def _check_room(root: Root, words: Words) -> None:
    """Ours come last on the command line: what does not fit there is cut out of them."""
    there = command_line(root) or ""
    size = len(" ".join((there, *words)).encode())
    if size >= COMMAND_LINE_SIZE:
        raise UsageError(
            f"the command line would have {size} bytes, and the kernel takes "
            f"{COMMAND_LINE_SIZE - 1} of them ({len(there.encode())} are there now); nothing was "
            "touched",
            hint="shorten what is there, or leave options out of the profile's [boot]",
        )
    if "--" in there.split():
        raise UsageError(
            "the command line has '--', and what follows goes to init, not to the kernel; nothing "
            "was touched",
            hint="move what is meant for init elsewhere",
        )


def _modprobe(options: Sequence[Option]) -> bytes:
    lines: dict[str, list[str]] = {}
    for option in options:
        for parameter in option.parameters:
            lines.setdefault(parameter.module, []).append(f"{parameter.name}={option.value}")
    text = "".join(f"options {module} {' '.join(given)}\n" for module, given in lines.items())
    return (HEADER + text).encode()


def _with_initramfs(root: Root, change: Change) -> Change:
    for tool in INITRAMFS_TOOLS:
        program = find(root, tool.program)
        fits = not tool.styles or change.style in tool.styles
        if program and fits and (not tool.signs or any(map(root.glob, tool.signs))):
            argv = (program, *tool.arguments)
            build = Command(argv, "the initramfs may hold the driver and its options", undo=argv)
            return replace(change, commands=(build,))
    note = "no tool that builds an initramfs is known here: if yours loads the driver, rebuild it"
    return replace(change, notes=(note,))


def _once(commands: Sequence[Command]) -> tuple[Command, ...]:
    """The same rebuild is not run twice."""
    return tuple({command.argv: command for command in reversed(commands)}.values())[::-1]


def _read(root: Root, path: str) -> str:
    """A text file that is to be edited.  Raises Failed with what stands in the way."""
    try:
        data, _ = root.read_file(path, MAX_FILE + 1)
    except OSError as error:
        raise Failed(f"{describe(error)}; nothing was touched") from error
    if len(data) > MAX_FILE or b"\0" in data:
        raise Failed(f"{path} is no text file of a boot loader; nothing was touched")
    return data.decode("utf-8", "surrogateescape")
