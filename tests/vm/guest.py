# SPDX-License-Identifier: Apache-2.0
"""A Debian guest with systemd as its first process, on a stock kernel, under QEMU.

KVM is used only where the processor virtualises: /dev/kvm alone says nothing (it may lead
to a hypervisor that runs no stock kernel).  Otherwise QEMU emulates, which is some ten times
slower: no time measured in a guest means anything.

Each guest writes to an overlay of its own.  The disk is honest: what the guest has flushed
is in the host's file, what it has not may be lost in a :meth:`Guest.power_cut`, even if the
write itself was acknowledged, because QEMU holds the map of the overlay in memory until the
guest asks for a flush.  A :meth:`Guest.reset` loses only the guest's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from infertune.catalogue.knobs import KNOBS
from vm import lab

QEMU = "qemu-system-x86_64"
COMMAND_LINE = (
    "console=ttyS0 quiet systemd.show_status=0 net.ifnames=0 audit=0 mitigations=off "
    "no_timer_check tsc=reliable"
)

SETTINGS = sorted(
    {
        path.format(gpu="/sys/class/drm/card*/device", ttm="/sys/module/ttm")
        for knob in KNOBS.values()
        for path in knob.paths
        if not knob.while_open
    }
    | {"/proc/sys/vm/*"}
)

# Runs in the guest.  Left out is what the kernel computes from the memory that is free at boot.
_READ = """
import glob, json
def read(path):
    try:
        return open(path).read()
    except OSError:
        return None
print(json.dumps({path: read(path) for each in patterns for path in glob.glob(each)
                  if not path.endswith(("user_reserve_kbytes", "admin_reserve_kbytes"))}))
"""

STATE = "/run/infertune /var/lib/infertune /var/lib/private/infertune"
"""What infertune keeps about a machine, which `setup --remove` leaves."""

SSH_FAILED = 255
BOOT_S = 600
"""Longest time to a login.  On two quiet cores it takes 20 s, on busy ones minutes."""

MEMORY = {
    "6.12": (  # two NUMA nodes
        "m 2048",
        "object memory-backend-ram,id=m0,size=1G",
        "object memory-backend-ram,id=m1,size=1G",
        "numa node,cpus=0,memdev=m0",
        "numa node,cpus=1,memdev=m1",
    ),
    "7.x": ("m 1024",),  # little memory, for tests of what happens when it runs out
}


class Done(NamedTuple):
    """How a command in the guest ended."""

    code: int
    out: str
    err: str


class Guest:
    """One virtual machine.  Start it with :meth:`start`, and :meth:`stop` it whatever happens."""

    base = "disk.ext4"
    """The file in the image that the guest's own disk is an overlay of."""
    extras = lab.EXTRAS
    """Of infertune, whose dependencies are in the image."""
    card = "virtio-net-pci"
    """The network card, as QEMU calls it."""

    def __init__(self, image: Path, kernel: str) -> None:
        self.kernel = kernel
        self.image = image
        # Short, because the path of a socket may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="infertune-guest-"))
        self.log = self.directory / "console"
        self._disk = self.directory / "disk.qcow2"
        self._initrd: Path | None = None
        self._qemu: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._boot_id = ""

    # -- life -----------------------------------------------------------------------

    def start(self) -> None:
        """Start from a fresh copy of the image and wait for the login.  Raises TimeoutError."""
        self._disk.unlink(missing_ok=True)
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"]
        command += ["-b", str(self.image / self.base), str(self._disk)]
        subprocess.run(command, check=True)
        self._power_on()

    def reset(self) -> None:
        """Press the reset button: memory is lost, the disk is as the guest last wrote it."""
        self._hang_up()
        self._qmp("system_reset")
        self._wait_for_login()

    def reboot(self, until: str = "true") -> None:
        """Let the guest start itself again; QEMU hands it the same kernel and initramfs.

        ``until`` is a command that succeeds in the boot to wait for, where there may be several.
        """

        def is_there() -> bool:
            with contextlib.suppress(subprocess.TimeoutExpired):
                booted = f"[ $(cat /proc/sys/kernel/random/boot_id) != {self._boot_id.strip()} ]"
                if self._ssh(f"{booted} && {until}", "root", 60).code == 0:
                    return True
            self._hang_up()
            return False

        self.run("systemctl reboot")
        self._hang_up()
        self._wait_for(is_there, BOOT_S, "reboot")
        self._wait_for_login()

    def restart(self, *, own_initramfs: bool = False) -> None:
        """Shut it down and start it, with the initramfs that the guest itself has built or ours.

        QEMU starts the kernel, not a boot loader on the guest's disk: what a boot loader would
        have read from there is fetched.
        """
        self._initrd = None
        if own_initramfs:
            release = self.read("/proc/sys/kernel/osrelease")
            built = [*self._ssh_to("root"), f"sync && cat /boot/initrd.img-{release}"]
            self._initrd = self.directory / "initrd"
            with self._initrd.open("wb") as file:
                subprocess.run(built, stdout=file, check=True, timeout=300)
        self.run("systemctl poweroff")
        assert self._qemu is not None
        self._hang_up()
        self._qemu.wait(BOOT_S)
        self._power_off()
        self._power_on()

    def power_cut(self) -> None:
        """Take the power away and give it back: what was not flushed may be lost."""
        self._power_off()
        self._power_on()

    def stop(self) -> None:
        """End it and remove all of it but its console.  Never raises for what is gone already."""
        self._power_off()
        if self.log.exists():
            shutil.copy(self.log, self.image.parent / f"console-{self.kernel}")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _started(self) -> tuple[str, ...]:
        """QEMU's options for memory and what it starts."""
        kernel = self.image / self.kernel
        return (
            *MEMORY[self.kernel],
            f"kernel {kernel}/vmlinuz",
            f"initrd {self._initrd or kernel / 'initrd'}",
            # Ours finds the disk by itself; one of initramfs-tools is told.
            f"append {COMMAND_LINE}{' root=/dev/vda rw' if self._initrd else ''}",
        )

    def _power_on(self, *, wait: bool = True) -> None:
        options = (
            _accelerator(),
            "machine q35",
            "cpu max",
            "smp 2",
            *self._started(),
            "display none",
            f"drive file={self._disk},if=virtio,format=qcow2,cache=writeback",
            "netdev user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
            f"device {self.card},netdev=net,romfile=",
            "device virtio-rng-pci",
            f"serial file:{self.log}",
            f"qmp unix:{self.directory}/qmp,server=on,wait=off",
        )
        words = [word for option in options for word in f"-{option}".split(" ", 1)]
        with (self.directory / "qemu.err").open("wb") as errors:
            self._qemu = subprocess.Popen(
                # A test process that is killed takes its guests along.
                ["setpriv", "--pdeathsig", "KILL", "--", QEMU, "-nodefaults", *words],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        self._wait_for(lambda: (self.directory / "qmp").is_socket(), 30, "QEMU")
        forwards = self._qmp("human-monitor-command", **{"command-line": "info usernet"})
        found = re.search(r"HOST_FORWARD\]\s+\S+\s+127\.0\.0\.1\s+(\d+)", forwards)
        assert found, forwards
        self._port = int(found[1])
        if wait:
            self._wait_for_login()

    def _power_off(self) -> None:
        self._hang_up()
        if self._qemu:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "qmp").unlink()

    def _wait_for_login(self) -> None:
        """Until another boot than the last has finished starting its units."""

        def is_up() -> bool:
            done = self._ssh("cat /proc/sys/kernel/random/boot_id", "root", 60)
            if done.code or done.out == self._boot_id:
                self._hang_up()
                return False
            self._boot_id = done.out
            return True

        self._wait_for(is_up, BOOT_S, "login")
        state = self.run("systemctl is-system-running --wait", timeout=BOOT_S).out.strip()
        if state != "running":
            failed = self.run("systemctl --failed --no-legend").out
            raise AssertionError(f"the guest is {state}: {failed}")

    def _wait_for(self, condition: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            log = self._console()
            assert self._qemu is not None
            if self._qemu.poll() is not None:
                raise AssertionError(f"QEMU ended: {(self.directory / 'qemu.err').read_text()}")
            if self._is_lost(log) or time.monotonic() > end:
                raise TimeoutError(f"{self.kernel}: no {what} within {seconds} s\n{log}")
            time.sleep(0.2)

    def _is_lost(self, log: str) -> bool:
        """Whether the machine will not come up any more, by the end of its console."""
        return "Kernel panic" in log

    def _console(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    # -- talking to it --------------------------------------------------------------

    def run(
        self, command: str, *, user: str = "root", stdin: bytes = b"", timeout: float = 120
    ) -> Done:
        """Run a shell command; TimeoutExpired if it lasts longer than ``timeout`` seconds.

        ``user`` may also be ``user``, who has no privilege.
        """
        return self._ssh(command, user, timeout, stdin)

    def sh(self, command: str, *, timeout: float = 120) -> str:
        """What a shell command that must succeed prints, as root."""
        done = self.run(command, timeout=timeout)
        assert done.code == 0, f"{command}: exit code {done.code}\n{done.out}{done.err}"
        return done.out

    def read(self, path: str) -> str:
        """A file as text, without the newline at its end."""
        return self.sh(f"cat {shlex.quote(path)}").rstrip("\n")

    def write(self, path: str, data: str | bytes) -> Done:
        """Store ``data`` in a file with one write, as the kernel's files want it."""
        raw = data.encode() if isinstance(data, str) else data
        quoted = shlex.quote(path)
        return self.run(f"dd of={quoted} bs=16M iflag=fullblock status=none", stdin=raw)

    def infertune(self, words: str, *, codes: tuple[int, ...] = (0,)) -> Done:
        """Run ``infertune WORDS`` as root; its exit code must be one of ``codes``."""
        done = self.run(f"infertune {words}")
        assert done.code in codes, f"infertune {words}: {done}"
        return done

    def settings(self) -> dict[str, str | None]:
        """What the kernel's files say that infertune may change, and their neighbours in vm."""
        answer = self.run("python3 -", stdin=f"patterns = {SETTINGS}\n{_READ}".encode())
        found: dict[str, str | None] = json.loads(answer.out)
        return found

    def install(self, wheel: Path) -> None:
        """Install infertune from its wheel; what it needs is in the image (image/dependencies).

        Unpacking that on an emulated processor would take minutes.  test_package.py and
        test_ansible.py install all of it.
        """
        self.put(wheel, "/root")
        venv = "/usr/lib/infertune"
        self.sh(
            f"mv /opt/dependencies {venv} && pip -q --python {venv}/bin/python install"
            f" --root-user-action=ignore --no-index '/root/{wheel.name}[{self.extras}]'"
            f" && ln -s {venv}/bin/infertune {venv}/bin/infertuned /usr/local/bin/"
            f" && rm /root/{wheel.name} && sync",
            timeout=BOOT_S,
        )

    def put(self, source: Path, directory: str) -> None:
        """Copy a file or a directory into ``directory`` of the guest."""
        pack = ["tar", "-C", str(source.parent), "-c", source.name]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
            assert tar.stdout
            quoted = shlex.quote(directory)
            unpack = f"mkdir -p {quoted} && tar --no-same-owner -C {quoted} -x"
            command = [*self._ssh_to("root"), unpack]
            subprocess.run(command, stdin=tar.stdout, check=True, timeout=300)

    def _ssh(self, command: str, user: str, timeout: float, stdin: bytes = b"") -> Done:
        done = subprocess.run(
            [*self._ssh_to(user), command],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        errors = done.stderr.decode(errors="replace")
        if done.returncode == SSH_FAILED:
            errors += f"\nThe end of the guest's console:\n{self._console()}"
        return Done(done.returncode, done.stdout.decode(), errors)

    def _ssh_to(self, user: str, *words: str) -> list[str]:
        options = {
            "IdentityFile": self.image / "key",
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "BatchMode": "yes",
            "ConnectTimeout": 15,
            "ServerAliveInterval": 30,
            "ControlMaster": "auto",
            "ControlPath": self.directory / "ssh-%r",
            "ControlPersist": "yes",
        }
        given = [f"-o{name}={value}" for name, value in options.items()]
        return ["ssh", "-F", "none", *given, *words, "-p", str(self._port), f"{user}@127.0.0.1"]

    def _hang_up(self) -> None:
        """Close the connections that are kept open for the next command."""
        for control in self.directory.glob("ssh-*"):
            command = self._ssh_to(control.name.removeprefix("ssh-"), "-O", "exit")
            subprocess.run(command, capture_output=True, check=False)

    def _qmp(self, command: str, **arguments: str) -> Any:
        """One command of QEMU's machine protocol; its result."""
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as stream:
            connection.connect(str(self.directory / "qmp"))
            json.loads(stream.readline())
            request = {"execute": command, "arguments": arguments}
            for each in ({"execute": "qmp_capabilities"}, request):
                stream.write(json.dumps(each))
                stream.flush()
                answer: dict[str, Any] = {}
                while "return" not in answer:  # events may come in between
                    answer = json.loads(stream.readline())
                    assert "error" not in answer, answer
            return answer["return"]


def _accelerator() -> str:
    flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    virtualises = flags and {"svm", "vmx"} & set(flags[1].split())
    if virtualises and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "accel kvm"
    # One thread for both processors.  With one for each, QEMU 7.2 may run code that another
    # processor has just patched (a static key), and the guest dies of a stray int3.
    return "accel tcg,thread=single,tb-size=512"
