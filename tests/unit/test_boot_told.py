# SPDX-License-Identifier: Apache-2.0
"""Images, Limine, and stacks that a person is told the exact lines for."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from boot_trees import (
    EFIVARS,
    GLOBAL_GUID,
    KERNEL,
    MACHINE_ID,
    PARTITION,
    Tools,
    build,
    facts,
    grubenv,
    read,
    said,
)
from infertune.base.root import Root, Space
from infertune.boot import words as texts
from infertune.boot.change import Way
from infertune.boot.plan import STACKS
from infertune.cli.main import main
from infertune.host import efi
from infertune.host.load_option import load_option
from infertune.host.machine import read_machine

WORDS = ("ttm.pages_limit=25165824", "amd_iommu=off")
GIVEN = " ".join(WORDS)
VARIABLE = f"{EFIVARS.lstrip('/')}/{{}}-{GLOBAL_GUID}"


def way(base: Path) -> Way:
    root = Root(base)
    machine = read_machine(root)
    return STACKS[machine.boot_style].way(root, machine, WORDS)


def put(base: Path, path: str, text: str | bytes) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


# -- Limine --------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["limine", "limine-uki"])
def test_f7_limines_own_tool_writes_entries_and_images(tree: str, tmp_path: Path) -> None:
    found = way(build(tmp_path, tree))
    [drop_in] = found.lasting.files
    assert drop_in.path == "/etc/limine-entry-tool.d/zz-infertune.conf"
    assert f'KERNEL_CMDLINE[default]+=" {GIVEN}"\n' in drop_in.data.decode()
    [command] = found.lasting.commands
    assert command.argv == command.undo == ("/usr/bin/limine-mkinitcpio",)


@pytest.mark.parametrize(
    ("tree", "file", "line"),
    [
        ("limine-uki", r"\EFI\Linux\omarchy_linux.efi", "root=UUID=1234 ro quiet"),
        (
            "limine",
            rf"\{MACHINE_ID}\linux-cachyos\vmlinuz",
            rf"initrd=\{MACHINE_ID}\linux-cachyos\initramfs root=UUID=1234 ro quiet",
        ),
    ],
)
def test_limine_the_firmware_starts_the_present_image_once(
    tree: str, file: str, line: str, tmp_path: Path
) -> None:
    found = way(build(tmp_path, tree))
    assert (found.one_try, found.trial.texts) == ("loader", ())
    [once] = found.trial.commands
    Tools(tmp_path)(once.argv)
    root = Root(tmp_path)
    [number] = set(efi.boot_numbers(root))
    made = load_option((tmp_path / VARIABLE.format(f"Boot{number}")).read_bytes()[4:])
    assert made is not None
    assert (made.file, made.partition) == (file, str(PARTITION))
    assert made.arguments == f"{line} {GIVEN} panic=30 rd.shell=0 rd.emergency=reboot"
    assert (tmp_path / VARIABLE.format("BootNext")).read_bytes()[4:] == b"\0\1"


def test_limine_names_of_an_older_tool(tmp_path: Path) -> None:
    build(tmp_path, "limine")
    folder = tmp_path / f"boot/{MACHINE_ID}/linux-cachyos"
    for name in ("vmlinuz", "initramfs"):
        (folder / name).rename(folder / f"{name}-linux-cachyos")
    [once] = way(tmp_path).trial.commands
    assert rf"\{MACHINE_ID}\linux-cachyos\vmlinuz-linux-cachyos" in once.argv


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("usr/bin/efibootmgr", None),
        (VARIABLE.format("SecureBoot"), b"\6\0\0\0\1"),
        (VARIABLE.format("SecureBoot"), None),
        ("proc/self/mounts", b"/dev/nvme0n1p2 / btrfs rw 0 0\n"),
        (f"dev/disk/by-partuuid/{PARTITION}", None),
        ("proc/cmdline", b"root=UUID=1234 rootflags=subvol=/@/.snapshots/7/snapshot\n"),
        (f"usr/lib/modules/{KERNEL}/pkgbase", b"linux-zen\n"),
        (f"usr/lib/modules/{KERNEL}/pkgbase", None),
    ],
)
def test_limine_without_a_trial_the_guard_enforces_it(
    path: str, data: bytes | None, tmp_path: Path
) -> None:
    build(tmp_path, "limine")
    (tmp_path / path).unlink()
    if data:
        put(tmp_path, path, data)
    found = way(tmp_path)
    assert not found.trial
    assert (found.one_try, bool(found.lasting)) == ("guard", True)


def test_limine_every_kernel_that_has_a_line_of_its_own(tmp_path: Path) -> None:
    build(tmp_path, "limine")
    put(
        tmp_path,
        "/etc/limine-entry-tool.conf",
        "KERNEL_CMDLINE[linux-zen]=root=UUID=1234 rw\nKERNEL_CMDLINE[fallback]=root=UUID=1234\n",
    )
    [drop_in] = way(tmp_path).lasting.files
    added = [line for line in drop_in.data.decode().splitlines() if line.startswith("KERNEL")]
    assert added == [f'KERNEL_CMDLINE[{key}]+=" {GIVEN}"' for key in ("linux-zen", "default")]


def test_limine_where_the_last_layer_throws_drop_ins_away(tmp_path: Path) -> None:
    build(tmp_path, "limine")
    default = 'KERNEL_CMDLINE[default]="quiet root=UUID=1234"\n'
    put(tmp_path, "/etc/default/limine", default)
    lasting = way(tmp_path).lasting
    assert not lasting.files
    [edit] = lasting.edits
    assert (edit.path, edit.place) == ("/etc/default/limine", "limine default")
    changed = texts.add(edit.place, default, WORDS)
    assert changed.endswith(f'KERNEL_CMDLINE[default]+=" {GIVEN}"\n')
    assert texts.remove(edit.place, changed + "TIMEOUT=3\n", WORDS) == default + "TIMEOUT=3\n"


def test_limine_without_lines_the_words_go_where_it_looks_then(tmp_path: Path) -> None:
    """What a drop-in adds to nothing would be all there is, without root=."""
    build(tmp_path, "limine")
    put(tmp_path, "/etc/default/limine", "ESP_PATH=/boot\n")
    put(tmp_path, "/etc/kernel/cmdline", "root=UUID=1234 rw\n")
    lasting = way(tmp_path).lasting
    assert [(edit.path, edit.place) for edit in lasting.edits] == [
        ("/etc/kernel/cmdline", "cmdline")
    ]
    assert not lasting.files


@pytest.mark.parametrize("line", ["", "KERNEL_CMDLINE[default]+=quiet splash\n"])
def test_limine_nothing_is_built_that_would_not_boot(line: str, tmp_path: Path) -> None:
    build(tmp_path, "limine")
    put(tmp_path, "/etc/default/limine", line)
    found = way(tmp_path)
    assert (found.one_try, found.lasting) == ("nobody", Way().lasting)
    assert "has no root=" in found.manual[0]
    assert f'KERNEL_CMDLINE[default]="root=UUID=1234 ro quiet {GIVEN}"' in found.manual[0]


def test_limine_ways_out(tmp_path: Path) -> None:
    build(tmp_path, "limine")
    assert "the firmware boots what it booted before" in way(tmp_path).rescue
    (tmp_path / "usr/bin/efibootmgr").unlink()
    assert "press 'e'" in way(tmp_path).rescue
    assert "choose a snapshot" in way(tmp_path).rescue
    put(tmp_path, VARIABLE.format("SecureBoot"), b"\6\0\0\0\1")
    assert "press 'e'" not in way(tmp_path).rescue


# -- images --------------------------------------------------------------------------


def test_ostree_counts_where_its_grub_can(tmp_path: Path) -> None:
    found = way(build(tmp_path, "rpm-ostree-counting"))
    count, kargs = found.lasting.commands
    assert found.one_try == "loader"
    assert kargs.argv[:2] == ("/usr/bin/rpm-ostree", "kargs")
    assert kargs.undo[2:] == tuple(f"--delete-if-present={word}" for word in WORDS)
    block, tools = tmp_path / "boot/grub2/grubenv", Tools(tmp_path)
    tools(count.argv)
    assert block.read_bytes() == grubenv("boot_success=1", "boot_counter=0")
    tools(count.confirm)
    assert block.read_bytes() == grubenv("boot_success=1")


@pytest.mark.parametrize("tree", ["rpm-ostree-counting", "bootc-sources"])
def test_ostree_leaves_a_count_of_somebody_else_alone(tree: str, tmp_path: Path) -> None:
    build(tmp_path, tree)
    put(tmp_path, "/boot/grub2/grubenv", grubenv("boot_counter=2", "boot_success=0"))
    found = way(tmp_path)
    assert found.one_try == "guard"
    assert len(found.lasting.commands) == 1
    assert "choose the deployment before it" in found.rescue


def test_bootc_takes_back_what_its_source_has_set(tmp_path: Path) -> None:
    [command] = way(build(tmp_path, "bootc-sources")).lasting.commands
    assert command.argv == (*command.undo, "--options", GIVEN)
    assert command.undo[1:] == (
        "loader-entries", "set-options-for-source", "--source", "infertune",
    )  # fmt: skip


def test_bootc_lines_to_type(tmp_path: Path) -> None:
    verb, otherwise = way(build(tmp_path, "bootc")).manual
    assert shlex.split(verb)[-2:] == ["--options", GIVEN]
    assert tomllib.loads(otherwise.split("'")[1]) == {"kargs": list(WORDS)}


def test_bootc_without_ostree(tmp_path: Path) -> None:
    build(tmp_path, "bootc-composefs")
    assert way(tmp_path).one_try == "nobody"
    assert len(way(tmp_path).manual) == 2
    # The command line of a unified kernel image is part of it.
    for path, data in said(StubInfo="systemd-stub 258").items():
        put(tmp_path, path, data)
    [line] = way(tmp_path).manual
    assert "kargs.d" in line


# -- the others ----------------------------------------------------------------------


def test_refind_the_whole_first_line(tmp_path: Path) -> None:
    build(tmp_path, "refind")
    assert way(tmp_path).manual == (
        f'make the first line of /boot/refind_linux.conf: "Boot" "root=UUID=1234 ro quiet {GIVEN}"',
    )
    put(tmp_path, "/boot/refind_linux.conf", "# none\n")
    assert "stanza in refind.conf" in way(tmp_path).manual[0]


def test_zfsbootmenu_a_command_for_the_dataset(tmp_path: Path) -> None:
    [line] = way(build(tmp_path, "zfsbootmenu")).manual
    assert shlex.split(line) == [
        "zfs", "set", f"org.zfsbootmenu:commandline=quiet {GIVEN}", "zroot/ROOT/debian",
    ]  # fmt: skip


@pytest.mark.parametrize("tree", ["nixos", "container", "unknown"])
def test_every_word_is_named(tree: str, tmp_path: Path) -> None:
    [line] = way(build(tmp_path, tree)).manual
    assert all(word in line for word in WORDS)
    assert read(tmp_path, "/proc/cmdline").startswith("root=")


@pytest.mark.parametrize("tree", ["limine-uki", "arch-uki"])
def test_room_is_asked_for_before_a_tool_runs(
    tree: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Limine's builds every kernel's image by itself, at the confirmation: asked at stage."""
    build(tmp_path, tree)
    before = facts(tmp_path)
    full = Space(device=1, free=1 << 20, read_only=False)
    monkeypatch.setattr(Root, "space", lambda _self, _path: full)
    assert main(["--root", str(tmp_path), "boot", "stage", "kernel"]) == 3
    err = capsys.readouterr().err
    assert "1 MiB free" in err
    assert "nothing was touched" in err
    assert facts(tmp_path) == before
