# SPDX-License-Identifier: Apache-2.0
"""Exit codes and output of the command line when nobody listens, or the input means harm."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infertune.base.root import write_user_file
from infertune.cli.base import printable
from infertune.cli.engine import _since
from infertune.cli.main import _plain, commands, main
from infertune.cli.parser import build_parser
from infertune.cli.verbs import GROUPS, MODULES, VERBS
from support import GENEROUS_S, build, values

REPOSITORY = Path(__file__).parents[2]


def infertune(*words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY / "daemon")}
    environment |= options.pop("more", {})  # type: ignore[arg-type]
    command = [sys.executable, "-B", "-m", "infertune", *words]
    return subprocess.run(command, env=environment, check=False, timeout=GENEROUS_S, **options)  # type: ignore[call-overload, no-any-return]


def profile(base: Path, text: str, name: str = "mine") -> None:
    directory = base / "etc/infertune/profiles"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.toml").write_text(f'description = "x"\n{text}')


def test_every_verb_is_found_in_its_module() -> None:
    for verb in VERBS.values():
        told = {(each.name, each.help, each.acts) for each in commands(verb.name)}
        listed = [each for each in VERBS.values() if each.module == verb.module]
        assert told == {(each.name, each.help, each.acts) for each in listed}
        assert verb.group in GROUPS
    declare = {
        path.stem
        for path in (REPOSITORY / "daemon/infertune/cli").glob("*.py")
        if re.search(r"^COMMANDS\b", path.read_text(), re.M)
    }
    assert set(MODULES) == declare


def test_what_argparse_is_not_asked_it_would_say_too() -> None:
    parser = build_parser(commands())
    plain = []
    for command in commands():
        wanted = [each for each in command.arguments if not each.names[0].startswith("-")]
        words = [command.name, *(f"word-{number}" for number in range(len(wanted)))]
        found = _plain(commands(command.name), words)
        if found is not None:
            assert vars(found) == vars(parser.parse_args(words))
            plain.append(command.name)
        for more in (["--json"], ["--", "x"], ["x"]):
            assert _plain(commands(command.name), [*words, *more]) is None
    assert {"apply", "status", "revert", "plan", "doctor"} <= set(plain)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["nonsense"], ["-h", "apply"]])
def test_what_needs_no_verb_imports_none(words: list[str]) -> None:
    done = infertune(*words, capture_output=True, more={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == (2 if words == ["nonsense"] else 0)
    helped = {"-h", "--help"} & set(words)
    assert all((f"\n  {verb} ".encode() in done.stdout) == bool(helped) for verb in VERBS)
    for module in MODULES:
        assert f"infertune.cli.{module}\n".encode() not in done.stderr
    assert b" argparse\n" not in done.stderr


@pytest.mark.parametrize("words", [["status"], ["--root", "doctor", "status"]])
def test_a_verb_costs_only_its_own_modules(words: list[str], tmp_path: Path) -> None:
    build(tmp_path / "doctor")
    done = infertune(
        *words, capture_output=True, cwd=tmp_path, more={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert b"infertune.engine" in done.stderr
    assert b"infertune.doctor" not in done.stderr


@pytest.mark.parametrize("output", ["closed pipe", "/dev/full", "closed"])
def test_what_is_done_does_not_depend_on_who_listens(output: str, tmp_path: Path) -> None:
    """What a verb does, and its exit code, do not depend on stdout; but where output is all that a
    verb does and it is lost, the verb has failed."""
    build(tmp_path)
    profile(tmp_path, "[now]\nvm.swappiness = 7\n")
    tree = str(tmp_path)

    def run(*words: str) -> int:
        if output == "closed":
            return infertune("--root", tree, *words, preexec_fn=lambda: os.close(1)).returncode
        if output == "/dev/full":
            with open("/dev/full", "wb") as full:
                done = infertune("--root", tree, *words, stdout=full, stderr=subprocess.PIPE)
            assert b"could not be written: ENOSPC" in done.stderr
            return done.returncode
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            return infertune("--root", tree, *words, stdout=pipe).returncode

    lost = output == "/dev/full"
    assert run("verify", "mine") == (3 if lost else 1)
    assert run("apply", "mine") == 0
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "7\n"
    assert run("verify", "mine") == (3 if lost else 0)
    profile(tmp_path, "[now]\nksm.run = { value = 0, required = true }\n")
    assert run("apply", "mine") == 3
    assert run("revert") == 0
    assert values(tmp_path)["/proc/sys/vm/swappiness"] == "60\n"


def test_what_is_for_a_closed_standard_error_is_not_said_elsewhere(tmp_path: Path) -> None:
    """A command's output, or a document, may be all that is there."""
    build(tmp_path)
    words = ("--root", str(tmp_path), "apply", "nobody-s")
    done = infertune(*words, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_ascii_terminal(tmp_path: Path) -> None:
    build(tmp_path)
    done = infertune(
        "--root", str(tmp_path), "knobs", "cpu_dma_latency",
        more={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == 0
    assert b"2000000000 \\xb5s" in done.stdout


def test_control_characters_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path)
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc/os-release").write_text('NAME="\x1b[2J"\nPRETTY_NAME="\x1b]0;x\x07"\n')
    profile(tmp_path, '[now]\nvm.min_free_kbytes = "\x1b[31m"\n'.replace("\x1b", "\\u001b"))
    assert main(["--root", str(tmp_path), "machine"]) == 0
    assert main(["--root", str(tmp_path), "profile", "check", "mine"]) == 2
    assert main(["--root", str(tmp_path), "knobs", "\x1b[31mx"]) == 2
    assert main(["--root", str(tmp_path), "apply", "mine", "--without", "\x1b[31mx"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\\x1b" in out + err


def test_printable() -> None:
    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\nc\\u202e"
    assert printable("a\nb", lines=False) == "a\\nb"
    assert printable("µ → 96 GiB") == "µ → 96 GiB"


def test_a_tree_that_leads_out_of_itself_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = tmp_path / "tree", tmp_path / "outside"
    build(inside)
    build(outside)
    profile(inside, "[now]\nvm.swappiness = 7\n")
    (inside / "proc/sys/vm").rename(inside / "proc/sys/vm.aside")
    (inside / "proc/sys/vm").symlink_to(outside / "proc/sys/vm")
    before = values(outside)
    assert main(["--root", str(inside), "apply", "mine"]) == 3
    assert "outside the recorded tree" in capsys.readouterr().err
    assert values(outside) == before


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_what_readers_need_can_be_read_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    build(tmp_path)
    profile(tmp_path, '[now]\nplatform_profile = "performance"\n')
    before = os.umask(umask)
    try:
        assert main(["--root", str(tmp_path), "apply", "mine"]) == 0
    finally:
        os.umask(before)
    for directory in ("run/infertune", "var/lib/infertune"):
        assert (tmp_path / directory).stat().st_mode & 0o777 == 0o755
        assert (tmp_path / directory / "journal").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["lock", "journal", ".journal.infertune"])
def test_a_fifo_in_our_place_does_not_hang(name: str, tmp_path: Path) -> None:
    build(tmp_path)
    profile(tmp_path, "[now]\nvm.swappiness = 7\n")
    (tmp_path / "run/infertune").mkdir()
    os.mkfifo(tmp_path / "run/infertune" / name)
    for words in (["status"], ["apply", "mine"], ["revert"]):
        assert infertune("--root", str(tmp_path), *words, capture_output=True).returncode in (
            0,
            1,
            3,
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["docktor"], "there is no verb 'docktor'; did you mean 'doctor'?"),
        (["xyzzy"], "there is no verb 'xyzzy'; 'infertune --help' lists them"),
        (["boot", "staeg", "quiet"], "boot: there is no 'staeg'; did you mean 'stage'?"),
        (["profile", "xyzzy"], "profile: there is no 'xyzzy'; there are show, check, explain"),
        (["profile"], "profile: one of show, check, explain is missing"),
        (["apply"], "apply: PROFILE is missing"),
        (["apply", "a", "b"], "apply: 'b' is one word too many"),
        (["setup", "--chekc"], "setup: there is no option '--chekc'; did you mean '--check'?"),
        (["knobs", "--jsn=1"], "knobs: there is no option '--jsn'; did you mean '--json'?"),
        (["run", "quiet", "--port", "abc"], "run: --port: 'abc' is not a port; write 1 to 65535"),
        (["run", "quiet", "--port"], "run: --port: expected one argument"),
        (["knobs", "ksm.rum"], "there is no knob 'ksm.rum'; did you mean 'ksm.run'?"),
        (["knobs", "xyzzy"], "there is no knob 'xyzzy'; 'infertune knobs' lists them all"),
        (["status", "--", "x"], "status: this verb takes no '--', or nothing follows it"),
        (["--bogus"], "overview: there is no option '--bogus'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"infertune: {said}\n")


@pytest.mark.parametrize(
    ("minutes", "said"),
    [(0, "just now"), (5, "5 min ago"), (120, "2 h ago"), (60 * 24 * 3, "3 days ago")],
)
def test_since_when_is_told_as_a_clock_on_the_wall_has_it(minutes: int, said: str) -> None:
    then = datetime.now(UTC) - timedelta(minutes=minutes, seconds=5)
    told = _since(then.isoformat())
    assert told == f"since {then.astimezone():%Y-%m-%d %H:%M} ({said})"
    assert _since("yesterday") == "since yesterday"


def test_what_cannot_be_written_whole_is_not_left(tmp_path: Path) -> None:
    """A file that is half there would refuse the next try; one that was there is the caller's."""
    file, old = tmp_path / "new", tmp_path / "old"
    old.write_text("x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))  # as a disk that is full
    try:
        for path, force in ((file, False), (old, True)):
            with pytest.raises(OSError, match="File too large"):
                write_user_file(str(path), b"data", force=force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not file.exists()
    assert old.exists()
