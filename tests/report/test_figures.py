"""The pictures: what they show, taken from the figures' own data."""

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
from charlm.report.figures import COLUMNS, draw_run, draw_table, read_curves, run_figure, table_figure
from charlm.runs.folder import Run


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


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(config_of(tmp_path / "little"), corpus={"name": "file"})


def add(run, *rows):
    for row in rows:
        run.append_metrics(row)


def lines_of(figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].get_lines()}


def heat_map(figure):
    return next(axes for axes in figure.axes if axes.images and axes.get_xlabel() == "optimizer steps").images[0]


def test_curves_hold_every_row(run):
    """Fault: training and validation mixed up, points dropped, or the best validation misnamed in the title."""
    add(run, *(training_row(step, 8 - step / 20) for step in range(1, 101)))
    add(run, validation_row(50, 6.25), validation_row(75, 4.125), validation_row(100, 4.5))
    figure = run_figure("little", run.config(), read_curves(run))
    lines = lines_of(figure)
    assert lines["training"] == [(step, 8 - step / 20) for step in range(1, 101)]
    assert lines["validation"] == [(50, 6.25), (75, 4.125), (100, 4.5)]
    # 100 points are smoothed over three; a straight line stays one except at its two ends.
    assert lines["training, smoothed"][1:-1] == [(s, pytest.approx(8 - s / 20)) for s in range(2, 100)]
    assert lines["training, smoothed"][0] == (1, pytest.approx((7.95 + 7.9) / 2))
    assert figure.get_suptitle() == "little: validation 4.125 bits per character after 75 steps"
    assert figure.axes[0].get_xlim() == (0, 100)


def test_heat_map_shows_the_table():
    """Fault: rows upside down, lost or doubled; a term drawn where it is silent; a wrong weight."""
    image = heat_map(table_figure(config_of("unused")))
    shown = image.get_array()
    # Per offset the deepest layer on top; layer 1 of 2 stops after a quarter, an extra target weighs 0.5.
    quarter = np.arange(COLUMNS) < COLUMNS // 4
    assert shown.shape == (4, COLUMNS)
    assert not shown[0].mask.any() and (shown[0] == 1.0).all()
    assert (shown[1].mask == ~quarter).all() and (shown[1][quarter] == 1.0).all()
    assert not shown[2].mask.any() and (shown[2] == 0.5).all()
    assert (shown[3].mask == ~quarter).all() and (shown[3][quarter] == 0.5).all()
    assert image.get_extent() == [0, 100, 3.5, -0.5]
    assert image.get_clim() == (0.0, 1.0)


def test_heat_map_keeps_both_kinds_of_positions_apart():
    """Fault: rows of the last position drawn over those of all positions."""
    aux = {"positions": PositionsConfig(schedule="linear"), "layers": LayersConfig(schedule="cosine")}
    config = config_of("unused", num_layers=3, **aux)
    figure = table_figure(config)
    assert heat_map(figure).get_array().shape[0] == len(build_terms(config.aux, 3)) == 12
    axes = heat_map(figure).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "2", "1"] * 4
    labels = ["next character, all positions", "next character, last position"]
    labels += ["2 ahead, all positions", "2 ahead, last position"]
    assert [text.get_text() for text in axes.texts if text.get_text() != "layer"] == labels


def test_deep_models_keep_legible_labels():
    """Fault: 128 labels printed over each other."""
    axes = heat_map(table_figure(config_of("unused", num_layers=64))).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [str(layer) for layer in range(64, 0, -4)] * 2


def test_draw_run_writes_a_picture(run, tmp_path):
    """Fault: no file, another place than the one returned, or an empty picture."""
    add(run, training_row(1, 8.0), training_row(2, 7.5), validation_row(2, 7.6))
    assert draw_run(run.path) == run.path / "run.png"
    assert (run.path / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    elsewhere = tmp_path / "new" / "curves.svg"
    assert draw_run(run.path, elsewhere) == elsewhere
    assert "<svg" in elsewhere.read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [training_row(10, 5.0)],
        [validation_row(10, 5.0)],
        [training_row(10, 5.0), training_row(20, float("nan")), training_row(30, 4.0), validation_row(30, 4.1)],
    ],
)
def test_draws_what_there_is(run, tmp_path, rows):
    """Fault: a run that was not validated yet, was logged only once, or diverged for a while cannot be drawn."""
    add(run, *rows)
    assert draw_run(run.path).stat().st_size > 10_000
    if len(rows) > 1:
        assert read_curves(run).train_steps == [10, 30]


def test_a_resumed_run_is_one_curve(run):
    """Fault: the steps that a resumed run repeats are drawn twice, or a line cut short by a kill stops the drawing."""
    add(run, *(training_row(step, 6.0) for step in (10, 20, 30)), validation_row(30, 6.0))
    with run.metrics_path.open("a") as file:
        file.write('{"step": 40, "bits_per')
    assert read_curves(run).train_steps == [10, 20, 30]
    run.forget_metrics_after(20)
    add(run, training_row(30, 5.0), validation_row(30, 5.5))
    curves = read_curves(run)
    assert (curves.train_steps, curves.train_bits) == ([10, 20, 30], [6.0, 6.0, 5.0])
    assert (curves.valid_steps, curves.valid_bits) == ([30], [5.5])


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "progress": 0.01, "loss": 1.0, "terms": {}}\n'])
def test_a_run_without_metrics_is_the_users_to_mend(run, content):
    """Fault: a traceback, or an empty picture, for a run that has not logged anything yet."""
    if content is not None:
        run.metrics_path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl.*trained"):
        draw_run(run.path)
    assert not (run.path / "run.png").exists()


def test_bad_places_are_the_users_to_mend(tmp_path):
    """Fault: a traceback for a folder that is no run, an unknown suffix or a folder that cannot be made."""
    with pytest.raises(UserError, match="not a run"):
        draw_run(tmp_path)
    with pytest.raises(UserError, match=r"weights\.docx.*png"):
        draw_table(config_of("unused"), tmp_path / "weights.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw_table(config_of("unused"), tmp_path / "file" / "weights.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_matplotlib_is_loaded_only_to_draw():
    """Fault: every start of training waits for matplotlib, or fails where it is missing."""
    code = f"import sys, {figures.__name__}; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
