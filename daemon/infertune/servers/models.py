# SPDX-License-Identifier: Apache-2.0
"""A model by its name, looked up where people keep models."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterable, Mapping

from infertune.base.errors import UsageError, did_you_mean
from infertune.base.records import replace
from infertune.base.root import Root, full_path
from infertune.base.units import printable_line
from infertune.host.models import SYSTEM, Model, find_models, places
from infertune.servers.declaration import Declaration

_SHOWN = 5
_PATH = re.compile(r"\.{0,2}/|~")


def of_caller(environment: Mapping[str, str]) -> tuple[Model, ...]:
    """The models that whoever calls keeps, and those of the machine."""
    return find_models(Root("/"), places(environment, _homes(environment)))


def _homes(environment: Mapping[str, str]) -> list[str]:
    """Of the caller, and of whom sudo was called by: the models are there."""
    homes = [os.path.expanduser("~")]
    uid = environment.get("SUDO_UID", "")
    if os.geteuid() == 0 and uid.isdecimal() and len(uid) <= 10:
        with contextlib.suppress(KeyError, OverflowError):
            homes.append(pwd.getpwuid(int(uid)).pw_dir)
    return homes


def model_path(text: str, environment: Mapping[str, str]) -> str:
    """The file that a command line names, by its path or by a model's name.  Raises UsageError."""
    if os.path.lexists(text) or _PATH.match(text):
        return full_path(text)
    return named(of_caller(environment), text).path


def with_its_model(root: Root, declaration: Declaration) -> Declaration:
    """The declaration with the path of its model, of the machine's places.  Raises UsageError."""
    model = declaration.model
    if model is None or model.startswith("/"):
        return declaration
    try:
        path = named(find_models(root, SYSTEM), model, " of " + ", ".join(SYSTEM)).path
    except UsageError as error:
        raise UsageError(f"server '{declaration.name}': {error.message}", hint=error.hint) from None
    return replace(declaration, model=path)


def named(found: Iterable[Model], name: str, where: str = "") -> Model:
    """The one model of a name: of its file, its repository, or ``OWNER/NAME:QUANTISATION``.

    Raises UsageError where there is none, or more than one.
    """
    found = list(found)
    matching = [each for each in found if _is_called(each, name)]
    shown = printable_line(name, 80)
    if not matching:
        near = did_you_mean(name, [each.name for each in found])
        raise UsageError(f"there is no file and no model{where} '{shown}'{near}", hint=_HINT)
    if len(matching) > 1:
        choices = ", ".join(printable_line(each.path, 200) for each in matching[:_SHOWN])
        more = f", and {len(matching) - _SHOWN} more" if len(matching) > _SHOWN else ""
        raise UsageError(f"'{shown}' is {len(matching)} models: {choices}{more}", hint=_HINT)
    one = matching[0]
    if one.missing:
        raise UsageError(f"{printable_line(one.path, 200)}: {one.missing} of its parts are missing")
    return one


_HINT = "'infertune models' lists them; or give the path of one"


def _is_called(model: Model, name: str) -> bool:
    wanted, _, tag = name.casefold().removesuffix(".gguf").partition(":")
    called = model.name.casefold()
    if not tag and called == wanted:
        return True
    if model.repository is None or model.repository.casefold() != wanted:
        return False
    return not tag or re.search(rf"(?:^|[-.]){re.escape(tag)}$", called) is not None
