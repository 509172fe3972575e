# SPDX-License-Identifier: Apache-2.0
"""Kernel samepage merging: scans memory for equal pages."""

from functools import partial

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Integer

_KSM = "/sys/kernel/mm/ksm"
_DOC = "Documentation/admin-guide/mm/ksm.rst"
_ABSENT = "this kernel is built without CONFIG_KSM"
_EVIDENCE = Evidence(
    "protective, unmeasured",
    "Model weights have no equal pages; the scanner only costs bandwidth and a core.",
    _DOC,
)

_knob = partial(Knob, evidence=_EVIDENCE, doc=_DOC, absent=_ABSENT)

KNOBS: tuple[Knob, ...] = (
    _knob(
        id="ksm.run",
        paths=(f"{_KSM}/run",),
        # 2 also breaks merged pages up again, which needs their memory back at once.
        value=Integer(0, 1),
        summary="0 stops the scanner and keeps what is merged, 1 runs it.",
    ),
    _knob(
        id="ksm.pages_to_scan",
        paths=(f"{_KSM}/pages_to_scan",),
        value=Integer(1, 2**32 - 1, "pages"),
        summary="Pages the scanner looks at before it sleeps.",
    ),
    _knob(
        id="ksm.sleep_millisecs",
        paths=(f"{_KSM}/sleep_millisecs",),
        value=Integer(0, 2**32 - 1, "ms"),
        summary="How long the scanner sleeps.",
    ),
)
