"""Pages of HTML that open from a disk: one file, with its pictures in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 66rem;
       padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: .2rem 0 1rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.summary { background: #f2f6fa; border-left: 4px solid #2b6cb0; padding: .8rem 1rem; font-size: 1.05rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.cards div { flex: 1 1 9rem; background: #f7f7f9; border-radius: .4rem; padding: .6rem .9rem; color: #555;
             font-size: .85rem; }
.cards b { display: block; font-size: 1.35rem; color: #1a1a1a; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 2px solid #999; }
tr.failed td { color: #b00020; } .notes { color: #7a4b00; } .origin { color: #666; font-size: .8rem; }
code, pre { font-size: .82rem; background: #f6f6f6; } pre { padding: .5rem .7rem; margin: .3rem 0; overflow-x: auto; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; border-left: 3px solid #cbd5e0; }
pre.gone { border-color: #d95f02; } pre.kept { border-color: #2b6cb0; }
details { margin: .25rem 0; } summary { cursor: pointer; } .equation { font-size: 1.1rem; font-weight: 600; }
"""


def escape(text: str) -> str:
    """Text as HTML: characters that would act on the page, or are not to be seen, as what they are."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return html.escape(shown)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text whose first column is words."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f'<div class="wide"><table>{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def figure(png: bytes, caption: str) -> str:
    """A picture with what it shows."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title: str, body: Sequence[str]) -> str:
    """The file: a heading, and the parts of the body in HTML."""
    parts = [f"<h1>{escape(title)}</h1>", *body]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
