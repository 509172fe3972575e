# SPDX-License-Identifier: Apache-2.0
"""The doctor sees model servers wherever owners keep them, and judges what they are given."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from doctor_support import HEALTHY, UNIT, File, Overlay, build, server, sized, surroundings
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.doctor.base import Finding, Unknown
from infertune.doctor.diagnose import Result, diagnose
from infertune.doctor.facts import read_facts
from infertune.doctor.rules import RULES
from infertune.doctor.rules.llama_cpp import GONE_FLAGS
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import NO_HELP, LlamaServer, look_around, recorded
from infertune.host.redaction import reduce_file
from infertune.host.servers import SERVERS_LIMIT, Declared, read_servers
from infertune.host.snapshot import open_snapshot, record
from infertune.server_files.block_yaml import NotUnderstood, load
from infertune.server_files.command_line import parse, render

FAKE = Path(__file__).parents[1] / "fake_llama_server"
BARE: Overlay = {**HEALTHY, UNIT: None}
"""Well set up, and nothing declared."""

SYSTEM = "/etc/systemd/system"
VENDOR = "/usr/lib/systemd/system"
USER = "/home/alice/.config/systemd/user"
QUADLET = "/etc/containers/systemd"
SWAP_UNIT = f"{SYSTEM}/llama-swap.service"
SWAP = "/etc/llama-swap/config.yaml"
START = "ExecStart=/usr/bin/llama-server -m /m/diary-UD-Q4_K_XL.gguf"


def unit(*lines: str) -> str:
    return "\n".join(("[Service]", *lines, ""))


def servers(tmp_path: Path, overlay: Overlay) -> tuple[Declared, ...]:
    return read_servers(build(tmp_path, BARE, overlay))


def one(tmp_path: Path, overlay: Overlay) -> Declared:
    [found] = servers(tmp_path, overlay)
    return found


def ask(root: Root, rule: str) -> Result:
    [result] = diagnose(read_facts(root, recorded(root)), [RULES[rule]])
    return result


def finding(tmp_path: Path, rule: str, *overlays: Overlay) -> Finding:
    answer = ask(build(tmp_path, BARE, *overlays), rule).answer
    assert isinstance(answer, Finding), answer
    return answer


# -- where they are found -----------------------------------------------------------------

PLACES: Mapping[str, tuple[str, str]] = {
    "system": (f"{SYSTEM}/a.service", unit(f"{START} --mlock")),
    "run": ("/run/systemd/system/a.service", unit(f"{START} --mlock")),
    "local": ("/usr/local/lib/systemd/system/a.service", unit(f"{START} --mlock")),
    "vendor": (f"{VENDOR}/a.service", unit(f"{START} --mlock")),
    "all-users": ("/etc/systemd/user/a.service", unit(f"{START} --mlock")),
    "user": (f"{USER}/a.service", unit(f"{START} --mlock")),
    "root's": ("/root/.config/systemd/user/a.service", unit(f"{START} --mlock")),
    "quadlet": (
        f"{QUADLET}/a.container",
        "[Container]\nImage=ghcr.io/ggml-org/llama.cpp:server-vulkan\nExec=-m /m/x.gguf --mlock\n",
    ),
    "quadlet-deep": (
        f"{QUADLET}/llm/a.container",
        "[Container]\nImage=localhost/llm\nExec=llama-server -m /m/x.gguf --mlock\n",
    ),
    "user-quadlet": (
        "/home/alice/.config/containers/systemd/a.container",
        "[Container]\nImage=localhost/llm\nEntrypoint=llama-server\nExec=--mlock -c 1\n",
    ),
    "quadlet-own-image": (
        f"{QUADLET}/b.container",
        "[Container]\nImage=localhost/strix:latest\nExec=-m /m/x.gguf --mlock\n",
    ),
    "compose": (
        "/opt/llm/compose.yaml",
        (
            "services:\n  chat:\n    image: ghcr.io/ggml-org/llama.cpp:server\n"
            '    command: ["-m", "/m/x.gguf",\n              "--mlock"]\n'
        ),
    ),
    "compose-home": (
        "/home/alice/docker/llm/docker-compose.yml",
        (
            "services:\n  chat:\n    image: llm\n    entrypoint: llama-server\n    command:\n"
            "    - --model\n    - /m/x.gguf\n    - --mlock\n"
        ),
    ),
    "lemonade": (
        "/var/lib/lemonade/.cache/lemonade/config.json",
        json.dumps({"llamacpp": {"args": "--mlock", "backend": "rocm"}}),
    ),
    "lemonade-recipe": (
        "/home/alice/.cache/lemonade/recipe_options.json",
        json.dumps({"Qwen": {"llamacpp_args": "--mlock", "ctx_size": 6666}}),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_server_is_found(place: str, tmp_path: Path) -> None:
    path, text = PLACES[place]
    found = one(tmp_path, {path: text})
    assert (found.path, found.engine, found.has("--mlock")) == (path, "llama.cpp", True)
    assert found.user == ("user" in path or "/home/" in path or "/root/" in path)
    # And judged: with the build that the image's tag, or nobody, tells it is at most likely.
    answer = ask(build(tmp_path / "again", BARE, {path: text}), "llama-gone-flags").answer
    assert isinstance(answer, Finding)
    assert f"{path} passes --mlock" in answer.text
    assert "--load-mode mlock" in (answer.fix or "")


COMMANDS: Mapping[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "llama-server -c 5 --mlock": ("llama-server", {"-c": "5", "--mlock": ""}, {}),
    "-/opt/x/llama-server --ctx_size=5 -ngl -1": (
        "/opt/x/llama-server",
        {"--ctx-size": "5", "-ngl": "-1"},
        {},
    ),
    "/usr/bin/env A=B llama-server --a": ("llama-server", {"--a": ""}, {"A": "B"}),
    "sh -c 'cd /x && exec llama-server -c 5; rm y'": ("llama-server", {"-c": "5"}, {}),
    'bash -lc "llama-server -c 5 | tee -a log"': ("llama-server", {"-c": "5"}, {}),
    "podman run --rm -p 1:2 -e A=B -v /m:/m:z ghcr.io/x/llama.cpp:server -c 5": (
        "",
        {"-c": "5"},
        {"A": "B"},
    ),
    "docker run -it --entrypoint llama-server x -c 5": ("llama-server", {"-c": "5"}, {}),
    "toolbox run -c llm llama-server -c 5": ("llama-server", {"-c": "5"}, {}),
    "distrobox enter llm -- llama-server -c 5": ("llama-server", {"-c": "5"}, {}),
    "sudo -u ollama A=B nice -n 5 llama-server -c 5": ("llama-server", {"-c": "5"}, {"A": "B"}),
    "sh -c 'while :; do llama-server -c 5; done'": ("llama-server", {"-c": "5"}, {}),
    "env A=B podman run -e C=D llama.cpp:x -c 5": ("", {"-c": "5"}, {"A": "B", "C": "D"}),
    "podman exec llm llama-server -c 5": ("llama-server", {"-c": "5"}, {}),
    "llama-server --api-key --mlock -c 5": (
        "llama-server",
        {"--api-key": "--mlock", "-c": "5"},
        {},
    ),
    'llama-server -m "/m/a b.gguf" -c 5': ("llama-server", {"-m": "/m/a b.gguf", "-c": "5"}, {}),
    'llama-server "-c 5': ("llama-server", {"-c": "5"}, {}),
}


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_line_is_taken_apart(text: str) -> None:
    command = parse(text)
    assert command is not None
    assert (command.program, dict(command.flags), dict(command.environment)) == COMMANDS[text]
    assert (command.image is not None) == ("podman" in text or "docker" in text or "box" in text)
    if " b.gguf" not in text:
        assert parse(render(command)) == command


@pytest.mark.parametrize(
    "text",
    ["", "ls -l", "podman ps", "sh -c", "docker run x", "sh run.sh",
     "systemctl restart ollama", "chown -R ollama /x", "sh -c 'ls; systemctl start ollama'"],
)  # fmt: skip
def test_what_starts_no_server_is_none(text: str) -> None:
    assert parse(text) is None


# -- systemd's rules --------------------------------------------------------------------------


def test_a_drop_in_wins_and_is_named(tmp_path: Path) -> None:
    overlay = {
        f"{VENDOR}/a.service": unit(START, "Environment=HSA_ENABLE_SDMA=1", "MemoryMin=1G"),
        f"{SYSTEM}/a.service.d/10-a.conf": unit("ExecStart=", f"{START} --mlock", "MemoryMin=2G"),
        f"{VENDOR}/a.service.d/20-b.conf": unit("Environment=HSA_ENABLE_SDMA=0"),
        # Hidden by /etc's of the same name.
        f"{VENDOR}/a.service.d/10-a.conf": unit("ExecStart=", f"{START} --no-mmap"),
    }
    found = one(tmp_path, overlay)
    assert found.path == f"{SYSTEM}/a.service.d/10-a.conf"
    assert found.has("--mlock")
    assert not found.has("--no-mmap")
    assert found.settings == {"MemoryMin": "2G"}
    assert found.environment == {"HSA_ENABLE_SDMA": "0"}
    assert found.origins == {"HSA_ENABLE_SDMA": f"{VENDOR}/a.service.d/20-b.conf"}


def test_a_drop_in_that_clears_the_start_leaves_no_server(tmp_path: Path) -> None:
    overlay = {
        f"{SYSTEM}/a.service": unit(START),
        f"{SYSTEM}/a.service.d/x.conf": unit("ExecStart=", "ExecStart=/opt/start"),
    }
    assert servers(tmp_path, overlay) == ()


@pytest.mark.parametrize(
    "above", [File(target="/dev/null"), unit("ExecStart=/usr/bin/other")], ids=["masked", "other"]
)
def test_a_unit_hides_those_of_its_name(above: str | File, tmp_path: Path) -> None:
    root = build(
        tmp_path / "m", BARE, {f"{SYSTEM}/a.service": above, f"{VENDOR}/a.service": unit(START)}
    )
    assert read_servers(root) == ()
    # A snapshot must not make it appear.
    file = tmp_path / "snapshot"
    file.write_text(taken(root))
    with open_snapshot(str(file)) as replay:
        assert read_servers(replay) == ()


def test_a_template_with_its_instances(tmp_path: Path) -> None:
    overlay = {
        f"{SYSTEM}/a@.service": unit(START),
        f"{SYSTEM}/a@.service.d/x.conf": unit("MemoryMin=1G"),
        f"{SYSTEM}/a@chat.service.d/x.conf": unit("MemoryMin=2G"),
        f"{SYSTEM}/a@code.service.d/y.conf": unit("AllowedCPUs=0-3"),
    }
    found = servers(tmp_path, overlay)
    assert [dict(each.settings) for each in found if each.settings] == [
        {"MemoryMin": "1G"},
        {"MemoryMin": "2G"},
        {"MemoryMin": "1G", "AllowedCPUs": "0-3"},
    ]


def test_flags_in_a_variable_of_a_file(tmp_path: Path) -> None:
    overlay = {
        f"{SYSTEM}/a.service": unit(
            "EnvironmentFile=-/etc/default/llama", "ExecStart=/usr/bin/llama-server $LLAMA_OPTS"
        ),
        "/etc/default/llama": 'LLAMA_OPTS="--mlock -c 4096 --api-key hunter2"\nHF_TOKEN=hunter2\n',
    }
    found = one(tmp_path, overlay)
    assert dict(found.flags) == {"--mlock": "", "-c": "4096", "--api-key": "redacted"}
    assert found.option("ctx_size") == "4096"


def test_flags_in_a_file_that_is_not_read_are_unknown(tmp_path: Path) -> None:
    text = unit("EnvironmentFile=/etc/shadow", "ExecStart=/usr/bin/llama-server $LLAMA_OPTS")
    answer = ask(build(tmp_path, BARE, {f"{SYSTEM}/a.service": text}), "llama-gone-flags").answer
    assert answer == Unknown(
        f"{SYSTEM}/a.service takes flags from $LLAMA_OPTS, which is not in a file that is read"
    )


def test_ollama_in_the_vendor_directory(tmp_path: Path) -> None:
    override = f"{SYSTEM}/ollama.service.d/override.conf"
    overlay = {
        f"{VENDOR}/ollama.service": unit("ExecStart=/usr/local/bin/ollama serve"),
        override: unit('Environment="HSA_OVERRIDE_GFX_VERSION=11.0.0" "OLLAMA_HOST=0.0.0.0"'),
    }
    text = finding(tmp_path, "rocm-override", overlay).text
    assert f"HSA_OVERRIDE_GFX_VERSION=11.0.0 ({override})" in text


# -- files that flags name ----------------------------------------------------------------------

PRESET = """version = 1
[*]
c = 8192
mlock = off
[alice/diary:UD-Q4_K_XL]
hf = alice/diary:UD-Q4_K_XL
  no-mmap = on
LLAMA_ARG_CACHE_RAM = 0
[b]
model = /m/x-Q8_0.gguf
"""


def test_a_preset(tmp_path: Path) -> None:
    overlay = {
        f"{SYSTEM}/r.service": unit(
            "ExecStart=/usr/bin/llama-server --models-preset /etc/llama/m.ini --models-max 1 -fa on"
        ),
        "/etc/llama/m.ini": PRESET,
    }
    router, first, second = servers(tmp_path, overlay)
    assert router.path == f"{SYSTEM}/r.service"
    assert (first.where, first.model) == ("/etc/llama/m.ini (server 1)", "model-UD-Q4_K_XL.gguf")
    assert (second.where, second.model) == ("/etc/llama/m.ini (server 2)", "model-Q8_0.gguf")
    assert first.has("--no-mmap")
    assert not second.has("--no-mmap")
    assert not first.has("--mlock")  # switched off
    assert [each.option("ctx_size") for each in (first, second)] == ["8192", "8192"]
    assert first.option("flash_attn") == "on"  # from the router
    assert first.option("cache_ram") == "0"
    # A key that llama-server does not know is refused, whatever its value.
    assert "--mlock, --no-mmap" in finding(tmp_path / "f", "llama-gone-flags", overlay).text


def swap(config: str | None, flags: str = "--config /etc/llama-swap/config.yaml") -> Overlay:
    return {
        SWAP_UNIT: unit(f"ExecStart=/usr/local/bin/llama-swap {flags}", "MemoryMin=4G"),
        SWAP: config,
    }


MODELS = """# hunter2
macros:
  "bin": /usr/bin/llama-server
  base: |
    ${bin} --port ${PORT}
    --no-mmap
models:
  "alice's diary":
    cmd: |
      # hunter2
      ${base}
      -m /m/diary-Q4_0.gguf \\
      --ctx-size 8192
    env: ["HSA_ENABLE_SDMA=0", "HF_TOKEN=hunter2"]
    aliases:
    - "gpt"
  two:
    macros: {ctx: 512}
    cmd: >-
      docker run --rm -e GPU_MAX_HW_QUEUES=1 -p ${PORT}:1
      ghcr.io/ggml-org/llama.cpp:server-rocm-b8000
      -m /m/x.gguf -c ${ctx} --draft-max 4
  three:
    proxy: http://127.0.0.1:1
groups:
  all:
    members: [two, "three"]
"""


@pytest.mark.parametrize("flags", ["--config /etc/llama-swap/config.yaml", f"-config={SWAP}", ""])
def test_llama_swap(flags: str, tmp_path: Path) -> None:
    first, second = servers(tmp_path, swap(MODELS, flags))
    assert (first.where, first.model) == (f"{SWAP} (server 1)", "model-Q4_0.gguf")
    assert first.has("--no-mmap")
    assert first.option("ctx_size") == "8192"
    assert dict(first.environment) == {"HSA_ENABLE_SDMA": "0"}
    assert first.settings == {"MemoryMin": "4G"}  # its servers live in its unit
    assert dict(second.environment) == {"GPU_MAX_HW_QUEUES": "1"}
    assert (second.image, second.option("ctx_size")) == ("llama.cpp:server-rocm-b8000", "512")
    # b8000 knows --draft-max, b11669 does not know --no-mmap.
    text = finding(tmp_path / "f", "llama-gone-flags", swap(MODELS, flags)).text
    assert f"{SWAP} (server 1) passes --no-mmap, which b11669 does not accept" in text
    assert "--draft-max" not in text


@pytest.mark.parametrize(
    ("overlay", "why"),
    [
        (swap(None), f"{SWAP}, which cannot be read (no such file or directory)"),
        (swap("models:\n  a: *x\n"), "is not understood (line 2: an alias without an anchor"),
        (swap("models:\n\ta: 1\n"), "is not understood (line 2: a tab for indentation)"),
        (swap("", "--config models.yaml"), "models.yaml, which is not an absolute path"),
        (swap("", "--config /etc/shadow"), "/etc/shadow, which is not read by that name"),
        (swap("", "--config /../etc/x.yaml"), "which is not an absolute path"),
    ],
    ids=["gone", "alias", "tab", "relative", "shadow", "up"],
)
def test_what_cannot_be_read_is_not_fine(overlay: Overlay, why: str, tmp_path: Path) -> None:
    root = build(tmp_path / "m", BARE, overlay)
    answer = ask(root, "llama-gone-flags").answer
    assert isinstance(answer, Unknown)
    assert answer.why.startswith("llama-swap is declared; its models are in ")
    assert why in answer.why
    # And in a snapshot it is as unknown.
    file = tmp_path / "snapshot"
    file.write_text(taken(root))
    with open_snapshot(str(file)) as replay:
        assert ask(replay, "llama-gone-flags").answer == answer


def test_a_compose_file_with_anchors(tmp_path: Path) -> None:
    text = (
        "x-llm: &llm\n  image: ghcr.io/ggml-org/llama.cpp:server-vulkan-b9000\n"
        "  environment:\n    HSA_ENABLE_SDMA: 0\n"
        "services:\n  a:\n    <<: *llm\n    command: --draft-max 3 -m /m/x.gguf\n"
        "  web:\n    image: nginx\n    ports:\n      - 80:80\n"
    )
    found = one(tmp_path, {"/srv/llm/compose.yaml": text})
    assert dict(found.environment) == {"HSA_ENABLE_SDMA": "0"}
    result = ask(build(tmp_path / "f", BARE, {"/srv/llm/compose.yaml": text}), "llama-gone-flags")
    assert isinstance(result.answer, Finding)
    assert "which the image's b9000 does not accept" in result.answer.text
    assert (result.severity, result.answer.confidence) == ("error", "likely")


@pytest.mark.parametrize(
    "text",
    ["a: [1, [2]]", "a: {b: {c: d}}", "a: !x y", "a: 'b", "a: b\n   c: d", "a\n- b: [", "a: *b",
     "a:\n  b: 1\n c: 2", "- a\nb: c"],
)  # fmt: skip
def test_yaml_that_is_not_of_the_subset_is_an_error_with_a_line(text: str) -> None:
    with pytest.raises(NotUnderstood, match=r"^line \d"):
        load(text)


def test_yaml_agrees_with_pyyaml() -> None:
    yaml = pytest.importorskip("yaml")
    for text in (MODELS.replace(">-", ">"), PLACES["compose"][1], PLACES["compose-home"][1]):
        plain = yaml.load(text, Loader=yaml.BaseLoader)
        assert _words(load(text)) == _words(plain)


def _words(node: object) -> object:
    """Without what differs in white space only."""
    if isinstance(node, dict):
        return {key: _words(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_words(each) for each in node]
    return str(node or "").split()


# -- which flags a binary takes -----------------------------------------------------------------


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_: str = "new") -> LlamaServer:
    """What the surroundings know of the fake llama-server."""
    binary = tmp_path / "bin" / "llama-server"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} --build {build_} -- "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setattr("infertune.doctor.surroundings._journal", lambda: ())
    monkeypatch.setattr("infertune.doctor.surroundings.others_may_write", lambda path: False)
    found = look_around(Root("/"), {"PATH": f"{binary.parent}:/usr/bin:/bin"}).server
    assert isinstance(found, LlamaServer), found
    return found


@pytest.mark.parametrize(("build_", "known", "gone"), [
    ("new", "--load-mode", "--mlock"), ("old", "--mlock", "--load-mode"),
])  # fmt: skip
def test_the_binary_is_asked(
    build_: str, known: str, gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(tmp_path, monkeypatch, build_)
    assert not isinstance(found.flags, Unknown)
    assert known in found.flags
    assert gone not in found.flags
    around = look_around(Root("/"), {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    # A snapshot has it too, and one flag that it does not list is an error, whatever the number.
    machine = build(
        tmp_path / "machine", BARE, {UNIT: unit(f"ExecStart=llama-server {gone} --bogus --port 1")}
    )
    machine.replace(SURROUNDINGS, around.to_file(), 0o644)
    assert recorded(machine).server == found
    answer = ask(machine, "llama-gone-flags").answer
    assert isinstance(answer, Finding)
    assert f"passes {', '.join(sorted((gone, '--bogus')))}, which " in answer.text
    assert answer.confidence is None


def test_a_flag_that_the_help_only_says_is_gone_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "--port PORT      port\n                 (env: LLAMA_ARG_PORT)\n"
        "--draft, --draft-n, --draft-max N       the argument has been\n"
        "                                        removed. use --spec-draft-n-max or\n"
        "                                        (env: LLAMA_ARG_DRAFT_MAX)\n"
        "--spec-draft-n-max N  tokens (default: 3)\n"
    )
    monkeypatch.setattr("infertune.doctor.surroundings.ask_help", lambda *_: text)
    found = asked(tmp_path, monkeypatch)
    assert found.flags == {"--port", "--spec-draft-n-max"}
    assert found.variables == {"LLAMA_ARG_PORT"}


def known(flags: list[str] | None, places: tuple[str, ...] = ()) -> Overlay:
    document = json.loads(surroundings()[SURROUNDINGS])
    document["server"] |= {"flags": flags, "variables": None, "places": places}
    return {SURROUNDINGS: json.dumps(document)}


def test_known_flags_beat_the_table(tmp_path: Path) -> None:
    """A build that kept --mlock is believed; an unknown flag is found without any table."""
    overlay = {**server("--mlock --bogus"), **known(["--mlock", "--model", "--port"])}
    answer = finding(tmp_path, "llama-gone-flags", overlay)
    assert "chat.service passes --bogus, which b11669 does not accept" in answer.text
    assert answer.confidence is None  # as the rule: sure
    assert answer.fix == "remove --bogus, or write it as llama-server --help has it"
    fine = {**server("--mlock"), **known(["--mlock", "--model"])}
    assert ask(build(tmp_path / "fine", BARE, fine), "llama-gone-flags").outcome == "fine"


def test_another_binary_is_likely_at_most(tmp_path: Path) -> None:
    overlay = {**server("--draft-max 3"), **known(["--model"], ("/usr/local/bin/llama-server",))}
    answer = finding(tmp_path, "llama-gone-flags", overlay)
    assert answer.confidence == "likely"
    assert "--model" not in answer.text
    same = {**server("--draft-max 3"), **known(["--model"], ("/usr/bin/llama-server",))}
    assert finding(tmp_path / "same", "llama-gone-flags", same).confidence is None


def test_an_image_without_a_build_is_a_doubt(tmp_path: Path) -> None:
    path, text = PLACES["quadlet"]
    result = ask(build(tmp_path, BARE, {path: text}), "llama-gone-flags")
    assert isinstance(result.answer, Finding)
    assert (result.severity, result.answer.confidence) == ("warning", "likely")
    assert "which llama.cpp has removed (by b10875)" in result.answer.text
    # Also without any llama-server on the host.
    alone = build(tmp_path / "alone", BARE, {path: text}, surroundings(server=False))
    assert ask(alone, "llama-gone-flags").severity == "warning"


@pytest.mark.parametrize("flag", GONE_FLAGS)
def test_the_table(flag: str, tmp_path: Path) -> None:
    gone = GONE_FLAGS[flag]
    new = {**server(f"{flag} 3"), **surroundings(f"{gone.build} (1234567)")}
    answer = finding(tmp_path / "new", "llama-gone-flags", new)
    assert f"passes {flag}, which b{gone.build} does not accept" in answer.text
    assert gone.instead in (answer.fix or "")
    old = {**server(f"{flag} 3"), **surroundings(f"{gone.build - 1} (1234567)")}
    assert ask(build(tmp_path / "old", BARE, old), "llama-gone-flags").outcome == "fine"


def test_variables_that_are_gone(tmp_path: Path) -> None:
    drop_in = f"{UNIT}.d/x.conf"
    overlay = {**server(), drop_in: unit("Environment=LLAMA_ARG_DRAFT_MAX=16")}
    result = ask(build(tmp_path, BARE, overlay), "llama-gone-variables")
    assert isinstance(result.answer, Finding)
    assert f"LLAMA_ARG_DRAFT_MAX=16 ({drop_in}) is refused by b11669" in result.answer.text
    assert result.severity == "error"
    assert result.answer.fix == "set LLAMA_ARG_SPEC_DRAFT_N_MAX instead"


def test_old_snapshots_do_not_know_flags(tmp_path: Path) -> None:
    found = recorded(build(tmp_path, HEALTHY)).server
    assert isinstance(found, LlamaServer)
    assert (found.flags, found.variables, found.places) == (NO_HELP, NO_HELP, ())


# -- what they are given, against the machine --------------------------------------------------

QUIET = "-b 2048 -ub 512 -c 131072 -np 1 -fa on -ctk q8_0 -ctv q8_0 --load-mode auto -cram 4096"


def test_a_server_that_is_set_up_well_is_left_alone(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, server(QUIET))
    results = diagnose(read_facts(root, recorded(root)), RULES.values())
    assert [each.rule.id for each in results if each.outcome == "finding"] == []


@pytest.mark.parametrize(
    ("rule", "flags", "more", "says"),
    [
        ("server-ubatch-capped", "-b 512 -ub 1024", {}, "the batch is 512:"),
        ("server-ubatch-vulkan", "-ub 2048 -dev Vulkan0", {}, "2048 tokens"),
        ("server-quantised-v", "--cache-type-v=q4_0 --flash-attn=0", {}, "q4_0"),
        ("server-slot-context", "-c 4096 -np 4", {}, "1024 for each"),
        ("server-locked-copy", "--load-mode mmap+mlock", {}, "second copy"),
        ("server-mapped-model", "", surroundings("8681 (1234567)"), "b8681 maps models"),
        ("server-no-offload", "--device none", {}, "on the CPU"),
        ("server-prompt-cache", "-cram -1", {}, "all memory"),
        ("server-prompt-cache", "-cram 32768", {}, "32 GiB"),
        ("server-prompt-cache", "", sized(120), "8 GiB, llama-server's default"),
    ],
)
def test_settings_that_do_not_fit(
    rule: str, flags: str, more: Overlay, says: str, tmp_path: Path
) -> None:
    assert says in finding(tmp_path, rule, server(flags), more).text


@pytest.mark.parametrize(
    ("rule", "flags"),
    [
        ("server-ubatch-vulkan", "-ub 2048 -dev ROCm0"),
        ("server-ubatch-vulkan", "-ub 2048 -b 512 -dev Vulkan0"),
        ("server-quantised-v", "-ctv q8_0 -fa auto"),
        ("server-quantised-v", "-ctv f16 -fa off"),
        ("server-slot-context", "-c 0 -np 4"),
        ("server-slot-context", "-c 65536 -np 4"),
        ("server-slot-context", "-c 4096 -np 8 --embedding"),
        ("server-locked-copy", "--mlock --no-mmap"),
        ("server-locked-copy", "--mlock -ngl 0"),
        ("server-mapped-model", "--load-mode mmap -dev Vulkan0"),
        ("server-mapped-model", "--load-mode mmap -ngl 0"),
        ("server-no-offload", "-ngl 0 --reranking"),
        ("server-prompt-cache", "-cram 0"),
    ],
)
def test_settings_that_fit(rule: str, flags: str, tmp_path: Path) -> None:
    assert ask(build(tmp_path, BARE, server(flags)), rule).outcome == "fine"


@pytest.mark.parametrize("place", ["quadlet", "compose", "lemonade"])
def test_what_a_container_may_lock_is_not_known(place: str, tmp_path: Path) -> None:
    path, text = PLACES[place]
    assert ask(build(tmp_path, BARE, {path: text}), "memlock-limit").outcome == "fine"


def test_a_variable_says_the_same_as_a_flag(tmp_path: Path) -> None:
    overlay = server("", "Environment=LLAMA_ARG_UBATCH=4096 LLAMA_ARG_BATCH=1024")
    assert "and the batch is 1024" in finding(tmp_path, "server-ubatch-capped", overlay).text


# -- snapshots -------------------------------------------------------------------------------------

ALL: Overlay = {
    **dict(PLACES.values()),
    **swap(MODELS),
    f"{SYSTEM}/r.service": unit("ExecStart=llama-server --models-preset /etc/llama/m.ini"),
    "/etc/llama/m.ini": PRESET,
    f"{SYSTEM}/a.service.d/x.conf": unit("Environment=HSA_ENABLE_SDMA=0 HF_TOKEN=hunter2"),
    f"{USER}/b.service": unit(
        "EnvironmentFile=/etc/default/llama", "ExecStart=%h/bin/llama-server $LLAMA_OPTS"
    ),
    "/etc/default/llama": "LLAMA_OPTS=--mlock --api-key hunter2 --alias alice\nA_KEY=-hunter2\n",
}


def taken(root: Root) -> str:
    def read(recorder: Root) -> None:
        read_facts(recorder, recorded(recorder))

    return record(root, read)


def test_a_snapshot_has_the_same_servers(tmp_path: Path) -> None:
    root = build(tmp_path / "m", BARE, ALL)
    here = read_servers(root)
    assert len(here) >= 16
    file = tmp_path / "snapshot"
    file.write_text(taken(root))
    with open_snapshot(str(file)) as replay:
        there = read_servers(replay)
        # Recorded again it is the same: user1 stays user1.
        assert taken(replay).partition("\n\n")[2] == file.read_text().partition("\n\n")[2]
    assert there == tuple(
        replace(
            each,
            path=each.path.replace("alice", "user1"),
            origins={name: path.replace("alice", "user1") for name, path in each.origins.items()},
        )
        for each in here
    )


def test_a_snapshot_of_servers_holds_nothing_private(tmp_path: Path) -> None:
    text = taken(build(tmp_path, BARE, ALL))
    for secret in ("alice", "hunter2", "diary", "A_KEY", "HF_TOKEN", "gpt"):
        assert secret not in text, secret
    assert "/home/user1/.config/systemd/user/b.service" in text
    assert "ExecStart=/elsewhere/llama-server" in text


@pytest.mark.parametrize("path", ALL)
def test_reducing_twice_changes_nothing(path: str, tmp_path: Path) -> None:
    once = reduce_file(path, build(tmp_path, ALL).read_bytes(path))
    assert once
    assert reduce_file(path, once) == once


def test_users_are_told_apart(tmp_path: Path) -> None:
    overlay = {
        f"/home/{name}/.config/systemd/user/a.service": unit(START) for name in ("bob", "alice")
    }
    text = taken(build(tmp_path, BARE, overlay))
    assert "/home/user1/.config/systemd/user/a.service" in text
    assert "/home/user2/.config/systemd/user/a.service" in text


# -- hostile files -----------------------------------------------------------------


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 20)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def deep(path: Path) -> None:
    path.write_text("".join(f"{'  ' * level}a:\n" for level in range(3000)))


def wide(path: Path) -> None:
    path.write_text("models:\n  a:\n    cmd: " + "${a}" * 60_000 + "\nmacros:\n  a: " + "${a}" * 99)


def junk(path: Path) -> None:
    path.write_bytes(os.urandom(50_000).replace(b"\0", b"llama-server "))


def spaces(path: Path) -> None:
    path.write_text("models:\n  a" + " " * 60_000 + "llama-server\n" + "'" * 60_000)


HOSTILE = {
    "fifo": os.mkfifo, "directory": Path.mkdir, "100-mib": sparse, "loop": loop, "deep": deep,
    "wide": wide, "junk": junk, "spaces": spaces,
}  # fmt: skip
HOSTILE_PATHS = (
    *(f"{SYSTEM}/x.service", f"{SYSTEM}/chat.service.d/x.conf", f"{USER}/x.service"),
    *(f"{QUADLET}/x.container", SWAP, "/etc/llama/m.ini", "/opt/x/compose.yaml"),
    *("/etc/default/llama", "/var/lib/lemonade/.cache/lemonade/config.json"),
)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind: str, tmp_path: Path) -> None:
    root = build(
        tmp_path,
        BARE,
        swap(None),
        server("--models-preset /etc/llama/m.ini", "EnvironmentFile=/etc/default/llama"),
    )
    for path in HOSTILE_PATHS:
        where = root.at(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        HOSTILE[kind](where)
    began = time.process_time()
    facts = read_facts(root, recorded(root))
    taken(root)
    assert time.process_time() - began < 10  # not a speed: a hang, or a blow-up
    assert not isinstance(facts.declared, Unknown), facts.declared
    assert any(each.path == UNIT for each in facts.declared)
    for result in diagnose(facts, RULES.values()):
        if isinstance(result.answer, Unknown):
            assert "please report" not in result.answer.why


def test_many_files(tmp_path: Path) -> None:
    line = f"{START} {'--mlock ' * 1500}\n"
    overlay = {f"{SYSTEM}/x{n}.service": unit(line) for n in range(400)}
    root = build(tmp_path, BARE, overlay)
    began = time.process_time()
    found = read_servers(root)
    assert time.process_time() - began < 20
    assert len(found) == SERVERS_LIMIT


def test_directories_that_lead_into_each_other(tmp_path: Path) -> None:
    root = build(tmp_path, BARE, {"/home/alice/a": File(target="..")})
    for name in ("b", "c"):
        root.at(f"/opt/{name}").parent.mkdir(parents=True, exist_ok=True)
        root.at(f"/opt/{name}").symlink_to(".")
    assert read_servers(root) == ()


def test_a_name_that_no_snapshot_could_hold_is_not_looked_at(tmp_path: Path) -> None:
    root = build(tmp_path, BARE, {f"{SYSTEM}/a\nb.service": unit(START)})
    assert read_servers(root) == ()
