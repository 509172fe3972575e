# SPDX-License-Identifier: Apache-2.0
"""Entry point of infertuned."""

from __future__ import annotations

import contextlib
import gc
import sys
from importlib import import_module


def main() -> int:
    """Become the daemon."""
    # asyncio takes TLS along where it finds it, and hashlib OpenSSL: 2 and up to 4 MiB of a daemon
    # that speaks no TLS, and whose hash is one of dbus-fast's that no system bus asks for.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        import_module("_md5")  # Fedora's Python has no hashes but OpenSSL's
        sys.modules["_hashlib"] = None  # type: ignore[assignment]

    # What is imported stays: to look for what of it can go is a fourteenth of a start
    # (benchmarks/start_to_ready.py).
    gc.disable()
    from infertune.service.daemon import main

    gc.enable()

    return main()


if __name__ == "__main__":
    sys.exit(main())
