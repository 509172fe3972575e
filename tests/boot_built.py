# SPDX-License-Identifier: Apache-2.0
"""A machine with one image that a tool builds in place, for tests of boot/images.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import boot_makers
from infertune.base.records import replace
from infertune.base.root import Root, Step
from infertune.boot import images, originals
from infertune.boot.change import Image, Shelter
from infertune.boot.commands import Ran
from infertune.boot.images import Built
from support import Counter

KERNEL = "7.1.3-test"
OPTIONS = "etc/modprobe.d/zz-infertune.conf"
WORDS = ("amd_iommu=off", "ttm.pages_limit=1")

INITRAMFS = Image(
    f"/boot/initrd.img-{KERNEL}",
    "initramfs",
    ("/usr/sbin/update-initramfs", "-u", "-k", KERNEL),
    (OPTIONS,),
    ("/usr/bin/lsinitramfs",),
)
BLIND = replace(INITRAMFS, look=())
UKI = Image(
    "/boot/EFI/Linux/arch.efi",
    "uki",
    ("/usr/bin/mkinitcpio", "-k", KERNEL, "-U", "/boot/EFI/Linux/arch.efi"),
    WORDS,
)
SHELTER = Shelter(
    ("/usr/bin/bootctl", "set-default", "infertune-old.efi"),
    ("/usr/bin/bootctl", "set-default", "arch.efi"),
)
SHELTERED = replace(UKI, shelter=SHELTER)
TRIAL = replace(SHELTERED, trial="/boot/EFI/Linux/infertune.efi")

KINDS = {
    "initramfs": INITRAMFS,
    "blind": BLIND,
    "uki": UKI,
    "sheltered": SHELTERED,
    "trial": TRIAL,
}


def uki(line: str, kernel: str = KERNEL, filler: str = "") -> bytes:
    return boot_makers.image(line, kernel, filler)


def content(image: Image, *, ours: bool, by: str = "") -> bytes:
    """A whole image, with what is staged or without it; ``by`` tells builders apart."""
    if image.kind == "uki":
        return uki(" ".join(("root=UUID=1", *WORDS) if ours else ("root=UUID=1",)), filler=by)
    names = ["usr/bin/sh", OPTIONS] if ours else ["usr/bin/sh"]
    return "\n".join(["whole", *names, by, "end"]).encode()


class Machine:
    """One with a single image, and tools that write it in place, in pieces."""

    def __init__(self, base: Path, image: Image) -> None:
        self.base = base
        self.image = image
        self.hook: Callable[[Step], int | None] = lambda _: None
        self.ran: list[str] = []
        self.staged = True
        """Whether the files are there of which the tool makes what the image should hold."""
        self.does = "builds"
        path = self.at(image.path)
        path.parent.mkdir(parents=True)
        path.write_bytes(self.old)
        path.chmod(0o600)
        self.default.write_text("arch.efi")

    @property
    def old(self) -> bytes:
        return content(self.image, ours=False, by="old")

    @property
    def default(self) -> Path:
        return self.base / "loader-default"

    @property
    def root(self) -> Root:
        return Root(self.base, hook=self.hook)

    def at(self, path: str) -> Path:
        return self.base / path.lstrip("/")

    def names(self) -> set[str]:
        return {path.name for path in self.at(self.image.path).parent.iterdir()}

    def __call__(self, argv: Sequence[str]) -> Ran:
        self.ran.append(" ".join(argv))
        if argv[0].endswith("/bootctl"):
            self.hook(Step("tool", "the loader's default"))
            self.default.write_text(argv[2])
            return Ran(0, "")
        path = self.at(self.image.path)
        if argv[0].endswith("/lsinitramfs"):
            lines = path.read_text().split("\n")
            whole = lines[0] == "whole" and lines[-1] == "end"
            return Ran(0, "", "\n".join(lines)) if whole else Ran(1, "premature end of archive")
        return self._builds(path)

    def _builds(self, path: Path) -> Ran:
        if self.does == "nothing":
            return Ran(0, "W: /boot is ro mounted.")
        new = content(self.image, ours=self.staged and self.does != "without")
        if self.does == "deletes":  # dracut 106 when its copy fails
            path.unlink()
            return Ran(1, "No space left on device")
        self.hook(Step("tool", "before it writes"))
        path.write_bytes(b"")
        self.hook(Step("tool", "after it has emptied the image"))
        path.write_bytes(new[: len(new) // 2])
        self.hook(Step("tool", "in the middle"))
        if self.does == "fails":
            return Ran(1, "No space left on device")
        if self.does == "tears":
            return Ran(0, "")
        path.write_bytes(new)
        self.hook(Step("tool", "at its end"))
        return Ran(0, "")

    # -- what is asked of it -------------------------------------------------

    def is_as_it_was(self) -> bool:
        path = self.at(self.image.path)
        return (
            path.read_bytes() == self.old
            and path.stat().st_mode & 0o777 == 0o600
            and self.names() == {path.name}
            and self.default.read_text() == "arch.efi"
            and not self.at(originals.STORE).exists()
        )

    def is_whole(self, path: str) -> bool:
        """Whether a machine boots from it."""
        try:
            data = self.at(path).read_bytes()
        except FileNotFoundError:
            return False
        built = [content(self.image, ours=ours, by=by) for ours in (0, 1) for by in ("", "old")]
        return data in (*built, content(self.image, ours=True, by="another"))

    def boots(self) -> bool:
        """By itself from the loader's default where that is known, else with one rename."""
        path, copy = self.image.path, images.kept(self.image)
        if self.image.shelter:
            default = f"{os.path.dirname(path)}/{self.default.read_text()}"
            if self.at(default).exists():
                return self.is_whole(default)
        return self.is_whole(path) or self.is_whole(copy)


IN_PLACE = [name for name in KINDS if name != "trial"]


def anew(machine: Machine) -> Machine:
    """The same machine, untouched."""
    shutil.rmtree(machine.base)
    return Machine(machine.base, machine.image)


def steps_of(machine: Machine, work: Callable[[Machine], object]) -> list[Step]:
    """What ``work`` does, step by step."""
    counter = Counter()
    machine.hook = counter
    work(machine)
    machine.hook = lambda _: None
    return counter.steps


def build(machine: Machine) -> Built:
    return images.build(machine.root, machine.image, machine)


def confirm(machine: Machine, built: Built) -> None:
    images.confirm(machine.root, built)


def confirm_without_copy(machine: Machine, built: Built) -> None:
    """As where there was no room for one."""
    confirm(machine, built)
    originals.drop(machine.root, machine.image.path)


def restore(machine: Machine, built: Built) -> str:
    """Answers with what is said of an image that was rebuilt."""
    return images.restore(machine.root, built, machine)
