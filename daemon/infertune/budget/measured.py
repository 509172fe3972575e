# SPDX-License-Identifier: Apache-2.0
"""What others measured: memory bandwidth of a chip, and speeds of models on it."""

from __future__ import annotations

from dataclasses import dataclass

from infertune.budget.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Memory bandwidth, in bytes per second."""

    gfx_target: str
    pci_id: str
    gpu_read: tuple[float, float]
    cpu_read: tuple[float, float]
    peak: float
    source: str


CHIPS: tuple[Chip, ...] = (
    Chip(
        gfx_target="gfx1151",
        pci_id="1002:1586",
        gpu_read=(212e9, 221e9),
        cpu_read=(100e9, 118e9),
        peak=256e9,
        source="lhl/strix-halo-testing; LPDDR5X-8000, 256 bit",
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
