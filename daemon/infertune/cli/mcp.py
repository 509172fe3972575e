# SPDX-License-Identifier: Apache-2.0
"""The verb ``mcp``: infertune as tools of an agent, over standard input and output.

The Model Context Protocol is spoken by its own SDK (extra ``mcp``); what the tools are is in
tools.py.  Each call is one process of this program, which lives no longer than its call: a client
that goes away, or cancels, ends it with SIGINT, as Ctrl-C would, so what it set goes back.  So does
a signal that ends this program.  A call's process has a session of its own: it hears of Ctrl-C from
us, and once, since a second SIGINT would cut short what it puts back.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from infertune import __version__
from infertune.base.errors import Exit, Failed, UsageError
from infertune.base.units import format_size
from infertune.cli.base import Context, verb
from infertune.cli.tools import TOOLS, Tool, schema, words

MAX_ANSWER = 8 * 2**20
"""Bytes of a verb's document; more is not an answer that anybody reads."""
MAX_ERRORS = 16 * 1024
MAX_MESSAGE = 4 * 2**20
"""Bytes of a client's message; a call's arguments are a few paths and names."""
GRACE_S = 60
"""Seconds that a verb has to put back what it set, after SIGINT."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INSTRUCTIONS = (
    "Tune a Linux machine for local LLM inference, and put everything back. Look first: machine, "
    "doctor, plan. 'apply' goes back by itself unless 'confirm' is called in time: check that the "
    "machine works before you confirm. Claim no speed-up that 'bench' has not measured here."
)


PROGRAM = (sys.executable, "-P", "-m", "infertune")


def _mcp(ctx: Context) -> int:
    try:
        import anyio
        import mcp  # noqa: F401
    except ImportError:
        raise UsageError(
            "mcp needs the MCP SDK, which is not installed",
            hint="install the extra 'mcp': pip install '.[mcp]'",
        ) from None

    if not (sys.stdin and sys.stdout):
        raise UsageError("mcp speaks over standard input and output, and one of them is closed")

    async def serve() -> int:
        made = server((*PROGRAM, f"--root={ctx.args.root}"))
        return await _until_signalled(partial(_serve, made, sys.stdin.fileno()))

    try:
        return anyio.run(serve)
    except BaseExceptionGroup as group:
        error = _only(group)
        if isinstance(error, BrokenPipeError):  # the client left: nobody is there to be told
            return Exit.DONE
        raise error from None


async def _serve(made: Any, descriptor: int) -> None:
    from mcp.server.stdio import stdio_server

    # Of an AsyncFile the SDK wants no more than its lines.
    messages: Any = _messages(descriptor)
    async with stdio_server(stdin=messages) as (incoming, outgoing):
        await made.run(incoming, outgoing, made.create_initialization_options())


async def _messages(descriptor: int) -> AsyncIterator[str]:
    """Lines of standard input.  Unlike a thread that reads, the wait for one can be cancelled.

    Raises Failed where one is longer than MAX_MESSAGE.
    """
    import anyio

    kept = bytearray()
    while True:
        with contextlib.suppress(PermissionError):  # epoll refuses a file, which never blocks
            await anyio.wait_readable(descriptor)
        piece = os.read(descriptor, 2**16)
        if not piece:
            break
        rest, *more = piece.split(b"\n")
        kept += rest
        for following in more:
            yield kept.decode(errors="replace")
            kept = bytearray(following)
        if len(kept) > MAX_MESSAGE:
            raise Failed(f"a message is longer than {format_size(MAX_MESSAGE)}")
    if kept:
        yield kept.decode(errors="replace")


async def _until_signalled(work: Callable[[], Awaitable[None]]) -> int:
    """Do it; a signal that ends a program cancels it.  Gives the exit code."""
    import anyio

    code: int = Exit.DONE
    with anyio.open_signal_receiver(*_ENDING) as signals:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                nonlocal code
                async for number in signals:
                    code = 128 + number
                    group.cancel_scope.cancel()

            group.start_soon(watch)
            await work()
            group.cancel_scope.cancel()
    return code


def _only(group: BaseExceptionGroup[Any]) -> BaseException:
    """What failed first, out of all the groups that tasks have wrapped around it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def server(program: Sequence[str]) -> Any:
    """The SDK's server with our tools; ``program`` is the command line before a verb."""
    from mcp.server.lowlevel import Server

    return Server(
        "infertune",
        version=__version__,
        instructions=_INSTRUCTIONS,
        on_list_tools=_list_tools,
        on_call_tool=_Caller(program).call,
    )


async def _list_tools(_context: Any, _params: Any) -> Any:
    from mcp import types

    return types.ListToolsResult(tools=[_described(types, tool) for tool in TOOLS.values()])


def _described(types: Any, tool: Tool) -> Any:
    return types.Tool(
        name=tool.name,
        description=tool.what,
        input_schema=schema(tool),
        annotations=types.ToolAnnotations(
            read_only_hint=not tool.changes,
            destructive_hint=False,  # whatever is changed goes back
            open_world_hint=False,
        ),
    )


MOST_AT_ONCE = 8
"""Verbs that run at the same time."""


class _Caller:
    """Answers calls.  One that measures waits for another, which it would disturb."""

    def __init__(self, program: Sequence[str]) -> None:
        import anyio

        self._program = program
        self._measuring = anyio.CapacityLimiter(1)
        self._others = anyio.CapacityLimiter(MOST_AT_ONCE)

    async def call(self, _context: Any, params: Any) -> Any:
        from mcp import types

        tool = TOOLS.get(params.name)
        try:
            if tool is None:
                raise UsageError(f"no tool '{params.name[:80]}'; there are {', '.join(TOOLS)}")
            line = words(tool, params.arguments or {})
            async with self._measuring if tool.measures else self._others:
                code, out, errors = await _ran([*self._program, *line], tool.limit_s)
        except UsageError as error:
            code, out, errors = Exit.USAGE, b"", error.message
        document = _document(out)
        said = {"exit_code": int(code), "errors": errors, "document": document}
        text = json.dumps(document) if document is not None else errors
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)],
            structured_content=said,
            # 1 is an answer: it differs, or there are findings.
            is_error=code not in (Exit.DONE, Exit.DIFFERS),
        )


def _document(out: bytes) -> Mapping[str, Any] | None:
    try:
        found = json.loads(out)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def _ran(command: list[str], limit_s: float) -> tuple[int, bytes, str]:
    """A verb's exit code, its document, and what it said on standard error."""
    import anyio

    async with await anyio.open_process(
        command,
        stdin=-3,
        stdout=-1,
        stderr=-1,
        env={**os.environ, "NO_COLOR": "1"},
        start_new_session=True,
    ) as process:
        out, errors = bytearray(), bytearray()

        async def keep(stream: Any, into: bytearray, most: int) -> None:
            async for piece in stream:
                into += piece[: max(0, most - len(into))]

        try:
            with anyio.fail_after(limit_s):
                async with anyio.create_task_group() as group:
                    group.start_soon(keep, process.stdout, out, MAX_ANSWER)
                    group.start_soon(keep, process.stderr, errors, MAX_ERRORS)
                code = await process.wait()
        except TimeoutError:
            code = Exit.FAILED
            errors += f"it took longer than {limit_s:g} s and was ended\n".encode()
        finally:
            if process.returncode is None:
                with anyio.CancelScope(shield=True), anyio.move_on_after(GRACE_S):
                    process.send_signal(signal.SIGINT)
                    await process.wait()
    return code, bytes(out), errors.decode(errors="replace").strip()


COMMANDS = (
    verb(
        "mcp",
        _mcp,
        description="Serves infertune as tools of an agent, by the Model Context Protocol over "
        "standard input and output: read, plan, fit, doctor, bench, apply, confirm and revert. A "
        "tool may do what the user may do who runs this; polkit asks as always. 'apply' always "
        "goes back by itself unless it is confirmed in time. Needs the extra 'mcp'.",
    ),
)
