# SPDX-License-Identifier: Apache-2.0
"""Debian's GRUB itself, started by QEMU's BIOS: it tries options once and drops them.

GRUB runs what our /etc/grub.d script prints, then either shows what an entry would be started with
and switches off, or starts a stock kernel.  Its environment block lies on a disk of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infertune.boot.change import AT_THE_TRY
from infertune.boot.stacks.grub import grub_script
from vm.guest import QEMU

WORDS = ("amd_iommu=off", "isolcpus=2-3")
UNBOOTABLE = ("rdinit=/nowhere",)
"""No first process and no root: the kernel panics, which by default it does for ever."""
MODULES = "biosdisk ext2 normal configfile loadenv serial terminal test echo halt linux"
EARLY = """
serial --unit=0 --speed=115200
terminal_output serial
set root=(hd1)
set prefix=(hd1){prefix}
configfile {prefix}/grub.cfg
"""
# Debian's 00_header loads the block first, and its 10_linux copies our variable into the entry.
CONFIG = """load_env
{script}
menuentry one {{
  {entry}
}}
set timeout=0
"""
# A line for each word: GRUB breaks lines after 80 columns.
SHOW = 'for word in quiet $infertune_options; do echo "GIVEN[$word]"; done; halt'
BOOT = "linux /vmlinuz console=ttyS0 $infertune_options; initrd /initrd"


class Grub:
    """A machine that has nothing but GRUB."""

    def __init__(
        self, directory: Path, tools: Path, words: tuple[str, ...], entry: str, *files: Path
    ) -> None:
        self.directory = directory
        self._tools = tools / "usr" / "bin"
        modules = tools / "usr" / "lib" / "grub" / "i386-pc"
        boot = directory / "tree" / "boot" / "grub"
        boot.parent.mkdir(parents=True)
        shutil.copytree(modules, boot / "i386-pc")
        script = directory / "01_infertune"
        script.write_text(grub_script(words))
        for file in files:
            shutil.copy(file, directory / "tree")
        printed = subprocess.run(["sh", script], capture_output=True, text=True, check=True)
        (boot / "grub.cfg").write_text(CONFIG.format(script=printed.stdout, entry=entry))
        self.tool("grub-script-check", boot / "grub.cfg")
        self._environment = boot / "grubenv"
        self.tool("grub-editenv", self._environment, "create")
        boot_disk(tools, directory / "hd0", "/boot/grub")

    def tool(self, name: str, *words: str | Path) -> None:
        subprocess.run([self._tools / name, *words], check=True)

    def set(self, value: str) -> None:
        """A new disk whose environment block says so, as grub-editenv would have written it."""
        self.tool("grub-editenv", self._environment, "set", f"infertune_boot={value}")
        file_system(self.directory / "tree", self.directory / "hd1")

    def start(self) -> str:
        """What the entry is started with."""
        text = self.run(lambda _: False)
        return " ".join(re.findall(r"GIVEN\[(.*?)\]", text))

    def run(self, until: Callable[[str], object], seconds: int = 300) -> str:
        """What the machine prints until that is so, or it has switched itself off."""
        drives = [
            word
            for number in (0, 1)
            for word in (
                "-drive",
                f"file={self.directory}/hd{number},format=raw,if=ide,index={number}",
            )
        ]
        serial = self.directory / "serial"
        options = f"-machine pc -accel tcg -m 512 -nodefaults -display none -serial file:{serial}"
        serial.unlink(missing_ok=True)
        end = time.monotonic() + seconds
        # A test process that is killed takes it along.
        command = ["setpriv", "--pdeathsig", "KILL", "--", QEMU, *options.split(), *drives]
        with subprocess.Popen(command) as qemu:
            try:
                while qemu.poll() is None:
                    if until(_text(serial)):
                        break
                    assert time.monotonic() < end, _text(serial)[-3000:]
                    time.sleep(0.5)
            finally:
                qemu.kill()
        return _text(serial)


def boot_disk(tools: Path, disk: Path, prefix: str) -> None:
    """A disk with GRUB in its first sectors; the rest of it is on the second disk."""
    modules = tools / "usr" / "lib" / "grub" / "i386-pc"
    early, core = disk.with_name("early.cfg"), disk.with_name("core")
    early.write_text(EARLY.format(prefix=prefix))
    options = f"-d {modules} -O i386-pc -p (hd1){prefix} -c {early} -o {core} {MODULES}"
    subprocess.run([tools / "usr" / "bin" / "grub-mkimage", *options.split()], check=True)
    data = (modules / "boot.img").read_bytes() + core.read_bytes()
    disk.write_bytes(data.ljust(2 << 20, b"\0"))


def file_system(tree: Path, disk: Path) -> None:
    """A new disk that holds the files of a directory."""
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    make: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-d", tree, disk]
    subprocess.run(make, env={**os.environ, "PATH": path}, check=True)


def _text(serial: Path) -> str:
    if not serial.exists():
        return ""
    return serial.read_text(errors="replace").replace("\r", "")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grub")
    for tool in (QEMU, "apt-get", "dpkg-deb", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"not installed: {tool}")
    packages = ("grub-common", "grub-pc-bin")
    fetch = ["apt-get", "-qq", "download", *packages]
    if subprocess.run(fetch, cwd=directory, capture_output=True, check=False).returncode:
        pytest.skip("Debian's GRUB cannot be fetched")
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, directory / "tools"], check=True)
    return directory / "tools"


def test_grub_tries_once(tools: Path, tmp_path: Path) -> None:
    grub = Grub(tmp_path / "machine", tools, WORDS, SHOW)
    words = " ".join(("quiet", *WORDS))
    grub.set("staged")
    tried = " ".join((words, *AT_THE_TRY))
    assert [grub.start() for _ in range(3)] == [tried, "quiet", "quiet"]
    grub.set("confirmed")
    assert [grub.start() for _ in range(2)] == [words, words]
    grub.set("")
    assert grub.start() == "quiet"


@pytest.mark.quick_on
def test_an_option_with_which_no_kernel_starts_is_gone_at_the_second_start(
    tools: Path, image: Path, tmp_path: Path
) -> None:
    """Nobody touches the machine: it is switched on once, and comes up without the option."""
    kernel = image / "6.12"
    grub = Grub(
        tmp_path / "machine", tools, UNBOOTABLE, BOOT, kernel / "vmlinuz", kernel / "initrd"
    )
    grub.set("staged")
    text = grub.run(lambda text: "Run /init as init process" in text, 900)
    first, second = re.findall(r"Kernel command line: (.*)", text)
    assert first.split()[-4:] == [*UNBOOTABLE, *AT_THE_TRY]
    assert second.split()[-1] == "console=ttyS0"
    panicked, again = text.index("Kernel panic"), text.index("Rebooting in 30 seconds")
    assert text.index(first) < panicked < again < text.rindex(second)
