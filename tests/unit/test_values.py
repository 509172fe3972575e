# SPDX-License-Identifier: Apache-2.0
"""The kernel's ways to write a value, read and written back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infertune.base.recorded import as_the_kernel_would
from infertune.base.units import GIB, format_cpulist, format_size, parse_cpulist, parse_size
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.values import Choice, Integer, QosRequest, Size, Switch, Table

THP = Choice(("always", "madvise", "never"))
MODES = Table(("BOOTUP_DEFAULT", "3D_FULL_SCREEN", "COMPUTE"), fixed=("CUSTOM",))

ROWS = b"""NUM        MODE_NAME     SCLK_UP_HYST
  0   BOOTUP_DEFAULT*:        -        0
  1   3D_FULL_SCREEN :        0      100
  5          COMPUTE :        0        5
"""
COLUMNS = b"""             0 BOOTUP_DEFAULT* 1 3D_FULL_SCREEN  5        COMPUTE  6         CUSTOM
 0(       GFXCLK)    1    2
"""


def test_switches() -> None:
    assert KNOBS["cpufreq.boost"].value.decode(b"1\n") == "1"
    assert KNOBS["zswap.enabled"].value.decode(b"N\n") == "N"
    with pytest.raises(ValueError, match="1"):
        KNOBS["zswap.enabled"].value.decode(b"1\n")


def test_bracketed_choice() -> None:
    raw = b"always [madvise] never\n"
    assert THP.decode(raw) == "madvise"
    assert THP.choices(raw) == ("always", "madvise", "never")
    assert THP.decode(b"performance\n") == "performance"
    assert THP.choices(b"performance\n") is None


@pytest.mark.parametrize("raw", [b"", b"always madvise never\n", b"[always] [never]\n"])
def test_choice_without_one_chosen_word(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no single chosen word"):
        THP.decode(raw)


@pytest.mark.parametrize("raw", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_table_in_rows_and_in_columns(raw: bytes) -> None:
    assert MODES.decode(raw) == "BOOTUP_DEFAULT"
    assert MODES.choices(raw) == ("BOOTUP_DEFAULT", "3D_FULL_SCREEN", "COMPUTE")
    assert MODES.encode("COMPUTE", raw) == "5"
    changed = as_the_kernel_would(raw, b"5")
    assert MODES.decode(changed) == "COMPUTE"
    assert as_the_kernel_would(changed, b"0") == raw
    with pytest.raises(OSError, match="Invalid argument"):
        as_the_kernel_would(raw, b"4")


def test_table_whose_current_entry_cannot_be_chosen() -> None:
    raw = COLUMNS.replace(b"DEFAULT*", b"DEFAULT ").replace(b"CUSTOM", b"CUSTOM*")
    assert MODES.decode(raw) == "CUSTOM"
    assert "CUSTOM" not in (MODES.choices(raw) or ())


def test_recorded_file_refuses_a_word_that_is_not_on_offer() -> None:
    assert (
        as_the_kernel_would(b"always [madvise] never\n", b"always") == b"[always] madvise never\n"
    )
    with pytest.raises(OSError, match="Invalid argument"):
        as_the_kernel_would(b"always [madvise] never\n", b"allways")
    assert as_the_kernel_would(b"60\n", b"10") == b"10\n"


@pytest.mark.parametrize(
    ("value", "configured"),
    [
        (Integer(0, 200), True),
        (Integer(0, 200), 201),
        (Integer(0, 200), -1),
        (Integer(0, 200), "10"),
        (Integer(0, 200), 1.5),
        (Switch(), 1),
        (Switch(), "yes"),
        (THP, "Always"),
        (THP, True),
        (MODES, "CUSTOM"),
        (Size(1024, 2**20, 2**34, "kB"), 4096),
        (Size(1024, 2**20, 2**34, "kB"), "1KiB"),
        (Size(1024, 2**20, 2**34, "kB"), "101%"),
        (QosRequest(0, 100), 101),
    ],
)
def test_what_may_not_be_configured(value: Integer, configured: object) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        value.parse(configured)


def test_held_latency_is_satisfied_by_a_stricter_request() -> None:
    value = QosRequest(0, 2_000_000_000)
    assert value.decode(b"\x63\0\0\0") == "99"
    assert value.to_bytes("99") == b"\x63\0\0\0"
    assert value.satisfied("20", "99")
    assert not value.satisfied("2000000000", "99")


@given(st.integers(0, 2**49))
def test_size_in_bytes_is_exact(size: int) -> None:
    assert parse_size(size) == size
    assert parse_size(f"{size} B") == size


@pytest.mark.parametrize(
    ("text", "size"), [("96GiB", 96 * GIB), ("1.5GiB", 3 * GIB // 2), ("50%", 4 * GIB)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, total=8 * GIB) == size


@pytest.mark.parametrize("text", ["", "GiB", "12", "12 gib", "-1GiB", "101%", "1e9", "１２GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_size(text, total=GIB)


@given(st.sets(st.integers(0, 2000)))
def test_cpulist_round_trip(cpus: set[int]) -> None:
    assert parse_cpulist(format_cpulist(cpus)) == cpus


@pytest.mark.parametrize("text", ["a", "3-1", "1,,2", "0-", "-1", "1-2-3", "123456"])
def test_cpulists_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_cpulist(text)


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 96 * GIB)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "96 GiB",
    ]


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_knob_is_complete(knob: object) -> None:
    """What the tables and documents print is there, and points at something that exists."""
    entry = KNOBS[knob.id]  # type: ignore[attr-defined]
    assert entry.paths
    assert all(path.startswith(("/sys/", "/proc/", "/dev/", "{")) for path in entry.paths)
    for text in (entry.summary, entry.evidence.text, entry.absent, entry.value.accepts()):
        assert text
    assert entry.summary.endswith(".")
    assert entry.evidence.source
    for other in (*entry.after, *entry.restore_after, *entry.touches):
        assert other in KNOBS
