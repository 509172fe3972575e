# SPDX-License-Identifier: Apache-2.0
"""Builds an initramfs or a unified kernel image; the old one stays until the new one is confirmed.

The tool of the distribution may write in place, and may be cut off in it, so a copy of the old
image is on disk beside it before it runs.  What is there tells what to do, by names alone:

- the copy is there: what is at ``path`` is not trusted; the copy gets its name back
- an image at ``trial``: it is not confirmed, and goes

Nothing of that takes room on the disk, or a tool.  Once it is confirmed the old one is kept
elsewhere (boot/originals.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from infertune.base.errors import Failed, cause, describe
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import MIB
from infertune.boot import originals
from infertune.boot.change import Command, Image
from infertune.boot.commands import Runner, run_step
from infertune.host import pe
from infertune.host.mounts import mounted

MARGIN = 4 * MIB
"""What a file system needs for itself, and others take meanwhile."""

UPDATE_INITRAMFS = "/etc/initramfs-tools/update-initramfs.conf"


@dataclass(frozen=True, slots=True)
class Built:
    """An image as it was built, or is about to be: what it takes to put the old one back."""

    image: Image
    digest: str = ""
    """SHA-256 of what we built; empty as long as that is not whole."""
    before: str = ""
    """SHA-256 of the old one."""

    @property
    def path(self) -> str:
        return self.image.path


def planned(image: Image) -> Built:
    """What the record has of an image before it is built."""
    return Built(image)


OLD = "infertune-old.efi"
"""What the copy of an old unified image is called."""


def kept(image: Image) -> str:
    """Where the copy of the old image lies."""
    if image.kind == "uki":
        # An ending that loaders look for: it can be booted from there.
        return f"{os.path.dirname(image.path)}/{OLD}"
    return f"{image.path}.infertune-old"


# -- before ------------------------------------------------------------------------


def ask_room(root: Root, images: Iterable[Image]) -> None:
    """Raise Failed, before anything is written, where an image could not be built safely."""
    wanted: dict[int, tuple[int, str]] = {}
    for image in images:
        try:
            size = root.size(image.path)
            space = root.space(os.path.dirname(image.path))
        except OSError as error:
            raise Failed(f"{describe(error)}; nothing was touched") from error
        _check_tool(root, image)
        place = mounted(root, image.path)
        where = place.path if place else os.path.dirname(image.path)
        if space.read_only:
            raise Failed(
                f"{where} is read-only: {image.path} cannot be built; nothing was touched",
                hint=f"find out why (it may have had an error), then: mount -o remount,rw {where}",
            )
        # The tool writes temporary files beside it, and the new one may be larger.
        needed = wanted.get(space.device, (MARGIN, ""))[0] + size + size * 5 // 4
        wanted[space.device] = (needed, where)
        if space.free < needed:
            raise Failed(
                f"{where} has {space.free // MIB} MiB free, and {-(-needed // MIB)} MiB are needed "
                f"to keep {image.path} while a new one is built; nothing was touched",
                hint=f"make room on {where} (kernels that are not used; *.new that a killed tool "
                "left), then try again",
            )


def ask_room_for_tool(root: Root, command: Command) -> None:
    """Raise Failed where a tool that builds images by itself would not have room for one."""
    for pattern in command.rewrites:
        for path in root.glob(pattern):
            try:
                size, space = root.size(path), root.space(os.path.dirname(path))
            except OSError as error:
                raise Failed(f"{describe(error)}; nothing was touched") from error
            needed = MARGIN + size * 5 // 4
            if space.read_only or space.free < needed:
                state = "read-only" if space.read_only else f"{space.free // MIB} MiB free"
                raise Failed(
                    f"{os.path.dirname(path)} has {state}, and {command.argv[0]} rebuilds {path}, "
                    f"which takes {-(-needed // MIB)} MiB; nothing was touched",
                    hint="make room there (remove kernels or snapshots that are not used)",
                )


def _check_tool(root: Root, image: Image) -> None:
    """What keeps a tool from building although it says it did."""
    if not image.build[0].endswith("/update-initramfs"):
        return
    for line in (root.get(UPDATE_INITRAMFS) or "").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "update_initramfs" and value.split("#")[0].strip(" \t\"'") == "no":
            raise Failed(
                f"{UPDATE_INITRAMFS} has update_initramfs=no: {image.path} would not be built; "
                "nothing was touched",
                hint="set it to 'yes', or put the options on the command line",
            )


# -- build and keep ----------------------------------------------------------------


def build(root: Root, image: Image, run: Runner) -> Built:
    """Build an image and see to it that it holds what it should.

    Raises Failed; the old image is then there again.
    """
    try:
        if root.exists(kept(image)):
            _put_back(root, image, run)  # of a try that was cut off
        built = _run_tool(root, image, run, partial(_check, root, image, run))
        if image.trial:
            root.rename(image.path, image.trial)
            root.rename(kept(image), image.path)
        if image.shelter:
            run_step(run, image.shelter.off)
    except (OSError, Failed, KeyboardInterrupt) as error:
        raise _after(root, image, run, error) from error
    return built


def confirm(root: Root, built: Built) -> None:
    """The new image has booted: it is the one from now on.  Can be repeated.

    Raises OSError; raises Failed where another program has built the default meanwhile.
    """
    image = built.image
    if image.trial and root.exists(image.trial):
        if _digest(root, image.path) != built.before:
            # It may be for another kernel, and the modules of this one gone.
            raise Failed(
                f"{image.path} was built by another program since, and is not replaced",
                hint="infertune boot undo, then stage again",
            )
        originals.keep(root, image.path, image.path, built.before)
        root.rename(image.trial, image.path)
    elif root.exists(kept(image)):
        originals.keep(root, image.path, kept(image), built.before)
    root.unlink(kept(image))


# -- put back ----------------------------------------------------------------------


def restore(root: Root, built: Built, run: Runner) -> str:
    """The old image again, from wherever it was cut off.

    Nothing happens where that is done already.  Answers with an empty text; where no original
    could be put back and the image was rebuilt, with a sentence that says why.  Raises Failed
    or OSError.
    """
    image, why = built.image, ""
    root.discard(image.path)  # of putting back that was cut off
    now, old = _digest(root, image.path), _digest(root, kept(image))
    if not built.digest:
        anew = False
    elif old is not None:
        # Not the old one: a copy of what is to go, of a building anew that was cut off.  The old
        # one, and neither it nor ours at its place: another program has built it since.
        anew = old != built.before or now not in (built.before, built.digest, None)
    else:
        # Confirmed, and the kept one gone; or the image went with its kernel.
        anew = now not in (built.before, None) and _is_ours(root, built, run)
    if not anew:
        # Once it is built the loader's default is its owner's again, and may be another by now.
        _put_back(root, image, run, sheltered=not built.digest or old is not None)
    else:
        goes = now if old in (None, built.before) else old
        why = _original_back(root, built, run, goes)
        if why:
            _rebuild(root, built, run)
    originals.drop(root, image.path)
    return f"{image.path} was rebuilt, with other bytes than before: {why}" if why else ""


def _original_back(root: Root, built: Built, run: Runner, goes: str | None) -> str:
    """The original of a confirmed image; or why it cannot be that, in one phrase.

    ``goes`` is the SHA-256 of what it would replace.  Raises Failed or OSError.
    """
    image = built.image
    if goes != built.digest:
        return "another program has built it since"
    if why := originals.put_back(root, image.path, built.before):
        return why
    # Of a building anew that was cut off.
    if image.shelter and root.exists(kept(image)):
        run_step(run, image.shelter.off)
    root.unlink(kept(image))
    return ""


def _rebuild(root: Root, built: Built, run: Runner) -> None:
    """The same image without what was staged; whatever it holds now."""
    image = built.image
    if not root.exists(kept(image)):
        ask_room(root, [image])
    try:
        _run_tool(root, image, run, lambda _: _check_clean(root, built, run))
        if image.shelter:
            run_step(run, image.shelter.off)
        root.unlink(kept(image))
    except (OSError, Failed, KeyboardInterrupt) as error:
        raise _after(root, image, run, error) from error


def _put_back(root: Root, image: Image, run: Runner, *, sheltered: bool = True) -> None:
    """The kept image at its place, and nothing else of ours.  Raises OSError or Failed."""
    if root.exists(kept(image)):
        root.rename(kept(image), image.path)
    root.discard(kept(image))
    if image.trial:
        root.unlink(image.trial)
    if image.shelter and sheltered:
        run_step(run, image.shelter.off)


def _after(root: Root, image: Image, run: Runner, error: BaseException) -> Failed:
    """What to tell after ``error``, once the old image is back."""
    why = cause(error)
    hint = error.hint if isinstance(error, Failed) else None
    try:
        _put_back(root, image, run)
    except (OSError, Failed) as second:
        if root.exists(kept(image)):
            hint = f"the old image is whole: mv {kept(image)} {image.path}"
        return Failed(f"{why}; {image.path} could not be put back: {cause(second)}", hint=hint)
    return Failed(f"{why}; {image.path} is as it was", hint=hint)


# -- the tool ----------------------------------------------------------------------


def _run_tool(root: Root, image: Image, run: Runner, check: Callable[[str], None]) -> Built:
    """Run the tool beside a copy of the old image, which stays.

    ``check`` is given the old one's, and raises Failed.  Raises OSError or Failed.
    """
    if not root.exists(kept(image)):
        root.copy(image.path, kept(image))
    before = root.digest(kept(image))
    if image.shelter:
        run_step(run, image.shelter.on)
    run_step(run, image.build)
    check(before)
    # The kept copy may go only when this one is on the disk, and not in memory.
    root.sync(image.path)
    return Built(image, root.digest(image.path), before)


def _check(root: Root, image: Image, run: Runner, before: str) -> None:
    """Raise Failed unless the image holds what it should."""
    missing = _missing(root, image, run)
    if missing is None or missing:
        _check_built(root, image, before)
    if not missing:
        return
    what = ", ".join(missing)
    if image.kind == "uki":
        raise Failed(
            f"{image.path} was built without {what} on its command line",
            hint="the tool has a command line of its own (in a preset, or its configuration): "
            "add the words there",
        )
    raise Failed(
        f"{image.path} was built without {what}",
        hint="dracut takes /etc/modprobe.d in only with hostonly=yes (dracut.conf(5)), mkinitcpio "
        "only with the hook modconf",
    )


def _check_clean(root: Root, built: Built, run: Runner) -> None:
    """Raise Failed unless the image is built without what was staged."""
    image = built.image
    missing = _missing(root, image, run)
    if image.holds and missing is not None:
        still = not missing
    else:
        still = _digest(root, image.path) == built.digest
    if still:
        raise Failed(f"{' '.join(image.build)}: {image.path} still holds what was staged")


def _check_built(root: Root, image: Image, before: str) -> None:
    if _digest(root, image.path) == before:
        raise Failed(f"{' '.join(image.build)} built nothing: {image.path} is what it was")


def _missing(root: Root, image: Image, run: Runner) -> tuple[str, ...] | None:
    """What an image should hold and does not; None where it cannot be looked into.

    Raises Failed for one that is not whole.
    """
    if image.kind == "uki":
        try:
            there: Sequence[str] = (pe.command_line(root, image.path) or "").split()
        except ValueError as error:
            raise Failed(f"{image.path} is no whole image: {error}") from error
    elif not image.look:
        return None
    else:
        listing = run_step(run, (*image.look, image.path))
        # lsinitrd lists as ls does, the others names alone.
        there = [line.split()[-1].lstrip("./") for line in listing.splitlines() if line.strip()]
    found = set(there)
    return tuple(each for each in image.holds if each not in found)


def _is_ours(root: Root, built: Built, run: Runner) -> bool:
    """Whether the image holds what was staged, whoever built it; if that is not known, it does."""
    if _digest(root, built.path) == built.digest:
        return True
    try:
        missing = _missing(root, built.image, run)
    except (OSError, Failed):
        return True  # torn, or not to be read: it is better rebuilt
    return missing is None or not missing


def _digest(root: Root, path: str) -> str | None:
    """None where there is no such file."""
    try:
        return root.digest(path)
    except FileNotFoundError:
        return None
