"""The pictures: what they show, taken from the figures' own data."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from charlm.config import (
    AuxConfig,
    Config,
    LayersConfig,
    ModelConfig,
    PositionsConfig,
    RunConfig,
    TrainConfig,
    UserError,
)
from charlm.objective.terms import build_terms
from charlm.report import figures
from charlm.report.figures import HEAT_COLUMNS, diagnostics, draw_diagnostics, draw_run, run_figure, thinned, weights
from charlm.report.metrics import read_runs
from charlm.report.style import PICTURE, save
from charlm.runs.folder import Run

CORPUS = {"name": "file", "sha256": "0"}


def config_of(path, num_layers=2, **aux) -> Config:
    return Config(
        model=ModelConfig(num_layers=num_layers, d_model=8, context_length=16),
        aux=AuxConfig(**aux),
        train=TrainConfig(steps=100, batch_size=4),
        run=RunConfig(dir=path),
    )


def training_row(step, bits):
    return {"step": step, "progress": step / 100, "loss": 3.0, "bits_per_character": bits, "terms": {}}


def validation_row(step, bits):
    return {"step": step, "progress": step / 100, "valid": {"bits_per_character": bits, "bits_per_byte": bits}}


def diagnosis(step: int, num_layers: int, shift: float = 0.0, **others) -> dict:
    """The row of a run with heads on all layers for two offsets, and one output."""
    layers = [f"layer{layer}" for layer in range(1, num_layers + 1)]
    bits = {
        f"{layer}/offset{offset}": 9 - place + offset + shift for place, layer in enumerate(layers) for offset in (1, 2)
    }
    ratios = {layer: (place + 1) / num_layers for place, layer in enumerate(layers)}
    record = {"symbols": 500, "bits_per_character": bits, "windows": 16, "supervision_ratio": ratios}
    record |= {"gradient_norm": dict.fromkeys(layers, 2.0 + shift)} | others
    return {"step": step, "progress": step / 100, "diagnostics": record}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(config_of(tmp_path / "little"), CORPUS)


def add(run, *rows):
    for row in rows:
        run.append_metrics(row)


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def panels_of(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    titled = {axes.get_title(loc="left"): lines_of(axes) for axes in figure.axes}
    return {title: lines for title, lines in titled.items() if title}


def heat_map(figure):
    return figure.axes[0].images[0]


def test_curves_hold_every_row(run):
    """Fault: training and validation mixed up, points dropped, or the best validation misnamed in the title."""
    add(run, *(training_row(step, 8 - step / 20) for step in range(1, 101)))
    add(run, validation_row(50, 6.25), validation_row(75, 4.125), validation_row(100, 4.5))
    figure = run_figure(*read_runs([run.path]))
    lines = lines_of(figure.axes[0])
    assert lines["training"] == [(step, 8 - step / 20) for step in range(1, 101)]
    assert lines["validation"] == [(50, 6.25), (75, 4.125), (100, 4.5)]
    assert len(lines["training, smoothed"]) == 80
    assert all(bits == pytest.approx(8 - step / 20) for step, bits in lines["training, smoothed"])
    assert figure.get_suptitle() == "little: validation 4.125 bits per character after 75 steps"
    assert figure.axes[0].get_xlim() == (0, 100)


def test_heat_map_shows_the_table():
    """Fault: rows upside down, lost or doubled; a term drawn where it is silent; a wrong weight."""
    image = heat_map(weights(config_of("unused"), PICTURE))
    # Per offset the deepest layer on top; layer 1 of 2 stops after a quarter, an extra target weighs 0.5.
    whole, quarter = np.ones(HEAT_COLUMNS), np.arange(HEAT_COLUMNS) < HEAT_COLUMNS // 4
    expected = np.array([whole, quarter, 0.5 * whole, 0.5 * quarter])
    shown = image.get_array()
    assert (shown.filled(0.0) == expected).all() and (shown.mask == (expected == 0)).all()
    assert image.get_extent() == [0, 100, 3.5, -0.5]
    assert image.get_clim() == (0.0, 1.0)


def test_heat_map_keeps_both_kinds_of_positions_apart():
    """Fault: rows of the last position drawn over those of all positions."""
    aux = {"positions": PositionsConfig(schedule="linear"), "layers": LayersConfig(schedule="cosine")}
    config = config_of("unused", num_layers=3, **aux)
    image = heat_map(weights(config, PICTURE))
    assert image.get_array().shape[0] == len(build_terms(config.aux, 3)) == 12
    assert [label.get_text() for label in image.axes.get_yticklabels()] == ["3", "2", "1"] * 4
    labels = ["next character", "next character, last position", "2 ahead", "2 ahead, last position"]
    assert [text.get_text() for text in image.axes.texts if text.get_text() != "layer"] == labels


def test_deep_models_keep_legible_labels():
    """Fault: 128 labels printed over each other."""
    axes = heat_map(weights(config_of("unused", num_layers=64), PICTURE)).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [str(layer) for layer in range(64, 0, -4)] * 2


def test_every_diagnostic_is_a_point(run):
    """Fault: layers or offsets mixed up, points lost where a layer has nothing at some steps, panels of nothing."""
    add(run, diagnosis(50, 2, gradient_cosine={"layer1": -0.5}), diagnosis(100, 2, shift=-1.0))
    assert panels_of(diagnostics(*read_runs([run.path]), PICTURE)) == {
        "bits per character, next character": {"layer 1": [(50, 10), (100, 9)], "layer 2": [(50, 9), (100, 8)]},
        "bits per character after 100 steps": {"next character": [(1, 9), (2, 8)], "2 ahead": [(1, 10), (2, 9)]},
        "supervision ratio, all outputs": {"layer 1": [(50, 0.5), (100, 0.5)], "layer 2": [(50, 1), (100, 1)]},
        "cosine, auxiliary and main gradient": {"layer 1": [(50, -0.5)]},
        "gradient norm": {"layer 1": [(50, 2), (100, 1)], "layer 2": [(50, 2), (100, 1)]},
    }


@pytest.mark.parametrize("ratios", [(0.9, 4.0), (0.06, 0.3), (1.0, 1.05), (0.5, 0.9), (0.001, 1.0)])
def test_logarithmic_panels_have_ticks(run, ratios):
    """Fault: a panel with one tick, because its values span less than a decade."""
    add(run, diagnosis(50, 2, supervision_ratio={"layer1": ratios[0], "layer2": ratios[1]}))
    figure = diagnostics(*read_runs([run.path]), PICTURE)
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "supervision ratio, all outputs")
    bottom, top = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if bottom <= tick <= top]) >= 3


def test_reads_what_shards_leave(run):
    """Fault: a run in shards, whose diagnostics are bits per character alone, cannot be drawn."""
    add(run, diagnosis(10, 2) | {"diagnostics": {"bits_per_character": {"layer2/offset1": 3.0}}})
    assert panels_of(diagnostics(*read_runs([run.path]), PICTURE)) == {
        "bits per character, next character": {"layer 2": [(10, 3)]},
        "bits per character after 10 steps": {"next character": [(2, 3)]},
    }


@pytest.mark.parametrize("num_layers", [1, 64])
def test_draws_pictures_of_any_depth(num_layers, tmp_path):
    """Fault: a single layer or row that has no range to draw over; no file where it is said to be."""
    run = Run.create(config_of(tmp_path / "run", num_layers), CORPUS)
    add(run, training_row(1, 8.0), training_row(2, 7.5), validation_row(2, 7.6), diagnosis(50, num_layers))
    for draw, name in ((draw_run, "run.png"), (draw_diagnostics, "diagnostics.png")):
        assert draw(run.path) == run.path / name
        assert (run.path / name).read_bytes().startswith(b"\x89PNG")
    elsewhere = tmp_path / "new" / "curves.svg"
    assert draw_run(run.path, elsewhere) == elsewhere
    assert "<svg" in elsewhere.read_text()


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        ([training_row(10, 5.0)], [10]),
        ([validation_row(10, 5.0)], []),
        ([training_row(10, 5.0), training_row(20, math.nan), training_row(30, 4.0)], [10, 30]),
    ],
)
def test_draws_what_there_is(run, rows, steps):
    """Fault: a run that was not validated yet, was logged only once, or diverged for a while cannot be drawn."""
    add(run, *rows)
    assert [step for step, _ in lines_of(run_figure(*read_runs([run.path])).axes[0])["training"]] == steps
    assert draw_run(run.path).stat().st_size > 10_000


def test_lines_are_thinned_by_means():
    """Fault: a line of a long run that fills the page, leaves out what is between its points, or seems to differ from
    another because it is smoothed more."""
    x, y = thinned(np.arange(1000.0), np.arange(1000.0) * 2, most=100)
    assert len(x) == 100 and x[0] == 4.5 and y[0] == 9.0
    steps = np.arange(1.0, 401.0)
    whole, early = (thinned(x, np.sin(x), 80, end=400.0) for x in (steps, steps[:100]))
    assert len(whole[0]) == 80 and len(early[0]) == 21
    assert [part[:20].tolist() for part in early] == [part[:20].tolist() for part in whole]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "progress": 0.01, "loss": 1.0, "terms": {}}\n'])
@pytest.mark.parametrize("draw", [draw_run, draw_diagnostics])
def test_a_run_without_metrics_is_the_users_to_mend(run, draw, content):
    """Fault: a traceback, or an empty picture, for a run that has not logged anything yet."""
    if content is not None:
        run.metrics_path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no"):
        draw(run.path)
    assert list(run.path.glob("*.png")) == []


def test_bad_places_are_the_users_to_mend(tmp_path):
    """Fault: a traceback for a folder that is no run, an unknown suffix or a folder that cannot be made."""
    with pytest.raises(UserError, match="not a run"):
        draw_run(tmp_path)
    with pytest.raises(UserError, match=r"weights\.docx.*png"):
        save(weights(config_of("unused"), PICTURE), tmp_path / "weights.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(weights(config_of("unused"), PICTURE), tmp_path / "file" / "weights.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_matplotlib_is_loaded_only_to_draw():
    """Fault: every start of training waits for matplotlib, or fails where it is missing."""
    code = f"import sys, {figures.__name__}; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
