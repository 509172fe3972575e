# SPDX-License-Identifier: Apache-2.0
"""The NPU: whether there is one, and whether it is awake."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, present
from infertune.host.devices import accelerator, accelerator_names

MAX_NPUS = 8

METRICS = (
    Metric(
        name="infertune_npu_info",
        help="An accelerator, its driver, its name and firmware.",
        labels=("npu", "driver", "name", "firmware"),
        source="Documentation/accel; drivers/accel/amdxdna/amdxdna_sysfs.c, vbnv, fw_version",
        series="one per NPU, at most 8",
    ),
    Metric(
        name="infertune_npu_active",
        help="1 while the device is powered, 0 while it is suspended.",
        labels=("npu",),
        source="Documentation/power/runtime_pm.rst, power/runtime_status",
        series="one per NPU, at most 8",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Every accelerator.  Raises Absent where there is none with a driver."""
    found = False
    for name in bounded(accelerator_names(root), MAX_NPUS):
        npu = accelerator(root, name)
        if not npu.driver:
            continue
        found = True
        yield Sample("infertune_npu_info", (name, npu.driver, npu.model, npu.firmware), 1)
        yield from present("infertune_npu_active", (name,), npu.active)
    if not found:
        raise Absent("no NPU with a driver")


NPU = Collector(id="npu", summary="The NPU, and whether it is awake.", metrics=METRICS, read=read)
