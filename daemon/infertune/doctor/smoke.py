# SPDX-License-Identifier: Apache-2.0
"""One token through the real server: what no file tells.

A CPU backend built for another CPU starts, lists devices, loads a model, and dies of SIGILL at its
first token.  Nothing is applied; the server gets the environment and the flags ``infertune run``
would give it, and as little work as there is.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from infertune.base.errors import Failed, InfertuneError, NotPermitted, UsageError
from infertune.base.root import full_path, read_plain_file
from infertune.catalogue.server_settings import server_arguments
from infertune.doctor.facts import Smoke
from infertune.launch.binary import (
    INSTALL_HINT,
    Server,
    ask_server,
    embedded_is_installed,
    embedded_program,
    find_server,
)
from infertune.launch.client import complete, healthy
from infertune.launch.embedded import default_model
from infertune.launch.process import Child, Signals, cause, environment, start
from infertune.launch.ready import choose_port

PATIENCE_S = 300.0
"""For loading and the token together: a large model from a slow disk takes minutes."""

_SETTINGS = {"ctx_size": "512", "parallel": "1", "warmup": "0"}
_POLL_S = 0.1


def smoke_run(
    caller: Mapping[str, str], model: str | None, patience_s: float = PATIENCE_S
) -> Smoke:
    """Serve a model, ask for one token, stop the server.

    Raises UsageError for a model that is none, NotPermitted for one the caller may not read,
    KeyboardInterrupt where a signal ended it; what the
    server does is the answer.
    """
    try:
        path = _model(caller, model)
    except UsageError:
        raise
    except Failed as error:
        return Smoke("not-run", f"{error.message} (give a model: --smoke GGUF)")
    try:
        server = _server(caller)
    except Failed as error:
        # A program that dies of --help has died of the same thing.
        illegal = "illegal instruction" in error.message
        return Smoke("illegal-instruction" if illegal else "died", error.message)
    if server is None:
        return Smoke("not-run", f"there is no llama-server here; {INSTALL_HINT}")
    with Signals() as signals:
        result = _run(caller, server, path, signals, patience_s)
        if signals.received():
            raise KeyboardInterrupt
    return result


def _server(caller: Mapping[str, str]) -> Server | None:
    path = find_server(None, caller.get("PATH"))
    if path:
        return ask_server((path,), {}, caller, embedded=False)
    if embedded_is_installed():
        program, env = embedded_program()
        return ask_server(program, env, caller, embedded=True)
    return None


def _model(caller: Mapping[str, str], model: str | None) -> str:
    if model is None:
        cache = caller.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return default_model(os.path.join(cache, "infertune"))
    path = full_path(model)
    try:
        magic = read_plain_file(Path(path), 4, follow=True)[0]
    except OSError as error:
        kind = NotPermitted if isinstance(error, PermissionError) else UsageError
        raise kind(f"--smoke {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise UsageError(f"--smoke {path}: not a GGUF file", hint="llama-server loads GGUF models")
    return path


def _run(
    caller: Mapping[str, str], server: Server, model: str, signals: Signals, patience_s: float
) -> Smoke:
    port = choose_port(None)
    arguments, _ = server_arguments(_SETTINGS, server.help, model=model, port=port)
    child = None
    began = time.monotonic()
    try:
        child = start(
            (*server.program, *arguments),
            environment(server.env, caller),
            lambda _: None,
            capture=True,
            program=server.program[0],
        )
        signals.child = child
        answer = _token(child, f"http://127.0.0.1:{port}", began + patience_s)
        if answer is None:
            took = time.monotonic() - began
            name = "the embedded llama.cpp" if server.embedded else server.program[0]
            return Smoke("answered", f"{name} gave its first token after {took:.1f} s")
        return answer
    except InfertuneError as error:
        return Smoke("died", f"the server: {error.message}")
    finally:
        if child:
            child.stop()


def _token(child: Child, url: str, end: float) -> Smoke | None:
    """None when a token came, else what became of the server."""
    loaded = False
    while time.monotonic() < end and child.poll() is None:
        if healthy(url):
            loaded = True
            break
        time.sleep(_POLL_S)
    where = "while it loaded the model"
    if loaded:
        where = "at its first token"
        try:
            complete(url, "The", 1, timeout_s=max(1.0, end - time.monotonic()))
            return None
        except Failed as error:
            why = error.message
            # A connection is cut a moment before the process can be waited for.
            if child.wait_for(2.0) is None:
                outcome = "silent" if "timed out" in why else "died"
                return Smoke(outcome, f"the server gave no token: {why}")
    status = child.poll()
    if status is None:
        return Smoke("silent", f"the server did not answer in time {where}")
    if -status == signal.SIGILL:
        return Smoke("illegal-instruction", f"the server died {where}: {cause(status)}")
    last = next((line for line in reversed(child.last_lines()) if line.strip()), "")
    said = f" ('{last.strip()[:120]}')" if last else ""
    return Smoke("died", f"the server died {where}: {cause(status, child.last_lines())}{said}")
