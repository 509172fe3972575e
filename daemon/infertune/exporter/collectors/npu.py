# SPDX-License-Identifier: Apache-2.0
"""The NPU: whether there is one, and whether it is awake."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded
from infertune.root import Root

MAX_NPUS = 8

METRICS = (
    Metric(
        name="infertune_npu_info",
        unit="1",
        help="An accelerator, its driver, its name and firmware.",
        labels=("npu", "driver", "name", "firmware"),
        source="Documentation/accel; drivers/accel/amdxdna/amdxdna_sysfs.c, vbnv, fw_version",
        series="one per NPU, at most 8",
    ),
    Metric(
        name="infertune_npu_active",
        unit="1",
        help="1 while the device is powered, 0 while it is suspended.",
        labels=("npu",),
        source="Documentation/power/runtime_pm.rst, power/runtime_status",
        series="one per NPU, at most 8",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Every accelerator.  Raises Absent where there is none with a driver."""
    found = False
    for npu in bounded(root.names("/sys/class/accel"), MAX_NPUS):
        device = f"/sys/class/accel/{npu}/device"
        driver = (root.readlink(f"{device}/driver") or "").rpartition("/")[2]
        if not driver:
            continue
        found = True
        labels = (
            npu,
            driver,
            root.get(f"{device}/vbnv") or "",
            root.get(f"{device}/fw_version") or "",
        )
        yield Sample("infertune_npu_info", labels, 1)
        status = root.get(f"{device}/power/runtime_status")
        if status in ("active", "suspended"):
            yield Sample("infertune_npu_active", (npu,), float(status == "active"))
    if not found:
        raise Absent("no NPU with a driver")


NPU = Collector(id="npu", summary="The NPU, and whether it is awake.", metrics=METRICS, read=read)
