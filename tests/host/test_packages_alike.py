# SPDX-License-Identifier: Apache-2.0
"""The .rpm and the Arch package hold what the .deb holds, where their systems look for it."""

from __future__ import annotations

import gzip
import hashlib
import io
import runpy
import shutil
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from host.test_package import PACKAGE, REPOSITORY, build
from infertune import __version__
from infertune.service.setup import PACKAGED

TOOLS = ("dpkg-deb", "nfpm", "zstd")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
PYTHON = ["--python", "3.14"]


class Entry(NamedTuple):
    """A file, link or directory of a package."""

    mode: int
    what: str
    """Its SHA-256, or where the link leads."""


Content = dict[str, Entry]
DIRECTORY = "directory"


def without_directories(content: Content) -> Content:
    return {path: each for path, each in content.items() if each.what != DIRECTORY}


def _entry(mode: int, content: bytes) -> Entry:
    if stat.S_ISLNK(mode):
        return Entry(0, content.decode())
    if stat.S_ISDIR(mode):
        return Entry(mode & ~stat.S_IFDIR, DIRECTORY)
    return Entry(stat.S_IMODE(mode), hashlib.sha256(content).hexdigest())


def _of_tar(data: bytes) -> Content:
    found: Content = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for each in tar:
            assert (each.uname, each.gname) == ("root", "root") or each.uid == each.gid == 0
            path = each.name.removeprefix("./").rstrip("/")
            if each.issym():
                found[path] = _entry(stat.S_IFLNK, each.linkname.encode())
            elif each.isdir():
                found[path] = _entry(stat.S_IFDIR | each.mode, b"")
            elif each.isfile():
                file = tar.extractfile(each)
                assert file is not None
                found[path] = _entry(each.mode, file.read())
    return found


def _of_rpm(data: bytes) -> Content:
    """The payload: a cpio archive (newc) behind the lead and two headers."""
    at = 96
    for aligned in (True, False):
        assert data[at : at + 3] == b"\x8e\xad\xe8"
        entries, size = struct.unpack(">II", data[at + 8 : at + 16])
        at += 16 + 16 * entries + size
        at += -at % 8 if aligned else 0
    archive = gzip.decompress(data[at:])
    found: Content = {}
    at = 0
    while True:
        assert archive[at : at + 5] == b"07070"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        if name == "TRAILER!!!":
            return found
        at += 110 + length
        at += -at % 4
        path = name.removeprefix("./").lstrip("/")
        found[path] = _entry(mode, archive[at : at + size])
        at += size + -size % 4


class Three(NamedTuple):
    deb: Content
    rpm: Content
    arch: Content
    install: str
    """The Arch package's functions."""
    rpm_file: Path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Three:
    output = tmp_path_factory.mktemp("three")
    files = {kind: build(kind, output, *PYTHON) for kind in ("deb", "rpm", "arch")}
    words = ["dpkg-deb", "--fsys-tarfile", files["deb"]]
    deb = _of_tar(subprocess.run(words, capture_output=True, check=True).stdout)
    words = ["zstd", "-dc", files["arch"]]
    packed = subprocess.run(words, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        file = tar.extractfile(".INSTALL")
        assert file is not None
        install = file.read().decode()
    arch = {p: each for p, each in _of_tar(packed).items() if p not in META}
    return Three(deb, _of_rpm(files["rpm"].read_bytes()), arch, install, files["rpm"])


META = {".INSTALL", ".MTREE", ".PKGINFO"}


def test_content_is_the_debs_but_for_paths(three: Three) -> None:
    elsewhere: dict[str, str] = runpy.run_path(str(PACKAGE))["ELSEWHERE"]
    left_out = ("usr/share/doc/", "usr/share/lintian/")
    expected = {
        elsewhere.get(path, path): each
        for path, each in without_directories(three.deb).items()
        if path in elsewhere or not path.startswith(left_out)
    }
    assert len(expected) > 200
    assert without_directories(three.rpm) == expected
    assert without_directories(three.arch) == expected


def test_no_directory_is_taken_from_another_package(three: Three) -> None:
    """Fedora's "filesystem" has /usr/bin with another mode, and rpm calls that a conflict."""
    ours = {path for path, each in three.rpm.items() if each.what == DIRECTORY}
    assert {"usr/lib/infertune", "etc/infertune", "usr/share/licenses/infertune"} <= ours
    assert [path for path in ours if "infertune" not in path.split("/")] == []
    # In an Arch package all of them stand, and pacman compares the modes.
    assert {each.mode for each in three.arch.values() if each.what == DIRECTORY} == {0o755}


@pytest.mark.parametrize("kind", ["rpm", "arch"])
def test_units_bus_and_polkit_are_where_they_are_read(three: Three, kind: str) -> None:
    content: Content = getattr(three, kind)
    for path in PACKAGED.values():
        assert content[path.lstrip("/")].mode == 0o644
    places = {path.rpartition("/")[0] for path in PACKAGED.values()}
    assert places == {
        "/usr/lib/systemd/system",
        "/usr/share/dbus-1/system.d",
        "/usr/share/polkit-1/actions",
    }
    for path in ("usr/bin/infertuned", "usr/share/zsh/site-functions/_infertune"):
        assert path in content
    # Arch and Fedora have no directory of that name, only a link.
    assert not [path for path in content if path.startswith(("usr/sbin", "bin", "sbin", "lib"))]


def test_what_arch_runs_is_a_shell_text(three: Three, tmp_path: Path) -> None:
    script = tmp_path / "install"
    script.write_text(three.install)
    subprocess.run(["bash", "-n", script], check=True)  # as pacman does
    for name in ("post_install", "post_upgrade", "pre_remove", "post_remove"):
        assert f"{name}()" in three.install


def test_the_changelog_begins_with_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert text.partition("\n## ")[2].partition("\n")[0] == __version__


def test_rpmlint_finds_no_error_unexplained(three: Three) -> None:
    if not shutil.which("rpmlint"):
        pytest.skip("rpmlint is not installed")
    filters = REPOSITORY / "packaging" / "nfpm" / "rpmlint.toml"
    done = subprocess.run(
        ["rpmlint", "-c", filters, three.rpm_file], capture_output=True, text=True
    )
    if "ImportError" in done.stderr:
        pytest.skip("rpmlint has no Python module of rpm")
    assert (done.returncode, "0 errors" in done.stdout) == (0, True), done.stdout + done.stderr
