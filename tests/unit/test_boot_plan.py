# SPDX-License-Identifier: Apache-2.0
"""What would be written and run, for each boot loader; sizes; findings; broken inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot_trees import KERNEL, MACHINE, TREES, build, facts
from infertune.base.errors import Busy
from infertune.base.root import Root
from infertune.base.units import GIB
from infertune.boot import commands, staging
from infertune.boot.commands import PROGRAMS, find, runner
from infertune.boot.options import PLACES, options
from infertune.boot.plan import plan
from infertune.boot.sizes import check_sizes
from infertune.boot.sources import findings
from infertune.boot.stacks.grub import DROP_IN as GRUB_DROP_IN
from infertune.boot.stacks.grub import SCRIPT as GRUB_SCRIPT
from infertune.boot.stacks.grub import grub_script
from infertune.catalogue.knobs import KNOBS
from infertune.cli.main import main
from infertune.host.boot_loader import STACKS
from infertune.host.machine import read_machine
from infertune.host.modprobe import read_sources
from infertune.pools.boot import boot_reserve
from infertune.pools.facts import read_facts
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "boot"


def infertune(base: Path, *words: str) -> int:
    return main(["--root", str(base), "boot", *words])


@pytest.mark.parametrize("tree", TREES)
def test_golden_plan(
    tree: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    before = facts(build(tmp_path, tree))
    assert infertune(tmp_path, "plan", "boot") == 0
    said, golden = capsys.readouterr().out, GOLDEN / f"{tree}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(said)
    assert said == golden.read_text()
    assert facts(tmp_path) == before
    assert not (tmp_path / "var/lib/infertune").exists()


def test_every_style_has_a_tree_and_an_entry(tmp_path: Path) -> None:
    styles = set()
    for tree in TREES:
        styles.add(read_machine(Root(build(tmp_path / tree, tree))).boot_style)
    assert styles == {stack.id for stack in STACKS} | {None}


def test_every_boot_knob_has_a_place() -> None:
    assert set(PLACES) == {knob.id for knob in KNOBS.values() if knob.time == "boot"}


# -- sizes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "pages"),
    [("96GiB", 25165824), ("108GiB", 28311552), ("59GiB", 15466496), ("1GiB", 262144)],
)
def test_a_gib_is_262144_pages(size: str, pages: int) -> None:
    assert KNOBS["ttm.pages_limit"].value.parse(size) == str(pages)


@pytest.mark.parametrize(
    ("total_gib", "reserve_gib"), [(128, 8), (96, 8), (64, 8), (32, 4), (2, 0.25)]
)
def test_the_boot_reserve(total_gib: int, reserve_gib: float) -> None:
    assert boot_reserve(total_gib * GIB) == reserve_gib * GIB


def _profile(base: Path, text: str) -> None:
    (base / "etc/infertune/profiles/mine.toml").write_text(text)


def test_a_size_that_leaves_too_little_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    total = 131072000 * 1024
    for knob in ("ttm.pages_limit", "ttm.page_pool_size"):
        for size, code in ((total - 8 * GIB, 0), (total - 8 * GIB + 4096, 2), (total, 2)):
            _profile(tmp_path, f'[boot]\n{knob} = "{size // 1024}KiB"\n')
            assert infertune(tmp_path, "stage", "mine") == code, (knob, size)
            if code:
                assert f"{knob}: " in capsys.readouterr().err
                assert not (tmp_path / "etc/modprobe.d/zz-infertune.conf").exists()
            infertune(tmp_path, "undo")


def test_without_the_size_of_memory_nothing_is_staged(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / "proc/meminfo").unlink()
    assert infertune(tmp_path, "stage", "size") == 2


def test_what_the_firmware_takes_is_not_the_gpus_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    card = tmp_path / "sys/class/drm/card1/device"
    (card / "uma").mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "device").write_text("0x1586\n")
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    (card / "mem_info_vram_total").write_text(f"{512 << 20}\n")
    (card / "uma/carveout").write_text("0\n")
    (card / "uma/carveout_options").write_text("0: Minimum (512 MB)\n7: M (64 GB)\n")
    _profile(
        tmp_path, '[boot]\nttm.pages_limit = "96GiB"\namdgpu.uma_carveout = "64GiB"\n'
    )  # fmt: skip
    assert infertune(tmp_path, "stage", "mine") == 2
    assert "96 GiB is refused" in (err := capsys.readouterr().err)
    assert "Linux has 61.5 GiB, of which at most 53.8 GiB" in err
    _profile(
        tmp_path, '[boot]\nttm.pages_limit = "53GiB"\namdgpu.uma_carveout = "64GiB"\n'
    )  # fmt: skip
    assert infertune(tmp_path, "stage", "mine") == 0


def test_no_size_that_the_kernel_takes_for_none(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    for knob in ("ttm.pages_limit", "ttm.page_pool_size"):
        _profile(tmp_path, f'[boot]\n{knob} = "0GiB"\n')
        assert infertune(tmp_path, "plan", "mine") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x" * 2040, "the command line would have 2094 bytes, and the kernel takes 2047"),
        ("a=b " * 60_000, "the command line would have 240053 bytes"),
        ("ro quiet -- single", "has '--', and what follows goes to init"),
    ],
)
def test_a_command_line_without_room(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / "proc/cmdline").write_text(line)
    before = facts(tmp_path)
    assert infertune(tmp_path, "stage", "kernel") == 2
    err = capsys.readouterr().err
    assert said in err
    assert "nothing was touched" in err
    assert facts(tmp_path) == before
    build(tmp_path / "unknown", "unknown")
    (tmp_path / "unknown/proc/cmdline").write_text(line)
    assert infertune(tmp_path / "unknown", "stage", "size") == 0  # modprobe.d has no such bound


def test_options_are_not_swallowed_by_a_comment(tmp_path: Path) -> None:
    build(tmp_path, "opensuse-grub2-bls")
    for text in ("", "# none yet\n", "root=1\n# the end\n", "root=1"):
        (tmp_path / "etc/kernel/cmdline").write_text(text)
        assert infertune(tmp_path, "stage", "kernel") == 0
        lines = (tmp_path / "etc/kernel/cmdline").read_text().splitlines()
        assert [line for line in lines if "amd_iommu=off" in line and not line.startswith("#")]
        assert infertune(tmp_path, "undo") == 0
        assert (tmp_path / "etc/kernel/cmdline").read_text() == text


# -- which module --------------------------------------------------------------------


def _words(base: Path, profile: str = "size") -> list[str]:
    root = Root(base)
    machine = read_machine(root)
    wanted = resolve(load_profile(root, profile), machine)
    found, _ = options(root, machine, wanted, read_sources(root))
    check_sizes(read_facts(root, machine), machine, found)
    return [parameter.word for option in found for parameter in option.parameters]


def test_the_module_that_is_really_used(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    assert _words(tmp_path) == ["ttm.pages_limit"]
    (tmp_path / "sys/module/amdttm/parameters").mkdir(parents=True)
    assert _words(tmp_path) == ["ttm.pages_limit"]  # amdgpu holds ttm
    (tmp_path / "sys/module/ttm/holders/amdgpu/x").unlink()
    (tmp_path / "sys/module/ttm/holders/amdgpu").rmdir()
    assert _words(tmp_path) == ["amdttm.pages_limit", "ttm.pages_limit"]  # nobody can say
    (tmp_path / "sys/module/amdttm/holders/amdgpu").mkdir(parents=True)
    assert _words(tmp_path) == ["amdttm.pages_limit"]


def test_a_module_that_is_not_loaded_but_there(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    for name in ("amdgpu", "ttm"):
        (tmp_path / "sys/module" / name).rename(tmp_path / name)
    assert _words(tmp_path) == ["ttm.pages_limit"]
    dep = tmp_path / f"lib/modules/{KERNEL}/modules.dep"
    dep.write_text("updates/dkms/amd-ttm.ko.zst:\nkernel/drivers/gpu/drm/ttm/ttm.ko.zst:\n")
    assert _words(tmp_path) == ["amd_ttm.pages_limit", "ttm.pages_limit"]
    dep.write_text("kernel/fs/ext4/ext4.ko:\n")
    assert _words(tmp_path) == []


def test_a_module_that_is_part_of_the_kernel_goes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / f"lib/modules/{KERNEL}/modules.builtin").write_text("kernel/x/ttm.ko\n")
    assert infertune(tmp_path, "plan", "size", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    files = document["lasting"]["files"]
    assert [file["path"] for file in files] == [GRUB_DROP_IN, GRUB_SCRIPT]
    assert "ttm.pages_limit=25165824" in files[1]["diff"]


def test_the_carve_out_is_the_firmwares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "debian-grub")
    card = tmp_path / "sys/class/drm/card1/device"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "device").write_text("0x1586\n")
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    _profile(tmp_path, '[boot]\namdgpu.uma_carveout = "512MiB"\n')
    assert infertune(tmp_path, "plan", "mine") == 0
    assert "set it in the BIOS" in capsys.readouterr().out
    (card / "uma").mkdir()
    (card / "uma/carveout").write_text("7\n")
    (card / "uma/carveout_options").write_text("0: Minimum (512 MB)\n3:  (4 GB)\n7: M (16 GB)\n")
    # A size that the BIOS set and the list lacks: undo would write another one (F13).
    (card / "mem_info_vram_total").write_text(f"{64 * GIB}\n")
    assert infertune(tmp_path, "stage", "mine") == 0
    assert "shows 'M (16 GB)': it could not be put back" in capsys.readouterr().out
    assert (card / "uma/carveout").read_text() == "7\n"
    (card / "mem_info_vram_total").write_text(f"{16 * GIB}\n")
    assert infertune(tmp_path, "stage", "mine") == 0
    assert (card / "uma/carveout").read_text() == "0\n"
    assert infertune(tmp_path, "undo") == 0
    assert (card / "uma/carveout").read_text() == "7\n"
    _profile(tmp_path, '[boot]\namdgpu.uma_carveout = "1GiB"\n')
    capsys.readouterr()
    assert infertune(tmp_path, "plan", "mine") == 0
    assert "it offers 512 MiB, 4 GiB, 16 GiB" in capsys.readouterr().out


def test_what_is_there_already_is_left_to_whoever_set_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / "proc/cmdline").write_text("ro amd_iommu=off\n")
    assert infertune(tmp_path, "plan", "kernel") == 0
    out = capsys.readouterr().out
    assert "amd_iommu is off already, set by another program" in out
    assert "nothing to stage" in out


def test_a_required_setting_without_a_place_stops_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / "sys/module/ttm").rename(tmp_path / "ttm")
    (tmp_path / f"lib/modules/{KERNEL}/modules.dep").unlink()
    _profile(tmp_path, '[boot]\nttm.pages_limit = { value = "9GiB", required = true }\n')
    assert infertune(tmp_path, "stage", "mine") == 2
    assert "no TTM module is loaded, but /etc/infertune/profiles/mine.toml:2 requires it" in (
        capsys.readouterr().err
    )


def test_isolating_every_cpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "debian-grub")
    _profile(tmp_path, '[boot]\nisolcpus = "0-3"\n')
    assert infertune(tmp_path, "plan", "mine") == 0
    assert "CPU 0" in capsys.readouterr().out


# -- GRUB's own counting ----------------------------------------------------------------


def test_grub_tries_once_and_keeps_what_is_confirmed(tmp_path: Path) -> None:
    """The script's logic is also shell's; GRUB's commands are stood in for."""
    script = tmp_path / "01_infertune"
    script.write_text(grub_script(("amd_iommu=off", "isolcpus=2-3")))
    printed = subprocess.run(["sh", script], capture_output=True, text=True, check=True).stdout
    frame = """
set() {{ eval "$(printf '%s' "$1" | sed 's/=\\(.*\\)/="\\1"/')"; }}
save_env() {{ {can_save}; printf '%s' "${{!1}}" >"$saved"; }}
export() {{ :; }}
infertune_boot=$(cat "$saved")
{script}
printf '%s' "$infertune_options"
"""

    def start(can_save: str = ":") -> str:
        code = frame.format(script=printed, can_save=can_save)
        done = subprocess.run(
            ["bash", "-c", code], env={"saved": str(saved), "PATH": os.defpath},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    saved = tmp_path / "grubenv"
    saved.write_text("staged")
    words = "amd_iommu=off isolcpus=2-3"
    tried = f"{words} panic=30 rd.shell=0 rd.emergency=reboot"
    assert [start(), start(), start()] == [tried, "", ""]
    saved.write_text("staged")
    assert start() == tried
    saved.write_text("confirmed")
    assert [start(), start()] == [words, words]
    saved.write_text("")
    assert start() == ""
    # Where it cannot count, it does not try.
    saved.write_text("staged")
    assert start("return 1") == ""


def test_the_drop_in_leaves_the_variable_to_grub(tmp_path: Path) -> None:
    root = Root(build(tmp_path, "debian-grub"))
    wanted = resolve(load_profile(root, "kernel"), read_machine(root))
    found, _ = options(root, read_machine(root), wanted, read_sources(root))
    files = plan(root, read_machine(root), found).now.files
    [drop_in] = [file for file in files if file.path == GRUB_DROP_IN]
    # As grub-mkconfig reads it, and as its 10_linux then prints it.
    code = f"GRUB_CMDLINE_LINUX_DEFAULT=quiet\n{drop_in.data.decode()}"
    code += 'args="$GRUB_CMDLINE_LINUX_DEFAULT"\ncat <<EOF\nlinux ro ${args}\nEOF\n'
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "linux ro quiet $infertune_options\n"


# -- who says what ----------------------------------------------------------------------


def _sources(base: Path, **files: str) -> list[str]:
    for name, text in files.items():
        (base / f"etc/modprobe.d/{name}.conf").write_text(text)
    return [str(each) for each in findings(read_sources(Root(base)))]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("amdgpu.gttsize=126976", "amdgpu.gttsize is deprecated"),
        ("amdgpu.gtt_size=1", "no parameter gtt_size"),
        ("amd_iommu=pt", "amd_iommu does not know pt"),
        ("iommu=pt", "gave inference nothing"),
        ("ttm.page_limit=1", "no parameter page_limit"),
        ("pages_limit=5", "without its module"),
        (
            "amd_iommu=pgtbl_v2 amd_iommu=off",
            "amd_iommu=pgtbl_v2 (/proc/cmdline) is overruled by amd_iommu=off",
        ),
    ],
)
def test_findings_of_the_command_line(line: str, expected: str, tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    assert _sources(tmp_path) == []
    (tmp_path / "proc/cmdline").write_text(f"ro {line} quiet\n")
    found = _sources(tmp_path)
    assert len(found) == 1
    assert expected in found[0]
    # What stands after "--" is for init.
    (tmp_path / "proc/cmdline").write_text(f"ro -- {line}\n")
    assert _sources(tmp_path) == []


def test_files_that_disagree_with_each_other_and_the_command_line(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    found = _sources(
        tmp_path,
        a="options ttm pages_limit=1\n",
        b="options ttm \\\n  pages_limit=2\n# options ttm pages_limit=3\n",
    )
    [only] = found
    assert only == (
        "ttm.pages_limit=1 (/etc/modprobe.d/a.conf:1) is overruled by ttm.pages_limit=2 "
        "(/etc/modprobe.d/b.conf:1); keep one of them"
    )
    (tmp_path / "proc/cmdline").write_text("ttm.pages_limit=9\n")
    assert "overruled by ttm.pages_limit=9 (/proc/cmdline)" in _sources(tmp_path)[0]
    # A namesake in /etc hides the distribution's file.
    (tmp_path / "usr/lib/modprobe.d").mkdir(parents=True)
    (tmp_path / "usr/lib/modprobe.d/b.conf").write_text("options amdgpu gttsize=1\n")
    assert len(_sources(tmp_path)) == 1
    (tmp_path / "usr/lib/modprobe.d/c.conf").write_text("options amdgpu gttsize=1\n")
    assert len(_sources(tmp_path)) == 2


def test_plan_says_who_will_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "unknown")
    (tmp_path / "etc/modprobe.d/ttm.conf").write_text("options ttm pages_limit=1\n")
    infertune(tmp_path, "plan", "size")
    assert "will be overridden" not in capsys.readouterr().out  # ours sorts later
    (tmp_path / "etc/modprobe.d/zzz.conf").write_text("options ttm pages_limit=2\n")
    infertune(tmp_path, "plan", "size")
    assert "overridden: /etc/modprobe.d/zzz.conf:1 says 2 and wins" in capsys.readouterr().out
    (tmp_path / "proc/cmdline").write_text("ttm.pages_limit=3\n")
    infertune(tmp_path, "plan", "size")
    assert "overridden: /proc/cmdline says 3 and wins" in capsys.readouterr().out


# -- broken inputs --------------------------------------------------------------------


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _outside(path: Path) -> None:
    path.symlink_to("../../../../../../proc/version")


BROKEN = {
    # name: (file, what is there, a word of what is said; None: nothing need be said)
    "binary": ("etc/modprobe.d/x.conf", b"\x00\x7fELF\x00\x01options ttm x=1\n", "not a text file"),
    "random bytes": ("etc/modprobe.d/x.conf", bytes(range(1, 256)) * 9, "not UTF-8"),
    "CRLF": ("etc/modprobe.d/x.conf", b"options ttm pages_limit=5\r\n", "Windows line ends"),
    "sparse": ("etc/modprobe.d/x.conf", _sparse, "larger than 1024 KiB"),
    "fifo": ("etc/modprobe.d/x.conf", os.mkfifo, "EINVAL"),
    "directory": ("etc/modprobe.d/x.conf", os.mkdir, "EISDIR"),
    "loop": ("etc/modprobe.d/x.conf", _loop, None),
    "dangling": ("etc/modprobe.d/x.conf", lambda p: p.symlink_to("/nowhere"), None),
    "outside": ("etc/modprobe.d/x.conf", _outside, None),
    "empty": ("etc/modprobe.d/x.conf", b"", None),
    "no value": ("etc/modprobe.d/x.conf", b"options\noptions ttm\noptions ttm =\n", None),
    "endless continuation": ("etc/modprobe.d/x.conf", b"options ttm a=1 \\", None),
    "one long line": ("etc/modprobe.d/x.conf", b"options ttm " + b"a=1 " * 60_000, None),
    "escape": ("etc/modprobe.d/x.conf", b"options amdgpu gttsize=\x1b[2J\n", "\\x1b"),
    "twice": ("etc/modprobe.d/x.conf", b"options ttm pages_limit=1 pages_limit=2\n", "overruled"),
    "no UTF-8": ("proc/cmdline", b"ro \xff\xfe=\xff amd_iommu=pt \xc3\x28\n", "not UTF-8"),
    "NUL": ("proc/cmdline", b"ro amd_iommu=pt\x00\x00\n", "does not know pt"),
    "open quote": ("proc/cmdline", b'ro a="b c amd_iommu=pt\n', None),
    "no command line": ("proc/cmdline", None, "/proc/cmdline is not read"),
    "nearly too long": ("proc/cmdline", b"a=b " * 450, None),
    "grub is a fifo": ("usr/sbin/grub-mkconfig", os.mkfifo, None),
    "no boot id": ("proc/sys/kernel/random/boot_id", None, None),
    "modules.dep": ("lib/modules/7.1.3-test/modules.dep", bytes(range(256)) * 999, None),
    "mounts": ("proc/self/mounts", b"\xff\n\n / \n", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "debian-grub")
    where, what, said = BROKEN[name]
    file = tmp_path / where
    file.unlink(missing_ok=True)
    if isinstance(what, bytes):
        file.write_bytes(what)
    elif what is not None:
        what(file)  # type: ignore[operator]
    assert infertune(tmp_path, "plan", "boot") == 0
    assert infertune(tmp_path, "status") in (0, 1)
    out, err = capsys.readouterr()
    assert "a bug" not in err
    assert "\x1b" not in out + err
    if said:
        assert said in out
    assert infertune(tmp_path, "stage", "size") in (0, 1)
    assert infertune(tmp_path, "undo") == 0


@pytest.mark.parametrize(
    "what", [b"\x00\x01", b"x" * (1 << 20) + b"y", os.mkfifo, lambda p: p.symlink_to("grub2")]
)
def test_a_file_that_must_be_edited_and_cannot(
    what: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "opensuse-grub2-bls")
    file = tmp_path / "etc/kernel/cmdline"
    file.unlink()
    file.write_bytes(what) if isinstance(what, bytes) else what(file)  # type: ignore[operator]
    (tmp_path / "etc/kernel/grub2").write_text("root=1\n")
    before = facts(tmp_path)
    assert infertune(tmp_path, "stage", "kernel") == 3
    err = capsys.readouterr().err
    assert "/etc/kernel/cmdline" in err
    assert "nothing was touched" in err
    assert facts(tmp_path) == before


# -- programs ---------------------------------------------------------------------------


def test_only_programs_of_the_catalogue_are_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a program"):
        find(Root(tmp_path), "sh")
    run = runner(Root("/"), lambda _: None)
    for argv in (["/usr/bin/sh", "-c", "x"], ["/tmp/dracut"], ["dracut"]):
        with pytest.raises(ValueError, match="not a program"):
            run(argv)
    assert "sh" not in PROGRAMS


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[Path]:
    """A file with the number of a process that outlives its test."""
    file = tmp_path / "pid"
    yield file
    os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("ends", [True, False])
def test_a_tool_is_waited_for_and_not_what_it_leaves_running(
    ends: bool, left_behind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "SAY_EVERY_S", 0.2)
    monkeypatch.setattr(commands, "TIMEOUT_S", 60 if ends else 0)
    code = f"echo said; setsid sleep 6000 & echo $! >{left_behind}; {'' if ends else 'sleep 6000'}"
    ran = commands._run(["/bin/sh", "-c", code], lambda _: None)
    assert ran == (
        commands.Ran(0, "said", "said\n") if ends else commands.Ran(-1, "no end after 0 minutes")
    )


def test_what_a_tool_wrote_is_on_the_disk_before_anything_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: flushed.append(True))
    assert commands._run(["/bin/true"], lambda _: None).code == 0
    assert flushed == [True]


def test_a_rebuild_that_outlives_us_keeps_others_out(tmp_path: Path) -> None:
    """Two rebuilds at once would write the same initramfs."""
    root = Root(build(tmp_path / "tree", "debian-grub"))
    file = tmp_path / "pid"

    def killed() -> None:
        with staging.lock(root, "first"):
            code = f"echo $$ >{file}.x; mv {file}.x {file}; exec sleep 6000"
            commands._run(["/bin/sh", "-c", code], lambda _: None)

    pid = os.fork()
    if pid == 0:
        try:
            killed()
        finally:
            os._exit(1)
    while not file.exists():
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(Busy, match=r"busy: first \(pid"), staging.lock(root, "second"):
        pass
    os.kill(int(file.read_text()), signal.SIGKILL)
    while root.lock_owner(staging.LOCK):
        time.sleep(0.05)
    with staging.lock(root, "second"):
        pass


def test_a_profile_cannot_name_a_command_or_a_path() -> None:
    for knob in MACHINE["/etc/infertune/profiles/boot.toml"].splitlines()[1:]:
        assert knob.partition(" =")[0] in PLACES
