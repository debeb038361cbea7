from __future__ import annotations

from cifar10_tl.engine.results import markdown_table, text_table


def test_a_text_table_has_columns_of_equal_width() -> None:
    assert text_table(["run", "acc"], [["a", "9.00%"], ["longer", ""]]) == "  run       acc\n  a       9.00%\n  longer"


def test_markdown_keeps_its_columns_whatever_is_in_a_cell() -> None:
    table = markdown_table(["run", "acc"], [["a|b", "1"]])
    assert table == "| run | acc |\n| --- | ---: |\n| a\\|b | 1 |\n"
