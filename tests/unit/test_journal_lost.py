# SPDX-License-Identifier: Apache-2.0
"""The journal has two places: what one loses, the other has, and nobody says ``idle``."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.base.errors import Busy, Exit, Failed
from infertune.base.root import Root, Step
from infertune.cli.main import main
from infertune.engine.journal import PERSISTENT, RUNTIME, STATES, Loaded
from infertune.engine.session import ApplyFailed, session
from infertune.engine.state import after_unclean_shutdown, status
from infertune.engine.store import Journals, Store
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.runner import collect
from support import (
    LONG,
    QUIET,
    Counter,
    apply,
    build,
    desired,
    recover,
    revert,
    values,
    with_hook,
)

pytestmark = pytest.mark.usefixtures("unflushed")

SWAPPINESS = "/proc/sys/vm/swappiness"
BEFORE = Path(__file__).parents[1] / "fixtures" / "journal-risky-copy"
"""Both files as infertune wrote them when the copy held risky knobs only (LONG applied)."""


def _lose(root: Root, directory: str = "run/infertune") -> None:
    shutil.rmtree(root.base / directory)


def _another_boot(root: Root) -> None:
    (root.base / "proc/sys/kernel/random/boot_id").write_text("another\n")
    shutil.rmtree(root.base / "run/infertune", ignore_errors=True)


def _state(root: Root) -> str:
    """What status says; the exporter must say the same."""
    said = status(root).state
    result = collect(COLLECTORS["journal"], root)
    assert result.state == "ok", result.why
    states = {
        each.labels[0]: each.value
        for each in result.samples
        if each.metric == "infertune_journal_state"
    }
    assert states == {state: float(state == said) for state in STATES}
    return said


def test_a_lost_run_loses_nothing(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    tuned = values(tmp_path)
    _lose(root)
    assert _state(root) == "applied"
    now = status(root)
    assert {item.outcome for item in now.items} == {"already"}
    assert now.notes == (f"{RUNTIME} was lost; its copy in {PERSISTENT} is used",)
    assert values(tmp_path) == tuned
    revert(root)
    assert values(tmp_path) == original
    assert Store(root, PERSISTENT).load() == Loaded(None)
    assert _state(root) == "idle"


@pytest.mark.parametrize("verb", ["revert", "recover"])
def test_the_command_line_after_a_lost_run(verb: str, tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "low", {"vm.swappiness": 1})
    _lose(root)
    assert main(["--root", str(tmp_path), "status"]) == Exit.DONE
    assert main(["--root", str(tmp_path), verb]) == Exit.DONE
    assert values(tmp_path) == original


def test_a_later_apply_takes_no_tuned_value_for_an_original(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    _lose(root)
    apply(root, "quiet", QUIET)
    assert values(tmp_path)[SWAPPINESS] == "1\n"
    _lose(root)
    revert(root)
    assert values(tmp_path) == original


def test_a_lost_run_keeps_what_somebody_set_since(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    _lose(root)
    (tmp_path / SWAPPINESS.lstrip("/")).write_text("33\n")
    revert(root)
    assert values(tmp_path)[SWAPPINESS] == "33\n"


def test_a_lost_run_of_a_session_that_is_gone(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    with session(root, "run long") as ours:
        ours.apply(desired("long", LONG), hold=True)
    _lose(root)
    assert _state(root) == "interrupted"
    with session(root, "status") as ours:
        assert ours.recovered is not None
    assert values(tmp_path) == original


def test_the_place_that_was_lost_is_written_again(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    kept = Store(root, RUNTIME).load()
    for directory in ("run/infertune", "var/lib/infertune"):
        _lose(root, directory)
        with session(root, "start") as ours:
            assert ours.recovered is None
        assert Store(root, RUNTIME).load() == Store(root, PERSISTENT).load() == kept


def test_a_session_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    apply(build(tmp_path), "long", LONG)
    counter = Counter()
    with session(with_hook(tmp_path, counter), "start"):
        pass
    assert [step.action for step in counter.steps] == ["lock", "lock"]


@pytest.mark.parametrize("lost", ["run/infertune", "var/lib/infertune"])
def test_whoever_holds_the_machine_does_so_without_its_file(lost: str, tmp_path: Path) -> None:
    root = build(tmp_path)
    with session(root, "first") as ours:
        ours.apply(desired("long", LONG))
        tuned = values(tmp_path)
        _lose(root, lost)
        assert "held by first" in status(root).notes[-1]
        with pytest.raises(Busy, match="first"), session(root, "second"):
            pass
        # Nor does who failed leave a lock that is anybody's.
        with pytest.raises(Busy, match="first"), session(root, "third"):
            pass
        assert values(tmp_path) == tuned
    with session(root, "second"):
        pass


def _steps(base: Path, work: Callable[[Root], None]) -> list[str]:
    """What is flushed, and when kernel files are written: the first of several in a row."""
    counter = Counter()
    work(with_hook(base, counter))
    told = []
    for step in counter.steps:
        if step.action in ("fsync", "sync-directory"):
            told.append(f"{step.action} {step.path}")
        elif step.path.startswith(("/proc", "/sys")) and told[-1:] != ["write"]:
            told.append("write")
    return told


def test_what_a_power_cut_may_not_undo_is_on_disk_first_and_nothing_else(tmp_path: Path) -> None:
    """The copy names what is risky before it is in force; what comes later may as well be old."""
    build(tmp_path)
    copy, journal = f"fsync {PERSISTENT}", f"fsync {RUNTIME}"
    on_disk = [copy, copy, f"sync-directory {PERSISTENT.rpartition('/')[0]}"]
    gone = [f"sync-directory {path.rpartition('/')[0]}" for path in (PERSISTENT, RUNTIME)]
    applied = _steps(tmp_path, lambda root: apply(root, "long", LONG))
    made = ["sync-directory /run", "sync-directory /var/lib"]
    assert applied == [*made, *on_disk, journal, "write", copy, journal]
    assert _steps(tmp_path, lambda root: apply(root, "long", LONG)) == [*on_disk, journal]
    assert _steps(tmp_path, revert) == [copy, journal, "write", *gone]


@pytest.mark.parametrize("verb", [lambda root: apply(root, "quiet", QUIET), revert])
def test_a_session_reads_each_place_once(
    verb: Callable[[Root], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    read, really = [], Root.read_bytes

    def watched(root: Root, path: str) -> bytes:
        if path in (RUNTIME, PERSISTENT):
            read.append(path)
        return really(root, path)

    monkeypatch.setattr(Root, "read_bytes", watched)
    verb(root)
    assert sorted(read) == [RUNTIME, PERSISTENT]


def test_a_session_whose_journals_vanish_puts_everything_back(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    with session(root, "run long") as ours:
        ours.apply(desired("long", LONG), hold=True)
        for directory in ("run/infertune", "var/lib/infertune"):
            _lose(root, directory)
        ours.revert()
    assert values(tmp_path) == original
    assert _state(root) == "idle"


@pytest.mark.parametrize("text", [b"", b"nonsense\n"], ids=["empty", "nonsense"])
def test_a_damaged_journal_has_a_copy(text: bytes, tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / RUNTIME.lstrip("/")).write_bytes(text)
    assert _state(root) == "degraded"
    recover(root)
    assert values(tmp_path) == original
    assert status(root).damaged == (f"{RUNTIME}.damaged-1",)


def test_a_lost_run_and_a_damaged_copy(tmp_path: Path) -> None:
    """What can be trusted goes back, the rest is said: never idle."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", {"transparent_hugepage.enabled": "always", "vm.swappiness": 10})
    copy = tmp_path / PERSISTENT.lstrip("/")
    copy.write_bytes(copy.read_bytes().replace(b'"original":"60"', b'"original":"61"'))
    _lose(root)
    assert _state(root) == "degraded"
    with session(root, "start") as ours:
        assert ours.recovered is not None
        assert any("the lasting journal was damaged" in note for note in ours.recovered.notes)
    left = {path for path, now in values(tmp_path).items() if now != original[path]}
    assert left == {SWAPPINESS}
    assert _state(root) == "degraded"
    assert status(root).damaged == (f"{PERSISTENT}.damaged-1",)


def test_nothing_of_a_lost_run_can_be_trusted(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / PERSISTENT.lstrip("/")).write_text("nonsense\n")
    _lose(root)
    with session(root, "start") as ours:
        assert ours.recovered is not None
        assert "nothing in it could be trusted, so nothing was put back" in ours.recovered.notes
    assert _state(root) == "degraded"


def test_a_damaged_copy_is_not_written_over_unseen(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / PERSISTENT.lstrip("/")).write_text("nonsense\n")
    with session(root, "start"):
        pass
    assert _state(root) == "degraded"
    apply(root, "quiet", QUIET)
    assert (tmp_path / f"{PERSISTENT}.damaged-1".lstrip("/")).read_text() == "nonsense\n"
    assert Store(root, PERSISTENT).load() == Store(root, RUNTIME).load()
    revert(root)
    assert values(tmp_path) == original


def test_a_copy_that_was_left_over_undoes_nothing_of_others(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "low", {"vm.swappiness": 1})
    left = (tmp_path / PERSISTENT.lstrip("/")).read_bytes()
    revert(root)
    (tmp_path / PERSISTENT.lstrip("/")).write_bytes(left)
    (tmp_path / SWAPPINESS.lstrip("/")).write_text("33\n")
    recover(root)
    assert values(tmp_path)[SWAPPINESS] == "33\n"
    assert _state(root) == "idle"


def test_a_copy_of_an_earlier_boot(tmp_path: Path) -> None:
    """Its values are gone; only what is risky is worth a word."""
    root = build(tmp_path)
    apply(root, "low", {"vm.swappiness": 1})
    _another_boot(root)
    assert _state(root) == "idle"
    assert status(root).notes == ()
    assert after_unclean_shutdown(root) is None
    (tmp_path / SWAPPINESS.lstrip("/")).write_text("1\n")
    revert(root)
    assert values(tmp_path)[SWAPPINESS] == "1\n"
    apply(root, "long", LONG)
    assert after_unclean_shutdown(root) is None
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("a third\n")
    assert after_unclean_shutdown(root) == "long"


# -- a /var that takes nothing ---------------------------------------------------


def _var(number: int, *actions: str) -> Callable[[Step], None]:
    """A hook: what is done to /var fails; with ``actions`` only these."""

    def act(step: Step) -> None:
        if step.path.startswith("/var") and (not actions or step.action in actions):
            raise OSError(number, "as if", step.path)

    return act


READ_ONLY = _var(errno.EROFS)
FULL = _var(errno.ENOSPC, "mkdir", "create", "write")


@pytest.mark.parametrize("hook", [READ_ONLY, FULL], ids=["read-only", "full"])
def test_no_apply_without_a_copy(hook: Callable[[Step], None], tmp_path: Path) -> None:
    build(tmp_path)
    original = values(tmp_path)
    written: list[Step] = []

    def watched(step: Step) -> None:
        hook(step)
        written.append(step)

    with pytest.raises(ApplyFailed, match="nothing had been written") as caught:
        apply(with_hook(tmp_path, watched), "low", {"vm.swappiness": 1})
    assert "/var/lib/infertune" in caught.value.message
    assert not [step for step in written if step.path.startswith(("/proc", "/sys"))]
    assert values(tmp_path) == original
    assert _state(build_root(tmp_path)) == "idle"


def test_a_revert_with_a_full_var(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    revert(with_hook(tmp_path, FULL))
    assert values(tmp_path) == original
    assert _state(root) == "idle"


def test_a_revert_with_a_read_only_var(tmp_path: Path) -> None:
    """The values go back and it is said; nobody's value is taken for ours afterwards."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    with pytest.raises(ApplyFailed, match="journal: EROFS"):
        revert(with_hook(tmp_path, READ_ONLY))
    assert values(tmp_path) == original
    (tmp_path / SWAPPINESS.lstrip("/")).write_text("33\n")
    with pytest.raises(ApplyFailed, match="journal: EROFS"):
        revert(with_hook(tmp_path, READ_ONLY))
    revert(root)
    assert values(tmp_path) == {**original, SWAPPINESS: "33\n"}
    assert _state(root) == "idle"


def test_a_confirmation_that_cannot_be_noted_is_none(tmp_path: Path) -> None:
    with session(build(tmp_path), "apply") as ours:
        ours.apply(desired("long", LONG), confirm_by=1.0)
    with session(with_hook(tmp_path, FULL), "confirm") as ours:
        with pytest.raises(Failed, match="ENOSPC"):
            ours.confirm()
        assert ours.applied
        assert ours.applied.confirm_by == 1.0


def test_a_damaged_copy_that_cannot_be_set_aside_stops_no_revert(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / PERSISTENT.lstrip("/")).write_text("nonsense\n")
    with pytest.raises(Failed, match=r"EROFS .*nothing was touched"):
        apply(with_hook(tmp_path, READ_ONLY), "quiet", QUIET)
    with pytest.raises(Failed, match="EROFS"):
        revert(with_hook(tmp_path, READ_ONLY))
    assert values(tmp_path) == original


# -- what an earlier version wrote -----------------------------------------------


def _as_before(root: Root) -> None:
    """LONG is applied, and both files are those of the earlier version."""
    apply(root, "long", LONG)
    for name, path in (("runtime", RUNTIME), ("lasting", PERSISTENT)):
        shutil.copy(BEFORE / name, root.base / path.lstrip("/"))


def test_journals_of_the_version_before(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    _as_before(root)
    assert _state(root) == "applied"
    # Whatever comes first completes the copy.
    with session(root, "start") as ours:
        assert ours.recovered is None
    _lose(root)
    assert _state(root) == "applied"
    revert(root)
    assert values(tmp_path) == original
    assert Journals(root).load() == Loaded(None)


def test_a_copy_of_the_version_before_and_of_an_earlier_boot(tmp_path: Path) -> None:
    root = build(tmp_path)
    _as_before(root)
    _another_boot(root)
    assert after_unclean_shutdown(root) == "long"
    assert _state(root) == "idle"
    assert any("cpufreq.scaling_governor" in n for n in status(root).notes)


def build_root(base: Path) -> Root:
    """The machine as it is, without the fault."""
    return with_hook(base, Counter())
