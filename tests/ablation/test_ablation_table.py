"""The table of an ablation: means, spread, differences and verdicts against hand arithmetic; the three forms."""

import csv
import io
import math
from dataclasses import replace

import pytest

from charlm.ablation.table import Row, draw, protocols, to_csv, to_markdown
from charlm.ablation.variants import Variant, VariantRun
from charlm.config import Config, ModelConfig, TrainConfig
from tiny import table_cells


def results(*scores: float, first_seed: int = 0) -> dict[int, dict[str, float]]:
    return {
        first_seed + index: {
            "bits_per_character": score,
            "bits_per_byte": score - 0.5,
            "seconds_per_step": (0.01, 0.03, 0.02)[index],
            "cpu_seconds": 100.0 * (index + 1),
            "peak_memory": (100 + index) * 2**20,
        }
        for index, score in enumerate(scores)
    }


def rows_of(paper: dict[str, float] | None = None, **by_name: dict[int, dict[str, float]]) -> list[Row]:
    rows: list[Row] = []
    for name, found in by_name.items():
        rows.append(Row(Variant(name, paper=(paper or {}).get(name)), found, rows[0] if rows else None))
    return rows


MEASURED = {
    "full": results(3.0, 3.1, 3.2),
    "worse": results(4.0, 4.2, 4.1),
    "noise": results(3.1, 3.1, 3.1),
    "better": results(2.5, 2.6, 2.7),
}


def test_arithmetic_by_hand() -> None:
    """Guards against the deviation of a population, differences of unlike seeds, and a verdict by another rule."""
    full, worse, noise, better = (row.figures for row in rows_of(**MEASURED))
    assert (full["delta"], full["delta_95"], full["verdict"]) == (None, None, "")
    assert full["bits_per_character"] == pytest.approx(3.1)
    assert full["standard_deviation"] == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert worse["delta"] == pytest.approx(1.0)  # 1.0, 1.1 and 0.9
    assert worse["delta_95"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # t of two degrees of freedom
    # Differences 0.1, 0, -0.1: their mean is 0. Those of `better` are -0.5 each: no spread at all.
    assert (noise["delta"], better["delta"], better["delta_95"]) == pytest.approx((0.0, -0.5, 0.0))
    assert (worse["verdict"], noise["verdict"], better["verdict"]) == ("worse", "within noise", "better")
    assert full["seconds_per_step"] == 0.02  # the median of 10, 30 and 20 ms
    assert full["peak_memory_bytes"] == 102 * 2**20


def test_seeds_that_only_one_row_has() -> None:
    """Guards against a difference between seed 2 of one row and seed 1 of another."""
    rows = rows_of(
        full=results(3.0, 3.5),
        late=results(4.0, 4.4, first_seed=1),
        other=results(1.0, first_seed=7),
        missing={},
    )
    _, late, other, missing = (row.figures for row in rows)
    assert (late["delta"], late["delta_95"], late["verdict"]) == (0.5, None, "")
    assert (other["bits_per_character"], other["delta"], other["standard_deviation"]) == (1.0, None, None)
    assert (missing["bits_per_character"], missing["delta"], missing["seconds_per_step"]) == (None, None, None)


def test_markdown() -> None:
    """Guards against cells under another column's name, lost failures, and the paper's figures at another row."""
    rows = rows_of({"full": 1.062, "worse": 2.482}, **MEASURED)
    rows[2] = replace(rows[2], failures=["noise, seed 4: out of memory (a.log)"])
    text = to_markdown(rows, ["Scored on something."])
    table = table_cells(text)
    assert text.startswith("Scored on something.\n\n| row ")
    assert table[0] == [
        "row", "bits per character", "Δ", "verdict", "ms per step", "CPU s", "peak memory", "seeds",
        "paper: T64, text8 dev", "paper's Δ",
    ]  # fmt: skip
    assert table[2] == ["full", "3.1000 ± 0.1000", "", "", "20.0", "200", "102 MiB", "3", "1.062", ""]
    assert table[3] == [
        "worse", "4.1000 ± 0.1000", "+1.0000 ± 0.2484", "worse", "20.0", "200", "102 MiB", "3", "2.482", "+1.420",
    ]  # fmt: skip
    assert table[4][3:] == ["within noise", "20.0", "200", "102 MiB", "3", "", ""]
    assert text.endswith("Failed:\n\n- noise, seed 4: out of memory (a.log)\n")
    assert "paper" not in to_markdown(rows_of(**MEASURED), [])


def test_csv() -> None:
    """Guards against rounded figures, and seeds under another's name."""
    table = rows_of(full=MEASURED["full"], worse=results(4.0, 1 / 3, first_seed=1), none={})
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["row"] for row in rows] == ["full", "worse", "none"]
    assert (rows[1]["seed_0"], rows[1]["seed_1"], float(rows[1]["seed_2"])) == ("", "4.0", 1 / 3)
    assert float(rows[0]["bits_per_byte"]) == pytest.approx(2.6)
    assert float(rows[1]["delta"]) == pytest.approx((0.9 + 1 / 3 - 3.2) / 2)
    assert (rows[2]["bits_per_character"], rows[2]["seeds"]) == ("", "0")


def test_protocol() -> None:
    """Guards against scores of unlike protocols in one table without a word."""

    def run_of(name: str, context_length: int, batch_size: int) -> VariantRun:
        train = TrainConfig(steps=500, batch_size=batch_size)
        return VariantRun(Variant(name), 0, Config(model=ModelConfig(context_length=context_length), train=train))

    a, b, c = run_of("a", 64, 4), run_of("b", 128, 2), run_of("c", 64, 4)
    (shared,) = protocols([a, c])
    assert shared.startswith("Scored on the first 200,000 symbols of the valid split of enwik8, context 64, stride 32")
    apart = protocols([a, b, c])
    assert [line.partition(":")[0] for line in apart] == ["a, c", "b"] and "context 128, stride 64" in apart[1]


def test_picture(tmp_path, monkeypatch) -> None:
    """Guards against rows that are lost or mislabelled, and one far outside that squashes the rest."""
    drawn = []
    monkeypatch.setattr("charlm.ablation.table.save", lambda figure, path: drawn.append(figure) or path)
    rows = rows_of(**MEASURED, far=results(9.0, 9.1, 9.2), none={})
    assert draw(rows, tmp_path / "table.png") == tmp_path / "table.png"
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*MEASURED, "far"]
    left, right = axes.get_xlim()
    assert left < 2.5 and 4.2 < right < 5
    seeds = [x for line in axes.get_lines() if line.get_marker() == "o" for x in line.get_xdata()]
    assert len(seeds) == 15 and sum(left < x < right for x in seeds) == 12
    assert [text.get_text() for text in axes.texts] == [
        "3.100", "4.100  +1.000*", "3.100  +0.000", "2.600  -0.500*", "9.100  +6.000*",
    ]  # fmt: skip
