# SPDX-License-Identifier: Apache-2.0
"""CPU sets in words, on the machines people have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infertune.base.units import format_cpulist
from infertune.catalogue.cpuset import CpuSet, resolve_cpus
from infertune.host.cpu import Core, Cpu


def processor(*cores: Core, online: tuple[int, ...] | None = None) -> Cpu:
    if online is None:
        online = tuple(sorted(cpu for core in cores for cpu in core.cpus))
    return Cpu(
        vendor=None, model=None, online=online, cores=cores, scaling_driver=None, amd_pstate=None
    )


# Ryzen AI Max+ 395: 16 cores in two CCDs, siblings numbered from 16.
STRIX_HALO = processor(
    *(Core((n, n + 16), package=0, l3=0 if n < 8 else 8, kind=None) for n in range(16))
)
# Two performance cores with SMT, four efficiency cores on an L3 of their own.
HYBRID = processor(
    Core((0, 1), 0, 0, "performance"),
    Core((2, 3), 0, 0, "performance"),
    *(Core((n,), 0, 4, "efficiency") for n in range(4, 8)),
)
NO_TOPOLOGY = processor(online=(0, 1, 2, 3))
NOTHING_KNOWN = processor(online=())


@pytest.mark.parametrize(
    ("words", "cpu", "expected"),
    [
        ("all", STRIX_HALO, "0-31"),
        ("All", NO_TOPOLOGY, "0-3"),
        ("0-7", STRIX_HALO, "0-7"),
        ("0-7", NOTHING_KNOWN, "0-7"),
        ("0, 2", NO_TOPOLOGY, "0,2"),
        ("all but 0-1", STRIX_HALO, "2-31"),
        ("all but 0,99", NO_TOPOLOGY, "1-3"),
        ("physical cores", STRIX_HALO, "0-15"),
        ("physical cores minus one", STRIX_HALO, "1-15"),
        ("all minus one", STRIX_HALO, "1-15,17-31"),
        ("physical cores of the largest L3", STRIX_HALO, "0-7"),
        ("physical cores of the largest L3, minus one", STRIX_HALO, "1-7"),
        ("physical  cores of the LARGEST l3 minus 3", STRIX_HALO, "3-7"),
        ("all of the largest L3", STRIX_HALO, "0-7,16-23"),
        ("performance cores", STRIX_HALO, "0-15"),
        ("performance cores", HYBRID, "0,2"),
        ("performance CPUs", HYBRID, "0-3"),
        ("efficiency cores minus two", HYBRID, "6-7"),
        ("physical cores", HYBRID, "0,2,4-7"),
        ("physical cores of the largest L3", HYBRID, "0,2"),
    ],
)
def test_words(words: str, cpu: Cpu, expected: str) -> None:
    assert format_cpulist(resolve_cpus(words, cpu)) == expected


def test_offline_siblings_are_left_out() -> None:
    cpu = processor(Core((0, 4), 0, 0, None), Core((1, 5), 0, 0, None), online=(1, 4, 5))
    assert resolve_cpus("physical cores", cpu) == (1, 4)
    assert resolve_cpus("all minus one", cpu) == (1, 5)


def test_larger_cache_wins_over_the_lower_one() -> None:
    cpu = processor(Core((0,), 0, 0, None), Core((1,), 0, 1, None), Core((2,), 0, 1, None))
    assert resolve_cpus("physical cores of the largest L3", cpu) == (1, 2)


@pytest.mark.parametrize(
    ("words", "cpu", "says"),
    [
        ("fisical cores", STRIX_HALO, "is not a CPU set; write a list such as '0-7'"),
        ("", STRIX_HALO, "empty CPU set"),
        ("all but", STRIX_HALO, "is not a CPU set"),
        ("physical cores minus zero", STRIX_HALO, "is not a CPU set"),
        ("7-3", STRIX_HALO, "runs backwards"),
        (7, STRIX_HALO, "7 is not a CPU set"),
        (True, STRIX_HALO, "True is not a CPU set"),
        ("0-40", STRIX_HALO, "CPU 32-40 of '0-40' is not online here; online: 0-31"),
        ("all but 0-31", STRIX_HALO, "leaves no CPU"),
        ("physical cores minus 16", STRIX_HALO, "leaves no CPU"),
        ("efficiency cores", STRIX_HALO, "leaves no CPU"),
        ("efficiency cores of the largest L3", STRIX_HALO, "leaves no CPU"),
        ("physical cores", NO_TOPOLOGY, "needs the core topology"),
        ("all minus one", NO_TOPOLOGY, "needs the core topology"),
        ("all", NOTHING_KNOWN, "which CPUs are online"),
        ("all of the largest L3", processor(Core((0,), 0, None, None)), "needs to know the L3"),
    ],
)
def test_refusals(words: object, cpu: Cpu, says: str) -> None:
    with pytest.raises(ValueError, match="^.*" + says.replace("?", r"\?")):
        resolve_cpus(words, cpu)


WORDS = st.one_of(
    st.text(max_size=30),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["all", "physical cores", "performance cores", "efficiency CPUs", "0-3"]),
        st.sampled_from(["", " of the largest L3"]),
        st.sampled_from(["", ", minus one", " minus 2", " minus 99"]),
    ),
)


@given(WORDS, st.sampled_from([STRIX_HALO, HYBRID, NO_TOPOLOGY, NOTHING_KNOWN]))
def test_never_empty_never_offline(words: str, cpu: Cpu) -> None:
    try:
        chosen = resolve_cpus(words, cpu)
    except ValueError:
        return
    assert CpuSet().parse(words) == words
    assert chosen
    assert set(chosen) <= set(cpu.online) or not cpu.online
