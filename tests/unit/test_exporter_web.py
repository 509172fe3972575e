# SPDX-License-Identifier: Apache-2.0
"""The exporter's port: who may listen where, who may read, and what is answered."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from infertune.base.errors import Failed, Unreachable, UsageError
from infertune.base.root import Root
from infertune.cli.probes import ask
from infertune.exporter import main, web, webconfig
from infertune.exporter.base import Collector, Sample
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.page import Page
from infertune.exporter.probes import Probes

REPOSITORY = Path(__file__).resolve().parents[2]
Serve = Callable[..., int]
GENEROUS_S = 120
"""Far more than anything here takes on a busy machine."""
HASH = "$2b$10$" + 53 * "a"
"""It has the form of one; nobody knows its password."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server of an empty machine; returns its port."""
    started: list[tuple[web.Server, threading.Thread, Page]] = []

    def start(config: webconfig.WebConfig | None = None) -> int:
        listener = web.listening_socket("127.0.0.1:0")
        probes = Probes()
        page = Page(Root(tmp_path), probes.collector())
        server = web.Server(listener, config or webconfig.WebConfig(), page, probes)
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        started.append((server, thread, page))
        return int(listener.getsockname()[1])

    yield start
    for server, thread, page in started:
        server.shutdown()
        thread.join()
        server.server_close()
        for _ in range(web.MAX_CONNECTIONS):  # whoever is still served
            assert server._places.acquire(timeout=GENEROUS_S)
        page.close()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GENEROUS_S)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_pages(serve: Serve) -> None:
    port = serve()
    status, text = get(port, "/metrics")
    assert status == 200
    assert 'infertune_collector_state{collector="amdgpu",state="absent"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert get(port, "/-/healthy") == (200, "healthy\n")
    assert "no GPU that amdgpu drives" in get(port, "/")[1]
    assert get(port, "/etc/passwd")[0] == 404


def test_collect_chooses(serve: Serve) -> None:
    port = serve()
    text = get(port, "/metrics?collect[]=journal&collect[]=amdgpu")[1]
    assert 'infertune_collector_success{collector="journal"}' in text
    assert 'infertune_collector_success{collector="knobs"}' not in text
    status, text = get(port, "/metrics?collect[]=nonsense")
    assert status == 400
    assert "no collector nonsense; there are profile, journal" in text


def test_who_is_being_answered_at_the_end_gets_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_DRAIN_S", GENEROUS_S)
    begun = threading.Event()

    class Slow(Page):
        def text(self, *given: Any) -> bytes:
            begun.set()
            time.sleep(0.5)
            return super().text(*given)

    listener = web.listening_socket("127.0.0.1:0")
    page = Slow(Root(tmp_path))
    server = web.Server(listener, webconfig.WebConfig(), page, None)
    serving = threading.Thread(target=server.serve_forever, args=[0.05])
    serving.start()
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert begun.wait(GENEROUS_S)
        server.shutdown()
        serving.join()
        server.drain()
        server.server_close()
        page.close()
        # Nobody serves any more: what it gets is here by now.
        client.setblocking(False)
        answer = b"".join(iter(lambda: client.recv(1 << 20), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"process_resident_memory_bytes" in answer


def test_a_client_that_says_nothing_holds_up_no_other(serve: Serve) -> None:
    port = serve()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    assert get(port, "/-/healthy")[0] == 200
    for each in silent:
        each.close()


def hang_up(clients: Iterable[socket.socket]) -> None:
    for each in clients:
        each.close()


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nX-Slow: "])
def test_a_scrape_is_answered_while_many_clients_hang(serve: Serve, said: bytes) -> None:
    """More of them than there are places, and nobody waits for the time limit of one."""
    port = serve()
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    for each in slow:
        each.sendall(said)
    for _ in range(3):
        assert get(port, "/metrics?collect[]=journal")[0] == 200
    assert sum(has_ended(each) for each in slow) <= 64 - web.MAX_CONNECTIONS + 3
    hang_up(slow)


def has_ended(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_who_takes_no_answer_does_not_keep_a_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_CLIENT_S", 60.0)
    monkeypatch.setattr(Page, "text", lambda *_: bytes(8_000_000))
    port = serve()
    deaf = [socket.create_connection(("127.0.0.1", port)) for _ in range(web.MAX_CONNECTIONS)]
    for each in deaf:
        each.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert each.recv(1)
    assert get(port, "/-/healthy")[0] == 200
    hang_up(deaf)


def test_who_waits_for_the_page_keeps_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def text(*_: object) -> bytes:
        begun.set()
        assert go_on.wait(GENEROUS_S)
        return b"the page\n"

    monkeypatch.setattr(Page, "text", text)
    port = serve()
    answers: list[tuple[int, str]] = []
    scrape = threading.Thread(target=lambda: answers.append(get(port, "/metrics")))
    scrape.start()
    assert begun.wait(GENEROUS_S)
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    assert get(port, "/-/healthy")[0] == 200
    go_on.set()
    scrape.join()
    assert answers == [(200, "the page\n")]
    hang_up(slow)


@pytest.mark.real_time
@pytest.mark.parametrize("tls", [False, True])
def test_a_request_has_one_time_limit(
    serve: Serve, certificate: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    """Not one for each of its bytes: a client that drips is as slow as one that is silent."""
    monkeypatch.setattr(web, "_CLIENT_S", 2.0)
    file = certificate / "web-config.yml"
    file.write_text("tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\n")
    port = serve(webconfig.load(str(file)) if tls else None)
    dripping = socket.create_connection(("127.0.0.1", port))
    if tls:
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        dripping = context.wrap_socket(dripping, server_hostname="127.0.0.1")
    dripping.settimeout(0.1)
    for byte in b"GET /-/healthy HTTP/1.1\r\nX-Slow: " + 200 * b"x":
        try:
            dripping.sendall(bytes([byte]))
            if not dripping.recv(1):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        pytest.fail("it was listened to for 20 s")
    dripping.close()


def test_a_client_that_goes_away_is_no_matter(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    port = serve()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert get(port, "/-/healthy")[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("said", "within"),
    [
        (None, 8.0),
        ("10.000000", 8.0),
        ("5", 4.5),
        ("1", 0.75),
        ("0", 8.0),
        ("-3", 8.0),
        ("nan", 8.0),
        ("inf", 8.0),
        ("soon", 8.0),
    ],
)
def test_the_scraper_s_time_is_kept(said: str | None, within: float) -> None:
    assert web.budget_s(said) == within


def test_the_page_is_made_in_the_scraper_s_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scrape_timeout of 1 s it comes within it, however many collectors hang."""
    given: list[float] = []

    def text(self: Page, wanted: object, budget_s: float) -> bytes:
        given.append(budget_s)
        return b"the page\n"

    monkeypatch.setattr(Page, "text", text)
    words = {"X-Prometheus-Scrape-Timeout-Seconds": "1"}
    assert get(serve(), "/metrics", **words) == (200, "the page\n")
    assert given == [0.75]


def test_collectors_that_hang_cost_the_page_its_time_and_no_more(tmp_path: Path) -> None:
    go_on = threading.Event()

    def hang(root: Root) -> Iterable[Sample]:
        go_on.wait(GENEROUS_S)
        return ()

    hanging = {
        name: Collector(id=name, summary="", metrics=(), read=hang, timeout_s=20.0)
        for name in ("a", "b", "c")
    }
    page = Page(Root(tmp_path), collectors={**hanging, "pressure": COLLECTORS["pressure"]})
    began = time.monotonic()
    text = page.text(budget_s=0.4).decode()
    lasted = time.monotonic() - began
    go_on.set()
    page.close()
    assert lasted < 20  # the time limit of one of them
    for name in ("a", "b", "c", "pressure"):
        assert f'infertune_collector_state{{collector="{name}",state="timeout"}} 1.0' in text


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip; q=1.0", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("identity", False),
        ("", False),
        ("gzipped", False),
    ],
)
def test_who_takes_gzip_gets_it(serve: Serve, header: str, wanted: bool) -> None:
    assert web.wants_gzip(header) is wanted
    connection = http.client.HTTPConnection("127.0.0.1", serve(), timeout=GENEROUS_S)
    try:
        connection.request("GET", "/metrics", headers={"Accept-Encoding": header})
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    assert answer.headers["Vary"] == "Accept-Encoding"
    assert (answer.headers["Content-Encoding"] == "gzip") is wanted
    assert b"infertune_collector_success" in (gzip.decompress(body) if wanted else body)


def test_a_connection_is_kept_and_ends_with_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = web.listening_socket("127.0.0.1:0")
    page = Page(Root(tmp_path))
    server = web.Server(listener, webconfig.WebConfig(), page, None)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    connection = http.client.HTTPConnection(
        "127.0.0.1", listener.getsockname()[1], timeout=GENEROUS_S
    )
    try:
        for path in ("/metrics", "/-/healthy", "/nothing", "/metrics"):
            connection.request("GET", path)
            assert connection.getresponse().read()
            if path == "/metrics":
                kept = connection.sock
            assert connection.sock is kept is not None
        # What it sent beside its request is no second one.
        connection.request("GET", "/-/healthy", body="GET /metrics HTTP/1.1\r\n\r\n")
        assert connection.getresponse().read() == b"healthy\n"
        assert connection.sock is None
        connection.request("GET", "/-/healthy")
        assert connection.getresponse().read() == b"healthy\n"
        server.shutdown()
        monkeypatch.setattr(web, "_DRAIN_S", GENEROUS_S)
        began = time.monotonic()
        server.drain()  # it waits for nobody who only might ask again
        assert time.monotonic() - began < GENEROUS_S
        assert has_ended(connection.sock)
    finally:
        connection.close()
        thread.join()
        server.server_close()
        page.close()


# -- passwords and TLS -----------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


OURS = [
    "127.0.0.1", "127.0.0.1:9877", "192.168.1.7:9877", "[::1]:9877", "[::1]", "localhost",
    "LocalHost:9877", "localhost.", "prometheus.localhost:9877", "strix", "strix:9877",
]  # fmt: skip
NOT_OURS = [
    "example.org", "example.org:9877", "127.0.0.1.example.org", "localhost.example.org:9877",
    "", ":9877", "[::1", "a.b@c.d",
]  # fmt: skip


@pytest.mark.parametrize("host", NOT_OURS)
def test_a_name_of_somebody_else(host: str, serve: Serve, tmp_path: Path) -> None:
    """DNS rebinding: a page of example.org asks 127.0.0.1 by its own name."""
    port = serve()
    for path in ("/metrics", "/probes", "/", "/-/healthy"):
        status, text = get(port, path, Host=host)
        assert status == 421
        assert "infertune_" not in text
    secret = bcrypt.hashpw(b"open sesame", bcrypt.gensalt(4)).decode()
    file = tmp_path / "web-config.yml"
    file.write_text(f"basic_auth_users:\n  alice: {secret}\n")
    # Whoever has to show a password may be asked by any name; a strange page does not know it.
    guarded = serve(webconfig.load(str(file)))
    allowed = basic("alice", "open sesame")
    assert get(guarded, "/metrics", Host=host, Authorization=allowed)[0] == 200


@pytest.mark.parametrize("host", OURS)
def test_names_of_this_machine(host: str, serve: Serve) -> None:
    assert get(serve(), "/-/healthy", Host=host)[0] == 200


def test_its_own_name_and_none(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Strix.Example.org")
    port = serve()
    assert get(port, "/-/healthy", Host="strix.example.org:9877")[0] == 200
    with socket.create_connection(("127.0.0.1", port), timeout=GENEROUS_S) as client:
        client.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
        assert b" 200 " in client.recv(100)


def test_whoever_is_refused_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a refusal takes says nothing of which users there are: counted in rounds."""
    users = {f"user{cost}": bcrypt.hashpw(b"right", bcrypt.gensalt(cost)) for cost in (4, 5, 7)}
    gate = webconfig.Gate(users)
    rounds = 0

    def counted(call: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def run(password: bytes, salt: bytes) -> object:
            nonlocal rounds
            rounds += 2 ** int(salt[4:6])
            return call(password, salt)

        return run

    for name in ("checkpw", "hashpw"):
        monkeypatch.setattr(bcrypt, name, counted(getattr(bcrypt, name)))
    seen = set()
    for user in (*users, "nobody", ""):
        rounds = 0
        assert not gate.admits(user, "wrong")
        seen.add(rounds)
    assert seen == {2**7}
    assert all(gate.admits(user, "right") for user in users)


def test_passwords(serve: Serve, tmp_path: Path) -> None:
    secret = bcrypt.hashpw(b"open sesame", bcrypt.gensalt(4)).decode()
    file = tmp_path / "web-config.yml"
    file.write_text(f"basic_auth_users:\n  alice: {secret}\n")
    port = serve(webconfig.load(str(file)))
    assert get(port, "/metrics")[0] == 401
    assert get(port, "/metrics", Authorization=basic("alice", "wrong"))[0] == 401
    assert get(port, "/metrics", Authorization=basic("bob", "open sesame"))[0] == 401
    assert get(port, "/metrics", Authorization="Basic !!!")[0] == 401
    for _ in range(2):  # the second time it is remembered
        assert get(port, "/metrics", Authorization=basic("alice", "open sesame"))[0] == 200
    assert get(port, "/-/healthy")[0] == 401


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory


def test_tls(serve: Serve, certificate: Path) -> None:
    file = certificate / "web-config.yml"
    file.write_text("tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\n")
    config = webconfig.load(str(file))
    assert not config.protected  # anybody may read it
    port = serve(config)
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    # One that never shakes hands holds up no other.
    silent = socket.create_connection(("127.0.0.1", port))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=GENEROUS_S, context=context)
    connection.request("GET", "/-/healthy")
    assert connection.getresponse().read() == b"healthy\n"
    connection.close()
    silent.close()
    with pytest.raises((http.client.HTTPException, OSError)):
        get(port, "/-/healthy")


def test_client_certificates(serve: Serve, certificate: Path) -> None:
    file = certificate / "web-config.yml"
    file.write_text(
        "tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\n"
        "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: cert.pem\n"
    )
    config = webconfig.load(str(file))
    assert config.protected
    port = serve(config)
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    for known in (False, True):
        if known:
            context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=GENEROUS_S, context=context
        )
        try:
            connection.request("GET", "/-/healthy")
            answered = connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            answered = False
        finally:
            connection.close()
        assert answered == known


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("tls_server_confg: {}\n", "unknown key 'tls_server_confg' in the file"),
        ("http_server_config:\n  http2: true\n", "unknown key 'http_server_config'"),
        ("tls_server_config:\n  cert: x\n", "unknown key 'cert' in tls_server_config"),
        ("tls_server_config:\n  cert_file: x\n", "no key_file"),
        ("tls_server_config:\n  cert_file: x\n  key_file: y\n", "TLS: No such file"),
        ("tls_server_config:\n  cert_file: 1\n  key_file: y\n", "cert_file is not a text"),
        ("tls_server_config: {cert_file: x, key_file: y, min_version: TLS10}\n", "TLS10"),
        ("tls_server_config: {cert_file: x, key_file: y, client_auth_type: Maybe}\n", "Maybe"),
        ("basic_auth_users:\n  alice: secret\n", "'alice' is not a bcrypt hash"),
        ("basic_auth_users: [alice]\n", "not a table"),
        ("- a\n", "the file is not a table"),
        ("a: [\n", "not valid YAML"),
        ("!!python/object/apply:os.system [id]\n", "not valid YAML"),
        ('tls_server_config: {cert_file: "a\\0b", key_file: y}\n', "cert_file 'a\\x00b' has a"),
        ('tls_server_config: {cert_file: x, key_file: "\\ud800"}\n', "key_file '\\ud800' has a"),
        ('"a\\nb": 1\n', "unknown key 'a b' in the file"),
        ("a: " + 5000 * "[" + "\n", "nested too deeply"),
        (5000 * "{a: " + "\n", "nested too deeply"),
        ("a: " + 5000 * "1" + "\n", "not valid YAML"),
        ("a: 2026-13-01\n", "not valid YAML"),
        (5000 * "# a comment that fills it\n", "larger than 64 KiB"),
        # A cost that bcrypt does not have, a hash that is cut off, one with a character too many.
        (f"basic_auth_users:\n  alice: {HASH.replace('$10$', '$99$')}\n", "not a bcrypt hash"),
        (f"basic_auth_users:\n  alice: {HASH[:-1]}\n", "not a bcrypt hash"),
        (f"basic_auth_users:\n  alice: {HASH}x\n", "not a bcrypt hash"),
        (f"basic_auth_users:\n  alice: {HASH[:-1]}!\n", "not a bcrypt hash"),
    ],
)
def test_a_bad_web_config_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, wrong: str
) -> None:
    file = tmp_path / "web-config.yml"
    file.write_text(text)
    assert main.main(["--web-config", str(file), "--once"]) == 2
    line, *hint = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infertune-exporter: {file}: ")
    assert wrong in line
    assert len(hint) <= 1


def test_a_good_hash_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "web-config.yml"
    for version in ("2a", "2b", "2y"):
        file.write_text(f"basic_auth_users:\n  alice: {HASH.replace('2b', version)}\n")
        assert webconfig.load(str(file)).users


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":0", "[::]:0"])
def test_others_must_not_reach_an_open_door(address: str) -> None:
    try:
        listener = web.listening_socket(address)
    except Failed as error:
        pytest.skip(f"no such address here: {error.message}")
    with listener:
        with pytest.raises(UsageError, match="TLS and authentication"):
            web.refuse_an_open_door(listener, webconfig.WebConfig())
        open_tls = webconfig.WebConfig(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        with pytest.raises(UsageError, match="TLS and authentication"):
            web.refuse_an_open_door(listener, open_tls)
        closed = webconfig.WebConfig(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), {"alice": b"x"})
        web.refuse_an_open_door(listener, closed)


@pytest.mark.parametrize("address", ["9877", "localhost:9877", "127.0.0.1:http", "1.2.3.4:99999"])
def test_no_address(address: str) -> None:
    with pytest.raises(UsageError):
        web.listening_socket(address)


def test_a_port_that_is_taken(serve: Serve) -> None:
    with pytest.raises(Failed, match="Address already in use"):
        web.listening_socket(f"127.0.0.1:{serve()}")


# -- the command line ---------------------------------------------------------------------


def test_once_on_a_recorded_machine(capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = str(REPOSITORY / "tests/golden/strix-halo-128-serving.snapshot")
    assert main.main(["--root", snapshot, "--once", "--collect", "amdgpu"]) == 0
    assert 'infertune_gpu_busy_ratio{gpu="card1"} 0.87' in capsys.readouterr().out
    assert main.main(["--root", snapshot]) == 2
    assert "--root needs --once" in capsys.readouterr().err
    assert main.main(["--once", "--collect", "x"]) == 2
    assert "no collector 'x'" in capsys.readouterr().err
    assert main.main(["--once", "--root", "/nonexistent"]) == 2


def test_probes_are_asked_of_the_exporter(serve: Serve) -> None:
    port = serve()
    found = json.loads(get(port, "/probes")[1])
    assert [dict(probe) for probe in ask(f"127.0.0.1:{port}")] == found
    with pytest.raises(UsageError):
        ask("nonsense")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        unused = closed.getsockname()[1]
    with pytest.raises(Unreachable):
        ask(f"127.0.0.1:{unused}")


# -- the units ------------------------------------------------------------------------------


def test_the_unit_is_hardened(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    for name in ("infertune-exporter.service", "infertune-exporter.socket"):
        text = (REPOSITORY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("@PYTHON@", sys.executable))
    unit = str(tmp_path / "infertune-exporter.service")
    done = subprocess.run(
        [tool, "security", "--offline=yes", "--threshold=15", unit],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_PAGER": ""},
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze here has no --offline (systemd 250)")
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [tool, "verify", "--man=no", unit, unit.replace(".service", ".socket")],
        capture_output=True,
        text=True,
    )
    assert "infertune-exporter" not in done.stderr
