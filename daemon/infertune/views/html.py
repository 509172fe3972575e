# SPDX-License-Identifier: Apache-2.0
"""A page as one file of HTML that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from infertune.views.page import Bar, Entry, Page, Section, Table, plain

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should a text ever get through unescaped, a browser still runs and fetches nothing for it."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1f24; --dim: #57606a; --line: #d5dbe1;
  --paper: #fff; --shade: #f4f6f8; --link: #0b57d0; --bar: #4878a8;
  --error: #b3261e; --warning: #8a5300; --info: #3a5f8a; --good: #1e6b34; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #9aa5b1; --line: #39424c;
  --paper: #15191d; --shade: #1e242a; --link: #8ab4f8; --bar: #6c9bcb;
  --error: #f2938c; --warning: #e5b567; --info: #9cc0e7; --good: #86cf9b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
p { margin: .35rem 0; }
.about { color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { overflow-wrap: break-word; max-width: 26rem; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
.label th { width: 11rem; font-weight: 400; } .label td { max-width: 40rem; }
.bar { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: .1rem 1rem;
  align-items: center; margin: .5rem 0; }
.bar i { display: block; height: .75rem; border-radius: .2rem; background: var(--shade);
  border: 1px solid var(--line); overflow: hidden; }
.bar b { display: block; height: 100%; background: var(--bar); }
.bar small { grid-column: 2; color: var(--dim); }
.entry { margin: .75rem 0; padding: .1rem 0 .1rem .9rem; border-left: 3px solid var(--line); }
.entry p { margin: .15rem 0; }
.entry .title { font-weight: 600; }
.entry span { color: var(--dim); }
.error { border-color: var(--error); } .error .word { color: var(--error); }
.warning { border-color: var(--warning); } .warning .word { color: var(--warning); }
.info { border-color: var(--info); } .info .word { color: var(--info); }
a { color: var(--link); }
@media print { body { padding: 0; font-size: 11px; } .entry { break-inside: avoid; } }
"""


def html(page: Page) -> str:
    """The whole file."""
    body = "".join(_section(each) for each in page.sections)
    about = "".join(f"<p>{_text(each)}</p>" for each in page.about)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_text(page.title)}</h1>\n<div class="about">{about}</div>\n{body}</body>\n</html>\n'
    )


def _text(text: str) -> str:
    """The only way for a text into the file."""
    return escape(plain(text))


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>\n"]
    parts += [f"<p>{_text(each)}</p>\n" for each in section.sentences]
    parts += [_bar(each) for each in section.bars]
    parts += [_entry(each) for each in section.entries]
    parts += _table(section.table) if section.table else ()
    return f"<section>\n{''.join(parts)}</section>\n"


def _bar(bar: Bar) -> str:
    drawn = ""
    if bar.share is not None:
        width = f"{min(max(bar.share, 0.0), 1.0) * 100:.1f}%"
        drawn = f'<i><b style="width: {width}"></b></i>'
    told = f"<small>{_text(bar.text)}</small>"
    return f'<div class="bar"><span>{_text(bar.label)}</span>{drawn}{told}</div>\n'


def _table(found: Table) -> Iterator[str]:
    yield f'<div class="scroll"><table{"" if found.header else " class=label"}>\n'
    if found.header:
        yield f"<thead><tr>{''.join(f'<th>{_text(each)}</th>' for each in found.header)}</tr>"
        yield "</thead>\n"
    yield "<tbody>\n"
    for first, *rest in found.rows:
        head = f"<td>{_text(first)}</td>" if found.header else f"<th>{_text(first)}</th>"
        yield f"<tr>{head}{''.join(f'<td>{_text(each)}</td>' for each in rest)}</tr>\n"
    yield "</tbody></table></div>\n"


def _entry(entry: Entry) -> str:
    kind = entry.word if entry.word in ("error", "warning", "info") else "info"
    title = f'<p class="title"><span class="word">{_text(entry.word)}:</span> '
    title += f"{_text(entry.title)}</p>"
    lines = "".join(
        f"<p><span>{_text(label)}:</span> {_text(text)}</p>" for label, text in entry.lines
    )
    links = "".join(f"<p><span>see:</span> {_link(*each)}</p>" for each in entry.links)
    return f'<div class="entry {kind}">{title}{lines}{links}</div>\n'


def _link(text: str, address: str) -> str:
    if not address.startswith("https://"):
        return _text(f"{text}, {address}")
    return f'<a href="{_text(address)}" rel="noreferrer">{_text(text)}</a>'
