"""Results for people: one sheet of rows, in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.table import Table
from rich.text import Text

from mlip_jax.core.markdown import plain
from mlip_jax.core.tables import make_table
from mlip_jax.evaluations.results import Results

_WORDS = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4"}  # figures with a name of their own
_HEADINGS = ("Dataset", "Figure", "Value", "Chance", "Examples", "Protocol")


@dataclass(frozen=True)
class Sheet:
    """A table. The first two columns are words; rows of one dataset stand together."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]


def sheet(results: Results, title: str) -> Sheet:
    """The results, a row a figure."""
    rows = []
    for key, value in results.figures.items():
        expected, examples = results.chance.get(key), results.examples.get(key)
        rows.append(
            (
                *names(key),
                formatted(key, value),
                "" if expected is None else formatted(key, expected),
                "" if examples is None else f"{examples:,}",
                results.protocols.get(key, ""),
            )
        )
    notes = [f"{_group(group)}: {note}" for group, note in results.notes.items()]
    notes += [
        f"{family.replace('_', '-')} is left out: {why}" for family, why in results.left_out.items()
    ]
    return Sheet(title, _HEADINGS, rows, notes)


def names(key: str) -> tuple[str, str]:
    """A figure's key in words: its family and dataset, and the figure."""
    family, name, figure = key.split("/", 2)
    words = figure.replace("_recall@", " R@").replace("top", "top-").replace("_", " ")
    words = _WORDS.get(figure, words)
    return _group(f"{family}/{name}"), words


def _group(group: str) -> str:
    family, _, name = group.partition("/")
    return f"{family.replace('_', '-')} · {name}"


def formatted(key: str, value: float) -> str:
    """A figure as percent, unless it is a rank, from 1, a cosine, a loss or CIDEr-D, 0 to 10."""
    if key.endswith("rank"):
        return f"{value:,.1f}"
    plain = key.endswith(("cosine", "loss", "cider_d"))
    return f"{value:.3f}" if plain else f"{100 * value:.2f} %"


def table(results: Results) -> Table:
    """The results for the terminal; the notes below say the protocols."""
    full = sheet(results, "Results" if results.figures else "No dataset to evaluate on")
    short = Sheet(full.title, _HEADINGS[:-1], [row[:-1] for row in full.rows], full.notes)
    return terminal(short)


def terminal(sheet: Sheet) -> Table:
    """A sheet for the terminal, notes below it."""
    drawn = make_table(
        sheet.headings,
        words=2,
        title=sheet.title,
        caption=Text("\n".join(sheet.notes)),
        caption_justify="left",
    )
    last = None
    for group, *cells in sheet.rows:
        if last is not None and group != last:
            drawn.add_section()
        drawn.add_row(Text("" if group == last else group), *map(Text, cells))
        last = group
    return drawn


def markdown(sheet: Sheet) -> str:
    """A sheet as a Markdown table, notes below it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(plain, cells))} |"

    rule = ["---", "---", *["---:"] * (len(sheet.headings) - 2)]
    lines = [
        f"# {plain(sheet.title)}",
        "",
        line(sheet.headings),
        line(rule),
        *map(line, sheet.rows),
    ]
    notes = [f"- {plain(note)}" for note in sheet.notes]
    return "\n".join([*lines, "", *notes]) + "\n"


def html(sheet: Sheet) -> str:
    """A sheet as a page that needs no other file."""
    return page_template(Path(__file__).with_name("sheet.html")).render(sheet=sheet)


def page_template(path: Path) -> jinja2.Template:
    """The HTML template of a file: what it shows is escaped, and an unknown name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(path.name)
