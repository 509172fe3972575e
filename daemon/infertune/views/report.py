# SPDX-License-Identifier: Apache-2.0
"""The document of a report (infertune.report/1) as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infertune.base.units import format_cpulist, format_size
from infertune.views.page import Bar, Entry, Page, Section, counted, table

Document = Mapping[str, Any]

UNKNOWN = "unknown"
CONTAINS = (
    "In it: the machine, its kernel and boot options; who holds the GPU's memory; the profile and "
    "every file it changed; model servers and the names of their models; what the doctor found and "
    "what was measured; versions."
)
LEFT_OUT = (
    "Left out: API keys and what looks like one, MAC addresses, UUIDs, serial numbers, users and "
    "their homes, addresses of servers, and values of kernel parameters and variables that are not "
    "about hardware or tuning"
)
READ_IT = "Read it before you show it to anyone."


def page(document: Document) -> Page:
    """What a person reads of it, the most important first."""
    machine = document["machine"] or {}
    dmi = machine.get("dmi") or {}
    product = " ".join(filter(None, (dmi.get("vendor"), dmi.get("product"))))
    named = document["host_name"]
    rest = "; the name of this host." if named is None else "."
    found = (
        Section("In short", tuple(_in_short(document))),
        _section("GPU memory", document, "machine", _memory),
        _section("Settings", document, "status", _settings),
        _section("Model servers", document, "servers", _servers),
        _section("Findings", document, "doctor", _findings),
        _section("Measured here", document, "verdicts", _verdicts),
        _section("Settings for the next boot", document, "boot", _boot),
        _section("Machine", document, "machine", _machine),
        _section("Versions", document, "versions", _versions),
        _section("eBPF probes", document, "probes", _probes),
        _section("Not known", document, "doctor", _not_known),
    )
    return Page(
        f"infertune report: {named or product or 'this machine'}",
        (
            f"Made {document['at']} by infertune {document['infertune']}.",
            CONTAINS,
            f"{LEFT_OUT}{rest} {READ_IT}",
        ),
        tuple(each for each in found if each),
    )


def _section(title: str, document: Document, part: str, make: Any) -> Section | None:
    """One part of the document; where it could not be had, why."""
    if document[part] is None:
        return Section(title, (f"Not known: {document['unknown'].get(part, 'nobody said why')}",))
    section: Section | None = make(title, document[part])
    return section


def _text(value: object) -> str:
    """A value for people; what is not known is said to be."""
    if value is None:
        return UNKNOWN
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _size(value: int | None) -> str:
    return UNKNOWN if value is None else format_size(value)


# -- in short ------------------------------------------------------------------------


def _in_short(document: Document) -> Iterator[str]:
    if status := document["status"]:
        yield _applied(status)
        if drift := status["drift"]:
            yield f"Drift: {counted(len(drift), 'file')} no longer as infertune left it."
    if doctor := document["doctor"]:
        number = Counter(each["severity"] for each in doctor["findings"])
        told = (("error", "error"), ("warning", "warning"), ("info", "note"))
        counts = ", ".join(counted(number[each], noun) for each, noun in told)
        unknown = len(doctor["unknown"])
        yield f"Doctor: {counts}; {counted(unknown, 'rule')} could not be answered."
    if (servers := document["servers"]) is not None:
        states = Counter(each["state"] for each in servers)
        told_of = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        yield f"Model servers: {told_of or 'none'}."
    if (boot := document["boot"]) and boot["state"] != "none":
        yield f"Boot settings: {boot['state']}."
    for part, why in document["unknown"].items():
        yield f"Not in this report: {part} ({why})."


def _applied(status: Document) -> str:
    about = status["applied"]
    if about is None:
        return f"No profile is applied ({status['state']})."
    until = "" if about["confirm_by_s"] is None else "; it goes back unless it is confirmed"
    return (
        f"Profile {about['profile']} for {about['backend']}, {status['state']} since "
        f"{about['since']}{until}."
    )


# -- machine -------------------------------------------------------------------------


def _machine(title: str, machine: Document) -> Section:
    rows = [(label, text) for label, text in _lines(machine) if text]
    return Section(title, table=table((), rows))


def _lines(machine: Document) -> Iterator[tuple[str, str]]:
    dmi, memory, cgroup = machine["dmi"], machine["memory"], machine["cgroup"]
    yield "machine", _joined(dmi["vendor"], dmi["product"])
    yield "board", _joined(dmi["board"])
    yield "firmware", _joined(dmi["bios_version"], dmi["bios_date"])
    yield "system", _text(machine["distro"])
    yield "kernel", _text(machine["kernel"])
    yield "command line", _text(machine["cmdline"])
    yield "boot loader", _text(machine["boot_style"])
    yield "CPU", _cpu(machine["cpu"])
    driver, mode = machine["cpu"]["scaling_driver"], machine["cpu"]["amd_pstate"]
    yield "frequency", f"{driver or UNKNOWN}{f', amd_pstate {mode}' if mode else ''}"
    total, free = _size(memory["total_bytes"]), _size(memory["available_bytes"])
    yield "memory", f"{total}, {free} available, swap {_size(memory['swap_bytes'])}"
    for gpu in machine["gpus"]:
        yield "GPU", _gpu(gpu)
    if not machine["gpus"]:
        yield "GPU", "none"
    yield "ROCm", "KFD is there" if machine["kfd"] else "no KFD: ROCm cannot run"
    yield "TTM", _ttm(machine["ttm"])
    yield "NPU", machine["npu"] or "none, or without a driver"
    yield "cgroup", f"version {_text(cgroup['version'])}: {' '.join(cgroup['controllers'])}"
    running = [each["name"] for each in machine["tuners"] if each["running"]]
    yield "other tuners that run", ", ".join(running) or "none"


def _joined(*parts: str | None) -> str:
    return " ".join(part for part in parts if part) or UNKNOWN


def _cpu(cpu: Document) -> str:
    cores, threads = len(cpu["cores"]), format_cpulist(cpu["online"])
    return f"{_text(cpu['model'])}, {counted(cores, 'core')}, CPUs {threads or UNKNOWN} online"


def _gpu(gpu: Document) -> str:
    kind = {True: "integrated", False: "discrete", None: None}[gpu["integrated"]]
    facts = [gpu["name"], gpu["pci_id"], f"driver {gpu['driver'] or 'none'}", gpu["gfx_target"]]
    facts.append(kind)
    if gpu["driver"] == "amdgpu":
        memory = "carve-out" if gpu["integrated"] else "VRAM"
        facts += [f"{memory} {_size(gpu['vram_bytes'])}", f"GTT {_size(gpu['gtt_bytes'])}"]
    return ", ".join(fact for fact in facts if fact)


def _ttm(ttm: Document | None) -> str:
    if ttm is None:
        return "none that amdgpu could hold"
    doubt = "" if ttm["sure"] else " (a guess: several are loaded)"
    return f"{ttm['module']}{doubt}, pages_limit {_text(ttm['pages_limit'])}"


# -- GPU memory ----------------------------------------------------------------------


def _memory(title: str, machine: Document) -> Section:
    found = machine["gpu_memory"]
    pools = {each["when"]: each for each in found["pools"]}
    now, rocm, then = (pools.get(when) for when in ("now", "now, ROCm", "next boot"))
    bars = []
    if now:
        bars.append(_bar("now", now, in_use=True))
    if rocm and not (now and _is_same(rocm, now)):
        bars.append(_bar("now, for ROCm", rocm, in_use=True))
    if then:
        bars.append(_bar("after the next boot", then, in_use=False))
    held_by = [] if now is None else [(now["name"], each) for each in now["holders"]]
    holders = [(each["name"], each["owner"] or "-", _held(pool, each)) for pool, each in held_by]
    return Section(
        title,
        tuple(f"Not known: {each}" for each in found["unknown"]),
        tuple(bars),
        table(("HELD BY", "UNIT OR CONTAINER", "BYTES"), holders),
    )


def _is_same(one: Document, other: Document) -> bool:
    return (one["name"], one["bytes"]) == (other["name"], other["bytes"])


def _bar(when: str, pool: Document, *, in_use: bool) -> Bar:
    size, held = pool["bytes"], pool["held_bytes"] if in_use else None
    limit = pool["limits"][0]["why"] if pool["limits"] else "the limit is unknown"
    used = f"{_size(held)} in use; " if in_use else ""
    share = held / size if held is not None and size else None
    return Bar(f"{when}: {format_size(size)} of {pool['name']}", share, used + limit)


def _held(pool: str, holder: Document) -> str:
    return format_size(holder["gtt_bytes" if pool == "GTT" else "vram_bytes"])


# -- settings ------------------------------------------------------------------------

_OUTCOMES = {
    "already": "as set",
    "conflict": "changed by others",
    "absent": "gone",
    "restore": "half written",
    "rejected": "unreadable",
}


def _settings(title: str, status: Document) -> Section:
    rows = [
        (
            each["knob"],
            _value(each, each["before"]),
            _value(each, each["want"]),
            _value(each, each["original"]),
            _OUTCOMES.get(each["outcome"], each["outcome"]),
            each["path"] or "-",
        )
        for each in status["items"]
    ]
    sentences = [_applied(status), *status["notes"]]
    sentences += [f"A damaged journal is kept in {each}" for each in status["damaged_journals"]]
    if demand := status["demand"]:
        now = "in force" if demand["in_force"] else "they are idle"
        sentences.append(f"While servers work: {demand['profile']} ({demand['backend']}); {now}.")
    sentences += [_drift(each) for each in status["drift"]]
    header = ("KNOB", "NOW", "WANTED", "BEFORE INFERTUNE", "", "FILE")
    return Section(title, tuple(dict.fromkeys(sentences)), table=table(header, rows))


def _value(item: Document, value: str | None) -> str:
    if value is None:
        return "-"
    unit = item["unit_bytes"]
    is_size = unit and value.isdecimal() and len(value) < 20
    return f"{value} ({format_size(int(value) * unit)})" if is_size else value


def _drift(each: Document) -> str:
    who = f" by {each['by']}" if each["by"] else ""
    return f"Drift: {each['knob']} is {each['state']}{who}, now {each['value'] or '-'}."


def _boot(title: str, boot: Document) -> Section:
    staged = f"{boot['state']}: {boot['profile']} ({boot['phase']}) since {boot['since']}."
    state = staged if boot["phase"] else "Nothing is staged."
    rows = [
        (each["id"], each["now"] or "-", each["value"], each["state"], each["reason"] or "")
        for each in boot["options"]
    ]
    findings = [f"{each['what']}; {each['fix']}" for each in boot["findings"]]
    header = ("SETTING", "NOW", "WANTED", "STATE", "")
    return Section(
        title,
        (state, *findings, *boot["notes"]),
        table=table(header, rows),
    )


# -- servers -------------------------------------------------------------------------


def _servers(title: str, servers: Iterable[Document]) -> Section:
    rows = [
        (
            each["name"],
            each["state"],
            each["engine"] or "-",
            each["profile"] or "-",
            _text(each["port"] or "-"),
            each["model"] or "-",
            each["error"] or "",
        )
        for each in servers
    ]
    header = ("SERVER", "STATE", "ENGINE", "PROFILE", "PORT", "MODEL", "ERROR")
    return Section(title, () if rows else ("None.",), table=table(header, rows))


# -- doctor --------------------------------------------------------------------------


def _findings(title: str, doctor: Document) -> Section:
    entries = [
        Entry(
            each["severity"],
            each["text"] + ("" if each["confidence"] == "sure" else " (likely)"),
            (("fix", each["fix"]), ("rule", ", ".join((each["id"], *each["covers"])))),
            tuple((source["text"], source["url"]) for source in each["sources"]),
        )
        for each in doctor["findings"]
    ]
    rows = [(each["title"], each["status"], each["why"]) for each in doctor["survey"]]
    quiet = (
        f"{counted(len(doctor['fine']), 'rule')} found nothing; "
        f"{len(doctor['not_applicable'])} are for other machines."
    )
    header = ("RECOMMENDED ELSEWHERE", "HERE", "WHY")
    return Section(title, (quiet,), table=table(header, rows), entries=tuple(entries))


def _not_known(title: str, doctor: Document) -> Section | None:
    reasons: dict[str, list[str]] = {}
    for each in doctor["unknown"]:
        reasons.setdefault(each["why"], []).append(each["id"])
    rows = [
        (why, ", ".join(ids)) for why, ids in sorted(reasons.items(), key=lambda one: -len(one[1]))
    ]
    header = ("WHY", "RULES OF THE DOCTOR")
    return Section(title, table=table(header, rows)) if rows else None


# -- verdicts ------------------------------------------------------------------------


def _verdicts(title: str, verdicts: Iterable[Document]) -> Section:
    rows = [
        (
            each["setting"],
            each["value"] or "-",
            each["profile"],
            each["found"],
            each["arm"],
            each["model"],
            each["day"],
            "; ".join(each["stale"]),
        )
        for each in verdicts
    ]
    header = ("SETTING", "VALUE", "PROFILE", "FOUND", "ARM", "MODEL", "DAY", "CHANGED SINCE")
    nothing = "Nothing: 'infertune prove' was not run."
    return Section(title, () if rows else (nothing,), table=table(header, rows))


# -- the rest ------------------------------------------------------------------------


def _probes(title: str, probes: Iterable[Document]) -> Section:
    rows = [(each["name"], each["state"], each["why"]) for each in probes]
    return Section(title, () if rows else ("None.",), table=table(("PROBE", "STATE", ""), rows))


def _versions(title: str, versions: Mapping[str, str | None]) -> Section:
    return Section(title, table=table((), [(name, _text(it)) for name, it in versions.items()]))
