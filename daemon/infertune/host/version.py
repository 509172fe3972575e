# SPDX-License-Identifier: Apache-2.0
"""Versions as numbers: of kernels, ROCm, builds of llama.cpp."""

from __future__ import annotations

Version = tuple[int, ...]


def format_version(version: Version) -> str:
    """``7.0.13`` of (7, 0, 13)."""
    return ".".join(map(str, version))
