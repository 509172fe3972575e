#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write grafana/dashboards/ from scripts/dashboards/.

``--check`` writes nothing and exits 1 where one is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dashboards import DASHBOARDS
from dashboards.base import render

DIRECTORY = Path(__file__).resolve().parent.parent / "grafana" / "dashboards"


def files() -> dict[Path, str]:
    """Every dashboard's file and what belongs into it."""
    return {
        DIRECTORY / f"{name}.json": json.dumps(render(dashboard), indent=2, sort_keys=True) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def main(arguments: Sequence[str]) -> int:
    old = {path for path, text in files().items() if not path.exists() or path.read_text() != text}
    for path in sorted(old):
        if "--check" not in arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
        print(f"{'out of date' if '--check' in arguments else 'written'}: {path.name}")
    return int(bool(old) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
