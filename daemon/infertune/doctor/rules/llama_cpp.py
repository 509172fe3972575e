# SPDX-License-Identifier: Apache-2.0
"""Builds of llama.cpp: windows with a bug, flags that are gone, and one token as a proof.

Numbers of builds are those of the issues: the first and the last build somebody reported bad, and
the first one that is known to have the fix.  Where nobody has named that one, the end is estimated
from dates, and the window says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from infertune.base.records import dataclass, replace
from infertune.doctor.base import (
    Answer,
    Confidence,
    Finding,
    Missing,
    Rule,
    Severity,
    Source,
    Unknown,
    Window,
    github,
    llama,
    need,
)
from infertune.doctor.builds import ROCM_BUILD, affected, image_build
from infertune.doctor.conditions import (
    AMDGPU,
    DECLARED,
    INTEGRATED,
    RDNA35,
    SERVER,
    SMOKED,
)
from infertune.doctor.facts import Facts
from infertune.doctor.surroundings import LlamaServer
from infertune.host.servers import Declared
from infertune.server_files.command_line import LLAMA

_WRONG_LOGITS = Window(first=(10040,), last=(10588,), good=(11669,), estimated=True)
"""b10039 is good and b10040 bad by bisection (#27506), b10588 was still bad; the fix, d4389a4dd920,
is of 8 September 2026, and Debian's b11669 is well after it."""
_MISREAD_MEMORY = Window(first=(7464,), last=(10460,), good=(10485,))
"""Reported with b7464; the fix 60eeeb6 is in v0.1.2, whose nightly is b10485."""
_PROMPT_REGRESSION = Window(first=(7349,), last=(7522,), good=(7700,), estimated=True)
"""Reported with b7349; eased by #18537 and #18666 in January 2026, whose build is a guess.  The
issue is still open."""
_TOP_K = Window(first=(10079,), last=(10241,), good=(10875,), estimated=True)
"""b10069 is good and b10079 bad (one report); #27466 was merged on 31 August 2026, b10875 is of 9
September.  Which build was the first with it is not known."""

_REPOSITORY = "https://github.com/ggml-org/llama.cpp/blob/master"
_BUILDING = Source("llama.cpp: docs/build.md", f"{_REPOSITORY}/docs/build.md")
_SERVER = Source("llama.cpp: llama-server", f"{_REPOSITORY}/tools/server/README.md")

LOAD_MODE_ONLY = 10875
"""First build without --mmap, --no-mmap, --mlock and --direct-io (pull request 28334)."""

_SPEC = llama(22397)
_LOAD = llama(28334)
_DRAFT = llama(22838)


@dataclass(frozen=True, slots=True)
class Gone:
    """A flag or a variable that llama-server no longer takes."""

    build: int
    """First build that is known to be without it."""
    instead: str
    """What to write; "" for nothing."""
    source: Source
    fatal: bool = True
    """The server does not start with it; a variable may be ignored instead."""


GONE_FLAGS: Mapping[str, Gone] = {
    "--mlock": Gone(LOAD_MODE_ONLY, "--load-mode mlock", _LOAD),
    "--mmap": Gone(LOAD_MODE_ONLY, "--load-mode mmap", _LOAD),
    "--no-mmap": Gone(LOAD_MODE_ONLY, "--load-mode none", _LOAD),
    "--direct-io": Gone(LOAD_MODE_ONLY, "--load-mode dio", _LOAD),
    "-dio": Gone(LOAD_MODE_ONLY, "--load-mode dio", _LOAD),
    "--no-direct-io": Gone(LOAD_MODE_ONLY, "", _LOAD),
    "-ndio": Gone(LOAD_MODE_ONLY, "", _LOAD),
    # b8953 is without the pull request, b8962 with it.
    "--draft": Gone(8962, "--spec-draft-n-max", _SPEC),
    "--draft-n": Gone(8962, "--spec-draft-n-max", _SPEC),
    "--draft-max": Gone(8962, "--spec-draft-n-max", _SPEC),
    "--draft-min": Gone(8962, "--spec-draft-n-min", _SPEC),
    "--draft-n-min": Gone(8962, "--spec-draft-n-min", _SPEC),
    "--spec-ngram-size-n": Gone(8962, "--spec-ngram-simple-size-n", _SPEC),
    "--spec-ngram-size-m": Gone(8962, "--spec-ngram-simple-size-m", _SPEC),
    "--spec-ngram-min-hits": Gone(8962, "--spec-ngram-simple-min-hits", _SPEC),
    # b9106 has them, b9134 has not.
    "--ctx-size-draft": Gone(9134, "", _DRAFT),
    "-cd": Gone(9134, "", _DRAFT),
    "--spec-draft-ctx-size": Gone(9134, "", _DRAFT),
    # Reported with b9535.
    "--checkpoint-every-n-tokens": Gone(9535, "--checkpoint-min-step", llama(22929)),
    "-cpent": Gone(9535, "--checkpoint-min-step", llama(22929)),
}
"""What llama.cpp took away from llama-server in 2026, for binaries whose --help is not known."""

_FLASH = ("--flash-attn", "-fa")
_FLASH_VALUE = 6325
"""Build of pull request 15434: --flash-attn has a value since, and takes the next flag for it."""

NEW_FLAGS: Mapping[str, tuple[int, str, Source]] = {
    **dict.fromkeys(("--load-mode", "-lm"), (9672, "--no-mmap or --mlock", llama(20834))),
    **dict.fromkeys(
        ("--spec-draft-n-max", "--spec-draft-n-min"), (8953, "--draft-max, --draft-min", _SPEC)
    ),
}
"""Flags, the last build that is known to be without them, and what it takes instead."""

GONE_VARIABLES: Mapping[str, Gone] = {
    "LLAMA_ARG_MLOCK": Gone(LOAD_MODE_ONLY, "LLAMA_ARG_LOAD_MODE=mlock", _LOAD, fatal=False),
    "LLAMA_ARG_MMAP": Gone(LOAD_MODE_ONLY, "LLAMA_ARG_LOAD_MODE", _LOAD, fatal=False),
    "LLAMA_ARG_NO_MMAP": Gone(LOAD_MODE_ONLY, "LLAMA_ARG_LOAD_MODE=none", _LOAD, fatal=False),
    "LLAMA_ARG_DIO": Gone(LOAD_MODE_ONLY, "LLAMA_ARG_LOAD_MODE=dio", _LOAD, fatal=False),
    # Bound to the entries that refuse the flags.
    "LLAMA_ARG_DRAFT_MAX": Gone(8962, "LLAMA_ARG_SPEC_DRAFT_N_MAX", _SPEC),
    "LLAMA_ARG_DRAFT_MIN": Gone(8962, "LLAMA_ARG_SPEC_DRAFT_N_MIN", _SPEC),
    "LLAMA_ARG_DRAFT_P_MIN": Gone(8962, "LLAMA_ARG_SPEC_DRAFT_P_MIN", llama(26100), fatal=False),
}


@dataclass(frozen=True, slots=True)
class _Binary:
    """What is known of the program that a declared server runs."""

    name: str
    build: int | None
    flags: frozenset[str] | None
    """By its own --help; None where that is not known."""
    variables: frozenset[str] | None
    sure: bool
    """Whether it is the llama-server on the search path."""
    places: tuple[str, ...] = ()


def _binary(server: Declared, facts: Facts) -> _Binary:
    """Raises Missing where nothing is known of it."""
    known = facts.server
    if server.image is not None:
        number = image_build(server.image)
        name = f"the image's b{number}" if number else "the image's build"
        return _Binary(name, number, None, None, sure=False)
    if server.kind == "Lemonade":
        return _Binary("the build that Lemonade chose", None, None, None, sure=False)
    absolute = server.program.startswith("/")
    elsewhere = server.program.startswith("/elsewhere/")
    if known is None or (elsewhere and isinstance(known, Unknown)):
        return _Binary("its build", None, None, None, sure=False)
    binary = _of(need(facts.llama))
    if elsewhere or (absolute and binary.places and server.program not in binary.places):
        return replace(binary, flags=None, variables=None, sure=False)
    return binary


def _of(known: LlamaServer) -> _Binary:
    return _Binary(
        f"b{known.build}" if known.build else f"this llama-server ({known.version})",
        known.build,
        None if isinstance(known.flags, Unknown) else known.flags,
        None if isinstance(known.variables, Unknown) else known.variables,
        sure=True,
        places=known.places,
    )


def _gone(server: Declared, binary: _Binary) -> list[str]:
    """The flags of a server that its program does not take."""
    if binary.flags is None:
        return sorted(flag for flag in server.flags if _is_gone_flag(flag, binary.build))
    # A key of a preset has no dashes, so it may be a short flag or a long one.
    bare = {flag.lstrip("-") for flag in binary.flags} if server.kind == "preset" else frozenset()
    return sorted(
        flag
        for flag in server.flags
        if flag not in binary.flags and flag.lstrip("-") not in (bare | _PRESET_ONLY)
    )


def _is_gone_flag(flag: str, build: int | None) -> bool:
    """By the tables; with a build that is not known any flag that has gone is a doubt."""
    if flag in NEW_FLAGS:
        return build is not None and build <= NEW_FLAGS[flag][0]
    gone = GONE_FLAGS.get(flag)
    return gone is not None and (build is None or build >= gone.build)


_PRESET_ONLY = frozenset(("load-on-startup", "stop-timeout"))
"""Keys of a preset that are no flags (llama.cpp: common/preset.cpp)."""


def _window(window: Window, harm: str, doubt: Severity) -> Callable[[Facts], Answer]:
    """A check of the build; between the known ends it is a doubt, and less severe."""

    def check(facts: Facts) -> Answer:
        found = affected(facts, "rocm", window)
        if found is None:
            return None
        build, bad = found
        if bad:
            return Finding(
                f"{build.name} with ROCm {harm}", confidence=None if build.sure else "likely"
            )
        return Finding(
            f"{build.name} may be from before the fix: with ROCm it {harm}",
            severity=doubt,
            confidence="likely",
        )

    return check


def _gone_flags(facts: Facts) -> Answer:
    found: list[tuple[Declared, _Binary, list[str]]] = []
    missing: Unknown | None = None
    for server in need(facts.declared):
        missing = missing or (Unknown(server.unread) if server.unread else None)
        if server.engine != LLAMA or not server.flags:
            continue
        try:
            binary = _binary(server, facts)
        except Missing as error:
            missing = error.unknown
            continue
        if gone := _gone(server, binary):
            found.append((server, binary, gone))
    if not found:
        return missing
    # What is sure first; then in the order of the files.
    found.sort(key=lambda each: not each[1].sure)
    server, binary, gone = found[0]
    return _gone_finding(server, binary, gone, and_others([each[0].where for each in found]))


def and_others(files: list[str]) -> str:
    """What a finding about the first of several files adds about the others."""
    others = list(dict.fromkeys(files))[1:]
    if not others:
        return ""
    named = ", ".join(others[:2])
    return f" (also {named}{f' and {len(others) - 2} more' if len(others) > 2 else ''})"


def _gone_finding(server: Declared, binary: _Binary, gone: list[str], more: str) -> Finding:
    fix = "; ".join(map(_instead, gone))
    about = f"{'--mlock' if '--mlock' in gone else gone[0]} of {server.where}"
    given = f"{server.where} passes {', '.join(gone)}, which"
    if binary.build is None and binary.flags is None:
        builds = sorted({GONE_FLAGS[flag].build for flag in gone})
        return Finding(
            f"{given} llama.cpp has removed (by {', '.join(f'b{each}' for each in builds)}): with "
            f"such a build the server does not start, and {binary.name} is not known{more}",
            severity="warning",
            confidence="likely",
            fix=fix,
            about=about,
        )
    text = f"{given} {binary.name} does not accept: the server does not start{more}"
    return Finding(text, confidence=None if binary.sure else "likely", fix=fix, about=about)


def may_refuse(server: Declared, facts: Facts, flag: str) -> bool:
    """Whether its program does not take a flag, or may not: ``llama-gone-flags`` tells of it."""
    return flag in _gone(server, _known_binary(server, facts))


def _instead(flag: str) -> str:
    if flag in NEW_FLAGS:
        return f"write {NEW_FLAGS[flag][1]} for {flag}, or use a newer build"
    gone = GONE_FLAGS.get(flag)
    if gone is None:
        return f"remove {flag}, or write it as llama-server --help has it"
    return f"write {gone.instead} for {flag}" if gone.instead else f"remove {flag}"


def _bare_flash(facts: Facts) -> Answer:
    found = [
        (server, binary)
        for server in need(facts.declared)
        if server.engine == LLAMA and any(server.flags.get(flag) == "" for flag in _FLASH)
        if (binary := _known_binary(server, facts)).build is None or binary.build >= _FLASH_VALUE
    ]
    if not found:
        return None
    server, binary = found[0]
    flag = next(flag for flag in _FLASH if flag in server.flags)
    return Finding(
        f"{server.where} passes {flag} without a value: from b{_FLASH_VALUE} on llama-server takes "
        "the next flag as its value, and does not start"
        + and_others([each.where for each, _ in found]),
        severity="error" if binary.build else "warning",
        confidence=None if binary.sure else "likely",
        fix=f"write {flag} on (or auto, the default)",
    )


def _known_binary(server: Declared, facts: Facts) -> _Binary:
    try:
        return _binary(server, facts)
    except Missing:
        return _Binary("its build", None, None, None, sure=False)


def _gone_variables(facts: Facts) -> Answer:
    for name, value, where, binary in _given_variables(facts):
        gone = GONE_VARIABLES.get(name)
        if not _is_gone(name, gone, binary, facts):
            continue
        given = f"{name}={value} ({where})"
        fix = f"set {gone.instead} instead" if gone else f"remove {name}"
        confidence: Confidence | None = None if binary.sure else "likely"
        if gone and gone.fatal:
            text = f"{given} is refused by {binary.name}: the server does not start"
            return Finding(text, "error", confidence, fix)
        return Finding(f"{given} is silently ignored by {binary.name}", None, confidence, fix)
    return None


def _given_variables(facts: Facts) -> Iterator[tuple[str, str, str, _Binary]]:
    """Variables of llama-server, their values, who has them, and the program that gets them."""
    caller = need(facts.environment)
    own = _of(need(facts.llama))
    yield from ((name, caller[name], "your environment", own) for name in caller)
    for server in need(facts.declared):
        if server.engine == LLAMA:
            binary = _binary(server, facts)
            for name, value in server.environment.items():
                yield name, value, server.origins.get(name, server.where), binary


def _is_gone(name: str, gone: Gone | None, binary: _Binary, facts: Facts) -> bool:
    """Raises Missing where it is not known what the program takes."""
    if not name.startswith("LLAMA_ARG_"):
        return False
    if binary.variables is not None:
        # LLAMA_ARG_NO_X switches off what LLAMA_ARG_X stands for.
        return binary.variables.isdisjoint((name, name.replace("_NO_", "_", 1)))
    if gone is None:
        return False
    return (binary.build or (facts.build if binary.sure else 0)) >= gone.build


def _no_gpu_backend(facts: Facts) -> Answer:
    backends = need(facts.llama).backends
    if set(backends) != {"cpu"}:
        return None
    return Finding(
        "no ROCm or Vulkan library was found for this llama-server: it may only use the CPU"
    )


def _no_number(facts: Facts) -> Answer:
    server = need(facts.llama)
    if server.build is not None:
        return None
    return Finding(
        f"llama-server calls itself '{server.version}': without a build number no known bug can be "
        "looked up"
    )


def _smoke(outcome: str) -> Callable[[Facts], Answer]:
    def check(facts: Facts) -> Answer:
        smoke = facts.smoke
        if smoke is None or smoke.outcome == "not-run":
            return Unknown(smoke.detail if smoke else "no server was asked")
        return Finding(smoke.detail) if smoke.outcome == outcome else None

    return check


RULES: tuple[Rule, ...] = (
    Rule(
        id="llama-wrong-logits",
        title="wrong results with ROCm for prompts longer than a micro-batch",
        when=RDNA35 & ROCM_BUILD,
        check=_window(
            _WRONG_LOGITS,
            "computes wrong logits for prompts longer than n_ubatch, without any error",
            "warning",
        ),
        severity="error",
        confidence="sure",
        fix="use a build of October 2026 or later, or Vulkan; until then set ubatch_size to "
        "batch_size",
        sources=(llama(28211), llama(27506), github("noamsto/nix-amd-ai", 128)),
        window=_WRONG_LOGITS,
        at_launch=True,
    ),
    Rule(
        id="llama-mixed-answers",
        title="with several slots, one request can get another's answer",
        when=RDNA35 & ROCM_BUILD,
        check=_window(
            _WRONG_LOGITS,
            "can give one client another's answer with several slots and a unified cache",
            "warning",
        ),
        severity="error",
        confidence="sure",
        fix="use a build of October 2026 or later, Vulkan, or one slot (--parallel 1)",
        sources=(llama(25992), llama(27579)),
        window=_WRONG_LOGITS,
        at_launch=True,
    ),
    Rule(
        id="llama-misread-memory",
        title="free memory of an APU is taken from MemAvailable instead of GTT",
        when=INTEGRATED & ROCM_BUILD,
        check=_window(
            _MISREAD_MEMORY,
            "takes MemAvailable for the GPU's free memory: it offloads too little, or too much",
            "info",
        ),
        confidence="sure",
        fix="use b10485 or newer; until then set --fit off and the sizes yourself",
        sources=(llama(18159), llama(27083)),
        window=_MISREAD_MEMORY,
    ),
    Rule(
        id="llama-slow-prompts",
        title="WMMA kernels that made prompts slower on RDNA 3.5",
        when=RDNA35 & ROCM_BUILD,
        check=_window(_PROMPT_REGRESSION, "processes prompts of quantised models slowly", "info"),
        fix="use a newer build, built with ROCm 7.2.1 or newer",
        sources=(llama(17917), llama(17576)),
        window=_PROMPT_REGRESSION,
    ),
    Rule(
        id="llama-top-k",
        title="with ROCm, TOP_K runs on the CPU and slows generation",
        when=AMDGPU & ROCM_BUILD,
        check=_window(_TOP_K, "does top-k on the CPU: 39 tokens/s became 11 in one report", "info"),
        fix="use a build from September 2026 on, or Vulkan",
        sources=(github("unslothai/unsloth", 7371), llama(26399), llama(27466)),
        window=_TOP_K,
    ),
    Rule(
        id="llama-gone-flags",
        title="a server is started with flags that its llama-server does not take",
        when=DECLARED,
        check=_gone_flags,
        severity="error",
        confidence="sure",
        fix="write what llama-server --help has instead",
        sources=(llama(28334), llama(20834), llama(22397), llama(22838), llama(22929)),
        covers=("memlock-limit",),
    ),
    Rule(
        id="llama-flash-value",
        title="--flash-attn without the value it has needed since August 2025",
        when=DECLARED,
        check=_bare_flash,
        severity="error",
        confidence="sure",
        fix="write --flash-attn on",
        sources=(llama(15434), github("defilantech/LLMKube", 147)),
    ),
    Rule(
        id="llama-gone-variables",
        title="variables that the installed llama-server ignores",
        when=SERVER,
        check=_gone_variables,
        confidence="sure",
        fix="set what llama-server --help has instead",
        sources=(llama(28334), llama(22397), llama(26100)),
    ),
    Rule(
        id="llama-no-gpu",
        title="a llama-server without a GPU backend",
        when=AMDGPU & SERVER,
        check=_no_gpu_backend,
        fix="install the Vulkan backend (libggml0-backend-vulkan on Debian) or a ROCm build",
        sources=(_BUILDING,),
    ),
    Rule(
        id="llama-no-number",
        title="a llama-server built without a build number",
        when=SERVER,
        check=_no_number,
        severity="info",
        confidence="sure",
        fix="build from a checkout with its history, or set LLAMA_BUILD_NUMBER",
        sources=(github("AOSC-Dev/aosc-os-abbs", 15369),),
    ),
    Rule(
        id="llama-illegal-instruction",
        title="llama-server dies with an illegal instruction at its first token",
        when=SMOKED,
        check=_smoke("illegal-instruction"),
        severity="error",
        confidence="sure",
        fix="install a build for this CPU, one with several CPU backends (Debian's), or build it "
        "here",
        sources=(_BUILDING,),
    ),
    Rule(
        id="llama-no-token",
        title="llama-server fails before its first token",
        when=SMOKED,
        check=_smoke("died"),
        severity="error",
        confidence="sure",
        fix="start it with 'infertune run' to see what the server says",
        sources=(_SERVER,),
    ),
    Rule(
        id="llama-silent",
        title="llama-server produces no token in time",
        when=SMOKED,
        check=_smoke("silent"),
        fix="try a smaller model; check the kernel log for GPU hangs",
        sources=(_SERVER,),
    ),
)
