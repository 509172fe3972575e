# SPDX-License-Identifier: Apache-2.0
"""Boot settings on a stock kernel: tried at a real start, kept or put back by the units.

QEMU starts the guest's kernel itself, so no boot loader is in play: what is shown here is
modprobe.d, the initramfs, the record on disk and the guard.  The command line is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vm.conftest import OURS, STATE
from vm.guest import Guest

pytestmark = pytest.mark.quick_on  # each start of a guest takes a minute, and these need several

PROFILE = "/etc/infertune/profiles/size.toml"
LIMIT = "/sys/module/ttm/parameters/pages_limit"
POOL = "/sys/module/ttm/parameters/page_pool_size"
DROP_IN = "/etc/modprobe.d/zz-infertune.conf"
PAGES = "78643"
"""0.3 GiB: both guests have that and a reserve."""

FILES = (
    "find /etc/modprobe.d /etc/default /etc/initramfs-tools /etc/kernel "
    "-exec stat -c '%n %F %a %u %g %s' {} + -type f -exec sha256sum {} + | sort"
)


@pytest.fixture(scope="module")
def machine(guest: Guest) -> Iterator[Guest]:
    """A guest that loads TTM at its start, with the units installed; afterwards as it was."""
    files = guest.sh(OURS)
    guest.infertune("setup")
    guest.sh("echo ttm >/etc/modules-load.d/ttm.conf && modprobe ttm")
    guest.sh(f"mkdir -p {PROFILE.rpartition('/')[0]}")
    size = f'[boot]\nttm.pages_limit = "{int(PAGES) * 4}KiB"\n'
    assert guest.write(PROFILE, size + 'ttm.page_pool_size = "4MiB"\n').code == 0
    guest.sh("sync")
    yield guest
    guest.infertune("boot undo")
    guest.infertune("setup --remove")
    guest.sh(f"rm -rf {STATE} /etc/infertune /etc/modules-load.d/ttm.conf /boot/*")
    guest.sh("sed -i '/^ttm$/d' /etc/initramfs-tools/modules")
    guest.restart()
    assert guest.sh(OURS) == files


def status(guest: Guest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(guest.infertune("boot status --json", codes=(0, 1)).out)
    return found


def settled(guest: Guest) -> dict[str, Any]:
    """What is said once the units of this start are done."""
    end = time.monotonic() + 120
    while guest.run("systemctl list-jobs --no-legend infertune-boot-*").out.strip():
        assert time.monotonic() < end
        time.sleep(1)
    return status(guest)


@pytest.mark.timeout(3600)  # each start may take minutes
def test_tried_kept_and_put_back(machine: Guest) -> None:
    guest = machine
    units = "infertune-boot-guard.service infertune-boot-confirm.service"
    verify = guest.run(f"systemd-analyze verify --man=no {units}")
    assert (verify.code, verify.out, verify.err) == (0, "", "")
    before, default = guest.sh(FILES), guest.read(LIMIT)
    assert default != PAGES

    # Staged, tried, confirmed by the units.
    guest.infertune("boot stage size")
    assert {each["state"] for each in status(guest)["options"]} == {"pending-reboot"}
    assert guest.write(LIMIT, PAGES).code == 0
    assert {each["state"] for each in status(guest)["options"]} == {"pending-reboot"}
    guest.reboot()
    found = settled(guest)
    assert (found["state"], found["phase"]) == ("active", "confirmed"), found
    assert (guest.read(LIMIT), guest.read(POOL)) == (PAGES, "1024")

    # Undone: the files at once, the values at the next start.
    guest.infertune("boot undo")
    assert guest.sh(FILES) == before
    guest.reboot()
    assert guest.read(LIMIT) == default
    assert settled(guest)["state"] == "none"


@pytest.mark.timeout(3600)
def test_what_nobody_confirms_is_put_back(machine: Guest) -> None:
    """The start after the one that tried it has the old settings, by itself."""
    guest = machine
    before, default = guest.sh(FILES), guest.read(LIMIT)
    guest.infertune("boot stage size --confirm-by-hand")
    guest.reboot()
    assert settled(guest)["phase"] == "trying"
    assert guest.read(LIMIT) == PAGES
    boots = int(guest.sh("journalctl --list-boots | wc -l"))
    guest.reboot(until=f"grep -qx {default} {LIMIT}")
    found = settled(guest)
    assert (found["state"], found["phase"]) == ("failed", "failed"), found
    assert "was not confirmed" in found["notes"][0]
    assert guest.sh(FILES) == before
    # The one that puts it back, and one more where the kernel had it by then: no boot loop.
    more = int(guest.sh("journalctl --list-boots | wc -l")) - boots
    print(f"boots until it is back: {more}")
    assert more in (1, 2)


@pytest.mark.timeout(3600)
def test_a_later_file_is_named(machine: Guest) -> None:
    guest = machine
    before = guest.sh(FILES)
    guest.sh("echo options ttm pages_limit=77777 >/etc/modprobe.d/zzz.conf")
    guest.infertune("boot stage size")
    guest.reboot()
    found = settled(guest)
    assert found["state"] == "overridden"
    assert "/etc/modprobe.d/zzz.conf:1 says 77777 and wins" in str(found["options"])
    assert guest.read(LIMIT) == "77777"
    guest.sh("rm /etc/modprobe.d/zzz.conf")
    guest.infertune("boot undo")
    assert guest.sh(FILES) == before


@pytest.mark.timeout(3600)
def test_power_cut_while_staging_and_undoing(machine: Guest) -> None:
    guest = machine
    before = guest.sh(FILES)
    drop_in = "# Written by infertune; 'infertune boot undo' puts back what was here before.\n"
    drop_in += f"options ttm pages_limit={PAGES} page_pool_size=1024"
    record = "/var/lib/infertune/boot"
    moments = (
        f"[ -e {record} ]",
        f"[ -e {DROP_IN} ]",
        f'grep -qs \'"phase":"staged"\' {record}',
    )
    for moment in moments * 4:
        guest.run(
            f"infertune boot stage size >/dev/null 2>&1 & until {moment}; do :; done", timeout=300
        )
        guest.power_cut()
        found = settled(guest)
        there = guest.run(f"cat {DROP_IN}").out.rstrip("\n")
        assert there in ("", drop_in), there
        # Either it was staged, and this start has it, or there is nothing of it.
        assert (found["phase"] == "confirmed") == (there == drop_in), found
        assert (guest.read(LIMIT) == PAGES) == (there == drop_in)
        print(f"power cut at {moment}: {found['phase']}")
        guest.infertune("boot undo")
        assert guest.sh(FILES) == before


@pytest.mark.timeout(3600)
def test_the_initramfs_has_it(machine: Guest) -> None:
    """Where the driver lies in the initramfs, the copy of modprobe.d in there is what counts."""
    guest = machine
    release = guest.read("/proc/sys/kernel/osrelease")
    guest.sh("echo ttm >>/etc/initramfs-tools/modules && rm /etc/modules-load.d/ttm.conf")
    # Kernels are found by their image in /boot, of which the lab's guests have none.
    guest.sh(f"touch /boot/vmlinuz-{release}")
    guest.sh(f"update-initramfs -c -k {release}", timeout=900)
    guest.restart(own_initramfs=True)
    default = guest.read(LIMIT)
    before = guest.sh(FILES)
    assert guest.run("infertune boot stage size", timeout=900).code == 0
    assert f"pages_limit={PAGES}" in guest.sh(
        f"cd /tmp && unmkinitramfs /boot/initrd.img-{release} x && "
        "cat $(find x -name zz-infertune.conf)"
    )
    guest.restart(own_initramfs=True)
    assert guest.read(LIMIT) == PAGES
    assert settled(guest)["phase"] == "confirmed"
    assert guest.run("infertune boot undo", timeout=900).code == 0
    assert guest.sh(FILES) == before
    guest.restart(own_initramfs=True)
    assert guest.read(LIMIT) == default
