# SPDX-License-Identifier: Apache-2.0
"""What a server computes with."""

from __future__ import annotations

BACKENDS = ("rocm", "vulkan", "cpu")
