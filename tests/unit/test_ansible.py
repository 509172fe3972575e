# SPDX-License-Identifier: Apache-2.0
"""Roles and playbooks: what can be said of them without a machine (tests/vm runs them)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from infertune import __version__
from infertune.cli.main import commands
from infertune.servers.declaration import KEYS

ANSIBLE = Path(__file__).resolve().parents[2] / "ansible"
ROLES = sorted(path.name for path in (ANSIBLE / "roles").iterdir())
PLAYBOOKS = sorted((ANSIBLE / "playbooks").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tasks(found: Any) -> list[dict[str, Any]]:
    """Every task, those in blocks too."""
    out = []
    for task in found:
        out.append(task)
        for part in ("tasks", "block", "rescue", "always"):
            out += tasks(task.get(part, []))
    return out


ALL = [
    (path.relative_to(ANSIBLE), task)
    for path in [*ANSIBLE.glob("roles/*/tasks/*.yml"), *PLAYBOOKS]
    for task in tasks(read(path))
]


@pytest.mark.parametrize("role", ROLES)
def test_arguments_are_those_with_defaults(role: str) -> None:
    base = ANSIBLE / "roles" / role
    options = read(base / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == read(
        base / "defaults" / "main.yml"
    )
    assert all(name.startswith(f"{role}_") for name in options)


@pytest.mark.parametrize("role", ROLES)
def test_only_declared_variables_are_used(role: str) -> None:
    base = ANSIBLE / "roles" / role
    text = "\n".join(path.read_text() for path in (base / "tasks").glob("*.yml"))
    used = set(re.findall(rf"\b{role}_[a-z_]+\b", text))
    own = set(re.findall(rf"register: ({role}_\w+)", text))
    own |= set(re.findall(rf"^ +({role}_\w+):", text, re.MULTILINE))
    own |= set(re.findall(rf"template_vars=\{{'({role}_\w+)'", text))
    if (base / "vars/main.yml").exists():
        own |= set(read(base / "vars/main.yml"))
    assert used - own <= set(read(base / "defaults" / "main.yml"))


def test_every_command_is_one_of_ours() -> None:
    """Each ``infertune VERB`` exists, with the options it is given."""
    known = {
        command.name: {w for a in command.arguments for w in a.names} for command in commands()
    }
    found = 0
    for where, task in ALL:
        words = str(task.get("ansible.builtin.command", "")).split()
        if (
            words[:1] == ["infertune"] and words[1] in known and words[1] != "boot"
        ):  # it has verbs of its own
            found += 1
            for word in words[2:]:
                if word.startswith("--"):
                    assert word in known[words[1]], (where, task["name"])
    assert found >= 15


def test_what_only_reads_also_runs_in_check_mode() -> None:
    for where, task in ALL:
        command = task.get("ansible.builtin.command")
        if command and task.get("changed_when") is False and "when" not in task:
            assert task.get("check_mode") is False, (where, task["name"])


OPEN = {"infertune_exporter_listen": "192.0.2.2:9877"}


def test_what_prometheus_and_grafana_get(tmp_path: Path) -> None:
    """The playbook run for real, on this machine, into directories of its own."""
    words = {
        "monitoring_prometheus": str(tmp_path / "prometheus"),
        "monitoring_grafana": str(tmp_path / "grafana"),
        "monitoring_dashboards": str(tmp_path / "dashboards"),
        "monitoring_reload": False,
        "monitoring_check": "",
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_become": False,
    }
    hosts = {"infertune": {"hosts": {"halo-1.example": {}, "halo-2.example": OPEN}}}
    hosts |= {"monitoring": {"hosts": {"here": words}}}  # type: ignore[dict-item]
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps(hosts))
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_NOCOLOR": "1"}
    play = [ansible("ansible-playbook"), "-i", inventory, "playbooks/monitoring.yml"]

    def changed(*more: str) -> int:
        done = subprocess.run(
            [*play, *more], cwd=ANSIBLE, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return int(re.findall(r"changed=(\d+)", done.stdout)[0])

    assert changed() > 0
    assert changed() == 0
    assert changed("--check") == 0
    groups = json.loads((tmp_path / "prometheus/targets/infertune.json").read_text())
    assert [each["targets"] for each in groups] == [
        ["halo-1.example:9877"],
        ["halo-2.example:9877"],
    ]
    assert [each["labels"] for each in groups] == [{}, {"__scheme__": "https"}]
    for directory, source, pattern in (
        ("prometheus/rules", "prometheus/rules", "*.yml"),
        ("dashboards", "grafana/dashboards", "*.json"),
        ("grafana/dashboards", "grafana/provisioning/dashboards", "*.yml"),
        ("grafana/datasources", "grafana/provisioning/datasources", "*.yml"),
    ):
        ours = {p.name: p.read_text() for p in (ANSIBLE.parent / source).glob(pattern)}
        assert ours == {p.name: p.read_text() for p in (tmp_path / directory).iterdir()}


def ansible(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (pip install ansible-core ansible-lint)")
    return path


def test_the_collection_stands_alone(tmp_path: Path) -> None:
    """Built and installed, nothing of it leads out of it."""
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_NOCOLOR": "1"}

    def galaxy(*words: str) -> None:
        done = subprocess.run(
            [ansible("ansible-galaxy"), "collection", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    galaxy("build", str(ANSIBLE), "--output-path", str(tmp_path))
    [made] = tmp_path.glob("infertune-infertune-*.tar.gz")
    assert made.name == f"infertune-infertune-{__version__}.tar.gz"
    galaxy("install", str(made), "--offline", "-p", str(tmp_path / "collections"))
    there = tmp_path / "collections/ansible_collections/infertune/infertune"
    files = there / "roles/monitoring/files"
    ours = ANSIBLE / "roles/monitoring/files"
    assert {p.name: p.read_text() for p in files.iterdir()} == {
        p.name: p.read_text() for p in ours.iterdir()
    }
    assert not [path for path in there.rglob("*") if path.is_symlink()]
    for playbook in sorted((there / "playbooks").glob("*.yml")):
        done = subprocess.run(
            [ansible("ansible-playbook"), "--syntax-check", f"infertune.infertune.{playbook.stem}"],
            cwd=tmp_path,
            env={**environment, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_syntax(playbook: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path)}
    words = [ansible("ansible-playbook"), "--syntax-check", playbook]
    done = subprocess.run(words, cwd=ANSIBLE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("playbook", "role"), [("site", "infertune"), ("monitoring",) * 2])
def test_tags_are_those_of_the_page(playbook: str, role: str, tmp_path: Path) -> None:
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    words = [ansible("ansible-playbook"), "--list-tags", f"playbooks/{playbook}.yml"]
    done = subprocess.run(words, cwd=ANSIBLE, env=environment, capture_output=True, text=True)
    listed = re.search(r"TASK TAGS: \[(.*)\]", done.stdout)
    assert listed, done.stdout + done.stderr
    page = (ANSIBLE / "roles" / role / "README.md").read_text()
    [told] = re.findall(r"^Tags.*?: ((?:.|\n)*?)\.\s", page, re.MULTILINE)
    assert set(listed[1].split(", ")) - {"always"} == set(re.findall(r"`(\w+)`", told))


NO_ADDRESS = ("--skip-list", "galaxy[no-repository]")
"""The repository has no address that could be named yet."""


def test_lint_for_production(tmp_path: Path) -> None:
    linter = ansible("ansible-lint")
    path = f"{Path(linter).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ANSIBLE_HOME": str(tmp_path)}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    shutil.copytree(ANSIBLE.parent, tmp_path / "copy", ignore=_only_what_is_linted)
    done = subprocess.run(
        [linter, "--offline", "--nocolor", "-q", "--profile", "production", *NO_ADDRESS],
        cwd=tmp_path / "copy" / "ansible",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _only_what_is_linted(directory: str, names: list[str]) -> set[str]:
    top = Path(directory) == ANSIBLE.parent
    kept = ("ansible", "prometheus", "grafana")  # the role has links there
    return {name for name in names if name.startswith(".") or (top and name not in kept)}


@pytest.mark.parametrize(
    ("variable", "name"),
    [("profiles", "../x"), ("servers", "Chat"), ("profiles", "a\nb"), ("servers", "x" * 65)],
)
def test_names_that_cannot_be_are_refused_before_anything_is_done(
    tmp_path: Path, variable: str, name: str
) -> None:
    (tmp_path / "play.yml").write_text(
        "- hosts: localhost\n  gather_facts: false\n  tasks:\n"
        "    - ansible.builtin.include_role: {name: infertune, tasks_from: names}\n"
    )
    given = {f"infertune_{variable}": {name: {}, "good-1": {}}, "infertune_profile": "ok"}
    words = [ansible("ansible-playbook"), tmp_path / "play.yml", "-e", json.dumps(given)]
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(words, cwd=ANSIBLE, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "a name of a profile or server has lower-case" in done.stdout
    assert "good-1" not in done.stdout.partition("fatal:")[2], done.stdout


def local(tmp_path: Path, tasks: list[dict[str, Any]], **variables: Any) -> tuple[int, str]:
    """Exit code of tasks that are played here, and what was printed."""
    play = [{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(json.dumps(play))
    variables["ansible_python_interpreter"] = sys.executable
    words = [ansible("ansible-playbook"), tmp_path / "play.yml", "-e", json.dumps(variables)]
    words += ["-i", "localhost,", "-c", "local"]
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(words, cwd=ANSIBLE, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_server_may_say_what_its_file_may() -> None:
    options = read(ANSIBLE / "roles/infertune/vars/main.yml")
    assert set(options["infertune_server_options"]) == {key.name for key in KEYS}
    sections = {"now", "boot", "launch", "server", "backend"}
    assert set(options["infertune_profile_options"]) == {"description", "extends", *sections}


@pytest.mark.parametrize(
    ("variable", "given", "said"),
    [
        ("servers", {"modelfile": "/m.gguf", "port": 1}, "modelfile. Supported parameters include"),
        ("servers", {"port": "eighty"}, "'port' is of type"),
        ("servers", "port = 8101\n", "dict"),
        ("profiles", {"description": "x", "live": {}}, "live. Supported parameters include"),
        ("profiles", {"now": {}}, "missing required arguments: description"),
    ],
)
def test_what_cannot_stand_in_a_file_is_refused_before_anything_is_done(
    tmp_path: Path, variable: str, given: Any, said: str
) -> None:
    role = {"ansible.builtin.include_role": {"name": "infertune", "tasks_from": "names"}}
    code, printed = local(tmp_path, [role], **{f"infertune_{variable}": {"chat": given}})
    assert code == 2, printed
    assert said in printed, printed


FILES: dict[str, Any] = {
    "description": 'with "quotes", a \\ and a\nline, ü and 🙂',
    "extends": ["base", "quiet"],
    "port": 8101,
    "force": True,
    "now": {"vm.swappiness": 5, "platform_profile": {"value": "balanced", "required": True}},
    "backend": {"vulkan": {"server": {"ubatch_size": 512}}, "rocm": {}},
    "settings": {},
}


def test_a_dict_is_written_as_toml(tmp_path: Path) -> None:
    template = str(ANSIBLE / "roles/infertune/templates/table.toml.j2")
    lookup = (
        "lookup('ansible.builtin.template', template, template_vars={'infertune_table': files})"
    )
    text = f"{{{{ {lookup} }}}}"
    copy = {"content": text, "dest": str(tmp_path / "made.toml"), "mode": "0644"}
    code, printed = local(
        tmp_path, [{"ansible.builtin.copy": copy}], template=template, files=FILES
    )
    assert code == 0, printed
    assert tomllib.loads((tmp_path / "made.toml").read_text()) == FILES


STOCK = """# As Debian's package has it, shortened.
global:
  scrape_interval:     1s # Set the scrape interval.

# Load rules once and periodically evaluate them.
rule_files:
  # - "first_rules.yml"

# A scrape configuration containing exactly one endpoint to scrape:
scrape_configs:
  # The job name is added as a label.
  - job_name: 'prometheus'
    static_configs:
      - targets: ['localhost:9']
"""
FLUSH = "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: own\n"
BY_HAND = "scrape_configs:\n- job_name: infertune\nrule_files: [/etc/prometheus/rules/*.yml]\n"


def monitored(tmp_path: Path, **variables: Any) -> tuple[str, str]:
    """Prometheus's configuration after the role, and the recap."""
    role = {"ansible.builtin.include_role": {"name": "monitoring"}}
    given = {
        "monitoring_prometheus": str(tmp_path),
        "monitoring_grafana": "",
        "ansible_become": False,
    }
    given |= {"monitoring_reload": False, "monitoring_check": "", **variables}
    tasks = [{"ansible.builtin.add_host": {"name": "localhost", "groups": "infertune"}}, role]
    code, printed = local(tmp_path, tasks, **given)
    assert code == 0, printed
    return (tmp_path / "prometheus.yml").read_text(), printed


@pytest.mark.parametrize(
    "before", [STOCK, FLUSH, "global: {}\n", None], ids=["debian", "flush", "bare", "none"]
)
def test_what_prometheus_lacks_is_put_in(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        (tmp_path / "prometheus.yml").write_text(before)
    text, _ = monitored(tmp_path)
    now, was = yaml.safe_load(text), yaml.safe_load(before or "{}")
    assert now["rule_files"] == ["rules/*.yml"]
    jobs = {job["job_name"]: job for job in now["scrape_configs"]}
    assert jobs["infertune"]["file_sd_configs"] == [{"files": ["targets/*.json"]}]
    assert set(jobs) == {"infertune", *(job["job_name"] for job in was.get("scrape_configs") or [])}
    again, printed = monitored(tmp_path)
    assert again == text, printed
    if before is not None:
        secret = {"basic_auth": {"username": "p", "password_file": "/etc/prometheus/p"}}
        changed, _ = monitored(tmp_path, monitoring_scrape=secret)
        jobs = {job["job_name"]: job for job in yaml.safe_load(changed)["scrape_configs"]}
        assert jobs["infertune"]["basic_auth"] == secret["basic_auth"]


def test_what_an_administrator_wrote_for_prometheus_stays(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(BY_HAND)
    assert monitored(tmp_path)[0] == BY_HAND
    (tmp_path / "prometheus.yml").write_text(STOCK)
    assert monitored(tmp_path, monitoring_configure=False)[0] == STOCK


STATUS = """#!/bin/sh
echo "$*" >>{log}
case "$1" in
    status) echo '{{"state": "idle", "applied": null, "drift": []}}' ;;
    servers) echo '{{"servers": []}}' ;;
esac
"""
"""In the place of infertune: a machine that does what it is told, and notes it."""

SSH = """#!/bin/sh
for last; do :; done
case "$*" in
    *" lost "*) [ ! -e {lost} ] || exit 255 ;;
esac
exec sh -c "$last"
"""
"""In the place of ssh: here, until there is a file that says that the machine is lost."""


def played(tmp_path: Path, name: str, hosts: dict[str, Any], **variables: Any) -> tuple[int, str]:
    """Exit code of a playbook for machines of nobody, and what it printed."""
    tool = shutil.which("ansible-playbook")
    if tool is None:
        pytest.skip("ansible-playbook is not installed (pip install ansible-core ansible-lint)")
    programs = {
        "infertune": STATUS.format(log=tmp_path / "told"),
        "ssh": SSH.format(lost=tmp_path / "is-lost"),
    }
    (tmp_path / "bin").mkdir(exist_ok=True)
    for program, text in programs.items():
        path = tmp_path / "bin" / program
        path.write_text(text)
        path.chmod(0o755)
    where = {
        "ansible_become": False,
        "ansible_pipelining": True,
        "ansible_python_interpreter": sys.executable,
        "ansible_ssh_executable": str(tmp_path / "bin" / "ssh"),
    }
    inventory = {"infertune": {"hosts": hosts, "vars": {**where, **variables}}}
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    words = ["-i", str(tmp_path / "inventory.json"), f"playbooks/{name}.yml"]
    words += ["-e", '{"infertune_serial": [2, 1]}']
    done = subprocess.run(
        [tool, *words],
        cwd=ANSIBLE,
        env={
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "ANSIBLE_NOCOLOR": "1",
        },
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_machine_lost_in_its_trial_stops_the_rollout(tmp_path: Path) -> None:
    """It is lost at the question whether it is well; the other one of its batch goes back."""
    lose = f"{{{{ lookup('pipe', 'touch {tmp_path}/is-lost; echo true') }}}}"
    hosts = {"kept": {}, "lost": {"infertune_health": lose}, "later": {}}
    code, said = played(tmp_path, "rollout", hosts, infertune_profile="quiet")
    told = (tmp_path / "told").read_text().splitlines()
    assert code != 0
    assert re.search(r"^lost +:.*unreachable=1", said, re.MULTILINE), said
    assert "lost is not well with it" in said
    assert not re.search(r"^later +:", said, re.MULTILINE), said
    assert "confirm" not in told
    assert told.count("apply quiet --confirm-within 10min") == 2
    assert told.count("revert") == 1


def test_drift_names_the_profiles_that_have_another_text(tmp_path: Path) -> None:
    code, said = played(tmp_path, "drift", {"one": {}})
    assert (code, "one is as it should be" in said) == (0, True), said
    texts = {"never-there": {"description": "x"}}
    code, said = played(tmp_path, "drift", {"one": {}}, infertune_profiles=texts)
    assert code == 2
    assert "other texts of profiles: never-there" in said
    assert "drift: none" in said
    code, said = played(tmp_path, "drift", {"one": {}}, infertune_profile="quiet")
    assert code == 2
    assert "one is idle (no profile of quiet)" in said
