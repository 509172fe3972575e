# SPDX-License-Identifier: Apache-2.0
"""A damaged journal is always noticed, and nothing false is ever restored from it."""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infertune.base.errors import Exit
from infertune.base.records import replace
from infertune.base.root import MAX_READ, Root
from infertune.cli.main import main
from infertune.engine.journal import (
    MAX_BYTES,
    PERSISTENT,
    Journal,
    Loaded,
    Record,
    dump,
    left_unclean,
    parse,
)
from infertune.engine.session import ApplyFailed, session
from infertune.engine.state import status
from infertune.engine.store import Store
from support import LONG, apply, build, desired, reset, revert, values

pytestmark = pytest.mark.usefixtures("unflushed")

BOOT = "11111111-2222-3333-4444-555555555555"
THP = Record(
    "transparent_hugepage.enabled",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "madvise",
    "always",
    "always",
    True,
)
SWAP = Record("vm.swappiness", "/proc/sys/vm/swappiness", "60", "10", "10", True)
JOURNAL = Journal(BOOT, "long", "vulkan", "apply (pid 1)", "2026-11-22T00:00:00+00:00", False,
                  ("ksm.run",), None, None, (THP, SWAP))  # fmt: skip


def test_round_trip() -> None:
    loaded = parse(dump(JOURNAL))
    assert loaded.damage == ()
    assert loaded.journal == JOURNAL


text = st.text(max_size=40)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
paths = names.filter(lambda text: ".." not in text).map(lambda text: f"/{text}")


@given(
    st.builds(
        Journal,
        boot_id=text,
        profile=text,
        backend=text,
        owner=text,
        since=text,
        held=st.booleans(),
        without=st.lists(text, max_size=3).map(tuple),
        earlier=st.none() | st.text(min_size=1, max_size=40),
        confirm_by=st.none() | st.floats(0, 1e9),
        records=st.lists(
            st.builds(Record, text, paths, text, st.none() | text, st.none() | text, st.booleans()),
            max_size=5,
        ).map(tuple),
    )
)
def test_round_trip_of_anything(journal: Journal) -> None:
    loaded = parse(dump(journal))
    assert loaded == type(loaded)(journal)


def _check_salvage(damaged: bytes) -> None:
    loaded = parse(damaged)
    assert loaded.damage, "the damage was not noticed"
    if loaded.journal is None:
        return
    assert loaded.journal.boot_id == BOOT
    assert set(loaded.journal.records) <= set(JOURNAL.records)
    assert loaded.journal.profile in (JOURNAL.profile, "unknown")


def test_every_byte_with_every_other_value() -> None:
    """All single-byte changes of a small journal: position x 255 values."""
    data = dump(JOURNAL.with_records([SWAP]))
    for position, byte in enumerate(data):
        for value in range(256):
            if value != byte:
                _check_salvage(data[:position] + bytes([value]) + data[position + 1 :])


def test_every_truncation() -> None:
    data = dump(JOURNAL)
    for length in range(len(data)):
        if length == 0:
            assert parse(b"").damage
        else:
            _check_salvage(data[:length])


def test_lines_that_are_missing_doubled_or_swapped() -> None:
    lines = dump(JOURNAL).splitlines(keepends=True)
    for index in range(len(lines)):
        _check_salvage(b"".join(lines[:index] + lines[index + 1 :]))
        _check_salvage(b"".join([*lines[: index + 1], *lines[index:]]))
    for index in range(len(lines) - 1):
        swapped = lines.copy()
        swapped[index], swapped[index + 1] = swapped[index + 1], swapped[index]
        _check_salvage(b"".join(swapped))


def test_lines_of_two_boots_are_not_mixed() -> None:
    other = dump(replace(JOURNAL, boot_id="another"))
    lines = dump(JOURNAL).splitlines(keepends=True)
    lines[1] = other.splitlines(keepends=True)[1]
    assert parse(b"".join(lines)).journal is None


def _damage(root: Root, data: bytes) -> None:
    """And its copy is gone: what is left is what can be trusted (test_journal_lost.py)."""
    (root.base / "run/infertune/journal").write_bytes(data)
    (root.base / "var/lib/infertune/journal").unlink()


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damaged_start_is_degraded_and_restores_only_what_is_true(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the engine: every seventh byte, and every seventh length."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    tuned = values(tmp_path)
    data = (tmp_path / "run/infertune/journal").read_bytes()
    points = 0
    for position in range(0, len(data), 7):
        reset(tmp_path)
        apply(root, "long", LONG)
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        _damage(root, flipped if kind == "flip" else data[:position])
        assert status(root).state == "degraded"
        with session(root, "start") as ours:
            report = ours.recovered
        assert report is not None
        assert "damaged" in report.notes[0]
        for path, now in values(tmp_path).items():
            assert now in (original[path], tuned[path])
        # It stays visible until somebody has looked.
        after = status(root)
        assert after.state == "degraded"
        assert len(after.damaged) == 1
        kept = tmp_path / after.damaged[0].lstrip("/")
        assert kept.read_bytes() == (tmp_path / "run/infertune/journal.damaged-1").read_bytes()
        # And the machine can be used.  Reverting may leave the energy preference, which the
        # governor locks: the line with the governor's original is the one that was lost.
        apply(root, "long", LONG)
        with contextlib.suppress(ApplyFailed):
            revert(root)
        points += 1
    with capsys.disabled():
        print(f"\n  damaged journal ({kind}): degraded start, nothing false: {points} points")


def test_a_lost_closing_line_loses_no_original(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    data = (tmp_path / "run/infertune/journal").read_bytes()
    _damage(root, b"".join(data.splitlines(keepends=True)[:-1]))
    with session(root, "start"):
        pass
    assert values(tmp_path) == original


def test_a_journal_of_an_earlier_boot_is_not_restored(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("another\n")
    (tmp_path / "proc/sys/vm/swappiness").write_text("33\n")
    now = status(root)
    assert now.state == "idle"
    assert any("an earlier boot ended while 'long' was applied" in note for note in now.notes)
    assert any("platform_profile" in note for note in now.notes)
    revert(root)
    assert (tmp_path / "proc/sys/vm/swappiness").read_text() == "33\n"


def test_a_switch_to_what_is_safe_is_nothing_to_be_warned_of(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "long", LONG)
    lasting = Store(root, PERSISTENT).load().journal
    assert left_unclean(lasting, "another")
    apply(root, "low", {"vm.swappiness": 1})
    assert left_unclean(Store(root, PERSISTENT).load().journal, "another") is None


def test_a_giant_journal_is_refused(tmp_path: Path) -> None:
    store = Store(Root(tmp_path), "/journal")
    (tmp_path / "journal").write_bytes(b"x" * (2 * 1024 * 1024))
    assert store.load().journal is None
    assert store.load().damage


@pytest.mark.parametrize("size", [MAX_BYTES - 1000, MAX_BYTES + 1000, MAX_READ + 1000])
def test_what_can_be_written_can_be_read(size: int, tmp_path: Path) -> None:
    store = Store(Root(tmp_path), "/run/journal")
    large = JOURNAL.with_records([THP, replace(SWAP, original="6" * (size - 1000))])
    if size > MAX_BYTES:
        with pytest.raises(OSError, match="too large"):
            store.save(large)
        assert store.load() == Loaded(None)
    else:
        store.save(large)
        assert store.load() == Loaded(large)


def _with(line: int, **fields: object) -> bytes:
    """JOURNAL with other fields in one of its lines, and checksums that are right."""
    lines = [json.loads(text.partition(b" ")[2]) for text in dump(JOURNAL).splitlines()[:-1]]
    lines[line].update(fields)

    def sealed(fields: object) -> bytes:
        text = json.dumps(fields).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)

    body = b"".join(map(sealed, lines))
    return body + sealed({"end": len(lines) - 1, "crc": f"{zlib.crc32(body):08x}"})


WRONG = [
    *((0, name, value) for name in ("profile", "backend", "owner", "since", "earlier")
      for value in (5, ["x"], "\ud800")),
    *((0, "held", value) for value in (1, "yes", None)),
    *((0, "without", value) for value in (5, "ksm.run", [5], {"ksm.run": 1}, None)),
    *((0, "confirm_by", value) for value in (10**400, -1, "5", [], float("nan"), float("inf"))),
    *((2, name, value) for name in ("knob", "path", "original", "ours", "want")
      for value in (5, [], "\udfff")),
    (2, "path", "/sys/\0"),
    (2, "settled", 1),
]  # fmt: skip


@pytest.mark.parametrize(("line", "name", "value"), WRONG)
def test_a_right_checksum_is_no_check(line: int, name: str, value: object, tmp_path: Path) -> None:
    """Damaged is what is not of its kind, too: said, set aside, and the rest of it restored."""
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", {"transparent_hugepage.enabled": "always", "vm.swappiness": 10})
    assert parse(_with(0)) == Loaded(JOURNAL)
    _damage(root, _with(line, **{name: value}))
    assert status(root).state == "degraded"
    with session(root, "start") as ours:
        assert ours.recovered is not None
        assert "damaged" in ours.recovered.notes[0]
    left = {"/proc/sys/vm/swappiness"} if line else set()
    assert {path for path, now in values(tmp_path).items() if now != original[path]} == left
    assert status(root).damaged == ("/run/infertune/journal.damaged-1",)


@pytest.mark.parametrize("path", ["run/infertune/journal", "var/lib/infertune/journal"])
def test_a_directory_in_its_place_is_set_aside(path: str, tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    (tmp_path / path / "within").mkdir(parents=True)
    assert status(root).state == "degraded"
    with session(root, "apply") as ours:
        report = ours.apply(desired("long", LONG))
    said = (report, *filter(None, [ours.recovered]))
    assert any("damaged" in note for each in said for note in each.notes)
    assert (tmp_path / f"{path}.damaged-1" / "within").is_dir()
    assert (tmp_path / path).is_file()
    assert status(root).damaged == (f"/{path}.damaged-1",)
    revert(root)
    assert values(tmp_path) == original


def test_a_damaged_lasting_journal_does_not_stop_a_revert(tmp_path: Path) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    apply(root, "long", LONG)
    (tmp_path / "var/lib/infertune/journal").write_text("nonsense\n")
    assert main(["--root", str(tmp_path), "revert"]) == Exit.DIFFERS
    assert values(tmp_path) == original
    assert status(root).damaged == ("/var/lib/infertune/journal.damaged-1",)
