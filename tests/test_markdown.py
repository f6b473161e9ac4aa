"""Tables in Markdown."""

from charlm.markdown import markdown_table


def test_a_table() -> None:
    """Guards against a table that Markdown does not read: figures on the left, and cells with a bar of their own."""
    rows = [["a|b", "1.5", "+0.1 ± 0.2", "7 up", "12"], ["c", "", "-3", "down", "1"]]
    assert markdown_table(["name", "x", "Δ", "mixed", "number"], rows).splitlines() == [
        "| name |   x |          Δ | mixed | number |",
        "| ---- | --: | ---------: | ----- | -----: |",
        r"| a\|b | 1.5 | +0.1 ± 0.2 | 7 up  |     12 |",
        "| c    |     |         -3 | down  |      1 |",
    ]
