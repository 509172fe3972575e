# SPDX-License-Identifier: Apache-2.0
"""Declared servers: what may be declared, and what systemd is told about it."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infertune.base.errors import DeclarationError, UsageError
from infertune.base.names import DECLARED
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_root
from infertune.profiles.config import Config, read_config
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, resolve
from infertune.servers.declaration import (
    Declaration,
    Foreign,
    declaration_text,
    parse_declaration,
)
from infertune.servers.store import (
    declared_names,
    find_declaration,
    remove_declaration,
    write_declaration,
)
from infertune.servers.unit import (
    directives,
    drop_in,
    is_a_home,
    needs,
    program,
    promised,
    slice_drop_in,
    systemd_run_line,
)
from infertune.service import setup
from infertune.service.partition import make_partition
from infertune.service.setup import FILES, check, install, remove, template

FIXTURE = Path(__file__).parents[1] / "fixtures" / "strix-halo-128.snapshot"
CHAT = Declaration("chat", "low-latency", "/models/a b.gguf", 8081, "rocm", {"ctx_size": 4096})


def desired(profile: str, backend: str = "rocm") -> Desired:
    with open_root(str(FIXTURE)) as root:
        return resolve(load_profile(root, profile), read_machine(root), backend)


def test_round_trip() -> None:
    assert parse_declaration("chat", declaration_text(CHAT), "x") == CHAT
    plain = Declaration("x", "quiet", None, 8080, "auto", {})
    assert parse_declaration("x", declaration_text(plain), "x") == plain


def test_flags_of_an_administrator_are_checked_where_they_stand() -> None:
    text = 'profile = "quiet"\nport = 8080\nflags = ["--no-webui", "--seed", "7"]\n'
    found = parse_declaration("x", text, "x")
    assert isinstance(found, Declaration)
    assert found.flags == ("--no-webui", "--seed", "7")
    assert parse_declaration("x", declaration_text(found), "x") == found
    for flags, says in (
        ('"--no-webui"', "is a list of words"),
        ("[1]", "is a list of words"),
        ('["--tools", "all"]', "--tools is not for a server's unit"),
        ('["--seed", "\\u001b[2J"]', "control characters"),
    ):
        with pytest.raises(DeclarationError, match=f"x:3: .*{says}"):
            parse_declaration("x", f'profile = "quiet"\nport = 8080\nflags = {flags}\n', "x")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('engine = "vllm"', "x:3: 'engine' goes with 'unit' or 'exec'"),
        ('user = "anna"', "x:3: 'user' goes with 'unit'"),
        ('unit = "a.service"\nuser = "root"', "x:4: 'user': root's units are the system's"),
        ('unit = "a.service"\nuser = ""', "x:4: 'user' is empty"),
        ('unit = "a.service"\nhost = "::"', "x:4: 'host' does not go with 'unit'"),
    ],
)
def test_a_key_of_another_kind_of_server(line: str, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        parse_declaration("chat", f'profile = "quiet"\nport = 8080\n{line}\n', "x")


def test_a_unit_of_others_is_declared_with_what_it_gets() -> None:
    text = 'unit = "ollama.service"\nprofile = "quiet"\nport = 11434\n'
    found = parse_declaration("ollama", text, "x")
    assert found == Foreign("ollama", "quiet", "ollama.service", "auto", 11434)
    assert parse_declaration("ollama", declaration_text(found), "x") == found
    with pytest.raises(DeclarationError, match=r"x:3: 'model' does not go with 'unit'"):
        parse_declaration("ollama", text.replace("port", "model"), "x")
    for unit in ("dbus.service", "infertune.service", "/etc/passwd", "user@0.service"):
        with pytest.raises(DeclarationError, match=r"x:1: 'unit': .* cannot be"):
            parse_declaration("ollama", text.replace("ollama.service", unit), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profile = 1\nport = 8080", "x.toml:1: 'profile': 1 is not a valid profile name"),
        ('profile = "../x"\nport = 8080', "'../x' is not a valid profile name"),
        ('profile = "quiet"', "'port' is missing"),
        ("port = 8080", "'profile' is missing"),
        ('profile = "quiet"\nport = 8080\nbackend = "cuda"', "x.toml:3: 'backend' is one of auto"),
        (
            'profile = "quiet"\n\nport = 80',
            ":3: 'port' is a number from 1024 to 65535, not 80",
        ),
        ('profile = "quiet"\nport = true', "x.toml:2: 'port' is a number .*, not true"),
        ('profile = "quiet"\nport = 8080\nmodel = "../a.gguf"', "absolute path"),
        ('profile = "quiet"\nport = 8080\nmodel = "a/../b"', "no name of a model"),
        ('profile = "quiet"\nport = 8080\nmodel = "/a\\nb"', "absolute path"),
        (
            'profile = "quiet"\nport = 8080\nexec = "/bin/sh"',
            "x.toml:3: exec is a list of words",
        ),
        (
            'profile = "quiet"\nport = 8080\n[settings]\nshell = 1',
            "there is no server setting 'shell'",
        ),
        ('profile = "quiet"\nport = 8080\n[settings]\nctx_size = "big"', "ctx_size"),
        ('profle = "quiet"\nport = 8080', "x.toml:1: unknown key 'profle'; did you mean 'profile'"),
        ('profile = "quiet"\nport = 8080\nforce = "yes"', "x.toml:3: 'force' is true or false"),
        ('profile = "quiet"\nport = 8080\n[settings]\nctx_sz = 1', "x.toml:4: .*'ctx_size'"),
        ("profile = ", "x.toml:1: not valid TOML"),
    ],
)
def test_declarations_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        parse_declaration("x", text, "x.toml")


def test_directives_say_what_the_profile_says() -> None:
    assert directives(desired("low-latency")) == {
        "MemoryMin": str(4 * 2**30),
        "MemorySwapMax": "0",
        "AllowedCPUs": "1-7",
        "OOMScoreAdjust": "-500",
        "ManagedOOMPreference": "avoid",
        "Nice": "-10",
    }
    assert "MemoryMin=4294967296\n" in text_of(CHAT, "low-latency")
    twice = slice_drop_in(needs([desired("low-latency")] * 2))
    assert twice.endswith(f"[Slice]\nMemoryMin={8 * 2**30}\n")


def text_of(declaration: Declaration, profile: str) -> str:
    return drop_in(declaration, desired(profile), python="/usr/bin/python3", groups=["render"])


def test_a_model_in_a_home_is_let_in_and_nothing_else_of_it() -> None:
    home = replace(CHAT, model='/home/me/my "big": models 100%/a.gguf')
    assert 'BindReadOnlyPaths="/home/me/my \\"big\\"\\: models 100%%"\n' in text_of(home, "quiet")
    assert "BindReadOnlyPaths" not in text_of(CHAT, "quiet")
    assert "SupplementaryGroups=render\n" in text_of(CHAT, "quiet")


@pytest.mark.parametrize(
    ("directory", "home"),
    [
        ("/home", True),
        ("/home/me", True),
        ("/var/home/me", True),
        ("/root", True),
        ("/root/models", False),
        ("/home/me/models", False),
        ("/srv/models", False),
    ],
)
def test_a_whole_home_is_never_shown(directory: str, home: bool) -> None:
    assert is_a_home(directory) == home


@pytest.mark.parametrize("path", ["/home/m.gguf", "/home/me/m.gguf", "/root/m.gguf"])
def test_a_declaration_cannot_have_a_home_shown_either(path: str, tmp_path: Path) -> None:
    etc = tmp_path / DECLARED.lstrip("/")
    etc.mkdir(parents=True)
    (etc / "chat.toml").write_text(f'profile = "quiet"\nport = 9000\nmodel = "{path}"\n')
    found = find_declaration(Root(tmp_path), "chat")
    assert found is not None
    with pytest.raises(UsageError, match=f"'chat': model {path}: the server would be shown all"):
        text_of(found, "quiet")
    drafting = replace(CHAT, settings={"spec_type": "draft-simple", "model_draft": path})
    with pytest.raises(UsageError, match=f"model_draft {path}"):
        text_of(drafting, "quiet")


def test_a_declaration_is_read_whole_or_refused(tmp_path: Path) -> None:
    etc = tmp_path / DECLARED.lstrip("/")
    etc.mkdir(parents=True)
    file = etc / "chat.toml"
    text = 'profile = "quiet"\nport = 9000\n'
    file.write_text(text + "#\n" * ((65536 - len(text)) // 2))
    assert find_declaration(Root(tmp_path), "chat")
    file.write_text(text + "#\n" * 32768 + "[settings]\nnonsense = 1\n")
    with pytest.raises(DeclarationError, match="larger than 64 KiB"):
        find_declaration(Root(tmp_path), "chat")
    file.write_bytes(text.encode() + b"# \xff\n")
    with pytest.raises(DeclarationError, match="not UTF-8"):
        find_declaration(Root(tmp_path), "chat")
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(DeclarationError, match="is a symbolic link; a declaration is a plain file"):
        find_declaration(Root(tmp_path), "chat")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
@pytest.mark.parametrize(
    ("what", "mode", "owner", "says"),
    [
        ("servers.d/chat.toml", 0o644, 0, None),
        ("servers.d/chat.toml", 0o646, 0, "this file"),
        ("servers.d/chat.toml", 0o644, 1000, "this file"),
        ("servers.d", 0o1777, 0, "this directory"),
        ("servers.d", 0o755, 1000, "this directory"),
        (".", 0o775, 0, "the way to it, .*/etc/infertune$"),
        ("..", 0o755, 1000, "the way to it, .*/etc$"),
        ("..", 0o1777, 0, None),
    ],
)
def test_who_may_change_a_declaration(
    what: str, mode: int, owner: int, says: str | None, tmp_path: Path
) -> None:
    etc = tmp_path / "etc/infertune"
    (etc / "servers.d").mkdir(parents=True)
    (etc / "servers.d/chat.toml").write_text('profile = "quiet"\nport = 9000\n')
    (etc / what).chmod(mode)
    os.chown(etc / what, owner, 0)
    root = Root(tmp_path)
    assert find_declaration(root, "chat"), "a recorded machine has no owners"
    root.live = True
    if says is None:
        assert find_declaration(root, "chat")
    else:
        with pytest.raises(DeclarationError, match=f"others than root may change {says}"):
            find_declaration(root, "chat")


def test_cpus_for_the_server_alone() -> None:
    wanted = desired("low-latency")
    setting = wanted.launch["nice"]
    alone = replace(
        wanted,
        launch={
            **wanted.launch,
            "cpus_partition": replace(setting, id="cpus_partition", canonical="isolated"),
            "scheduling_policy": replace(setting, id="scheduling_policy", canonical="rr"),
        },
    )
    text = drop_in(CHAT, alone, python="/py")
    assert text.endswith("ExecStartPre=+/py -I -m infertune.service.partition isolated\n")
    assert {"CPUSchedulingPolicy=rr", "CPUSchedulingPriority=1"} <= set(text.splitlines())
    # Only whoever wants to be alone narrows the slice, in which others live too.
    assert "AllowedCPUs=1-7\n" in slice_drop_in(needs([wanted, alone]))
    assert "AllowedCPUs" not in slice_drop_in(needs([wanted]))


def test_a_partition_that_the_kernel_refuses_is_taken_back(tmp_path: Path) -> None:
    class Kernel(Root):
        def write_value(self, path: str, text: str) -> None:
            said = "isolated invalid (Cpu list in cpuset.cpus not exclusive)"
            super().write_value(path, said if text == "isolated" else text)

    root = Kernel(tmp_path)
    file = tmp_path / "group/infertune.slice/cpuset.cpus.partition"
    file.parent.mkdir(parents=True)
    file.write_text("member\n")
    assert make_partition(root, "/group", "root") is None
    assert file.read_text().strip() == "root"
    why = make_partition(root, "/group", "isolated")
    assert why is not None
    assert "not exclusive" in why
    assert file.read_text().strip() == "member"
    file.unlink()
    file.parent.rmdir()
    assert "No such file" in str(make_partition(root, "/group", "root"))


def test_every_launch_setting_reaches_a_unit() -> None:
    reached = {setting.id for setting in LAUNCH_SETTINGS.values() if setting.directive}
    # Without a directive of systemd: ExecStartPre of its own (servers/unit.py), and a variable of
    # the environment (launch/heap.py).
    assert reached | {"cpus_partition", "malloc_hugetlb"} == set(LAUNCH_SETTINGS)


@pytest.mark.parametrize("unit", ["infertune-server@.service", "infertune-exporter.service"])
def test_units_of_one_user_cannot_ask_for_each_other_s_memory(unit: str) -> None:
    text = (Path(__file__).parents[2] / "systemd" / unit).read_text()
    filters = [line.partition("=")[2] for line in text.splitlines() if "SystemCallFilter=" in line]
    assert filters[0].startswith("@system-service")
    taken = {call for each in filters if each[0] == "~" for call in each[1:].split()}
    given = {call for each in filters[1:] if each[0] != "~" for call in each.split()}
    calls = {"process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"}
    assert calls <= taken - given


@pytest.mark.parametrize(
    ("text", "memory_min", "cpus"),
    [
        ("MemoryMin=4G\nAllowedCPUs=0-1,4", 4 * 2**30, {0, 1, 4}),
        ("MemoryMin=4096\nAllowedCPUs=all of them", 4096, set()),
        ("MemoryMin=infinity", 0, set()),
        (f"MemoryMin={'9' * 5000}", 0, set()),
        ("MemoryMin", 0, set()),
    ],
)
def test_a_drop_in_that_was_edited_by_hand(text: str, memory_min: int, cpus: set[int]) -> None:
    found = promised(f"{text}\nExecStartPre=+/py -I -m infertune.service.partition root\n")
    assert (found.memory_min, found.cpus) == (memory_min, cpus)


def test_the_equivalent_command_can_be_pasted() -> None:
    line = systemd_run_line(
        CHAT,
        desired("low-latency"),
        ["/bin/$x", "a b", "${HOME}"],
        {"A": "b c"},
        template(),
        ["render"],
    )
    words = shlex.split(line)
    assert words[0] == "systemd-run"
    assert "--property=AllowedCPUs=1-7" in words
    assert "--property=DynamicUser=yes" in words
    assert "--property=CapabilityBoundingSet=" in words
    assert "--property=StateDirectory=infertune/servers/chat" in words
    assert "--property=SupplementaryGroups=render" in words
    assert not [word for word in words if "%" in word or "ExecStart" in word]
    assert "--setenv=A=b c" in words
    assert words[-4:] == ["--", "/bin/$x", "a b", "$${HOME}"]


def test_without_a_profile_it_has_the_daemon_s(tmp_path: Path) -> None:
    etc = tmp_path / DECLARED.lstrip("/")
    etc.mkdir(parents=True)
    (etc / "chat.toml").write_text("port = 9000\n")
    with pytest.raises(DeclarationError, match="'profile' is missing"):
        find_declaration(Root(tmp_path), "chat")
    (tmp_path / "etc/infertune/infertuned.toml").write_text('profile = "quiet"\n')
    found = find_declaration(Root(tmp_path), "chat")
    assert found is not None
    assert found.profile == "quiet"


def test_a_configuration_that_cannot_be_read_is_not_a_missing_one(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert read_config(root) == Config()
    file = tmp_path / "etc/infertune/infertuned.toml"
    file.parent.mkdir(parents=True)
    assert read_config(root) == Config()
    (tmp_path / "elsewhere.toml").write_text('profile = "quiet"\n')
    file.symlink_to("../../elsewhere.toml")
    assert read_config(root) == Config("quiet")
    (tmp_path / "elsewhere.toml").unlink()
    with pytest.raises(DeclarationError, match="cannot be read: No such file"):
        read_config(root)
    file.unlink()
    file.mkdir()
    with pytest.raises(DeclarationError, match="cannot be read: Is a directory"):
        read_config(root)
    file.rmdir()
    file.write_text(f"# {'x' * 70_000}\nprofile = 'quiet'\n")
    with pytest.raises(DeclarationError, match="cannot be read: Larger than 64 KiB"):
        read_config(root)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DeclarationError, match="cannot be read: not a regular file"):
        read_config(root)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_configuration_that_the_disk_or_a_right_denies(number: int, tmp_path: Path) -> None:
    class Denied(Root):
        def read_small(self, path: str, limit: int) -> str:
            raise OSError(number, os.strerror(number), path)

        def get(self, path: str) -> str | None:
            return None

    with pytest.raises(DeclarationError, match=os.strerror(number)):
        read_config(Denied(tmp_path))


def test_etc_counts_before_run(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write_declaration(root, CHAT)
    assert find_declaration(root, "chat") == CHAT
    etc = tmp_path / DECLARED.lstrip("/")
    etc.mkdir(parents=True)
    (etc / "chat.toml").write_text('profile = "quiet"\nport = 9000\n')
    (etc / "Not A Name.toml").write_text("")
    found = find_declaration(root, "chat")
    assert found is not None
    assert found.profile == "quiet"
    assert declared_names(root, DECLARED) == ["chat"]
    remove_declaration(root, "chat")
    assert (etc / "chat.toml").exists()
    assert find_declaration(root, "../chat") is None


def test_setup_writes_exactly_its_files_and_takes_them_away(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert {each.outcome for each in check(root)} == {"missing"}
    assert {each.outcome for each in install(root)} == {"written"}
    assert {each.outcome for each in check(root)} == {"same"}
    root.replace(FILES[0][1], b"of an older version")
    assert [each.outcome for each in check(root)][:2] == ["differs", "same"]
    assert {each.outcome for each in install(root)} == {"written", "same"}
    assert {each.outcome for each in install(root)} == {"same"}
    files = {f"/{p.relative_to(tmp_path)}" for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {target for _, target in FILES}
    for path in files:
        assert "@PYTHON@" not in (tmp_path / path.lstrip("/")).read_text()
    assert {each.outcome for each in remove(root)} == {"removed"}
    assert {each.outcome for each in remove(root)} == {"absent"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_setup_makes_no_directory_that_others_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        install(Root(tmp_path))
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert made
    assert {path.stat().st_mode & 0o7777 for path in made} == {0o755}


@pytest.mark.skipif(os.geteuid() != 0, reason="setup needs root")
def test_setup_leaves_alone_what_a_package_owns(tmp_path: Path) -> None:
    """A second unit in /etc would win over the package's, whatever the next update brings."""
    root = Root(tmp_path)
    root.live = True
    unit = tmp_path / "usr/lib/systemd/system/infertune.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    for verb in (install, remove):
        with pytest.raises(UsageError, match="a package of the distribution has installed"):
            verb(root)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [unit]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
@pytest.mark.parametrize(
    ("what", "mode", "owner", "refused"),
    [
        ("bin/python3", 0o755, 0, False),
        ("bin/python3", 0o757, 0, True),
        ("bin/python3", 0o775, 0, True),
        ("bin/python3", 0o755, 1000, True),
        ("bin", 0o777, 0, True),
        (".", 0o755, 1000, True),
        (".", 0o1777, 0, False),
        ("infertune/service/setup.py", 0o646, 0, True),
        ("infertune", 0o775, 0, True),
    ],
)
def test_setup_refuses_a_program_that_others_may_change(
    what: str, mode: int, owner: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service would run it as root."""
    program = tmp_path / "program"
    for file in ("bin/python3", "infertune/service/setup.py"):
        (program / file).parent.mkdir(parents=True)
        (program / file).touch(0o755)
    shutil.copytree(Path(__file__).parents[2] / "systemd", program / "infertune/systemd")
    monkeypatch.setattr(sys, "executable", str(program / "bin/python3"))
    monkeypatch.setattr(setup, "__file__", str(program / "infertune/service/setup.py"))
    (program / what).chmod(mode)
    os.chown(program / what, owner, 0)
    root = Root(tmp_path / "machine")
    root.base.mkdir()
    root.live = True
    if refused:
        with pytest.raises(UsageError, match="can be changed by others than root"):
            install(root)
        assert not list(root.base.iterdir())
    else:
        assert {each.outcome for each in install(root)} == {"written"}


@pytest.mark.parametrize("directory", ["my tools", "100%i", "a;b #c", "é  %"])
def test_a_python_in_an_odd_place(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What systemd itself makes of the units."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    python = tmp_path / directory / "python3"
    python.parent.mkdir()
    python.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, "executable", str(python))
    (tmp_path / "machine").mkdir()
    install(Root(tmp_path / "machine"))
    units = tmp_path / "machine/etc/systemd/system"
    kept = units / "infertune-server@.service.d/50-infertune.conf"
    kept.parent.mkdir()
    line = f"ExecStartPre=+{program(str(python))} -I -m infertune.service.partition root\n"
    kept.write_text(f"[Service]\n{line}")
    files = [str(units / name) for name in ("infertune.service", "infertune-server@chat.service")]
    (units / "infertune-server@chat.service").symlink_to("infertune-server@.service")
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *files]
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    ours = [line for line in done.stderr.splitlines() if "infertune" in line or directory in line]
    assert ours == []
    # It does complain where the program is not there.
    python.unlink()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert str(python) in done.stderr


@pytest.mark.parametrize("path", ['/opt/a"b/python', "/opt/a\\b/python", "/opt/$HOME/p", "/a\nb"])
def test_a_python_that_no_unit_takes(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", path)
    with pytest.raises(UsageError, match="install to a plainer path"):
        install(Root(tmp_path))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
