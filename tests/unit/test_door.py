# SPDX-License-Identifier: Apache-2.0
"""Servers that other machines reach: where they listen, who may come, and the key they ask for."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune import launcher
from infertune.base.addresses import PRIVATE, url
from infertune.base.errors import DeclarationError, UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.catalogue.server_settings import server_arguments
from infertune.cli import serve
from infertune.cli.main import main
from infertune.exporter import servers as exported
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_root
from infertune.host.sockets import listeners
from infertune.launch.ready import choose_port
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, resolve
from infertune.run import Request, Result, Run, prepare
from infertune.servers.api_key import credential, credential_of, refuse_open_file
from infertune.servers.declaration import Declaration, declaration_text, parse_declaration
from infertune.servers.store import declared_ports, write_declaration
from infertune.servers.unit import drop_in, systemd_run_line
from infertune.service.setup import template

FIXTURE = Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot"
KEYS = "/etc/infertune/keys/chat"
PLAIN = 'profile = "quiet"\nport = 8081\n'
KEYED = f'{PLAIN}api_key_file = "{KEYS}"\n'
HELP = "--host HOST   address\n--port PORT   port\n--api-key-file FNAME   file with keys\n"


def quiet() -> Desired:
    with open_root(str(FIXTURE)) as root:
        return resolve(load_profile(root, "quiet"), read_machine(root), "rocm")


def parsed(text: str) -> Declaration:
    found = parse_declaration("chat", text, "x")
    assert isinstance(found, Declaration)
    assert parse_declaration("chat", declaration_text(found), "x") == found
    return found


def directives(declaration: Declaration) -> dict[str, str]:
    text = drop_in(declaration, quiet(), python="/usr/bin/python3")
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_other_machines_take_a_key() -> None:
    assert parsed(PLAIN).host == "127.0.0.1"
    assert parsed(f'{PLAIN}host = "::1"\n').host == "::1"
    for host in ("0.0.0.0", "192.168.1.5", "::", "2001:db8::1"):
        with pytest.raises(DeclarationError, match=rf"x:3: 'host': {host} .*needs a key: api_key"):
            parse_declaration("chat", f'{PLAIN}host = "{host}"\n', "x")
        assert parsed(f'{KEYED}host = "{host}"\n').host == host
    assert parsed(KEYED).api_key_file == KEYS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('host = "example.org"', "'host': 'example.org' is not an address"),
        ('host = "/run/x.sock"', "is not an address"),
        ('host = "fe80::1%eth0"', "has a zone"),
        ('host = "::ffff:10.0.0.1"', "an IPv4 address written as IPv6"),
        ('host = "224.0.0.1"', "many machines"),
        ('host = "255.255.255.255"', "many machines"),
        ('host = "0.0.0.0"\nclients = ["fe80::1%eth0"]', "has a zone"),
        ('host = "0.0.0.0"\nclients = ["::ffff:10.0.0.0/104"]', "an IPv4 address written as IPv6"),
        ("host = 2130706433", "is not an address"),
        ('host = "0.0.0.0"\nclients = ["10.0.0.1/8"]', "is no address and no network"),
        ('host = "0.0.0.0"\nclients = "10.0.0.0/8"', "clients is a list"),
        ('host = "0.0.0.0"\nclients = []', "clients is a list"),
        ('host = "0.0.0.0"\nclients = ["10.0.0.0/8\\nIPAddressAllow=any"]', "is no address"),
        ('clients = ["10.0.0.0/8"]', "is for a 'host' that other machines reach"),
    ],
)
def test_addresses_that_are_none(line: str, says: str) -> None:
    with pytest.raises(DeclarationError, match=f"x:[45]: .*{re.escape(says)}"):
        parse_declaration("chat", f"{KEYED}{line}\n", "x")


@pytest.mark.parametrize(
    "path",
    ["keys", "/", "/a b", "/a%n", "/../etc/shadow", "/a/./b", "//a", "/a\\nb", "/a:b"],
)
def test_paths_of_keys_that_are_none(path: str) -> None:
    with pytest.raises(DeclarationError, match=r"x:3: 'api_key_file': .* is not an absolute path"):
        parse_declaration("chat", f'{PLAIN}api_key_file = "{path}"\n', "x")


def test_the_unit_lets_in_who_was_named_and_nobody_else() -> None:
    assert "IPAddressAllow" not in directives(parsed(KEYED))
    open_to_all = parsed(f'{KEYED}host = "0.0.0.0"\n')
    assert directives(open_to_all)["IPAddressAllow"] == " ".join(PRIVATE)
    some = parsed(f'{KEYED}host = "10.1.2.3"\nclients = ["10.9.0.0/16", "2001:db8::/32"]\n')
    assert directives(some)["IPAddressAllow"] == "10.1.2.3 10.9.0.0/16 2001:db8::/32"
    anybody = parsed(f'{KEYED}host = "::"\nclients = ["any"]\n')
    assert directives(anybody)["IPAddressAllow"] == "any"
    assert directives(parsed(KEYED))["LoadCredential"] == f"api-key:{KEYS}"
    assert "LoadCredential" not in directives(parsed(PLAIN))
    # What the drop-in adds to: nobody but this machine.
    assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in template()


def test_the_server_is_given_the_file_and_never_the_key() -> None:
    path = credential_of("infertune-server@chat.service")
    arguments, _ = server_arguments({}, HELP, model="/m", port=1, host="::", api_key_file=path)
    assert arguments[2:] == ["--host", "::", "--port", "1", "--api-key-file", path]
    # One that asks for no key would answer everybody.
    with pytest.raises(ValueError, match="has no --api-key-file"):
        server_arguments({}, "--host HOST   x\n", model="/m", port=1, api_key_file=path)
    keyed = replace(parsed(f'{KEYED}host = "10.1.2.3"\n'), model="/m.gguf")
    words = shlex.split(systemd_run_line(keyed, quiet(), ["/bin/x"], {}, template()))
    assert f"--property=LoadCredential=api-key:{KEYS}" in words
    assert f"--property=IPAddressAllow=10.1.2.3 {' '.join(PRIVATE)}" in words


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
@pytest.mark.parametrize(
    ("mode", "owner", "directory", "says"),
    [
        (0o600, "0:0", 0o755, None),
        (0o640, "0:0", 0o755, None),
        (0o600, "0:1000", 0o755, None),
        (0o640, "0:1000", 0o755, "others than root may read it"),
        (0o644, "0:0", 0o755, "others than root may read it"),
        (0o601, "0:0", 0o755, "others than root may read it"),
        (0o600, "1000:0", 0o755, "others than root may change this file"),
        (0o660, "0:0", 0o755, "others than root may change this file"),
        (0o600, "0:0", 0o777, "others than root may change this directory"),
    ],
)
def test_a_key_that_others_may_read_or_change(
    mode: int, owner: str, directory: int, says: str | None, tmp_path: Path
) -> None:
    file = tmp_path / KEYS.lstrip("/")
    file.parent.mkdir(parents=True)
    file.write_text("k" * 32)
    file.chmod(mode)
    uid, gid = owner.split(":")
    os.chown(file, int(uid), int(gid))
    file.parent.chmod(directory)
    root = Root(tmp_path)
    root.live = True
    if says is None:
        refuse_open_file(root, KEYS)
        return
    with pytest.raises(UsageError, match=says):
        refuse_open_file(root, KEYS)


def test_a_link_or_a_device_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("k" * 32)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("link", "fifo"):
        with pytest.raises(UsageError, match=f"/{name}: not a regular file"):
            refuse_open_file(Root(tmp_path), f"/{name}")
    with pytest.raises(UsageError, match="/none: No such file"):
        refuse_open_file(Root(tmp_path), "/none")


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("a" * 16 + "\n", True),
        ("a" * 16 + "\n" + "b" * 32 + "\n", True),
        ("a" * 16, True),
        ("", False),
        ("\n", False),
        ("a" * 15 + "\n", False),
        ("a" * 16 + "\r\n", False),
        ("a" * 16 + "\n\n", False),
        ("secret secret secret\n", False),
        (("a" * 63 + "\n") * 1025, False),
    ],
)
def test_keys_are_looked_at_where_they_are_used(text: str, fine: bool, tmp_path: Path) -> None:
    (tmp_path / "api-key").write_bytes(text.encode())
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    if fine:
        assert credential(environment) == f"{tmp_path}/api-key"
        return
    with pytest.raises(UsageError, match="a key for each line, of 16 to 512") as failure:
        credential(environment)
    assert "secret" not in failure.value.message


def test_without_its_copy_a_server_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not given its api_key_file"):
        credential({})
    with pytest.raises(UsageError, match="api_key_file: No such file"):
        credential({"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_the_exporter_asks_only_where_loopback_leads(tmp_path: Path) -> None:
    root = Root(tmp_path)
    keyed = Declaration("all", "quiet", None, 8081, host="0.0.0.0", api_key_file=KEYS)
    for one in (
        keyed,
        replace(keyed, name="one", port=8082, host="192.168.1.5"),
        replace(keyed, name="six", port=8083, host="::1"),
        replace(keyed, name="own", port=8084, host="127.0.0.1"),
    ):
        write_declaration(root, one)
    assert declared_ports(root).keys() == {"all", "one", "six", "own"}
    asked = {name: each.port for name, each in exported.asked(root).items()}
    assert asked == {"all": 8081, "own": 8084}


def test_ports_of_another_address() -> None:
    with socket.create_server(("127.0.0.3", 0)) as server:
        port = server.getsockname()[1]
        here = Root("/")
        assert not listeners(here, port)
        assert {each.uid for each in listeners(here, port, "127.0.0.3")} == {os.getuid()}
        with pytest.raises(UsageError, match="is taken"):
            choose_port(port, address="127.0.0.3")
    with pytest.raises(UsageError, match=r"192\.0\.2\.1 is not an address of this machine"):
        choose_port(None, address="192.0.2.1")


def test_serve_wants_a_key_for_another_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "quiet", "--model", "/m.gguf", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 is reached by other machines" in capsys.readouterr().err
    assert main(["serve", "quiet", "--host", "example.org"]) == 2
    assert "'example.org' is not an address, such as" in capsys.readouterr().err


def test_the_list_says_who_is_open() -> None:
    assert serve._door({"port": 8080, "host": "127.0.0.1"}) == "8080"
    assert serve._door({"port": 8080, "host": "0.0.0.0"}) == "0.0.0.0:8080"
    assert serve._door({"port": 11434}) == "11434"
    assert serve._door({}) == "-"


def test_where_this_machine_finds_it() -> None:
    assert url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert url("::", 1) == "http://[::1]:1"
    assert url("192.168.1.5", 1) == "http://192.168.1.5:1"


def test_the_daemon_starts_nothing_with_an_open_key(tmp_path: Path) -> None:
    pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")
    from infertune.service.serving import Serving
    from support import build

    class Systemd:
        """Nothing runs, and nothing may be started."""

        async def states(self, unit: str) -> dict[str, str]:
            return {}

    root = build(tmp_path)
    (tmp_path / "key").write_text("k" * 32)
    (tmp_path / "key").chmod(0o644)
    write_declaration(root, Declaration("chat", "quiet", "/m", 8081, api_key_file="/key"))
    with pytest.raises(UsageError, match="/key: others than root may read it"):
        asyncio.run(Serving(root, Systemd()).serve("chat"))  # type: ignore[arg-type]


def server(directory: Path, *flags: str) -> str:
    """A llama-server that takes these flags."""
    file = directory / "llama-server"
    lines = "; ".join(f"echo '{flag} X   x'" for flag in ("--model", "--host", "--port", *flags))
    file.write_text(f"#!/bin/sh\n[ $1 = --help ] && {{ {lines}; }}\nexit 0\n")
    file.chmod(0o755)
    return str(file)


def test_a_start_without_a_key_is_refused_where_one_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with open_root(str(FIXTURE)) as root:
        machine = read_machine(root)

        def argv(program: str) -> tuple[str, ...]:
            request = Request(
                profile="base",
                caller={"PATH": "/usr/bin:/bin"},
                backend="cpu",
                model=str(tmp_path / "m.gguf"),
                server=program,
                host="127.0.0.2",
                api_key_file="/run/credentials/x/api-key",
            )
            return prepare(Run(root, machine, request, Result("base"), Quiet()))[1].argv

        words = argv(server(tmp_path, "--api-key-file"))
        assert words[3:6] == ("--host", "127.0.0.2", "--port")
        assert words[7:] == ("--api-key-file", "/run/credentials/x/api-key")
        with pytest.raises(UsageError, match="has no --api-key-file"):
            argv(server(tmp_path))


class Quiet:
    """An audience that hears nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_the_launcher_takes_the_copy_of_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Request] = []

    def stop_here(one: Run) -> None:
        asked.append(one.request)
        raise UsageError("enough")

    (tmp_path / "api-key").write_text("c29tZXRoaW5nLXNlY3JldA\n")
    declared = replace(parsed(f'{KEYED}host = "10.1.2.3"\n'), model="/m.gguf")
    monkeypatch.setattr("sys.argv", ["launcher", "chat"])
    monkeypatch.setattr(launcher, "find_declaration", lambda *_: declared)
    monkeypatch.setattr(launcher, "prepare", stop_here)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert launcher.main() == 2
    assert "was not given its api_key_file" in capsys.readouterr().err
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert launcher.main() == 2
    (request,) = asked
    assert (request.host, request.api_key_file) == ("10.1.2.3", f"{tmp_path}/api-key")
    said = capsys.readouterr()
    assert "c29tZXRo" not in said.out + said.err
