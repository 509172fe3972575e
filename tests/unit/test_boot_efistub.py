# SPDX-License-Identifier: Apache-2.0
"""A kernel that the firmware starts itself."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from boot_trees import (
    EFIVARS,
    GLOBAL_GUID,
    KERNEL,
    Tools,
    build,
    started,
)
from infertune.base.errors import Failed
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.boot import record, staging
from infertune.boot.change import Change, Command, Way
from infertune.boot.stacks.efistub import efistub
from infertune.host import efi
from infertune.host.load_option import load_option
from infertune.host.machine import read_machine

WORDS = ("ttm.pages_limit=25165824", "amd_iommu=off")
LINE = r"initrd=\initramfs-linux.img root=UUID=1234 ro quiet"


def way(base: Path) -> Way:
    root = Root(base)
    return efistub(root, read_machine(root), WORDS)


def variable(base: Path, name: str) -> Path:
    return base / EFIVARS.lstrip("/") / f"{name}-{GLOBAL_GUID}"


def variables(base: Path) -> dict[str, bytes]:
    found = (base / EFIVARS.lstrip("/")).iterdir()
    return {path.name.partition("-")[0]: path.read_bytes() for path in found}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build(tmp_path, "efistub")
    variable(tmp_path, "BootOrder").write_bytes(b"\7\0\0\0\3\0\1\0")
    return tmp_path


def only(commands: tuple[Command, ...]) -> Command:
    [command] = commands
    return command


def test_the_firmware_starts_the_trial_once(base: Path) -> None:
    found = way(base)
    assert (found.one_try, found.lasting.texts, found.trial.texts) == ("loader", (), ())
    before = variables(base)
    tools, trial = Tools(base), only(found.trial.commands)
    tools(trial.argv)
    now = variables(base)
    assert now["BootNext"][4:] == bytes.fromhex("0001")
    made = load_option(now["Boot0100"][4:])
    assert made is not None
    assert made.file == r"\EFI\arch\image.efi"
    line = f"{LINE} {' '.join(WORDS)} panic=30 rd.shell=0 rd.emergency=reboot"
    assert made.arguments == line
    # Nothing else has changed: what the firmware starts by default least of all.
    assert {name: now[name] for name in before} == before
    tools(trial.undo)
    # A BootNext without its option means nothing; the firmware deletes it.
    assert variables(base) == before | {"BootNext": now["BootNext"]}


def test_what_lasts_is_first_in_the_order_and_goes_out_of_it_again(base: Path) -> None:
    before = variables(base)
    tools, lasting = Tools(base), only(way(base).lasting.commands)
    tools(lasting.argv)
    now = variables(base)
    assert now["BootOrder"] == b"\7\0\0\0" + bytes.fromhex("010103000100")
    made = load_option(now["Boot0101"][4:])
    assert made is not None
    assert made.arguments == f"{LINE} {' '.join(WORDS)}"
    assert {**now, "BootOrder": before["BootOrder"]} == {**before, "Boot0101": now["Boot0101"]}
    tools(lasting.undo)
    assert variables(base) == before


def test_tried_kept_and_undone(base: Path) -> None:
    root, tools = Root(base), Tools(base)
    before, found = variables(base), way(base)
    change = Change("efistub", words=WORDS, trial=found.trial, lasting=found.lasting)
    with staging.lock(root, "test"):
        stage = staging.stage(root, "mine", replace(change, one_try="loader"), tools)
        assert variables(base)["BootOrder"] == before["BootOrder"]
        staging.keep(root, replace(stage, phase="trying"), tools)
        kept = variables(base)
        assert "Boot0100" not in kept
        assert kept["BootOrder"] == b"\7\0\0\0" + bytes.fromhex("010103000100")
        staging.undo(root, tools)
    assert variables(base) == before | {"BootNext": kept["BootNext"]}


def test_numbers_that_are_taken_are_left(base: Path) -> None:
    for name in ("Boot0100", "Boot0102"):
        variable(base, name).write_bytes(b"\7\0\0\0")
    found = way(base)
    assert "0101" in only(found.trial.commands).argv
    assert "0103" in only(found.lasting.commands).argv


def test_the_disk_is_that_of_the_option_that_was_started(base: Path) -> None:
    argv = only(way(base).trial.commands).argv
    at = argv.index("--disk")
    assert argv[at : at + 4] == ("--disk", "/dev/nvme0n1", "--part", "1")


def set_option(base: Path, file: str, arguments: str) -> None:
    for path, data in started(file, arguments).items():
        (base / path.lstrip("/")).write_bytes(data)


def no_program(base: Path) -> None:
    (base / "usr/bin/efibootmgr").unlink()


def other_disk(base: Path) -> None:
    (base / "sys/class/block/nvme0n1p1").unlink()


def versioned(base: Path) -> None:
    set_option(base, rf"\EFI\gentoo\vmlinuz-{KERNEL}.efi", LINE)


def no_arguments(base: Path) -> None:
    set_option(base, r"\vmlinuz-linux", "")


def others(base: Path) -> None:
    set_option(base, r"\vmlinuz-linux", "root=UUID=99 rw")


@pytest.mark.parametrize("what", [no_program, other_disk, versioned, no_arguments, others])
def test_what_is_not_certain_is_a_line_to_type(what: object, base: Path) -> None:
    what(base)  # type: ignore[operator]
    found = way(base)
    assert (found.one_try, found.lasting, found.trial) == ("nobody", Way().lasting, Way().trial)
    words = shlex.split(found.manual[0])
    assert words[:2] == ["efibootmgr", "--create"]
    assert words[words.index("--unicode") + 1].endswith(" ".join(WORDS))
    option = efi.boot_current(Root(base))
    assert option is not None
    assert words[words.index("--loader") + 1] == option.file


def test_where_the_firmware_does_not_say_what_it_started(base: Path) -> None:
    variable(base, "BootCurrent").unlink()
    assert " ".join(WORDS) in way(base).manual[0]


def test_a_firmware_without_room_has_nothing_to_take_back(base: Path) -> None:
    """efibootmgr fails where it is told to delete what it could not make."""
    before, found = variables(base), way(base)
    change = Change("efistub", words=WORDS, trial=found.trial, lasting=found.lasting)
    full = Tools(base, lambda argv: "--create-only" in argv)
    with staging.lock(Root(base), "test"), pytest.raises(Failed, match="everything is as it was"):
        staging.stage(Root(base), "mine", change, full)
    assert variables(base) == before
    assert record.load(Root(base)) is None
