# SPDX-License-Identifier: Apache-2.0
"""Every setting with every value, against the recorded ``--help`` of two builds of llama-server.

Build 10434 (August 2026, not a distribution's) and build 11669 (Debian, October 2026) printed them;
the texts are llama.cpp's (tests/fixtures/llama-server/LICENSE).
``tests/real/test_real_settings.py`` asks the program itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.catalogue.server_settings import (
    SERVER_SETTINGS,
    ClientName,
    Factor,
    FilePath,
    IntegerOr,
    ServerSetting,
    own_flags,
    parse_help,
    parse_server_setting,
    server_arguments,
    unknown_flag,
)
from infertune.catalogue.values import Choice, Integer, Size, Switch
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_root
from infertune.profiles.profile import load_profile, package_directory

REPOSITORY = Path(__file__).resolve().parents[2]
BUILDS = ("b10434", "b11669")
HELP = {
    build: (REPOSITORY / f"tests/fixtures/llama-server/{build}.help").read_text()
    for build in BUILDS
}
PROFILES = sorted(path.stem for path in package_directory().glob("*.toml"))


def values(setting: ServerSetting) -> Iterator[str | int | bool]:
    """Every word that may be configured, and both ends of every range."""
    kind = setting.value
    if isinstance(kind, Choice):
        yield from kind.words
    elif isinstance(kind, Switch):
        yield from (True, False)
    elif isinstance(kind, Integer):
        yield from (kind.low, kind.high)
        yield from kind.words if isinstance(kind, IntegerOr) else ()
    elif isinstance(kind, Size):
        yield from (f"{kind.low_bytes // 2**20}MiB", f"{kind.high_bytes // 2**20}MiB")
    elif isinstance(kind, Factor):
        yield from (str(kind.low), str(kind.high))
    else:
        assert isinstance(kind, FilePath | ClientName), "a kind of value that is not tried here"
        yield "/m/x.gguf" if isinstance(kind, FilePath) else "x"


EVERY = [(name, value) for name, one in SERVER_SETTINGS.items() for value in values(one)]


@pytest.mark.parametrize("build", BUILDS)
def test_no_setting_is_refused_with_any_value(build: str) -> None:
    assert len({name for name, _ in EVERY}) == len(SERVER_SETTINGS)
    left_out = []
    for name, value in EVERY:
        canonical = parse_server_setting(name, value)
        _, refused = server_arguments({name: canonical}, HELP[build], model="/m.gguf", port=1)
        left_out += refused
    assert left_out == []


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_no_profile_is_refused_anything(build: str, profile: str) -> None:
    with open_root(str(REPOSITORY / "tests/fixtures/strix-halo-128.snapshot")) as root:
        machine, found = read_machine(root), load_profile(root, profile)
    for backend, given in found.by_backend.items():
        server = [each for each in given.values() if each.section == "server"]
        assert server, backend
        settings = {
            each.id: parse_server_setting(each.id, each.configured, machine) for each in server
        }
        assert server_arguments(settings, HELP[build], model="/m.gguf", port=1)[1] == []


@pytest.mark.parametrize("build", BUILDS)
def test_no_documented_flag_is_unknown(build: str) -> None:
    pages = "\n".join(page.read_text() for page in REPOSITORY.glob("docs/*.md"))
    documented = [json.loads(each) for each in re.findall(r"^ *flags = (\[.*?\])", pages, re.M)]
    assert documented
    for words in documented:
        assert own_flags(words) is None
        assert unknown_flag(words, HELP[build]) is None


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_not_for_untrusted_environments_is_no_flag_of_a_declaration(build: str) -> None:
    dangerous = {
        flag
        for flag, option in parse_help(HELP[build]).items()
        if "untrusted environments" in " ".join(option.text.split())
        and flag.startswith("--")
        and not flag.startswith("--no-")
    }
    assert {"--tools", "--agent", "--ui-mcp-proxy", "--mcp-servers-config"} <= dangerous
    dangerous.add("--tools-runtime")  # what the tools run in
    assert [flag for flag in sorted(dangerous) if own_flags([flag]) is None] == []


READ_AT_THE_START = {
    "--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled", "--grammar-file",
    "--json-schema-file", "--lookup-cache-static", "--ui-config-file", "--webui-config-file",
    "--ssl-key-file", "--ssl-cert-file", "--chat-template-file",
}  # fmt: skip
"""Flags with a file that a declaration may name: the server reads it and gives nobody access."""


_FILE = re.compile(r" *((FNAME|PATH|DIR|\w*(FILE|URL))\b|\[?<repo>|<user>/)")


@pytest.mark.parametrize("build", BUILDS)
def test_no_other_flag_of_a_declaration_names_a_file(build: str) -> None:
    named = {
        flag
        for flag, option in parse_help(HELP[build]).items()
        if flag.startswith("--") and _FILE.match(option.text)
    }
    assert {"--media-path", "--log-prompts-dir", "--slot-save-path"} <= named
    assert {flag for flag in named if own_flags([flag]) is None} == READ_AT_THE_START
