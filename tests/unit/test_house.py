# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: linters, types, import arrows, the one door, documents, words."""

from __future__ import annotations

import ast
import codecs
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError
from pathlib import Path

import pytest

from infertune.base.errors import Exit
from infertune.cli.main import commands
from kernel_paths import kernel_files, reads

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "daemon" / "infertune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
IGNORED = {".git", ".venv", ".hypothesis", "__pycache__", "build", "dist"}


def files() -> Iterator[Path]:
    """Every file of the repository, as it lies here: also one that is not committed yet."""
    for directory, names, found in os.walk(REPOSITORY):
        names[:] = [name for name in names if name not in IGNORED and not name.endswith("_cache")]
        # .git is a file in a worktree.
        found = [name for name in found if name != ".git" and not name.startswith(".coverage")]
        yield from (Path(directory, name) for name in found)


def run(*command: str | Path) -> str:
    """Run a tool of this environment in the repository; fail with what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(str(command[0]), path=path)
    if tool is None:
        # On the machine that decides, a missing tool must not pass for a clean tree.
        if os.environ.get("CI"):
            pytest.fail(f"{command[0]} is not installed")
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [tool, *command[1:]],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "PYTHONPATH": "daemon", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- linters ------------------------------------------------------------------


def test_ruff_check() -> None:
    run("ruff", "check", "--no-cache", "--quiet", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--no-cache", "--check", "--quiet", ".")


def test_types(tmp_path: Path) -> None:
    run("mypy", "--cache-dir", tmp_path, "--no-error-summary")


def test_import_arrows() -> None:
    run("lint-imports", "--no-cache")


def test_spelling() -> None:
    run("codespell")


def test_shell() -> None:
    scripts = [path for path in files() if is_shell(path)]
    assert REPOSITORY / "scripts" / "test" in scripts
    run("shellcheck", "-x", *scripts)


def is_shell(path: Path) -> bool:
    if path.parent.name == "completions":
        return False  # generated
    with path.open("rb") as file:
        return path.suffix == ".sh" or file.readline().rstrip() == b"#!/usr/bin/env bash"


# -- rooms and floors ------------------------------------------------------------

ROOMS = runpy.run_path(str(REPOSITORY / "scripts" / "rooms"))


def test_floors_are_what_the_contract_and_the_document_say() -> None:
    """A room that imports less may stand lower; one that is new, or higher, wants a decision."""
    below = ROOMS["arrows"](PACKAGE)
    stack = ROOMS["floors"](below)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contract = project["tool"]["importlinter"]["contracts"][0]
    assert [layer.split(" | ") for layer in contract["layers"]] == stack[::-1]
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert [re.findall(r"`(\w+)`", rooms) for _, rooms in rows] == stack[::-1]
    assert [int(number) for number, _ in rows] == list(range(len(stack)))[::-1]
    arrows = sum(map(len, below.values()))
    assert f"{len(below)} rooms on {len(stack)} floors, with {arrows} arrows between them" in text


def test_an_arrow_up_and_a_circle_would_be_seen(tmp_path: Path) -> None:
    for room, source in {
        "low": "",
        "high": "from house import low",
        "top": "import house.high.a",
    }.items():
        (tmp_path / "house" / room).mkdir(parents=True)
        (tmp_path / "house" / room / "a.py").write_text(source)
    below = ROOMS["arrows"](tmp_path / "house")
    assert ROOMS["floors"](below) == [["low"], ["high"], ["top"]]
    with pytest.raises(CycleError, match="cycle"):
        ROOMS["floors"]({**below, "low": {"top"}})


# -- the one door -------------------------------------------------------------

WRITERS_OF_OS = re.compile(
    "f?chmod|[fl]?chown|copy_file_range|f?truncate|link|makedirs|mkdir|mkfifo|mknod|pwritev?"
    "|remove(dirs|xattr)?|renames?|replace|rmdir|sendfile|setxattr|symlink|unlink|utime|writev?"
)
WRITERS_OF_PATHS = re.compile(
    "l?chmod|hardlink_to|mkdir|rename|rmdir|symlink_to|touch|unlink|write_(bytes|text)"
)
STARTERS_OF_OS = re.compile("exec[lv]p?e?|fork(pty)?|posix_spawnp?|spawn[lv]p?e?|system|popen")
HARMLESS = {"shutil.which", "tempfile.TemporaryDirectory"}
MODULES_THAT_WRITE = {"sqlite3", "dbm", "shelve", "pickle"}
# ctypes could call anything; launch/ needs it for prctl(2) and mincore(2), the daemon's timer for
# timerfd_create(2), its inotify(7), libudev, its client sd-bus(3), the exporter for capset(2) and
# perf_event_open(2).  The daemon replaces itself (execv) when a new version takes over, and setup
# tells systemd what it wrote.  bpf/ calls libbpf.  The bandwidth of memory is measured with
# memchr(3).
STARTS = {
    "bpf",
    "boot/commands.py",
    "budget/bandwidth.py",
    "launch",
    "service/client.py",
    "service/inotify.py",
    "service/timer.py",
    "service/udev.py",
    "service/daemon.py",
    "service/setup.py",
    "launcher.py",
    "exporter/capabilities.py",
    "exporter/energy.py",
}
SEES_ENVIRONMENT = {
    "launch",
    "cli",
    "service/daemon.py",
    "service/of_user.py",
    "launcher.py",
    "admit.py",
    "exporter/main.py",
}
MODULES_THAT_START = {"subprocess", "multiprocessing", "pty", "ctypes", "mmap"}
READ_FLAGS = {"RDONLY", "CLOEXEC", "DIRECTORY", "NOFOLLOW", "NONBLOCK", "NOCTTY", "PATH"}

Offence = tuple[int, str]


def offences(
    source: str, *, may_start: bool = False, may_see_environment: bool = False
) -> list[Offence]:
    """What a module does that only base/root.py (writing) or launch/ (starting) may do."""
    found: list[Offence] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, w) for a in node.names for w in _import(a.name, may_start)]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, what) for what in _import(node.module or "", may_start)]
            if node.module in ("os", "shutil", "tempfile"):
                # `from os import rename` would hide the name this test looks for.
                found.append((node.lineno, f"imports names out of {node.module}"))
        elif isinstance(node, ast.Attribute) and not may_see_environment:
            if ast.unparse(node) in ("os.environ", "os.environb", "os.getenv", "os.putenv"):
                found.append((node.lineno, "looks at the environment"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in _call(node, may_start)]
    return sorted(found)


def _import(module: str, may_start: bool) -> Iterator[str]:
    name = module.partition(".")[0]
    if name in MODULES_THAT_WRITE or (name in MODULES_THAT_START and not may_start):
        yield f"imports {name}"


def _call(node: ast.Call, may_start: bool) -> Iterator[str]:
    called = ast.unparse(node.func)
    owner, _, name = called.rpartition(".")
    if owner == "os":
        if name == "open" and not _only_reads(node):
            yield called
        elif name == "write" and may_start:
            pass  # where nothing is opened for writing it can only be a pipe
        elif WRITERS_OF_OS.fullmatch(name) or (STARTERS_OF_OS.fullmatch(name) and not may_start):
            yield called
    elif owner in ("shutil", "tempfile") and called not in HARMLESS:
        yield called
    elif name == "open":
        mode = _mode(node, 1 if owner in ("", "io") else 0)
        if mode is None or set(mode) & set("wax+"):
            yield f"{called} for writing"
    elif WRITERS_OF_PATHS.fullmatch(name) and not owner.endswith("root"):
        yield called  # the methods of Root have the same names: that is the door


def _only_reads(node: ast.Call) -> bool:
    """Whether an os.open() can write nothing."""
    if ast.unparse(node.args[0]) == "os.devnull":
        return True
    flags = ast.unparse(node.args[1]).split(" | ") if len(node.args) > 1 else [""]
    return all(flag.removeprefix("os.O_") in READ_FLAGS for flag in flags)


def _mode(node: ast.Call, position: int) -> str | None:
    """The mode of an open(); None where it is not written out."""
    if any(keyword.arg == "timeout" for keyword in node.keywords):
        return "r"  # a URL opener: no open() of a file takes one
    given = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
    given += node.args[position : position + 1]
    if not given:
        return "r"
    value = given[0]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_root_writes_and_only_launch_starts(path: Path) -> None:
    where = path.relative_to(PACKAGE)
    if where == Path("base/root.py"):
        return
    found = offences(
        path.read_text(),
        may_start=bool({where.parts[0], str(where)} & STARTS),
        may_see_environment=bool({where.parts[0], str(where)} & SEES_ENVIRONMENT),
    )
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "open('/x', 'w')",
        "open('/x', mode='r+b')",
        "open('/x', mode)",
        "io.open('/x', 'a')",
        "path.open('w')",
        "Path('/x').write_text('y')",
        "os.open('/x', flags)",
        "os.open('/x', os.O_RDWR | os.O_CLOEXEC)",
        "os.write(1, b'x')",
        "tempfile.mkstemp()",
        "os.rename('/x', '/y')",
        "os.replace('/x', '/y')",
        "target.unlink()",
        "from os import rename",
        "from shutil import copy",
        "shutil.copy(a, b)",
        "import subprocess",
        "from multiprocessing import Process",
        "os.execv('/x', [])",
        "os.system('x')",
        "fail = os.environ['INFERTUNE_FAIL']",
        "os.getenv('INFERTUNE_FAIL')",
    ],
)
def test_the_door_would_be_seen_open(line: str) -> None:
    assert offences(line)


@pytest.mark.parametrize(
    "line",
    [
        "open('/x')",
        "path.open('rb')",
        "self._root.unlink('/x')",
        "root.mkdir('/x')",
        "shutil.which('x')",
        "text.replace('a', 'b')",
        "os.open(os.devnull, os.O_WRONLY)",
        "os.open('/x', os.O_RDONLY | os.O_CLOEXEC)",
        "opener.open(request, timeout=5)",
        "tempfile.TemporaryDirectory()",
        "os.path.dirname('/x')",
    ],
)
def test_reading_is_no_offence(line: str) -> None:
    assert not offences(line)


# -- the one room that reads ---------------------------------------------------------

READ_ELSEWHERE = {("launch/place.py", "/proc/*/oom_score_adj"): "what was written is read back"}
"""Kernel files that are read outside of host/, and why.

Paths that are data do not show: of knobs (their catalogue has them), of boot options, of events
(service/watch.py), of the file of a group that has just been written (launch/place.py).
base/root.py asks /proc/locks who holds a lock: it is below host/.
"""
HOST = PACKAGE / "host"


def test_kernel_files_are_read_in_host_only() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), text)
        for path in SOURCES
        if HOST not in path.parents
        for _, text in kernel_files(path.read_text())
    }
    assert found == set(READ_ELSEWHERE)


def test_no_kernel_file_is_read_in_two_modules() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for path in HOST.glob("*.py"):
        for _, text in kernel_files(path.read_text()):
            where[text].add(path.name)
    assert {"/proc/meminfo", "/sys/class/dmi/id/*", "/proc/*/status"} <= set(where)
    assert not {text: sorted(names) for text, names in where.items() if len(names) > 1}


def test_the_exporter_reads_no_file_of_the_machine_itself() -> None:
    found = {
        (path.name, text)
        for path in (PACKAGE / "exporter").rglob("*.py")
        for text in reads(path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("root.get('/proc/meminfo')", "/proc/meminfo"),
        ("self._root.exists('/sys/class/kfd')", "/sys/class/kfd"),
        ("ctx.root.at(f'/sys/kernel/btf/{name}').read_bytes()", "/sys/kernel/btf/*"),
        ("A = '/proc'\ndef f(root, pid):\n    root.read(f'{A}/{pid}/status')", "/proc/*/status"),
        ("def f(root):\n    path = '/proc/' + g()\n    return root.read(path)", "/proc/*"),
        ("def f(root):\n    for x in ('a', '/sys/b'):\n        root.get_int(x)", "/sys/b"),
        ("[root.get(f'{p}/c') for p in root.glob('/sys/a*')[:3]]", "/sys/a*/c"),
        ("from infertune.host.cpu import CPUS\nroot.names(CPUS)", "/sys/devices/system/cpu"),
        ("class A:\n    def f(self):\n        return self.get('/proc/stat')", "/proc/stat"),
    ],
)
def test_a_read_of_a_kernel_file_would_be_seen(source: str, path: str) -> None:
    assert path in {text for _, text in kernel_files(source)}


@pytest.mark.parametrize(
    "source",
    [
        "archive.files.get('/proc/stat')",
        "root.get('/etc/os-release')",
        "root.write_value('/sys', x)",
    ],
)
def test_other_calls_are_no_reads_of_a_kernel_file(source: str) -> None:
    assert not kernel_files(source)


def test_dataclasses_are_ours() -> None:
    """One module that takes the standard library's would cost every verb what ours saves."""
    theirs = re.compile(r"^\s*(from|import) dataclasses", re.MULTILINE)
    assert not [path for path in SOURCES if theirs.search(path.read_text())]


# -- documents equal declarations --------------------------------------------------


def test_generated_documents_are_current() -> None:
    run("python", "scripts/generate_docs.py", "--check")


def test_exit_codes_are_documented() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    table = {int(n): name for n, name in re.findall(r"^\| (\d) \| `(\w+)`", text, re.MULTILINE)}
    assert table == {code: name for name, code in vars(Exit).items() if name.isupper()}


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    extras = project["optional-dependencies"].values()
    named = {re.split(r"[^\w-]", entry)[0] for extra in extras for entry in extra}
    text = (REPOSITORY / "docs" / "dependencies.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)) == named
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert named <= set(re.findall(r"^([\w-]+)==", lock, re.MULTILINE))


def documents() -> list[Path]:
    return sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_documents_name_only_verbs_that_exist(path: Path) -> None:
    verbs = {command.name for command in commands()}
    code = re.findall(r"```.*?```|`[^`]+`", path.read_text(), re.DOTALL)
    used = set(re.findall(r"^(?:[`$ ]*)(?:\S*bin/)?infertune ([a-z]+)\b", "\n".join(code), re.M))
    assert used <= verbs


# -- what lies in the repository -----------------------------------------------------

# In rot13, so that this file does not hold them.  Paths of one machine and hosts of package
# registries (an installation may use a mirror) do not belong into a repository; neither do
# remarks on the tools somebody wrote it with.
WORDS = codecs.decode(
    "/jbex/|/gzc/i/|/gzc/p/|clcv.bet|clgubaubfgrq|qro.qrovna.bet|ertvfgel.aczwf"
    "|pynhqr|naguebcvp|pungtcg|tvguho.pbcvybg|pb-nhgurerq-ol",
    "rot13",
)


def test_words_that_stay_out() -> None:
    pattern = re.compile(WORDS.replace(".", r"\."), re.IGNORECASE)
    found = [
        f"{path.relative_to(REPOSITORY)}: {match[0]}"
        for path in files()
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert not found


def test_every_source_states_its_licence() -> None:
    suffixes = {".py", ".sh", ".c", ".h", ".toml", ".yml", ".yaml"}
    for path in files():
        where = path.relative_to(REPOSITORY)
        if {"completions", "fixtures", "bad-profiles"} & set(where.parts):
            continue
        with path.open("rb") as file:
            head = file.read(400).decode(errors="replace")
        if head and (path.suffix in suffixes or head.startswith("#!")):
            licence = re.search(r"SPDX-License-Identifier: (\S+)", head)
            assert licence, f"{where} has no SPDX line"
            assert (REPOSITORY / "LICENSES" / f"{licence[1]}.txt").exists(), where


def test_wheel_is_complete(tmp_path: Path) -> None:
    # Built as pip does it, but without a network: hatchling is in the lock.
    run("hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith("/METADATA")]
        requires = re.findall(r"^Requires-Dist: (.*)", archive.read(metadata).decode(), re.M)
    shipped = (REPOSITORY / "profiles").glob("*.toml")
    profiles = {f"infertune/profiles/shipped/{path.name}" for path in shipped}
    assert profiles
    modules = {f"infertune/{path.relative_to(PACKAGE)}" for path in SOURCES}
    probes = {f"infertune/probes/{p.name}" for p in (REPOSITORY / "probes").glob("*.toml")}
    assert probes
    assert profiles | modules | probes <= names
    if shutil.which("clang") or os.environ.get("CI"):
        assert {name.replace(".toml", ".bpf.o") for name in probes} <= names
    assert all("extra ==" in requirement for requirement in requires)
