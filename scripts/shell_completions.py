# SPDX-License-Identifier: Apache-2.0
"""completions/: what each shell completes of the command line, for generate_docs.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import shtab

from infertune.base.names import DECLARED
from infertune.catalogue.knobs import KNOBS
from infertune.cli.main import commands
from infertune.cli.parser import build_parser
from infertune.doctor.rules import RULES
from infertune.profiles.profile import SEARCH_PATH
from infertune.servers.declaration import TRANSIENT

SHELLS = ("bash", "zsh", "fish")
_OWN = Path(__file__).resolve().parent.parent / "profiles"


def pages() -> dict[str, str]:
    """One text for each shell: verbs, options, and the names that they take."""
    parser = build_parser(commands())
    _name_completers(parser)
    return {shell: shtab.complete(parser, shell=shell).rstrip("\n") + "\n" for shell in SHELLS}


def _names_in(directories: Sequence[str], known: Iterable[str] = ()) -> Any:
    """A completer of what lies as NAME.toml in directories of the machine.

    A shell looks there: Python would take half a second for each Tab.
    """
    there = f"ls {' '.join(directories)} 2>/dev/null | sed -n 's/[.]toml//p'"
    return shtab.cmd(f"echo {' '.join(known)}; {there}" if known else there)


def _name_completers(parser: argparse.ArgumentParser) -> None:
    """Tell shtab what the arguments of every verb take, by the word that stands for each."""
    own = sorted(each.stem for each in _OWN.glob("*.toml"))
    completers: dict[object, Any] = {
        **dict.fromkeys(("PROFILE", "PROFILE|FILE", "P"), _names_in(SEARCH_PATH, own)),
        **dict.fromkeys(("MODEL", "FILE", "GGUF", "PATH"), shtab.FILE),
    }
    choices: dict[object, list[str]] = {"KNOB": list(KNOBS), "ID": list(RULES)}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                below.description = None  # else a whole paragraph is shown beside the verb
                _name_completers(below)
        elif action.metavar == "NAME" and not action.option_strings:
            action.complete = _names_in((DECLARED, TRANSIENT))  # type: ignore[attr-defined]
        elif action.metavar in completers:
            action.complete = completers[action.metavar]  # type: ignore[attr-defined]
        elif action.metavar in choices:
            action.choices = choices[action.metavar]
