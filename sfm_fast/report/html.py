"""One self-contained HTML page, with embedded pictures and without scripts or requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from torch import Tensor

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6875; --line: #d8dee5; --page: #fff; --tint: #f4f7fa; --best: #1f6f43; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9fabb7; --line: #34404c; --page: #14191f; --tint: #1c232b; --best: #6fcf97; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p, .note { max-width: 46rem; } .note, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: var(--tint); }
tr.highlight td { font-weight: 600; color: var(--best); }
.pictures td, .pictures th { padding: .2rem; text-align: center; border: 0; background: none; font-size: .75rem; font-weight: 400; white-space: normal; }
.pictures th:first-child { text-align: right; padding-right: .6rem; color: var(--soft); }
.pictures img { width: 68px; height: 68px; image-rendering: pixelated; border-radius: 3px; display: block; margin: auto; }
figure { margin: 0; } figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { background: var(--tint); padding: .1rem .3rem; border-radius: 3px; }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page: ``sections`` are (heading, HTML body)."""
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n{body}\n</body>\n</html>\n"
    )


def note(text: str) -> str:
    """A paragraph in small type."""
    return f'<p class="note">{escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], highlight: int | None = None) -> str:
    """A table, with row ``highlight`` emphasised."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for index, row in enumerate(rows):
        opening = '<tr class="highlight">' if index == highlight else "<tr>"
        lines.append(opening + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(image: Tensor, alternative: str) -> str:
    """An <img> of (H, W, channels) uint8, embedded as PNG."""
    from PIL import Image

    array = image.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG", optimize=True)
    return (
        f'<img alt="{escape(alternative)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def picture_rows(columns: Sequence[str], rows: Sequence[tuple[str, Tensor]]) -> str:
    """Rows of pictures under common column names: (row name, (columns, H, W, channels) uint8)."""
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f"<td>{picture(image, f'{name}: {column}')}</td>" for image, column in zip(images, columns, strict=True)
        )
        + "</tr>"
        for name, images in rows
    ]
    return f'<div class="scroll"><table class="pictures"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    """An SVG with a caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
