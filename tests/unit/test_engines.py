# SPDX-License-Identifier: Apache-2.0
"""Inference engines: what their answers mean, and that asking changes nothing.

The answers are recorded (llama-server: build 11669 of Debian) or written after the documents that
each engine names as its source.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infertune.base.root import Root
from infertune.exporter import asking
from infertune.exporter.asking import STATES, ask
from infertune.exporter.collectors.engines import ENGINES_COLLECTOR, MAX_MODELS, of_one
from infertune.exporter.page import render
from infertune.exporter.runner import check, collect
from infertune.exporter.servers import asked
from infertune.host.servers import unit_engine
from infertune.servers.engines import ENGINES
from infertune.servers.engines.base import MAX_ASKED, MODEL_STATES, Answer, Known, Model, Reading
from infertune.servers.engines.exposition import samples

COUNTED = {"tokens_predicted_total": 4.0, "requests_processing": 0.0}
PAGE = "llamacpp:tokens_predicted_total 4\nllamacpp:requests_processing 0\n"


def read(
    engine: str, answers: Mapping[str, object], known: Known | None = None
) -> tuple[Reading, list[str]]:
    """What an engine says where it answers so, and what it was asked."""
    talk, paths, answer = ENGINES[engine].talk(known or Known()), [], None
    while True:
        try:
            path = next(talk) if answer is None else talk.send(answer)
        except StopIteration as end:
            return end.value, paths
        paths.append(path)
        found = answers[path]  # a KeyError is a question that nobody expected
        if not isinstance(found, Answer):
            found = Answer("up", found if isinstance(found, str) else json.dumps(found))
        answer = found


# -- llama-server --------------------------------------------------------------------


def props(build: str = "b11669-Debian", **more: object) -> dict[str, object]:
    return {"build_info": build, "model_alias": "gemma", "is_sleeping": False, **more}


def router(build: str = "b11669-Debian") -> dict[str, object]:
    return {
        "role": "router",
        "max_instances": 2,
        "model_alias": "llama-server",
        "build_info": build,
    }


def listed(*models: tuple[str, str], arguments: str = "--metrics") -> dict[str, object]:
    return {
        "data": [
            {"id": name, "status": {"value": state, "args": [arguments]}, "object": "model"}
            for name, state in models
        ],
        "object": "list",
    }


def test_one_model() -> None:
    reading, _ = read("llama-server", {"/props": props(), "/metrics": PAGE})
    assert reading == Reading("up", (Model("gemma", "loaded", COUNTED),))


def test_only_known_metrics_pass() -> None:
    page = PAGE + '# TYPE other gauge\nother 3\nllamacpp:requests_deferred{a="b"} 4\nllamacpp:x 1\n'
    reading, _ = read("llama-server", {"/props": props(), "/metrics": page})
    assert reading.models[0].values == COUNTED
    for wrong in ("<html>not metrics</html>", "llamacpp:n_tokens_max x", "a 1 " + 400 * "9"):
        with pytest.raises(ValueError, match=r"."):
            read("llama-server", {"/props": props(), "/metrics": wrong})


@pytest.mark.parametrize("state", ["loading", "denied", "timeout", "unreachable"])
def test_a_server_that_does_not_tell_its_model(state: str) -> None:
    assert read("llama-server", {"/props": Answer(state)})[0] == Reading(state)


def test_without_metrics_there_is_a_model_without_values() -> None:
    answers = {"/props": props(), "/metrics": Answer("no-metrics")}
    assert read("llama-server", answers)[0] == Reading("no-metrics", (Model("gemma", "loaded"),))


def test_a_model_that_sleeps_is_not_asked() -> None:
    reading, paths = read("llama-server", {"/props": props(is_sleeping=True)})
    assert reading == Reading("up", (Model("gemma", "sleeping"),))
    assert paths == ["/props"]


@pytest.mark.parametrize(
    ("build", "known", "asked"),
    [
        ("b10519-x", Known(), True),
        ("b10518-x", Known(), False),
        ("b0-unknown", Known(), False),
        ("", Known(), False),
        ("b10518-x", Known(never_sleeps=True), True),
        ("b0-unknown", Known(never_sleeps=True), True),
    ],
)
def test_a_build_whose_metrics_keep_a_model_is_not_asked(
    build: str, known: Known, asked: bool
) -> None:
    reading, paths = read("llama-server", {"/props": props(build), "/metrics": PAGE}, known)
    assert paths == (["/props", "/metrics"] if asked else ["/props"])
    assert reading.state == ("up" if asked else "no-metrics")
    assert reading.models[0].state == "loaded"


def test_a_build_that_knows_no_sleep_is_asked() -> None:
    answers = {"/props": {"build_info": "b4000-x", "model_alias": "m"}, "/metrics": PAGE}
    assert read("llama-server", answers)[0].state == "up"


def test_a_router_tells_of_all_and_is_asked_of_loaded_ones() -> None:
    names = [("a", "loaded"), ("b/c d", "loaded"), ("e", "sleeping"), ("f", "unloaded")]
    more = [("g", "loading"), ("h", "downloading"), ("i", "something new")]
    answers = {
        "/props": router(),
        "/models": listed(*names, *more),
        "/metrics?model=a&autoload=false": PAGE,
        "/metrics?model=b%2Fc%20d&autoload=false": Answer("not-understood"),  # unloaded meanwhile
    }
    reading, _ = read("llama-server", answers)
    assert reading.state == "up"
    assert [(each.name, each.state, each.values) for each in reading.models] == [
        ("a", "loaded", COUNTED),
        ("b/c d", "loaded", {}),
        ("e", "sleeping", {}),
        ("f", "unloaded", {}),
        ("g", "loading", {}),
        ("h", "loading", {}),
        ("i", None, {}),
    ]


def test_a_model_that_did_not_start() -> None:
    broken = listed(("a", "unloaded"))
    broken["data"][0]["status"]["failed"] = True  # type: ignore[index]
    reading, _ = read("llama-server", {"/props": router(), "/models": broken})
    assert reading.models == (Model("a", "failed"),)


@pytest.mark.parametrize(
    ("build", "arguments", "own", "asked"),
    [
        ("b10519-x", "--sleep-idle-seconds", False, True),
        ("b10518-x", "--sleep-idle-seconds", True, False),
        ("b10518-x", "--metrics", True, True),
        ("b10518-x", "--metrics", False, False),  # a variable may have it sleep
    ],
)
def test_an_old_router_is_asked_where_none_of_its_models_sleeps(
    build: str, arguments: str, own: bool, asked: bool
) -> None:
    answers = {
        "/props": router(build),
        "/models": listed(("a", "loaded"), arguments=arguments),
        "/metrics?model=a&autoload=false": PAGE,
    }
    reading, paths = read("llama-server", answers, Known(never_sleeps=own))
    assert (len(paths) == 3) == asked
    assert reading.state == ("up" if asked else "no-metrics")


def test_a_router_without_metrics() -> None:
    answers = {
        "/props": router(),
        "/models": listed(("a", "loaded")),
        "/metrics?model=a&autoload=false": Answer("no-metrics"),
    }
    assert read("llama-server", answers)[0] == Reading("no-metrics", (Model("a", "loaded"),))


def test_a_router_of_many_models_is_asked_of_some() -> None:
    names = [(f"m{number}", "loaded") for number in range(MAX_ASKED + 5)]
    answers = {f"/metrics?model={name}&autoload=false": PAGE for name, _ in names}
    reading, paths = read(
        "llama-server", {**answers, "/props": router(), "/models": listed(*names)}
    )
    assert len(reading.models) == MAX_ASKED + 5
    assert len(paths) == MAX_ASKED + 2


# -- the others ----------------------------------------------------------------------


def test_llama_swap_is_asked_what_runs_and_nothing_else() -> None:
    running = {
        "running": [
            {"model": "qwen3:32b", "state": "ready", "ttl": 300, "cmd": "x", "proxy": "y"},
            {"model": "b", "state": "starting"},
            {"model": "c", "state": "new word"},
        ]
    }
    reading, paths = read("llama-swap", {"/running": running})
    assert paths == ["/running"]
    states = [(each.name, each.state) for each in reading.models]
    assert states == [("qwen3:32b", "loaded"), ("b", "loading"), ("c", None)]


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (
            {"models": [{"name": "gemma3:latest", "size": 6591830464, "size_vram": 5}]},
            ["gemma3:latest"],
        ),
        ({"models": []}, []),
        ({"models": None}, []),
    ],
)
def test_ollama(answer: object, names: list[str]) -> None:
    reading, paths = read("ollama", {"/api/ps": answer})
    assert paths == ["/api/ps"]
    assert reading == Reading("up", tuple(Model(name, "loaded") for name in names))


LEMONADE_HEALTH = {
    "status": "ok",
    "version": "10.9.0",
    "model_loaded": "Qwen3-8B-GGUF",
    "all_models_loaded": [
        {"model_name": "Qwen3-8B-GGUF", "recipe": "llamacpp", "device": "gpu"},
        {"model_name": "Qwen3-1.7b-FLM", "recipe": "flm", "device": "npu"},
    ],
}
LEMONADE_METRICS = """\
# HELP lemonade_server_up Whether the Lemonade server is running.
# TYPE lemonade_server_up gauge
lemonade_server_up 1
lemonade_model_output_tokens{model_name="Qwen3-8B-GGUF",recipe="llamacpp"} 7
lemonade_model_output_tokens_total{model_name="Qwen3-8B-GGUF",recipe="llamacpp"} 70
lemonade_model_output_tokens_total{model_name="Qwen3-1.7b-FLM",recipe="flm"} 30
lemonade_model_input_tokens_total{model_name="Qwen3-1.7b-FLM",recipe="flm"} 20
lemonade_model_output_tokens_total{model_name="gone",recipe="flm"} 1
lemonade_llamacpp_tokens_predicted_total{model_name="Qwen3-8B-GGUF",recipe="llamacpp"} 71
lemonade_llamacpp_tokens_predicted_seconds_total{model_name="Qwen3-8B-GGUF"} 2.5
lemonade_output_tokens_total 101
"""


def test_lemonade() -> None:
    answers = {"/api/v1/health": LEMONADE_HEALTH, "/metrics": LEMONADE_METRICS}
    reading, _ = read("lemonade", answers)
    counted = {"tokens_predicted_total": 71.0, "tokens_predicted_seconds_total": 2.5}
    assert reading == Reading(
        "up",
        (
            Model("Qwen3-8B-GGUF", "loaded", counted),
            Model(
                "Qwen3-1.7b-FLM",
                "loaded",
                {"tokens_predicted_total": 30.0, "prompt_tokens_total": 20.0},
            ),
            Model("gone", "unloaded", {"tokens_predicted_total": 1.0}),
        ),
    )


def test_lemonade_does_not_ask_a_server_that_is_to_sleep() -> None:
    health = json.loads(json.dumps(LEMONADE_HEALTH))
    health["all_models_loaded"][0]["launch_command"] = ["llama-server", "--sleep-idle-seconds", "9"]
    reading, paths = read("lemonade", {"/api/v1/health": health})
    assert paths == ["/api/v1/health"]
    assert reading.state == "no-metrics"
    assert [each.state for each in reading.models] == ["loaded", "loaded"]


VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-0.6B"} 2.0
vllm:num_requests_running{engine="1",model_name="Qwen/Qwen3-0.6B"} 1.0
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-0.6B"} 0.0
vllm:engine_sleep_state{engine="0",model_name="Qwen/Qwen3-0.6B",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="Qwen/Qwen3-0.6B",sleep_state="discard_all"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="Qwen/Qwen3-0.6B"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="Qwen/Qwen3-0.6B"} 0.5
vllm:prefix_cache_hits_total{engine="0",model_name="Qwen/Qwen3-0.6B"} 16.0
vllm:prompt_tokens_total{engine="0",model_name="Qwen/Qwen3-0.6B"} 55.0
vllm:generation_tokens_total{engine="0",model_name="Qwen/Qwen3-0.6B"} 1.2e+03
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="Qwen/Qwen3-0.6B"} 0.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="Qwen/Qwen3-0.6B"} 4.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="Qwen/Qwen3-0.6B"} 0.5
process_resident_memory_bytes 1.0e+09
"""


def test_vllm() -> None:
    reading, paths = read("vllm", {"/metrics": VLLM})
    assert paths == ["/metrics"]
    [model] = reading.models
    assert (model.name, model.state) == ("Qwen/Qwen3-0.6B", "loaded")
    assert model.values == {
        "requests_processing": 3.0,
        "requests_deferred": 0.0,
        "kv_cache_usage_ratio": 0.5,
        "prompt_tokens_cached_total": 16.0,
        "prompt_tokens_total": 55.0,
        "tokens_predicted_total": 1200.0,
        "first_token_seconds_total": 0.5,
        "first_tokens_total": 4.0,
    }


def test_vllm_asleep() -> None:
    asleep = VLLM.replace('sleep_state="awake"} 1.0', 'sleep_state="awake"} 0.0')
    assert read("vllm", {"/metrics": asleep})[0].models[0].state == "sleeping"


def test_sglang() -> None:
    page = (
        'sglang:num_running_reqs{model_name="q",tp_rank="0"} 1.0\n'
        'sglang:num_queue_reqs{model_name="q",priority=""} 3.0\n'
        'sglang:num_queue_reqs{model_name="q",priority="1"} 2.0\n'
        'sglang:token_usage{model_name="q"} 0.37\n'
        'sglang:generation_tokens_total{model_name="q",is_streaming="true"} 5.0\n'
        'sglang:generation_tokens_total{model_name="q",is_streaming="false"} 6.0\n'
        'sglang:time_to_first_token_seconds_sum{model_name="q"} 2.5\n'
        'sglang:time_to_first_token_seconds_count{model_name="q"} 5\n'
        'sglang:gen_throughput{model_name="q"} 86.5\n'
    )
    reading, paths = read("sglang", {"/metrics": page})
    assert paths == ["/metrics"]
    assert reading.models[0].values == {
        "requests_processing": 1.0,
        "requests_deferred": 3.0,
        "kv_cache_usage_ratio": 0.37,
        "tokens_predicted_total": 11.0,
        "first_token_seconds_total": 2.5,
        "first_tokens_total": 5.0,
    }


def test_labels_of_metrics() -> None:
    page = 'a_x{m="q\\"{},\\\\ \\n",n="2"} 1\na_y 2 17\nb_x{broken} 1\n'
    found = [(line.name, dict(line.labels), line.value) for line in samples(page, "a_")]
    assert found == [("a_x", {"m": 'q"{},\\ \n', "n": "2"}, 1.0), ("a_y", {}, 2.0)]
    with pytest.raises(ValueError, match="labels"):
        list(samples("a{m=1} 1", "a"))


# -- nothing that an engine sends costs more than its own values -----------------------


@pytest.mark.parametrize("engine", ENGINES)
@given(
    texts=st.lists(
        st.one_of(
            st.text(max_size=60),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(
                            [
                                "data",
                                "models",
                                "running",
                                "id",
                                "name",
                                "status",
                                "role",
                                "build_info",
                            ]
                        ),
                        inner,
                        max_size=3,
                    )
                ),
                max_leaves=8,
            ).map(json.dumps),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_answer_is_a_reading_or_none(engine: str, texts: list[str]) -> None:
    talk = ENGINES[engine].talk(Known())
    reading = Reading("not-understood")
    with contextlib.suppress(Exception):
        next(talk)
        with contextlib.suppress(StopIteration):
            for text in [*texts, *[""] * 30]:
                try:
                    talk.send(Answer("up", text))
                except StopIteration as end:
                    reading = end.value
                    raise
    found = list(of_one("s", reading))
    check(ENGINES_COLLECTOR, found)
    render(ENGINES_COLLECTOR.metrics, found).decode()
    assert reading.state in STATES


def test_a_name_can_break_neither_page_nor_terminal() -> None:
    loaded = '{"models": [{"name": "\\ud800\\n\\u001b[2J\\"x"}, {"name": "%s"}]}' % ("y" * 500)
    reading, _ = read("ollama", {"/api/ps": loaded})
    found = list(of_one("s", reading))
    check(ENGINES_COLLECTOR, found)
    text = render(ENGINES_COLLECTOR.metrics, found).decode()
    assert "\x1b" not in text
    assert max(len(each.name) for each in reading.models) == 128


def told(reading: Reading) -> dict[str, object]:
    """The values by the metric's own part of its name."""
    found = of_one("s", reading)
    values = {each.metric.removeprefix("infertune_model_"): each.value for each in found}
    return {name: value for name, value in values.items() if "state" not in name}


@pytest.mark.parametrize("number", ["NaN", "+Inf", "-1", "1e999"])
def test_a_number_that_is_none_is_not_told(number: str) -> None:
    page = f"{PAGE}llamacpp:n_decode_total {number}\n"
    assert told(read("llama-server", {"/props": props(), "/metrics": page})[0]) == COUNTED


def test_what_is_not_known_of_a_part_is_not_known_of_all() -> None:
    lines = [
        f'vllm:{name}{{model_name="a",engine="{number}"}} {value}\n'
        for name in ("kv_cache_usage_perc", "prompt_tokens_total")
        for number, value in enumerate(("5", "NaN"))
    ]
    for page in ("".join(lines), "".join(reversed(lines)), lines[1]):
        reading, _ = read("vllm", {"/metrics": page})
        assert reading.models[0].state == "loaded"
        assert told(reading) == {}


@pytest.mark.parametrize("number", ["1_0", "\u0663", "0x10", "five"])
def test_a_number_of_another_language_is_not_understood(number: str) -> None:
    with pytest.raises(ValueError, match=r"no page|could not convert"):
        list(samples(f"llamacpp:n_decode_total {number}\n", "llamacpp:"))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("page", ["", "other_metric 1\n"])
def test_a_page_of_another_program_is_not_understood(engine: str, page: str) -> None:
    assert read(engine, {"/metrics": page})[0] == Reading("not-understood")
    with pytest.raises(ValueError, match="no page of llama-server's"):
        read("llama-server", {"/props": props(), "/metrics": page})
    with pytest.raises(KeyError):
        read("ollama", {"/api/ps": {"models of": "another"}})


def test_a_name_may_hold_other_ends_of_lines() -> None:
    page = 'vllm:num_requests_running{model_name="a\u2028\x85\x0cb"} 1\r\n'
    (model,) = read("vllm", {"/metrics": page})[0].models
    assert model.values == {"requests_processing": 1.0}
    assert model.name == r"a\u2028\x85\x0cb"


def test_a_model_that_is_told_twice_counts_once() -> None:
    twice = {"models": [{"name": "a"}, {"name": "a"}]}
    check(ENGINES_COLLECTOR, list(of_one("s", read("ollama", {"/api/ps": twice})[0])))


def test_the_loaded_ones_of_many_models_are_told() -> None:
    many = [(f"a{number:03}", "unloaded") for number in range(MAX_MODELS + 9)]
    answers = {
        "/props": router(),
        "/models": listed(*many, ("z", "loaded")),
        "/metrics?model=z&autoload=false": PAGE,
    }
    found = list(of_one("s", read("llama-server", answers)[0]))
    models = {each.labels[1] for each in found if each.metric == "infertune_model_state"}
    assert len(models) == MAX_MODELS
    assert "z" in models


def test_every_value_an_engine_gives_is_declared() -> None:
    from infertune.servers.engines import labelled, lemonade, llama_server

    given = {*llama_server.VALUES.values(), *labelled._VLLM.values(), *labelled._SGLANG.values()}
    given |= {*lemonade._OWN.values()}
    declared = {
        metric.name.removeprefix("infertune_model_") for metric in ENGINES_COLLECTOR.metrics
    }
    assert given <= declared


# -- which engine ----------------------------------------------------------------------


def write(base: Path, path: str, text: str) -> None:
    file = base / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("unit", "text", "engine"),
    [
        ("ollama.service", "[Service]\nExecStart=/usr/local/bin/ollama serve\n", "ollama"),
        ("lemond.service", "[Service]\nExecStart=/usr/bin/lemond --port 13305\n", "lemonade"),
        (
            "swap.service",
            "[Service]\nExecStart=/opt/llama-swap --config /etc/c.yaml\n",
            "llama-swap",
        ),
        ("v.service", "[Service]\nExecStart=/opt/v/bin/vllm serve Qwen/Qwen3-0.6B\n", "vllm"),
        (
            "llm@.service",
            "[Service]\nExecStart=/usr/bin/llama-server -m /m/%i.gguf\n",
            "llama-server",
        ),
        ("own.service", "[Service]\nExecStart=/opt/own-engine\n", None),
    ],
)
def test_an_engine_is_recognised_by_what_its_unit_starts(
    unit: str, text: str, engine: str | None, tmp_path: Path
) -> None:
    write(tmp_path, f"/etc/systemd/system/{unit}", text)
    name = unit.replace("@.", "@qwen.")
    write(tmp_path, "/etc/infertune/servers.d/x.toml", declared(name))
    found = asked(Root(tmp_path))["x"].engine
    assert (found.id if found else None) == engine


def test_a_drop_in_may_start_another_engine(tmp_path: Path) -> None:
    write(
        tmp_path,
        "/usr/lib/systemd/system/a.service",
        "[Service]\nExecStart=/usr/bin/ollama serve\n",
    )
    text = "[Service]\nExecStart=\nExecStart=/usr/bin/llama-server -m /m/x.gguf\n"
    write(tmp_path, "/etc/systemd/system/a.service.d/own.conf", text)
    assert unit_engine(Root(tmp_path), "a.service") == "llama.cpp"


def declared(unit: str, port: int = 9000, engine: str | None = None) -> str:
    text = f'profile = "quiet"\nunit = "{unit}"\nport = {port}\n'
    return text + (f'engine = "{engine}"\n' if engine else "")


def test_what_is_declared_counts_before_what_is_recognised(tmp_path: Path) -> None:
    write(tmp_path, "/etc/systemd/system/a.service", "[Service]\nExecStart=/usr/bin/ollama serve\n")
    write(tmp_path, "/etc/infertune/servers.d/x.toml", declared("a.service", engine="vllm"))
    found = asked(Root(tmp_path))["x"].engine
    assert found is ENGINES["vllm"]


def test_an_engine_that_is_not_known_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a question would do to it is not known either."""
    write(tmp_path, "/etc/infertune/servers.d/x.toml", declared("a.service"))
    root = Root(tmp_path)
    root.live = True

    def refuse(talks: Mapping[str, Any]) -> dict[str, Reading]:
        assert not talks
        return {}

    monkeypatch.setattr("infertune.exporter.collectors.engines.ask", refuse)
    result = collect(ENGINES_COLLECTOR, root)
    assert result.state == "ok", result.why
    assert [s.labels for s in result.samples if s.value] == [("x", "unknown-engine")]


def test_our_own_server_is_seen_not_to_sleep(tmp_path: Path) -> None:
    group = "/sys/fs/cgroup/infertune.slice/infertune-server@{}.service"
    write(tmp_path, "/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    for pid, name, more in ((11, "a", ""), (12, "b", "--sleep-idle-seconds\09\0"), (13, "c", "")):
        write(
            tmp_path,
            f"/etc/infertune/servers.d/{name}.toml",
            f'profile = "quiet"\nport = {pid + 8000}\n',
        )
        write(tmp_path, f"{group.format(name)}/cgroup.procs", f"{pid}\n")
        if name != "c":  # whose process is not shown
            write(tmp_path, f"/proc/{pid}/cmdline", f"llama-server\0--metrics\0{more}")
    found = asked(Root(tmp_path))
    assert {name: each.known.never_sleeps for name, each in found.items()} == {
        "a": True,
        "b": False,
        "c": False,
    }


# -- a stand-in that knows what a scrape would do ----------------------------------------


class StandIn:
    """A server of some engine.  ``touched``: what a scrape did to it that it must not do."""

    def __init__(self, engine: str, build: int = 11669) -> None:
        self.engine, self.build = engine, build
        self.touched: list[str] = []
        self.states = {"awake": "loaded", "asleep": "sleeping", "away": "unloaded"}
        self.afterwards: str | None = None
        """What "awake" is as soon as it was told what it is."""

    def answer(self, method: str, target: str) -> tuple[int, object]:
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if method != "GET":
            self.touched.append(f"{method} {target}")
            return 200, {}
        answers = {
            "router": self._router,
            "llama-server": self._one,
            "llama-swap": self._swap,
            "ollama": self._ollama,
            "lemonade": self._lemonade,
            "vllm": self._page,
            "sglang": self._page,
        }
        answer = answers[self.engine](url.path, query)
        told = "/models" if self.engine == "router" else "/props"
        if self.afterwards and url.path == told:
            self.states["awake"] = self.afterwards
        return answer

    def _use(self, what: str) -> None:
        self.touched.append(what)

    def _model_metrics(self, name: str, *, autoload: bool) -> tuple[int, object]:
        state = self.states.get(name)
        if state == "unloaded":
            if not autoload:
                return 400, {"error": "model is not loaded"}
            self._use(f"loaded {name}")
        elif self.build < 10519:
            self._use(f"woke {name}" if state == "sleeping" else f"kept {name}")
        return 200, PAGE

    def _router(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path == "/props" and "model" not in query:
            return 200, router(f"b{self.build}-x")
        if path == "/models" and not query:
            sleep = "--sleep-idle-seconds"
            return 200, listed(*self.states.items(), arguments=sleep)
        if path == "/metrics" and "model" in query:
            return self._model_metrics(query["model"], autoload=query.get("autoload") != "false")
        if path == "/health":
            return 200, {"status": "ok"}
        self._use(f"{path} {query}")
        return 400, {}

    def _one(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path == "/props":
            return 200, props(f"b{self.build}-x", is_sleeping=self.states["awake"] == "sleeping")
        if path == "/metrics":
            return self._model_metrics("awake", autoload=False)
        if path != "/health":
            self._use(path)
        return 200, {}

    def _swap(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path in ("/running", "/health", "/metrics"):
            return 200, {"running": [{"model": "awake", "state": "ready"}]}
        self._use(path)  # /upstream/MODEL starts it
        return 200, {}

    def _ollama(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path in ("/api/ps", "/api/tags", "/api/version", "/"):
            return 200, {"models": [{"name": "awake"}]}
        self._use(path)
        return 200, {}

    def _lemonade(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path == "/api/v1/health":
            entry = {"model_name": "awake", "launch_command": ["--sleep-idle-seconds", "9"]}
            return 200, {"all_models_loaded": [entry]}
        self._use(path)  # /metrics asks the llama-server behind the model
        return 200, ""

    def _page(self, path: str, query: dict[str, str]) -> tuple[int, object]:
        if path != "/metrics":
            self._use(path)  # SGLang's /health may generate
        return 200, VLLM if self.engine == "vllm" else 'sglang:token_usage{model_name="q"} 0.1\n'


@contextlib.contextmanager
def serving(stand_in: StandIn) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, found = stand_in.answer(self.command, self.path)
            body = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("build", [11669, 10519, 10518, 9760, 0])
@pytest.mark.parametrize("engine", ["router", *ENGINES])
def test_a_scrape_loads_wakes_and_keeps_nothing(
    engine: str, build: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that goes between two questions."""
    monkeypatch.setattr(asking, "TIMEOUT_S", 30.0)  # a busy machine is not what is asked here
    stand_in = StandIn(engine, build)
    name = "llama-server" if engine == "router" else engine
    with serving(stand_in) as port:
        for state in ("loaded", "sleeping", "unloaded", "loaded"):
            if (engine, state) == ("llama-server", "unloaded"):
                continue  # its one model is there as long as it is
            for afterwards in (None, None, "sleeping", "unloaded"):
                if (engine, afterwards) == ("llama-server", "unloaded"):
                    continue
                stand_in.states["awake"], stand_in.afterwards = state, afterwards
                reading = ask({"s": (port, ENGINES[name].talk(Known()))})["s"]
                assert reading.state in ("up", "no-metrics")
    assert stand_in.touched == []


@pytest.mark.real_time
def test_what_is_there_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a router that computes does not answer: the others have their values."""
    stand_in = StandIn("router")
    stand_in.states = {"a": "loaded", "b": "loaded"}
    late = threading.Event()
    as_ever = stand_in.answer

    def answer(method: str, target: str) -> tuple[int, object]:
        if "model=b" in target:
            late.wait(60)
        return as_ever(method, target)

    stand_in.answer = answer  # type: ignore[method-assign]
    began = time.monotonic()
    monkeypatch.setattr(asking, "TIMEOUT_S", 5.0)
    with serving(stand_in) as port:
        reading = ask({"s": (port, ENGINES["llama-server"].talk(Known()))})["s"]
        late.set()
    assert time.monotonic() - began < 60
    assert reading.state == "up"
    assert [(each.name, dict(each.values)) for each in reading.models] == [
        ("a", COUNTED),
        ("b", {}),
    ]


def test_a_conversation_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Any:
        while True:
            yield "/again"

    monkeypatch.setattr(asking, "TIMEOUT_S", 30.0)
    stand_in = StandIn("ollama")
    with serving(stand_in) as port:
        assert ask({"s": (port, endless())}) == {"s": Reading("not-understood")}
    assert len(stand_in.touched) <= asking._MAX_QUESTIONS


@pytest.mark.parametrize("path", ["http://elsewhere/", "/a b", "/a\r\nHost: x", "", "/é"])
def test_only_a_path_is_asked(path: str) -> None:
    def talk() -> Any:
        yield path
        return Reading("up")

    assert ask({"s": (9, talk())}) == {"s": Reading("not-understood")}


def test_states_are_those_of_the_metrics() -> None:
    assert set(MODEL_STATES) == {"loaded", "loading", "sleeping", "unloaded", "failed"}
