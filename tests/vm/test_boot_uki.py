# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images by ukify: a trial once, then kept or back by itself, and undone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vm import circle
from vm.efi import EfiGuest

pytestmark = [
    pytest.mark.quick_on,
    pytest.mark.timeout(3600),
]  # each boot takes a minute

STACK = circle.UKI
Start = Callable[[circle.Stack], EfiGuest]


def test_a_panic_comes_back_by_itself(efi: Start) -> None:
    circle.panic_comes_back(efi(STACK), STACK)


def test_kept_through_a_kernel_update_and_undone(efi: Start) -> None:
    circle.kept_and_undone(efi(STACK), STACK)


def test_kept_and_undone_byte_for_byte(efi: Start) -> None:
    circle.kept_and_undone_exactly(efi(STACK))


def test_a_hang_needs_one_reset(efi: Start) -> None:
    circle.hang_needs_one_reset(efi(STACK), STACK)


def test_power_cuts(efi: Start) -> None:
    circle.power_cuts(efi(STACK), STACK, seed=15)
