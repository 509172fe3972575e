# SPDX-License-Identifier: Apache-2.0
"""Names on the bus and in polkit; the 1 is the version, within which things are only added."""

from __future__ import annotations

from infertune.base.errors import (
    Busy,
    DeclarationError,
    InfertuneError,
    NotPermitted,
    ProfileError,
    UsageError,
)

BUS_NAME = "org.infertune.Infertune1"
ROOT_NAME = "org.infertune.Infertune1.Root"
"""The same object on a connection to which the bus lets nobody but root send."""
OBJECT_PATH = "/org/infertune/Infertune1"
INTERFACE = "org.infertune.Infertune1"
ERROR = "org.infertune.Infertune1.Error"

ACTION_READ = "org.infertune.read"
ACTION_APPLY = "org.infertune.apply"
ACTION_SERVE = "org.infertune.serve"
ACTION_BOOT = "org.infertune.boot"

ERRORS: dict[str, type[InfertuneError]] = {
    "NotAuthorized": NotPermitted,
    "Busy": Busy,
    "InvalidProfile": ProfileError,
    "InvalidDeclaration": DeclarationError,
    "InvalidArgument": UsageError,
    "Failed": InfertuneError,
}
"""Domain errors by the last part of their name on the bus; the first that fits is used."""
