# SPDX-License-Identifier: Apache-2.0
"""The catalogue: one file per family, one entry per knob, and nothing else to touch."""

from infertune.catalogue.knobs import boot, cpu, gpu, ksm, platform, thp, vm, zswap
from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.knobs.live import Reading, Target, read_live, targets

KNOBS: dict[str, Knob] = {
    knob.id: knob
    for family in (thp, vm, cpu, platform, gpu, ksm, zswap, boot)
    for knob in family.KNOBS
}
"""Every knob by its id, in the order they are documented."""

__all__ = ["KNOBS", "Evidence", "Knob", "Reading", "Target", "read_live", "targets"]
