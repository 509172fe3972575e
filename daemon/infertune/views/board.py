# SPDX-License-Identifier: Apache-2.0
"""The document of ``top`` (infertune.top/1) as lines of a terminal: as wide and high as it is.

Plain text: no colour says anything that no word does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from infertune.base.records import dataclass
from infertune.base.units import GIB, format_size, printable_line
from infertune.views.page import counted

Document = Mapping[str, Any]

NARROWEST = 40
UNKNOWN = "unknown"
_LABEL = 8
"""Columns of the first word of a line."""
_BAR = 24


def board(document: Document, width: int, height: int | None = None) -> list[str]:
    """At most ``height`` lines of at most ``width`` columns; None: as many as it takes."""
    width = max(width, NARROWEST)
    lines = [
        *_head(document),
        *(_gpu(each) for each in document["gpus"]),
        *_memory(document["memory"], width),
        *_waiting(document),
        "",
        *_servers(document["servers"], width),
        "",
        *_below(document),
    ]
    if height is not None and len(lines) > height:
        left = len(lines) - height + 1
        lines = [*lines[: max(height - 1, 0)], f"... {counted(left, 'more line')}"]
    return [printable_line(line, width).rstrip() for line in lines]


def _line(label: str, *parts: str) -> str:
    return f"{label:<{_LABEL}}{'  '.join(part for part in parts if part)}"


# -- numbers ---------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits that count, as a person reads a speed."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """``131 us``, ``4.2 ms``, ``1.4 s``."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value / 1e-9:.0f} ns"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


# -- the lines above -------------------------------------------------------------------


def _head(document: Document) -> Iterator[str]:
    profile, drift, doctor = (document[each] for each in ("profile", "drift", "doctor"))
    if profile is None:
        yield _line("profile", UNKNOWN)
    elif profile["name"] is None:
        yield _line("profile", f"none applied ({profile['state']})")
    else:
        since = profile["since"][:16].replace("T", " ")
        state = "" if profile["state"] == "applied" else profile["state"]
        yield _line("profile", f"{profile['name']} ({profile['backend']})", f"since {since}", state)
        if profile["confirm_in_s"] is not None:
            yield _line("", f"goes back in {profile['confirm_in_s']:.0f} s unless it is confirmed")
    if profile and profile["while_serving"]:
        yield _line("", f"while servers work: {profile['while_serving']}")
    told = [f"drift {len(drift)}"]
    if doctor is None:
        told.append("doctor not asked")
    else:
        counts = [counted(doctor[f"{each}s"], each) for each in ("error", "warning", "note")]
        told.append(f"doctor {', '.join(counts)}")
    yield _line("state", *told)


def _gpu(gpu: Document) -> str:
    hertz, traffic, by = gpu["hertz"], gpu["dram_bytes_per_s"], gpu["throttled_by"]
    return _line(
        "GPU",
        f"{_percent(gpu['busy'])} busy",
        "" if gpu["watts"] is None else f"{gpu['watts']:.0f} W",
        "" if gpu["celsius"] is None else f"{gpu['celsius']:.0f} C",
        "" if hertz is None else f"{hertz / 1e9:.2f} GHz",
        "" if traffic is None else f"memory {traffic / 1e9:.0f} GB/s",
        f"throttled by {', '.join(by)}" if by else "",
    )


def _memory(memory: Document | None, width: int) -> Iterator[str]:
    if memory is None:
        yield _line("memory", f"of the GPU: {UNKNOWN}")
        return
    size, held = memory["bytes"], memory["held_bytes"]
    used = UNKNOWN if held is None else f"{held / GIB:.1f}"
    filled = round(_BAR * min(held / size, 1)) if held is not None and size else 0
    bar = f"[{'#' * filled}{'.' * (_BAR - filled)}]" if width >= 72 and held is not None else ""
    promised = memory["promised_bytes"]
    yield _line(
        "memory",
        bar,
        f"{used} of {size / GIB:.1f} GiB {memory['pool']}",
        f"{format_size(promised)} promised" if promised else "",
    )
    then = memory["next_boot_bytes"]
    later = f"after the next boot {then / GIB:.1f} GiB" if then is not None else ""
    changes = then is not None and abs(then - size) >= GIB // 16
    yield _line("", f"limit {memory['limited_by'] or UNKNOWN}", later if changes else "")


def _waiting(document: Document) -> Iterator[str]:
    pressure, queue = document["pressure"], document["run_queue"]
    resources = ("cpu", "io", "memory")
    yield _line("stalled", *(f"{each} {_percent(pressure[each])}" for each in resources))
    waited = "run queue -"
    if queue is not None:
        waited = f"run queue p50 <= {seconds(queue['p50_s'])}, p99 <= {seconds(queue['p99_s'])}"
    yield _line("probes", waited, f"major faults {number(document['major_faults_per_s'])}/s")


# -- servers -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    show: Callable[[Document], str]
    rank: int = 0
    """The higher, the sooner it gives way where it is narrow."""
    widest: int = 12
    right: bool = True
    gives_way: bool = False
    """Whether it is cut where that lets another one be seen."""


def _speed(server: Document, value: float | None) -> str:
    """In brackets where it is of an earlier request."""
    if value is None:
        return "-"
    return number(value) if server["speeds_are_new"] else f"({number(value)})"


def _ttft(server: Document) -> str:
    if server["ttft_s"] is None:
        return "-"
    text = f"{'<= ' if server['ttft_at_most'] else ''}{seconds(server['ttft_s'])}"
    return text if server["speeds_are_new"] else f"({text})"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _state(server: Document) -> str:
    state, answers = server["state"], server["answers"]
    if state not in (None, "active"):
        return str(state)
    return str({"up": "up", None: state or "unknown"}.get(answers, answers))


_COLUMNS = (
    _Column("SERVER", lambda each: each["name"], widest=20, right=False),
    _Column("STATE", _state, widest=14, right=False),
    _Column("MODEL", lambda each: _file(each["model"]), 2, 40, right=False, gives_way=True),
    _Column("ENGINE", lambda each: each["engine"] or "-", rank=7, right=False),
    _Column("PROMPT/S", lambda each: _speed(each, each["prompt_per_s"])),
    _Column("TOKENS/S", lambda each: _speed(each, each["tokens_per_s"])),
    _Column("TTFT", _ttft, rank=1),
    _Column("REQ", lambda each: _count(each["requests"]), rank=3),
    _Column("WAIT", lambda each: _count(each["waiting"]), rank=4),
    _Column(
        "RUNQ P99",
        lambda each: seconds(each["run_queue"]["p99_s"]) if each["run_queue"] else "-",
        rank=5,
    ),
    _Column("FAULTS/S", lambda each: number(each["major_faults_per_s"]), rank=6),
)


def _file(model: str | None) -> str:
    return "-" if model is None else model.rpartition("/")[2] or model


def _servers(servers: Sequence[Document], width: int) -> Iterator[str]:
    if not servers:
        yield "no servers"
        return
    columns = list(_COLUMNS)
    while _taken(columns, servers) > width and (last := max(each.rank for each in columns)):
        columns = [each for each in columns if each.rank != last]
    left = width - _taken(columns, servers) + _LEAST
    laid_out = [_laid_out(each, servers, left) for each in columns]
    for cells in zip(*laid_out, strict=True):
        yield "  ".join(cells)


_LEAST = 12
"""Columns that a name which gives way keeps."""


def _taken(columns: Sequence[_Column], servers: Sequence[Document]) -> int:
    """Columns of a terminal that they take at the least."""
    widths = (len(_laid_out(each, servers, _LEAST)[0]) for each in columns)
    return sum(widths) + 2 * (len(columns) - 1)


def _laid_out(column: _Column, servers: Sequence[Document], left: int) -> list[str]:
    """Title and cells of one width; ``left`` bounds a column that gives way."""
    widest = min(column.widest, max(left, _LEAST)) if column.gives_way else column.widest
    cells = [column.title, *(printable_line(column.show(each), widest) for each in servers)]
    width = max(map(len, cells))
    if column.gives_way:
        width = max(width, min(_LEAST, widest))
    return [each.rjust(width) if column.right else each.ljust(width) for each in cells]


# -- the lines below -----------------------------------------------------------------------


def _below(document: Document) -> Iterator[str]:
    for each in document["drift"]:
        who = f" by {each['by']}" if each["by"] else ""
        yield _line("drift", f"{each['knob']} is {each['state']}{who}: {each['value'] or '-'}")
    if (doctor := document["doctor"]) and doctor["worst"]:
        yield _line("doctor", doctor["worst"])
    for what, why in document["unknown"].items():
        yield _line(UNKNOWN, f"{what}: {why}")
