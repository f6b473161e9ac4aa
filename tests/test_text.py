"""Lines as wide as their terminal, and tables in Markdown."""

import fcntl
import os
import struct
import sys
import termios

import pytest

from charlm.text import fitted, markdown_table, say, visible

MESSAGE = "error: data.corpus=file: --run.resume=true is one word\n  and this line is short"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (30, "error: data.corpus=file:\n  --run.resume=true is one\n  word\n  and this line is short"),
        (20, "error:\n  data.corpus=file:\n  --run.resume=true\n  is one word\n  and this line is\n  short"),
        (80, MESSAGE),
        (0, MESSAGE),
    ],
)
def test_lines_break_at_spaces(columns, shown, monkeypatch):
    """Guards against words that a terminal cuts in two, options above all, and lines that are joined."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stderr:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        monkeypatch.setattr(sys, "stderr", stderr)
        assert fitted(MESSAGE) == shown
    os.close(master)


def test_elsewhere_lines_stay_whole(tmp_path, monkeypatch):
    """Guards against log files that nothing can be searched in."""
    with (tmp_path / "log").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert fitted("word " * 100) == "word " * 100


VISIBLE = {
    "plain é 漢 \N{NO-BREAK SPACE}": "plain é 漢 \N{NO-BREAK SPACE}",
    "\x1b[2J\r\b": "␛[2J␍␈",
    "\x7f\x9b": r"\u007F\u009B",
    "\u202e\u2066\u200b\u2028": r"\u202E\u2066\u200B\u2028",
    "\ud800\udce9": r"\uD800\xE9",
    "␛": r"\u241B",
    "a\tb\n": "a⇥b↵",
}


def test_nothing_commands_a_terminal(capsys):
    """Guards against text of a stranger's that clears the screen, reorders what stands there, or ends the script."""
    for text, shown in VISIBLE.items():
        assert visible(text) == shown
        assert fitted(text) == visible(text, kept="\n")
    say("a\x1b", "\n\ud800", end="")
    assert capsys.readouterr().out == "a␛ \n\\uD800"


def test_a_table() -> None:
    """Guards against a table that Markdown does not read: figures on the left, and cells with a bar of their own."""
    rows = [["a|b", "1.5", "+0.1 ± 0.2", "7 up", "12"], ["c", "", "-3", "down", "1"]]
    assert markdown_table(["name", "x", "Δ", "mixed", "number"], rows).splitlines() == [
        "| name |   x |          Δ | mixed | number |",
        "| ---- | --: | ---------: | ----- | -----: |",
        r"| a\|b | 1.5 | +0.1 ± 0.2 | 7 up  |     12 |",
        "| c    |     |         -3 | down  |      1 |",
    ]
