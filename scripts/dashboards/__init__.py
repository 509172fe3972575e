# SPDX-License-Identifier: Apache-2.0
"""The dashboards: one module each, and nothing else to touch."""

from dashboards.base import Dashboard
from dashboards.fleet import FLEET
from dashboards.machine import MACHINE
from dashboards.model import MODEL
from dashboards.tuning import TUNING

DASHBOARDS: dict[str, Dashboard] = {
    "machine": MACHINE,
    "model": MODEL,
    "tuning": TUNING,
    "fleet": FLEET,
}
"""Every dashboard by the name of its file in ``grafana/dashboards/``."""
