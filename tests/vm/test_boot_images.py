# SPDX-License-Identifier: Apache-2.0
"""Real tools build images in a chroot: where there is no room, and killed in the middle.

dracut 106 and initramfs-tools of Debian 13, ukify of Debian sid; a tmpfs is /boot or the ESP.
What runs there is infertune as it is here, with the chroot for its root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infertune.base.errors import Failed
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import MIB
from infertune.boot import images, originals
from infertune.boot.builders import initramfs_image, uki_image
from infertune.boot.change import Image
from infertune.boot.commands import Runner, runner
from vm import lab

pytestmark = [pytest.mark.quick_on(), pytest.mark.timeout(1200)]  # minutes: only with --thorough

WORDS = ("amd_iommu=off", "ttm.pages_limit=25165824")
OPTIONS = "options ttm pages_limit=25165824\n"
CMDLINE = "root=UUID=1234 ro quiet\n"
KILLED_AT = (0.05, 0.3, 0.6, 0.9)
"""When, as a share of the time that the tool takes."""


@dataclass(frozen=True)
class System:
    suite: str
    packages: str
    boot: str = "/boot"
    """What lies on the small file system."""
    files: tuple[tuple[str, str], ...] = ()

    @property
    def is_uki(self) -> bool:
        return self.boot == "/efi"


HOSTONLY = ("/etc/dracut.conf.d/hostonly.conf", 'hostonly="yes"\n')
UKI_FILES = (
    ("/etc/kernel/install.conf", "layout=uki\nuki_generator=ukify\nBOOT_ROOT=/efi\n"),
    ("/etc/kernel/entry-token", "debian\n"),
    ("/etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
    ("/etc/kernel/cmdline", CMDLINE),
)
SYSTEMS = {
    "dracut": System("trixie", "dracut", files=(HOSTONLY,)),
    "initramfs-tools": System("trixie", "initramfs-tools"),
    "ukify": System(
        "sid", "systemd-ukify,systemd-boot-efi,systemd,initramfs-tools", "/efi", UKI_FILES
    ),
}


BUILD_TREE = r"""
# The host's own mirror and ways to fetch, as in tests/vm/image/build; it may be some days behind.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'ORIGIN: Debian' 'COMPONENT: main' |
    grep -v -m 1 security)
conf=$(mktemp)
trap 'rm "$conf"' EXIT
apt-config dump | grep -E '^Acquire::(https?::|Retries)' >"$conf"
echo 'Acquire::Check-Valid-Until "false";' >>"$conf"
mmdebstrap --mode=root --variant=apt --include="$3" --aptopt="$conf" "$2" "$1" ${mirror:+"$mirror"}
"""


def tree_of(system: System) -> Path:
    """An archive of the system, built once and kept."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it mounts file systems and builds in a chroot")
    if shutil.which("mmdebstrap") is None:
        pytest.skip("not installed: mmdebstrap")
    key = hashlib.sha256(repr((system.suite, system.packages)).encode()).hexdigest()[:12]
    archive = lab.cache() / f"boot-images-{key}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_suffix(".part.tar")
        packages = f"{system.packages},linux-image-amd64,kmod,zstd"
        built = subprocess.run(
            ["sh", "-c", BUILD_TREE, "sh", part, system.suite, packages],
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            pytest.skip(f"no Debian {system.suite} can be had here: {built.stderr[-200:]}")
        part.rename(archive)
    return archive


def sh(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Machine:
    """A system in a chroot whose images lie on a small file system."""

    def __init__(self, base: Path, system: System) -> None:
        self.base = base
        self.system = system
        self.kernel = os.listdir(base / "usr/lib/modules")[0]
        self.image: Image
        self.old = b""

    def at(self, path: str) -> Path:
        return self.base / path.lstrip("/")

    @property
    def path(self) -> Path:
        return self.at(self.image.path)

    def stage(self, *, ours: bool) -> None:
        """The file from which the tool takes what is staged."""
        if self.system.is_uki:
            line = f"{CMDLINE.strip()} {' '.join(WORDS)}\n" if ours else CMDLINE
            self.at("/etc/kernel/cmdline").write_text(line)
        else:
            file = self.at("/etc/modprobe.d/zz-infertune.conf")
            file.unlink(missing_ok=True)
            if ours:
                file.write_text(OPTIONS)

    def room(self, free: int) -> None:
        """Leave so many bytes on the small file system."""
        self.resize(1024 * MIB)
        found = os.statvfs(self.at(self.system.boot))
        self.resize((found.f_blocks - found.f_bfree) * found.f_frsize + free)

    def resize(self, size: int) -> None:
        sh("mount", "-o", f"remount,rw,size={size}", self.at(self.system.boot))

    def call(self, work: Callable[[], Any]) -> Any:
        """What ``work`` answers in the chroot; raises Failed as it does."""
        reading, writing = os.pipe()
        pid = self.start(lambda: os.write(writing, pickle.dumps(_outcome(work))))
        os.close(writing)
        with os.fdopen(reading, "rb") as answers:
            answer = answers.read()
        assert os.waitpid(pid, 0)[1] == 0
        result, message, hint = pickle.loads(answer)
        if message is not None:
            raise Failed(message, hint=hint)
        return result

    def start(self, work: Callable[[], Any]) -> int:
        """Run ``work`` in the chroot; its process id."""
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.chroot(self.base)
                os.chdir("/")
                work()
                code = 0
            finally:
                os._exit(code)
        return pid

    def build(self) -> images.Built:
        image = self.image
        built: images.Built = self.call(lambda: images.build(Root("/"), image, run_tools()))
        return built

    def restore(self, built: images.Built) -> None:
        self.call(lambda: images.restore(Root("/"), built, run_tools()))

    def ask_room(self) -> None:
        image = self.image
        self.call(lambda: images.ask_room(Root("/"), [image]))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path.parent))

    def kill_all(self) -> None:
        """Every process in the chroot, as if the power had gone."""
        while found := [pid for pid in os.listdir("/proc") if pid.isdecimal() and self._has(pid)]:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)

    def _has(self, pid: str) -> bool:
        try:
            where = os.readlink(f"/proc/{pid}/root")
            return where == str(self.base) and "Z" not in Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False


def _outcome(work: Callable[[], Any]) -> tuple[Any, str | None, str | None]:
    try:
        return work(), None, None
    except Failed as error:
        return None, error.message, error.hint


def run_tools() -> Runner:
    return runner(Root("/"), lambda _: None)


@pytest.fixture(params=SYSTEMS, scope="module")
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    found = SYSTEMS[request.param]
    archive = tree_of(found)
    base = tmp_path_factory.mktemp("system").resolve()
    sh("tar", "-C", base, "-xf", archive)
    for path, text in found.files:
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    machine = Machine(base, found)
    (base / "kernel").write_text(f"{machine.kernel}\n")
    mounts = [
        (("-t", "proc", "proc"), base / "proc"),
        (("--bind", base / "kernel"), base / "proc/sys/kernel/osrelease"),
        # dracut takes a system without them for another machine's, and is not host-only there.
        (("-t", "sysfs", "-o", "ro", "sysfs"), base / "sys"),
        (("--bind", "/dev"), base / "dev"),
        (("-t", "tmpfs", "tmpfs"), base / "run"),
        (("-t", "tmpfs", "-o", "size=1024m", "tmpfs"), base / found.boot.lstrip("/")),
    ]
    shutil.copytree(base / "boot", base / "boot.before")
    with contextlib.ExitStack() as stack:
        for what, where in mounts:
            if not where.exists():
                where.mkdir()
            sh("mount", *what, where)
            stack.callback(sh, "umount", where)
        _first_image(machine)
        yield machine
        machine.kill_all()


def _first_image(machine: Machine) -> None:
    kernel = machine.kernel
    if not machine.system.is_uki:
        for file in machine.at("/boot.before").iterdir():
            shutil.copy(file, machine.at("/boot"))
        machine.image = machine.call(lambda: initramfs_image(Root("/"), kernel))
    else:
        machine.at("/efi/EFI/Linux").mkdir(parents=True)
        add = ("/usr/bin/kernel-install", "add", kernel, f"/usr/lib/modules/{kernel}/vmlinuz")
        assert machine.call(lambda: run_tools()(add)).code == 0
        path = f"/efi/EFI/Linux/debian-{kernel}.efi"
        machine.image = machine.call(lambda: uki_image(Root("/"), WORDS, path))
    assert isinstance(machine.image, Image), machine.image
    machine.old = machine.path.read_bytes()


@pytest.fixture
def machine(system: Machine) -> Iterator[Machine]:
    """The system with the old image, all the room it wants, and something staged."""
    system.resize(1024 * MIB)
    system.path.write_bytes(system.old)
    system.stage(ours=True)
    image, old, names = system.image, system.old, system.names()
    yield system
    system.image, system.old = image, old
    system.resize(1024 * MIB)
    for name in set(system.names()) - set(names):
        (system.path.parent / name).unlink()


def test_it_is_built_kept_and_put_back(machine: Machine) -> None:
    names = machine.names()
    built = machine.build()
    new = machine.path.read_bytes()
    assert new != machine.old
    assert machine.at(images.kept(machine.image)).read_bytes() == machine.old
    machine.restore(built)
    assert machine.path.read_bytes() == machine.old
    assert machine.names() == names


def test_it_is_confirmed_and_comes_back(machine: Machine) -> None:
    names, mode = machine.names(), machine.path.stat().st_mode
    built = machine.build()
    machine.call(lambda: images.confirm(Root("/"), built))
    assert machine.names() == names
    assert machine.at(originals.place(machine.image.path)).read_bytes() == machine.old
    machine.stage(ours=False)
    machine.restore(built)
    assert machine.path.read_bytes() == machine.old
    assert machine.path.stat().st_mode == mode
    assert machine.names() == names
    assert not machine.at(originals.STORE).exists()


def test_it_is_confirmed_and_built_anew(machine: Machine) -> None:
    """Where no original could be kept."""
    names = machine.names()
    built = machine.build()
    machine.call(lambda: images.confirm(Root("/"), built))
    machine.call(lambda: originals.clear(Root("/")))
    machine.stage(ours=False)
    machine.restore(built)
    assert hashlib.sha256(machine.path.read_bytes()).hexdigest() != built.digest
    assert machine.names() == names


@pytest.mark.parametrize("system", ["dracut"], indirect=True)
def test_dracut_that_is_not_host_only(machine: Machine) -> None:
    """It answers 0, and leaves /etc/modprobe.d out (kernel-modules of dracut 106)."""
    names = machine.names()
    path, text = HOSTONLY
    machine.at(path).write_text('hostonly="no"\n')
    try:
        with pytest.raises(Failed, match="was built without etc/modprobe") as error:
            machine.build()
    finally:
        machine.at(path).write_text(text)
    assert "hostonly=yes" in (error.value.hint or "")
    assert machine.path.read_bytes() == machine.old
    assert machine.names() == names


def test_on_trial_the_default_is_what_it_was(machine: Machine) -> None:
    names = machine.names()
    trial = f"{os.path.dirname(machine.image.path)}/infertune.efi"
    machine.image = replace(machine.image, trial=trial)
    built = machine.build()
    assert machine.path.read_bytes() == machine.old
    assert machine.names() == sorted([*names, "infertune.efi"])
    machine.restore(built)
    assert machine.names() == names


def test_no_room_is_said_before(machine: Machine) -> None:
    names = machine.names()
    machine.room(len(machine.old) + 8 * MIB)
    with pytest.raises(Failed, match=r"MiB are needed .*; nothing was touched") as error:
        machine.ask_room()
    print(error.value.message, error.value.hint)
    assert machine.path.read_bytes() == machine.old
    assert machine.names() == names
    machine.room(len(machine.old) * 9 // 4 + images.MARGIN + MIB)
    machine.ask_room()
    machine.build()


def test_the_tool_finds_no_room(machine: Machine) -> None:
    """As if there had been less than was asked for: another program took it meanwhile."""
    names = machine.names()
    machine.old = os.urandom(2 * MIB)
    machine.path.write_bytes(machine.old)
    machine.room(4 * MIB)
    with pytest.raises(Failed, match="is as it was") as error:
        machine.build()
    print(error.value.message)
    assert machine.path.read_bytes() == machine.old
    assert machine.names() == names


def test_a_read_only_file_system(machine: Machine) -> None:
    sh("mount", "-o", "remount,ro", machine.at(machine.system.boot))
    with pytest.raises(Failed, match="is read-only"):
        machine.ask_room()
    # What update-initramfs does there: it answers 0 (initramfs-tools 0.148).
    with pytest.raises(Failed):
        machine.build()
    assert machine.path.read_bytes() == machine.old


def test_killed_in_the_middle(machine: Machine) -> None:
    names, image = machine.names(), machine.image
    began = time.monotonic()
    machine.build()
    lasts = time.monotonic() - began
    machine.call(lambda: images.restore(Root("/"), images.planned(image), run_tools()))
    for share in KILLED_AT:
        at = time.monotonic() + share * lasts
        _kill_when(machine, lambda: time.monotonic() > at)  # noqa: B023
        _boots_again(machine, names, f"{share:.0%} of {lasts:.0f} s")


def test_killed_while_it_writes(machine: Machine) -> None:
    names = machine.names()

    def writes() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if machine.path.stat().st_size != len(machine.old):
                return True
        beside = Path(f"{machine.path}.new")
        return beside.exists() and beside.stat().st_size > 0

    assert _kill_when(machine, writes)
    _boots_again(machine, names, "while it writes")


def _kill_when(machine: Machine, moment: Callable[[], bool]) -> bool:
    """Cut a build off; False where it has ended before, and only the record does not know."""
    image = machine.image
    pid = machine.start(lambda: images.build(Root("/"), image, run_tools()))
    while not moment():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0
            return False
    os.kill(pid, signal.SIGKILL)
    machine.kill_all()
    os.waitpid(pid, 0)
    return True


def _boots_again(machine: Machine, names: list[str], when: str) -> None:
    kept = machine.at(images.kept(machine.image))
    size = machine.path.stat().st_size if machine.path.exists() else None
    left = sorted(set(machine.names()) - set(names))
    print(f"killed {when}: the image has {size} of {len(machine.old)} bytes, beside it {left}")
    if kept.exists():
        assert kept.read_bytes() == machine.old
    else:
        assert machine.path.read_bytes() == machine.old
    machine.restore(images.planned(machine.image))
    assert machine.path.read_bytes() == machine.old
    assert not kept.exists()
