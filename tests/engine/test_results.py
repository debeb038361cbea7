from __future__ import annotations

import csv

from cifar10_tl.engine.results import markdown_table, text_table
from cifar10_tl.io import csv_text


def test_a_text_table_has_columns_of_equal_width() -> None:
    assert text_table(["run", "acc"], [["a", "9.00%"], ["longer", ""]]) == "  run       acc\n  a       9.00%\n  longer"


def test_markdown_keeps_its_columns_whatever_is_in_a_cell() -> None:
    table = markdown_table(["run", "acc"], [["a|b", "1"]])
    assert table == "| run | acc |\n| --- | ---: |\n| a\\|b | 1 |\n"


def test_csv_quotes_what_needs_it() -> None:
    text = csv_text(["a,b", "c"], [['say "x"', None], ["two\nlines", 0.1]])
    assert list(csv.reader(text.splitlines(keepends=True))) == [["a,b", "c"], ['say "x"', ""], ["two\nlines", "0.1"]]
