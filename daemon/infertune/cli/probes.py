# SPDX-License-Identifier: Apache-2.0
"""``infertune probes``: which eBPF probes are attached, and why others are not."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from infertune.base.errors import Exit, NotPermitted, Unreachable, UsageError
from infertune.cli.base import JSON, Command, Context, argument, verb

ADDRESS = "127.0.0.1:9877"
EXPORTER = argument(
    "--exporter",
    metavar="ADDRESS",
    default=ADDRESS,
    help=f"where infertune-exporter listens (default {ADDRESS})",
)
_MAX_BYTES = 4 * 1024 * 1024
_FIELDS = ("name", "state", "why", "programs")


def _probes(ctx: Context) -> int:
    if not ctx.root.live:
        raise UsageError("a recorded machine has no kernel to attach probes to")
    probes = _attach() if ctx.args.attach else ask(ctx.args.exporter)
    if ctx.args.json:
        ctx.print_json("infertune.probes/1", {"probes": list(probes)})
    else:
        rows = [(probe["name"], probe["state"], probe["why"]) for probe in probes]
        ctx.table(("PROBE", "STATE", "WHY NOT"), rows)
    failed = any(probe["state"] == "failed" for probe in probes)
    return Exit.DIFFERS if failed else Exit.DONE


def ask(address: str) -> Sequence[dict[str, Any]]:
    """What the running exporter says.  Raises Unreachable, UsageError."""
    body = fetch(address, "/probes")
    try:
        found = json.loads(body)
        return [{field: probe[field] for field in _FIELDS} for probe in found]
    except (ValueError, TypeError, KeyError) as error:
        raise Unreachable(f"what answers on {address} is no infertune-exporter") from error


def fetch(address: str, path: str) -> bytes:
    """A page of the running exporter.  Raises Unreachable, UsageError."""
    host, colon, port = address.rpartition(":")
    plain = re.fullmatch(r"[\w.:\[\]-]{1,255}", host, re.ASCII) and ".." not in host
    if not plain or not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"'{address}' is not an address", hint=f"write '{ADDRESS}'")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(_MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"no infertune-exporter answers on {address}: {error}",
            hint="systemctl start infertune-exporter; or 'infertune probes --attach' as root",
        ) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise Unreachable(f"{address} answers {answer.status} {answer.reason}")
    return body


def _attach() -> Sequence[dict[str, Any]]:
    """Attach for a moment, and say what came of it.  Raises NotPermitted, UsageError."""
    if os.geteuid() != 0:
        raise NotPermitted("attaching probes needs root (CAP_BPF and CAP_PERFMON)")
    try:
        from infertune.exporter.probes import Probes
    except ImportError as error:
        raise UsageError(
            f"the exporter is not installed here: {error}",
            hint="install infertune with its extra 'exporter' (docs/install)",
        ) from error
    probes = Probes()
    try:
        found = probes.attach()
    finally:
        probes.close()
    return [{field: getattr(probe, field) for field in _FIELDS} for probe in found]


COMMANDS: tuple[Command, ...] = (
    verb(
        "probes",
        _probes,
        (
            argument("--attach", action="store_true", help="attach them here for a moment (root)"),
            EXPORTER,
            JSON,
        ),
        "Asks the running infertune-exporter, or with '--attach' tries itself and detaches again. "
        "A probe is absent where this kernel does not have what it attaches to (no GPU scheduler "
        "without a GPU driver), not applicable where it cannot work, failed where it should.",
    ),
)
