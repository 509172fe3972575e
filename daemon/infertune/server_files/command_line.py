# SPDX-License-Identifier: Apache-2.0
"""A command line that starts a model server, whatever stands around it: ``env``, a shell, podman.

How an engine and its flags are written, and nothing about files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

from infertune.base.records import dataclass, field, replace

COMMAND_LIMIT = 16 * 1024
"""Bytes of one command line that are looked at; ARG_MAX is larger, no server's is."""

LLAMA = "llama.cpp"

ENGINES: Mapping[str, str] = {
    "llama-server": LLAMA,
    "llama-swap": "llama-swap",
    "ollama": "Ollama",
    "lemond": "Lemonade",
    "lemonade-server": "Lemonade",
    "lemonade-server-dev": "Lemonade",
    "vllm": "vLLM",
}
"""Program and engine."""

_IMAGES: Mapping[str, str] = {
    "ollama": "Ollama",
    "llama-swap": "llama-swap",
    "llama.cpp": LLAMA,
    "llama-cpp": LLAMA,
    "llamacpp": LLAMA,
    "llama-server": LLAMA,
    "lemonade": "Lemonade",
    "vllm": "vLLM",
}
"""A part of an image's name and what it runs; the first that fits counts."""

_MENTIONS = (*ENGINES, *_IMAGES, "gguf", "GGUF")
_SUBJECT = re.compile(r"llama|llm|\bai\b|inference", re.IGNORECASE)

SCRIPT = "script"
"""Engine of a command that is a shell script: what it starts stands in that file."""
_SCRIPT_PATH = re.compile(
    r"(?:/|%h/)(?:[\w.@+-]+/)*(?:[\w.@+-]+\.sh|[\w-]*(?:llama|llm)[\w-]*)", re.ASCII
)

INHERITED = "inherited"
"""Image of a quadlet's drop-in that gives other words to the image of its quadlet."""

CONTAINER = "container"
"""Stands for an image whose name is not known, or not shown."""

_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ash"))
_RUNNERS = frozenset(("podman", "docker", "nerdctl"))
_BOXES = frozenset(("toolbox", "distrobox", "distrobox-enter"))
_WRAPPERS = frozenset(
    (
        *("env", "exec", "nice", "ionice", "chrt", "taskset", "numactl", "stdbuf", "nohup", "time"),
        *(
            "sudo",
            "runuser",
            "setpriv",
            "systemd-run",
            "systemd-inhibit",
            "gamemoderun",
            "catchsegv",
        ),
        *("infertune", "do", "then", "{"),
    )
)
"""Programs, and words of a shell, that a command follows."""
_STARTS = frozenset((*ENGINES, *_RUNNERS, *_BOXES, *_SHELLS))
_SWITCHES = re.compile(
    r"-[ditqP]+|--(?:detach|rm|rmi|interactive|tty|init|privileged|read-only|replace|quiet"
    r"|no-healthcheck|publish-all|env-host|no-hosts|no-hostname|oom-kill-disable)"
)
"""Options of ``podman run`` and ``docker run`` without a value; every other one has one."""
_FLAG = re.compile(r"(--?[A-Za-z][\w-]{0,60})(?:=(.*))?", re.ASCII | re.DOTALL)
_NUMBER = re.compile(r"-\d[\d.,]{0,20}", re.ASCII)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w{0,80})=(.*)", re.ASCII | re.DOTALL)
_REFERENCE = re.compile(
    r"\$\{?([A-Za-z_]\w{0,80}(?:OPTS?|OPTIONS|ARGS?|FLAGS|PARAMS|EXTRA))\}?",
    re.ASCII | re.IGNORECASE,
)
"""A variable that holds flags by its name; any other one is a value (``-m $MODEL``)."""
_END = frozenset((";", "&&", "||", "|", "&", ">", ">>", "2>", "2>&1", "<", "(", ")"))

PRIVATE_FLAGS = frozenset(
    (
        *("--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file", "-hft", "--hf-token"),
        *("--alias", "-a", "--chat-template", "--chat-template-file", "--chat-template-kwargs"),
        *("--host", "--log-file", "--path", "--slot-save-path", "--grammar", "--json-schema"),
    )
)
"""Flags whose next word is their value, whatever it looks like: it may be a secret."""

MODEL_FLAGS = frozenset(
    (
        *("--model", "-m", "--hf-repo", "-hf", "-hfr", "--model-draft", "-md"),
        *("--spec-draft-model", "--spec-draft-hf", "-hfd"),
    )
)
"""Flags that name a model."""


@dataclass(frozen=True, slots=True)
class Command:
    """One server as a command line starts it."""

    engine: str
    program: str
    """As written; "" where an image's own entry point is run."""
    image: str | None = None
    """Image it runs in, CONTAINER where only that it is one is known; None on the host."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Flags and their values, "" for a switch; the last of equal ones counts."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the line itself sets."""
    references: tuple[str, ...] = ()
    """Names of variables whose words are flags too: ``$LLAMA_OPTS``."""


def may_start_a_server(text: str) -> bool:
    """Whether a unit's text has a word without which none starts a server that is known here."""
    if any(name in text for name in _MENTIONS):
        return True
    return ".sh" in text and _SUBJECT.search(text) is not None


def parse(text: str) -> Command | None:
    """The server that a command line starts; None where it starts none that is known."""
    return _command(_words(text[:COMMAND_LIMIT]))


def parse_flags(text: str) -> dict[str, str]:
    """Flags in a text of nothing else, as variables and settings hold them."""
    return _flags(_words(text[:COMMAND_LIMIT]))[0]


def words(text: str) -> list[str]:
    """A text as a command line's words."""
    return _words(text[:COMMAND_LIMIT])


def shell_words(text: str) -> list[str]:
    """A line of a shell script as words, its operators apart, without its comment."""
    return _words(text[:COMMAND_LIMIT], operators=True)


def shell_commands(words: list[str]) -> Iterator[Command]:
    """The servers that one line of a shell script starts."""
    for part in _parts(words):
        command = _command(part)
        if command is not None and command.engine != SCRIPT:
            yield command


def without_environment(command: Command) -> Command:
    """The same server, its variables left to whoever keeps them elsewhere."""
    return replace(command, environment={})


def holds_flags(name: str) -> bool:
    """Whether a variable of this name holds flags."""
    return _REFERENCE.fullmatch(f"${name}") is not None


def image_engine(image: str) -> str | None:
    """What an image runs by itself, as far as its name says so."""
    name = image.rpartition("/")[2].lower()
    return next((engine for part, engine in _IMAGES.items() if part in name), None)


def render(command: Command) -> str:
    """A line that ``parse`` takes for the same server.  Every value must be one plain word."""
    words = [f"{name}={value}" for name, value in command.environment.items()]
    if words:
        words.insert(0, "env")
    if command.image == CONTAINER:
        words += ["podman", "exec", CONTAINER]
    elif command.image is not None:
        words += ["podman", "run", command.image]
    words += [command.program] if command.program else []
    return " ".join([*words, *render_flags(command), *(f"${name}" for name in command.references)])


def render_flags(command: Command) -> Iterator[str]:
    """Flags as words, those with a value as two."""
    for flag, value in command.flags.items():
        yield flag
        if value:
            yield value


# -- words ----------------------------------------------------------------------------


def _words(text: str, *, operators: bool = False) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()" if operators else False)
    lexer.whitespace_split = True
    lexer.commenters = "#" if operators else ""
    try:
        return list(lexer)
    except ValueError:
        # An open quote.  systemd would refuse the line; what it means is plain enough.
        return text.replace('"', "").replace("'", "").split()


def _command(words: list[str]) -> Command | None:
    environment: dict[str, str] = {}
    for at, word in enumerate(words):
        # systemd's prefixes of an ExecStart=: "-" failure is fine, "+" full privileges, ...
        program = word.lstrip("@-:+!") if at == 0 else word
        name = _base(program)
        rest = words[at + 1 :]
        if assignment := _ASSIGNMENT.fullmatch(word):
            environment[assignment[1]] = assignment[2]
        elif name in _WRAPPERS:
            return _wrapped(rest, environment)
        elif name in ENGINES:
            return _server(program, rest, environment)
        elif name in _RUNNERS:
            return _container(rest, environment)
        elif name in _BOXES:
            boxed = _wrapped(rest, environment)
            return _contained(boxed, CONTAINER) if boxed else None
        elif name in _SHELLS:
            return _shell(rest, environment)
        elif _SCRIPT_PATH.fullmatch(program):
            return Command(SCRIPT, program, environment=environment)
        else:
            return None
    return None


def _wrapped(words: list[str], environment: Mapping[str, str]) -> Command | None:
    """What a program runs that takes a command line behind options of its own."""
    starts = [at for at, word in enumerate(words) if _base(word) in _STARTS]
    # "sudo -u ollama llama-server": a user may be called like an engine.
    starts.sort(key=lambda at: _base(words[at]) != "llama-server")
    for at in starts[:1]:
        given = filter(None, map(_ASSIGNMENT.fullmatch, words[:at]))
        own = {**environment, **{found[1]: found[2] for found in given}}
        command = _command(words[at:])
        return _joined(command, own) if command else None
    return None


def _base(word: str) -> str:
    return word.rpartition("/")[2]


def _shell(words: list[str], environment: Mapping[str, str]) -> Command | None:
    """What ``sh -c TEXT`` or ``sh SCRIPT`` starts."""
    for at, word in enumerate(words):
        if _SCRIPT_PATH.fullmatch(word):
            return Command(SCRIPT, word, environment=environment)
        if re.fullmatch(r"-[a-z]*c", word) and at + 1 < len(words):
            inner = _words(words[at + 1], operators=True)
            for part in _parts(inner):
                # A shell in a shell in a shell: one level is enough.
                nested = any(_base(each) in _SHELLS for each in part)
                if not nested and (command := _command(part)):
                    return _joined(command, environment)
    return None


def _parts(words: list[str]) -> Iterator[list[str]]:
    """Commands of a shell's line, one after the other."""
    while words:
        part = list(takewhile(lambda word: word not in _END, words))
        yield part
        words = words[len(part) + 1 :]


def _joined(command: Command, environment: Mapping[str, str]) -> Command:
    return replace(command, environment={**environment, **command.environment})


def _contained(command: Command, image: str) -> Command:
    return command if command.image is not None else replace(command, image=image)


def _container(words: list[str], environment: dict[str, str]) -> Command | None:
    """``run [OPTIONS] IMAGE [WORDS]`` or ``exec NAME WORDS``."""
    rest = iter(words)
    verb = next((word for word in rest if word in ("run", "exec", "create")), None)
    if verb is None:
        return None
    entry: list[str] = []
    name = ""
    for word in rest:
        if not word.startswith("-"):
            name = word
            break
        option, equals, value = word.partition("=")
        if not equals and not _SWITCHES.fullmatch(word):
            value = next(rest, "")
        if option in ("-e", "--env") and (assignment := _ASSIGNMENT.fullmatch(value)):
            environment[assignment[1]] = assignment[2]
        if option == "--entrypoint":
            entry = [value.strip("[]\"'")]
    inside = [*entry, *rest]
    if verb == "exec":
        return in_image(CONTAINER, inside, environment)
    return in_image(name, inside, environment)


def in_image(image: str, words: list[str], environment: Mapping[str, str]) -> Command | None:
    """The server that ``words`` start in an image; its own entry point where they start none."""
    command = _command(words) if words and not words[0].startswith("-") else None
    if command is not None:
        return _joined(_contained(command, image), environment)
    flags, references = _flags(words)
    if image == INHERITED:
        return Command("", "", image, flags, environment, references)
    engine = image_engine(image)
    if engine is None and any("gguf" in flags.get(flag, "").lower() for flag in MODEL_FLAGS):
        engine = LLAMA  # an image of the owner's own: whatever is in it takes its flags
    if engine is None:
        return None
    return Command(engine, "", image, flags if engine == LLAMA else {}, environment, references)


def _server(program: str, words: list[str], environment: Mapping[str, str]) -> Command:
    engine = ENGINES[_base(program)]
    flags, references = _flags(words)
    if engine not in (LLAMA, "llama-swap"):
        flags = {}  # the same names mean something else there
    return Command(engine, program, None, flags, environment, references)


def _flags(words: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    flags: dict[str, str] = {}
    references: list[str] = []
    rest = list(takewhile(lambda word: word not in _END, words))
    at = 0
    while at < len(rest):
        word = rest[at]
        at += 1
        if reference := _REFERENCE.fullmatch(word):
            references.append(reference[1])
            continue
        found = _FLAG.fullmatch(word)
        if found is None:
            continue
        name, value = found[1], found[2]
        if name.startswith("--"):
            name = name.replace("_", "-")  # as common_params_parse of llama.cpp does
        if value is None and at < len(rest) and _is_value(name, rest[at]):
            value = rest[at]
            at += 1
        flags.pop(name, None)
        flags[name] = value or ""
    return flags, tuple(references)


def _is_value(flag: str, word: str) -> bool:
    if flag in PRIVATE_FLAGS or _NUMBER.fullmatch(word):
        return True
    return not word.startswith("-") and _REFERENCE.fullmatch(word) is None
