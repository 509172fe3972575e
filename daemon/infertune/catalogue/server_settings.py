# SPDX-License-Identifier: Apache-2.0
"""What a profile's ``[server]`` may say, and how it becomes flags of one llama-server.

llama.cpp renames and removes flags between builds, and its version text is not
reliable, so flags are taken from that binary's own ``--help``.  What the help
does not know is refused with a reason and never passed: an unknown flag stops
the server, an unknown environment variable is silently ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from infertune.base.addresses import LOOPBACK
from infertune.base.errors import did_you_mean
from infertune.base.records import dataclass
from infertune.base.units import MIB, printable_line
from infertune.catalogue.values import Choice, Integer, Size, Switch, Value
from infertune.host.machine import Machine


@dataclass(frozen=True)
class IntegerOr(Integer):
    """A whole number with bounds, or one of some words."""

    words: tuple[str, ...] = ()

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if isinstance(configured, str) and configured in self.words:
            return configured
        return super().parse(configured, machine)

    def accepts(self) -> str:
        return f"{super().accepts()}, or {', '.join(self.words)}"


@dataclass(frozen=True)
class Factor(Value):
    """A positive number with decimals, as a text: settings are words, whole numbers or switches."""

    low: float
    high: float

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        text = str(configured)
        if isinstance(configured, bool) or not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
            raise ValueError(f"{configured!r} is not a number such as '0.5'; {self.accepts()}")
        if not self.low <= float(text) <= self.high:
            raise ValueError(f"{configured} is out of range; {self.accepts()}")
        return f"{float(text):g}"

    def decode(self, raw: bytes) -> str:
        return f"{float(raw):g}"

    def accepts(self) -> str:
        return f"{self.low:g} to {self.high:g}, such as '0.5'"


@dataclass(frozen=True)
class Choices(Choice):
    """Words of a list, separated by commas."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if not isinstance(configured, str):
            return super().parse(configured, machine)
        words = [super(Choices, self).parse(word.strip()) for word in configured.split(",")]
        if len(set(words)) < len(words):
            raise ValueError(f"'{configured}' has a word twice")
        return ",".join(words)

    def accepts(self) -> str:
        return f"{super().accepts()}; several, separated by commas"


@dataclass(frozen=True)
class FilePath(Value):
    """The absolute path of a file that the server reads; whether it is there is asked later."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        # systemd, too, takes no '..' in the paths that it lets a unit see.
        if (
            not isinstance(configured, str)
            or not re.match("/[^/]", configured)
            or not configured.isprintable()
            or len(os.fsencode(configured)) >= _PATH_MAX
            or os.path.normpath(configured) != configured
        ):
            shown = printable_line(str(configured), 80)
            raise ValueError(f"'{shown}' is not {self.accepts()}")
        return configured

    def decode(self, raw: bytes) -> str:
        return os.fsdecode(raw)

    def accepts(self) -> str:
        return "an absolute path of a file, without '..', such as '/srv/models/draft.gguf'"


@dataclass(frozen=True)
class ModelsPath(FilePath):
    """Where a router finds its models: a directory of GGUF files, or a file of presets."""

    what: str

    def accepts(self) -> str:
        return f"an absolute path of {self.what}"


@dataclass(frozen=True)
class ClientName(Value):
    """A name by which clients ask for the model; builds since 2026 read a list at commas."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        del machine
        if not isinstance(configured, str) or not re.fullmatch(
            r"[\w][\w .:/@+-]{0,127}", configured
        ):
            shown = printable_line(str(configured), 80)
            raise ValueError(f"'{shown}' is not {self.accepts()}")
        return configured

    def decode(self, raw: bytes) -> str:
        return raw.decode("utf-8", "replace")

    def accepts(self) -> str:
        return "a name of letters, digits, blanks and . : / @ + - _, at most 128"


_PATH_MAX = 4096
"""Bytes of a path that the kernel takes, with the NUL at its end (limits.h)."""


Way = str | Mapping[str, tuple[str, ...]]
"""A flag that is given the value, or for each value the flags (without value) that mean it."""


@dataclass(frozen=True, kw_only=True)
class ServerSetting:
    """One setting of llama-server, as a catalogue entry."""

    id: str
    value: Value
    summary: str
    ways: tuple[Way, ...]
    """Ways to say it, newest first; the first one the binary knows is used.  Empty where infertune
    does it itself."""
    numbers: bool = False
    """Whether it changes on purpose what is computed, not only in which order or where: the answers
    of such a server are judged harder (measure/gate.py)."""


def _switch(flag: str, off: str | None = None) -> Mapping[str, tuple[str, ...]]:
    return {"1": (flag,), "0": (off,) if off else ()}


DRAFTS = ("draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark")
NGRAMS = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""llama.cpp, common/speculative.cpp; which of them a build has is in its ``--help``."""
_DRAFTS_BY_ITSELF = "draft-mtp"
"""Uses layers of the model itself (unless they come in a file of their own)."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

PREWARM = "prewarm"

_SETTINGS = (
    ServerSetting(
        id="ctx_size",
        value=Integer(0, 2**24, "tokens (0: as the model says)"),
        summary="context of all slots together",
        ways=("--ctx-size",),
    ),
    ServerSetting(
        id="batch_size",
        value=Integer(1, 2**20, "tokens"),
        summary="most tokens of one logical batch",
        ways=("--batch-size",),
    ),
    ServerSetting(
        id="ubatch_size",
        value=Integer(1, 2**20, "tokens"),
        summary="most tokens of one physical batch; large ones are fast but hold the GPU long",
        ways=("--ubatch-size",),
    ),
    ServerSetting(
        id="parallel",
        value=Integer(1, 1024, "slots"),
        summary="requests answered at the same time",
        ways=("--parallel",),
    ),
    ServerSetting(
        id="threads",
        value=Integer(1, 1024, "threads"),
        summary="CPU threads while generating",
        ways=("--threads",),
    ),
    ServerSetting(
        id="threads_batch",
        value=Integer(1, 1024, "threads"),
        summary="CPU threads while reading the prompt",
        ways=("--threads-batch",),
    ),
    ServerSetting(
        id="gpu_layers",
        value=IntegerOr(0, 9999, "layers", words=("auto", "all")),
        summary="layers kept on the GPU",
        ways=("--n-gpu-layers", "--gpu-layers"),
    ),
    ServerSetting(
        id="flash_attn",
        value=Choice(("on", "off", "auto")),
        summary="flash attention; a quantised V cache needs it",
        ways=("--flash-attn", {"on": ("--flash-attn",), "off": ()}),
    ),
    ServerSetting(
        id="cache_type_k",
        value=Choice(CACHE_TYPES),
        summary="type of the K cache; smaller ones change the output a little",
        ways=("--cache-type-k",),
        numbers=True,
    ),
    ServerSetting(
        id="cache_type_v",
        value=Choice(CACHE_TYPES),
        summary="type of the V cache; smaller ones change the output a little",
        ways=("--cache-type-v",),
        numbers=True,
    ),
    ServerSetting(
        id="load_mode",
        value=Choice(("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")),
        summary="how the model file gets into memory; auto avoids mmap on an integrated GPU",
        ways=(
            "--load-mode",
            {
                "auto": (),
                "mmap": (),
                "none": ("--no-mmap",),
                "mlock": ("--mlock",),
                "mmap+mlock": ("--mlock",),
                "dio": ("--direct-io",),
            },
        ),
    ),
    ServerSetting(
        id=PREWARM,
        value=Choice(("auto", "on", "off")),
        summary="whether infertune has the model read into memory while the server sets itself up; "
        "auto leaves it where that is of no use, on only where memory does not allow it",
        ways=(),
    ),
    ServerSetting(
        id="repack",
        value=Switch(),
        summary="repack weights for the CPU while loading: faster there, but they are not mapped",
        ways=(_switch("--repack", "--no-repack"),),
    ),
    ServerSetting(
        id="rope_freq_scale",
        value=Factor(0.01, 4.0),
        summary="factor on positions (0.5: twice the context the model was trained for); changes "
        "every answer",
        ways=("--rope-freq-scale",),
        numbers=True,
    ),
    ServerSetting(
        id="cache_ram",
        value=Size(MIB, 0, 2**20 * MIB, "MiB"),
        summary="memory for prompts kept for reuse; the server's own default is 8 GiB",
        ways=("--cache-ram",),
    ),
    ServerSetting(
        id="cache_reuse",
        value=Integer(0, 2**20, "tokens"),
        summary="shortest piece of an earlier prompt that is shifted and used again",
        ways=("--cache-reuse",),
        numbers=True,
    ),
    ServerSetting(
        id="kv_unified",
        value=Switch(),
        summary="one KV cache for all slots",
        ways=(_switch("--kv-unified", "--no-kv-unified"),),
    ),
    ServerSetting(
        id="kv_offload",
        value=Switch(),
        summary="KV cache on the GPU",
        ways=(_switch("--kv-offload", "--no-kv-offload"),),
    ),
    ServerSetting(
        id="cont_batching",
        value=Switch(),
        summary="add new requests to a running batch",
        ways=(_switch("--cont-batching", "--no-cont-batching"),),
    ),
    ServerSetting(
        id="fit",
        value=Choice(("on", "off")),
        summary="let the server shrink unset settings until the model fits",
        ways=("--fit",),
    ),
    ServerSetting(
        id="n_cpu_moe",
        value=Integer(0, 9999, "layers"),
        summary="layers whose experts stay on the CPU side",
        ways=("--n-cpu-moe",),
    ),
    ServerSetting(
        id="prio",
        value=Integer(-1, 3),
        summary="thread priority: -1 low, 0 normal, 1 medium, 2 high, 3 real time",
        ways=("--prio",),
    ),
    ServerSetting(
        id="poll",
        value=Integer(0, 100, "%"),
        summary="how much idle threads spin; no effect on builds with OpenMP",
        ways=("--poll",),
    ),
    ServerSetting(
        id="warmup",
        value=Switch(),
        summary="one empty run before the server is ready",
        ways=(_switch("--warmup", "--no-warmup"),),
    ),
    ServerSetting(
        id="metrics",
        value=Switch(),
        summary="serve /metrics",
        ways=(_switch("--metrics"),),
    ),
    ServerSetting(
        id="slots",
        value=Switch(),
        summary="serve /slots",
        ways=(_switch("--slots", "--no-slots"),),
    ),
    ServerSetting(
        id="jinja",
        value=Switch(),
        summary="use the chat template of the model file",
        ways=(_switch("--jinja", "--no-jinja"),),
    ),
    ServerSetting(
        id="alias",
        value=ClientName(),
        summary="name by which clients ask for the model; without one that of its file",
        ways=("--alias",),
    ),
    ServerSetting(
        id="sleep_idle_seconds",
        value=Integer(1, 10**7, "seconds"),
        summary="unload the model when nobody has asked for so long; the next request loads it",
        ways=("--sleep-idle-seconds",),
    ),
    ServerSetting(
        id="models_dir",
        value=ModelsPath("a directory, without '..', such as '/srv/models'"),
        summary="a router over the models of a directory, instead of a server of one model",
        ways=("--models-dir",),
    ),
    ServerSetting(
        id="models_preset",
        value=ModelsPath("a file, without '..', such as '/etc/models.ini'"),
        summary="a router over the models of an INI file, which may give each its own flags",
        ways=("--models-preset",),
    ),
    ServerSetting(
        id="models_max",
        value=Integer(0, 64, "models"),
        summary="most models that a router has loaded at once (0: no limit; its own default is 4); "
        "for one more it unloads the one that was used least recently",
        ways=("--models-max",),
    ),
    ServerSetting(
        id="spec_type",
        value=Choices(("none", *DRAFTS, *NGRAMS)),
        summary="guess tokens ahead: from the text so far (ngram), or with a model that drafts",
        ways=("--spec-type", {"none": ()}),
        numbers=True,
    ),
    ServerSetting(
        id="model_draft",
        value=FilePath(),
        summary="file of the model that drafts (spec_type)",
        ways=("--spec-draft-model", "--model-draft"),
        numbers=True,
    ),
    ServerSetting(
        id="spec_draft_n_max",
        value=Integer(1, 1024, "tokens"),
        summary="most tokens that are drafted at once",
        ways=("--spec-draft-n-max", "--draft-max"),
        numbers=True,
    ),
    ServerSetting(
        id="mmproj",
        value=FilePath(),
        summary="file of the projector that lets the model see images or hear sound",
        ways=("--mmproj",),
        numbers=True,
    ),
    ServerSetting(
        id="mmproj_offload",
        value=Switch(),
        summary="projector on the GPU",
        ways=(_switch("--mmproj-offload", "--no-mmproj-offload"),),
    ),
    ServerSetting(
        id="ctx_checkpoints",
        value=Integer(0, 2**16, "checkpoints"),
        summary="most states of a conversation that each slot keeps to go back to; the server's "
        "own default is 32",
        ways=("--ctx-checkpoints", "--swa-checkpoints"),
    ),
    ServerSetting(
        id="checkpoint_min_step",
        value=Integer(0, 2**24, "tokens"),
        summary="least distance of two such states",
        ways=("--checkpoint-min-step",),
    ),
    ServerSetting(
        id="swa_full",
        value=Switch(),
        summary="KV cache of the whole context also where a layer sees only a window",
        ways=(_switch("--swa-full"),),
    ),
)

SERVER_SETTINGS: Mapping[str, ServerSetting] = {setting.id: setting for setting in _SETTINGS}


def parse_server_setting(name: str, configured: object, machine: Machine | None = None) -> str:
    """Canonical value of one setting.  Raises ValueError, with a sentence that names it."""
    if name not in SERVER_SETTINGS:
        shown = printable_line(name, 80)
        near = did_you_mean(name, SERVER_SETTINGS)
        raise ValueError(f"there is no server setting '{shown}'{near}")
    try:
        return SERVER_SETTINGS[name].value.parse(configured, machine)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def change_numbers(settings: Iterable[str]) -> bool:
    """Whether one of these settings changes on purpose what a server computes."""
    return any(SERVER_SETTINGS[each].numbers for each in settings)


def files_of(settings: Mapping[str, str | int | bool]) -> dict[str, str]:
    """The files of models that settings name, by setting."""
    return {
        name: str(value)
        for name, value in settings.items()
        if type(SERVER_SETTINGS[name].value) is FilePath
    }


def models_of(settings: Mapping[str, str | int | bool]) -> dict[str, str]:
    """Where a router finds its models, by setting; empty for a server of one model."""
    return {name: str(settings[name]) for name in _ROUTERS if name in settings}


_ROUTERS = ("models_dir", "models_preset")
_OF_ONE_MODEL = ("alias", "model_draft", "mmproj")
"""A router would give them to every model."""


def check_together(settings: Mapping[str, str]) -> None:
    """Raise ValueError where canonical settings lack one that another of them needs, or has no
    room for."""
    if models_of(settings):
        for name in _OF_ONE_MODEL:
            if name in settings:
                raise ValueError(
                    f"{name} is for one model; models of a router have theirs in models_preset"
                )
    elif "models_max" in settings:
        raise ValueError("models_max is for a router, which needs models_dir or models_preset")
    kinds = settings.get("spec_type", "").split(",")
    needy = [kind for kind in kinds if kind in DRAFTS and kind != _DRAFTS_BY_ITSELF]
    if needy and "model_draft" not in settings:
        raise ValueError(
            f"spec_type={needy[0]} needs model_draft, the file of the model that drafts; "
            f"{_DRAFTS_BY_ITSELF} uses layers of the model itself"
        )


@dataclass(frozen=True, slots=True)
class Option:
    """What ``--help`` says of one flag."""

    argument: str | None
    """The placeholder of its value as printed (``N``, ``[on|off|auto]``), None if it takes none."""
    words: tuple[str, ...] | None
    """The values it lists, None where it lists none."""
    text: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A setting that is not passed to this server, and why."""

    setting: str
    value: str
    reason: str


_FLAG = re.compile(r"(--?[A-Za-z0-9][\w-]*)(,\s*(?=-))?")
_LISTED = re.compile(r" [\[{]?([\w.+-]+(?:[|,][\w.+-]+)+)[\]}]?")
_ALLOWED = re.compile(r"allowed values:\s*((?:[\w.+-]+,\s*)*[\w.+-]+)")
_BULLET = re.compile(r"^\s+- '?([\w.+-]+)'?(?: \(default\))?:", re.MULTILINE)


def parse_help(text: str) -> dict[str, Option]:
    """The flags of a llama-server ``--help``; flags of one entry share one Option."""
    options: dict[str, Option] = {}
    for entry in re.split(r"^(?=-)", text, flags=re.MULTILINE)[1:]:
        flags, position = [], 0
        while match := _FLAG.match(entry, position):
            flags.append(match[1])
            position = match.end()
            if not match[2]:
                break
        if "argument has been removed" in " ".join(entry.split()):
            continue  # listed only to say what replaces it: given, it ends the server
        # One space and a word: the value's placeholder.  More, or a new line: the description.
        argument = re.match(r" (\S+(?: \S+)*)", entry[position:])
        text = entry[position:]
        option = Option(argument[1] if argument else None, _listed(text), text)
        options.update(dict.fromkeys(flags, option))
    return options


def _listed(text: str) -> tuple[str, ...] | None:
    """The values an entry offers: in its placeholder, as a list in words, or as bullets."""
    if match := _LISTED.match(text) or _ALLOWED.search(text):
        return tuple(re.split(r"[|,]\s*", match[1]))
    return tuple(_BULLET.findall(text)) or None


def server_arguments(
    settings: Mapping[str, str],
    help_text: str,
    *,
    model: str | None,
    port: int,
    host: str = LOOPBACK,
    api_key_file: str | None = None,
) -> tuple[list[str], list[Refused]]:
    """Arguments for the llama-server that printed ``help_text``, and what it cannot be given.

    ``settings`` are canonical values by id.  Host and port are always given:
    the default port differs between builds.  A router has no ``model``.  Raises ValueError for a
    build that knows no API key where there is to be one: it would answer everybody.
    """
    options = parse_help(help_text)
    arguments = [] if model is None else ["--model", model]
    arguments += ["--host", host, "--port", str(port)]
    if api_key_file is not None:
        if "--api-key-file" not in options:
            raise ValueError("this llama-server has no --api-key-file, so it would ask for no key")
        arguments += ["--api-key-file", api_key_file]
    if model is not None and "--alias" in options and "alias" not in settings:
        arguments += ["--alias", alias(model)]
    refused: list[Refused] = []
    for name, value in settings.items():
        reasons: list[str] = []
        setting = SERVER_SETTINGS[name]
        if not setting.ways:
            continue
        for way in setting.ways:
            flags, reason = _say(way, value, _words(setting.value, value), options)
            if reason is None:
                arguments += flags
                break
            reasons.append(reason)
        else:
            refused.append(Refused(name, value, "; ".join(dict.fromkeys(reasons))))
    return arguments, refused


_WRITTEN_BY_US = ("--model", "--host", "--port", "--device", "--api-key", "--api-key-file")
_NOT_FOR_A_UNIT = (
    "--tools",  # reads, writes and runs what a model asks for
    "--tools-runtime",
    "--agent",  # all of these tools
    "--mcp-servers-config",  # more of them, as commands
    "--mcp-servers-json",
    "--video-ffmpeg-dir",  # programs that it runs
    "--media-path",  # files for whoever asks the server
    "--log-prompts-dir",
    "--log-file",
    "--slot-save-path",
    "--path",
    "--hf-repo",
    "--hf-file",
    "--hf-token",
    "--model-url",
    "--docker-repo",
    "--rpc",
    "--ui-mcp-proxy",  # asks any address for whoever asks the server
    "--webui-mcp-proxy",
    "--lookup-cache-dynamic",  # a file that is written
    "--mmproj-url",
    "--hf-repo-v",
    "--hf-file-v",
    "--hf-repo-draft",
    "--spec-draft-hf",
)
"""Flags that reach for files, programs or addresses which a server's unit is not to have."""


def own_flags(words: Sequence[str]) -> str | None:
    """What is wrong with flags that an administrator adds; None: nothing that can be told yet."""
    if words and not words[0].startswith("-"):
        return f"'{printable_line(words[0], 80)}' is not a flag"
    settings = {way: one.id for one in _SETTINGS for way in _flags_of(one)}
    for word in words:
        flag = word.partition("=")[0]
        if flag in settings:
            return f"{flag} is '{settings[flag]}' under [settings]"
        if flag in _WRITTEN_BY_US:
            return f"infertune gives {flag} itself"
        if flag in _NOT_FOR_A_UNIT:
            return f"{flag} is not for a server's unit"
        if flag.startswith("-") and not flag.startswith("--") and not _is_number(flag):
            return f"write {printable_line(flag, 40)} in its long form"
    return None


def _flags_of(setting: ServerSetting) -> Iterable[str]:
    for way in setting.ways:
        yield from (way,) if isinstance(way, str) else (f for flags in way.values() for f in flags)


def unknown_flag(words: Sequence[str], help_text: str) -> str | None:
    """The first flag that the server which printed ``help_text`` does not have."""
    options = parse_help(help_text)
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return next((flag for flag in flags if flag not in options), None)


def alias(model: str) -> str:
    """The name that clients see: that of the file, without what says which part of it this is.

    Builds since 2026 read a list there, so a comma cannot be part of it.
    """
    stem = os.path.basename(model).removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem).replace(",", "_")


def _words(kind: Value, value: str) -> list[str]:
    """Those of a value that the help has to know: not numbers, and not a name."""
    if isinstance(kind, FilePath | ClientName) or _is_number(value):
        return []
    return value.split(",") if isinstance(kind, Choices) else [value]


def _say(
    way: Way, value: str, words: Sequence[str], options: Mapping[str, Option]
) -> tuple[Sequence[str], str | None]:
    """The arguments that mean ``value``, or the reason why this way does not work here."""
    if isinstance(way, str):
        option = options.get(way)
        if option is None:
            return (), f"this build has no {way}"
        if option.argument is None:
            return (), f"{way} of this build takes no value"
        for word in words:
            if option.words is not None and word not in option.words:
                return (), f"{way} of this build offers {', '.join(option.words)}"
            if option.words is None and not _mentions(option.text, word):
                return (), f"{way} of this build does not say that it takes '{word}'"
        if len(words) > 1 and "comma-separated" not in option.text:
            return (), f"{way} of this build takes one word"
        return (way, value), None
    if value not in way:
        return (), f"this build has no way to say '{value}'"
    for flag in way[value]:
        option = options.get(flag)
        if option is None:
            return (), f"this build has no {flag}"
        if option.argument is not None:
            return (), f"{flag} of this build wants a value"
    return way[value], None


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", value) is not None


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None
