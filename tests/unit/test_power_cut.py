# SPDX-License-Identifier: Apache-2.0
"""A power cut at every step: whatever of the unflushed is on the disk then.

/run is gone with the boot and the kernel's values are its own again.  What a name in /var leads to
is anybody's guess until its directory is flushed: the old file, or any that replaced it since; and
nothing, where a file was renamed before it was flushed itself.  The guest tests cut the power of a
real disk; they cannot choose what it loses.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.root import Root, Step
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.knobs.live import is_file_of
from infertune.engine.journal import PERSISTENT, find
from infertune.engine.session import ApplyFailed, session
from infertune.engine.state import after_unclean_shutdown, status
from support import (
    FILES,
    LONG,
    QUIET,
    Counter,
    Values,
    apply,
    build,
    desired,
    recover,
    reset,
    revert,
    values,
    with_hook,
)

pytestmark = pytest.mark.usefixtures("unflushed")

HOME, PARENT = "/var/lib/infertune", "/var/lib"
RISKY = {
    path: knob.id
    for path in FILES
    for knob in KNOBS.values()
    if knob.risk != "safe" and is_file_of(knob, path)
}
SAFE: Values = {"vm.swappiness": 1}

Cut = tuple[bytes | None, frozenset[str]]
"""What the copy may be after a power cut, and which risky knobs were in force."""


class Killed(BaseException):
    """As kill -9: no handler for errors catches it."""


class Disk:
    """A hook that knows at every step what a power cut may leave of the copy."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._copy = base / PERSISTENT.lstrip("/")
        self._may: set[bytes | None] = {None}
        self._flushed = self._named = False
        self._last: Step | None = None
        self.left = 0
        """Steps until it kills; 0 for never."""
        self.failing: str | None = None
        """End of the path of a kernel file that refuses its value."""
        self.cuts: set[Cut] = set()

    def look(self) -> None:
        """Note what the step before has done, and what a cut would leave now."""
        last, now = self._last, self._read()
        self._last = None
        if last and last.path == PERSISTENT and last.action == "rename" and not self._flushed:
            self._may.add(b"")
        self._may.add(now)
        if last and last.action == "sync-directory":
            self._named |= last.path == PARENT
            if last.path == HOME:
                self._may = {now}
        left = self._may if self._named else self._may | {None}
        tuned = frozenset(
            knob
            for path, knob in RISKY.items()
            if (self._base / path.lstrip("/")).read_text() != FILES[path]
        )
        self.cuts |= {(copy, tuned) for copy in left}

    def __call__(self, step: Step) -> None:
        self.look()
        self._last = step
        if step.path == PERSISTENT and step.action in ("create", "fsync"):
            self._flushed = step.action == "fsync"
        self.left -= 1
        if self.left == 0:
            self._last = None
            raise Killed
        if self.failing and step.action == "write" and step.path.endswith(self.failing):
            self._last = self.failing = None
            raise OSError(errno.EINVAL, "as if", step.path)

    def _read(self) -> bytes | None:
        return self._copy.read_bytes() if self._copy.exists() else None


def _after(base: Path, copy: bytes | None) -> Root:
    """The machine when it has power again; somebody has set another value since."""
    reset(base)
    (base / "proc/sys/kernel/random/boot_id").write_text("another\n")
    (base / "proc/sys/vm/swappiness").write_text("33\n")
    if copy is not None:
        (base / HOME.lstrip("/")).mkdir()
        (base / PERSISTENT.lstrip("/")).write_bytes(copy)
    return build_root(base)


def build_root(base: Path, hook: Callable[[Step], None] | None = None) -> Root:
    return with_hook(base, hook or Counter())


def _check(base: Path, cut: Cut) -> None:
    """Nothing is ours in the new boot; what was risky is known; the next call works as ever."""
    copy, tuned = cut
    root = _after(base, copy)
    fresh = values(base)
    assert status(root).state == "idle"
    unclean = find(root).unclean
    assert tuned <= {record.knob for record in (unclean.records if unclean else ())}
    steps = Counter()
    with session(build_root(base, steps), "start") as ours:
        assert ours.recovered is None
    assert {step.action for step in steps.steps} <= {"lock", "mkdir", "sync-directory"}
    apply(root, "long", LONG)
    revert(root)
    assert values(base) == fresh


def _long(root: Root) -> None:
    apply(root, "long", LONG)


def _quiet(root: Root) -> None:
    apply(root, "quiet", QUIET)


def _safe(root: Root) -> None:
    apply(root, "safe", SAFE)


def _run(root: Root) -> None:
    with session(root, "run long") as ours:
        ours.apply(desired("long", LONG), hold=True)
        ours.revert()


def _confirmed(root: Root) -> None:
    with session(root, "apply long") as ours:
        ours.apply(desired("long", LONG), confirm_by=1.0)
        ours.confirm()


CALLS: dict[str, tuple[Callable[[Root], None], ...]] = {
    "apply and revert": (_long, revert),
    "the same again": (_long, _long, revert),
    "switch": (_safe, _long, _quiet, _safe, revert),
    "run": (_run,),
    "run over another": (_quiet, _run),
    "confirm": (_confirmed, revert, _confirmed),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_power_cut_at_every_step(name: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    build(tmp_path)
    for call in CALLS[name]:
        call(with_hook(tmp_path, disk))
        disk.look()
    assert len({copy for copy, _ in disk.cuts}) > 2
    assert any(tuned for _, tuned in disk.cuts)
    for cut in disk.cuts:
        _check(tmp_path, cut)


@pytest.mark.parametrize("before", [None, _quiet])
def test_a_power_cut_while_a_failed_apply_goes_back(
    before: Callable[[Root], None] | None, tmp_path: Path
) -> None:
    disk = Disk(tmp_path)
    root = build(tmp_path)
    root = with_hook(tmp_path, disk)
    if before:
        before(root)
    disk.failing = "platform_profile"
    with pytest.raises(ApplyFailed):
        _long(root)
    disk.look()
    for cut in disk.cuts:
        _check(tmp_path, cut)


@pytest.mark.parametrize(
    ("before", "killed"), [(None, _long), (_long, _quiet), (_long, revert)],
    ids=["apply", "switch", "revert"],
)  # fmt: skip
def test_a_power_cut_after_a_kill(
    before: Callable[[Root], None] | None, killed: Callable[[Root], None], tmp_path: Path
) -> None:
    """A kill at every step, and the power goes at any step of the recovery."""
    cuts: set[Cut] = set()
    number = 0
    while True:
        number += 1
        disk = Disk(tmp_path)
        shutil.rmtree(tmp_path)
        build(tmp_path)
        if before:
            before(with_hook(tmp_path, disk))
        disk.left = number
        with contextlib.suppress(Killed):
            killed(with_hook(tmp_path, disk))
        over, disk.left = disk.left > 0, 0
        recover(with_hook(tmp_path, disk))
        disk.look()
        cuts |= disk.cuts
        assert values(tmp_path) == FILES
        if over:
            break
    assert number > 15
    for cut in cuts:
        _check(tmp_path, cut)


def test_a_revert_that_is_over_stays_over(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    build(tmp_path)
    root = with_hook(tmp_path, disk)
    _long(root)
    revert(root)
    disk.cuts.clear()
    disk.look()
    assert disk.cuts == {(None, frozenset())}


@pytest.mark.parametrize(("left", "profile"), [(0, None), (50, None), (-1, "long")])
def test_a_copy_that_is_torn_all_the_same(left: int, profile: str | None, tmp_path: Path) -> None:
    """On FAT, or by a disk that lies: it is said, and nothing is written."""
    build(tmp_path)
    _long(build_root(tmp_path))
    root = _after(tmp_path, (tmp_path / PERSISTENT.lstrip("/")).read_bytes()[:left])
    fresh = values(tmp_path)
    assert status(root).state == "degraded"
    assert after_unclean_shutdown(root) == profile
    recover(root)
    assert values(tmp_path) == fresh
