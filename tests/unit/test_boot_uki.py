# SPDX-License-Identifier: Apache-2.0
"""Unified kernel images: one is built, tried under another name, and takes the old one's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import boot_makers
from boot_trees import (
    BOOT_ID,
    EFIVARS,
    KERNEL,
    LOADER_GUID,
    PARTITION,
    UKI,
    Facts,
    Tools,
    build,
    facts,
    said,
    secure_boot,
    started,
)
from infertune.base.errors import Failed
from infertune.base.root import Root, Step
from infertune.boot import guard, originals, record, staging
from infertune.boot.change import AT_THE_TRY, Way
from infertune.boot.options import options
from infertune.boot.plan import STACKS, plan
from infertune.boot.stacks.one_shot import ID
from infertune.boot.stacks.uki import DRACUT_DROP_IN, DROP_IN, TRIAL
from infertune.cli.main import main
from infertune.host.machine import read_machine
from infertune.host.modprobe import read_sources
from infertune.host.unknown import Unknown
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import resolve
from support import At, Counter, in_child, kill

WORDS = ("amd_iommu=off", "ttm.pages_limit=25165824")
GIVEN = " ".join(WORDS)
IMAGE = "boot/EFI/Linux/arch-linux.efi"
PRESET = "/etc/mkinitcpio.d/linux.preset"


def way(base: Path) -> Way:
    root = Root(base)
    machine = read_machine(root)
    return STACKS[machine.boot_style].way(root, machine, WORDS)


def lay(base: Path, files: dict[str, str | bytes]) -> Path:
    for path, data in files.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return base


def gone(base: Path, *paths: str) -> None:
    for path in paths:
        (base / path.lstrip("/")).unlink()


@pytest.fixture
def arch(tmp_path: Path) -> Path:
    return build(tmp_path, "arch-uki")


# -- the plan ------------------------------------------------------------------------


def test_one_image_is_built_and_started_once(arch: Path) -> None:
    found = way(arch)
    assert found.one_try == "loader"
    entry, drop_in = found.trial.files
    assert entry.path == f"/boot/loader/entries/{ID}"
    assert f"efi /EFI/Linux/arch-linux.efi{TRIAL}\n" in entry.data.decode()
    line = f"root=UUID=1 rw {' '.join((*WORDS, *AT_THE_TRY))}"
    assert f"options {line}\n" in entry.data.decode()
    assert (drop_in.path, drop_in.data, drop_in.briefly) == (DROP_IN, f"{GIVEN}\n".encode(), True)
    [image] = found.trial.images
    assert (image.path, image.trial) == (f"/{IMAGE}", f"/{IMAGE}{TRIAL}")
    assert not image.trial.endswith(".efi")  # or systemd-boot would find it by itself
    assert image.holds == WORDS
    assert image.build[0] == "/usr/bin/mkinitcpio"
    assert "-P" not in image.build
    assert [each.path for each in found.lasting.files] == [DROP_IN]
    assert not found.lasting.files[0].briefly
    assert (found.lasting.images, found.lasting.commands) == ((), ())
    assert "when the initramfs gives up, the machine reboots by itself" in found.rescue


def test_the_old_image_is_the_default_while_the_tool_writes(arch: Path) -> None:
    [image] = way(arch).trial.images
    assert image.shelter is not None
    assert image.shelter.on == ("/usr/bin/bootctl", "set-default", "infertune-old.efi")
    assert image.shelter.off == ("/usr/bin/bootctl", "set-default", "")
    lay(arch, said(LoaderEntryDefault="arch-linux.efi"))
    [image] = way(arch).trial.images
    assert image.shelter is not None
    assert image.shelter.off[-1] == "arch-linux.efi"


@pytest.mark.parametrize(
    ("preset", "said_"),
    [
        ("default_options='--cmdline /etc/kernel/other'\n", "has a command line of its own: add"),
        ("default_options=--no-cmdline\n", "has a command line of its own: add the words there"),
        ("default_uki=\n", "does not build /boot/EFI/Linux/arch-linux.efi: rebuild it"),
        ("default_uki=/efi/EFI/Linux/other.efi\n", "does not build /boot/EFI/Linux/arch-linux.efi"),
    ],
)
def test_f10_a_preset_that_would_not_take_the_words_is_a_persons(
    preset: str, said_: str, arch: Path
) -> None:
    with (arch / PRESET.lstrip("/")).open("a") as file:
        file.write(preset)
    found = way(arch)
    [told] = found.manual
    assert (found.one_try, bool(found.trial), bool(found.lasting)) == ("nobody", False, False)
    assert PRESET in told
    assert said_ in told
    assert told.endswith(GIVEN)


def test_where_the_command_line_comes_from(arch: Path) -> None:
    lay(arch, {"/etc/kernel/cmdline": "root=UUID=1 rw\n"})
    [told] = way(arch).manual
    assert "/etc/kernel/cmdline and /etc/cmdline.d both exist" in told
    assert f"-U /{IMAGE}" in told
    gone(arch, "/etc/cmdline.d/root.conf")
    [edit] = way(arch).lasting.edits
    assert (edit.path, edit.place) == ("/etc/kernel/cmdline", "cmdline")
    gone(arch, "/etc/kernel/cmdline")
    # mkinitcpio would take /proc/cmdline, which is the trial's.
    [edit] = way(arch).lasting.edits
    assert (edit.path, edit.base) == ("/etc/kernel/cmdline", "root=UUID=1 rw\n")


def test_dracut_has_a_file_of_its_own(arch: Path) -> None:
    gone(arch, PRESET)
    lay(arch, {"/usr/bin/dracut": "", "/etc/dracut.conf.d/uki.conf": "uefi=yes\n"})
    found = way(arch)
    [drop_in] = found.lasting.files
    assert drop_in.path == DRACUT_DROP_IN
    assert f'kernel_cmdline+=" {GIVEN} "\n' in drop_in.data.decode()
    assert found.trial.images[0].build[0] == "/usr/bin/dracut"


def test_with_secure_boot_the_image_has_to_be_signed(arch: Path) -> None:
    lay(arch, secure_boot(on=True))
    [told] = way(arch).manual
    assert "nothing that signs is found here" in told
    lay(arch, {"/usr/lib/initcpio/post/sbctl": ""})
    found = way(arch)
    assert found.one_try == "loader"
    # The stub takes no options from the entry then, so nothing reboots by itself.
    assert "if the machine panics or hangs, reset or power-cycle it once" in found.rescue


def test_an_entry_with_options_of_its_own_is_what_counts(arch: Path) -> None:
    entry = "title Arch\nefi /EFI/Linux/arch-linux.efi\noptions root=UUID=1 rw quiet\n"
    lay(arch, {"/boot/loader/entries/arch.conf": entry, **said(LoaderEntrySelected="arch.conf")})
    found = way(arch)
    assert not found.trial.images
    assert [each.path for each in found.lasting.edits] == ["/boot/loader/entries/arch.conf"]
    lay(arch, {**secure_boot(on=True), "/usr/lib/initcpio/post/sbctl": ""})
    assert way(arch).trial.images


OTHERWISE: dict[str, Callable[[Path], object]] = {
    "the stub tells nothing and the loader does": lambda base: gone(
        base, f"{EFIVARS}/StubImageIdentifier-{LOADER_GUID}"
    ),
    "in another case": lambda base: lay(
        base, said(StubImageIdentifier=r"\EFI\LINUX\ARCH-LINUX.EFI")
    ),
    # Seen in a guest: the copy booted after a power cut while the tool wrote, and was put back.
    "by its copy, which has its own name again": lambda base: lay(
        base,
        said(
            StubImageIdentifier=r"\EFI\Linux\infertune-old.efi",
            LoaderEntrySelected="infertune-old.efi",
        ),
    ),
    "in the boot that tries it": lambda base: lay(
        base,
        said(
            StubImageIdentifier=rf"\EFI\Linux\arch-linux.efi{TRIAL}",
            LoaderEntrySelected=ID,
        ),
    ),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_the_image_that_booted_is_found(how: str, arch: Path) -> None:
    before = way(arch)
    OTHERWISE[how](arch)
    assert way(arch) == before


def test_which_of_many_images_was_booted_by_its_copy(arch: Path) -> None:
    lay(arch, {**said(StubImageIdentifier=r"\EFI\Linux\infertune-old.efi"),
               "/boot/EFI/Linux/another.efi": "x"})  # fmt: skip
    assert way(arch).manual == (f"build an image whose command line also has: {GIVEN}",)
    release = (arch / "proc/sys/kernel/osrelease").read_text().strip()
    (arch / IMAGE).rename(arch / f"boot/EFI/Linux/linux-{release}.efi")
    assert "build an image whose" not in " ".join(way(arch).manual)


def test_an_image_that_is_not_found_is_a_persons(arch: Path) -> None:
    gone(arch, IMAGE)
    assert way(arch).manual == (f"build an image whose command line also has: {GIVEN}",)


# -- started by the firmware ---------------------------------------------------------


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """A machine without a boot loader."""
    build(tmp_path, "uki-kernel-install")
    for name in ("LoaderInfo", "LoaderFeatures", "LoaderEntrySelected"):
        gone(tmp_path, f"{EFIVARS}/{name}-{LOADER_GUID}")
    lay(tmp_path, {"/usr/bin/efibootmgr": "", **started(UKI)})
    links = {f"/dev/disk/by-partuuid/{PARTITION}": "../../nvme0n1p1"}
    links["/sys/class/block/nvme0n1p1"] = "../../devices/x/nvme0n1/nvme0n1p1"
    for link, target in links.items():
        path = tmp_path / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    lay(tmp_path, {"/sys/devices/x/nvme0n1/nvme0n1p1/partition": "1\n"})
    return tmp_path


def test_the_firmware_starts_the_trial_once(firmware: Path) -> None:
    found = way(firmware)
    assert found.one_try == "loader"
    [command] = found.trial.commands
    assert command.argv[0] == "/usr/bin/efibootmgr"
    assert "--bootnext" in command.argv
    assert f"{UKI}{TRIAL}" in command.argv
    assert command.argv[-1] == f"root=UUID=1 ro {' '.join((*WORDS, *AT_THE_TRY))}"
    assert found.trial.images[0].shelter is None
    assert not found.lasting.commands
    assert "the firmware boots what it booted before" in found.rescue


def test_without_a_way_to_start_it_once_it_is_a_persons(firmware: Path) -> None:
    lay(firmware, started(UKI, "root=UUID=1 quiet"))
    [told] = way(firmware).manual
    assert "nothing here boots an image once: keep a copy of /boot/efi/EFI/Linux/" in told
    assert f"add {GIVEN} to /etc/kernel/cmdline" in told
    assert told.endswith(f"/usr/bin/kernel-install add {KERNEL} /boot/vmlinuz-{KERNEL}")
    lay(firmware, started(UKI))
    assert not way(firmware).manual
    gone(firmware, "/usr/bin/efibootmgr")
    assert way(firmware).manual == (told,)
    # systemd-boot from before it sorted as it does now.
    lay(firmware, said(LoaderInfo="systemd-boot 249.11"))
    assert way(firmware).manual == (told,)


# -- staged, kept, put back ------------------------------------------------------------


def stage(base: Path) -> None:
    root = Root(base)
    machine = read_machine(root)
    wanted = resolve(load_profile(root, "boot"), machine)
    found = plan(root, machine, options(root, machine, wanted, read_sources(root))[0])
    with staging.lock(root, "test"):
        staging.stage(root, "boot", found, Tools(base))


def undo(base: Path, tools: Tools | None = None, *, force: bool = False) -> staging.Undone:
    with staging.lock(Root(base), "test"):
        done = staging.undo(Root(base), tools or Tools(base), force=force)
    assert done
    return done


def boot(base: Path, number: int, *, tried: bool) -> str:
    """Another boot, of the trial or of the default; what the guard does at it."""
    lay(base, {BOOT_ID: f"{number:08d}-0000-0000-0000-000000000000\n"})
    boot_makers.bootctl(base, ("bootctl", "set-oneshot", ""))
    state = record.load(Root(base))
    assert state is not None
    line = ["root=UUID=1", "rw"]
    if tried:
        line += [*state.words, *AT_THE_TRY]
        for option in state.options:
            for parameter in (each for each in option.parameters if each.module):
                lay(base, {parameter.path: f"{option.value}\n"})
    lay(base, {"/proc/cmdline": " ".join(line)})
    with staging.lock(Root(base), "boot"):
        return guard.at_start(Root(base), Tools(base)).what


def confirm(base: Path) -> str:
    with staging.lock(Root(base), "confirm"):
        return guard.at_target(Root(base), Tools(base)).what


TREES = {"arch-uki": IMAGE, "uki-kernel-install": f"boot/efi{UKI}".replace("\\", "/")}


@pytest.mark.parametrize("tree", TREES)
def test_the_default_image_is_the_old_one_until_it_is_confirmed(tree: str, tmp_path: Path) -> None:
    path, old = tmp_path / TREES[tree], facts(build(tmp_path, tree))
    trial = path.with_name(path.name + TRIAL)
    before = path.read_bytes()
    stage(tmp_path)
    new = trial.read_bytes()
    assert "isolcpus=2-3" in boot_makers.line_in(trial)
    assert "panic=30" not in boot_makers.line_in(trial)
    assert path.read_bytes() == before
    # What a kernel update builds meanwhile is without the words.
    assert {k: v for k, v in facts(tmp_path).items() if k.startswith("etc")} == {
        k: v for k, v in old.items() if k.startswith("etc")
    }
    assert boot_makers.variable(tmp_path) == ID
    assert boot_makers.variable(tmp_path, default=True) is None
    assert boot(tmp_path, 1, tried=True) == "tried"
    assert path.read_bytes() == before
    assert confirm(tmp_path) == "kept"
    assert path.read_bytes() == new
    assert not trial.exists()
    undo(tmp_path)
    assert facts(tmp_path) == old


def kept(base: Path, tree: str = "arch-uki") -> Path:
    """A machine whose image was built before anybody here did; staged, tried, confirmed."""
    image = build(base, tree) / TREES[tree]
    image.write_bytes(boot_makers.image(boot_makers.line_in(image), KERNEL, "of last year"))
    stage(base)
    assert boot(base, 1, tried=True) == "tried"
    assert confirm(base) == "kept"
    return image


@pytest.mark.parametrize("tree", TREES)
def test_a_kept_image_comes_back_byte_for_byte(tree: str, tmp_path: Path) -> None:
    image = kept(tmp_path, tree)
    tools = Tools(tmp_path)
    done = undo(tmp_path, tools)
    assert (done.left, done.anew, tools.ran) == ((), (), [])
    assert b"of last year" in image.read_bytes()
    assert "isolcpus" not in boot_makers.line_in(image)
    assert not (tmp_path / originals.STORE.lstrip("/")).exists()


@pytest.mark.parametrize("tree", TREES)
def test_a_kept_image_that_was_built_since_is_built_anew_and_said(
    tree: str, tmp_path: Path
) -> None:
    image = kept(tmp_path, tree)
    line = boot_makers.line_in(image)
    image.write_bytes(boot_makers.image(line, KERNEL, "with new microcode"))
    [said] = undo(tmp_path).anew
    assert said == (
        f"/{TREES[tree]} was rebuilt, with other bytes than before: another program has built "
        "it since"
    )
    assert "isolcpus" not in boot_makers.line_in(image)
    assert b"of last year" not in image.read_bytes()


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_undo_says_what_was_built_anew(
    how: list[str], arch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(arch)
    originals.clear(Root(arch))
    monkeypatch.setattr("infertune.cli.boot.runner", lambda root, say: Tools(arch))
    assert main(["--root", str(arch), "boot", "undo", *how]) == 0
    out = capsys.readouterr().out
    said = f"/{IMAGE} was rebuilt, with other bytes than before: its original is not kept"
    if how:
        assert json.loads(out)["anew"] == [said]
    else:
        assert f"note: {said}\n" in out


def test_status_says_what_undo_has(arch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = kept(arch)
    size = (arch / originals.place(f"/{IMAGE}").lstrip("/")).stat().st_size
    main(["--root", str(arch), "boot", "status"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"undo puts back the original of /{IMAGE}, unless another program builds it meanwhile: "
        f"/var/lib/infertune/boot-images/{image.name} (" in said
    )
    main(["--root", str(arch), "boot", "status", "--json"])
    assert json.loads(capsys.readouterr().out)["originals"] == [
        {
            "path": f"/{IMAGE}",
            "kept": True,
            "copy": f"/var/lib/infertune/boot-images/{image.name}",
            "bytes": size,
        }
    ]
    originals.clear(Root(arch))
    main(["--root", str(arch), "boot", "status"])
    assert f"undo rebuilds /{IMAGE}: its original is not kept" in capsys.readouterr().out
    main(["--root", str(arch), "boot", "status", "--json"])
    assert json.loads(capsys.readouterr().out)["originals"] == [
        {"path": f"/{IMAGE}", "kept": False, "copy": None, "bytes": None}
    ]


def test_status_of_what_only_root_may_see(
    arch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(arch)
    copy = originals.place(f"/{IMAGE}")
    hidden = originals.Original(f"/{IMAGE}", copy, Unknown("EACCES: Permission denied"))
    monkeypatch.setattr(originals, "look", lambda root, path: hidden)
    main(["--root", str(arch), "boot", "status"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"not known: whether the original of /{IMAGE} is kept (EACCES" in said
    main(["--root", str(arch), "boot", "status", "--json"])
    assert json.loads(capsys.readouterr().out)["originals"] == [
        {"path": f"/{IMAGE}", "kept": None, "copy": copy, "bytes": None}
    ]


def test_plan_says_where_there_is_no_room_for_an_original(
    arch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "ROOM", 1 << 60)
    assert main(["--root", str(arch), "boot", "plan", "boot", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    [note] = [each for each in notes if "no room" in each]
    assert note.startswith(
        f"no room in /var/lib/infertune/boot-images for the original of /{IMAGE} ("
    )
    assert note.endswith("): once it is confirmed, undo rebuilds it")


def test_what_is_kept_goes_with_its_kernel(arch: Path) -> None:
    kept(arch)
    copy = arch / originals.place(f"/{IMAGE}").lstrip("/")
    assert boot(arch, 2, tried=True) == "nothing"
    assert copy.exists()
    data = (arch / IMAGE).read_bytes()
    gone(arch, IMAGE)
    # Nothing in there: it may not be mounted.
    assert boot(arch, 3, tried=True) == "nothing"
    assert copy.exists()
    lay(arch, {"/boot/EFI/Linux/newer.efi": data})
    assert boot(arch, 4, tried=True) == "nothing"
    assert not copy.parent.exists()


def test_what_is_kept_goes_with_its_record(arch: Path) -> None:
    kept(arch)
    store = arch / originals.STORE.lstrip("/")
    # The tool fails, and what it should have built is forgotten by force.
    line = boot_makers.line_in(arch / IMAGE)
    (arch / IMAGE).write_bytes(boot_makers.image(line, KERNEL, "another"))
    assert undo(arch, Tools(arch, lambda argv: "mkinitcpio" in argv[0]), force=True).left
    assert not store.exists()
    # A record that somebody moved away.
    store.mkdir()
    (store / "of-long-ago.efi").write_bytes(b"x")
    (arch / record.PATH.lstrip("/")).unlink()
    stage(arch)
    assert not store.exists()


def test_killed_while_it_is_kept_or_undone_every_byte_comes_back(tmp_path: Path) -> None:
    """Power cut at each step of confirming, and of the undo after it: undo can be repeated."""

    def ready(*, confirmed: bool) -> Facts:
        shutil.rmtree(tmp_path)
        image = build(tmp_path, "arch-uki") / IMAGE
        image.write_bytes(boot_makers.image("root=UUID=1 rw", KERNEL, "of last year"))
        before = facts(tmp_path)
        stage(tmp_path)
        boot(tmp_path, 1, tried=True)
        if confirmed:
            assert confirm(tmp_path) == "kept"
        return before

    def work(hook: Callable[[Step], int | None], *, undoing: bool) -> None:
        root = Root(tmp_path, hook=hook)
        if undoing:
            staging.undo(root, Tools(tmp_path))
        else:
            guard.at_target(root, Tools(tmp_path))

    for undoing in (False, True):
        ready(confirmed=undoing)
        counter = Counter()
        work(counter, undoing=undoing)
        assert any(originals.STORE in step.path for step in counter.steps)
        for number in range(1, len(counter.steps) + 1):
            before = ready(confirmed=undoing)
            hook = At(number, kill)
            assert in_child(lambda: work(hook, undoing=undoing)) & 127 == 9  # noqa: B023
            # Whatever boots now is whole.
            assert boot_makers.line_in(tmp_path / IMAGE)
            if record.load(Root(tmp_path)):
                undo_or_nothing(tmp_path)
            assert facts(tmp_path) == before, (undoing, number)
            assert not (tmp_path / originals.STORE.lstrip("/")).exists(), (undoing, number)


def undo_or_nothing(base: Path) -> None:
    with staging.lock(Root(base), "test"):
        staging.undo(Root(base), Tools(base))


@pytest.mark.parametrize("tree", TREES)
def test_a_trial_that_hangs(tree: str, tmp_path: Path) -> None:
    before = facts(build(tmp_path, tree))
    stage(tmp_path)
    boot(tmp_path, 1, tried=True)
    assert boot(tmp_path, 2, tried=False) in ("put-back", "reboot")
    assert facts(tmp_path) == before


def test_an_image_that_a_kernel_update_has_built_is_not_replaced(arch: Path) -> None:
    """The trial is of a kernel whose modules may be gone."""
    stage(arch)
    boot(arch, 1, tried=True)
    update = boot_makers.image("root=UUID=1 rw", "7.2.0")
    lay(arch, {IMAGE: update})
    with pytest.raises(Failed, match="was built by another program since"):
        confirm(arch)
    undo(arch)
    assert (arch / IMAGE).read_bytes() == update
    assert not (arch / f"{IMAGE}{TRIAL}").exists()
