# SPDX-License-Identifier: Apache-2.0
"""A Debian guest that a real boot loader starts, from a disk with GPT, ESP and root.

QEMU knows nothing of the guest's kernel: the firmware (OVMF, Secure Boot off) starts what lies
on the ESP, and its variables persist as a machine's do.  So what a loader does with an entry is
seen, and a kernel that panics or hangs comes back only if something brings it back.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vm import lab
from vm.guest import BOOT_S, Guest

PANIC = "Kernel panic - not syncing"


class EfiGuest(Guest):
    """One virtual machine with firmware and boot loader."""

    base = "disk"
    extras = lab.EFI_EXTRAS
    # One that OVMF has no driver for.  Where there is a network it looks at it at every tick of its
    # timer, and on a busy host that may take it longer than to the next tick: it never goes on.
    card = "vmxnet3"

    def __init__(self, image: Path, stack: str) -> None:
        super().__init__(image, stack)
        self._variables = self.directory / "vars.fd"
        self._earlier = ""

    # -- life -----------------------------------------------------------------------

    def start(self) -> None:
        """Start from a fresh copy of disk and variables; wait for the login."""
        self._earlier = ""
        self.log.unlink(missing_ok=True)
        source = self.image / "vars.fd"
        shutil.copy(source, self._variables)
        super().start()

    def keep(self, directory: Path) -> None:
        """Shut it down, and make its disk and variables the image of other guests."""
        self.shut_down()
        directory.mkdir(parents=True)
        convert = ["qemu-img", "convert", "-O", "raw", str(self._disk), str(directory / "disk")]
        subprocess.run(convert, check=True)
        shutil.copy(self._variables, directory / "vars.fd")
        for name in ("code.fd", "key", "release"):
            shutil.copy(self.image / name, directory / name)

    def stop(self) -> None:
        """End it; the console that is left is that of its whole life, not of the last power on."""
        self._power_off()
        if self.log.exists():
            self.log.write_text(self.console(all_of_it=True))
        super().stop()

    def shut_down(self) -> None:
        self.run("systemctl poweroff")
        assert self._qemu is not None
        self._hang_up()
        self._qemu.wait(BOOT_S)
        self._power_off()

    def restart(self, *, own_initramfs: bool = False) -> None:
        """Shut it down and start it."""
        del own_initramfs  # a boot loader knows no other
        self.shut_down()
        self._power_on()

    def go_down(self) -> None:
        """Let it start itself again, and do not wait for that."""
        self.run("systemctl reboot")
        self._hang_up()

    def come_back(self) -> None:
        """Wait for the login of another boot than the last."""
        self._wait_for_login()

    def power_cut_at(self, moment: Callable[[], object], seconds: float = BOOT_S) -> None:
        """Take the power away as soon as ``moment`` is true, and give it back."""
        end = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < end, "the moment of the power cut did not come"
            time.sleep(0.05)
        self.power_cut()

    def _started(self) -> tuple[str, ...]:
        if self.log.exists():
            self._earlier += self.log.read_text(errors="replace")
        return (
            "m 1024",
            f"drive if=pflash,format=raw,unit=0,readonly=on,file={self.image}/code.fd",
            f"drive if=pflash,format=raw,unit=1,file={self._variables}",
        )

    def _is_lost(self, log: str) -> bool:
        del log
        return False  # a panic is what is tried here

    # -- what it shows ----------------------------------------------------------------

    def console(self, *, all_of_it: bool = False) -> str:
        """What it has printed since the power came back, or since :meth:`start`."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return ((self._earlier if all_of_it else "") + text).replace("\r", "")

    def kernels(self, *, all_of_it: bool = False) -> list[str]:
        """The command lines of the kernels that started, by their own word."""
        return re.findall(r"Kernel command line: (.*)", self.console(all_of_it=all_of_it))

    def wait_for_console(self, pattern: str, seconds: float = BOOT_S, *, since: int = 0) -> None:
        """Until its console shows this, behind the first ``since`` characters."""
        self._wait_for(
            lambda: re.search(pattern, self.console()[since:]),
            seconds,
            f"'{pattern}' on its console",
        )

    def wait_for_kernel(self, number: int, seconds: float = BOOT_S) -> str:
        """The command line of the kernel with that number since power on, from 1."""
        self._wait_for(lambda: len(self.kernels()) >= number, seconds, f"kernel {number}")
        return self.kernels()[number - 1]

    def command_line(self) -> str:
        return self.read("/proc/cmdline")

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Print how long it took."""
        began = time.monotonic()
        yield
        print(f"{self.kernel}: {what}: {time.monotonic() - began:.0f} s")
