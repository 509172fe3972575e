# SPDX-License-Identifier: Apache-2.0
"""What was measured, on disk: one directory for each run.

``run.json`` says what was asked and of what machine, ``samples.jsonl`` has a line for each sample,
kept or not, which is on disk before the next one starts: it is what a run that was killed resumes
from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from infertune.base.errors import Failed
from infertune.base.root import MAX_READ, Root
from infertune.host.machine import Machine

OF_ROOT = "/var/lib/infertune/measurements"
SCHEMA = "infertune.measurement/1"
_MAX_RUN = 1024 * 1024
_PIECE = 1024 * 1024
_MOST = 256
"""Runs of one model that are looked at, the newest."""


def directory_of(environment: Mapping[str, str], home: str, *, root: bool) -> str:
    """Where whoever calls keeps measurements (XDG Base Directory Specification)."""
    state = environment.get("XDG_STATE_HOME", "")
    # A relative path is to be ignored, as that specification says.
    if not state.startswith("/"):
        if root:
            return OF_ROOT
        state = f"{home}/.local/state"
    return f"{state}/infertune/measurements"


def machine_key(machine: Machine) -> str:
    """Names the hardware.

    Kernel, build and profile are in ``run.json`` and not in here: a measurement that they have
    made stale is still found, and said to be.
    """
    return key_of(machine.dmi.product, machine.cpu.model, machine.memory.total_bytes)


def key_of(product: str | None, processor: str | None, memory_bytes: int | None) -> str:
    """The same for who has not read the whole machine."""
    facts = (product, processor, (memory_bytes or 0) >> 30)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def model_key(root: Root, files: Sequence[str]) -> str:
    """Names a model by what is in its files; not by all of it, which takes minutes to read.

    Their sizes, heads (metadata and the types of all tensors) and a piece of the weights of each.
    Raises OSError.
    """
    found = hashlib.sha256()
    for each in files:
        path = root.real(each)
        size = root.size(path)
        found.update(f"{size}\n".encode())
        for offset in (0, size // 2, max(size - _PIECE, 0)):
            found.update(root.read_part(path, offset, _PIECE))
    return found.hexdigest()[:16]


def named_key(name: str) -> str:
    """The same for a model that is known by its name alone."""
    return f"named-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class Store:
    """One run."""

    def __init__(self, root: Root, path: str) -> None:
        self._root = root
        self.path = path

    def begin(self, run: Mapping[str, Any]) -> None:
        """Note what is measured.  Raises OSError."""
        self._root.mkdir(self.path)
        text = json.dumps({"schema": SCHEMA, **run}, indent=2)
        self._root.replace(f"{self.path}/run.json", f"{text}\n".encode())

    def run(self) -> dict[str, Any]:
        """What was noted.  Raises Failed where it is not a run's directory."""
        try:
            data, _ = self._root.read_file(f"{self.path}/run.json", _MAX_RUN)
            found = json.loads(data)
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise Failed(f"{self.path} is not a measurement, or of another version")
        return found

    def write(self, name: str, text: str) -> None:
        """Put a file beside it, in place of an earlier one.  Raises OSError."""
        self._root.replace(f"{self.path}/{name}", text.encode())

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """The same for a document."""
        self.write(name, f"{json.dumps(document, indent=1)}\n")

    def add(self, sample: Mapping[str, Any]) -> None:
        """Keep one sample; it is on disk when this returns.  Raises OSError."""
        line = json.dumps(sample, separators=(",", ":"))
        self._root.append(f"{self.path}/samples.jsonl", f"{line}\n".encode())

    def samples(self) -> list[dict[str, Any]]:
        """Every whole sample, in order; a line that a kill has torn is left out."""
        try:
            data, _ = self._root.read_file(f"{self.path}/samples.jsonl", MAX_READ)
        except OSError:
            return []
        found = []
        for line in data.split(b"\n"):
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(sample, dict):
                found.append(sample)
        return found


def runs(root: Root, directory: str, machine: str, model: str) -> list[Store]:
    """The runs of a model on this machine, the newest first: their names begin with the time."""
    here = f"{directory}/{machine}/{model}"
    return [Store(root, f"{here}/{name}") for name in root.names(here)[::-1][:_MOST]]
