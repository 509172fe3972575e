# SPDX-License-Identifier: Apache-2.0
"""The port: /metrics, /probes (for ``infertune probes``), a plain index, /-/healthy."""

from __future__ import annotations

import base64
import binascii
import contextlib
import gzip
import html
import http.server
import ipaddress
import json
import re
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from infertune import __version__
from infertune.base.errors import Failed, UsageError
from infertune.base.records import asdict
from infertune.exporter import deadline
from infertune.exporter.page import Page
from infertune.exporter.probes import Probes
from infertune.exporter.runner import BUDGET_S
from infertune.exporter.webconfig import Gate, WebConfig

DEFAULT = "127.0.0.1:9877"
MAX_CONNECTIONS = 32
"""Served at once; one more, and the one that has kept us waiting longest has to go.  Prometheus
makes one."""
_CLIENT_S = 10.0
"""How long a client may take to say what it wants (TLS and all), and then to take the answer."""
_IDLE_S = 300.0
"""How long a connection is kept for the next scrape: with TLS a new one costs more than a page."""
_DRAIN_S = 2.0
"""How long whoever is being answered is waited for at the end."""
_ROOM_S = 0.01
"""How long a client waits for a free place before another one loses its own."""


def listening_socket(address: str) -> socket.socket:
    """A socket on ``HOST:PORT`` (``[::1]:9877``, ``:9877`` for all).

    Raises UsageError for what is no address, Failed where it cannot be had.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"'{address}' is not an address to listen on", hint=f"write '{DEFAULT}'")
    host = host.removeprefix("[").removesuffix("]") or "::"
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as error:
        raise UsageError(
            f"'{host}' is not an IP address", hint=f"write '{DEFAULT}' or '[::1]:9877'"
        ) from error
    try:
        return socket.create_server(
            (host, int(port)), family=family, dualstack_ipv6=host == "::" and socket.has_ipv6
        )
    except OSError as error:
        raise Failed(f"cannot listen on {address}: {error.strerror}") from error


def refuse_an_open_door(listener: socket.socket, config: WebConfig) -> None:
    """Raises UsageError where others could reach a port that is not protected."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or config.protected:
        return
    host = str(listener.getsockname()[0])
    if not ipaddress.ip_address(host).is_loopback:
        raise UsageError(
            f"{host} can be reached from other machines: that takes TLS and authentication",
            hint="--web-config FILE with tls_server_config, and basic_auth_users or client "
            "certificates; or listen on 127.0.0.1",
        )


def is_ours(host: str | None) -> bool:
    """Whether a request's ``Host`` may mean this machine.

    A page in a browser here may have its own name resolve to 127.0.0.1 (DNS rebinding) and ask a
    port that asks nobody for anything; but not by an address, nor by a name that no DNS has.
    """
    if host is None:
        return True  # HTTP/1.0; no browser speaks it
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    own = name.endswith(".localhost") or name == socket.gethostname().lower()
    return bool(name) and ("." not in name or own)


def budget_s(scrape_timeout: str | None) -> float:
    """How long the page may take: Prometheus says how long it waits, and wants it sent by then."""
    try:
        timeout = float(scrape_timeout or "")
    except ValueError:
        return BUDGET_S
    return min(BUDGET_S, timeout - min(0.5, timeout / 4)) if timeout > 0 else BUDGET_S


def wants_gzip(accept_encoding: str) -> bool:
    """Whether the client takes a compressed answer (RFC 9110, 12.5.3)."""
    offered = (each.replace(" ", "").lower() for each in accept_encoding.split(","))
    return any(re.fullmatch(r"gzip(;q=(1(\.0*)?|0\.\d*[1-9]\d*))?", each) for each in offered)


class Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves a socket that is listening already, a bounded number of clients at once."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: socket.socket, config: WebConfig, page: Page, probes: Probes | None
    ) -> None:
        super().__init__(("", 0), _Handler)  # not its business: the socket is there already
        self.socket = listener
        self.tls = config.tls
        self.open = config.open
        if self.tls:
            self.tls.sslsocket_class = deadline.TlsSocket
        self.gate = Gate(config.users) if config.users else None
        self.page = page
        self.probes = probes
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._waiting: dict[socket.socket, None] = {}
        self._idle: set[socket.socket] = set()
        """Of those, the ones that have had their answer and may ask again."""

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, object]:
        accepted, address = self.socket.accept()
        family, kind, protocol = accepted.family, accepted.type, accepted.proto
        return deadline.Socket(family, kind, protocol, fileno=accepted.detach()), address

    @contextlib.contextmanager
    def waiting_for(self, client: socket.socket) -> Iterator[None]:
        """While we wait for this client, it may lose its place to another one."""
        self._waits(client)
        try:
            yield
        finally:
            self._waits_not(client)

    @contextlib.contextmanager
    def working_for(self, client: socket.socket) -> Iterator[None]:
        """While the client waits for us, it may not."""
        self._waits_not(client)
        try:
            yield
        finally:
            self._waits(client)

    def _waits(self, client: socket.socket) -> None:
        with self._lock:
            self._waiting[client] = None

    def _waits_not(self, client: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(client, None)

    def idles(self, client: socket.socket, *, idle: bool) -> None:
        """Whether this client has its answer, and nothing was heard of it since."""
        with self._lock:
            (self._idle.add if idle else self._idle.discard)(client)

    def _make_room(self) -> None:
        """Hang up on who has kept us waiting longest; its thread then ends by itself."""
        with self._lock:
            longest = next(iter(self._waiting), None)
            if longest is not None:
                del self._waiting[longest]
                _hang_up(longest)

    def process_request(self, request: object, client_address: object) -> None:
        while not self._places.acquire(timeout=_ROOM_S):
            self._make_room()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        request.close()

    def drain(self) -> None:
        """Let those who are being answered have their answer, for as long as a moment."""
        with self._lock:
            for client in self._idle:
                _hang_up(client)
        end = time.monotonic() + _DRAIN_S
        for _ in range(MAX_CONNECTIONS):
            if not self._places.acquire(timeout=max(0, end - time.monotonic())):
                return

    def server_close(self) -> None:
        self.socket.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away or speaks no TLS is its own affair."""


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has hung up itself
        # Not SSLSocket.shutdown: it takes TLS away under the thread that reads.
        socket.socket.shutdown(client, socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection is kept
    server: Server
    connection: deadline.Socket | deadline.TlsSocket
    server_version = f"infertune-exporter/{__version__}"
    sys_version = ""

    def setup(self) -> None:
        # Here and not at accept(): a client that never finishes its handshake holds up no other.
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(
                self.request, server_side=True, do_handshake_on_connect=False
            )
        self.request.limit(_CLIENT_S)
        super().setup()

    def handle(self) -> None:
        with self.server.waiting_for(self.connection):
            if isinstance(self.connection, deadline.TlsSocket):
                self.connection.do_handshake()
            super().handle()

    def handle_one_request(self) -> None:
        super().handle_one_request()
        if not self.close_connection:
            self.server.idles(self.connection, idle=True)
            self.connection.limit(_IDLE_S)

    def parse_request(self) -> bool:
        # Its first line is there: now it has to be as quick as any other.
        self.server.idles(self.connection, idle=False)
        self.connection.limit(_CLIENT_S)
        return super().parse_request()

    def finish(self) -> None:
        self.server.idles(self.connection, idle=False)
        super().finish()
        if isinstance(self.request, ssl.SSLSocket):
            self.request.close()

    def do_GET(self) -> None:
        if self.server.open and not is_ours(self.headers.get("Host")):
            why = b"asked by a name that is not this machine's; use its address or 'localhost'\n"
            self._answer(421, "text/plain", why)
            return
        if not self._admitted():
            self._answer(
                401,
                "text/plain",
                b"unauthorized\n",
                {"WWW-Authenticate": 'Basic realm="infertune-exporter"', "Connection": "close"},
            )
            return
        where = urlsplit(self.path)
        if where.path == "/metrics":
            self._metrics(where.query)
        elif where.path == "/probes":
            probes = self.server.probes.states() if self.server.probes else ()
            text = json.dumps([asdict(probe) for probe in probes])
            self._answer(200, "application/json", text.encode())
        elif where.path == "/-/healthy":
            self._answer(200, "text/plain", b"healthy\n")
        elif where.path == "/":
            self._answer(200, "text/html; charset=utf-8", self._index().encode())
        else:
            self._answer(
                404, "text/plain", b"not found; there are /metrics, /probes, / and /-/healthy\n"
            )

    do_HEAD = do_GET

    def _metrics(self, query: str) -> None:
        wanted = parse_qs(query).get("collect[]", [])
        unknown = sorted(set(wanted) - set(self.server.page.names))
        if unknown:
            known = ", ".join(self.server.page.names)
            why = f"no collector {', '.join(unknown)}; there are {known}\n"
            self._answer(400, "text/plain; charset=utf-8", why.encode())
            return
        with self.server.working_for(self.connection):
            within = budget_s(self.headers.get("X-Prometheus-Scrape-Timeout-Seconds"))
            text = self.server.page.text(wanted, within)
            more = {"Vary": "Accept-Encoding"}
            if wants_gzip(self.headers.get("Accept-Encoding", "")):
                # The fastest level: a tenth of the size, and the others gain little on it.
                text, more["Content-Encoding"] = gzip.compress(text, 1, mtime=0), "gzip"
        self._answer(200, CONTENT_TYPE_PLAIN_0_0_4, text, more)

    def _index(self) -> str:
        rows = [
            (name, result.state, result.why) for name, result in self.server.page.results().items()
        ]
        if self.server.probes:
            rows += [(f"probe {p.name}", p.state, p.why) for p in self.server.probes.states()]
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
            for row in rows
        )
        return (
            "<!doctype html><title>infertune-exporter</title>\n<h1>infertune-exporter</h1>\n"
            f'<p>Version {__version__}. <a href="/metrics">Metrics</a></p>\n'
            f"<table>\n{cells}</table>\n"
        )

    def _admitted(self) -> bool:
        gate = self.server.gate
        if gate is None:
            return True
        kind, _, proof = self.headers.get("Authorization", "").partition(" ")
        try:
            user, colon, password = base64.b64decode(proof, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return kind.lower() == "basic" and bool(colon) and gate.admits(user, password)

    def _answer(
        self, code: int, kind: str, body: bytes, more: Mapping[str, str] | None = None
    ) -> None:
        self.connection.limit(_CLIENT_S)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.send_header(
                "Connection", "close"
            )  # what it sent beside would be read as a request
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is nothing to log."""
