# SPDX-License-Identifier: Apache-2.0
"""The original of a confirmed image comes back byte for byte, where nobody built it since."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from boot_built import (
    INITRAMFS,
    KINDS,
    TRIAL,
    UKI,
    Machine,
    anew,
    build,
    confirm,
    content,
    restore,
    steps_of,
)
from infertune.base.errors import Failed
from infertune.base.root import Root, Space, Step
from infertune.boot import images, originals
from infertune.boot.images import Built
from infertune.host.unknown import Unknown
from support import At, Counter, fail, in_child, kill, shorten


@pytest.fixture(params=KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine", KINDS[request.param])


def confirmed(machine: Machine) -> Built:
    """Kept, and then without what the tool makes the image of."""
    built = build(machine)
    confirm(machine, built)
    machine.staged = False
    machine.ran.clear()
    return built


def copy_of(machine: Machine) -> Path:
    return machine.at(originals.place(machine.image.path))


def is_built_anew(machine: Machine) -> bool:
    image = machine.image
    now = machine.at(image.path)
    return (
        now.read_bytes() == content(image, ours=False)
        and machine.names() == {now.name}
        and machine.default.read_text() == "arch.efi"
        and not machine.at(originals.STORE).exists()
    )


# -- exact -------------------------------------------------------------------------------


def test_confirmed_and_undone_it_is_as_it_was(machine: Machine) -> None:
    built = confirmed(machine)
    assert copy_of(machine).read_bytes() == machine.old
    assert len(list(machine.at(originals.STORE).iterdir())) == 1
    for _ in range(2):
        assert restore(machine, built) == ""
        assert machine.is_as_it_was()  # with its mode, and nothing kept any more
    assert not machine.ran, "neither the tool nor the loader's default"


def test_nobody_else_may_look_into_what_is_kept(machine: Machine) -> None:
    confirmed(machine)
    # A boot partition that only root may read shows its files as readable.
    assert machine.at(originals.STORE).stat().st_mode & 0o777 == 0o700


def test_what_another_program_built_since_is_not_put_back_over(machine: Machine) -> None:
    built = confirmed(machine)
    newer = content(machine.image, ours=True, by="another")
    machine.at(machine.image.path).write_bytes(newer)
    path = machine.image.path
    assert restore(machine, built) == (
        f"{path} was rebuilt, with other bytes than before: another program has built it since"
    )
    assert is_built_anew(machine)


def test_a_newer_image_without_the_options_stays(machine: Machine) -> None:
    if machine.image.look or machine.image.kind == "uki":  # one that can be looked into
        built = confirmed(machine)
        newer = content(machine.image, ours=False, by="another")
        machine.at(machine.image.path).write_bytes(newer)
        assert restore(machine, built) == ""
        assert machine.at(machine.image.path).read_bytes() == newer
        assert not machine.at(originals.STORE).exists()


def test_an_image_that_went_with_its_kernel_does_not_come_back(machine: Machine) -> None:
    built = confirmed(machine)
    machine.at(machine.image.path).unlink()
    assert restore(machine, built) == ""
    assert not machine.names()
    assert not machine.at(originals.STORE).exists()


def test_a_damaged_copy_is_never_put_back(machine: Machine) -> None:
    built = confirmed(machine)
    data = bytearray(machine.old)
    data[len(data) // 2] ^= 1
    copy_of(machine).write_bytes(data)
    assert restore(machine, built).endswith(f"{originals.place(machine.image.path)} is damaged")
    assert is_built_anew(machine)


# -- room --------------------------------------------------------------------------------


class Var(Root):
    """A machine with so much room below /var."""

    space_of = Space(1, 0, False)

    def space(self, path: str) -> Space:
        return self.space_of if "/boot/" not in path else super().space(path)


def test_without_room_nothing_is_kept_and_the_tool_builds(machine: Machine) -> None:
    built = build(machine)
    root = Var(machine.base)
    needed = len(machine.old) + originals.ROOM
    for number, space in enumerate([Space(1, needed - 1, False), Space(1, 1 << 40, True)]):
        root.space_of = space
        why = originals.no_room(root, machine.image.path)
        assert why == ("256 MiB free, 257 MiB needed", "read-only")[number]
    root.space_of = Space(1, needed - 1, False)
    images.confirm(root, built)
    assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=True)
    assert not machine.at(originals.STORE).exists()
    machine.staged = False
    assert restore(machine, built).endswith("its original is not kept")
    assert is_built_anew(machine)


def test_with_just_enough_room_it_is_kept(machine: Machine) -> None:
    built = build(machine)
    root = Var(machine.base)
    root.space_of = Space(1, len(machine.old) + originals.ROOM, False)
    images.confirm(root, built)
    # Asked again (it was killed before it was noted) there is less room: by what is kept.
    root.space_of = Space(1, 0, False)
    images.confirm(root, built)
    originals.keep(root, machine.image.path, machine.image.path, built.before)
    assert restore(machine, built) == ""
    assert machine.is_as_it_was()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_what_cannot_be_kept_does_not_keep_the_new_one_out(machine: Machine, number: int) -> None:
    built = build(machine)
    steps = steps_of(machine, lambda machine: confirm(machine, built))
    of_store = [at for at, step in enumerate(steps, 1) if originals.STORE in step.path]
    assert len(of_store) > 4
    for at in of_store:
        machine = anew(machine)
        built = build(machine)
        machine.hook = At(at, fail(number))
        confirm(machine, built)
        machine.hook = lambda _: None
        assert machine.at(machine.image.path).read_bytes() == content(machine.image, ours=True)
        store = machine.at(originals.STORE)
        assert not store.exists() or copy_of(machine).read_bytes() == machine.old
        machine.staged = False
        said = restore(machine, built)
        assert machine.is_as_it_was() if not said else is_built_anew(machine)


def test_a_copy_that_is_cut_short_is_not_kept(machine: Machine) -> None:
    built = build(machine)
    steps = steps_of(machine, lambda machine: confirm(machine, built))
    at = next(n for n, step in enumerate(steps, 1) if step.action == "write")
    machine = anew(machine)
    built = build(machine)
    machine.hook = At(at, shorten)
    confirm(machine, built)
    assert not machine.at(originals.STORE).exists()


# -- cut off -----------------------------------------------------------------------------


def test_power_cut_while_the_original_is_put_back(machine: Machine) -> None:
    """At each pair of steps: what boots is whole, and another undo brings every byte back."""
    built = confirmed(machine)
    total = len(steps_of(machine, lambda machine: restore(machine, built)))
    for first in range(1, total + 1):
        for second in range(1, total + 2):
            machine = anew(machine)
            built = confirmed(machine)
            machine.hook = At(first, kill)
            assert in_child(lambda: restore(machine, built)) & 127 == 9  # noqa: B023
            assert machine.boots(), (first, second)
            machine.hook = At(second, kill)
            status = in_child(lambda: restore(machine, built))  # noqa: B023
            machine.hook = lambda _: None
            assert machine.boots(), (first, second)
            assert restore(machine, built) == ""
            assert machine.is_as_it_was(), (first, second)
            assert " ".join(machine.image.build) not in machine.ran
            if status == 0:
                break


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPERM])
def test_an_original_that_cannot_be_put_back_is_built_anew(machine: Machine, number: int) -> None:
    """FAT, for one, refuses a mode that it had when it was mounted otherwise."""

    def hook(step: Step) -> None:
        if step.action == "create" and step.path == machine.image.path:
            raise OSError(number, os.strerror(number), step.path)

    built = confirmed(machine)
    machine.hook = hook
    assert "its original could not be put back (" in restore(machine, built)
    machine.hook = lambda _: None
    assert is_built_anew(machine)


def test_power_cut_while_it_is_built_anew_after_all(machine: Machine) -> None:
    """The copy could not be put back, and the tool is cut off: the next undo has the copy."""

    def broken(step: Step) -> None:
        if step.action == "create" and step.path == machine.image.path:
            raise OSError(errno.EIO, "Input/output error", step.path)

    def both(*hooks: Callable[[Step], int | None]) -> Callable[[Step], None]:
        def hook(step: Step) -> None:
            for each in hooks:
                each(step)

        return hook

    built = confirmed(machine)
    counter = Counter()
    machine.hook = both(counter, broken)
    restore(machine, built)
    for number in range(1, len(counter.steps) + 1):
        machine = anew(machine)
        built = confirmed(machine)
        machine.hook = both(At(number, kill), broken)
        assert in_child(lambda: restore(machine, built)) & 127 == 9  # noqa: B023
        machine.hook = lambda _: None
        assert machine.boots(), number
        restore(machine, built)
        assert machine.is_as_it_was() or is_built_anew(machine), number


def test_the_tool_fails_where_the_copy_cannot_be_put_back(machine: Machine) -> None:
    def broken(step: Step) -> None:
        if step.action == "create" and step.path == machine.image.path:
            raise OSError(errno.ENOSPC, "No space left on device", step.path)

    built = confirmed(machine)
    machine.hook, machine.does = broken, "fails"
    with pytest.raises(Failed, match="is as it was"):
        restore(machine, built)
    # Once there is room, the next undo has it.
    machine.hook = lambda _: None
    assert restore(machine, built) == ""
    assert machine.is_as_it_was()


def test_what_a_killed_undo_left_goes_whatever_comes_next(machine: Machine) -> None:
    built = confirmed(machine)
    steps = steps_of(machine, lambda machine: restore(machine, built))
    at = next(n for n, step in enumerate(steps, 1) if step.action == "fsync")
    machine = anew(machine)
    built = confirmed(machine)
    machine.hook = At(at, kill)
    in_child(lambda: restore(machine, built))
    machine.hook = lambda _: None
    assert len(machine.names()) == 2  # half of the original, under a name that nobody looks for
    machine.at(machine.image.path).write_bytes(content(machine.image, ours=True, by="another"))
    restore(machine, built)
    assert is_built_anew(machine)


# -- bounded -----------------------------------------------------------------------------


def test_one_for_each_image_and_none_of_what_was_before(tmp_path: Path) -> None:
    for image in (INITRAMFS, UKI):
        machine = Machine(tmp_path / image.kind, image)
        for _ in range(3):
            confirmed(machine)
            assert os.listdir(machine.at(originals.STORE)) == [Path(image.path).name]
            machine.staged = True
        originals.clear(machine.root)
        assert not machine.at(originals.STORE).exists()


def test_half_a_copy_goes_too(machine: Machine) -> None:
    built = build(machine)
    steps = steps_of(machine, lambda machine: confirm(machine, built))
    at = next(n for n, step in enumerate(steps, 1) if step.action == "write")
    path = machine.image.path
    for drop in (originals.clear, lambda root: originals.drop(root, path)):
        machine = anew(machine)
        built = build(machine)
        machine.hook = At(at, kill)
        in_child(lambda: confirm(machine, built))  # noqa: B023
        machine.hook = lambda _: None
        assert machine.at(originals.STORE).exists()
        drop(machine.root)
        assert not machine.at(originals.STORE).exists()


# -- said --------------------------------------------------------------------------------


def test_what_is_kept_is_said_with_its_size(machine: Machine) -> None:
    confirmed(machine)
    found = originals.look(machine.root, machine.image.path)
    assert (found.path, found.size) == (machine.image.path, len(machine.old))
    assert found.copy == f"/var/lib/infertune/boot-images/{Path(machine.image.path).name}"
    originals.clear(machine.root)
    assert originals.look(machine.root, machine.image.path).size is None


def test_what_only_root_may_see_is_not_known(tmp_path: Path) -> None:
    class Closed(Root):
        def size(self, path: str) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    found = originals.look(Closed(tmp_path), TRIAL.path)
    assert isinstance(found.size, Unknown)
    assert "EACCES" in found.size.why
