"""A report as one HTML file that needs nothing beside it: styles inside, pictures embedded, no script.

Whatever a model or a data file says is shown as text: every string passes `html.escape` here and nowhere else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2e9e5b; --bad: #d0473d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; margin: 1rem 0; }
.panels { display: flex; gap: .8rem; flex-wrap: wrap; }
figure { margin: 0; flex: 1 1 240px; max-width: 400px; }
figure img { width: 100%; height: auto; border-radius: 4px; }
.plot { display: block; max-width: min(100%, 860px); margin: 1rem 0; border-radius: 4px; background: #fff; }
.panels .plot { max-width: 48%; height: auto; align-self: start; }
figcaption { font-size: 13px; overflow-wrap: anywhere; white-space: pre-wrap; }
.question { font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
.right { color: var(--good); } .wrong { color: var(--bad); } .note { opacity: .75; }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; margin: 0; font-size: 11px; }
  article, .plot, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  figure { max-width: 31%; }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; `parts` are fragments made by the functions below."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def links(targets: Sequence[tuple[str, str]]) -> str:
    """Names and the pages that they lead to."""
    entries = "".join(f'<li><a href="{escape(target)}">{escape(name)}</a></li>' for name, target in targets)
    return f"<ul>{entries}</ul>"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in row) + "</tr>")
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


def plot(png: bytes, name: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<img class="plot" alt="{escape(name)}" src="data:image/png;base64,{source}">'


def figure(image: Image.Image, caption: str, verdict: bool | None = None) -> str:
    """A picture with its caption; the verdict is a mark in words and colour."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=86)
    source = base64.b64encode(content.getvalue()).decode()
    mark = {None: "", True: '<b class="right">✓</b> ', False: '<b class="wrong">✗</b> '}[verdict]
    return (
        f'<figure><img alt="{escape(caption[:80])}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{mark}{escape(caption)}</figcaption></figure>"
    )


def side_by_side(parts: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(parts)}</div>'


def article(question: str, figures: Sequence[str]) -> str:
    return f'<article><div class="question">{escape(question)}</div>{side_by_side(figures)}</article>'
