# SPDX-License-Identifier: Apache-2.0
"""The firmware's own power profile."""

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Choice

KNOBS: tuple[Knob, ...] = (
    Knob(
        id="platform_profile",
        paths=("/sys/firmware/acpi/platform_profile",),
        value=Choice(
            (
                "low-power",
                "cool",
                "quiet",
                "balanced",
                "balanced-performance",
                "performance",
                "max-power",
            )
        ),
        choices_file="platform_profile_choices",
        summary="Package power and fan limits as the vendor set them; the largest power lever.",
        evidence=Evidence(
            "reported",
            "Together with amd_iommu=off: +14.6 % prefill (5.2 to 24.4), +3.6 % decode (0 to 9.2) "
            "over 5 models and 9 depths; the two were not separated.",
            "kyuz0/amd-strix-halo-toolboxes benchmark data, 2026",
        ),
        doc="Documentation/userspace-api/sysfs-platform_profile.rst",
        absent="the firmware offers no platform profile (many desktops and all virtual machines)",
        risk="power",
    ),
)
