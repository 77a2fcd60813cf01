"""What a model knows about held-out clouds. This file holds the renderer of Markdown tables."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """A Markdown table, without a newline at its end.

    Args:
        header: titles of C columns.
        rows: C cells each, as text.
        align: a letter for each column, `l` or `r`; by default the first column stands left and the others right.

    Raises:
        ValueError: a row, or `align`, has another number of columns than the header.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [header, [{"l": "---", "r": "---:"}[letter] for letter in align], *rows]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a table of {len(header)} columns ({', '.join(header)}) got {len(line)} cells: {line}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
