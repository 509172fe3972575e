# SPDX-License-Identifier: Apache-2.0
"""What profiles mean on recorded machines."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from infertune.base.errors import ProfileError, UsageError
from infertune.base.root import Root
from infertune.base.units import GIB, parse_size
from infertune.host.machine import Machine, read_machine
from infertune.host.snapshot import open_root
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, assume_backend, resolve

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@functools.cache
def recorded(name: str) -> Machine:
    with open_root(str(FIXTURES / f"{name}.snapshot")) as root:
        return read_machine(root)


@pytest.fixture(scope="module")
def strix_halo() -> Machine:
    return recorded("strix-halo-128")


def shipped(name: str, machine: Machine, backend: str, base: Path) -> Desired:
    return resolve(load_profile(Root(base), name), machine, backend)


def canonical(desired: Desired) -> dict[str, str]:
    settings = [
        *desired.now,
        *desired.boot,
        *desired.launch.values(),
        *desired.env.values(),
        *desired.server.values(),
    ]
    return {setting.id: setting.canonical for setting in settings}


# What an owner of a 128 GB Strix Halo would check by hand.
LONG_CONTEXT = {
    "transparent_hugepage.defrag": "defer",
    "vm.swappiness": "10",
    "kernel.numa_balancing": "0",
    "ksm.run": "0",
    "ttm.pages_limit": "25165824",  # 96 GiB in pages of 4 KiB
    "memory_min": str(4 * GIB),
    "memory_swap_max": "0",
    "oom_score_adj": "-500",
    "malloc_hugetlb": "1",
    "load_mode": "auto",
    "parallel": "1",
    "ctx_size": "131072",
    "cache_ram": "8192",
    "metrics": "1",
    "gpu_layers": "999",
    "flash_attn": "on",
    "batch_size": "2048",
}


def test_long_context_on_vulkan(strix_halo: Machine, tmp_path: Path) -> None:
    desired = shipped("long-context", strix_halo, "vulkan", tmp_path)
    assert canonical(desired) == {**LONG_CONTEXT, "AMD_VULKAN_ICD": "RADV", "ubatch_size": "512"}
    assert desired.unresolved == ()


def test_long_context_on_rocm(strix_halo: Machine, tmp_path: Path) -> None:
    desired = shipped("long-context", strix_halo, "rocm", tmp_path)
    expected = {**LONG_CONTEXT, "ROCBLAS_USE_HIPBLASLT": "1", "ubatch_size": "2048"}
    assert canonical(desired) == expected


def test_low_latency_takes_one_cache_but_its_first_core(
    strix_halo: Machine, tmp_path: Path
) -> None:
    desired = shipped("low-latency", strix_halo, "rocm", tmp_path)
    assert desired.launch["cpus"].canonical == "1-7"
    assert shipped("low-latency", strix_halo, "cpu", tmp_path).launch["cpus"].canonical == "0-15"


@pytest.mark.parametrize("profile", ["long-context", "throughput", "big-moe", "desktop-share"])
@pytest.mark.parametrize("name", ["strix-halo-128", "strix-halo-64-laptop", "rog-z13"])
def test_the_gpu_never_gets_so_much_that_the_system_starves(
    name: str, profile: str, tmp_path: Path
) -> None:
    machine = recorded(name)
    [limit] = shipped(profile, machine, "vulkan", tmp_path).boot
    total = machine.memory.total_bytes
    assert total
    assert int(limit.canonical) * 4096 <= total * 0.9
    assert total - int(limit.canonical) * 4096 >= 8 * GIB


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.snapshot")), ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", ["long-context", "low-latency", "desktop-share", "quiet"])
def test_no_profile_fails_on_any_machine(path: Path, profile: str, tmp_path: Path) -> None:
    desired = shipped(profile, recorded(path.stem), "auto", tmp_path)
    assert desired.now


def test_backend_is_assumed_from_the_driver(strix_halo: Machine) -> None:
    assert assume_backend(strix_halo)[0] == "vulkan"
    assert assume_backend(recorded("intel-desktop"))[0] == "cpu"


def test_unknown_backend(strix_halo: Machine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'vulcan' is not a backend") as caught:
        shipped("quiet", strix_halo, "vulcan", tmp_path)
    assert caught.value.hint == "Did you mean 'vulkan'?"


def own(base: Path, text: str) -> Root:
    directory = base / "etc/infertune/profiles"
    directory.mkdir(parents=True)
    (directory / "x.toml").write_text(text)
    return Root(base)


def test_optional_is_left_out_and_required_refused(strix_halo: Machine, tmp_path: Path) -> None:
    root = own(tmp_path / "a", "[launch]\ncpus = '0-99'\nnice = 1")
    desired = resolve(load_profile(root, "x"), strix_halo)
    assert list(desired.launch) == ["nice"]
    [left] = desired.unresolved
    assert (left.id, left.source.line) == ("cpus", 2)
    assert "CPU 32-99 of '0-99' is not online here" in left.reason
    root = own(tmp_path / "b", "[launch]\ncpus = { value = '0-99', required = true }")
    with pytest.raises(ProfileError, match=r"x\.toml:2: 'cpus' is required, but not possible"):
        resolve(load_profile(root, "x"), strix_halo)


def test_settings_come_in_the_order_of_the_catalogue(strix_halo: Machine, tmp_path: Path) -> None:
    root = own(
        tmp_path,
        "[now]\nzswap.enabled = true\nvm.swappiness = 1\ntransparent_hugepage.defrag = 'never'\n"
        "[launch.env]\nOMP_B = 'b'\nOMP_A = 'a'\n",
    )
    desired = resolve(load_profile(root, "x"), strix_halo)
    assert [setting.id for setting in desired.now] == [
        "transparent_hugepage.defrag",
        "vm.swappiness",
        "zswap.enabled",
    ]
    assert list(desired.env) == ["OMP_A", "OMP_B"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("96GiB, at most 80%", 96 * GIB),
        ("96GiB, at most 50%", 64 * GIB),
        ("25%, at most 8GiB", 8 * GIB),
    ],
)
def test_the_smaller_of_two_sizes(text: str, expected: int) -> None:
    assert parse_size(text, total=128 * GIB) == expected


def test_only_two_sizes_may_be_compared() -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("1GiB, at most 2GiB, at most 3GiB")
