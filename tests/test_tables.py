"""Tables on the terminal: nothing is cut off, however narrow it is."""

import io

import pytest
from rich.console import Console

from mlip_jax.core.tables import make_table

LONG = "configs/a_config_with_a_name_as_long_as_two_thirds_of_a_page.py:size=B/16,data=prepared:x"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_heading_and_no_cell_is_cut(width):
    table = make_table(("Figure", LONG, "Chance"), words=1)
    table.add_row("text to image R@1", "42.65 %", LONG.upper())
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    lines = output.getvalue().splitlines()
    assert "\u2026" not in output.getvalue() and all(len(line) <= width for line in lines)
    for text in (LONG, LONG.upper()):
        assert sorted(text) == sorted(set_of(text, lines))


def set_of(text, lines):
    """The characters of the text's case that the lines hold, but for the other words."""
    heading = text == LONG
    rule = next(place for place, line in enumerate(lines) if "\u2500" in line)
    part = "".join(lines[:rule] if heading else lines[rule + 1 :])
    for other in ("Figure", "Chance") if heading else ("text", "to", "image", "R@1", "42.65", "%"):
        part = part.replace(other, "", 1)
    return part.replace(" ", "")
