# SPDX-License-Identifier: Apache-2.0
"""What boot loaders do with an entry that is to be tried once; infertune is not on these machines.

What is shown here is what boot/stacks relies on: which entry a loader takes for its default, what
starts an entry once, what is renamed by whom, and that a trial which panics or hangs is followed
by the default.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infertune.boot.stacks.grub import DROP_IN, SCRIPT, grub_script
from vm import circle, lab
from vm.circle import HANG, UNBOOTABLE
from vm.efi import PANIC, EfiGuest

pytestmark = [pytest.mark.quick_on, pytest.mark.timeout(3600)]  # each boot takes a minute

WORD = "infertune.trial"
"""A word that is nothing to any kernel."""
ENTRIES = "/boot/efi/loader/entries"
IMAGES = "/boot/efi/EFI/Linux"
TRIAL = "_-infertune-trial.conf"
"""'_' is passed over when ids are compared, and '-' comes before every letter and number: last."""

# The loader's own order, and what it has started; both in UTF-16 behind four bytes of attributes.
_REPORTED = """
import glob, json
def variable(name):
    [path] = glob.glob(f"/sys/firmware/efi/efivars/{name}-4a67b082-*")
    return open(path, "rb").read()[4:].decode("utf-16").rstrip(chr(0)).split(chr(0))
print(json.dumps([variable("LoaderEntries"), variable("LoaderEntrySelected")[0]]))
"""


@pytest.fixture
def machine() -> Iterator[Callable[[circle.Stack], EfiGuest]]:
    machines: list[EfiGuest] = []

    def get(stack: circle.Stack) -> EfiGuest:
        try:
            guest = EfiGuest(lab.image(stack.name), stack.name)
        except lab.Unavailable as reason:
            pytest.skip(f"no guests here: {reason}")
        machines.append(guest)
        with guest.timed("power on to login"):
            guest.start()
        return guest

    yield get
    for guest in machines:
        guest.stop()


Start = Callable[[circle.Stack], EfiGuest]


def reported(guest: EfiGuest) -> tuple[list[str], str]:
    """What the loader says: the ids of its entries in its order, and the one it has started."""
    order, selected = json.loads(guest.run("python3 -", stdin=_REPORTED.encode()).out)
    return [each for each in order if not each.startswith("auto-")], selected


def listed(guest: EfiGuest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(guest.sh("bootctl list --json=short"))
    return found


def default_of(guest: EfiGuest) -> dict[str, Any]:
    return next(each for each in listed(guest) if each["isDefault"])


def add_trial(guest: EfiGuest, name: str, words: str) -> None:
    """An entry of type 1 that starts what the default starts, with more words; no sort-key."""
    default = default_of(guest)
    if default["type"] == "type2":
        starts = f"efi {default['path'].removeprefix('/boot/efi')}\n"
    else:
        starts = f"linux {default['linux']}\ninitrd {default['initrd'][0]}\n"
    text = f"title trial\n{starts}options {default['options']} {words}\n"
    assert guest.write(f"{ENTRIES}/{name}", text).code == 0


def once(guest: EfiGuest, entry: str) -> None:
    guest.sh(f"bootctl set-oneshot {entry} && sync")


def names(guest: EfiGuest) -> set[str]:
    return set(guest.sh(f"ls {ENTRIES} {IMAGES}").split())


SYSTEMD = pytest.mark.parametrize("stack", [circle.SYSTEMD_BOOT, circle.UKI], ids=lambda s: s.name)


@SYSTEMD
def test_systemd_boot_starts_an_entry_once(machine: Start, stack: circle.Stack) -> None:
    guest = machine(stack)
    default = default_of(guest)["id"]
    add_trial(guest, TRIAL, WORD)
    before = names(guest)
    assert default_of(guest)["id"] == default
    once(guest, TRIAL)
    guest.reboot()
    assert reported(guest) == ([default, TRIAL], TRIAL)
    assert guest.command_line().split()[-1] == WORD
    # Nobody renames what is not counted, and nothing of systemd's minds that it goes at once.
    assert names(guest) == before
    guest.sh(f"rm {ENTRIES}/{TRIAL}")
    guest.reboot()
    assert reported(guest) == ([default], default)
    assert WORD not in guest.command_line()


@SYSTEMD
def test_systemd_boot_goes_on_with_the_default_after_a_panic_or_a_hang(
    machine: Start, stack: circle.Stack
) -> None:
    guest = machine(stack)
    default = default_of(guest)["id"]
    add_trial(guest, TRIAL, f"{WORD} {UNBOOTABLE}")
    once(guest, TRIAL)
    started = len(guest.kernels())
    with guest.timed("a panic, and back"):
        guest.reboot()
    trial, after = guest.kernels()[started:]
    assert trial.endswith(f"{WORD} {UNBOOTABLE}")
    assert WORD not in after
    assert guest.console().count(PANIC) == 1
    assert reported(guest)[1] == default

    guest.sh(f"printf '#!/bin/sh\\nwhile :; do sleep 1000; done\\n' >{HANG}; chmod +x {HANG}")
    add_trial(guest, TRIAL, f"{WORD} init={HANG}")
    once(guest, TRIAL)
    started = len(guest.kernels())
    guest.go_down()
    assert WORD in guest.wait_for_kernel(started + 1)
    time.sleep(40)
    assert len(guest.kernels()) == started + 1
    with guest.timed("after the reset"):
        guest.reset()
    assert WORD not in guest.command_line()
    assert reported(guest)[1] == default


def test_the_trial_is_last_whatever_else_there_is(machine: Start) -> None:
    """Not even entries without a sort-key, as people write them, are behind it."""
    guest = machine(circle.SYSTEMD_BOOT)
    made = f"{ENTRIES}/{default_of(guest)['id']}"
    add_trial(guest, TRIAL, WORD)
    others = ("arch.conf", "a.conf", "0.conf", "Z.conf")
    for other in others:
        guest.sh(f"grep -v ^sort-key {made} >{ENTRIES}/{other}")
    guest.sh(f"rm {made}")
    for text in ("timeout 0\n", "timeout 0\ndefault *\n", "timeout 0\ndefault @saved\n"):
        guest.write("/boot/efi/loader/loader.conf", text)
        once(guest, TRIAL)
        guest.reboot()
        assert reported(guest)[1] == TRIAL
        guest.reboot()
        order, selected = reported(guest)
        assert order[-1] == TRIAL
        assert set(order[:-1]) == {each.lower() for each in others}  # as systemd-boot says them
        assert selected == order[0]
        assert WORD not in guest.command_line()


def test_boot_counting_goes_on_beside_it(machine: Start) -> None:
    guest = machine(circle.SYSTEMD_BOOT)
    name = default_of(guest)["id"]
    add_trial(guest, TRIAL, WORD)
    counted = name.replace(".conf", "+3.conf")
    guest.sh(f"mv {ENTRIES}/{name} {ENTRIES}/{counted}")
    once(guest, TRIAL)
    guest.reboot()
    assert guest.command_line().split()[-1] == WORD
    assert {TRIAL, counted} <= names(guest)
    guest.reboot()
    assert WORD not in guest.command_line()
    assert {TRIAL, name} <= names(guest)  # the default was counted and blessed


def test_why_the_trial_has_no_counter(machine: Start) -> None:
    """One without tries left can be started once, too, but loader and systemd rename it: blessed,
    it sorts like any other and may be the default; and taken away early, systemd has a failed unit.
    """
    guest = machine(circle.SYSTEMD_BOOT)
    made = f"{ENTRIES}/{default_of(guest)['id']}"
    guest.sh(f"grep -v ^sort-key {made} >{ENTRIES}/arch.conf && rm {made}")
    add_trial(guest, "infertune-trial+0.conf", f"{WORD} {UNBOOTABLE}")
    once(guest, "infertune-trial.conf")
    guest.reboot()
    assert "infertune-trial+0-1.conf" in names(guest)
    assert reported(guest) == (["arch.conf", "infertune-trial.conf"], "arch.conf")
    guest.sh(f"rm {ENTRIES}/infertune-trial*")
    add_trial(guest, "infertune-trial+0.conf", WORD)
    once(guest, "infertune-trial.conf")
    guest.reboot()
    assert "infertune-trial.conf" in names(guest)
    guest.reboot()
    assert reported(guest) == (["infertune-trial.conf", "arch.conf"], "infertune-trial.conf")


def test_an_image_of_its_own(machine: Start) -> None:
    """Beside an entry that starts the default's image with other options: an image made anew."""
    guest = machine(circle.UKI)
    default = default_of(guest)["id"]
    release = guest.read("/proc/sys/kernel/osrelease")
    image = TRIAL.replace(".conf", ".efi")
    with guest.timed("ukify"):
        guest.sh(
            f"ukify build --linux=/boot/vmlinuz-{release} --initrd=/boot/initrd.img-{release} "
            f"--uname={release} --os-release='PRETTY_NAME=\"trial\"' "
            f'--cmdline="$(cat /etc/kernel/cmdline) {WORD}" --output={IMAGES}/{image}',
            timeout=300,
        )
    assert default_of(guest)["id"] == default
    once(guest, image)
    guest.reboot()
    assert reported(guest) == ([default, image], image)
    assert guest.command_line().split()[-1] == WORD
    assert {image, default} <= names(guest)
    guest.reboot()
    assert reported(guest)[1] == default
    assert WORD not in guest.command_line()


def test_grub_on_uefi_tries_once(machine: Start) -> None:
    """GRUB's block lies on ext4, and GRUB for UEFI writes it."""
    guest = machine(circle.GRUB)
    guest.sh(circle.GRUB.prepare, timeout=300)
    line = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT \\$infertune_options"\n'
    guest.sh(f"mkdir -p {DROP_IN.rpartition('/')[0]}")
    guest.write(DROP_IN, line)

    def try_once(words: str) -> None:
        guest.write(SCRIPT, grub_script((*words.split(),)).replace("panic=30", "panic=5"))
        guest.sh(
            f"chmod +x {SCRIPT} && update-grub && grub-editenv - set infertune_boot=staged && sync",
            timeout=300,
        )

    try_once(WORD)
    guest.reboot()
    assert WORD in guest.command_line().split()
    assert "infertune_boot=tried" in guest.sh("grub-editenv - list")
    guest.reboot()
    assert WORD not in guest.command_line()

    try_once(f"{WORD} rdinit=/nowhere")
    started = len(guest.kernels())
    with guest.timed("a panic, and back"):
        guest.reboot()
    trial, after = guest.kernels()[started:]
    assert WORD in trial
    assert WORD not in after
    assert guest.console().count(PANIC) == 1

    guest.sh(f"printf '#!/bin/sh\\nwhile :; do sleep 1000; done\\n' >{HANG}; chmod +x {HANG}")
    try_once(f"{WORD} init={HANG}")
    started = len(guest.kernels())
    guest.go_down()
    assert WORD in guest.wait_for_kernel(started + 1)
    time.sleep(40)
    assert len(guest.kernels()) == started + 1
    with guest.timed("after the reset"):
        guest.reset()
    assert WORD not in guest.command_line()
