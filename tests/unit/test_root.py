# SPDX-License-Identifier: Apache-2.0
"""The door: what it asks of the kernel, and in which order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from infertune.base.root import Root, ShortWrite, Step


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that make a file durable, in order, with what they are about."""
    seen: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def call(first: int | str | Path, *rest: object) -> object:
            about = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            seen.append(f"{name} {os.path.basename(about)}")
            return original(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "rename"):
        watch(name)
    return seen


def test_replace_is_durable_before_and_after_it_is_visible(
    tmp_path: Path, calls: list[str]
) -> None:
    """Data on disk before the name points at it, the name on disk before anybody relies on it."""
    directory = tmp_path / "run"
    directory.mkdir()
    Root(tmp_path).replace("/run/journal", b"x")
    assert calls == [
        "write .journal.infertune",
        "fsync .journal.infertune",
        "rename .journal.infertune",
        "fsync journal",  # FAT writes a name with its file
        "fsync run",
    ]
    assert (directory / "journal").read_bytes() == b"x"


def test_what_may_as_well_be_old_is_whole_all_the_same(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "run").mkdir()
    Root(tmp_path).replace("/run/journal", b"x", durable=False)
    whole = ["write .journal.infertune", "fsync .journal.infertune", "rename .journal.infertune"]
    assert calls == whole


def test_copy_and_rename_are_durable(tmp_path: Path, calls: list[str]) -> None:
    directory = tmp_path / "boot"
    directory.mkdir()
    (directory / "image").write_bytes(b"x" * 3_000_000)
    (directory / "image").chmod(0o640)
    root = Root(tmp_path)
    root.copy("/boot/image", "/boot/old")
    whole = ["write .old.infertune"] * 3
    renamed = ["rename .old.infertune", "fsync old", "fsync boot"]
    assert calls == [*whole, "fsync .old.infertune", *renamed]
    assert (directory / "old").read_bytes() == b"x" * 3_000_000
    assert (directory / "old").stat().st_mode & 0o777 == 0o640
    calls.clear()
    root.sync("/boot/image")
    root.rename("/boot/old", "/boot/image")
    assert calls == ["fsync image", "fsync boot", "rename old", "fsync image", "fsync boot"]
    assert os.listdir(directory) == ["image"]


@pytest.mark.parametrize("by", ["rename", "replace", "copy"])
def test_what_is_replaced_is_held_until_that_is_on_disk(by: str, tmp_path: Path) -> None:
    """FAT would give its blocks away while the old name still leads to them."""
    (tmp_path / "new").write_text("new")
    (tmp_path / "image").write_text("old")
    held = []

    def is_open() -> bool:
        links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        return f"{tmp_path}/image (deleted)" in links

    def look(step: Step) -> int | None:
        if step.action == "sync-directory":
            held.append(is_open())
        return None

    root = Root(tmp_path, hook=look)
    work = {
        "rename": lambda: root.rename("/new", "/image"),
        "replace": lambda: root.replace("/image", b"new"),
        "copy": lambda: root.copy("/new", "/image"),
    }
    work[by]()
    assert held == [True]
    assert (tmp_path / "image").read_text() == "new"
    assert not is_open()


def test_a_copy_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes what fits, and refuses the rest at the next call."""
    (tmp_path / "image").write_bytes(b"x" * 1000)
    (tmp_path / "old").write_bytes(b"older")
    write = os.write
    room = [600]

    def full(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(fd, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        Root(tmp_path).copy("/image", "/old")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/old")
    assert sorted(os.listdir(tmp_path)) == ["image", "old"]
    assert (tmp_path / "old").read_bytes() == b"older"


def test_only_plain_files_are_copied_and_measured(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "fifo")
    root = Root(tmp_path)
    for path in ("/link", "/fifo", "/"):
        for work in (root.size, root.digest, root.sync, lambda path: root.copy(path, "/to")):
            with pytest.raises(OSError, match=r"symbolic links|not a regular file|Is a directory"):
                work(path)
    assert not (tmp_path / "to").exists()


def test_a_new_directory_is_durable(tmp_path: Path, calls: list[str]) -> None:
    Root(tmp_path).mkdir("/a/b")
    assert calls == [f"fsync {tmp_path.name}", "fsync a"]

    def refuse(step: Step) -> None:
        if step.action == "sync-directory":
            raise OSError(number, "as if", step.path)

    number = errno.EINVAL  # a cgroup's file system
    Root(tmp_path, hook=refuse).mkdir("/c")
    number = errno.EIO
    with pytest.raises(OSError, match="as if"):
        Root(tmp_path, hook=refuse).mkdir("/d")


def test_unlink_is_durable(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    Root(tmp_path).unlink("/file")
    assert calls == [f"fsync {tmp_path.name}"]


def test_every_effect_is_a_step_that_can_be_stopped(tmp_path: Path) -> None:
    """A hook that refuses everything leaves nothing changed."""
    (tmp_path / "file").write_text("1\n")
    (tmp_path / "empty").mkdir()

    def refuse(step: Step) -> int | None:
        raise OSError(errno.EPERM, "no", step.path)

    root = Root(tmp_path, hook=refuse)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="no"):
        root.write_value("/file", "2")
    with pytest.raises(OSError, match="no"):
        root.replace("/file", b"2")
    with pytest.raises(OSError, match="no"):
        root.copy("/file", "/copy")
    with pytest.raises(OSError, match="no"):
        root.rename("/file", "/renamed")
    with pytest.raises(OSError, match="no"):
        root.unlink("/file")
    with pytest.raises(OSError, match="no"):
        root.mkdir("/new")
    with pytest.raises(OSError, match="no"):
        root.rmdir("/empty")
    with pytest.raises(OSError, match="no"):
        root.keep_open("/file", b"2")
    with pytest.raises(OSError, match="no"), root.lock("/lock", "me"):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "1\n"


def test_a_short_write_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("60\n")
    root = Root(tmp_path, hook=lambda step: 1 if step.action == "write" else None)
    with pytest.raises(ShortWrite, match="1 of 2"):
        root.write_value("/file", "10")
    with pytest.raises(ShortWrite):
        root.replace("/file", b"long")
    assert os.listdir(tmp_path) == ["file"]


def test_replace_leaves_other_names_of_a_file_and_its_neighbours_alone(tmp_path: Path) -> None:
    """``grub.new`` is a name people use; and nothing is written through a link."""
    neighbours = [tmp_path / name for name in ("grub.new", "grub~", "grub.bak")]
    for each in neighbours:
        each.write_text("theirs")
    root = Root(tmp_path)
    left = []

    def stop(step: Step) -> int | None:
        if step.action == "rename":
            left[:] = [each for each in tmp_path.iterdir() if each not in neighbours]
        return None

    Root(tmp_path, hook=stop).replace("/grub", b"ours")
    [successor] = left
    # grub-mkconfig runs what a shell's * finds in /etc/grub.d.
    assert successor.name.startswith(".")
    os.link(neighbours[0], successor)
    root.replace("/grub", b"again")
    root.unlink("/grub")
    assert [each.read_text() for each in neighbours] == ["theirs"] * 3
    assert sorted(tmp_path.iterdir()) == sorted(neighbours)


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a\0b", ""])
def test_paths_that_are_none(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        Root(tmp_path).at(path)


def test_this_machine_by_any_name() -> None:
    assert Root("/").live
    assert Root("//").live
    assert Root("/proc/self/root").live
    assert not Root("/tmp").live


def test_natural_order(tmp_path: Path) -> None:
    for name in ("cpu10", "cpu2", "cpu1", "cpu1²"):
        (tmp_path / name).mkdir()
    assert Root(tmp_path).glob("/cpu[0-9]*") == ["/cpu1", "/cpu1²", "/cpu2", "/cpu10"]


def test_a_held_file_is_open_until_it_is_closed(tmp_path: Path) -> None:
    held = Root(tmp_path).keep_open("/dev/null", b"x")
    assert held.fd is None  # a recorded machine has no driver behind its files
    held.close()
    held = Root("/").keep_open("/dev/null", b"1234")
    assert held.fd is not None
    number = held.fd
    held.close()
    held.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_nobody_else_can_take_the_lock_or_part_of_it(tmp_path: Path) -> None:
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        parent.chmod(0o755)
    root = Root(tmp_path)
    # As an earlier version left it.
    (tmp_path / "lock").touch(0o644)

    def as_nobody() -> tuple[str | None, bool]:
        """Who holds it, and whether the file can be opened: that is all a shared lock takes."""
        os.seteuid(65534)
        try:
            return root.lock_owner("/lock"), os.access(
                tmp_path / "lock", os.R_OK, effective_ids=True
            )
        finally:
            os.seteuid(0)

    with root.lock("/lock", "me") as holder:
        assert holder is None
        assert as_nobody() == ("another infertune", False)
        assert root.lock_owner("/lock") == "me"
    assert as_nobody() == (None, False)
    assert root.lock_owner("/lock") is None


# -- small files, records ------------------------------------------------------------


def test_small_files(tmp_path: Path) -> None:
    root = Root(tmp_path)
    (tmp_path / "text").write_bytes(b"gr\xf6\xdfer\r\n")
    assert root.read_small("/text", 100) == "gr\ufffd\ufffder\r\n"
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "large").write_bytes(b"x" * 101)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, words in (
        ("binary", "Binary, not text"),
        ("large", "Larger than"),
        ("directory", "Is a directory"),
        ("fifo", "not a regular file"),
        ("none", "No such file"),
    ):
        with pytest.raises(OSError, match=words):
            root.read_small(f"/{name}", 100)


def test_records_end_where_there_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "log", os.O_WRONLY)
    try:
        os.write(writer, b"one\ntwo\n")
        # With a writer that is there the end is "would block", as on /dev/kmsg.
        assert Root(tmp_path).read_records("/log", 100) == b"one\ntwo\n"
        os.write(writer, b"x" * 20_000)
        assert len(Root(tmp_path).read_records("/log", 100)) == 8192
    finally:
        os.close(writer)
        os.close(reader)


def read_only(step: Step) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), step.path)


def test_a_lock_on_a_read_only_file_system(tmp_path: Path) -> None:
    """Whoever holds it keeps all others out, whether they may write or not."""
    writer, reader = Root(tmp_path), Root(tmp_path, hook=read_only)
    with pytest.raises(OSError, match="Read-only"), reader.lock("/lock", "a"):
        pass
    with writer.lock("/lock", "a") as holder:
        assert holder is None
        with reader.lock("/lock", "b") as other:
            assert other == "a"
    for again in range(2):
        with reader.lock("/lock", f"c {again}") as holder:
            assert holder is None
            assert writer.lock_owner("/lock") is not None
            with writer.lock("/lock", "d") as other:
                assert other is not None
            with reader.lock("/lock", "e") as other:
                assert other is not None
        assert writer.lock_owner("/lock") is None
