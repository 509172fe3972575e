# SPDX-License-Identifier: Apache-2.0
"""The verbs: where each is, under which heading the help has it, and what it is for in one line.

Only the module of the verb at hand is imported: all of them take longer than most verbs do, and
``--help`` needs none.
"""

from __future__ import annotations

from infertune.base.records import dataclass

GROUPS = {
    "look": "Look",
    "tune": "Tune, and put back",
    "serve": "Serve a model",
    "boot": "Set for the next boot",
    "measure": "Measure",
    "service": "Service",
}
"""Headings of the help, in the order in which a person works."""


@dataclass(frozen=True)
class Verb:
    """What is known of a verb before its module is imported."""

    name: str
    module: str
    """The module of this package that has it in its ``COMMANDS``."""
    group: str
    """One of GROUPS."""
    help: str
    acts: bool = False
    """Whether it does more than print.  Its exit code says how that went, whoever hears of it; of
    every other verb the output is all there is, and without it the verb has failed."""


VERBS: dict[str, Verb] = {
    each.name: each
    for each in (
        Verb("overview", "overview", "look", "say how this machine stands, and what to do next"),
        Verb("machine", "machine", "look", "show what this machine is"),
        Verb("doctor", "doctor", "look", "look for what is known to be bad on this machine"),
        Verb("knobs", "knobs", "look", "list the settings a profile can use"),
        Verb("models", "models", "look", "list the models on this machine, and say which fit"),
        Verb("fit", "fit", "look", "say whether a model fits, and what would make it fit"),
        Verb("expect", "fit", "look", "say how fast a model can be on this machine"),
        Verb("snapshot", "machine", "look", "record this machine as a text file for --root", True),
        Verb("top", "top", "look", "watch profile, servers, memory and GPU; keys to act"),
        Verb("report", "report", "look", "write all of it to one file, for a bug report", True),
        Verb("recommend", "recommend", "tune", "say which profile suits this machine, and why"),
        Verb("profiles", "profile", "tune", "list the profiles"),
        Verb("profile", "profile", "tune", "show, check or explain one profile"),
        Verb("plan", "engine", "tune", "show what a profile would change; change nothing"),
        Verb("apply", "engine", "tune", "make the machine what a profile says", True),
        Verb("confirm", "engine", "tune", "keep what was applied with --confirm-within", True),
        Verb("status", "engine", "tune", "show what is applied now"),
        Verb("verify", "engine", "tune", "check that the machine is what a profile says"),
        Verb("revert", "engine", "tune", "put every original value back", True),
        Verb("recover", "engine", "tune", "put every original value back after a crash", True),
        Verb("run", "run", "serve", "apply a profile, serve under it, put everything back", True),
        Verb("serve", "serve", "serve", "start a model server as a unit, under a profile", True),
        Verb("servers", "serve", "serve", "list model servers"),
        Verb("start", "serve", "serve", "start a declared server that was stopped", True),
        Verb("stop", "serve", "serve", "stop a model server", True),
        Verb("logs", "serve", "serve", "show what a model server printed"),
        Verb(
            "prewarm",
            "prewarm",
            "serve",
            "read models into memory before a server needs them",
            True,
        ),
        Verb("adopt", "adopt", "serve", "put a server that you already run under a profile", True),
        Verb(
            "admit", "adopt", "serve", "say whether an adopted server would fit if it started now"
        ),
        Verb("release", "adopt", "serve", "give an adopted unit back as it was", True),
        Verb("boot", "boot", "boot", "settings that take effect at the next boot"),
        Verb("bench", "bench", "measure", "measure how fast a model is served here", True),
        Verb("prove", "prove", "measure", "say whether a profile helps on this machine", True),
        Verb("gate", "gate", "measure", "say whether other server settings keep the answers"),
        Verb("tune", "tune", "measure", "look for faster server settings, same answers", True),
        Verb("probes", "probes", "measure", "show which eBPF probes are attached"),
        Verb("setup", "setup", "service", "install the files of the service, or remove them", True),
        Verb("mcp", "mcp", "service", "serve infertune as tools of an agent (MCP)", True),
    )
}
"""In the order in which the help has them."""

MODULES = tuple(dict.fromkeys(each.module for each in VERBS.values()))
