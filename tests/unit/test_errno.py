# SPDX-License-Identifier: Apache-2.0
"""Every step fails with every errno, and every write is cut short: nothing stays half done."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.errors import Exit, InfertuneError
from infertune.base.root import Root, Step
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.values import Value
from infertune.engine.session import ApplyFailed, session
from infertune.engine.state import status
from support import (
    LONG,
    QUIET,
    At,
    Counter,
    apply,
    build,
    desired,
    fail,
    recover,
    reset,
    revert,
    shorten,
    values,
    with_hook,
)

pytestmark = pytest.mark.usefixtures("unflushed")

FAULTS: dict[str, Callable[[Step], int | None]] = {
    name: fail(getattr(errno, name))
    for name in (
        "ENOSPC", "EROFS", "EIO", "EPERM", "EACCES", "EBUSY", "EINVAL", "ENOENT", "ENODEV", "EINTR",
    )
}  # fmt: skip
FAULTS["short write"] = shorten


def _switch(root: Root) -> None:
    apply(root, "quiet", QUIET)


def _apply(root: Root) -> None:
    apply(root, "long", LONG)


def _nothing(root: Root) -> None:
    return None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("before", "verb"), [(_nothing, _apply), (_apply, _switch)], ids=["apply", "switch"]
)
def test_a_failed_step_rolls_back(
    before: Callable[[Root], None], verb: Callable[[Root], None], fault: str, tmp_path: Path
) -> None:
    build(tmp_path)
    original = values(tmp_path)
    counter = Counter()
    before(build(tmp_path))
    verb(with_hook(tmp_path, counter))
    for number, step in enumerate(counter.steps, start=1):
        if fault == "short write" and not step.size:
            continue
        if step.action in ("mkdir", "lock") and step.path.startswith("/var/"):
            continue  # test_a_lock_that_var_does_not_take
        if step.action == "sync-directory" and (
            step.path == "/var/lib" or (step.path == "/run" and fault == "EINVAL")
        ):
            continue  # for the directory of a lock: test_a_new_directory_is_durable
        if (
            fault == "EROFS"
            and step.action == "lock"
            and (tmp_path / "run/infertune/lock").exists()
        ):
            continue  # had all the same: test_a_revert_with_a_read_only_run
        reset(tmp_path)
        before(build(tmp_path))
        there = values(tmp_path)
        hook = At(number, FAULTS[fault])
        with pytest.raises(InfertuneError) as caught:
            verb(with_hook(tmp_path, hook))
        assert hook.hit == step
        _check_error(caught.value, fault, step)
        assert values(tmp_path) == there, f"{fault} at {step} left something changed"
        # The machine is not stuck: the same call works now, and everything can go back.
        verb(build_root(tmp_path))
        revert(build_root(tmp_path))
        assert values(tmp_path) == original, f"after {fault} at {step}"


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"short write"}))
def test_a_lock_that_var_does_not_take(fault: str, tmp_path: Path) -> None:
    """Its second place keeps nobody from going on, least of all back."""
    build(tmp_path)
    original = values(tmp_path)
    _apply(build_root(tmp_path))
    counter = Counter()
    revert(with_hook(tmp_path, counter))
    [number] = [
        number
        for number, step in enumerate(counter.steps, start=1)
        if step.action == "lock" and step.path.startswith("/var/")
    ]
    _apply(build_root(tmp_path))
    revert(with_hook(tmp_path, At(number, FAULTS[fault])))
    assert values(tmp_path) == original


def _check_error(error: InfertuneError, fault: str, step: Step) -> None:
    """One line that names the knob (or the journal) and the errno, and the right exit code."""
    # The half of a value that gets through may itself be refused ("alw" for "always").
    names = ("EIO", "EINVAL") if fault == "short write" else (fault,)
    assert any(name in error.message for name in names)
    assert "\n" not in error.message
    before_any_change = "nothing was touched" in error.message
    if before_any_change and fault in ("EPERM", "EACCES"):
        assert error.exit_code == Exit.NOT_PERMITTED
        return
    assert error.exit_code == Exit.FAILED
    if not before_any_change:
        subject = error.message.partition(":")[0]
        assert subject == "journal" or subject in KNOBS
        if step.path.startswith(("/sys", "/proc")):
            assert step.path in {
                file for knob in [KNOBS[subject]] for file in _files(knob.paths, step)
            }
        assert "rolled back" in error.message


def _files(patterns: tuple[str, ...], step: Step) -> list[str]:
    return [step.path for pattern in patterns if Path(step.path).match(pattern)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_step_does_not_stop_a_revert(fault: str, tmp_path: Path) -> None:
    build(tmp_path)
    original = values(tmp_path)
    _apply(build_root(tmp_path))
    counter = Counter()
    revert(with_hook(tmp_path, counter))
    for number, step in enumerate(counter.steps, start=1):
        if fault == "short write" and not step.size:
            continue
        reset(tmp_path)
        _apply(build_root(tmp_path))
        hook = At(number, FAULTS[fault])
        error = _error_of(lambda hook=hook: revert(with_hook(tmp_path, hook)))  # type: ignore[misc]
        if error is not None:
            assert error.exit_code in (Exit.FAILED, Exit.NOT_PERMITTED)
            if "nothing was touched" in error.message:
                recover(build_root(tmp_path))
        # A passing fault on a knob is tried twice; a journal that cannot be written does not
        # keep the values from going back.
        assert values(tmp_path) == original, f"{fault} at {step}"
        recover(build_root(tmp_path))
        assert values(tmp_path) == original


def test_a_file_that_was_rolled_back_is_called_that(tmp_path: Path) -> None:
    build(tmp_path)

    def broken(step: Step) -> int | None:
        return fail(errno.EIO)(step) if step.path.endswith("/platform_profile") else None

    failed = pytest.raises(ApplyFailed)
    with session(with_hook(tmp_path, broken), "apply") as ours, failed as caught:
        ours.apply(desired("long", LONG))
    outcomes = {(item.knob, item.outcome) for item in caught.value.report.items}
    assert {("vm.swappiness", "rolled-back"), ("platform_profile", "rejected")} <= outcomes
    assert "applied" not in {outcome for _, outcome in outcomes}


def test_a_revert_with_a_read_only_run(tmp_path: Path) -> None:
    build(tmp_path)
    original = values(tmp_path)
    _apply(build_root(tmp_path))

    def read_only(step: Step) -> None:
        if step.path.startswith("/run"):
            raise OSError(errno.EROFS, "Read-only file system", step.path)

    with pytest.raises(ApplyFailed, match="journal: EROFS"):
        revert(with_hook(tmp_path, read_only))
    assert values(tmp_path) == original
    with pytest.raises(ApplyFailed, match="journal: EROFS"):
        _apply(with_hook(tmp_path, read_only))
    assert values(tmp_path) == original


def _error_of(call: Callable[[], None]) -> InfertuneError | None:
    try:
        call()
    except InfertuneError as error:
        return error
    return None


@pytest.mark.parametrize("number", [errno.EIO, errno.EBUSY, errno.EPERM])
def test_a_file_that_keeps_refusing_keeps_its_record(number: int, tmp_path: Path) -> None:
    """One stubborn file: the others go back, exit code 3, and a later try succeeds."""
    build(tmp_path)
    original = values(tmp_path)
    _apply(build_root(tmp_path))

    def stubborn(step: Step) -> int | None:
        if step.path == "/proc/sys/vm/swappiness":
            return fail(number)(step)  # type: ignore[func-returns-value]
        return None

    with pytest.raises(ApplyFailed) as caught:
        revert(with_hook(tmp_path, stubborn))
    assert caught.value.exit_code == Exit.FAILED
    assert caught.value.message.startswith(f"vm.swappiness: {errno.errorcode[number]}")
    now = values(tmp_path)
    assert now.pop("/proc/sys/vm/swappiness") == "10\n"
    assert now == {k: v for k, v in original.items() if k != "/proc/sys/vm/swappiness"}
    recover(build_root(tmp_path))
    assert values(tmp_path) == original


def test_a_value_that_a_table_has_no_row_for_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had when it was planned: what was written before goes back, as with any other refusal."""
    build(tmp_path)
    original = values(tmp_path)

    def encode(value: Value, canonical: str, raw: bytes) -> str:
        if canonical == "10":
            raise ValueError("the table has no entry 10")
        return canonical

    monkeypatch.setattr(Value, "encode", encode)
    with pytest.raises(ApplyFailed, match=r"EINVAL \(the table has no entry 10\).*rolled back"):
        _apply(build_root(tmp_path))
    assert values(tmp_path) == original
    assert status(build_root(tmp_path)).state == "idle"


def test_a_stubborn_file_in_a_rollback_is_not_forgotten(tmp_path: Path) -> None:
    """Writing fails, and putting back fails too: the journal keeps the original."""
    build(tmp_path)
    original = values(tmp_path)

    def bad_disk(step: Step) -> int | None:
        if step.path == "/sys/firmware/acpi/platform_profile":
            return fail(errno.EIO)(step)  # type: ignore[func-returns-value]
        if step.path == "/proc/sys/vm/swappiness" and swapped:
            return fail(errno.EIO)(step)  # type: ignore[func-returns-value]
        if step.path == "/proc/sys/vm/swappiness":
            swapped.append(step)
        return None

    swapped: list[Step] = []
    with pytest.raises(ApplyFailed, match="1 files could not be rolled back"):
        _apply(with_hook(tmp_path, bad_disk))
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "10\n"
    recover(build_root(tmp_path))
    assert values(tmp_path) == original


def test_required_knob_that_is_absent_stops_everything(tmp_path: Path) -> None:
    build(tmp_path)
    counter = Counter()
    root = with_hook(tmp_path, counter)
    with (
        session(root, "apply x") as ours,
        pytest.raises(ApplyFailed, match=r"cpufreq\.boost: absent, but x\.toml:2 requires it"),
    ):
        ours.apply(desired("x", {"vm.swappiness": 1, "cpufreq.boost": True}, required=True))
    assert {step.action for step in counter.steps} <= {"mkdir", "lock", "sync-directory"}


def build_root(base: Path) -> Root:
    """The machine as it is, without the fault."""
    return with_hook(base, Counter())
