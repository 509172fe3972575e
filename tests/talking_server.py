# SPDX-License-Identifier: Apache-2.0
"""A server in this process that answers what it was told to, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Canned(ThreadingHTTPServer):
    """Pages and events are set by the test."""

    daemon_threads = False  # closed only when nobody is answered any more

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = True
        self.models: Any = {"data": [{"id": "gpt-oss-20b"}]}
        self.pages: dict[str, Any] = {}
        """JSON by path, also for what is posted; it may be the body of an error and its code."""
        self.events: tuple[dict[str, Any], ...] = ()
        self.pause_s = 0.0
        """Before each event."""
        self.asked: tuple[str, dict[str, Any]] = ("", {})
        self.heads: dict[str, str] = {}
        """Of the last request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Canned

    def _answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _page(self, path: str) -> bool:
        found = self.server.pages.get(path.partition("?")[0])
        if found is None:
            return False
        code, body = found if isinstance(found, tuple) else (200, found)
        self._answer(code, json.dumps(body).encode())
        return True

    def do_GET(self) -> None:
        self.server.heads = dict(self.headers)
        if self._page(self.path):
            return
        if self.path == "/v1/models" and self.server.models is not None:
            self._answer(200, json.dumps(self.server.models).encode())
        elif self.path == "/" and self.server.page and self.headers["Accept-Encoding"] == "gzip":
            self._answer(200, b"<html>")
        else:
            self._answer(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked, self.server.heads = (self.path, body), dict(self.headers)
        if self._page(self.path):
            return
        self.send_response(200)
        self.end_headers()
        for event in self.server.events:
            time.sleep(self.server.pause_s)
            try:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            except OSError:
                return  # the client has hung up
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def talking() -> Iterator[Canned]:
    with Canned() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield one
        one.shutdown()
        thread.join()
