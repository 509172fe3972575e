# SPDX-License-Identifier: Apache-2.0
"""The manual pages, in man(7) macros, made from the declarations in the code.

infertune(1) from the table of verbs, infertune.profile(5) from the settings and keys of the files
that people write, infertuned(8) and infertune-exporter(8) from the options of the two programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from infertune import __version__
from infertune.base.errors import Exit
from infertune.base.tables import Key
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.launch_settings import ENVIRONMENT_ALLOWED, LAUNCH_SETTINGS
from infertune.catalogue.server_settings import SERVER_SETTINGS
from infertune.cli.base import Argument, Command
from infertune.cli.main import commands
from infertune.cli.parser import build_parser
from infertune.exporter.main import parser as exporter_parser
from infertune.exporter.web import DEFAULT
from infertune.profiles.config import CONFIG, CONFIG_KEYS
from infertune.profiles.profile import SEARCH_PATH
from infertune.servers.declaration import KEYS

EXIT_MEANING = {
    Exit.DONE: "done",
    Exit.DIFFERS: "something differs, or there are findings",
    Exit.USAGE: "wrong usage, or a profile that is not valid; nothing was touched",
    Exit.FAILED: "failed and rolled back, or another infertune has the machine",
    Exit.NOT_PERMITTED: "not permitted; nothing was touched",
    Exit.UNREACHABLE: "the daemon cannot be reached; nothing was touched",
}


JOURNAL = "/run/infertune/journal, /var/lib/infertune/journal"
EXAMPLES = (
    ("What is this machine, and is anything on it known to be bad?", "infertune doctor"),
    ("Look at what a profile would change, change it, and go back:", "infertune plan long-context"),
    ("", "infertune apply long-context"),
    ("", "infertune revert"),
    ("Go back after five minutes unless you confirm:",
     "infertune apply low-latency --confirm-within 5min"),
    ("Serve a model under a profile, and put everything back when it ends:",
     "infertune run long-context --model model.gguf"),
    ("Put a server that you already run under a profile:", "infertune adopt ollama --plan"),
)  # fmt: skip


def pages() -> dict[str, str]:
    """The text of each page, by its file's name."""
    return {
        "infertune.1": infertune_1(),
        "infertune.profile.5": profile_5(),
        "infertuned.8": infertuned_8(),
        "infertune-exporter.8": exporter_8(),
    }


def _head(name: str, section: int, group: str, summary: str) -> list[str]:
    return [
        f'.TH {name.upper()} {section} "" "infertune {__version__}" "{group}"',
        ".SH NAME",
        f"{_roff(name)} \\- {summary}",
    ]


def _see_also(*others: tuple[str, int]) -> list[str]:
    listed = [f".BR {_roff(name)} ({section})" for name, section in others]
    return [".SH SEE ALSO", *(f"{each}," for each in listed[:-1]), listed[-1]]


def _accepted(what: str, accepts: str, default: str = "") -> str:
    """What a setting is, what may stand there, and what holds without it, in sentences."""
    said = (what[0].upper() + what[1:], f"Accepts {accepts}", default and f"Without it: {default}")
    return " ".join(f"{each.rstrip('.')}." for each in said if each).replace("`", "")


def _items(items: Iterable[tuple[str, str]]) -> list[str]:
    """What each thing is: a list with tags."""
    return [line for tag, text in items for line in (".TP", f".B {_roff(tag)}", _roff(text))]


def infertune_1() -> str:
    """infertune(1)."""
    parser = build_parser(commands())
    out = [
        f'.TH INFERTUNE 1 "" "infertune {__version__}" "User Commands"',
        ".SH NAME",
        "infertune \\- tune a machine for local LLM inference, and put everything back",
        ".SH SYNOPSIS",
        ".B infertune",
        "[\\fB\\-\\-root\\fR \\fIPATH\\fR] [\\fB\\-\\-debug\\fR] \\fIVERB\\fR ...",
        ".SH DESCRIPTION",
        _roff(parser.description or ""),
        ".SH OPTIONS",
        ".TP",
        "\\fB\\-\\-root\\fR \\fIPATH\\fR",
        "Work on a recorded machine: a directory tree or a snapshot file.",
        ".TP",
        "\\fB\\-\\-debug\\fR",
        "Show a traceback when something fails.",
        ".TP",
        "\\fB\\-\\-version\\fR",
        "Show the version and exit.",
        ".SH VERBS",
    ]
    for command in commands():
        out += _man_verb(command, ())
    out += [
        ".SH DIAGNOSTICS",
        "infertuned logs to the system journal (\\fBjournalctl \\-u infertune\\fR).",
        "With \\fBEnvironment=INFERTUNED_OPTIONS=\\-\\-debug\\fR below [Service] in a drop-in",
        "(\\fBsystemctl edit infertune\\fR) and after a \\fBsystemctl restart infertune\\fR, which",
        "puts everything back first, it also says each call with its caller and its outcome,",
        "and what is in force after each turn, with priority 7.",
    ]
    out += [".SH EXIT STATUS"]
    for code, meaning in EXIT_MEANING.items():
        out += [".TP", f".B {code}", _roff(meaning)]
    out.append(".SH EXAMPLES")
    for what, example in EXAMPLES:
        out += [".PP", _roff(what)] if what else []
        out += [".RS 4", f".B {_roff(example)}", ".RE"]
    out += [
        ".SH FILES",
        ".TP",
        f".I {_roff(', '.join(SEARCH_PATH))}",
        "Profiles, first match wins; then the ones of the package.",
        ".TP",
        ".I /run/infertune/journal, /var/lib/infertune/journal",
        "Values to go back to, of this boot, and the same once more.",
        ".TP",
        ".I /var/lib/infertune/boot, /var/lib/infertune/boot\\-images",
        "What boot settings were before they were staged, and the originals of images that were",
        "rebuilt and confirmed; both until undo.",
    ]
    out += _see_also(("infertune.profile", 5), ("infertuned", 8), ("infertune-exporter", 8))
    return "\n".join(out) + "\n"


def profile_5() -> str:
    """infertune.profile(5): the files that people write."""
    out = [
        *_head("infertune.profile", 5, "File Formats", "profiles and servers of infertune"),
        ".SH SYNOPSIS",
        *(line for path in SEARCH_PATH for line in (f".I {_roff(path)}/NAME.toml", ".br")),
        ".I /etc/infertune/servers.d/NAME.toml",
        ".br",
        f".I {CONFIG}",
        ".SH DESCRIPTION",
        "All of them are TOML. A mistake is told with file and line, and what would be right;",
        "nothing of such a file is applied.",
        ".PP",
        "A profile says what the machine should be while a model serves. The first of the",
        "directories that has it counts, then the profiles of the package. It may say",
        '.B extends = \\(dqNAME\\(dq',
        "to take another as its ground, or that of its own name which comes with infertune.",
        "A setting is a value, or",
        '.BR "{ value = ..., required = true, because = \\(dqwhy\\(dq }" :',
        "what is required and cannot be had makes",
        ".B apply",
        "fail and put everything back.",
        ".PP",
        "Sizes are written",
        ".BR 512MiB ,",
        ".BR 96GiB ,",
        ".B 10%",
        "of the system's memory, or with bounds:",
        '.BR "4GiB, at most 10%" .',
        ".SS [now] and [boot]",
        "Knobs, set when the profile is applied and at the next boot.",
        *_items((knob.id, _accepted(knob.summary, knob.value.accepts()))
                for knob in KNOBS.values()),
        ".SS [launch]",
        "How the process of the server is placed.",
        *_items((each.id, _accepted(each.summary, each.value.accepts()))
                for each in LAUNCH_SETTINGS.values()),
        ".SS [launch.env]",
        "Variables of its environment.",
        *_items((each.pattern, each.why) for each in ENVIRONMENT_ALLOWED),
        ".SS [server]",
        "llama-server's own settings. [backend.rocm.server] and the like hold for one backend.",
        *_items((each.id, _accepted(each.summary, each.value.accepts()))
                for each in SERVER_SETTINGS.values()),
        ".SH SERVERS",
        "/etc/infertune/servers.d/NAME.toml declares a server. With",
        ".B unit",
        "it is a unit of your own, with",
        ".B exec",
        "any command in a unit of infertune's, else llama-server.",
        *_key_items(KEYS),
        ".SH THE DAEMON",
        f"{CONFIG} is read when infertuned starts.",
        *_key_items(CONFIG_KEYS),
        ".SH EXAMPLES",
        "/etc/infertune/profiles/long\\-context.toml:",
        ".PP",
        *_example('extends = "long-context"', "", "[now]", "vm.swappiness = 20"),
        ".PP",
        "/etc/infertune/servers.d/chat.toml:",
        ".PP",
        *_example('model = "/srv/models/model.gguf"', "port = 8080",
                  'profile = "long-context"', "", "[settings]", "ctx_size = 65536"),
        *_see_also(("infertune", 1), ("infertuned", 8)),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def _key_items(keys: Iterable[Key]) -> list[str]:
    return _items((key.name, _accepted(key.what, key.accepts, key.default)) for key in keys)


def _example(*lines: str) -> list[str]:
    return [".RS 4", ".nf", *(_roff(line) for line in lines), ".fi", ".RE"]


def infertuned_8() -> str:
    """infertuned(8)."""
    out = [
        *_head("infertuned", 8, "System Administration", "the daemon of infertune"),
        ".SH SYNOPSIS",
        ".B infertuned",
        "[\\fB\\-\\-debug\\fR | \\fB\\-\\-version\\fR]",
        ".SH DESCRIPTION",
        "Keeps a profile in force, and the originals of what it changed, for as long as it runs;",
        "starts model servers as units, and puts units of others under a profile. It is started by",
        "systemd, as infertune.service, and talks to",
        ".BR infertune (1)",
        "over the system bus as org.infertune.Infertune1; polkit decides who may change something.",
        "It opens no network socket.",
        ".PP",
        "At its start it puts right what an earlier run left, then applies the profile of",
        f".I {CONFIG}",
        "if there is one. When it is stopped every setting goes back; model servers go on.",
        ".SH OPTIONS",
        *_items((("--debug", "Log each call with its caller and outcome, with priority 7."),
                 ("--version", "Show the version and exit."))),
        ".SH SIGNALS",
        *_items((("SIGTERM", "Put everything back and end."),
                 ("SIGHUP", "Start again in place; the machine is not touched."))),
        ".SH FILES",
        *_items(((CONFIG, "What the daemon is told; infertune.profile(5)."),
                 ("/etc/infertune/servers.d", "Declared servers; infertune.profile(5)."),
                 (JOURNAL, "Values to go back to, of this boot, and the same once more."))),
        ".SH EXAMPLES",
        "Enable it, and follow what it says:",
        *_example("systemctl enable --now infertune", "journalctl -fu infertune"),
        *_see_also(("infertune", 1), ("infertune.profile", 5), ("infertune-exporter", 8),
                   ("polkit", 8)),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def exporter_8() -> str:
    """infertune-exporter(8)."""
    options = [
        (", ".join(action.option_strings) + (f" {action.metavar}" if action.metavar else ""),
         f"{(action.help or '')[:1].upper()}{(action.help or '')[1:]}.")
        for action in exporter_parser()._actions
    ]  # fmt: skip
    out = [
        *_head("infertune-exporter", 8, "System Administration",
               "metrics of this machine and its model servers for Prometheus"),
        ".SH SYNOPSIS",
        ".B infertune\\-exporter",
        "[\\fIOPTION\\fR]...",
        ".SH DESCRIPTION",
        exporter_parser().description or "",
        "It attaches eBPF probes, gives up every capability, then opens the port",
        f"({DEFAULT}, or the socket that systemd hands it). A value that is not known is left out,",
        "never zero. A scrape never loads, wakes or keeps a model.",
        ".SH OPTIONS",
        *_items(options),
        ".SH EXAMPLES",
        "Serve at boot; print the page once; only what one collector reads:",
        *_example("systemctl enable --now infertune-exporter.socket", "infertune-exporter --once",
                  "infertune-exporter --once --collect amdgpu"),
        *_see_also(("infertune", 1), ("infertuned", 8)),
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def _man_verb(command: Command, parents: tuple[str, ...]) -> Iterator[str]:
    words = (*parents, command.name)
    if command.subcommands:
        for sub in command.subcommands:
            yield from _man_verb(sub, words)
        return
    usage = " ".join(_usage(argument) for argument in command.arguments)
    yield f".SS {_roff(' '.join(words))} {usage}".rstrip()
    yield _roff(command.description or command.help)
    for argument in command.arguments:
        yield ".TP"
        yield _usage(argument, brackets=False)
        yield _roff(str(argument.options.get("help", "")))


def _usage(argument: Argument, *, brackets: bool = True) -> str:
    """One argument as a reader of a synopsis expects it."""
    options = argument.options
    name = argument.names[-1]
    value = str(options.get("metavar") or name.lstrip("-").upper())
    if choices := options.get("choices"):
        value = "|".join(map(str, choices))
    if not name.startswith("-"):
        text = f"\\fI{_roff(value)}\\fR"
        if options.get("nargs") in ("*", "...", "+"):
            text += " ..."
        optional = options.get("nargs") in ("?", "*", "...")
    else:
        text = ", ".join(f"\\fB{_roff(each)}\\fR" for each in argument.names)
        if not str(options.get("action", "store")).startswith("store_"):
            shown = f"\\fI{_roff(value)}\\fR"
            text += f" [{shown}]" if options.get("nargs") == "?" else f" {shown}"
        optional = not options.get("required", False)
    return f"[{text}]" if optional and brackets else text


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\n\n", "\n.PP\n")
    # A line that starts with a dot or an apostrophe would be a request.
    return "\n".join(
        f"\\&{line}" if line[:1] in "'." and line != ".PP" else line for line in text.split("\n")
    )
