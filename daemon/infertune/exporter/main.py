# SPDX-License-Identifier: Apache-2.0
"""infertune-exporter: attach the probes, give up every capability, then open the port."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from infertune import __version__
from infertune.base.errors import Exit, InfertuneError, UsageError
from infertune.base.notify import Notifier
from infertune.base.root import Root
from infertune.exporter import capabilities, web, webconfig
from infertune.exporter.energy import Energy
from infertune.exporter.page import Page
from infertune.exporter.probes import Probes
from infertune.exporter.servers import cgroup_ids
from infertune.host.snapshot import open_root

_FIRST_PASSED = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="infertune-exporter",
        description="Serve what this machine and its model servers do as Prometheus metrics.",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"infertune-exporter {__version__}")
    made.add_argument(
        "--listen",
        metavar="ADDRESS",
        help=f"address to listen on (default {web.DEFAULT}); a socket from systemd counts first",
    )
    made.add_argument(
        "--web-config", metavar="FILE", help="TLS and users, in exporter-toolkit's web-config.yml"
    )
    made.add_argument(
        "--root", metavar="PATH", default="/", help="read a recorded machine (needs --once)"
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="print the page and exit")
    what.add_argument(
        "--check", action="store_true", help="check the settings, attach the probes, say so, exit"
    )
    made.add_argument(
        "--collect", metavar="NAME", action="append", default=[], help="with --once: only this one"
    )
    made.add_argument("--no-probes", action="store_true", help="do not attach the eBPF probes")
    made.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    args = parser().parse_args(argv)
    try:
        return int(_run(args))
    except InfertuneError as error:
        if args.debug:
            raise
        print(f"infertune-exporter: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if args.debug:
            raise
        print(f"infertune-exporter: {error.strerror}: {error.filename}", file=sys.stderr)
        return Exit.FAILED


def _run(args: argparse.Namespace) -> int:
    config = webconfig.load(args.web_config) if args.web_config else webconfig.WebConfig()
    with open_root(args.root) as root:
        if not root.live and not args.once:
            raise UsageError("--root needs --once: a recorded machine does not change")
        if args.once:
            return _once(root, args)
        probes, energy = Probes(cgroups=lambda: cgroup_ids(root)), Energy(root)
        try:
            if not args.no_probes:
                probes.attach()
            energy.open()
            capabilities.drop_all()
            if args.check:
                return _check(probes)
            page = Page(root, probes.collector(), energy.collector())
            return _serve(args, config, page, probes)
        finally:
            probes.close()
            energy.close()


def _once(root: Root, args: argparse.Namespace) -> int:
    page = Page(root)
    unknown = set(args.collect) - set(page.names)
    if unknown:
        raise UsageError(
            f"no collector '{min(unknown)}'", hint=f"there are {', '.join(page.names)}"
        )
    sys.stdout.write(page.text(args.collect).decode())
    page.close()
    return Exit.DONE


def _check(probes: Probes) -> int:
    states = probes.states()
    for probe in states:
        print(f"{probe.name}: {probe.state}{': ' if probe.why else ''}{probe.why}")
    return Exit.DIFFERS if any(probe.state == "failed" for probe in states) else Exit.DONE


def _serve(
    args: argparse.Namespace, config: webconfig.WebConfig, page: Page, probes: Probes
) -> int:
    notifier = Notifier(os.environ)
    again = threading.Event()
    listener = _passed_socket() or web.listening_socket(args.listen or web.DEFAULT)
    server = web.Server(listener, config, page, probes)
    try:
        web.refuse_an_open_door(listener, config)
        signal.signal(signal.SIGTERM, _stop)
        probes.retry_while_absent(lambda: _start_again(again, notifier))
        attached = sum(probe.state == "attached" for probe in probes.states())
        notifier.send(READY=1, STATUS=f"{attached} probes attached")
        # Half a second would be two wake-ups a second for nothing: it is stopped by a signal.
        server.serve_forever(poll_interval=3600)
    except KeyboardInterrupt:
        return Exit.FAILED if again.is_set() else Exit.DONE
    finally:
        notifier.send(STOPPING=1)
        server.drain()
        server.server_close()
        page.close()
    return Exit.DONE


def _start_again(again: threading.Event, notifier: Notifier) -> None:
    """End with an error, so that systemd starts a new process, which may attach for a moment."""
    if notifier.heard:
        notifier.send(STATUS="a probe can be attached now; starting again for it")
        again.set()
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _passed_socket() -> socket.socket | None:
    """The listening socket that systemd handed over (sd_listen_fds(3)), or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise UsageError("systemd passed more than one socket; one is served")
    passed = socket.socket(fileno=_FIRST_PASSED)
    if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError("the socket from systemd does not listen; it needs ListenStream=")
    os.set_inheritable(_FIRST_PASSED, False)
    return passed


if __name__ == "__main__":
    sys.exit(main())
