# SPDX-License-Identifier: Apache-2.0
"""The models on this machine: ``infertune models``."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from infertune.base.errors import Exit, InfertuneError
from infertune.base.units import format_size
from infertune.boot.sizes import outlooks
from infertune.budget.budget import budget
from infertune.budget.gguf_file import ModelFile, read_model
from infertune.budget.settings import read_memory
from infertune.budget.shape import read_shape
from infertune.cli.base import JSON, Command, Context, verb
from infertune.cli.engine import BACKEND
from infertune.host.machine import read_machine
from infertune.pools.facts import read_facts
from infertune.pools.promised import with_reservations
from infertune.profiles.resolve import assume_backend
from infertune.servers.models import of_caller

_MOST = 100
"""Heads that are read; one takes up to a second."""


def _models(ctx: Context) -> int:
    found = sorted(of_caller(os.environ), key=lambda each: (each.name.casefold(), each.path))
    machine = read_machine(ctx.root)
    backend = ctx.args.backend if ctx.args.backend != "auto" else assume_backend(machine)[0]
    facts = with_reservations(ctx.root, read_facts(ctx.root, machine), backend)
    ways = outlooks(ctx.root, machine, facts, None)
    documents = []
    for model in found[:_MOST]:
        about: dict[str, Any] = {
            **{name: getattr(model, name) for name in ("name", "repository", "path", "bytes")},
            "type": None,
            "verdict": None,
            "error": None,
        }
        try:
            head = read_model(model.path)
            about["type"] = _main_type(head)
            about["verdict"] = budget(
                read_shape(head), read_memory({}), facts, backend, ways
            ).verdict
        except InfertuneError as error:
            about["error"] = error.message
        documents.append(about)
    left_out = len(found) - len(documents)
    if ctx.args.json:
        document = {"backend": backend, "models": documents, "left_out": left_out}
        ctx.print_json("infertune.models/1", document)
        return Exit.DONE
    if not found:
        ctx.print("no models where they are usually kept")
        return Exit.DONE
    ctx.table(("MODEL", "SIZE", "TYPE", "FITS", "FROM"), list(map(_row, documents)))
    if left_out:
        ctx.print(f"{left_out} more {'was' if left_out == 1 else 'were'} left out")
    return Exit.DONE


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    """One line of the list.  What is typed again comes first, and is not cut."""
    size, kind = format_size(model["bytes"]), model["type"] or "-"
    verdict = model["verdict"] or "unreadable"
    return model["name"], size, kind, verdict, model["repository"] or ""


def _main_type(model: ModelFile) -> str | None:
    """The type that most of a model's bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in model.tensors:
        sizes[tensor.type] += tensor.bytes
    return next((name for name, _ in sizes.most_common(1)), None)


COMMANDS: tuple[Command, ...] = (
    verb(
        "models",
        _models,
        (BACKEND, JSON),
        "Models in the caches of Hugging Face and llama.cpp, of LM Studio, in ~/models and in "
        "/srv/models, with the type most of their weights have and whether they fit with the "
        "server's own settings ('infertune fit' says why). 'serve', 'run' and 'fit' take such a "
        "name, a repository (OWNER/NAME), or OWNER/NAME:QUANTISATION. Links that lead out of these "
        "places, and directories into which everybody may write, are passed over.",
    ),
)
