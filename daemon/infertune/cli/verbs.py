# SPDX-License-Identifier: Apache-2.0
"""The verbs by the modules of this package they are in, with what each is for in one line.

Only the module of the verb at hand is imported: all of them take longer than most verbs do, and
``--help`` needs none.
"""

from __future__ import annotations

VERBS: dict[str, dict[str, str]] = {
    "machine": {
        "machine": "show what this machine is",
        "snapshot": "record this machine as a text file for --root",
    },
    "knobs": {
        "knobs": "list the settings a profile can use",
    },
    "doctor": {
        "doctor": "look for what is known to be bad on this machine",
    },
    "profile": {
        "profiles": "list the profiles",
        "profile": "show, check or explain one profile",
    },
    "engine": {
        "plan": "show what a profile would change; change nothing",
        "apply": "make the machine what a profile says",
        "confirm": "keep what was applied with --confirm-within",
        "verify": "check that the machine is what a profile says",
        "status": "show what is applied now",
        "revert": "put every original value back",
        "recover": "put every original value back after a crash",
    },
    "boot": {
        "boot": "settings that take effect at the next boot",
    },
    "fit": {
        "fit": "say whether a model fits into this machine, and what would make it fit",
        "expect": "say how fast a model can be on this machine",
    },
    "models": {
        "models": "list the models on this machine, and say which fit",
    },
    "run": {
        "run": "apply a profile, serve under it, put everything back",
    },
    "serve": {
        "serve": "start a model server as a unit, under a profile",
        "start": "start a declared server that was stopped",
        "servers": "list model servers",
        "stop": "stop a model server",
        "logs": "show what a model server printed",
    },
    "adopt": {
        "adopt": "put a server that you already run under a profile",
        "release": "give an adopted unit back as it was",
    },
    "setup": {
        "setup": "install the files of the service, or remove them",
    },
    "probes": {
        "probes": "show which eBPF probes are attached",
    },
}


def module_of(verb: str | None) -> str | None:
    """The module that has a verb; None where none has."""
    return next((module for module, verbs in VERBS.items() if verb in verbs), None)


def help_of(verb: str) -> str:
    """What a verb is for."""
    return next(verbs[verb] for verbs in VERBS.values() if verb in verbs)
