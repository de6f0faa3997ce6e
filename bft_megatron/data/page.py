"""A prepared row as one self-contained HTML page. Reading and printing the row is in `inspection`."""

from __future__ import annotations

from html import escape

from bft_megatron.data.inspection import Row, Sample, Span, heading, visible

_STYLE = """
:root { color-scheme: light dark; --learned: light-dark(#bfe8c5, #1d5a2b); --masked: light-dark(#5c5f66, #a0a4ab);
  --empty: light-dark(#e4e4e7, #333338); --line: light-dark(#d0d0d5, #44444a); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: .85rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.row, .row a { display: flex; min-width: 0; } .row { height: 2rem; margin: 1rem 0; background: var(--empty); }
.row a { border-right: 1px solid canvas; } .row i { min-width: 0; background: var(--masked); opacity: .55; }
.row i.learned { background: var(--learned); opacity: 1; } .row i.empty { background: none; }
section { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; }
h2 { padding: .4rem .8rem; border-bottom: 1px solid var(--line); } section:target h2 { background: var(--empty); }
.text { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem;
  color: var(--masked); unicode-bidi: plaintext; }
mark { background: var(--learned); color: canvastext; } b { border: 1px solid; border-radius: 3px; }
"""


def page(row: Row) -> str:
    """Return the page: a bar with every place of the row to scale, then the samples with supervised text marked."""
    bar = "".join(
        f'<a href="#sample-{k}" title="{escape(heading(sample))}" style="flex:{sample.tokens + sample.padding} 0 0">'
        f"{''.join(_part(span.tokens, 'learned' if span.supervised else '') for span in sample.spans)}"
        f"{_part(sample.padding, 'empty')}</a>"
        for k, sample in enumerate(row.samples)
    )
    left = row.places - sum(sample.tokens + sample.padding for sample in row.samples)
    samples = "\n".join(_section(k, sample) for k, sample in enumerate(row.samples))
    summary = escape(row.summary())
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{summary}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{summary}</h1>\n<p><mark>learned</mark> not learned <b>control token</b></p>\n"
        f'<div class="row">{bar}{_part(left, "empty")}</div>\n{samples}\n</html>\n'
    )


def _part(tokens: int, kind: str) -> str:
    return f'<i class="{kind}" style="flex:{tokens} 0 0"></i>' if tokens else ""


def _section(k: int, sample: Sample) -> str:
    text = "".join(map(_span, sample.spans))
    return f'<section id="sample-{k}"><h2>{escape(heading(sample))}</h2><div class="text">{text}</div></section>'


def _span(span: Span) -> str:
    text = escape(visible(span.text))
    if span.control:
        text = f"<b>{text}</b>"
    return f"<mark>{text}</mark>" if span.supervised else text
