# SPDX-License-Identifier: Apache-2.0
"""The verbs ``fit`` and ``expect``, and the question that ``run`` and ``serve`` ask first.

The daemon never reads a model: a root process has no business in files of anybody's making.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from infertune.base.errors import Exit, UsageError
from infertune.base.records import asdict, replace
from infertune.base.root import Root, full_path
from infertune.base.units import format_size
from infertune.boot.sizes import outlooks
from infertune.budget.budget import Budget, budget
from infertune.budget.companions import ALONE
from infertune.budget.expect import Expectation, expect
from infertune.budget.gguf_file import ModelFile, read_model
from infertune.budget.settings import ServerMemory, read_memory
from infertune.budget.shape import Shape, read_shape
from infertune.catalogue.server_settings import (
    SERVER_SETTINGS,
    check_together,
    parse_server_setting,
)
from infertune.cli.base import (
    JSON,
    Argument,
    Command,
    Context,
    argument,
    verb,
    whole,
)
from infertune.cli.engine import BACKEND
from infertune.host.machine import Machine, read_machine
from infertune.host.system import load_average
from infertune.launch.embedded import default_model
from infertune.pools.facts import read_facts
from infertune.pools.promised import with_reservations
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import assume_backend, resolve
from infertune.servers.models import model_path

FORCE = argument(
    "--force", action="store_true", help="start the server even if the model does not fit"
)


MODEL = argument(
    "model",
    metavar="MODEL",
    nargs="?",
    help="GGUF file or name of a model ('infertune models'; default: the embedded one)",
)
CTX = argument(
    "--ctx",
    type=whole("a context", 1, 2**24),
    metavar="N",
    help="tokens of context, of all slots together",
)


def parse_setting(text: str) -> tuple[str, str | int | bool]:
    """``ctx_size=4096`` as a profile would say it.  Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        configured: str | int | bool = json.loads(value)
    except (ValueError, RecursionError):
        configured = value
    if isinstance(configured, float):
        configured = value
    try:
        parse_server_setting(name, configured)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return name, configured


def canonical(given: Mapping[str, str | int | bool], machine: Machine) -> dict[str, str]:
    """Server settings as this machine's server would have them.  Raises UsageError."""
    found = {}
    for name, value in given.items():
        try:
            found[name] = SERVER_SETTINGS[name].value.parse(value, machine)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    return found


# -- fit ------------------------------------------------------------------------------


def _fit(ctx: Context) -> int:
    args = ctx.args
    model = _model(args.model)
    shape = read_shape(model)
    machine = read_machine(ctx.root)
    backend = args.backend if args.backend != "auto" else assume_backend(machine)[0]
    settings = _settings(ctx, machine, backend)
    memory = read_memory(settings)
    facts = with_reservations(ctx.root, read_facts(ctx.root, machine), backend)
    ways = outlooks(ctx.root, machine, facts, args.profile)
    found = budget(shape, memory, facts, backend, ways)
    if args.json:
        ctx.print_json("infertune.fit/1", _fit_document(ctx, model, shape, memory, backend, found))
    else:
        _print_fit(ctx, model, shape, backend, found)
    return Exit.DONE if found.verdict in ("fits", "tight") else Exit.DIFFERS


def _model(path: str | None) -> ModelFile:
    if path is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = default_model(os.path.join(cache, "infertune"))
    return read_model(model_path(path, os.environ))


def _settings(ctx: Context, machine: Machine, backend: str) -> dict[str, str]:
    """Canonical settings: the profile's, over them those after ``--``, over these the options."""
    found: dict[str, str] = {}
    if ctx.args.profile:
        desired = resolve(load_profile(ctx.root, ctx.args.profile), machine, backend)
        found = {name: setting.canonical for name, setting in desired.server.items()}
    found |= canonical(dict(map(parse_setting, ctx.command)), machine)
    if ctx.args.ctx is not None:
        found["ctx_size"] = str(ctx.args.ctx)
    if ctx.args.parallel is not None:
        found["parallel"] = str(ctx.args.parallel)
    for name, path in (("mmproj", ctx.args.mmproj), ("model_draft", ctx.args.draft)):
        if path is not None:
            found[name] = full_path(path)
    try:
        check_together(found)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return found


def _print_fit(ctx: Context, model: ModelFile, shape: Shape, backend: str, found: Budget) -> None:
    ctx.print(f"{shape.name or os.path.basename(model.files[0])}: {_describe(model, shape)}")
    ctx.print(f"backend {backend}")
    rows = [
        (part.what, format_size(part.bytes), part.where, part.when, part.source)
        for part in found.parts
    ]
    ctx.table(("WHAT", "SIZE", "WHERE", "WHEN", "FROM"), rows)
    pools = [
        (
            pool.name,
            format_size(pool.bytes),
            "unknown" if pool.held is None else format_size(pool.held),
            format_size(pool.need),
            format_size(pool.need_later),
            pool.source,
        )
        for pool in found.pools
    ]
    ctx.table(("POOL", "SIZE", "IN USE", "AT START", "LATER", "LIMITED BY"), pools)
    for note in found.notes:
        ctx.print(f"note: {note}", 2)
    verdict = "unknown whether it fits" if found.verdict == "unknown" else found.verdict
    first, *more = found.reasons or ("",)
    ctx.print(f"{verdict}: {first}" if first else verdict)
    for text in (*more, *(f"{each.verdict} with {each.text}" for each in found.remedies)):
        ctx.print(f"  {text}")
    if found.verdict == "does not fit" and not found.remedies:
        ctx.print("  no single change makes it fit here: take a smaller quant, or another model")


def _describe(model: ModelFile, shape: Shape) -> str:
    parts = f" in {len(model.files)} files" if len(model.files) > 1 else ""
    facts = [
        f"{shape.architecture}, {_billions(shape.parameters)} parameters",
        *([f"{_billions(shape.active_parameters)} active"] if shape.experts else []),
        f"{format_size(shape.weights_bytes)}{parts}",
        *([f"trained for {shape.context} tokens"] if shape.context else []),
    ]
    return ", ".join(facts)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def _fit_document(
    ctx: Context,
    model: ModelFile,
    shape: Shape,
    memory: ServerMemory,
    backend: str,
    found: Budget,
) -> dict[str, Any]:
    projector, draft = memory.companions.projector, memory.companions.draft
    settings = asdict(replace(memory, ctx=memory.ctx or shape.context, companions=ALONE))
    del settings["companions"]
    return {
        "files": list(model.files),
        "profile": ctx.args.profile,
        "backend": backend,
        "model": _model_document(shape),
        "projector": asdict(projector) if projector else None,
        "draft": _model_document(draft) if draft else None,
        "settings": settings,
        **asdict(found),
    }


def _model_document(shape: Shape) -> dict[str, Any]:
    fields = (
        "name", "architecture", "known", "checked", "parameters", "active_parameters",
        "weights_bytes", "active_bytes", "context", "experts", "experts_used", "vocab",
    )  # fmt: skip
    return {**{field: getattr(shape, field) for field in fields}, "layers": len(shape.layers)}


# -- expect ---------------------------------------------------------------------------


def _expect(ctx: Context) -> int:
    model = _model(ctx.args.model)
    shape = read_shape(model)
    machine = read_machine(ctx.root)
    read: float | None = None
    notes: tuple[str, ...] = ()
    if ctx.root.live:
        from infertune.budget.bandwidth import read_bandwidth

        read = read_bandwidth(machine)
        notes = _busy(ctx.root, machine)
    depth = ctx.args.ctx or min(32768, shape.context or 32768)
    found = expect(shape, machine, read, depth)
    found = replace(found, notes=(*found.notes, *notes))
    bench = _last_bench(ctx, model, shape, machine, read) if ctx.root.live else None
    if ctx.args.json:
        document = {
            "files": list(model.files),
            "model": _model_document(shape),
            **asdict(found),
            "last_bench": bench,
        }
        ctx.print_json("infertune.expect/1", document)
    else:
        _print_expect(ctx, model, shape, found, bench)
    return Exit.DONE


def _last_bench(
    ctx: Context, model: ModelFile, shape: Shape, machine: Machine, read: float | None
) -> dict[str, Any] | None:
    """What 'infertune bench' measured of this model here, beside what memory allows."""
    # Imported here: no other verb of this module measures.
    from infertune.measure.figures import last_bench
    from infertune.measure.store import OF_ROOT, directory_of, machine_key, model_key
    from infertune.measure.trial import PROMPT

    home = os.path.expanduser("~")
    own = (directory_of(os.environ, home, root=root) for root in (False, True))
    key = model_key(ctx.root, model.files)
    last = last_bench(ctx.root, dict.fromkeys((*own, OF_ROOT)), machine_key(machine), key)
    if last is None:
        return None
    reader = "GPU" if last.about.get("backend") in ("rocm", "vulkan") else "CPU"
    rows = []
    for each in last.rows:
        # Weights are read once for all slots, so that the roofline is about one.
        lines = (
            expect(shape, machine, read, each.depth + PROMPT).rooflines if each.slots == 1 else ()
        )
        most = next((one for one in lines if one.reader == reader), None)
        fields = ("depth", "slots", "kept", "ttft_p50_s", "prefill_per_s", "decode_per_s")
        rows.append({name: getattr(each, name) for name in (*fields, "decode_low", "decode_high")})
        deep = most.tokens_per_second_deep or most.tokens_per_second if most else None
        rows[-1]["roofline_per_s"] = deep[1] if deep else None
    names = ("began", "profile", "backend", "build", "kernel", "busy")
    return {
        **{name: last.about.get(name) for name in names},
        "path": last.path,
        "reader": reader,
        "kernel_now": machine.kernel,
        "rows": rows,
    }


def _busy(root: Root, machine: Machine) -> tuple[str, ...]:
    """A remark where other programs want the CPUs, and so the memory."""
    load = load_average(root)
    if load is None or load < len(machine.cpu.online) / 2:
        return ()
    return (f"load {load}: other programs run, and the bandwidth measured is what they leave",)


def _print_expect(
    ctx: Context,
    model: ModelFile,
    shape: Shape,
    found: Expectation,
    bench: Mapping[str, Any] | None,
) -> None:
    ctx.print(f"{shape.name or os.path.basename(model.files[0])}: {_describe(model, shape)}")
    deep = "unknown" if found.depth_bytes is None else format_size(found.depth_bytes)
    weights = format_size(found.active_bytes)
    ctx.print(
        f"read for each token: {weights} of weights, and {deep} for a context of "
        f"{found.depth} tokens"
    )
    if found.rooflines:
        header = ("READER", "BANDWIDTH", "AT MOST, TOKENS/S", f"AT {found.depth}", "FROM")
        ctx.table(
            header,
            [
                (
                    each.reader,
                    f"{_range(tuple(one / 1e9 for one in each.bandwidth))} GB/s",
                    _range(each.tokens_per_second),
                    _range(each.tokens_per_second_deep),
                    each.source,
                )
                for each in found.rooflines
            ],
        )
    for speed in found.measured_by_others:
        ctx.print(
            f"measured by others: {speed.model}: {_range(speed.tokens_per_second)} tokens/s "
            f"({speed.how}; {speed.source})"
        )
    if not found.measured_by_others:
        ctx.print("measured by others: nothing is known here of this model on this hardware")
    if bench:
        _print_bench(ctx, bench)
    else:
        ctx.print("measured here: not yet ('infertune bench')")
    for note in found.notes:
        ctx.print(f"note: {note}", 2)


def _print_bench(ctx: Context, bench: Mapping[str, Any]) -> None:
    under = f"profile {bench['profile']}" if bench["profile"] else "no profile"
    how = ", ".join(
        str(each)
        for each in (under, bench["backend"], bench["build"], "busy" if bench["busy"] else None)
        if each
    )
    ctx.print(f"measured here: {str(bench['began'])[:10]}: {how}", 2)
    rows = []
    for each in bench["rows"]:
        speed, most = each["decode_per_s"], each["roofline_per_s"]
        low, high = each["decode_low"], each["decode_high"]
        told = "-" if speed is None else _range((speed, speed))
        between = "" if low is None else f" ({_range((low, high)).replace(' to ', '-')})"
        share = (
            "-" if speed is None or not most else f"{speed / most:.0%} of {_range((most, most))}"
        )
        rows.append((str(each["depth"]), str(each["slots"]), f"{told}{between}", share))
    header = ("DEPTH", "SLOTS", "TOKENS/S", f"OF AT MOST ({bench['reader']})")
    ctx.table(header, rows)
    if bench["kernel"] != bench["kernel_now"]:
        ctx.print(f"note: measured under kernel {bench['kernel']}: may be out of date", 2)


def _range(pair: tuple[float, ...] | None) -> str:
    if pair is None:
        return "unknown"
    low, high = (f"{each:.0f}" if each >= 20 else f"{each:.1f}" for each in pair)
    return low if low == high else f"{low} to {high}"


_ARGUMENTS: tuple[Argument, ...] = (
    MODEL,
    argument("--profile", metavar="P", help="with the server settings of this profile"),
    CTX,
    argument("--parallel", type=whole("a number of slots", 1, 1024), metavar="N", help="slots"),
    argument("--mmproj", metavar="FILE", help="with this projector (images, sound)"),
    argument("--draft", metavar="FILE", help="with this model that drafts"),
    BACKEND,
    JSON,
)

COMMANDS: tuple[Command, ...] = (
    verb(
        "fit",
        _fit,
        _ARGUMENTS,
        "Reads the head of a GGUF file (all parts of a split one) and adds what a llama-server "
        "takes for it: weights, KV cache and recurrent state of all layers, compute buffers, "
        "prompt cache, context checkpoints, and a projector or a model that drafts. Holds "
        "that against the memory of this machine: carve-out or GTT limit, "
        "and RAM less a reserve for the system. Says fits, tight or does not fit, where each "
        "figure comes from, which single change helps, and not checked where no server of that "
        "architecture was ever measured against the sums. Without a profile the server's own "
        "defaults count. Server settings may follow after --, as SETTING=VALUE. Exit code 1: "
        "does not fit, or not known.",
        takes_command=True,
    ),
    verb(
        "expect",
        _expect,
        (MODEL, CTX, JSON),
        "Bytes that are read for each token, the memory bandwidth of this machine (measured for a "
        "second, on the CPU), and so the most tokens per second that memory allows; beside it "
        "what 'infertune bench' measured here last, and what others measured on this hardware.",
    ),
)
