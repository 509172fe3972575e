# SPDX-License-Identifier: Apache-2.0
"""Valid profiles: how they are found, inherit, and are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infertune.base.errors import ProfileError
from infertune.base.root import Root
from infertune.catalogue.backends import BACKENDS
from infertune.cli.main import main
from infertune.cli.profile import as_toml
from infertune.profiles.profile import SEARCH_PATH, Given, Profile, load_profile, package_directory

SHIPPED = ["base", "big-moe", "desktop-share", "long-context", "low-latency", "quiet", "throughput"]


class Machine:
    """A recorded machine that holds only profiles."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = Root(base)

    def write(self, name: str, text: str, directory: str = SEARCH_PATH[0]) -> None:
        path = self.root.at(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.toml").write_text(text)

    def load(self, name: str) -> Profile:
        return load_profile(self.root, name)

    def cli(self, *words: str) -> int:
        return main(["--root", str(self.base), *words])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def values(profile: Profile, backend: str | None = None) -> dict[str, object]:
    settings = profile.by_backend[backend] if backend else profile.general
    return {given.id: given.configured for given in settings.values()}


def given(profile: Profile, name: str, backend: str | None = None) -> Given:
    settings = profile.by_backend[backend] if backend else profile.general
    return next(given for key, given in settings.items() if key[1] == name)


# -- what may be written ----------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[now]\nvm.swappiness = 10",
        "[now]\n'vm.swappiness' = 10",
        "[now.vm]\nswappiness = 10",
        "[now]\nvm = { swappiness = 10 }",
        "now.vm.swappiness = 10",
        "now = { vm = { swappiness = { value = 10 } } }",
        "[now.vm.swappiness]\nvalue = 10",
        "[now.'vm.swappiness']\nvalue = 10\nrequired = false",
    ],
)
def test_every_spelling_of_a_knob(machine: Machine, text: str) -> None:
    machine.write("x", text)
    assert values(machine.load("x")) == {"vm.swappiness": 10}


def test_everything_a_profile_may_say(machine: Machine) -> None:
    machine.write(
        "x",
        """\
description = "all of it"
[now]
transparent_hugepage.hugepages-64kB.enabled = "always"
platform_profile = { value = "balanced", required = true, because = "it is cool" }
[boot]
ttm.pages_limit = "96GiB, at most 80%"
[launch]
cpus = "physical cores of the largest L3, minus one"
memory_min = 0
memlock = "unlimited"
env.OMP_NUM_THREADS = 8
[launch.env.GGML_X]
value = "y"
[server]
gpu_layers = "all"
kv_unified = false
[backend.rocm]
server = { ubatch_size = 2048 }
launch.env = { HSA_X = "1" }
""",
    )
    profile = machine.load("x")
    assert profile.description == "all of it"
    assert values(profile) == {
        "transparent_hugepage.hugepages-64kB.enabled": "always",
        "platform_profile": "balanced",
        "ttm.pages_limit": "96GiB, at most 80%",
        "cpus": "physical cores of the largest L3, minus one",
        "memory_min": 0,
        "memlock": "unlimited",
        "OMP_NUM_THREADS": 8,
        "GGML_X": "y",
        "gpu_layers": "all",
        "kv_unified": False,
    }
    assert values(profile, "rocm").keys() - values(profile).keys() == {"ubatch_size", "HSA_X"}
    assert values(profile, "vulkan") == values(profile)
    platform = given(profile, "platform_profile")
    assert (platform.required, platform.because) == (True, "it is cool")
    assert str(platform.source) == "/etc/infertune/profiles/x.toml:4"
    assert given(profile, "GGML_X").source.line == 13


def test_an_empty_profile_is_valid(machine: Machine) -> None:
    machine.write("x", "")
    assert values(machine.load("x")) == {}


# -- inheriting --------------------------------------------------------------------


def test_child_wins_and_remembers(machine: Machine) -> None:
    machine.write("a", "[now]\nvm.swappiness = { value = 1, required = true }\nksm.run = 0")
    machine.write("b", "extends = 'a'\n[now]\nvm.swappiness = 2")
    machine.write("c", "extends = 'b'\ndescription = 'c'\n[now]\nvm.swappiness = 3")
    profile = machine.load("c")
    swappiness = given(profile, "vm.swappiness")
    assert (swappiness.configured, swappiness.required) == (3, False)
    assert [(source.profile, value) for source, value in swappiness.overridden] == [
        ("b", 2),
        ("a", 1),
    ]
    assert given(profile, "ksm.run").source.profile == "a"


def test_backend_wins_in_one_file_and_child_over_both(machine: Machine) -> None:
    machine.write("a", "[server]\nparallel = 1\n[backend.rocm.server]\nparallel = 2")
    machine.write("b", "extends = 'a'\n[server]\nparallel = 3")
    machine.write("c", "extends = 'a'\n[backend.vulkan.server]\nparallel = 4")
    assert [values(machine.load("a"), backend)["parallel"] for backend in BACKENDS] == [2, 1, 1]
    assert [values(machine.load("b"), backend)["parallel"] for backend in BACKENDS] == [3, 3, 3]
    assert [values(machine.load("c"), backend)["parallel"] for backend in BACKENDS] == [2, 4, 1]
    overridden = given(machine.load("b"), "parallel", "rocm").overridden
    assert [value for _, value in overridden] == [2, 1]


def test_parents_that_agree_or_are_decided(machine: Machine) -> None:
    machine.write("a", "description = 'first'\n[now]\nvm.swappiness = 1\nksm.run = 0")
    machine.write("b", "[now]\nvm.swappiness = 2\nksm.run = { value = 0, required = true }")
    machine.write("c", "extends = ['a', 'b']\n[now]\nvm.swappiness = 3")
    profile = machine.load("c")
    assert values(profile) == {"vm.swappiness": 3, "ksm.run": 0}
    assert given(profile, "ksm.run").required
    assert profile.description == "first"
    machine.write("d", "extends = ['a', 'b']")
    with pytest.raises(ProfileError, match=r"d.toml:1: the parents disagree on 'vm.swappiness'"):
        machine.load("d")


@pytest.mark.parametrize("order", ["'b', 'c'", "'c', 'b'"])
def test_common_ancestor_is_no_disagreement(machine: Machine, order: str) -> None:
    machine.write("a", "[now]\nvm.swappiness = 1")
    machine.write("b", "extends = 'a'\n[now]\nvm.swappiness = 2")
    machine.write("c", "extends = 'a'")
    machine.write("d", f"extends = [{order}]")
    assert values(machine.load("d")) == {"vm.swappiness": 2}


def test_search_path(machine: Machine) -> None:
    for number, directory in reversed(list(enumerate(SEARCH_PATH))):
        machine.write("x", f"[now]\nvm.swappiness = {number}", directory)
        assert values(machine.load("x")) == {"vm.swappiness": number}


def test_admin_profile_extends_the_vendors_of_its_own_name(machine: Machine) -> None:
    machine.write("x", "[now]\nvm.swappiness = 3", SEARCH_PATH[3])
    machine.write("x", "extends = 'x'\n[now]\nksm.run = 0", SEARCH_PATH[1])
    machine.write("x", "extends = 'x'\n[now]\nvm.swappiness = 0")
    profile = machine.load("x")
    assert values(profile) == {"vm.swappiness": 0, "ksm.run": 0}
    assert profile.parents[0].file.startswith("/run/")
    assert profile.parents[0].parents[0].file.startswith("/usr/lib/")


def test_admin_profile_extends_the_one_that_comes_with_infertune(machine: Machine) -> None:
    machine.write("quiet", "extends = 'quiet'\n[server]\nctx_size = 1024")
    profile = machine.load("quiet")
    assert values(profile)["ctx_size"] == 1024
    assert values(profile)["cpufreq.boost"] is False
    # Others that extend base get the administrator's base.
    machine.write("base", "extends = 'base'\n[now]\nksm.run = 1")
    assert values(machine.load("throughput"))["ksm.run"] == 1


def test_deep_but_not_too_deep(machine: Machine) -> None:
    for number in range(1, 9):
        machine.write(f"p{number}", f"extends = 'p{number + 1}'" if number < 8 else "")
    assert machine.load("p1")


# -- the profiles that come with infertune -------------------------------------------


def test_all_shipped_profiles_are_here() -> None:
    assert sorted(path.stem for path in package_directory().glob("*.toml")) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile(machine: Machine, name: str) -> None:
    profile = machine.load(name)
    assert profile.description
    # A reason must not claim more than the catalogue's evidence, and a number has a source.
    for layer in (profile.general, *profile.by_backend.values()):
        for setting in layer.values():
            if setting.because and re.search(r"\d+ ?%|faster", setting.because):
                assert re.match(r"reported|measured", setting.because), setting


# -- the command line ----------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_show_prints_a_profile_of_the_same_meaning(machine: Machine, name: str) -> None:
    profile = machine.load(name)
    machine.write("copy", "\n".join(as_toml(profile)))
    copy = machine.load("copy")
    assert not copy.parents
    for backend in (None, *BACKENDS):
        settings = (p.by_backend[backend] if backend else p.general for p in (profile, copy))
        first, second = (
            {k: (g.configured, g.required, g.because) for k, g in layer.items()}
            for layer in settings
        )
        assert first == second


def test_show_escapes(machine: Machine) -> None:
    machine.write("x", "description = 'a \"b\" \\ é'\n[launch.env]\nGGML_X = '\u2028\"\\'")
    machine.write("copy", "\n".join(as_toml(machine.load("x"))))
    assert values(machine.load("copy")) == {"GGML_X": '\u2028"\\'}


def test_profiles_lists_where_each_comes_from(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.write("mine", "description = 'my own'")
    machine.write("quiet", "extends = 'quiet'")
    machine.write("broken", "x = 1")
    machine.write("Not A Name", "")
    assert machine.cli("profiles", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "infertune.profiles/1"
    rows = {row["name"]: row for row in document["profiles"]}
    assert sorted(rows) == sorted([*SHIPPED, "mine", "broken"])
    assert rows["mine"] == {
        "name": "mine",
        "description": "my own",
        "from": "/etc/infertune/profiles",
        "file": "/etc/infertune/profiles/mine.toml",
        "overrides": [],
        "error": None,
    }
    assert rows["quiet"]["overrides"] == [str(package_directory() / "quiet.toml")]
    assert rows["quiet"]["description"].startswith("less heat")
    assert rows["base"]["from"] == "infertune"
    assert "broken.toml:1: unknown key 'x'" in rows["broken"]["error"]
    assert machine.cli("profiles") == 0
    out = capsys.readouterr().out
    assert "quiet: /etc/infertune/profiles/quiet.toml overrides " in out
    assert "not valid: /etc/infertune/profiles/broken.toml:1" in out


def test_check_a_file(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "draft.toml"
    file.write_text("extends = 'quiet'\n[now]\nvm.swappiness = 5\n")
    assert machine.cli("profile", "check", str(file)) == 0
    assert capsys.readouterr().out == f"{file}: valid, 14 settings\n"
    file.write_text("extends = 'quiet'\n[now]\nvm.swappiness = 500\nx = 1\n")
    assert machine.cli("profile", "check", str(file), "--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is False
    assert [error["line"] for error in document["errors"]] == [3, 4]
    assert machine.cli("profile", "check", str(tmp_path / "nothing.toml")) == 2
    assert "cannot be read: No such file" in capsys.readouterr().out


def test_a_draft_may_extend_the_installed_profile_of_its_name(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "quiet.toml").write_text("extends = 'quiet'")
    assert machine.cli("profile", "check", f"{tmp_path}/quiet.toml") == 0


@pytest.mark.parametrize("verb", ["show", "explain"])
def test_only_check_takes_a_file(
    machine: Machine, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "draft.toml").write_text("")
    assert machine.cli("profile", verb, f"{tmp_path}/draft.toml") == 2
    assert "is not a profile name" in capsys.readouterr().err


def test_explain(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    (machine.base / "proc").mkdir()
    (machine.base / "proc/meminfo").write_text("MemTotal: 131072000 kB\n")
    machine.write("x", "extends = 'long-context'\n[now]\nvm.swappiness = 5\n[launch]\ncpus = '0-3'")
    assert machine.cli("profile", "explain", "x", "--backend", "rocm") == 0
    out = capsys.readouterr().out
    assert "backend rocm: as asked" in out
    assert (
        "vm.swappiness = 5\n"
        "    set by x (/etc/infertune/profiles/x.toml:3)\n"
        f"    instead of 10 by base ({package_directory()}/base.toml:"
    ) in out
    assert "    evidence: protective, unmeasured\n" in out
    assert '"96GiB, at least 75%, at most 80%", here 96 GiB' in out
    assert machine.cli("profile", "explain", "x", "--backend", "rocm", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "infertune.profile-explain/1"
    found = {entry["id"]: entry for entry in document["settings"]}
    assert found["ttm.pages_limit"]["value"] == "25165824"
    assert found["ROCBLAS_USE_HIPBLASLT"]["table"] == "launch.env"


def test_explain_says_what_is_left_out(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.write("x", "[launch]\ncpus = 'physical cores of the largest L3'")
    assert machine.cli("profile", "explain", "x") == 0
    out = capsys.readouterr().out
    assert "left out on this machine:\ncpus = " in out
