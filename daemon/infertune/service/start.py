# SPDX-License-Identifier: Apache-2.0
"""Entry point of infertuned."""

from __future__ import annotations

import sys


def main() -> int:
    """Become the daemon."""
    # asyncio takes TLS along where it finds it: 2 MiB of a daemon that speaks none.
    sys.modules["ssl"] = None  # type: ignore[assignment]

    from infertune.service.daemon import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
