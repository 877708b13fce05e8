"""A whole page of HTML, and the parts that stand in it: tables, pictures with what they show, lists."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_LIGHT = (
    "--ink:#1b1b1f;--paper:#fcfcfd;--faint:#5d5d68;--line:#d5d5dd;--stripe:#f1f2f5;--mark:#fff0b8;"
    "--c0:#0064a8;--c1:#c04c00;--c2:#007a55;--c3:#a03c7c;--c4:#7d6200;--c5:#50606e"
)
_DARK = (
    "--ink:#e8e8ee;--paper:#16161a;--faint:#a3a3b1;--line:#3a3a44;--stripe:#202027;--mark:#574806;"
    "--c0:#5ab4f0;--c1:#ff9a55;--c2:#3fd9a8;--c3:#ea9acb;--c4:#e6d34a;--c5:#b7c1cb"
)
COLOURS = tuple(f"var(--c{number})" for number in range(6))
"""Colours of lines and marks, which keep a contrast of 3 on light and on dark paper."""

_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink) }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid var(--line) }}
h3 {{ font-size: 1em; margin: 1.2em 0 .3em }} a {{ color: inherit }} h1, h3, li, p, dd {{ overflow-wrap: anywhere }}
.wide {{ overflow-x: auto; max-width: 100% }} :focus-visible {{ outline: 2px solid var(--c0); outline-offset: 2px }}
table {{ border-collapse: collapse }} td, th {{ padding: .15em .7em; text-align: right; vertical-align: top }}
caption {{ text-align: left; color: var(--faint); font-size: .9em; padding: .3em 0 }}
th, td {{ white-space: nowrap }} .left, :is(th, td):first-child {{ text-align: left; white-space: normal }}
.left {{ min-width: 7em; max-width: 30em }} :is(th, td):first-child {{ min-width: 5em }}
tbody tr:nth-child(even) {{ background: var(--stripe) }}
img {{ image-rendering: pixelated; border: 1px solid var(--line); width: 100%; display: block }}
svg {{ max-width: 100%; height: auto }} text {{ font-size: 12px; fill: currentColor }}
figure {{ margin: 1em 0 }} figcaption, .note {{ color: var(--faint); font-size: .9em }} li {{ margin: .4em 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }} mark {{ background: var(--mark); color: inherit }}
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """The page. `body`: HTML, one element after the other; `style`: CSS of this page alone."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body>\n" + "\n".join(body) + "\n"
        "</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], name: str = "", caption: str = "", words: int = 1) -> str:
    """A table of texts, which a narrow window scrolls by itself.

    Args:
        head: names of the columns.
        rows: cells; what is not a text is written by `str`.
        name: the table's id, if it has one.
        caption: what the table shows.
        words: columns from the left that hold words and not numbers.
    """
    identity = f' id="{escape(name)}"' if name else ""
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    cells = "".join(f'<th scope="col"{_side(at, words)}>{escape(text)}</th>' for at, text in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{_side(at, words)}>{escape(str(cell))}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table{identity}>{above}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _side(column: int, words: int) -> str:
    return ' class="left"' if 0 < column < words else ""


def image_figure(uri: str, caption: str) -> str:
    """An image, of a data URI, above what it shows."""
    text = escape(caption)
    return f'<figure><img alt="{text}" src="{uri}"><figcaption>{text}</figcaption></figure>'


def items(sentences: Iterable[str], name: str = "") -> str:
    """Sentences as a list; nothing where there are none."""
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    identity = f' id="{escape(name)}"' if name else ""
    return f"<ul{identity}>{found}</ul>" if found else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text. `kind`: its class, such as `note`."""
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(text)}</p>"


def counted(count: int, thing: str) -> str:
    """So many of a thing whose plural ends with s: `1 line`, `2,000 lines`."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def folded(title: str, content: str) -> str:
    """What is shown once its title is chosen."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
