# SPDX-License-Identifier: Apache-2.0
"""What others measured: memory bandwidth of a chip, and speeds of models on it."""

from __future__ import annotations

import re

from infertune.base.records import dataclass
from infertune.budget.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Memory bandwidth, in bytes per second."""

    name: str
    cpu_model: re.Pattern[str]
    """The name of the processor: chips that differ in their memory share one kind of GPU."""
    gfx_target: str
    pci_id: str
    gpu_read: tuple[float, float]
    gpu_source: str
    cpu_read: tuple[float, float]
    cpu_source: str
    peak: float
    """Of the memory itself: transfers per second times the width of the bus."""
    note: str | None = None
    """What to say wherever one of these figures is shown."""


_STRIX_HALO = Chip(
    name="Strix Halo",
    cpu_model=re.compile(r"RYZEN AI MAX\+? (PRO )?3\d\d\b", re.IGNORECASE),
    gfx_target="gfx1151",
    pci_id="1002:1586",
    gpu_read=(212e9, 221e9),
    gpu_source="measured by others: lhl/strix-halo-testing; LPDDR5X-8000, 256 bit",
    cpu_read=(100e9, 118e9),
    cpu_source="measured by others: lhl/strix-halo-testing; LPDDR5X-8000, 256 bit",
    peak=256e9,
)

CHIPS: tuple[Chip, ...] = (
    # Strix Point is not here: its boards have DDR5 or LPDDR5X of several speeds.
    _STRIX_HALO,
    Chip(
        # AMD's page of the Ryzen AI Max PRO 400 series: 485, 490 and 495, with up to
        # LPDDR5X-8533 on the same bus; gfx1151 as before (unslothai/unsloth pull request 7290).
        name="Gorgon Halo",
        cpu_model=re.compile(r"RYZEN AI MAX\+? (PRO )?4\d\d\b", re.IGNORECASE),
        gfx_target="gfx1151",
        pci_id="1002:1586",
        gpu_read=(212e9 * 8533 / 8000, 221e9 * 8533 / 8000),
        gpu_source="scaled from Strix Halo (lhl/strix-halo-testing) to LPDDR5X-8533, 256 bit",
        # Not scaled: what two dies of cores can read is far below what the memory gives.
        cpu_read=_STRIX_HALO.cpu_read,
        cpu_source="measured by others on Strix Halo: lhl/strix-halo-testing",
        peak=273e9,
        note="no measurement of Gorgon Halo is known here: figures are of Strix Halo, and the "
        "GPU's bandwidth is scaled from LPDDR5X-8000 to 8533",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of one model, generated one after the other, at a short context."""

    gfx_target: str
    model: str
    architecture: str
    parameters: float
    """To tell models of one architecture apart; 3 % may be off."""
    bits: tuple[float, float]
    """Bits for a weight, of the quantisations this is about."""
    tokens_per_second: tuple[float, float]
    how: str
    source: str


SPEEDS: tuple[Speed, ...] = (
    Speed(
        gfx_target="gfx1151",
        model="gpt-oss 120B MXFP4",
        architecture="gpt-oss",
        parameters=116.83e9,
        bits=(4.0, 5.0),
        tokens_per_second=(51.2, 55.6),
        how="ROCm 6.4.4; RADV b9049",
        source="llama.cpp issue 17917; strix-halo-guide",
    ),
    Speed(
        gfx_target="gfx1151",
        model="Qwen3 (Coder) 30B-A3B, Q4",
        architecture="qwen3moe",
        parameters=30.53e9,
        bits=(4.0, 5.5),
        tokens_per_second=(96.8, 96.8),
        how="RADV b9049",
        source="strix-halo-guide",
    ),
    Speed(
        gfx_target="gfx1151",
        model="Qwen3.6 35B-A3B, Q4_K_XL",
        architecture="qwen35moe",
        parameters=35e9,
        bits=(4.0, 5.9),
        tokens_per_second=(53.5, 62.8),
        how="ROCm 7.14; RADV; kernel 7.1.3",
        source="kyuz0/amd-strix-halo-toolboxes",
    ),
    Speed(
        gfx_target="gfx1151",
        model="Qwen3.6 35B-A3B, Q8_K_XL",
        architecture="qwen35moe",
        parameters=35e9,
        bits=(8.0, 10.0),
        tokens_per_second=(48.1, 49.2),
        how="ROCm; RADV",
        source="kyuz0/amd-strix-halo-toolboxes",
    ),
    Speed(
        gfx_target="gfx1151",
        model="Qwen3.6 27B, Q8",
        architecture="qwen35",
        parameters=27e9,
        bits=(8.0, 10.0),
        tokens_per_second=(6.6, 6.6),
        how="ROCm; RADV; without speculation",
        source="kyuz0/amd-strix-halo-toolboxes",
    ),
    Speed(
        gfx_target="gfx1151",
        model="Llama 2 7B, Q4_0",
        architecture="llama",
        parameters=6.74e9,
        bits=(4.0, 5.0),
        tokens_per_second=(46.7, 51.2),
        how="AMDVLK, RADV, HIP; 2025",
        source="lhl/strix-halo-testing",
    ),
)


def speeds_of(shape: Shape, gfx_target: str | None) -> tuple[Speed, ...]:
    """What is known of this very model, at about these bits for a weight."""
    if not shape.parameters:
        return ()
    bits = 8 * shape.weights_bytes / shape.parameters
    return tuple(
        speed
        for speed in SPEEDS
        if speed.gfx_target == gfx_target
        and speed.architecture == shape.architecture
        and abs(shape.parameters / speed.parameters - 1) < 0.03
        and speed.bits[0] <= bits <= speed.bits[1]
    )
