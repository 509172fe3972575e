# SPDX-License-Identifier: Apache-2.0
"""Which builds of llama.cpp compute on this machine, and with which backend.

The llama-server on the search path, and images whose tag has a number (``server-rocm-b10200``).
"""

from __future__ import annotations

import re
from typing import Literal

from infertune.base.records import dataclass
from infertune.doctor.base import When, Window, need
from infertune.doctor.facts import Facts
from infertune.doctor.surroundings import LlamaServer
from infertune.host.servers import Declared
from infertune.host.unknown import Missing
from infertune.server_files.command_line import LLAMA

Backend = Literal["rocm", "vulkan"]

_MARKS: tuple[tuple[Backend, tuple[str, ...]], ...] = (
    ("vulkan", ("vulkan", "radv")),
    ("rocm", ("rocm", "hip")),
)


@dataclass(frozen=True, slots=True)
class Build:
    """One llama-server that computes with a backend."""

    name: str
    """``llama-server b9672``, or the image's with the file that runs it."""
    number: int
    sure: bool
    """Whether it is the llama-server on the search path, which said so itself."""


def runs_on(server: Declared, facts: Facts) -> Backend | None:
    """Where only one backend can be meant; None where it is not known."""
    device = (server.option("device") or "").lower()
    image = server.image or ""
    for backend, marks in _MARKS:
        if device.startswith(marks) or any(mark in image for mark in marks):
            return backend
    known = facts.server
    if server.image is not None or device or not isinstance(known, LlamaServer):
        return None
    gpus: list[Backend] = [each for each in known.backends if each != "cpu"]
    return gpus[0] if len(gpus) == 1 else None


def image_build(image: str) -> int | None:
    """The number in an image's tag."""
    found = re.search(r"\bb(\d{3,6})\b", image)
    return int(found[1]) if found else None


def _images(facts: Facts, backend: Backend) -> list[Build]:
    """Raises Missing."""
    return [
        Build(f"the image's llama-server b{number} ({server.where})", number, sure=False)
        for server in need(facts.declared)
        if server.engine == LLAMA and server.image and runs_on(server, facts) == backend
        if (number := image_build(server.image)) is not None
    ]


def _uses(facts: Facts, backend: Backend) -> bool:
    """Whether the llama-server on the search path computes with a backend.  Raises Missing."""
    if facts.server is None:
        return False
    backends = need(facts.llama).backends
    if backend == "rocm" or "rocm" not in backends:
        return backend in backends
    # Beside ROCm, llama-server prefers ROCm, unless it is told otherwise.
    return backend in backends and any(
        server.image is None and runs_on(server, facts) == backend
        for server in need(facts.declared)
        if server.engine == LLAMA
    )


def builds(facts: Facts, backend: Backend) -> list[Build]:
    """Every build that computes with a backend.  Raises Missing where none has a number."""
    found = _images(facts, backend)
    if _uses(facts, backend):
        try:
            found.insert(0, Build(f"llama-server b{facts.build}", facts.build, sure=True))
        except Missing:
            if not found:
                raise
    return found


def affected(facts: Facts, backend: Backend, window: Window) -> tuple[Build, bool] | None:
    """A build in a window, and whether it is surely bad there; the worst first.  Raises Missing."""
    said = [(build, window.says((build.number,))) for build in builds(facts, backend)]
    for wanted in ("bad", "maybe"):
        for build, says in said:
            if says == wanted:
                return build, wanted == "bad"
    return None


def _has(facts: Facts, backend: Backend) -> bool:
    try:
        if _images(facts, backend):
            return True
    except Missing:
        pass
    return _uses(facts, backend)


ROCM_BUILD = When("a llama-server with ROCm", lambda facts: _has(facts, "rocm"))
VULKAN_BUILD = When("a llama-server that computes with Vulkan", lambda facts: _has(facts, "vulkan"))
