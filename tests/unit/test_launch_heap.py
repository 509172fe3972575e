# SPDX-License-Identifier: Apache-2.0
"""Huge pages for one server's heap: when nothing comes of asking, and that it is said."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.launch import heap
from infertune.launch.place import Placed

ENABLED = "sys/kernel/mm/transparent_hugepage/enabled"
GLIBC = b"/lib64/ld-linux-x86-64.so.2"
ASKED = {"nice": "0", "malloc_hugetlb": "1"}


def machine(base: Path, enabled: str | None = "always [madvise] never") -> Root:
    if enabled is not None:
        file = base / ENABLED
        file.parent.mkdir(parents=True)
        file.write_text(enabled + "\n")
    return Root(base)


def program(file: Path, loader: bytes | None) -> str:
    """An ELF program with one program header: its loader, or a segment that is none."""
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<Q14xHH", 64, 56, 1)
    text = b"" if loader is None else loader + b"\0"
    kind = 1 if loader is None else 3
    segment = struct.pack("<IIQQQQQQ", kind, 4, 64 + 56, 0, 0, len(text), len(text), 1)
    file.write_bytes(header.ljust(64, b"\0") + segment + text)
    return str(file)


def of_heap(root: Root, program: str, tunables: str = "glibc.malloc.hugetlb=1") -> Placed:
    [one] = heap.placed(root, ASKED, {"GLIBC_TUNABLES": tunables}, program)
    return one


def test_a_program_with_glibc(tmp_path: Path) -> None:
    one = of_heap(machine(tmp_path), program(tmp_path / "server", GLIBC))
    assert one == Placed("malloc_hugetlb", "1", "applied", "GLIBC_TUNABLES", "1")


@pytest.mark.parametrize(
    ("enabled", "loader", "why"),
    [
        (None, GLIBC, "this kernel has no transparent huge pages"),
        ("always madvise [never]", GLIBC, "transparent_hugepage.enabled is never"),
        ("[always] madvise never", b"/lib/ld-musl-x86_64.so.1", "is musl, not glibc"),
        ("always [madvise] never", None, "linked statically"),
    ],
)
def test_where_nothing_comes_of_it_that_is_said(
    tmp_path: Path, enabled: str | None, loader: bytes | None, why: str
) -> None:
    one = of_heap(machine(tmp_path, enabled), program(tmp_path / "server", loader))
    assert one.outcome == "absent"
    assert why in (one.why or "")


def test_of_a_script_its_interpreter_counts(tmp_path: Path) -> None:
    musl = program(tmp_path / "shell", b"/lib/ld-musl-x86_64.so.1")
    script = tmp_path / "start"
    script.write_text(f"#! {musl} -e\nexec server\n")
    assert "musl" in (of_heap(machine(tmp_path), str(script)).why or "")
    script.write_text(f"#!{script}\n")
    assert of_heap(Root(tmp_path), str(script)).outcome == "applied"  # nothing is claimed


def test_an_older_glibc_does_not_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.confstr_names, "CS_GNU_LIBC_VERSION", 2)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.34")
    one = of_heap(machine(tmp_path), program(tmp_path / "server", GLIBC))
    assert one.why == "glibc 2.34 does not know it; 2.35 does"


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x02\x01", b"#!", b"\x7fELF" + bytes(80)])
def test_what_is_no_program_claims_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "server").write_bytes(content)
    root = machine(tmp_path)
    assert "musl" not in (of_heap(root, str(tmp_path / "server")).why or "")
    assert of_heap(root, str(tmp_path / "missing")).outcome == "applied"


def test_an_owner_who_said_otherwise_is_right(tmp_path: Path) -> None:
    one = of_heap(machine(tmp_path), sys.executable, "glibc.malloc.hugetlb=2")
    assert (one.outcome, one.got) == ("rejected", "2")


def test_false_needs_no_huge_pages(tmp_path: Path) -> None:
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    [one] = heap.placed(machine(tmp_path, None), {"malloc_hugetlb": "0"}, env, sys.executable)
    assert one.outcome == "applied"
