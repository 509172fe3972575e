# SPDX-License-Identifier: Apache-2.0
"""Snapshots: the same machine comes out, nothing private goes in, nothing damaged gets through."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infertune.base.errors import SnapshotError, UsageError
from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS, read_live, targets
from infertune.cli.main import main
from infertune.doctor.facts import read_facts
from infertune.doctor.surroundings import recorded
from infertune.host.machine import read_machine
from infertune.host.snapshot import (
    END,
    MAGIC,
    Archive,
    open_root,
    open_snapshot,
    parse,
    record,
    redact_cmdline,
    render,
)

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("*.snapshot"))


def snapshot(*entries: str) -> bytes:
    return "\n".join([MAGIC, "# a test", *entries, END, ""]).encode()


def body(text: str) -> str:
    """A snapshot without its header, whose date and origin differ."""
    return text[text.index("\n\n") :]


def read_everything(root: Root) -> None:
    machine = read_machine(root)
    read_facts(root, recorded(root))
    for knob in KNOBS.values():
        read_live(root, targets(root, machine, knob))
    root.get("/proc/sys/kernel/random/boot_id")


# -- the same machine comes out ------------------------------------------------------


def test_there_are_the_machines_we_promise() -> None:
    names = {path.stem for path in FIXTURES}
    assert {
        "strix-halo-128",
        "strix-halo-64-laptop",
        "dkms-amdttm",
        "intel-desktop",
        "recorded-vm",
    } <= names


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture_says_where_it_is_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == MAGIC
    if path.stem.startswith("recorded-"):
        assert re.match(r"# Recorded on Linux \d", lines[1])
    else:
        assert lines[1].startswith("# Reconstructed, not recorded: ")
        assert any(line.startswith("# From published values: ") for line in lines[:20])
        assert any(line.startswith("# Not confirmed: ") for line in lines[:20])


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture_holds_exactly_what_is_read(path: Path) -> None:
    """Recording a replay gives the same file: nothing is lost, nothing was never read."""
    with open_snapshot(str(path)) as root:
        assert body(record(root, read_everything)) == body(path.read_text())


def test_replay_is_gone_afterwards() -> None:
    with open_snapshot(str(FIXTURES[0])) as root:
        base = root.base
        assert base.is_dir()
        assert not root.live
    assert not base.exists()


files = st.dictionaries(
    st.from_regex(r"/(sys|proc|dev)(/[A-Za-z0-9_.:-]*[A-Za-z0-9]){1,3}", fullmatch=True),
    st.tuples(
        st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)),
        st.sampled_from([0o400, 0o444, 0o644, 0o600, 0o755]),
    ),
    max_size=5,
)


@given(files)
def test_any_bytes_survive(content: dict[str, tuple[bytes, int]]) -> None:
    paths = sorted(content)
    if any(b.startswith(f"{a}/") for a in paths for b in paths):
        return
    text = render(Archive(files=content), ["a test"])
    assert parse(text.encode(), "x").files == content


def test_binary_and_unended_files(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    contents = {
        "/dev/cpu_dma_latency": b"\x00\x94\x35\x77",
        "/dev/newlines": b"\n\n",
        "/dev/empty": b"",
        "/dev/tabs": b"a\tb \\ c\r\n# end of snapshot\nPath: /x",
    }
    for path, data in contents.items():
        (tmp_path / path[1:]).write_bytes(data)

    def read(root: Root) -> None:
        for path in contents:
            root.read_bytes(path)

    text = record(Root(tmp_path), read)
    assert text.isascii()
    archive = parse(text.encode(), "x")
    assert {path: data for path, (data, _) in archive.files.items()} == contents


def test_time_of_a_file_survives(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    image = tmp_path / "boot/initrd.img"
    image.write_bytes(b"not of interest")
    os.utime(image, (1_790_000_000, 1_790_000_000))
    text = record(Root(tmp_path), lambda root: root.modified("/boot/initrd.img") and None)
    assert "Path: /boot/initrd.img\nMode: 644\nModified: 2026-09-21T14:13:20Z\nLines: 0\n" in text
    file = tmp_path / "file"
    file.write_text(text)
    with open_snapshot(str(file)) as replay:
        assert replay.modified("/boot/initrd.img") == 1_790_000_000
        assert replay.modified("/boot/none") is None


@pytest.mark.parametrize("when", ["soon", "2026-13-01T00:00:00Z", "1790000000", ""])
def test_a_time_that_is_none_is_refused(when: str) -> None:
    with pytest.raises(SnapshotError, match="not a time such as"):
        parse(snapshot("", "Path: /x", "Mode: 644", f"Modified: {when}", "Lines: 0"), "x")


def test_links_are_recorded_as_seen_from_where_they_lie(tmp_path: Path) -> None:
    device = tmp_path / "sys/devices/pci/0000:c3:00.0"
    device.mkdir(parents=True)
    (tmp_path / "sys/bus/pci/drivers/amdgpu").mkdir(parents=True)
    (device / "driver").symlink_to("../../../bus/pci/drivers/amdgpu")
    (device / "vendor").write_text("0x1002\n")
    card = tmp_path / "sys/class/drm/card1"
    card.mkdir(parents=True)
    (card / "device").symlink_to("../../../devices/pci/0000:c3:00.0")

    def read(root: Root) -> None:
        root.read("/sys/class/drm/card1/device/vendor")
        root.readlink("/sys/class/drm/card1/device/driver")

    archive = parse(record(Root(tmp_path), read).encode(), "x")
    assert archive.links == {
        "/sys/class/drm/card1/device/driver": "../../../../bus/pci/drivers/amdgpu"
    }
    assert list(archive.files) == ["/sys/class/drm/card1/device/vendor"]


# -- nothing private goes in ---------------------------------------------------------

SECRETS = {
    "/proc/cmdline": (
        "BOOT_IMAGE=/vmlinuz root=UUID=5eC2e7a1-1111-2222-3333-abcdefabcdef ro "
        "cryptdevice=PARTUUID=0b1c:cryptroot "
        "rd.luks.uuid=luks-9f0e8d7c-aaaa-bbbb-cccc-0123456789ab "
        "ip=10.1.2.3::10.1.2.1:255.255.255.0:secrethost:eth0 "
        "netconsole=@/,6666@10.9.8.7/de:ad:be:ef:00:01 "
        'amdgpu.gttsize=1024 ttm.pages_limit=25165824 dyndbg="file hidden.c +p" '
        "-- --token=hunter2\n"
    ),
    "/proc/sys/kernel/hostname": "secrethost.example.org\n",
    "/proc/sys/kernel/osrelease": "7.1.0-secrethost\n",
    "/proc/sys/kernel/random/boot_id": "01234567-89ab-cdef-0123-456789abcdef\n",
    "/proc/self/mounts": (
        "/dev/mapper/luks-9f0e8d7c /home/alice ext4 rw 0 0\n"
        "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n//nas.example.org/alice /mnt cifs rw 0 0\n"
    ),
    "/proc/cpuinfo": "vendor_id : AuthenticAMD\n\nvendor_id : AuthenticAMD\n",
    "/proc/812/comm": "tuned\n",
    "/proc/4711/comm": "alice-diary\n",
    "/etc/os-release": "ID=debian\nMACHINE_OWNER=alice\n",
    "/sys/class/dmi/id/product_name": "Box of secrethost\n",
    "/sys/class/dmi/id/product_serial": "SN-ALICE-1\n",
    "/sys/class/net/eth0/address": "de:ad:be:ef:00:01\n",
    "/sys/class/kfd/kfd/topology/nodes/1/properties": (
        "gfx_target_version 110501\nunique_id 7777123456789\ndrm_render_minor 128\n"
    ),
    "/sys/kernel/mm/ksm/run": "0 de:ad:be:ef:00:01 01234567-89AB-cdef-0123-456789abcdef\n",
}
WORDS = (
    "5ec2e7a1 0b1c cryptroot 9f0e8d7c 10.1.2 secrethost 10.9.8.7 de:ad hidden.c hunter2 token "
    "01234567 alice nas.example sn-alice 7777123456789 4711 /812/"
)


def test_no_secret_gets_in(tmp_path: Path) -> None:
    for path, text in SECRETS.items():
        where = tmp_path / path[1:]
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)

    def read(root: Root) -> None:
        read_everything(root)
        for path in SECRETS:
            if path != "/proc/sys/kernel/hostname":
                root.read(path)

    text = record(Root(tmp_path), read)
    found = [word for word in WORDS.split() if word in text.lower()]
    assert found == []
    archive = parse(text.encode(), "x")
    assert b"ttm.pages_limit=25165824" in archive.files["/proc/cmdline"][0]
    assert archive.files["/proc/1001/comm"][0] == b"tuned\n"
    assert archive.files["/proc/sys/kernel/random/boot_id"][0] == (
        b"00000000-0000-0000-0000-000000000000\n"
    )


def test_host_name_itself_is_never_recorded(tmp_path: Path) -> None:
    where = tmp_path / "proc/sys/kernel"
    where.mkdir(parents=True)
    (where / "hostname").write_text("secrethost\n")

    def read(root: Root) -> None:
        assert root.get("/proc/sys/kernel/hostname") == "secrethost"

    assert "secrethost" not in record(Root(tmp_path), read)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("quiet ro mitigations=off", "quiet ro mitigations=off"),
        (
            "amd_iommu=off iommu=pt amdttm.pages_limit=5",
            "amd_iommu=off iommu=pt amdttm.pages_limit=5",
        ),
        ("root=/dev/sda1 foo.bar=baz", "root=redacted foo.bar=redacted"),
        ('"module.x=secret word" quiet', "redacted quiet"),
        ("quiet -- --password=x", "quiet"),
    ],
)
def test_cmdline(line: str, shown: str) -> None:
    assert redact_cmdline(line) == shown


# -- nothing damaged gets through -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (b"", 0, "cut off"),
        (b"hello\n", 1, "not a snapshot"),
        (f"{MAGIC}\n".encode(), 1, "cut off"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 5", "x"), 7, "cut off"),
        (snapshot() + b"Path: /a\n", 4, "more after"),
        (snapshot("Foo: /a"), 3, "expected"),
        (snapshot("Path: a", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Path: /../a", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Path: /a/../../b", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Path: //a", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Path: /a/", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Path: /a\0b", "Mode: 644", "Lines: 0"), 3, "plain absolute path"),
        (snapshot("Directory: /"), 3, "plain absolute path"),
        (snapshot(f"Directory: /{'a' * 300}"), 3, "plain absolute path"),
        (snapshot("Path: /a", "Mode: 4755", "Lines: 0"), 4, "mode"),
        (snapshot("Path: /a", "Lines: 0"), 4, "'Mode: ' expected"),
        (snapshot("Path: /a", "Mode: 644", "Lines: -1"), 5, "number of lines"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 99999999"), 5, "number of lines"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 1", r"a\q"), 6, "backslash"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 1", r"a\xZZ"), 6, "backslash"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 1", "\xff").replace(b"\xc3", b""), 6, "UTF-8"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 0", "Directory: /a"), 6, "twice"),
        (snapshot("Path: /a", "Mode: 644", "Lines: 0", "Directory: /a/b"), 6, "not a directory"),
        (snapshot("Path: /a", "SymlinkTo: b", "Directory: /a/b"), 5, "not a directory"),
        (snapshot("Directory: /a/b", "Path: /a", "SymlinkTo: b"), 4, "is a directory"),
        (snapshot("Path: /a", "SymlinkTo: /etc/passwd"), 4, "plain relative link"),
        (snapshot("Path: /a", "SymlinkTo: ../x"), 4, "leads out"),
        (snapshot("Path: /a/b", "SymlinkTo: ../../x"), 4, "leads out"),
        (snapshot("Path: /a/b", "SymlinkTo: c/../../../x"), 4, "plain relative link"),
        (snapshot("Path: /a", "SymlinkTo: "), 4, "plain relative link"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, text: bytes, line: int, says: str) -> None:
    file = tmp_path / "x.snapshot"
    file.write_bytes(text)
    with pytest.raises(SnapshotError) as caught, open_snapshot(str(file)):
        pass
    assert f"{file}:{line}: " in caught.value.message
    assert says in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


def test_every_cut_is_noticed() -> None:
    data = snapshot("Path: /a", "Mode: 644", "Lines: 2", "1", "", "Directory: /b")
    for size in range(len(data) - 1):
        with pytest.raises(SnapshotError):
            parse(data[:size], "x")


@given(st.binary(max_size=200))
def test_noise_is_refused_cleanly(noise: bytes) -> None:
    with pytest.raises(SnapshotError):
        parse(MAGIC.encode() + b"\n" + noise, "x")


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infertune.host.snapshot.MAX_SIZE", 10)
    file = tmp_path / "x"
    file.write_bytes(snapshot())
    with pytest.raises(SnapshotError, match="larger"), open_snapshot(str(file)):
        pass


# -- --root ---------------------------------------------------------------------------------


def test_open_root(tmp_path: Path) -> None:
    with open_root("/") as root:
        assert root.live
    with open_root(str(tmp_path)) as root:
        assert root.base == tmp_path.resolve()
        assert not root.live
    for wrong in (tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(UsageError, match="neither"), open_root(str(wrong)):
            pass


def test_verb_writes_what_root_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = next(path for path in FIXTURES if path.stem == "strix-halo-128")
    copy = tmp_path / "copy.snapshot"
    assert main(["--root", str(source), "snapshot", str(copy)]) == 0
    assert body(copy.read_text()) == body(source.read_text())
    capsys.readouterr()
    assert main(["--root", str(source), "snapshot", str(copy)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["--root", str(source), "snapshot", "--force", "--json", str(copy)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "infertune.snapshot/1"
    assert document["bytes"] == copy.stat().st_size
    assert main(["--root", str(copy), "machine", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert main(["--root", str(source), "machine", "--json"]) == 0
    assert replayed == json.loads(capsys.readouterr().out)
    assert replayed["inference_gpu"] == "/sys/class/drm/card1/device"


def test_verb_prints_to_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(FIXTURES[0]), "snapshot", "-"]) == 0
    assert capsys.readouterr().out.startswith(MAGIC)
    assert main(["--root", str(FIXTURES[0]), "snapshot", "-", "--json"]) == 2


def test_a_root_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a closed directory would be a machine without anything, and all well with it."""
    file = tmp_path / "a.snapshot"
    file.write_bytes(FIXTURES[0].read_bytes())

    def forbidden(path: str, limit: int) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        patched.setattr("infertune.host.snapshot.read_user_file", forbidden)
        for path in (tmp_path, file):
            assert main(["--root", str(path), "doctor"]) == 4
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert str(path) in err
    assert main(["--root", str(tmp_path), "doctor"]) == 0


def test_what_may_not_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dev/cpu_dma_latency"
    file.parent.mkdir()
    file.write_bytes(bytes(4))

    def forbidden(root: Root, path: str, size: int) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Root, "read_value", forbidden)
    text = record(Root(tmp_path), read_everything)
    assert "# Not readable when recorded: /dev/cpu_dma_latency" in text
    assert "/dev/cpu_dma_latency" not in parse(text.encode(), "x").files
