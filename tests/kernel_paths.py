# SPDX-License-Identifier: Apache-2.0
"""Which files of /proc and /sys a module reads, as far as its source shows it."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Iterator

READERS = {
    *("at", "exists", "get", "get_int", "glob", "listed", "modified", "names", "read"),
    *("read_bytes", "read_file", "read_records", "read_small", "read_value", "readlink", "real"),
}
"""Methods of Root that read; their first argument is a path.  at() is how to read past it."""


def kernel_files(source: str) -> set[tuple[int, str]]:
    """Line and path of every read of /proc or /sys; ``*`` stands for what is not in the source.

    A path that is handed in, or comes out of data, does not show.
    """
    tree = ast.parse(source)
    known = _learn(_imported(tree), tree.body)
    found: set[tuple[int, str]] = set()
    for scope in _scopes(tree):
        here = _learn(known, list(ast.walk(scope)))
        for line, path in _reads_in(scope):
            texts = (re.sub(r"\*+", "*", text) for text in _texts(path, here))
            found |= {(line, text) for text in texts if re.match(r"/(proc|sys)(/|$)", text)}
    return found


def reads(source: str) -> list[str]:
    """The path of every read through Root, as it is written."""
    return [ast.unparse(path) for _, path in _reads_in(ast.parse(source))]


Known = dict[str, set[str]]
"""What a name may stand for."""


def _reads_in(scope: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    for node in ast.walk(scope):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[path, *_]):
                if name in READERS and re.search(r"(^|[._])root$|^self$", ast.unparse(owner)):
                    yield node.lineno, path


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from node.body
        else:
            yield node


def _imported(tree: ast.Module) -> Known:
    """Texts that a module takes from others of ours."""
    found: Known = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("infertune."):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                value = getattr(module, alias.name, None)
                if isinstance(value, str):
                    found[alias.asname or alias.name] = {value}
    return found


def _learn(known: Known, nodes: Iterable[ast.AST]) -> Known:
    found = dict(known)
    bindings = [each for node in nodes for each in _bindings(node)]
    for name, value in bindings:
        if texts := _texts(value, found):
            found[name] = found.get(name, set()) | texts
    return found


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            | ast.For(target=ast.Name(id=name), iter=value)
            | ast.comprehension(target=ast.Name(id=name), iter=value)
            | ast.NamedExpr(target=ast.Name(id=name), value=value)
        ):
            yield name, value


def _texts(node: ast.expr, known: Known) -> set[str]:
    """What an expression may be; empty where the source does not say."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Name(id=name):
            return known.get(name, set())
        case ast.JoinedStr(values=parts):
            return _joined(parts, known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined([left, right], known)
        case ast.IfExp(body=one, orelse=other):
            return _texts(one, known) | _texts(other, known)
        case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
            return {text for part in parts for text in _texts(part, known)}
        case (
            ast.FormattedValue(value=inner)
            | ast.Starred(value=inner)
            | ast.Subscript(value=inner)  # a slice of a list of paths
            | ast.Call(func=ast.Name(id="reversed" | "sorted"), args=[inner, *_])
            | ast.Call(func=ast.Attribute(attr="glob" | "real"), args=[inner, *_])
        ):
            return _texts(inner, known)
    return set()


def _joined(parts: list[ast.expr], known: Known) -> set[str]:
    texts = {""}
    for part in parts:
        texts = {text + more for text in texts for more in _texts(part, known) or {"*"}}
    return texts
