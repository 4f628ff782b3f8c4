"""A page that opens without a server: figures inside it, no script, nothing from elsewhere."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Figure(NamedTuple):
    """A PNG with what it shows."""

    name: str
    caption: str
    png: bytes


class Section(NamedTuple):
    """A table with a heading and a line about it."""

    title: str
    note: str
    heading: Sequence[str]
    body: Sequence[Sequence[str]]


class Page(NamedTuple):
    """lines: the answer, a paragraph each."""

    title: str
    lines: Sequence[str]
    figures: Sequence[Figure]
    sections: Sequence[Section]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { margin: .3rem 0; max-width: 46rem; } .first { font-size: 1.1rem; font-weight: 600; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; } figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td:last-child:not(.number) { min-width: 12rem; }
th { border-bottom: 2px solid #888; } .number { text-align: right; white-space: nowrap; }
"""


def html(page: Page) -> str:
    """The page's text; every word of it is escaped."""
    lines = [f'<p class="{"line" if number else "first"}">{escape(line)}</p>' for number, line in enumerate(page.lines)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(page.title)}</h1>",
            *lines,
            *map(_section, page.sections[:1]),
            *map(_figure, page.figures),
            *map(_section, page.sections[1:]),
            "</body>\n</html>\n",
        ]
    )


def _figure(figure: Figure) -> str:
    data = b64encode(figure.png).decode()
    caption = escape(figure.caption)
    image = f'<img alt="{escape(figure.name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _section(section: Section) -> str:
    numbers = [
        all(_is_number(row[column]) for row in section.body) and bool(section.body)
        for column in range(len(section.heading))
    ]
    heading = _cells("th", section.heading, numbers)
    body = "\n".join(f"<tr>{_cells('td', row, numbers)}</tr>" for row in section.body)
    return (
        f'<h2>{escape(section.title)}</h2>\n<p class="note">{escape(section.note)}</p>\n<div class="wide"><table>\n'
        f"<thead><tr>{heading}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cells(tag: str, cells: Sequence[str], numbers: Sequence[bool]) -> str:
    return "".join(
        f'<{tag} class="number">{escape(cell)}</{tag}>' if number else f"<{tag}>{escape(cell)}</{tag}>"
        for cell, number in zip(cells, numbers, strict=True)
    )


def _is_number(cell: str) -> bool:
    """Such as `1,000`, `0.05`, `93.1 ± 0.4 %` or a missing one."""
    try:
        float(cell.split(" ")[0].replace(",", "").replace("−", "-"))
    except (ValueError, IndexError):
        return cell in ("–", "None")
    return True
