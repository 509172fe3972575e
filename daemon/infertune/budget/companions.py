# SPDX-License-Identifier: Apache-2.0
"""What a server loads beside its model: a projector for images or sound, a model that drafts."""

from __future__ import annotations

from collections.abc import Mapping

from infertune.base.records import dataclass
from infertune.budget.gguf_file import ModelError, read_model
from infertune.budget.shape import Shape, read_shape


@dataclass(frozen=True, slots=True)
class Projector:
    """A file that turns images or sound into tokens (``--mmproj``)."""

    file: str
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Companions:
    """The other files of one server."""

    projector: Projector | None = None
    draft: Shape | None = None
    """A smaller model that guesses ahead, or the layers for MTP in a file of their own."""


ALONE = Companions()


def read_companions(settings: Mapping[str, str]) -> Companions:
    """The files that the canonical settings ``mmproj`` and ``model_draft`` name.

    Raises ModelError for a file that cannot be read, or is something else.
    """
    projector, draft = settings.get("mmproj"), settings.get("model_draft")
    return Companions(
        projector=_read_projector(projector) if projector else None,
        draft=read_shape(read_model(draft)) if draft else None,
    )


def _read_projector(path: str) -> Projector:
    model = read_model(path)
    kind = model.metadata.get("general.type")
    if kind != "mmproj" and model.metadata.get("general.architecture") != "clip":
        raise ModelError(f"{path}: not a projector", hint="its name usually begins with 'mmproj'")
    return Projector(path, model.tensor_bytes)
