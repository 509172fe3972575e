# SPDX-License-Identifier: Apache-2.0
"""Pictures of the dashboards: their JSON and a real Prometheus's answers, in headless Chromium.

Used for docs/images only (``pytest tests/host/test_dashboards.py --draw DIRECTORY``).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dashboards_of import Query, dashboards, panels

SPAN_S = 90
CHROMIUM = (
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # Without these the lower part of a picture was missing, seen on a busy machine (Chromium 156).
    "--run-all-compositor-stages-before-draw",
    "--virtual-time-budget=3000",
)
Ask = Callable[..., Any]
SHOWN = {"machine": "recorded", "model": "here"}
"""Which machine is chosen, in those that show one."""


def draw(ask: Ask, names: Mapping[str, str], directory: Path, scratch: Path) -> None:
    """One PNG for each dashboard; ``names`` says what to call each instance."""
    page = Path(__file__).with_name("page.html")
    for name, dashboard in dashboards().items():
        place = scratch / name
        place.mkdir(parents=True)
        shutil.copy(page, place / "page.html")
        own = {shown: instance for instance, shown in names.items()}
        text = json.dumps(_data(ask, dashboard, own.get(SHOWN.get(name, ""), ".*")))
        for instance, shown in names.items():
            text = text.replace(instance, shown)
        (place / "data.js").write_text(f"const DATA = {text};\n")
        rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
        subprocess.run(
            [
                *CHROMIUM,
                f"--user-data-dir={place / 'profile'}",
                f"--window-size=1600,{rows * 34 + 75}",
                f"--screenshot={directory / f'dashboard-{name}.png'}",
                f"file://{place / 'page.html'}",
            ],
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _data(ask: Ask, dashboard: dict[str, Any], instance: str) -> dict[str, Any]:
    to = math.floor(time.time())
    answers = {panel["id"]: _series(ask, panel, instance, to) for panel in panels(dashboard)}
    return {"dashboard": dashboard, "answers": answers, "from": to - SPAN_S, "to": to}


def _series(ask: Ask, panel: dict[str, Any], instance: str, to: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for target in panel["targets"]:
        expr = Query("", target["expr"]).filled(instance=instance)
        common = {"legend": target["legendFormat"]}
        if target["instant"]:
            for each in ask("query", query=expr)["result"]:
                value = float(each["value"][1])
                found.append({**common, "labels": each["metric"], "value": value})
            continue
        words = {"start": str(to - SPAN_S), "end": str(to), "step": "2"}
        for each in ask("query_range", query=expr, **words)["result"]:
            points = [[at, float(value)] for at, value in each["values"] if value != "NaN"]
            if points:
                found.append({**common, "labels": each["metric"], "points": points})
    return found
