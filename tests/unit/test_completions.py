# SPDX-License-Identifier: Apache-2.0
"""What Tab gives in bash: names that a verb takes, of this machine too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from infertune.catalogue.knobs import KNOBS
from infertune.cli.verbs import VERBS
from support import GENEROUS_S

REPOSITORY = Path(__file__).parents[2]
COMPLETIONS = REPOSITORY / "completions"

TAB = """
source "$0"
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_infertune
printf '%s\\n' "${COMPREPLY[@]}"
"""


def tab(machine: Path, *words: str) -> set[str]:
    """What bash offers for the last word, on a machine whose files lie below a directory."""
    text = (COMPLETIONS / "infertune.bash").read_text()
    for place in ("/etc", "/run", "/usr/lib", "/usr/local/lib"):
        text = text.replace(f" {place}/infertune/", f" {machine}{place}/infertune/")
    script = machine / "completion"
    script.write_text(text)
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-c", TAB, script, "infertune", *words],
        capture_output=True, text=True, check=True, timeout=GENEROUS_S,
    )  # fmt: skip
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["zzz"], set()),
        (["rec"], {"recommend", "recover"}),
        (["apply", "lo"], {"long-context", "low-latency"}),
        (["boot", "stage", "lon"], {"long-context"}),
        (["fit", "--profile", "qu"], {"quiet"}),
        (["apply", "mi"], {"mine"}),
        (["profile", "explain", "mi"], {"mine"}),
        (["stop", "ch"], {"chat", "chat-2"}),
        (["logs", ""], {"chat", "chat-2"}),
        (["knobs", "ksm."], {knob for knob in KNOBS if knob.startswith("ksm.")}),
        (["plan", "quiet", "--without", "vm.sw"], {"vm.swappiness"}),
        (["doctor", "--rule", "swap-n"], {"swap-none"}),
        (["plan", "quiet", "--backend", "v"], {"vulkan"}),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_tab_offers_names(words: list[str], offered: set[str], tmp_path: Path) -> None:
    for file in (
        "etc/infertune/profiles/mine.toml",
        "etc/infertune/servers.d/chat.toml",
        "run/infertune/servers.d/chat-2.toml",
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert tab(tmp_path, *words) == offered


def test_a_machine_without_any_of_it_offers_our_own(tmp_path: Path) -> None:
    assert tab(tmp_path, "apply", "") >= {path.stem for path in REPOSITORY.glob("profiles/*.toml")}
    assert tab(tmp_path, "stop", "") == set()


def test_fish_shows_a_line_beside_a_verb_not_a_paragraph() -> None:
    text = (COMPLETIONS / "infertune.fish").read_text()
    for verb in VERBS.values():
        assert f"-a {verb.name} -d '{verb.help}'" in text.replace('"', "'")
