# SPDX-License-Identifier: Apache-2.0
"""Eight appliers at once, two hundred rounds: one wins, the others hear who, nothing is mixed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from infertune.base.errors import Busy, InfertuneError
from infertune.engine.session import session
from infertune.engine.state import status
from support import FakeKernel, Values, apply, build, desired, revert, values

APPLIERS = 8
ROUNDS = 200

PROFILES: list[Values] = [
    {
        "vm.swappiness": 100 + number,
        "vm.watermark_scale_factor": 100 + number,
        "transparent_hugepage.khugepaged.pages_to_scan": 100 + number,
        "kernel.numa_balancing": number % 4,
    }
    for number in range(APPLIERS)
]


def test_eight_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path)
    original = values(tmp_path)
    context = multiprocessing.get_context("fork")
    start, tried, checked = (context.Barrier(APPLIERS + 1) for _ in range(3))
    results = context.SimpleQueue()

    def applier(number: int) -> None:
        for _ in range(ROUNDS):
            start.wait(60)
            try:
                with session(FakeKernel(tmp_path), f"apply p{number}") as ours:
                    ours.apply(desired(f"p{number}", PROFILES[number]))
                    results.put((number, None))
                    # Holds the machine until everybody has tried.
                    tried.wait(60)
            except (InfertuneError, OSError) as error:
                results.put((number, str(error)))
                tried.wait(60)
            checked.wait(60)

    processes = [context.Process(target=applier, args=(n,)) for n in range(APPLIERS)]
    for process in processes:
        process.start()
    try:
        for round_ in range(ROUNDS):
            start.wait(60)
            tried.wait(60)
            answers = dict(results.get() for _ in range(APPLIERS))
            winners = [number for number, answer in answers.items() if answer is None]
            assert len(winners) == 1, f"round {round_}: {answers}"
            winner = winners[0]
            pid = processes[winner].pid
            for number, answer in answers.items():
                if number != winner:
                    assert f"apply p{winner} (pid {pid})" in answer
            now = values(tmp_path)
            wanted = {str(value) for value in PROFILES[winner].values()}
            held = {
                now[path].strip()
                for path in (
                    "/proc/sys/vm/swappiness",
                    "/proc/sys/vm/watermark_scale_factor",
                    "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan",
                    "/proc/sys/kernel/numa_balancing",
                )
            }
            assert held == wanted, f"round {round_}: mixed state"
            checked.wait(60)
    finally:
        for barrier in (start, tried, checked):
            barrier.abort()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    # A winner's `finally` has let go; the last one's values are still there and go back.
    revert(root)
    assert values(tmp_path) == original
    with capsys.disabled():
        print(f"\n  {APPLIERS} appliers at once: one winner in {ROUNDS} of {ROUNDS} rounds")


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    root = build(tmp_path)
    with session(root, "apply a"):
        before = values(tmp_path)
        with pytest.raises(Busy, match=rf"busy: apply a \(pid {os.getpid()}\) has this machine"):
            apply(FakeKernel(tmp_path), "b", PROFILES[0])
        assert values(tmp_path) == before
    apply(root, "b", PROFILES[0])
    assert values(tmp_path) != before


def test_status_sees_the_holder_and_does_not_disturb_it(tmp_path: Path) -> None:
    root = build(tmp_path)
    apply(root, "p", PROFILES[0])
    with session(root, "run p"):
        for _ in range(3):
            now = status(root)
            assert now.state == "running"
            assert any(f"run p (pid {os.getpid()})" in note for note in now.notes)
    assert status(root).state == "applied"
