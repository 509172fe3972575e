# SPDX-License-Identifier: Apache-2.0
"""Stand-in until the module that builds images is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infertune.boot.change import Image, Shelter
from infertune.boot.commands import Runner
from infertune.root import Root


@dataclass(frozen=True, slots=True)
class Built:
    """An image as a tool has built it; no digest: not yet."""

    path: str
    kind: Literal["initramfs", "uki"]
    build: tuple[str, ...]
    trial: str = ""
    shelter: Shelter | None = None
    digest: str | None = None


def planned(image: Image) -> Built:
    return Built(image.path, image.kind, image.build, image.trial, image.shelter)


def build(root: Root, image: Image, run: Runner) -> Built:
    del root, run
    return planned(image)


def confirm(root: Root, built: Built) -> None:
    del root, built


def restore(root: Root, built: Built, run: Runner) -> None:
    del root, built, run


def ask_room(root: Root, images: tuple[Image, ...]) -> None:
    del root, images
