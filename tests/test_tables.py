"""Markdown tables."""

import pytest

from pointalign.evaluation import markdown_table


def test_columns_are_aligned_and_rows_complete():
    assert markdown_table(["name", "value"], [["a", "1"], ["b", ""]]) == (
        "| name | value |\n| --- | ---: |\n| a | 1 |\n| b |  |"
    )
    assert markdown_table(["a", "b"], [], "rl").splitlines()[1] == "| ---: | --- |"


@pytest.mark.parametrize(("rows", "align"), [([["a"]], None), ([["a", "b", "c"]], None), ([], "l")])
def test_a_missing_cell_is_an_error(rows, align):
    with pytest.raises(ValueError, match=r"table of 2 columns \(name, value\)"):
        markdown_table(["name", "value"], rows, align)
