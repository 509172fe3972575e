# SPDX-License-Identifier: Apache-2.0
"""Starts of adopted units that are judged: what is read of them, and what keeps one down."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf_files
from doctor_support import GPU, HEALTHY, build
from infertune import admit
from infertune.base.errors import DeclarationError, UsageError
from infertune.base.root import Root
from infertune.base.units import GIB
from infertune.budget.admission import DoesNotFit
from infertune.budget.of_flags import Started, started
from infertune.cli.main import main
from infertune.host.servers import unit_server
from infertune.servers.adopted import Wanted
from infertune.servers.declaration import Foreign, declaration_text, parse_declaration
from infertune.servers.unit import foreign_drop_in, gate
from known_models import KNOWN

BIG = next(model for model in KNOWN if model.name == "gpt-oss 120B")  # 59 GiB on 96
UNIT = "/etc/systemd/system/llm.service"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("model") / "m.gguf"
    return str(gguf_files.write(where, BIG.metadata(), BIG.tensors()))


@pytest.fixture
def machine(tmp_path: Path) -> Root:
    return Root(build(tmp_path / "machine", HEALTHY).base)


def write(root: Root, path: str, text: str) -> None:
    root.at(path).parent.mkdir(parents=True, exist_ok=True)
    root.at(path).write_text(text)


def in_use(root: Root, gib: int) -> None:
    write(root, f"{GPU}/mem_info_gtt_used", f"{gib * GIB}\n")


def starts(root: Root, line: str, **environment: str) -> Started:
    write(root, UNIT, f"[Service]\nExecStart={line}\n")
    return started(unit_server(root, "llm.service", environment), "llm.service")


# -- what its files say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("-c 8192 -np 2 -ub 256 -b 512", {"ctx_size": "8192", "parallel": "2",
         "ubatch_size": "256", "batch_size": "512"}),
        ("--ctx-size=0 -np -1 -ngl 999", {"ctx_size": "0", "gpu_layers": "999"}),
        ("-fa -ctk q8_0 -ctv q4_0", {"flash_attn": "on", "cache_type_k": "q8_0",
         "cache_type_v": "q4_0"}),
        ("-fa off -nkvo -cmoe --no-mmap", {"flash_attn": "off", "kv_offload": "0",
         "n_cpu_moe": "9999", "load_mode": "none"}),
        ("-ncmoe 12 -cram 0 -ctxcp 4 --swa-full", {"n_cpu_moe": "12", "cache_ram": "0",
         "ctx_checkpoints": "4", "swa_full": "1"}),
        ("-md /m/d.gguf -mm /m/p.gguf --no-mmproj-offload --spec-type draft-simple -fit off",
         {"model_draft": "/m/d.gguf", "mmproj": "/m/p.gguf", "mmproj_offload": "0",
          "spec_type": "draft-simple", "fit": "off"}),
        ("--jinja --port 8080 -t 8 --alias x", {}),
    ],
)  # fmt: skip
def test_flags_are_settings(tmp_path: Path, flags: str, settings: dict[str, str]) -> None:
    found = starts(Root(tmp_path), f"/usr/bin/llama-server -m /m/a.gguf {flags}")
    assert (found.unknown, found.model) == (None, "/m/a.gguf")
    assert found.settings == settings


def test_drop_ins_instances_and_variables(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write(
        root,
        "/usr/lib/systemd/system/llm@.service",
        "[Service]\nEnvironmentFile=/etc/llm/%i.env\nEnvironment=WHERE=/srv/%p\n"
        "ExecStart=/usr/bin/llama-server -m ${WHERE}/%i.gguf -c 100% $LLAMA_ARGS\n",
    )
    write(
        root,
        "/run/systemd/system/llm@qwen.service.d/zz.conf",
        "[Service]\nExecStart=\n"
        "ExecStart=/usr/bin/llama-server -m ${WHERE}/%i.gguf -c $CTX $LLAMA_ARGS\n",
    )
    known = {"CTX": "4096", "LLAMA_ARGS": "-ngl 20", "LLAMA_ARG_N_PARALLEL": "3"}
    found = started(unit_server(root, "llm@qwen.service", known), "llm@qwen.service")
    assert found.model == "/srv/llm/qwen.gguf"
    assert found.settings == {"ctx_size": "4096", "gpu_layers": "20", "parallel": "3"}
    without = started(unit_server(root, "llm@qwen.service"), "llm@qwen.service")
    assert without.unknown is not None
    assert "takes flags from $LLAMA_ARGS" in without.unknown


def test_a_file_of_variables_is_read_whole(tmp_path: Path) -> None:
    """A snapshot leaves the names of models out; who judges a start needs them."""
    root = Root(tmp_path)
    write(root, "/etc/default/llm", "MODEL=/srv/m/private-name.gguf\n")
    line = "/usr/bin/llama-server -m ${MODEL}\nEnvironmentFile=-/etc/default/llm"
    assert starts(root, line).model == "/srv/m/private-name.gguf"


def test_no_device_is_the_cpu(tmp_path: Path) -> None:
    assert starts(Root(tmp_path), "llama-server -m /m/a.gguf -dev none").on_cpu
    assert not starts(Root(tmp_path), "llama-server -m /m/a.gguf").on_cpu


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/usr/bin/sleep 9", "llm.service starts no server that infertune knows"),
        ("/usr/bin/ollama serve", "what Ollama loads is not known before it does"),
        ("llama-server -hf a/b:Q4", "with -hf it is not known how much it takes"),
        ("llama-server -m /m/a.gguf -ot x=CPU", "with -ot it is not known"),
        ("llama-server --models-dir /m", "with --models-dir it is not known"),
        ("llama-server --models-preset /m/a.ini", "with a preset it is not known"),
        ("llama-server -c 1", "names no model"),
        ("llama-server -m a.gguf", "a.gguf is not the whole path of a file"),
        ("llama-server -m %d/a.gguf", "%d/a.gguf is not the whole path"),
        ("llama-server -m /m/${SECRET}.gguf", "${SECRET}.gguf is not the whole path"),
        ("llama-server -m /m/a.gguf -c $CTX", "ctx_size: "),
        ("llama-server -m /m/a.gguf -c many", "ctx_size: "),
        ("llama-server -m /m/a.gguf -cram -1", "cache_ram: "),
        ("podman run ghcr.io/llama-server -m /m/a.gguf", "a container has files of its own"),
    ],
)
def test_what_cannot_be_judged(tmp_path: Path, line: str, why: str) -> None:
    found = starts(Root(tmp_path), line)
    assert found.unknown is not None
    assert why in found.unknown


# -- the judgement -------------------------------------------------------------------------


def adopted(**more: object) -> Foreign:
    return Foreign("llm", "long-context", "llm.service", "vulkan", **more)  # type: ignore[arg-type]


def served(root: Root, model: str) -> None:
    line = f"llama-server -m {model} -c 8192 -np 1 -ngl 999 -cram 0"
    write(root, UNIT, f"[Service]\nExecStart=/usr/bin/{line}\n")


def test_a_llama_server_is_judged_by_its_flags(machine: Root, model: str) -> None:
    served(machine, model)
    assert admit.judge(machine, adopted(), {}) == admit.Judged("llm.service", None, known=True)
    in_use(machine, 60)
    with pytest.raises(DoesNotFit, match=r"^does not fit now: GTT: .*nothing was started"):
        admit.judge(machine, adopted(), {})
    forced = admit.judge(machine, adopted(), {}, force=True)
    assert forced.remark is not None
    assert forced.remark.startswith('admission = "warn" overrides: does not fit now: GTT: ')


def test_what_is_declared_counts_for_any_engine(machine: Root) -> None:
    write(machine, UNIT, "[Service]\nExecStart=/usr/bin/ollama serve\n")
    unknown = admit.judge(machine, adopted(), {})
    assert (unknown.known, unknown.remark) == (
        False,
        "not judged: what Ollama loads is not known before it does",
    )
    assert admit.judge(machine, adopted(memory=40 * GIB), {}).remark is None
    in_use(machine, 60)
    with pytest.raises(DoesNotFit, match="does not fit now: GTT: 40 GiB of the 36 GiB"):
        admit.judge(machine, adopted(memory=40 * GIB), {})
    with pytest.raises(DoesNotFit, match="does not fit: GTT: 200 GiB"):
        admit.judge(machine, adopted(memory=200 * GIB), {})


def test_what_the_unit_itself_holds_does_not_count(machine: Root) -> None:
    in_use(machine, 60)
    write(machine, "/sys/class/kfd/kfd/proc/4242/vram_1", f"{60 * GIB}\n")
    for node in machine.at("/sys/class/kfd/kfd/topology/nodes").iterdir():
        (node / "gpu_id").write_text("1\n")
    for unit in ("other.service", "llm.service"):
        write(machine, "/proc/4242/cgroup", f"0::/system.slice/{unit}\n")
        write(machine, "/proc/4242/comm", "engine\n")
        if unit == "llm.service":
            assert admit.judge(machine, adopted(memory=40 * GIB), {}).remark is None
        else:
            with pytest.raises(DoesNotFit, match=r"other\.service \(engine, pid 4242\)"):
                admit.judge(machine, adopted(memory=40 * GIB), {})


def test_a_file_that_is_not_there_is_not_refused(machine: Root) -> None:
    write(machine, UNIT, "[Service]\nExecStart=/usr/bin/llama-server -m /none/m.gguf\n")
    found = admit.judge(machine, adopted(), {})
    assert not found.known
    assert found.remark is not None
    assert found.remark.startswith("whether the model fits is unknown: ")


# -- the step before a start ----------------------------------------------------------------


@pytest.fixture
def step(machine: Root, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """A start of a unit that is declared with this line more, on a machine that is full."""
    served(machine, model)
    in_use(machine, 60)
    monkeypatch.setattr(admit, "Root", lambda _: machine)
    monkeypatch.setattr(admit.signal, "alarm", lambda _: 0)
    monkeypatch.setattr(admit.signal, "signal", lambda *_: None)
    monkeypatch.setattr(admit.sys, "argv", ["admit", "llm"])

    def run(line: str) -> int:
        text = f'profile = "long-context"\nunit = "llm.service"\nbackend = "vulkan"\n{line}\n'
        write(machine, "/etc/infertune/servers.d/llm.toml", text)
        return admit.main()

    return run


def test_only_a_misfit_that_is_to_be_refused_keeps_it_down(
    step: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    for line, code, says in (
        ("", 0, ""),
        ('admission = "warn"', 0, r"<4>infertune: admission = \"warn\" overrides: does not fit"),
        (
            'admission = "refuse"',
            2,
            "<3>infertune: does not fit now: GTT: .*; nothing was started; ",
        ),
        ('admission = "refuse"\nmemory = "1GiB"', 0, ""),
        ('admission = "refuse"\nmemory = "99 bananas"', 0, "<4>infertune: not judged: .*memory"),
    ):
        assert step(line) == code, line
        error = capfd.readouterr().err
        assert error.count("\n") == bool(says), error
        assert re.match(says, error), error


def test_a_fault_of_ours_keeps_nothing_down(
    step: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for fault in (ValueError("x\ny"), UsageError("no"), OSError(5, "x"), RecursionError()):

        def broken(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(admit, "check", broken)
        assert step('admission = "refuse"') == 0
        assert capfd.readouterr().err.startswith("<4>infertune: not judged: ")
    monkeypatch.setattr(admit.sys, "argv", ["admit"])
    assert admit.main() == 0
    monkeypatch.setattr(admit.sys, "argv", ["admit", "../etc"])
    assert admit.main() == 0


def test_a_disk_that_hangs_keeps_it_for_so_long_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(admit.os, "_exit", ended.append)
    bounds: list[int] = []
    monkeypatch.setattr(admit.signal, "alarm", bounds.append)
    handlers: list[object] = []
    monkeypatch.setattr(admit.signal, "signal", lambda _, handler: handlers.append(handler))
    monkeypatch.setattr(admit.sys, "argv", ["admit", "nothing-by-this-name"])
    assert admit.main() == 0
    assert bounds == [20]
    [given_up] = handlers
    assert callable(given_up)
    capfd.readouterr()
    given_up(14, None)
    assert ended == [0]
    assert capfd.readouterr().err == "<4>infertune: not judged: it was not known after 20 s\n"


# -- declared, and asked for ----------------------------------------------------------------


def parsed(more: str, unit: str = "llm.service") -> Foreign:
    text = f'unit = "{unit}"\nprofile = "quiet"\n{more}\n'
    found = parse_declaration("llm", text, "llm.toml")
    assert isinstance(found, Foreign)
    return found


def test_a_declaration_says_it_and_is_written_back() -> None:
    for more, admission, memory in (
        ("", None, None),
        ('admission = "warn"', "warn", None),
        ('admission = "refuse"\nmemory = "64GiB"', "refuse", 64 * GIB),
    ):
        found = parsed(more)
        assert (found.admission, found.memory) == (admission, memory)
        assert parse_declaration("llm", declaration_text(found), "x") == found


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('admission = "yes"', "llm.toml:3: 'admission' is one of warn, refuse, not 'yes'"),
        ('memory = "1GiB"', "llm.toml:3: 'memory' goes with 'admission'"),
        ('admission = "warn"\nmemory = 3', "llm.toml:4: 'memory' is a text in quotes, not 3"),
        ('admission = "warn"\nmemory = "3"', "llm.toml:4: 'memory': '3' is not a size"),
        ('admission = "warn"\nmemory = "0GiB"', "llm.toml:4: 'memory' is what the server takes"),
        ('admission = "warn"\nmemory = "5%"', "llm.toml:4: 'memory': "),
        ('user = "anna"\nadmission = "warn"', "llm.toml:4: 'admission': only starts of the"),
    ],
)
def test_what_is_wrong_with_it_is_said_with_its_line(more: str, says: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parsed(more)
    assert str(caught.value).startswith(says)
    with pytest.raises(DeclarationError, match=r"box\.scope is not started by systemd"):
        parsed('admission = "warn"', unit="box.scope")
    with pytest.raises(DeclarationError, match="'admission' does not go with 'model'"):
        parse_declaration("x", 'profile="q"\nport=8080\nmodel="/m"\nadmission="warn"', "x.toml")


def test_only_refuse_lets_the_step_fail() -> None:
    step = gate("llm", "refuse", "/opt/in fer%tune/bin/python")
    assert step == '"/opt/in fer%%tune/bin/python" -I -m infertune.admit llm'
    assert gate("llm", "warn", "/usr/bin/python3") == "-/usr/bin/python3 -I -m infertune.admit llm"
    drop_in = foreign_drop_in(Wanted("quiet", "cpu", directives={"ExecStartPre": step}))
    assert f"\nExecStartPre={step}\n" in drop_in
    with pytest.raises(UsageError, match="lies in a home"):
        gate("llm", "warn", "/home/anna/venv/bin/python")


# -- the verb -----------------------------------------------------------------------------


def test_the_verb(machine: Root, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*words: str) -> tuple[int, str, str]:
        code = main(["--root", str(machine.base), "admit", *words])
        return code, *capsys.readouterr()

    served(machine, model)
    text = 'profile = "long-context"\nunit = "llm.service"\nbackend = "vulkan"\n'
    write(machine, "/etc/infertune/servers.d/llm.toml", text + 'admission = "warn"\n')
    assert say("llm") == (0, "llm.service: fits\n", "")
    code, out, _ = say("llm", "--json")
    document = json.loads(out)
    assert (code, document["fits"], document["admission"]) == (0, True, "warn")
    in_use(machine, 60)
    code, out, error = say("llm")
    assert (code, out) == (2, "")
    assert error.startswith("infertune: does not fit now: GTT: ")
    code, out, _ = say("llm", "--json")
    assert (code, json.loads(out)["fits"]) == (2, False)
    write(machine, UNIT, "[Service]\nExecStart=/usr/bin/ollama serve\n")
    code, out, _ = say("llm", "--json")
    assert (code, json.loads(out)["fits"]) == (0, None)
    code, _, error = say("nobody")
    assert (code, error.splitlines()[0]) == (2, "infertune: no unit is adopted as 'nobody'")
    own = 'profile = "long-context"\nport = 8080\nmodel = "/m.gguf"\n'
    write(machine, "/etc/infertune/servers.d/own.toml", own)
    assert "infertune starts 'own' itself" in say("own")[2]
