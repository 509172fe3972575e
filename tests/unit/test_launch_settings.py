# SPDX-License-Identifier: Apache-2.0
"""What a profile may say about the process, and which variables it may set."""

from __future__ import annotations

import pytest

from infertune.catalogue.launch_settings import (
    LAUNCH_SETTINGS,
    check_environment,
    with_tunables,
)


@pytest.mark.parametrize(
    ("name", "configured", "canonical"),
    [
        ("memory_min", "4GiB", "4294967296"),
        ("memory_swap_max", "0", "0"),
        ("memory_swap_max", 0, "0"),
        ("memory_swap_max", "max", "max"),
        ("memlock", "unlimited", "unlimited"),
        ("memlock", "10%", "10%"),
        ("oom_score_adj", -1000, "-1000"),
        ("nice", -20, "-20"),
        ("cpu_weight", 10000, "10000"),
        ("malloc_hugetlb", True, "1"),
        ("malloc_hugetlb", False, "0"),
    ],
)
def test_accepted(name: str, configured: object, canonical: str) -> None:
    assert LAUNCH_SETTINGS[name].value.parse(configured) == canonical


@pytest.mark.parametrize(
    ("name", "configured"),
    [
        ("memory_min", "unlimited"),
        ("memory_min", False),
        ("memory_min", "200%"),
        ("memlock", "max"),
        ("oom_score_adj", -1001),
        ("nice", 20),
        ("nice", True),
        ("cpu_weight", 0),
        ("cpus", ""),
        ("cpus", 3),
        ("malloc_hugetlb", 2),
    ],
)
def test_refused(name: str, configured: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        LAUNCH_SETTINGS[name].value.parse(configured)


@pytest.mark.parametrize(
    "name",
    [
        "HSA_OVERRIDE_GFX_VERSION",
        "HSA_ENABLE_SDMA",
        "ROCBLAS_USE_HIPBLASLT",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "GPU_MAX_HW_QUEUES",
        "GGML_CUDA_ENABLE_UNIFIED_MEMORY",
        "OMP_NUM_THREADS",
        "GOMP_SPINCOUNT",
        "AMD_VULKAN_ICD",
        "RADV_PERFTEST",
        "MALLOC_ARENA_MAX",
        "MALLOC_TRIM_THRESHOLD_",
    ],
)
def test_variables_that_tune(name: str) -> None:
    check_environment(name, "1")


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "HSA_LIBRARY_PATH",
        "GGML_LIBRARY_PATH",
        "PYTHONPATH",
        "GCONV_PATH",
        "VK_LAYER_PATH",
        "VK_INSTANCE_LAYERS",
        "OCL_ICD_VENDORS",
        "HSA_TOOLS_LIB",
        "OMP_TOOL_LIBRARIES",
        "GGML_BACKEND_PATH",
        "LLAMA_ARG_MLOCK",
        "PATH",
        "HOME",
        "ggml_x",
        "GGML_X=1",
        "GGML_\n",
        "",
    ],
)
def test_variables_that_load_code_or_mean_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"may not be set|is not a variable"):
        check_environment(name, "1")


@pytest.mark.parametrize("value", ["a\0b", "a\nb", "\x1b[2J"])
def test_values_with_control_characters(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        check_environment("GGML_X", value)


@pytest.mark.parametrize(
    ("given", "wanted", "comes_to"),
    [
        ("", "1", "glibc.malloc.hugetlb=1"),
        ("", "0", "glibc.malloc.hugetlb=0"),
        ("glibc.rtld.nns=4", "1", "glibc.rtld.nns=4:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=2", "1", "glibc.malloc.hugetlb=2"),
        ("glibc.malloc.hugetlb=2:a=b", "1", "glibc.malloc.hugetlb=2:a=b"),
    ],
)
def test_tunables_of_the_owner_stay(given: str, wanted: str, comes_to: str) -> None:
    env = {"GGML_TEST": "1", **({"GLIBC_TUNABLES": given} if given else {})}
    launch = {"nice": "-5", "malloc_hugetlb": wanted}
    assert with_tunables(env, launch) == {"GGML_TEST": "1", "GLIBC_TUNABLES": comes_to}
    assert with_tunables(env, {"nice": "-5"}) == env
