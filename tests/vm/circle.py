# SPDX-License-Identifier: Apache-2.0
"""Boot settings on a machine that a boot loader starts: the same circles on each boot stack.

Stage, trial, back by itself or kept, undone: what is looked at is what a person would look at, the
kernel's command line, what ``status`` says, and every byte of /boot, of the ESP and of /etc.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Any

from vm.efi import PANIC, EfiGuest

WORD = "transparent_hugepage=madvise"
PROFILE = "words"
TRIES_ALONE = ("panic=30", "rd.shell=0", "rd.emergency=reboot")
UNBOOTABLE = "rdinit=/nowhere panic=5"
"""No first process: the kernel panics, as one does whose driver takes the machine down."""
HANG = "/usr/local/sbin/hang"
STORE = "/var/lib/infertune/boot-images"

# What changes at every start, whoever does what: GRUB's block, random seeds, and what fsck.fat
# finds on the ESP after a power cut.
_LEFT_OUT = "grubenv|random-seed|boot-secret-mixin|FSCK[0-9]+.REC"
_TREES = f"""
( find /boot /etc -type f -print0 | xargs -0 sha256sum
  find /boot /etc -type l -printf '%l %p\\n'
  find /etc/default /etc/kernel /etc/grub.d /boot -printf '%m %U %G %y %p\\n' 2>/dev/null
) | grep -vE '/({_LEFT_OUT})$' | sort
"""


@dataclass(frozen=True, slots=True)
class Stack:
    """What differs: shell commands for the guest."""

    name: str
    prepare: str
    """Once, in a machine that was never started before."""
    spoil: str
    """Give {words} to what is tried, and to nothing else."""
    rebuild: str
    """Make the entry of release $1 anew, without a new initramfs where that is possible."""
    entry_of: str
    """Print how the kernel of release $1 would be started."""


GRUB = Stack(
    "grub-efi",
    "grub-install --target=x86_64-efi --efi-directory=/boot/efi --removable --no-nvram && "
    "update-grub",
    r"sed -i 's|panic=30.*\"|{words}\"|' /boot/grub/grub.cfg && grep '{words}' /boot/grub/grub.cfg",
    "update-grub",
    'grep -m 1 "linux.*vmlinuz-$1" /boot/grub/grub.cfg',
)
SYSTEMD_BOOT = Stack(
    "systemd-boot",
    "true",
    "sed -i '/^options/s|$| {words}|' /boot/efi/loader/entries/*infertune*",
    "kernel-install add $1 /boot/vmlinuz-$1 /boot/initrd.img-$1",
    'grep ^options /boot/efi/loader/entries/*-"$1"*.conf',
)
UKI = Stack(
    "uki",
    "true",
    "sed -i '/^options/s|$| {words}|' /boot/efi/loader/entries/*infertune*",
    "kernel-install add $1 /boot/vmlinuz-$1",
    "bootctl list --json=short | tr '{' '\\n' | grep -F -- -$1",
)


def trees(guest: EfiGuest) -> list[str]:
    """Every file of /boot, the ESP and /etc with its sum; those we are about with their modes."""
    return guest.sh(_TREES, timeout=300).splitlines()


def same(guest: EfiGuest, before: list[str]) -> None:
    """Raise AssertionError with what differs."""
    now = trees(guest)
    gone, came = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    assert now == before, f"gone: {gone}\ncame: {came}"


def settled(guest: EfiGuest) -> dict[str, Any]:
    """What ``status`` says once the units of this start are done."""
    end = time.monotonic() + 300
    while guest.run("systemctl list-jobs --no-legend infertune-boot-*").out.strip():
        assert time.monotonic() < end
        time.sleep(1)
    found: dict[str, Any] = json.loads(guest.infertune("boot status --json", codes=(0, 1)).out)
    return found


def has_it(command_line: str) -> bool:
    return WORD in command_line.split()


def stage(guest: EfiGuest, more: str = "") -> None:
    done = guest.run(f"infertune boot stage {PROFILE} {more}", timeout=900)
    assert done.code == 0, done
    assert settled(guest)["phase"] == "staged"


def undo(guest: EfiGuest) -> list[str]:
    """Answers with what it says of images that were rebuilt."""
    done = guest.run("infertune boot undo --json", timeout=900)
    assert done.code == 0, done
    assert guest.run(f"ls -A {STORE}").code, "nothing is kept any more"
    anew: list[str] = json.loads(done.out)["anew"]
    return anew


def spoil(guest: EfiGuest, stack: Stack, words: str) -> None:
    guest.sh(stack.spoil.format(words=words) + " && sync")


def panic_comes_back(guest: EfiGuest, stack: Stack) -> None:
    """A kernel that panics in the trial: nobody touches the machine, and it is as it was."""
    before = trees(guest)
    stage(guest)
    spoil(guest, stack, UNBOOTABLE)
    started = len(guest.kernels())
    with guest.timed("trial with a panic, and back"):
        guest.reboot()
        found = settled(guest)
    trial, after, *more = guest.kernels()[started:]
    print(f"trial: ...{trial[-90:]}\nafter: ...{after[-90:]}")
    assert has_it(trial)
    assert UNBOOTABLE in trial
    assert not has_it(after)
    assert not more
    assert guest.console().count(PANIC) == 1
    assert (found["state"], found["phase"]) == ("failed", "failed"), found
    same(guest, before)
    # Nor at the next one.
    guest.reboot()
    assert not has_it(guest.command_line())
    assert settled(guest)["phase"] == "failed"
    same(guest, before)


def hang_needs_one_reset(guest: EfiGuest, stack: Stack) -> None:
    """A kernel that neither panics nor goes on: one press of the reset button."""
    guest.sh(f"printf '#!/bin/sh\\nwhile :; do sleep 1000; done\\n' >{HANG}; chmod +x {HANG}; sync")
    before = trees(guest)
    stage(guest)
    spoil(guest, stack, f"init={HANG}")
    started = len(guest.kernels())
    guest.go_down()
    trial = guest.wait_for_kernel(started + 1)
    assert has_it(trial)
    assert HANG in trial
    time.sleep(40)
    assert len(guest.kernels()) == started + 1
    with guest.timed("after the reset of a trial that hangs"):
        guest.reset()
        found = settled(guest)
    assert not has_it(guest.command_line())
    assert (found["state"], found["phase"]) == ("failed", "failed"), found
    same(guest, before)


def kept_and_undone(guest: EfiGuest, stack: Stack) -> None:
    """A trial that boots is kept, a new kernel has it too, and undone it is as it was.

    Its own entry is made anew meanwhile, as by an update of the same kernel.
    """
    before = trees(guest)
    with guest.timed("stage"):
        stage(guest)
    with guest.timed("trial"):
        guest.reboot()
        found = settled(guest)
    assert has_it(guest.command_line())
    assert (found["state"], found["phase"]) == ("active", "confirmed"), found
    with guest.timed("the boot after it was kept"):
        guest.reboot()
    line = guest.command_line()
    assert has_it(line)
    assert not set(TRIES_ALONE) & set(line.split()), line
    assert settled(guest)["state"] == "active"
    release = guest.read("/proc/sys/kernel/osrelease")
    with guest.timed("a new kernel"):
        newer = new_kernel(guest, release)
    assert_entry_has_it(guest, stack, newer, True)
    remove_kernel(guest, newer)
    guest.sh(stack.rebuild.replace("$1", release), timeout=900)
    guest.reboot()
    assert has_it(guest.command_line())
    assert settled(guest)["state"] == "active"
    with guest.timed("undo"):
        anew = undo(guest)
    print(f"{stack.name}: rebuilt: {anew}")
    # What is newer than the original is rebuilt by the system's own tool.
    assert len(anew) == (stack is UKI)
    assert all(each.endswith("another program has built it since") for each in anew)
    same_but_images(guest, before)
    guest.reboot()
    assert not has_it(guest.command_line())
    assert settled(guest)["state"] == "none"
    same_but_images(guest, before)


def kept_and_undone_exactly(guest: EfiGuest) -> None:
    """A kept image that nobody built since is, once undone, the very one of before."""
    before = trees(guest)
    stage(guest)
    guest.reboot()
    assert has_it(guest.command_line())
    found = settled(guest)
    assert (found["state"], found["phase"]) == ("active", "confirmed"), found
    [original] = found["originals"]
    print(f"kept: {original}")
    assert guest.sh(f"stat -c %s {original['copy']}").strip() == str(original["bytes"])
    [image] = [line for line in before if line.endswith(f"  {original['path']}")]
    assert guest.sh(f"sha256sum {original['copy']}").split()[0] == image.split()[0]
    assert image not in trees(guest), "the default has another image now"
    guest.reboot()
    assert has_it(guest.command_line())
    with guest.timed("undo of a kept image"):
        assert undo(guest) == []
    same(guest, before)
    guest.reboot()
    assert not has_it(guest.command_line())
    assert settled(guest)["state"] == "none"
    same(guest, before)


def kept_with_boot_counting(guest: EfiGuest) -> None:
    """systemd-boot renames the entries of the system at each boot meanwhile, and systemd back."""
    entries = "/boot/efi/loader/entries"
    release = guest.read("/proc/sys/kernel/osrelease")
    [name] = guest.sh(f"cd {entries} && ls").split()
    guest.sh(
        f"rm {entries}/{name} && echo 3 >/etc/kernel/tries && "
        + SYSTEMD_BOOT.rebuild.replace("$1", release),
        timeout=300,
    )
    counted = name.replace(".conf", "+3.conf")
    assert guest.sh(f"ls {entries}").split() == [counted]
    content = guest.read(f"{entries}/{counted}")
    guest.reboot()  # counted, and blessed
    guest.sh(f"mv {entries}/{name} {entries}/{counted} && sync")
    before = trees(guest)
    stage(guest)
    guest.reboot()
    assert has_it(guest.command_line())
    assert settled(guest)["phase"] == "confirmed"
    guest.reboot()
    assert has_it(guest.command_line())
    assert guest.sh(f"ls {entries}").split() == [name]  # blessed, with the words in it
    undo(guest)
    assert guest.read(f"{entries}/{name}") == content
    guest.sh(f"mv {entries}/{name} {entries}/{counted} && sync")
    same(guest, before)
    guest.reboot()
    assert not has_it(guest.command_line())


def new_kernel(guest: EfiGuest, release: str) -> str:
    """The running kernel once more as a newer release.

    It cannot boot, but its entry is made by the hooks that a kernel's package runs.
    """
    version, rest = release.split("+", 1)
    first, last = version.rsplit(".", 1)
    newer = f"{first}.{int(last) + 1}+{rest}"
    guest.sh(
        f"cd /usr/lib/modules && cp -al {release} {newer} && depmod {newer} && "
        f"cp /boot/vmlinuz-{release} /boot/vmlinuz-{newer} && "
        f"linux-run-hooks image postinst {newer} /boot/vmlinuz-{newer} -- configure",
        timeout=900,
    )
    return newer


def remove_kernel(guest: EfiGuest, release: str) -> None:
    guest.sh(
        f"rm -rf /usr/lib/modules/{release} /boot/vmlinuz-{release} /boot/config-{release} && "
        f"linux-run-hooks image postrm {release} /boot/vmlinuz-{release} -- remove",
        timeout=900,
    )


def assert_entry_has_it(guest: EfiGuest, stack: Stack, release: str, wanted: bool) -> None:
    entry = guest.sh(stack.entry_of.replace("$1", release)).replace("\0", "")
    print(f"entry of {release}: ...{entry.strip()[-120:]}")
    assert (WORD in entry or "$infertune_options" in entry) == wanted, entry


def same_but_images(guest: EfiGuest, before: list[str]) -> None:
    """As before, but for an image that the distribution's own hook has rebuilt."""

    def kept(lines: list[str]) -> list[str]:
        return [line for line in lines if not line.endswith(".efi")]

    now = trees(guest)
    assert kept(now) == kept(before), sorted(set(kept(now)) ^ set(kept(before)))


def power_cuts(guest: EfiGuest, stack: Stack, seed: int, *, rounds: int = 10) -> None:
    """At random moments of staging, of keeping and of putting back: it always boots, old or new."""
    chance = random.Random(seed)
    before = trees(guest)
    began = time.monotonic()
    stage(guest)
    stage_s = time.monotonic() - began
    undo(guest)
    same(guest, before)
    began = time.monotonic()
    for number in range(rounds):
        what = ("stage", "stage", "keep", "stage", "put back")[number % 5]
        if what == "stage":
            run_and_cut(guest, f"infertune boot stage {PROFILE}", chance.uniform(0, stage_s))
        else:
            stage(guest, "--confirm-by-hand")
            guest.reboot()
            assert has_it(guest.command_line())
            if what == "keep":
                run_and_cut(guest, "infertune boot confirm", chance.uniform(0, 8))
            else:
                started = len(guest.kernels())
                guest.go_down()
                guest.wait_for_kernel(started + 1)
                time.sleep(chance.uniform(8, 35))  # the guard is at work in there
                guest.power_cut()
        found = settled(guest)
        there = has_it(guest.command_line())
        print(f"{stack.name}: power cut {number} at {what}: {found['phase']}, {there=}")
        if found["phase"] in ("none", "failed", "undone", None):
            assert not there or found["state"] != "active"
        undo(guest)
        same(guest, before)
    guest.reboot()
    assert not has_it(guest.command_line())
    print(f"{stack.name}: {rounds} power cuts in {time.monotonic() - began:.0f} s")


def run_and_cut(guest: EfiGuest, command: str, after_s: float) -> None:
    guest.run(f"nohup {command} >/dev/null 2>&1 </dev/null & sleep {after_s:.2f}", timeout=300)
    guest.power_cut()
