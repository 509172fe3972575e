# SPDX-License-Identifier: Apache-2.0
"""What ``infertune prove`` found on this machine."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded
from infertune.host.cpu import model_name
from infertune.host.memory import meminfo
from infertune.host.system import product, release
from infertune.measure.store import OF_ROOT, key_of
from infertune.measure.verdicts import QUIET, STRESS, load, stale

_MOST = 128

METRICS = (
    Metric(
        name="infertune_measured_change_ratio",
        help="Measured here by infertune prove: change of tokens per second with a setting of a "
        "profile, 0.04 is 4 % more. stale is yes when kernel, model or server have changed since.",
        labels=("profile", "setting", "arm", "model", "verdict", "day", "stale"),
        source=f"{OF_ROOT}/*/verdicts.json (docs/measuring.md)",
        series=f"settings measured x models x {1 + len(STRESS)} arms, the newest of each; "
        f"{_MOST} at most",
    ),
    Metric(
        name="infertune_measured_kept_ratio",
        help="Measured beside neighbours that take CPU: share of the quiet, bare machine's tokens "
        "per second that is left, under the profile and without it (bare).",
        labels=("profile", "arm", "model", "server"),
        source=f"{OF_ROOT}/*/verdicts.json (docs/measuring.md)",
        series=f"2 x profiles x models x {len(STRESS)}; {2 * _MOST} at most",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Raises Absent where nothing was measured."""
    memory = meminfo(root).get("MemTotal")
    found = load(root, [OF_ROOT], key_of(product(root), model_name(root), memory))
    if not found:
        raise Absent("nothing was measured here as root: infertune prove")
    kernel = release(root)
    for one in bounded(found, _MOST):
        if one.estimate is not None:
            changed = "yes" if stale(root, one, kernel) else "no"
            which = (one.profile, one.setting, one.arm, one.model.name, one.word, one.day, changed)
            yield Sample("infertune_measured_change_ratio", which, one.estimate)
        if one.arm != QUIET:
            for server, share in (("profile", one.keeps), ("bare", one.bare)):
                if share is not None:
                    labels = (one.profile, one.arm, one.model.name, server)
                    yield Sample("infertune_measured_kept_ratio", labels, share)


MEASURED = Collector(
    id="measured",
    summary="What infertune prove found on this machine.",
    metrics=METRICS,
    read=read,
    max_age_s=60.0,
)
