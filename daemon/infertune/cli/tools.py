# SPDX-License-Identifier: Apache-2.0
"""What an agent may ask for: one entry for each tool, and the command line that answers it.  Pure.

A tool is a verb with ``--json`` and a few of its arguments.  The process of the verb is that of
whoever runs ``infertune mcp``, so a tool may do what its caller may do, and polkit asks as always.
Nothing here starts a program that the caller names, and no argument of a tool can become an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from infertune.base.errors import UsageError, did_you_mean
from infertune.base.records import dataclass

MAX_WORD = 4096
"""Characters of an argument: PATH_MAX."""
SHORT_S = 60
"""Seconds for a verb that only reads."""
LONG_S = 4 * 3600
"""Seconds for one that measures; its own deadlines are shorter."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a tool."""

    name: str
    what: str
    option: str = ""
    """The verb's option; empty for a word of its own."""
    required: bool = False
    default: str | int | None = None
    whole: tuple[int, int] | None = None
    """Lowest and highest number; None for a text."""
    flag: bool = False
    """Whether it is on or off."""
    pattern: str = r"[^\x00-\x1f\x7f]+"
    """What a text looks like."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One verb, as an agent sees it."""

    name: str
    verb: tuple[str, ...]
    what: str
    parameters: tuple[Parameter, ...] = ()
    changes: bool = False
    """Whether the machine is another one afterwards."""
    measures: bool = False
    """Whether it needs the machine for itself, and long."""

    @property
    def limit_s(self) -> int:
        return LONG_S if self.measures else SHORT_S


_PROFILE = Parameter("profile", "name of a profile, as 'profiles' lists them", required=True)
_UNDER = Parameter("profile", "name of a profile", "--profile")
_MODEL = Parameter("model", "path of a GGUF file, or a name that 'models' lists", required=True)
_BACKEND = Parameter(
    "backend", "auto, rocm, vulkan or cpu", "--backend", pattern="auto|rocm|vulkan|cpu"
)
_WITHIN = Parameter(
    "confirm_within",
    "after this time everything goes back unless 'confirm' was called: 30s to 60min",
    "--confirm-within",
    default="5min",
    pattern=r"(3\d|[4-9]\d|[1-9]\d\d)s|([1-9]|[1-5]\d|60)min",
)

TOOLS = {
    tool.name: tool
    for tool in (
        Tool("machine", ("machine",), "What this machine is: memory, GPU, kernel, tuners."),
        Tool("doctor", ("doctor",), "What is known to be bad on this machine, and fixes."),
        Tool("knobs", ("knobs",), "Every setting that a profile can use, its value now, its risk."),
        Tool("profiles", ("profiles",), "Profiles, and where each comes from."),
        Tool("explain", ("profile", "explain"), "What a profile comes to here, and why.",
             (_PROFILE, _BACKEND)),
        Tool("models", ("models",), "Models on this machine, and which fit."),
        Tool("servers", ("servers",), "Model servers, and what each runs under."),
        Tool("status", ("status",), "What is applied now, and what has drifted."),
        Tool("plan", ("plan",), "What a profile would change. Changes nothing.",
             (_PROFILE, _BACKEND)),
        Tool("verify", ("verify",), "Whether the machine is what a profile says.",
             (_PROFILE, _BACKEND)),
        Tool("fit", ("fit",), "Whether a model fits, and what would make it fit.",
             (_MODEL, _UNDER, _BACKEND)),
        Tool("expect", ("expect",), "How fast memory bandwidth lets a model be, beside what was "
             "measured here.", (_MODEL,)),
        Tool("bench", ("bench",), "Measure time to the first token, time per token and tokens per "
             "second. Takes minutes; refuses while other programs work.",
             (Parameter("model", _MODEL.what), _UNDER, _BACKEND,
              Parameter("url", "address of a server that runs, instead of starting one", "--url",
                        pattern=r"https?://[^\s]+"),
              Parameter("samples", "samples that count, of each row", "--samples", whole=(1, 1000)),
              Parameter("against", "a profile, or an earlier run, to compare with in pairs",
                        "--against"),
              Parameter("busy", "measure among programs that work", "--busy", flag=True)),
             measures=True),
        Tool("prove", ("prove",), "Measure whether a profile helps on this machine, in pairs in "
             "random order: helps, harms, no effect shown, cannot decide. Takes the budget; "
             "everything goes back. Needs root, or launch_only.",
             (_PROFILE, Parameter("model", _MODEL.what, "--model"), _BACKEND,
              Parameter("budget", "time for all of it, as 20m", "--budget", default="20m",
                        pattern=r"[1-9]\d?\d?m"),
              Parameter("launch_only", "leave the kernel's settings alone", "--launch-only",
                        flag=True),
              Parameter("busy", "measure among programs that work", "--busy", flag=True)),
             measures=True),
        Tool("tune", ("tune",), "Look for faster server settings that give the same answers; "
             "another process checks what is proposed. Takes the budget; only servers are started.",
             (Parameter("model", _MODEL.what),
              Parameter("goal", "latency or throughput", "--goal", pattern="latency|throughput"),
              Parameter("minutes", "time for all of it", "--budget", default=30, whole=(5, 240)),
              Parameter("resume", "directory of a run that was cut short", "--resume"),
              Parameter("busy", "measure among programs that work", "--busy", flag=True)),
             measures=True),
        Tool("apply", ("apply",), "Make the machine what a profile says. Everything goes back by "
             "itself after confirm_within unless 'confirm' is called. Needs the daemon.",
             (_PROFILE, _BACKEND, _WITHIN), changes=True),
        Tool("confirm", ("confirm",), "Keep what 'apply' changed.", changes=True),
        Tool("revert", ("revert",), "Put every original value back.", changes=True),
    )
}  # fmt: skip


def schema(tool: Tool) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments."""
    properties = {each.name: _property(each) for each in tool.parameters}
    required = [each.name for each in tool.parameters if each.required]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _property(parameter: Parameter) -> dict[str, Any]:
    about: dict[str, Any] = {"description": parameter.what}
    if parameter.flag:
        about["type"] = "boolean"
    elif parameter.whole:
        low, high = parameter.whole
        about |= {"type": "integer", "minimum": low, "maximum": high}
    else:
        about |= {"type": "string", "maxLength": MAX_WORD, "pattern": f"^({parameter.pattern})$"}
    if parameter.default is not None:
        about["default"] = parameter.default
    return about


def words(tool: Tool, given: Mapping[str, Any]) -> list[str]:
    """The verb's command line for these arguments.  Raises UsageError.

    An option and its value are one word, and a word of its own never begins with '-': no value can
    be read as an option.
    """
    known = {each.name: each for each in tool.parameters}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; known: {', '.join(known) or 'none'}"
            raise UsageError(f"'{tool.name}' has no argument '{name[:80]}'{hint}")
    line = [*tool.verb, "--json"]
    for parameter in tool.parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            if parameter.required:
                raise UsageError(f"'{tool.name}' needs the argument '{parameter.name}'")
        elif parameter.flag:
            line += [parameter.option] if _switch(parameter, value) else []
        else:
            text = _text(parameter, value)
            line.append(f"{parameter.option}={text}" if parameter.option else text)
    return line


def _switch(parameter: Parameter, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"'{parameter.name}' is true or false")
    return value


def _text(parameter: Parameter, value: object) -> str:
    if parameter.whole:
        low, high = parameter.whole
        if type(value) is not int or not low <= value <= high:
            raise UsageError(f"'{parameter.name}' is a number from {low} to {high}")
        return str(value)
    if (
        not isinstance(value, str)
        or len(value) > MAX_WORD
        or value.startswith("-")
        or not re.fullmatch(parameter.pattern, value, re.ASCII)
    ):
        raise UsageError(f"'{parameter.name}' is not valid: {parameter.what}")
    return value
