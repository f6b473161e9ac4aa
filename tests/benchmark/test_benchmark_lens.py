"""The benchmark of the lens."""

from pathlib import Path

import pytest
from benchmarks import lens

from tiny import refused, run_script, table_cells

FOUND = {
    "model": {"num_layers": 6, "d_model": 128, "context_length": 128, "heads": 12},
    "symbols": 2000,
    "machine": "a machine",
    "threads": 2,
    "seconds": {
        "keystroke": [(0.002, 0.001), (0.004, 0.003), (0.003, 0.001)],
        "middle": [(0.05, 0.04)],
        "middle_whole": [(0.06, 0.05)],
        "first_paint": [(0.4, 0.3), (0.5, 0.3)],
        "whole": [(0.7, 0.6)],
    },
}


def test_the_table_is_in_milliseconds() -> None:
    """Guards against seconds in a column of milliseconds, and a mean that hides the slowest key."""
    (header, _, *rows) = table_cells(lens.to_markdown(FOUND))
    assert header == ["milliseconds", "median", "95 %", "most", "of the processor", "most"]
    assert rows[0] == ["a key at the end", "3.0", "3.9", "4.0", "1.0", "3.0"]
    assert rows[3][1:] == ["450.0", "495.0", "500.0", "300.0", "300.0"]


def test_every_key_and_paint_is_timed(run_on_disk: Path, monkeypatch) -> None:
    """Guards against keys that are not in the text yet, and paints of a text that was read before."""
    monkeypatch.setattr(lens, "SYMBOLS", 60)
    monkeypatch.setattr(lens, "KEYS", 20)
    asked = []
    monkeypatch.setattr(lens, "answer", lambda runs, name, values: asked.append((values, read(runs))) or {})
    found = lens.run(run_on_disk, "cpu", lambda line: None)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {
        "keystroke": 19,
        "middle": 5,
        "middle_whole": 5,
        "first_paint": 5,
        "whole": 5,
    }
    assert [known for _, known in asked[2:22:4]] == [0] * 5
    keys = [values for values, _ in asked[-38::2]]
    assert [own["since"] for own in keys] == list(range(60, 79))
    assert keys[-1]["text"].startswith(keys[0]["text"])
    monkeypatch.setattr(lens, "SYMBOLS", 10**6)
    with refused("run"):
        lens.run(run_on_disk, "cpu", lambda line: None)


def read(runs) -> int:
    return len(runs.lens().reading.ids)


@pytest.mark.parametrize("flags", [[], ["--run=run", "--picture=x.png"]])
def test_it_needs_a_run_and_draws_none(flags: list[str], capfd) -> None:
    """Guards against a traceback where the run is missing, and a picture that is silently left out."""
    assert run_script("benchmark", "lens", *flags) == 2
    assert "run=" in capfd.readouterr().err
