# SPDX-License-Identifier: Apache-2.0
"""The Debian package and the wheelhouse, built here: what is in them, and that they stand alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infertune import __version__
from infertune.service.setup import PACKAGED

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "scripts" / "package"

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed"),
]


def build(what: str, output: Path, *words: str) -> Path:
    command = [sys.executable, "-B", PACKAGE, what, "--output", output, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "pip" in done.stderr and "onnection" in done.stderr:
        pytest.skip("no network to fetch the locked wheels from")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deb", "--python", "2.7"], "'2.7' is none of 3.11"),
        (["deb", "--python", "3.x"], "'3.x' is none of 3.11"),
        (["deb", "--version", "../1"], "'../1' does not begin with a digit"),
        (["wheelhouse", "--extras", "daemon,gpu"], "no extra is 'gpu'; there are daemon, "),
    ],
)
def test_wrong_usage_is_said_before_anything_is_made(
    tmp_path: Path, words: list[str], said: str
) -> None:
    command = [sys.executable, "-B", PACKAGE, *words, "--output", tmp_path / "dist"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "dist").exists()


def test_a_wheelhouse_that_cannot_be_made_leaves_the_last_one(tmp_path: Path) -> None:
    last = tmp_path / "wheelhouse"
    last.mkdir()
    (last / "here").touch()
    command = [sys.executable, "-B", PACKAGE, "wheelhouse", "--output", tmp_path]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["wheelhouse"]
    assert (last / "here").exists()


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("deb", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def tree(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tree")
    subprocess.run(["dpkg-deb", "--raw-extract", deb, directory], check=True)
    return directory


def test_it_says_what_it_is(deb: Path) -> None:
    words = ["dpkg-deb", "--field", deb, "Package", "Version", "Architecture", "Depends"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"Package: infertune\nVersion: {__version__}\nArchitecture: amd64\n" in said
    assert "python3 (>= 3.13), python3 (<< 3.14~)" in said


def test_units_and_policies_are_those_of_setup(tree: Path) -> None:
    for path in PACKAGED.values():
        text = (tree / path.lstrip("/")).read_text()
        assert "@PYTHON@" not in text
        if "ExecStart=" in text:
            assert "ExecStart=/usr/lib/infertune/bin/python3 -I -m infertune." in text
    assert not (tree / "etc/systemd").exists()


def test_profiles_are_configuration(tree: Path) -> None:
    listed = (tree / "DEBIAN" / "conffiles").read_text().split()
    shipped = {
        f"/etc/infertune/profiles/{each.name}" for each in (REPOSITORY / "profiles").iterdir()
    }
    assert set(listed) == shipped


def test_the_probes_are_compiled(tree: Path) -> None:
    probes = [path for path in tree.rglob("*.bpf.o") if path.is_file()]
    assert len(probes) == len(list((REPOSITORY / "probes").glob("*.bpf.c")))


def test_sums_are_right_and_nothing_is_compiled_for_a_python(tree: Path) -> None:
    lines = (tree / "DEBIAN" / "md5sums").read_text().splitlines()
    assert len(lines) > 100
    for line in lines:
        total, _, path = line.partition("  ")
        assert hashlib.md5((tree / path).read_bytes()).hexdigest() == total
    assert not list(tree.rglob("__pycache__"))


def test_built_twice_it_is_the_same(deb: Path, tmp_path: Path) -> None:
    assert build("deb", tmp_path).read_bytes() == deb.read_bytes()


def test_lintian_finds_nothing_unexplained(deb: Path) -> None:
    if not shutil.which("lintian"):
        pytest.skip("lintian is not installed")
    words = ["lintian", "--fail-on", "error,warning", "--allow-root", deb]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    overrides = (REPOSITORY / "packaging" / "deb" / "lintian-overrides").read_text()
    assert overrides.count("# ") >= 3


def test_wheels_install_without_a_network(tmp_path: Path) -> None:
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    house = build("wheelhouse", tmp_path, "--python", ours)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    [pip] = house.glob("pip-*.whl")
    environment = {"PATH": os.defpath, "PIP_CONFIG_FILE": os.devnull}
    words = ["install", "-q", "--no-index", "--find-links", house, "infertune[daemon,exporter]"]
    done = subprocess.run(
        [venv / "bin/python", "-I", pip / "pip", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("infertune", "infertune-exporter"):
        said = subprocess.run(
            [venv / "bin" / name, "--version"], env=environment, capture_output=True, text=True
        )
        assert (said.returncode, __version__ in said.stdout) == (0, True), said


@pytest.mark.parametrize(("kind", "tool"), [("deb", "dpkg-deb"), ("rpm", "nfpm")])
def test_a_packer_that_is_not_there_is_one_line(tmp_path: Path, kind: str, tool: str) -> None:
    command = [sys.executable, PACKAGE, kind, "--output", tmp_path]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert f"{tool} is not installed" in done.stderr


def test_a_bad_word_is_one_line() -> None:
    done = subprocess.run([sys.executable, PACKAGE, "msi"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
