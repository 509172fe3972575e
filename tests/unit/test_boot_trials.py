# SPDX-License-Identifier: Apache-2.0
"""What is kept has been seen to work, and what is taken back is taken from wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from boot_trees import BOOT_ID, TREES, Tools, build, facts
from infertune.base.root import Root
from infertune.boot import guard, record, staging
from infertune.boot.change import AT_THE_TRY
from infertune.boot.options import options
from infertune.boot.plan import plan
from infertune.boot.state import is_ready, read_status
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.modprobe import read_sources
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve

WORD = "amd_iommu=off"
CARD = "sys/class/drm/card1/device"


def stage(base: Path, profile: str = "kernel") -> record.Stage:
    root = Root(base)
    machine = read_machine(root)
    wanted = resolve(load_profile(root, profile), machine)
    change = plan(root, machine, options(root, machine, wanted, read_sources(root))[0])
    gpu = machine.inference_gpu
    ready = gpu.pci_id if gpu and is_ready(gpu) else None
    with staging.lock(root, "test"):
        return staging.stage(root, profile, change, Tools(base), gpu=ready)


def undo(base: Path) -> staging.Undone | None:
    with staging.lock(Root(base), "test"):
        return staging.undo(Root(base), Tools(base))


def boot(base: Path, name: str, cmdline: str | None = None) -> tuple[str, str]:
    """What the two units find in another boot."""
    (base / BOOT_ID.lstrip("/")).write_text(f"{name}\n")
    if cmdline is not None:
        (base / "proc/cmdline").write_text(f"{cmdline}\n")
    root = Root(base)
    early = guard.at_start(root, Tools(base)).what
    return early, guard.at_target(root, Tools(base)).what


def with_gpu(base: Path, gtt: int = 62 << 30) -> None:
    card = base / CARD
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "device").write_text("0x1586\n")
    (card / "driver").symlink_to("../../../../bus/pci/drivers/amdgpu")
    (card / "mem_info_gtt_total").write_text(f"{gtt}\n")


# -- F0: confirmed means true ------------------------------------------------------------


def test_f0_a_boot_without_the_options_and_without_a_gpu_confirms_nothing(tmp_path: Path) -> None:
    """The default target is reached behind a black screen, too."""
    build(tmp_path, "debian-grub-btrfs")
    with_gpu(tmp_path)
    before = facts(tmp_path)
    stage(tmp_path, "size")
    for gone in (tmp_path / CARD, tmp_path / "sys/module/ttm"):
        gone.rename(tmp_path / f"gone-{gone.name}")
    assert boot(tmp_path, "black") == ("tried", "open")
    [note] = read_status(Root(tmp_path), read_machine(Root(tmp_path))).notes
    assert "ttm.pages_limit is not in force: its module is not loaded" in note
    assert "the GPU 1002:1586 is not ready" in note
    assert boot(tmp_path, "next")[0] == "put-back"
    assert facts(tmp_path) == before
    assert record.load(Root(tmp_path)).phase == "failed"  # type: ignore[union-attr]


def test_f0_options_in_force_and_a_gpu_that_amdgpu_did_not_bind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "fedora-bls")
    with_gpu(tmp_path)
    before = facts(tmp_path)
    stage(tmp_path)
    (tmp_path / CARD / "driver").unlink()
    assert boot(tmp_path, "trial", f"BOOT_IMAGE=/v ro {WORD}") == ("tried", "open")
    assert main(["--root", str(tmp_path), "boot", "confirm"]) == 2
    assert "the GPU 1002:1586 is not ready: amdgpu did not bind it" in capsys.readouterr().err
    assert boot(tmp_path, "clean", "BOOT_IMAGE=/v ro") == ("put-back", "nothing")
    assert facts(tmp_path) == before


def test_f0_a_size_that_amdgpu_did_not_take(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    with_gpu(tmp_path)
    stage(tmp_path, "size")
    pages = tmp_path / "sys/module/ttm/parameters/pages_limit"
    pages.write_text("25165824\n")
    line = "BOOT_IMAGE=/v ro ttm.pages_limit=25165824"
    assert boot(tmp_path, "trial", line) == ("tried", "open")
    (tmp_path / CARD / "mem_info_gtt_total").write_text(f"{96 << 30}\n")
    assert guard.at_target(Root(tmp_path), Tools(tmp_path)).what == "kept"


def test_f0_a_gpu_that_was_not_there_at_stage_is_not_missed(tmp_path: Path) -> None:
    build(tmp_path, "debian-grub")
    stage(tmp_path)
    assert boot(tmp_path, "trial", f"BOOT_IMAGE=/v ro {WORD}") == ("tried", "kept")


# -- F3: entries do not keep still -------------------------------------------------------

ENTRY = "boot/loader/entries/arch.conf"


def kept(base: Path) -> None:
    """Staged, tried, confirmed: the entries have the word."""
    stage(base)
    line = f"initrd=\\initramfs-linux.img root=UUID=1 rw {WORD} {' '.join(AT_THE_TRY)}"
    assert boot(base, "trial", line) == ("tried", "kept")
    assert WORD in (base / ENTRY).read_text()


@pytest.mark.parametrize("name", ["arch+3.conf", "arch+2-1.conf", "arch+0-3.conf"])
def test_f3_an_entry_that_boot_counting_has_renamed(name: str, tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    before = (tmp_path / ENTRY).read_bytes()
    kept(tmp_path)
    (tmp_path / ENTRY).rename((tmp_path / ENTRY).with_name(name))
    done = undo(tmp_path)
    assert done is not None
    assert done.left == ()
    assert (tmp_path / ENTRY).with_name(name).read_bytes() == before
    assert not (tmp_path / ENTRY).exists()


def test_f3_an_entry_that_went_with_its_kernel(tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    before = facts(tmp_path)
    kept(tmp_path)
    (tmp_path / ENTRY).unlink()
    done = undo(tmp_path)
    assert done is not None
    assert done.left == ()
    del before[ENTRY]
    assert facts(tmp_path) == before


def test_f3_an_entry_that_was_rewritten_without_our_words(tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    kept(tmp_path)
    theirs = "title Arch\nlinux /vmlinuz-linux\noptions root=UUID=1 rw theirs\n"
    (tmp_path / ENTRY).write_text(theirs)
    done = undo(tmp_path)
    assert done is not None
    assert done.left == ()
    assert (tmp_path / ENTRY).read_text() == theirs


@pytest.mark.parametrize("with_trial", [False, True])
def test_f3_an_entry_made_meanwhile_from_the_running_command_line(
    with_trial: bool, tmp_path: Path
) -> None:
    build(tmp_path, "arch-systemd-boot")
    kept(tmp_path)
    given = " ".join((WORD, *AT_THE_TRY) if with_trial else (WORD,))
    made = tmp_path / "boot/loader/entries/arch-zen.conf"
    made.write_text(f"title Zen\noptions root=UUID=1 rw {given}\n")
    undo(tmp_path)
    assert made.read_text() == "title Zen\noptions root=UUID=1 rw\n"


def test_f3_an_entry_made_during_the_trial_keeps_only_what_lasts(tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    stage(tmp_path)
    made = tmp_path / "boot/loader/entries/arch-zen.conf"
    made.write_text(f"title Zen\noptions root=UUID=1 rw {WORD} {' '.join(AT_THE_TRY)}\n")
    assert boot(tmp_path, "trial", f"root=UUID=1 rw {WORD}") == ("tried", "kept")
    assert made.read_text() == f"title Zen\noptions root=UUID=1 rw {WORD}\n"


def test_f3_a_word_that_its_owner_wrote_stays(tmp_path: Path) -> None:
    build(tmp_path, "arch-systemd-boot")
    own = tmp_path / "boot/loader/entries/arch-fallback.conf"
    own.write_text(f"title Arch\noptions root=UUID=1 rw {WORD}\n")
    before = facts(tmp_path)
    kept(tmp_path)
    undo(tmp_path)
    assert facts(tmp_path) == before


# -- F4: what to do at the machine ----------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
def test_f4_whatever_is_written_has_a_way_back_that_is_true(
    tree: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options can only be deleted in a menu where none of them lies in an image."""
    build(tmp_path, tree)
    assert main(["--root", str(tmp_path), "boot", "plan", "boot", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    said, now = document["comes_back"], document["trial"]
    now = now if any(now.values()) else document["lasting"]
    assert bool(said) == any(now.values())
    if any("modprobe.d" in file["path"] for file in now["files"]):
        assert "modprobe.blacklist=amdgpu" in said
    elif now["images"]:
        assert "delete the options" not in said or document["one_try"] == "loader"


# -- F9: a disk that the TPM unlocks --------------------------------------------------------


def test_f9_a_measured_boot_is_refused_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, "debian-grub")
    (tmp_path / "etc/crypttab").write_text("root UUID=1 none luks,tpm2-device=auto\n")
    before = facts(tmp_path)
    assert main(["--root", str(tmp_path), "boot", "plan", "kernel"]) == 0
    assert "/etc/crypttab:1" in capsys.readouterr().out
    assert main(["--root", str(tmp_path), "boot", "stage", "kernel"]) == 2
    err = capsys.readouterr().err
    assert "a disk is unlocked by the TPM" in err
    assert "--force" in err
    assert facts(tmp_path) == before
    assert main(["--root", str(tmp_path), "boot", "stage", "kernel", "--force"]) == 0


# -- F14: who enforces the one try ----------------------------------------------------------

BY_THE_LOADER = {
    *("debian-grub", "fedora-bls", "arch-systemd-boot", "debian-systemd-boot", "arch-uki"),
    *("uki-kernel-install", "pop-os", "cachyos-systemd-boot", "opensuse-systemd-boot", "efistub"),
}


@pytest.mark.parametrize("tree", sorted(BY_THE_LOADER))
def test_f14_the_loader_itself_tries_it_once_and_status_says_so(
    tree: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, tree)
    assert stage(tmp_path).one_try == "loader"
    assert main(["--root", str(tmp_path), "boot", "status"]) == 1
    said = capsys.readouterr().out
    assert "tried once: enforced by the boot loader" in said
    assert "if the kernel does not boot: " in said


def test_a_trial_that_never_got_as_far_as_the_guard(tmp_path: Path) -> None:
    """A panic, a hang and a reset: the loader boots the default, and what is left goes."""
    build(tmp_path, "arch-systemd-boot")
    before = facts(tmp_path)
    stage(tmp_path)
    assert boot(tmp_path, "clean")[0] == "put-back"
    assert facts(tmp_path) == before
    [note] = read_status(Root(tmp_path), read_machine(Root(tmp_path))).notes
    assert "did not get far enough to be counted, or another entry was chosen" in note
